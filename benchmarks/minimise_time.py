"""Time of L-BFGS and of its compilation, beside SciPy with JAX's gradients and a loop of optax.lbfgs.

    python benchmarks/minimise_time.py [--rounds 7]

All run in float32 to the same loss: the best of all, plus 1e-4 of the decrease that it made. The limit of evaluations
of each solver is the smallest that reaches it. Runs are interleaved in one process, and each timed run follows one of
the same solver: what comes right after SciPy takes up to 40 ms longer. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree
from minimise import optax_loop
from sklearn.datasets import load_breast_cancer, load_digits

from jaxsgd.second_order import minimize

Fun = Callable[[Any, Any], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def logistic(params: Any, data: Any) -> jax.Array:
    features, labels = data
    return cross_entropy(features @ params["w"] + params["b"], labels) + 1e-4 * jnp.sum(params["w"] ** 2)


def mlp(params: Any, data: Any) -> jax.Array:
    features, labels = data
    hidden = jnp.tanh(features @ params["w1"] + params["b1"])
    decay = jnp.sum(params["w1"] ** 2) + jnp.sum(params["w2"] ** 2)
    return cross_entropy(hidden @ params["w2"] + params["b2"], labels) + 1e-4 * decay


def tasks() -> dict[str, tuple[Fun, Any, Any]]:
    """``name: (fun, params, data)``."""
    out: dict[str, tuple[Fun, Any, Any]] = {}
    for name, load in (("breast_cancer", load_breast_cancer), ("digits", load_digits)):
        features, labels = load(return_X_y=True)
        features = (features - features.mean(0)) / (features.std(0) + 1e-6)
        data = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
        size, classes = features.shape[1], int(labels.max()) + 1
        params = {"w": jnp.zeros((size, classes)), "b": jnp.zeros(classes)}
        out[f"logistic, {name}"] = logistic, params, data
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(size=(64, 32)) / 8, jnp.float32),
        "b1": jnp.zeros(32),
        "w2": jnp.asarray(rng.normal(size=(32, 10)) / 6, jnp.float32),
        "b2": jnp.zeros(10),
    }
    out["MLP, digits"] = mlp, params, data
    return out


@partial(jax.jit, static_argnums=0)
def optax_steps(fun: Fun, params: Any, data: Any, most: Any) -> Any:
    def going(state: Any, iterations: Any, evaluations: Any) -> Any:
        return iterations < most

    params, state, _ = optax_loop(lambda params: fun(params, data), params, going)
    return params, optax.tree_utils.tree_get(state, "value")


def scipys(fun: Fun, params: Any, data: Any) -> Callable[[int], float]:
    start, unravel = ravel_pytree(params)
    both = jax.jit(jax.value_and_grad(lambda x, data: fun(unravel(x), data)))

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = both(np.asarray(x, np.float32), data)
        return float(value), np.asarray(grad, np.float64)

    def run(iterations: int) -> float:
        out = scipy.optimize.minimize(
            value_and_grad,
            np.asarray(start, np.float64),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "maxfun": 10_000, "ftol": 0, "gtol": 0},
        )
        return out.fun

    return run


def runs(fun: Fun, params: Any, data: Any) -> dict[str, Callable[[int], float]]:
    """``name: run(iterations) -> final loss``."""

    def ours(iterations: int) -> float:
        return float(minimize(fun, params, args=(data,), tol=0.0, max_iterations=iterations).value)

    def optaxs(iterations: int) -> float:
        return float(optax_steps(fun, params, data, iterations)[1])

    return {"jaxsgd lbfgs": ours, "optax.lbfgs loop": optaxs, "SciPy L-BFGS-B": scipys(fun, params, data)}


def fewest(run: Callable[[int], float], target: float, most: int) -> int:
    """The smallest number of iterations that reaches the target."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if run(middle) <= target else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=int, default=300, help="iterations that set the target")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'task':24}{'solver':20}{'iterations':>12}{'loss':>11}{'ms':>9}{'ratio':>8}{'compile s':>11}")
    for task, (fun, params, data) in tasks().items():
        solvers = runs(fun, params, data)
        compiles = {name: [] for name in solvers}
        for _ in range(3):
            for name, run in runs(fun, params, data).items():
                jax.clear_caches()  # or the first of them would pay for what all trace
                begin = time.perf_counter()
                run(1)
                compiles[name].append(time.perf_counter() - begin)
        best = min(run(options.most) for run in solvers.values())
        target = best + 1e-4 * (float(fun(params, data)) - best)
        counts = {name: fewest(run, target, options.most) for name, run in solvers.items()}
        times: dict[str, list[float]] = {name: [] for name in solvers}
        losses = {}
        for _ in range(options.rounds):
            for name, run in solvers.items():
                run(counts[name])
                begin = time.perf_counter()
                losses[name] = run(counts[name])
                times[name].append(time.perf_counter() - begin)
        first = times["jaxsgd lbfgs"]
        for name in solvers:
            ratio = statistics.median(a / b for a, b in zip(first, times[name], strict=True))
            print(
                f"{task:24}{name:20}{counts[name]:>12}{losses[name]:>11.5f}{1e3 * statistics.median(times[name]):>9.1f}"
                f"{ratio:>8.2f}{statistics.median(compiles[name]):>11.2f}"
            )


if __name__ == "__main__":
    main()
