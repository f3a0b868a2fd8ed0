"""Least squares: it solves what SciPy solves, its statuses are true, it compiles, batches and differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxsgd.second_order.result import Status
from jaxsgd.second_order.squares import METHODS, least_squares

T = np.linspace(0.0, 4.0, 40)


def decay(p, y):
    return p["size"] * jnp.exp(-p["rate"] * T) + p["shift"] - y


def rosenbrock(x):
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def helix(x):
    turn = jnp.arctan2(x[1], x[0]) / (2 * jnp.pi)
    return jnp.stack([10 * (x[2] - 10 * turn), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


def singular(x):
    return jnp.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def badly_scaled(x):
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def freudenstein(x):
    """A large residual at the minimum, where the Jacobian is singular."""
    return jnp.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


METERS = 45.0 + 5.0 * np.arange(1, 17)
READINGS = [34780.0, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]


def meyer(x):
    return x[0] * jnp.exp(x[1] / (METERS + x[2])) - np.array(READINGS)


def chebyquad(x):
    rows = [jnp.ones_like(x), 2 * x - 1]
    for _ in range(2, 9):
        rows.append(2 * (2 * x - 1) * rows[-1] - rows[-2])
    return jnp.stack([rows[k].mean() - (0.0 if k % 2 else -1 / (k * k - 1)) for k in range(1, 9)])


def joined(table):
    """``{name: (residual, args)}``, with one residual for all problems of as many parameters: one compiled program.

    Rows of zeros make their residuals as many. They change no fit.
    """

    def join(problems):
        def padded(fn):
            return lambda x: jnp.pad(r := fn(x), (0, T.size - r.size if len(problems) > 1 else 0))

        branches = [padded(fn) for fn, *_ in problems.values()]

        def residual(x, i):
            return jax.lax.switch(i, branches, x)

        return {name: (residual, (i,)) for i, name in enumerate(problems)}

    out = {}
    for size in {len(problem[1]) for problem in table.values()}:
        out |= join({name: problem for name, problem in table.items() if len(problem[1]) == size})
    return out


PROBLEMS = {
    "rosenbrock": (rosenbrock, [-1.2, 1.0], (1, 10, 100)),
    "helix": (helix, [-1.0, 0.0, 0.0], (1, 10, 100)),
    "singular": (singular, [3.0, -1.0, 0.0, 1.0], (1, 10, 100)),
    "badly scaled": (badly_scaled, [1.0, 1.0], (1, 10, 100)),
    "freudenstein": (freudenstein, [0.5, -2.0], (1, 10)),
    "meyer": (meyer, [0.02, 4000.0, 250.0], (1, 10)),
    "chebyquad": (chebyquad, np.arange(1, 9) / 9, (1, 10)),
}
SOLVED = joined(PROBLEMS)


TIGHT = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12, "max_nfev": 2000}


@pytest.mark.xdist_group("joined problems that SciPy solves")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_solves_what_scipy_solves(problem, x64):
    """From the usual start, and from starts ten and a hundred times as far."""
    fn, first, scales = PROBLEMS[problem]
    same, args = SOLVED[problem]
    residual, jacobian = jax.jit(fn), jax.jit(jax.jacfwd(fn))

    def cost(start, **how):
        fit = scipy.optimize.least_squares(
            lambda x: np.asarray(residual(x)), start, jac=lambda x: np.asarray(jacobian(x)), **TIGHT, **how
        )
        return fit.cost

    for scale in scales:
        start = scale * np.asarray(first)
        costs = [cost(start, method="lm"), cost(start, method="trf", x_scale="jac")]
        result = least_squares(same, start, args=args)
        assert result.success, (scale, str(result))
        # Where the minimum is 0, costs below 1e-14 are all alike.
        assert float(result.value) <= min(costs) * (1 + 1e-6) + 1e-14, scale
        np.testing.assert_allclose(result.value, 0.5 * np.sum(np.asarray(residual(result.params)) ** 2), rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_a_tree_and_says_so(method, x64):
    truth = {"size": 2.0, "rate": 1.5, "shift": 0.3}
    y = np.asarray(decay(truth, 0.0)) + 0.01 * np.random.default_rng(0).normal(size=T.size)
    fit = least_squares(decay, {"size": 1.0, "rate": 1.0, "shift": 0.0}, args=(y,), method=method)
    wanted, _ = scipy.optimize.curve_fit(lambda t, a, b, c: a * np.exp(-b * t) + c, T, y, [1.0, 1.0, 0.0])
    assert fit.status is Status.CONVERGED_GRADIENT
    np.testing.assert_allclose([fit.params[name] for name in ("size", "rate", "shift")], wanted, rtol=1e-6)
    assert "Converged" in str(fit)


def test_a_badly_conditioned_jacobian_keeps_its_digits(x64):
    """A Vandermonde matrix of condition 1e9: its square, 1e18, has no digit left in float64."""
    matrix = np.vander(np.linspace(0, 1, 40), 13)
    assert 1e8 < np.linalg.cond(matrix) < 1e10
    wanted = np.linalg.lstsq(matrix, np.cos(5 * np.linspace(0, 1, 40)), rcond=None)[0]
    fit = least_squares(lambda x: matrix @ x - np.cos(5 * np.linspace(0, 1, 40)), np.zeros(13))
    # The error of any stable method is the condition number, 1e9, times rounding, 1e-16, and a margin of 100.
    np.testing.assert_allclose(fit.params, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_vmap_stops_each_member_on_its_own(x64):
    starts = np.random.default_rng(1).uniform(-2, 2, (20, 2))
    many = jax.jit(jax.vmap(lambda x: least_squares(rosenbrock, x)))(starts)
    for i, start in enumerate(starts):
        one = least_squares(rosenbrock, start)
        assert (int(one.iterations), int(one.evaluations), int(one.code)) == tuple(
            int(x[i]) for x in (many.iterations, many.evaluations, many.code)
        )
        np.testing.assert_allclose(many.params[i], one.params, rtol=1e-10)
    assert len(set(many.evaluations.tolist())) > 3 and "20 results" in str(many)


def test_derivatives_follow_from_the_implicit_function_theorem(x64):
    x = np.linspace(-1, 1, 30)
    design, y = np.stack([x**k for k in range(4)], 1), np.sin(3 * x) + np.cos(2 * x)

    def weights(log_penalty):
        """Ridge regression as stacked residuals."""
        residual = lambda w: (design @ w - y, jnp.exp(log_penalty / 2) * w)
        return least_squares(residual, jnp.zeros(4)).params

    slope = jax.jacfwd(weights)(-1.0)
    penalty = np.exp(-1.0)
    inverse = np.linalg.inv(design.T @ design + penalty * np.eye(4))
    np.testing.assert_allclose(slope, -penalty * inverse @ (inverse @ (design.T @ y)), rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.jacrev(weights))(-1.0), slope, rtol=1e-9)

    def rate(y):
        return least_squares(decay, {"size": 1.0, "rate": 1.0, "shift": 0.0}, args=(y,)).params["rate"]

    data = np.asarray(decay({"size": 2.0, "rate": 1.5, "shift": 0.3}, 0.0)) + 0.05 * np.sin(9 * T)
    direction = np.cos(T)
    difference = (rate(data + 1e-5 * direction) - rate(data - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(jax.grad(rate)(data) @ direction, difference, rtol=1e-5)


def test_it_compiles_once(x64):
    traces = []

    def residual(x, y):
        traces.append(0)
        return x * x - y

    least_squares(residual, jnp.ones(3), args=(jnp.arange(1.0, 4.0),))
    before = len(traces)
    fit = least_squares(residual, 2 * jnp.ones(3), args=(jnp.arange(2.0, 5.0),))
    assert len(traces) == before
    np.testing.assert_allclose(fit.params, np.sqrt([2.0, 3.0, 4.0]))


def test_aux_and_callback(x64):
    seen = []
    fit = least_squares(
        lambda x: (rosenbrock(x), {"sum": x.sum()}), jnp.array([-1.2, 1.0]), has_aux=True, callback=seen.append
    )
    jax.effects_barrier()
    assert float(fit.aux["sum"]) == pytest.approx(2.0)
    values = [float(r.value) for r in seen]
    assert len(seen) == int(fit.evaluations) - 1 and values == sorted(values, reverse=True)


def test_the_best_point_is_finite_and_the_status_is_true(x64):
    walled = lambda x: jnp.stack([jnp.log(x[0]) + 3, x[1] - 1])
    fit = least_squares(walled, jnp.array([2.0, 5.0]))
    assert fit.success and np.isfinite(fit.params).all()
    np.testing.assert_allclose(fit.params, [np.exp(-3), 1], rtol=1e-8)
    limited = least_squares(rosenbrock, jnp.array([-1.2, 1.0]), max_iterations=2)
    assert limited.status is Status.ITERATION_LIMIT and not limited.success
    assert float(limited.value) <= float(0.5 * jnp.sum(rosenbrock(jnp.array([-1.2, 1.0])) ** 2))
    none = least_squares(rosenbrock, jnp.array([1.0, 1.0]))
    assert none.success and int(none.evaluations) == 1
    broken = least_squares(lambda x: jnp.sqrt(x - 2), jnp.ones(2))
    assert broken.status is Status.NOT_FINITE_START and np.array_equal(broken.params, np.ones(2))
    edge = least_squares(lambda x: jnp.where(x > 1.5, jnp.nan, x - 3), jnp.zeros(1))
    assert not edge.success and np.isfinite(edge.params).all() and float(edge.params[0]) > 1.4


def peak(x):
    return x[0] * jnp.exp(-((T - x[1]) ** 2) / x[2]) - 1.5 * np.exp(-((T - 1.8) ** 2) / 0.5)


def parallel(x):
    return jnp.stack([x[0] + x[1] - 3, 1e-3 * (x[0] - x[1]) - 1, x[2] - x[0]])


# Bounds are exact in float32, for the thread of a callback may round to it.
BOXED = {
    "an active bound": (rosenbrock, [-1.2, 1.0], [-np.inf, -np.inf], [0.5, np.inf]),
    "a start at the bound": (rosenbrock, [0.5, 0.5], [-1.0, 0.5], [0.5, 1.5]),
    "bounds far away": (rosenbrock, [-1.2, 1.0], [-10.0, -10.0], [10.0, 10.0]),
    "a bound that must be left": (peak, [0.125, 3.0, 2.0], [0.125, 0.5, 0.0625], [1.25, 3.0, 2.0]),
    "columns nearly parallel": (parallel, [0.5, 0.5, 0.5], [0.0] * 3, [1.0] * 3),
    "a parameter that is fixed": (peak, [1.0, 1.5, 0.375], [0.0, 0.0, 0.375], [5.0, 5.0, 0.375]),
}
INSIDE = joined(BOXED)
SEEN = []


def keep(result):
    """A callback that all fits share, for another is another program."""
    SEEN.append(result)


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        pytest.param(
            problem,
            method,
            marks=[
                pytest.mark.xdist_group(f"joined problems with bounds, {method}"),
                *[pytest.mark.slow] * (method != "lm" and problem != next(iter(BOXED))),
            ],
        )
        for problem in BOXED
        for method in METHODS
    ],
)
def test_bounds_hold_and_the_end_is_scipys(problem, method, x64):
    fn, start, low, high = BOXED[problem]
    same, args = INSIDE[problem]
    low, high = np.array(low), np.array(high)
    # SciPy wants a start strictly inside, and no parameter without room.
    room = high > low
    inside = np.clip(start, np.where(room, low, low - 1) + 1e-6, np.where(room, high, high + 1) - 1e-6)[room]
    residual, full = jax.jit(fn), np.array(start)

    def of_free(x):
        full[room] = x
        return np.asarray(residual(full))

    wanted = scipy.optimize.least_squares(
        of_free, inside, bounds=(low[room], high[room]), ftol=1e-14, xtol=1e-14, gtol=1e-14, max_nfev=2000
    )
    SEEN.clear()
    fit = least_squares(same, np.array(start), args=args, bounds=(low, high), method=method, callback=keep)
    jax.effects_barrier()
    assert fit.success, str(fit)
    assert float(fit.value) <= wanted.cost * (1 + 1e-8) + 1e-14
    assert len(SEEN) == int(fit.evaluations) - 1
    for result in [*SEEN, fit]:
        x = np.asarray(result.params)
        assert (low <= x).all() and (x <= high).all()
    x, gradient = np.asarray(fit.params), np.asarray(jax.grad(lambda x: 0.5 * jnp.sum(fn(x) ** 2))(fit.params))
    np.testing.assert_allclose(fit.grad_norm, np.abs(x - np.clip(x - gradient, low, high)).max(), atol=1e-9)


def test_no_residual_is_computed_outside_the_bounds(x64):
    """A model that is NaN outside: the logarithm of a negative number."""
    seen = []

    def residual(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return jnp.log(x) - np.log([1e-3, 0.5])

    fit = least_squares(residual, np.array([5.0, 5.0]), bounds=(np.array([1 / 64, 0.0]), None))
    jax.effects_barrier()
    assert len(seen) > 3 and min(x[0] for x in seen) >= 1 / 64 and min(x[1] for x in seen) >= 0
    np.testing.assert_allclose(fit.params, [1 / 64, 0.5], rtol=1e-9)
    assert fit.success and float(fit.params[0]) == 1 / 64


def test_bounds_batch_differentiate_and_take_trees(x64):
    y = np.asarray(decay({"size": 2.0, "rate": 1.5, "shift": -0.3}, 0.0))
    low = {"size": 0.0, "rate": 0.0, "shift": 0.0}

    def rate(y, floor):
        start = {"size": 1.0, "rate": 1.0, "shift": 0.5}
        return least_squares(decay, start, args=(y,), bounds=(low | {"shift": floor}, None)).params["rate"]

    both = jax.jit(jax.vmap(rate, (None, 0)))(y, jnp.array([-1.0, 0.0]))
    np.testing.assert_allclose(both, [rate(y, -1.0), rate(y, 0.0)], rtol=1e-8)
    assert abs(both[0] - 1.5) < 1e-7 and both[1] > 1.6
    difference = (rate(y, 1e-5) - rate(y, -1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(rate, 1)(y, 0.0), difference, rtol=1e-5)
    assert jax.grad(rate, 1)(y, -1.0) == 0


T01 = np.linspace(0.0, 1.0, 20)
NO_MINIMUM = {
    "a plateau": (lambda x: jnp.exp(-x * x) + 1, [7.0], {Status.STEP_TOO_SMALL}),
    "a plateau without any slope": (lambda x: jnp.exp(-x * x) + 1, [30.0], {Status.FLAT}),
    "a limit at infinity": (
        lambda x: jnp.stack([1 + jnp.exp(-x[0]), x[1] - 2]),
        [1.0, 0.0],
        {Status.FLAT, Status.STEP_TOO_SMALL},
    ),
    "no minimum": (lambda x: jnp.arctan(x) - 2, [0.0], {Status.STEP_TOO_SMALL, Status.ITERATION_LIMIT}),
    "a start that is infinite": (lambda x: 1 / x, [0.0], {Status.NOT_FINITE_START}),
    "a Jacobian that is infinite": (lambda x: jnp.sqrt(jnp.abs(x)) + x, [0.0], {Status.NOT_FINITE_START}),
    "NaN on the way": (lambda x: jnp.where(x > 1.5, jnp.nan, x - 3), [0.0], {Status.NOT_FINITE}),
}
MINIMUM = {
    "a Jacobian without full rank": (lambda x: (x[0] + x[1]) * T01 - jnp.sin(3 * T01), [1.0, 2.0], 1.76596122),
    "a parameter without effect": (lambda x: jnp.stack([x[0] - 1 + 0 * x[1], 2 * x[0] - 3]), [3.0, 5.0], 0.1),
    "a parameter whose effect is of second order": (lambda x: jnp.stack([x[0] ** 2 + 1, x[1] - 3]), [0.0, 1.0], 0.5),
    "an amplitude of zero": (lambda x: jnp.append(x[0] * jnp.exp(-x[1] * T01), 1.0), [1.0, 1.0], 0.5),
    "fewer residuals than parameters": (lambda x: jnp.stack([x[0] * x[1] - 1, x[2] ** 2 - 2]), [3.0, 1.0, 1.0], 0.0),
    "a saddle at the start": (lambda x: jnp.stack([(x[0] + x[1]) ** 2 - 1, x[0] - x[1]]), [0.0, 0.0], 0.0),
    "a maximum at the start": (lambda x: jnp.cos(2 * jnp.pi * x) + 1, [0.0], 0.0),
    "two decays that start alike": (
        lambda x: x[0] * jnp.exp(-x[1] * T) + x[2] * jnp.exp(-x[3] * T) - jnp.exp(-T / 3) - 2 * jnp.exp(-2 * T),
        [1.0, 1.0, 1.0, 1.0],
        0.0,
    ),
    "a network of zeros": (lambda x: x[0] * jnp.tanh(x[1] * T) - jnp.tanh(T), [0.0, 0.0], 0.0),
    "scales of 16 orders": (lambda x: jnp.stack([1e8 * (x[0] - 1e-6), 1e-8 * (x[1] - 1e9)]), [1.0, 1.0], 0.0),
    "a maximum of all parameters": (lambda x: x * x - 1, [0.0, 0.0], 0.0),
    "a maximum of one parameter": (lambda x: jnp.stack([x[0] ** 2 - 1, x[1]]), [0.0, 1.0], 0.0),
}
JOINED = joined(NO_MINIMUM) | joined(MINIMUM)


@pytest.mark.xdist_group("joined problems without a minimum")
@pytest.mark.parametrize("problem", NO_MINIMUM)
def test_no_success_is_none(problem, x64):
    _, start, statuses = NO_MINIMUM[problem]
    fn, args = JOINED[problem]
    fit = least_squares(fn, np.array(start), args=args)
    assert fit.status in statuses, fit.status.name
    assert not fit.success and np.isfinite(fit.params).all()


def test_a_saddle_point_that_no_further_try_leaves_has_its_name(x64):
    fit = least_squares(lambda x: jnp.stack([(x[0] + x[1]) ** 2 - 1, x[0] - x[1]]), np.zeros(2), method="gauss_newton")
    assert fit.status is Status.SADDLE_POINT


def test_a_success_that_has_lost_rank_is_tried_again(x64):
    """The second try from this start spends two parameters on one residual, and ends at 17."""
    import problems

    fit = least_squares(problems.bard, np.full(3, 100.0))
    assert fit.success
    # The minimum of More, Garbow & Hillstrom's table, to its digits.
    np.testing.assert_allclose(2 * fit.value, 8.21487e-3, rtol=1e-5)


@pytest.mark.xdist_group("joined problems with a minimum")
@pytest.mark.parametrize("problem", MINIMUM)
def test_a_minimum_is_a_success(problem, x64):
    _, start, value = MINIMUM[problem]
    fn, args = JOINED[problem]
    fit = least_squares(fn, np.array(start), args=args)
    assert fit.success, str(fit)
    np.testing.assert_allclose(fit.value, value, rtol=1e-7, atol=1e-14)


def narrow(x):
    return x[0] * jnp.exp(-(((T - x[1]) / x[2]) ** 2)) - 2 * np.exp(-(((T - 1.7) / 0.6) ** 2)) - 0.01 * np.sin(9 * T)


def lorentz(x):
    readings = 3 / (1 + ((T - 1.7) / 0.3) ** 2) + 0.1 * T + 0.01 * np.sin(9 * T)
    return x[0] / (1 + ((T - x[1]) / x[2]) ** 2) + x[3] * T - readings


def two_peaks(x):
    readings = 2 * np.exp(-(((T - 1) / 0.4) ** 2)) + np.exp(-(((T - 3) / 0.3) ** 2)) + 0.01 * np.sin(9 * T)
    peaks = x[::3, None] * jnp.exp(-(((T - x[1::3, None]) / x[2::3, None]) ** 2))
    return jnp.sum(peaks, axis=0) - readings


TOGETHER = {
    "a peak of one reading": (narrow, [1.0, 3.5, 0.01], [2.0, 1.7, 0.6]),
    "a peak that runs off": (lorentz, [30.0, 20.0, 3.0, 1.0], [3.0, 1.7, 0.3, 0.1]),
    "sizes that overflow": (two_peaks, [8.3, 6.7, 0.1, 10.9, 1.1, 7.6], [2.0, 1.0, 0.4, 1.0, 3.0, 0.3]),
}
ENDS = [
    *(("a peak of one reading", method, None) for method in METHODS),
    ("a peak of one reading", "lm", (-1e4, 1e4)),
    *((name, method, None) for name in list(TOGETHER)[1:] for method in ("lm", "dogleg")),
]


@pytest.mark.parametrize(
    ("name", "method", "bounds"),
    [pytest.param(*end, marks=[pytest.mark.slow] * (end[1] != "lm" or end[2] is not None)) for end in ENDS],
)
def test_a_success_is_no_end_where_parameters_lose_their_effect_together(name, method, bounds, x64):
    """The readings are a curve and a small sine: the minimum is below the sine's value."""
    fn, start, truth = TOGETHER[name]
    fit = least_squares(fn, np.array(start), method=method, bounds=bounds)
    assert not fit.success or fit.value <= jnp.sum(fn(jnp.array(truth)) ** 2) / 2, str(fit)
    if name == "a peak of one reading":
        # One method has no further tries.
        assert fit.status is Status.FLAT if method == "gauss_newton" else fit.success


def test_ends_are_the_same_in_a_batch(x64):
    starts = np.array([TOGETHER["a peak of one reading"][1], [1.5, 1.5, 0.5]])
    fits = jax.jit(jax.vmap(lambda x: least_squares(narrow, x, method="gauss_newton")))(starts)
    assert [Status(int(code)) for code in fits.code] == [Status.FLAT, Status.CONVERGED_GRADIENT]


def box(x):
    t = jnp.arange(1, 11) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def peak(x):
    return x[0] * jnp.exp(-(((T - x[1]) / x[2]) ** 2)) - 3 * np.exp(-(((T - 1.7) / 0.6) ** 2))


FAR = {
    "a difference of decays": (box, [0.0, 1000.0, 2000.0]),
    "a decay before the first reading": (
        lambda x: x[0] * jnp.exp(-x[1] * T) + x[2] - (2 * np.exp(-1.5 * T) + 0.5),
        [1.0, 500.0, 0.0],
    ),
    "a peak beside the readings": (peak, [1.0, 40.0, 1.0]),
}


BACK = joined(FAR)
HOW = [("lm", None), ("dogleg", None), ("lm", (-1e4, 1e4))]
FIRST = next(iter(FAR))


@pytest.mark.xdist_group("joined problems with a parameter without effect")
@pytest.mark.parametrize(
    ("problem", "method", "bounds"), [(problem, *how) for problem in FAR for how in HOW[: 3 if problem == FIRST else 1]]
)
def test_a_parameter_without_effect_is_brought_back(problem, method, bounds, x64):
    _, start = FAR[problem]
    fn, args = BACK[problem]
    fit = least_squares(fn, np.array(start), args=args, method=method, bounds=bounds)
    assert fit.success and float(fit.value) < 1e-12, str(fit)


@pytest.mark.parametrize(("method", "bounds"), [*((method, None) for method in METHODS), ("lm", (-np.inf, np.inf))])
def test_a_small_step_from_a_position_far_from_zero_is_no_end(method, bounds):
    """A step that is small beside a position may be as long as the peak there is wide."""

    def misses(p, t, readings):
        return p[0] * jnp.exp(-(((t - p[1]) / p[2]) ** 2)) + p[3] - readings

    near = [(1e3, 50), (1e5, 10), (1e6, 50), (1e7, 1e3), (1e8, 1e4), (1e10, 1e6), (1e15, 1e11)]
    for dtype, places in ((np.float32, near), (np.float64, [*near, (1e12, 30), (1e18, 1e6)])):
        with jax.enable_x64(dtype == np.float64):
            for at, width in places:
                t = np.linspace(at - 10 * width, at + 10 * width, 200).astype(dtype)
                truth, start = np.array([[2, at + width / 2, width, 0.3], [1, at, 1.5 * width, 0]], dtype)
                noise = 0.02 * np.random.default_rng(0).normal(size=200)
                data = t, (misses(truth, t, 0) + noise).astype(dtype)
                fit = least_squares(misses, start, args=data, method=method, bounds=bounds)
                level = np.sum(np.square(misses(truth, *data))) / 2
                assert fit.success and fit.value < 1.02 * level, (dtype, at, width, str(fit))


@pytest.mark.parametrize("bounds", [None, (-3.0, 3.0)], ids=["free", "boxed"])
@pytest.mark.parametrize("method", METHODS)
def test_units_of_residuals_do_not_matter(method, bounds):
    """In float32 the squares of these residuals are 0 or inf."""

    def fit(size):
        out = least_squares(
            lambda x, size: size * rosenbrock(x), jnp.array([-1.2, 1.0]), args=(size,), method=method, bounds=bounds
        )
        assert out.success, str(out)
        return out

    plain = fit(jnp.float32(1))
    for size in (2.0**85, 2.0**-85):
        scaled = fit(jnp.float32(size))
        np.testing.assert_array_equal(scaled.params, plain.params)
        assert int(scaled.evaluations) == int(plain.evaluations)


def test_a_start_whose_squares_overflow_is_left(x64):
    t = jnp.arange(1.0, 11)

    def residual(x):
        return 2 + 2 * t - jnp.exp(t * x[0]) - jnp.exp(t * x[1])

    fit = least_squares(residual, jnp.array([30.0, 40.0]), max_iterations=1000)
    assert fit.success, str(fit)
    assert fit.value < 130


def test_float32_and_shapes():
    fit = least_squares(lambda p: {"a": p[0] - 1, "b": p[1:] * 2 - 3}, jnp.zeros((3, 2)))
    assert fit.params.dtype == jnp.float32 and fit.success
    np.testing.assert_allclose(fit.params, [[1, 1], [1.5, 1.5], [1.5, 1.5]], rtol=1e-5)
    wide = least_squares(lambda x: jnp.sum(x, keepdims=True) - 3, jnp.zeros(3))
    np.testing.assert_allclose(wide.params, [1, 1, 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: least_squares(lambda x: jnp.sum(x**2), jnp.ones(2)), ValueError, "Use jaxsgd.minimize"),
        (lambda: least_squares(rosenbrock, jnp.ones(2, int)), TypeError, "int32. Use floating-point"),
        (lambda: least_squares(rosenbrock, jnp.array([jnp.nan, 1])), ValueError, "not finite at the start"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), method="lmm"), ValueError, "did you mean 'lm'"),
        (lambda: least_squares(lambda x: x > 0, jnp.ones(2)), TypeError, "array of bool"),
        (lambda: least_squares(lambda x: x + 1j, jnp.ones(2)), TypeError, "array of complex64"),
        (lambda: least_squares(lambda x: x[:0], jnp.ones(2)), ValueError, "returns no number"),
        (lambda: least_squares(3, jnp.ones(2)), TypeError, "residual=3"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), args=[1]), TypeError, "args is a list. Use a tuple"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), args=("a",)), TypeError, r"args\[0\]='a': it is no array"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), callback=3), TypeError, "callback=3: it is no function"),
        (
            lambda: least_squares(rosenbrock, jnp.ones(2), callback=lambda *, r: None),
            TypeError,
            "callback: it is called with 1 arg",
        ),
        (lambda: least_squares(rosenbrock, jnp.ones(2), args=(1.0,)), TypeError, "residual: it is called with 2 arg"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), tol="a"), ValueError, "tol='a': it must lie in"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), tol=-1), ValueError, "tol=-1"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), max_iterations=1.5), ValueError, "max_iterations=1.5"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), has_aux=True), TypeError, "has_aux=True"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), bounds=(1, 0)), ValueError, "lower 1 is above upper 0"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), bounds=3), ValueError, "two parts are needed"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), bounds=({"a": 0}, None)), ValueError, "or a tree like params"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), bounds=(np.zeros(3), None)), ValueError, "has the shape"),
        (lambda: least_squares(rosenbrock, jnp.ones(2), bounds=(jnp.nan, None)), ValueError, "a bound is NaN"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match="(?s)" + words.replace("(", r"\(")):
        call()


# -- the held-out problems -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("first", 140), ("second", 151)])
def test_held_out_problems_are_well_formed(name, count, x64):
    import held_out

    problems = getattr(held_out, name)()
    assert len(problems) == count == len({problem.name for problem in problems})
    for problem in problems:
        residuals = problem.residual(jnp.asarray(problem.start))
        assert residuals.ndim == 1 and residuals.size >= problem.start.size, problem.name
        np.testing.assert_allclose(problem.fun(jnp.asarray(problem.start)), jnp.sum(residuals**2), rtol=1e-12)


@pytest.mark.slow
def test_no_success_is_false_on_held_out_problems(x64):
    import minimise

    table = minimise.run(["lm", "dogleg", "SciPy lm", "SciPy trf"], squares=True, unseen=["first"])
    assert not table.false("lm") and not table.false("dogleg")
    assert table.count("lm") >= max(table.count("SciPy lm"), table.count("SciPy trf"))
