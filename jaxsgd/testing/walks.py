"""Walking a transformation in float64 over gradients of several temperaments, and comparing two walks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.numerics import widest

__all__ = [
    "GRADIENTS",
    "SHAPES",
    "Comparison",
    "check_draw",
    "check_rule",
    "compare",
    "draw_gradients",
    "draw_params",
    "loss_of",
    "walk",
]

SHAPES: Mapping[str, tuple[int, ...]] = {"scalar": (), "vector": (7,), "matrix": (5, 3), "cube": (4, 3, 2)}
"""The default tree: one leaf of each number of dimensions, sizes all different."""

GRADIENTS: Mapping[str, Callable[[np.random.RandomState, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape) + 0.2,
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.uniform(size=shape) < 0.3),
    "heavy": lambda rng, shape: np.clip(rng.standard_cauchy(shape), -1e4, 1e4),
    "constant": lambda rng, shape: np.broadcast_to(rng.standard_normal(shape[1:]), shape).copy(),
    "tiny": lambda rng, shape: 1e-9 * rng.standard_normal(shape),
    "huge": lambda rng, shape: 1e6 * rng.standard_normal(shape),
}
"""How gradients may be: a name -> a function of a generator and a shape ``(steps, *leaf shape)``."""


def draw_params(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    """Parameters in float64, standard normal."""
    rng = np.random.RandomState(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def draw_gradients(
    kind: str, seed: int, steps: int = 50, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> dict[str, np.ndarray]:
    """Gradients in float64, each leaf ``(steps, *shape)``.

    Raises:
      ValueError: ``kind`` is not in `GRADIENTS`.
    """
    if kind not in GRADIENTS:
        raise ValueError(f"kind={kind!r}: known are {', '.join(GRADIENTS)}")
    rng = np.random.RandomState(seed)
    return {name: np.asarray(GRADIENTS[kind](rng, (steps, *shape))) for name, shape in shapes.items()}


def loss_of(params: Any) -> jax.Array:
    """The loss handed to transformations that ask for ``value``: positive, smooth, in the params' dtype."""
    leaves = jax.tree.leaves(params)
    dtype = widest(jnp.result_type(p) for p in leaves)
    return 2 + sum((jnp.mean(jnp.abs(p) ** 2).astype(dtype) for p in leaves), jnp.zeros((), dtype))


def walk(tx: optax.GradientTransformation) -> Callable[[Any, Any], Any]:
    """A compiled ``(params, gradients) -> parameters after each step``, each leaf ``(steps, *shape)``."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, state = tx.update(g, state, params, value=loss_of(params), obj_fn=loss_of)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return run


# -- one rule against another ---------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The place where two trajectories differ most.

    Attributes:
      gradients: the kind of gradients, a key of `GRADIENTS`.
      error: the largest difference, relative to the largest value of its leaf's trajectory.
      leaf: the leaf where that is.
      step: the 1-based step where that is.
      first: the first step at which any leaf differs by more than ``rtol``; None if none does.
      ours, theirs: the two values there.
    """

    gradients: str
    error: float
    leaf: str
    step: int
    first: int | None
    ours: float
    theirs: float

    def __str__(self) -> str:
        if self.first is None:
            return f"{self.gradients:9} agree to {self.error:.1e}"
        return (
            f"{self.gradients:9} part at step {self.first}; worst {self.error:.1e} in {self.leaf!r} at step "
            f"{self.step}: {self.ours:.9g} against {self.theirs:.9g}"
        )


def compare(
    tx: optax.GradientTransformation,
    like: optax.GradientTransformation,
    *,
    gradients: Iterable[str] = ("normal", "sparse", "heavy", "constant"),
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    steps: int = 50,
    seed: int = 0,
    rtol: float = 1e-12,
) -> list[Comparison]:
    """Walk two transformations over the same gradients in float64; one `Comparison` for each kind.

    Args:
      tx, like: the transformation to check, and the one that it should follow.
      gradients: keys of `GRADIENTS`.
      shapes: leaf name -> shape.
      steps, seed: how many steps, and of which random numbers.
      rtol: what counts as parting, relative to the largest value of the leaf's trajectory. float32
        comparisons hide real differences of this size, which is why this one is in float64.
    """
    out = []
    with jax.enable_x64(True):
        ours, theirs = walk(tx), walk(like)
        for kind in gradients:
            params, grads = draw_params(seed, shapes), draw_gradients(kind, seed + 1, steps, shapes)
            a, b = jax.device_get((ours(params, grads), theirs(params, grads)))
            out.append(_compared(kind, a, b, rtol))
    return out


def _compared(kind: str, ours: Any, theirs: Any, rtol: float) -> Comparison:
    worst, first = None, None
    for name in theirs:
        a, b = ours[name].reshape(len(ours[name]), -1), theirs[name].reshape(len(theirs[name]), -1)
        # NaN on both sides is agreement, on one side it is the largest difference there is.
        difference = np.where(np.isnan(a) & np.isnan(b), 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf))
        errors = difference / max(float(np.nanmax(np.abs(b), initial=0.0)), np.finfo(np.float64).tiny)
        step, element = np.unravel_index(int(errors.argmax()), errors.shape)
        late = np.flatnonzero(errors.max(axis=1) > rtol)
        if late.size:
            first = min(int(late[0]) + 1, first or len(a))
        if worst is None or errors[step, element] > worst[0]:
            worst = (
                float(errors[step, element]),
                name,
                int(step) + 1,
                float(a[step, element]),
                float(b[step, element]),
            )
    assert worst is not None, "an empty tree has nothing to compare"
    error, name, step, mine, other = worst
    return Comparison(kind, error, name, step, first, mine, other)


_kept_walk = functools.lru_cache(maxsize=256)(walk)


def check_draw(
    tx: optax.GradientTransformation, like: optax.GradientTransformation, params: Any, grads: Any, rtol: float = 1e-12
) -> None:
    """Fail unless ``tx`` follows ``like`` over these gradients, in float64.

    For draws of `jaxsgd.testing.strategies.problems`.

    Both walks are compiled once for all draws of the same shapes.

    Args:
      tx, like: the transformation to check, and the one that it should follow; made once, not for each draw.
      params: leaf name -> array.
      grads: leaf name -> array with one more axis in front, the steps.
      rtol: as in `compare`.

    Raises:
      AssertionError: where they part: the worst leaf, the step, the relative error.
    """
    with jax.enable_x64(True):
        ours, theirs = jax.device_get((_kept_walk(tx)(params, grads), _kept_walk(like)(params, grads)))
    found = _compared("drawn", ours, theirs, rtol)
    assert found.first is None, f"the trajectories part:\n  {found}"


def check_rule(tx: optax.GradientTransformation, like: optax.GradientTransformation, **options: Any) -> None:
    """Fail unless ``tx`` follows ``like``; the arguments are those of `compare`.

    Raises:
      AssertionError: a report of every kind of gradients, those that part first.
    """
    found = compare(tx, like, **options)
    if any(c.first is not None for c in found):
        lines = sorted(found, key=lambda c: c.first is None)
        raise AssertionError("the trajectories part:\n" + "\n".join(f"  {line}" for line in lines))
