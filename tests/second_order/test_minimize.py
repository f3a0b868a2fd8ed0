"""`minimize`: every method finds minima of any pytree, says truly how it ended, and has derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxsgd.second_order import Result, Status, minimize
from jaxsgd.second_order.bfgs import BFGS
from jaxsgd.second_order.descent import Move
from jaxsgd.second_order.limited_memory import biggs_factor
from jaxsgd.second_order.minimizer import METHODS
from jaxsgd.second_order.vectors import power_of_two, tilted

pytestmark = pytest.mark.usefixtures("x64")


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def ridge(x, features, target, penalty):
    return jnp.sum((features @ x - target) ** 2) / 2 + penalty * jnp.sum(x**2) / 2


def tree_fun(params):
    # Minimum at w = [1, 1], b = 2, c = 3, value 0.
    return rosenbrock(params["w"]) + (params["b"] - 2) ** 2 + jnp.sum((params["c"] - 3) ** 2)


START = {"w": np.array([-1.2, 1.0]), "b": 0.0, "c": np.zeros((2, 1))}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 4)), rng.normal(size=20)


# -- the minimum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_minimum_of_a_tree(method):
    result = minimize(tree_fun, START, method=method)
    assert result.status is Status.CONVERGED_GRADIENT
    assert jax.tree.structure(result.params) == jax.tree.structure(START)
    np.testing.assert_allclose(result.params["w"], 1, atol=1e-5)
    np.testing.assert_allclose(result.params["b"], 2, atol=1e-5)
    assert float(result.value) == pytest.approx(float(tree_fun(result.params)), abs=1e-15)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(jax.grad(tree_fun)(result.params)))
    assert float(result.grad_norm) == pytest.approx(largest, rel=1e-6)
    assert 0 < int(result.iterations) < int(result.evaluations)


@pytest.mark.parametrize("method", ["newton", "trust_region"])
def test_newton_solves_a_quadratic_in_one_step(method):
    rng = np.random.default_rng(1)
    factor = rng.normal(size=(6, 6))
    matrix, target = factor @ factor.T + np.eye(6), 0.1 * rng.normal(size=6)

    def fun(x):
        return (x - target) @ matrix @ (x - target) / 2

    result = minimize(fun, np.zeros(6), method=method)
    assert int(result.iterations) == 1
    np.testing.assert_allclose(result.params, target, rtol=0, atol=1e-12)


def test_the_scale_of_lbfgs_does_not_fall_at_once():
    """With the scale of the newest pair alone it takes 189 evaluations."""

    def fun(x):
        return jnp.sum(jnp.logspace(0, 4, 20) * x**2) / 2

    result = minimize(fun, np.ones(20))
    assert result.success
    assert int(result.evaluations) < 140


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_value_does_not_matter(method, dtype):
    """Without a unit, products of two gradients are 0 or inf at the last factors."""

    def scaled(x, k):
        return k * rosenbrock(x)

    factors = {np.float32: (1, 1e-9, 1e9, 1e-12, 1e12, 1e-25, 1e25), np.float64: (1, 1e-10, 1e10)}[dtype]
    if method == "lbfgs" and dtype is np.float64:
        factors = (*factors, 1e-200, 1e200)
    # Where the first gradient is below 1, the tolerance is relative to it: the last one may be 1e-5 of 233.
    atol = 1e-3 if dtype is np.float64 else 3e-3
    for factor in factors:
        result = minimize(scaled, np.array([-1.2, 1.0], dtype), method=method, args=(dtype(factor),))
        np.testing.assert_allclose(result.params, 1, atol=atol)
        assert result.success
        if factor == 1:
            plain = result
        # Above 1 the tolerance is absolute: in float64, conjugate gradients go on to the last digit of 1e10.
        if dtype is np.float32 or method == "lbfgs":
            assert int(result.evaluations) <= 2 * int(plain.evaluations), (factor, str(result))
        assert float(result.value) == pytest.approx(factor * float(rosenbrock(result.params)), rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["lbfgs", "lbfgsb", "bfgs", "newton_cg", "trust_region"])
def test_parameters_that_begin_alike_part(method, dtype):
    """Gradients keep them alike, and the lowest point of those is a saddle point."""

    def fun(p):
        a, b = p["a"], p["b"]
        return jnp.sum((a + b - 1) ** 2 + (a * b + 1) ** 2) + (p["c"][0] - p["c"][-1]) ** 2 + jnp.sum(p["c"] ** 2)

    with jax.enable_x64(dtype == np.float64):
        for alike in (1.0, 0.5, -2.0):
            start = {"a": np.full(3, alike, dtype), "b": np.full(3, alike, dtype), "c": np.full(4, alike, dtype)}
            result = minimize(fun, start, method=method)
            assert result.success and result.value < 1e-8, str(result)


def test_no_two_entries_tilt_alike():
    leaves = [jnp.ones(1000), jnp.ones((40, 50)), jnp.ones((40, 50)), jnp.ones(()), jnp.ones((3, 4, 5))]
    shares = np.concatenate([np.ravel(leaf) for leaf in tilted(leaves)])
    assert shares.min() >= 0.99 and shares.max() <= 1
    # Of 160,000 float32 numbers between 0.99 and 1, few of 5,000 are the same by chance.
    assert len(np.unique(shares)) > 0.99 * len(shares)
    # The mean of an even spread; that of chance would have an error of 4e-5.
    assert abs(shares.mean() - 0.995) < 1e-4


@pytest.mark.parametrize("cubic", [0.0, 0.05, -0.05])
def test_the_factor_of_a_pair_gives_the_curvature_at_the_end_of_the_step(cubic):
    def value(x):
        return 3 + 2 * x + 1.5 * x**2 + cubic * x**3

    slope, curvature = jax.grad(value), jax.grad(jax.grad(value))
    old, new = 0.2, 1.1
    s, y = jnp.array([new - old]), jnp.array([slope(new) - slope(old)])
    true = np.bool_(True)
    move = Move(s, value(new), [slope(new)[None]], 1.0, [s], [y], value(old) - value(new), true, true, true, 1.0, [s])
    sy = jnp.vdot(s, y)
    assert float(biggs_factor(move, sy) * sy) == pytest.approx(float(curvature(new) * s[0] ** 2), rel=1e-10)
    # Beside a large value the decrease is rounding, and says nothing.
    assert float(biggs_factor(move._replace(f=1e15), sy)) == 1


def test_evaluations_are_counted():
    calls = []

    def fun(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum((x - 1) ** 4)

    result = minimize(fun, np.zeros(2))
    jax.effects_barrier()
    assert len(calls) == int(result.evaluations)


def test_float32_and_bfloat16():
    result = minimize(rosenbrock, jnp.array([-1.2, 1.0], jnp.float32))
    assert result.params.dtype == result.value.dtype == jnp.float32
    assert result.success
    np.testing.assert_allclose(result.params, 1, atol=1e-2)
    narrow = minimize(lambda x: jnp.sum((x.astype(jnp.float32) - 1) ** 2), jnp.zeros(3, jnp.bfloat16))
    assert narrow.params.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.params.astype(jnp.float32), 1, atol=1e-2)


# -- bounds ----------------------------------------------------------------------------------------


def test_every_point_is_inside_the_bounds():
    low, high = np.array([-1.0, -0.2, 0.1]), np.array([0.5, 2.0, 0.15])

    def fun(x):  # A point outside would be the best of all.
        return jnp.where(jnp.any((x < low) | (x > high)), -1e6, rosenbrock(x))

    result = minimize(fun, np.array([0.0, -3.0, 0.0]), bounds=(low, high))
    assert np.all(result.params >= low) and np.all(result.params <= high) and float(result.value) > -1
    best = scipy.optimize.minimize(
        lambda x: float(rosenbrock(jnp.asarray(x))),
        np.array([0.0, -0.2, 0.1]),
        bounds=list(zip(low, high, strict=True)),
        options={"ftol": 1e-15, "gtol": 1e-9},
    )
    assert result.success
    assert float(result.value) <= best.fun + 1e-8


def test_without_bounds_lbfgsb_is_lbfgs():
    plain, boxed = (minimize(rosenbrock, np.array([-1.2, 1.0]), method=m) for m in ("lbfgs", "lbfgsb"))
    assert int(plain.evaluations) == int(boxed.evaluations)
    np.testing.assert_allclose(plain.params, boxed.params, rtol=1e-8)


def test_a_corner_is_a_minimum():
    result = minimize(lambda x: jnp.sum(x), np.ones(3), bounds=(0.0, None))
    assert result.status is Status.CONVERGED_GRADIENT
    assert np.all(np.asarray(result.params) == 0)


def test_equal_bounds_hold_a_parameter():
    low, high = np.array([0.5, -np.inf]), np.array([0.5, np.inf])
    result = minimize(rosenbrock, np.array([-1.2, 1.0]), bounds=(low, high))
    np.testing.assert_allclose(result.params, [0.5, 0.25], atol=1e-6)


# -- how it ended ----------------------------------------------------------------------------------


def test_no_success_where_there_is_no_minimum():
    assert minimize(lambda x: x, 1.0).status is Status.UNBOUNDED
    kink = minimize(lambda x: jnp.abs(x[0] - 1 / 3) + 100 * jnp.abs(x[1] - x[0] ** 2), np.array([-1.0, 2.0]))
    assert not kink.success
    wrong = jax.custom_jvp(lambda x: jnp.sum((x - 1) ** 2))
    wrong.defjvp(lambda p, t: (wrong(*p), -jnp.sum(2 * (p[0] - 1) * t[0])))
    result = minimize(wrong, np.zeros(2))
    assert result.status is Status.LINE_SEARCH_FAILED
    assert "wrong gradient" in str(result)


@pytest.mark.parametrize("method", METHODS)
def test_limits_are_told(method):
    result = minimize(rosenbrock, np.array([-1.2, 1.0]), method=method, max_iterations=3)
    assert result.status is Status.ITERATION_LIMIT
    assert int(result.iterations) == 3
    result = minimize(rosenbrock, np.array([-1.2, 1.0]), method=method, max_evaluations=4)
    assert result.status is Status.EVALUATION_LIMIT
    assert int(result.evaluations) == 4


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite(method):
    def fun(x):
        return jnp.sum(x - jnp.log(x)) + jnp.sum((x - 2) ** 2)  # not finite below zero

    result = minimize(fun, np.array([30.0, 1e-3]), method=method)
    assert result.success
    assert np.all(np.isfinite(np.asarray(result.params)))
    result = minimize(fun, np.array([-1.0, 1.0]), method=method)
    assert result.status is Status.NOT_FINITE_START
    assert np.all(np.isfinite(np.asarray(result.params)))


@pytest.mark.parametrize("method", ["newton", "trust_region"])
def test_a_saddle_is_no_success(method):
    result = minimize(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, np.array([1.0, 0.0]), method=method)
    if result.success:
        np.testing.assert_allclose(np.abs(result.params[1]), 0.5**0.5, atol=1e-5)
    else:
        assert result.status is Status.SADDLE_POINT


def poisson_regression(b):
    x = jnp.concatenate([jnp.ones((100, 1)), COVARIATES], 1)
    return jnp.sum(jnp.exp(x @ b) - COUNTS * (x @ b))


COVARIATES = np.random.default_rng(3).normal(size=(100, 3))
COUNTS = np.random.default_rng(5).poisson(np.exp(1 + COVARIATES @ np.array([0.5, -0.3, 0.2])))
STEEP = {
    "cosh": (lambda x: jnp.cosh(x[0]) + x[1] ** 2, [40.0, 1.0]),
    "a steeper cosh": (lambda x: jnp.cosh(x[0]) + x[1] ** 2, [80.0, 1.0]),
    "Poisson": (poisson_regression, [5.0, 8.0, -8.0, 3.0]),
    "a kink": (lambda p: jnp.abs(p[0] - 1) + 3 * jnp.abs(p[0] + p[1]) + jnp.sum(jnp.exp(2 * p)), [10.0, 9.0]),
    "a kink at zero": (lambda p: jnp.abs(p[0]) + 2 * jnp.abs(p[1] - p[0]) + 1e-3 * jnp.sum(p**2) ** 3, [30.0, 29.0]),
    "an exponential": (lambda p: 1e-6 * (jnp.sum((p - 1) ** 2) + jnp.exp(p[0] - p[1])), [9.0, -9.0]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "lbfgsb"])
def test_after_a_steep_start_a_small_share_of_the_gradient_is_no_success(method, dtype):
    """Any gradient is a small share of the first one there, which is up to 1e34."""
    lowest = {"a kink": 2.9378196, "a kink at zero": 0.0, "cosh": 1.0, "a steeper cosh": 1.0}
    lowest |= {"Poisson": float(minimize(poisson_regression, np.zeros(4)).value)}
    lowest |= {"an exponential": float(minimize(STEEP["an exponential"][0], np.zeros(2)).value)}
    for name, (fun, start) in STEEP.items():
        result = minimize(fun, np.asarray(start, dtype), method=method)
        if result.success:
            room = 3e-4 * max(abs(lowest[name]), 0.1 if "zero" in name else 0)
            # All that BFGS remembers of a steep slope, it takes for the curvature of the valley.
            room *= 100 if (method, name) == ("bfgs", "an exponential") else 1
            assert float(result.value) - lowest[name] <= room, (name, str(result))
        elif method in ("newton_cg", "trust_region"):
            assert "kink" in name, (name, str(result))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_low_minimum_is_not_taken_for_a_fall_without_end(method, dtype):
    """From a value of zero, which says nothing about how far down it goes."""

    def pulled(x, stiffness, force):
        return stiffness * jnp.sum(x**2) / 2 - force * jnp.sum(x)

    for stiffness, force in ((1e10, 1e13), (1.0, 3e7)):
        result = minimize(pulled, np.zeros(4, dtype), method=method, args=(dtype(stiffness), dtype(force)))
        assert result.success, str(result)
        np.testing.assert_allclose(result.params, force / stiffness, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_fall_without_end_is_no_success(method, dtype):
    """Nor where the slope is zero at last because a square has overflowed."""
    for fun in (lambda x: -jnp.log1p(jnp.sum(x**2)), lambda x: jnp.sum(x) - jnp.sum(x) ** 3):
        result = minimize(fun, np.array([1.0, 2.0], dtype), method=method, max_iterations=1000)
        assert not result.success, str(result)


@pytest.mark.parametrize("method", METHODS)
def test_a_slope_that_rounding_hides_near_the_start_is_followed(method):
    result = minimize(lambda x: jnp.sqrt(1 + (x[0] - 1e9) ** 2) + x[1] ** 2, np.zeros(2, np.float32), method=method)
    assert result.success and float(result.value) == 1, str(result)


@pytest.mark.parametrize("method", ["newton", "trust_region", "lbfgs"])
def test_the_tolerance_of_float32_is_the_documented_one(method):
    """The decrease that is left by the exact Hessian; a value that goes to zero has no rounding to hide it."""

    def fun(x):
        return jnp.sum(x**8)

    result = minimize(fun, np.array([3.0, 3.0], np.float32), method=method)
    x = np.asarray(result.params, np.float64)
    assert result.success
    left = np.sum((8 * x**7) ** 2 / (56 * x**6)) / 2
    # L-BFGS goes by a decrease that its own model predicts.
    assert left <= (1e-12 if method != "lbfgs" else 1e-10), str(result)


def test_flat_start_is_no_success():
    result = minimize(lambda x: 1 - jnp.exp(-jnp.sum(x**2)), np.array([5.0, 0.0]))
    assert not result.success or float(result.value) < 1e-8


DATA = np.random.default_rng(3).normal(size=(40, 4))
LABELS = DATA @ np.array([1.0, -2, 0, 0.5]) + np.random.default_rng(4).standard_t(2, size=40)
KINKS = {
    "least absolute deviations": lambda x: jnp.mean(jnp.abs(DATA @ x - LABELS)),
    "lasso": lambda x: jnp.mean((DATA @ x - LABELS) ** 2) + 0.5 * jnp.sum(jnp.abs(x)),
    "hinge": lambda x: jnp.mean(jnp.maximum(0, 1 - np.sign(LABELS) * (DATA @ x))) + 0.01 * x @ x,
}


def kinked(x, i):
    """All of them in one program."""
    return jax.lax.switch(i, list(KINKS.values()), x)


@pytest.mark.parametrize("method", ["lbfgs", "bfgs", "cg", "lbfgsb"])
def test_no_success_at_a_kink(method):
    for i, name in enumerate(KINKS):
        result = minimize(kinked, np.zeros(4), method=method, args=(i,))
        assert not result.success or result.grad_norm < 1e-5, (name, str(result))


@pytest.mark.parametrize("method", ["lbfgs", "bfgs", "cg", "newton"])
def test_a_start_at_the_precision_of_the_value_is_a_success(method):
    start = np.full(3, 2.0001, np.float32)
    assert minimize(lambda x: 1e4 + 1e4 * jnp.sum((x - 2) ** 2), start, method=method).success


def test_bfgs_forgets_a_matrix_that_rounding_made_indefinite():
    model, x = BFGS(), [jnp.array([1.0, 2.0])]
    at = model.init(x)._replace(h=-jnp.eye(2), gamma=jnp.asarray(0.5), count=jnp.int32(4))
    no, zero = jnp.zeros((), bool), [jnp.zeros(2)]
    g = [jax.random.normal(jax.random.key(0), (2,))]
    move = Move(x, jnp.ones(()), g, 1.0, zero, zero, jnp.zeros(()), no, no, no, jnp.ones(()), zero)
    memory, (p,), *_ = model.advance(at, move)
    np.testing.assert_allclose(p, -0.5 * g[0])
    np.testing.assert_allclose(memory.h, 0.5 * jnp.eye(2))


def test_bfgs_ends_by_value_only_without_what_a_steep_start_taught_it():
    """Curvatures of 1e9 at the start; in the valley a plain step is too short by as much (cliff, of CUTEst)."""

    def cliff(x):
        return ((x[0] - 3) / 100) ** 2 - (x[0] - x[1]) + jnp.exp(20 * (x[0] - x[1]))

    result = minimize(cliff, np.array([0.0, -1.0]), method="bfgs")
    assert result.success
    # At x0 = 3 and x1 = 3 + log(20) / 20.
    assert float(result.value) == pytest.approx((1 + np.log(20)) / 20, abs=1e-9)
    limited = minimize(cliff, np.array([0.0, -1.0]), method="bfgs", max_evaluations=42)
    assert limited.status is Status.EVALUATION_LIMIT and int(limited.evaluations) == 42


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lbfgsb", "cg")])
def test_steps_that_rounding_makes_up_and_down_end(method):
    """Near the minimum of Jennrich and Sampson's function in float32, values differ by rounding and slopes do not."""
    i = np.arange(1, 11, dtype=np.float32)
    result = minimize(
        lambda x: jnp.sum((2 + 2 * i - jnp.exp(i * x[0]) - jnp.exp(i * x[1])) ** 2),
        np.array([0.3, 0.4], np.float32),
        method=method,
    )
    assert result.success and result.evaluations < 150, str(result)
    np.testing.assert_allclose(result.value, 124.36218, rtol=1e-6)


@pytest.mark.parametrize("method", ["newton_cg", "trust_region"])
def test_a_value_near_zero_may_be_the_rounding_of_larger_numbers(method):
    """The logarithm of about 1: at 3.0003 it is 0 or 1e-7, so that only the slope tells where the minimum is."""
    result = minimize(lambda x: jnp.log(jnp.cosh(x - 3)), np.float32(5), method=method)
    assert result.success and result.evaluations < 20, str(result)
    np.testing.assert_allclose(result.params, 3, atol=1e-5)


def test_a_region_that_shrinks_at_a_flat_minimum_is_a_success(x64):
    """Factors of a matrix may turn together: the Hessian is singular at every minimum."""
    target = np.outer(np.arange(6.0), np.ones(6)) + np.eye(6)
    start = 0.1 * np.random.default_rng(3).normal(size=(2, 6, 2))
    for k in range(4):
        result = minimize(
            lambda x: jnp.sum((x[0] @ x[1].T - target) ** 2) + 1e-3 * jnp.sum(x**2),
            (1 + k) * start,
            method="trust_region",
        )
        assert result.success and result.grad_norm < 1e-6, str(result)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_newton_does_not_see_the_units_of_the_parameters(dtype):
    """Parameters of 1e4 and 1e-4 have curvatures of 1e-8 and 1e8, whose quotient float32 does not hold."""

    def fun(x, size):
        a, b = x / size
        return 1 + (a - 1) ** 2 + (b - 1) ** 2 + 0.1 * (a * b - 1) ** 2 + (a - b) ** 4

    seen = []
    for size in ((1.0, 1.0), (1e4, 1e-4), (1e-7, 1e6)):
        size = np.asarray(size, dtype)
        result = minimize(fun, size * np.asarray([0.01, 10], dtype), method="newton", args=(size,))
        assert result.success, str(result)
        np.testing.assert_allclose(result.params, size, rtol=1e-3)
        seen.append(int(result.iterations))
    assert max(seen) - min(seen) <= 2, seen


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_power_of_two_is_the_number_without_its_mantissa(dtype):
    info = np.finfo(dtype)
    low, high = 2.0 ** (info.minexp + 2), 2.0 ** (info.maxexp - 2)
    drawn = np.exp2(np.random.default_rng(0).uniform(info.minexp, info.maxexp, 1000)).astype(dtype)
    x = np.concatenate([drawn, np.array([1, 2, 3, 0.5, info.max, info.tiny], dtype)])
    expected = np.clip(np.ldexp(1.0, np.frexp(x)[1].astype(int) - 1), low, high)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(x)), expected)
    np.testing.assert_array_equal(power_of_two(jnp.array([0, -1, np.inf, np.nan], dtype)), 1)


# -- jit, vmap, scan, derivatives ------------------------------------------------------------------


def test_vmap_equals_single_runs():
    starts = jax.random.uniform(jax.random.key(0), (40, 2), minval=-2, maxval=2)

    def run(x):
        return minimize(rosenbrock, x)

    batch = jax.jit(jax.vmap(run))(starts)
    assert str(batch).startswith("40 results")
    for i in range(0, 40, 13):
        one = run(starts[i])
        assert int(one.evaluations) == int(batch.evaluations[i])
        np.testing.assert_allclose(one.params, batch.params[i], rtol=1e-9)
    assert np.all(np.asarray(batch.success))


def far_rosenbrock(x, size):
    """Rosenbrock's function in other units of its parameters."""
    return rosenbrock(x / size)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_may_be_large(method):
    """In float32, products of two slopes are 0 for parameters of 1e25, and a slope of 1e-10 is no small one."""
    seen = []

    def see(*news):
        seen.append(news)

    first = np.array([-1.2, 1.0], np.float32)
    plain = minimize(far_rosenbrock, first, method=method, args=(np.ones(2, np.float32),), callback=see)
    for sizes in ((1e8, 1e8), (1e10, 1e10), (1e15, 1.0), (1.0, 1e15), (1e30, 1e12)):
        size = np.asarray(sizes, np.float32)
        result = minimize(far_rosenbrock, size * first, method=method, args=(size,), callback=see)
        # The value at a point that is rounded in its seventh digit.
        assert result.success and result.value < 1e-7, (sizes, str(result))
        # Not two: units are powers of two, so that the first region or step may be another.
        assert int(result.evaluations) <= 3 * int(plain.evaluations), (sizes, str(result), str(plain))
        gradient = np.abs(jax.grad(far_rosenbrock)(result.params, size)).max()
        np.testing.assert_allclose(result.grad_norm, gradient, rtol=1e-3, atol=1e-6 / size.max(), err_msg=str(sizes))
        jax.effects_barrier()
        _, params, value, grad_norm = seen[-1]
        np.testing.assert_array_equal(params, result.params)
        assert (value, grad_norm) == (float(result.value), float(result.grad_norm)), sizes


def peak_loss(p, t, readings):
    return jnp.mean((p[0] * jnp.exp(-(((t - p[1]) / p[2]) ** 2)) + p[3] - readings) ** 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_position_far_from_zero_keeps_its_scale(method):
    """The size of a position says nothing about the width of a peak there. In float32 it is rounded to a thousandth of
    the width or so: the value is a staircase at the minimum, and a step in all parameters may be lost in one of them.
    """
    for at, width in ((1e3, 50), (1e5, 10), (1e6, 50), (1e7, 1e3), (1e8, 1e4), (1e9, 1e6), (1e10, 1e6), (1e15, 1e11)):
        t = np.linspace(at - 10 * width, at + 10 * width, 200).astype(np.float32)
        truth, start = np.float32([2, at + width / 2, width, 0.3]), np.float32([1, at, 1.5 * width, 0])
        noise = 0.02 * np.random.default_rng(0).normal(size=200)
        readings = truth[0] * np.exp(-(((t - truth[1]) / truth[2]) ** 2)) + truth[3] + noise
        data = t, readings.astype(np.float32)
        result = minimize(peak_loss, start, method=method, args=data)
        assert result.success, (at, width, str(result))
        # A slope along a position of 1e7 is small before the position is right: it ends cg, which learns no curvature.
        slope = np.abs(jax.grad(peak_loss)(result.params, *data)).max()
        by_slope = method == "cg" and result.status is Status.CONVERGED_GRADIENT and slope <= 1e-5
        assert by_slope or result.value < 1.05 * peak_loss(truth, *data), (at, width, str(result))


def test_large_parameters_stay_inside_their_bounds():
    size = np.asarray([1e15, 1e15], np.float32)
    box = (np.array([-2e15, -1.0], np.float32), np.array([5e14, 1e30], np.float32))
    result = minimize(far_rosenbrock, np.float32([-1.2e15, 1e15]), bounds=box, args=(size,))
    np.testing.assert_allclose(result.params, [5e14, 2.5e14], rtol=1e-3)
    assert result.success and result.params[0] == box[1][0]


def test_members_of_a_batch_have_their_own_sizes():
    sizes = np.float32([1, 1e10, 1e20])
    ends = jax.vmap(lambda size: minimize(far_rosenbrock, size * np.float32([-1.2, 1.0]), args=(size,)))(sizes)
    np.testing.assert_allclose(ends.params / sizes[:, None], np.ones((3, 2)), rtol=1e-3)
    assert ends.success.all()


@pytest.mark.parametrize("bounds", [None, (-np.inf, np.inf)], ids=["free", "bounded"])
def test_derivatives_of_large_parameters(bounds):
    """In float32 the Hessian of parameters of 1e25 is 0. In reverse, two such parameters are multiplied."""

    def end(shift, size):
        start = np.float32([3 * size, 2.0])
        size = np.float32([size, 1.0])
        return minimize(lambda x, k: jnp.sum((x / size - k) ** 2), start, args=(shift,), bounds=bounds).params

    shift = np.float32([1.0, 2.0])
    np.testing.assert_allclose(jax.jacfwd(end)(shift, 1e25), np.diag([1e25, 1.0]), rtol=1e-5)
    np.testing.assert_allclose(jax.jacrev(end)(shift, 1e15), np.diag([1e15, 1.0]), rtol=1e-5)


def test_scan_and_jit():
    def body(x, shift):
        result = minimize(lambda x: jnp.sum((x - shift) ** 2), x)
        return result.params, result

    _, results = jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(3.0)))(jnp.zeros(2))
    assert isinstance(results, Result)
    np.testing.assert_allclose(results.params[:, 0], np.arange(3), atol=1e-8)


@pytest.mark.parametrize("method", ["lbfgs", "newton_cg"])
def test_implicit_derivatives_agree_with_differences(method):
    features, target = data()

    def error(log_penalty, target):
        result = minimize(ridge, np.zeros(4), method=method, args=(features, target, jnp.exp(log_penalty)), tol=1e-11)
        return jnp.sum(result.params**3)

    by_rule, by_target = jax.grad(error, argnums=(0, 1))(0.3, jnp.asarray(target))
    h = 1e-5
    assert float(by_rule) == pytest.approx(float(error(0.3 + h, target) - error(0.3 - h, target)) / (2 * h), rel=1e-5)
    step = np.zeros(20)
    step[3] = h
    difference = float(error(0.3, target + step) - error(0.3, target - step)) / (2 * h)
    assert float(by_target[3]) == pytest.approx(difference, rel=1e-5)
    forward = jax.jvp(lambda x: error(x, target), (0.3,), (1.0,))[1]
    assert float(forward) == pytest.approx(float(by_rule), rel=1e-6)


def test_derivatives_by_closed_over_arrays_and_of_value_and_aux():
    def solved(shift):
        def fun(x):
            return jnp.sum((x - shift) ** 2 + x**2), {"sum": jnp.sum(x)}

        return minimize(fun, jnp.zeros(3), has_aux=True)

    assert float(jax.grad(lambda s: solved(s).params[0])(2.0)) == pytest.approx(0.5, rel=1e-6)
    # value = 3 * shift^2 / 2
    assert float(jax.jit(jax.grad(lambda s: solved(s).value))(2.0)) == pytest.approx(6, rel=1e-6)
    assert float(jax.grad(lambda s: solved(s).aux["sum"])(2.0)) == pytest.approx(1.5, rel=1e-6)


def test_derivatives_at_bounds():
    def corner(limit, pull):
        def fun(x):
            return (x[0] - pull) ** 2 + (x[1] - pull) ** 2 + x[0] * x[1] / 2

        return minimize(fun, jnp.zeros(2), bounds=(None, jnp.stack([limit, 10.0])), tol=1e-10).params

    by_limit, by_pull = jax.jacobian(corner, argnums=(0, 1))(0.3, 1.0)
    # x0 = limit, and 2 (x1 - pull) + x0 / 2 = 0.
    np.testing.assert_allclose(by_limit, [1, -0.25], atol=1e-6)
    np.testing.assert_allclose(by_pull, [0, 1], atol=1e-6)


def test_the_second_call_does_not_trace():
    traces = []

    def fun(x, k):
        traces.append(1)
        return jnp.sum((x - k) ** 2)

    minimize(fun, np.zeros(2), args=(1.0,))
    seen = len(traces)
    minimize(fun, np.ones(2), args=(2.0,), tol=1e-3, max_iterations=7)
    assert len(traces) == seen


def test_sharded_params_stay_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.arange(16.0), sharding)
    for method in ("lbfgs", "cg"):
        result = minimize(lambda p: jnp.sum((p["x"] - 1) ** 2 * jnp.arange(1, 17)), {"x": x}, method=method)
        assert result.params["x"].sharding.is_equivalent_to(sharding, 1)
        np.testing.assert_allclose(result.params["x"], 1, atol=1e-6)


def test_callback_sees_each_step():
    seen = []
    result = minimize(tree_fun, START, callback=lambda i, p, f, g: seen.append((i, p["b"], f, g)))
    jax.effects_barrier()
    assert sorted(row[0] for row in seen) == list(range(1, int(result.iterations) + 1))
    last = max(seen)
    # The host's thread may be without float64.
    assert last[2:] == pytest.approx((float(result.value), float(result.grad_norm)), rel=1e-6)


@pytest.mark.parametrize("method", ["lbfgs", "trust_region"])
def test_callback_sees_only_the_steps_of_each_member(method):
    seen = []

    def tell(i, p, f, g):
        seen.append((i, f))

    def solve(power):
        return minimize(lambda x: jnp.sum(jnp.abs(x - 1) ** power), X, method=method, callback=tell)

    results = jax.vmap(solve)(jnp.array([2.0, 4.0]))
    jax.effects_barrier()
    assert all(np.isfinite(f) for _, f in seen)
    assert sorted(i for i, _ in seen) == sorted(i + 1 for most in results.iterations for i in range(int(most)))


def test_limits_may_be_traced():
    @jax.jit
    def solve(most):
        return minimize(tree_fun, START, max_iterations=most, max_evaluations=most, tol=0.0)

    assert int(solve(4).evaluations) == 4
    assert minimize(tree_fun, START, max_iterations=10**12).success


def test_a_python_number_is_a_value():
    assert float(minimize(lambda x: 3.0, X).value) == 3


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_without_a_finite_start(method):
    result = minimize(lambda x: jnp.sum(jnp.log(x)), X - 1, method=method)
    assert result.status is Status.NOT_FINITE_START
    assert result.grad_norm == np.inf


# -- bad input -------------------------------------------------------------------------------------

X = np.zeros(2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: minimize(3, X), TypeError, "fun=3"),
        (lambda: minimize(lambda x: x, X), TypeError, "least_squares"),
        (lambda: minimize(lambda x: (jnp.sum(x), 1), X), TypeError, "has_aux=True"),
        (lambda: minimize(lambda x: {"loss": jnp.sum(x)}, X), TypeError, "one number"),
        (lambda: minimize(lambda x: jnp.sum(x) > 0, X), TypeError, "bool"),
        (lambda: minimize(jnp.sum, X, has_aux=True), TypeError, "has_aux=False"),
        (lambda: minimize(jnp.sum, np.zeros(2, int)), TypeError, "int64"),
        (lambda: minimize(jnp.sum, {"a": np.zeros(2, complex)}), TypeError, "'a' is complex128"),
        (lambda: minimize(jnp.sum, {}), ValueError, "no number"),
        (lambda: minimize(jnp.sum, np.zeros((0, 3)), method="newton"), ValueError, "no number"),
        (lambda: minimize(jnp.sum, {"a": np.array([1, np.nan])}), ValueError, "'a' is not finite"),
        (lambda: minimize(jnp.sum, X, method="l-bfgs"), ValueError, "did you mean 'lbfgs'"),
        (lambda: minimize(jnp.sum, X, method="bfgs", bounds=(0, 1)), ValueError, "method='lbfgsb'"),
        (lambda: minimize(jnp.sum, X, bounds=(1, 0)), ValueError, "lower 1 is above upper 0"),
        (lambda: jax.jit(lambda x: minimize(jnp.sum, x, bounds=(1, 0)))(X), ValueError, "lower 1 is above upper 0"),
        (lambda: jax.jit(lambda x: minimize(jnp.sum, x, bounds=(X, X - 1)))(X), ValueError, "is above upper"),
        (lambda: minimize(jnp.sum, X, bounds=({"a": X}, None)), ValueError, "lower bound"),
        (lambda: minimize(jnp.sum, X, bounds=(np.zeros(3), None)), ValueError, "shape"),
        (lambda: minimize(jnp.sum, X, bounds=3), ValueError, r"bounds=\(lower, upper\)"),
        (lambda: minimize(jnp.sum, X, bounds=(np.nan, None)), ValueError, "NaN"),
        (lambda: minimize(jnp.sum, X, max_iterations=0), ValueError, "max_iterations=0"),
        (lambda: minimize(jnp.sum, X, max_iterations=1.5), TypeError, "max_iterations=1.5: a whole number"),
        (lambda: minimize(jnp.sum, X, max_iterations="5"), TypeError, "max_iterations='5'"),
        (lambda: minimize(jnp.sum, X, max_evaluations=2.0), TypeError, "max_evaluations=2.0"),
        (lambda: minimize(jnp.sum, X, memory=2.5), TypeError, "memory=2.5"),
        (lambda: minimize(jnp.sum, X, tol=-1.0), ValueError, "tol=-1"),
        (lambda: minimize(jnp.sum, X, tol=np.float32(-1)), ValueError, "tol"),
        (lambda: minimize(jnp.sum, X, tol="small"), ValueError, "tol='small'"),
        (lambda: minimize(jnp.sum, X, callback=3), TypeError, "callback=3"),
        (lambda: minimize(jnp.sum, X, callback=lambda result: None), TypeError, "callback: it is called with 4 arg"),
        (lambda: minimize(lambda x, y: x @ y, X), TypeError, "fun: it is called with 1 argument: missing.*'y'"),
        (lambda: minimize(lambda x: x @ x, X, args=(X,)), TypeError, "fun: it is called with 2 arguments: too many"),
        (lambda: minimize(jnp.sum, X, args=([1.0, "a"],)), TypeError, r"args\[0\]\[1\]='a': it is no array"),
        (lambda: minimize(jnp.sum, X, bounds=("0", 1)), TypeError, "'0'"),
        (lambda: minimize(jnp.sum, X, bounds=(0, 1j)), TypeError, "upper bound has 1j"),
        (lambda: minimize(jnp.sum, X, bounds=(np.inf, None)), ValueError, "leaves no number"),
        (lambda: minimize(jnp.sum, X, args=3), TypeError, "tuple"),
        (
            lambda: minimize(jnp.sum, np.zeros(1_000_000, np.float32), method="newton"),
            ValueError,
            r"1,000,000 parameters takes 3,725 GiB in float32.*newton_cg",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


# -- the benchmark ---------------------------------------------------------------------------------


@pytest.fixture
def bench():
    import minimise

    return minimise


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lbfgs", "newton", "trust_region"])
def test_benchmark(bench, method):
    rivals = {"lbfgs": "SciPy L-BFGS-B tight", "newton": "SciPy trust-exact", "trust_region": "SciPy trust-exact"}
    table = bench.run([method, rivals[method]])
    assert not table.false(method)
    assert table.count(method) >= max(table.count(rivals[method]), 0.97 * len(table.solved))


@pytest.mark.slow
def test_benchmark_with_bounds(bench):
    table = bench.run(["lbfgsb", "SciPy L-BFGS-B"], boxed=True)
    assert not table.false("lbfgsb")
    assert table.count("lbfgsb") >= table.count("SciPy L-BFGS-B")


@pytest.mark.slow
def test_a_thousand_starts():
    starts = jax.random.uniform(jax.random.key(0), (1000, 2), minval=-2, maxval=2)
    batch = jax.jit(jax.vmap(lambda x: minimize(rosenbrock, x)))(starts)
    for i in range(1000):
        one = minimize(rosenbrock, starts[i])
        assert int(one.evaluations) == int(batch.evaluations[i])
        np.testing.assert_allclose(one.params, batch.params[i], rtol=1e-9)
