r"""Rules that divide by an estimate of the Hessian's diagonal.

The estimate needs the objective itself: ``tx.update(grads, state, params, obj_fn=loss)``, where ``loss`` is a function
of the params. One estimate serves the whole tree for several steps. Under `jax.jit` over a mesh nothing more is needed.
Inside `jax.shard_map` the objective must be that of all devices: let it end in `jax.lax.pmean`, and leave ``check_vma``
on. In `jax.pmap`, average in a ``hessian_diagonal_fn`` of your own.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxsgd.hyper import Decay, Seed, Static, Whole, WholeFrom, checked, is_off
from jaxsgd.numerics import debias, ema, real_dtype, real_zeros, sq, wide
from jaxsgd.paths import leaf_names
from jaxsgd.registry import rule
from jaxsgd.slots import Mean, kept_in, start, unless

__all__ = ["gauss_newton_bartlett", "hutchinson", "sophia"]


def hutchinson(random_seed: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Hutchinson's estimate of the Hessian's diagonal: $r \odot \nabla^2 f\, r$ with random signs $r$.

    The signs of an array depend on the key and on the array's name: they are the same on every replica. Exact where
    the Hessian is diagonal. It costs one Hessian-vector product, in the dtype of the params; complex params get the
    mean curvature of both axes. Arrays that are not floating get zeros.

    Args:
      random_seed: a key.

    Returns:
      A transformation without state that gives the estimate in place of the gradients.
    """

    def estimate(params: Any, obj_fn: Callable[[Any], jax.Array]) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        names = leaf_names(params)
        points = {i: jnp.asarray(p) for i, p in enumerate(leaves) if _is_smooth(p)}
        keys = {i: jax.random.fold_in(random_seed, zlib.crc32(names[i].encode())) for i in points}
        signs = {i: _signs(keys[i], p) for i, p in points.items()}

        def objective(points: dict[int, jax.Array]) -> jax.Array:
            return obj_fn(treedef.unflatten([points.get(i, p) for i, p in enumerate(leaves)]))

        along = jax.jvp(jax.grad(objective), (points,), (signs,))[1]
        # A product with ones is exact in any dtype; it is widened for the average that it enters.
        diagonal = {i: jnp.real(wide(h) * wide(signs[i])) for i, h in along.items()}
        return treedef.unflatten([diagonal.get(i, _nothing(p)) for i, p in enumerate(leaves)])

    return _stateless(estimate)


def gauss_newton_bartlett(batch_size: int) -> Callable[[jax.Array], optax.GradientTransformationExtraArgs]:
    r"""The Gauss-Newton-Bartlett estimate (Liu et al. 2023, arXiv:2305.14342): $B\, \hat g \odot \hat g$.

    $\hat g$ is the gradient of the mean loss over a batch of $B$ examples whose labels are drawn from the model. It
    needs no second derivative and is never negative. ``sophia(1e-4, hessian_diagonal_fn=gauss_newton_bartlett(64))``
    is Sophia-G. Its objective takes a key too::

        def loss(params, key):
            logits = model(params, x)
            labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            return cross_entropy(logits, labels).mean()

    Args:
      batch_size: $B$, the number of labels in the mean (for a language model: of tokens).

    Raises:
      ValueError: ``batch_size`` below 1.
    """
    if not batch_size >= 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 is needed")

    def factory(random_seed: jax.Array) -> optax.GradientTransformationExtraArgs:
        def estimate(params: Any, obj_fn: Callable[[Any, jax.Array], jax.Array]) -> Any:
            gradient = jax.grad(obj_fn, allow_int=True)(params, random_seed)
            return jax.tree.map(
                lambda p, g: batch_size * sq(wide(g)) if _is_smooth(p) else _nothing(p), params, gradient
            )

        return _stateless(estimate)

    return factory


def _is_smooth(p: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(p), jnp.inexact)


def _nothing(p: Any) -> jax.Array:
    """A diagonal of zeros, in the dtype that the state of ``p`` is kept in."""
    return real_zeros(p) if _is_smooth(p) else jnp.zeros(jnp.shape(p), jnp.float32)


def _signs(key: jax.Array, p: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(p):
        return jax.random.rademacher(key, p.shape, p.dtype)
    real, imaginary = jax.random.rademacher(key, (2, *p.shape), real_dtype(p.dtype))
    return jax.lax.complex(real, imaginary) * 0.5**0.5


def _stateless(estimate: Callable[[Any, Any], Any]) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del updates
        if "obj_fn" not in extra_args:
            raise ValueError("obj_fn: the estimate needs the objective: tx.update(grads, state, params, obj_fn=...)")
        return estimate(params, extra_args["obj_fn"]), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _diagonal(params, updates, *, t, update_interval, estimator, key, obj_fn):
    """A new estimate of the diagonal where one is due, else zeros, which the rule does not use."""

    def rest() -> Any:
        return jax.tree.map(_nothing, params)

    def estimate() -> Any:
        tx = optax.with_extra_args_support(estimator(jax.random.fold_in(jax.random.key(key), t.astype(jnp.int32))))
        diagonal, _ = tx.update(updates, tx.init(params), params, obj_fn=obj_fn)
        return jax.tree.map(lambda zero, h: jnp.real(h).astype(zero.dtype), rest(), diagonal)

    due = (t - 1) % update_interval == 0
    if isinstance(due, Tracer):
        return {"hessian": jax.lax.cond(due, estimate, rest)}
    return {"hessian": estimate() if due else rest()}


def _win(g, mu, nu, *, t, b1, eps, gamma, clip_threshold, print_every):
    """How many entries of the step are not clipped, where that is printed."""
    if is_off(print_every):
        return {"won": jnp.zeros(()), "entries": jnp.zeros(())}
    mean, root = debias(ema(mu, g, b1), b1, t), jnp.maximum(gamma * nu, eps)
    won = jnp.abs(mean) < clip_threshold * root
    return {"won": jnp.sum(won, dtype=root.dtype), "entries": jnp.full((), won.size, root.dtype)}


def _print_win_rate(*, t, won, entries, print_every):
    if not is_off(print_every):
        show = functools.partial(jax.debug.print, "sophia: step {}, win rate {}", t.astype(jnp.int32), won / entries)
        jax.lax.cond(t % print_every == 0, show, lambda: None)
    return {}


def _optax_arguments(
    clip_threshold: Any = 1.0,
    hessian_diagonal_fn: Any = None,
    verbose: bool = False,
    print_win_rate_every_n_steps: int = 0,
    **rest: Any,
) -> dict[str, Any]:
    """The arguments that are no numbers: how to estimate, whether to clip, whether to print."""
    make = hutchinson if hessian_diagonal_fn is None else hessian_diagonal_fn
    if isinstance(make, optax.GradientTransformation):
        raise TypeError(
            "sophia: hessian_diagonal_fn: a ready-made transformation keeps a state of its own; give the function that "
            "makes one from a key, such as jaxsgd.rules.curvature.hutchinson without its parentheses"
        )
    if not callable(make):
        raise TypeError(f"sophia: hessian_diagonal_fn={make!r}: a function of a key that makes a transformation")
    every, clips = print_win_rate_every_n_steps, clip_threshold is not None
    checked("sophia: print_win_rate_every_n_steps", every, WholeFrom(0))
    return rest | {
        "estimator": make,
        "clip_threshold": clip_threshold if clips else 1.0,
        "clips": clips,
        "print_every": every if verbose and clips else 0,
    }


@rule(
    positional="learning_rate b1 b2 eps weight_decay weight_decay_mask gamma clip_threshold update_interval "
    "hessian_diagonal_fn mu_dtype verbose print_win_rate_every_n_steps",
    call=_optax_arguments,
    weight_decay=1e-4,
    trees=_diagonal,
    sums=_win,
    shared=_print_win_rate,
    usual_rate=1e-3,
)
def sophia(
    g,
    mu: Annotated[Mean, unless("b1"), kept_in("mu_dtype")],
    nu: Annotated[Mean, start(real_zeros)],
    *,
    t,
    hessian,
    b1: Decay = 0.965,
    b2: Decay = 0.99,
    eps=1e-8,
    gamma=0.01,
    clip_threshold=1.0,
    update_interval: Whole = 10,
    key: Seed = 0,
    estimator: Static = None,
    clips: Static = True,
    print_every: Static = 0,
):
    r"""Sophia (Liu et al. 2023, arXiv:2305.14342): $u = \operatorname{clip}(\hat m_t / \max(\gamma h, \epsilon), \rho),\; h \leftarrow \beta_2 h + (1-\beta_2)\, r \odot \nabla^2 f\, r$.

    The update needs the objective, a function of the params: ``obj_fn=``. Every ``update_interval`` steps, the first
    included, the diagonal of its Hessian is estimated, by default with random signs $r$ (`hutchinson`, Sophia-H). The
    step uses the average $h$ from before the estimate, as in optax and in the authors' training loop.

    ``hessian_diagonal_fn`` is another way to estimate it: a function of a key that makes a gradient transformation,
    such as `gauss_newton_bartlett(batch_size)` (Sophia-G) or optax's ``hutchinson_estimator_diag_hessian``. Each
    estimate calls it with a new key, of the seed ``key`` and the step. ``clip_threshold`` is $\rho$, or None.
    ``verbose`` with ``print_win_rate_every_n_steps=n`` prints the share of entries that are not clipped.

    Use it when you train a language model and can pay for estimates of the Hessian. Avoid it when the loss cannot be
    passed as ``obj_fn``.
    """
    mu = ema(mu, g, b1)
    mean, root = debias(mu, b1, t), jnp.maximum(gamma * nu, eps)
    u = mean / root
    if clips:  # without a division where there may be none
        u = jnp.where(jnp.abs(mean) < clip_threshold * root, u, clip_threshold * jnp.sign(mean))
    return u, mu, jnp.where((t - 1) % update_interval == 0, ema(nu, hessian, b2), nu)
