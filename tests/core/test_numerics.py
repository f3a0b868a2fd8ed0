"""Formulas on arrays, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsgd import numerics


@settings(deadline=None, max_examples=60)
@given(decay=st.floats(0.0, 0.99999), t=st.integers(1, 10**6))
def test_debias_keeps_its_digits_in_float32(decay, t):
    exact = -np.expm1(t * np.log(decay)) if decay else 1.0
    ours = 1.0 / float(numerics.debias(jnp.float32(1.0), decay, jnp.float32(t)))
    assert ours == pytest.approx(exact, rel=1e-6)


def test_debias_as_written_would_lose_them():
    naive = 1 - jnp.float32(0.999) ** jnp.float32(1)
    assert abs(float(naive) - 0.001) / 0.001 > 1e-5
    assert float(numerics.debias(jnp.float32(0.001), 0.999, jnp.float32(1))) == pytest.approx(1.0, rel=3e-7)


def test_debias_of_a_runtime_decay():
    for decay in (0.0, 0.9, 0.999):
        known = numerics.debias(jnp.float32(1), decay, jnp.float32(3))
        traced = jax.jit(numerics.debias)(jnp.float32(1), jnp.float32(decay), jnp.float32(3))
        np.testing.assert_allclose(traced, known, rtol=1e-4)  # 0.999 in float32 is off by 1e-8, in 0.003


def test_ema_without_memory_is_its_input():
    assert numerics.ema(None, jnp.float32(3), 0.0) == 3
    assert numerics.ema(jnp.float32(1), jnp.float32(3), 0.75) == 1.5


def test_sq_is_real_and_differentiable_at_zero():
    z = jnp.asarray([3 + 4j, 0j])
    assert numerics.sq(z).tolist() == [25.0, 0.0] and jnp.isrealobj(numerics.sq(z))
    assert jnp.all(jnp.isfinite(jax.grad(lambda w: numerics.sq(w).sum())(z)))


def test_pain_8_global_norm_is_in_float32():
    many = [jnp.full((1,), 0.1, jnp.bfloat16) for _ in range(2000)]
    exact = np.sqrt(sum(float(x[0]) ** 2 for x in many))
    assert float(numerics.global_norm(many)) == pytest.approx(exact, rel=1e-5)
    large = {"a": jnp.full((4,), 300.0, jnp.float16)}
    assert float(numerics.global_norm(large)) == pytest.approx(600.0)
    assert float(numerics.global_norm({})) == 0.0
    assert float(numerics.global_norm({"z": jnp.asarray([3 + 4j])})) == 5.0


@settings(deadline=None, max_examples=20)
@given(value=st.floats(-(2.0**100), 2.0**100, width=32), seed=st.integers(0, 2**31 - 1))
def test_stochastic_rounding_has_the_right_mean_and_neighbours(value, seed):
    x = jnp.full((4096,), value, jnp.float32)
    rounded = numerics.stochastic_round(x, jnp.bfloat16, jax.random.bits(jax.random.key(seed), x.shape, jnp.uint16))
    values = np.unique(np.asarray(rounded, np.float64))
    assert len(values) <= 2
    gap = np.ptp(values) if len(values) == 2 else 2.0**-7 * abs(value)
    # Standard error of the mean of 4,096 draws is at most gap / 128; six of them.
    assert abs(np.asarray(rounded, np.float64).mean() - np.float64(np.float32(value))) <= 6 * gap / 128 + 1e-37


def test_stochastic_rounding_at_the_ends():
    ends = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, jnp.finfo(jnp.float32).max], jnp.float32)
    out = np.asarray(
        numerics.stochastic_round(ends, jnp.bfloat16, jnp.full(ends.shape, 0xFFFF, jnp.uint16)), np.float32
    )
    assert out[0] == 0 and out[1] == 0 and out[2] == np.inf and out[3] == -np.inf and np.isnan(out[4])
    assert np.isfinite(out[5])
    with pytest.raises(ValueError, match="to bfloat16; got dtype=float16"):
        numerics.stochastic_round(ends, jnp.float16, jnp.zeros(ends.shape, jnp.uint16))


def test_a_seed_or_a_key_everywhere():
    """One reading of a seed or a key, with the same answer from each entry point."""
    import jaxsgd
    from jaxsgd.numerics import as_key

    same = [3, np.int64(3), np.uint8(3), jnp.int32(3), jax.random.key(3)]
    assert all(bool(jnp.all(jax.random.key_data(as_key(x)) == jax.random.key_data(jax.random.key(3)))) for x in same)
    old = jax.random.PRNGKey(3)
    assert as_key(old) is old
    params, batches = {"w": jnp.ones(4)}, [np.full((8, 4), i, np.float32) for i in range(1, 4)]
    loss_fn = lambda params, batch, key: jnp.mean((batch @ params["w"]) ** 2)
    tx = jaxsgd.sgd(1e-3)
    tools = {
        "create": lambda key: jaxsgd.TrainState.create(params, tx, key=key),
        "sharpness": lambda key: jaxsgd.sharpness(loss_fn, params, batches[0], key=key),
        "noise_scale": lambda key: jaxsgd.noise_scale(loss_fn, params, batches, key=key),
        "probe": lambda key: jaxsgd.probe(loss_fn, params, batches, jaxsgd.sgd, steps=40, key=key),
        "range_test": lambda key: jaxsgd.range_test(loss_fn, params, batches, jaxsgd.sgd, steps=20, key=key),
        "plan": lambda key: jaxsgd.plan(loss_fn, params, tx, batches[0], key=key),
    }
    for name, tool in tools.items():
        for key in (np.int64(3), jax.random.key(3), old):
            tool(key)
        for wrong in (1.5, "a", True, jnp.ones(3)):
            with pytest.raises(TypeError, match="key=.*a seed or a key is needed"):
                tool(wrong)
                pytest.fail(f"{name}: key={wrong!r} was accepted")
