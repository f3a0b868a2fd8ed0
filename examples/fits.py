"""Fit 10,000 curves in one compiled call, and differentiate a fit with respect to its penalty.

    python examples/fits.py

The first part fits ``size * exp(-rate * t) + shift`` to noisy curves with one vmapped `least_squares`. The second
chooses the penalty of ridge regression by gradient descent on the validation error: the derivative of the fit follows
from the implicit function theorem.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd import adam
from jaxsgd.second_order.result import Result
from jaxsgd.second_order.squares import least_squares

T = np.linspace(0.0, 4.0, 50)


def curve(p: dict[str, jax.Array]) -> jax.Array:
    return p["size"] * jnp.exp(-p["rate"] * T) + p["shift"]


def decay(p: dict[str, jax.Array], y: jax.Array) -> jax.Array:
    return curve(p) - y


def fit(y: jax.Array) -> Result:
    return least_squares(decay, {"size": 1.0, "rate": 1.0, "shift": 0.0}, args=(y,))


def many(count: int) -> Result:
    """Fit ``count`` curves, print the time and the errors."""
    rng = np.random.default_rng(0)
    truth = {"size": rng.uniform(1, 3, count), "rate": rng.uniform(0.5, 3, count), "shift": rng.uniform(-1, 1, count)}
    data = np.asarray(jax.vmap(curve)(truth)) + 0.02 * rng.normal(size=(count, T.size))
    fits = jax.jit(jax.vmap(fit)).lower(data).compile()
    begin = time.perf_counter()
    results = jax.block_until_ready(fits(data))
    seconds = time.perf_counter() - begin
    print(results)
    print(f"{count:,} fits in {seconds:.2f} s: {1e6 * seconds / count:.1f} microseconds each")
    for name, wanted in truth.items():
        error = np.abs(np.asarray(results.params[name]) - wanted)
        print(f"{name:>6}: median error {np.median(error):.4f}")
    return results


def ridge(steps: int) -> list[float]:
    """Choose the penalty by gradient descent on the validation error; print and return the errors."""
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(60, 30)), rng.normal(size=30) * (rng.uniform(size=30) < 0.3)
    y = x @ weights + 2.0 * rng.normal(size=60)
    train, valid = slice(0, 40), slice(40, 60)

    def validation(log_penalty: jax.Array) -> jax.Array:
        def residual(w: jax.Array, log_penalty: jax.Array) -> tuple[jax.Array, jax.Array]:
            return x[train] @ w - y[train], jnp.exp(log_penalty / 2) * w

        w = least_squares(residual, jnp.zeros(30), args=(log_penalty,)).params
        return jnp.mean((x[valid] @ w - y[valid]) ** 2)

    log_penalty, tx = jnp.asarray(-2.0), adam(0.3)
    both = jax.jit(jax.value_and_grad(validation))
    slope = float(both(log_penalty)[1])
    difference = float((validation(log_penalty + 1e-4) - validation(log_penalty - 1e-4)) / 2e-4)
    print(f"d error / d log penalty at 0.135: {slope:.8f}; by differences {difference:.8f}")
    state, errors = tx.init(log_penalty), []
    for _ in range(steps):
        error, gradient = both(log_penalty)
        errors.append(float(error))
        updates, state = tx.update(gradient, state, log_penalty)
        log_penalty = optax.apply_updates(log_penalty, updates)
    print(f"penalty {float(jnp.exp(log_penalty)):.3g}: validation error {errors[0]:.4g} -> {errors[-1]:.4g}")
    return errors


def main(argv: list[str] | None = None) -> tuple[Result, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="curves to fit")
    parser.add_argument("--steps", type=int, default=40, help="of the search for the penalty")
    args = parser.parse_args(argv)
    for name in ("count", "steps"):
        if getattr(args, name) < 1:
            parser.exit(2, f"--{name} {getattr(args, name)}: at least 1 is needed\n")
    with jax.enable_x64(True):
        return many(args.count), ridge(args.steps)


if __name__ == "__main__":
    main()
