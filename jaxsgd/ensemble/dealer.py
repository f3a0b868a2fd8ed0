"""Runs on devices: dealt out along a first axis, and gathered again, in one process or in several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsgd.numerics import is_key

__all__ = ["Dealer", "devices_of"]

MEMBERS = PartitionSpec("members")


def devices_of(mesh: Mesh | Sequence[Any] | None) -> list[Any]:
    """The devices of a mesh or a list. Default: all that belong to this process."""
    if mesh is None:
        return jax.local_devices()
    return list(mesh.devices.flat) if isinstance(mesh, Mesh) else list(mesh)


class Dealer:
    """Splits arrays ``(members, ...)`` over devices. The last row is repeated until the devices divide the rows.

    Several processes call every method together, with the same numbers.

    Args:
      devices: the devices, of any process. More than ``members`` are not used.
      members: the number of runs.

    Attributes:
      devices: the devices in use.
      members: the number of runs.
      rows: the runs of one device.
      local: the first of them that belongs to this process.
      spread: whether some of the devices belong to other processes.
    """

    def __init__(self, devices: Sequence[Any], members: int) -> None:
        self.devices, self.members = list(devices)[:members], members
        self.rows = -(-members // len(self.devices))
        self.spread = any(device.process_index != jax.process_index() for device in self.devices)
        own = [device for device in self.devices if device.process_index == jax.process_index()]
        self.local = (own or self.devices)[0]
        self._mesh = Mesh(np.asarray(self.devices), ("members",))
        self._split, self._whole = NamedSharding(self._mesh, MEMBERS), NamedSharding(self._mesh, PartitionSpec())
        self._gather = jax.jit(lambda tree: tree, out_shardings=self._whole)
        self._cut = jax.jit(lambda tree: jax.tree.map(lambda x: x[:members], tree))

    def deal(self, tree: Any) -> Any:
        """Arrays ``(members, ...)`` on the devices, each with its rows."""
        more = self.rows * len(self.devices) - self.members
        return jax.tree.map(lambda x: self._put(_padded(x, more), self._split), tree)

    def share(self, tree: Any) -> Any:
        """Arrays that every device has whole."""
        return jax.tree.map(lambda x: self._put(x, self._whole), tree)

    def cut(self, tree: Any) -> Any:
        """Dealt arrays without the repeated rows."""
        return self._cut(tree) if self.spread else jax.tree.map(lambda x: x[: self.members], tree)

    def fetch(self, x: jax.Array) -> np.ndarray:
        """A dealt array on the host of every process."""
        return np.asarray(self._gather(x) if self.spread else x)

    def host(self, tree: Any) -> Any:
        """Dealt arrays on the host, without the repeated rows; typed keys remain arrays of JAX."""

        def one(x: Any) -> Any:
            if is_key(x):
                data = jnp.asarray(self.fetch(jax.random.key_data(x))[: self.members])
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
            return self.fetch(x)[: self.members]

        return jax.tree.map(one, tree)

    def on_each(self, fn: Callable[..., Any], shared: int) -> Callable[..., Any]:
        """``fn`` on the rows of each device; the first ``shared`` arguments are the same for all."""

        def call(*args: Any) -> Any:
            specs = tuple(PartitionSpec() if i < shared else MEMBERS for i in range(len(args)))
            return jax.shard_map(fn, mesh=self._mesh, in_specs=specs, out_specs=MEMBERS, check_vma=False)(*args)

        return call

    def least(self, value: float) -> float:
        """The least ``value`` of all processes, so that all take the same decision."""
        if not self.spread:
            return value
        shape = (len(self.devices),)
        values = jax.make_array_from_callback(shape, self._split, lambda _: np.asarray([value], np.float32))
        return float(np.asarray(jax.jit(jnp.min, out_shardings=self._whole)(values)))

    def _put(self, x: Any, sharding: NamedSharding) -> Any:
        if not self.spread or isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        if is_key(x):
            data = self._put(np.asarray(jax.random.key_data(x)), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)  # all processes have the same: nothing is sent
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _padded(x: np.ndarray, more: int) -> np.ndarray:
    return np.pad(x, [(0, more), *[(0, 0)] * (np.ndim(x) - 1)], mode="edge")
