"""Slow NumPy twins, as in `twins.py`, of the rules that follow torch.optim."""

from __future__ import annotations

import numpy as np


def torch_rprop(p, grads, learning_rate, weight_decay=0.0, *, eta_minus=0.5, eta_plus=1.2, min_step_size=1e-6,
                max_step_size=50.0):  # fmt: skip
    before, steps, out = np.zeros(p.size), [learning_rate] * p.size, []
    for g in grads:
        g, x = g.flatten(), p.flatten()
        for i in range(p.size):
            turned = g[i] * before[i] < 0
            grown = eta_minus if turned else eta_plus if g[i] * before[i] > 0 else 1.0
            steps[i] = min(max(steps[i] * grown, min_step_size), max_step_size)
            if turned:
                g[i] = 0.0
            x[i] = x[i] - steps[i] * np.sign(g[i]) - learning_rate * weight_decay * x[i]
        before = g
        p = x.reshape(p.shape)
        out.append(p)
    return out


def torch_adafactor(p, grads, learning_rate, weight_decay=0.0, *, decay_rate=0.8, eps1=None, eps2=1e-3, d=1.0):
    eps1 = 2.0**-52 if eps1 is None else eps1
    rms = lambda x: np.sqrt(np.mean(x**2))
    rows = columns = v = 0.0
    out = []
    for t, g in enumerate(grads, start=1):
        keep = 1 - t**-decay_rate
        if g.ndim < 2:
            v = keep * v + (1 - keep) * g**2
            estimate = v
        else:
            rows = keep * rows + (1 - keep) * np.mean(g**2, axis=-1)
            columns = keep * columns + (1 - keep) * np.mean(g**2, axis=-2)
            total = np.maximum(np.mean(rows, axis=-1), eps1)
            estimate = np.einsum("...i,...j->...ij", rows, columns) / total[..., None, None]
        u = g / np.maximum(np.sqrt(estimate), eps1)
        step = max(eps2, rms(p)) * min(learning_rate, 1 / np.sqrt(t))
        p = p - learning_rate * weight_decay * p - step * u / max(1.0, rms(u) / d)
        out.append(p)
    return out


def torch_sparse_adam(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8):
    shape, out = p.shape, []
    p = p.reshape(-1, 1) if p.ndim < 2 else p.copy()  # what has no rows is made of rows of one number
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        p = p.copy()
        for i, row in enumerate(g.reshape(p.shape)):
            if np.all(row == 0):
                continue
            m[i] = b1 * m[i] + (1 - b1) * row
            v[i] = b2 * v[i] + (1 - b2) * row**2
            u = m[i] / (1 - b1**t) * np.sqrt(1 - b2**t) / (np.sqrt(v[i]) + eps)
            p[i] = p[i] - learning_rate * (u + weight_decay * p[i])
        out.append(p.reshape(shape))
    return out


TWINS = {"torch_rprop": torch_rprop, "torch_adafactor": torch_adafactor, "torch_sparse_adam": torch_sparse_adam}
