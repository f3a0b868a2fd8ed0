"""A user's function as a solver wants it: pure, checked, and of a vector."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from jaxsgd.numerics import widest
from jaxsgd.paths import check_params, leaf_names

__all__ = [
    "Space",
    "check_args",
    "check_bounds",
    "check_fun",
    "check_hash",
    "check_start",
    "hoist",
    "is_concrete",
    "is_split",
    "peak",
]

Vector = list[jax.Array]
"""A point or direction: one flat array, or for sharded parameters one array a leaf."""


def check_fun(fun: Any, form: str, name: str, count: int) -> None:
    """Check that ``fun`` can be called with so many arguments.

    Args:
      fun: the function.
      form: its form, for the message.
      name: the name of the argument.
      count: the number of its arguments.

    Raises:
      TypeError: it is no function, or takes other arguments.
    """
    if not callable(fun):
        raise TypeError(f"{name}={fun!r}: it is no function. Use a function {form}")
    try:
        inspect.signature(fun).bind(*count * [None])
    except TypeError as error:
        many = "argument" if count == 1 else "arguments"
        raise TypeError(f"{name}: it is called with {count} {many}: {error}. Use a function {form}") from None
    except ValueError:  # a builtin has no signature
        pass


def check_hash(fun: Any, form: str, name: str) -> None:
    """Check that ``fun`` can be hashed, for programs are kept by function.

    Raises:
      TypeError: it has no hash.
    """
    try:
        hash(fun)
    except TypeError:
        raise TypeError(
            f"{name} is a {type(fun).__name__} without a hash, so its compiled program cannot be found again. "
            f"Use a function {form}"
        ) from None


def is_concrete(tree: Any) -> bool:
    """Whether no leaf of ``tree`` is a tracer."""
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def is_split(params: Any) -> bool:
    """Whether a leaf of ``params`` is sharded over devices, so that it should not be copied into one vector."""
    return any(
        isinstance(x, jax.Array)
        and not isinstance(x, Tracer)
        and len(x.sharding.device_set) > 1
        and not x.is_fully_replicated
        for x in jax.tree.leaves(params)
    )


def peak(array: Any) -> Any:
    """The largest magnitude of an array, in NumPy: NaN if a number is. None if it is a tracer."""
    if isinstance(array, Tracer):
        return None
    devices = array.devices()
    if len(devices) == 1 and all(device.platform == "cpu" for device in devices):
        return abs(np.asarray(array)).max(initial=0)  # in less time than a compiled program takes to start
    with jax.ensure_compile_time_eval():  # in a program that is being traced too
        return np.asarray(abs(array).max(initial=0))


def check_args(args: Any) -> None:
    """Check the further arguments of a function.

    Raises:
      TypeError: they are no tuple, or hold something that is no array and no number.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"args is a {type(args).__name__}. Use a tuple: args=(data,)")
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        try:
            jax.typeof(leaf)
        except TypeError:
            where = f"args{jax.tree_util.keystr(path)}={leaf!r}"
            raise TypeError(f"{where}: it is no array and no number. Use it inside the function instead") from None


def check_start(params: Any) -> tuple[Any, list[Any]]:
    """``params`` with numbers as arrays, and the `peak` of each leaf.

    Raises:
      TypeError: a leaf is no array of real floating-point numbers.
      ValueError: there is no number, or a concrete leaf is not finite.
    """
    check_params(params)
    leaves, treedef = jax.tree.flatten(params)
    if not any(np.size(leaf) for leaf in leaves):
        raise ValueError("params has no number: there is nothing to minimize over. Use a pytree of float arrays")
    out, peaks = [], []
    for i, leaf in enumerate(leaves):
        array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf, float if isinstance(leaf, float) else None)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            kind = "Use two real arrays, the real and the imaginary part"
            if not jnp.issubdtype(array.dtype, jnp.complexfloating):
                kind = "Use floating-point numbers, such as jnp.float32"
            raise TypeError(f"{_where(params, i)} is {array.dtype}. {kind}")
        peaks.append(peak(array))
        if peaks[-1] is not None and not peaks[-1] < np.inf:
            raise ValueError(f"{_where(params, i)} is not finite at the start. Use a finite start")
        out.append(array)
    return treedef.unflatten(out), peaks


def check_bounds(bounds: Any, params: Any) -> tuple[Any, Any]:
    """Lower and upper bounds with the structure, shapes and dtypes of the parameters.

    Args:
      bounds: ``(lower, upper)``, each a number, None or a tree like ``params``.
      params: a pytree of floating-point arrays.

    Raises:
      TypeError: a bound is no real number.
      ValueError: bounds crossed, NaN, or of another structure or shape.
    """
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"bounds={bounds!r}: two parts are needed. Use bounds=(lower, upper)")
    with jax.ensure_compile_time_eval():  # what is known is checked in a program that is being traced too
        lower = _side(bounds[0], params, "lower", -np.inf)
        upper = _side(bounds[1], params, "upper", np.inf)
        if is_concrete((lower, upper)):
            _check_order(params, lower, upper)
    return lower, upper


def _check_order(params: Any, lower: Any, upper: Any) -> None:
    """Refuses bounds that are NaN, crossed, or leave no number."""
    rows = zip(leaf_names(params), jax.tree.leaves(lower), jax.tree.leaves(upper), strict=True)
    for name, low, high in rows:
        where = f" of {name!r}" if name else ""
        if bool(jnp.any(jnp.isnan(low) | jnp.isnan(high))):
            raise ValueError(f"bounds{where}: a bound is NaN. Use -inf and inf for no bound")
        if bool(jnp.any(low > high)):
            at = np.unravel_index(int(jnp.argmax(low - high)), low.shape)
            raise ValueError(
                f"bounds{where}: lower {float(low[at]):.6g} is above upper {float(high[at]):.6g}. "
                "Use bounds=(lower, upper) with lower <= upper"
            )
        if bool(jnp.any((low == jnp.inf) | (high == -jnp.inf))):
            raise ValueError(
                f"bounds{where}: a lower bound of inf or an upper one of -inf leaves no number. "
                "Use -inf for no lower and inf for no upper bound"
            )


def _side(side: Any, params: Any, name: str, missing: float) -> Any:
    side = missing if side is None else side
    for leaf in jax.tree.leaves(side):
        dtype = getattr(leaf, "dtype", np.dtype(type(leaf)))
        if not any(jnp.issubdtype(dtype, kind) for kind in (np.floating, np.integer)):
            raise TypeError(f"bounds: the {name} bound has {leaf!r}. Use real numbers, None or a tree like params")
    if np.ndim(side) == 0 and len(jax.tree.leaves(side)) == 1 and jax.tree.structure(side) == jax.tree.structure(0):
        return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(side, x.dtype), x.shape), params)
    if jax.tree.structure(side) != jax.tree.structure(params):
        raise ValueError(
            f"bounds: the {name} bound is {jax.tree.structure(side)}, params is {jax.tree.structure(params)}. "
            "Use a number, None or a tree like params"
        )

    def shaped(bound: Any, x: Any) -> jax.Array:
        try:
            return jnp.broadcast_to(jnp.asarray(bound, x.dtype), x.shape)
        except ValueError:
            raise ValueError(
                f"bounds: the {name} bound has the shape {np.shape(bound)}, its parameter {x.shape}. "
                "Use a tree of arrays like params"
            ) from None

    return jax.tree.map(shaped, side, params)


def _where(params: Any, i: int) -> str:
    name = leaf_names(params)[i]
    return f"params: {name!r}" if name else "params"


def hoist(fun: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``fun`` without closed-over arrays: a pure function, and those arrays.

    Args:
      fun: a function that JAX can trace. It is traced once.
      *args: its arguments, or shapes of them.

    Returns:
      ``(pure, consts)`` with ``pure(consts, *args) == fun(*args)``. Closed-over tracers are among the consts.
    """
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    treedef = jax.tree.structure(shape)

    def pure(consts: list[Any], *args: Any) -> Any:
        # A number of Python that ``fun`` returns is no array yet.
        return treedef.unflatten(map(jnp.asarray, jaxpr_as_fun(closed.replace(consts=consts))(*jax.tree.leaves(args))))

    return pure, list(closed.consts)


class Space:
    """The vectors that stand for parameters: one flat array in the widest dtype, or one array a leaf.

    Args:
      params: a pytree of floating-point arrays, or tracers.
      split: keep the leaves apart, with their shardings. Default: one flat array.

    Attributes:
      size: the number of parameters.
      dtype: the dtype of vectors and values: float64 if a leaf has it, else float32.
    """

    def __init__(self, params: Any, split: bool = False) -> None:
        leaves, self.treedef = jax.tree.flatten(params)
        self.shapes = [np.shape(x) for x in leaves]
        self.dtypes = [jnp.result_type(x) for x in leaves]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.size, self.split = sum(self.sizes), split
        self.dtype = widest(self.dtypes)

    def vector(self, tree: Any) -> Vector:
        """The vector of a tree with the structure of the parameters."""
        leaves = [jnp.asarray(x).astype(self.dtype) for x in jax.tree.leaves(tree)]
        return leaves if self.split else [jnp.concatenate([x.ravel() for x in leaves])]

    def tree(self, vector: Vector) -> Any:
        """The tree of a vector, in the dtypes of the parameters."""
        if self.split:
            return self.treedef.unflatten([x.astype(d) for x, d in zip(vector, self.dtypes, strict=True)])
        ends = np.cumsum(self.sizes)
        parts = [vector[0][end - size : end] for end, size in zip(ends, self.sizes, strict=True)]
        rows = zip(parts, self.shapes, self.dtypes, strict=True)
        return self.treedef.unflatten([x.reshape(shape).astype(dtype) for x, shape, dtype in rows])
