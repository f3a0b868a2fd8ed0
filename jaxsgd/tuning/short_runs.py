"""Short trainings by learning rate, for the probe and the range test: where they begin, and what they cost."""

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
from jaxsgd.loss import is_stateful, with_all_arguments
from jaxsgd.progress import Bar
from jaxsgd.registry import RULES, Rule
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
    "manner",
    "noise_of",
    "tail",
    "usual_rate",
]

UNKNOWN = 1e-2
"""The first rate for a rule without a usual rate."""
PLACES = 8
"""Runs in memory at most."""
CHUNK = 64
"""Batches stacked at a time."""


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
        if isinstance(rule, Rule)
        else rules_in(rule(1e-3), {"w": jnp.ones((2, 2))} if params is None else params)
    )
    named = getattr(rule, "__name__", "")
    rules += [RULES[named]] if named in RULES else []  # such as optax's adamw
    known = [(float(found.usual_rate), found.name) for found in rules if found.usual_rate is not None]
    return known[0] if known else (UNKNOWN, "")


class Manner(NamedTuple):
    """How a rule steps, as it shows on a small parameter.

    Attributes:
      proportional: whether its steps shrink with the gradient: those of gradient descent do, those of Adam do not.
      schedule: the learning rate of each step as a part of the one asked for; ones where it cannot be seen.
    """

    proportional: bool
    schedule: np.ndarray


def manner(rule: Any, steps: int) -> Manner:
    """How ``rule`` steps in a training of ``steps`` steps."""
    params = {"w": jnp.ones((2, 2))}

    def walk(size: jax.Array) -> tuple[jax.Array, jax.Array]:
        tx = optax.with_extra_args_support(rule(1.0))

        def step(state: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            updates: Any
            updates, state = tx.update({"w": jnp.full((2, 2), size)}, state, params, value=jnp.ones(()))
            rates = [node.hyper["learning_rate"] for _, node in find_states(state) if "learning_rate" in node.hyper]
            return state, (jnp.abs(updates["w"]).max(), jnp.asarray(rates[0] if rates else 1.0, jnp.float32))

        return jax.lax.scan(step, tx.init(params), length=steps)[1]

    try:
        sizes, rates = map(np.asarray, jax.jit(jax.vmap(walk))(jnp.array([0.1, 0.01])))
    except Exception:  # a rule made for certain parameters alone
        return Manner(False, np.ones(steps))
    few = min(steps, 20)
    whole = bool(np.isfinite(rates).all() and rates.max() > 0)
    return Manner(bool(sizes[0, :few].max() > 3 * sizes[1, :few].max()), rates[0] if whole else np.ones(steps))


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
      ValueError: fewer than ``least``; a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: a part of the steps is needed, above 0 and at most 1")
    spend = int(share * steps)
    if spend < least:
        raise ValueError(f"steps={steps}, share={share}: {spend} steps to spend, at least {least} are needed")
    return spend


def beginning(loss_fn: Callable[..., Any], model: Any, key: int | jax.Array) -> tuple[Any, Callable[..., Any]]:
    """``(given, begin)`` with ``begin(given, tx) -> (step, state)``: the training's start, arrays apart from the rest.

    Args:
      loss_fn: as in `jaxsgd.make_step`, or of ``(params, batch)`` alone.
      model: a tree of parameters, an ``nnx.Module`` or a `jaxsgd.TrainState`, whose optimizer state is not used.
      key: a seed or a key.
    """
    graphdef, params, held = apart(model)
    key = jax.random.key(key) if isinstance(key, int) else key
    loss = with_all_arguments(loss_fn, is_stateful(graphdef, held))

    def begin(given: Any, tx: Any) -> tuple[Any, TrainState]:
        params, held, key = given
        tx = optax.with_extra_args_support(tx)
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key, held, graphdef)
        return make_step(loss, tx, donate=False).fn, state

    arrays = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, held))
    return (*arrays, key), begin


class Members:
    """Trainings by learning rate: a fixed number of places, that rates move in and out of.

    Attributes:
      curves: learning rate -> the loss of each step so far, NaN from where it diverged.
      spent: steps taken by all of them.
    """

    def __init__(self, given: Any, begin: Callable[..., Any], rule: Any, feed: Feed, bar: Bar) -> None:
        def build(given: Any, learning_rate: Any) -> tuple[Any, Any]:
            return begin(given, rule(learning_rate))

        self._population = Population(build, {"learning_rate": np.ones(PLACES, np.float32)}, given=given)
        self._feed, self._bar = feed, bar
        self._batches: list[Any] = []
        self._places: list[float | None] = [None] * PLACES
        self.curves: dict[float, np.ndarray] = {}
        self.spent = 0

    @property
    def constant(self) -> bool:
        """Whether every step had the same batch."""
        return all(batch is self._batches[0] for batch in self._batches)

    def alive(self, rate: float) -> bool:
        """Whether a rate has not diverged."""
        return bool(np.isfinite(self.curves[rate]).all())

    def ready(self, rate: float) -> bool:
        """Whether a rate can go on: it has not diverged, nor given its place away."""
        return self.alive(rate) and rate in self._places

    def train(self, rates: Sequence[float], horizon: int) -> None:
        """Take rates to ``horizon`` steps, new ones from the start; each is new or `ready`."""
        while len(self._batches) < horizon:
            self._batches.append(self._feed.next())
        self._settle([rate for rate in rates if rate not in self.curves], rates)
        while behind := [r for r in rates if self.alive(r) and len(self.curves[r]) < horizon]:
            first = min(len(self.curves[r]) for r in behind)
            now = [r for r in behind if len(self.curves[r]) == first]
            # Those that are ahead wait until the others have caught up.
            until = min([horizon, *(len(self.curves[r]) for r in behind if r not in now), first + CHUNK])
            self._advance(now, self._batches[first:until])

    def control(self, rate: float, steps: Sequence[int]) -> np.ndarray:
        """The losses at a rate too small to move the weights on the batches of these steps."""
        self._settle([rate], [])
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

    def _settle(self, new: Sequence[float], keep: Sequence[float]) -> None:
        """Give new rates places: free ones, then those of rates that diverged or did worst."""
        if not new:
            return
        free = [i for i, rate in enumerate(self._places) if rate is None]
        held = [i for i, rate in enumerate(self._places) if rate is not None and rate not in keep]
        free += sorted(held, key=lambda i: -tail(self.curves.get(self._places[i] or 0.0, np.zeros(0))))
        mask, values = np.zeros(PLACES, bool), np.ones(PLACES, np.float32)
        for rate, i in zip(new, free[: len(new)], strict=True):
            self._places[i], mask[i], values[i] = rate, True, rate
            self.curves[rate] = np.zeros(0)
        self._population.restart(mask, {"learning_rate": values})


def tail(curve: np.ndarray, steps: int | None = None) -> float:
    """The mean loss over the second half of the first ``steps``; infinite for what diverged or never began."""
    curve = curve[:steps]
    if not len(curve) or not np.isfinite(curve).all():
        return math.inf
    return float(curve[-max(1, round(len(curve) / 2)) :].mean())


def noise_of(losses: np.ndarray) -> float:
    """The deviation of a loss around its trend, from second differences."""
    return float(np.sqrt(np.mean(np.diff(losses, 2) ** 2) / 6)) if len(losses) > 2 else 0.0


def chance(gain: float, error: float, freedom: int) -> float:
    """The chance of such a gain from noise of such an error."""
    return float(scipy.special.stdtr(freedom, -gain / error)) if error else float(gain <= 0)
