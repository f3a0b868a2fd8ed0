"""Moments at eight and four bits beside float32: time, memory and compilation of a step.

    python benchmarks/eight_bit.py [--millions 64]

One array of so many million parameters. The compiled step from gradients to new parameters (`jaxsgd.update_params`),
parameters and state donated; medians of interleaved runs beside ``optax.adamw`` in float32. The losses of trainings
are in ``benchmarks/parity.py``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np
import optax

import jaxsgd


def updates(millions: int, runs: int = 9) -> None:
    """Print a line for each way to keep AdamW's moments."""
    shape = (millions * 1024, 1024)
    grads = jax.random.normal(jax.random.key(0), shape) * 1e-2
    weights = jax.random.normal(jax.random.key(1), shape)
    ways = {"optax float32": optax.adamw(1e-3), "float32": jaxsgd.adamw(1e-3, weight_decay=1e-4)}
    ways["int8"] = jaxsgd.adamw(1e-3, weight_decay=1e-4, storage=jaxsgd.int8())
    ways["int4"] = jaxsgd.adamw(1e-3, weight_decay=1e-4, storage=jaxsgd.int4())
    ways["fp8"] = jaxsgd.adamw(1e-3, weight_decay=1e-4, storage=jaxsgd.fp8())
    compiled, compiling, carries = {}, {}, {}
    for name, tx in ways.items():

        def step(carry: Any, grads: Any, tx: Any = tx) -> Any:
            return jaxsgd.update_params(tx, grads, carry[1], carry[0])

        carries[name] = jax.numpy.copy(weights), tx.init(weights)
        lowered = jax.jit(step, donate_argnums=0).lower(carries[name], grads)
        begin = time.perf_counter()
        compiled[name] = lowered.compile()
        compiling[name] = time.perf_counter() - begin
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, compiled_step in compiled.items():
            begin = time.perf_counter()
            carries[name] = jax.block_until_ready(compiled_step(carries[name], grads))
            times[name].append(time.perf_counter() - begin)
    print(f"{'update':16}{'ns / param':>12}{'ratio':>8}{'state':>10}{'temps':>10}{'compile':>10}   (bytes a param)")
    first = np.asarray(times["optax float32"][1:])
    for name, compiled_step in compiled.items():
        own, held = np.asarray(times[name][1:]), sum(x.nbytes for x in jax.tree.leaves(carries[name][1]))
        temps = compiled_step.memory_analysis().temp_size_in_bytes
        print(
            f"{name:16}{np.median(own) / weights.size * 1e9:12.2f}{np.median(own / first):8.2f}"
            f"{held / weights.size:10.3f}{temps / weights.size:10.3f}{compiling[name]:9.2f}s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=int, default=64)
    updates(parser.parse_args().millions)


if __name__ == "__main__":
    main()
