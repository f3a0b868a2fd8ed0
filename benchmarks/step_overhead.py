"""What a train step costs the host: jaxsgd's step beside nnx.Optimizer under nnx.jit, on a model of many small layers.

    python benchmarks/step_overhead.py [--layers 48] [--steps 200]

The arithmetic is next to nothing, so the time is that of Python and of dispatch. Runs of the competitors are
interleaved; the medians and their ratios are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import jaxsgd


class Net(nnx.Module):
    def __init__(self, layers: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(layers)])
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    batch = np.ones((8, 8), np.float32)
    make = lambda: Net(args.layers, nnx.Rngs(0))  # noqa: E731
    leaves = len(jax.tree.leaves(nnx.state(make(), nnx.Param)))

    def jaxsgd_runner(mesh: Mesh | None):
        tx = jaxsgd.adamw(1e-3)
        step = jaxsgd.make_step(lambda model, b, key: jnp.mean(model(b) ** 2), tx, mesh=mesh)
        held = [jaxsgd.TrainState.create(make(), tx, mesh=mesh)]

        def run() -> None:
            for _ in range(args.steps):
                held[0], _ = step(held[0], batch)
            jax.block_until_ready(held[0])

        return run

    def nnx_runner():
        model = make()
        optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, b):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(b) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        def run() -> None:
            for _ in range(args.steps):
                loss = step(model, optimizer, batch)
            jax.block_until_ready(loss)

        return run

    one = Mesh(jax.devices()[:1], ("data",))
    runners = {
        "nnx.Optimizer, nnx.jit": nnx_runner(),
        "jaxsgd": jaxsgd_runner(None),
        "jaxsgd, mesh of 1": jaxsgd_runner(one),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()  # compile
    for _ in range(args.rounds):
        for name, run in runners.items():
            begin = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - begin) / args.steps)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians["nnx.Optimizer, nnx.jit"]
    print(f"{leaves} parameters, {args.steps} steps a run, {args.rounds} interleaved runs")
    for name, value in medians.items():
        print(f"{name:24s} {1e3 * value:7.2f} ms a step, {value / base:.2f} of nnx.Optimizer under nnx.jit")


if __name__ == "__main__":
    main()
