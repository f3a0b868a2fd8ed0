"""Checkpoints: what comes back is what was there, a damaged one is found, and a failed save costs no other."""

from __future__ import annotations

import gc
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd.checkpoint import Checkpoints, DirectoryInUse, leaves, lock

HERE = pathlib.Path(__file__).parent


def small(value: float = 0.0) -> dict:
    return {"step": jnp.int32(value), "w": jnp.full((4, 3), value, jnp.float32), "key": jax.random.key(int(value))}


def same(a, b) -> None:
    """Bit for bit, kind for kind."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, x, y in zip(jaxsgd.paths.leaf_names(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y), name
        assert np.shape(x) == np.shape(y), name
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None), name
        if isinstance(x, jax.Array):
            assert x.committed == y.committed, name
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim), name
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                assert jax.random.key_impl(x) == jax.random.key_impl(y), name
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def devices(count: int, *shape: int) -> np.ndarray:
    return np.reshape(jax.devices()[:count], shape or (count,))


def filled(directory, *steps: int, keep: int = 3) -> Checkpoints:
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(small(step), step=step, data=step, wait=True)
    return checkpoints


def test_every_kind_of_leaf_comes_back(tmp_path):
    mesh = Mesh(devices(4), ("data",))
    nan = np.array([0x7FC12345, 0xFF800001], np.uint32).view(np.float32)
    state = {
        "narrow": {name: jnp.asarray([0, 1, -2], name) for name in ("bfloat16", "float16", "int8", "float8_e4m3fn")},
        "wide": np.array([1.0 + 2**-52, -0.0]),
        "nan and minus zero": [jnp.asarray(nan), -jnp.zeros(5), jnp.zeros((2, 2))],
        "complex": jnp.asarray([1 - 2j], jnp.complex64),
        "flags": jnp.array([True, False]),
        "empty": (jnp.zeros((0, 3)), np.zeros((2, 0), np.int16), jax.random.split(jax.random.key(0), 0)),
        "numbers": [3, 2.5, True, np.float32(0.1)],
        "a.b/c": jnp.int32(7),
        "ä %/..": np.arange(3),
        "keys": [jax.random.key(5), jax.random.split(jax.random.key(1, impl="rbg"), 3), jax.random.PRNGKey(2)],
        "split": jax.device_put(jnp.arange(24.0).reshape(8, 3), NamedSharding(mesh, P("data"))),
        "split keys": jax.device_put(jax.random.split(jax.random.key(2), 4), NamedSharding(mesh, P("data"))),
        "there": jax.device_put(jnp.ones(3), jax.devices()[3]),
        "key there": jax.device_put(jax.random.key(9), jax.devices()[3]),
        "packed": jaxsgd.int8(min_size=1).pack(jnp.linspace(-1, 1, 512)),
        "floats": jaxsgd.fp8(min_size=1).pack(jnp.linspace(-1, 1, 512)),
        "nothing": None,
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, step=1, data={"epoch": 3, "state": {"state": 2**100}})
        back = checkpoints.restore(state)
    same(back.state, state)
    assert back[1:] == ({"epoch": 3, "state": {"state": 2**100}}, 1, None)
    same(Checkpoints(tmp_path).restore(state).state, state)  # to read needs no ``with``


def test_shapes_are_enough_to_restore(tmp_path):
    filled(tmp_path, 4)
    home = NamedSharding(Mesh(devices(2), ("data",)), P("data"))
    shapes = jax.eval_shape(small)
    shapes["w"] = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=home)
    state, data, step, _ = Checkpoints(tmp_path).restore(shapes)
    assert (data, step, int(state["step"])) == (4, 4, 4)
    assert state["w"].sharding.is_equivalent_to(home, 2)
    assert state["key"] == jax.random.key(4)


def test_other_devices_and_other_meshes(tmp_path):
    """8 -> 4 -> 2 x 2 -> 1 -> 8: always the same numbers, always where they were asked for."""
    rows, both = P("data"), P("data", "model")
    homes = [
        NamedSharding(Mesh(devices(8), ("data",)), rows),
        NamedSharding(Mesh(devices(4), ("data",)), P(None, "data")),
        NamedSharding(Mesh(devices(4, 2, 2), ("data", "model")), both),
        NamedSharding(Mesh(devices(8, 2, 4), ("data", "model")), P("model", "data")),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        NamedSharding(Mesh(devices(8), ("data",)), P()),
    ]
    truth = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    state = {"w": jax.device_put(truth, homes[-1])}
    with Checkpoints(tmp_path) as checkpoints:
        for step, home in enumerate(homes):
            checkpoints.save(state, step=step)
            state = checkpoints.restore({"w": jax.device_put(np.zeros_like(truth), home)}).state
            assert state["w"].sharding.is_equivalent_to(home, 2)
            np.testing.assert_array_equal(state["w"], truth)


@pytest.mark.parametrize("when", ["before Orbax looks", "while it writes"])
def test_the_state_may_be_donated_while_it_is_saved(tmp_path, when):
    """The next steps reuse the memory of arrays, and host arrays and the position in the data change in place."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    home = NamedSharding(Mesh(devices(4), ("data",)), P("data"))
    arrays = {"w": jnp.zeros((256, 1024)), "split": jax.device_put(jnp.zeros((256, 1024)), home)}
    host, data = np.zeros(9), {"index": 0}

    def go_on():
        nonlocal arrays
        before = arrays
        for _ in range(20):
            arrays = advance(arrays)
        assert before["w"].is_deleted()  # or this shows nothing
        host[:] += 20
        data["index"] += 20
        jax.block_until_ready(arrays)

    def late(*args, **kwargs):
        go_on()
        save(*args, **kwargs)

    with Checkpoints(tmp_path) as checkpoints:
        save = checkpoints._writer.save
        if when == "before Orbax looks":
            checkpoints._writer.save = late
        for step in range(3):
            checkpoints.save({**arrays, "host": host}, step=step, data=data)
            if when == "while it writes":
                go_on()
            back = checkpoints.restore({**arrays, "host": host}, step=step)
            assert back.data == {"index": 20 * step}
            for name, x in back.state.items():
                np.testing.assert_array_equal(x, np.full(x.shape, 20.0 * step), err_msg=name)


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Parameters, moments, schedule, the key of the dropout and the place in the data."""

    def loss(params, batch, key):
        kept = jax.random.bernoulli(key, 0.8, batch.shape)
        return jnp.mean((jnp.where(kept, batch, 0) @ params["w"]) ** 2)

    tx = jaxsgd.adamw(optax.cosine_decay_schedule(1e-2, 30))
    step = jaxsgd.make_step(loss, tx)
    batches = np.random.default_rng(0).normal(size=(12, 16, 4)).astype(np.float32)

    def fresh():
        return jaxsgd.TrainState.create({"w": jnp.ones((4, 2))}, tx, key=3)

    unbroken = fresh()
    for batch in batches:
        unbroken, _ = step(unbroken, batch)
    for stop in (5, 9, 12):
        with Checkpoints(tmp_path, every=4) as checkpoints:
            state, index = fresh(), 0
            if checkpoints.latest is not None:
                state, index, at, _ = checkpoints.restore(state)
                assert at == index == int(state.step) > 0
            for index in range(index, stop):  # noqa: B020
                state, _ = step(state, batches[index])
                checkpoints.after(index + 1, state, data=index + 1)
    same(state, unbroken)
    assert step.compiles == 1, "a restored state is not another kind of state"


def test_the_newest_few_are_kept(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "mine").touch()
    (tmp_path / "notes").mkdir()
    checkpoints = filled(tmp_path, 2, 3, 5, 4, keep=3)
    assert checkpoints.saved == [3, 5, 4]  # in the order written: a run that went back to step 3 goes on from 4
    assert checkpoints.latest == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4", "5", "notes"]
    assert (tmp_path / "1" / "mine").exists()
    filled(tmp_path, 1)
    assert checkpoints.saved == [5, 4, 1] and not (tmp_path / "1" / "mine").exists()


def test_an_old_one_goes_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    filled(tmp_path, 1)
    here, go = threading.Event(), threading.Event()

    def slow(*args):
        here.set()
        assert go.wait(30)
        seal(*args)

    seal = jaxsgd.checkpoint.seal
    monkeypatch.setattr(jaxsgd.checkpoint, "seal", slow)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(small(2), step=2)
        assert here.wait(30)
        assert checkpoints.saved == [1]
        with pytest.warns(RuntimeWarning, match="2: no jaxsgd-manifest: the save was cut short; passed over"):
            assert Checkpoints(tmp_path).restore(small()).step == 1
        go.set()
        checkpoints.wait()
        assert checkpoints.saved == [2]


def test_a_checkpoint_of_the_same_step_is_replaced_and_never_missing(tmp_path, monkeypatch):
    filled(tmp_path, 7)

    def cut(*_):
        raise SystemExit("killed here")

    with monkeypatch.context() as patch, Checkpoints(tmp_path, keep=1) as checkpoints:
        patch.setattr(jaxsgd.checkpoint, "seal", cut)
        patch.setattr(checkpoints, "_recover", lambda: None)
        with pytest.raises(OSError, match=r"step 7 was not saved.*left: the checkpoints of the steps \[7\]"):
            checkpoints.save(small(8), step=7, wait=True)
    with pytest.warns(RuntimeWarning, match="cut short"):
        assert Checkpoints(tmp_path).restore(small()).data == 7
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(small(9), step=7, data=9, wait=True)
        assert checkpoints.restore(small()).data == 9
        assert checkpoints.saved == [7] and not list((tmp_path / "replaced").iterdir())


def _largest(path: pathlib.Path) -> pathlib.Path:
    return max((p for p in path.rglob("*") if p.is_file() and "ocdbt" in str(p)), key=lambda p: p.stat().st_size)


def _flip(file: pathlib.Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


FAULTS = {
    "a bit": (lambda p: _flip(_largest(p), 100), "ocdbt.*damaged"),
    "truncated": (lambda p: os.truncate(_largest(p), 10), "ocdbt.* has 10 bytes instead of"),
    "longer": (lambda p: os.truncate(_largest(p), 10**5), "ocdbt.* has 100000 bytes instead of"),
    "a file is missing": (lambda p: _largest(p).unlink(), "ocdbt.* is missing"),
    "a file is a directory": (lambda p: [_largest(p).unlink(), (p / "about" / "metadata").unlink()], "missing"),
    "manifest: a bit": (lambda p: _flip(p / "jaxsgd-manifest", 3000), "jaxsgd-manifest is damaged"),
    "manifest: its digest": (lambda p: _flip(p / "jaxsgd-manifest", 5), "jaxsgd-manifest is damaged"),
    "manifest: empty": (lambda p: os.truncate(p / "jaxsgd-manifest", 0), "jaxsgd-manifest is damaged"),
    "manifest: gone": (lambda p: (p / "jaxsgd-manifest").unlink(), "no jaxsgd-manifest: the save was cut short"),
    "of another step": (lambda p: [shutil.rmtree(p), shutil.copytree(p.parent / "1", p)], "manifest is that of step 1"),
    "an empty directory": (lambda p: [shutil.rmtree(p), p.mkdir()], "no jaxsgd-manifest"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    filled(directory, 1, 2)
    return directory


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_passed_over_by_name(two, tmp_path, fault):
    harm, words = FAULTS[fault]
    shutil.copytree(two, tmp_path / "run")
    directory = tmp_path / "run"
    harm(directory / "2")
    with pytest.warns(RuntimeWarning, match=rf"run/2: .*{words}.*; passed over for that of step 1"):
        state, data, step, _ = Checkpoints(directory).restore(small())
    assert (data, step) == (1, 1)
    same(state, small(1))
    with pytest.raises(ValueError, match=rf"no good checkpoint: .*run/2: .*{words}"):
        Checkpoints(directory).restore(small(), step=2)
    harm(directory / "1") if fault != "of another step" else (directory / "1" / "jaxsgd-manifest").unlink()
    with pytest.raises(ValueError, match=r"no good checkpoint: .*run/2: .*run/1: "):
        Checkpoints(directory).restore(small())


def test_a_known_bad_one_is_not_counted_among_those_kept(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    _flip(_largest(tmp_path / "run" / "2"), 100)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        with pytest.warns(RuntimeWarning, match="passed over"):
            checkpoints.restore(small())
        checkpoints.save(small(3), step=3, data=3, wait=True)
        assert checkpoints.saved == [1, 2, 3]
        checkpoints.save(small(4), step=4, data=4, wait=True)
        assert checkpoints.saved == [3, 4]


def test_nothing_saved_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert checkpoints.latest is None and checkpoints.saved == []
    with pytest.raises(FileNotFoundError, match="no checkpoint; nothing was saved yet"):
        checkpoints.restore(small())
    filled(tmp_path / "a" / "b", 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; there are \[1\]"):
        checkpoints.restore(small(), step=5)


def test_a_checkpoint_of_another_model_says_which_paths_differ(tmp_path):
    filled(tmp_path, 1)
    other = {**small(), "w": jnp.zeros((4, 5)), "step": jnp.float32(0), "mine": {f"{i}": np.zeros(1) for i in range(9)}}
    del other["key"]
    with pytest.raises(ValueError, match="the checkpoint of another model") as caught:
        Checkpoints(tmp_path).restore(other)
    assert str(caught.value).splitlines()[1:] == [
        "only the checkpoint has (1):", "  key",
        "only the state has (9):", *(f"  mine/{i}" for i in range(8)), "  and 1 more",
        "another shape or dtype (2):", "  step: int32[] saved, float32[] in the state",
        "  w: float32[4,3] saved, float32[4,5] in the state",
        "after an edit of the optimizer: restore(..., migrate=True)",
    ]  # fmt: skip


def test_pain_6_after_an_edit_of_the_optimizer(tmp_path):
    """A clip is put before Adam, and Adam's moments go on."""
    pytest.importorskip("jaxsgd.migration")
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    old = jaxsgd.adamw(1e-2)
    step = jaxsgd.make_step(lambda p, batch, key: jnp.sum((batch @ p["w"] + p["b"]) ** 2), old, donate=False)
    state, _ = step(jaxsgd.TrainState.create(params, old, key=1), np.ones((2, 4), np.float32))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data=17)
    new = optax.chain(optax.clip_by_global_norm(1.0), jaxsgd.adamw(1e-2))
    fresh = jaxsgd.TrainState.create(params, new, key=2)
    with pytest.raises(ValueError, match="migrate=True"):
        checkpoints.restore(fresh)
    with pytest.raises(ValueError, match="like is a dict without opt_state and params"):
        checkpoints.restore({"w": 1}, migrate=True)
    back = checkpoints.restore(fresh, migrate=True)
    assert back.data == 17 and back.report is not None
    assert jax.tree.structure(back.state) == jax.tree.structure(fresh)
    same(back.state.params, state.params)
    same(back.state.key, state.key)
    ((_, moved),) = jaxsgd.state.find_states(back.state.opt_state)
    ((_, left),) = jaxsgd.state.find_states(state.opt_state)
    same(moved.slots, left.slots)
    wider = jaxsgd.TrainState.create({**params, "w": jnp.ones((4, 5))}, new)
    with pytest.raises(ValueError, match=r"params/w: float32\[4,3\] saved.*\n.*only opt_state may differ"):
        checkpoints.restore(wider, migrate=True)


def test_storages_of_ones_own_need_both_optimizers(tmp_path):
    """Packed and unpacked by them when a checkpoint is restored; reset, and said so, where they are not given."""
    from test_migration import Factored  # here, for it starts a backend, which a peer must not have

    params = {"w": jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0))}  # of rank 1
    plain, own = jaxsgd.adam(1e-2), jaxsgd.adam(1e-2, storage={"nu": Factored()})
    states = [jaxsgd.TrainState.create(params, tx) for tx in (plain, own)]
    state = states[0].replace(opt_state=plain.update(params, states[0].opt_state, params)[1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, step=1, wait=True)
        assert checkpoints.restore(states[1], migrate=True).report.reset
        there = checkpoints.restore(states[1], migrate=True, tx=own)
        assert there.report.complete
        checkpoints.save(there.state, step=2, wait=True)
        assert checkpoints.restore(states[0], migrate=True).report.reset
        back = checkpoints.restore(states[0], migrate=True, old_tx=own)
    assert back.report.complete
    np.testing.assert_allclose(back.state.opt_state.slots["nu"]["w"], state.opt_state.slots["nu"]["w"], rtol=1e-5)


def test_sigterm_saves_and_leaves(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, Checkpoints(tmp_path, every=2) as checkpoints:
        for step in range(1, 10):
            if step == 5:
                signal.raise_signal(signal.SIGTERM)
            checkpoints.after(step, small(step), data=step)
    assert left.value.code == 143
    assert checkpoints.latest == 5 and checkpoints.restore(small()).data == 5
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit), Checkpoints(tmp_path) as checkpoints:
        signal.raise_signal(signal.SIGTERM)  # and the loop is over: nothing left to save, but not forgotten
    assert signal.getsignal(signal.SIGTERM) is before


def fail_later(directory: pathlib.Path) -> None:
    with Checkpoints(directory, every=3) as checkpoints:
        checkpoints.after(3, small(3))
        for step in range(4, 10**4):  # the first step after the failure tells it, not the next save
            time.sleep(0.01)
            checkpoints.after(3 * step + 1, small(3))


def test_the_loops_own_exception_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError) as caught, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), step=1)
        raise ZeroDivisionError
    assert checkpoints.saved == [1] and not hasattr(caught.value, "__notes__")
    monkeypatch.setattr(jaxsgd.checkpoint, "seal", full)
    with pytest.raises(ZeroDivisionError) as caught, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(2), step=2)
        raise ZeroDivisionError
    (note,) = caught.value.__notes__
    assert "step 2 was not saved (OSError: [Errno 28] No space left on device)" in note
    with pytest.raises(OSError, match=r"No space left on device\); left: the checkpoints of the steps \[1\]"):
        fail_later(tmp_path)


BAD = {
    "keep": (lambda p: Checkpoints(p, keep=0), ValueError, "keep=0: it must be 1 or more"),
    "every": (lambda p: Checkpoints(p, every=0), ValueError, "every=0: it must be 1 or more"),
    "bucket": (lambda p: Checkpoints("gs://bucket/run"), ValueError, "where that storage is mounted"),
    "a file": (lambda p: Checkpoints(__file__), NotADirectoryError, "test_checkpoint.py' is a file"),
    "under a file": (lambda p: Checkpoints(f"{__file__}/run"), NotADirectoryError, "is a file"),
    "no place to make one": (lambda p: Checkpoints("/proc/jaxsgd"), OSError, "'/proc/jaxsgd': it cannot be made"),
    "read only": (lambda p: Checkpoints("/proc/self").__enter__(), OSError, "'/proc/self': it cannot be written"),
    "outside with": (lambda p: Checkpoints(p).save(small()), RuntimeError, "with Checkpoints"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(tmp_path, name):
    call, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        call(tmp_path)


def test_bad_states(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for state, kind, words in [
            ({"a": "text"}, TypeError, "'a' is 'text'; only arrays and numbers"),
            ({"a": jax.ShapeDtypeStruct((), jnp.float32)}, TypeError, "only arrays and numbers"),
            ({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, ValueError, "two leaves have the name 'a/b'"),
            ({"a": np.ones(1), "a/": np.zeros(1)}, ValueError, "the names 'a' and 'a/' are one place in the store"),
            ({}, ValueError, "it holds no array"),
        ]:
            with pytest.raises(kind, match=words):
                checkpoints.save(state, step=1)
        with pytest.raises(ValueError, match="the state has no step of its own"):
            checkpoints.save(small())
        with pytest.raises(TypeError, match="data=.*JSON"):
            checkpoints.save(small(), data=np.ones(2), step=1)
        with pytest.raises(ValueError, match="step=-1"):
            checkpoints.save(small(), step=-1)
        gone = small()
        jax.jit(lambda x: x + 1, donate_argnums=0)(gone["w"])
        with pytest.raises(RuntimeError, match="'w' was donated to a later step"):
            checkpoints.save(gone, step=1)
    assert list(tmp_path.iterdir()) == []


def full_disk(directory: str) -> None:
    """In a process of its own: no file may grow beyond a limit, as on a full disk."""
    import resource

    state = {"w": np.random.default_rng(0).normal(size=30_000)}
    everything = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(state, step=1, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, everything[1]))
        for step in (2, 3):
            try:
                checkpoints.save(state, step=step)
                checkpoints.wait()
            except OSError as error:
                assert f"{directory}: the checkpoint of step {step} was not saved" in str(error), error
                assert "left: the checkpoints of the steps [1]" in str(error), error
                print(error)
            else:
                raise AssertionError("it was saved")
            assert sorted(os.listdir(directory)) == [".jaxsgd-lock", "1"], os.listdir(directory)
        with warnings.catch_warnings(record=True) as told:
            assert checkpoints.restore(state).step == 1 and not told
        resource.setrlimit(resource.RLIMIT_FSIZE, everything)
        checkpoints.save(state, step=4, wait=True)
        assert checkpoints.saved == [1, 4]
        same(checkpoints.restore(state).state, state)
    print("room again")


def hold(directory: str, process: str = "0") -> None:
    """A run that holds its directory until it is killed."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(small(1), step=1, wait=True)
        print("ready", flush=True)
        time.sleep(600)


def test_a_second_run_stops_at_once_and_a_dead_one_is_no_hindrance(tmp_path):
    """Two processes; the first is killed, and the directory is free again at once."""
    first = start("hold", tmp_path)
    try:
        assert first.stdout.readline() == "ready\n", first.communicate()
        before, begin = lock._read(tmp_path / lock.LOCK), time.perf_counter()
        words = (
            rf"directory='{tmp_path}': another run saves there \(process {first.pid} on host '{socket.gethostname()}'"
        )
        with pytest.raises(DirectoryInUse, match=words), Checkpoints(tmp_path):
            raise AssertionError("two runs in one directory")
        assert time.perf_counter() - begin < 1 and lock._read(tmp_path / lock.LOCK) == before
        assert Checkpoints(tmp_path).restore(small()).step == 1  # reading needs no lock
    finally:
        first.kill()
    deadline = time.monotonic() + 10
    while lock._is_alive(before):  # dead, and not even collected by its parent
        assert time.monotonic() < deadline
    filled(tmp_path, 2)
    first.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_the_lock_is_given_back(tmp_path):
    file = tmp_path / lock.LOCK
    with Checkpoints(tmp_path) as checkpoints:
        assert file.exists()
        with pytest.raises(DirectoryInUse, match="these checkpoints are open already"):
            checkpoints.__enter__()
        with pytest.raises(DirectoryInUse, match="It is this process: close its other Checkpoints first"):
            Checkpoints(tmp_path).__enter__()
    assert not file.exists()
    with pytest.raises(ZeroDivisionError), checkpoints:
        raise ZeroDivisionError
    assert not file.exists()
    before = signal.getsignal(signal.SIGTERM)
    try:
        open_still = Checkpoints(tmp_path).__enter__()
        assert file.exists()
        del open_still
        gc.collect()
        assert not file.exists()
        with pytest.raises(DirectoryInUse, match="was deleted while this run saves there"), checkpoints:
            file.unlink()
            checkpoints.save(small(1), step=1)
    finally:
        signal.signal(signal.SIGTERM, before)


OWNERS = {
    "a process that is gone": (lambda o: o | {"pid": 2**22 + 1}, 0, True),
    "its number was given to another": (lambda o: o | {"started": "1"}, 0, True),
    "the host was started again": (lambda o: o | {"boot": "another"}, 0, True),
    "another host, alive": (lambda o: o | {"host": "elsewhere"}, 0, False),
    "another host, silent for a while": (lambda o: o | {"host": "elsewhere"}, 50, False),
    "another host, crashed": (lambda o: o | {"host": "elsewhere"}, 61, True),
    "another container of the same name": (lambda o: o | {"space": "pid:[1]", "pid": 2**22 + 1}, 0, False),
    "cannot be read": (lambda o: [], 0, False),
    "cannot be read, and old": (lambda o: [], 61, True),
    "alive but stopped for an hour": (lambda o: o, 3600, False),
}


@pytest.mark.parametrize("name", OWNERS)
def test_a_stale_lock_is_recognised(tmp_path, name):
    change, age, stale = OWNERS[name]
    file = tmp_path / lock.LOCK
    file.write_text(json.dumps(change(lock._myself())))
    os.utime(file, (time.time() - age,) * 2)
    if stale:
        filled(tmp_path, 1)
    else:
        with pytest.raises(DirectoryInUse, match="another run saves there"):
            filled(tmp_path, 1)
        assert file.exists()


def test_a_run_whose_lock_was_taken_over_saves_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), step=1, wait=True)
        os.replace(_written(tmp_path / "theirs", lock._myself()), tmp_path / lock.LOCK)
        theirs = tmp_path / "5.orbax-checkpoint-tmp"
        theirs.mkdir()
        with pytest.raises(DirectoryInUse, match="the lock of this run was taken over by process"):
            checkpoints.save(small(2), step=2)
    assert checkpoints.saved == [1] and (tmp_path / lock.LOCK).exists() and theirs.exists()


def _written(path: pathlib.Path, owner: dict) -> pathlib.Path:
    path.write_text(json.dumps(owner))
    return path


def start(function: str, *arguments: object) -> subprocess.Popen:
    call = f"import test_checkpoint; test_checkpoint.{function}(*{[str(each) for each in arguments]!r})"
    return subprocess.Popen(
        [sys.executable, "-c", call],
        cwd=HERE,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def elsewhere(directory: str) -> None:
    """In a process of its own, and of another host by its name: save, wait to be stopped and woken, save again."""
    socket.gethostname, lock.BEAT = (lambda: "elsewhere"), 0.1
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(small(1), step=1, wait=True)
        print("saved", flush=True)
        sys.stdin.readline()
        with pytest.raises(DirectoryInUse, match="the lock of this run was taken over by process"):
            checkpoints.save(small(2), step=2)
    print("refused")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_a_stopped_run_loses_its_lock_to_another_host_and_saves_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LIMIT", 1.0)
    child = start("elsewhere", tmp_path)
    assert child.stdout.readline() == "saved\n"
    with pytest.raises(DirectoryInUse, match="host 'elsewhere'"):
        Checkpoints(tmp_path).__enter__()
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(5), step=5, wait=True)
        os.kill(child.pid, signal.SIGCONT)
        out, _ = child.communicate("go on\n", timeout=300)
        assert child.returncode == 0 and out == "refused\n", out
        checkpoints.save(small(6), step=6, wait=True)
        assert checkpoints.saved == [1, 5, 6]


def test_a_full_disk_costs_no_other_checkpoint(tmp_path):
    child = start("full_disk", tmp_path)
    out, _ = child.communicate(timeout=300)
    assert child.returncode == 0 and "room again" in out, out


TRUTH = np.arange(16 * 6, dtype=np.float32).reshape(16, 6)


def _like(mesh: Mesh, value: np.ndarray) -> dict:
    def spread(x: np.ndarray, spec: P) -> jax.Array:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    return {
        "rows": spread(value, P("data")), "all": spread(value, P()), "step": jnp.int32(value[0, 1]),
        "keys": jax.random.wrap_key_data(spread(np.arange(8, dtype=np.uint32).reshape(4, 2), P("data"))),
        "key": jax.random.key(0),
    }  # fmt: skip


def _holds(state: dict, value: np.ndarray) -> None:
    for name in ("rows", "all"):
        for shard in state[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index], err_msg=name)
    assert int(state["step"]) == int(value[0, 1])
    for shard in jax.random.key_data(state["keys"]).addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(8, dtype=np.uint32).reshape(4, 2)[shard.index])


def peer(port: str, index: str, directory: str) -> None:
    """One of two processes with two devices each."""
    jax.config.update("jax_num_cpu_devices", 2)
    options = {"heartbeat_timeout_seconds": 10, "initialization_timeout": 30, "shutdown_timeout_seconds": 10}
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index), **options)
    mesh = Mesh(jax.devices(), ("data",))
    with Checkpoints(directory, keep=2, every=10) as checkpoints:
        like = _like(mesh, 0 * TRUTH)
        state, data, step, _ = checkpoints.restore(like)  # of one process with four devices
        assert (data, step) == ("alone", 1), (data, step)
        _holds(state, TRUTH)
        state["rows"] = jax.jit(lambda x: x + 1, donate_argnums=0)(state["rows"])
        checkpoints.save({**state, "rows": state["rows"]}, step=2, data="together")
        state["rows"] = jax.jit(lambda x: x - 1, donate_argnums=0)(state["rows"])
        checkpoints.wait()
        assert checkpoints.saved == [1, 2]
        checkpoints.save(state, step=3, wait=True)
        checkpoints.save(state, step=3, data="again", wait=True)
        assert checkpoints.saved == [2, 3] and checkpoints.restore(like).data == "again"
        try:
            checkpoints.restore({"rows": like["rows"]})
        except ValueError as error:
            assert "only the checkpoint has (4)" in str(error)
        try:
            checkpoints.restore(like, step=9)
        except FileNotFoundError as error:
            assert "no checkpoint of step 9; there are [2, 3]" in str(error)
        print("ready", flush=True)
        for step in range(4, 10**6):
            jax.block_until_ready(jax.jit(lambda x: x.sum())(state["rows"]))
            checkpoints.after(step, state, data="terminated")
    raise AssertionError("it was not terminated")


def test_two_processes(tmp_path):
    """From 1 process with 4 devices to 2 with 2 and back; one of them is asked to terminate: both save and leave."""
    alone = Mesh(devices(4), ("data",))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_like(alone, TRUTH), step=1, data="alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    peers = [start("peer", port, index, tmp_path) for index in range(2)]
    try:
        for each in peers:
            lines = []
            while "ready\n" not in lines:
                lines.append(each.stdout.readline())
                assert lines[-1], "".join(lines)
        peers[1].send_signal(signal.SIGTERM)
        outs = [each.communicate(timeout=300)[0] for each in peers]
    finally:
        for each in peers:
            each.kill()
    assert [each.returncode for each in peers] == [143, 143], outs
    state, data, step, _ = checkpoints.restore(_like(alone, 0 * TRUTH))
    assert data == "terminated" and step == checkpoints.latest > 3
    _holds(state, TRUTH)


def full_for_one(port: str, index: str, directory: str, full: str, what: str) -> None:
    """One of two processes that train in step. In one of them no file may grow beyond a limit, as on a full disk; or
    none can be made, as in a folder that is read-only (which it is not for root)."""
    import resource

    jax.config.update("jax_num_cpu_devices", 2)
    options = {"heartbeat_timeout_seconds": 100, "initialization_timeout": 30, "shutdown_timeout_seconds": 10}
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index), **options)
    mesh = Mesh(jax.devices(), ("data",))
    truth = np.random.default_rng(0).normal(size=(400, 1000)).astype(np.float32)
    rows = jax.make_array_from_callback(truth.shape, NamedSharding(mesh, P("data")), lambda at: truth[at])
    advance = jax.jit(lambda x: x + x.mean())
    with Checkpoints(directory, every=10) as checkpoints:
        checkpoints.save({"w": rows}, step=1, wait=True)
        if index == full and what == "folder":
            jaxsgd.checkpoint.tempfile.TemporaryFile = _refused
        elif index == full:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        for step in range(2, 10**5):
            rows = jax.block_until_ready(advance(rows))
            if step == 10:
                print("full", flush=True)
            checkpoints.after(step, {"w": rows})
            time.sleep(0.01)


def _refused(**_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("full", "what"),
    [(0, "disk"), pytest.param(1, "disk", marks=pytest.mark.slow), pytest.param(1, "folder", marks=pytest.mark.slow)],
)
def test_a_full_disk_of_one_process_ends_all(tmp_path, full, what):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    peers = [start("full_for_one", port, index, tmp_path, full, what) for index in range(2)]
    try:
        lines = [peers[full].stdout.readline()]
        while lines[-1] not in ("full\n", ""):
            lines.append(peers[full].stdout.readline())
        begin = time.perf_counter()
        outs = [each.communicate(timeout=300)[0] for each in peers]
    finally:
        for each in peers:
            each.kill()
    assert time.perf_counter() - begin < 60 and lines[-1], lines
    for each, out in zip(peers, outs, strict=True):
        assert each.returncode == 1, out[-3000:]
        (told,) = [line for line in out.splitlines() if line.startswith("OSError: ")]
        assert f"{tmp_path}: the checkpoint of step 10 was not saved (process {full} of 2: " in told, out[-3000:]
        assert "left: the checkpoints of the steps [1]" in told
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_the_manifest_says_what_it_is_made_of(tmp_path):
    """Its first line is the SHA-256 of the rest; each file's is the one that any other program computes."""
    filled(tmp_path, 3)
    digest, body = (tmp_path / "3" / "jaxsgd-manifest").read_text().split("\n", 1)
    about = json.loads(body)
    assert about["step"] == 3
    files = {str(p.relative_to(tmp_path / "3")) for p in (tmp_path / "3").rglob("*") if p.is_file()}
    assert set(about["files"]) == files - {"jaxsgd-manifest"}
    names = [*about["files"]]
    told = subprocess.run(["sha256sum", *names], cwd=tmp_path / "3", capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in told.splitlines()] == [about["files"][name][1] for name in names]
    assert leaves.SHOWN == 8 and len(digest) == 64
