"""Slow NumPy twins of rules made of rules. See twins.py."""

from __future__ import annotations

import numpy as np


def schedule_free_sgd(y, grads, learning_rate, weight_decay=0.0, *, b1=0.9, momentum=None, weight_lr_power=2.0,
                      r=0.0):  # fmt: skip
    x, z, b, total, highest, out = y.copy(), y.copy(), np.zeros_like(y), 0.0, 0.0, []
    for t, g in enumerate(grads):
        rate = learning_rate(t) if callable(learning_rate) else learning_rate
        highest = max(highest, rate)
        b = (momentum or 0.0) * b + g
        z = z - rate * (b + weight_decay * y)
        weight = (t + 1) ** r * highest**weight_lr_power
        total += weight
        x = (1 - weight / total) * x + weight / total * z
        y = b1 * x + (1 - b1) * z
        out.append(y)
    return out


def _adam_directions(grads, *, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False, bias_correction=True):
    m, v = 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c1_next, c2 = (1 - b1**t, 1 - b1 ** (t + 1), 1 - b2**t) if bias_correction else (1, 1, 1)
        mean = b1 * m / c1_next + (1 - b1) * g / c1 if nesterov else m / c1
        yield g, mean / (np.sqrt(v / c2 + eps_root) + eps)


def cautious_adam(p, grads, learning_rate, weight_decay=0.0, **hyper):
    out = []
    for g, u in _adam_directions(grads, **hyper):
        phi = (u * g > 0).astype(float)
        p = p - learning_rate * (u * phi / max(phi.mean(), 1e-3) + weight_decay * p)
        out.append(p)
    return out


def cautious_decay_adam(p, grads, learning_rate, weight_decay=0.0, **hyper):
    out = []
    for _, u in _adam_directions(grads, **hyper):
        p = p - learning_rate * (u + weight_decay * np.where(u * p >= 0, p, 0))
        out.append(p)
    return out


def _descend(p, directions, learning_rate, weight_decay):
    out = []
    for u in directions:
        p = p - learning_rate * (u(p) + weight_decay * p)
        out.append(p)
    return out


def _sgd(momentum, nesterov):
    b = 0.0

    def direction(g):
        nonlocal b
        if momentum is None:
            return g
        b = momentum * b + g
        return g + momentum * b if nesterov else b

    return direction


def grokfast_sgd(p, grads, learning_rate, weight_decay=0.0, *, alpha=0.98, lamb=2.0, momentum=None, nesterov=False):
    slow, walk, raised = grads[0], _sgd(momentum, nesterov), []
    for g in grads:
        slow = alpha * slow + (1 - alpha) * g
        raised.append(walk(g + lamb * slow))
    return _descend(p, [lambda _, u=u: u for u in raised], learning_rate, weight_decay)


def centralized_sgd(p, grads, learning_rate, weight_decay=0.0, *, momentum=None, nesterov=False):
    walk = _sgd(momentum, nesterov)
    centre = (lambda g: g - g.reshape(-1, g.shape[-1]).mean(0)) if p.ndim > 1 else (lambda g: g)
    return _descend(p, [lambda _, g=g: walk(centre(g)) for g in grads], learning_rate, weight_decay)


def adaptive_clip_sgd(p, grads, learning_rate, weight_decay=0.0, *, clipping=0.01, eps_clip=1e-3, momentum=None,
                      nesterov=False):  # fmt: skip
    walk = _sgd(momentum, nesterov)

    def clipped(g, w):
        g2, w2 = (x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(-1, 1) for x in (g, w))
        room = clipping * np.maximum(np.linalg.norm(w2, axis=0), eps_clip)
        return (g2 * np.minimum(1.0, room / np.maximum(np.linalg.norm(g2, axis=0), 1e-300))).reshape(g.shape)

    return _descend(p, [lambda w, g=g: walk(clipped(g, w)) for g in grads], learning_rate, weight_decay)


def lookahead_sgd(p, grads, learning_rate, weight_decay=0.0, *, sync_period=6, slow_step_size=0.5, momentum=None,
                  nesterov=False):  # fmt: skip
    slow, walk, out = p.copy(), _sgd(momentum, nesterov), []
    for t, g in enumerate(grads, start=1):
        p = p - learning_rate * (walk(g) + weight_decay * p)
        if t % sync_period == 0:
            slow = slow + slow_step_size * (p - slow)
            p = slow
        out.append(p)
    return out


_ALL = (schedule_free_sgd, cautious_adam, cautious_decay_adam, grokfast_sgd, centralized_sgd, adaptive_clip_sgd)
TWINS = {f.__name__: f for f in (*_ALL, lookahead_sgd)}
