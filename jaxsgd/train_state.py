"""All that changes in training, as one pytree: on one device, or made in place on a mesh."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsgd.annotations import unplaced
from jaxsgd.memory import check_host_memory, in_host_memory
from jaxsgd.models import has_statistics, is_linen, is_module, make_serializable, merge_model, split_model
from jaxsgd.numerics import as_key, strong
from jaxsgd.paths import check_optimizer, check_params, is_function
from jaxsgd.rules.averaging import averages_in, eval_params
from jaxsgd.sharding import compiled_init, param_sharding, put, state_sharding

__all__ = ["TrainState", "check_kind", "refuse_deleted"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training, as one pytree.

    Attributes:
      step: int32 scalar, completed steps.
      params: the trained parameters.
      opt_state: the transformation's state.
      key: the base PRNG key; step ``i`` uses ``jax.random.fold_in(key, i)``.
      model_state: the state that the model updates by itself (batch statistics, NNX variables other than
        ``nnx.Param``), or None.
      graphdef: the static half of an NNX model, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    model_state: Any = None
    graphdef: Any = dataclasses.field(default=None, metadata={"static": True})

    def replace(self, **fields: Any) -> TrainState:
        """The state with other values of some fields."""
        return dataclasses.replace(self, **fields)

    @classmethod
    def create(
        cls,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        key: int | jax.Array = 0,
        model_state: Any = None,
        mesh: Mesh | None = None,
        specs: Any = None,
        zero1: str | tuple[str, ...] | None = None,
        offload: bool = False,
    ) -> TrainState:
        """The state before the first step. Arrays are copied: the step donates its own, never the caller's.

        Args:
          model: an ``nnx.Module``, a tree of parameters, or a function of a key that makes either. A tree may come from
            Flax linen's ``init``, or be any other pytree of arrays and numbers. On a mesh a function's parameters are
            never whole on one device. A pytree with ``__call__`` is a tree.
          tx: any optax gradient transformation.
          key: a seed or a PRNG key. Default: 0.
          model_state: with a tree of parameters, the other variables of the model; then the loss takes and
            returns them (see `make_step`).
          mesh: the mesh for the whole state, with Auto or Explicit axes. Each device makes its own part.
          specs: the sharding of the parameters, see `jaxsgd.state_sharding`. Default: the present one, else what the
            model states (`nnx.with_partitioning`, linen's boxes), else replicated. Given, they replace both.
          zero1: the mesh axes to split the optimizer's state over, see `jaxsgd.state_sharding`.
          offload: keep the optimizer's slots in the host's memory between steps (memory kind ``"pinned_host"``). The
            step brings them to the device and sends the new ones back, with the same numbers. Scalars, such as the
            learning rate, stay on the device. ``tx.init`` is then compiled. Without a mesh the state is bound to its
            device. Default: False.

        Raises:
          ValueError: ``tx.init`` or `jaxsgd.state_sharding` refuses the parameters (integers that are not frozen,
            group patterns that match nothing); specs or zero1 without a mesh; offload on a platform without such
            memory, or without a mesh for parameters on several devices.
          TypeError: a leaf of the parameters is no array and no number, such as a function; ``tx`` is no gradient
            transformation; ``model`` is a linen module.
          RuntimeError: the parameters were donated to an earlier step.

        >>> state = TrainState.create({"w": jnp.ones((4, 2))}, jaxsgd.adam(1e-3), offload=True)
        >>> state.opt_state.slots["mu"]["w"].sharding.memory_kind
        'pinned_host'
        """
        build, key, arrays = cls._recipe(model, tx, key, model_state)
        if mesh is None:
            if specs is not None or zero1 is not None:
                raise ValueError("mesh=None: specs and zero1 need a mesh")
            if not offload:
                return build(key, arrays)
            where = cls._offloaded(cls._abstract(build, key, arrays, None), _on_one_device(arrays))
            # Compiled, so that no slot has to be whole on the device first.
            return jax.device_put(build(key, arrays, jax.jit(tx.init, out_shardings=where.opt_state)), where)
        where = cls._where(cls._abstract(build, key, arrays, mesh), arrays, tx, mesh, specs, zero1, offload)
        if arrays is not None:
            arrays = put(arrays, (where.params, where.model_state))
        with unplaced():
            return compiled_init(build, mesh, where)(put(key, where.key), arrays)

    @classmethod
    def shapes(
        cls,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        key: int | jax.Array = 0,
        model_state: Any = None,
        mesh: Mesh | None = None,
        specs: Any = None,
        zero1: str | tuple[str, ...] | None = None,
        offload: bool = False,
    ) -> TrainState:
        """The state of `create` as `jax.ShapeDtypeStruct` with shardings; nothing is allocated.

        Use it to compile a step (``step.lower(state, batch)``), or to restore a checkpoint. The devices of ``mesh``
        need not exist. Arguments and errors are those of `create`; parameters may be shapes themselves.
        """
        build, key, arrays = cls._recipe(model, tx, key, model_state)
        shapes = cls._abstract(build, key, arrays, mesh)
        if mesh is None:
            if not offload:
                return shapes
            where = cls._offloaded(shapes, _on_one_device(arrays))
        else:
            where = cls._where(shapes, arrays, tx, mesh, specs, zero1, offload)
        return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, where)

    @classmethod
    def _recipe(cls, model: Any, tx: Any, key: Any, model_state: Any) -> tuple[Any, jax.Array, Any]:
        """``build, key, arrays``: ``build(key, arrays, init)`` makes the state; no arrays if a function makes them."""
        check_optimizer(tx)
        make_serializable(cls)
        if is_module(model) and model_state is not None:
            raise ValueError("model_state: an nnx.Module carries its own; leave it out")
        if is_linen(model):
            raise TypeError(
                f"model: a linen module has no parameters. Use {type(model).__name__}(...).init(key, x)['params']"
            )
        key = jnp.array(as_key(key), copy=True)
        by_function = is_function(model) and not is_module(model)
        if not by_function:
            refuse_deleted("model", model)
            # The static half has to be split off before tracing.
            graphdef, params, carried = _parts(model, model_state)

        def build(key: jax.Array, arrays: Any, init: Callable[[Any], Any] = tx.init) -> TrainState:
            if by_function:
                init_key, key = jax.random.split(key)
                own, params, carried = _parts(model(init_key), model_state)
            else:
                own, (params, carried) = graphdef, arrays
            params, carried, key = jax.tree.map(lambda x: jnp.array(strong(x), copy=True), (params, carried, key))
            return cls(jnp.zeros((), jnp.int32), params, _unshared(init(params)), key, carried, own)

        return build, key, None if by_function else jax.tree.map(strong, (params, carried))

    @staticmethod
    def _abstract(build: Any, key: jax.Array, arrays: Any, mesh: Mesh | None) -> TrainState:
        """The shapes of a state."""
        with unplaced() if mesh is not None else nullcontext():
            return jax.eval_shape(build, key, arrays)

    @staticmethod
    def _where(
        shapes: TrainState, arrays: Any, tx: Any, mesh: Mesh, specs: Any, zero1: Any, offload: bool
    ) -> TrainState:
        """The sharding of each array of a state."""
        like, carried = (shapes.params, shapes.model_state) if arrays is None else arrays
        everywhere = NamedSharding(mesh, PartitionSpec())
        where = jax.tree.map(lambda _: everywhere, shapes).replace(
            params=param_sharding(like, mesh, specs),
            model_state=param_sharding(carried, mesh),
            opt_state=state_sharding(tx, like, mesh, specs=specs, zero1=zero1),
        )
        return TrainState._to_host(where, shapes, mesh.devices.flat[0]) if offload else where

    @staticmethod
    def _offloaded(shapes: TrainState, device: Any) -> TrainState:
        """The sharding of each array of a state on one device, with the slots in its host's memory.

        All on a mesh of that device: of other arrays JAX does not always know in a trace in which memory they are.
        """
        mesh = Mesh(np.array([device]), ("device",))
        where = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
        return TrainState._to_host(where, shapes, device)

    @staticmethod
    def _to_host(where: TrainState, shapes: TrainState, device: Any) -> TrainState:
        """Shardings of a state with the slots in the host's memory."""
        check_host_memory("offload=True", device)
        return where.replace(opt_state=in_host_memory(where.opt_state, shapes.opt_state, shapes.params))

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate, from `jaxsgd.eval_params`."""
        return eval_params(self.opt_state, self.params)

    @property
    def model(self) -> Any:
        """The NNX model with the parameters to evaluate. Its arrays are copies: the next step donates its own.

        Warns:
          UserWarning: the parameters are averages, with the trained ones' batch statistics. Use `model_with`.
        """
        if self.graphdef is not None and has_statistics(self.model_state) and any(averages_in(self.opt_state)):
            warnings.warn(
                "model: its weights are averages, its batch statistics those of the trained weights. "
                "Use state.model_with(jaxsgd.batch_statistics(state, loss_fn, batches))",
                stacklevel=2,
            )
        return self.model_with(self.model_state)

    def model_with(self, model_state: Any) -> Any:
        """The NNX model with the parameters to evaluate and this model state, such as new batch statistics.

        Args:
          model_state: a tree like ``state.model_state``, such as that of `jaxsgd.batch_statistics`.
        """
        if self.graphdef is None:
            raise ValueError("model: this state was not made from an nnx.Module. Use state.eval_params")
        parts = jax.tree.map(lambda x: jnp.array(x, copy=True), (self.eval_params, model_state))
        return merge_model(self.graphdef, *parts)


def _parts(model: Any, model_state: Any) -> tuple[Any, Any, Any]:
    """``graphdef, params, model_state`` of a module or of a tree of parameters.

    Raises:
      TypeError: a leaf of the parameters is no array and no number.
    """
    if not is_module(model):
        check_params(model)
        return None, model, model_state
    graphdef, params, others = split_model(model)
    check_params(params)
    return graphdef, params, others


def _on_one_device(arrays: Any) -> Any:
    """The device of arrays without a mesh; that which JAX uses by default if none has a place.

    Raises:
      ValueError: they are on several devices.
    """
    placed = [x.devices() for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    devices = set[Any]().union(*placed) or jnp.zeros(()).devices()
    if len(devices) > 1:
        raise ValueError(
            f"offload=True: the parameters are on {len(devices)} devices and mesh=None. Use mesh=, the mesh that they "
            "are on"
        )
    return next(iter(devices))


def _unshared(tree: Any) -> Any:
    """``tree`` with a copy of each array that is in it twice, as in the state of `optax.lbfgs`: donation refuses it."""
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if id(x) in seen and isinstance(x, jax.Array):
            return jnp.array(x, copy=True)
        seen.add(id(x))
        return x

    return jax.tree.map(own, tree)


def check_kind(state: Any) -> None:
    """Check that ``state`` is a `TrainState`.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"state: a jaxsgd.TrainState is needed, got a {type(state).__name__}. Use TrainState.create")


def refuse_deleted(argument: str, tree: Any) -> None:
    """Raise if an array of ``tree`` was donated.

    Raises:
      RuntimeError: an earlier step took its memory.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise RuntimeError(
                f"{argument}: an earlier step took this state's memory; go on with the state it returned, "
                "or build the step with donate=False"
            )
