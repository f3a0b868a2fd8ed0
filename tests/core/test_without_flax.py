"""Plain JAX and Equinox: the same quickstart, and nobody pays for Flax who does not use it."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

import jaxsgd

RNG = np.random.default_rng(0)
BATCHES = [{"x": x, "y": np.sin(x.sum(1, keepdims=True))} for x in RNG.normal(size=(30, 16, 3)).astype(np.float32)]


def alone(code):
    """Run code in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_plain_jax_does_not_import_flax():
    alone(
        """
        import sys
        import jax.numpy as jnp, numpy as np
        import jaxsgd

        def loss_fn(params, batch):
            return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), {"size": jnp.abs(params["w"]).max()}

        tx = jaxsgd.guard(jaxsgd.adamw(1e-2))
        state = jaxsgd.TrainState.create({"w": jnp.zeros((3, 1))}, tx)
        step = jaxsgd.make_step(loss_fn, tx)
        batch = {"x": np.ones((4, 3), np.float32), "y": np.ones((4, 1), np.float32)}
        for _ in range(3):
            state, metrics = step(state, batch)
        params = state.eval_params
        again = jaxsgd.make_step(loss_fn, tx, donate=False)
        sweep = jaxsgd.sweep(again, state, [batch] * 4, learning_rate=[1e-3, 1e-2])
        assert sweep.best and jaxsgd.plan(loss_fn, params, tx, batch).fits
        assert jaxsgd.sharpness(loss_fn, params, batch).threshold > 0
        loaded = [name for name in sys.modules if name.split(".")[0] == "flax"]
        assert not loaded, loaded[:5]
        """
    )


def test_plain_jax_quickstart():
    def loss_fn(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)

    params = {"in": jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32), "out": jnp.zeros((8, 1))}
    tx = optax.chain(jaxsgd.clip_by_global_norm(1.0), jaxsgd.adamw(1e-1))
    state, step = jaxsgd.TrainState.create(params, tx), jaxsgd.make_step(loss_fn, tx)
    losses = []
    for batch in BATCHES * 3:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert jax.tree.structure(state.eval_params) == jax.tree.structure(params)


def test_equinox_quickstart():
    import equinox as eqx

    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        model = eqx.combine(params, static)
        return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)

    tx = jaxsgd.adamw(5e-2)
    state, step = jaxsgd.TrainState.create(params, tx), jaxsgd.make_step(loss_fn, tx)
    losses = []
    for batch in BATCHES * 3:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    trained = eqx.combine(state.eval_params, static)
    assert jax.vmap(trained)(BATCHES[0]["x"]).shape == (16, 1)
    again, start = jaxsgd.make_step(loss_fn, tx, donate=False), jaxsgd.TrainState.create(params, tx)
    assert jaxsgd.sweep(again, start, BATCHES, learning_rate=[1e-3, 1e-2]).best


def test_flax_can_serialize_a_state():
    tx = jaxsgd.adamw(1e-2)
    state = jaxsgd.TrainState.create({"w": jnp.arange(3.0)}, tx).replace(key=jnp.zeros(2, jnp.uint32))
    other = state.replace(params={"w": jnp.zeros(3)}, step=jnp.int32(7))
    back = serialization.from_bytes(other, serialization.to_bytes(state))
    np.testing.assert_array_equal(back.params["w"], state.params["w"])
    assert int(back.step) == 0
