"""Sweeps larger than memory, sweeps that were stopped, and sweeps over several processes."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsgd
from jaxsgd.ensemble.waves import wave_size

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
RATES = np.concatenate([np.geomspace(1e-3, 0.1, 61), [30.0, 1e4, 0.05]])  # 64 runs, of which some diverge


def loss_fn(params, batch, key):
    noise = 1e-3 * jax.random.normal(key, (4,))
    return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"] + noise) ** 2)


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, 4, 3)).astype(np.float32)
    batches = [{"x": a, "y": np.sin(a.sum(1))} for a in x]
    tx = jaxsgd.momentum(1e-2)
    params = {"in": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32), "out": jnp.zeros(8)}
    return jaxsgd.make_step(loss_fn, tx, donate=False), jaxsgd.TrainState.create(params, tx), batches


def weight(state):
    return sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(state))


def assert_same(one, other):
    np.testing.assert_array_equal(one.diverged_at, other.diverged_at)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    np.testing.assert_allclose(one.final, other.final, rtol=1e-5)
    assert one.best == other.best
    for i in np.flatnonzero(~one.diverged)[::7]:
        for a, b in zip(jax.tree.leaves(one.member(i).params), jax.tree.leaves(other.member(i).params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def whole(task):
    return jaxsgd.sweep(*task, learning_rate=RATES, strategy="vmap", mesh=jax.devices()[:1])


@pytest.mark.parametrize(
    "strategy, devices, at_once", [("vmap", 1, 16), ("map", 1, 10), ("loop", 2, 40), ("auto", 2, 6)]
)
def test_waves_give_the_results_of_one(task, whole, strategy, devices, at_once):
    assert whole.waves == 1 and whole.diverged.sum() == 2
    each = weight(task[1])
    result = jaxsgd.sweep(
        *task, learning_rate=RATES, strategy=strategy, mesh=jax.devices()[:devices],
        memory=(1 + at_once // devices) * each,
    )  # fmt: skip
    assert result.waves == -(-64 // at_once)
    assert result.compiles == 1 or strategy == "auto"  # which has no room for both forms beside the states
    assert isinstance(jax.tree.leaves(result.states.params)[0], np.ndarray)
    assert_same(whole, result)


@pytest.mark.parametrize("kind", ["iterator", "function"])
def test_every_wave_sees_the_same_batches(task, whole, kind):
    step, state, batches = task
    data = iter(batches) if kind == "iterator" else lambda i: batches[i]
    result = jaxsgd.sweep(
        step,
        state,
        data,
        steps=STEPS,
        learning_rate=RATES,
        strategy="vmap",
        mesh=jax.devices()[:1],
        memory=9 * weight(state),
    )
    assert result.waves > 1
    assert_same(whole, result)


def test_what_is_built_goes_in_waves_too(task, whole):
    _, state, batches = task

    def build(learning_rate):
        tx = jaxsgd.momentum(learning_rate)
        return jaxsgd.make_step(loss_fn, tx), jaxsgd.TrainState.create(state.params, tx)

    one = jax.devices()[:1]
    result = jaxsgd.sweep(build, data=batches, learning_rate=RATES, strategy="map", mesh=one, memory=20 * weight(state))
    assert result.waves == 4
    assert_same(whole, result)


def test_a_training_of_ones_own_goes_in_waves(task, whole):
    step, state, batches = task
    stack = jax.tree.map(lambda *xs: np.stack(xs), *batches)

    def train(state, data):
        def body(state, batch):
            state, metrics = step.fn(state, batch)
            return state, metrics["loss"]

        return jax.lax.scan(body, state, data)

    memory = weight(state) + weight(stack) + 12 * weight(state)
    result = jaxsgd.sweep(train, state, stack, learning_rate=RATES, mesh=jax.devices()[:1], memory=memory)
    assert result.waves > 1
    np.testing.assert_array_equal(result.diverged, whole.diverged)
    np.testing.assert_allclose(result.final, whole.final, rtol=1e-4)


def test_a_run_is_judged_by_waves_before_and_after(task):
    """A rate is no good because another, in a wave that comes later, shows what a usual loss is."""
    step, state, batches = task
    rates = [2.0, 3.0, 1e-3, 1e-2]
    one = jaxsgd.sweep(step, state, batches, learning_rate=rates, limit=3.0, strategy="vmap", mesh=jax.devices()[:1])
    two = jaxsgd.sweep(
        step, state, batches, learning_rate=rates, limit=3.0, strategy="vmap", mesh=jax.devices()[:1],
        memory=3 * weight(state),
    )  # fmt: skip
    assert two.waves == 2 and one.diverged.any()
    assert_same(one, two)


def test_sizes_of_waves():
    device = jax.devices()[:1]
    assert wave_size(64, device, 10.0, 1000.0) == 64
    assert wave_size(64, device, 10.0, 330.0) == 32
    assert wave_size(64, device, 10.0, 310.0) == 22  # three waves of one size, not of 31, 31 and 2
    assert wave_size(64, jax.devices()[:4], 10.0, 45.0, 5.0) == 16
    with pytest.raises(ValueError, match=r"memory=9.0: one run's state takes 10 bytes.*memory=12"):
        wave_size(64, device, 10.0, 9.0, 2.0)


class Stopped(Exception):
    pass


def test_a_stopped_sweep_continues(task, whole, tmp_path):
    step, state, batches = task
    taken = []

    def data(i):
        taken.append(i)
        if len(taken) == 40:
            raise Stopped
        return batches[i]

    arguments = dict(learning_rate=RATES, steps=STEPS, strategy="vmap", mesh=jax.devices()[:1])
    arguments |= dict(memory=17 * weight(state), directory=tmp_path, save_every=8)
    with pytest.raises(Stopped):
        jaxsgd.sweep(step, state, data, **arguments)
    stopped_after = len(taken)
    result = jaxsgd.sweep(step, state, lambda i: (taken.append(i), batches[i])[1], **arguments)
    assert result.waves == 4
    assert len(taken) - stopped_after < 4 * STEPS - 24  # the first wave was not trained again
    assert_same(whole, result)
    taken.clear()
    again = jaxsgd.sweep(step, state, lambda i: (taken.append(i), batches[i])[1], **arguments)
    assert len(set(taken)) <= 1  # nothing is trained; one batch says what a step returns
    assert_same(result, again)
    with pytest.raises(ValueError, match="it holds another sweep, with steps=24, not 20"):
        jaxsgd.sweep(step, state, data, **arguments | {"steps": 20})
    with pytest.raises(ValueError, match="directory: only a Step"):
        jaxsgd.sweep(lambda state, data: data, state, batches, learning_rate=RATES, directory=tmp_path)


PROCESS = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    count, index, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    jax.config.update("jax_num_cpu_devices", 4 // count)
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    import jaxsgd
    from jaxsgd.tuning.race import plans

    def loss_fn(params, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2)

    rng = np.random.default_rng(0)
    batches = [{"x": a, "y": np.sin(a.sum(1))} for a in rng.normal(size=(20, 4, 3)).astype(np.float32)]
    tx = jaxsgd.adamw(1e-2)
    params = {"in": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32), "out": jnp.zeros(8)}
    step, state = jaxsgd.make_step(loss_fn, tx, donate=False), jaxsgd.TrainState.create(params, tx)
    held = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(state))
    rates = [*np.geomspace(1e-3, 1e-1, 9), 1e30]
    saved = {}
    for strategy in ("auto", "loop"):
        for memory in (None, 3 * held):
            found = jaxsgd.sweep(step, state, batches, learning_rate=rates, seed=[0, 1], strategy=strategy,
                                 mesh=jax.devices(), memory=memory,
                                 directory=None if memory is None else f"{out}.{strategy}")
            name = f"{strategy}{found.waves}"
            saved[name + " losses"], saved[name + " diverged"] = found.losses, found.diverged_at
            saved[name + " params"] = np.asarray(jax.jit(lambda x: x.sum())(found.member(3).params["in"]))
    budget = 2 * plans(8, 2)[-1].cost
    chosen = jaxsgd.pick(loss_fn, lambda key: params, batches, candidates=["sgd", "adam"], steps=8, seeds=2,
                         budget=budget, validation=batches[0], mesh=jax.devices())
    saved["picked"] = np.asarray([row["loss"] for row in chosen.records()], float)
    if index == 0:
        np.savez(out, **saved)
    print(jax.process_count(), "processes", len(jax.devices()), "devices")
"""


def processes(count, port, out):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(count)]
    running = [
        subprocess.Popen([*command, str(i), str(port), str(out)], stderr=subprocess.PIPE, text=True, env=environment)
        for i in range(count)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), errors[0][-2000:] + errors[-1][-2000:]
    return dict(np.load(out))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.xdist_group("multihost")
def test_two_processes_of_two_devices_give_the_results_of_one_with_four(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one = processes(1, port, tmp_path / "one.npz")
    two = processes(2, port, tmp_path / "two.npz")
    assert set(one) == set(two) and {"auto1 losses", "auto3 losses", "loop1 losses", "loop3 losses"} <= set(one)
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(one["auto1 losses"], one["loop3 losses"], rtol=1e-5)
