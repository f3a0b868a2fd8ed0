"""Property tests for update rules: yours, optax's, ours. Public, for any optax gradient transformation.

Floor 7. Five lines in your test file::

    from jaxsgd.testing import check_laws, check_rule

    def test_my_rule():
        check_laws(my_rule(1e-2))
        check_rule(my_rule(1e-2), like=optax.adam(1e-2))

`check_rule` walks two transformations side by side in float64 over gradients of several temperaments and says
where they part: the worst leaf, the step, the relative error. `check_laws` checks what every transformation
owes its users: that jit changes nothing, that the state keeps its shape, that bf16 weights do not ruin it.
`compare` and `laws_broken` give the same findings without raising. The strategies at the end need Hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.numerics import widest
from jaxsgd.paths import leaf_names

__all__ = [
    "GRADIENTS",
    "LAWS",
    "SHAPES",
    "Broken",
    "Comparison",
    "check_laws",
    "check_rule",
    "compare",
    "draw_gradients",
    "draw_params",
    "gradient_draws",
    "laws_broken",
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
    """Where two trajectories differ most.

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


def check_rule(tx: optax.GradientTransformation, like: optax.GradientTransformation, **options: Any) -> None:
    """Fail unless ``tx`` follows ``like``; the arguments are those of `compare`.

    Raises:
      AssertionError: a report of every kind of gradients, those that part first.
    """
    found = compare(tx, like, **options)
    if any(c.first is not None for c in found):
        lines = sorted(found, key=lambda c: c.first is None)
        raise AssertionError("the trajectories part:\n" + "\n".join(f"  {line}" for line in lines))


# -- laws of any transformation -------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A law that does not hold, and what was seen."""

    law: str
    seen: str

    def __str__(self) -> str:
        return f"{self.law}: {self.seen}"


def _shape_of(state: Any) -> Any:
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(state)]
    # A PRNG key has no weak type.
    return jax.tree.structure(state), [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def _update(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    extended = optax.with_extra_args_support(tx)
    return lambda grads, state, params: extended.update(grads, state, params, value=loss_of(params), obj_fn=loss_of)


def _narrow(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _difference(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        (float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs), default=0
    )


def law_jit(tx: optax.GradientTransformation) -> str | None:
    """jit changes nothing."""
    params, update = _narrow(draw_params(1), jnp.float32), _update(tx)
    grads = _narrow(draw_params(2), jnp.float32)
    compiled = jax.jit(update)(grads, tx.init(params), params)[0]
    with jax.disable_jit():
        eager = update(grads, tx.init(params), params)[0]
    apart = _difference(compiled, eager)
    return None if apart <= 1e-5 else f"the compiled and the eager update differ by {apart:.1e}"


def law_structure(tx: optax.GradientTransformation) -> str | None:
    """The state keeps structure, shapes, dtypes and weak types, so that scan and donation work."""
    params, update = _narrow(draw_params(1), jnp.float32), _update(tx)
    before = state = tx.init(params)
    for seed in (2, 3):
        _, state = update(_narrow(draw_params(seed), jnp.float32), state, params)
    return None if _shape_of(before) == _shape_of(state) else "init and update give states of different shape or dtype"


def law_gradient_dtype(tx: optax.GradientTransformation) -> str | None:
    """Gradients of another dtype do not change the state's dtypes (and so compile nothing anew)."""
    params, update = _narrow(draw_params(1), jnp.bfloat16), _update(tx)
    state = tx.init(params)
    _, after = update(_narrow(draw_params(2), jnp.float32), state, params)
    changed = {
        f"{a.dtype.name} became {b.dtype.name}"
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
        if jnp.result_type(a) != jnp.result_type(b)
    }
    return None if not changed else f"float32 gradients of bfloat16 params: state in {', '.join(sorted(changed))}"


def law_moments(tx: optax.GradientTransformation) -> str | None:
    """bf16 weights do not narrow what is remembered: state of a parameter's shape is float32 at least."""
    params = _narrow(draw_params(1), jnp.bfloat16)
    narrow = [
        name
        for name, x in zip(leaf_names(tx.init(params)), jax.tree.leaves(tx.init(params)), strict=True)
        if jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.finfo(x.dtype).bits < 32
    ]
    return None if not narrow else f"kept in bfloat16: {', '.join(narrow[:4])}{', ...' if len(narrow) > 4 else ''}"


def law_responds(tx: optax.GradientTransformation) -> str | None:
    """The update depends on the gradient that it is given, not only on earlier ones."""
    params, update, state = _narrow(draw_params(1), jnp.float32), _update(tx), None
    state = tx.init(params)
    for seed in (2, 3, 4):
        _, state = update(_narrow(draw_params(seed), jnp.float32), state, params)
    grads = _narrow(draw_params(5), jnp.float32)
    one = update(grads, state, params)[0]
    other = update(jax.tree.map(lambda g: -g, grads), state, params)[0]
    return None if _difference(one, other) > 0 else "the opposite gradient gives the same update: it comes a step late"


def law_first_step(tx: optax.GradientTransformation) -> str | None:
    """The first gradient already moves the parameters (ADOPT and SOAP do not move, by design)."""
    params = _narrow(draw_params(1), jnp.float32)
    updates, _ = _update(tx)(params, tx.init(params), params)
    moved = any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
    return None if moved else "the first update is zero though the gradient is not: updates come a step late"


def law_zero(tx: optax.GradientTransformation) -> str | None:
    """Zero gradients give finite updates."""
    params = jax.tree.map(jnp.zeros_like, _narrow(draw_params(1), jnp.float32))
    updates, state = _update(tx)(params, tx.init(params), params)
    finite = all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((updates, state)))
    return None if finite else "zero gradients of zero parameters give NaN or inf"


def law_empty(tx: optax.GradientTransformation) -> str | None:
    """Empty trees and None leaves pass through."""
    update = _update(tx)
    params = {"a": jnp.ones(3), "b": None}
    updates, _ = update(params, tx.init(params), params)
    if updates["b"] is not None:
        return "a None leaf did not stay None"
    return None if update({}, tx.init({}), {})[0] == {} else "an empty tree did not stay empty"


def law_isolation(tx: optax.GradientTransformation) -> str | None:
    """NaN in one leaf does not reach another (rules with tree-wide sums cannot have this)."""
    params = _narrow(draw_params(1), jnp.float32)
    grads = {**_narrow(draw_params(2), jnp.float32), "vector": jnp.full((7,), jnp.nan)}
    updates, _ = _update(tx)(grads, tx.init(params), params)
    return None if bool(jnp.all(jnp.isfinite(updates["matrix"]))) else "NaN in one leaf spread to another"


def law_recompiles(tx: optax.GradientTransformation) -> str | None:
    """The second call of the compiled update does not compile again."""
    params, traces = _narrow(draw_params(1), jnp.float32), 0

    @jax.jit
    def update(grads: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return _update(tx)(grads, state, params)

    _, state = update(params, tx.init(params))
    update(params, state)
    return None if traces == 1 else f"{traces} traces for two calls"


LAWS: Mapping[str, Callable[[optax.GradientTransformation], str | None]] = {
    name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")
}
"""The laws by name: each takes a transformation and says what it saw where it does not hold, or None."""


def laws_broken(tx: optax.GradientTransformation, laws: Sequence[str] | None = None) -> list[Broken]:
    """The laws that do not hold for ``tx``; an exception counts as a law that does not hold.

    Raises:
      ValueError: a law that is not in `LAWS`.
    """
    out = []
    for name in LAWS if laws is None else laws:
        if name not in LAWS:
            raise ValueError(f"laws: {name!r} is unknown; known are {', '.join(LAWS)}")
        try:
            seen = LAWS[name](tx)
        except Exception as error:  # whatever a rule under test raises is the finding
            seen = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if seen is not None:
            out.append(Broken(name, seen))
    return out


def check_laws(tx: optax.GradientTransformation, *, without: Sequence[str] = ()) -> None:
    """Fail unless every law holds, but those named in ``without``.

    Raises:
      AssertionError: each law that does not hold, and what was seen.
    """
    broken = laws_broken(tx, [name for name in LAWS if name not in without])
    if broken:
        raise AssertionError("laws that do not hold:\n" + "\n".join(f"  {b}" for b in broken))


# -- strategies -----------------------------------------------------------------------------------


def gradient_draws(shapes: Mapping[str, tuple[int, ...]] = SHAPES, steps: int = 50) -> Any:
    """A Hypothesis strategy of ``(params, gradients)`` in float64, of fixed shapes so that a walk compiles once.

    Kinds, seeds and scales (1e-6 to 1e6) are drawn.

    Raises:
      ImportError: Hypothesis is not installed.
    """
    from hypothesis import strategies as st

    def build(kind: str, seed: int, exponent: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        grads = draw_gradients(kind, seed, steps, shapes)
        return draw_params(seed, shapes), {name: 10.0**exponent * g for name, g in grads.items()}

    return st.builds(build, st.sampled_from(sorted(GRADIENTS)), st.integers(0, 2**31 - 1), st.integers(-6, 6))
