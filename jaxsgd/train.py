"""The train step: from a loss and a gradient transformation to one compiled, donating function.

Floor 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from jaxsgd.numerics import global_norm
from jaxsgd.paths import leaf_names
from jaxsgd.rules.averaging import eval_params
from jaxsgd.state import find_states, metrics

__all__ = ["Step", "TrainState", "make_step"]


@struct.dataclass
class TrainState:
    """All that changes in training, as one pytree.

    Attributes:
      step: int32 scalar, completed steps.
      params: what is trained.
      opt_state: the transformation's state.
      key: the base PRNG key; step ``i`` uses ``jax.random.fold_in(key, i)``.
      model_state: what the model changes by itself (batch statistics, NNX variables other than
        ``nnx.Param``), or None.
      graphdef: the static half of an NNX model, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    model_state: Any = None
    graphdef: Any = struct.field(pytree_node=False, default=None)

    @classmethod
    def create(
        cls, model: Any, tx: optax.GradientTransformation, *, key: int | jax.Array = 0, model_state: Any = None
    ) -> TrainState:
        """The state before the first step. Arrays are copied: the step donates its own, never the caller's.

        Args:
          model: an ``nnx.Module``, or a tree of parameters (of Flax linen's ``init``, or any other).
          tx: any optax gradient transformation.
          key: a seed or a PRNG key.
          model_state: with a tree of parameters, what else the model carries; then the loss takes and
            returns it (see `make_step`).

        Raises:
          ValueError: what ``tx.init`` refuses: integer parameters, group patterns that match nothing.
        """
        graphdef = None
        if isinstance(model, nnx.Module):
            if model_state is not None:
                raise ValueError("model_state: an nnx.Module carries its own; leave it out")
            graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
        else:
            params = model
        params, model_state = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, model_state))
        key = jax.random.key(key) if isinstance(key, int) else jnp.array(key, copy=True)
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), key, model_state, graphdef)

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate: those of `jaxsgd.eval_params`."""
        return eval_params(self.opt_state, self.params)

    @property
    def model(self) -> Any:
        """The NNX model with the parameters to evaluate. Its arrays are copies: the next step donates its own."""
        if self.graphdef is None:
            raise ValueError("model: this state was not made from an nnx.Module; use state.eval_params")
        parts = jax.tree.map(lambda x: jnp.array(x, copy=True), (self.eval_params, self.model_state))
        return nnx.merge(self.graphdef, *parts)


Loss = Callable[..., Any]


def make_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    *,
    gradient_at: Callable[[Any, Any], Any] | None = None,
    donate: bool = True,
) -> Step:
    """A compiled train step: ``state, metrics = step(state, batch)``.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``. With an NNX model, ``params`` is the
        model itself, whose other variables (batch statistics, counters) are carried along. With a
        ``model_state`` of its own: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``.
      tx: any optax gradient transformation; it receives the loss as the extra argument ``value``.
      gradient_at: optional ``(opt_state, params) -> params`` where the gradient is taken, for example
        `jaxsgd.look_ahead`.
      donate: give the state's memory to the next state. The old state cannot be used again then.

    Returns:
      A `Step`. Its metrics are device scalars: ``loss``, ``gradient_norm``, ``update_norm``, what
      `jaxsgd.metrics` reads in the optimizer's state (``step``, ``learning_rate``, ...), and ``aux``.
    """
    return Step(loss_fn, optax.with_extra_args_support(tx), gradient_at, donate)


class Step:
    """One train step. Call it, or use the pure function ``step.fn`` under scan, vmap or a jit of your own.

    Attributes:
      fn: ``(state, batch) -> (state, metrics)``, pure and not compiled.
      jitted: ``fn`` compiled, donating the state.
      compiles: how often ``fn`` was traced.
    """

    def __init__(self, loss_fn: Loss, tx: Any, gradient_at: Any, donate: bool) -> None:
        self.loss_fn, self.tx, self.gradient_at = loss_fn, tx, gradient_at
        self.compiles = 0
        self.jitted = jax.jit(self._counted, donate_argnums=(0,) if donate else ())
        self._sizes: set[int] = set()

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """One step.

        Raises:
          ValueError: the batch is empty, or its arrays disagree on their first axis; the loss is no scalar.
          RuntimeError: the state was given to an earlier step, which reused its memory.
        """
        if isinstance(state.step, jax.Array) and state.step.is_deleted():
            raise RuntimeError(
                "state: an earlier step took this state's memory; go on with the state it returned, "
                "or build the step with donate=False"
            )
        size = batch_size(batch)
        if size is not None and size not in self._sizes:
            if self._sizes:
                seen = ", ".join(map(str, sorted(self._sizes)))
                warnings.warn(
                    f"batch: {size} examples, so far {seen}: the step is compiled anew for each size; "
                    "drop or pad the odd batch",
                    stacklevel=2,
                )
            self._sizes.add(size)
        return self.jitted(state, batch)

    def _counted(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        self.compiles += 1
        return self.fn(state, batch)

    def fn(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The step as a pure function."""
        key = jax.random.fold_in(state.key, state.step)
        at = state.params if self.gradient_at is None else self.gradient_at(state.opt_state, state.params)
        (loss, (model_state, aux)), grads = jax.value_and_grad(self._loss, has_aux=True)(at, state, batch, key)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params, value=loss)
        new = state.replace(  # type: ignore[attr-defined]
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            model_state=model_state,
        )
        report = metrics(opt_state) if find_states(opt_state) else {}
        report |= {
            "step": new.step,
            "loss": loss,
            "gradient_norm": global_norm(grads),
            "update_norm": global_norm(updates),
        }
        return new, report if aux is None else {**report, "aux": aux}

    def _loss(self, params: Any, state: TrainState, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
        """The user's loss in one form: ``loss, (model_state, aux)``."""
        model_state = state.model_state
        if state.graphdef is not None:
            model = nnx.merge(state.graphdef, params, model_state, copy=True)
            out = self.loss_fn(model, batch, key)
            model_state = nnx.state(model, nnx.Not(nnx.Param))
        elif model_state is not None:
            out = self.loss_fn(params, model_state, batch, key)
            try:
                loss, (model_state, aux) = out
            except (TypeError, ValueError):
                raise ValueError("loss_fn: with a model_state it returns (loss, (model_state, aux))") from None
            out = (loss, aux)
        else:
            out = self.loss_fn(params, batch, key)
        loss, aux = out if isinstance(out, tuple) else (out, None)
        if jnp.shape(loss) != ():
            raise ValueError(f"loss_fn: the loss has the shape {jnp.shape(loss)}; a scalar is needed (its mean?)")
        return loss, (model_state, aux)


def batch_size(batch: Any) -> int | None:
    """The length of the first axis, which all arrays of a batch share; None where there is no array.

    Raises:
      ValueError: names the arrays that disagree, or the empty one.
    """
    sizes = {
        name: jnp.shape(leaf)[0]
        for name, leaf in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True)
        if jnp.ndim(leaf) > 0
    }
    if not sizes:
        return None
    (first, size), *others = sizes.items()
    for name, other in others:
        if other != size:
            raise ValueError(f"batch: {first!r} has {size} examples, {name!r} has {other}; they must be the same")
    if size == 0:
        raise ValueError(f"batch: {first!r} is empty; at least one example is needed")
    return size
