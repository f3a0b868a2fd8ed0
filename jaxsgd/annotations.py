"""Shardings that a Flax model states of its own parameters.

They come from `nnx.with_partitioning`, `flax.linen.with_partitioning` and
`flax.linen.with_logical_partitioning`.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxsgd.models import is_variable

__all__ = ["annotated_specs", "unplaced"]


def annotated_specs(tree: Any) -> list[PartitionSpec | None]:
    """The spec that the model states for each leaf of ``tree``, in flattening order; None where it states none.

    Logical names are translated by the rules of the annotation, and by those of the context
    (`flax.linen.logical_axis_rules`, `nnx.logical_axis_rules`).
    """
    out: list[PartitionSpec | None] = []
    for node in jax.tree.leaves(tree, is_leaf=_is_box):
        spec = _stated(node) if _is_box(node) else None
        out += [spec] * len(jax.tree.leaves(node))
    return out


def unplaced() -> AbstractContextManager[Any]:
    """In it NNX makes variables with annotations without placing them: their maker does it once it knows where."""
    nnx = sys.modules.get("flax.nnx")
    return nullcontext() if nnx is None else nnx.use_eager_sharding(False)


def _is_box(node: Any) -> bool:
    return is_variable(node) or isinstance(node, getattr(sys.modules.get("flax.core.meta"), "AxisMetadata", ()))


def _stated(box: Any) -> PartitionSpec | None:
    from flax import linen, nnx
    from flax.core.meta import Partitioned
    from flax.linen.spmd import logical_to_mesh

    if is_variable(box):
        said = box.get_metadata().get("out_sharding")
        if isinstance(said, NamedSharding):
            return said.spec
        found = jax.tree.leaves(nnx.get_partition_spec(box), is_leaf=lambda x: isinstance(x, PartitionSpec))
        return found[0] if said and found else None
    if isinstance(box, linen.LogicallyPartitioned):
        return logical_to_mesh(PartitionSpec(*box.names), rules=box.rules)
    return box.get_partition_spec() if isinstance(box, Partitioned) else None
