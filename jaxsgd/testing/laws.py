"""What every transformation owes its users, as laws that say what they saw where they do not hold.

Floor 7.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.paths import leaf_names
from jaxsgd.testing.walks import draw_params, loss_of

__all__ = ["LAWS", "Broken", "check_laws", "each_law", "laws_broken"]


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


def _law(name: str) -> Callable[[optax.GradientTransformation], str | None]:
    if name not in LAWS:
        raise ValueError(f"laws: {name!r} is unknown; known are {', '.join(LAWS)}")
    return LAWS[name]


def _without(names: Sequence[str]) -> list[str]:
    """The laws but those named."""
    left_out = [_law(name) for name in names]
    return [name for name, law in LAWS.items() if law not in left_out]


def laws_broken(tx: optax.GradientTransformation, laws: Sequence[str] | None = None) -> list[Broken]:
    """The laws that do not hold for ``tx``; an exception counts as a law that does not hold.

    Raises:
      ValueError: a law that is not in `LAWS`.
    """
    out = []
    asked = {name: _law(name) for name in (LAWS if laws is None else laws)}
    for name, law in asked.items():
        try:
            seen = law(tx)
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
    broken = laws_broken(tx, _without(without))
    if broken:
        raise AssertionError("laws that do not hold:\n" + "\n".join(f"  {b}" for b in broken))


def each_law(tx: optax.GradientTransformation, *, without: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """A pytest test for every law, by one decorator; needs pytest.

    Usage::

        @each_law(my_rule(1e-2))
        def test_my_rule(law):
            law()

    Raises:
      ValueError: ``without`` names a law that is not in `LAWS`.
    """
    import pytest

    asked = _without(without)
    return pytest.mark.parametrize("law", [functools.partial(_hold, tx, name) for name in asked], ids=asked)


def _hold(tx: optax.GradientTransformation, law: str) -> None:
    broken = laws_broken(tx, [law])
    assert not broken, str(broken[0])
