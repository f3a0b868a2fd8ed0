"""The response of a rule to a small gradient once its scales are constant, measured on the rule itself.

Around a minimum a rule is a linear recursion. Its averages of gradients, and the parameters, are linear combinations of
their old values and of the gradient. Averages of squares do not change under a small gradient, and stay fixed. The rule
itself, called with tiny inputs, gives the coefficients. They give its preconditioner: the divisor of each coordinate.
They also give the largest stable learning rate on a quadratic, where an eigenvalue of the recursion's matrix leaves the
unit circle. For gradient descent this is ``2 / h``, for momentum ``2 (1 + b) / h``, for Adam
``2 (1 + b1) / ((1 - b1) h)`` with h of the preconditioned Hessian (Cohen et al. 2021, arXiv:2103.00065, and 2022,
arXiv:2207.14484).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.curvature.rule_response import Asked, rate_in_force, rule_name
from jaxsgd.numerics import wide
from jaxsgd.paths import in_containers_of
from jaxsgd.state import find_states

__all__ = ["Recursion", "Response", "read_rule"]

SAME = 2e-3
"""Up to here two coefficients, which have rounding errors, are one."""


@dataclass(frozen=True)
class Recursion:
    """One coordinate under a rule: parameter x, averages m, gradient g, at a learning rate r::

        x <- x + (a0 + r a1) m - r b g - r d x + ...        m <- C m + c g

    All coefficients are affine in the learning rate: ``here + rate * per_rate``.

    Attributes:
      here, per_rate: matrices of the shape ``(1 + k, 2 + k)``. Rows: the change of x, then the new averages. Columns:
        the gradient in units of the preconditioner, the averages, and x by decoupled weight decay.
    """

    here: np.ndarray
    per_rate: np.ndarray

    def radius(self, rate: float, curvature: float) -> float:
        """The spectral radius of a step at this learning rate, where ``g = curvature * x``."""
        table = self.here + rate * self.per_rate
        k = len(table) - 1
        matrix = np.zeros((k + 1, k + 1))
        matrix[:, 0] = table[:, 0] * curvature + table[:, -1]
        matrix[:, 1:] = table[:, 1:-1]
        matrix[0, 0] += 1
        return float(np.abs(np.linalg.eigvals(matrix)).max())

    def threshold(self, curvature: float) -> float:
        """The largest stable learning rate, inf where there is no curvature to speak of."""
        if not curvature > 0 or not math.isfinite(1e-3 / curvature):
            return math.inf
        stable = lambda rate: self.radius(rate, curvature) <= 1 + 1e-6  # noqa: E731
        low = 1e-3 / curvature
        if not stable(low):
            return 0.0
        for _ in range(600):
            if not stable(low * 1.05):
                break
            low *= 1.05
        else:
            return math.inf
        high = low * 1.05
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if stable(middle) else (low, middle)
        return low


@dataclass(frozen=True)
class Response:
    """The result of `read_rule`.

    Attributes:
      name: the rule's.
      recursion: of every coordinate, after division by its preconditioner.
      trained: which leaves the rule moves at all.
      preconditioner: of each coordinate of those, as a vector; inf where it does not move.
      shift: what weight decay through the gradient adds to the Hessian's diagonal.
      learning_rate: as last applied.
      notes: what else there is to say.
    """

    name: str
    recursion: Recursion
    trained: tuple[bool, ...]
    preconditioner: np.ndarray
    shift: np.ndarray
    learning_rate: float
    notes: tuple[str, ...]


def _close(a: Any, b: Any, tolerance: float = SAME) -> bool:
    return bool(
        np.max(np.abs(a - b), initial=0) <= tolerance * max(np.max(np.abs(a), initial=0), np.max(np.abs(b), initial=0))
    )


def read_rule(
    tx: optax.GradientTransformation, params: Any, opt_state: Any, gradient: Sequence[Any], value: Any
) -> Response:
    """The linear recursion that ``tx`` is around a minimum, with its scales held as ``opt_state`` has them.

    Args:
      tx: a jaxsgd rule, or a chain of transformations with one in it.
      params, opt_state: the point.
      gradient: leaves like those of ``params``, of the size that gradients have there.
      value: the loss there.

    Raises:
      ValueError: the rule is no such recursion, coordinate by coordinate; why not.
    """
    name = rule_name(tx, params)
    # `nnx.Optimizer` has containers of its own around the arrays.
    opt_state = in_containers_of(jax.eval_shape(lambda params: tx.init(params), params), opt_state)
    held = [state for _, state in find_states(opt_state) if "learning_rate" in state.hyper]
    if not held:
        raise ValueError("opt_state: no jaxsgd state in it, whose learning rate a threshold could be compared with")
    rate = float(held[0].hyper["learning_rate"])
    unit = float(rate_in_force(held[0]))
    refuse = f"tx: {name} has no diagonal preconditioner: "
    asked = Asked(name, optax.with_extra_args_support(tx), params, opt_state, value)
    base = asked.base()
    table = asked.table(base)
    moved = asked.flat([np.full(p.shape, i) for i, p in enumerate(asked.leaves)])
    answers = np.abs(table[0, :-1]).max(0) if len(table) else np.zeros(0)
    if not np.isfinite(table).all():
        raise ValueError(
            f"opt_state: {name} divides by zero where it has seen no gradient; give the state after a step or more"
        )
    if not answers.any():
        raise ValueError(
            f"{refuse}its step does not grow with the gradient (it takes a sign, waits for more batches, or has halted)"
        )
    trained = tuple(
        bool(f and answers[moved == i].any()) or bool(f and not p.size)
        for i, (p, f) in enumerate(zip(asked.leaves, asked.floating, strict=True))
    )
    mask = np.isin(moved, [i for i, t in enumerate(trained) if t])
    unseen = _check_linear(asked, base, table, mask, gradient, refuse)
    if len(table) > 1 and not _close(table[1:, -1], _through(table) * table[1:, 0], 1e-2):
        raise ValueError(f"{refuse}its averages follow the parameters")
    half, double = (asked.table(asked.at_rate(base, f)) for f in (0.5, 2.0))
    table, half, double = (t[:, :, mask] for t in (table, half, double))
    steps, shorter = (np.abs(_impulse(t)).sum(0) for t in (table, half))
    if not _close(double - table, 2 * (table - half), 1e-2) or np.any(np.abs(shorter - steps / 2) > 0.01 * steps):
        raise ValueError(
            f"tx: the steps of {name} are no multiple of its learning rate (a group may have its own: use lr_mult)"
        )
    return _normalised(name, table, half, trained, rate, unit, unseen)


def _impulse(table: np.ndarray) -> np.ndarray:
    """The steps that one unit of gradient makes, now and later: ``(2 k + 1, coordinates)``."""
    k = len(table) - 1
    m, out = table[1:, 0], [table[0, 0]]
    for _ in range(2 * k):
        out.append((table[0, 1 : k + 1] * m).sum(0))
        m = np.einsum("abn,bn->an", table[1:, 1 : k + 1], m)
    return np.stack(out)


def _through(table: np.ndarray) -> np.ndarray:
    """The weight decay that comes the gradient's way: how many times the parameter is added to it."""
    lead = 1 if len(table) > 1 else 0
    g = table[lead, 0]
    return np.where(g != 0, table[lead, -1] / np.where(g != 0, g, 1), 0)


def _check_linear(asked: Asked, base: Any, table: np.ndarray, mask: np.ndarray, gradient: Any, refuse: str) -> int:
    """That all inputs together do what they do one by one, tiny and as large as here.

    Returns:
      How many coordinates have a gradient that their scale has hardly seen.
    """
    bent = f"{refuse}its step is not proportional to the gradient"
    state = base
    for j, kind in enumerate(asked.kinds):
        state = asked.with_averages(state, kind, asked.random(30 + j, asked.tiny))
    g, p = asked.random(29, asked.tiny), asked.random(28, asked.tiny)
    twice = [2 * x if i in asked.odd else x for i, x in enumerate(state)]
    once, doubled = asked.outputs(state, g, p), asked.outputs(twice, [2 * x for x in g], [2 * x for x in p])
    if not _close(doubled, 2 * once):
        raise ValueError(bent)
    inputs = [asked.flat(g), *(asked.flat(asked.averages(state, kind)) for kind in asked.kinds), asked.flat(p)]
    said = np.einsum("abn,bn->an", table, np.stack(inputs))
    if not all(_close(x, y) for x, y in zip(once, said, strict=True)):
        raise ValueError(f"{refuse}its step mixes coordinates")
    leaf = asked.flat([np.full(p.shape, i) for i, p in enumerate(asked.leaves)])

    def off(g: Any, p: Any) -> np.ndarray:
        """Coordinates that a gradient of true size moves otherwise; most of a leaf may not."""
        made = asked.outputs(base, g, p)[0]
        said = table[0, 0] * asked.flat(g) + table[0, -1] * asked.flat(p)
        wrong = np.abs(made - said) > 0.05 * np.maximum(np.abs(made), np.abs(said))
        moves = (made != 0) | (said != 0)
        for i in np.unique(leaf[moves]):
            if wrong[moves & (leaf == i)].mean() > 0.5:
                raise ValueError(bent)
        return wrong & mask

    pairs = list(zip(asked.leaves, asked.floating, asked.zeros(), strict=True))
    point = [wide(p) if f else p for p, f, _ in pairs]
    small = [0.01 * jnp.asarray(g, z.dtype) if f else z for g, (_, f, z) in zip(gradient, pairs, strict=True)]
    unseen = int(off(small, point).sum())
    if not asked.scales:
        off(asked.random(27, 1e-3 / math.sqrt(max(int(mask.sum()), 1))), asked.zeros())
    return unseen


def _normalised(
    name: str, table: np.ndarray, half: np.ndarray, trained: tuple[bool, ...], rate: float, unit: float, unseen: int
) -> Response:
    """The recursion that all coordinates share, and what each is divided by."""
    k, notes = len(table) - 1, []
    if unseen:
        notes.append(
            f"{unseen:,} parameters have a gradient here far above the earlier ones that {name} divides by: "
            "the threshold will rise in the next steps"
        )
    impulse = _impulse(table)
    strength = np.abs(impulse).sum(0)
    ref = int(np.argmax(strength))
    alive = strength > 0
    shape = impulse[:, alive] / strength[alive]
    if not np.max(np.abs(shape - shape[:, [np.argmax(strength[alive])]]), initial=0) <= 10 * SAME:
        raise ValueError(f"tx: {name} treats parameters by different recursions (a group may override its momentum)")
    # Weight decay: what comes the gradient's way is part of the Hessian, the rest is the rule's own.
    decay, g = table[:, -1], table[:, 0]
    shift = _through(table)
    apart = np.zeros((2, table.shape[-1]))
    if k:
        apart = np.stack([decay[0] - shift * g[0], half[0, -1] - shift * half[0, 0]])
        apart = np.where(np.abs(apart) > 1e-12, apart, 0)
    strongest = int(np.argmax(np.abs(apart[0])))
    if not _close(apart[0], apart[0, strongest], 1e-2):
        notes.append("weight decay is of some parameters only: the threshold is that of decay for all")

    def columns(t: np.ndarray, own: float) -> np.ndarray:
        return np.concatenate([t[:, :-1, ref], np.r_[own, np.zeros(k)][:, None]], 1)

    now, before = columns(table, apart[0, strongest]), columns(half, apart[1, strongest])
    per_rate = (now - before) / (unit / 2)
    here = now - unit * per_rate
    first = np.abs(np.stack([table[1, 0], half[1, 0]]))[:, alive] if k else np.ones((2, 1))
    divisor = _divisor(now, unit, bool(np.ptp(first) > 0.01 * first.max()))
    if not 0 < divisor < math.inf:
        raise ValueError(
            f"tx: {name} has no diagonal preconditioner: its steps do not follow each gradient (it waits for more "
            "batches)"
        )
    here[:, 0] *= divisor
    per_rate[:, 0] *= divisor
    with np.errstate(divide="ignore"):
        preconditioner = np.where(alive, divisor * strength[ref] / np.where(alive, strength, 1), np.inf)
    return Response(name, Recursion(here, per_rate), trained, preconditioner, shift, rate, tuple(notes))


def _divisor(now: np.ndarray, unit: float, of_steps: bool) -> float:
    """What the rule divides the gradient by at one coordinate, where the average of gradients, or their sum, counts as
    the gradient: 1 for momentum in any form, ``sqrt(v) + eps`` for Adam. An average of what is divided already
    does not show its weight: it counts as a sum."""
    k = len(now) - 1
    if not k:
        return unit / abs(now[0, 0])
    c, m = now[1:, 1 : k + 1], now[1:, 0]
    if np.abs(np.linalg.eigvals(c)).max() > 1 - 1e-9:
        return unit / np.abs(_impulse(now[:, :, None])).sum()
    settled = np.linalg.solve(np.eye(k) - c, m)
    main = int(np.argmax(np.abs(settled)))  # a difference of gradients settles at zero
    gain = abs(now[0, 0] + now[0, 1 : k + 1] @ settled) / unit
    if of_steps:
        return 1 / ((1 - c[main, main]) * gain)
    return abs(settled[main]) / gain
