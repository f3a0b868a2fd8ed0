"""Models of Flax, taken apart and put together. Flax is imported by whoever made the model, never here first."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax

__all__ = [
    "carried_state",
    "has_statistics",
    "is_linen",
    "is_module",
    "is_variable",
    "make_serializable",
    "merge_model",
    "split_model",
]


def _flax(module: str, name: str) -> Any:
    """A type of Flax; without Flax an empty tuple, of which nothing is an instance."""
    return getattr(sys.modules.get(f"flax.{module}"), name, ())


def is_module(x: Any) -> bool:
    """Whether ``x`` is an ``nnx.Module``."""
    return isinstance(x, _flax("nnx", "Module"))


def is_linen(x: Any) -> bool:
    """Whether ``x`` is a ``linen.Module``, which has no parameters of its own."""
    return isinstance(x, _flax("linen", "Module"))


def is_variable(x: Any) -> bool:
    """Whether ``x`` is an ``nnx.Variable``."""
    return isinstance(x, _flax("nnx", "Variable"))


def split_model(model: Any) -> tuple[Any, Any, Any]:
    """``(graphdef, params, model_state)`` of an ``nnx.Module``."""
    from flax import nnx

    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    return graphdef, params, others


def merge_model(graphdef: Any, params: Any, model_state: Any) -> Any:
    """The ``nnx.Module`` of its parts, with variables of its own."""
    from flax import nnx

    return nnx.merge(graphdef, params, model_state, copy=True)


def carried_state(model: Any) -> Any:
    """The variables of an ``nnx.Module`` other than ``nnx.Param``."""
    from flax import nnx

    return nnx.state(model, nnx.Not(nnx.Param))


def has_statistics(model_state: Any) -> bool:
    """Whether a tree holds batch statistics of NNX."""
    nodes = jax.tree.leaves(model_state, is_leaf=is_variable)
    return any(isinstance(node, _flax("nnx", "BatchStat")) for node in nodes)


def make_serializable(cls: type) -> None:
    """Let ``flax.serialization`` take a dataclass with a method ``replace``, if Flax is there; once.

    Fields that are no part of the pytree stay as they are in the target, as in ``flax.struct.dataclass``.
    """
    serialization: Any = sys.modules.get("flax.serialization")
    if serialization is None or cls in serialization._STATE_DICT_REGISTRY:
        return
    names = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("static")]

    def to_state_dict(x: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(x, name)) for name in names}

    def from_state_dict(x: Any, held: dict[str, Any]) -> Any:
        new = {name: serialization.from_state_dict(getattr(x, name), held[name], name=name) for name in names}
        return x.replace(**new)

    serialization.register_serialization_state(cls, to_state_dict, from_state_dict)
