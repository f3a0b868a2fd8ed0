"""Solvers of unconstrained and boxed minimization beside each other, in float64, with 2,000 evaluations each.

    python benchmarks/minimise.py [--quick] [--method lbfgs] [--boxed] [--squares] [--held-out [first]] [--details]

A problem counts as solved if the value is within 1e-6 of the best that any solver found, in units of the best value
or 1; or if the point is a local minimum by its gradient and exact Hessian, whatever the solver says. A success that
is none is a point that the solver calls a success and this test does not. Evaluations are of the value with its
gradient; their median is over the problems that both solve.

``--squares`` puts `least_squares` beside SciPy's lm and trf and optimistix. There a problem counts as solved if the
value is within 1e-6 of the best of all, relative to it; or if the point is a strict local minimum. ``--held-out``
takes problems instead that did not serve to choose anything: with ``--squares`` sets of ``held_out.py``, alone the
functions of ``held_out_functions.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import held_out
import held_out_functions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import scipy.optimize
from problems import Problem

from jaxsgd.second_order import least_squares, minimize

MOST = 2000
UNSEEN = {"first": held_out.first, "second": held_out.second}
OURS = ("lbfgs", "newton", "trust_region", "newton_cg", "bfgs", "cg", "lbfgsb")


@dataclass
class Outcome:
    x: np.ndarray
    evaluations: int
    success: bool


Solver = Callable[[Problem, Any], Outcome]


def ours(method: str) -> Solver:
    def solve(problem: Problem, _: Any) -> Outcome:
        bounds = None if problem.lower is None else (problem.lower, problem.upper)
        out = minimize(problem.fun, problem.start, method=method, max_evaluations=MOST, bounds=bounds)
        return Outcome(np.asarray(out.params), int(out.evaluations), out.success)

    return solve


def scipys(method: str, **options: Any) -> Solver:
    def solve(problem: Problem, compiled: Any) -> Outcome:
        def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = compiled["both"](x)
            return float(value), np.asarray(grad)

        extra: dict[str, Any] = {}
        if method == "trust-exact":
            extra["hess"] = lambda x: np.asarray(compiled["hessian"](x))
        bounds = None if problem.lower is None else scipy.optimize.Bounds(problem.lower, problem.upper)
        if method == "L-BFGS-B":
            options.update(maxfun=MOST)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                out = scipy.optimize.minimize(
                    fun,
                    problem.start,
                    jac=True,
                    method=method,
                    bounds=bounds,
                    options={"maxiter": MOST, **options},
                    **extra,
                )
            except (ValueError, np.linalg.LinAlgError):
                return Outcome(problem.start, MOST, False)
        return Outcome(out.x, out.nfev, bool(out.success) and out.nfev <= MOST)

    return solve


def optaxs(problem: Problem, _: Any) -> Outcome:
    x, evaluations, size = _to_gradient(problem.fun, jnp.asarray(problem.start))
    return Outcome(np.asarray(x), int(evaluations), bool(size <= 1e-6))


def optax_loop(fun: Any, x: Any, going: Callable[[Any, Any, Any], Any]) -> tuple[Any, Any, Any]:
    """The loop that optax's documentation shows for its L-BFGS.

    Args:
      fun: ``fun(x) -> value``.
      x: the start, a pytree.
      going: ``going(state, iterations, evaluations)``, whether to go on.

    Returns:
      ``(x, state, evaluations)``.
    """
    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(fun)

    def body(carry: Any) -> Any:
        x, state, iterations, count = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=fun)
        steps = optax.tree_utils.tree_get(state, "info").num_linesearch_steps
        return optax.apply_updates(x, updates), state, iterations + 1, count + steps.astype(count.dtype)

    begin = x, tx.init(x), jnp.int32(0), jnp.int32(0)
    x, state, _, count = jax.lax.while_loop(lambda carry: going(*carry[1:]), body, begin)
    return x, state, count


def _gradient(state: Any) -> Any:
    return optax.tree_utils.tree_norm(optax.tree_utils.tree_get(state, "grad"), ord=jnp.inf)


def _to_gradient(fun: Any, x: Any) -> Any:
    def going(state: Any, iterations: Any, count: Any) -> Any:
        size = _gradient(state)
        return (iterations == 0) | ((size > 1e-6) & (count < MOST) & jnp.isfinite(size))

    x, state, count = jax.jit(lambda x: optax_loop(fun, x, going))(x)
    return x, count + 1, _gradient(state)


def optimistixs(kind: str) -> Solver:
    def solve(problem: Problem, _: Any) -> Outcome:
        import optimistix

        solver = getattr(optimistix, kind)(rtol=1e-8, atol=1e-8)
        out = optimistix.minimise(
            lambda x, args: problem.fun(x), solver, jnp.asarray(problem.start), max_steps=MOST, throw=False
        )
        success = bool(out.result == optimistix.RESULTS.successful)
        return Outcome(np.asarray(out.value), int(out.stats["num_steps"]), success)

    return solve


def our_squares(method: Any) -> Solver:
    def solve(problem: Problem, _: Any) -> Outcome:
        bounds = None if problem.lower is None else (problem.lower, problem.upper)
        assert problem.residual is not None
        out = least_squares(problem.residual, problem.start, method=method, max_iterations=MOST // 2, bounds=bounds)
        return Outcome(np.asarray(out.params), int(out.evaluations), out.success)

    return solve


def scipy_squares(method: str) -> Solver:
    def solve(problem: Problem, compiled: Any) -> Outcome:
        bounds = (-np.inf, np.inf) if problem.lower is None else (problem.lower, problem.upper)
        if method == "lm" and problem.lower is not None:
            return Outcome(problem.start, 0, False)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                out = scipy.optimize.least_squares(
                    lambda x: np.asarray(compiled["residual"](x)),
                    problem.start,
                    jac=lambda x: np.asarray(compiled["jacobian"](x)),
                    method="trf" if problem.lower is not None else method,
                    bounds=bounds,
                    ftol=1e-12,
                    xtol=1e-12,
                    gtol=1e-12,
                    max_nfev=MOST,
                )
            except (ValueError, np.linalg.LinAlgError):  # lm needs as many residuals as parameters, and finite ones.
                return Outcome(problem.start, MOST, False)
        return Outcome(out.x, out.nfev, bool(out.success))

    return solve


def optimistix_squares(problem: Problem, _: Any) -> Outcome:
    import optimistix

    if problem.lower is not None:
        return Outcome(problem.start, 0, False)
    solver = optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-12)
    out = optimistix.least_squares(
        lambda x, args: problem.residual(x), solver, jnp.asarray(problem.start), max_steps=MOST, throw=False
    )
    success = bool(out.result == optimistix.RESULTS.successful)
    return Outcome(np.asarray(out.value), int(out.stats["num_steps"]), success)


def solvers(boxed: bool, squares: bool = False) -> dict[str, Solver]:
    if squares:
        return {
            **{method: our_squares(method) for method in ("lm", "dogleg")},
            "SciPy lm": scipy_squares("lm"),
            "SciPy trf": scipy_squares("trf"),
            "optimistix LM": optimistix_squares,
        }
    if boxed:
        tight = {"ftol": 1e-15, "gtol": 1e-6}
        return {
            "lbfgsb": ours("lbfgsb"),
            "SciPy L-BFGS-B": scipys("L-BFGS-B"),
            "SciPy L-BFGS-B tight": scipys("L-BFGS-B", **tight),
        }
    return {
        **{method: ours(method) for method in OURS},
        "SciPy L-BFGS-B": scipys("L-BFGS-B"),
        "SciPy L-BFGS-B tight": scipys("L-BFGS-B", ftol=1e-15, gtol=1e-6),
        "SciPy BFGS": scipys("BFGS"),
        "SciPy trust-exact": scipys("trust-exact"),
        "optax lbfgs": optaxs,
        "optimistix LBFGS": optimistixs("LBFGS"),
        "optimistix BFGS": optimistixs("BFGS"),
    }


def is_minimum(problem: Problem, compiled: Any, x: np.ndarray) -> bool:
    """Whether Newton's method predicts no decrease at ``x``, and the curvature is not negative."""
    value, grad = (np.asarray(part) for part in compiled["both"](x))
    hessian = np.asarray(compiled["hessian"](x))
    if not (np.isfinite(value) and np.all(np.isfinite(grad)) and np.all(np.isfinite(hessian))):
        return False
    if problem.lower is not None:
        if np.any(x < problem.lower) or np.any(x > problem.upper):
            return False
        held = ((x <= problem.lower) & (grad >= 0)) | ((x >= problem.upper) & (grad <= 0))
        grad, hessian = grad[~held], hessian[np.ix_(~held, ~held)]
        if not len(grad):
            return True
    values, vectors = np.linalg.eigh(hessian)
    size = np.maximum(np.abs(values), 1e-14 * np.max(np.abs(values)) + 1e-300)
    with np.errstate(over="ignore", invalid="ignore"):  # where parameters ran off: such a gain is no small one
        gain = np.sum((grad @ vectors) ** 2 / size) / 2
    start = abs(float(compiled["both"](problem.start)[0]))
    return bool(gain <= 1e-6 * max(abs(float(value)), min(1, start)) and values[0] >= -1e-6 * np.max(np.abs(values)))


def is_strict(problem: Problem, compiled: Any, x: np.ndarray) -> bool:
    """Whether ``x`` is a minimum with positive curvature along every parameter that no bound holds."""
    if not is_minimum(problem, compiled, x):
        return False
    grad, hessian = np.asarray(compiled["both"](x)[1]), np.asarray(compiled["hessian"](x))
    if problem.lower is not None:
        held = ((x <= problem.lower) & (grad > 0)) | ((x >= problem.upper) & (grad < 0))
        hessian = hessian[np.ix_(~held, ~held)]
    size = np.sqrt(np.abs(np.diagonal(hessian)))
    if not np.all(size > 0):
        return False
    return not len(size) or bool(np.linalg.eigvalsh(hessian / size / size[:, None])[0] > 1e-9)


def judged_squares(problem: Problem, outcomes: dict[str, Outcome], compiled: Any) -> dict[str, bool]:
    """Which solvers solved a problem of least squares."""
    values = {name: float(compiled["both"](out.x)[0]) for name, out in outcomes.items()}
    best = min(v for v in values.values() if np.isfinite(v))
    limit = best * (1 + 1e-6) + 1e-12 * min(1, float(compiled["both"](problem.start)[0]))
    return {name: values[name] <= limit or is_strict(problem, compiled, out.x) for name, out in outcomes.items()}


def judged(problem: Problem, outcomes: dict[str, Outcome], compiled: Any) -> dict[str, bool]:
    """Which solvers solved a problem."""
    values = {name: float(compiled["both"](out.x)[0]) for name, out in outcomes.items()}
    best = min((v for v in values.values() if np.isfinite(v)), default=np.inf)
    start = abs(float(compiled["both"](problem.start)[0]))
    unit = max(abs(best), min(1, start))
    out = {}
    for name, outcome in outcomes.items():
        near = values[name] - best <= 1e-6 * unit
        out[name] = outcome.evaluations <= MOST + 1 and bool(near or is_minimum(problem, compiled, outcome.x))
    return out


@dataclass
class Table:
    """The outcome of every solver on every problem."""

    solved: dict[str, dict[str, bool]]
    outcomes: dict[str, dict[str, Outcome]]

    def count(self, name: str) -> int:
        return sum(row[name] for row in self.solved.values())

    def false(self, name: str) -> list[str]:
        """The problems that a solver calls solved and that are not."""
        return [p for p, row in self.solved.items() if self.outcomes[p][name].success and not row[name]]

    def doubted(self, name: str) -> list[str]:
        """The problems that a solver solved without saying so."""
        return [p for p, row in self.solved.items() if not self.outcomes[p][name].success and row[name]]

    def evaluations(self, name: str, other: str | None = None) -> float:
        rows = [p for p, row in self.solved.items() if row[name] and (other is None or row[other])]
        return statistics.median(self.outcomes[p][name].evaluations for p in rows) if rows else float("nan")


def run(
    names: list[str] | None = None,
    boxed: bool = False,
    every: int = 1,
    squares: bool = False,
    unseen: Sequence[str] | None = None,
) -> Table:
    """Run solvers on the problems.

    Args:
      names: the solvers. Default: all.
      boxed: problems with bounds. Default: without.
      every: take one of so many problems. Default: 1.
      squares: problems of least squares, with bounds and without. Default: of minimization.
      unseen: take held-out problems instead: of least squares the sets of these names, ``"first"`` and ``"second"``.
        Default: None, none.
    """
    table = Table({}, {})
    chosen = {name: solve for name, solve in solvers(boxed, squares).items() if names is None or name in names}
    if unseen is not None:
        every_one = [p for name in unseen for p in UNSEEN[name]()] if squares else held_out_functions.functions()
    elif squares:
        every_one = problems.residuals()
    else:
        every_one = problems.boxed() if boxed else problems.unconstrained()
    compiled: dict[str, Any] = {}
    last: Any = None
    for problem in every_one[::every]:
        if problem.residual is None or problem.residual is not last:
            jax.clear_caches()
            compiled = {"both": jax.jit(jax.value_and_grad(problem.fun)), "hessian": jax.jit(jax.hessian(problem.fun))}
            if problem.residual is not None:
                compiled["residual"] = jax.jit(problem.residual)
                compiled["jacobian"] = jax.jit(jax.jacfwd(problem.residual))
        last = problem.residual
        outcomes = {name: solve(problem, compiled) for name, solve in chosen.items()}
        table.outcomes[problem.name] = outcomes
        table.solved[problem.name] = (judged_squares if squares else judged)(problem, outcomes, compiled)
    return table


def show(table: Table, first: str, details: bool) -> None:
    names = list(next(iter(table.outcomes.values())))
    print(f"{len(table.solved)} problems; evaluations: median over those that the solver and {first} solve\n")
    print(f"{'solver':24}{'solved':>8}{'evaluations':>13}{first[:10]:>12}{'false':>7}{'unsure':>8}")
    for name in names:
        print(
            f"{name:24}{table.count(name):>8}{table.evaluations(name, first):>13.1f}"
            f"{table.evaluations(first, name):>12.1f}{len(table.false(name)):>7}{len(table.doubted(name)):>8}"
        )
    for name in names:
        missed = [p for p, row in table.solved.items() if not row[name]]
        if missed:
            print(f"\n{name} misses: {', '.join(missed)}")
        if table.false(name):
            print(f"{name} calls solved: {', '.join(table.false(name))}")
    rivals = [name for name in ("SciPy lm", "SciPy trf") if name in names]
    if rivals:
        lost = [p for p, row in table.solved.items() if any(row[r] for r in rivals) and not row[first]]
        print(f"\n{first} misses what {' or '.join(rivals)} solves: {', '.join(lost) or 'nothing'}")
    if details:
        print()
        for p, row in table.outcomes.items():
            cells = (f"{out.evaluations}{'' if table.solved[p][name] else '!'}" for name, out in row.items())
            print(f"{p:28}" + "".join(f"{cell:>8}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one of five problems")
    parser.add_argument("--method", nargs="*", help="names of solvers; default: all")
    parser.add_argument("--boxed", action="store_true", help="problems with bounds")
    parser.add_argument("--squares", action="store_true", help="least_squares beside SciPy and optimistix")
    parser.add_argument(
        "--held-out", nargs="*", choices=UNSEEN, help="held-out functions instead; with --squares, sets of these names"
    )
    parser.add_argument("--details", action="store_true", help="evaluations of each solver on each problem")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    begin = time.perf_counter()
    if options.held_out is not None and (options.boxed or bool(options.held_out) != options.squares):
        parser.error("--held-out: alone it takes functions. Name a set with --squares: --squares --held-out second")
    table = run(options.method, options.boxed, 5 if options.quick else 1, options.squares, options.held_out)
    show(table, next(iter(next(iter(table.outcomes.values())))), options.details)
    print(f"\n{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
