"""Hypothesis strategies for tests of update rules: trees, gradients, dtypes, hyperparameters. Needs Hypothesis.

Values and seeds are drawn, shapes are not unless asked for: a compiled walk then serves every example::

    from hypothesis import given
    from jaxsgd.testing.strategies import problems
    from jaxsgd.testing import check_draw

    @given(problems())
    def test_my_rule(problem):
        check_draw(my_rule(1e-2), optax.adam(1e-2), *problem)
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from jaxsgd.hyper import Bounds, Choice, SeedOf
from jaxsgd.registry import Rule
from jaxsgd.testing.walks import GRADIENTS, SHAPES, draw_gradients, draw_params

__all__ = ["dtypes", "gradients", "hyperparameters", "param_trees", "problems", "shapes"]

SEEDS = st.integers(0, 2**31 - 1)
DECAYS = re.compile(r"b\d|.*_b\d|decay|momentum|rho")
"""Arguments of other people's functions that are the decay of an average, in [0, 1)."""


def dtypes(*, narrow: bool = True, complex: bool = False) -> SearchStrategy[np.dtype]:
    """Dtypes that parameters have: float32; with ``narrow`` bfloat16 and float16; with ``complex`` complex64."""
    known = [jnp.float32, *([jnp.bfloat16, jnp.float16] if narrow else []), *([jnp.complex64] if complex else [])]
    return st.sampled_from([jnp.dtype(d) for d in known])


def shapes(max_leaves: int = 4, max_dims: int = 3, max_side: int = 5) -> SearchStrategy[dict[str, tuple[int, ...]]]:
    """Shapes of a tree, name -> shape, empty axes and scalars among them. Each new one compiles again."""
    shape = st.lists(st.integers(0, max_side), max_size=max_dims).map(tuple)
    names = st.sampled_from([f"leaf_{i}" for i in range(max_leaves)])
    return st.dictionaries(names, shape, min_size=1, max_size=max_leaves)


def param_trees(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtypes: SearchStrategy | None = None
) -> SearchStrategy[dict[str, np.ndarray]]:
    """Parameter trees: standard normal, times 10**-3 to 10**3, some of their leaves zero.

    Args:
      shapes: leaf name -> shape.
      dtypes: a strategy of one dtype for the whole tree; float64 arrays by default.
    """

    def build(seed: int, exponent: int, empty: set[str], dtype: Any) -> dict[str, np.ndarray]:
        made = {name: x * 10.0**exponent * (name not in empty) for name, x in draw_params(seed, shapes).items()}
        return {name: np.asarray(x, dtype) for name, x in made.items()}

    zero = st.sets(st.sampled_from(sorted(shapes)), max_size=1) if shapes else st.just(set())
    return st.builds(
        build, SEEDS, st.integers(-3, 3), zero, st.just(np.dtype(np.float64)) if dtypes is None else dtypes
    )


def gradients(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, steps: int = 50, kinds: Sequence[str] | None = None
) -> SearchStrategy[dict[str, np.ndarray]]:
    """Gradients of ``steps`` steps in float64, each leaf ``(steps, *shape)``, of a kind in `GRADIENTS`.

    Raises:
      ValueError: a kind that is not in `GRADIENTS`.
    """
    for kind in kinds or ():
        if kind not in GRADIENTS:
            raise ValueError(f"kinds: {kind!r} is unknown; known are {', '.join(GRADIENTS)}")
    return st.builds(
        lambda kind, seed: draw_gradients(kind, seed, steps, shapes), st.sampled_from(list(kinds or GRADIENTS)), SEEDS
    )


def problems(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, steps: int = 50, kinds: Sequence[str] | None = None
) -> SearchStrategy[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """``(params, gradients)`` of the same shapes in float64, for `jaxsgd.testing.check_draw`."""
    return st.tuples(st.builds(lambda seed: draw_params(seed, shapes), SEEDS), gradients(shapes, steps, kinds))


def hyperparameters(
    factory: Callable[..., optax.GradientTransformation], **fixed: Any
) -> SearchStrategy[dict[str, Any]]:
    """Keyword arguments for ``factory``, read off its signature: ``factory(**drawn)`` is a valid call.

    Arguments whose default is a number or a flag are drawn, and so is the learning rate. Decays are from [0.01, 0.999],
    epsilons and rates from several decades, other numbers between half and double their default. The rules of jaxsgd
    declare the values of each argument, and their choices are drawn too. Of other functions ``b1``, ``momentum`` and
    ``rho`` are decays, and a default below 1 stays below 1. Arguments of other kinds keep their defaults.

    Args:
      factory: such as `optax.adam` or a rule of `jaxsgd.RULES`.
      fixed: arguments that are not drawn, or strategies of their own for them.

    Raises:
      TypeError: ``fixed`` names an argument that ``factory`` does not have.
    """
    parameters = inspect.signature(factory).parameters
    for name in fixed:
        if name not in parameters:
            raise TypeError(f"{name}: {getattr(factory, '__name__', factory)} has no such argument")
    known = {name: hyper.domain for name, hyper in factory.hypers.items()} if isinstance(factory, Rule) else {}
    drawn = {name: _values(name, p.default, known.get(name)) for name, p in parameters.items()}
    given = {name: s if isinstance(s, SearchStrategy) else st.just(s) for name, s in fixed.items()}
    return st.fixed_dictionaries({name: s for name, s in drawn.items() if s is not None} | given)


def _values(name: str, default: Any, domain: Any) -> SearchStrategy | None:
    """Values of one argument, or None where it keeps its default."""
    if name == "learning_rate":
        return _decades(-4, -1)
    if isinstance(domain, Choice):
        return st.sampled_from(domain.known)
    if isinstance(domain, SeedOf):
        return SEEDS
    if isinstance(default, bool):
        return st.booleans()
    if not isinstance(default, int | float) or not math.isfinite(default):
        return None
    if name.startswith("eps"):
        return _decades(-10, -3)
    if name.endswith("weight_decay"):
        return st.one_of(st.just(0.0), _decades(-4, -1))
    decays = DECAYS.fullmatch(name) is not None
    if isinstance(domain, Bounds):
        decays = (domain.low, domain.high) == (0, 1)
    if decays:
        return st.floats(0.01, 0.999)
    below, high = getattr(domain, "low", 0.0), getattr(domain, "high", math.inf)
    if isinstance(default, int):
        most = min(2 * default, math.nextafter(high, 0))
        return st.integers(max(1, default // 2, math.ceil(below)), max(1, math.floor(most)))
    if default <= 0:
        return st.just(default)
    if domain is None and default < 1:
        high = (1 + default) / 2
    return st.floats(max(default / 2, below), min(2 * default, math.nextafter(high, 0)))


def _decades(low: int, high: int) -> SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)
