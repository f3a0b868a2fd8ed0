"""Clipping, guarding, accumulating, averaging, measuring: each pain as optax has it, and gone."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd.transforms import (
    accumulate,
    accumulate_gradients,
    clip_by_global_norm,
    guard,
    guard_report,
    monitor,
    monitor_report,
    params_ema,
    resume,
)

pytestmark = pytest.mark.slow  # a minute on two cores; CI runs it

PARAMS = {"a": {"w": jnp.asarray([[1.0, -2.0], [3.0, 0.5]])}, "b": jnp.asarray(0.5), "none": None}
MAKERS = {
    "clip": lambda tx: optax.chain(clip_by_global_norm(0.5), tx),
    "guard": lambda tx: guard(tx, z_score=4.0, window=4),
    "accumulate": lambda tx: accumulate(tx, 3),
    "ema": lambda tx: optax.chain(tx, params_ema(0.9)),
    "monitor": monitor,
    "all": lambda tx: monitor(guard(accumulate(optax.chain(clip_by_global_norm(0.5), tx, params_ema(0.9)), 2))),
}


def same(a, b, rtol=0.0, atol=0.0):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def noise(seed, like=PARAMS, scale=1.0):
    tree = optax.tree.random_like(jax.random.key(seed), like, jax.random.normal)
    return jax.tree.map(lambda x: scale * x, tree)


def filled(value, like=PARAMS):
    return jax.tree.map(lambda p: jnp.full_like(p, value), like)


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def on_mesh(fn, in_specs, out_specs, check_vma=True):
    return jax.jit(jax.shard_map(fn, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


# -- what holds for each -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", MAKERS)
def test_state_never_changes_its_types(kind, dtype):
    """Under strict promotion, with float32 gradients on narrow weights, for our rules and optax's: one compile."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    cases = [("strict", jaxsgd.adamw(0.01))]
    if kind in ("accumulate", "guard"):  # these hold an inner state whose dtypes optax itself would change
        cases.append(("standard", optax.adamw(0.01)))
    for promotion, inner in cases:
        tx = MAKERS[kind](inner)

        @jax.jit
        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params, value=jnp.asarray(1.0))
            # optax.apply_updates itself promotes.
            return jax.tree.map(lambda x, u: x + u.astype(x.dtype), params, updates), state

        with jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion("raise"):
            state, p = tx.init(params), params
            types = jax.tree.map(jax.typeof, state)
            for i in range(4):
                p, state = step(p, state, noise(i))
                assert jax.tree.map(jax.typeof, state) == types
        assert step._cache_size() == 1


@pytest.mark.parametrize("kind", MAKERS)
def test_scan_and_eager_and_vmap_agree(kind):
    tx = MAKERS[kind](jaxsgd.adam(0.1))
    grads = jax.tree.map(lambda *g: jnp.stack(g), *(noise(i) for i in range(5)))

    def run(scale):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: scale * x, g), state, params, value=scale)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), grads)[0]

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(5):
        updates, state = tx.update(noise(i), state, params, value=jnp.asarray(1.0))
        params = optax.apply_updates(params, updates)
    same(jax.jit(run)(jnp.asarray(1.0)), (params, state), 2e-5, 1e-6)
    swept = jax.vmap(run)(jnp.asarray([0.5, 1.0]))
    same(jax.tree.map(lambda x: x[1], swept), (params, state), 2e-5, 1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_float64_complex_and_empty_trees(kind, x64):
    tx = MAKERS[kind](jaxsgd.adam(0.1))
    for params in (
        {"r": np.ones(3)},
        {"c": np.ones(3, np.complex64), "r": np.ones(2, np.float32)},
        {},
        {"r": None},
    ):
        with jax.numpy_dtype_promotion("strict"):
            state, p = tx.init(params), params
            for i in range(3):
                grads = jax.tree.map(lambda x, i=i: jnp.asarray((i + 1) * x, x.dtype), params)
                updates, state = tx.update(grads, state, p)
                p = optax.apply_updates(p, updates)
        for new, old in zip(jax.tree.leaves(p), jax.tree.leaves(params), strict=True):
            assert new.dtype == old.dtype and np.isfinite(new).all()
    state = tx.init({"r": np.ones(3)})
    floats = {x.dtype.name for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats <= ({"float64", "float32"} if kind in ("monitor", "all") else {"float64"})


@pytest.mark.parametrize("kind", MAKERS)
def test_nnx_and_partition_and_sharding(kind):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MAKERS[kind](jaxsgd.adam(0.1)), wrt=nnx.Param)
    before = np.array(model.kernel[...])
    for _ in range(3):
        grads = nnx.grad(lambda m: ((m(jnp.ones((4, 2))) - 1) ** 2).mean())(model)
        optimizer.update(model, grads)
    assert np.abs(model.kernel[...] - before).max() > 1e-3

    parts = optax.partition(
        {"x": MAKERS[kind](jaxsgd.adam(0.1)), "y": jaxsgd.sgd(0.1)}, {"a": {"w": "x"}, "b": "y", "none": None}
    )
    state = parts.init(PARAMS)
    for i in range(3):
        updates, state = jax.jit(parts.update)(noise(i), state, PARAMS)
    assert np.abs(updates["b"]) > 0

    where = NamedSharding(mesh(), P("data"))
    params = {"w": jax.device_put(jnp.ones((16, 2)), where)}
    tx = MAKERS[kind](jaxsgd.adam(0.1))
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    for leaf in jax.tree.leaves((updates, state)):
        assert leaf.ndim < 2 or leaf.sharding.is_equivalent_to(where, 2)


# -- clip --------------------------------------------------------------------------------------------


def test_pain_8_many_bf16_leaves_have_their_true_norm():
    grads = [jnp.full((), 0.1, jnp.bfloat16)] * 1000
    truth = np.sqrt(1000) * float(grads[0])
    assert float(optax.tree.norm(grads)) < 0.7 * truth  # the bfloat16 sum stalls
    tx = clip_by_global_norm(1.0)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert float(state.gradient_norm) == pytest.approx(truth, rel=1e-5) and state.gradient_norm.dtype == jnp.float32
    assert updates[0].dtype == jnp.bfloat16
    assert float(updates[0]) == pytest.approx(0.1 / truth, rel=1e-2)


def test_pain_8_float16_does_not_overflow_to_zero():
    grads = {"w": jnp.full((4,), 300.0, jnp.float16)}
    theirs, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    assert np.all(np.asarray(theirs["w"]) == 0)
    tx = clip_by_global_norm(1.0)
    ours, state = tx.update(grads, tx.init(grads))
    same(ours, {"w": np.full(4, 0.5)}, 1e-3)
    assert float(state.gradient_norm) == 600


def test_pain_8_zero_norm_has_a_finite_derivative():
    def through(tx):
        return jax.grad(lambda g: tx.update({"w": g}, tx.init({"w": g}))[0]["w"].sum())(jnp.zeros(3))

    assert np.isnan(through(optax.clip_by_global_norm(1.0))).all()
    same(through(clip_by_global_norm(1.0)), np.ones(3))
    beyond = jax.grad(lambda g: clip_by_global_norm(1.0).update([g], clip_by_global_norm(1.0).init([g]))[0][0].sum())
    same(beyond(jnp.asarray([3.0, 4.0])), [4 * (4 - 3) / 125, 3 * (3 - 4) / 125], 1e-4)


def test_clip_equals_optax_and_leaves_small_gradients_alone(x64):
    for scale in (1e-3, 10.0):
        grads = noise(0, like=jax.tree.map(lambda p: p.astype(np.float64), PARAMS), scale=scale)
        tx = clip_by_global_norm(0.7)
        ours, state = tx.update(grads, tx.init(grads))
        theirs, _ = optax.clip_by_global_norm(0.7).update(grads, optax.EmptyState())
        same(ours, theirs, 1e-14 if scale > 1 else 0)
        assert float(state.gradient_norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-14)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_clip_of_a_norm_that_is_not_finite(bad):
    """Nothing finite is left, nothing is hidden, and no NaN is made of an inf."""
    grads = {"w": jnp.asarray([1.0, bad, -2.0]), "b": jnp.ones(2)}
    tx = clip_by_global_norm(1.0)
    updates, state = tx.update(grads, tx.init(grads))
    same(updates, {"w": [0, bad, 0], "b": [0, 0]})
    same(state.gradient_norm, bad)
    huge = {"w": jnp.asarray([1e30, 1.0])}
    same(tx.update(huge, tx.init(huge))[0], {"w": [0, 0]})


def test_clip_follows_a_schedule_and_says_what_is_wrong():
    tx = clip_by_global_norm(lambda count: 1.0 / (count + 1))
    state = tx.init([jnp.ones(4)])
    for i in range(3):
        updates, state = jax.jit(tx.update)([jnp.ones(4)], state)
        assert float(optax.tree.norm(updates)) == pytest.approx(1 / (i + 1), rel=1e-6)
    assert int(state.count) == 3
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm"):
            clip_by_global_norm(wrong)
    chain = optax.chain(clip_by_global_norm(1.0), optax.inject_hyperparams(clip_by_global_norm)(max_norm=0.5))
    assert float(optax.tree.norm(chain.update([jnp.ones(4)], chain.init([jnp.ones(4)]))[0])) == pytest.approx(0.5)


def test_pain_8_the_norm_is_global_under_shard_map():
    """Shards are added up; what is replicated is not counted eight times; pmap adds up all."""
    grads = {"shard": jnp.arange(16.0), "copy": jnp.asarray([3.0])}
    specs = {"shard": P("data"), "copy": P()}

    def clipped(tx, check_vma=True):
        return on_mesh(lambda g: tx.update(g, tx.init(g))[0], (specs,), specs, check_vma)

    want = clip_by_global_norm(1.0).update(grads, clip_by_global_norm(1.0).init(grads))[0]
    same(clipped(clip_by_global_norm(1.0, axis_name="data"))(grads), want, 1e-6)
    theirs = clipped(optax.clip_by_global_norm(1.0), check_vma=False)(grads)
    assert float(optax.tree.norm(theirs)) > 2  # each device by its own norm

    only = {"shard": grads["shard"]}
    want = jax.tree.map(lambda g: g / np.linalg.norm(g), only)
    tx = clip_by_global_norm(1.0, axis_name="data")
    blind = on_mesh(lambda g: tx.update(g, tx.init(g))[0], (P("data"),), P("data"), check_vma=False)
    same(blind(only), want, 1e-6)
    halves = jax.pmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")({"shard": only["shard"].reshape(8, 2)})
    same(np.asarray(halves["shard"]).reshape(16), want["shard"], 1e-6)


def test_clip_over_two_axes():
    grid = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    grads = {"both": jnp.arange(8.0).reshape(2, 4), "one": jnp.arange(4.0), "none": jnp.ones(3)}
    specs = {"both": P("data", "model"), "one": P("model"), "none": P()}
    tx = clip_by_global_norm(1.0, axis_name=("data", "model"))
    fn = jax.shard_map(lambda g: tx.update(g, tx.init(g)), mesh=grid, in_specs=(specs,), out_specs=(specs, P()))
    updates, state = jax.jit(fn)(grads)
    assert float(state.gradient_norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    assert float(optax.tree.norm(updates)) == pytest.approx(1, rel=1e-6)


def test_no_program_of_a_leaf_repeats_the_sum_over_all_leaves():
    """Compilers copy cheap operations into every consumer: 192 leaves of guard(adamw) once took minutes to compile."""
    leaves = [jnp.ones((2, i + 1)) for i in range(24)]
    for tx in (clip_by_global_norm(1.0), guard(optax.sgd(0.1)), guard(clip_by_global_norm(1.0))):
        text = jax.jit(tx.update).lower(leaves, tx.init(leaves)).compile().as_text()
        assert text.count(" add(") < 5 * len(leaves)  # not their square


# -- guard -------------------------------------------------------------------------------------------


def advance(tx, state, params, grads, **extra):
    updates, state = jax.jit(tx.update)(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pain_11_a_bad_batch_leaves_no_trace(bad):
    """State, step and schedule after good, bad, good are those after good, good."""
    tx = guard(optax.chain(clip_by_global_norm(1.0), jaxsgd.adamw(optax.linear_schedule(0.1, 0.0, 5)), params_ema(0.9)))
    with_bad = without = PARAMS, tx.init(PARAMS)
    for i in range(4):
        with_bad = advance(tx, with_bad[1], with_bad[0], noise(i))
        without = advance(tx, without[1], without[0], noise(i))
        params, state = advance(tx, with_bad[1], with_bad[0], noise(9) | {"b": jnp.asarray(bad)})
        same(params, with_bad[0])
        with_bad = params, state
    same(with_bad[0], without[0])
    same(with_bad[1].inner, without[1].inner)
    assert int(jaxsgd.metrics(with_bad[1])["step"]) == 4
    report = guard_report(with_bad[1])
    assert report == {"skipped": 4, "skipped_in_a_row": 1, "halted": False, "verdict": report["verdict"]}
    assert "last 1 steps were bad" in report["verdict"]
    assert guard_report(without[1])["verdict"] == "good: 0 steps skipped so far"


def test_pain_11_optax_lets_the_nan_in_and_the_guard_never():
    nan = filled(np.nan)
    theirs, ours = optax.apply_if_finite(optax.sgd(0.1), 2), guard(jaxsgd.sgd(0.1), max_consecutive=3)
    a = b = PARAMS
    state_a, state_b = theirs.init(a), ours.init(b)
    for i in range(5):
        a, state_a = advance(theirs, state_a, a, nan)
        b, state_b = advance(ours, state_b, b, nan)
        assert guard_report(state_b)["halted"] == (i >= 2)
    assert np.isnan(a["b"])
    same(b, PARAMS)
    b, state_b = advance(ours, state_b, b, noise(0))  # halted: a good step is skipped too
    same(b, PARAMS)
    report = guard_report({"opt": (state_b,)})
    assert report["halted"] and report["skipped"] == 6 and "halted: 6 steps" in report["verdict"]
    b, state_b = advance(ours, resume((state_b,))[0], b, noise(0))
    assert float(b["b"]) != 0.5 and not guard_report(state_b)["halted"] and guard_report(state_b)["skipped"] == 6


def test_pain_11_a_bad_loss_alone_is_caught():
    tx = guard(jaxsgd.sgd(0.1))
    params, state = advance(tx, tx.init(PARAMS), PARAMS, noise(0), value=jnp.asarray(jnp.inf))
    same(params, PARAMS)
    assert int(state.skipped) == 1
    with pytest.raises(ValueError, match=r"value: it has the shape \(2,\)"):
        tx.update(noise(0), state, params, value=jnp.ones(2))


def test_pain_11_outliers_of_norm_and_loss_are_skipped():
    tx = guard(jaxsgd.sgd(0.0), z_score=6.0, window=16)
    rng = np.random.RandomState(0)
    run = jax.jit(lambda s, g, v: tx.update({"w": g}, s, {"w": jnp.ones(4)}, value=v)[1])
    state = tx.init({"w": jnp.ones(4)})

    def feed(norm=1.0, loss=2.0):
        nonlocal state
        before = int(state.skipped)
        state = run(state, jnp.full(4, norm * (1 + 0.1 * rng.randn()) / 2), jnp.asarray(loss + 0.1 * rng.randn()))
        return int(state.skipped) - before

    assert feed(norm=1e3) == 0  # nothing to compare with yet
    assert sum(feed() for _ in range(150)) == 0
    assert abs(float(state.losses.mean) - 2) < 0.1 and 0.05 < float(state.losses.variance) ** 0.5 < 0.2
    assert feed(norm=1e6) == 1 and feed(norm=5) == 1 and feed() == 0  # the first does not hide the second
    assert feed(loss=8) == 1 and feed() == 0
    assert feed(norm=0.01) == 0 and feed(loss=0.1) == 0  # only what is too large
    assert sum(feed() for _ in range(50)) == 0
    skipped = [feed(loss=8) for _ in range(30)]  # a lasting change is followed, not fought for ever
    assert skipped[0] == 1 and 0 < sum(skipped) < 15 and sum(skipped[-10:]) == 0


def test_rolling_statistics_are_the_weighted_ones(x64):
    tx = guard(jaxsgd.sgd(0.1), z_score=1e9, window=10)
    values = np.random.RandomState(0).rand(30)
    state = tx.init({"w": jnp.ones(1)})
    for v in values:
        state = tx.update({"w": jnp.asarray([v])}, state, {"w": jnp.ones(1)})[1]
    weights = (9 / 11) ** np.arange(30)[::-1]
    mean = np.average(values, weights=weights)
    variance = np.average((values - mean) ** 2, weights=weights)
    same((state.norms.mean, state.norms.variance), (mean, variance), 1e-12)
    assert int(state.losses.count) == 0


def test_pain_11_constant_values_are_no_outliers():
    tx = guard(jaxsgd.sgd(0.1), z_score=3.0, window=4)
    state = tx.init(PARAMS)
    for wiggle in [0.0] * 20 + [1e-6, -1e-6, 1e-4]:
        state = jax.jit(tx.update)(filled(1 + wiggle), state, PARAMS, value=jnp.asarray(1 + wiggle))[1]
    assert int(state.skipped) == 0


def test_guard_does_not_poison_a_derivative():
    """A meta-gradient through a skipped step is that of no step, where a plain select would give NaN."""
    tx = guard(jaxsgd.adam(0.1))

    def after(scale):
        params, state = PARAMS, tx.init(PARAMS)
        for grads in (noise(0), filled(jnp.nan), noise(1)):
            grads = jax.tree.map(lambda g: g + scale, grads)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return sum(map(jnp.sum, jax.tree.leaves(params)))

    assert np.isfinite(jax.grad(after)(1.0))


def test_guard_holds_keys_and_says_what_is_wrong():
    noisy = guard(optax.add_noise(1e-3, 0.0, jax.random.key(0)))
    state = noisy.init(PARAMS)
    held = noisy.update(filled(np.nan), state, PARAMS)[1]
    same(jax.random.key_data(held.inner.rng_key), jax.random.key_data(state.inner.rng_key))
    for wrong in ({"max_consecutive": 0}, {"z_score": 0.0}, {"z_score": -1}, {"window": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            guard(jaxsgd.sgd(0.1), **wrong)
    for report in (guard_report, resume, monitor_report):
        with pytest.raises(ValueError, match="no .*State in"):
            report(jaxsgd.sgd(0.1).init(PARAMS))
    both = optax.partition({"x": guard(jaxsgd.sgd(0.1)), "y": guard(jaxsgd.adam(0.1))}, {"a": "x", "b": "y"})
    report = guard_report(both.init({"a": jnp.ones(2), "b": jnp.ones(2)}))
    assert len(report) == 8 and all("/" in name for name in report)
    swept = jax.vmap(lambda g: guard(jaxsgd.sgd(0.1)).update(g, guard(jaxsgd.sgd(0.1)).init(g))[1])
    assert guard_report(swept(jnp.asarray([1.0, jnp.nan])))["skipped"] == [0, 1]


@pytest.mark.parametrize("check_vma", [True, False])
def test_pain_11_all_replicas_agree(check_vma):
    """One device's NaN, in its gradient or its loss, stops all eight."""
    tx = guard(jaxsgd.adam(0.1), axis_name="data", z_score=5.0, window=4)

    def step(params, state, g, loss):
        mean = jax.lax.pmean(jnp.where(jnp.isfinite(g), g, 0), "data")  # a mean that hides the NaN
        bad = jnp.where(jnp.isfinite(g).all(), 0.0, jnp.nan)
        updates, state = tx.update({"w": mean}, state, params, value=loss[0] + bad)
        return optax.apply_updates(params, updates), state

    fn = on_mesh(step, (P(), P(), P("data"), P("data")), (P(), P()), check_vma)
    params = {"w": jnp.ones((1, 2))}
    state = tx.init(params)
    g, loss = jnp.ones((8, 2)), jnp.arange(8.0)
    for bad_g, bad_loss in ((g.at[3].set(jnp.nan), loss), (g, loss.at[5].set(jnp.inf))):
        new, state = fn(params, state, bad_g, bad_loss)
        for shard in new["w"].addressable_shards:
            same(shard.data, params["w"])
    assert guard_report(state)["skipped"] == 2
    new, state = fn(params, state, g, loss)
    assert float(new["w"][0, 0]) == pytest.approx(0.9) and float(state.losses.mean) == pytest.approx(3.5)


def test_pain_11_sharded_gradients_are_judged_together():
    tx = guard(jaxsgd.sgd(1.0), axis_name="data")
    specs = {"w": P("data")}
    params = {"w": jnp.ones(8)}
    fn = on_mesh(lambda g, p: tx.update(g, tx.init(p), p)[0], (specs, specs), specs)
    same(fn({"w": jnp.ones(8).at[2].set(jnp.nan)}, params), {"w": np.zeros(8)})
    same(fn({"w": jnp.ones(8)}, params), {"w": -np.ones(8)})


def test_guard_in_the_train_step():
    def loss_fn(params, batch, key):
        return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()

    tx = guard(jaxsgd.adam(0.1))
    state = jaxsgd.TrainState.create({"w": jnp.zeros(3)}, tx)
    step = jaxsgd.make_step(loss_fn, tx)
    x = np.random.RandomState(0).randn(16, 3).astype(np.float32)
    for i in range(100):
        y = x @ np.arange(3, dtype=np.float32)
        state, report = step(state, {"x": x, "y": y * np.nan if i % 10 == 3 else y})
    assert float(report["loss"]) < 1e-2 and step.compiles == 1
    assert guard_report(state)["skipped"] == 10 and int(jaxsgd.metrics(state.opt_state)["step"]) == 90


# -- accumulation inside a step ------------------------------------------------------------------------

RNG = np.random.RandomState(1)
LINEAR = {"w": jnp.asarray(RNG.randn(3, 2)), "b": jnp.zeros(2)}
BATCH = {
    "x": RNG.randn(24, 3).astype(np.float32),
    "y": RNG.randn(24, 2).astype(np.float32),
    "mask": (RNG.rand(24) < 0.6).astype(np.float32),
    "scale": np.float32(2.0),
}


def token_loss(params, batch, key):
    """A mean over the tokens of the batch, as a language model's is."""
    tokens = batch["mask"].sum()
    squares = ((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2).mean(1) * batch["scale"]
    loss = (squares * batch["mask"]).sum() / tokens
    return loss, {"tokens": tokens, "examples": jnp.asarray(len(batch["x"])), "twice": 2 * loss, "each": squares}


@pytest.mark.parametrize("weight", ["tokens", lambda batch: batch["mask"].sum()], ids=["aux", "function"])
@pytest.mark.parametrize("steps", [1, 4, 24])
def test_pain_4_the_token_weighted_mean_is_that_of_the_whole_batch(steps, weight):
    (loss, aux), grads = jax.value_and_grad(token_loss, has_aux=True)(LINEAR, BATCH, None)
    (ours, our_aux), our_grads = jax.jit(accumulate_gradients(token_loss, steps, weight=weight))(LINEAR, BATCH)
    same((ours, our_grads, our_aux["twice"]), (loss, grads, aux["twice"]), 2e-5, 1e-6)
    assert our_aux["examples"] == 24 and our_aux["each"].shape == (steps, 24 // steps)
    if isinstance(weight, str):
        assert float(our_aux["tokens"]) == float(aux["tokens"])
    if steps == 4:  # the plain mean of means is another gradient
        plain = accumulate_gradients(token_loss, steps)(LINEAR, BATCH)[1]
        assert np.abs(plain["w"] - grads["w"]).max() > 1e-3


def test_pain_4_empty_microbatches_do_not_count():
    batch = BATCH | {"mask": np.where(np.arange(24) % 4 == 1, 0, 1).astype(np.float32)}  # microbatch 1 is padding: 0/0
    (loss, _), grads = jax.value_and_grad(token_loss, has_aux=True)(LINEAR, batch, None)
    (ours, aux), our_grads = accumulate_gradients(token_loss, 4, weight="tokens")(LINEAR, batch)
    same((ours, our_grads), (loss, grads), 2e-5, 1e-6)
    assert float(aux["tokens"]) == 18
    nothing = accumulate_gradients(token_loss, 4, weight="tokens")(LINEAR, batch | {"mask": np.zeros(24, np.float32)})
    same((nothing[0][0], nothing[1]), (0.0, filled(0.0, LINEAR)))


def test_pain_4_bf16_gradients_are_summed_in_float32():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    loss_fn = lambda p, x, key: (p["w"] * x.mean(0)).sum()
    x = jnp.ones((512, 2), jnp.bfloat16)
    (loss, aux), grads = jax.jit(accumulate_gradients(loss_fn, 512))(params, x)  # a bf16 sum of ones stops at 256
    assert grads["w"].dtype == jnp.float32 == loss.dtype and aux is None
    same((loss, grads), (2.0, {"w": np.ones(2)}))
    tx = jaxsgd.adamw(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


def test_accumulate_gradients_splits_keys_and_compiles_once():
    loss_fn = lambda p, batch, key: (p * jax.random.normal(key)).sum() + 0 * batch.sum()
    fn = jax.jit(accumulate_gradients(loss_fn, 4))
    for seed in range(3):
        grads = fn(jnp.ones(2), np.ones((8, 1), np.float32), jax.random.key(seed))[1]
        want = np.mean([jax.random.normal(k) for k in jax.random.split(jax.random.key(seed), 4)])
        same(grads, np.full(2, want), 1e-5)
    assert fn._cache_size() == 1


def test_accumulate_gradients_says_what_is_wrong():
    fn = accumulate_gradients(token_loss, 5)
    with pytest.raises(ValueError, match=r"'\w+' has 24 examples, not divisible by steps=5; nearest: 20 or 25"):
        fn(LINEAR, BATCH)
    with pytest.raises(ValueError, match="nearest: 5$"):
        fn(LINEAR, np.ones((3, 2)))
    with pytest.raises(ValueError, match="'x' has 24 examples, 'y' has 20"):
        fn(LINEAR, {"x": np.ones(24), "y": np.ones(20)})
    with pytest.raises(ValueError, match="no array"):
        fn(LINEAR, {"scale": 1.0})
    with pytest.raises(ValueError, match="steps=0"):
        accumulate_gradients(token_loss, 0)
    with pytest.raises(ValueError, match="a scalar is needed"):
        accumulate_gradients(lambda p, b, k: b, 2)(1.0, np.ones(4, np.float32))
    for loss_fn in (lambda p, b, k: p * b.sum(), lambda p, b, k: (p * b.sum(), {"n": 1})):
        with pytest.raises(ValueError, match="weight='tokens'"):
            accumulate_gradients(loss_fn, 2, weight="tokens")(1.0, np.ones(4, np.float32))


def test_pain_4_a_sharded_batch_is_split_where_it_lies():
    """Under jit on eight devices: the gradient of the whole batch, and no example changes its device."""
    batch = {k: np.concatenate([v] * 4)[:64] if np.ndim(v) else v for k, v in BATCH.items()}
    placed = {k: jax.device_put(v, NamedSharding(mesh(), P("data") if np.ndim(v) else P())) for k, v in batch.items()}
    params = jax.device_put(LINEAR, NamedSharding(mesh(), P()))
    fn = jax.jit(accumulate_gradients(lambda p, b, key: token_loss(p, b, key)[0], 4, weight=lambda b: b["mask"].sum()))
    want = jax.value_and_grad(lambda p: token_loss(p, batch, None)[0])(LINEAR)
    same((lambda out: (out[0][0], out[1]))(fn(params, placed)), want, 2e-5, 1e-6)
    program = fn.lower(params, placed).compile().as_text()
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in program, moving


@pytest.mark.parametrize("check_vma", [True, False])
def test_pain_4_devices_reduce_once_at_the_end(check_vma):
    batch = {k: np.concatenate([v] * 4)[:64] for k, v in BATCH.items() if np.ndim(v)}
    loss_fn = lambda p, b, key: token_loss(p, b | {"scale": 2.0}, key)
    fn = accumulate_gradients(loss_fn, 4, weight="tokens", axis_name="data")

    def whole(params, batch):
        (loss, aux), grads = fn(params, batch)
        return loss, grads, aux["tokens"], aux["examples"]

    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(LINEAR, batch, None)
    sharded = on_mesh(whole, (P(), P("data")), P(), check_vma)
    same(sharded(LINEAR, batch), (loss, grads, aux["tokens"], 64), 2e-5, 1e-6)
    jaxpr = str(jax.make_jaxpr(sharded)(LINEAR, batch))
    assert "psum" not in jaxpr.split("scan[", 1)[1].split("length=", 1)[0]

    own = on_mesh(lambda p, b: jax.tree.map(lambda g: g[None], accumulate_gradients(loss_fn, 4)(p, b)[1]),
                  (P(), P("data")), P("data"), check_vma)(LINEAR, batch)  # fmt: skip
    first = accumulate_gradients(loss_fn, 4)(LINEAR, {k: v[:8] for k, v in batch.items()})[1]
    same(jax.tree.map(lambda g: g[0], own), first, 2e-5, 1e-6)


# -- accumulation over steps ---------------------------------------------------------------------------


def counting():
    """A transformation that counts how often it really runs."""
    calls = collections.Counter()

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.update(["run"]))
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update), calls


@pytest.mark.parametrize("eager", [False, True])
def test_pain_4_the_optimizer_runs_once_a_window(eager):
    for wrap, expected in ((lambda tx: optax.MultiSteps(tx, 4), 8), (lambda tx: accumulate(tx, 4), 2)):
        inner, calls = counting()
        tx = wrap(inner)
        update = tx.update if eager else jax.jit(tx.update)
        state = tx.init(PARAMS)
        for i in range(8):
            updates, state = update(noise(i), state, PARAMS)
            assert bool(np.any(updates["b"] != 0)) == (i % 4 == 3)
        jax.effects_barrier()
        assert calls["run"] == expected


def test_pain_4_one_inf_spoils_one_window():
    theirs, ours = optax.MultiSteps(optax.sgd(1.0), 2), accumulate(jaxsgd.sgd(1.0), 2)
    guarded = accumulate(guard(jaxsgd.sgd(1.0)), 2)
    dropped = guard(accumulate(jaxsgd.sgd(1.0), 2))
    states = [tx.init(PARAMS) for tx in (theirs, ours, guarded, dropped)]
    steps = [jax.jit(tx.update) for tx in (theirs, ours, guarded, dropped)]
    log = []
    for value in (jnp.inf, 1.0, 2.0, 4.0):
        outs = [step(filled(value), state, PARAMS) for step, state in zip(steps, states, strict=True)]
        states = [state for _, state in outs]
        log.append([float(updates["b"]) for updates, _ in outs])
    assert np.isnan(log[3][0])  # for ever
    assert log[1][1] == -np.inf and log[3][1] == -3
    assert log[1][2] == 0 and log[3][2] == -3
    assert [row[3] for row in log] == [0, 0, -1.5, 0]  # only the bad microbatch is left out
    assert guard_report(states[2])["skipped"] == 1


def test_pain_4_windows_equal_one_step_on_their_mean(x64):
    params = jax.tree.map(lambda p: p.astype(np.float64), PARAMS)
    inner = jaxsgd.adamw(0.1, weight_decay=0.1)
    tx = accumulate(inner, 3)
    a, b, state, own = params, params, tx.init(params), inner.init(params)
    tokens = [1.0, 5.0, 2.0]
    for window in range(4):
        grads = [noise(3 * window + i, like=params) for i in range(3)]
        for g, w in zip(grads, tokens, strict=True):
            a, state = advance(tx, state, a, g, weight=w)
        mean = jax.tree.map(lambda *g: np.average(g, axis=0, weights=tokens), *grads)
        updates, own = inner.update(mean, own, b)
        b = optax.apply_updates(b, updates)
    same(a, b, 1e-13)
    assert int(jaxsgd.metrics(state)["step"]) == 4


def test_pain_4_a_partial_window_is_flushed():
    tx = accumulate(jaxsgd.sgd(1.0), 4)
    state = tx.init(PARAMS)
    for value in (1.0, 3.0):
        _, state = jax.jit(tx.update)(filled(value), state, PARAMS)
    updates, state = jax.jit(tx.flush)(state, PARAMS)
    same(updates, filled(-2.0))
    assert int(state.step) == 0 and float(state.weight) == 0
    again, unchanged = jax.jit(tx.flush)(state, PARAMS)
    same(again, filled(0.0))
    same(unchanged, state)
    assert int(jaxsgd.metrics(unchanged)["step"]) == 1
    updates, _ = tx.flush(tx.update(filled(1.0), state)[1])
    same(updates, filled(-1.0))
    with pytest.raises(ValueError, match="every=0"):
        accumulate(jaxsgd.sgd(1.0), 0)


def test_pain_4_weight_zero_counts_nothing():
    tx = accumulate(jaxsgd.adam(1.0), 2)
    state = tx.init(PARAMS)
    _, state = tx.update(filled(np.nan), state, PARAMS, weight=0)
    updates, state = tx.update(filled(1.0), state, PARAMS, weight=jnp.asarray(7, jnp.int32))
    same(updates, filled(-1.0), 1e-6)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(filled(1.0), state, PARAMS, weight=0)
        same(updates, filled(0.0))
    assert int(jaxsgd.metrics(state)["step"]) == 1


def test_accumulate_under_shard_map():
    """The reduction inside the clip is in one branch of the condition, which all devices take together."""
    specs = {"w": P("data"), "b": P()}
    params = {"w": jnp.arange(8.0), "b": jnp.ones(2)}
    grads = jax.tree.map(lambda p: p + 1, params)

    def window(params, grads, axis_name=None):
        clip = clip_by_global_norm(1.0, axis_name=axis_name)
        tx = accumulate(guard(optax.chain(clip, jaxsgd.adamw(0.1)), axis_name=axis_name), 2)
        first, state = tx.update(grads, tx.init(params), params)
        return first, tx.update(grads, state, params)[0]

    first, second = on_mesh(partial(window, axis_name="data"), (specs, specs), (specs, specs))(params, grads)
    same(first, filled(0.0, params))
    same(second, window(params, grads)[1], 1e-5)


# -- averages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debias", [True, False])
def test_pain_20_params_ema_is_the_weighted_mean_of_the_parameters(debias, x64):
    tx = optax.chain(jaxsgd.adam(0.1), params_ema(0.8, debias=debias))
    params = jax.tree.map(lambda p: p.astype(np.float64), PARAMS)
    state, seen = tx.init(params), [params]
    same(state[1].average, params)
    for i in range(6):
        params, state = advance(tx, state, params, noise(i, like=params))
        seen.append(params)
    weights = 0.8 ** np.arange(7)[::-1] * 0.2
    weights[0] = 0 if debias else 0.8**6
    want = jax.tree.map(lambda *p: np.average(p, axis=0, weights=weights), *seen)
    same(state[1].average, want, 1e-12)
    assert int(state[1].count) == 6


def test_pain_20_params_ema_of_bf16_parameters_does_not_stall():
    params = {"w": jnp.ones(3, jnp.bfloat16), "steps": jnp.asarray(3)}
    tx = params_ema(0.999, debias=False)
    state = tx.init(params)
    still, twice = jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda p: 2 * p, params)
    body = lambda s, _: (tx.update(still, s, twice)[1], None)
    state = jax.jit(lambda s: jax.lax.scan(body, s, length=1000)[0])(state)
    assert state.average["w"].dtype == jnp.float32 and int(state.average["steps"]) == 6
    same(state.average["w"], np.full(3, 2 - 0.999**1000), 1e-4)  # in bf16, 1 + 0.001 is 1


def test_params_ema_can_be_donated_and_says_what_is_wrong():
    tx = optax.chain(jaxsgd.sgd(0.1), params_ema(0.9))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    jax.jit(lambda p, s: advance(tx, s, p, p), donate_argnums=(0, 1))(params, state)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="decay"):
            params_ema(wrong)
    with pytest.raises(ValueError, match="params: params_ema needs them"):
        params_ema(0.9).update(PARAMS, params_ema(0.9).init(PARAMS))


def test_pain_20_params_ema_agrees_on_eight_devices():
    tx = optax.chain(jaxsgd.adam(0.1), params_ema(0.9))
    specs = {"w": P("data"), "b": P()}
    params = {"w": jnp.arange(8.0), "b": jnp.ones(2)}

    def run(params):
        state, p = tx.init(params), params
        for _ in range(3):
            updates, state = tx.update(p, state, p)
            p = optax.apply_updates(p, updates)
        return state[1].average

    same(on_mesh(run, (specs,), specs)(params), run(params), 1e-6)


# -- measurements --------------------------------------------------------------------------------------


def test_pain_20_monitor_has_one_structure():
    theirs = optax.monitor({"norm": optax.tree.norm})
    before = theirs.init(PARAMS)
    assert jax.tree.structure(theirs.update(PARAMS, before)[1]) != jax.tree.structure(before)  # so scan refuses it

    tx = monitor(jaxsgd.sgd(0.1))
    state = tx.init(PARAMS | {"zero": jnp.zeros(2)})
    assert monitor_report(state)["gradient_norm/a/w"] == 0
    grads = PARAMS | {"zero": jnp.ones(2)}
    body = lambda s, _: (tx.update(grads, s, PARAMS | {"zero": jnp.zeros(2)})[1], None)
    state = jax.lax.scan(body, state, length=3)[0]
    report = monitor_report({"opt": (state,)})
    assert set(report) == {f"{k}/{n}" for k in ("gradient_norm", "update_ratio") for n in ("a/w", "b", "zero")}
    assert float(report["gradient_norm/a/w"]) == pytest.approx(np.linalg.norm(PARAMS["a"]["w"]), rel=1e-6)
    assert float(report["update_ratio/a/w"]) == pytest.approx(0.1, rel=1e-6)
    assert float(report["update_ratio/zero"]) == 0
    assert int(jaxsgd.metrics(state)["step"]) == 3


def test_monitor_measures_shards_together_and_says_what_is_wrong():
    tx = monitor(jaxsgd.sgd(0.1), axis_name="data")
    specs = {"w": P("data"), "b": P()}
    params = {"w": jnp.arange(8.0), "b": jnp.ones(2)}
    fn = on_mesh(lambda p: monitor_report(tx.update(p, tx.init(p), p)[1]), (specs,), P())
    plain = monitor(jaxsgd.sgd(0.1))
    same(fn(params), monitor_report(plain.update(params, plain.init(params), params)[1]), 1e-6)
    with pytest.raises(ValueError, match="two leaves have the name 'a/b'"):
        plain.init({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
    with pytest.raises(ValueError, match="params: monitor needs them"):
        plain.update(params, plain.init(params))
    frozen = monitor(jaxsgd.sgd(0.1, groups=[("n", {"frozen": True})]))
    state = frozen.init({"w": jnp.ones(2), "n": jnp.asarray(3)})
    assert set(state.gradient_norms) == {"w"}


def test_all_of_them_together_in_the_train_step():
    loss_fn = lambda p, batch, key: ((batch["x"] @ p["w"] + p["b"] - batch["y"]) ** 2).mean()
    tx = MAKERS["all"](jaxsgd.adamw(0.05))
    state = jaxsgd.TrainState.create(LINEAR, tx)
    step = jaxsgd.make_step(loss_fn, tx)
    batch = {k: BATCH[k] for k in "xy"}
    losses = []
    for _ in range(60):
        state, report = step(state, batch)
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[0] and step.compiles == 1
    assert int(report["step"]) == 60 and guard_report(state)["skipped"] == 0
    assert len(monitor_report(state)) == 4
    assert float(optax.tree.get(state.opt_state, "gradient_norm")) == pytest.approx(float(report["gradient_norm"]), 0.2)
