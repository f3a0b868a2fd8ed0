"""A slow NumPy twin of PSGD, from the papers (arXiv:1512.04202, 1809.10232); see twins.py.

The noise that the preconditioner is fitted against is data here: drawn by the step and by the name of the leaf.
"""

from __future__ import annotations

import zlib

import jax
import numpy as np

NAMES = {(): "scalar", (7,): "vector", (5, 3): "matrix", (4, 3, 2): "cube"}
"""The leaves of the laws' tree by their shapes."""


def noise(name, shape, step, key=0):
    """The draw of a step (from 1) for a leaf."""
    drawn = jax.random.fold_in(jax.random.fold_in(jax.random.key(key), step), zlib.crc32(name.encode()))
    return np.asarray(jax.random.normal(drawn, shape, np.float64))


def spectral_below(x):
    """||x|| from below, of a symmetric matrix: from its longest column one step of the power iteration."""
    y = x / np.abs(x).max()
    v = y @ y[:, np.argmax((y**2).sum(0))]
    return np.abs(x).max() * np.linalg.norm(y @ v / np.linalg.norm(v))


def along(q, x, axis):
    """The linear map of a factor (its diagonal, or all of it) along one axis of x."""
    whole = np.diag(q) if q.ndim == 1 else q
    return np.moveaxis(np.tensordot(whole, x, ([1], [axis])), 0, axis)


def inverse_transposed(q):
    return 1 / q if q.ndim == 1 else np.linalg.inv(q).T


def kron(p, grads, learning_rate, weight_decay=0.0, *, b1, preconditioner_update_probability, max_size_triangular,
         min_ndim_triangular, momentum_into_precond_update, precond_lr, precond_init_scale, merge_dims, key,
         memory_save_mode=None, name=None, noises=None):  # fmt: skip
    name = NAMES[p.shape] if name is None else name
    if noises is None:
        noises = [noise(name, p.shape, t, key) for t in range(1, len(grads) + 1)]
    given = {k: v for k, v in locals().items() if k not in ("p", "grads", "noises", "given")}
    if p.ndim > 2 and not merge_dims:
        parts = [kron(p[i], grads[:, i], noises=[v[i] for v in noises], **given) for i in range(len(p))]
        return [np.stack(step) for step in zip(*parts, strict=True)]
    shape = p.shape if p.ndim < 3 else (p.size // p.shape[-1], p.shape[-1])
    longest = max(range(len(shape)), key=lambda axis: (shape[axis], axis), default=None)
    factors = []
    for axis, size in enumerate(shape):
        diagonal = size == 1 or size > max_size_triangular or len(shape) < min_ndim_triangular
        if memory_save_mode == "all_diag" or (memory_save_mode == "one_diag" and axis == longest):
            diagonal = True
        if memory_save_mode == "smart_one_diag" and axis == longest and len(shape) > 1 and len(set(shape)) > 1:
            diagonal = True
        begun = np.ones(size) if diagonal else np.eye(size)
        factors.append(precond_init_scale ** (1 / len(shape)) * begun)
    if not shape:  # a number is a vector of one
        shape, factors = (1,), [precond_init_scale * np.ones(1)]
    m, waited, out = np.zeros(shape), 0, []
    for t, g in enumerate(grads, start=1):
        g, v = g.reshape(shape), noises[t - 1].reshape(shape)
        m = b1 * m + (1 - b1) * g
        mean = m / (1 - b1**t)
        seen = mean if momentum_into_precond_update else g
        rate = preconditioner_update_probability
        if callable(rate):
            rate = rate(t - 1)
        if rate is None:
            rate = min(max(np.exp(-0.001 * (t - 1 - 500)), 0.03), 1)
        waited += 1
        if waited >= 1 / rate:
            waited = 0
            if np.any(seen != 0):
                damping = np.sqrt(2.0**-23)  # of float32
                a, b = seen + damping * np.mean(np.abs(seen)) * v, v
                for axis, q in enumerate(factors):
                    a, b = along(q, a, axis), along(inverse_transposed(q), b, axis)
                for axis, q in enumerate(factors):
                    others = [i for i in range(len(shape)) if i != axis]
                    ours, theirs = (np.tensordot(x, x, (others, others)) for x in (a, b))
                    if q.ndim == 1:
                        ours, theirs = np.diag(ours), np.diag(theirs)
                        factors[axis] = q - precond_lr * (ours - theirs) * q / np.max(ours + theirs)
                    else:
                        size = spectral_below(ours + theirs)
                        factors[axis] = q - precond_lr / size * np.triu(ours - theirs) @ q
        u = mean
        for axis, q in enumerate(factors):
            u = along(q**2 if q.ndim == 1 else q.T @ q, u, axis)
        u = u * min(1, 1.1 / (np.sqrt(np.mean(u**2)) + 1e-12))
        p = p - learning_rate * (u.reshape(p.shape) + weight_decay * p)
        out.append(p)
    return out


TWINS = {"kron": kron}
