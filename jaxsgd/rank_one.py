"""Second moments by the means of their rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.numerics import wide
from jaxsgd.storage import Storage

__all__ = ["Factored", "Factors", "factored"]


class Factors(NamedTuple):
    """A matrix of rank one, or a stack of them.

    Attributes:
      rows: the mean of each row, shape ``(..., n)``.
      columns: the mean of each column, shape ``(..., m)``.
    """

    rows: jax.Array
    columns: jax.Array


@dataclass(frozen=True)
class Factored:
    """Means of rows and columns. See `factored`."""

    min_dim_size: int

    def accepts(self, kind: str) -> bool:
        return kind == "square"

    def _packs(self, x: Any) -> bool:
        return x.ndim > 1 and min(x.shape[-2:]) >= self.min_dim_size and jnp.issubdtype(x.dtype, jnp.floating)

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        del key
        return Factors(jnp.mean(x, -1), jnp.mean(x, -2)) if self._packs(x) else x

    def unpack(self, packed: Any) -> jax.Array:
        if not isinstance(packed, Factors):
            return wide(packed)
        # Each factor by the root of the mean: the product of rows and columns may underflow.
        root = jnp.sqrt(jnp.mean(packed.rows, -1, keepdims=True))
        share = 1 / jnp.where(root > 0, root, 1)
        return (packed.rows * share)[..., :, None] * (packed.columns * share)[..., None, :]


def factored(*, min_dim_size: int = 128) -> Storage:
    r"""Second moments as the means of their rows and columns: ``storage={"nu": factored()}``.

    The factors of Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) for any rule with a second moment:
    $v \approx r c^\top / \bar r$. A matrix of $n \times m$ keeps $n + m$ numbers. The last two axes of an array are the
    matrix; axes before them are a stack. The step itself sees the new moment before it is factored. An array stays as
    it is if one of its last two axes is shorter than ``min_dim_size``. So does a slot that is no second moment.

    Args:
      min_dim_size: the least size of both axes. Default: 128, as in Adafactor.

    Raises:
      ValueError: ``min_dim_size`` is below 2.

    Example:
      >>> tx = jaxsgd.adam(1e-3, storage={"mu": jaxsgd.int8(), "nu": jaxsgd.factored()})
      >>> tx.init({"kernel": jnp.zeros((256, 512))}).slots["nu"]["kernel"].rows.shape
      (256,)
    """
    if isinstance(min_dim_size, bool) or min_dim_size < 2 or math.floor(min_dim_size) != min_dim_size:
        raise ValueError(f"min_dim_size={min_dim_size}: a whole number of at least 2 is needed")
    return Factored(min_dim_size)
