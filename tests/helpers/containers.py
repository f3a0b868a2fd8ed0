"""A tree of two leaves in every kind of container that a user may hand over."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx, struct
from flax.core import freeze


class Pair(NamedTuple):
    value: Any
    query: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    value: Any
    query: Any


@struct.dataclass
class Struct:
    value: Any
    query: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Gain:
    """A model as of Equinox: its own pytree, and callable."""

    value: Any
    query: Any

    def __call__(self, x):
        return self.value * x + self.query


class Holder(nnx.Module):
    def __init__(self, value, query):
        self.value, self.query = nnx.Param(value), nnx.Param(query)


def boxed(value, query):
    return {"value": nn.Partitioned(value, ("data",)), "query": nn.Partitioned(query, (None,))}


CONTAINERS = {
    "dict": lambda value, query: {"value": value, "query": query},
    "list": lambda value, query: [value, query],
    "tuple": lambda value, query: (value, query),
    "NamedTuple": Pair,
    "dataclass": Plain,
    "flax.struct": Struct,
    "FrozenDict": lambda value, query: freeze({"value": value, "query": query}),
    "nnx.State": lambda value, query: nnx.state(Holder(value, query), nnx.Param),
    "nnx.Module": Holder,
    "linen boxes": boxed,
    "callable": Gain,
}
NAMES = {"list": ["0", "1"], "tuple": ["0", "1"]}
SORTED = ("dict", "FrozenDict", "nnx.State", "nnx.Module", "linen boxes")


def names_of(kind):
    return NAMES.get(kind, ["query", "value"] if kind in SORTED else ["value", "query"])
