"""Large arrays with packed slots are stepped in pieces on a CPU: the same numbers, in little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsgd
from jaxsgd import int8, leaf, pieces
from jaxsgd.elementwise import elementwise

RULES = ("adamw", "lion", "momentum", "adagrad", "rmsprop", "nesterov", "yogi", "adabelief", "schedule_free_adamw")
SHAPES = {"rows": (384, 1000), "blocks": (3, 4096, 32), "flat": (300_032,), "odd": (601, 512)}
"""Rows that are no multiple of a block; more than two axes; one axis; a last piece that is shorter."""


def _steps(tx, params, count=3):
    """Some steps, with gradients that grow and change their sign."""
    update = jax.jit(tx.update)
    state, out = tx.init(params), []
    for i in range(count):
        grads = jax.tree.map(lambda p, i=i: (i + 1) * jnp.sin((i + 1) * 40 * p), params)
        updates, state = update(grads, state, params)
        out.append(updates)
    return out, state


def _params(shape, dtype=jnp.float32):
    return {"w": jax.random.normal(jax.random.key(1), shape).astype(dtype)}


@pytest.fixture
def small(monkeypatch, retraced):
    monkeypatch.setattr(pieces, "PIECE", 2**14)
    monkeypatch.setattr(leaf, "LARGE", 2**15)


@pytest.fixture
def whole(monkeypatch):
    """What the same calls give with no piece."""

    def of(make, params):
        with monkeypatch.context() as m:
            m.setattr(leaf, "LARGE", 2**40)
            jax.clear_caches()
            out = _steps(make(), params)
        jax.clear_caches()
        return out

    return of


def _loops(tx, params):
    grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    return "while" in jax.jit(tx.update).lower(grads, state, params).as_text()


def _same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jnp.integer):
            # The compiler may fuse a product and a sum in one program only: a code then goes to its other neighbour.
            assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3
        else:
            # A step that is the difference of two parameters has their rounding, 5e-7 at 4.
            close = np.isclose(a, b, rtol=1e-5, atol=5e-7)
            assert np.mean(~close) < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_in_pieces_is_the_rule(rule, small, whole):
    make, params = functools.partial(jaxsgd.RULES[rule], 1e-2, storage=int8()), _params(SHAPES["odd"])
    assert _loops(make(), params)
    _same(_steps(make(), params), whole(make, params))


@pytest.mark.parametrize("storage", [jaxsgd.int4(), jaxsgd.fp8()], ids=["int4", "fp8"])
def test_other_codes_are_cut(storage, small, whole):
    make, params = functools.partial(jaxsgd.adamw, 1e-2, storage=storage), _params(SHAPES["odd"])
    assert _loops(make(), params)
    _same(_steps(make(), params), whole(make, params))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_arrays_of_any_shape_are_cut(shape, small, whole):
    make, params = functools.partial(jaxsgd.adamw, 1e-2, storage=int8()), _params(shape)
    assert _loops(make(), params)
    _same(_steps(make(), params), whole(make, params))


@pytest.mark.parametrize("options", [{}, {"rounding": "compensated"}], ids=str)
def test_16_bit_parameters_are_cut(options, small, whole):
    make, params = functools.partial(jaxsgd.adamw, 1e-2, storage=int8(), **options), _params((601, 512), jnp.bfloat16)
    assert _loops(make(), params)
    _same(_steps(make(), params), whole(make, params))


def test_what_looks_at_the_whole_array_is_not_cut(small):
    params = _params((601, 512))
    for name in ("adafactor", "lamb", "muon"):
        tx = jaxsgd.RULES[name](1e-2, storage=int8())
        assert not _loops(tx, params), name


def test_members_with_rates_of_their_own_are_cut_alike(small):
    params = _params((64, 1024))

    def stepped(rate):
        tx = jaxsgd.adamw(rate, storage=int8())
        return tx.update(params, tx.init(params), params)[0]

    rates = jnp.asarray([1e-3, 1e-2])
    together = jax.jit(jax.vmap(stepped))(rates)
    _same(together, jax.tree.map(lambda *x: jnp.stack(x), *(jax.jit(stepped)(rate) for rate in rates)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_split_array_is_left_to_the_compiler(kind, small):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jax.device_put(_params((1024, 512)), NamedSharding(mesh, PartitionSpec("data")))
    tx = jaxsgd.adamw(1e-2, storage=int8())
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert "while" not in text and "all-gather" not in text


def test_the_memory_beside_the_slots_is_small():
    params = {"w": jax.ShapeDtypeStruct((65536, 1024), jnp.float32)}
    tx = jaxsgd.adamw(1e-2, storage=int8())
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert step.memory_analysis().temp_size_in_bytes < 0.05 * 4 * 65536 * 1024  # a whole moment would be 1


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x, s: jnp.where(x > s, jnp.sqrt(x), s * x), True),
        (lambda x, s: x + jnp.max(s), True),
        (lambda x, s: x - jnp.mean(x), False),
        (lambda x, s: x[::-1] * s, False),
        (lambda x, s: x * x.shape[0], False),
        (lambda x, s: x @ x.T, False),
        (lambda x, s: x * jnp.arange(x.size).reshape(x.shape), False),
        (lambda x, s: jnp.cumsum(x), False),
    ],
)
def test_elementwise(fn, expected):
    shapes = [
        (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)) for shape in [(8, 8), (4, 8)]
    ]
    assert elementwise(fn, *shapes) is expected
