"""A part of a checkpoint: the weights alone, into other structures and dtypes, averaged; and which ones stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd.checkpoint import Checkpoints, _read_some

X, Y = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, out: int = 3, extra: bool = False) -> None:
        self.body, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, out, rngs=rngs)
        if extra:
            self.adapter = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.norm(self.body(x))))


def trained(tx, steps: int = 4):
    step = jaxsgd.make_step(lambda model, batch, key: jnp.mean(model(batch) ** 2), tx)
    state = jaxsgd.TrainState.create(Net(nnx.Rngs(0)), tx, key=1)
    for _ in range(steps):
        state, _ = step(state, X)
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory and the state in it: AdamW with an average of the parameters."""
    state = trained(optax.chain(jaxsgd.adamw(1e-2), jaxsgd.params_ema(0.9)))
    directory = tmp_path_factory.mktemp("run")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(state, data=7, metric=0.25)
    return directory, state


def equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_the_weights_without_knowing_anything(run):
    directory, state = run
    params, data, step, report = Checkpoints(directory).restore_params()
    assert (data, step, report.complete) == (7, 4, True)
    assert params.keys() == {"body", "norm", "head"} and isinstance(params["body"]["kernel"], np.ndarray)
    for name, x in jaxsgd.paths.named_leaves(state.params, "params").items():
        part, leaf = name.split("/")
        np.testing.assert_array_equal(params[part][leaf], x)
    stats = Checkpoints(directory).restore_params(part="model_state").state
    np.testing.assert_array_equal(stats["norm"]["mean"], jax.tree.leaves(state.model_state["norm"]["mean"])[0])
    half = Checkpoints(directory).restore_params(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half.state)} == {jnp.dtype(jnp.bfloat16)}
    assert {entry.reason for entry in half.report.kept} == {"cast from float32 to bfloat16"}


def test_a_model_with_its_batch_statistics(run):
    directory, state = run
    fresh = Net(nnx.Rngs(5))
    model = Checkpoints(directory).restore_params(fresh).state
    evaluated = nnx.merge(state.graphdef, state.params, state.model_state)
    for each in (model, evaluated):
        each.eval()
    np.testing.assert_array_equal(model(X), evaluated(X))
    assert not np.array_equal(fresh.body.kernel[...], model.body.kernel[...])  # like is not written to


def test_averages(run):
    directory, state = run
    average = Checkpoints(directory).restore_params(state.params, averaged=True).state
    equal(average, state.eval_params)
    assert not np.array_equal(average["body"]["kernel"], state.params["body"]["kernel"])


FREE = {"own": jaxsgd.schedule_free_adamw(1e-2), "optax": optax.contrib.schedule_free_sgd(0.1)}


@pytest.mark.parametrize("tx", FREE.values(), ids=FREE)
def test_averages_of_schedule_free_are_computed(tmp_path, tx):
    state = trained(tx)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    for like in (state.params, None):
        back = checkpoints.restore_params(like, averaged=True).state
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state.eval_params), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_no_averages_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(jaxsgd.sgd(0.1), 1))
    with pytest.raises(ValueError, match="averaged=True: .* has no averaged weights"):
        checkpoints.restore_params(averaged=True)


def test_a_new_head_and_an_adapter(run):
    directory, state = run
    fresh = Net(nnx.Rngs(5), out=5, extra=True)
    with pytest.raises(ValueError, match="the weights of another model\n(.*\n)*Use partial=True") as caught:
        Checkpoints(directory).restore_params(fresh)
    assert "params/head/kernel: the shape was (8, 3), now it is (8, 5)" in str(caught.value)
    model, _, _, report = Checkpoints(directory).restore_params(fresh, partial=True)
    np.testing.assert_array_equal(model.body.kernel[...], state.params["body"]["kernel"][...])
    np.testing.assert_array_equal(model.head.kernel[...], fresh.head.kernel[...])
    assert {entry.name for entry in report.reset} == {
        f"params/{part}/{leaf}" for part in ("head", "adapter") for leaf in ("kernel", "bias")
    }
    assert not report.complete and "new, the checkpoint has no such leaf" in str(report)
    assert {entry.name for entry in report.kept} > {"params/body/kernel", "model_state/norm/mean"}
    assert [e.name for e in report.dropped] == ["params/head/bias", "params/head/kernel"]


def test_names_may_differ(run):
    directory, state = run
    like = {"base": {"kernel": jnp.zeros((4, 8), jnp.bfloat16)}, "lora": jnp.ones(2)}
    back = Checkpoints(directory).restore_params(
        like, partial=True, rename=lambda name: name.replace("params/base", "params/body")
    )
    np.testing.assert_array_equal(back.state["base"]["kernel"], state.params["body"]["kernel"].astype(jnp.bfloat16))
    (kept,) = back.report.kept
    assert kept.reason == "from params/body/kernel, cast from float32 to bfloat16"
    np.testing.assert_array_equal(back.state["lora"], like["lora"])


def test_shapes_on_a_mesh(run):
    directory, state = run
    home = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), P(None, "data"))
    like = {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=home)}
    back = Checkpoints(directory).restore_params({"body": like}, partial=True).state
    assert back["body"]["kernel"].sharding.is_equivalent_to(home, 2)
    np.testing.assert_array_equal(back["body"]["kernel"], state.params["body"]["kernel"].astype(jnp.bfloat16))


def test_only_what_is_asked_for_is_read(run, monkeypatch):
    directory, _ = run
    asked = []
    import jaxsgd.checkpoint as room

    def spy(path, table, names, *rest):
        out = _read_some(path, table, names, *rest)
        asked.append(set(out))
        return out

    monkeypatch.setattr(room, "_read_some", spy)
    Checkpoints(directory).restore_params()
    assert all(name.startswith("params/") for name in asked[0]) and len(asked[0]) == 6


def test_a_reader_goes_on_when_its_checkpoint_is_deleted(tmp_path, monkeypatch):
    """A run saves step 2 and deletes step 1 after a reader has chosen that one."""
    writer = save(tmp_path, {1: None}, keep=1)
    choose, chosen = Checkpoints._choose, []

    def late(self, step):
        chosen.append(choose(self, step))
        if len(chosen) == 1:
            save(tmp_path, {2: None}, keep=1)
        return chosen[-1]

    monkeypatch.setattr(Checkpoints, "_choose", late)
    assert Checkpoints(tmp_path).restore({"w": jnp.zeros(2)}).step == 2
    assert [path.name for path in chosen] == ["1", "2"] and writer.saved == [2]


BAD = {
    "no such part": ({"part": "weights"}, ValueError, r"part='weights': .*Use one of \['key', 'model_state', "),
    "an integer dtype": ({"dtype": jnp.int8}, TypeError, "a floating dtype is needed"),
    "partial of nothing": ({"partial": True}, ValueError, "partial=True: it needs like"),
    "rename of nothing": ({"rename": str.upper}, ValueError, "rename=.*: it needs like"),
    "another model": ({"like": {"boddy": jnp.ones(2)}, "partial": True}, ValueError, "did you mean 'params/body/"),
    "a shape without a value": (
        {
            "like": {"body": {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}, "z": jax.ShapeDtypeStruct((), int)},
            "partial": True,
        },
        ValueError,
        "'params/z' is only a shape.*Use initialised arrays",
    ),
    "no number": (
        {"like": {"body": {"kernel": jnp.ones((4, 8), int)}}, "partial": True},
        ValueError,
        "no leaf of like fits",
    ),
    "a name that is none": (
        {"like": {"b": jnp.ones(2)}, "rename": lambda _: None},
        TypeError,
        r"rename\('params/b'\) returned None",
    ),
    "a step that is not there": ({"step": 9}, FileNotFoundError, "no checkpoint of step 9"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(run, name):
    arguments, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        Checkpoints(run[0]).restore_params(**arguments)


def test_a_value_that_does_not_fit_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"params": {"w": jnp.array([1e5, jnp.inf])}}, step=1)
    with pytest.raises(ValueError, match="params/w: its values do not fit into float16"):
        checkpoints.restore_params(dtype=jnp.float16)
    np.testing.assert_array_equal(checkpoints.restore_params(dtype=jnp.bfloat16).state["w"][1], np.inf)


def test_migrate_into_shapes(tmp_path):
    old, new = jaxsgd.adamw(1e-2), optax.chain(optax.clip_by_global_norm(1.0), jaxsgd.adamw(1e-2))
    state = trained(old)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    shapes = jaxsgd.TrainState.shapes(Net(nnx.Rngs(0)), new, key=0)
    with pytest.raises(ValueError, match="only shapes in opt_state.*Use tx="):
        checkpoints.restore(shapes, migrate=True)
    with pytest.raises(ValueError, match="tx: it has another state"):
        checkpoints.restore(shapes, migrate=True, tx=old)
    back = checkpoints.restore(shapes, migrate=True, tx=new)
    ((_, moved),) = jaxsgd.state.find_states(back.state.opt_state)
    for x, y in zip(jax.tree.leaves(moved.slots), jax.tree.leaves(state.opt_state.slots), strict=True):
        np.testing.assert_array_equal(x, y)
    assert back.report.complete and jax.tree.structure(back.state) == jax.tree.structure(shapes)


def test_describe(run):
    directory, state = run
    told = Checkpoints(directory).describe()
    assert (told.step, told.data, told.metric, told.steps, told.metrics) == (4, 7, 0.25, (4,), {4: 0.25})
    leaves = {leaf.name: leaf for leaf in told.leaves}
    assert set(leaves) == set(jaxsgd.paths.leaf_names(state))
    kernel = leaves["params/body/kernel"]
    assert (kernel.shape, kernel.dtype, kernel.bytes) == ((4, 8), "float32", 128)
    assert told.bytes["params"] == sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert told.files == sum(p.stat().st_size for p in (directory / "4").rglob("*") if p.is_file()) - (
        (directory / "4" / "jaxsgd-manifest").stat().st_size
    )
    slots = " ".join(name for names in told.optimizer.values() for name in names).split()
    assert {"mu", "nu", "average", "count"} <= set(slots)
    assert len(told.averages) == 6
    text = str(told)
    assert "step 4 of [4], metric 0.25" in text and "params/body/kernel" in text and "float32[4, 8]" in text


def save(directory, metrics, **options) -> Checkpoints:
    with Checkpoints(directory, **options) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save({"w": jnp.ones(2)}, step=step, metric=metric, wait=True)
    return checkpoints


def test_the_best_and_every_nth_are_kept(tmp_path):
    losses = {1: 0.9, 2: 0.2, 3: 0.5, 4: float("nan"), 5: 0.7, 6: None, 7: 0.2, 8: 0.8}
    for mode, best, kept in (("min", 7, [2, 7, 8]), ("max", 1, [1, 8])):
        checkpoints = save(tmp_path / mode, losses, keep=1, keep_best=2, best_mode=mode)
        assert checkpoints.best == best and checkpoints.saved == kept
    checkpoints = save(tmp_path / "nth", losses, keep=2, keep_every=3)
    assert checkpoints.saved == [3, 6, 7, 8]
    assert Checkpoints(tmp_path / "min").restore({"w": jnp.zeros(2)}, step=7).step == 7
    assert save(tmp_path / "none", {1: None}).best is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_best": -1}, "keep_best=-1: it must be 0 or more"),
        ({"keep_every": 0}, "keep_every=0: it must be 1 or more"),
        ({"keep": 1.5}, "keep=1.5: .*Use a whole number"),
        ({"best_mode": "least"}, "best_mode='least': use \"min\" for a loss"),
    ],
)
def test_bad_options(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path, **options)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="metric='low': a number is needed"):
        checkpoints.save({"w": jnp.ones(2)}, step=1, metric="low" if options else None)
