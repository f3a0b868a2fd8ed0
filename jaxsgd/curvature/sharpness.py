"""The sharpness of a loss at a point, and the learning rates that it allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.batches import as_arrays, batch_size, check_divides
from jaxsgd.curvature.lanczos import Curvature, Spectrum, spectrum
from jaxsgd.curvature.linear_response import Response, read_rule
from jaxsgd.ensemble.feed import is_one_batch
from jaxsgd.ensemble.losses import apart, takes
from jaxsgd.loss import is_stateful, with_all_arguments
from jaxsgd.memory import in_device_memory
from jaxsgd.numerics import as_key, check_count
from jaxsgd.paths import check_optimizer, is_function, leaf_names
from jaxsgd.progress import Bar
from jaxsgd.report import Column, Report, Table, number, span
from jaxsgd.train_state import TrainState

__all__ = ["Sharpness", "sharpness"]


@dataclass(frozen=True, repr=False)
class Sharpness(Report):
    """The curvature of a loss at a point.

    Attributes:
      hessian: the largest and smallest eigenvalues of the Hessian over the trained parameters.
      preconditioned: those of ``P^-1/2 H P^-1/2``, where P is the divisor of each coordinate in the rule's step. For a
        rule without a divisor, those of the Hessian. None without a rule.
      thresholds: the largest stable learning rate by optimizer.
      threshold: the largest stable learning rate of the rule; without a rule, of gradient descent.
      constant: the threshold times the largest (preconditioned) eigenvalue.
      learning_rate: the rule's learning rate, as last applied, or None.
      rule: its name, or None.
      loss, gradient_norm: the values at this point.
      parameters: the number of trained numbers, without frozen leaves.
      preconditioner: the smallest, the median and the largest entry of P, or None.
      tolerance: the residuals asked for, as a share of the largest eigenvalue's magnitude.
      notes: further remarks.
    """

    picture = "sharpness"
    in_dict = ("ratio", "saddle", "converged")

    hessian: Spectrum
    preconditioned: Spectrum | None
    thresholds: Mapping[str, float]
    threshold: float
    constant: float
    learning_rate: float | None
    rule: str | None
    loss: float
    gradient_norm: float
    parameters: int
    preconditioner: tuple[float, float, float] | None
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def eigenvalues(self) -> tuple[float, ...]:
        """The largest eigenvalues of the Hessian, descending."""
        return self.hessian.eigenvalues

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue of the Hessian."""
        return self.hessian.smallest

    @property
    def residuals(self) -> tuple[float, ...]:
        """For each of `eigenvalues`, a bound of the distance to an eigenvalue of the Hessian."""
        return self.hessian.residuals

    @property
    def saddle(self) -> bool:
        """Whether the loss curves down in some direction, by more than the iteration's error."""
        return self.hessian.negative

    @property
    def converged(self) -> bool:
        return self.hessian.converged and (self.preconditioned is None or self.preconditioned.converged)

    @property
    def iterations(self) -> int:
        """The number of products of the Hessian with a vector."""
        extra = 0 if self.preconditioned is None else self.preconditioned.iterations
        return self.hessian.iterations + extra

    @property
    def ratio(self) -> float | None:
        """The learning rate as a multiple of the threshold; None where there is no rule."""
        if self.learning_rate is None:
            return None
        return self.learning_rate / self.threshold if self.threshold > 0 else math.inf

    # -- the report ---------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        if not math.isfinite(self.threshold):
            return "no direction curves up: no learning rate is too large for the curvature here"
        if self.learning_rate is None:
            named = ", ".join(f"{name} {number(value)}" for name, value in self.thresholds.items())
            return f"the largest stable learning rates are {named}"
        assert self.ratio is not None
        said = "unstable" if self.ratio > 1 else "stable"
        ends = f"the threshold {number(self.threshold)} of {self.rule}: {said}"
        return f"learning rate {number(self.learning_rate)} is {number(self.ratio)}x {ends}"

    @property
    def why(self) -> tuple[str, ...]:
        out = [
            f"loss {number(self.loss)}, gradient norm {number(self.gradient_norm)}, {self.parameters:,} parameters, "
            f"{self.iterations} products with the Hessian"
        ]
        if self.saddle:
            out.append(
                f"saddle: the smallest eigenvalue {number(self.smallest)} is negative, so a direction curves down"
            )
        else:
            out.append("no direction curves down by more than the error")
        if self.rule is not None and math.isfinite(self.threshold):
            what = "preconditioned eigenvalue" if self.preconditioner is not None else "eigenvalue"
            out.append(f"{self.rule} is stable up to {number(self.constant)} / the largest {what}")
        if self.preconditioner is not None:
            low, middle, high = self.preconditioner
            out.append(f"{self.rule} divides by {span(low, high)}, median {number(middle)}")
        return (*out, *map(self._short_of, self._unconverged()), *self.notes)

    def _unconverged(self) -> list[tuple[str, Spectrum]]:
        both = (("Hessian", self.hessian), ("preconditioned Hessian", self.preconditioned))
        return [(name, part) for name, part in both if part is not None and not part.converged]

    def _short_of(self, found: tuple[str, Spectrum]) -> str:
        name, part = found
        worst = max(*part.residuals, part.smallest_residual)
        share = worst / max(abs(part.largest), abs(part.smallest))
        return (
            f"NOT CONVERGED: {name}: after {part.iterations} products a residual is {number(worst)}, "
            f"{number(share, 1)} of the largest eigenvalue (asked: {number(self.tolerance, 1)})"
        )

    @property
    def next(self) -> tuple[str, ...]:
        out = [
            f"raise iterations={part.iterations}: the {name} has not converged" for name, part in self._unconverged()
        ]
        if self.ratio is None:
            out.append("give tx= and its state to compare your learning rate with its threshold")
        elif self.ratio > 1:
            out.append(
                f"expect oscillation in the sharpest direction; a rate below {number(self.threshold)} removes it, "
                "if the loss stops falling"
            )
        return tuple(out)

    @property
    def table(self) -> Table:
        """A row for each eigenvalue found, with a bound of its error."""
        columns = [Column("eigenvalue", kind="text"), Column("Hessian"), Column("error")]
        parts = [self.hessian]
        if self.preconditioned is not None and self.preconditioner is not None:
            columns += [Column(f"preconditioned by {self.rule}"), Column("its error")]
            parts.append(self.preconditioned)
        names = ["largest", *(f"no. {i}" for i in range(2, len(self.hessian.eigenvalues) + 1)), "smallest"]
        rows = []
        for i, name in enumerate(names):
            row: list[Any] = [name]
            for part in parts:
                last = name == "smallest"
                row += [part.smallest if last else part.eigenvalues[i]]
                row += [part.smallest_residual if last else part.residuals[i]]
            rows.append(tuple(row))
        return Table(tuple(columns), tuple(rows))


def sharpness(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *,
    tx: optax.GradientTransformation | None = None,
    opt_state: Any = None,
    eigenvalues: int = 1,
    iterations: int = 400,
    tolerance: float = 1e-5,
    microbatches: int = 1,
    key: int | jax.Array = 0,
    progress: bool | None = None,
) -> Sharpness:
    """The largest eigenvalues of the loss's Hessian, the smallest, and the learning rates they allow.

    With a rule, the Hessian is also preconditioned by the optimizer's state: ``P^-1/2 H P^-1/2``. P is the present
    divisor of each coordinate. For Adam it is the corrected ``sqrt(v) + eps`` times the correction of its mean, as in
    Cohen et al. 2022, arXiv:2207.14484. P and the threshold come from calls of the rule itself. So it works with any
    rule that treats each coordinate by itself and in proportion to the gradient. All others (signs, matrices, norms of
    layers) are refused by name. Learning-rate multipliers are part of P. Frozen parameters are not in the Hessian.
    Weight decay through the gradient is added to it.

    Above the threshold a step oscillates and grows along the sharpest direction, as far as the loss is quadratic. The
    threshold is that of the loss of ``batch``: one minibatch and all data have different ones. Of several equal
    eigenvalues only one may be found.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``, or of ``(params, batch)``; for a TrainState
        with a model state as in `jaxsgd.make_step`. All products use the same key, so its random numbers are the same.
      params: a tree of real floating parameters, an ``nnx.Module``, or a `TrainState`, with its optimizer state. The
        model state is constant. So the Hessian is that of the loss with the statistics and counters given.
      batch: a batch, or a list of batches of the same shapes, for their mean loss. A list ``[x, y]`` of arrays is one
        batch where the loss takes only the whole array.
      tx, opt_state: the optimizer, and its state after some steps. A rule without a divisor, such as momentum, needs no
        state.
      eigenvalues: the number of largest eigenvalues. Default: 1.
      iterations: the largest number of products with the Hessian, for each spectrum. Default: 400.
      tolerance: the residuals to reach, as a share of the largest eigenvalue's magnitude. Default: 1e-5.
      microbatches: the number of parts to split the batch into along its first axis, to save memory. The loss must be
        a mean over examples. Default: 1.
      key: a seed or a PRNG key. Default: 0.
      progress: show a bar. Default: on if stderr is a terminal.

    Raises:
      TypeError: ``loss_fn`` is no such function; ``batch`` is no batch; a leaf of ``params`` is no array and no number.
      ValueError: parameters that are not real floating numbers; batches of several shapes; a rule without a diagonal
        preconditioner, or whose state has seen no gradient; a loss without a finite Hessian.
    """
    for name, value in (("eigenvalues", eigenvalues), ("iterations", iterations), ("microbatches", microbatches)):
        check_count(name, value)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: a share between 0 and 1 is needed")
    if tx is None and opt_state is not None:
        raise ValueError("opt_state: it needs the rule it belongs to: tx=")
    if tx is not None:
        check_optimizer(tx)
    if isinstance(params, TrainState) and opt_state is None and tx is not None:
        opt_state = params.opt_state
    curvature, tree = _curvature(loss_fn, params, batch, microbatches, key)
    _refuse_types(curvature, integers=tx is not None)
    if curvature.size == 0:
        raise ValueError("params: there are none that are real floating numbers")
    start = jax.random.key(7)
    loss, gradient = curvature.value_and_gradient()
    value = float(loss)
    if not math.isfinite(value):
        raise ValueError(f"loss_fn: the loss is {value} at this point")
    response = None
    if tx is not None:
        opt_state = tx.init(tree) if opt_state is None else opt_state
        response = read_rule(tx, tree, in_device_memory(opt_state), _leaves(curvature, gradient), loss)
        curvature = curvature.only(response.trained)
        _, gradient = curvature.value_and_gradient()
    with Bar("sharpness", total=2 * iterations, show=progress) as bar:
        plain = spectrum(curvature, eigenvalues, iterations, tolerance, start, bar)
        other, divisors = None, None
        if response is not None:
            other, divisors = _preconditioned(
                curvature, response, plain, eigenvalues, iterations, tolerance, start, bar
            )
    norm = float(jnp.sqrt(jnp.sum(gradient * gradient)))
    shared = (plain, other)
    if response is None:
        top = plain.largest if plain.largest > plain.residuals[0] + plain.rounding else 0.0
        thresholds = {name: c / top if top > 0 else math.inf for name, c in CONSTANTS.items()}
        threshold, rate, rule, notes = thresholds["gradient descent"], None, None, ()
    else:
        assert other is not None
        top = other.largest if other.largest > other.residuals[0] + other.rounding else 0.0
        threshold, rate, rule, notes = (
            response.recursion.threshold(top),
            response.learning_rate,
            response.name,
            response.notes,
        )
        thresholds = {response.name: threshold}
    constant = threshold * top if top > 0 else math.inf
    return Sharpness(
        *shared, thresholds, threshold, constant, rate, rule, value, norm, curvature.size, divisors, tolerance, notes
    )


CONSTANTS = {"gradient descent": 2.0, "momentum 0.9": 2 * 1.9, "Nesterov 0.9": 2 * 1.9 / 2.8}
"""The largest stable learning rate times the largest eigenvalue, of optimizers without a preconditioner."""


def _preconditioned(
    curvature: Curvature, response: Response, plain: Spectrum, wanted: int, iterations: int, tolerance: float,
    key: jax.Array, bar: Bar,
) -> tuple[Spectrum, tuple[float, float, float] | None]:  # fmt: skip
    """The spectrum preconditioned by the rule, and the smallest, median and largest of its divisors."""
    p, shift = response.preconditioner, response.shift
    divisors = (float(p.min()), float(np.median(p)), float(p.max()))
    same = lambda x: bool(np.ptp(x) <= 1e-4 * np.abs(x).max()) if np.isfinite(x).all() else False  # noqa: E731
    if same(p) and same(shift):
        one = abs(p[0] - 1) < 1e-4
        scaled = plain.transformed(1.0 if one else 1 / float(p[0]), float(shift[0]))
        return scaled, None if one else divisors
    with np.errstate(divide="ignore"):
        root = np.where(np.isfinite(p), 1 / np.sqrt(p), 0)
    return spectrum(curvature, wanted, iterations, tolerance, key, bar, root, shift), divisors


def _curvature(loss_fn: Any, model: Any, batch: Any, microbatches: int, key: Any) -> tuple[Curvature, Any]:
    """The loss at this point as a `Curvature`, and the tree of parameters."""
    graphdef, params, model_state = apart(model)
    with_all_arguments(loss_fn, is_stateful(graphdef, model_state))
    if not jax.tree.leaves(params):
        raise ValueError("params: there are none")
    one = not is_function(batch) and is_one_batch(batch, takes(loss_fn, model))
    several = False
    if isinstance(batch, list) and not one:
        batch, several = _stacked([as_arrays(entry) for entry in batch]), True
    elif one:
        batch_size(batch)
        batch = as_arrays(batch)
    elif dataclasses.is_dataclass(batch):
        as_arrays(batch)
    else:
        raise TypeError(f"batch={batch!r}: a batch or a list of batches is needed. Use list(...), or next(iter(...))")
    if microbatches > 1:
        if several:
            raise ValueError(f"microbatches={microbatches}: a list of batches is split already. Use one of the two")
        check_divides(batch, microbatches, f"{microbatches} microbatches")
        batch, several = jax.tree.map(lambda x: _split(x, microbatches), batch), True
    key = as_key(key)
    names = tuple(leaf_names(params))
    return Curvature.of(loss_fn, graphdef, params, model_state, batch, several, key, names), params


def _split(x: Any, count: int) -> Any:
    if np.ndim(x) == 0:
        return np.broadcast_to(x, (count,))
    return x.reshape(count, np.shape(x)[0] // count, *np.shape(x)[1:])


def _stacked(batches: list[Any]) -> Any:
    if not batches:
        raise ValueError("batch: the list is empty; at least one batch is needed")
    shapes = [(jax.tree.map(np.shape, b), jax.tree.structure(b)) for b in batches]
    for i, (batch, shape) in enumerate(zip(batches, shapes, strict=True)):
        batch_size(batch)
        if shape != shapes[0]:
            raise ValueError(
                f"batch: batch {i} of the list has the shapes {shape[0]}, the first {shapes[0][0]}; "
                "all must be alike for their mean to be that of the examples"
            )
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *batches)


def _refuse_types(curvature: Curvature, integers: bool) -> None:
    """Check that all parameters are real floating numbers, or integers that a rule freezes."""
    for name, p in zip(curvature.names, curvature.arrays["params"], strict=True):
        if jnp.issubdtype(p.dtype, jnp.floating) or integers and not jnp.issubdtype(p.dtype, jnp.complexfloating):
            continue
        kind = "complex" if jnp.issubdtype(p.dtype, jnp.complexfloating) else "no floating number"
        raise ValueError(f"params: {name!r} is {p.dtype.name}, {kind}; a Hessian of real floating parameters is needed")


def _leaves(curvature: Curvature, flat: jax.Array) -> list[Any]:
    """A vector of the trained parameters as leaves, zeros for the others."""
    out, at = [], 0
    for p, trained in zip(curvature.arrays["params"], curvature.problem.trained, strict=True):
        part = flat[at : at + p.size].reshape(p.shape) if trained else jnp.zeros(p.shape)
        at += p.size if trained else 0
        out.append(part)
    return out
