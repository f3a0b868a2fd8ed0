"""Slow NumPy twins of Muon's kin, from the papers; see twins.py."""

from __future__ import annotations

import jax
import numpy as np
import twins


def orthogonal(x, steps, eps):
    """Newton-Schulz on one matrix, as written."""
    y = x / (np.sqrt(np.sum(x**2)) + eps)
    for _ in range(steps):
        gram = y @ y.T if len(y) <= len(y.T) else y.T @ y
        inner = -4.7750 * gram + 2.0315 * gram @ gram
        y = 3.4445 * y + (inner @ y if len(y) <= len(y.T) else y @ inner)
    return y


def each_matrix(twin):
    """A twin on one matrix, on a batch of them; Adam below two dimensions, without weight decay."""

    def whole(p, grads, learning_rate, weight_decay=0.0, *, adam_b1, adam_b2, adam_eps, **hyper):
        if p.ndim < 2:
            return twins.adam(p, grads, learning_rate, b1=adam_b1, b2=adam_b2, eps=adam_eps)
        out = [np.empty_like(p) for _ in grads]
        for i in np.ndindex(p.shape[:-2]):
            x = p[i]
            for t, u in enumerate(twin(p[i].shape, [g[i] for g in grads], **hyper)):
                x = x - learning_rate * (u + weight_decay * x)
                out[t][i] = x
        return out

    return whole


@each_matrix
def normuon(shape, grads, *, ns_steps, beta, beta2, eps, eps_nu, nesterov, consistent_rms):
    m, v = np.zeros(shape), np.zeros(shape[1])
    for g in grads:
        m = beta * m + (1 - beta) * g
        o = orthogonal(beta * m + (1 - beta) * g if nesterov else m, ns_steps, eps)
        for neuron in range(shape[1]):
            v[neuron] = beta2 * v[neuron] + (1 - beta2) * np.mean(o[:, neuron] ** 2)
        scaled = o / (np.sqrt(v) + eps_nu)
        if consistent_rms is None:
            size = np.linalg.norm(o) * max(1, shape[1] / shape[0]) ** 0.5
        else:
            size = consistent_rms * np.sqrt(o.size)
        yield size * scaled / (np.linalg.norm(scaled) or 1)


@each_matrix
def adamuon(shape, grads, *, ns_steps, beta, beta2, eps, eps_nu, nesterov, sign, consistent_rms):
    m, v = np.zeros(shape), np.zeros(shape)
    for g in grads:
        m = beta * m + g  # a sum, as in the paper: the signs are those of the average
        x = beta * m + g if nesterov else m
        o = orthogonal(np.sign(x) if sign else (1 - beta) * x, ns_steps, eps)
        o[np.abs(o) <= 512 * 2.0**-52 * np.sqrt(np.mean(o**2))] = 0  # rounding
        v = beta2 * v + (1 - beta2) * o**2
        scaled = o / (np.sqrt(v) + eps_nu)
        yield consistent_rms * np.sqrt(o.size) * scaled / (np.linalg.norm(scaled) or 1)


@each_matrix
def dion(shape, grads, *, rank_fraction, beta, eps, key):
    turned = shape[1] >= shape[0]  # the longer side has the orthonormal basis
    long, short = sorted(shape, reverse=True)
    rank = int(np.ceil(rank_fraction * short))
    m = np.zeros((long, short))
    q = np.array(jax.random.normal(jax.random.key(key), (short, rank), np.float64))
    for g in grads:
        b = m + (g.T if turned else g)
        image, basis = b @ q, np.zeros((long, 0))
        if np.any(b):
            basis = np.linalg.qr(image)[0]
        r, unit = b.T @ basis, np.zeros((short, rank))
        for j in range(basis.shape[1]):
            length = np.sqrt(np.sum(r[:, j] ** 2))
            if length > 64 * 2.0**-52 * np.sqrt(np.sum(b**2)):
                unit[:, j] = r[:, j] / (length + eps)
                q[:, j] = unit[:, j]
        m = b - (1 - beta) * basis @ r.T
        u = (basis @ unit[:, : basis.shape[1]].T) * np.sqrt(shape[1] / shape[0])
        yield u.T if turned else u


TWINS = {"normuon": normuon, "adamuon": adamuon, "dion": dion}
