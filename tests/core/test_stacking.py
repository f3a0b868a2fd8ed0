"""Matrices of one shape step as one stack: the same numbers as one after the other, in fewer products."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsgd
import jaxsgd.lift
import jaxsgd.stacking
from jaxsgd.elementwise import divided
from jaxsgd.matrices import JORDAN
from jaxsgd.planning.reading import read
from jaxsgd.planning.targets import lookup
from jaxsgd.stacking import LEAST, stacks

SHAPES = {
    "a": (6, 4), "b": (6, 4), "c": (4, 6), "d": (6, 4), "scan": (3, 6, 4), "scan2": (3, 6, 4), "bias": (4,),
}  # fmt: skip
STEPS = 6
RULES = ["muon", "muon_jordan", "normuon", "adamuon", "dion", "soap", "shampoo", "kron"]


def draw(seed, dtype, lead=()):
    rng = np.random.RandomState(seed)
    return {name: jnp.asarray(rng.standard_normal((*lead, *shape)), dtype) for name, shape in SHAPES.items()}


def walked(tx, dtype=jnp.float32):
    """Parameters and state after some steps, and the program of one."""

    @jax.jit
    def run(params, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    return run(draw(0, dtype), draw(1, dtype, (STEPS,)))


def alone(monkeypatch):
    monkeypatch.setattr(jaxsgd.lift, "stacks", lambda keys, leaves: [[i] for i in range(len(keys))])


@pytest.mark.parametrize("name", RULES)
def test_a_stack_takes_the_steps_of_its_leaves(name, monkeypatch, x64, retraced):
    tx = jaxsgd.RULES[name](0.02, weight_decay=0.1)
    stacked = walked(tx, jnp.float64)
    alone(monkeypatch)
    expected = walked(tx, jnp.float64)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), stacked, expected)


@pytest.mark.parametrize("storage", [None, {"mu": jaxsgd.cast("bfloat16")}], ids=["plain", "bf16"])
def test_float32_and_narrow_momentum(storage, monkeypatch):
    tx = jaxsgd.muon(0.02, storage=storage)
    stacked, _ = walked(tx)
    alone(monkeypatch)
    expected, _ = walked(tx)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), stacked, expected)


def products(tx, params):
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    return len(re.findall(r"stablehlo\.dot_general", text))


def test_products_do_not_grow_with_the_number_of_leaves():
    counts = [products(jaxsgd.muon(0.02), {f"w{i}": jnp.ones((6, 4)) for i in range(n)}) for n in (1, 8)]
    assert counts == [15, 15]


def test_only_whole_matrix_work_sees_the_stack():
    """The next momentum, the decay and the rate are applied leaf by leaf: parameters are never stacked."""
    params = {f"w{i}": jnp.ones((6, 4)) for i in range(8)}
    tx = jaxsgd.muon(0.02, weight_decay=0.1)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert text.count(" concatenate(") <= 2, "of the gradients and of the momentum"
    whole, rest = divided(lambda x, y: (x @ (x + 1) + y, 2 * y), (3, 3), jnp.ones((3, 3)), jnp.eye(3))
    made = whole(jnp.ones((3, 3)), jnp.eye(3))
    assert [x.tolist() for x in made] == [[[6.0] * 3] * 3]
    first, second = rest((jnp.ones((3, 3)), jnp.eye(3)), made)
    assert np.array_equal(first, 6 + np.eye(3)) and np.array_equal(second, 2 * np.eye(3))


@pytest.mark.parametrize("name", ["adamw", "muon_jordan"])
def test_scalars_side_by_side_change_no_number(name, monkeypatch, retraced):
    tx = jaxsgd.RULES[name](0.02, weight_decay=0.1)
    expected = walked(tx)
    monkeypatch.setattr(jaxsgd.stacking, "platform_of", lambda leaves: "cuda")
    jax.tree.map(np.testing.assert_array_equal, walked(jaxsgd.RULES[name](0.02, weight_decay=0.1)), expected)


@pytest.mark.compiler("cuda")
def test_small_leaves_of_one_shape_share_kernels_on_a_gpu():
    target = lookup("h100:1")
    there = NamedSharding(target.mesh(), PartitionSpec())
    params = {f"b{i}": jax.ShapeDtypeStruct((64,), jnp.float32) for i in range(24)}

    def kernels(tx):
        def update(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), (params, state, params))
        return sum(read(target.compile(jax.jit(update, donate_argnums=(0, 1)).lower(*shapes))).kernels.values())

    assert kernels(jaxsgd.adamw(1e-3)) <= 6 < 24 <= kernels(optax.adamw(1e-3))


def test_leaves_with_other_settings_are_other_stacks():
    params = {f"w{i}": jnp.ones((6, 4)) for i in range(4)}
    tx = jaxsgd.muon(0.02, groups=[("w[01]", {"ns_steps": 3}), ("w3", {"frozen": True})])
    assert products(tx, params) == 3 * 3 + 3 * 5


def test_no_stack_is_larger_than_a_quarter_of_the_tree():
    sizes = [jax.ShapeDtypeStruct((1024, LEAST // 4096), jnp.float32)] * 16
    found = stacks(["one"] * 16, sizes)
    assert [len(indices) for indices in found] == [4] * 4
    assert sorted(i for indices in found for i in indices) == list(range(16))
    few = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 16
    assert stacks(["one"] * 15 + [None], few) == [list(range(15)), [15]]


@pytest.mark.parametrize("split", [(), ("data",)], ids=["copied", "split"])
def test_a_mesh_takes_each_matrix_on_one_device(split):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    there = NamedSharding(mesh, PartitionSpec(*split))
    rng = np.random.RandomState(0)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for i in range(12)}
    params = jax.device_put(params, there)

    def compiled(tx):
        state = jax.jit(tx.init, out_shardings=jax.tree.map(lambda x: there if x.ndim else None, tx.init(params)))(
            params
        )
        updating = jax.jit(tx.update, out_shardings=(jax.tree.map(lambda x: x.sharding, params), None))
        program = updating.lower(params, state, params).compile()
        return program, program(params, state, params)[0]

    whole, expected = compiled(jaxsgd.muon(0.02))
    spread, found = compiled(jaxsgd.muon(0.02, mesh=mesh))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), found, expected)
    text = spread.as_text()
    moved = re.findall(r" = \S+ (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    assert len(moved) <= 4, "one transfer there and one back, of the momentum and of the update"
    if not split:
        assert spread.cost_analysis()["flops"] < 0.25 * whole.cost_analysis()["flops"], (
            "two of twelve, padded to sixteen"
        )


def test_newton_schulz_in_bfloat16():
    params = {"w": jnp.asarray(np.random.RandomState(0).standard_normal((32, 48)), jnp.float32)}

    def update(tx):
        return tx.update(params, tx.init(params), params)[0]["w"]

    def as_written(x):
        a, b, c = JORDAN[0]
        x = (x / jnp.linalg.norm(x)).astype(jnp.bfloat16)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.astype(jnp.float32)

    def distance(x, y):
        return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

    narrow, wide = update(jaxsgd.muon_jordan(1.0)), update(jaxsgd.muon_jordan(1.0, ns_dtype="float32"))
    original = -as_written(params["w"]) * 1.5**0.5  # the first momentum has the gradient's direction
    assert 1e-3 < distance(narrow, wide) < 1.25 * distance(original, wide), "as near as the original's bfloat16"
    assert narrow.dtype == jnp.float32
    with pytest.raises(ValueError, match="ns_dtype='int8': a floating type is needed"):
        jaxsgd.muon(0.02, ns_dtype="int8")
    with jax.enable_x64(True):
        double = {"w": params["w"].astype(jnp.float64)}
        updates = [
            tx.update(double, tx.init(double), double)[0]["w"]
            for tx in (jaxsgd.muon_jordan(1.0), jaxsgd.muon_jordan(1.0, ns_dtype=None))
        ]
        assert np.array_equal(*updates), "float64 parameters are computed in float64"


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_staggered_refreshes_are_spread_over_the_steps(name):
    """Each basis changes once in an interval, and every step refreshes as much as any other."""
    slot = {"soap": "left_basis", "shampoo": "left_root"}[name]
    shapes = {f"w{i}": (6, 4) for i in range(8)}
    rng = np.random.RandomState(0)
    params = {leaf: jnp.asarray(rng.standard_normal(shape), jnp.float32) for leaf, shape in shapes.items()}

    def refreshed(**given):
        tx = jaxsgd.RULES[name](0.01, precondition_frequency=4, **given)
        update, state, out = jax.jit(tx.update), tx.init(params), []
        for _ in range(9):
            grads = {leaf: jnp.asarray(rng.standard_normal(shape), jnp.float32) for leaf, shape in shapes.items()}
            before = state.slots[slot]
            _, state = update(grads, state, params)
            out.append({leaf for leaf in shapes if not np.array_equal(before[leaf], state.slots[slot][leaf])})
        return out

    together = [len(changed) for changed in refreshed()]
    assert together == [8, 0, 0, 0, 8, 0, 0, 0, 8]
    first, *later = refreshed(stagger=True)
    assert len(first) == 8
    assert [len(changed) for changed in later] == [2] * 8
    assert set.union(*later[:4]) == set(shapes)
    with pytest.raises(TypeError, match="stagger=1"):
        jaxsgd.RULES[name](0.01, stagger=1)
