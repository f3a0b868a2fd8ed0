"""The places of averaged weights in a state. A checkpoint lists them, so that a reader needs no optimizer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import wide
from jaxsgd.paths import named_leaves
from jaxsgd.rules.averaging import averages_in, extrapolated

__all__ = ["averaged", "find_averages"]


def find_averages(state: Any) -> dict[str, list[str]]:
    """Name of each parameter with an average -> names of the leaves that hold it.

    The first is the average. For the z of a schedule-free rule the leaf of b1 follows, from which `averaged`
    extrapolates."""
    if not (hasattr(state, "opt_state") and hasattr(state, "params")):
        return {}
    names = {id(leaf): name for name, leaf in named_leaves(state, "state").items()}
    out: dict[str, list[str]] = {}
    for tree, b1 in averages_in(state.opt_state):
        for name, leaf in named_leaves(tree, "state").items():
            out[f"params/{name}"] = [names[id(leaf)], *([] if b1 is None else [names[id(b1)]])]
    return out


def averaged(param: Any, *saved: Any) -> Any:
    """One parameter's average, in its dtype, from the leaves that `find_averages` names."""
    if len(saved) == 1:
        return saved[0].astype(param.dtype)
    z, b1 = saved
    y = jnp.asarray(param)
    x = extrapolated(wide(y), wide(jnp.asarray(z)), jnp.asarray(b1, wide(y).real.dtype)).astype(y.dtype)
    return np.asarray(x) if isinstance(param, np.ndarray) else x
