"""A train step that updates each layer of a stack as soon as its gradient is there.

An ordinary step holds the gradients of all layers before the optimizer starts. Here the backward pass starts at the end
of the stack. The optimizer steps a layer before the gradient of the next one is computed. So the gradients of one layer
exist at a time. LOMO (Lv et al. 2023, arXiv:2306.09782) does so for SGD, by hooks in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal
from jax.sharding import Mesh

from jaxsgd.applying import step_params
from jaxsgd.batches import as_arrays
from jaxsgd.draws import layer_key, of_layer
from jaxsgd.elementwise import CALLS
from jaxsgd.meshes import in_mesh, is_explicit
from jaxsgd.numerics import conjugated, global_norm, is_float0, is_key, widest
from jaxsgd.paths import check_optimizer, leaf_names
from jaxsgd.placement import brought_home, compiled_for, with_slots_on_device
from jaxsgd.second_order.batch_loss import taken_by
from jaxsgd.sharding import check_axes, shard_batch
from jaxsgd.state import find_states, metrics
from jaxsgd.train_state import TrainState, check_kind, refuse_deleted
from jaxsgd.transforms.moving import moving

__all__ = ["LayerStep", "make_layer_step"]


def make_layer_step(
    before: Callable[[Any, Any, jax.Array], Any],
    layer: Callable[[Any, Any, jax.Array], Any],
    after: Callable[[Any, Any, Any, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    *,
    layers: str = "layers",
    layer_clip: float | None = None,
    donate: bool = True,
    mesh: Mesh | None = None,
    batch_axes: str | tuple[str, ...] = "data",
) -> LayerStep:
    """A train step in which the optimizer works during the backward pass: ``state, metrics = step(state, batch)``.

    The model is three functions, with a stack of equal layers in the middle. The backward pass computes each layer a
    second time, as under `jax.checkpoint`. The gradient of a layer lives until its update only. State and parameters
    are those of an ordinary step, so that checkpoints and `jaxsgd.make_step` take them. Each layer draws its own random
    numbers, for noise, rounding or a packed state; they are others than those of an ordinary step.

    Args:
      before: ``before(params, batch, key) -> x``, from a batch to the input of the first layer. ``params`` are all
        parameters but the layers'.
      layer: ``layer(layer_params, x, key) -> x``, one layer.
      after: ``after(params, x, batch, key) -> loss``, from the output of the last layer to a scalar.
      tx: a gradient transformation that steps each array by itself: no global norm, no sum over parameters. A rule that
        looks at a whole array, such as Muon, sees one layer at a time. So does a function in ``groups=``.
      layers: the key of ``state.params`` that holds the stack. The first axis of its arrays counts the layers.
        Default: ``"layers"``.
      layer_clip: the largest norm of the gradient of a layer, and of the other parameters together. A larger gradient
        is scaled to it. It takes the place of a clip by the global norm. Default: no clip.
      donate: reuse the state's memory. Default: True.
      mesh: the devices. The state comes from ``TrainState.create(..., mesh=mesh)`` and keeps its sharding. Default:
        the device where the state is.
      batch_axes: the axes of ``mesh`` over which the first axis of the batch is split. Default: ``"data"``.

    Returns:
      A `LayerStep`. Its metrics are those of `jaxsgd.make_step`: ``loss``, ``gradient_norm`` (before the clip),
      ``update_norm``, ``step``, ``learning_rate`` and so on.

    Raises:
      TypeError: ``tx`` is no gradient transformation.
      ValueError: ``layer_clip`` not above 0; ``mesh`` has no such axis.

    Example:
      >>> params = {"layers": jnp.ones((3, 4, 4)) / 8, "head": jnp.ones(4)}
      >>> step = make_layer_step(
      ...     lambda params, batch, key: batch["x"],
      ...     lambda w, x, key: x + jnp.tanh(x @ w),
      ...     lambda params, x, batch, key: jnp.mean((x @ params["head"] - batch["y"]) ** 2),
      ...     jaxsgd.adamw(1e-2),
      ... )
      >>> state = jaxsgd.TrainState.create(params, jaxsgd.adamw(1e-2))
      >>> state, metrics = step(state, {"x": jnp.ones((2, 4)), "y": jnp.ones(2)})
      >>> int(metrics["step"])
      1
    """
    check_optimizer(tx)
    if layer_clip is not None and not layer_clip > 0:
        raise ValueError(f"layer_clip={layer_clip}: a norm above 0 is needed. Use None for no clip")
    if mesh is not None:
        check_axes("batch_axes", batch_axes, mesh)
    return LayerStep(
        before, layer, after, optax.with_extra_args_support(tx), layers, layer_clip, donate, mesh, batch_axes
    )


class LayerStep:
    """A step that updates each layer during the backward pass. See `make_layer_step`.

    Attributes:
      fn: ``(state, batch) -> (state, metrics)``, pure and not compiled.
      jitted: ``fn`` compiled, donating the state (on a mesh: for the last state's sharding).
    """

    def __init__(
        self,
        before: Callable[..., Any],
        layer: Callable[..., Any],
        after: Callable[..., Any],
        tx: Any,
        layers: str,
        layer_clip: float | None,
        donate: bool,
        mesh: Mesh | None,
        batch_axes: str | tuple[str, ...],
    ) -> None:
        self.before, self.layer, self.after, self.tx = before, layer, after, tx
        self.layers, self.layer_clip = layers, layer_clip
        self.mesh, self.batch_axes = mesh, batch_axes
        self._donated, self._home = (0,) if donate else (), None
        self.jitted = jax.jit(self.fn, donate_argnums=self._donated)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """One step.

        Args:
          state: a `TrainState` whose parameters are a dict, without a model state.
          batch: a tree of arrays, handed to ``before`` and ``after``.

        Raises:
          TypeError: the state is no `TrainState`.
          ValueError: the parameters have no such stack; the state has a model state; the optimizer looks at several
            parameters at once, or keeps other arrays for the stack than for a layer; the loss is no real scalar.
          RuntimeError: the state was donated to an earlier step.
        """
        check_kind(state)
        refuse_deleted("state", state.step)
        state, batch = self._settle(state, batch)
        with self._entered():
            return self.jitted(state, batch)

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The step lowered for these arguments: a `jax.stages.Lowered` to compile or to print."""
        check_kind(state)
        state, batch = self._settle(state, batch)
        with self._entered():
            return self.jitted.lower(state, batch)

    def _entered(self) -> AbstractContextManager[Any]:
        return in_mesh(self.mesh if is_explicit(self.mesh) else None)

    def _settle(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """The arguments on the mesh. The step is compiled for the state's sharding."""
        if self.mesh is None:
            return state, as_arrays(batch)
        if [getattr(x, "sharding", None) for x in jax.tree.leaves(state)] != self._home:
            state, home = brought_home(self.mesh, state, self._home)
            if home != self._home:
                self._home = home
                where = jax.tree.unflatten(jax.tree.structure(state), home)
                self.jitted = compiled_for(self.fn, self.mesh, where, self._donated, others=1)
        return state, shard_batch(batch, self.mesh, self.batch_axes)

    @with_slots_on_device
    def fn(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The step as a pure function."""
        if state.graphdef is not None or jax.tree.leaves(state.model_state):
            raise ValueError("state: a model state has no place in three functions. Use jaxsgd.make_step")
        stack = _Stack.of(state.params, self.layers)
        parts = _Parts.of(self.tx, stack, state)
        moves_own = [moves for moves, mine in zip(parts.moves, stack.in_layers, strict=True) if mine]
        moves_rest = [moves for moves, mine in zip(parts.moves, stack.in_layers, strict=True) if not mine]
        first, middle, last = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        keys = jax.random.split(middle, stack.count)

        def forward(x: Any, layer: Any) -> Any:
            params, key = layer
            return self.layer(params, x, key), x

        x, back_before = jax.vjp(lambda rest: self.before(rest, batch, first), stack.rest)
        x, inputs = jax.lax.scan(forward, x, (stack.layers, keys))
        loss, back_after = jax.vjp(lambda rest, x: self.after(rest, x, batch, last), stack.rest, x)
        if jnp.shape(loss) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(f"after: it returned {loss.dtype}{list(jnp.shape(loss))}; a loss is a real scalar")
        rest_grads, dx = back_after(jnp.ones_like(loss))
        extra = taken_by(self.tx.update, {"value": loss})

        def stepped(grads: Any, params: Any, kept: list[Any], *, rest: bool) -> Any:
            """One update of all parameters, of which either those of a layer or the others count."""
            new, opt_state, steps = step_params(self.tx.update, grads, parts.of_one(kept), params, **extra)
            squares = [x for x, mine in zip(steps, stack.in_layers, strict=True) if mine is not rest]
            return new, opt_state, sum((x.astype(stack.dtype) for x in squares), jnp.zeros((), stack.dtype))

        def backward(turn: Any, carry: Any) -> Any:
            dx, layers, kept, norms = carry
            i = stack.count - 1 - turn

            def at(tree: Any) -> Any:
                return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

            def one(dx: Any, layers: Any, kept: list[Any]) -> Any:
                own, key = at(layers), keys[i]
                _, back = jax.vjp(lambda params, x: self.layer(params, x, key), own, at(inputs))
                grads, dx = back(dx)
                grads, norm = self._clipped(_moving(conjugated(grads), moves_own))
                with of_layer(i):
                    params, opt_state, moved = stepped(
                        stack.joined(jax.tree.map(jnp.zeros_like, stack.rest), grads),
                        stack.joined(stack.rest, own),
                        at(kept),
                        rest=False,
                    )
                return dx, params[self.layers], parts.of_layers(opt_state), jnp.stack([norm.astype(moved.dtype), moved])

            def none(dx: Any, layers: Any, kept: list[Any]) -> Any:
                return dx, at(layers), at(kept), jnp.zeros_like(norms)

            # A branch that the compiler cannot resolve: no slice of the stack is read after it was replaced.
            dx, own, new, more = jax.lax.cond(state.step >= 0, one, none, dx, layers, kept)
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return dx, jax.tree.map(put, layers, own), jax.tree.map(put, kept, new), norms + more

        begin = dx, stack.layers, parts.of_layers(state.opt_state), jnp.zeros(2, stack.dtype)
        dx, layers, kept, norms = jax.lax.fori_loop(0, stack.count, backward, begin)

        (through,) = back_before(dx)
        grads = conjugated(jax.tree.map(_sum, rest_grads, through))
        grads, norm = self._clipped(_moving(grads, moves_rest))
        some = jax.tree.map(lambda x: x[0], layers)
        params, opt_state, moved = stepped(
            stack.joined(grads, jax.tree.map(jnp.zeros_like, some)),
            stack.joined(stack.rest, some),
            [x[0] for x in kept],
            rest=True,
        )
        norms = jnp.sqrt(norms + jnp.stack([norm.astype(moved.dtype), moved]))
        new = state.replace(
            step=state.step + 1,
            params={**params, self.layers: layers},
            opt_state=parts.joined(kept, opt_state),
        )
        report = metrics(new.opt_state) if find_states(new.opt_state) else {}
        report |= {"step": new.step, "loss": loss, "gradient_norm": norms[0], "update_norm": norms[1]}
        return new, report

    def _clipped(self, grads: Any) -> tuple[Any, jax.Array]:
        """Gradients with a norm of at most ``layer_clip``, and the square of their norm before."""
        norm = global_norm(grads)
        if self.layer_clip is not None:
            scale = jnp.minimum(1, self.layer_clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            grads = jax.tree.map(lambda g: g if is_float0(g) else (g * scale).astype(g.dtype), grads)
        return grads, norm**2


def _moving(grads: Any, moves: list[bool]) -> Any:
    """Gradients with zeros for what the optimizer leaves where it is."""
    leaves, treedef = jax.tree.flatten(grads)
    return treedef.unflatten(g if m or is_float0(g) else jnp.zeros_like(g) for g, m in zip(leaves, moves, strict=True))


def _sum(a: Any, b: Any) -> Any:
    return a if is_float0(a) else a + b


@dataclass(frozen=True)
class _Stack:
    """The parameters, with the layers apart.

    Attributes:
      name: the key of the layers.
      layers: their parameters, the first axis of each array counts them.
      rest: the others.
      count: how many layers there are.
    """

    name: str
    layers: Any
    rest: dict[str, Any]
    count: int

    @classmethod
    def of(cls, params: Any, name: str) -> _Stack:
        if not isinstance(params, dict) or name not in params:
            keys = sorted(map(repr, params)) if isinstance(params, dict) else type(params).__name__
            raise ValueError(f"layers={name!r}: the parameters have no such key. Use a dict with it; got {keys}")
        arrays = dict(zip(leaf_names({name: params[name]}), jax.tree.leaves(params[name]), strict=True))
        sizes = {key: jnp.shape(x)[:1] for key, x in arrays.items()}
        if not arrays or len(set(sizes.values())) > 1 or () in sizes.values():
            found = ", ".join(f"{key!r} {jnp.shape(x)}" for key, x in arrays.items())
            raise ValueError(f"layers={name!r}: the first axis of all arrays counts the layers; got {found or 'none'}")
        count = next(iter(sizes.values()))[0]
        return cls(name, params[name], {key: x for key, x in params.items() if key != name}, count)

    @property
    def dtype(self) -> Any:
        return widest(x.dtype for x in jax.tree.leaves((self.layers, self.rest)))

    @property
    def in_layers(self) -> list[bool]:
        """Whether each leaf of the parameters is a layer's."""
        marks = self.joined(jax.tree.map(lambda _: False, self.rest), jax.tree.map(lambda _: True, self.layers))
        return jax.tree.leaves(marks)

    def joined(self, rest: Any, own: Any) -> dict[str, Any]:
        """Parameters, or a tree like them, with one layer in place of the stack."""
        return {**rest, self.name: own}


@dataclass(frozen=True)
class _Parts:
    """The optimizer's state: arrays that belong to the layers, and the others.

    Attributes:
      state: before the step.
      in_layers: whether the first axis of each array counts the layers.
      moves: whether each parameter is moved.
    """

    state: Any
    in_layers: list[bool]
    moves: list[bool]

    @classmethod
    def of(cls, tx: Any, stack: _Stack, state: TrainState) -> _Parts:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack.layers)
        params = stack.joined(stack.rest, one)
        wanted = jax.eval_shape(tx.init, params)
        kept, treedef = jax.tree.flatten(state.opt_state)
        for_one, other = jax.tree.flatten(wanted)
        names = leaf_names(state.opt_state)
        if treedef != other:
            raise ValueError(
                "tx: it keeps another state for the stack of layers than for one layer, such as a packed one for the "
                "larger array. Use a storage with min_size=0, or jaxsgd.make_step"
            )
        in_layers = []
        for name, x, like in zip(names, kept, for_one, strict=True):
            if x.shape not in (like.shape, (stack.count, *like.shape)):
                raise ValueError(
                    f"tx: its state {name!r} of shape {x.shape} has no part for each of {stack.count} layers; one "
                    f"layer has {like.shape}. Use a rule that steps each number by itself, or jaxsgd.make_step"
                )
            in_layers.append(x.shape != like.shape)
        _check_apart(tx, wanted, params, stack.in_layers, in_layers)
        return cls(state.opt_state, in_layers, moving(tx.update, wanted, params, None))

    def of_layers(self, state: Any) -> list[Any]:
        """The arrays of a state that belong to the layers."""
        return [x for x, mine in zip(jax.tree.leaves(state), self.in_layers, strict=True) if mine]

    def joined(self, kept: list[Any], state: Any = None) -> Any:
        """A state, by default that before the step, with these arrays of the layers."""
        leaves, treedef = jax.tree.flatten(self.state if state is None else state)
        own = iter(kept)
        return treedef.unflatten(next(own) if mine else x for x, mine in zip(leaves, self.in_layers, strict=True))

    def of_one(self, kept: list[Any]) -> Any:
        """The state before the step with these arrays of a layer, and with its own random keys."""

        def own(x: Any) -> Any:
            return layer_key(x) if is_key(x) else x

        return jax.tree.map(own, self.joined(kept))


def _check_apart(tx: Any, state: Any, params: Any, in_layers: list[bool], kept_in_layers: list[bool]) -> None:
    """Check that an optimizer steps each array by its own gradient alone.

    Raises:
      ValueError: an update, or an array of the state, depends on the gradients of several parameters.
    """
    value = jax.ShapeDtypeStruct((), jnp.float32)

    def update(grads: Any, state: Any, params: Any, value: Any) -> Any:
        return tx.update(grads, state, params, **taken_by(tx.update, {"value": value}))

    traced = jax.make_jaxpr(update)(params, state, params, value)
    names, count = leaf_names(params), len(in_layers)
    sources = [frozenset([i]) if i < count else frozenset[int]() for i in range(len(traced.jaxpr.invars))]
    reached = _reached(traced.jaxpr, sources)
    for i, found in enumerate(reached):
        if i < count:
            strange = found - {i}
        elif kept_in_layers[i - count]:
            strange = found if len(found) > 1 else frozenset()
        else:
            strange = frozenset(j for j in found if in_layers[j]) or (found if len(found) > 1 else frozenset())
        if strange:
            what = f"the update of {names[i]!r}" if i < count else "its state"
            raise ValueError(
                f"tx: {what} depends on the gradient of {names[min(strange)]!r}. A clip by the global norm, a guard or "
                "a sum over parameters needs all gradients before the first update, which takes two passes. "
                "Use layer_clip= for a clip of each layer, or jaxsgd.make_step"
            )


def _reached(jaxpr: Any, sources: list[frozenset[int]]) -> list[frozenset[int]]:
    """For each output the inputs that it may depend on, where each input stands for ``sources``."""
    known: dict[Any, frozenset[int]] = dict(zip(jaxpr.invars, sources, strict=True))
    nothing: frozenset[int] = frozenset()

    def read(x: Any) -> frozenset[int]:
        return nothing if isinstance(x, Literal) else known.get(x, nothing)

    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        inner = equation.params.get(CALLS.get(equation.primitive.name, ""))
        if inner is not None:
            outputs = _reached(inner.jaxpr, inputs)
        else:
            outputs = [nothing.union(*inputs)] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]
