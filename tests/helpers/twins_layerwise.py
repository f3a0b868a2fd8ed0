"""Slow NumPy twins, as in `twins.py`, of rules whose counterpart elsewhere is missing, wrong or random."""

from __future__ import annotations

import zlib

import jax
import numpy as np

NAMES = {shape: name for name, shape in {"scalar": (), "vector": (7,), "matrix": (5, 3), "cube": (4, 3, 2)}.items()}
"""The arrays of `laws.SHAPES` by their shapes: noise goes by the name of a leaf."""


def rprop(p, grads, learning_rate, weight_decay=0.0, *, eta_minus=0.5, eta_plus=1.2, min_step_size=1e-6,
          max_step_size=50.0):  # fmt: skip
    before, out = np.zeros(p.size), []
    steps = np.full(p.size, learning_rate)
    for g in grads:
        g = g.ravel().copy()
        x = p.ravel().copy()
        for i in range(p.size):
            if g[i] * before[i] > 0:
                steps[i] = min(max(steps[i] * eta_plus, min_step_size), max_step_size)
            elif g[i] * before[i] < 0:
                steps[i] = min(max(steps[i] * eta_minus, min_step_size), max_step_size)
                g[i] = 0
            x[i] -= steps[i] * np.sign(g[i]) + learning_rate * weight_decay * x[i]
        before = g
        p = x.reshape(p.shape)
        out.append(p)
    return out


def noisy_sgd(p, grads, learning_rate, weight_decay=0.0, *, eta=0.01, gamma=0.55, key=0):
    out = []
    for t, g in enumerate(grads, start=1):
        drawn = jax.random.fold_in(jax.random.fold_in(jax.random.key(key), t), zlib.crc32(NAMES[p.shape].encode()))
        noise = np.asarray(jax.random.normal(drawn, p.shape, p.dtype))
        p = p - learning_rate * (g + (eta / t**gamma) ** 0.5 * noise + weight_decay * p)
        out.append(p)
    return out


def adalomo(p, grads, learning_rate, weight_decay=0.0, *, decay_rate=0.8, clipping_threshold=1.0, eps=1e-30):
    *_, second, first = (0, 1) if p.ndim < 2 else sorted(range(p.ndim), key=lambda axis: p.shape[axis])
    r, c, v, out = 0.0, 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        decay = 1 - t**-decay_rate
        if p.ndim < 2:
            v = decay * v + (1 - decay) * (g**2 + eps)
        else:
            r = decay * r + (1 - decay) * (g**2 + eps).mean(first, keepdims=True)
            c = decay * c + (1 - decay) * (g**2 + eps).mean(second, keepdims=True)
            v = r * c / r.mean(second, keepdims=True)
        u = g / np.sqrt(v)
        u = u / max(1, np.sqrt(np.mean(u**2)) / clipping_threshold)
        rate = learning_rate * max(1e-3, np.sqrt(np.mean(p**2)))
        p = p - rate * weight_decay * p - rate * u
        out.append(p)
    return out


TWINS = {"rprop": rprop, "noisy_sgd": noisy_sgd, "adalomo": adalomo}
