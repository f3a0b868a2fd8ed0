"""Short runs by learning rate, for the probe and the range test: their start and their cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy

from jaxsgd.curvature.rule_response import rules_in
from jaxsgd.ensemble.feed import Feed, stacked
from jaxsgd.ensemble.losses import apart
from jaxsgd.ensemble.population import Population
from jaxsgd.hyper import WholeFrom
from jaxsgd.loss import is_stateful, with_all_arguments
from jaxsgd.numerics import as_key
from jaxsgd.progress import Bar
from jaxsgd.registry import RULES, AnyRule
from jaxsgd.state import find_states
from jaxsgd.train import make_step
from jaxsgd.train_state import TrainState

__all__ = [
    "Manner",
    "Members",
    "beginning",
    "budget",
    "chance",
    "checked_rule",
    "compressed",
    "manner",
    "noise_of",
    "sets_rate",
    "tail",
    "usual_rate",
]

UNKNOWN = 1e-2
"""The first rate for a rule without a usual rate."""
PLACES = 8
"""Runs in memory at most."""
CHUNK = 64
"""Batches stacked at a time."""
OWN_RATE = "jaxsgd.rules.adaptive_lr"
"""The module of the rules that set their own step size."""
OWN_RATE_STATES = frozenset(
    (
        "MechanizeState", "MechanicState", "ProdigyState", "DAdaptAdamWState", "DoGState", "DoWGState", "MomoState",
        "MomoAdamState", "COCOBState",
    )
)  # fmt: skip
"""States of transformations that do so, in jaxsgd and in optax."""


def usual_rate(rule: Any, params: Any = None) -> tuple[float, str]:
    """The learning rate to search around, and the name of the rule that it is usual for.

    Args:
      rule: a rule, or a function of the learning rate that returns a gradient transformation.
      params: the parameters or their shapes, to find the rules in a transformation. Default: one small matrix.

    Returns:
      ``(rate, name)``. The name is empty and the rate `UNKNOWN` if no rule in it has a usual rate.
    """
    rules = (
        [rule]
        if isinstance(rule, AnyRule)
        else rules_in(rule(1e-3), {"w": jnp.ones((2, 2))} if params is None else params)
    )
    named = getattr(rule, "__name__", "")
    rules += [RULES[named]] if named in RULES else []  # such as optax's adamw
    known = [(float(found.usual_rate), found.name) for found in rules if found.usual_rate is not None]
    return known[0] if known else (UNKNOWN, "")


def sets_rate(rule: Any, params: Any) -> tuple[str, float] | None:
    """The name of a rule that sets its own step size, such as Prodigy, and the rate to leave it at; or None."""
    if isinstance(rule, AnyRule):
        return (rule.name, rule.usual_rate or 1.0) if rule.module == OWN_RATE else None
    try:
        tx = rule(1.0)
        found = [(r.name, r.usual_rate or 1.0) for r in rules_in(tx, params) if r.module == OWN_RATE]
        states = jax.tree.leaves(jax.eval_shape(tx.init, params), is_leaf=_sets_rate)
    except Exception:  # a rule that takes no concrete rate says so where it is trained
        return None
    found += [(type(state).__name__.removesuffix("State").lower(), 1.0) for state in states if _sets_rate(state)]
    return found[0] if found else None


def _sets_rate(node: Any) -> bool:
    kind = type(node)
    return kind.__name__ in OWN_RATE_STATES and kind.__module__.split(".")[0] in ("jaxsgd", "optax")


class Manner(NamedTuple):
    """The steps of a rule under a constant gradient.

    Attributes:
      schedule: ``(steps,)``, the learning rate of each step as a part of its peak; ones where it cannot be seen.
      every: calls for one update, such as those of `jaxsgd.accumulate`.
    """

    schedule: np.ndarray
    every: int

    @property
    def constant(self) -> bool:
        """Whether the schedule does not change."""
        return bool(np.ptp(self.schedule) < 1e-3)


def manner(rule: Any, steps: int) -> Manner:
    """The schedule of ``rule`` in a run of ``steps`` steps, and the calls that one update takes."""
    params = {"w": jnp.ones((2, 2))}
    gradient = {"w": jnp.full((2, 2), 0.1)}

    def scheduled(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def walk() -> Any:
        tx = optax.with_extra_args_support(rule(1.0))

        def step(state: Any, _: None) -> Any:
            updates, state = tx.update(gradient, state, params, value=jnp.ones(()))
            rates = [node.hyper["learning_rate"] for _, node in find_states(state) if "learning_rate" in node.hyper]
            rate = jnp.asarray(rates[0] if rates else 1.0, jnp.float32)
            return state, (rate, jnp.abs(jax.tree.leaves(updates)[0]).max() > 0)

        start = tx.init(params)
        rates, moved = jax.lax.scan(step, start, length=steps)[1]
        if not any(map(scheduled, jax.tree.leaves(start, is_leaf=scheduled))):
            return rates, moved

        def at(count: jax.Array) -> jax.Array:
            """The size of the first update, if the schedule alone had counted so far."""
            state = jax.tree.map(lambda x: type(x)(count=count) if scheduled(x) else x, start, is_leaf=scheduled)
            return jnp.abs(jax.tree.leaves(tx.update(gradient, state, params, value=jnp.ones(()))[0])[0]).max()

        return jax.vmap(at)(jnp.arange(steps, dtype=jnp.int32)), moved

    try:
        rates, moved = map(np.asarray, jax.jit(walk)())
    except Exception:  # a rule made for certain parameters alone
        return Manner(np.ones(steps), 1)
    gaps = np.diff(np.flatnonzero(moved))
    every = int(np.median(gaps)) if len(gaps) else steps if moved.any() else 1
    rates = rates if np.isfinite(rates).all() and rates.max() > 0 else np.ones(steps)
    return Manner(rates / rates.max(), max(1, every))


def checked_rule(rule: Any) -> Callable[[Any], Any]:
    """``rule``, if it can be called with a learning rate.

    Raises:
      TypeError: it is a gradient transformation, whose rate is chosen, or nothing that can be called.
    """
    if hasattr(rule, "update") and hasattr(rule, "init"):
        raise TypeError(
            "rule: a gradient transformation has its learning rate already; give jaxsgd.adamw, or a function"
        )
    if not callable(rule):
        raise TypeError(f"rule={rule!r}: a rule such as jaxsgd.adamw, or a function of the learning rate, is needed")
    return rule


def budget(steps: int, share: float, least: int) -> int:
    """The steps to spend: ``share`` of ``steps``.

    Raises:
      TypeError: ``steps`` is no whole number.
      ValueError: fewer than ``least``; a share that is not above 0.
    """
    WholeFrom(1).check(f"steps={steps!r}", steps)
    if not 0 < share < math.inf:
        raise ValueError(f"share={share}: a number of runs is needed, above 0. Use 1 for the cost of one")
    spend = int(share * steps)
    if spend < least:
        raise ValueError(f"steps={steps}, share={share}: {spend} steps to spend, at least {least} are needed")
    return spend


def beginning(loss_fn: Callable[..., Any], model: Any, key: int | jax.Array) -> tuple[Any, Callable[..., Any]]:
    """``(given, begin)`` with ``begin(given, tx) -> (step, state)``: the start of a run, arrays apart from the rest.

    Args:
      loss_fn: as in `jaxsgd.make_step`, or of ``(params, batch)`` alone.
      model: a tree of parameters, an ``nnx.Module`` or a `jaxsgd.TrainState`, whose optimizer state is not used.
      key: a seed or a key.
    """
    graphdef, params, held = apart(model)
    key = as_key(key)
    loss = with_all_arguments(loss_fn, is_stateful(graphdef, held))

    def begin(given: Any, tx: Any) -> tuple[Any, TrainState]:
        params, held, key = given
        tx = optax.with_extra_args_support(tx)
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key, held, graphdef)
        return make_step(loss, tx, donate=False).fn, state

    arrays = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, held))
    return (*arrays, key), begin


class Members:
    """Runs by learning rate: a fixed number of places, that rates move in and out of.

    A schedule is applied as a whole: a run of h steps takes the schedule of ``steps`` steps in h. Such a run cannot be
    prolonged, so a longer one starts from the beginning.

    Args:
      given, begin: see `beginning`.
      rule: a function of the learning rate.
      feed: the batches.
      bar: shows the steps taken.
      schedule: ``(steps,)``, the rate of each step of a whole training. Default: None, constant.

    Attributes:
      curves: learning rate -> the loss of each step of its last run, NaN from where it diverged.
      spent: steps taken by all of them.
    """

    def __init__(
        self, given: Any, begin: Callable[..., Any], rule: Any, feed: Feed, bar: Bar, schedule: np.ndarray | None = None
    ) -> None:
        def build(given: Any, learning_rate: Any, horizon: Any) -> tuple[Any, Any]:
            tx = rule(learning_rate)
            return begin(given, tx if schedule is None else optax.chain(tx, compressed(schedule, horizon)))

        ones = np.ones(PLACES, np.float32)
        self._population = Population(build, {"learning_rate": ones, "horizon": ones}, given=given)
        self._feed, self._bar, self._whole = feed, bar, schedule is None
        self._batches: list[Any] = []
        self._places: list[float | None] = [None] * PLACES
        self._past: dict[tuple[float, int], np.ndarray] = {}
        self.curves: dict[float, np.ndarray] = {}
        self.spent = 0

    @property
    def constant(self) -> bool:
        """Whether every step had the same batch."""
        return all(batch is self._batches[0] for batch in self._batches)

    def alive(self, rate: float) -> bool:
        """Whether a rate has not diverged."""
        return bool(np.isfinite(self.curves[rate]).all())

    def run(self, rate: float, steps: int) -> np.ndarray | None:
        """The losses of a run of ``steps`` steps, or None if there was none."""
        if not self._whole:
            return self._past.get((rate, steps))
        curve = self.curves[rate]
        return curve[:steps] if len(curve) >= steps else None

    def cost(self, rate: float, horizon: int) -> int:
        """The steps that it takes to bring a rate to ``horizon`` steps."""
        if not self._whole or rate not in self._places:
            return 0 if rate in self.curves and len(self.curves[rate]) == horizon else horizon
        return max(0, horizon - len(self.curves[rate])) if self.alive(rate) else 0

    def train(self, rates: Sequence[float], horizon: int) -> None:
        """Take rates to ``horizon`` steps, from the start where they cannot be prolonged."""
        while len(self._batches) < horizon:
            self._batches.append(self._feed.next())
        again = [r for r in rates if self.cost(r, horizon) == horizon]
        self._settle(again, rates, horizon)
        while behind := [r for r in rates if self.alive(r) and len(self.curves[r]) < horizon]:
            first = min(len(self.curves[r]) for r in behind)
            now = [r for r in behind if len(self.curves[r]) == first]
            # Those that are ahead wait until the others have caught up.
            until = min([horizon, *(len(self.curves[r]) for r in behind if r not in now), first + CHUNK])
            self._advance(now, self._batches[first:until])
        for rate in rates:
            curve = self.curves[rate]
            self._past[rate, horizon] = np.pad(curve, (0, horizon - len(curve)), constant_values=np.nan)

    def control(self, rate: float, steps: Sequence[int]) -> np.ndarray:
        """The losses at a rate too small to move the weights on the batches of these steps."""
        self._settle([rate], [], len(self._batches))
        self._advance([rate], [self._batches[i] for i in steps])
        return self.curves.pop(rate)

    def _advance(self, rates: Sequence[float], batches: Sequence[Any]) -> None:
        index = [self._places.index(rate) for rate in rates]
        before = self._population.steps
        losses = self._population.advance(stacked(batches), active=np.isin(np.arange(PLACES), index))["loss"]
        went = self._population.steps - before
        for rate, i in zip(rates, index, strict=True):
            row = losses[i].astype(np.float64)
            self.curves[rate] = np.append(self.curves[rate], row)
            taken = min(int(went[i]) + 1, len(row))  # what is not finite was a step too
            self.spent += taken
            self._bar.advance(taken, f"at {rate:.2g}")

    def _settle(self, new: Sequence[float], keep: Sequence[float], horizon: int) -> None:
        """Give new rates places: their own, free ones, then those of rates that diverged or did worst."""
        if not new:
            return
        free = [i for i, rate in enumerate(self._places) if rate is None or rate in new]
        held = [i for i, rate in enumerate(self._places) if i not in free and rate not in keep]
        free += sorted(held, key=lambda i: -tail(self.curves.get(self._places[i] or 0.0, np.zeros(0))))
        mask = np.zeros(PLACES, bool)
        values = {"learning_rate": np.ones(PLACES, np.float32), "horizon": np.full(PLACES, horizon, np.float32)}
        for rate, i in zip(new, free[: len(new)], strict=True):
            mask[i], values["learning_rate"][i] = True, rate
            self._places = [None if held == rate else held for held in self._places]
            self._places[i] = rate
            self.curves[rate] = np.zeros(0)
        self._population.restart(mask, values)


def compressed(schedule: np.ndarray, horizon: Any) -> optax.GradientTransformation:
    """Scale updates, so that ``horizon`` steps see the whole schedule."""
    table = jnp.asarray(schedule, jnp.float32)

    def init(params: Any) -> jax.Array:
        return jnp.zeros((), jnp.int32)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state
        at = jnp.minimum(((count + 0.5) * len(schedule) / horizon).astype(jnp.int32), len(schedule) - 1)
        now = table[jnp.minimum(count, len(schedule) - 1)]
        ratio = table[at] / jnp.where(now > 0, now, 1.0)
        return jax.tree.map(lambda u: (ratio * u).astype(u.dtype), updates), count + 1

    return optax.GradientTransformation(init, update)


def tail(curve: np.ndarray, part: float = 0.25) -> float:
    """The mean loss over the last ``part`` of a run; infinite if it diverged or never began."""
    if not len(curve) or not np.isfinite(curve).all():
        return math.inf
    return float(curve[-max(min(2, len(curve)), round(part * len(curve))) :].mean())


def noise_of(losses: np.ndarray) -> float:
    """The deviation of a loss around its trend, from second differences."""
    return float(np.sqrt(np.mean(np.diff(losses, 2) ** 2) / 6)) if len(losses) > 2 else 0.0


def chance(gain: float, error: float, freedom: int) -> float:
    """The chance of such a gain from noise of such an error."""
    return float(scipy.special.stdtr(freedom, -gain / error)) if error else float(gain <= 0)
