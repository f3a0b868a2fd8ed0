"""Every kind of leaf, container, schedule and state that a rule may meet gives the right number, or a clear error."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import case_of
from flax import nnx

import jaxsgd
from jaxsgd import RULES, torch

FREEZE = [("steps", {"frozen": True})]


def stepper(tx: Any) -> Any:
    """``(grads, state, params) -> (updates, state)`` with a loss and an objective for those who ask."""
    tx = optax.with_extra_args_support(tx)

    def objective(params: Any) -> Any:
        floating = [x for x in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        return sum((jnp.sum(jnp.asarray(x, jnp.float32) ** 2) for x in floating), jnp.zeros(()))

    return lambda g, state, params: tx.update(g, state, params, value=jnp.float32(1.5), obj_fn=objective)


def leaves() -> dict[str, Any]:
    """One leaf of every kind."""
    rng = np.random.RandomState(0)
    matrix = rng.standard_normal((4, 3))
    return {
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(0.5),
        "number": 1.5,
        "numpy": matrix.astype(np.float32),
        "numpy_scalar": np.float32(2.0),
        "none": None,
        "bfloat16": jnp.asarray(matrix, jnp.bfloat16),
        "float16": jnp.asarray(matrix, jnp.float16),
        "list": [jnp.ones(3), jnp.ones((2, 2, 2))],
        "steps": jnp.arange(3),
    }


def gradient(x: Any, seed: int = 1) -> Any:
    """A gradient of one leaf; that of an integer is float0."""
    if jnp.issubdtype(jnp.result_type(x), jnp.integer):
        return np.zeros(jnp.shape(x), jax.dtypes.float0)
    draw = np.random.RandomState(seed).standard_normal(jnp.shape(x))
    return jnp.asarray(draw, jnp.result_type(x))


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_kind_of_leaf(name):
    tx, params = RULES[name](0.01, groups=FREEZE), leaves()
    grads, state = jax.tree.map(gradient, params), None
    state = before = tx.init(params)
    first, state = stepper(tx)(grads, state, params)
    updates, state = stepper(tx)(grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for (path, u), p in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        assert u.dtype == jnp.result_type(p) and u.shape == jnp.shape(p), path
        assert np.isfinite(np.asarray(u, np.float32)).all(), path
    assert np.all(np.asarray(updates["steps"]) == 0)
    # A number, and arrays of NumPy, get what arrays of JAX get.
    same = jax.tree.map(lambda p: jnp.asarray(p, jnp.result_type(p)), params)
    other = stepper(tx)(grads, tx.init(same), same)[0]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


RATE_OF_THEIR_OWN = {
    "madgrad": "eps is added to the learning rate, as in the authors' code",
    "muon_jordan": "leaves that are no hidden matrices have a learning rate of their own, 3e-4",
    "torch_rprop": "the learning rate is where its steps start; they are at least min_step_size",
}


@pytest.mark.parametrize("name", sorted(set(RULES) - set(RATE_OF_THEIR_OWN)))
def test_a_rate_of_zero_moves_nothing(name):
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.ones(3)}
    tx = RULES[name](0.0)
    state = tx.init(params)
    for seed in range(3):
        updates, state = stepper(tx)(jax.tree.map(lambda p, s=seed: gradient(p, s), params), state, params)
        for x in jax.tree.leaves(updates):
            np.testing.assert_array_equal(x, np.zeros_like(x))


# -- containers --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    kernel: Any
    value: Any


@flax.struct.dataclass
class Struct:
    kernel: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Callable:
    """What an Equinox module is: a pytree that can be called."""

    kernel: Any
    value: Any

    def __call__(self, x):
        raise AssertionError("a pytree was called")


CONTAINERS = {
    "dict": lambda k, v: {"kernel": k, "value": v},
    "OrderedDict": lambda k, v: collections.OrderedDict(kernel=k, value=v),
    "list": lambda k, v: [k, v],
    "tuple": lambda k, v: (k, v),
    "NamedTuple": Pair,
    "flax.struct": Struct,
    "callable": Callable,
    "FrozenDict": lambda k, v: flax.core.freeze({"kernel": k, "value": v}),
    "nnx.State": lambda k, v: nnx.State({"kernel": nnx.Param(k), "value": nnx.Param(v)}),
    "linen boxes": lambda k, v: {
        "kernel": nn.Partitioned(k, ("a", "b")),
        "value": nn.Partitioned(v, ("a", None)),
    },
}
SOME = {
    "adamw": jaxsgd.adamw(0.01),
    "adafactor": jaxsgd.adafactor(0.01),
    "prodigy": jaxsgd.prodigy(1.0),
    "soap": jaxsgd.soap(0.01),
    "cautious": jaxsgd.cautious(jaxsgd.adam)(0.01),
    "schedule_free": jaxsgd.schedule_free_adamw(0.01),
    "torch.Adam": torch.Adam(0.01),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_numbers(container):
    k, v = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(1, 2, 8).reshape(4, 2)
    make = CONTAINERS[container]
    for name, tx in SOME.items():
        seen = []
        for build in (CONTAINERS["dict"], make):
            params, grads = build(k, v), build(0.1 * k + 1, 0.2 * v)
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(grads, state, params)
            seen.append(jax.tree.leaves(updates))
        for a, b in zip(*seen, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("container", ["NamedTuple", "flax.struct", "callable"])
def test_a_field_called_value_keeps_its_name(container):
    params = CONTAINERS[container](jnp.ones((4, 3)), jnp.ones((4, 2)))
    tx = jaxsgd.adam(0.1, groups=[(r"^(query|key|value)$", {"frozen": True})])
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.all(updates.value == 0) and np.all(updates.kernel != 0)
    assert "value" in jaxsgd.describe(tx, params)


@pytest.mark.parametrize("argument", ["mask", "muon"])
def test_a_pytree_that_can_be_called_is_a_tree(argument):
    params = Callable(jnp.ones((4, 3)), jnp.ones((4, 2)))
    if argument == "mask":
        tx = jaxsgd.adamw(0.1, weight_decay=1.0, mask=Callable(True, False))
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        assert np.all(updates.kernel != 0) and np.all(updates.value == 0)
    else:
        dims = optax.contrib.MuonDimensionNumbers(0, 1)
        tx = jaxsgd.muon(0.1, muon_weight_dimension_numbers=Callable(dims, None))
        assert tx.lift.overrides(params)[1]["axes"] is None and tx.lift.overrides(params)[0]["axes"] is not None


def test_function_leaves_are_refused():
    with pytest.raises(TypeError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
        jaxsgd.adam(0.1).init(Callable(jnp.ones(3), jax.nn.relu))


# -- a state of other parameters -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_state_of_other_shapes_is_refused(name):
    tx = RULES[name](0.01)
    old, new = {"w": jnp.ones((8, 1))}, {"w": jnp.ones((8, 10))}
    state = tx.init(old)
    if not jax.tree.leaves(state.slots):
        return  # nothing is kept of an array
    expected = jax.eval_shape(tx.init, new)
    if [x.shape for x in jax.tree.leaves(expected.slots)] == [x.shape for x in jax.tree.leaves(state.slots)]:
        return  # one number for each array: it fits any
    with pytest.raises(ValueError, match="'w' has the shape"):
        stepper(tx)(new, state, new)


# -- schedules ---------------------------------------------------------------------------------------


def test_a_schedule_may_be_plain_python_outside_jit():
    params, table = {"w": jnp.ones(3)}, np.asarray([0.5, 0.25, 0.125])
    loop = {"rate": 1.0}
    for schedule, wanted in (
        (lambda step: 0.5 if step < 1 else 0.25, [0.5, 0.25, 0.25]),
        (lambda step: float(table[int(step)]), [0.5, 0.25, 0.125]),
        (lambda step: loop["rate"], [1.0, 0.5, 0.25]),
    ):
        tx = jaxsgd.sgd(schedule)
        state, loop["rate"] = tx.init(params), 1.0
        for rate in wanted:
            updates, state = tx.update({"w": jnp.ones(3)}, state, params)
            np.testing.assert_allclose(updates["w"], -rate)
            loop["rate"] /= 2


@pytest.mark.parametrize("how", ["eager", "jit", "scan", "disable_jit", "vmap"])
def test_schedules_in_groups(how):
    """lr_mult, and any other number of a group, may be a schedule."""
    rate = optax.linear_schedule(1.0, 0.0, 4)
    tx = jaxsgd.adamw(0.1, groups=[("b", {"lr_mult": rate, "weight_decay": rate}), ("c", {"learning_rate": rate})])
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}

    def walk(params):
        def step(carry, _):
            p, s = carry
            u, s = tx.update(jax.tree.map(jnp.ones_like, p), s, p)
            return (p, s), u

        if how in ("eager", "disable_jit"):
            carry, out = (params, tx.init(params)), []
            for _ in range(3):
                carry, u = step(carry, None)
                out.append(u)
            return jax.tree.map(lambda *x: jnp.stack(x), *out)
        return jax.lax.scan(step, (params, tx.init(params)), length=3)[1]

    if how == "jit":
        seen = jax.jit(walk)(params)
    elif how == "vmap":
        seen = jax.tree.map(lambda x: x[0], jax.vmap(walk)(jax.tree.map(lambda p: jnp.stack([p, p]), params)))
    elif how == "disable_jit":
        with jax.disable_jit():
            seen = walk(params)
    else:
        seen = walk(params)
    for i in range(3):
        r = 1 - i / 4
        np.testing.assert_allclose(seen["a"][i], -0.1 * (1 + 1e-4), rtol=1e-5)
        np.testing.assert_allclose(seen["b"][i], -0.1 * r * (1 + r), rtol=1e-5)
        np.testing.assert_allclose(seen["c"][i], -r * (1 + 1e-4), rtol=1e-5)


# -- arguments of the wrong kind -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mask": {"w": 1.0}}, TypeError, "mask: .*'w'.*True or False"),
        ({"mask": {"v": True}}, ValueError, "mask"),
        ({"groups": "w"}, TypeError, "a list of"),
        ({"groups": [("w", {"frozen": "yes"})]}, TypeError, "frozen='yes': True or False"),
        ({"groups": [("w", {"frozen": 1})]}, TypeError, "frozen=1: True or False"),
        ({"groups": [("w",)]}, TypeError, "a pair"),
        ({"groups": [(3, {"frozen": True})]}, TypeError, "a regular expression"),
        ({"groups": [("w", {"lr_mult": "big"})]}, TypeError, "lr_mult='big'"),
        ({"norms": "yes"}, TypeError, "norms='yes'"),
        ({"rounding": "up"}, ValueError, "rounding='up'"),
        ({"dynamic": ("b3",)}, ValueError, "dynamic='b3'"),
        ({"b1": 1.0}, ValueError, "b1=1.0"),
        ({"b1": "0.9"}, TypeError, "b1='0.9'"),
        ({"nesterov": 1}, TypeError, "nesterov=1: True or False"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        jaxsgd.adam(0.1, **arguments).init({"w": jnp.ones(2)})


# -- the state of an NNX optimizer ------------------------------------------------------------------------


def test_the_state_of_an_nnx_optimizer():
    """Reading and setting work on it, and what is set stays a variable of the optimizer."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = jaxsgd.schedule_free_adamw(optax.constant_schedule(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    assert int(jaxsgd.metrics(optimizer.opt_state)["step"]) == 1
    evaluated = jaxsgd.eval_params(optimizer.opt_state, params)
    assert jax.tree.structure(evaluated) == jax.tree.structure(params)
    before = jax.tree.structure(nnx.state(optimizer, nnx.OptState))
    optimizer.opt_state = nnx.data(jaxsgd.with_hyper(optimizer.opt_state, learning_rate=0.5))
    assert jax.tree.structure(nnx.state(optimizer, nnx.OptState)) == before
    optimizer.update(model, grads)
    assert float(jaxsgd.metrics(optimizer.opt_state)["learning_rate"]) == 0.5


@pytest.mark.parametrize("storage", [{}, jaxsgd.int8(min_size=0)], ids=["plain", "int8"])
def test_look_ahead_on_an_nnx_optimizer(storage):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jaxsgd.velocity(0.1, storage=storage), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    params = nnx.state(model, nnx.Param)
    ahead = jaxsgd.look_ahead(optimizer.opt_state, params)
    for a, p in zip(jax.tree.leaves(ahead), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, p - 0.09, rtol=1e-5, atol=1e-6)


def test_a_slot_called_average_is_no_average():
    """A role is said by the slot's annotation, never by its name."""
    before = set(RULES)
    try:

        @jaxsgd.rule
        def toy_average(g, average, *, t):
            return g, average + g

        params = {"w": jnp.ones(3)}
        tx = toy_average(0.1)
        state = tx.update(params, tx.init(params), params)[1]
        np.testing.assert_array_equal(jaxsgd.eval_params(state, params)["w"], params["w"])
    finally:
        for name in set(RULES) - before:
            del RULES[name]


def test_complex_parameters_are_refused_or_turn():
    """Every rule either turns with the phase of its parameters, or says why not in its case."""
    assert {name for name in RULES if "complex" in case_of(name).exceptions} <= {"kron", "noisy_sgd"}


@pytest.mark.parametrize("name", sorted(RULES))
def test_complex_parameters_need_no_promotion(name):
    """An equation scales complex numbers by real ones, which JAX refuses under strict promotion of dtypes."""
    params = {"z": np.ones((4, 3), np.complex64), "x": np.ones(3, np.float32)}
    with jax.numpy_dtype_promotion("strict"):
        tx = RULES[name](0.01)
        updates, _ = jax.eval_shape(lambda p: stepper(tx)(p, tx.init(p), p), params)
    assert {name: u.dtype for name, u in updates.items()} == {"z": np.complex64, "x": np.float32}


# -- a transformation as a pytree ---------------------------------------------------------------------------


TRANSFORMATIONS = {
    "a rule": jaxsgd.adamw(0.1),
    "torch's": torch.SGD(0.1, momentum=0.9),
    "a wrapped rule": jaxsgd.cautious(jaxsgd.adam)(0.1),
    "a tree rule": jaxsgd.newton_cg(),
    "accumulate": jaxsgd.accumulate(jaxsgd.adam(0.1), 2),
    "guard": jaxsgd.guard(jaxsgd.adam(0.1)),
    "mechanize": jaxsgd.mechanize(jaxsgd.adam(0.1)),
    "a chain": optax.chain(jaxsgd.clip_by_global_norm(1.0), jaxsgd.adam(0.1)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_is_taken_apart_and_put_together(name):
    """By JAX's tree functions, by filters, which leave None in places, and by cloudpickle."""
    cloudpickle = pytest.importorskip("cloudpickle")
    equinox = pytest.importorskip("equinox")
    tx = TRANSFORMATIONS[name]
    arrays, others = equinox.partition(tx, equinox.is_array)
    again = {
        "tree map": jax.tree.map(lambda x: x, tx),
        "filter": equinox.combine(arrays, others),
        "cloudpickle": cloudpickle.loads(cloudpickle.dumps(tx)),
    }
    assert repr(arrays) and repr(tx._replace(init=None))
    params = {"w": jnp.arange(3.0)}

    def loss(p: Any) -> Any:
        return jnp.sum(p["w"] ** 2)

    wanted = tx.update(params, tx.init(params), params, value_fn=loss)
    for way, made in again.items():
        assert type(made) is type(tx) and (repr(made) == repr(tx) or "<locals>" in repr(tx)), way
        found = made.update(params, made.init(params), params, value_fn=loss)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b, way)
