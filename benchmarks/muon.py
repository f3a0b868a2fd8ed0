"""The time of one Muon step on the CPU: ours beside optax.contrib.muon, in turns within one process.

``python benchmarks/muon.py`` takes a GPT-2 of a few layers; ``--layers 12 --width 768`` is the small one. Both
optimizers orthogonalise the same leaves. The ratio is the median of the ratios of each pair of runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsgd


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> dict[str, Any]:
    """Shapes of GPT-2's parameters: 4 + 12 leaves a layer."""

    def norm() -> dict[str, tuple[int, ...]]:
        return {"scale": (width,), "bias": (width,)}

    def dense(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (rows, columns), "bias": (columns,)}

    tree: dict[str, Any] = {"wte": (vocabulary, width), "wpe": (context, width), "ln_f": norm()}
    for i in range(layers):
        tree[f"h{i}"] = {
            "ln_1": norm(), "c_attn": dense(width, 3 * width), "c_proj": dense(width, width),
            "ln_2": norm(), "c_fc": dense(width, 4 * width), "c_out": dense(4 * width, width),
        }  # fmt: skip
    return tree


def kernels(params: Any) -> Any:
    """Dimension numbers of optax for the layers' kernels; Adam for all other leaves, as in `jaxsgd.muon`."""

    def numbers(path: Any, leaf: Any) -> Any:
        return optax.contrib.MuonDimensionNumbers(0, 1) if path[-1].key == "kernel" else None

    return jax.tree_util.tree_map_with_path(numbers, params)


def prepared(tx: Any, params: Any, grads: Any) -> Any:
    """A function that takes one step from where the last one ended and waits for it."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    now = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def run() -> float:
        begin = time.perf_counter()
        now[:] = jax.block_until_ready(compiled(*now, grads))
        return time.perf_counter() - begin

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    shapes = gpt2(args.layers, args.width, args.vocabulary)
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = treedef.unflatten(jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True))
    theirs = prepared(optax.contrib.muon(0.02, muon_weight_dimension_numbers=kernels), params, params)
    for name, tx in {"muon": jaxsgd.muon(0.02), "muon_jordan (bfloat16)": jaxsgd.muon_jordan(0.02)}.items():
        ours = prepared(tx, params, params)
        pairs = [(theirs(), ours()) for _ in range(args.runs)]
        before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name}: optax {before:.3f} s, jaxsgd {after:.3f} s a step: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
