"""Slow NumPy twins of the rules in `jaxsgd.rules.adam_variants` that optax lacks; see `twins`."""

from __future__ import annotations

import numpy as np


def nadamw(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0,
           nesterov=True, bias_correction=True):  # fmt: skip
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        now, following, scale = (1 - b1**t, 1 - b1 ** (t + 1), 1 - b2**t) if bias_correction else (1, 1, 1)
        mean = b1 * m / following + (1 - b1) * g / now if nesterov else m / now
        p = p - learning_rate * (mean / (np.sqrt(v / scale + eps_root) + eps) + weight_decay * p)
        out.append(p)
    return out


def mars(p, grads, learning_rate, weight_decay=0.0, *, b1=0.95, b2=0.99, eps=1e-8, gamma=0.025, max_norm=1.0):
    m, v, last, out = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(grads, start=1):
        c = g + gamma * b1 / (1 - b1) * (g - last)
        norm = np.sqrt(np.sum(c**2))
        if norm > max_norm:
            c = max_norm * c / norm
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * c**2
        u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        p, last = p - learning_rate * (u + weight_decay * p), g
        out.append(p)
    return out


def grams(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8):
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - learning_rate * (np.sign(g) * np.abs(u) + weight_decay * p)
        out.append(p)
    return out


def adan(p, grads, learning_rate, weight_decay=0.0, *, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, eps_root=1e-8,
         weight=None):  # fmt: skip
    m, d, v, last, out = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), grads[0], []
    weight = b2 if weight is None else weight
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        d = b2 * d + (1 - b2) * (g - last)
        v = b3 * v + (1 - b3) * (g + weight * (g - last)) ** 2
        u = (m / (1 - b1**t) + weight * d / (1 - b2**t)) / (np.sqrt(v / (1 - b3**t) + eps_root) + eps)
        p, last = p - learning_rate * (u + weight_decay * p), g
        out.append(p)
    return out


TWINS = {"adan": adan, "nadamw": nadamw, "mars": mars, "grams": grams}
