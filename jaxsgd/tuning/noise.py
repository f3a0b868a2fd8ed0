"""The gradient noise scale: the batch size beyond which more examples help little."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy

from jaxsgd.batches import as_arrays, batch_size
from jaxsgd.ensemble.feed import Feed, is_one_batch
from jaxsgd.ensemble.losses import pure_loss, takes
from jaxsgd.numerics import as_key, check_count, differentiable, sq, wide, widest, zeros
from jaxsgd.paths import check_optimizer, is_function
from jaxsgd.progress import Bar
from jaxsgd.transforms.moving import moving
from jaxsgd.tuning.scaling import Doubling, NoiseScale, scale_learning_rate

__all__ = ["Doubling", "NoiseScale", "noise_scale", "scale_learning_rate"]

PARTS = 32
"""A batch is split into at least so many parts."""
ENDLESS = 100
"""So many batches are taken from an iterator without a length."""


def noise_scale(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Any,
    *,
    small: int | None = None,
    population: float | str | None = None,
    count: int | None = None,
    key: int | jax.Array = 0,
    gradient: Callable[[Callable[..., jax.Array]], Callable[..., Any]] = jax.grad,
    tx: optax.GradientTransformation | None = None,
    progress: bool | None = None,
) -> NoiseScale:
    r"""Gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162): $B = tr(\Sigma) / \lvert G \rvert^2$.

    G is the gradient without noise and Sigma the covariance of one example's gradient, both at ``params``. Batches are
    split into K parts of b examples, m = K b in total. With the parts' gradients g_i and their mean g,

    - tr(Sigma) is b times their sample variance, sum |g_i - g|^2 / (K - 1);
    - |G|^2 is |g|^2 - (1 - m / population) tr(Sigma) / m, since |g|^2 alone contains the noise of the mean.

    Both are unbiased. They are the estimators of the paper's appendix A.1. The parts are its small batch and all
    examples together its big batch. Of all pairs this one has the least variance: every pair of parts is compared, and
    none with itself. Errors are the jackknife's over parts, which are slightly too large rather than too small.

    The gradients are taken twice: first for their mean, then for the deviations from it. In float32 a difference of
    large squares would lose the deviations. The memory is that of one part and of three gradients: parts go one by one
    through a program that is compiled once. (A scan over them is many times slower for convolutions on CPU.)

    Complex parameters count as their real and imaginary parts. Integer parameters have no gradient and are left out.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``, or of ``(params, batch)``; for a TrainState
        with a model state, which stays constant, as in `jaxsgd.make_step`. The mean of the examples' losses. (With
        their sum, |G|^2 and tr(Sigma) are ``small**2`` times as large, the scale is the same.)
      params: a tree, an ``nnx.Module`` or a `jaxsgd.TrainState`.
      batches: one batch, or a list of batches with examples drawn at random (a shuffled epoch, or a part of one).
        Sizes may differ. Also an iterator, or a function of the step, which needs ``count``.
      small: examples in a part. 1 is best and costs most. Default: the largest size that gives at least 32 parts a
        batch, which for a model of many parameters is hardly worse. A loss that couples its examples (batch
        normalization) sees parts.
      population: the number of examples in the data set that the batches are drawn from without replacement; ``"all"``
        if the batches are the whole data set. The estimates are then for the loss over that set, and after an epoch
        only the split into parts is random. ``math.inf``: examples are fresh, or drawn with replacement. Default: for
        a list, the estimates are for the loss over it, as if it were all the data. Errors and interval are those of a
        sample and cover both cases. Iterators and functions give fresh examples.
      count: the number of batches to take. Default: the whole list, or 100 from an iterator.
      key: a seed or a PRNG key for the loss; each part gets its own, and an NNX model random numbers of its own
        too. Default: 0.
      gradient: a transformation from the loss to its gradient, both functions of ``(params, batch, key)``. Use it for
        steps that do not follow `jax.grad`, such as preconditioned ones. Default: `jax.grad`.
      tx: the optimizer of the training. Parameters that it never moves, such as frozen ones, are left out. Default:
        None, all count.
      progress: show a bar after two seconds. Default: on if stderr is a terminal.

    Returns:
      A `NoiseScale`.

    Raises:
      ValueError: fewer than 4 parts; a batch that does not divide into parts; ``count`` above the batches there are; no
        floating parameter that moves; a gradient that is not finite, or exactly 0 for all examples.
      TypeError: a leaf of ``params`` is no array and no number; ``tx`` is no gradient transformation.
    """
    taking = takes(loss_fn, params)
    fn, params = pure_loss(loss_fn, params, random=True)
    moves = None if tx is None else _moves(tx, params)
    points = differentiable(params, moves)[0]
    if not points:
        frozen = "" if tx is None else " that tx moves"
        raise ValueError(f"params: there is no floating or complex parameter{frozen}, so there is no gradient")
    taken, sizes = _taken(batches, count, taking)
    if small is None:
        small = _usual(sizes)
    else:
        check_count("small", small)
    for index, size in enumerate(sizes):
        if size % small:
            raise ValueError(f"small={small}: batch {index} has {size} examples, which do not divide by it")
    parts = sum(sizes) // small
    if parts < 4:
        raise ValueError(
            f"batches: {sum(sizes)} examples in all make {parts} of {small}; at least 4 are needed. "
            "Use larger batches, or more of them"
        )
    if population == "all":
        population = sum(sizes)
    elif isinstance(population, str) or population is not None and not population >= max(sizes):
        raise ValueError(
            f"population={population!r}: 'all', math.inf, or so many examples that a batch of {max(sizes)} can be drawn"
        )
    elif population is None and not _whole(batches, taking):
        population = math.inf
    key = as_key(key)

    grad = jax.grad(fn, allow_int=True) if gradient is jax.grad else gradient(fn)
    take = jax.jit(_part(grad, moves), donate_argnums=1)
    about = [zeros(p) for p in points]
    rows: list[Any] = []
    with Bar("noise scale", 2 * len(taken), progress) as bar:
        for _ in range(2):
            total, rows = jax.tree.map(jnp.zeros_like, about), []
            for batch, size in zip(taken, sizes, strict=True):
                for first in range(0, size, small):
                    part = jax.tree.map(lambda x, i=first: x[i : i + small] if jnp.ndim(x) else x, batch)
                    total, row = take(params, total, about, part, key, np.int32(len(rows)))
                    rows.append(row)
                rows[-1].block_until_ready()
                bar.advance(1, f"{len(rows)} of {parts} parts")
            about = [t / parts for t in total]
    away, along = np.asarray(rows, np.float64).T
    norm_sq = float(sum(jnp.sum(sq(x)) for x in about))
    if not np.isfinite(norm_sq) or not np.all(np.isfinite(away)):
        raise ValueError("params: the gradient is not finite at this point, so its noise cannot be estimated")
    if norm_sq == 0 and not away.any():
        raise ValueError(
            "params: the gradient of every example is exactly 0 at this point, so there is neither gradient nor noise. "
            "Use the parameters of a training that has begun, and a loss that depends on them"
        )
    sample = _estimate(norm_sq, away, along, small, 1.0)
    if population is None:
        result = _estimate(norm_sq, away, along, small, 0.0)
        doubt = {name: sample[name] for name in ("standard_error", "known", "gradient_norm_sq_error", "variance_error")}
        result |= doubt | {name: pick(result[name], sample[name]) for name, pick in (("low", min), ("high", max))}
    else:
        result = _estimate(norm_sq, away, along, small, max(0.0, 1 - sum(sizes) / population))
    return NoiseScale(
        **result, as_sample=sample["scale"], small=small, parts=parts, population=population, batch_size=sizes[0]
    )


def _whole(batches: Any, taking: Callable[[Any], bool]) -> bool:
    """Whether ``batches`` has a length, so that all of them are at hand."""
    return is_one_batch(batches, taking) or hasattr(batches, "__len__")


def _moves(tx: optax.GradientTransformation, params: Any) -> list[bool]:
    check_optimizer(tx)
    update = optax.with_extra_args_support(tx).update
    return moving(update, jax.eval_shape(tx.init, params), params, None)


def _part(grad: Callable[..., Any], moves: list[bool] | None) -> Callable[..., Any]:
    """``(params, total, about, part, key, index) -> (total + gradient, (|d|^2, <d, about>))``, d = gradient - about.

    ``total`` and ``about`` are lists, without the integer parameters and those that rest.
    """

    def take(params: Any, total: Any, about: Any, part: Any, key: jax.Array, index: jax.Array) -> Any:
        gradients = [wide(g) for g in differentiable(grad(params, part, jax.random.fold_in(key, index)), moves)[0]]
        pairs = list(zip(gradients, about, strict=True))
        dtype = widest(g.dtype for g, _ in pairs)
        away = [jnp.sum(sq(g - a)).astype(dtype) for g, a in pairs]
        along = [jnp.sum(jnp.real((g - a) * jnp.conj(a))).astype(dtype) for g, a in pairs]
        return jax.tree.map(jnp.add, total, gradients), jnp.stack([sum(away), sum(along)])

    return take


def _estimate(norm_sq: float, away: np.ndarray, along: np.ndarray, small: int, unseen: float) -> dict[str, Any]:
    """The fields of a `NoiseScale`.

    Args:
      norm_sq: |g|^2.
      away, along: |d|^2 and <d, g> of each part.
      small: examples in a part.
      unseen: the share of the population that is in no batch.
    """
    count = len(away)
    spread = away.sum()
    estimate = np.array([small * spread / (count - 1), norm_sq - unseen * spread / (count - 1) / count])
    # Each part left out in turn, in closed form.
    norms = norm_sq - 2 * along / (count - 1) + away / (count - 1) ** 2
    spreads = (spread - away * count / (count - 1)) / (count - 2)
    without = np.stack([small * spreads, norms - unseen * spreads / (count - 1)])
    centered = without - without.mean(axis=1, keepdims=True)
    covariance = (count - 1) / count * centered @ centered.T
    # A whole epoch is no random sample, but its split into parts is random.
    covariance *= np.array([[1.0 if small > 1 else unseen, unseen], [unseen, unseen]])
    (trace, gradient), t = estimate, float(scipy.special.stdtrit(count - 1, 0.975))
    low, high = _fieller(trace, gradient, covariance, t)
    known = math.isfinite(high)
    scale = trace / gradient if gradient > 0 else math.inf
    error = math.inf
    if known:
        slope = np.array([1 / gradient, -trace / gradient**2])
        error = math.sqrt(max(0.0, slope @ covariance @ slope))
    errors = np.sqrt(np.diag(covariance))
    return {
        "scale": float(scale), "standard_error": error, "low": low, "high": high, "known": known,
        "gradient_norm_sq": float(gradient), "gradient_norm_sq_error": float(errors[1]),
        "variance": float(trace), "variance_error": float(errors[0]),
    }  # fmt: skip


def _fieller(above: float, below: float, covariance: np.ndarray, t: float) -> tuple[float, float]:
    """Fieller's interval of ``above / below``, cut off at 0: all r for which above - r below may be 0."""
    a = below**2 - t**2 * covariance[1, 1]
    b = above * below - t**2 * covariance[0, 1]
    c = above**2 - t**2 * covariance[0, 0]
    if below > 0 and a > 0:
        root = math.sqrt(max(0.0, b**2 - a * c))
        return max(0.0, (b - root) / a), (b + root) / a
    if c <= 0 or b**2 - a * c < 0:
        return 0.0, math.inf
    # The interval goes through infinity: its lower end remains.
    if a == 0:
        return (max(0.0, c / (2 * b)) if b > 0 else 0.0), math.inf
    return max(0.0, (b - math.sqrt(b**2 - a * c)) / a), math.inf


def _taken(batches: Any, count: int | None, taking: Callable[[Any], bool]) -> tuple[list[Any], list[int]]:
    """The batches in a list, since they are needed twice, and their sizes."""
    if count is not None:
        check_count("count", count)
    one = is_one_batch(batches, taking) and not is_function(batches)
    if one:
        taken = [batches]
    elif is_function(batches):
        if count is None:
            raise ValueError("count=None: a function of the step has no end. Use count=, the number of batches")
        taken = [batches(step) for step in range(count)]
    elif isinstance(batches, Iterable):
        known = hasattr(batches, "__len__")
        taken = list(itertools.islice(batches, count if count is not None or known else ENDLESS))
    else:
        Feed(batches)  # raises
        taken = [batches]
    if not taken:
        raise ValueError("batches: there are none; at least one is needed")
    if count is not None and len(taken) < count:
        found = "batches is one batch. Use a list of batches" if one else f"there are only {len(taken)} batches"
        raise ValueError(f"count={count}: {found}")
    sizes = []
    for index, batch in enumerate(taken):
        size = batch_size(batch)
        if size is None:
            raise ValueError(f"batches: batch {index} has no array with a first axis of examples")
        sizes.append(size)
    taken = [as_arrays(batch) for batch in taken]
    return [jax.tree.map(lambda x: x if hasattr(x, "ndim") else np.asarray(x), batch) for batch in taken], sizes


def _usual(sizes: list[int]) -> int:
    """The largest part that divides all batches and leaves at least 32 parts of each."""
    common = math.gcd(*sizes)
    few = [part for part in range(1, common + 1) if common % part == 0 and min(sizes) // part >= PARTS]
    return max(few, default=1)
