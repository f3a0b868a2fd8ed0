"""A symmetric product in half the work is the product. Here its kernel is interpreted; compilers prove its form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxsgd
from jaxsgd import symmetric
from jaxsgd.matrices import PRECONDITIONINGS, PRESETS, gram, newton_schulz
from jaxsgd.planning.hlo import Program
from jaxsgd.planning.reading import read
from jaxsgd.planning.targets import lookup

SIZE = 256


def drawn(*shape, dtype="float32", seed=0):
    x = np.random.RandomState(seed).standard_normal(shape)
    return jnp.asarray(x / np.sqrt(max(shape[-2:])), dtype)


def relative(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture
def interpreted(monkeypatch, retraced):
    """The kernel in place of XLA's products, wherever it takes them; what it was asked for."""
    asked, kernel = [], symmetric.half_product

    def counted(arrays, tall, scalars):
        asked.append((len(arrays), arrays[0].shape, tall, scalars))
        return kernel(arrays, tall, scalars, interpret=True)

    monkeypatch.setattr(symmetric, "platform_of", lambda arrays: "cuda")
    monkeypatch.setattr(symmetric, "half_product", counted)
    platforms = jax.lax.platform_dependent

    def chosen(*arrays, cuda=None, **others):
        return platforms(*arrays, **others) if cuda is None else cuda(*arrays)

    monkeypatch.setattr(symmetric.jax.lax, "platform_dependent", chosen)
    return asked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("size", [SIZE, 320], ids=["whole tiles", "small tiles"])
def test_a_gram_matrix(size, tall, dtype):
    x = drawn(2, *((128, size) if tall else (size, 128)), dtype=dtype)
    found = symmetric.half_product([x], tall, (0, 0, 1), interpret=True)
    wide = np.asarray(x, np.float64)
    wide = wide.swapaxes(1, 2) if tall else wide
    assert found.dtype == x.dtype and relative(found, wide @ wide.swapaxes(1, 2)) < jnp.finfo(dtype).eps
    assert np.array_equal(found[:, -64:, :128], found[:, :128, -64:].swapaxes(1, 2)), "each tile is written twice"


def test_a_polynomial_and_a_product_of_matrices_that_commute():
    x = drawn(1, SIZE, 2 * SIZE)
    a = np.asarray(x @ x.swapaxes(1, 2), np.float64)
    one = np.eye(SIZE)
    p = symmetric.half_product([jnp.asarray(a, jnp.float32)], False, (3, -4, 2), interpret=True)
    assert relative(p, 3 * one - 4 * a + 2 * a @ a) < 1e-6
    both = symmetric.half_product([p, jnp.asarray(a, jnp.float32)], False, (0, 0, 1), interpret=True)
    assert relative(both, np.asarray(p, np.float64) @ a) < 1e-6


SHAPES = [(SIZE, SIZE), (SIZE, 640), (640, SIZE), (2, SIZE, 640)]
USUAL = {("frobenius", SHAPES[2]), ("frobenius", SHAPES[3]), ("schatten", SHAPES[0])}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, marks=() if (kind, shape) in USUAL else pytest.mark.slow)
        for kind in PRECONDITIONINGS
        for shape in SHAPES
    ],
    ids=str,
)
def test_newton_schulz_by_the_kernel(kind, shape, interpreted, request):
    x = drawn(*shape)
    found = newton_schulz(x, PRESETS["standard"], 5, preconditioning=kind)
    grams = sum(scalars == (0, 0, 1) and count == 1 for count, _, _, scalars in interpreted)
    assert grams == (3 if 640 in shape else 5), "two steps of a long matrix come from one Gram matrix"
    assert sum(scalars == PRESETS["standard"][0] for *_, scalars in interpreted) == 5
    request.getfixturevalue("monkeypatch").undo()
    usual = newton_schulz(x, PRESETS["standard"], 5, preconditioning=kind)
    with jax.enable_x64(True):
        exact = newton_schulz(jnp.asarray(x, jnp.float64), PRESETS["standard"], 5, preconditioning=kind)
    assert relative(found, exact) < min(1e-5, 1.5 * relative(usual, exact))


@pytest.mark.parametrize(
    "name", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon_jordan", "soap", "shampoo"))]
)
def test_rules_by_the_kernel(name, interpreted, request):
    shape = (SIZE, 384)
    params = {"a": drawn(*shape), "b": drawn(*shape, seed=1), "scan": drawn(2, *shape, seed=2), "bias": drawn(1, 7)[0]}

    def walked():
        tx = jaxsgd.RULES[name](0.02)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        now = params, tx.init(params)
        for _ in range(2):
            now = step(*now)
        return [now[1].slots[side] for side in ("left", "right")] if name in ("soap", "shampoo") else now[0]

    found = walked()
    assert 2 in {shape[0] for _, shape, _, _ in interpreted}, "leaves of one shape are one stack"
    request.getfixturevalue("monkeypatch").undo()
    jax.clear_caches()
    most = 5e-3 if name == "muon_jordan" else 2e-5  # bfloat16
    jax.tree.map(lambda x, y: np.testing.assert_array_less(relative(x, y), most), found, walked())


@pytest.mark.parametrize("transform", [lambda f: f, jax.value_and_grad], ids=["value", "derivative"])
def test_a_step_by_the_kernel_is_mapped_and_differentiated(transform, interpreted, request):
    x, at = drawn(SIZE, SIZE), jnp.asarray([0.5, 1.0])

    def loss(scale, x):
        return jnp.sum(newton_schulz(x * scale, PRESETS["standard"], 1, eps=0.1)[0])

    mapped = jax.vmap(jax.vmap(transform(loss), (0, None)), (None, 0))
    found = mapped(at, jnp.stack([x, -2 * x]))
    counts = {shape[0] for _, shape, _, _ in interpreted}
    assert (max(counts) == 4) if counts else transform is jax.value_and_grad, "one call for all that is mapped"
    request.getfixturevalue("monkeypatch").undo()
    expected = mapped(at, jnp.stack([x, -2 * x]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, expected)


@pytest.mark.parametrize(
    "x",
    [drawn(SIZE, 100), drawn(250, 512), drawn(128, 512), drawn(SIZE, 512) + 0j],
    ids=["length", "size", "small", "complex"],
)
def test_other_matrices_are_left_to_xla(x, interpreted):
    assert relative(gram(x).real, (x @ x.conj().T).real) < 1e-6 and not interpreted


def test_a_count_that_is_traced_is_left_to_xla(interpreted, request):
    x = drawn(SIZE, SIZE)
    found = jax.jit(newton_schulz)(x, PRESETS["standard"], jnp.asarray(2))
    assert {scalars for *_, scalars in interpreted} == {(0, 0, 1)}, "the polynomial's factors are no constants"
    request.getfixturevalue("monkeypatch").undo()
    assert relative(found, newton_schulz(x, PRESETS["standard"], 2)) < 1e-6


def compiled(tx, params, topology):
    """A step on all devices of a topology, with parameters and state on each."""
    target = lookup(topology)
    there = NamedSharding(target.mesh(), PartitionSpec())

    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), (params, state, params))
    return target.compile(jax.jit(update, donate_argnums=(0, 1)).lower(*shapes))


@pytest.mark.compiler("cuda")
def test_a_gpu_computes_half_of_a_symmetric_product():
    params = {f"w{i}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(4)}
    program = Program(compiled(jaxsgd.muon(0.02), params, "h100:1").as_text())
    entry = program.computations[program.entry]
    halves = [i for i in entry.values() if "half_product" in i.label]
    assert len(halves) == 2 * 5, "a Gram matrix and its polynomial, of all leaves, in each step"
    assert sum(program.totals().flops.values()) == 4 * 5 * (1 + 1 + 2) * 512**3
    several = compiled(jaxsgd.muon(0.02), params, "h100:8")
    assert not re.findall("half_product", several.as_text()), "XLA cannot divide a kernel among devices"


@pytest.mark.compiler("cuda")
def test_muon_on_a_gpu_moves_half_of_what_optaxs_does(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    from muon import gpt2, kernels

    shapes = gpt2(12, 768)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    theirs = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=kernels)
    ours, others = (read(compiled(tx, params, "h100:1")) for tx in (jaxsgd.muon(1e-3), theirs))
    assert sum(ours.kernels.values()) <= 200
    assert ours.bytes <= 0.5 * others.bytes
    assert ours.memory.temporaries <= 0.5 * others.memory.temporaries
