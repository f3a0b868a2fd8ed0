"""`minimize` and `least_squares` inside `jax.shard_map`, whose check asks of each value over which axes it varies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxsgd import least_squares, minimize

SPLIT = P("data")
TIMES = jnp.linspace(0, 4, 20)


def spread(fn, *arrays, out=SPLIT, given=None):
    """``fn`` on 8 devices, each with its part of the arrays."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (SPLIT,) * len(arrays) if given is None else given
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out))(*arrays)


def rosenbrock(x, a):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (a - x[:-1]) ** 2)


def decay(params, times):
    return params["size"] * jnp.exp(-params["rate"] * times) - 3 * jnp.exp(-0.5 * times)


def same(found, expected):
    assert np.array_equal(found.status, expected.status)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), found.params, expected.params)


@pytest.mark.parametrize(
    "method",
    [
        "lbfgs",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("lbfgsb", "bfgs", "cg", "newton", "newton_cg", "trust_region")
        ),
    ],
)
def test_every_device_minimizes_from_its_starts(method):
    options = {"method": method} | ({"bounds": (-5.0, 5.0)} if method == "lbfgsb" else {})
    run = jax.vmap(lambda x: minimize(rosenbrock, x, args=(1.0,), **options))
    starts = jnp.stack([jnp.asarray([-1.2 + 0.1 * i, 1.0]) for i in range(16)])
    found = spread(run, starts)
    same(found, jax.jit(run)(starts))
    np.testing.assert_allclose(found.params, 1, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lm", "gauss_newton", "dogleg"])
def test_every_device_fits_its_curves(method):
    run = jax.vmap(lambda params: least_squares(decay, params, args=(TIMES,), method=method))
    starts = {"size": jnp.linspace(0.5, 2, 16), "rate": jnp.full(16, 0.1)}
    found = spread(run, starts)
    same(found, jax.jit(run)(starts))
    np.testing.assert_allclose(found.params["rate"], 0.5, rtol=1e-3)


def quartic(x, a):
    return jnp.sum((x - a) ** 2) + jnp.sum(x**4)


def alone(data):
    return jnp.stack([minimize(quartic, jnp.ones(3), args=(a,)).params for a in data])


@pytest.mark.parametrize(
    "run",
    [
        lambda a: minimize(lambda x: quartic(x, a[0]), jnp.ones(3)).params[None],
        lambda a: minimize(lambda x, a: (quartic(x, a), a), jnp.ones(3), args=(a[0],), has_aux=True).params[None],
    ],
    ids=["closure", "aux"],
)
def test_one_start_and_data_of_each_device(run):
    data = jnp.linspace(0, 1, 8)
    np.testing.assert_allclose(spread(run, data), alone(data), atol=1e-4)


def test_a_mean_over_devices_has_one_minimum():
    data = jnp.linspace(0, 1, 8)

    def run(a):
        return minimize(lambda x: jax.lax.pmean(quartic(x, a), "data"), jnp.ones(3))

    found = spread(run, data, out=P())
    expected = minimize(lambda x: jnp.mean(jax.vmap(lambda a: quartic(x, a))(data)), jnp.ones(3))
    assert found.success and expected.success
    np.testing.assert_allclose(found.params, expected.params, atol=1e-4)


def grown(params, size, times):
    return decay(params, times) + 3 * jnp.exp(-0.5 * times) - size * jnp.exp(-size * times)


@pytest.mark.slow
def test_derivatives_of_each_devices_solution():
    data, starts = jnp.linspace(0, 1, 8), jnp.ones((8, 3))

    def slope(a, x):
        return jax.grad(lambda a: jnp.sum(minimize(quartic, x, args=(a,)).params))(a)

    np.testing.assert_allclose(spread(jax.vmap(slope), data, starts), jax.vmap(slope)(data, starts), rtol=1e-5)

    def rate(size):
        start = {"size": 1.0, "rate": 0.3}
        return least_squares(grown, start, args=(size, TIMES)).params["rate"]

    sizes = jnp.linspace(0.5, 1, 8)
    found = spread(jax.vmap(jax.grad(rate)), sizes)
    np.testing.assert_allclose(found, 1, rtol=1e-2)  # the rate is s


def test_bounds_and_a_callback():
    seen = []
    data = jnp.linspace(0, 1, 8)

    def told(iteration, x, value, grad_norm):
        seen.append((iteration, x))

    def run(a):
        return minimize(quartic, -jnp.ones(3), args=(a[0],), bounds=(-1.0, 0.5), callback=told).params[None]

    found = spread(run, data)
    jax.effects_barrier()
    np.testing.assert_allclose(found, np.minimum(alone(data), 0.5), atol=1e-4)
    assert sum(i == 1 for i, _ in seen) == 8 and all(np.max(x) <= 0.5 for _, x in seen)
