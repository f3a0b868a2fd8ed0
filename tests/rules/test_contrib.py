"""Mechanic, sharpness-aware minimization, plateaus: as optax has them, and where they go on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd.numerics import wide
from jaxsgd.testing import draw_gradients, draw_params
from jaxsgd.transforms import MechanizeState, PlateauState, SamState, mechanize, normalize, reduce_on_plateau, sam

pytestmark = pytest.mark.slow  # a minute and a half on two cores; CI runs it

theirs = optax.contrib
PARAMS = {"a": {"w": jnp.asarray([[1.0, -2.0], [3.0, 0.5]])}, "b": jnp.asarray(0.5), "none": None}
MAKERS = {
    "mechanize": lambda tx: mechanize(tx, s_init=1e-2),
    "sam": lambda tx: sam(tx, optax.chain(normalize(), jaxsgd.sgd(0.1))),
    "sam opaque": lambda tx: sam(tx, optax.chain(normalize(), jaxsgd.sgd(0.1)), opaque_mode=True),
    "plateau": lambda tx: optax.chain(tx, reduce_on_plateau(0.5, 1)),
}


def same(a, b, rtol=0.0, atol=0.0):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def noise(seed, like=PARAMS):
    return optax.tree.random_like(jax.random.key(seed), like, jax.random.normal)


def apply(params, updates):  # optax.apply_updates itself promotes
    return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)


def bowl(params):
    """A loss of any tree, in float32 at least."""
    return sum((jnp.sum(jnp.cosh(jnp.abs(wide(p)) - 1)) for p in jax.tree.leaves(params)), 0.0)


def gradient(params, i=0):
    del i
    return jax.tree.map(lambda g, p: g.astype(p.dtype), jax.grad(bowl)(params), params)


def walker(tx, steps):
    """A compiled ``(params, gradients) -> parameters after each step, last state``; by default gradients of `bowl`."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params, grads=None):
        def step(carry, g):
            params, state = carry
            g = gradient(params) if g is None else g
            updates, state = tx.update(g, state, params, value=bowl(params), grad_fn=gradient)
            params = apply(params, updates)
            return (params, state), params

        (_, state), visited = jax.lax.scan(step, (params, tx.init(params)), grads, length=steps)
        return visited, state

    return run


def walk(tx, params, grads=None, steps=12):
    return walker(tx, steps)(params, grads)


# -- what holds for each -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", MAKERS)
def test_state_never_changes_its_types(kind, dtype):
    """Under strict promotion, with float32 gradients on narrow weights, for our rules and optax's: one compile."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    cases = [("strict", jaxsgd.adamw(0.01))]
    if kind != "plateau":  # all others hold an inner state, whose dtypes optax itself would change
        cases.append(("standard", optax.adamw(0.01)))
    float32_gradient = lambda p, i: jax.tree.map(wide, gradient(p))
    for promotion, inner in cases:
        tx = MAKERS[kind](inner)

        @jax.jit
        def step(params, state, grads, tx=tx):
            return tx.update(grads, state, params, value=jnp.asarray(1.0), grad_fn=float32_gradient)

        with jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion("raise"):
            state, p = tx.init(params), params
            types = jax.tree.map(jax.typeof, state)
            for i in range(4):
                updates, state = step(p, state, noise(i))
                assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
                p = apply(p, updates)
                assert jax.tree.map(jax.typeof, state) == types
        assert step._cache_size() == 1
        if kind == "plateau":
            assert {x.dtype.name for x in state[1]} == {"float32", "int32"}
        if kind == "mechanize":
            assert {x.dtype.name for x in jax.tree.leaves((state.r, state.s, state.delta))} == {"float32"}


@pytest.mark.parametrize("kind", MAKERS)
def test_scan_and_eager_and_vmap_agree(kind):
    tx = MAKERS[kind](jaxsgd.adam(0.1))
    grads = jax.tree.map(lambda *g: jnp.stack(g), *(noise(i) for i in range(5)))

    def run(scale):
        def body(carry, g):
            params, state = carry
            g = jax.tree.map(lambda x: scale * x, g)
            updates, state = tx.update(g, state, params, value=scale, grad_fn=gradient)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), grads)[0]

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(5):
        updates, state = tx.update(noise(i), state, params, value=jnp.asarray(1.0), grad_fn=gradient)
        params = optax.apply_updates(params, updates)
    same(jax.jit(run)(jnp.asarray(1.0)), (params, state), 2e-5, 1e-6)
    swept = jax.vmap(run)(jnp.asarray([0.5, 1.0]))
    same(jax.tree.map(lambda x: x[1], swept), (params, state), 2e-5, 1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_float64_complex_integers_and_empty_trees(kind, x64):
    frozen = jaxsgd.adam(0.1, groups=[(lambda name, leaf: name == "n", {"frozen": True})])
    for inner, params in (
        (jaxsgd.adam(0.1), {"r": np.ones(3)}),
        (jaxsgd.adam(0.1), {"c": np.ones(3, np.complex64), "r": np.ones(2, np.float32)}),
        (frozen, {"n": np.ones(2, np.int32), "r": np.ones(2, np.float32)}),
        (jaxsgd.adam(0.1), {}),
        (jaxsgd.adam(0.1), {"r": None}),
    ):
        if "sam" in kind and "n" in params:
            continue  # the adversary, too, must leave integers alone: below
        tx = MAKERS[kind](inner)
        state, p = tx.init(params), params
        half = lambda p, i: jax.tree.map(lambda x: (0.5 * x).astype(x.dtype), p)
        for i in range(3):
            grads = jax.tree.map(lambda x, i=i: jnp.asarray((i + 1) * x, x.dtype), params)
            updates, state = tx.update(grads, state, p, value=1.0, grad_fn=half)
            p = optax.apply_updates(p, updates)
        for new, old in zip(jax.tree.leaves(p), jax.tree.leaves(params), strict=True):
            assert new.dtype == old.dtype and np.isfinite(new).all()
    state = MAKERS[kind](jaxsgd.adam(0.1)).init({"r": np.ones(3)})
    assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float64", "int32"}


@pytest.mark.parametrize("kind", MAKERS)
def test_neighbours(kind):
    """nnx, partition, MultiSteps, apply_if_finite, map_params, tree.get, donation, shards on eight devices."""
    tx, extra = MAKERS[kind](jaxsgd.adam(0.1)), {"value": jnp.asarray(1.0), "grad_fn": gradient}
    if kind != "sam opaque":
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        before = np.array(model.kernel[...])
        for _ in range(4):
            loss, grads = nnx.value_and_grad(lambda m: ((m(jnp.ones((4, 2))) - 1) ** 2).mean())(model)
            optimizer.update(model, grads, value=loss)
        assert np.abs(model.kernel[...] - before).max() > 1e-4

    parts = optax.partition({"x": tx, "y": jaxsgd.sgd(0.1)}, {"a": {"w": "x"}, "b": "y", "none": None})
    state = parts.init(PARAMS)
    for i in range(3):
        updates, state = jax.jit(partial(parts.update, **extra))(noise(i), state, PARAMS)
    assert np.abs(updates["b"]) > 0

    alone, _ = walk(tx, PARAMS, steps=4)
    many = optax.MultiSteps(tx, 2)
    often, _ = walk(optax.GradientTransformationExtraArgs(many.init, many.update), PARAMS, steps=8)
    safe, _ = walk(optax.apply_if_finite(tx, 2), PARAMS, steps=4)
    same(jax.tree.map(lambda x: x[1::2], often), alone, 1e-5, 1e-6)
    same(safe, alone, 1e-5, 1e-6)

    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda x: x + 0, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    jax.jit(lambda p, s: tx.update(p, s, p, **extra), donate_argnums=(0, 1))(jax.tree.map(jnp.copy, PARAMS), state)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P("data"))
    params = {"w": jax.device_put(jnp.ones((16, 2)), where)}
    state = tx.init(params)
    updates, state = jax.jit(partial(tx.update, **extra))(params, state, params)
    for leaf in jax.tree.leaves((updates, state)):
        assert leaf.ndim < 2 or leaf.sharding.is_equivalent_to(where, 2)


def test_readable_fields():
    assert float(optax.tree.get(MAKERS["plateau"](jaxsgd.sgd(0.1)).init(PARAMS), "scale")) == 1
    assert isinstance(mechanize(jaxsgd.sgd(0.1)).init(PARAMS), MechanizeState)
    assert isinstance(MAKERS["sam"](jaxsgd.sgd(0.1)).init(PARAMS), SamState)
    for kind in MAKERS:
        assert isinstance(MAKERS[kind](jaxsgd.sgd(0.1)), optax.GradientTransformationExtraArgs)


# -- mechanize -----------------------------------------------------------------------------------

BASES = {
    "sgd": (jaxsgd.sgd(0.1), optax.sgd(0.1)),
    "adam": (jaxsgd.adam(1.0), optax.adam(1.0)),
    "lion": (jaxsgd.lion(1.0, weight_decay=0.0), optax.lion(1.0, weight_decay=0.0)),
}
ARGUMENTS = [{}, {"weight_decay": 0.0}, {"weight_decay": 0.1}, {"eps": 1e-6}, {"s_init": 1e-3}, {"num_betas": 3}]


def mechanic(start, grads, moves, *, weight_decay=1e-2, eps=1e-8, s_init=1e-6, num_betas=6):
    """Mechanic of the paper in 80 bits, one array, given the updates of the optimizer inside: positions."""
    wide = np.longdouble
    x0 = x = start.astype(wide)
    betas = 1 - wide(0.1) ** np.arange(1, num_betas + 1)
    r, m, v, s, out = np.zeros_like(betas), np.zeros_like(betas), np.zeros_like(betas), np.full_like(betas, s_init), []
    for g, u in zip(grads.astype(wide), moves.astype(wide), strict=True):
        moved = (x - x0) / (s.sum() + wide(eps))
        bent = g + wide(weight_decay) * s.sum() * np.sqrt((g**2).sum()) / (np.sqrt((x**2).sum()) + wide(eps)) * x
        won = -(bent * moved).sum()
        r = betas * r + np.clip(won, -m, m) * s
        m, v = np.maximum(betas * m, abs(won) + wide(eps)), betas**2 * v + won**2
        s = (wide(s_init) / num_betas * m + np.maximum(r, 0)) / (np.sqrt(v) + wide(eps))
        x = x0 + s.sum() * (moved + u)
        out.append(x)
    return np.stack(out)


def relative(ours, other):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def flat(tree, axes=0):
    """All leaves of a tree as one array, behind the first ``axes`` axes."""
    return np.concatenate([np.reshape(x, (*np.shape(x)[:axes], -1)) for x in jax.tree.leaves(tree)], axis=axes)


@pytest.mark.parametrize("base", BASES)
def test_mechanize_is_optax_mechanize(base, x64):
    """At 1e-12, and at 1e-12 of the paper's algorithm in 80 bits.

    Not so from optax where the scale grows fast, under constant gradients: its sum of updates is a small difference of
    parameters, and that error grows with the scale. There 80 bits decide, and optax is 1e-11 and more from them.
    """
    params, (mine, other) = draw_params(1), BASES[base]
    x = flat(params)
    for arguments in ARGUMENTS:
        ours, optaxs = walker(mechanize(mine, **arguments), 50), walker(theirs.mechanize(other, **arguments), 50)
        for kind in ("normal", "sparse", "heavy", "constant"):
            grads = draw_gradients(kind, 2, 50)
            moves = jax.lax.scan(lambda s, g: other.update(g, s, x)[::-1], other.init(x), flat(grads, 1))[1]
            (visited, state), (theirs_visited, their_state) = ours(params, grads), optaxs(params, grads)
            assert np.allclose(state.s, their_state.s, rtol=1e-7)
            errors = {"optax": relative(visited, theirs_visited)}
            if np.finfo(np.longdouble).eps < 1e-18:
                exact = mechanic(x, flat(grads, 1), np.asarray(moves), **arguments)
                errors["the paper"] = relative(flat(visited, 1), exact)
                if kind == "constant" and errors["optax"] > 1e-12:
                    assert relative(flat(theirs_visited, 1), exact) > 1e-12
                    del errors["optax"]
            elif kind == "constant":
                del errors["optax"]
            for where, error in errors.items():
                assert error <= 1e-12, f"{arguments} on {kind} gradients: {error:.1e} from {where}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mechanize_moves_what_small_updates_cannot(dtype):
    """Updates of 1e-3 times a scale of 1e-6: a parameter of 3 holds no such move, and their sum is kept."""
    params = jnp.full(4, 3.0, dtype)

    def train(tx):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(p, state, p)
            return (apply(p, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=2000)[0])()

    stuck, _ = train(theirs.mechanize(optax.adam(1e-3)))
    assert jnp.isnan(stuck).all() if dtype == "float16" else (stuck == params).all()  # in float16, 1e-8 is 0
    p, state = train(mechanize(jaxsgd.adam(1e-3)))
    assert float(jnp.abs(p.astype(jnp.float32)).max()) < 1 and float(state.s.sum()) > 1e-3


def test_mechanize_carries_what_narrow_parameters_cannot_hold():
    """Steps of a sixteenth of bf16's grid arrive all the same, as the sum of the updates says they should."""
    tx = mechanize(jaxsgd.sgd(1.0), s_init=2.0**-12, num_betas=1, weight_decay=0.0)
    p = jnp.ones(3, jnp.bfloat16)
    state = tx.init(p)
    step = jax.jit(lambda p, s: (lambda u, s: (p + u, s))(*tx.update(jnp.full(3, 1.0), s, p)))
    for _ in range(64):
        p, state = step(p, state)
    assert state.carry.dtype == p.dtype
    want = 1 + np.asarray(state.s.sum() * state.delta)
    np.testing.assert_allclose(p.astype(np.float32) + state.carry.astype(np.float32), want, rtol=1e-4)
    np.testing.assert_allclose(p.astype(np.float32), want, rtol=2**-8)
    assert abs(want[0] - 1) > 2**-8


def test_mechanize_takes_runtime_arguments():
    made = optax.inject_hyperparams(partial(mechanize, jaxsgd.sgd(0.1)), static_args=("num_betas",))
    injected, _ = walk(made(weight_decay=0.1, s_init=1e-3), PARAMS)
    plain, _ = walk(mechanize(jaxsgd.sgd(0.1), weight_decay=0.1, s_init=1e-3), PARAMS)
    same(injected, plain, 1e-5, 1e-6)


def test_mechanize_says_what_is_wrong_and_stays_finite():
    for wrong in ({"weight_decay": -1.0}, {"eps": 0.0}, {"s_init": -1e-6}, {"num_betas": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            mechanize(jaxsgd.sgd(0.1), **wrong)
    tx = mechanize(jaxsgd.sgd(0.1))
    with pytest.raises(ValueError, match="params: mechanize needs them"):
        tx.update(PARAMS, tx.init(PARAMS))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    visited, state = walk(tx, zeros, jax.tree.map(lambda p: jnp.zeros((5, *p.shape)), PARAMS), 5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((visited, state)))
    same(jax.tree.map(lambda x: x[-1], visited), zeros)


# -- sharpness-aware minimization ----------------------------------------------------------------

INSIDE = {
    "sgd": (jaxsgd.sgd(0.05, 0.9), optax.sgd(0.05, 0.9), jaxsgd.sgd(0.1), optax.sgd(0.1)),
    "adam": (jaxsgd.adamw(0.05), optax.adamw(0.05), jaxsgd.adam(0.01), optax.adam(0.01)),
    "lion": (jaxsgd.lion(0.05), optax.lion(0.05), jaxsgd.sgd(0.1, 0.5), optax.sgd(0.1, 0.5)),
}


SAM_ARGUMENTS = {
    "default": {},
    "period": {"sync_period": 3},
    "state kept": {"reset_state": False},
    "opaque": {"opaque_mode": True},
    "opaque, period": {"opaque_mode": True, "sync_period": 3, "reset_state": False},
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("arguments", SAM_ARGUMENTS.values(), ids=SAM_ARGUMENTS)
def test_sam_is_optax_sam(arguments, inside, x64):
    """On given gradients of four temperaments, and on those of a loss."""
    params = draw_params(1)
    mine, other, my_adversary, other_adversary = INSIDE[inside]
    ours = walker(sam(mine, optax.chain(normalize(), my_adversary), **arguments), 50)
    tx = theirs.sam(other, optax.chain(theirs.normalize(), other_adversary), **arguments)
    update = lambda g, s, p, *, grad_fn, value: tx.update(g, s, p, grad_fn=grad_fn)  # it refuses all others
    optaxs = walker(optax.GradientTransformationExtraArgs(tx.init, update), 50)
    for kind in ("normal", "sparse", "heavy", "constant", None):
        grads = None if kind is None else draw_gradients(kind, 2, 50)
        error = relative(ours(params, grads)[0], optaxs(params, grads)[0])
        assert error <= 1e-12, f"{kind}: {error:.1e} from optax"


def test_sam_of_period_1_is_the_optimizer_alone():
    """optax's takes every other step from where it was before the last."""
    alone, _ = walk(jaxsgd.adam(0.1), PARAMS)
    for opaque in (False, True):
        same(walk(sam(jaxsgd.adam(0.1), normalize(), 1, opaque_mode=opaque), PARAMS)[0], alone, 1e-6, 1e-7)


def test_sam_finds_the_flat_minimum():
    """Two minima of the same depth, a sharp one at 0 and a wide one at 3: the adversary drives it out of the first."""
    f = lambda x: -jnp.exp(-20 * x**2) - jnp.exp(-0.5 * (x - 3) ** 2)

    def train(tx):
        x = jnp.asarray(0.05)
        state = tx.init(x)
        step = jax.jit(lambda x, s: (lambda u, s: (x + u, s))(*tx.update(jax.grad(f)(x), s, x)))
        for _ in range(400):
            x, state = step(x, state)
        return float(x)

    assert abs(train(jaxsgd.sgd(0.02))) < 0.01
    assert abs(train(sam(jaxsgd.sgd(0.2), optax.chain(normalize(), jaxsgd.sgd(1.0))))) > 1


def test_sam_selects_and_passes_on():
    """A NaN of the branch not taken stays out; keys and counts keep their types; extra arguments arrive."""
    tx = sam(jaxsgd.sgd(0.1), optax.chain(theirs.normalize(), optax.sgd(0.05)))  # its 0 / 0 is NaN
    x = jnp.ones(2)
    updates, state = tx.update(x, tx.init(x), x)
    updates, _ = jax.jit(tx.update)(jnp.zeros(2), state, x + updates)
    np.testing.assert_allclose(updates, -0.05 / np.sqrt(2), rtol=1e-5)  # back to where it was

    noisy = sam(jaxsgd.sgd(0.1), optax.add_noise(0.1, 0.5, key=jax.random.key(0)), 2, False)
    walked, state = walk(noisy, {"x": x})
    assert jax.dtypes.issubdtype(state.adv_state.rng_key.dtype, jax.dtypes.prng_key)
    assert np.isfinite(walked["x"]).all()

    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append((value, "grad_fn" in extra))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for opaque in (False, True):
        tx = sam(spy, spy, opaque_mode=opaque)
        tx.update(x, tx.update(x, tx.init(x), x, value=7, grad_fn=gradient)[1], x, value=7, grad_fn=gradient)
    assert seen == [(7, False)] * 6


@pytest.mark.parametrize("opaque", [False, True])
def test_sam_in_bf16_returns_to_where_it_was(opaque):
    tx = sam(jaxsgd.sgd(0.0), optax.chain(normalize(), jaxsgd.sgd(0.05)), opaque_mode=opaque)
    params = noise(3, jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS))
    visited, _ = walk(tx, params, steps=6)
    same(jax.tree.map(lambda x: x[-1], visited), params, 2**-7)


def test_sam_averages_over_devices_in_opaque_mode():
    tx = sam(jaxsgd.sgd(0.1), optax.chain(normalize(), jaxsgd.sgd(0.1)), opaque_mode=True, batch_axis_name="data")
    x, batch = jnp.asarray([1.0, 2.0]), jnp.arange(16.0).reshape(8, 2)
    loss = lambda x, b: jnp.mean((x - b) ** 4)

    def one(b):
        grads = jax.lax.pmean(jax.grad(loss)(x, b), "data")
        return tx.update(grads, tx.init(x), x, grad_fn=lambda p, i: jax.grad(loss)(p, b))[0]

    whole = sam(jaxsgd.sgd(0.1), optax.chain(normalize(), jaxsgd.sgd(0.1)), opaque_mode=True)
    grads = lambda p, i=0: jax.grad(loss)(p, batch)
    want, _ = whole.update(grads(x), whole.init(x), x, grad_fn=grads)
    same(jax.vmap(one, axis_name="data")(batch[:, None]), jnp.broadcast_to(want, (8, 2)), 1e-5)


def test_normalize():
    tx = normalize()
    grads = {"w": jnp.asarray([3.0, 0.0]), "b": jnp.asarray(4.0, jnp.bfloat16), "none": None}
    updates, _ = tx.update(grads, tx.init(grads), unknown=1)
    same(updates, {"w": np.asarray([0.6, 0]), "b": jnp.asarray(0.8, jnp.bfloat16), "none": None}, 1e-6)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    same(tx.update(zeros, tx.init(zeros))[0], zeros)
    half = jnp.full(3, 300.0, jnp.float16)  # whose squares float16 does not hold
    np.testing.assert_allclose(tx.update(half, tx.init(half))[0], 3**-0.5, rtol=1e-3)
    assert tx.update({}, tx.init({}))[0] == {}


def test_sam_says_what_is_wrong():
    with pytest.raises(ValueError, match="sync_period=0"):
        sam(jaxsgd.sgd(0.1), normalize(), 0)
    tx = sam(jaxsgd.sgd(0.1), normalize(), opaque_mode=True)
    with pytest.raises(ValueError, match="grad_fn: sam with opaque_mode=True needs it"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="params: sam needs them"):
        tx.update(PARAMS, tx.init(PARAMS))


# -- plateaus ------------------------------------------------------------------------------------


def scales(tx, values, dtype=np.float64):
    """The state after each value, stacked."""
    params = jnp.ones(1, dtype)

    def step(state, value):
        updates, state = tx.update(params, state, value=value)
        return state, (updates, state)

    return jax.jit(lambda v: jax.lax.scan(step, tx.init(params), v)[1])(jnp.asarray(values, dtype))


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "factor": st.floats(0.05, 0.95),
        "patience": st.integers(1, 4),
        "rtol": st.sampled_from([0.0, 1e-4, 0.1, 0.5]),
        "atol": st.sampled_from([1e-6, 0.01, 0.5]),
        "cooldown": st.integers(0, 3),
        "accumulation_size": st.integers(1, 3),
        "min_scale": st.sampled_from([0.0, 0.05, 0.6]),
    }
)


@settings(max_examples=40, deadline=None)
@given(arguments=CONFIGURATIONS, values=st.lists(st.one_of(st.floats(0, 10), st.sampled_from([np.nan, np.inf])),
                                                 min_size=30, max_size=30))  # fmt: skip
def test_plateau_is_optax_reduce_on_plateau(arguments, values):
    with jax.enable_x64(True):
        updates, state = scales(reduce_on_plateau(**arguments), values)
        their_updates, their_state = scales(theirs.reduce_on_plateau(**arguments), values)
    np.testing.assert_allclose(updates, their_updates, rtol=1e-14)
    for name in PlateauState._fields:
        np.testing.assert_allclose(getattr(state, name), getattr(their_state, name), rtol=1e-14, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=20, max_size=20), shift=st.floats(-5, 5))
def test_plateau_under_an_absolute_tolerance_does_not_know_where_zero_is(values, shift):
    """The scale depends on differences alone, for values of either sign."""
    tx = reduce_on_plateau(0.5, 2, rtol=0.0, atol=0.01)
    with jax.enable_x64(True):
        rounded = np.round(np.asarray(values), 1)
        _, here = scales(tx, rounded)
        _, there = scales(tx, rounded + np.round(shift))
    np.testing.assert_array_equal(here.scale, there.scale)


def test_plateau_sees_negative_values_stand_still():
    """A share of a negative best lies above it: optax takes every value for an improvement."""
    flat, falling = [-1.0] * 12, [-1.0 - 0.1 * i for i in range(12)]
    with jax.enable_x64(True):
        assert scales(theirs.reduce_on_plateau(0.5, 3), flat)[1].scale[-1] == 1
        assert scales(reduce_on_plateau(0.5, 3), flat)[1].scale[-1] == 0.125
        assert scales(reduce_on_plateau(0.5, 3), falling)[1].scale[-1] == 1


def test_plateau_takes_minus_infinity_for_no_improvement():
    values = [5.0, -np.inf, 4.0, 3.0, 2.0, 1.0]
    with jax.enable_x64(True):
        assert scales(theirs.reduce_on_plateau(0.5, 2), values)[1].scale[-1] < 1  # nothing is below it, for ever
        _, state = scales(reduce_on_plateau(0.5, 2), values)
        assert state.scale[-1] == 1 and state.best_value[-1] == 1
    np.testing.assert_array_equal(state.plateau_count, [0, 1, 0, 0, 0, 0])


def test_plateau_allows_a_relative_tolerance_of_1():
    values = [8.0, 4.0, -1.0, -3.0]
    with jax.enable_x64(True):
        assert np.isinf(scales(theirs.reduce_on_plateau(0.5, 3, rtol=1.0), values)[1].best_value).all()  # 0 * inf
        _, state = scales(reduce_on_plateau(0.5, 3, rtol=1.0), values)
    np.testing.assert_array_equal(state.best_value, [8, 8, -1, -3])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plateau_of_narrow_parameters_keeps_its_digits(dtype):
    flat, falling = np.ones(20), 1 - 5e-4 * np.arange(20)
    states = {}
    for name, make in (("ours", reduce_on_plateau), ("theirs", theirs.reduce_on_plateau)):
        tx = make(0.999, 1)

        def step(state, value, tx=tx):
            state = tx.update(jnp.ones(1, dtype), state, value=value)[1]
            return state, state.scale

        run = jax.jit(lambda v, tx=tx, step=step: jax.lax.scan(step, tx.init(jnp.ones(1, dtype)), v)[1])
        states[name] = run(jnp.asarray(flat, jnp.float32)), run(jnp.asarray(falling, jnp.float32))
    np.testing.assert_allclose(states["ours"][0], 0.999 ** np.arange(20), rtol=1e-5)
    np.testing.assert_array_equal(states["ours"][1], 1)
    if dtype == "bfloat16":
        assert states["theirs"][0][-1] == 1  # 0.999 in bf16
    updates, _ = reduce_on_plateau().update(jnp.ones(1, dtype), reduce_on_plateau().init(jnp.ones(1, dtype)), value=1)
    assert updates.dtype == dtype


def test_plateau_says_what_is_wrong():
    wrong = [
        ("factor", 0.0),
        ("factor", 1.0),
        ("factor", float("nan")),
        ("patience", 0),
        ("patience", 1.5),
        ("rtol", -0.1),
    ]
    wrong += [("rtol", 1.5), ("atol", -1.0), ("cooldown", -1), ("accumulation_size", 0), ("min_scale", 2.0)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"{name}={value}"):
            reduce_on_plateau(**{name: value})
    with pytest.raises(ValueError, match="rtol=0.0, atol=0.0"):
        reduce_on_plateau(rtol=0.0)
    with pytest.raises(TypeError, match="factor='half'"):
        reduce_on_plateau("half")
    tx = reduce_on_plateau()
    with pytest.raises(ValueError, match="value: reduce_on_plateau needs it"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"value: it has the shape \(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.ones(2))


def test_plateau_takes_runtime_arguments():
    halve = jax.jit(lambda patience: scales(reduce_on_plateau(0.5, patience), np.ones(6, np.float32), np.float32)[1])
    np.testing.assert_array_equal(halve(jnp.asarray(1)).scale, 0.5 ** np.arange(6))
    np.testing.assert_array_equal(halve(jnp.asarray(5)).scale, [1, 1, 1, 1, 1, 0.5])
