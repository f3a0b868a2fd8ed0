"""Metrics of many steps, fetched together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import check_count
from jaxsgd.paths import named_leaves

__all__ = ["Recorder"]


class Recorder:
    """Keeps the metrics of steps on the device and fetches them in one transfer every so many steps.

    ``float(metrics["loss"])`` at each step makes the host wait for that step. The device then waits for the host to
    send the next one. A recorder avoids both::

        recorder = jaxsgd.Recorder(every=20)
        for batch in batches:
            state, metrics = step(state, batch)
            for record in recorder.add(metrics):  # empty but for every 20th step
                print(record["step"], record["loss"])
        recorder.flush()
        losses = [record["loss"] for record in recorder.records]

    Attributes:
      records: what was fetched so far, a dict of numbers for each step; those in ``aux`` under their own names, or
        under ``aux/<name>`` where the step has a metric of that name.
    """

    records: list[dict[str, float]]

    def __init__(self, every: int = 20) -> None:
        """Raises ValueError for ``every`` below 1."""
        check_count("every", every)
        self.every = every
        self.records = []
        self._waiting: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, Any]) -> list[dict[str, float]]:
        """Take the metrics of one step; return the records that this step made due, in order, mostly none.

        Raises:
          ValueError: a metric is no scalar, or has other names than those of the steps before.
        """
        flat = flat_metrics(metrics)
        for name, x in flat.items():
            if x.ndim:
                raise ValueError(f"metrics: {name!r} has the shape {x.shape}; scalars are recorded")
        if self._waiting and flat.keys() != self._waiting[0].keys():
            raise ValueError(f"metrics: now {sorted(flat)}, in the steps before {sorted(self._waiting[0])}")
        self._waiting.append(flat)
        return self.flush() if len(self._waiting) >= self.every else []

    def flush(self) -> list[dict[str, float]]:
        """Fetch what is still on the device."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        if len(waiting) < self.every:  # a rest is not worth a program of its own
            fetched = [{name: x.item() for name, x in one.items()} for one in jax.device_get(waiting)]
        else:
            kinds = {name: np.dtype(x.dtype) for name, x in waiting[0].items()}
            rows = _fetch(_packed([list(one.values()) for one in waiting]))
            fetched = [{n: _number(x, kinds[n]) for n, x in zip(kinds, row, strict=True)} for row in rows]
        self.records += fetched
        return fetched


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The metrics of a step by name. Entries of ``aux`` keep their names, or are ``aux/<name>`` if a metric has it.

    ``skipped`` is a metric even where no guard counts it, so that no entry of ``aux`` is read as such a count.
    """
    aux = metrics.get("aux")
    own = {name: x for name, x in metrics.items() if name != "aux"}
    inside = aux if isinstance(aux, dict) else {"aux": aux}
    inside = {f"aux/{name}" if name in own or name == "skipped" else name: x for name, x in inside.items()}
    return {name: jnp.asarray(x) for name, x in named_leaves(own | inside, "metrics").items()}


@jax.jit
def _packed(rows: list[list[jax.Array]]) -> jax.Array:
    """Scalars of any dtype as the bits of one array: 32 wide, or 64 where one is."""
    width = max(x.dtype.itemsize for x in rows[0])
    real, whole, bits = (jnp.float64, jnp.int64, jnp.uint64) if width == 8 else (jnp.float32, jnp.int32, jnp.uint32)

    def as_bits(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
            return x.astype(bits)
        return jax.lax.bitcast_convert_type(x.astype(real if jnp.issubdtype(x.dtype, jnp.floating) else whole), bits)

    return jnp.stack([jnp.stack([as_bits(x) for x in row]) for row in rows])


def _fetch(x: jax.Array) -> np.ndarray:
    return np.asarray(x)


def _number(bits: np.unsignedinteger, kind: np.dtype) -> float:
    """The number that was packed: a float, an int or a bool, as its dtype was."""
    if jnp.issubdtype(kind, jnp.floating):
        return bits.view(np.float64 if bits.itemsize == 8 else np.float32).item()
    if jnp.issubdtype(kind, jnp.unsignedinteger):
        return bits.item()
    whole = bits.view(np.int64 if bits.itemsize == 8 else np.int32).item()
    return bool(whole) if kind == np.bool_ else whole
