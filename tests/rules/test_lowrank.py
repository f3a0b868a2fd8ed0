"""GaLore, APOLLO and Adam-mini: against optax's code, the authors' code, and at their edges."""

import types

import jax
import jax.numpy as jnp
import laws
import lowrank_cases as recorded
import numpy as np
import optax
import pytest
import twins_lowrank
from optax.contrib import GaLoreDimensionNumbers
from optax.contrib import _galore as optax_galore

import jaxsgd
from jaxsgd.rules import lowrank
from jaxsgd.rules.adaptive import adam, adamw, amsgrad
from jaxsgd.rules.factored import adam_mini
from jaxsgd.rules.lowrank import apollo, apollo_mini, galore, grown, leading_basis, low_rank
from jaxsgd.rules.momentum import sgd
from jaxsgd.rules.sign import lion

pytestmark = pytest.mark.slow  # CI runs it

RATE = laws.RATE


def same(ours, theirs, kind="normal", tolerance=1e-12, dtype=np.float64):
    """Two transformations walk the same path."""
    params, grads = laws.tree(1, dtype), {k: g.astype(dtype) for k, g in laws.gradients(2, kind).items()}
    a, b = (jax.device_get(laws.walk(tx)(params, grads))[0] for tx in (ours, theirs))
    assert laws.relative(a, b) <= tolerance


# -- GaLore against optax ------------------------------------------------------------------------

CUBE = {"scalar": None, "vector": None, "matrix": None, "cube": GaLoreDimensionNumbers((0, 2), 1)}
CALLS = [
    {},
    {"rank": 2},
    {"rank": 2, "update_proj_gap": 7, "scale": 0.25},
    {"rank": 1, "weight_decay": 0.1, "mask": {"scalar": True, "vector": False, "matrix": True, "cube": False}},
    {"rank": 2, "base_optimizer": optax.scale_by_adam(0.8, 0.95), "update_proj_gap": 5},
    {"rank": 2, "base_optimizer": optax.scale_by_lion()},
    {"rank": 2, "base_optimizer": optax.chain(optax.scale_by_rms(), optax.trace(0.9))},
    {"rank": 2, "base_optimizer": optax.identity()},
    {"rank": 2, "weight_dimension_numbers": CUBE},
    {"rank": 2, "weight_dimension_numbers": lambda params: {**CUBE, "matrix": GaLoreDimensionNumbers(1, 0)}},
]


@pytest.fixture
def optax_in_float64(monkeypatch):
    """optax's own code, but for its float32 singular vectors: those are 1e-7 from ours."""
    wide = types.SimpleNamespace(**{name: getattr(jnp, name) for name in dir(jnp)})
    wide.float32 = jnp.float64
    monkeypatch.setattr(optax_galore, "jnp", wide)


@pytest.mark.parametrize("arguments", CALLS, ids=lambda arguments: ",".join(arguments))
def test_a_call_for_optax_walks_the_same_path(x64, optax_in_float64, arguments):
    same(galore(RATE, **arguments), optax.contrib.galore(RATE, **arguments))


def test_positional_arguments_are_those_of_optax(x64, optax_in_float64):
    arguments = (RATE, 2, 9, 0.5, optax.scale_by_adam(0.8), 0.1, None, None)
    same(galore(*arguments), optax.contrib.galore(*arguments))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-6)])
def test_optax_as_it_is(x64, dtype, tolerance):
    """In float64 its float32 projector shows, 1e-7; in float32 the rounding of Adam's bias correction, 3e-6."""
    arguments = {"rank": 2, "update_proj_gap": 10}
    same(galore(RATE, **arguments), optax.contrib.galore(RATE, **arguments), tolerance=tolerance, dtype=dtype)


def test_one_number_for_all_batches_over_the_other_axes(x64):
    params, grads = laws.tree(1)["cube"], laws.gradients(2)["cube"]
    rank = {"rank": 2, "update_proj_gap": 7}
    whole = jax.device_get(laws.walk(galore(RATE, **rank, weight_dimension_numbers=GaLoreDimensionNumbers(-2, -1))))
    whole = whole(params, grads)[0]
    for i in range(len(params)):
        alone = laws.walk(galore(RATE, **rank))(params[i], grads[:, i])[0]
        np.testing.assert_allclose(whole[:, i], alone, rtol=1e-12)
    state = galore(RATE, weight_dimension_numbers=GaLoreDimensionNumbers(-2, -1)).init(laws.tree(1))
    assert state.slots["projector"]["vector"] is None and state.slots["projector"]["cube"].shape == (4, 3, 2)


def test_the_state_is_of_low_rank():
    params = {"w": jnp.ones((40, 20)), "b": jnp.ones(20)}
    shapes = lambda side: {k: v["w"].shape for k, v in galore(RATE, rank=4, side=side).init(params).slots.items()}
    assert shapes("long") == {"projector": (40, 4), "mu": (4, 20), "nu": (4, 20)}
    assert shapes("short") == {"projector": (20, 4), "mu": (4, 40), "nu": (4, 40)}


def test_on_the_short_side_full_rank_loses_nothing(x64):
    """Momentum commutes with a rotation: with SGD inside, full rank is SGD itself. The long side drops most of it."""
    rule = low_rank(sgd)
    same(rule(RATE, side="short", momentum=0.9), sgd(RATE, momentum=0.9))
    with pytest.raises(AssertionError):
        same(rule(RATE, side="long", momentum=0.9), sgd(RATE, momentum=0.9), tolerance=0.1)


def test_any_rule_of_gradients_can_be_inside(x64, optax_in_float64):
    inside = {"rank": 2, "update_proj_gap": 6}
    by_optax = optax.contrib.galore(RATE, **inside, base_optimizer=optax.scale_by_lion(0.8, 0.9), weight_decay=0.1)
    same(low_rank(lion)(RATE, **inside, b1=0.8, b2=0.9, weight_decay=0.1), by_optax)
    same(low_rank(adam)(RATE, **inside), galore(RATE, **inside))
    by_optax = optax.contrib.galore(RATE, **inside, base_optimizer=optax.scale_by_amsgrad(), weight_decay=0.0)
    same(low_rank(amsgrad)(RATE, **inside), by_optax)
    assert low_rank(adamw).defaults["weight_decay"] == 1e-4


def test_compressed_moments_keep_their_kinds():
    params = {"w": jnp.ones((96, 64))}
    for rule in (galore, low_rank(amsgrad), apollo):
        kinds = {name: slot.kind for name, slot in rule.slots.items()}
        assert (kinds["mu"], kinds["nu"], kinds.get("projector", "basis")) == ("mean", "square", "basis")
        stored = rule(RATE, rank=64, storage=jaxsgd.int8()).init(params).slots
        packed = {name for name, x in stored.items() if x["w"] is not None and len(jax.tree.leaves(x["w"])) == 2}
        assert packed == {name for name, kind in kinds.items() if kind in ("mean", "square")}


def test_an_optax_base_sees_each_leaf_by_itself():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    tx = galore(RATE, rank=1, base_optimizer=optax.scale_by_adam())
    state = tx.init(params)
    assert state.slots["inner"]["w"].mu.shape == (1, 3) and state.slots["projector"]["w"].shape == (4, 1)
    assert not jax.tree.leaves((state.slots["mu"], state.slots["nu"]))
    _, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


# -- where the singular vectors are nobody's ------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_basis_is_whole_and_the_same_whatever_the_rounding(x64, dtype, turned):
    rng = np.random.RandomState(0)
    g = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5))
    g = (g if not turned else g.T @ rng.standard_normal((6, 6))).astype(dtype)
    rows, eps = len(g), np.finfo(dtype).eps
    basis = leading_basis(jnp.asarray(g), 4, turned)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=20 * eps)
    for other in (g * dtype(1.3), g[:, ::-1].copy()):
        np.testing.assert_allclose(np.abs(leading_basis(jnp.asarray(other), 4, turned)), np.abs(basis), atol=400 * eps)
    nothing = leading_basis(jnp.zeros((rows, 5), dtype), 4, turned)
    np.testing.assert_allclose(nothing.T @ nothing, np.eye(4), atol=20 * eps)


def test_rounding_is_no_signal():
    """A gradient of rank 1 takes steps of rank 1; optax divides the rounding by itself and takes full ones."""
    g = {"w": jnp.asarray(np.outer(np.arange(1, 6), np.arange(1, 4)) / 7, jnp.float32)}
    ranks = []
    for make in (galore, optax.contrib.galore):
        tx = make(1.0, rank=3)
        ranks.append(np.linalg.matrix_rank(tx.update(g, tx.init(g), g)[0]["w"], tol=1e-3))
    assert ranks[0] == 1 and ranks[1] > 1


def test_a_first_gradient_of_zero_does_not_hold_a_layer():
    params, g = {"w": jnp.zeros((6, 4))}, {"w": jnp.ones((6, 4))}
    for make in (galore, apollo, apollo_mini):
        tx = make(0.1)
        updates, state = tx.update(params, tx.init(params), params)
        assert np.all(updates["w"] == 0)
        updates, state = tx.update(g, state, params)
        assert np.linalg.norm(updates["w"]) > 0.01, make


def test_complex_matrices_turn_with_their_phase(x64):
    rng = np.random.RandomState(0)
    p, g = (rng.standard_normal((5, 3)) + 1j * rng.standard_normal((5, 3)) for _ in range(2))
    turn = np.exp(0.7j)
    for tx in (galore(RATE, rank=2), galore(RATE, rank=2, side="short"), apollo(RATE, rank=2), apollo_mini(RATE)):
        update = tx.update(g, tx.init(p), p)[0]
        np.testing.assert_allclose(tx.update(turn * g, tx.init(p), p)[0], turn * update, atol=1e-12)


def test_what_is_not_finite_stays_in_its_leaf():
    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((4, 3))}
    for tx in (galore(RATE), apollo(RATE, rank=2), apollo_mini(RATE), adam_mini(RATE)):
        bad = {"w": jnp.full((4, 3), jnp.nan), "v": jnp.ones((4, 3))}
        assert np.all(np.isfinite(tx.update(bad, tx.init(params), params)[0]["v"]))


@pytest.mark.parametrize("side", ["long", "short"])
def test_a_step_with_a_new_basis_is_an_ordinary_step(x64, side):
    """jit equals eager, vmap equals one by one, and the derivative is that of the singular vectors too."""
    params, grads = laws.tree(1), {k: g[0] for k, g in laws.gradients(3).items()}
    tx = galore(RATE, rank=2, side=side, eps=0.1)
    state = tx.init(params)
    one = lambda rate: tx.update(grads, jaxsgd.with_hyper(state, learning_rate=rate), params)[0]["matrix"]
    many, rates = jax.vmap(one)(jnp.array([0.1, 0.2])), (0.1, 0.2)
    for rate, update in zip(rates, many, strict=True):
        np.testing.assert_allclose(update, one(rate), rtol=1e-12)
    with jax.disable_jit():
        np.testing.assert_allclose(one(0.1), many[0], rtol=1e-11)
    moved = lambda s: tx.update(jax.tree.map(lambda g, d: g + s * d, grads, laws.tree(5)), state, params)[0]["matrix"]
    tangent = jax.jvp(moved, (0.0,), (1.0,))[1]
    np.testing.assert_allclose(tangent, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-8)


# -- APOLLO ----------------------------------------------------------------------------------------


def test_each_leaf_and_each_interval_has_a_projection_of_its_own():
    params = {"a": jnp.ones((4, 6)), "c": jnp.ones((4, 6))}
    tx, seeds = apollo(RATE, rank=2, update_proj_gap=3), []
    state = tx.init(params)
    for _ in range(7):
        _, state = tx.update(params, state, params)
        seeds.append(tuple(int(seed) for seed in state.slots["seed"].values()))
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[4] == seeds[5] != seeds[6]
    assert len({seed for pair in seeds for seed in pair}) == 6
    assert {k: v["a"].shape for k, v in state.slots.items()} == {
        "mu": (2, 6), "nu": (2, 6), "size": (1, 1), "seed": (),
    }  # fmt: skip


def test_a_step_grows_slowly_and_falls_at_once():
    x, size, sizes = jnp.eye(4) / 2, jnp.zeros((1, 1)), []
    for factor in (0.0, 1.0, 3.0, 3.0, 0.1, 1.0):
        limited, size = grown(factor * x, size, 1.01)
        sizes.append(float(size[0, 0]))
        np.testing.assert_allclose(jnp.linalg.norm(limited), sizes[-1], rtol=1e-6)
    np.testing.assert_allclose(sizes, [0, 1, 1.01, 1.01**2, 0.1, 0.101], rtol=1e-6)
    assert "size" not in apollo(RATE, growth=None).init({"w": x}).slots


def test_who_gets_adam_goes_by_name():
    params = {"embed/embedding": jnp.ones((9, 4)), "mlp/kernel": jnp.ones((4, 8)), "query/kernel": jnp.ones((4, 2, 3))}
    shapes = lambda tx: {k: v.shape for k, v in tx.init(params).slots["nu"].items()}
    kept = {"embed/embedding": (9, 4), "mlp/kernel": (1, 8), "query/kernel": (1, 6)}
    assert shapes(apollo_mini(RATE)) == kept
    assert shapes(apollo_mini(RATE, adam="mlp")) == {**kept, "embed/embedding": (1, 9), "mlp/kernel": (4, 8)}
    told = {"embed/embedding": None, "mlp/kernel": None, "query/kernel": GaLoreDimensionNumbers(0, -1)}
    assert shapes(apollo_mini(RATE, weight_dimension_numbers=told))["query/kernel"] == (2, 1, 4)


# -- Adam-mini -------------------------------------------------------------------------------------


def blocks_of(params, **arguments):
    return {k: v.shape for k, v in adam_mini(RATE, **arguments).init(params).slots["nu"].items()}


def test_blocks_go_by_name_and_shape():
    leaf = lambda *shape: jnp.ones(shape)
    params = {
        "Embed_0/embedding": leaf(9, 4), "attn/query/kernel": leaf(4, 2, 3), "attn/key/bias": leaf(2, 3),
        "attn/value/kernel": leaf(4, 2, 3), "attn/out/kernel": leaf(2, 3, 4), "layers/key/kernel": leaf(5, 4, 2, 3),
        "Dense_0/kernel": leaf(4, 8), "Dense_0/bias": leaf(8), "LayerNorm_0/scale": leaf(4), "layers/norm": leaf(5, 4),
        "q_proj/kernel": leaf(4, 6), "layers/wk": leaf(5, 4, 6), "lm_head/kernel": leaf(4, 9),
        "Conv_0/kernel": leaf(3, 3, 2, 4), "PatchEmbed_0/kernel": leaf(4, 8),
    }  # fmt: skip
    expected = {
        "Embed_0/embedding": (9, 1), "attn/query/kernel": (1, 2, 1), "attn/key/bias": (2, 3),
        "attn/value/kernel": (1, 2, 3), "attn/out/kernel": (2, 1, 4), "layers/key/kernel": (5, 1, 2, 1),
        "Dense_0/kernel": (1, 8), "Dense_0/bias": (8,), "LayerNorm_0/scale": (1,), "layers/norm": (5, 1),
        "q_proj/kernel": (1, 2, 1), "layers/wk": (5, 1, 2, 1), "lm_head/kernel": (1, 9), "Conv_0/kernel": (3, 3, 1, 4),
        "PatchEmbed_0/kernel": (1, 8),
    }  # fmt: skip
    assert blocks_of(params, head_dim=3) == expected
    assert blocks_of({"q_proj/kernel": leaf(4, 6)}) == {"q_proj/kernel": (1, 6)}
    blocks = [("Conv", (0, 1, 2)), ("Dense", "all"), ("Dense_0/bias", ()), ("out", (0, 1))]
    told = {"Conv_0/kernel": (1, 1, 1, 4), "Dense_0/kernel": (1, 1), "attn/out/kernel": (1, 1, 4)}
    assert blocks_of(params, head_dim=3, blocks=blocks) == {**expected, **told}


def test_a_block_for_each_coordinate_is_adam(x64):
    same(adam_mini(RATE, blocks=[("", ())]), adam(RATE))


# -- what is wrong is said -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: galore(RATE, rank=0), ValueError, "rank=0"),
        (lambda: galore(RATE, rank=2.5), TypeError, "rank=2.5: a whole number"),
        (lambda: galore(RATE, side="left"), ValueError, "known are 'long', 'short'"),
        (lambda: galore(RATE, base_optimizer=lion), TypeError, r"use low_rank\(lion\)"),
        (lambda: galore(RATE, base_optimizer=1), TypeError, "base_optimizer=1: a transformation is needed"),
        (lambda: galore(RATE, base_optimizer=optax.identity(), b1=0.5), TypeError, "b1=0.5 is Adam's"),
        (lambda: low_rank(jaxsgd.lamb), ValueError, "lamb asks for 'p'"),
        (lambda: low_rank(jaxsgd.prodigy), ValueError, "prodigy"),
        (lambda: low_rank(galore), ValueError, "galore has 'axes' too"),
        (lambda: low_rank(adam_mini), ValueError, "adam_mini has '.*' too, or treats whole parameters by it"),
        (lambda: low_rank(jaxsgd.muon), ValueError, "muon has 'axes' too, or treats whole parameters by it"),
        (lambda: apollo(RATE, scale_type="row"), ValueError, "known are 'channel', 'tensor'"),
        (lambda: apollo(RATE, key=0.5), TypeError, "key=0.5: a whole number"),
        (lambda: adam_mini(head_dim=0), TypeError, "head_dim=0"),
        (lambda: adam_mini(head_dim=4).init({"q_proj": jnp.ones((4, 6))}), ValueError, "'q_proj' of shape"),
        (lambda: adam_mini(blocks=[("q", (0, 2))]).init({"q": jnp.ones((4, 6))}), ValueError, "has no axes"),
        (lambda: adam_mini(blocks=[("k", ())]).init({"q": jnp.ones((4, 6))}), ValueError, "matches no parameter"),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dimensions", [(0, 0), (0, 2), ((0, 1), ()), (0, -3)])
def test_wrong_dimension_numbers_are_named(dimensions):
    for make in (galore, apollo):
        tx = make(RATE, weight_dimension_numbers={"w": GaLoreDimensionNumbers(*dimensions)})
        with pytest.raises(ValueError, match=r"weight_dimension_numbers: 'w' of shape \(3, 2\)"):
            tx.init({"w": jnp.ones((3, 2))})


# -- against the authors' code ---------------------------------------------------------------------


def recorded_of(case):
    with np.load(recorded.DATA) as data:
        return {name: data[f"{case}/{name}"] for name in recorded.shapes(case)}


def walked(tx, params, grads):
    kept = np.array(recorded.KEPT) - 1
    return {k: np.asarray(v)[kept] for k, v in laws.walk(tx)(params, grads)[0].items()}


def turned(tree):
    """torch's (out, in) and ours, there and back."""
    return {k: v if k == "vector" else np.swapaxes(v, -1, -2) for k, v in tree.items()}


def agree(ours, theirs):
    for name, value in theirs.items():
        error = np.max(np.abs(ours[name] - value)) / np.max(np.abs(value))
        assert error <= 1e-12, f"{name}: {error:.1e}"


def renamed(kwargs, told):
    """Their arguments as ours."""
    b1, b2 = kwargs.get("betas", (0.9, 0.999))
    return {"b1": b1, "b2": b2, "eps": kwargs.get("eps", 1e-6), "rank": recorded.RANK, **told}


@pytest.mark.parametrize("case", [case for case in recorded.CASES if case.startswith("galore")])
def test_galore_torch(x64, case):
    """Its eps comes before the correction of the second moment: compared without one, or without a correction."""
    _, kwargs, told = recorded.CASES[case]
    arguments = renamed(kwargs, told) | {"side": "short", "bias_correction": kwargs.get("correct_bias", True)}
    params, grads = (turned(tree) for tree in recorded.problem(case))
    agree(turned(walked(galore(recorded.RATE, **arguments), params, grads)), recorded_of(case))


def _apollo_arguments(case):
    _, kwargs, told = recorded.CASES[case]
    arguments = renamed(kwargs, told)
    return {**arguments, "growth": None} if kwargs.get("disable_nl") else arguments


@pytest.mark.parametrize("case", [case for case in recorded.CASES if case.startswith("apollo")])
def test_the_twin_of_apollo_is_apollo_torch(case):
    """With the same projections. The twin is what the first law holds the rule against."""
    params, grads = (turned(tree) for tree in recorded.problem(case))
    arguments, ours = _apollo_arguments(case), {}
    for name, p in params.items():

        def projections(name=name, p=p):
            for step in range(recorded.STEPS):
                yield _projection(name, p.shape, step // arguments["update_proj_gap"])

        out = twins_lowrank.apollo(p, grads[name], recorded.RATE, **arguments, drawn=projections())
        ours[name] = np.stack(out)[np.array(recorded.KEPT) - 1]
    agree(turned(ours), recorded_of(case))


def _projection(name, shape, interval):
    """What apollo-torch was given, as (rank, short axis) of a leaf of this (in, out) shape."""
    rows, columns = shape
    right = columns >= rows  # their rows are our columns
    drawn = recorded.normal(name, (recorded.RANK, rows) if right else (columns, recorded.RANK), interval)
    return (drawn if right else drawn.T) / np.sqrt(recorded.RANK)


@pytest.mark.parametrize("case", ["apollo-once", "apollo-whole"])
def test_apollo_torch(x64, monkeypatch, case):
    """The rule itself, where one projection lasts for the whole walk."""
    for name in recorded.MATRICES:
        params, grads = ({name: turned(tree)[name]} for tree in recorded.problem(case))
        shape = params[name].shape
        if len(shape) > 1:
            fixed = _projection(name, shape, 0)
            monkeypatch.setattr(lowrank, "drawn", lambda seed, shape, dtype, fixed=fixed: jnp.asarray(fixed, dtype))
        ours = turned(walked(apollo(recorded.RATE, **_apollo_arguments(case)), params, grads))
        agree(ours, {name: recorded_of(case)[name]})


NAMES = {"q_proj.weight": "query/kernel", "k_proj.weight": "key/kernel", "v_proj.weight": "value/kernel"}


def _flax(tree, axis_of_heads):
    """The recorded transformer with kernels (in, out); attention's may have an axis of heads, as in Flax."""
    out = {}
    for name, value in tree.items():
        kernel = not name.endswith(("embed_tokens.weight", "bias", "norm.weight"))
        value = np.swapaxes(value, -1, -2) if kernel else value
        for theirs, flax in NAMES.items() if axis_of_heads else ():
            if name.endswith(theirs):
                value, name = value.reshape(*value.shape[:-1], -1, recorded.HEAD_DIM), name.replace(theirs, flax)
        out[name] = value
    return out


@pytest.mark.parametrize("axis_of_heads", [True, False])
@pytest.mark.parametrize("case", ["mini", "mini-decay"])
def test_adam_mini_of_its_authors(x64, case, axis_of_heads):
    _, kwargs, _ = recorded.CASES[case]
    arguments = {"eps": kwargs.get("eps", 1e-8), "weight_decay": kwargs.get("weight_decay", 0.0)}
    arguments |= dict(zip(("b1", "b2"), kwargs.get("betas", (0.9, 0.999)), strict=True))
    kinds = {} if axis_of_heads else {"head_dim": recorded.HEAD_DIM}
    tx = adam_mini(recorded.RATE, **arguments, **kinds, groups=[("norm|bias", {"weight_decay": 0.0})])
    params, grads = (_flax(tree, axis_of_heads) for tree in recorded.problem(case))
    agree(walked(tx, params, grads), _flax(recorded_of(case), axis_of_heads))


def test_every_package_is_recorded():
    with np.load(recorded.DATA) as data:
        assert {line.split()[0] for line in data["versions"]} == {"torch", "galore-torch", "apollo-torch", "adam-mini"}
        assert {key.split("/")[0] for key in data if key != "versions"} == set(recorded.CASES)
