"""Batches in order, from a list, an iterator, a function of the step, or one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.batches import as_arrays, batch_size
from jaxsgd.paths import is_function

__all__ = ["Feed", "is_one_batch", "stacked"]


def is_one_batch(data: Any, takes: Callable[[Any], bool] | None = None) -> bool:
    """Whether ``data`` is a batch: an array, a number, or a pytree of them that is no list. A list holds batches.

    A list of bare arrays, such as ``[x, y]``, is one batch where the loss takes the list and not its entries.

    Args:
      data: the batch or batches.
      takes: whether the loss takes a batch. Default: unknown; a list then holds batches.

    Raises:
      ValueError: the loss takes a list of arrays both as one batch and as several.
    """
    if isinstance(data, list) and data and takes is not None and all(hasattr(x, "shape") for x in data):
        whole = takes(as_arrays(data))
        if whole and takes(as_arrays(data[0])):
            raise ValueError(
                f"batch: a list of {len(data)} arrays, which the loss takes as one batch and as {len(data)} batches. "
                "Use a tuple for one batch, or a list of tuples for several"
            )
        return whole
    if isinstance(data, list | Iterator | MappingView):
        return False
    if isinstance(data, Mapping | tuple | np.ndarray | jax.Array) or jnp.isscalar(data):
        return True
    leaves = jax.tree.leaves(data)
    return bool(leaves) and leaves[0] is not data


class Feed:
    """The batches of a run, in order.

    Args:
      data: one of

        - a list of batches, or another iterable that can be walked again, such as a torch DataLoader; after its end
          it starts over;
        - an iterator or a generator, which may end;
        - a function of the step ``0, 1, ...`` that returns a batch;
        - one batch for every step: a dict, a tuple, an array or another pytree. A list ``[x, y]`` of arrays is one
          batch where the loss takes only the whole array; see `is_one_batch`.
      takes: whether the loss takes a batch. Default: unknown.
      replay: keep the batches on the host, so that `rewind` can give them again. It concerns iterators, and iterables
        that may give other batches on their next walk. Default: False.

    Attributes:
      taken: the number of batches taken so far.

    Raises:
      TypeError: ``data`` is none of these.
      ValueError: it is empty.
    """

    def __init__(self, data: Any, takes: Callable[[Any], bool] | None = None, *, replay: bool = False) -> None:
        self.taken = 0
        self._kept: list[Any] | None = [] if replay and not isinstance(data, list | tuple) else None
        self._data = data
        self._ahead: Any = None
        self._walk: Iterator[Any] | None = None
        self._at: Callable[[int], Any] | None = None
        self._shape: Any = None
        if is_function(data):
            self._at = data
        elif is_one_batch(data, takes):
            batch_size(data)
            data = as_arrays(data)
            self._at = lambda _: data
        elif isinstance(data, Iterable):
            self._walk = iter(data)
        else:
            if dataclasses.is_dataclass(data):
                as_arrays(data)
            raise TypeError(
                f"data={data!r}: batches are needed: a list, an iterator, a function of the step, or one batch"
            )

    def next(self) -> Any:
        """The next batch.

        Raises:
          ValueError: there is none left, or its arrays have other shapes than those of the first batch.
        """
        if self._ahead is not None:
            batch, self._ahead = self._ahead, None
            self.taken += 1
            return batch
        if self._kept is not None and self.taken < len(self._kept):
            self.taken += 1
            return self._kept[self.taken - 1]
        batch = as_arrays(self._next())
        shape = jax.tree.map(jnp.shape, batch), jax.tree.structure(batch)
        if self._shape is None:
            batch_size(batch)
            self._shape = shape
        elif shape != self._shape:
            raise ValueError(
                f"data: batch {self.taken} has the shapes {shape[0]}, those before it {self._shape[0]}; "
                "all batches must be alike: drop or pad the odd one"
            )
        self.taken += 1
        if self._kept is not None and self._walk is not None:
            self._kept.append(batch)
        return batch

    def peek(self) -> Any:
        """The next batch, which `next` will return."""
        if self._ahead is None:
            self._ahead = self.next()
            self.taken -= 1
        return self._ahead

    def skip(self, count: int) -> None:
        """Pass over batches. A function of the step is not called for them."""
        if self._at is not None:
            self.taken, self._ahead = self.taken + count, None
            return
        for _ in range(count):
            self.next()

    def rewind(self) -> None:
        """Start over with the first batch. An iterator has to be made with ``replay``."""
        if self._walk is not None and self._kept is None:
            self._walk = iter(self._data)
        self.taken, self._ahead = 0, None

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
            f"data: the iterator ended after {self.taken} batches; more are needed. Use a list, or a longer iterator"
        )

    def take(self, count: int) -> Any:
        """The next ``count`` batches stacked along a new first axis."""
        return stacked([self.next() for _ in range(count)])


def stacked(batches: Sequence[Any]) -> Any:
    """Batches along a new first axis. If all are the same object, it is not copied."""
    if all(batch is batches[0] for batch in batches):
        return jax.tree.map(lambda x: np.broadcast_to(x, (len(batches), *np.shape(x))), batches[0])
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)
