"""torch.optim's optimizers under its names, arguments and defaults, following its trajectories.

Replace ``torch.optim.`` by ``jaxsgd.torch.`` and leave out the parameters::

    tx = jaxsgd.torch.AdamW(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

All of them share these arguments:

- ``lr`` is a number or a schedule of the 0-based step. In the state it is called ``learning_rate``.
- ``maximize`` ascends.
- ``foreach``, ``fused``, ``capturable`` and ``differentiable`` choose torch's kernels. They are accepted and change
  nothing.
- ``groups``, ``storage``, ``dynamic``, ``norms``, ``mask`` and ``rounding`` are jaxsgd's (see `jaxsgd.Rule.__call__`).
- a value out of its range raises `ValueError`, as in every rule.

Torch's parameter groups become ``groups=[(regex, {"learning_rate": ..., "weight_decay": ...})]``.

Complex parameters step as in torch: their real and imaginary parts are independent numbers. torch's gradient of a
complex parameter is the conjugate of `jax.grad`'s.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
from optax import ScalarOrSchedule

from jaxsgd.hyper import is_constant, is_off
from jaxsgd.lift import Transformation
from jaxsgd.paths import Groups, leaf_names, resolve_groups
from jaxsgd.registry import Rule
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
from jaxsgd.slots import Slot

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SparseAdam",
]  # fmt: skip

P = ParamSpec("P")


# -- from torch's call to a rule's -----------------------------------------------------------------


def _of_torch(fn: Callable[P, tuple[Rule, dict[str, Any]]]) -> Callable[P, Transformation]:
    """Let ``fn``, which returns a rule and the arguments that have other names there, make the transformation.

    Arguments that the rule has under the same name are passed on as they are.
    """
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def make(*args: P.args, **kwargs: P.kwargs) -> Transformation:
        rule, renamed = fn(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        passed = {name: value for name, value in bound.arguments.items() if name in rule.defaults}
        rule = _ascending(rule) if bound.arguments.get("maximize") else rule
        return rule(**{"learning_rate": bound.arguments["lr"], **passed, **renamed})

    return make


def _numbers(argument: str, given: Any, *names: str) -> dict[str, Any]:
    """An argument of torch that holds two hyperparameters, by the names that they have here."""
    try:
        return dict(zip(names, given, strict=True))
    except (TypeError, ValueError):
        raise TypeError(f"{argument}={given!r}: two numbers are needed, ({', '.join(names)})") from None


# The rules made of a rule are remembered: a rule is static in a compiled step.


@functools.cache
def _l2(rule: Rule) -> Rule:
    """The same rule with weight decay added to the gradient, as torch does by default."""
    return replace(rule, coupled=True)


@functools.cache
def _ascending(rule: Rule) -> Rule:
    """The same rule, uphill: weight decay is added to the negative gradient."""
    return replace(rule, advance=lambda leaf: rule.step(leaf.replace(g=-leaf.g)))


def _parts(x: Any) -> Any:
    """torch.view_as_real: the real and the imaginary part along a new last axis."""
    return None if x is None else jnp.stack([jnp.real(x), jnp.imag(x)], -1)


def _whole(x: Any) -> Any:
    """torch.view_as_complex."""
    return None if x is None else jax.lax.complex(x[..., 0], x[..., 1])


@functools.cache
def _in_parts(rule: Rule) -> Rule:
    """The same elementwise rule on the parts of complex arrays. Their slots are complex, as in torch."""

    def fn(g: Any, *slots: Any, **rest: Any) -> Any:
        if not any(x is not None and jnp.iscomplexobj(x) for x in (g, *slots)):
            return rule.fn(g, *slots, **rest)
        return tuple(map(_whole, rule.fn(_parts(g), *map(_parts, slots), **rest)))

    return replace(rule, fn=fn, slots={name: _begun_in_parts(slot) for name, slot in rule.slots.items()})


def _begun_in_parts(slot: Slot) -> Slot:
    @functools.wraps(slot.begin)
    def begin(p: Any, **hyper: Any) -> Any:
        return _whole(slot.begin(_parts(p), **hyper)) if jnp.iscomplexobj(p) else slot.begin(p, **hyper)

    return replace(slot, begin=begin)


@functools.cache
def _refusing(rule: Rule, refusal: Callable[[Any], str | None]) -> Rule:
    """The same rule, whose ``init`` raises where ``refusal`` gives a reason against a leaf that is not frozen."""

    def call(**arguments: Any) -> dict[str, Any]:
        groups = arguments["groups"]
        groups = list(groups.items()) if isinstance(groups, Mapping) else groups

        def routes(params: Any) -> list[dict[str, Any]]:
            leaves, names = jax.tree.leaves(params), leaf_names(params)
            for name, leaf, own in zip(names, leaves, resolve_groups(groups, names, leaves), strict=True):
                why = None if own.get("frozen") else refusal(leaf)
                if why is not None:
                    raise ValueError(f"{rule.name}: {name!r} {why}")
            return [{}] * len(leaves)

        return (arguments if rule.call is None else rule.call(**arguments)) | {"routes": routes}

    return replace(rule, call=call)


def _complex(leaf: Any) -> str | None:
    dtype = jnp.result_type(leaf)
    return f"is {dtype.name}; as in torch, complex parameters are not supported" if dtype.kind == "c" else None


def _no_matrix(leaf: Any) -> str | None:
    if jnp.ndim(leaf) == 2:
        return _complex(leaf)
    return (
        f"has the shape {jnp.shape(leaf)}, and as in torch matrices only are taken. Use jaxsgd.muon, which takes whole "
        "trees and updates all but the hidden matrices by Adam"
    )


# -- torch's names ---------------------------------------------------------------------------------


@_of_torch
def SGD(
    lr: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.0,
    dampening: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    fused: bool | None = None,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.SGD: `jaxsgd.rules.torch.torch_sgd` with L2 decay.

    Raises:
      ValueError: ``nesterov`` without momentum, or with dampening.
    """
    if nesterov and (is_off(momentum) or is_constant(dampening) and dampening != 0):
        raise ValueError(f"nesterov=True needs momentum > 0 and dampening=0; got {momentum=}, {dampening=}")
    return _l2(torch_sgd), {}


@_of_torch
def Adam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    decoupled_weight_decay: bool = False,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.Adam: `jaxsgd.adam` (`torch_amsgrad` with ``amsgrad``), decay in the gradient unless decoupled."""
    rule = _in_parts(torch_amsgrad if amsgrad else adam)
    return rule if decoupled_weight_decay else _l2(rule), _numbers("betas", betas, "b1", "b2")


@_of_torch
def AdamW(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.AdamW: `Adam` with decoupled weight decay, 0.01 by default (optax: 0.0001)."""
    return _in_parts(torch_amsgrad if amsgrad else adam), _numbers("betas", betas, "b1", "b2")


@_of_torch
def NAdam(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    momentum_decay: ScalarOrSchedule = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.NAdam: `jaxsgd.rules.torch.torch_nadam`, whose momentum rises by ``momentum_decay``."""
    rule = _in_parts(torch_nadam)
    return rule if decoupled_weight_decay else _l2(rule), _numbers("betas", betas, "b1", "b2")


@_of_torch
def Adamax(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.Adamax: `jaxsgd.adamax` with L2 decay."""
    return _l2(_in_parts(adamax)), _numbers("betas", betas, "b1", "b2")


@_of_torch
def RMSprop(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    momentum: ScalarOrSchedule = 0.0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    *,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.RMSprop: `jaxsgd.rules.torch.torch_rmsprop` with L2 decay."""
    return _l2(_in_parts(torch_rmsprop)), {}


@_of_torch
def Adagrad(
    lr: ScalarOrSchedule = 1e-2,
    lr_decay: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    initial_accumulator_value: ScalarOrSchedule = 0.0,
    eps: ScalarOrSchedule = 1e-10,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.Adagrad: `jaxsgd.rules.torch.torch_adagrad` with L2 decay."""
    return _l2(_in_parts(torch_adagrad)), {}


@_of_torch
def Adadelta(
    lr: ScalarOrSchedule = 1.0,
    rho: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    foreach: bool | None = None,
    *,
    capturable: bool = False,
    maximize: bool = False,
    differentiable: bool = False,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.Adadelta: `jaxsgd.adadelta`, whose weight decay is L2."""
    return _in_parts(adadelta), {}


@_of_torch
def RAdam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.RAdam: `jaxsgd.rules.torch.torch_radam`, decay in the gradient unless decoupled."""
    rule = _in_parts(torch_radam)
    return rule if decoupled_weight_decay else _l2(rule), _numbers("betas", betas, "b1", "b2")


@_of_torch
def ASGD(
    lr: ScalarOrSchedule = 1e-2,
    lambd: ScalarOrSchedule = 1e-4,
    alpha: ScalarOrSchedule = 0.75,
    t0: ScalarOrSchedule = 1e6,
    weight_decay: ScalarOrSchedule = 0.0,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
    *,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.ASGD: `jaxsgd.rules.torch.torch_asgd`; `jaxsgd.eval_params` gives the average."""
    return torch_asgd, {}


@_of_torch
def Rprop(
    lr: ScalarOrSchedule = 1e-2,
    etas: tuple[Any, Any] = (0.5, 1.2),
    step_sizes: tuple[Any, Any] = (1e-6, 50.0),
    *,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.Rprop: `jaxsgd.rules.torch.torch_rprop`; only the first step's ``lr`` counts."""
    bounds = _numbers("step_sizes", step_sizes, "min_step_size", "max_step_size")
    return _in_parts(torch_rprop), _numbers("etas", etas, "eta_minus", "eta_plus") | bounds


@_of_torch
def Adafactor(
    lr: ScalarOrSchedule = 1e-2,
    beta2_decay: Any = -0.8,
    eps: tuple[Any, Any] = (None, 1e-3),
    d: ScalarOrSchedule = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.Adafactor: `jaxsgd.rules.torch.torch_adafactor`, whose ``decay_rate`` is ``-beta2_decay``.

    ``eps[0]`` None is the rounding unit of the parameter, and of float32 for narrower ones.

    Raises:
      ValueError: ``beta2_decay`` above 0; from ``init``, a complex array.
    """
    if is_constant(beta2_decay) and beta2_decay > 0:
        raise ValueError(f"beta2_decay={beta2_decay!r}: it must be 0 or less")
    return _refusing(torch_adafactor, _complex), {"decay_rate": -beta2_decay, **_numbers("eps", eps, "eps1", "eps2")}


@_of_torch
def Muon(
    lr: ScalarOrSchedule = 1e-3,
    weight_decay: ScalarOrSchedule = 0.1,
    momentum: ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: ScalarOrSchedule = 1e-7,
    ns_steps: Any = 5,
    adjust_lr_fn: str | None = None,
    *,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.Muon: `jaxsgd.rules.torch.torch_muon`, on matrices, in their precision where torch rounds to bfloat16.

    ``adjust_lr_fn`` takes the array as (rows, columns): "original" (None) scales by ``sqrt(max(1, rows / columns))``.
    A weight in torch is (out, in), a Flax kernel is (in, out). On a kernel the scale is ``sqrt(max(1, in / out))``;
    `jaxsgd.muon` has torch's ``sqrt(max(1, out / in))``. "match_rms_adamw" is the same for both.

    Raises:
      ValueError: another ``adjust_lr_fn``; from ``init``, a complex array, or one of other than two dimensions.
    """
    return _refusing(torch_muon, _no_matrix), {}


@_of_torch
def SparseAdam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    maximize: bool = False,
    *,
    groups: Groups = (),
    storage: Any = None,
    dynamic: tuple[str, ...] = (),
    norms: bool = False,
    mask: Any = None,
    rounding: str | None = None,
):
    """torch.optim.SparseAdam: `jaxsgd.rules.torch.torch_sparse_adam`, on dense gradients.

    A sparse gradient in torch has the indices of its rows. Here these are the rows that are not all zero.

    Raises:
      ValueError: from ``init``, a complex array.
    """
    return _refusing(torch_sparse_adam, _complex), _numbers("betas", betas, "b1", "b2")
