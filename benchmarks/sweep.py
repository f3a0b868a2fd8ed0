"""What a sweep of learning rates costs beside single runs, and beside optax compiled anew for each rate.

    python benchmarks/sweep.py [--model mlp|cnn] [--members 32] [--steps 64] [--devices 2]

All of them train the same Adam on the same batches of handwritten digits. "Single runs" are jaxsgd's own compiled step,
called once a step, and the same step under one compiled `jax.lax.scan`: both compiled once for all rates, the compile
not counted. Runs are interleaved; medians and their ratios are printed. The runs of optax and of the whole sweep
count their compiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd.ensemble.population import Population


def mlp_loss(params: Any, batch: Any, key: Any) -> jax.Array:
    x = batch["image"].reshape(len(batch["image"]), -1)
    for i in (1, 2):
        x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w3"] + params["b3"], batch["label"]).mean()


def cnn_loss(params: Any, batch: Any, key: Any) -> jax.Array:
    x = batch["image"]
    for name in ("c1", "c2"):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
    x = x.reshape(len(x), 4, 2, 4, 2, -1).max((2, 4)).reshape(len(x), -1)
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"], batch["label"]).mean()


def start(model: str, width: int) -> tuple[Any, Any]:
    shapes = {
        "mlp": {"w1": (64, width), "w2": (width, width), "w3": (width, 10)},
        "cnn": {"c1": (3, 3, 1, 16), "c2": (3, 3, 16, 32), "w": (512, 10)},
    }[model]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape) * np.prod(shape[:-1]) ** -0.5
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    if model == "mlp":
        params |= {f"b{i}": jnp.zeros(params[f"w{i}"].shape[1]) for i in (1, 2, 3)}
    return (mlp_loss if model == "mlp" else cnn_loss), params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--strategy", default="auto")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)

    digits = load_digits()
    index = np.random.default_rng(0).integers(0, len(digits.target), (args.steps, 64))
    images = (digits.images[..., None] / 16).astype(np.float32)
    stacked = {"image": images[index], "label": digits.target[index].astype(np.int32)}
    batches = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(args.steps)]
    on_device = jax.device_put(stacked, jax.devices()[0])
    rates = np.geomspace(1e-5, 1e-2, args.members)
    loss_fn, params = start(args.model, args.width)

    tx = jaxsgd.adam(1e-3)
    step = jaxsgd.make_step(loss_fn, tx)
    state = jaxsgd.TrainState.create(params, tx)

    def at(rate: float) -> jaxsgd.TrainState:
        fresh = jax.tree.map(jnp.copy, state)
        return fresh.replace(opt_state=jaxsgd.with_hyper(fresh.opt_state, learning_rate=float(rate)))

    def by_steps() -> None:
        for rate in rates:
            now = at(rate)
            for batch in batches:
                now, metrics = step(now, batch)
            jax.block_until_ready(metrics)

    scanned = jax.jit(lambda state, batches: jax.lax.scan(step.fn, state, batches))

    def by_scan() -> None:
        for rate in rates:
            jax.block_until_ready(scanned(at(rate), on_device))

    def build(given: Any, learning_rate: Any) -> tuple[Any, Any]:
        return step, given.replace(opt_state=jaxsgd.with_hyper(given.opt_state, learning_rate=learning_rate))

    populations = {
        n: Population(build, {"learning_rate": rates}, given=state, strategy=args.strategy, devices=jax.devices()[:n])
        for n in sorted({1, args.devices})
    }

    def by_population(n: int):
        def run() -> None:
            populations[n].restart(np.ones(args.members, bool), {"learning_rate": rates})
            populations[n].advance(stacked)

        return run

    runners = {"single runs, step by step": by_steps, "single runs, scanned": by_scan}
    if args.model == "cnn":
        del runners["single runs, scanned"]  # XLA for CPU is dozens of times slower there
    runners |= {f"sweep, {n} device{'s' * (n > 1)}": by_population(n) for n in populations}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()  # compile
    for _ in range(args.rounds):
        for name, run in runners.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{args.model}, {args.members} rates, {args.steps} steps, {args.rounds} interleaved runs")
    for n, population in populations.items():
        print(f"{n} device(s): {population.strategy} ({population.why}), {population.compiles} compile")
    for name, value in medians.items():
        ratios = ", ".join(f"{value / medians[base]:.2f} of {base}" for base in runners if base.startswith("single"))
        print(f"{name:28s} {value:7.3f} s: {ratios}")

    def with_optax() -> None:
        """As people sweep today: a rate is a constant of the compiled program."""
        for rate in rates:
            optimizer = optax.adam(float(rate))

            @jax.jit
            def one(params: Any, opt_state: Any, batch: Any, optimizer: Any = optimizer) -> tuple[Any, Any, jax.Array]:
                loss, grads = jax.value_and_grad(lambda p: loss_fn(p, batch, None))(params)
                updates, opt_state = optimizer.update(grads, opt_state)
                return optax.apply_updates(params, updates), opt_state, loss

            now, opt_state = params, optimizer.init(params)
            for batch in batches:
                now, opt_state, loss = one(now, opt_state, batch)
            jax.block_until_ready(loss)

    whole: dict[str, list[float]] = {"jaxsgd.sweep, compile and all": [], "optax, compiled for each rate": []}
    for _ in range(3):
        jax.clear_caches()
        begin = time.perf_counter()
        result = jaxsgd.sweep(
            jaxsgd.make_step(loss_fn, tx),
            state,
            batches,
            learning_rate=rates,
            strategy=args.strategy,
            mesh=jax.devices()[:1],
            progress=False,
        )
        whole["jaxsgd.sweep, compile and all"].append(time.perf_counter() - begin)
        assert result.compiles == 1, result.compiles
        jax.clear_caches()
        begin = time.perf_counter()
        with_optax()
        whole["optax, compiled for each rate"].append(time.perf_counter() - begin)
    ours, theirs = (statistics.median(times) for times in whole.values())
    print(f"jaxsgd.sweep, compile and all: {ours:.2f} s; optax for each rate: {theirs:.2f} s: {theirs / ours:.1f}x")


if __name__ == "__main__":
    sys.exit(main())
