"""Slow NumPy twins of the rules with low-rank or reduced state, from the papers; see twins.py.

Two things are taken from JAX because they are data here, not arithmetic: the signs of singular vectors, which a
solver chooses (the moments outlive a change of basis, so they matter), and the random numbers of a seed.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

NAMES = {(): "scalar", (7,): "vector", (5, 3): "matrix", (4, 3, 2): "cube"}


def svd(x):
    return tuple(np.asarray(part) for part in jnp.linalg.svd(jnp.asarray(x), full_matrices=False))


def leading(x, rank, left):
    """The leading singular vectors; for the singular value 0 cosines, by Gram and Schmidt."""
    u, s, vh = svd(x)
    basis, n = (u if left else vh.T)[:, :rank].copy(), x.shape[0 if left else 1]
    for j in range(rank):
        if s[j] <= max(x.shape) * np.finfo(x.dtype).eps * s[0]:
            column = np.cos(np.pi / n * (np.arange(n) + 0.5) * j)
            for _ in range(2):
                column = column - basis[:, :j] @ (basis[:, :j].T @ column)
            basis[:, j] = column / np.linalg.norm(column)
    return basis


def galore(p, grads, learning_rate, weight_decay=0.0, *, rank=128, update_proj_gap=200, scale=1.0, side="long",
           b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False, bias_correction=True):  # fmt: skip
    m, v, basis, out = 0.0, 0.0, np.zeros((0, 0)), []
    left = p.ndim == 2 and (p.shape[0] >= p.shape[1] if side == "long" else p.shape[0] <= p.shape[1])
    for t, g in enumerate(grads, start=1):
        if p.ndim == 2:
            if (t - 1) % update_proj_gap == 0:
                basis = leading(g, min(rank, *p.shape), left)
            g = basis.T @ g if left else g @ basis
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c1_next, c2 = (1 - b1**t, 1 - b1 ** (t + 1), 1 - b2**t) if bias_correction else (1, 1, 1)
        mean = b1 * m / c1_next + (1 - b1) * g / c1 if nesterov else m / c1
        u = mean / (np.sqrt(v / c2 + eps_root) + eps)
        if p.ndim == 2:
            u = scale * (basis @ u if left else u @ basis.T)
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def projections(shape, rank, gap, key, name):
    """The projections of steps 1, 2, ... of a leaf, from its seeds, for each matrix of a batch."""
    t = 0
    while True:
        t += 1
        if (t - 1) % gap == 0:
            step = jax.random.fold_in(jax.random.key(key), t)
            bits = np.asarray(jax.random.bits(jax.random.fold_in(step, zlib.crc32(name.encode())), (), np.uint32))
            drawn = jax.random.normal(jax.random.key(bits.view(np.int32)), (*shape[:-2], rank, min(shape[-2:])))
        yield np.asarray(drawn) / np.sqrt(rank)


def apollo(p, grads, learning_rate, weight_decay=0.0, *, rank=256, update_proj_gap=200, scale=1.0,
           scale_type="channel", b1=0.9, b2=0.999, eps=1e-6, growth=1.01, key=0, drawn=None):  # fmt: skip
    """One leaf. ``drawn`` yields the projection of each step, (..., rank, short axis); from the seed by default."""
    if p.ndim < 2:
        return _fused_adam(p, grads, learning_rate, weight_decay, b1, b2, eps)
    batch, short = p.shape[:-2], min(p.shape[-2:])
    if drawn is None and rank < short:
        drawn = projections(p.shape, rank, update_proj_gap, key, NAMES[p.shape])
    m, v, before, out = {i: 0.0 for i in np.ndindex(batch)}, {i: 0.0 for i in np.ndindex(batch)}, {}, []
    for t, g in enumerate(grads, start=1):
        u, made = np.zeros_like(p), None if drawn is None else next(drawn)
        for i in np.ndindex(batch):
            x = g[i] if p.shape[-2] <= p.shape[-1] else g[i].T
            r = x if made is None else made[i] @ x
            m[i], v[i] = b1 * m[i] + (1 - b1) * r, b2 * v[i] + (1 - b2) * r**2
            axis = 0 if scale_type == "channel" else None
            ratio = np.linalg.norm(m[i] / (np.sqrt(v[i]) + eps), axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
            x = x * ratio
            if growth:
                size = np.linalg.norm(x)
                if before.get(i, 0.0) > 0:
                    limit = max(size / (before[i] + 1e-8), growth) / growth
                    x, size = x / limit, size / limit
                before[i] = size
            u[i] = x if p.shape[-2] <= p.shape[-1] else x.T
        u = np.sqrt(scale) * u * np.sqrt(1 - b2**t) / (1 - b1**t)
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def apollo_mini(*args, **hyper):
    return apollo(*args, **{"rank": 1, "scale": 128.0, "scale_type": "tensor", **hyper})


def _fused_adam(p, grads, learning_rate, weight_decay, b1, b2, eps):
    """Adam with eps before the correction of its second moment, as the authors of APOLLO have it."""
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = m / (np.sqrt(v) + eps) * np.sqrt(1 - b2**t) / (1 - b1**t)
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def adam_mini(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8):
    """A leaf without a telling name: a block for each output, or one for a vector."""
    m, v, out = np.zeros_like(p), 0.0, []
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        block = np.mean(g**2, axis=-2, keepdims=True) if p.ndim > 1 else np.mean(g**2)
        v = b2 * v + (1 - b2) * block
        p = p - learning_rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * p)
        out.append(p)
    return out


TWINS = {"galore": galore, "apollo": apollo, "apollo_mini": apollo_mini, "adam_mini": adam_mini}
