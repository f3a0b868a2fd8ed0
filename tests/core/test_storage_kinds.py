"""A storage that a rule accepts changes the bytes of its state as computed; any other is refused by a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsgd
from jaxsgd import RULES
from jaxsgd.storage import accepts

PARAMS = {"kernel": jax.ShapeDtypeStruct((128, 256), jnp.float32), "bias": jax.ShapeDtypeStruct((256,), jnp.float32)}
WRAPPERS = (
    jaxsgd.cautious,
    jaxsgd.cautious_decay,
    jaxsgd.grokfast,
    jaxsgd.centralized,
    jaxsgd.adaptive_clip,
    jaxsgd.lookahead,
    jaxsgd.low_rank,
    jaxsgd.schedule_free,
)


class Sums(NamedTuple):
    """A matrix of rank one."""

    row: jax.Array
    col: jax.Array


@dataclass(frozen=True)
class RankOne:
    """A user's own storage: the second moment of a matrix by its row and column sums."""

    def accepts(self, kind: str) -> bool:
        return kind == "square"

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        return Sums(jnp.sum(x, 1), jnp.sum(x, 0)) if x.ndim == 2 else x

    def unpack(self, packed: Any) -> jax.Array:
        if not isinstance(packed, Sums):
            return packed
        total = jnp.sum(packed.row)
        return packed.row[:, None] * packed.col / jnp.where(total > 0, total, 1)


def of_int8(shape: tuple[int, ...], itemsize: int) -> int:
    size = math.prod(shape)
    if size < 4096 or not shape:
        return size * itemsize
    return size + itemsize * math.prod(shape[:-1]) * -(-shape[-1] // min(256, shape[-1]))


def of_factors(shape: tuple[int, ...], itemsize: int) -> int:
    if len(shape) < 2 or min(shape[-2:]) < 128:
        return math.prod(shape) * itemsize
    return math.prod(shape[:-2]) * sum(shape[-2:]) * itemsize


STORAGES = {
    "int8": (jaxsgd.int8(), of_int8),
    "fp8": (jaxsgd.fp8(), of_int8),
    "bfloat16": (jaxsgd.cast("bfloat16"), lambda shape, itemsize: 2 * math.prod(shape)),
    "float16": (jaxsgd.cast("float16"), lambda shape, itemsize: 2 * math.prod(shape)),
    "factored": (jaxsgd.factored(), of_factors),
    "rank one": (RankOne(), lambda shape, itemsize: itemsize * (sum(shape) if len(shape) == 2 else math.prod(shape))),
}


def wrapped() -> dict[str, Any]:
    """Every wrapper around rules that it takes."""
    out = {}
    for wrap in WRAPPERS:
        for base in ("adam", "sgd", "momentum", "rmsprop", "lion", "yogi", "adagrad"):
            try:
                made = wrap(RULES[base])
            except ValueError:  # both have a slot or a hyperparameter of one name, or the base owns its step
                continue
            out[made.name] = made
    return out


SUBJECTS = {**RULES, **wrapped()}


def slots_of(rule: Any, **arguments: Any) -> dict[str, Any]:
    return jax.eval_shape(rule(1e-3, **arguments).init, PARAMS).slots


def size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("how", STORAGES)
@pytest.mark.parametrize("subject", sorted(SUBJECTS))
def test_bytes_fall_as_computed_or_the_storage_is_refused(subject, how):
    rule, (storage, packed) = SUBJECTS[subject], STORAGES[how]
    plain = slots_of(rule)
    taken = {name for name, slot in rule.slots.items() if accepts(storage, slot.kind) and name in plain}
    if not taken:
        with pytest.raises(ValueError, match="it takes no slot of this rule|no slot .* with these settings"):
            slots_of(rule, storage=storage)
    else:
        stored = slots_of(rule, storage=storage)
        for name, held in plain.items():
            floats = [x for x in jax.tree.leaves(held) if jnp.issubdtype(x.dtype, jnp.floating)]
            others = size(held) - size(floats)
            wanted = sum(packed(x.shape, x.dtype.itemsize) for x in floats) if name in taken else size(floats)
            assert size(stored[name]) == wanted + others, name
    for name, slot in rule.slots.items():
        if not accepts(storage, slot.kind):
            with pytest.raises(ValueError, match=f"does not take a slot of the kind '{slot.kind}'"):
                rule(1e-3, storage={name: storage})


@pytest.mark.parametrize(
    "subject",
    [
        "cautious_adam", "lookahead_adam", "grokfast_adam", "centralized_adam", "low_rank_adam", "schedule_free_adamw",
        "galore", "apollo", "rmsprop", "adagrad", "yogi", "adam_mini", "normuon",
    ],
)  # fmt: skip
def test_eight_bits_are_no_longer_ignored(subject):
    """Each of these kept its moments in float32 under ``storage=int8()``, without a word."""
    big = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    rule = SUBJECTS[subject]
    before = size(jax.eval_shape(rule(1e-3).init, big).slots)
    assert size(jax.eval_shape(rule(1e-3, storage=jaxsgd.int8()).init, big).slots) < 0.8 * before


def test_a_storage_of_ones_own_trains(x64):
    """The lift packs and unpacks any pytree; with row and column sums of rank one nothing is lost."""
    rng = np.random.RandomState(0)
    params = {"w": jnp.asarray(rng.standard_normal((5, 3))), "b": jnp.zeros(3)}
    ours, exact = jaxsgd.adam(0.01, storage={"nu": RankOne()}), jaxsgd.adam(0.01)
    grads = {"w": jnp.outer(jnp.arange(1.0, 6), jnp.arange(1.0, 4)), "b": jnp.ones(3)}
    states = [ours.init(params), exact.init(params)]
    assert isinstance(states[0].slots["nu"]["w"], Sums)
    for _ in range(3):
        found = [tx.update(grads, s, params) for tx, s in zip((ours, exact), states, strict=True)]
        states = [state for _, state in found]
        np.testing.assert_allclose(found[0][0]["w"], found[1][0]["w"], rtol=1e-12)
        params = optax.apply_updates(params, found[1][0])


def test_factors_are_those_of_adafactor(x64):
    """The new factors are moving averages of the means of rows and columns of the squared gradients."""
    rng = np.random.default_rng(0)
    params, tx = {"w": jnp.zeros((3, 130, 140))}, jaxsgd.adam(0.01, b2=0.9, storage={"nu": jaxsgd.factored()})
    state, rows, columns = tx.init(params), np.zeros((3, 130)), np.zeros((3, 140))
    for _ in range(4):
        g = rng.normal(size=(3, 130, 140)) * 10.0 ** rng.uniform(-3, 0, (3, 130, 1))
        _, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state, params)
        rows, columns = 0.9 * rows + 0.1 * (g**2).mean(-1), 0.9 * columns + 0.1 * (g**2).mean(-2)
    np.testing.assert_allclose(state.slots["nu"]["w"].rows, rows, rtol=1e-12)
    np.testing.assert_allclose(state.slots["nu"]["w"].columns, columns, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-15, 0.0, 1e18])
def test_factors_of_small_and_large_gradients(size):
    tx = jaxsgd.adam(0.01, eps=1e-30, storage={"nu": jaxsgd.factored()})
    params = {"w": jnp.ones((128, 128))}
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)({"w": jnp.full((128, 128), size)}, state, params)
        assert np.isfinite(updates["w"]).all()
    np.testing.assert_allclose(updates["w"], -0.01 if size else 0, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 0, True, 2.5])
def test_factors_need_two_axes(size):
    with pytest.raises(ValueError, match=f"min_dim_size={size}: a whole number"):
        jaxsgd.factored(min_dim_size=size)


class Keyless:
    """Packs without a key."""

    def pack(self, x):
        return x

    unpack = pack


@pytest.mark.parametrize(
    ("storage", "error", "words"),
    [
        (Keyless(), TypeError, r"storage\['mu'\]=.*its pack needs the arguments \(x, key\)"),
        ("int8", TypeError, "a storage such as"),
        (jaxsgd.int8, TypeError, "a storage"),
        ({"mu": jaxsgd.int8}, TypeError, "a storage is needed"),
        ({"mo": jaxsgd.int8()}, ValueError, "no slot 'mo'"),
        ({"nu": jaxsgd.cast("float16")}, ValueError, "does not take a slot of the kind 'square'"),
    ],
)
def test_wrong_storages_are_refused(storage, error, words):
    with pytest.raises(error, match=words):
        jaxsgd.adam(1e-3, storage=storage)
    with pytest.raises(error, match=words):
        jaxsgd.adam(1e-3, groups=[("a", {"storage": storage})])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_need_a_scale(dtype):
    with pytest.raises(ValueError, match="too few exponents without a scale"):
        jaxsgd.cast(dtype)


def test_a_storage_for_slots_that_are_off_is_refused():
    """An option that is accepted and does nothing is a trap: sgd without momentum keeps no slot."""
    for storage in (jaxsgd.int8(), jaxsgd.cast("bfloat16"), {"trace": jaxsgd.cast("bfloat16")}):
        with pytest.raises(ValueError, match="sgd: storage=.*no slot trace with these settings; kept are: none"):
            jaxsgd.sgd(1e-3, storage=storage)
        assert jaxsgd.sgd(1e-3, momentum=0.9, storage=storage).lift.slots == ("trace",)
    with pytest.raises(ValueError, match="adam: storage=.*no slot mu with these settings; kept are: nu"):
        jaxsgd.adam(1e-3, b1=0.0, storage={"mu": jaxsgd.int8()})
    jaxsgd.adam(1e-3, b1=0.0, storage=jaxsgd.int8())
    jaxsgd.sgd(1e-3, accumulator_dtype="bfloat16")  # as with optax


@dataclass(frozen=True)
class Halves:
    """A user's own storage that packs into containers without names."""

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        half = x.size // 2
        return [jnp.ravel(x)[half:], {"first": jnp.ravel(x)[:half], "shape": (jnp.zeros(x.shape, bool),)}]

    def unpack(self, packed: Any) -> jax.Array:
        second, first = packed
        return jnp.concatenate([first["first"], second]).reshape(first["shape"][0].shape)


NNX_STORAGES = {
    "int8": jaxsgd.int8(min_size=0),
    "dynamic": jaxsgd.int8(min_size=0, map="dynamic"),
    "int4": jaxsgd.int4(min_size=0),
    "fp8": jaxsgd.fp8(min_size=0),
    "factored": {"nu": jaxsgd.factored(min_dim_size=2)},
    "rank one": {"nu": RankOne()},
    "halves": Halves(),
}
AROUND = {
    "the rule alone": lambda tx: tx,
    "accumulate": lambda tx: jaxsgd.accumulate(tx, 2),
    "guard": jaxsgd.guard,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize(
    ("storage", "around"),
    [(name, "the rule alone") for name in NNX_STORAGES] + [("int8", name) for name in AROUND if "rule" not in name],
)
def test_an_nnx_optimizer_keeps_packed_slots(storage, around):
    """It makes mappings of containers inside a slot, and sorts their keys."""
    tx = optax.with_extra_args_support(AROUND[around](jaxsgd.adam(0.1, storage=NNX_STORAGES[storage])))
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    optimizer, params = nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.to_pure_dict(nnx.state(model))
    state = tx.init(params)
    for i in range(4):
        grads = jax.tree.map(lambda x, i=i: jnp.cos(3.0 * x + i), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        gradient = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(gradient, grads)
        optimizer.update(model, gradient)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@dataclass(frozen=True)
class Flat:
    """It forgets the shape."""

    def pack(self, x, key=None):
        return x.reshape(-1)

    def unpack(self, packed):
        return packed


def test_a_storage_that_gives_another_shape_back_is_named():
    tx, params = jaxsgd.momentum(0.1, storage={"trace": Flat()}), {"w": jnp.ones((2, 3))}
    with pytest.raises(
        ValueError, match=r"Flat\(\) packed trace of shape \(2, 3\) and unpacked an array of shape \(6,\)"
    ):
        tx.update(params, tx.init(params), params)
