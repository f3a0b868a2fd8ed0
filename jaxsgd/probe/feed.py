"""Batches in order, from whatever holds them.

Floor 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.batches import batch_size

__all__ = ["Feed", "stacked"]


class Feed:
    """The batches of a training, in order and as many as one asks for.

    Args:
      data: a list (or another iterable that can be walked again) of batches, from whose end one goes on at its
        beginning; an iterator or a generator, which may run dry; a function of the step ``0, 1, ...`` that gives a
        batch; or one batch (a dict, a tuple or an array), which is then the batch of every step.

    Attributes:
      taken: batches taken so far.

    Raises:
      TypeError: ``data`` is none of these.
      ValueError: it is empty.
    """

    def __init__(self, data: Any) -> None:
        self.taken = 0
        self._data = data
        self._walk: Iterator[Any] | None = None
        self._at: Callable[[int], Any] | None = None
        self._shape: Any = None
        if isinstance(data, Mapping | tuple | np.ndarray | jax.Array) or jnp.isscalar(data):
            batch_size(data)
            self._at = lambda _: data
        elif callable(data):
            self._at = data
        elif isinstance(data, Iterable):
            self._walk = iter(data)
        else:
            raise TypeError(
                f"data={data!r}: batches are needed: a list, an iterator, a function of the step, or one batch"
            )

    def next(self) -> Any:
        """The next batch.

        Raises:
          ValueError: there is none, or its arrays have other shapes than those of the first batch.
        """
        batch = self._next()
        shape = jax.tree.map(jnp.shape, batch), jax.tree.structure(batch)
        if self._shape is None:
            batch_size(batch)
            self._shape = shape
        elif shape != self._shape:
            raise ValueError(
                f"data: batch {self.taken} has the shapes {shape[0]}, those before {self._shape[0]}; "
                "all batches must be alike: drop or pad the odd one"
            )
        self.taken += 1
        return batch

    def _next(self) -> Any:
        if self._at is not None:
            return self._at(self.taken)
        assert self._walk is not None
        for _ in range(2):
            try:
                return next(self._walk)
            except StopIteration:
                if iter(self._data) is self._data:  # an iterator is walked once
                    break
                self._walk = iter(self._data)
        if self.taken == 0:
            raise ValueError("data: it is empty; at least one batch is needed")
        raise ValueError(
            f"data: an iterator that ended after {self.taken} batches; more are needed: give a list, or a longer one"
        )

    def take(self, count: int) -> Any:
        """The next ``count`` batches stacked along a new first axis."""
        return stacked([self.next() for _ in range(count)])


def stacked(batches: Sequence[Any]) -> Any:
    """Batches along a new first axis; one that is every batch is not copied."""
    if all(batch is batches[0] for batch in batches):
        return jax.tree.map(lambda x: np.broadcast_to(x, (len(batches), *np.shape(x))), batches[0])
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)
