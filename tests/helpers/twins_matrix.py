"""Slow NumPy twins of the rules on matrices, from the papers; see twins.py."""

from __future__ import annotations

import numpy as np
import twins


def orthogonalised(x, triples, eps, preconditioning):
    """Newton-Schulz on one matrix, seen as a polynomial of its singular values."""
    left, s, right = np.linalg.svd(x, full_matrices=False)
    if preconditioning == "frobenius":
        s = s / (np.sqrt(np.sum(s**2)) + eps)
    elif preconditioning == "spectral":
        s = s / (s.max() + eps)
    elif preconditioning == "schatten":
        s = s / np.sqrt(max(np.sqrt(np.sum(s**4)), eps**2))
    else:
        wide = x if x.shape[0] <= x.shape[1] else x.T
        wide = wide / np.sqrt(np.maximum(np.abs(wide @ wide.T).sum(axis=1, keepdims=True), eps**2))
        left, s, right = np.linalg.svd(wide if wide.shape == x.shape else wide.T, full_matrices=False)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (left * s) @ right


def muon(p, grads, learning_rate, weight_decay=0.0, *, ns_steps, beta, eps, nesterov, adaptive,
         bias_correction, consistent_rms, adam_b1, adam_b2, adam_eps, adam_eps_root, adam_nesterov,
         adam_rate=None, preconditioning="frobenius", adams=lambda p: p.ndim < 2):  # fmt: skip
    if adams(p):
        rate = learning_rate if adam_rate is None else adam_rate
        return twins.adam(p, grads, rate, b1=adam_b1, b2=adam_b2, eps=eps if adam_eps is None else adam_eps,
                          eps_root=adam_eps_root, nesterov=nesterov and adam_nesterov)  # fmt: skip
    triples = [(3.4445, -4.7750, 2.0315)] * ns_steps
    m, out = np.zeros_like(p), []
    rows, columns = p.shape[-2:]
    scale = np.sqrt(max(1, columns / rows)) if consistent_rms is None else consistent_rms * np.sqrt(max(rows, columns))
    for t, g in enumerate(grads, start=1):
        m = beta * m + (1 - beta) * g
        now, following = (1 - beta**t, 1 - beta ** (t + 1)) if bias_correction else (1, 1)
        mean = beta * m / following + (1 - beta) * g / now if nesterov else m / now
        u = np.zeros_like(p)
        for i in np.ndindex(p.shape[:-2]):
            u[i] = orthogonalised(mean[i], triples, eps, preconditioning)
            if adaptive:
                u[i] *= np.sum(mean[i] * u[i])
        p = p - learning_rate * (scale * u + weight_decay * p)
        out.append(p)
    return out


def optax_muon(*args, **hyper):
    return muon(*args, **hyper, adams=lambda p: p.ndim != 2)


def muon_jordan(*args, **hyper):
    return muon(*args, **hyper, adam_rate=3e-4)


def eigenvectors(x):
    """Largest eigenvalue first; in the null space Gram-Schmidt on cosines, the identity if there is nothing else."""
    n = len(x)
    values, vectors = np.linalg.eigh(x)
    kept = [vectors[:, i] for i in range(n)[::-1] if values[i] > 8 * n * 2.0**-52 * values[-1]]
    if not values[-1] > 0:
        return np.eye(n)
    while len(kept) < n:
        column = np.cos(np.pi / n * (np.arange(n) + 0.5) * len(kept))
        for _ in range(2):
            for q in kept:
                column = column - q * (q @ column)
        kept.append(column / np.linalg.norm(column))
    return np.stack(kept, axis=1)


def soap(p, grads, learning_rate, weight_decay=0.0, *, b1, b2, eps, shampoo_beta, precondition_frequency,
         max_precond_dim, bias_correction):  # fmt: skip
    """As the authors' code: the momentum lives in the rotated space and is carried over when the basis moves."""
    if p.ndim > 2:
        arguments = {k: v for k, v in locals().items() if k not in ("p", "grads")}
        parts = [soap(p[i], grads[:, i], **arguments) for i in range(len(p))]
        return [np.stack(step) for step in zip(*parts, strict=True)]
    decay = b2 if shampoo_beta is None else shampoo_beta
    sides = [p.ndim == 2 and n <= max_precond_dim for n in p.shape]
    factors = [np.zeros((n, n)) if side else None for n, side in zip(p.shape, sides, strict=True)]
    bases, m, v, out = None, np.zeros_like(p), np.zeros_like(p), []

    def clear(x, size):
        """Without what rounding leaves in the place of a zero."""
        if all(f is None for f in factors):
            return x
        return np.where(np.abs(x) > 64 * 2.0**-52 / np.sqrt(max(p.shape)) * np.linalg.norm(size), x, 0)

    def turn(x, inverse=False):
        for q in bases:  # each product moves the next axis to the front, so that after all of them x is upright
            x = np.moveaxis(x, 0, -1) if q is None else np.tensordot(x, q, ([0], [1 if inverse else 0]))
        return x

    for step, g in enumerate(grads):
        if step > 0:
            m = b1 * m + (1 - b1) * turn(g)
            v = b2 * v + (1 - b2) * clear(turn(g), g) ** 2
            rate = learning_rate
            if bias_correction:
                rate = learning_rate * np.sqrt(1 - b2**step) / (1 - b1**step)
            p = p - rate * turn(clear(m, m) / (np.sqrt(v) + eps), inverse=True)
            p = p - learning_rate * weight_decay * p
            m = turn(m, inverse=True)
        for axis, factor in enumerate(factors):
            if factor is not None:
                other = [a for a in range(g.ndim) if a != axis]
                factors[axis] = decay * factor + (1 - decay) * np.tensordot(g, g, (other, other))
        if step == 0:
            bases = [None if f is None else eigenvectors(f) for f in factors]
        elif step % precondition_frequency == 0:
            for axis, (factor, q) in enumerate(zip(factors, bases, strict=True)):
                if factor is not None:
                    order = np.argsort(-np.diag(q.T @ factor @ q), kind="stable")
                    v = np.take(v, order, axis=axis)
                    bases[axis] = np.linalg.qr(factor @ q[:, order])[0]
        if step > 0:
            m = turn(m)
        out.append(p)
    return out


def shampoo(p, grads, learning_rate, weight_decay=0.0, *, eps, precondition_frequency, graft, max_precond_dim):
    if p.ndim > 2:
        arguments = {k: v for k, v in locals().items() if k not in ("p", "grads")}
        parts = [shampoo(p[i], grads[:, i], **arguments) for i in range(len(p))]
        return [np.stack(step) for step in zip(*parts, strict=True)]
    sides = [axis for axis in range(p.ndim) if p.ndim == 2 and p.shape[axis] <= max_precond_dim]
    factors = {axis: eps * np.eye(p.shape[axis]) for axis in sides}
    roots, total, out = {}, np.zeros_like(p), []
    for step, g in enumerate(grads):
        total = total + g**2
        adagrad = g / np.sqrt(eps + total)
        for axis in sides:
            factors[axis] = factors[axis] + (g @ g.T if axis == 0 else g.T @ g)
            if step % precondition_frequency == 0:
                values, vectors = np.linalg.eigh(factors[axis])
                roots[axis] = vectors @ np.diag(np.maximum(values, eps) ** (-1 / (2 * len(sides)))) @ vectors.T
        u = adagrad
        if sides:
            u = g
            for axis in sides:
                u = roots[axis] @ u if axis == 0 else u @ roots[axis]
            if graft:
                u = u * np.linalg.norm(adagrad) / (np.linalg.norm(u) or 1)
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


TWINS = {"shampoo": shampoo, "soap": soap, "muon": muon, "optax_muon": optax_muon, "muon_jordan": muon_jordan}
