"""The result of a minimization: the best point, and one true sentence about the end of the search."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

__all__ = ["Result", "Status"]


class Status(enum.IntEnum):
    """The reason why a solver ended. `sentence` is a full sentence.

    The three that begin with ``CONVERGED`` are successes.

    >>> Status.ITERATION_LIMIT.sentence
    'The limit of iterations was reached before convergence.'
    """

    RUNNING = 0
    CONVERGED_GRADIENT = 1
    CONVERGED_VALUE = 2
    CONVERGED_STEP = 3
    ITERATION_LIMIT = 4
    EVALUATION_LIMIT = 5
    LINE_SEARCH_FAILED = 6
    STEP_TOO_SMALL = 7
    NOT_FINITE_START = 8
    NOT_FINITE = 9
    UNBOUNDED = 10
    SADDLE_POINT = 11
    FLAT = 12

    @property
    def sentence(self) -> str:
        """One sentence about the end of the search."""
        return SENTENCES[self]

    @property
    def success(self) -> bool:
        """Whether the solver converged."""
        return self in SUCCESSES


SUCCESSES = (Status.CONVERGED_GRADIENT, Status.CONVERGED_VALUE, Status.CONVERGED_STEP)

SENTENCES = {
    Status.RUNNING: "The solver has not ended.",
    Status.CONVERGED_GRADIENT: "Converged: the gradient is zero within the tolerance.",
    Status.CONVERGED_VALUE: "Converged: no step lowers the value any further at this precision.",
    Status.CONVERGED_STEP: "Converged: the predicted step changes no parameter at this precision.",
    Status.ITERATION_LIMIT: "The limit of iterations was reached before convergence.",
    Status.EVALUATION_LIMIT: "The limit of evaluations was reached before convergence.",
    Status.LINE_SEARCH_FAILED: "The line search found no lower value along a descent direction. "
    "The function may have a kink or noise there, or a wrong gradient.",
    Status.STEP_TOO_SMALL: "The trust region shrank to nothing without a lower value. "
    "The function may have a kink or noise there, or a wrong derivative.",
    Status.NOT_FINITE_START: "The value or the gradient at the start is not finite.",
    Status.NOT_FINITE: "No finite value was found next to the best point.",
    Status.UNBOUNDED: "The value fell as far as numbers go: the function has no minimum.",
    Status.SADDLE_POINT: "The gradient is zero, but the curvature is negative: the point is no minimum.",
    Status.FLAT: "The value is flat: parameters, single ones or several together, have no effect near the best point, "
    "but have one elsewhere. Another start may find a lower value.",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Result:
    """The result of `jaxsgd.minimize` and `jaxsgd.least_squares`: a pytree of arrays.

    Attributes:
      params: the best point, in the structure and dtypes of the start.
      value: the value there, a scalar.
      grad_norm: the largest absolute entry of the gradient there. With bounds: of the projected gradient.
      iterations: the number of accepted steps, int32.
      evaluations: the number of evaluations of the function with its gradient, int32.
      code: the status as int32, an array of them under `jax.vmap`.
      aux: the auxiliary output of the function at ``params``, or None.

    >>> import jax.numpy as jnp
    >>> result = Result(jnp.ones(2), jnp.float32(0), jnp.float32(0), jnp.int32(3), jnp.int32(4), jnp.int32(1))
    >>> result.status.name
    'CONVERGED_GRADIENT'
    """

    params: Any
    value: Any
    grad_norm: Any
    iterations: Any
    evaluations: Any
    code: Any
    aux: Any = None

    @property
    def status(self) -> Any:
        """A `Status`; an integer array inside `jax.jit` and for a batch of results."""
        if isinstance(self.code, Tracer) or np.ndim(self.code):
            return self.code
        return Status(int(self.code))

    @property
    def success(self) -> Any:
        """Whether the solver converged: a bool; a boolean array inside `jax.jit` and for a batch of results."""
        out = (self.code >= min(SUCCESSES)) & (self.code <= max(SUCCESSES))
        return out if isinstance(self.code, Tracer) or np.ndim(self.code) else bool(out)

    def __str__(self) -> str:
        if isinstance(self.code, Tracer) or not isinstance(self.code, jax.Array | np.ndarray | np.generic):
            return f"Result(value={self.value}, status={self.code})"
        if np.ndim(self.code):
            return self._counted()
        return (
            f"{self.status.sentence}\n"
            f"value {float(self.value):.6g}, gradient {float(self.grad_norm):.3g}, "
            f"{int(self.iterations)} iterations, {int(self.evaluations)} evaluations"
        )

    __repr__ = __str__

    def _counted(self) -> str:
        """The number of results for each status, with the range of evaluations."""
        codes = np.asarray(self.code).ravel()
        if not codes.size:
            return "0 results"
        rows = [f"{np.sum(codes == code):>6}  {Status(int(code)).sentence}" for code in np.unique(codes)]
        least, most = int(np.min(self.evaluations)), int(np.max(self.evaluations))
        return "\n".join([f"{codes.size} results, {least} to {most} evaluations each", *rows])
