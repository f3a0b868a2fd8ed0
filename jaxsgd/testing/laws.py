"""The laws that every transformation owes its users; a law that does not hold gives the evidence.

A law takes a transformation. If its parameter is called ``make``, it takes a function of the learning rate that returns
one, such as a rule.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.blockwise import fp8, int8
from jaxsgd.forms import forms
from jaxsgd.paths import leaf_names
from jaxsgd.registry import Rule
from jaxsgd.state import find_states, metrics, with_hyper
from jaxsgd.storage import Storage, accepts, cast, of_kind
from jaxsgd.testing.walks import SHAPES, draw_params, loss_of

__all__ = ["LAWS", "Broken", "check_laws", "each_law", "laws_broken"]

Law = Callable[[Any], str | None]
RATE = 0.01
"""The learning rate of a transformation that a law makes."""
ROUNDING = 1e-14
"""Relative to the parameters in float64: two programs may round the same step differently, once."""


@dataclass(frozen=True)
class Broken:
    """A law that does not hold, and what was seen."""

    law: str
    seen: str

    def __str__(self) -> str:
        return f"{self.law}: {self.seen}"


# -- what the laws ask with ------------------------------------------------------------------------


def _tree(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, dtype) for name, x in draw_params(seed).items()}


def _update(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    extended = optax.with_extra_args_support(tx)
    return lambda grads, state, params: extended.update(grads, state, params, value=loss_of(params), obj_fn=loss_of)


@functools.lru_cache(maxsize=4)
def _compiled(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The compiled update; several laws share it."""
    return jax.jit(_update(tx))


def _relative(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value of its array; NaN on one side only is infinite."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact) or not np.size(x):
            continue
        x, y = np.asarray(x), np.asarray(y)
        apart = np.where(np.isnan(x) & np.isnan(y), 0.0, np.nan_to_num(np.abs(x - y), nan=np.inf))
        worst = max(worst, float(np.max(apart)) / (float(np.max(np.abs(y))) or 1.0))
    return worst


def _kind(state: Any) -> Any:
    """Structure, shapes, dtypes and weak types: by these jit tells arguments apart."""
    leaves = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in jax.tree.leaves(state)]
    # A PRNG key and a NumPy array have no weak type.
    return jax.tree.structure(state), [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def _finite(tree: Any) -> bool:
    inexact = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in inexact)


# -- programs --------------------------------------------------------------------------------------


def law_jit(tx: optax.GradientTransformation) -> str | None:
    """jit changes nothing: updates and state, in float64."""
    with jax.enable_x64(True):
        params, update = _tree(1, np.float64), _update(tx)
        state = update(_tree(3, np.float64), tx.init(params), params)[1]
        compiled = _compiled(tx)(_tree(4, np.float64), state, params)
        with jax.disable_jit():
            eager = update(_tree(4, np.float64), state, params)
        # An update may be a small difference of large numbers: what counts is where the parameters end.
        apart = _relative(optax.apply_updates(params, compiled[0]), optax.apply_updates(params, eager[0]))
        apart = max(apart, _relative(compiled[1], eager[1]))
    return None if apart < ROUNDING else f"the compiled and the eager update differ by {apart:.1e}"


def law_scan(tx: optax.GradientTransformation) -> str | None:
    """`jax.lax.scan` over steps gives what a loop gives, in float64."""
    with jax.enable_x64(True):
        params, update = _tree(1, np.float64), _update(tx)
        state, grads = tx.init(params), [_tree(seed, np.float64) for seed in (3, 4)]

        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, state = update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        stacked = jax.tree.map(lambda *xs: np.stack(xs), *grads)
        scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, stacked)[0])((params, state))
        looped = (params, state)
        for g in grads:
            updates, after = _compiled(tx)(g, looped[1], looped[0])
            looped = (optax.apply_updates(looped[0], updates), after)
        apart = _relative(scanned, looped)
    return None if apart < 10 * ROUNDING else f"a scan of two steps and two steps differ by {apart:.1e}"


def law_vmap(make: Callable[[Any], optax.GradientTransformation]) -> str | None:
    """`jax.vmap` over the learning rate gives what single runs give, in float64."""
    with jax.enable_x64(True):
        params, rates = _tree(1, np.float64), np.array([0.01, 0.02, 0.3])
        first, second = _tree(3, np.float64), _tree(4, np.float64)
        tx = make(RATE)
        state = _update(tx)(first, tx.init(params), params)[1]
        held = [node for _, node in find_states(state) if "learning_rate" in node.hyper]

        def second_step(rate: Any) -> Any:
            if len(held) == 1:
                return _update(tx)(second, with_hyper(state, learning_rate=rate), params)[0]
            own = make(rate)
            after = _update(own)(first, own.init(params), params)[1]
            return _update(own)(second, after, params)[0]

        many = jax.jit(jax.vmap(second_step))(rates)
        for i, rate in enumerate(rates):
            one = second_step(float(rate))
            ends = (
                optax.apply_updates(params, jax.tree.map(lambda x, i=i: x[i], many)),
                optax.apply_updates(params, one),
            )
            if (apart := _relative(*ends)) >= ROUNDING:
                return f"at the learning rate {rate:g} the vmapped and the single update differ by {apart:.1e}"
    return None


def law_derivative(tx: optax.GradientTransformation) -> str | None:
    """The update is differentiable: its derivative is the limit of differences, in float64."""
    with jax.enable_x64(True):
        params, update = _tree(1, np.float64), _compiled(tx)
        state = update(_tree(3, np.float64), tx.init(params), params)[1]
        grads, direction = _tree(4, np.float64), _tree(5, np.float64)

        def moved(s: Any) -> Any:
            return update(jax.tree.map(lambda g, d: g + s * d, grads, direction), state, params)[0]

        tangent = jax.jit(lambda s: jax.jvp(moved, (s,), (1.0,))[1])(0.0)
        # Central differences with step 1e-6 in float64: truncation and rounding both near 1e-10.
        difference = jax.tree.map(lambda a, b: (a - b) / 2e-6, moved(1e-6), moved(-1e-6))
        for name, a, b in zip(leaf_names(tangent), jax.tree.leaves(tangent), jax.tree.leaves(difference), strict=True):
            if not np.allclose(a, b, rtol=1e-5, atol=1e-8):
                return f"the derivative at {name!r} is off by {float(np.max(np.abs(a - b))):.1e}"
    return None


def law_structure(tx: optax.GradientTransformation) -> str | None:
    """The state keeps structure, shapes, dtypes and weak types, so that scan and donation work."""
    params = _tree(1)
    before = state = tx.init(params)
    for seed in (1, 2):
        _, state = _compiled(tx)(_tree(seed), state, params)
        if _kind(before) != _kind(state):
            return "init and update give states of different shape or dtype"
    return None


def law_recompiles(tx: optax.GradientTransformation) -> str | None:
    """The second call of the compiled update does not compile again."""
    params, update = _tree(1), jax.jit(_update(tx))
    state = tx.init(params)
    for seed in (1, 2):
        _, state = update(_tree(seed), state, params)
    traces = update._cache_size()  # type: ignore[attr-defined]  # of jax.jit, for tests
    return None if traces == 1 else f"{traces} traces for two calls"


# -- dtypes ----------------------------------------------------------------------------------------


def law_gradient_dtype(tx: optax.GradientTransformation) -> str | None:
    """Gradients of another dtype do not change the state's dtypes, and so do not recompile."""
    for dtype, other in ((jnp.bfloat16, np.float32), (np.float32, jnp.bfloat16)):
        params = _tree(1, dtype)
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(_update(tx), _tree(2, other), state, params)
        changed = {
            f"{a.dtype.name} became {b.dtype.name}"
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
            if a.dtype != b.dtype
        }
        if changed:
            names = f"{jnp.dtype(other).name} gradients of {jnp.dtype(dtype).name} params"
            return f"{names}: state in {', '.join(sorted(changed))}"
    return None


def law_moments(tx: optax.GradientTransformation) -> str | None:
    """16-bit weights do not narrow the state: floating state is float32 at least."""
    for dtype in (jnp.bfloat16, np.float16):
        state = jax.eval_shape(tx.init, _tree(1, dtype))
        narrow = [
            name
            for name, x in zip(leaf_names(state), jax.tree.leaves(state), strict=True)
            # Eight-bit floats come from a storage, never from 16-bit weights.
            if jnp.issubdtype(x.dtype, jnp.floating) and 8 < jnp.finfo(x.dtype).bits < 32
        ]
        if narrow:
            names = f"{', '.join(narrow[:4])}{', ...' if len(narrow) > 4 else ''}"
            return f"kept in {jnp.dtype(dtype).name}: {names}"
    return None


def law_strict(tx: optax.GradientTransformation) -> str | None:
    """Strict promotion of dtypes and ranks holds, and updates have the dtype of the parameters."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (np.float32, jnp.bfloat16, np.float16):
            params = _tree(1, dtype)
            updates, _ = jax.eval_shape(lambda g, p: _update(tx)(g, tx.init(p), p), _tree(2, dtype), params)
            found = {u.dtype.name for u in jax.tree.leaves(updates)}
            if found != {jnp.dtype(dtype).name}:
                return f"updates of {jnp.dtype(dtype).name} params are {', '.join(sorted(found))}"
    return None


def law_stalls(tx: optax.GradientTransformation) -> str | None:
    """5,000 steps of bf16 weights fill the state like those of float32 weights (a learning rate of 1e-3 or less)."""
    constant = jnp.linspace(0.5, 1.5, 8)

    def march(dtype: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            # The gradient is rounded once; what the state makes of it must not notice the parameters' dtype.
            updates, state = _update(tx)(constant.astype(dtype).astype(jnp.float32), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.ones(8, dtype)
        return jax.lax.scan(step, (params, tx.init(params)), length=5000)[0][1]

    narrow, full = jax.jit(lambda: (march(jnp.bfloat16), march(jnp.float32)))()
    for name, a, b in zip(leaf_names(narrow), jax.tree.leaves(narrow), jax.tree.leaves(full), strict=True):
        # bf16 rounds the gradient by 2**-9, its square by 2**-8.
        if jnp.issubdtype(a.dtype, jnp.inexact) and not np.allclose(a, b, rtol=2**-7, atol=0):
            return f"{name}: {np.ravel(a)[0]:.3g} in bf16, {np.ravel(b)[0]:.3g} in float32"
    return None


# -- steps -----------------------------------------------------------------------------------------


def law_responds(tx: optax.GradientTransformation) -> str | None:
    """The update depends on the gradient that it is given, not only on earlier ones."""
    params, update = _tree(1), _compiled(tx)
    state = tx.init(params)
    for seed in (2, 3, 4):
        _, state = update(_tree(seed), state, params)
    grads = _tree(5)
    one = update(grads, state, params)[0]
    other = update(jax.tree.map(lambda g: -g, grads), state, params)[0]
    return None if _relative(one, other) > 0 else "the opposite gradient gives the same update: it comes a step late"


def law_first_step(tx: optax.GradientTransformation) -> str | None:
    """The first gradient already moves the parameters (ADOPT and SOAP do not move, by design)."""
    params = _tree(1)
    updates, _ = _compiled(tx)(params, tx.init(params), params)
    moved = any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
    return None if moved else "the first update is zero though the gradient is not: updates come a step late"


def law_schedule(make: Callable[[Any], optax.GradientTransformation]) -> str | None:
    """Schedules see the 0-based count; the state of a rule of jaxsgd shows the rate that it applied."""
    with jax.enable_x64(True):
        params, grads = _tree(1, np.float64), _tree(2, np.float64)
        tx, constant = make(lambda count: 0.5 ** (count + 1)), make(0.5)
        by_hand, _ = _update(constant)(grads, constant.init(params), params)
        state, applied = tx.init(params), []
        ours = len(find_states(state)) == 1
        applied += [float(metrics(state)["learning_rate"])] if ours else []
        for step in range(3):
            updates, state = _update(tx)(grads, state, params)
            if step == 0 and (apart := _relative(updates, by_hand)) >= ROUNDING:
                return f"the first update differs by {apart:.1e} from that with the schedule's value at 0"
            if ours and int(metrics(state)["step"]) != step + 1:
                return f"after {step + 1} steps the state counts {int(metrics(state)['step'])}"
            applied += [float(metrics(state)["learning_rate"])] if ours else []
        if ours and applied != [0.5, 0.5, 0.25, 0.125]:
            return f"the state shows the rates {applied}, applied were [0.5, 0.25, 0.125]"
    return None


# -- edges -----------------------------------------------------------------------------------------


def law_zero(tx: optax.GradientTransformation) -> str | None:
    """Zero gradients of zero parameters give finite updates and state."""
    params = jax.tree.map(np.zeros_like, _tree(1))
    updates, state = _compiled(tx)(params, tx.init(params), params)
    return None if _finite((updates, state)) else "zero gradients of zero parameters give NaN or inf"


def law_rest(tx: optax.GradientTransformation) -> str | None:
    """Zero gradients leave zero parameters where they are (noise, and a sign of 0, do not)."""
    params = jax.tree.map(np.zeros_like, _tree(1))
    updates, _ = _compiled(tx)(params, tx.init(params), params)
    still = all(bool(jnp.all(u == 0)) for u in jax.tree.leaves(updates))
    return None if still else "a zero gradient moved a zero parameter"


def law_empty(tx: optax.GradientTransformation) -> str | None:
    """Empty trees, None leaves and a single scalar pass through."""
    update = _update(tx)

    @jax.jit  # one program of all
    def updates(*trees: Any) -> Any:
        return [update(params, tx.init(params), params)[0] for params in trees]

    holey, scalar, empty = updates({"a": jnp.ones(3), "b": None}, jnp.float32(1.5), {})
    if holey["b"] is not None:
        return "a None leaf did not stay None"
    if jnp.shape(scalar) != ():
        return "a scalar did not stay a scalar"
    return None if empty == {} else "an empty tree did not stay empty"


def law_complex(tx: optax.GradientTransformation) -> str | None:
    """Turning the phase of complex parameters and gradients turns the update: nothing depends on the axes."""
    rng = np.random.RandomState(0)
    z, g = (jnp.asarray(rng.standard_normal(6) + 1j * rng.standard_normal(6), jnp.complex64) for _ in range(2))
    turn = jnp.exp(1j * jnp.float32(0.7)).astype(jnp.complex64)
    updates, _ = _update(tx)(g, tx.init(z), z)
    turned, _ = _update(tx)(turn * g, tx.init(turn * z), turn * z)
    if np.allclose(turned, turn * updates, rtol=2e-5, atol=1e-6):
        return None
    return f"the update of turned parameters is off by {float(jnp.max(jnp.abs(turned - turn * updates))):.1e}"


def law_isolation(tx: optax.GradientTransformation) -> str | None:
    """NaN and inf in one leaf do not reach another (rules with tree-wide sums cannot have this)."""
    for params, grads in ((_tree(1), _tree(2)), 2 * (jax.tree.map(np.zeros_like, _tree(1)),)):
        for bad in (np.nan, np.inf):
            poisoned = {**grads, "vector": np.full(SHAPES["vector"], bad, np.float32)}
            updates, _ = _compiled(tx)(poisoned, tx.init(params), params)
            if not _finite(updates["matrix"]):
                return f"{'NaN' if np.isnan(bad) else 'inf'} in one leaf spread to another"
    return None


def law_non_finite(tx: optax.GradientTransformation) -> str | None:
    """15 steps of NaN or inf in all leaves, after a finite one, end (run it under a time limit)."""
    params, update = _tree(1), _compiled(tx)
    for bad in (np.nan, np.inf):
        _, state = update(_tree(2), tx.init(params), params)
        poisoned = jax.tree.map(lambda p, bad=bad: np.full_like(p, bad), params)
        for _ in range(15):
            _, state = update(poisoned, state, params)
        jax.block_until_ready(state)
    return None


# -- storage ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A storage that only tests use: two bfloat16 arrays, the rounded value and a part of what that lost."""

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        dtype = jnp.promote_types(jnp.bfloat16, jnp.complex64) if jnp.iscomplexobj(x) else jnp.bfloat16
        high = x.astype(dtype)
        return {"high": high, "low": (x - high.astype(x.dtype))[..., :1].astype(dtype) if x.ndim else ()}

    def unpack(self, packed: Any) -> jax.Array:
        return jnp.asarray(packed["high"], jnp.float32)


STORAGES: Mapping[str, Storage] = {
    "bfloat16": cast("bfloat16"),
    "float16": cast("float16"),
    "int8": int8(min_size=0),
    "fp8": fp8(min_size=0),
    "one's own": Pair(),
}
"""The storages of `law_storage`."""


def law_storage(make: Callable[..., optax.GradientTransformation]) -> str | None:
    """Every storage that a rule of jaxsgd accepts makes its state as small as computed; others are refused."""
    if not isinstance(make, Rule):
        return None
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    plain = forms(make(RATE), params)
    kept = make(RATE).lift.slots
    for name, storage in STORAGES.items():
        taken = any(accepts(storage, make.slots[slot].kind) for slot in kept)
        try:
            tx = make(RATE, storage=storage)
        except ValueError as error:
            if taken or "storage" not in str(error):
                return f"{name}: refused: {error}"
            continue
        if not taken:
            return f"{name}: accepted, but no slot that is kept is of a kind that it takes"
        seen = _broken_storage(tx, params, plain, storage)
        if seen is not None:
            return f"{name}: {seen}"
    return None


def _broken_storage(tx: Any, params: Any, plain: Sequence[Any], storage: Storage) -> str | None:
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(_update(tx), params, state, params)
    if _kind(state) != _kind(after):
        return "init and update store it differently"
    stored = {(f.container, f.slot.name, f.parameter): f.stored for f in forms(tx, params)}
    for form in plain:
        wanted = form.stored
        if accepts(storage, form.slot.kind):
            wanted = jax.eval_shape(of_kind(storage, form.slot.kind).pack, wanted)
        found = stored[form.container, form.slot.name, form.parameter]
        if _bytes(found) != _bytes(wanted):
            return f"{form.slot.name} of {form.parameter} takes {_bytes(found)} bytes, computed {_bytes(wanted)}"
        if _bytes(found) > _bytes(form.stored):
            return f"{form.slot.name} of {form.parameter} grows from {_bytes(form.stored)} to {_bytes(found)} bytes"
    return None


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# -- running them ----------------------------------------------------------------------------------

LAWS: Mapping[str, Law] = {
    name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")
}
"""The laws by name. Each takes a transformation, or a function of the learning rate that makes one, and returns
the evidence if it does not hold, else None."""


def _is_transformation(subject: Any) -> bool:
    return hasattr(subject, "init") and hasattr(subject, "update")


def _needs_make(law: Law) -> bool:
    return "make" in inspect.signature(law).parameters


def _applied(subject: Any, names: Sequence[str] | None) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """The laws that apply to ``subject``, bound to it."""
    tx = subject if _is_transformation(subject) else subject(RATE)
    for name in LAWS if names is None else names:
        law = _law(name)
        if not _needs_make(law):
            yield name, functools.partial(law, tx)
        elif tx is not subject:
            yield name, functools.partial(law, subject)


def _law(name: str) -> Law:
    if name not in LAWS:
        raise ValueError(f"laws: {name!r} is unknown; known are {', '.join(LAWS)}")
    return LAWS[name]


def _without(names: Sequence[str]) -> list[str]:
    """The laws but those named."""
    left_out = [_law(name) for name in names]
    return [name for name, law in LAWS.items() if law not in left_out]


def laws_broken(subject: Any, laws: Sequence[str] | None = None) -> list[Broken]:
    """The laws that do not hold for ``subject``; an exception counts as a law that does not hold.

    Args:
      subject: a transformation, or a function of the learning rate that makes one, such as a rule: then the laws about
        learning rates and storage apply too.
      laws: keys of `LAWS`. Default: all.

    Raises:
      ValueError: a law that is not in `LAWS`.
    """
    out = []
    for name, law in list(_applied(subject, laws)):
        try:
            seen = law()
        except Exception as error:  # whatever a rule under test raises is the finding
            seen = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if seen is not None:
            out.append(Broken(name, seen))
    return out


def check_laws(subject: Any, *, without: Sequence[str] = ()) -> None:
    """Fail unless every law holds, but those named in ``without``; ``subject`` is that of `laws_broken`.

    Raises:
      AssertionError: each law that does not hold, and what was seen.
    """
    broken = laws_broken(subject, _without(without))
    if broken:
        raise AssertionError("laws that do not hold:\n" + "\n".join(f"  {b}" for b in broken))


def each_law(subject: Any, *, without: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """A pytest test for every law, by one decorator; needs pytest. ``subject`` is that of `laws_broken`.

    Usage::

        @each_law(my_rule(1e-2))
        def test_my_rule(law):
            law()

    Raises:
      ValueError: ``without`` names a law that is not in `LAWS`.
    """
    import pytest

    asked = [name for name, _ in _applied(subject, _without(without))]
    return pytest.mark.parametrize("law", [functools.partial(_hold, subject, name) for name in asked], ids=asked)


def _hold(subject: Any, law: str) -> None:
    broken = laws_broken(subject, [law])
    assert not broken, str(broken[0])
