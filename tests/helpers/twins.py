"""Slow NumPy twins of rules, written from the papers: one array, one loop, no helper of jaxsgd.

A twin is ``twin(p, grads, learning_rate, weight_decay, **hyper) -> [p after each step]``. They stand in where
nobody else's code has the rule, or the argument.
"""

from __future__ import annotations

import importlib
import pathlib

import numpy as np


def adam(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0,
         nesterov=False, bias_correction=True):  # fmt: skip
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        c1, c1_next, c2 = (1 - b1**t, 1 - b1 ** (t + 1), 1 - b2**t) if bias_correction else (1, 1, 1)
        mean = b1 * m / c1_next + (1 - b1) * g / c1 if nesterov else m / c1
        u = mean / (np.sqrt(v / c2 + eps_root) + eps)
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def schedule_free_adamw(y, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0,
                        bias_correction=True, weight_lr_power=2.0, r=0.0):  # fmt: skip
    x, z, v, total, highest, out = y.copy(), y.copy(), np.zeros_like(y), 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        v = b2 * v + (1 - b2) * g**2
        corrected = v / (1 - b2**t) if bias_correction else v
        rate = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        highest = max(highest, rate)
        z = z - rate * (g / (np.sqrt(corrected + eps_root) + eps) + weight_decay * y)
        weight = t**r * highest**weight_lr_power
        total += weight
        x = (1 - weight / total) * x + weight / total * z
        y = b1 * x + (1 - b1) * z
        out.append(y)
    return out


def schedule_free_radam(y, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8,
                        weight_lr_power=2.0, r=0.0, silent_sgd_phase=True):  # fmt: skip
    x, z, v, total, highest, out = y.copy(), y.copy(), np.zeros_like(y), 0.0, 0.0, []
    full = 2 / (1 - b2) - 1
    for t, g in enumerate(grads, start=1):
        v = b2 * v + (1 - b2) * g**2
        rate = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        n, u = full - 2 * t * b2**t / (1 - b2**t), g
        if n > 4:
            rate *= np.sqrt((n - 4) * (n - 2) * full / ((full - 4) * (full - 2) * n))
            u = g / (np.sqrt(v / (1 - b2**t)) + eps)
        elif silent_sgd_phase:
            rate = 0.0
        highest = max(highest, rate)
        z = z - rate * (u + weight_decay * y)
        weight = t**r * highest**weight_lr_power
        total += weight
        c = weight / total if total else 0.0
        x = (1 - c) * x + c * z
        y = b1 * x + (1 - b1) * z
        out.append(y)
    return out


def torch_sgd(p, grads, learning_rate, weight_decay=0.0, *, momentum=0.0, dampening=0.0, nesterov=False):
    b, out = None, []
    for g in grads:
        b = g if b is None else momentum * b + (1 - dampening) * g
        u = (g + momentum * b if nesterov else b) if momentum else g
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def torch_amsgrad(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8):
    m, v, top, out = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        top = np.maximum(top, v)
        u = m / (1 - b1**t) / (np.sqrt(top) / np.sqrt(1 - b2**t) + eps)
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def torch_nadam(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8, momentum_decay=4e-3):
    m, v, product, out = np.zeros_like(p), np.zeros_like(p), 1.0, []
    for t, g in enumerate(grads, start=1):
        now = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        following = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        product *= now
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        root = np.sqrt(v / (1 - b2**t)) + eps
        u = ((1 - now) * g / (1 - product) + following * m / (1 - product * following)) / root
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def torch_rmsprop(p, grads, learning_rate, weight_decay=0.0, *, alpha=0.99, eps=1e-8, momentum=0.0, centered=False):
    v, mean, b, out = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), []
    for g in grads:
        v = alpha * v + (1 - alpha) * g**2
        mean = alpha * mean + (1 - alpha) * g
        b = momentum * b + g / (np.sqrt(v - mean**2 if centered else v) + eps)
        p = p - learning_rate * (b + weight_decay * p)
        out.append(p)
    return out


def torch_adagrad(p, grads, learning_rate, weight_decay=0.0, *, initial_accumulator_value=0.0, eps=1e-10, lr_decay=0.0):
    s, out = np.full_like(p, initial_accumulator_value), []
    for t, g in enumerate(grads):
        s = s + g**2
        p = p - learning_rate * (g / ((np.sqrt(s) + eps) * (1 + t * lr_decay)) + weight_decay * p)
        out.append(p)
    return out


def torch_radam(p, grads, learning_rate, weight_decay=0.0, *, b1=0.9, b2=0.999, eps=1e-8):
    m, v, full, out = np.zeros_like(p), np.zeros_like(p), 2 / (1 - b2) - 1, []
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        length, u = full - 2 * t * b2**t / (1 - b2**t), m / (1 - b1**t)
        if length > 5:
            r = np.sqrt((length - 4) * (length - 2) * full / ((full - 4) * (full - 2) * length))
            u = u * r * np.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
        p = p - learning_rate * (u + weight_decay * p)
        out.append(p)
    return out


def torch_asgd(p, grads, learning_rate, weight_decay=0.0, *, lambd=1e-4, alpha=0.75, t0=1e6):
    eta, out = learning_rate, []
    for t, g in enumerate(grads, start=1):
        p = p * (1 - lambd * eta) - eta * (g + weight_decay * p)
        eta = learning_rate / (1 + lambd * learning_rate * t) ** alpha
        out.append(p)
    return out


TWINS = {
    "adam": adam, "adamw": adam, "nadam": adam, "schedule_free_adamw": schedule_free_adamw,
    "schedule_free_radam": schedule_free_radam,
    "torch_sgd": torch_sgd, "torch_amsgrad": torch_amsgrad, "torch_nadam": torch_nadam,
    "torch_rmsprop": torch_rmsprop, "torch_radam": torch_radam, "torch_asgd": torch_asgd,
    "torch_adagrad": torch_adagrad,
}  # fmt: skip

for _file in sorted(pathlib.Path(__file__).parent.glob("twins_*.py")):
    TWINS |= importlib.import_module(_file.stem).TWINS
