"""The slots of a transformation: the rule, the parameter and the storage of each.

Migration, planning and the probe ask here, for chains, partitions and wrappers alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxsgd.lift import watched
from jaxsgd.paths import find_nodes, leaf_names
from jaxsgd.slots import Slot
from jaxsgd.state import State
from jaxsgd.storage import Storage, plain

__all__ = ["Form", "forms"]


@dataclass(frozen=True)
class Form:
    """One slot of one parameter.

    Attributes:
      container: the name of the `jaxsgd.State` that holds it, in the optimizer's state.
      slot: its declaration in the rule.
      parameter: the parameter's name.
      storage: how it is stored.
      stored: shapes and dtypes of the stored arrays, a pytree.
    """

    container: str
    slot: Slot
    parameter: str
    storage: Storage
    stored: Any

    @property
    def names(self) -> list[str]:
        """The names of the stored arrays in the optimizer's state."""
        place = [self.container, "slots", self.slot.name, self.parameter]
        return ["/".join(filter(None, [*place, inside])) for inside in leaf_names(self.stored)]


def forms(tx: optax.GradientTransformation, params: Any) -> list[Form]:
    """Every slot that the rules in ``tx`` keep of ``params``, parameter by parameter.

    Args:
      tx: any transformation.
      params: the parameters, or their shapes.

    Returns:
      A `Form` for each slot of each parameter; none for a parameter that a rule does not train, or has no slot of.
    """
    seen, state = watched(tx, params)
    made = [(lift, own, jax.eval_shape(lift.init, own)) for lift, own in seen]
    out = []
    for container, node in find_nodes(state, State):
        # Only rules in a chain are alike, and their states are in the order of their start.
        found = next((entry for entry in made if _layout(entry[2]) == _layout(node)), None)
        if found is None:
            continue
        made.remove(found)
        lift, own, _ = found
        treedef, names, storages = jax.tree.structure(own), leaf_names(own), lift.storages(own)
        for name, slot in lift.rule.slots.items():
            trees = treedef.flatten_up_to(node.slots[name]) if name in node.slots else [None] * len(names)
            for parameter, stored, known in zip(names, trees, storages, strict=True):
                if jax.tree.leaves(stored):
                    out.append(Form(container, slot, parameter, known.get(name, plain), stored))
    return out


def _layout(state: State) -> Any:
    """Names and shapes; two tracings of one NNX state have unequal structures."""
    return leaf_names(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
