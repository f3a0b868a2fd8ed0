"""torch.optim's optimizers under its names, arguments and defaults, following its trajectories.

Floor 4. Porting is replacing ``torch.optim.`` by ``jaxsgd.torch.`` and leaving out the parameters::

    tx = jaxsgd.torch.AdamW(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

What these have in common:

- ``lr`` is a number or a schedule of the 0-based step, and lives in the state as ``learning_rate``.
- ``maximize`` ascends.
- ``foreach``, ``fused``, ``capturable`` and ``differentiable`` ask of torch's kernels what every compiled JAX
  update is already; they are accepted so that a call can be carried over, and change nothing.
- ``groups``, ``storage``, ``dynamic``, ``norms`` and ``mask`` are jaxsgd's, as keyword arguments (see
  `jaxsgd.Rule.__call__`).
- a value out of its range raises `ValueError`, as every rule does.

Torch's parameter groups become ``groups=[(regex, {"learning_rate": ..., "weight_decay": ...})]``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsgd.paths import leaf_names
from jaxsgd.rule import Rule
from jaxsgd.rules.adaptive import adadelta, adam, adamax
from jaxsgd.rules.torch import (
    torch_adafactor,
    torch_adagrad,
    torch_amsgrad,
    torch_asgd,
    torch_muon,
    torch_nadam,
    torch_radam,
    torch_rmsprop,
    torch_rprop,
    torch_sgd,
    torch_sparse_adam,
)

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SparseAdam",
]  # fmt: skip

Transformation = optax.GradientTransformationExtraArgs


def _l2(rule: Rule) -> Rule:
    """The same rule with weight decay added to the gradient, as torch does by default."""
    return dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, coupled=True))


def _ascend_if(maximize: bool, tx: Transformation) -> Transformation:
    return optax.chain(optax.scale(-1.0), tx) if maximize else tx


def _numbers(argument: str, given: Any, *names: str) -> dict[str, Any]:
    """An argument of torch that holds several hyperparameters, by the names that they have here."""
    try:
        return dict(zip(names, given, strict=True))
    except (TypeError, ValueError):
        count = {2: "two", 3: "three"}[len(names)]
        raise TypeError(f"{argument}={given!r}: {count} numbers are needed, ({', '.join(names)})") from None


def _betas(betas: Any) -> dict[str, Any]:
    return _numbers("betas", betas, "b1", "b2")


def SGD(
    lr: Any = 1e-3,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    fused: bool | None = None,
    **frame: Any,
) -> Transformation:
    """torch.optim.SGD: `jaxsgd.rules.torch.torch_sgd` with L2 decay.

    Raises:
      ValueError: ``nesterov`` without momentum, or with dampening.
    """
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov=True needs momentum > 0 and dampening=0; got {momentum=}, {dampening=}")
    made = _l2(torch_sgd)(
        lr, momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay, **frame
    )
    return _ascend_if(maximize, made)


def Adam(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    amsgrad: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    decoupled_weight_decay: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.Adam: `jaxsgd.adam` (`torch_amsgrad` with ``amsgrad``), decay in the gradient unless decoupled."""
    base = torch_amsgrad if amsgrad else adam
    made = (base if decoupled_weight_decay else _l2(base))(
        lr, **_betas(betas), eps=eps, weight_decay=weight_decay, **frame
    )
    return _ascend_if(maximize, made)


def AdamW(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    **frame: Any,
) -> Transformation:
    """torch.optim.AdamW: `Adam` with decoupled weight decay, 0.01 by default (optax: 0.0001)."""
    return Adam(
        lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True, **frame
    )  # fmt: skip


def NAdam(
    lr: Any = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.NAdam: `jaxsgd.rules.torch.torch_nadam`, whose momentum rises by ``momentum_decay``."""
    made = (torch_nadam if decoupled_weight_decay else _l2(torch_nadam))(
        lr, **_betas(betas), eps=eps, momentum_decay=momentum_decay, weight_decay=weight_decay, **frame
    )
    return _ascend_if(maximize, made)


def Adamax(
    lr: Any = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.Adamax: `jaxsgd.adamax` with L2 decay."""
    made = _l2(adamax)(lr, **_betas(betas), eps=eps, weight_decay=weight_decay, **frame)
    return _ascend_if(maximize, made)


def RMSprop(
    lr: Any = 1e-2,
    alpha: Any = 0.99,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    momentum: Any = 0.0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.RMSprop: `jaxsgd.rules.torch.torch_rmsprop` with L2 decay."""
    made = _l2(torch_rmsprop)(
        lr, alpha=alpha, eps=eps, momentum=momentum, centered=centered, weight_decay=weight_decay, **frame
    )
    return _ascend_if(maximize, made)


def Adagrad(
    lr: Any = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: Any = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    **frame: Any,
) -> Transformation:
    """torch.optim.Adagrad: `jaxsgd.rules.torch.torch_adagrad` at the rate ``lr / (1 + step * lr_decay)``, L2 decay."""

    def decaying(count):
        return (lr(count) if callable(lr) else lr) / (1 + count * lr_decay)

    made = _l2(torch_adagrad)(
        decaying if lr_decay else lr,
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        weight_decay=weight_decay,
        **frame,
    )
    return _ascend_if(maximize, made)


def Adadelta(
    lr: Any = 1.0,
    rho: Any = 0.9,
    eps: float = 1e-6,
    weight_decay: Any = 0.0,
    foreach: bool | None = None,
    *,
    capturable: bool = False,
    maximize: bool = False,
    differentiable: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.Adadelta: `jaxsgd.adadelta`, whose weight decay is L2 already."""
    return _ascend_if(maximize, adadelta(lr, rho=rho, eps=eps, weight_decay=weight_decay, **frame))


def RAdam(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.RAdam: `jaxsgd.rules.torch.torch_radam`, decay in the gradient unless decoupled."""
    made = (torch_radam if decoupled_weight_decay else _l2(torch_radam))(
        lr, **_betas(betas), eps=eps, weight_decay=weight_decay, **frame
    )
    return _ascend_if(maximize, made)


def ASGD(
    lr: Any = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: Any = 0.0,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.ASGD: `jaxsgd.rules.torch.torch_asgd`; `jaxsgd.eval_params` gives the average."""
    return _ascend_if(maximize, torch_asgd(lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, **frame))


def Rprop(
    lr: Any = 1e-2,
    etas: tuple[Any, Any] = (0.5, 1.2),
    step_sizes: tuple[Any, Any] = (1e-6, 50.0),
    *,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.Rprop: `jaxsgd.rules.torch.torch_rprop`; only the first step's ``lr`` counts."""
    bounds = _numbers("step_sizes", step_sizes, "min_step_size", "max_step_size")
    return _ascend_if(maximize, torch_rprop(lr, **_numbers("etas", etas, "eta_minus", "eta_plus"), **bounds, **frame))


def Adafactor(
    lr: Any = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[Any, Any] = (None, 1e-3),
    d: Any = 1.0,
    weight_decay: Any = 0.0,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.Adafactor: `jaxsgd.rules.torch.torch_adafactor`, whose ``decay_rate`` is ``-beta2_decay``.

    ``eps[0]`` None is the rounding unit of the parameter, and of float32 for narrower ones.

    Raises:
      ValueError: ``beta2_decay`` above 0.
    """
    if beta2_decay > 0:
        raise ValueError(f"beta2_decay={beta2_decay!r}: it must be 0 or less")
    made = torch_adafactor(
        lr, decay_rate=-beta2_decay, **_numbers("eps", eps, "eps1", "eps2"), d=d, weight_decay=weight_decay, **frame
    )
    return _ascend_if(maximize, made)


def Muon(
    lr: Any = 1e-3,
    weight_decay: Any = 0.1,
    momentum: Any = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    **frame: Any,
) -> Transformation:
    """torch.optim.Muon on matrices, and in their precision where torch rounds to bfloat16.

    ``adjust_lr_fn`` reads the array as it is, (rows, columns), and "original" (None) scales by
    ``sqrt(max(1, rows / columns))``. A weight in torch is (out, in), a Flax kernel (in, out): on the kernel of the
    same layer the scale is ``sqrt(max(1, in / out))``, and `jaxsgd.muon` gives torch's ``sqrt(max(1, out / in))``.
    "match_rms_adamw" is the same for both.

    Raises:
      ValueError: another ``adjust_lr_fn``; from ``init``, an array of other than two dimensions.
    """
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(f'adjust_lr_fn={adjust_lr_fn!r}: "original" (or None) and "match_rms_adamw" are known')
    coefficients = tuple(_numbers("ns_coefficients", ns_coefficients, "a", "b", "c").values())
    spec = torch_muon.spec.fix(coefficients=coefficients, adjust=adjust_lr_fn or "original")
    made = dataclasses.replace(torch_muon, spec=spec)(
        lr, momentum=momentum, nesterov=nesterov, eps=eps, ns_steps=ns_steps, weight_decay=weight_decay, **frame
    )
    lift: Any = made.update.__self__  # type: ignore[attr-defined]

    def init(params: Any) -> Any:
        for name, leaf, own in zip(leaf_names(params), jax.tree.leaves(params), lift.overrides(params), strict=True):
            if jnp.ndim(leaf) != 2 and not own.get("frozen"):
                raise ValueError(
                    f"Muon: {name!r} has the shape {jnp.shape(leaf)}, and matrices only are taken, as in torch; "
                    "jaxsgd.muon takes whole trees, and updates by Adam what is no hidden matrix"
                )
        return made.init(params)

    return made._replace(init=init)


def SparseAdam(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    maximize: bool = False,
    **frame: Any,
) -> Transformation:
    """torch.optim.SparseAdam on dense gradients: `jaxsgd.rules.torch.torch_sparse_adam`.

    The rows that torch is told by a sparse gradient's indices are here those whose gradient is not all zero.
    """
    return _ascend_if(maximize, torch_sparse_adam(lr, **_betas(betas), eps=eps, **frame))
