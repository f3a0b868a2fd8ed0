"""Labelled loss curves from real trainings, and how well `jaxsgd.diagnosis.diagnose` names what is wrong with them.

    python benchmarks/verdict_curves.py            # the table, from the recorded curves
    python benchmarks/verdict_curves.py --check    # the same; fails where docs/verdicts.md says something else
    python benchmarks/verdict_curves.py --write    # writes docs/verdicts.md
    python benchmarks/verdict_curves.py --train    # trains again and writes tests/data/verdict_curves.npz (minutes)
    python benchmarks/verdict_curves.py --train-ordered  # only the curves whose batches come in a fixed order
    python benchmarks/verdict_curves.py --advice   # trains at 24 rates: does advice on the rate point to the best?

The label of a curve comes from its setting and from a sweep of learning rates over the same task, measured on all
training examples at the end, never from the shape of the curve (`label_of`). The tasks are split in two halves: the
thresholds were set on the first, "tuned", and the second, "held out", was looked at only then.
"""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsgd
from jaxsgd.diagnosis.diagnose import Diagnosis, diagnose
from jaxsgd.diagnosis.verdict import Verdict

VOCABULARY = 48
CURVES = pathlib.Path(__file__).parent.parent / "tests/data/verdict_curves.npz"
PAGE = pathlib.Path(__file__).parent.parent / "docs/verdicts.md"
BEGIN, END = "<!-- made by benchmarks/verdict_curves.py --write -->", "<!-- end of what is made -->"

# --- tasks: real data, small models -------------------------------------------------------------------------------


def mlp(sizes: tuple[int, ...], act: Callable[..., Any] = jax.nn.relu) -> Any:
    """``init(key)`` and ``apply(params, x)`` of a perceptron."""

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(sizes))
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=False)
        return [{"w": jax.random.normal(k, (a, b)) * np.sqrt(2 / a), "b": jnp.zeros(b)} for k, a, b in pairs]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = act(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return init, apply


def linear(inputs: int, outputs: int) -> Any:
    init, apply = mlp((inputs, outputs))
    return lambda key: jax.tree.map(jnp.zeros_like, init(key)), apply


def cnn(outputs: int = 10) -> Any:
    """Patches of 2 x 2, twice, and a head: 8 x 8 pixels to logits."""
    sizes = [(4, 16), (64, 32), (4 * 32, outputs)]

    def init(key: jax.Array) -> Any:
        pairs = zip(jax.random.split(key, 3), sizes, strict=True)
        return [{"w": jax.random.normal(k, s) * np.sqrt(2 / s[0]), "b": jnp.zeros(s[1])} for k, s in pairs]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 8, 8, 1)
        for layer in params[:-1]:
            n, side, _, depth = x.shape
            x = x.reshape(n, side // 2, 2, side // 2, 2, depth).transpose(0, 1, 3, 2, 4, 5)
            x = jax.nn.relu(x.reshape(n, side // 2, side // 2, 4 * depth) @ layer["w"] + layer["b"])
        return x.reshape(x.shape[0], -1) @ params[-1]["w"] + params[-1]["b"]

    return init, apply


def transformer(vocabulary: int, width: int = 24, context: int = 16) -> Any:
    """One block of attention and perceptron over characters; the embedding is also the head."""
    shapes = {"embed": (vocabulary, width), "place": (context, width), "qkv": (width, 3 * width), "out": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(shapes))
        return {n: jax.random.normal(k, s) * s[0] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def apply(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["embed"][tokens] * np.sqrt(vocabulary / width) + p["place"]
        q, k, v = jnp.split(norm(x) @ p["qkv"], 3, axis=-1)
        scores = jnp.einsum("bqd,bkd->bqk", q, k) / np.sqrt(width)
        scores = jnp.where(jnp.tril(jnp.ones((context, context), bool)), scores, -1e9)
        x = x + jax.nn.softmax(scores) @ v @ p["out"]
        x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
        return norm(x) @ p["embed"].T

    return init, apply


def cross_entropy(out: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()


def squares(out: jax.Array, y: jax.Array) -> jax.Array:
    return ((out - y) ** 2).mean()


@functools.cache
def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, shuffled once."""
    if name.startswith("text"):
        from pydoc_data.topics import topics

        text = "".join(topics.values()).lower()[:24_000]
        known = [c for c, _ in collections.Counter(text).most_common(VOCABULARY - 1)]
        ids = np.array([known.index(c) if c in known else VOCABULARY - 1 for c in text], np.int32)
        rows = np.stack([ids[i : i + 17] for i in range(0, len(ids) - 17, 17)])
        rows = rows[np.random.default_rng(0).permutation(len(rows))]
        return rows[:, :-1], rows[:, 1:]
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name.split('-')[0]}")(return_X_y=True)
    x = x / 16 if name.startswith("digits") else (x - x.mean(0)) / x.std(0)
    y = ((y - y.mean()) / y.std())[:, None] if name == "diabetes" else y
    if name == "digits-pixels":
        y = x
    if name.endswith("-regression"):
        y = 2.0 * (np.eye(10)[y] if name.startswith("digits") else y[:, None]) - 1
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].astype(np.float32), y[order].astype(np.int32 if y.ndim == 1 else np.float32)


class Task(NamedTuple):
    name: str
    data: str
    model: Any
    loss: Callable[..., Any]
    rule: Callable[..., Any]
    center: float
    batch: int | None
    steps: int


R, TANH = jaxsgd.RULES, jnp.tanh
TASKS = [
    Task("linear diabetes gd", "diabetes", linear(10, 1), squares, R["sgd"], 0.1, None, 200),
    Task("logistic cancer gd", "breast_cancer", linear(30, 2), cross_entropy, R["sgd"], 0.5, None, 250),
    Task("linear diabetes momentum 32", "diabetes", linear(10, 1), squares, R["momentum"], 0.01, 32, 200),
    Task("logistic cancer adam 32", "breast_cancer", linear(30, 2), cross_entropy, R["adam"], 0.02, 32, 200),
    Task("softmax digits sgd 64", "digits", linear(64, 10), cross_entropy, R["sgd"], 0.5, 64, 300),
    Task("softmax wine adam", "wine", linear(13, 3), cross_entropy, R["adam"], 0.05, None, 200),
    Task("perceptron digits adamw 64", "digits", mlp((64, 32, 10)), cross_entropy, R["adamw"], 5e-3, 64, 300),
    Task("perceptron digits momentum", "digits", mlp((64, 32, 10)), cross_entropy, R["momentum"], 0.05, None, 300),
    Task("tanh cancer rmsprop 32", "breast_cancer", mlp((30, 16, 2), TANH), cross_entropy, R["rmsprop"], 1e-3, 32, 250),
    Task("perceptron wine gd", "wine", mlp((13, 16, 3)), cross_entropy, R["sgd"], 0.1, None, 200),
    Task("cnn digits lion 64", "digits", cnn(), cross_entropy, R["lion"], 1e-3, 64, 300),
    Task("cnn digits adam 32", "digits", cnn(), cross_entropy, R["adam"], 3e-3, 32, 250),
    Task("perceptron diabetes adam", "diabetes", mlp((10, 32, 1)), squares, R["adam"], 0.01, None, 300),
    Task("characters adamw 32", "text", transformer(VOCABULARY), cross_entropy, R["adamw"], 5e-3, 32, 300),
    Task("autoencoder rmsprop 64", "digits-pixels", mlp((64, 16, 64), jnp.tanh), squares, R["rmsprop"], 2e-3, 64, 300),
    Task("perceptron digits sgd 32", "digits", mlp((64, 64, 32, 10)), cross_entropy, R["sgd"], 0.1, 32, 350),
    Task("characters momentum 32", "text", transformer(VOCABULARY), cross_entropy, R["momentum"], 0.05, 32, 250),
    Task("tanh digits gd", "digits", mlp((64, 32, 10), jnp.tanh), cross_entropy, R["sgd"], 0.3, None, 250),
    Task("linear cancer gd", "breast_cancer-regression", linear(30, 1), squares, R["sgd"], 0.05, None, 200),
    Task("linear digits momentum", "digits-regression", linear(64, 10), squares, R["momentum"], 0.02, None, 250),
]  # fmt: skip
HELD_OUT = frozenset(task.name for task in TASKS[1::2])
"""Every second one."""


# --- training -----------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What a run changes: all None is the plain training."""

    rule: Any = None
    steps: int | None = None
    examples: int | None = None  # train on so few, validate on others
    mislabelled: float = 0.0  # share of the training examples
    seed: int = 0
    start: Callable[[Any], Any] | None = None  # other parameters to start from
    scale: Any = None  # (steps,) inputs multiplied by
    wrong: Any = None  # (steps,) bool, the batch's targets shuffled
    kick: Any = None  # (steps,) noise added to the weights, relative to their size
    rates: Any = None  # (steps,) factors of the learning rate
    fixed_order: bool = False  # the same batches in the same order each epoch


PLAIN = Setting()


def train(task: Task, rates: Any, setting: Setting = PLAIN) -> dict[str, np.ndarray]:
    """Runs at several learning rates, side by side: arrays whose first axis is the rate's."""
    x, y = data(task.data)
    cut = int(0.8 * len(x))
    last = cut if setting.examples is None else setting.examples
    held_rows = 64 if task.data == "text" else 200
    (xs, ys), (xv, yv) = (x[:last], y[:last]), (x[cut:][:held_rows], y[cut:][:held_rows])
    if setting.mislabelled:
        wrong = np.random.default_rng(1).random(last) < setting.mislabelled
        ys = np.where(wrong.reshape(-1, *[1] * (ys.ndim - 1)), np.roll(ys, 1, axis=0), ys)
    steps, size = setting.steps or task.steps, task.batch and min(task.batch, last)
    rng = np.random.default_rng(setting.seed)
    if size is None:
        index = np.zeros((steps, 0), np.int32)
    else:
        epochs = -(-steps // (last // size))
        orders = [rng.permutation(last) for _ in range(1 if setting.fixed_order else epochs)]
        whole = [order[: last // size * size].reshape(-1, size) for order in np.resize(orders, (epochs, last))]
        index = np.concatenate(whole)[:steps].astype(np.int32)
    init, apply = task.model
    params = init(jax.random.key(setting.seed))
    params = params if setting.start is None else setting.start(params)
    xs, ys, xv, yv = (jnp.asarray(v) for v in (xs, ys, xv, yv))
    ones, zeros = np.ones(steps, np.float32), np.zeros(steps, np.float32)
    inputs = (
        jnp.asarray(index), *(jnp.asarray(zeros + v if v is not None else d) for v, d in (
            (setting.scale, ones), (setting.wrong, zeros), (setting.kick, zeros), (setting.rates, ones))),
        jax.random.split(jax.random.key(setting.seed + 1), steps),
    )  # fmt: skip

    spoiled = setting.scale is not None or setting.wrong is not None

    def loss_fn(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return task.loss(apply(p, x), y)

    def run(rate: jax.Array) -> Any:
        tx = (setting.rule or task.rule)(rate)

        def step(carry: Any, now: Any) -> Any:
            p, state = carry
            rows, scale, wrong, kick, factor, key = now
            bx, by = clean = (xs, ys) if size is None else (xs[rows], ys[rows])
            bx = jnp.where(scale == 1, bx, (bx * scale).astype(bx.dtype))
            by = jnp.where(wrong > 0, jnp.roll(by, 1, axis=0), by)
            loss, grads = jax.value_and_grad(loss_fn)(p, bx, by)
            excess = loss - loss_fn(p, *clean) if spoiled else jnp.zeros(())
            updates, state = tx.update(grads, state, p)
            updates = jax.tree.map(lambda u: u * factor, updates)
            noise = optax.tree.random_like(key, p)
            moved = optax.apply_updates(p, updates)
            moved = jax.tree.map(lambda m, e, o: m + kick * e * jnp.sqrt((o * o).mean()), moved, noise, p)
            norm = jnp.linalg.norm
            flat = jax.tree.leaves(
                jax.tree.map(
                    lambda g, u, w: jnp.stack(
                        [norm(g.ravel()), jnp.where(w.any(), norm(u.ravel()) / jnp.maximum(norm(w.ravel()), 1e-30), 0)]
                    ),
                    grads,
                    updates,
                    p,
                )
            )
            whole = jnp.concatenate([u.ravel() for u in jax.tree.leaves(updates)])
            mark = whole[:: max(1, whole.size // 500)]  # a sample of the step's direction
            return (moved, state), (loss, loss_fn(p, xv, yv), jnp.stack(flat), mark, excess)

        (p, _), (loss, validation, layers, marks, excess) = jax.lax.scan(step, (params, tx.init(params)), inputs)
        return {"loss": loss, "validation": validation, "layers": layers, "marks": marks, "excess": excess,
                "full": loss_fn(p, xs, ys),
                "start": loss_fn(params, xs, ys)}  # fmt: skip

    out = jax.jit(jax.vmap(run))(jnp.asarray(np.atleast_1d(rates), jnp.float32))
    return {name: np.asarray(value) for name, value in out.items()}


class Curve(NamedTuple):
    task: str
    setting: str
    label: str
    loss: np.ndarray
    best_known: float
    validation: np.ndarray | None = None  # every tenth step
    layers: np.ndarray | None = None  # (steps, leaves, 2): gradient norms, update ratios


GRID = 2.0 ** np.arange(-14, 10)


def turning(marks: np.ndarray, whole: bool = False) -> float:
    """How far the steps turn back: the lowest mean cosine of steps some lag apart, in its second half."""
    marks = marks[0 if whole else len(marks) // 2 :].astype(np.float64)
    unit = marks / np.maximum(np.linalg.norm(marks, axis=1, keepdims=True), 1e-300)
    gram = unit @ unit.T
    return min(np.diagonal(gram, lag).mean() for lag in range(1, len(gram) // 2))


def dead(params: Any) -> Any:
    """Hidden units that no example reaches."""
    return [{**layer, "b": layer["b"] - 10.0} for layer in params[:-1]] + params[-1:]


def zeroed(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def label_of(reached: float, rate: float, best_rate: float, turns: float) -> str | None:
    """What a plain run deserves; None where it is between two labels.

    Args:
      reached: its share of the fall that the best rate brings, of the loss on all training examples.
      turns: see `turning`; of runs without minibatches only, in which noise does not turn the steps.
    """
    if not np.isfinite(reached) or (reached < 0.05 and rate > best_rate):
        return "diverged"
    if turns < -0.4 and reached < 0.95 and rate > best_rate:
        return "oscillating"
    if reached >= 0.95:
        return "good"
    if 0.05 <= reached <= 0.5 and rate <= best_rate / 30:
        return "too slow"
    return None


def curves_of(task: Task) -> list[Curve]:
    """Every labelled curve of one task."""
    rates = task.center * GRID
    swept = train(task, rates)
    full = np.where(np.isfinite(swept["full"]), swept["full"], np.inf)
    top = int(full.argmin())
    start, best, best_rate = swept["start"][0], full[top], rates[top]
    known = float(np.mean(swept["loss"][top, -task.steps // 10 :]))
    out: list[Curve] = []

    def add(
        label: str, run: dict[str, np.ndarray], row: int, what: str, layers: bool = False, held: bool = False
    ) -> None:
        validation = run["validation"][row, ::10] if held else None
        seen = run["layers"][row].astype(np.float16) if layers else None
        out.append(Curve(task.name, what, label, run["loss"][row], known, validation, seen))

    turns = [turning(np.nan_to_num(m)) if task.batch is None else 0.0 for m in swept["marks"]]
    labels = [label_of((start - full[i]) / (start - best), rates[i], best_rate, turns[i]) for i in range(len(rates))]
    print(task.name, f"start {start:.3g} best {best:.3g} at {best_rate:.3g}", labels, flush=True)
    wanted = {"good": [top, top - 2], "diverged": [], "too slow": [], "oscillating": []}
    for label, rows in wanted.items():
        found = [i for i, x in enumerate(labels) if x == label]
        if label == "diverged":
            rows += [found[0], found[min(2, len(found) - 1)]] if found else []
        elif label == "too slow":
            rows += [found[-1], found[max(0, len(found) - 4)]] if found else []
        elif label == "oscillating":
            rows += found[:2]
        for row in dict.fromkeys(rows):
            if labels[row] == label:
                rises = swept["validation"][row]
                fine = label == "good" and rises[-1] - rises.min() < 0.03 * (rises[0] - rises.min())
                add(label, swept, row, f"rate {rates[row] / best_rate:.3g} of the best", held=fine)
    for what, label, rate, setting in planted(task, best_rate):
        run = train(task, rate, setting)
        low = best if setting.examples is None else 0.0
        reached, held = (run["start"][0] - run["full"][0]) / (start - low), run["validation"][0]
        blocks = [block.mean() for block in np.array_split(held, 20)]
        rose = (np.mean(blocks[-2:]) - min(blocks)) / (held[0] - min(blocks) + 1e-9)
        at = np.flatnonzero(np.zeros(1) if setting.kick is None else setting.kick) + 1
        thrown = (held[at] - held[at - 1]).max(initial=0) / max(held[0] - held.min(), 1e-9)
        excess = run["excess"][0].max() / (start - best)
        turns = turning(run["marks"][0], whole=True)
        holds = {
            "good": reached >= 0.95,
            "oscillating": turns < -0.3 and reached > 0.05 and (what.startswith("momentum") or reached < 0.95),
            "spikes": reached >= 0.7 and max(thrown / 2, excess) > 0.25,
            "stuck": abs(reached) < 0.01,
            "plateau": 0.05 < reached < 0.7,
            "overfitting": rose > 0.1,
        }[label]  # the setting alone does not make it so
        print(
            f"  {what}: {label} {holds}, reached {reached:.3g}, turns {turns:.2f}, validation rose {rose:.2f}",
            flush=True,
        )
        if holds:
            add(label, run, 0, what, layers=what.startswith(("dead", "weights")), held=label == "overfitting")
    return out


ORDERED = "batches in a fixed order"


def ordered_curves_of(task: Task) -> list[Curve]:
    """Runs whose batches come in the same order each epoch, labelled by a sweep of such runs: a rhythm that is none of
    the optimizer's."""
    if task.batch is None:
        return []
    rates = task.center * GRID
    swept = train(task, rates, Setting(fixed_order=True))
    full = np.where(np.isfinite(swept["full"]), swept["full"], np.inf)
    top = int(full.argmin())
    start, best, best_rate = swept["start"][0], full[top], rates[top]
    known = float(np.mean(swept["loss"][top, -task.steps // 10 :]))
    out = []
    for row in (top, top - 2, top - 1):
        label = label_of((start - full[row]) / (start - best), rates[row], best_rate, 0.0)
        print(f"  {task.name}, {ORDERED}, rate {rates[row] / best_rate:.3g} of the best: {label}", flush=True)
        if label is not None and len(out) < 2:
            what = f"{ORDERED}, rate {rates[row] / best_rate:.3g} of the best"
            out.append(Curve(task.name, what, label, swept["loss"][row], known))
    return out


DIRECTIONS = {Verdict.DIVERGED: -1, Verdict.OSCILLATING: -1, Verdict.TOO_SLOW: 1, Verdict.STUCK: 1}
"""Where advice on the learning rate points."""


def direction(said: Diagnosis) -> int:
    """1 for advice to raise the rate, -1 to lower it, 0 for none."""
    return 0 if "not too low" in said.advice else DIRECTIONS.get(said.verdict, 0)


def advice_of(task: Task) -> collections.Counter[str]:
    """Runs at all rates of a sweep, shuffled and in a fixed order: what was advised, and how often the sweep says the
    opposite."""
    rates, count = task.center * GRID, collections.Counter()
    for size in (32, 96):
        for ordered in (False, True):
            swept = train(task._replace(batch=size), rates, Setting(fixed_order=ordered, seed=3))
            full = np.where(np.isfinite(swept["full"]), swept["full"], np.inf)
            top = int(full.argmin())
            for i, loss in enumerate(swept["loss"]):
                said = diagnose(loss)
                way = direction(said)
                count["runs"] += 1
                count["advice on the rate"] += way != 0
                count["of it the wrong way"] += way > 0 and i >= top or way < 0 and i <= top
                if i <= top and swept["start"][i] - full[i] >= 0.95 * (swept["start"][i] - full[top]):
                    rings = any(f.verdict is Verdict.OSCILLATING for f in said.findings)
                    kind = "in a fixed order" if ordered else "shuffled"
                    count[f"good runs, {kind}"] += 1
                    count[f"of them called oscillating, {kind}"] += rings
    return count


def planted(task: Task, best: float) -> list[tuple[str, str, float, Setting]]:
    """Runs that are changed in a known way: what, the label, the learning rate, the change."""
    n, place = task.steps, TASKS.index(task)
    text, layered = task.data == "text", "linear" not in task.name and task.data != "text"
    layered &= not task.name.startswith(("logistic", "softmax"))
    at = np.zeros(n, np.float32)
    at[[int(0.41 * n), int(0.6 * n), int(0.83 * n)]] = 1
    out = [("best rate, 5 times as long", "good", best, Setting(steps=5 * n))] if not text else []
    heavy = functools.partial(R["momentum"], momentum=0.99)
    if not text and "adam" not in task.name and "lion" not in task.name and "rmsprop" not in task.name:
        rate = best / (4 if task.rule is R["momentum"] else 8)
        out += [(f"momentum 0.99, rate {share:.2g} of the best", "oscillating", rate * share, Setting(heavy))
                for share in (0.1, 0.4, 1.0)]  # fmt: skip
    if task.batch is None:  # between the rates of the sweep, where training is at the edge of what is stable
        out += [(f"rate {share} of the best", "oscillating", best * share, PLAIN) for share in (1.25, 1.5, 3.0)]
        bouncing = functools.partial(R["lion"], weight_decay=0.0)
        out += [(f"lion at {rate}", "oscillating", rate, Setting(bouncing)) for rate in (0.01, 0.1)]
    spikes = {
        "inputs times 30": Setting(scale=1 + 29 * at), "wrong targets": Setting(wrong=at),
        "noise on the weights": Setting(kick=2.0 * at),
    }  # fmt: skip
    kinds = list(spikes)[1:] if text else list(spikes)
    for kind in (kinds[place % len(kinds)], kinds[(place + 1) % len(kinds)]):
        out.append((f"{kind} in 3 steps", "spikes", best / 8, spikes[kind]))
    if place % 3 == 0:
        out.append(("learning rate 0", "stuck", 0.0, Setting()))
    if layered:
        out.append(("dead hidden units", "stuck", best / 4, Setting(start=dead)))
        out.append(("weights start at 0", "stuck", best / 4, Setting(start=zeroed)))
    decayed = np.clip(1 - np.arange(n) / (n * (0.1 if place % 2 else 0.2)), 0, 1).astype(np.float32)
    out.append(("rate decays to 0 too early", "plateau", best / 16, Setting(rates=decayed)))
    if layered or text:
        few = {"breast_cancer": 40, "wine": 20}.get(task.data, 60)
        out.append((f"{few} examples", "overfitting", best / 2, Setting(examples=few, steps=2 * n)))
        if task.data in ("digits", "breast_cancer", "wine"):
            what = f"{2 * few} examples, 3 of 10 mislabelled"
            out.append((what, "overfitting", best / 4, Setting(examples=2 * few, mislabelled=0.3)))
    return out


# --- the recorded curves and the page -----------------------------------------------------------------------------


def save(curves: list[Curve]) -> None:
    arrays: dict[str, Any] = {"names": np.array([[c.task, c.setting, c.label] for c in curves])}
    arrays["best_known"] = np.array([c.best_known for c in curves])
    for i, c in enumerate(curves):
        arrays |= {f"{name}/{i}": v for name, v in c._asdict().items() if isinstance(v, np.ndarray)}
    CURVES.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(CURVES, **arrays)


def load() -> list[Curve]:
    with np.load(CURVES) as file:
        names, known = file["names"], file["best_known"]
        parts = [[file.get(f"{name}/{i}") for name in ("loss", "validation", "layers")] for i in range(len(names))]
    return [
        Curve(*map(str, row), loss, float(best), validation, layers)
        for row, best, (loss, validation, layers) in zip(names, known, parts, strict=True)
    ]


def half_of(curve: Curve) -> str:
    return "held out" if curve.task in HELD_OUT else "tuned"


def judged(curves: list[Curve], told: bool) -> list[tuple[Curve, Diagnosis]]:
    """Each curve with its diagnosis. Plateaus are left out where the best known loss is not told: see the page."""
    out = []
    for curve in curves:
        if curve.label == "plateau" and not told:
            continue
        history: dict[str, Any] = {"loss": curve.loss}
        if curve.layers is not None:
            for i in range(curve.layers.shape[1]):
                history[f"gradient_norm/{i}"], history[f"update_ratio/{i}"] = curve.layers[:, i].T
        known = curve.best_known if told else None
        out.append((curve, diagnose(history, validation=curve.validation, best_known=known)))
    return out


def matrix(rows: list[tuple[Curve, Diagnosis]]) -> str:
    """The confusion matrix as a Markdown table: a row for each label, a column for each verdict."""
    labels = [v for v in Verdict.of_curves() if any(c.label == v for c, _ in rows)]
    columns = [v for v in Verdict.of_curves() if v in labels or any(d.verdict == v for _, d in rows)]
    lines = ["| label \\ verdict | " + " | ".join(columns) + " | right |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for label in labels:
        said = [d.verdict for c, d in rows if c.label == label]
        cells = [str(said.count(v)) if v in said else "" for v in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {said.count(label)} of {len(said)} |")
    return "\n".join(lines)


def accuracy(rows: list[tuple[Curve, Diagnosis]]) -> str:
    right = sum(c.label == d.verdict for c, d in rows)
    return f"{right} of {len(rows)} ({right / max(1, len(rows)):.1%})"


def page() -> str:
    curves = load()
    text = PAGE.read_text() if PAGE.exists() else f"{BEGIN}\n{END}\n"
    lines = [f"{len(curves)} curves of {len({c.task for c in curves})} tasks.", ""]
    lines += ["| input | tuned half | held-out half | all |", "| --- | ---: | ---: | ---: |"]
    both = {
        "losses (and validation, layers where recorded)": judged(curves, False),
        "`best_known` too": judged(curves, True),
    }
    for told, rows in both.items():
        halves = [[r for r in rows if half_of(r[0]) == half] for half in ("tuned", "held out")]
        lines.append(f"| {told} | " + " | ".join(accuracy(r) for r in (*halves, rows)) + " |")
    for told, rows in both.items():
        lines += ["", f"### Input: {told}", "", matrix(rows), "", "The curves with a wrong verdict:", ""]
        lines += ["| task | setting | half | label | verdict | text of the report |", "|" + " --- |" * 6]
        lines += [
            f"| {c.task} | {c.setting} | {half_of(c)} | {c.label} | {d.verdict} | {d.findings[0].text} |"
            for c, d in rows
            if c.label != d.verdict
        ]
    made = "\n".join(lines)
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{made}\n" + text[text.index(END) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    for name in ("train", "train-ordered", "advice", "write", "check"):
        action.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--tasks", default="", help="with --train or --advice: only those whose name has this in it")
    args = parser.parse_args()
    if args.train or args.train_ordered:
        chosen = [task for task in TASKS if args.tasks in task.name]
        names = {task.name for task in chosen}
        again = lambda c: c.task in names and (args.train or c.setting.startswith(ORDERED))  # noqa: E731
        made = [c for c in load() if not again(c)] if args.tasks or args.train_ordered else []
        for task in chosen:
            begin = time.perf_counter()
            made += [*(curves_of(task) if args.train else []), *ordered_curves_of(task)]
            print(f"  {time.perf_counter() - begin:.0f} s", flush=True)
            order = [task.name for task in TASKS]
            save(sorted(made, key=lambda c: order.index(c.task)))
        return 0
    if args.advice:
        total: collections.Counter[str] = collections.Counter()
        for task in TASKS:
            if args.tasks in task.name:
                total.update(advice_of(task))
                print(task.name, dict(total), flush=True)
        return 0
    wanted = page()
    if args.write:
        PAGE.write_text(wanted)
    elif args.check and wanted != PAGE.read_text():
        print(f"{PAGE.name} is out of date; run python benchmarks/verdict_curves.py --write", file=sys.stderr)
        return 1
    print(wanted[wanted.index(BEGIN) + len(BEGIN) : wanted.index(END)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
