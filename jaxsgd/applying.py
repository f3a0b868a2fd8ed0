"""An update and the new parameters in one pass.

`optax.apply_updates` reads each update again that the optimizer has just written. XLA joins the two in kernels that it
makes itself. A kernel of the optimizer's own writes the parameter in place of the update. That is right only if no
other transformation changes or reads the update afterwards. So the updates are traced once, and only those that come
out unchanged and unread are written this way.
"""

from __future__ import annotations

import contextvars
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax
from jax.core import Tracer
from jax.extend.core import Literal

from jaxsgd.blockwise import CODES
from jaxsgd.numerics import sum_of_squares

__all__ = ["apart", "applies", "step_params", "tell", "update_params"]


class _Seen(NamedTuple):
    """The result of a lift for one parameter, as the first pass meets it.

    Nothing keeps it: it may be of a trace inside, such as a branch of `jax.lax.cond`, which it must not outlive.

    Attributes:
      p: the parameter before.
      out: its update.
    """

    p: Callable[[], Any]
    out: Callable[[], Any]


class _Made(NamedTuple):
    """The result of a lift for one parameter that is stepped in one pass.

    Attributes:
      p: the new parameter.
      squares: the sum of the update's squares.
    """

    p: Any
    squares: Any


@dataclass
class _Pass:
    """One update of a transformation. A parameter is known by the ``id`` of its mark, one of its stored arrays.

    Attributes:
      chosen: the parameters to step in one pass.
      seen: the results of the others.
      made: the results of those.
      repeated: the parameters that were stepped twice.
    """

    chosen: frozenset[int] = frozenset()
    seen: dict[int, _Seen] = field(default_factory=dict)
    made: dict[int, _Made] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)


_pass: contextvars.ContextVar[_Pass | None] = contextvars.ContextVar("pass", default=None)


@contextmanager
def _within(new: _Pass | None) -> Iterator[None]:
    token = _pass.set(new)
    try:
        yield
    finally:
        _pass.reset(token)


def apart() -> Any:
    """A context whose updates are updates: for functions whose traces are kept."""
    return _within(None)


def applies(slots: Any) -> bool:
    """Whether the new parameter is wanted in place of the update, for the parameter with these stored slots."""
    now = _pass.get()
    return now is not None and id(_mark(slots)) in now.chosen


def tell(slots: Any, p: Any, out: Any, squares: Any = None) -> None:
    """Report the update of a parameter that could be stepped in one pass, or its new value and the update's squares."""
    now, mark = _pass.get(), id(_mark(slots))
    if now is None or not isinstance(out, Tracer):
        return
    if mark in now.chosen:
        now.made[mark] = _Made(out, squares)
        return
    if mark in now.seen:
        now.repeated.add(mark)
    now.seen[mark] = _Seen(_weakly(p), _weakly(out))


def _weakly(x: Any) -> Callable[[], Any]:
    return weakref.ref(x) if isinstance(x, Tracer) else lambda: x


def _mark(slots: Any) -> Any:
    return jax.tree.leaves(slots)[0]


def update_params(
    tx: optax.GradientTransformation, grads: Any, state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """One step of any optimizer: ``(new params, new state)``.

    It equals ``tx.update`` and `optax.apply_updates`. Under ``jax.jit``, parameters with an 8-bit state are written in
    the same pass over memory that steps them. `jaxsgd.make_step` uses it.

    Args:
      tx: a gradient transformation.
      grads: the gradients, a tree like ``params``.
      state: the optimizer's state.
      params: the parameters.
      extra_args: further arguments of ``tx.update``, such as ``value=loss``.

    Returns:
      The parameters after the step, in the shapes and dtypes of ``params``, and the optimizer's next state.

    Raises:
      ValueError, TypeError: what ``tx.update`` raises.
      RuntimeError: under ``jax.jit``, ``tx.update`` treats an update otherwise when it is traced again.

    >>> import jaxsgd
    >>> tx, params = jaxsgd.adamw(1e-3, storage=jaxsgd.int8()), {"w": jnp.ones((64, 256))}
    >>> params, state = jax.jit(lambda g, s, p: update_params(tx, g, s, p))(params, tx.init(params), params)
    """
    update = optax.with_extra_args_support(tx).update
    return _stepped(update, grads, state, params, extra_args)[:2]


def step_params(
    update: Callable[..., Any], grads: Any, state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any, list[jax.Array]]:
    """`update_params` by the ``update`` of a transformation; and of each update the sum of its squares."""
    params, state, updates, whole = _stepped(update, grads, state, params, extra_args)
    return params, state, [whole[id(u)] if id(u) in whole else sum_of_squares(u) for u in updates]


def _stepped(
    update: Callable[..., Any], grads: Any, state: Any, params: Any, extra_args: Any
) -> tuple[Any, Any, list[Any], dict[int, Any]]:
    """New params and state, the updates, and the sums of squares of those that are new params, by their ``id``."""
    one = _Pass(_final(update, grads, state, params, extra_args))
    with _within(one):
        updates, state = update(grads, state, params, **extra_args)
    whole = {id(made.p): made.squares for made in one.made.values()}
    if not whole.keys() <= {id(u) for u in jax.tree.leaves(updates)}:
        raise RuntimeError("tx: it treated an update otherwise when it was called again. Use a pure function as update")

    def after(p: Any, u: Any) -> Any:
        return u if p is None or id(u) in whole else optax.apply_updates(p, u)

    params = jax.tree.map(after, params, updates, is_leaf=lambda x: x is None)
    return params, state, jax.tree.leaves(updates), whole


def _final(update: Callable[..., Any], grads: Any, state: Any, params: Any, extra_args: Any) -> frozenset[int]:
    """The parameters whose updates come out of ``update`` unchanged and unread, by the ``id`` of their marks."""
    arrays = jax.tree.leaves(state)
    packed = any(getattr(x, "dtype", None) in CODES and x.size > 1 for x in arrays)
    if not packed or not any(isinstance(x, Tracer) for x in arrays):
        return frozenset()
    way, marks, kept = _Pass(), list[int | None](), {id(x) for x in arrays}

    def follow() -> Any:
        updates, after = update(grads, state, params, **extra_args)
        made = {id(one.out()): (mark, one) for mark, one in way.seen.items() if mark in kept - way.repeated}

        def look(p: Any, u: Any) -> None:
            if p is not None:
                mark, one = made.get(id(u), (None, None))
                marks.append(mark if one is not None and one.out() is u and one.p() is p else None)

        jax.tree.map(look, params, updates, is_leaf=lambda x: x is None)
        return jax.tree.leaves(updates), after

    with _within(way):
        traced = jax.make_jaxpr(follow)().jaxpr
    # What reads an update on the way, such as a norm or an average of the parameters, needs the update itself.
    read = Counter(x for equation in traced.eqns for x in equation.invars if not isinstance(x, Literal))
    read.update(x for x in traced.outvars if not isinstance(x, Literal))
    results = zip(marks, traced.outvars[: len(marks)], strict=True)
    return frozenset(mark for mark, x in results if mark is not None and read[x] == 1)
