"""A state carried over an edit of its optimizer: the run goes on as if it had always been so."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from containers import CONTAINERS, names_of
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxsgd
from jaxsgd.migration import adopt, migrate
from jaxsgd.paths import leaf_names
from jaxsgd.slots import Mean, Square

PARAMS = {"dense": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)}}
HALF = 5
SWITCH = optax.piecewise_constant_schedule(1e-2, {HALF: 0.3})
"""1e-2 for the first steps, then 3e-3."""


def walk(tx, state, params, steps, start=0):
    """``steps`` steps on gradients that depend on the step and the parameters."""
    for i in range(start, start + steps):
        grads = jax.tree.map(lambda p, i=i: 0.3 * p + jnp.cos(jnp.arange(p.size) + i).reshape(p.shape), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def by_name(tree):
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def told(entries):
    """``{(slot, parameter): reason}`` of a section of a report."""
    return {(e.slot, e.parameter): e.reason for e in entries}


def assert_equal(a, b, tolerance=0.0):
    for name, x, y in zip(leaf_names(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_like(state, fresh):
    """The same structure, and what jit tells arrays apart by."""
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for name, x, y in zip(leaf_names(state), jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        assert (x.aval, x.sharding, x.committed) == (y.aval, y.sharding, y.committed), name


def labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "vector", params)


adam, adamw, clip = jaxsgd.adam, jaxsgd.adamw, jaxsgd.clip_by_global_norm
no_decay = [("bias", {"weight_decay": lambda step: jnp.where(step < HALF, 0.1, 0.0)})]
wide_clip = clip(1e9)

# Old, new, and the optimizer that is the old one for HALF steps and then the new one (where it is not the old one).
EDITS: dict[str, tuple] = {
    "nothing": (adamw(1e-2), adamw(1e-2)),
    "clip added": (adam(1e-2), optax.chain(wide_clip, adam(1e-2))),
    "clip removed": (optax.chain(wide_clip, adam(1e-2)), adam(1e-2)),
    "wrapped": (adam(1e-2), jaxsgd.guard(optax.chain(wide_clip, adam(1e-2), jaxsgd.params_ema(0.9)))),
    "unwrapped": (jaxsgd.guard(optax.chain(wide_clip, adam(1e-2), jaxsgd.params_ema(0.9))), adam(1e-2)),
    "accumulated": (adam(1e-2), jaxsgd.accumulate(adam(1e-2), 1)),
    "order": (optax.chain(wide_clip, adam(1e-2)), optax.chain(adam(1e-2), wide_clip)),
    "constant to schedule": (adam(1e-2), adam(SWITCH), adam(SWITCH)),
    "schedule to constant": (adam(SWITCH), adam(3e-3), adam(SWITCH)),
    "decay added": (adam(1e-2), adamw(1e-2, weight_decay=0.1), adamw(1e-2, weight_decay=lambda t: 0.1 * (t >= HALF))),
    "decay mask": (
        adamw(1e-2, weight_decay=0.1),
        adamw(1e-2, weight_decay=0.1, groups=[("bias", {"weight_decay": 0.0})]),
        adamw(1e-2, weight_decay=0.1, groups=no_decay),
    ),
    "partition to routing": (
        optax.partition({"matrix": jaxsgd.muon(1e-2), "vector": adam(1e-2, nesterov=True)}, labels),
        jaxsgd.muon(1e-2),
    ),
    "schedule-free": (jaxsgd.schedule_free_adamw(1e-2), jaxsgd.guard(jaxsgd.schedule_free_adamw(1e-2))),
    "learnt rate": (jaxsgd.mechanize(adam(1e-2)), optax.chain(optax.identity(), jaxsgd.mechanize(adam(1e-2)))),
    "adamw of optax": (optax.adamw(1e-2), adamw(1e-2)),
    "chain of optax": (optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(SWITCH)), adamw(SWITCH)),
    "sgd of optax": (optax.sgd(SWITCH, momentum=0.9), jaxsgd.sgd(SWITCH, momentum=0.9)),
    "lion of optax": (optax.lion(1e-2), jaxsgd.lion(1e-2)),
    "injected of optax": (optax.inject_hyperparams(optax.adamw)(1e-2), adamw(1e-2)),
    "MultiSteps of optax": (optax.MultiSteps(optax.adamw(1e-2), 1), jaxsgd.accumulate(adamw(1e-2), 1)),
    "schedule-free of optax": (optax.contrib.schedule_free_adamw(1e-2), jaxsgd.schedule_free_adamw(1e-2)),
    "to optax": (adamw(SWITCH, weight_decay=1e-2), optax.adamw(SWITCH, weight_decay=1e-2)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_pain_6_a_run_goes_on_as_if_it_had_always_been_so(edit):
    old, new, whole = (*EDITS[edit], EDITS[edit][0])[:3]
    params, state = walk(old, old.init(PARAMS), PARAMS, HALF)
    before = jax.tree.map(np.array, state)
    carried, report = migrate(state, new, params)
    assert_equal(before, state)
    assert_like(carried, new.init(params))
    got, _ = walk(new, carried, params, HALF, start=HALF)
    wanted, _ = walk(whole, whole.init(PARAMS), PARAMS, 2 * HALF)
    assert_equal(got, wanted, 1e-6)
    assert any(e.slot == "count" and e.reason.startswith("5") for e in report.kept), report


def test_an_unchanged_optimizer_keeps_everything_bit_for_bit():
    tx = jaxsgd.guard(
        optax.chain(clip(1.0), adamw(SWITCH, storage={"mu": jaxsgd.cast("bfloat16")}), jaxsgd.params_ema(0.9))
    )
    params, state = walk(tx, tx.init(PARAMS), PARAMS, HALF)
    carried, report = migrate(state, tx, params)
    assert_equal(carried, state)
    assert report.complete and not report.changed


def test_a_migrated_state_costs_no_compile():
    tx = jaxsgd.guard(adamw(1e-2, storage={"mu": jaxsgd.int8(min_size=4, stochastic=False)}))
    params, state = walk(optax.adamw(1e-2), optax.adamw(1e-2).init(PARAMS), PARAMS, 1)
    step = jax.jit(tx.update)
    for held in (tx.init(params), migrate(state, tx, params)[0], migrate(jax.device_get(state), tx, params)[0]):
        step(params, held, params)
    assert step._cache_size() == 1


def test_the_average_of_parameters_goes_on():
    old, new = (
        optax.chain(adam(1e-2), jaxsgd.params_ema(0.9)),
        optax.chain(wide_clip, adam(1e-2), jaxsgd.params_ema(0.9)),
    )
    params, state = walk(old, old.init(PARAMS), PARAMS, HALF)
    params, carried = walk(new, migrate(state, new, params)[0], params, HALF, start=HALF)
    wanted, whole = walk(old, old.init(PARAMS), PARAMS, 2 * HALF)
    assert_equal(jaxsgd.eval_params(carried, params), jaxsgd.eval_params(whole, wanted), 1e-6)


def test_memory_is_not_shared():
    params, state = walk(adam(1e-2), adam(1e-2).init(PARAMS), PARAMS, 1)
    carried, _ = migrate(state, adam(1e-2), params)
    wanted = jax.tree.map(np.array, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert_equal(carried, wanted)
    with pytest.raises(ValueError, match="'count' was donated to a step"):
        migrate(state, adam(1e-2), params)


# -- the count -------------------------------------------------------------------------------------


def test_another_rule_keeps_what_it_shares():
    params, state = walk(adamw(1e-2), adamw(1e-2).init(PARAMS), PARAMS, HALF)
    carried, report = migrate(state, jaxsgd.lion(1e-2), params)
    assert_equal(carried.slots, {"mu": state.slots["mu"]})
    assert carried.count == HALF
    assert {slot for slot, _ in told(report.dropped)} == {"nu"} and not report.reset
    assert "weight_decay: 0.0001 -> 0.001, as the new optimizer says" in str(report)


@pytest.mark.parametrize("old", [jaxsgd.sgd(1e-2), jaxsgd.sgd(1e-2, momentum=0.9), jaxsgd.lion(1e-2)])
def test_a_rule_with_a_new_slot_starts_anew(old):
    """As the new optimizer would: a full mu at count 0, or an empty nu at a high one, would step too far."""
    params, state = walk(old, old.init(PARAMS), PARAMS, HALF)
    carried, report = migrate(state, adam(1e-2), params)
    assert_equal(carried, adam(1e-2).init(params))
    assert not report.complete and {slot for slot, _ in told(report.reset)} == {"mu", "nu"}
    assert "count: 5 -> 0, with its" in str(report)


def test_the_count_as_asked_for():
    params, state = walk(jaxsgd.lion(1e-2), jaxsgd.lion(1e-2).init(PARAMS), PARAMS, HALF)
    kept, report = migrate(state, adam(1e-2), params, count="keep")
    assert kept.count == HALF and "goes on, but nu of 'dense/bias', 'dense/kernel' are reset" in str(report)
    assert_equal(kept.slots["mu"], state.slots["mu"])
    reset, report = migrate(state, jaxsgd.lion(SWITCH), params, count="reset")
    assert reset.count == 0 and "count: 5 -> 0, as asked for" in str(report)
    assert_equal(reset.slots, state.slots)
    params, state = walk(optax.sgd(1e-2, momentum=0.9), optax.sgd(1e-2, momentum=0.9).init(PARAMS), PARAMS, 2)
    tx = jaxsgd.sgd(SWITCH, momentum=0.9)
    assert "the old state has none" in str(migrate(state, tx, params)[1])
    assert migrate(state, tx, params, count=700)[0].count == 700
    for wrong in ("never", -1, True):
        with pytest.raises(ValueError, match="count="):
            migrate(state, tx, params, count=wrong)  # type: ignore[arg-type]


def test_first_steps_are_as_long_as_documented():
    """Of adam, where moments and count disagree; the numbers stand in the docstring of `migrate`."""
    params = jnp.ones(3)
    state = adam(1.0).init(params)
    full = {"mu": jnp.ones(3), "nu": jnp.zeros(3)}

    def lengths(state, steps):
        out = []
        for _ in range(steps):
            updates, state = adam(1.0).update(jnp.ones(3), state, params)
            out.append(float(-updates[0]))
        return out

    late = lengths(state._replace(count=jnp.int32(10_000)), 12)
    np.testing.assert_allclose([late[0], late[11]], [3.2, 6.6], atol=0.05)
    without_nu = state._replace(count=jnp.int32(10_000), slots=full)
    np.testing.assert_allclose(lengths(without_nu, 1), 32, atol=0.5)
    early = state._replace(slots=full)
    np.testing.assert_allclose(lengths(early, 1), 10, atol=0.05)


def test_unequal_counts():
    """Of two rules that become one, the larger count goes on, and the report has both."""
    old = optax.partition({"matrix": adam(1e-2), "vector": adam(1e-2)}, labels)
    state = by_name(old.init(PARAMS))
    for i, name in enumerate(n for n in state if n.endswith("count")):
        state[name] = jnp.int32(10 * (i + 1))
    carried, report = migrate(state, adam(1e-2), PARAMS)
    assert carried.count == 20 and "20, where others have 10" in str(report)


# -- hyperparameters -------------------------------------------------------------------------------


def test_hyperparameters_are_as_the_new_optimizer_says():
    state = jaxsgd.with_hyper(adamw(0.1).init(PARAMS), learning_rate=0.2)
    carried, report = migrate(state, adamw(3e-4), PARAMS)
    assert carried.hyper["learning_rate"] == jnp.float32(3e-4)
    assert [e.reason for e in report.changed] == ["0.2 -> 0.0003, as the new optimizer says"]
    pinned = jaxsgd.with_hyper(adam(SWITCH).init(PARAMS), learning_rate=0.2)
    carried, report = migrate(pinned, adam(SWITCH), PARAMS)
    assert carried.pins["pin of learning_rate"] < 0 and "was 0.2; it follows its schedule again" in str(report)


# -- forms, shapes, dtypes -------------------------------------------------------------------------


def test_storage_changed():
    params = {"w": jnp.sin(jnp.arange(96.0)).reshape(6, 16), "b": jnp.ones(3)}
    eight = adam(1e-2, storage=jaxsgd.int8(block=4, min_size=8, stochastic=False))
    _, plain = walk(adam(1e-2), adam(1e-2).init(params), params, HALF)
    packed, report = migrate(plain, eight, params)
    assert_like(packed, eight.init(params))
    assert packed.slots["mu"]["w"].codes.dtype == jnp.int8 and report.complete
    assert told(report.kept)["mu", "w"] == "packed at 8 bits" and told(report.kept)["mu", "b"] == ""
    again, report = migrate(packed, adam(1e-2), params)
    assert told(report.kept)["nu", "w"] == "unpacked from 8 bits"
    for slot in ("mu", "nu"):
        error = jnp.abs(again.slots[slot]["w"] - plain.slots[slot]["w"])
        # To nearest, by half of the largest distance of two values: 1 / 15 of a block's largest.
        assert 0 < jnp.max(error) < jnp.max(jnp.abs(plain.slots[slot]["w"])) / 30
    assert_equal(migrate(packed, eight, params)[0], packed)
    longer = adam(1e-2, storage=jaxsgd.int8(block=16, min_size=8))
    assert told(migrate(packed, longer, params)[1].kept)["mu", "w"] == "repacked at 8 bits"
    cast, report = migrate(plain, adam(1e-2, storage=jaxsgd.cast("bfloat16")), params)
    assert_equal(cast.slots, jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain.slots))
    assert "cast from float32 to bfloat16" in str(report)


class Outer(NamedTuple):
    """A matrix of squares by the sums of its rows and columns."""

    row: Any
    col: Any


@dataclass(frozen=True)
class Factored:
    """A storage of one's own: matrices of squares as `Outer`, all else as it is."""

    def accepts(self, kind):
        return kind == "square"

    def pack(self, x, key=None):
        return Outer(x.sum(1), x.sum(0)) if x.ndim == 2 else x

    def unpack(self, packed):
        if not isinstance(packed, Outer):
            return packed
        return packed.row[:, None] * packed.col / jnp.maximum(packed.col.sum(), 1e-30)


@dataclass(frozen=True)
class Logarithm:
    """A storage whose form looks like the plain one."""

    def pack(self, x, key=None):
        return jnp.log(x + 1e-12)

    def unpack(self, packed):
        return jnp.exp(packed) - 1e-12


AROUND = {
    "alone": lambda rule, **options: rule(1e-2, **options),
    "wrapper": lambda rule, **options: jaxsgd.cautious(rule)(1e-2, **options),
    "chain": lambda rule, **options: jaxsgd.guard(
        optax.chain(wide_clip, rule(1e-2, **options), jaxsgd.params_ema(0.9))
    ),
    "partition": lambda rule, **options: optax.partition(
        {"vector": rule(1e-2), "matrix": rule(1e-2, **options)}, labels
    ),
    "steps": lambda rule, **options: optax.MultiSteps(rule(1e-2, **options), 1),
    "injected": lambda rule, **options: optax.inject_hyperparams(rule)(learning_rate=1e-2, **options),
}


@pytest.mark.parametrize("around", AROUND)
def test_storages_of_ones_own(around):
    """Packed by the new optimizer's storage, unpacked by the old one's, wherever the rule stands."""
    make = AROUND[around]
    plain, own = make(jaxsgd.adam), make(jaxsgd.adam, storage={"nu": Factored()})
    params, state = walk(plain, plain.init(PARAMS), PARAMS, HALF)
    nu = find_node(state, "nu/dense/kernel")
    packed, report = migrate(state, own, params)
    assert_like(packed, own.init(params))
    assert report.complete and told(report.kept)["nu", "dense/kernel"] == "packed by Factored"
    np.testing.assert_allclose(find_node(packed, "nu/dense/kernel/row"), nu.sum(1), rtol=1e-6)
    same, report = migrate(packed, own, params)
    assert_equal(same, packed)
    assert report.complete and told(report.kept)["nu", "dense/kernel"] == ""

    back, report = migrate(packed, plain, params, old_tx=own)
    assert_like(back, plain.init(params))
    assert report.complete and told(report.kept)["nu", "dense/kernel"] == "unpacked by Factored"
    wanted = nu.sum(1)[:, None] * nu.sum(0) / nu.sum()
    np.testing.assert_allclose(find_node(back, "nu/dense/kernel"), wanted, rtol=1e-5)

    unknown, report = migrate(packed, plain, params)
    assert "stored in another form (row, col): give old_tx=" in told(report.reset)["nu", "dense/kernel"]
    kept = told(report.reset if around == "partition" else report.kept)
    assert ("mu", "dense/kernel") in kept, report
    assert not np.any(find_node(unknown, "nu/dense/kernel"))

    eight = make(jaxsgd.adam, storage=jaxsgd.int8(min_size=4, block=2))
    packed, report = migrate(packed, eight, params, old_tx=own)
    assert_like(packed, eight.init(params))
    assert told(report.kept)["nu", "dense/kernel"] == "repacked at 8 bits"
    again, report = migrate(packed, own, params)
    assert told(report.kept)["nu", "dense/kernel"] == "repacked by Factored" and report.complete
    np.testing.assert_allclose(find_node(again, "nu/dense/kernel/row"), nu.sum(1), rtol=0.03)


def find_node(state, end):
    """The leaf whose name ends so."""
    return next(leaf for name, leaf in by_name(state).items() if name.endswith(end))


def test_a_storage_that_looks_like_the_plain_one():
    """Told apart by the two optimizers; by names alone the value is taken as it is."""
    plain, own = adam(1e-2), adam(1e-2, storage={"nu": Logarithm()})
    params, state = walk(plain, plain.init(PARAMS), PARAMS, HALF)
    packed, report = migrate(state, own, params, old_tx=plain)
    assert told(report.kept)["nu", "dense/kernel"] == "packed by Logarithm"
    np.testing.assert_allclose(
        packed.slots["nu"]["dense"]["kernel"], np.log(state.slots["nu"]["dense"]["kernel"] + 1e-12), rtol=1e-5
    )
    back, _ = migrate(packed, plain, params, old_tx=own)
    assert_equal(back.slots, state.slots, 1e-6)
    assert_equal(migrate(packed, own, params)[0], packed)


def test_into_a_state_that_was_made_already():
    """`adopt` packs into storages of one's own if it knows the optimizer, and says what it lacks if not."""
    own = adam(1e-2, storage={"nu": Factored()})
    params, state = walk(adam(1e-2), adam(1e-2).init(PARAMS), PARAMS, HALF)
    packed, report = adopt(by_name(state), own.init(params), params, tx=own)
    assert report.complete
    _, report = adopt(by_name(state), own.init(params), params)
    assert "its new form is not known: give tx=" in told(report.reset)["nu", "dense/kernel"]
    _, report = adopt({f"run/opt/{n}": x for n, x in by_name(packed).items()}, state, params, old_tx=own)
    assert report.complete and told(report.kept)["nu", "dense/kernel"] == "unpacked by Factored"


@pytest.fixture
def forget():
    before = set(jaxsgd.RULES)
    yield
    for name in set(jaxsgd.RULES) - before:
        del jaxsgd.RULES[name]


def test_kinds(forget):
    """A slot of another kind is reset, and so is a sum of squares that would be negative."""

    @jaxsgd.rule
    def summed(g, nu: Square):
        return g, nu + g * g

    @jaxsgd.rule
    def signed(g, nu: Mean):
        return g, nu + g

    params = {"w": jnp.arange(3.0)}
    state = signed(0.1).init(params)
    state = state._replace(slots={"nu": {"w": jnp.array([1.0, -1.0, 2.0])}}, count=jnp.int32(4))
    carried, report = migrate(state, summed(0.1), params)
    assert not np.any(carried.slots["nu"]["w"]) and carried.count == 0
    assert "a sum of squares" in told(report.reset)["nu", "w"]
    positive = state._replace(slots={"nu": {"w": jnp.arange(3.0)}})
    assert migrate(positive, summed(0.1), params)[1].complete
    _, report = migrate(positive, summed(0.1), params, old_tx=signed(0.1))
    assert told(report.reset)["nu", "w"] == "it was of the kind mean, now it is square"


def test_a_copy_of_the_parameters_starts_at_any_step():
    params, state = walk(adam(1e-2), adam(1e-2).init(PARAMS), PARAMS, HALF)
    carried, report = migrate(state, jaxsgd.lookahead(adam)(1e-2), params)
    assert carried.count == HALF and not told(report.reset).keys() & {("mu", "dense/bias"), ("nu", "dense/bias")}
    assert_equal({k: carried.slots[k] for k in ("mu", "nu")}, state.slots)
    copies = [slot for slot in carried.slots if slot not in state.slots]
    assert copies
    for slot in copies:
        assert_equal(carried.slots[slot], params)


def test_narrow_and_complex_leaves():
    """A value goes into the new dtype if it fits, and complex ones stay complex."""
    params, state = walk(adam(1e-2), adam(1e-2).init(PARAMS), PARAMS, HALF)
    half = adam(1e-2, storage={"mu": jaxsgd.cast("float16")})
    carried, report = migrate(state, half, params)
    assert report.complete and carried.slots["mu"]["dense"]["kernel"].dtype == jnp.float16
    huge = state._replace(slots={**state.slots, "mu": jax.tree.map(lambda x: x * 1e6, state.slots["mu"])})
    carried, report = migrate(huge, half, params)
    assert told(report.reset)["mu", "dense/bias"] == "its values do not fit into float16" and carried.count == 0
    for name in ("float16", "bfloat16", "float8_e4m3fn"):
        dtype = jnp.dtype(name)
        narrow = {n: np.asarray(x, dtype) if "/slots/" in f"/{n}" else x for n, x in by_name(state).items()}
        carried, report = migrate(narrow, adam(1e-2), params)
        assert report.complete and told(report.kept)["mu", "dense/bias"] == f"cast from {name} to float32"
        assert_equal(carried.slots["mu"], state.slots["mu"], 0.1)
    z = {"w": jnp.array([1 + 2j, 3 - 1j], jnp.complex64)}
    state = adam(1e-2).update(z, adam(1e-2).init(z), z)[1]
    carried, report = migrate(state, optax.chain(wide_clip, adam(1e-2)), z)
    assert report.complete
    assert_equal(carried[1], state)
    carried, report = migrate(state, adam(1e-2), {"w": jnp.ones(2)})
    assert told(report.reset)["mu", "w"] == "it was complex64, now it is float32"


@pytest.mark.parametrize("kind", [kind for kind in CONTAINERS if kind != "nnx.Module"])
def test_containers(kind):
    """A leaf keeps its name in every container, also a field called ``value``; by structure and by names alone."""
    tx, own = adam(1e-2), adam(1e-2, storage={"nu": Factored()})
    params = CONTAINERS[kind](jnp.full((2, 3), 2.0), jnp.ones((2, 3)))
    state = tx.update(params, tx.init(params), params)[1]
    first, second = names_of(kind)
    moved = by_name(state.slots["mu"])
    assert not np.array_equal(moved[first], moved[second])
    for old in (state, by_name(jax.device_get(state))):
        carried, report = migrate(old, jaxsgd.guard(optax.chain(wide_clip, own)), params)
        assert report.complete and {parameter for _, parameter in told(report.kept)} - {None} == {first, second}
        assert_equal(by_name(carried.inner[1].slots["mu"]), moved)
        back, report = migrate(carried, tx, params, old_tx=jaxsgd.guard(optax.chain(wide_clip, own)))
        assert not report.reset
        assert_like(back, tx.init(params))
        assert_equal(back.slots["mu"], state.slots["mu"])
        assert_equal(back.slots["nu"], state.slots["nu"], 1e-6)


def test_leaves_of_every_kind():
    params = {
        "array": jnp.ones((2, 3)), "numpy": np.ones(3, np.float32), "bf16": jnp.ones(3, jnp.bfloat16),
        "half": jnp.ones(3, jnp.float16), "complex": jnp.ones(3, jnp.complex64), "scalar": jnp.float32(2),
        "number": 1.5, "empty": jnp.zeros((0, 3)), "none": None, "index": np.arange(3), "key": np.uint32(7),
    }  # fmt: skip
    frozen = {"groups": [("index|key", {"frozen": True})]}
    tx, new = adam(1e-2, **frozen), optax.chain(wide_clip, adam(1e-2, storage=jaxsgd.int8(min_size=2), **frozen))
    state = tx.init(params)
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)
    carried, report = migrate(state, new, params)
    assert_like(carried, new.init(params))
    assert report.complete, report
    back, report = migrate(carried, tx, params)
    assert_like(back, tx.init(params))
    assert not report.reset, report
    for name, x, y in zip(leaf_names(state.slots), *map(jax.tree.leaves, (back.slots, state.slots)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, err_msg=name)


def test_rounding_added():
    """The slot of what was rounded off begins at 0 in any run: the moments and the count go on."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    carried, _ = migrate({**by_name(adam(1e-2).init(params)), "count": 7}, adam(1e-2, rounding="compensated"), params)
    assert carried.count == 7


def test_groups_changed():
    frozen = adam(1e-2, groups=[("bias", {"frozen": True})])
    params, state = walk(frozen, frozen.init(PARAMS), PARAMS, HALF)
    live, report = migrate(state, adam(1e-2), params)
    assert live.count == HALF
    assert_equal(live.slots["mu"]["dense"], {**state.slots["mu"]["dense"], "bias": jnp.zeros(3)})
    assert told(report.reset) == {(s, "dense/bias"): "new, the old state has none for it" for s in ("mu", "nu")}
    assert "goes on, but mu, nu of 'dense/bias' are reset" in str(report)
    again, report = migrate(live, frozen, params)
    assert_equal(again, state)
    assert not report.reset and {parameter for _, parameter in told(report.dropped)} == {"dense/bias"}


def test_model_changed():
    old = {"a": jnp.ones((2, 3)), "gone": jnp.ones(2), "kept": jnp.ones(4)}
    new = {"a": jnp.ones((2, 5)), "added": jnp.ones(2), "kept": jnp.ones(4)}
    _, state = walk(adam(1e-2), adam(1e-2).init(old), old, HALF)
    carried, report = migrate(state, adam(1e-2), new)
    assert_equal(carried.slots["mu"]["kept"], state.slots["mu"]["kept"])
    assert carried.count == HALF
    reset = told(report.reset)
    assert reset["mu", "a"] == "the shape was (2, 3), now it is (2, 5)"
    assert reset["nu", "added"] == "new, the old state has none for it"
    assert told(report.dropped) == {(s, "gone"): "no such parameter" for s in ("mu", "nu")}


def test_dtypes(x64):
    params = {"w": jnp.ones(3, jnp.float64)}
    state = {"count": np.int64(3), "0/mu/w": np.ones(3, np.float32), "0/nu/w": np.ones(3, np.complex128)}
    carried, report = migrate(state, adam(1e-2), params, count="keep")
    assert carried.slots["mu"]["w"].dtype == jnp.float64 and carried.count.dtype == jnp.int32
    assert told(report.kept)["mu", "w"] == "cast from float32 to float64"
    assert told(report.reset)["nu", "w"] == "it was complex128, now it is float64"


def test_sharded():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    params = {"w": jnp.arange(32.0).reshape(8, 4)}
    _, state = walk(adam(1e-2), adam(1e-2).init(params), params, 2)

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data") if x.ndim else PartitionSpec()))

    fresh = jax.tree.map(place, adam(1e-2, storage=jaxsgd.cast("bfloat16")).init(params))
    carried, report = adopt(by_name(jax.device_get(state)), fresh, params)
    assert_like(carried, fresh)
    assert_equal(carried.slots["mu"], state.slots["mu"], 1e-2)
    back, _ = migrate(carried, adam(1e-2), params)
    assert_like(back, state)


# -- names -----------------------------------------------------------------------------------------


def test_two_rules_with_the_same_slots():
    """In order, where they are as many; otherwise by their whole names, which is said, or not at all."""
    two = optax.chain(adam(1e-2), adam(1e-2))
    _, state = walk(two, two.init(PARAMS), PARAMS, 2)
    more, report = migrate(state, optax.chain(wide_clip, *[adam(1e-2)] * 2), PARAMS)
    assert_equal(more[1:], state)
    assert not report.reset
    one, report = migrate(state, adam(1e-2), PARAMS)
    assert_equal(one, adam(1e-2).init(PARAMS))
    assert "uncertain: there are 2 in the old state (at 0, 1), 1 in the new" in str(report)
    first, report = migrate(state, optax.chain(adam(1e-2)), PARAMS)
    assert_equal(first[0], state[0])
    assert "by its whole name: there are 2" in str(report)
    unlike = optax.chain(adam(1e-2), jaxsgd.lion(1e-2))
    _, state = walk(unlike, unlike.init(PARAMS), PARAMS, 2)
    swapped, report = migrate(state, optax.chain(jaxsgd.lion(1e-2), adam(1e-2)), PARAMS)
    assert_equal(swapped[::-1], state)
    assert report.complete


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def test_modules():
    tx, packed = adam(1e-2), adam(1e-2, storage={"mu": jaxsgd.int8(min_size=4)})
    state = jaxsgd.TrainState.create(Net(nnx.Rngs(0)), tx)
    _, held = walk(tx, state.opt_state, state.params, 2)
    carried, report = migrate(held, jaxsgd.guard(tx), state.params)
    assert_equal(carried.inner, held)
    assert report.complete
    there, report = migrate(migrate(held, packed, state.params)[0], packed, state.params)
    assert_like(there, packed.init(state.params))
    assert report.complete
    optimizer = nnx.Optimizer(Net(nnx.Rngs(0)), optax.adam(1e-2), wrt=nnx.Param)
    assert migrate(optimizer.opt_state, tx, state.params)[1].complete


def nested(state, lists):
    """As a checkpoint is read without its structure: dicts, and positions as names or lists."""
    out: dict[str, Any] = {}
    for name, leaf in by_name(jax.device_get(state)).items():
        *path, last = name.split("/")
        node = out
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf

    def listed(node):
        if not isinstance(node, dict):
            return node
        node = {key: listed(child) for key, child in node.items()}
        return [node.get(str(i)) for i in range(3)] if lists and node and all(map(str.isdigit, node)) else node

    return listed(out)


@pytest.mark.parametrize("lists", [False, True])
def test_raw_checkpoints(lists):
    old = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SWITCH))
    _, state = walk(old, old.init(PARAMS), PARAMS, 2)
    assert_equal(migrate(nested(state, lists), adamw(SWITCH), PARAMS)[0], migrate(state, adamw(SWITCH), PARAMS)[0])
    tx = optax.chain(clip(1.0), adam(1e-2, storage={"mu": jaxsgd.int8(min_size=4, block=2)}))
    state, _ = migrate(state, tx, PARAMS)
    carried, report = migrate(nested(state, lists), tx, PARAMS)
    assert_equal(carried, state)
    assert report.complete


@pytest.mark.parametrize("shape", [(3,), ()], ids=str)
def test_one_array(shape):
    params = jnp.ones(shape)
    for old in (adam(1e-2), optax.adam(1e-2)):
        _, state = walk(old, old.init(params), params, 2)
        carried, report = migrate(state, optax.chain(adam(1e-2), optax.identity()), params)
        assert report.complete, report
        assert carried[0].count == 2
        assert_equal(carried[0].slots, {"mu": optax.tree.get(state, "mu"), "nu": optax.tree.get(state, "nu")})
    packed = adam(1e-2, storage={"mu": jaxsgd.int8(min_size=2)})
    there, report = migrate(carried, packed, params)
    assert report.complete
    assert_like(migrate(there, packed, params)[0], there)


def test_names_within_names():
    """Where nothing but its neighbours tells a leaf's parameter: ``0/trace/dense/kernel`` is no ``kernel``."""
    params = {"kernel": jnp.ones(3), "w": jnp.ones(3), "dense": {"kernel": jnp.ones(3)}, "trace": {"w": jnp.ones(3)}}
    old = optax.sgd(1e-2, momentum=0.9)
    state = jax.tree.unflatten(jax.tree.structure(old.init(params)), [jnp.full(3, i + 1.0) for i in range(4)])
    carried, report = migrate(state, jaxsgd.sgd(1e-2, momentum=0.9), params)
    assert_equal(carried.slots["trace"], state[0].trace)
    assert report.complete


names = st.sampled_from(["mu", "nu", "w", "count", "scale", "codes", "0", "value", "inner", "average", "slots", "step"])
shapes = st.sampled_from([(), (2,), (2, 3)]).map(lambda shape: np.ones(shape, np.float32))
trees = st.recursive(shapes, lambda children: st.dictionaries(names, children, min_size=1, max_size=3), max_leaves=6)
KINDS = [
    adam(1e-2),
    adam(1e-2, storage=jaxsgd.int8(min_size=0, block=2)),
    optax.adam(1e-2),
    optax.trace(0.9),
]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(trees.filter(lambda tree: isinstance(tree, dict)), st.sampled_from(KINDS), st.booleans())
def test_parameters_may_be_called_anything(params, tx, wrapped):
    """Slots, counts and parts of packed values are told from parameters of the same names."""
    numbers = itertools.count(1)
    old = optax.chain(tx, jaxsgd.params_ema(0.9))
    new = jaxsgd.guard(optax.chain(clip(1.0), tx, jaxsgd.params_ema(0.9))) if wrapped else old
    state = jax.tree.map(lambda x: jnp.full(x.shape, next(numbers) % 100, x.dtype), old.init(params))
    carried, report = migrate(state, new, params)
    got = by_name(carried.inner[1:] if wrapped else carried)
    for name, leaf in by_name(state).items():
        if "/hyper/" not in name:
            np.testing.assert_array_equal(got[name], leaf, err_msg=f"{name}\n{report}")
    assert report.complete


# -- words -----------------------------------------------------------------------------------------


def test_reports_are_short():
    params = {f"layer{i:02}": {"kernel": np.ones((128, 128), np.float32), "bias": np.ones(i + 1)} for i in range(40)}
    wider = {k: {**v, "bias": np.ones(100)} for k, v in params.items()}
    _, report = migrate(adam(1e-2).init(params), adam(1e-2), wider)
    lines = str(report).splitlines()
    assert lines[0] == "kept     mu, nu of 40 parameters (1.3 M elements)"
    assert sum(line.startswith("reset") for line in lines) == 20
    assert lines[21] == "reset    ... and 21 more lines"
    assert repr(report) == str(report)


def test_wrong_input():
    other = adam(1e-2).init({"encoder": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"another model's\? The parameters are 'dense/bias'.*'slots/mu/encoder'"):
        migrate(other, adam(1e-2), PARAMS)
    for nothing in ((), {}, optax.EmptyState()):
        with pytest.raises(ValueError, match="holds no array"):
            migrate(nothing, adam(1e-2), PARAMS)
    with pytest.raises(ValueError, match="is a str"):
        migrate({"count": "five"}, adam(1e-2), PARAMS)
    with pytest.raises(ValueError, match="is a ShapeDtypeStruct"):
        migrate(jax.eval_shape(adam(1e-2).init, PARAMS), adam(1e-2), PARAMS)
    with pytest.raises(ValueError, match="two leaves have the name 'a/b'"):
        migrate({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, adam(1e-2), PARAMS)
    with pytest.raises(ValueError, match="matches no parameter"):
        migrate(other, adam(1e-2, groups=[("encoder", {"frozen": True})]), PARAMS)
