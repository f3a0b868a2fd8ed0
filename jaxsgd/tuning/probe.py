"""The learning rate for a training, from short runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsgd.ensemble.feed import Feed
from jaxsgd.ensemble.losses import takes
from jaxsgd.hyper import is_constant
from jaxsgd.progress import Bar
from jaxsgd.report import number
from jaxsgd.rules.adaptive import adamw
from jaxsgd.tuning.answer import answer
from jaxsgd.tuning.probe_result import Probe
from jaxsgd.tuning.range_test import rising
from jaxsgd.tuning.search import Search
from jaxsgd.tuning.short_runs import (
    Members,
    beginning,
    budget,
    checked_rule,
    manner,
    sets_rate,
    usual_rate,
)

__all__ = ["probe"]


def probe(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    rule: Callable[[Any], Any] = adamw,
    *,
    steps: int = 1000,
    share: float = 1.0,
    around: float | None = None,
    range_test: bool = False,
    key: int | jax.Array = 0,
    progress: bool | None = None,
) -> Probe:
    """Learning rate for a run of ``steps`` steps, from short runs at several rates.

    All runs begin at ``params``, see the same batches and are one compiled program. The steps of all of them together
    are at most ``share`` times ``steps``. A run that diverges stops there.

    The suggestion follows from the rate with the lowest loss of the longest runs. Where noise makes the end of that
    loss uncertain, a longer run needs a lower rate. The suggestion is then that rate times the cube root of the
    longest runs' share of the steps. It goes at most halfway, in logarithms, to the next rate that is too low.
    Otherwise it is that rate, or below it, down to the next lower one, if that does about as well. The limit is what
    the best did a tenth of the steps sooner.

    Args:
      loss_fn: ``(params, batch, key) -> loss``, ``(loss, aux)`` too, or of ``(params, batch)``; for a TrainState with a
        model state as in `jaxsgd.make_step`.
      params: a tree of parameters, an ``nnx.Module`` or a `jaxsgd.TrainState`; left as it is. The optimizer
        starts fresh.
      data: a list of batches, an iterator, a function of the step, or the one batch of all steps. As many batches as
        the longest run takes stay in memory. A list ``[x, y]`` of arrays is one batch where the loss takes only
        the whole list.
      rule: a rule, or a function of the learning rate that returns a gradient transformation, with clipping or a
        schedule in it. Any schedule of optax works. Short runs see the whole schedule, compressed. Default: AdamW.
      steps: calls of the train step in the run that the rate is for. With `jaxsgd.accumulate` or MultiSteps a call
        takes one microbatch. Default: 1000.
      share: the cost, in whole runs. Default: 1, the cost of one whole run.
      around: the rate at which the search begins. Default: the rule's usual rate.
      range_test: also make the range test, with a third of the steps. Default: False.
      key: a seed or a key for the random numbers in the loss. Default: 0.
      progress: show a bar after two seconds. Default: on if stderr is a terminal.

    Returns:
      A `Probe`. For a rule that sets its own step size, such as Prodigy, it says so and trains nothing.

    Raises:
      ValueError: fewer than 6 steps to spend (30 with the range test); ``around`` not above 0.
      TypeError: ``rule`` is a gradient transformation.

    >>> import jax.numpy as jnp
    >>> found = probe(lambda p, batch: jnp.sum((p - batch) ** 2), jnp.zeros(3), jnp.ones(3), jaxsgd.sgd, steps=200)
    >>> found.learning_rate is not None and found.range[0] <= found.learning_rate <= found.range[1]
    True
    """
    rule = checked_rule(rule)
    spend = budget(steps, share, 30 if range_test else 6)
    if around is not None and not (is_constant(around) and 0 < around < math.inf):
        raise ValueError(f"around={around!r}: a learning rate above 0 is needed")
    given, begin = beginning(loss_fn, params, key)
    usual, name = usual_rate(rule, given[0]) if around is None else (float(around), "around")
    if around is None and (own := sets_rate(rule, given[0])):
        return _left_alone(*own)
    feed, tested = Feed(data, takes(loss_fn, params)), None
    with Bar("probe", spend, progress) as bar:
        if range_test:
            tested = rising(given, begin, rule, feed.take(spend // 3), usual * 1e-4, usual * 1e3)
            spend -= spend // 3
            bar.advance(tested.steps, "range test")
        shape = manner(rule, steps)
        members = Members(given, begin, rule, feed, bar, None if shape.constant else shape.schedule)
        search = Search(members, usual, spend, steps, shape.every)
        search.run()
    doubts = [] if name else [f"no usual rate is known for this rule: the search began at {usual:.2g}. Use around="]
    if not shape.constant:
        doubts.append("each run saw the whole schedule, compressed into its steps")
    return answer(search, tested, doubts)


def _left_alone(name: str, rate: float) -> Probe:
    why = f"{name} sets its own step size from the gradients; leave learning_rate at {number(rate)}"
    return Probe(rate, (rate, rate), "medium", (why,), (), np.zeros((0, 0)), 0, math.nan, 0, 0.0, rate)
