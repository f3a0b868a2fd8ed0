"""The language model of char_lm.py, its text and its batches, for training and for programs that only plan it.

    built = build(PRESETS["1.3b"])
    params = jax.eval_shape(built.init, jax.random.key(0))      # 1,311,082,496 parameters, none of them made

Nothing here trains, draws or writes.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Config:
    """The sizes of a model and its batches. A vocabulary larger than the text's is padding."""

    layers: int = 4
    width: int = 96
    heads: int = 4
    context: int = 128
    batch_size: int = 16
    vocabulary: int = 128
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False


PRESETS = {
    "tiny": Config(layers=2, width=32, heads=2, context=32, batch_size=8),
    "small": Config(),
    "124m": Config(layers=12, width=768, heads=12, context=1024, vocabulary=50304),
    "1.3b": Config(layers=24, width=2048, heads=16, context=2048, vocabulary=50304),
}
"""Models by name; the two large ones have the number of parameters that they say."""


def rotated(x: jax.Array) -> jax.Array:
    """Queries or keys ``(rows, length, heads, size)``, turned by angles that grow with the position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Causal attention and a perceptron, each on the norm of what it adds to."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        types: Any = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        inwards: Any = {"use_bias": False, **types}
        # Each block adds twice to the stream: without the factor its variance would grow with the depth.
        small = nn.initializers.variance_scaling(0.5 / c.layers, "fan_in", "truncated_normal")
        outwards = inwards | {"kernel_init": small}
        drop = nn.Dropout(c.dropout, deterministic=not self.train)
        normed = nn.RMSNorm(name="attention_norm", **types)(x)
        heads = (c.heads, c.width // c.heads)
        query, key, value = (nn.DenseGeneral(heads, name=n, **inwards)(normed) for n in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + drop(nn.Dense(c.width, name="out", **outwards)(mixed.reshape(x.shape)))
        hidden = nn.Dense(4 * c.width, name="up", **inwards)(nn.RMSNorm(name="mlp_norm", **types)(x))
        return x + drop(nn.Dense(c.width, name="down", **outwards)(nn.gelu(hidden))), None


class Transformer(nn.Module):
    """Token ids ``(rows, length)`` to logits ``(rows, length, vocabulary)`` in float32.

    The blocks are one scan over stacked parameters, compiled once whatever their number; the embedding is also the
    head.
    """

    config: Config
    train: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        types: Any = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        embed = nn.Embed(
            c.vocabulary, c.width, name="embed", embedding_init=nn.initializers.normal(c.width**-0.5), **types
        )
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat else Block,
            variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=c.layers,
        )  # fmt: skip
        x, _ = stack(c, self.train, name="blocks")(embed(tokens), None)
        x = nn.RMSNorm(name="final_norm", **types)(x)
        return embed.attend(x).astype(jnp.float32)


def row_losses(model: Transformer, params: Any, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The mean loss of each row of ``tokens`` (rows, context + 1), in nats per character."""
    rngs = None if key is None else {"dropout": key}
    logits: Any = model.apply({"params": params}, tokens[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


class Built(NamedTuple):
    """What training needs of a model.

    Attributes:
      init: ``key -> params``.
      loss_fn: ``(params, batch, key) -> (loss, {"bits_per_char": ...})``. Where the batch has ``"weight"`` (rows,), the
        losses of the rows are multiplied with it.
      batch: the batch as shapes, ``{"tokens": int32 (rows, context + 1)}``.
    """

    init: Callable[[jax.Array], Any]
    loss_fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    batch: dict[str, jax.ShapeDtypeStruct]


def build(config: Config) -> Built:
    """The model of ``config`` and its loss. No array is made: `jax.eval_shape` of both works at any size."""
    model = Transformer(config, train=True)

    def init(key: jax.Array) -> Any:
        return Transformer(config).init(key, jnp.zeros((1, config.context), jnp.int32))["params"]

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = row_losses(model, params, batch["tokens"], key)
        loss = (losses * batch["weight"]).mean() if "weight" in batch else losses.mean()
        return loss, {"bits_per_char": loss / math.log(2)}

    rows = (config.batch_size, config.context + 1)
    return Built(init, loss_fn, {"tokens": jax.ShapeDtypeStruct(rows, jnp.int32)})


class Corpus(NamedTuple):
    """A text as ids: ``characters[id]``; those too rare to learn are one, the replacement character."""

    characters: str
    train: np.ndarray
    validation: np.ndarray

    def text(self, ids: Any) -> str:
        return "".join(self.characters[i] for i in np.asarray(ids))


def corpus(rare: int = 10) -> Corpus:
    """Python's help topics, the last tenth for validation; a character seen less than ``rare`` times counts as rare."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    counts = collections.Counter(text)
    characters = "\ufffd" + "".join(sorted(c for c, n in counts.items() if n >= rare))
    ids = {c: i for i, c in enumerate(characters)}
    coded = np.array([ids.get(c, 0) for c in text], np.int32)
    split = len(coded) * 9 // 10
    return Corpus(characters, coded[:split], coded[split:])


def batch_at(position: int, ids: np.ndarray, config: Config, seed: int, nan_rate: float = 0.0) -> dict[str, np.ndarray]:
    """The batch of a step, drawn from the seed and the number of steps before it: a resumed run sees the same."""
    rng = np.random.default_rng([seed, position])
    starts = rng.integers(0, len(ids) - config.context, config.batch_size)
    batch = {"tokens": ids[starts[:, None] + np.arange(config.context + 1)]}
    if nan_rate:
        batch["weight"] = np.full(config.batch_size, np.nan if rng.random() < nan_rate else 1.0, np.float32)
    return batch


def evaluator(config: Config, ids: np.ndarray, mesh: Mesh | None = None) -> Callable[[Any], float]:
    """``params -> `` the mean loss over all of ``ids``, cut into windows, in nats per character."""
    count = (len(ids) - 1) // config.context
    windows = ids[np.arange(count)[:, None] * config.context + np.arange(config.context + 1)]
    batches: Any = np.resize(windows, (-(-count // config.batch_size), config.batch_size, config.context + 1))
    if mesh is not None:
        batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "data")))

    # One program, not one a batch: those would be under way together, and on a CPU wait for each other's collectives.
    @jax.jit
    def losses(params: Any, batches: jax.Array) -> jax.Array:
        return jax.lax.map(lambda tokens: row_losses(Transformer(config), params, tokens), batches)

    return lambda params: float(np.ravel(losses(params, batches))[:count].mean(dtype=np.float64))


def sampler(config: Config, characters: int, length: int, temperature: float) -> Callable[..., jax.Array]:
    """``(params, prompt, key) -> ids``: ``length`` characters after ``prompt`` (context,), in one compiled loop."""

    def sample(params: Any, prompt: jax.Array, key: jax.Array) -> jax.Array:
        def step(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits: Any = Transformer(config).apply({"params": params}, window[None])
            last = logits[0, -1, :characters]
            new = jax.random.categorical(key, last / temperature) if temperature else last.argmax()
            return jnp.append(window[1:], new.astype(window.dtype)), new

        return jax.lax.scan(step, prompt, jax.random.split(key, length))[1]

    return jax.jit(sample)


SPLIT = {"query": 2, "key": 2, "value": 2, "out": 1, "up": 2, "down": 1, "embed": 0}
"""The dimension of a kernel that is split over the mesh axis "model": heads, hidden units, the vocabulary."""


def split(mesh: Mesh, fsdp: bool) -> Callable[[str, Any], PartitionSpec]:
    """How parameters lie on the mesh: kernels over "model", and with ``fsdp`` every matrix over "data" as well."""

    def specs(name: str, leaf: Any) -> PartitionSpec:
        axes: list[str | None] = [None] * leaf.ndim
        layer = name.split("/")[-2]
        if "model" in mesh.shape and layer in SPLIT:
            axes[SPLIT[layer]] = "model"
        first = int(name.startswith("blocks"))  # the scan takes one layer at a time: each must be on all devices
        free = [d for d in range(first, leaf.ndim) if axes[d] is None and leaf.shape[d] % mesh.shape["data"] == 0]
        if fsdp and leaf.ndim - first > 1 and free:
            axes[max(free, key=lambda d: leaf.shape[d])] = "data"
        return PartitionSpec(*axes)

    return specs
