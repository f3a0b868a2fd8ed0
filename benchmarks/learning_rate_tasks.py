"""Small trainings on real data, to try learning rate tools on.

    task = TASKS["digits cnn adamw"]()
    jaxsgd.probe(task.loss_fn, task.init(jax.random.key(0)), task.data(0), task.rule, steps=task.steps)

Every task is a data set, a model, a rule, a batch size and a budget of steps. The data come from scikit-learn (tables,
digits, two photographs), from Python (its help topics and its sources) and from vega_datasets (`pip install
jaxsgd[benchmarks]`; without it its tasks are left out). Thresholds of the probe may look at the data sets in `DESIGN`
only. No task on the others had been run before they were fixed.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import jaxsgd

Params = Any
Loss = Callable[[Params, dict[str, Any], jax.Array], jax.Array]


@dataclass(frozen=True)
class Task:
    """A training with everything but the learning rate.

    Attributes:
      name: data set, model, rule.
      data_set: the name of the data set.
      init: ``key -> params``.
      loss_fn: ``(params, batch, key) -> loss``.
      metric: ``(params, batch) -> scalar`` on held-out examples: accuracy, or the part of the variance explained.
      data: ``seed -> (step -> batch)``.
      whole: a batch of all training examples, or a large sample of a text.
      test: a batch of held-out examples.
      rule: ``learning_rate -> gradient transformation``.
      steps: steps of one full training.
    """

    name: str
    data_set: str
    init: Callable[[jax.Array], Params]
    loss_fn: Loss
    metric: Callable[[Params, Any], jax.Array]
    data: Callable[[int], Callable[[int], Any]]
    whole: Any
    test: Any
    rule: Callable[[Any], optax.GradientTransformation]
    steps: int


# Data: each set is a pair of batches, training and held-out examples


def split(x: np.ndarray, y: np.ndarray, raw: bool = False) -> tuple[Any, Any]:
    """Four fifths to train on, shuffled once. Columns get mean 0 and deviation 1 unless ``raw``; real targets too."""
    order = np.random.default_rng(0).permutation(len(x))
    x, y = np.asarray(x, np.float64)[order], np.asarray(y)[order]
    if not raw:
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    y = ((y - y.mean(0)) / y.std(0)).astype(np.float32) if y.dtype.kind == "f" else y.astype(np.int32)
    cut = len(x) - len(x) // 5
    x = x.astype(np.float32)
    return {"x": x[:cut], "y": y[:cut]}, {"x": x[cut:], "y": y[cut:]}


@functools.cache
def table(name: str, raw: bool = False) -> tuple[Any, Any]:
    """A table of scikit-learn; the pixels of digits lie in [0, 1]."""
    bunch: Any = getattr(datasets, f"load_{name}")()
    if name == "digits":
        return split(bunch.data / 16, bunch.target, raw=True)
    y = bunch.target.astype(float) if name in ("diabetes", "linnerud") else bunch.target
    return split(bunch.data, y, raw)


def vega(name: str) -> list[dict[str, Any]]:
    """The rows of a file of vega_datasets."""
    spec = importlib.util.find_spec("vega_datasets")
    assert spec is not None and spec.origin is not None
    text = (pathlib.Path(spec.origin).parent / "_data" / name).read_text()
    return json.loads(text) if name.endswith("json") else list(csv.DictReader(text.splitlines()))


def classes_of(values: list[str]) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


@functools.cache
def cars(raw: bool = False, of: str = "mileage") -> tuple[Any, Any]:
    """406 cars: the mileage, or the origin, from weight, power, displacement, cylinders, acceleration and year."""
    names = ["Weight_in_lbs", "Horsepower", "Displacement", "Cylinders", "Acceleration", "Miles_per_Gallon"]
    rows = [row for row in vega("cars.json") if all(row[name] is not None for name in names)]
    x = np.array([[float(row[n]) for n in names[:5]] + [float(row["Year"][:4]) - 1970] for row in rows])
    if of == "origin":
        return split(x, classes_of([row["Origin"] for row in rows]), raw)
    return split(x, np.array([float(row["Miles_per_Gallon"]) for row in rows]), raw)


@functools.cache
def weather(of: str = "kind", raw: bool = False) -> tuple[Any, Any]:
    """1,461 days in Seattle: the kind of weather, or the warmest hour, from the other columns and the season."""
    rows = vega("seattle-weather.csv")
    day = np.array([int(row["date"][5:7]) + int(row["date"][8:10]) / 31 for row in rows]) * 2 * np.pi / 12
    columns = ["precipitation", "temp_min", "wind"] + (["temp_max"] if of == "kind" else [])
    x = np.array([[float(row[name]) for name in columns] for row in rows])
    x = np.column_stack([x, np.sin(day), np.cos(day)])
    kinds = classes_of([row["weather"] for row in rows])
    return split(x, kinds if of == "kind" else np.array([float(row["temp_max"]) for row in rows]), raw)


@functools.cache
def airports() -> tuple[Any, Any]:
    """Airports: the state, of the nineteen with most on the mainland, from latitude and longitude."""
    rows = [row for row in vega("airports.csv") if row["state"] and row["country"] == "USA"]
    names, counts = np.unique([row["state"] for row in rows], return_counts=True)
    common = set(names[np.argsort(-counts)[:20]]) - {"AK", "HI"}
    rows = [row for row in rows if row["state"] in common]
    x = np.array([[float(row["latitude"]), float(row["longitude"])] for row in rows])
    return split(x, classes_of([row["state"] for row in rows]))


@functools.cache
def barley() -> tuple[Any, Any]:
    """120 fields of barley: the yield from variety, site and year."""
    rows = vega("barley.json")
    hot = [np.eye(20)[classes_of([str(row[name]) for row in rows])] for name in ("variety", "site", "year")]
    x = np.concatenate(hot, axis=1)
    return split(x[:, x.any(0)], np.array([float(row["yield"]) for row in rows]))


@functools.cache
def photograph(index: int, task: str) -> tuple[Any, Any]:
    """A photograph of scikit-learn, a quarter as wide: colours from places, or the middle of noisy or holed patches."""
    image = datasets.load_sample_images().images[index][::4, ::4].astype(np.float64) / 255
    rng = np.random.default_rng(1)
    if task == "places":
        places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[:2]), indexing="ij"), -1)
        places = places.reshape(-1, 2)
        waves = np.concatenate([f(np.pi * k * places) for k in (1, 2, 4, 8) for f in (np.sin, np.cos)], axis=1)
        return split(np.concatenate([places, waves], axis=1), image.reshape(-1, 3), raw=True)
    patches = np.lib.stride_tricks.sliding_window_view(image.mean(-1), (5, 5)).reshape(-1, 25)
    patches = patches[rng.permutation(len(patches))[:4000]]
    middle = patches[:, 12].copy()
    if task == "noise":
        patches = patches + 0.1 * rng.normal(size=patches.shape)
    else:
        patches = np.delete(patches, [6, 7, 8, 11, 12, 13, 16, 17, 18], axis=1)
    return split(patches, middle, raw=task == "hole")


@functools.cache
def text(which: str) -> np.ndarray:
    """Python's help topics, or sources of its library, as ids below 64; rare characters are 0."""
    if which == "topics":
        from pydoc_data.topics import topics

        whole = "\n".join(topics[name] for name in sorted(topics))
    else:
        folder = pathlib.Path(json.__file__).parent.parent
        whole = "\n".join((folder / name).read_text() for name in ("argparse.py", "ast.py", "inspect.py", "tarfile.py"))
    characters, counts = np.unique(np.array(list(whole)), return_counts=True)
    common = characters[np.argsort(-counts, kind="stable")[:63]]
    ids = {c: i + 1 for i, c in enumerate(common)}
    return np.array([ids.get(c, 0) for c in whole], np.int32)


def minibatches(data: dict[str, np.ndarray], size: int | None) -> Callable[[int], Callable[[int], Any]]:
    """Batches in epochs, in another order each time; without a size the whole set each step."""
    count = len(data["y"])
    if size is None:
        return lambda seed: lambda step: data

    @functools.lru_cache(maxsize=4)
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    def at(seed: int, step: int) -> Any:
        epoch, place = divmod(step, count // size)
        index = order(seed, epoch)[place * size : (place + 1) * size]
        return {name: array[index] for name, array in data.items()}

    return lambda seed: functools.partial(at, seed)


def windows(which: str, size: int, context: int, test: bool = False) -> Callable[[int], Callable[[int], Any]]:
    """Windows of the text from random places; the last tenth of the text is held out."""

    def at(seed: int, step: int) -> Any:
        ids = text(which)
        cut = len(ids) - len(ids) // 10
        ids = ids[cut:] if test else ids[:cut]
        starts = np.random.default_rng([seed, step]).integers(0, len(ids) - context - 1, size)
        return {"tokens": ids[starts[:, None] + np.arange(context + 1)]}

    return lambda seed: functools.partial(at, seed)


# Models: init(key) and apply(params, x, key)


def dense(key: jax.Array, inputs: int, outputs: int, gain: float = 1.0) -> dict[str, jax.Array]:
    scale = gain / np.sqrt(inputs)
    return {"w": scale * jax.random.normal(key, (inputs, outputs)), "b": jnp.zeros((outputs,))}


def affine(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def normed(x: jax.Array, axis: int) -> jax.Array:
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 1e-5)


def mlp(
    *sizes: int, act: Callable = jax.nn.relu, norm: int | None = None, drop: float = 0.0, gain: float = 1.4
) -> tuple[Any, Any]:
    """Dense layers; ``norm=0`` norms hidden units over the batch, ``norm=-1`` over the layer."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(sizes) - 1)
        gains = [gain] * (len(sizes) - 2) + [1.0 if len(sizes) > 2 else 0.0]
        layers = [dense(k, a, b, g) for k, a, b, g in zip(keys, sizes[:-1], sizes[1:], gains, strict=True)]
        if norm is not None:
            for layer, width in zip(layers[:-1], sizes[1:-1], strict=True):
                layer["scale"] = jnp.ones((width,))
        return layers

    def apply(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
        for i, layer in enumerate(params[:-1]):
            x = affine(layer, x)
            x = act(x if norm is None else normed(x, norm) * layer["scale"])
            if drop:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - drop, x.shape)
                x = jnp.where(kept, x / (1 - drop), 0.0)
        return affine(params[-1], x)

    return init, apply


def cnn(*channels: int) -> tuple[Any, Any]:
    """3 x 3 convolutions with stride 2 on images of 8 x 8, the mean over the image, a dense head of 10."""

    def init(key: jax.Array) -> Params:
        keys, pairs = jax.random.split(key, len(channels) + 1), zip((1, *channels), channels, strict=False)
        kernels = [jax.random.normal(k, (3, 3, a, b)) * np.sqrt(2 / (9 * a)) for k, (a, b) in zip(keys, pairs)]  # noqa: B905
        return {"conv": kernels, "head": dense(keys[-1], 4 * channels[-1], 10)}

    def apply(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
        x = x.reshape(-1, 8, 8, 1)
        for kernel in params["conv"]:
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x)
        return affine(params["head"], x.reshape(x.shape[0], -1))

    return init, apply


def transformer(width: int, heads: int, layers: int, context: int) -> tuple[Any, Any]:
    """A causal transformer with norms before each part; tokens to 64 logits."""

    def init(key: jax.Array) -> Params:
        k = iter(jax.random.split(key, 2 + 4 * layers))
        out = {
            "embed": jax.random.normal(next(k), (64, width)) * 0.1,
            "position": jax.random.normal(next(k), (context, width)) * 0.1,
        }
        blocks = [
            {
                "qkv": dense(next(k), width, 3 * width), "out": dense(next(k), width, width, 0.5),
                "up": dense(next(k), width, 4 * width), "down": dense(next(k), 4 * width, width, 0.5),
            }
            for _ in range(layers)
        ]  # fmt: skip
        return {**out, "blocks": blocks}

    def apply(params: Params, tokens: jax.Array, key: jax.Array) -> jax.Array:
        x = params["embed"][tokens] + params["position"][None, : tokens.shape[1]]
        shape = (*tokens.shape, heads, width // heads)
        for block in params["blocks"]:
            q, k, v = (part.reshape(shape) for part in jnp.split(affine(block["qkv"], normed(x, -1)), 3, axis=-1))
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + affine(block["out"], mixed.reshape(x.shape))
            x = x + affine(block["down"], jax.nn.gelu(affine(block["up"], normed(x, -1))))
        return normed(x, -1) @ params["embed"].T

    return init, apply


def rnn(width: int) -> tuple[Any, Any]:
    """A plain recurrent network with tanh; tokens to 64 logits."""

    def init(key: jax.Array) -> Params:
        a, b, c = jax.random.split(key, 3)
        return {
            "embed": 0.5 * jax.random.normal(a, (64, width)),
            "turn": dense(b, width, width),
            "head": dense(c, width, 64),
        }

    def apply(params: Params, tokens: jax.Array, key: jax.Array) -> jax.Array:
        def turn(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(x + affine(params["turn"], h))
            return h, h

        x = jnp.swapaxes(params["embed"][tokens], 0, 1)
        _, hidden = jax.lax.scan(turn, jnp.zeros_like(x[0]), x)
        return affine(params["head"], jnp.swapaxes(hidden, 0, 1))

    return init, apply


def bigram() -> tuple[Any, Any]:
    """A table of logits of the next character."""
    return lambda key: jnp.zeros((64, 64)), lambda params, tokens, key: params[tokens]


def window_mlp(context: int, width: int, hidden: int) -> tuple[Any, Any]:
    """The last characters' embeddings side by side through one hidden layer."""
    begin, rest = mlp(context * width, hidden, 64)

    def init(key: jax.Array) -> Params:
        return {"embed": jax.random.normal(key, (64, width)), "mlp": begin(jax.random.fold_in(key, 1))}

    def apply(params: Params, tokens: jax.Array, key: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        return rest(params["mlp"], x.reshape(x.shape[0], -1), key)[:, None]

    return init, apply


# Losses: of an apply function


def classes(apply: Any) -> Loss:
    def loss_fn(params: Params, batch: dict[str, Any], key: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch["x"], key), batch["y"]).mean()

    return loss_fn


def squares(apply: Any) -> Loss:
    return lambda params, batch, key: jnp.square(
        apply(params, batch["x"], key) - batch["y"].reshape(len(batch["y"]), -1)
    ).mean()


def itself(apply: Any) -> Loss:
    return lambda params, batch, key: jnp.square(apply(params, batch["x"], key) - batch["x"]).mean()


def next_character(apply: Any) -> Loss:
    def loss_fn(params: Params, batch: dict[str, Any], key: jax.Array) -> jax.Array:
        tokens = batch["tokens"]
        logits = apply(params, tokens[:, :-1], key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, -logits.shape[1] :]).mean()

    return loss_fn


def accuracy(apply: Any) -> Callable[[Params, Any], jax.Array]:
    def metric(params: Params, batch: Any) -> jax.Array:
        key = jax.random.key(0)
        if "tokens" in batch:
            logits = apply(params, batch["tokens"][:, :-1], key)
            return (logits.argmax(-1) == batch["tokens"][:, -logits.shape[1] :]).mean()
        return (apply(params, batch["x"], key).argmax(-1) == batch["y"]).mean()

    return metric


def explained(loss: Any, target: str) -> Callable[[Params, Any], jax.Array]:
    """The part of the variance of the target that the model explains."""

    def metric(params: Params, batch: Any) -> jax.Array:
        return 1 - loss(params, batch, jax.random.key(0)) / jnp.square(batch[target] - batch[target].mean(0)).mean()

    return metric


# Rules that are more than a name


def clipped(rule: Any, norm: float) -> Any:
    return lambda learning_rate: optax.chain(optax.clip_by_global_norm(norm), rule(learning_rate))


def cosine(rule: Any, steps: int) -> Any:
    return lambda learning_rate: rule(optax.cosine_decay_schedule(learning_rate, steps))


def warmed(rule: Any, steps: int) -> Any:
    """A tenth of warm-up, then a cosine."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return lambda learning_rate: rule(lambda count: learning_rate * shape(count))


def one_cycle(rule: Any, steps: int) -> Any:
    """One cycle to the rate and down; optax's function tests its peak in Python."""
    shape = optax.cosine_onecycle_schedule(steps, 1.0)
    return lambda learning_rate: rule(lambda count: learning_rate * shape(count))


TASKS: dict[str, Callable[[], Task]] = {}
"""Every task by name, made when called."""


def _table(name: str, data: Callable[[], Any], size: int | None, model: Any, loss: Any, rule: Any, steps: int) -> None:
    def make() -> Task:
        train, test = data()
        loss_fn = loss(model[1])
        metric = accuracy(model[1]) if loss is classes else explained(loss_fn, "x" if loss is itself else "y")
        batches = minibatches(train, size)
        return Task(name, name.split()[0], model[0], loss_fn, metric, batches, train, test, rule, steps)

    TASKS[name] = make


def _text(name: str, size: int, context: int, model: Any, rule: Any, steps: int) -> None:
    which = name.split()[0]

    def make() -> Task:
        whole = windows(which, 256, context)(10_000)(0)
        test = windows(which, 256, context, test=True)(10_000)(0)
        batches = windows(which, size, context)
        metric = accuracy(model[1])
        return Task(name, which, model[0], next_character(model[1]), metric, batches, whole, test, rule, steps)

    TASKS[name] = make


def _rows(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


tanh = jnp.tanh
_digits, _cancer, _diabetes = (_rows(table, name) for name in ("digits", "breast_cancer", "diabetes"))
_wine, _iris, _china = _rows(table, "wine"), _rows(table, "iris"), functools.partial(photograph, 0)
_table("digits softmax sgd", _digits, 64, mlp(64, 10), classes, jaxsgd.sgd, 500)
_table("digits mlp sgd full", _digits, None, mlp(64, 24, 10), classes, jaxsgd.sgd, 150)
_table("digits mlp adam", _digits, 32, mlp(64, 32, 10), classes, jaxsgd.adam, 600)
_table("digits tanh momentum", _digits, 32, mlp(64, 32, 32, 10, act=tanh, gain=1.0), classes, jaxsgd.momentum, 400)
_table("digits cnn adamw", _digits, 16, cnn(4, 8), classes, jaxsgd.adamw, 200)
_table("digits mlp momentum cosine", _digits, 32, mlp(64, 32, 10), classes, cosine(jaxsgd.momentum, 500), 500)
_table("digits code adam", _digits, 32, mlp(64, 32, 8, 32, 64), itself, jaxsgd.adam, 800)
_table("digits code muon", _digits, 32, mlp(64, 24, 64, act=tanh, gain=1.0), itself, jaxsgd.muon, 300)
_table("digits batchnorm sgd", _digits, 64, mlp(64, 32, 32, 10, norm=0), classes, jaxsgd.sgd, 400)
_table("digits layernorm lion", _digits, 32, mlp(64, 32, 32, 10, norm=-1), classes, jaxsgd.lion, 400)
_table("digits deep rmsprop", _digits, 32, mlp(64, 32, 32, 32, 10), classes, jaxsgd.rmsprop, 400)
_table("digits dropout adamw", _digits, 32, mlp(64, 48, 10, drop=0.3), classes, jaxsgd.adamw, 1000)
_table("digits mlp adamw one cycle", _digits, 32, mlp(64, 32, 10), classes, one_cycle(jaxsgd.adamw, 300), 300)
_table("cancer logistic sgd full", _cancer, None, mlp(30, 2), classes, jaxsgd.sgd, 300)
_table("cancer mlp adagrad", _cancer, 32, mlp(30, 16, 2), classes, jaxsgd.adagrad, 400)
_table("cancer raw adam", _rows(table, "breast_cancer", True), 64, mlp(30, 2), classes, jaxsgd.adam, 500)
_table("cancer logistic lion", _cancer, 16, mlp(30, 2), classes, jaxsgd.lion, 600)
_table("cancer batchnorm momentum", _cancer, 64, mlp(30, 16, 16, 2, norm=0), classes, jaxsgd.momentum, 300)
_table("wine tanh momentum full", _wine, None, mlp(13, 16, 3, act=tanh), classes, jaxsgd.momentum, 200)
_table("wine softmax adagrad", _wine, 16, mlp(13, 3), classes, jaxsgd.adagrad, 500)
_table("wine mlp adafactor full", _wine, None, mlp(13, 16, 3), classes, jaxsgd.adafactor, 200)
_table("wine raw adamw", _rows(table, "wine", True), 16, mlp(13, 3), classes, jaxsgd.adamw, 1000)
_table("iris softmax sgd full", _iris, None, mlp(4, 3), classes, jaxsgd.sgd, 1000)
_table("iris mlp adam", _iris, 10, mlp(4, 16, 3), classes, jaxsgd.adam, 400)
_table("iris mlp rmsprop full", _iris, None, mlp(4, 16, 16, 3, act=tanh), classes, jaxsgd.rmsprop, 100)
_table("iris mlp lion", _iris, 15, mlp(4, 24, 3), classes, jaxsgd.lion, 500)
_table("diabetes linear sgd", _diabetes, 8, mlp(10, 1), squares, jaxsgd.sgd, 300)
_table("diabetes linear adamw", _diabetes, 32, mlp(10, 1), squares, jaxsgd.adamw, 3000)
_table("diabetes mlp sgd", _diabetes, 32, mlp(10, 24, 1), squares, jaxsgd.sgd, 1000)
_table("diabetes tanh nesterov full", _diabetes, None, mlp(10, 16, 1, act=tanh), squares, jaxsgd.nesterov, 800)
_table("diabetes mlp adam warmed", _diabetes, 32, mlp(10, 24, 1), squares, warmed(jaxsgd.adam, 600), 600)
_table("china places adam", lambda: _china("places"), 64, mlp(18, 32, 3), squares, jaxsgd.adam, 1500)
_table("china places momentum", lambda: _china("places"), 64, mlp(18, 32, 3), squares, jaxsgd.momentum, 500)
_table("china noise sgd", lambda: _china("noise"), 32, mlp(25, 1), squares, jaxsgd.sgd, 300)
_table("china hole adamw", lambda: _china("hole"), 64, mlp(16, 16, 1), squares, jaxsgd.adamw, 400)
_text("topics transformer adamw", 4, 16, transformer(16, 2, 1, 16), jaxsgd.adamw, 300)
_text("topics bigram sgd", 16, 16, bigram(), jaxsgd.sgd, 600)
_text("topics bigram adam", 16, 16, bigram(), jaxsgd.adam, 400)
_text("topics window schedule-free", 32, 5, window_mlp(5, 8, 32), jaxsgd.schedule_free_adamw, 600)
_text("topics window clipped momentum", 32, 5, window_mlp(5, 8, 32), clipped(jaxsgd.momentum, 1.0), 600)
_text("topics window adamw warmed", 32, 5, window_mlp(5, 8, 32), warmed(jaxsgd.adamw, 500), 500)

DESIGN = tuple(TASKS)
"""Tasks on the data sets that the probe was designed on."""

_linnerud, _flower = _rows(table, "linnerud"), functools.partial(photograph, 1)
_table("linnerud linear sgd", _linnerud, 4, mlp(3, 3), squares, jaxsgd.sgd, 300)
_table("linnerud mlp adam full", _linnerud, None, mlp(3, 16, 3), squares, jaxsgd.adam, 200)
_table("linnerud tanh momentum", _linnerud, 8, mlp(3, 16, 3, act=tanh), squares, jaxsgd.momentum, 500)
_table("flower places adamw", lambda: _flower("places"), 64, mlp(18, 32, 3), squares, jaxsgd.adamw, 1000)
_table("flower places nesterov", lambda: _flower("places"), 32, mlp(18, 32, 3), squares, jaxsgd.nesterov, 600)
_table("flower places muon", lambda: _flower("places"), 64, mlp(18, 24, 24, 3), squares, jaxsgd.muon, 300)
_table("flower noise linear sgd", lambda: _flower("noise"), 16, mlp(25, 1), squares, jaxsgd.sgd, 200)
_table("flower hole lion", lambda: _flower("hole"), 64, mlp(16, 16, 1), squares, jaxsgd.lion, 400)
_table(
    "flower places adam cosine", lambda: _flower("places"), 64, mlp(18, 32, 3), squares, cosine(jaxsgd.adam, 800), 800
)
_text("sources bigram adam", 16, 16, bigram(), jaxsgd.adam, 300)
_text("sources bigram momentum", 16, 16, bigram(), jaxsgd.momentum, 500)
_text("sources window adamw", 32, 5, window_mlp(5, 8, 32), jaxsgd.adamw, 1500)
_text("sources window sgd", 32, 5, window_mlp(5, 8, 32), jaxsgd.sgd, 600)
_text("sources window adamw one cycle", 32, 5, window_mlp(5, 8, 32), one_cycle(jaxsgd.adamw, 400), 400)
_text("sources rnn rmsprop", 8, 12, rnn(24), jaxsgd.rmsprop, 300)
_text("sources transformer lion", 4, 16, transformer(16, 2, 1, 16), jaxsgd.lion, 300)
if importlib.util.find_spec("vega_datasets") is not None:
    _origin, _warmest = _rows(cars, False, "origin"), _rows(weather, "warmest")
    _table("cars linear sgd", cars, 8, mlp(6, 1), squares, jaxsgd.sgd, 200)
    _table("cars mlp adam", cars, 32, mlp(6, 24, 1), squares, jaxsgd.adam, 600)
    _table("cars raw linear adam", _rows(cars, True), 32, mlp(6, 1), squares, jaxsgd.adam, 1000)
    _table("cars origin lion", _origin, 32, mlp(6, 16, 3), classes, jaxsgd.lion, 400)
    _table("cars origin momentum full", _origin, None, mlp(6, 16, 3), classes, jaxsgd.momentum, 150)
    _table("cars mlp sgd warmed", cars, 16, mlp(6, 24, 1), squares, warmed(jaxsgd.sgd, 500), 500)
    _table("weather softmax sgd", weather, 32, mlp(6, 5), classes, jaxsgd.sgd, 400)
    _table("weather mlp adamw", weather, 64, mlp(6, 24, 24, 5), classes, jaxsgd.adamw, 500)
    _table("weather batchnorm nadam", weather, 64, mlp(6, 24, 24, 5, norm=0), classes, jaxsgd.nadam, 300)
    _table("weather warmest linear momentum", _warmest, 16, mlp(5, 1), squares, jaxsgd.momentum, 300)
    _table("weather warmest mlp adagrad", _warmest, 32, mlp(5, 16, 1), squares, jaxsgd.adagrad, 400)
    _table("airports mlp adam", airports, 64, mlp(2, 32, 32, 19), classes, jaxsgd.adam, 1000)
    _table("airports tanh momentum", airports, 64, mlp(2, 32, 19, act=tanh), classes, jaxsgd.momentum, 800)
    _table("airports layernorm rmsprop", airports, 32, mlp(2, 32, 32, 19, norm=-1), classes, jaxsgd.rmsprop, 500)
    _table("airports mlp sgd", airports, 64, mlp(2, 32, 19), classes, jaxsgd.sgd, 3000)
    _table("barley linear sgd full", barley, None, mlp(18, 1), squares, jaxsgd.sgd, 200)
    _table("barley linear adamw", barley, 16, mlp(18, 1), squares, jaxsgd.adamw, 500)
    _table("barley mlp adafactor", barley, 16, mlp(18, 16, 1), squares, jaxsgd.adafactor, 300)

HELD_OUT = tuple(name for name in TASKS if name not in DESIGN)
"""Tasks on the other data sets, left alone until the thresholds were fixed."""
