r"""Rules that keep the state of a matrix in a space of low rank.

Floor 3. One axis of each gradient matrix is compressed to ``rank``, by its own singular vectors (GaLore) or at
random (APOLLO); the moments are those of what is left. Axes before the matrix axes are a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from optax import GradientTransformation
from optax.contrib import GaLoreDimensionNumbers

from jaxsgd.matrices import as_matrices, completed, frobenius, rotated, rotated_back
from jaxsgd.numerics import ema, filled, real_dtype, real_zeros, sq
from jaxsgd.paths import leaf_names
from jaxsgd.rule import REQUIRED, Rule, make_rule, register, rule
from jaxsgd.rules.adaptive import adam
from jaxsgd.rules.matrix import NOT_HIDDEN, axes_of, matrix_leaves, spread
from jaxsgd.rules.wrappers import titled
from jaxsgd.spec import Spec, is_off, seed, signature_of

__all__ = ["apollo", "apollo_mini", "galore", "low_rank"]

# -- which axes are compressed -------------------------------------------------------------------


def facing(x: jax.Array, axes: Any, side: str) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], bool] | None:
    """``x`` as matrices whose rows are the axis to compress, the way back, and whether that transposed them.

    Args:
      x: a leaf.
      axes: its matrix axes ``(rows, columns)``, None where it has none, or ``"two"``: of a two-dimensional leaf.
      side: which of the two is compressed, the ``"long"`` or the ``"short"`` one; of equal ones the rows.
    """
    if axes == "two":
        axes = ((0,), (1,)) if x.ndim == 2 else None
    if axes is None or x.size == 0:
        return None
    rows, columns = (math.prod(x.shape[axis] for axis in group) for group in axes)
    turned = rows < columns if side == "long" else rows > columns
    return *as_matrices(x, *(axes[::-1] if turned else axes)), turned


def _compressed(p: jax.Array, axes: Any, side: str, rank: Any) -> jax.Array:
    """Zeros for a gradient of ``p`` as the moments see it; ``p`` itself where that is the whole gradient."""
    found = facing(p, axes, side)
    if found is None:
        return p
    *batch, rows, columns = found[0].shape
    return jnp.zeros((*batch, min(int(rank), rows, columns), columns), p.dtype)


def _told(rule: Rule, arguments: Mapping[str, Any]) -> Callable[[Any], list[dict[str, Any]]] | None:
    """Tell each leaf its matrix axes: those of ``weight_dimension_numbers``, or by ``adam`` if there is such a thing."""
    given = arguments["weight_dimension_numbers"]
    if given is not None:
        return lambda params: [{"axes": axes} for axes in _dimensions(params, given)]
    if "adam" in arguments:
        return lambda params: [{"axes": axes} for axes in matrix_leaves(params, arguments["adam"], None)]
    return None


def _dimensions(params: Any, given: Any) -> list[Any]:
    """Each leaf's ``(rows, columns)`` by dimension numbers: one for all, a tree of them, or a function of the params."""
    numbers = given(params) if callable(given) else given
    one = isinstance(numbers, GaLoreDimensionNumbers)  # for all leaves that are matrices
    leaves = zip(
        leaf_names(params), jax.tree.leaves(params), spread(numbers, params, GaLoreDimensionNumbers), strict=True
    )
    argument = "weight_dimension_numbers"
    return [axes_of(argument, name, leaf, None if one and jnp.ndim(leaf) < 2 else d) for name, leaf, d in leaves]


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: known are {', '.join(map(repr, known))}")


def _whole(arguments: Mapping[str, Any]) -> None:
    """A rank is the length of an axis: it must be known, and whole."""
    rank = arguments["rank"]
    if isinstance(rank, bool) or not (isinstance(rank, int) or hasattr(rank, "dtype") and rank.dtype.kind in "iu"):
        raise TypeError(f"rank={rank!r}: a whole number is needed")


# -- GaLore --------------------------------------------------------------------------------------

SIDES = ("long", "short")


def leading_basis(x: jax.Array, rank: int, turned: bool) -> jax.Array:
    """The left singular vectors of the ``rank`` largest singular values, in columns.

    Those of the singular value 0, which a solver picks by its rounding, are cosines, made orthogonal to the others
    and to each other: the basis is always whole, and the same on every machine but for the others' signs.
    ``turned`` says that ``x`` is a transpose; the signs are then those of the matrix as it was.
    """
    left, values, right = jnp.linalg.svd(jnp.swapaxes(x, -1, -2) if turned else x, full_matrices=False)
    vectors = (jnp.swapaxes(right, -1, -2) if turned else left)[..., :rank]
    values = jnp.expand_dims(values, -2)
    null = values[..., :rank] <= max(x.shape[-2:]) * float(jnp.finfo(values.dtype).eps) * values[..., :1]
    made, triangle = jnp.linalg.qr(completed(vectors, null))
    signs = jnp.sign(jnp.expand_dims(jnp.diagonal(triangle, axis1=-2, axis2=-1), -2))
    return jnp.where(null, made * signs, vectors)


def _galore_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """``base_optimizer`` where it is one: a transformation that knows nothing but gradients."""
    base = arguments["base_optimizer"]
    if isinstance(base, Rule):
        raise TypeError(f"base_optimizer={base!r}: for a rule of jaxsgd say low_rank({base.name})(...)")
    if base is not None and not isinstance(base, GradientTransformation):
        raise TypeError(f"base_optimizer={base!r}: a transformation is needed, such as optax.scale_by_lion()")
    changed = [name for name, default in adam.spec.hyper.items() if base is not None and arguments[name] != default]
    if changed:
        raise TypeError(f"{changed[0]}={arguments[changed[0]]!r} is of Adam's; tell it to base_optimizer")
    return {**_low_rank_arguments(arguments), "optimizer": base}


def _low_rank_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    _one_of("side", arguments["side"], SIDES)
    _whole(arguments)
    return arguments


def low_rank(base: Rule) -> Rule:
    r"""GaLore (Zhao et al. 2024, arXiv:2403.03507): $u = \alpha P\, \rho(P^T g)$.

    The wrapped rule $\rho$ sees gradients of ``rank`` rows; $P$ are the leading left singular vectors of $g$, taken
    anew every ``update_proj_gap`` steps, $\alpha$ is ``scale``. The arguments are those of `galore`, then the base's own.

    Raises:
      ValueError: the base asks for more than a gradient, or has sums over the tree.
    """
    return _low_rank(base, f"low_rank_{base.name}", titled(low_rank, base))


def _low_rank(base: Rule, name: str, doc: str, **fields: Any) -> Rule:
    inner, own = base.spec, {"rank": 128, "update_proj_gap": 200, "scale": 1.0, "side": "long"}
    hidden = {"axes": "two", "optimizer": None}
    for asked in sorted({"p", "learning_rate", "weight_decay"} & {*inner.context}):
        raise ValueError(f"{name}: {base.name} asks for {asked!r}; in a low-rank space there is only the gradient")
    if inner.sums is not None or inner.shared is not None or inner.coupled:
        raise ValueError(f"{name}: {base.name} must see the parameters, or all leaves at once")
    for taken in {*own, *hidden} & {*inner.hyper} or {"projector", "inner"} & {*inner.slots}:
        raise ValueError(f"{name}: {base.name} has {taken!r} too")

    def fn(g, projector, state, *slots, **now):
        found, optimizer = facing(g, now["axes"], now["side"]), now["optimizer"]
        if found is not None:
            x, back, turned = found
            anew = lambda: leading_basis(x, projector.shape[-1], turned)  # noqa: E731
            projector = jax.lax.cond((now["t"] - 1) % now["update_proj_gap"] == 0, anew, lambda: projector)
            g = rotated(x, projector, None)
        if optimizer is None:
            u, *slots = inner.fn(g, *slots, **{n: now[n] for n in (*inner.context, *inner.hyper)}, **inner.fixed)
        else:
            u, state = optimizer.update(g, state)
        u = u if found is None else now["scale"] * back(rotated_back(u, projector, None))
        return u, projector, state, *slots

    fn.__signature__ = signature_of(  # type: ignore[attr-defined]
        ("g", "projector", "inner", *inner.slots),
        ("t", *(c for c in inner.context if c != "t")),
        {**own, **hidden, **inner.hyper},
    )

    def projector(p, axes, side, rank):
        found, low = facing(p, axes, side), _compressed(p, axes, side, rank)
        return None if found is None else jnp.zeros((*found[0].shape[:-1], low.shape[-2]), p.dtype)

    def begin(slot: str) -> Callable:
        def start(**now: Any) -> Any:
            proxy = _compressed(now["p"], now["axes"], now["side"], now["rank"])
            if slot == "inner":
                return None if now["optimizer"] is None else now["optimizer"].init(proxy)
            return None if now["optimizer"] is not None else inner.begin(slot, {**now, "p": proxy})

        start.__signature__ = signature_of(("p", *own, *hidden, *inner.hyper))  # type: ignore[attr-defined]
        return start

    starts = {"projector": projector, **{slot: begin(slot) for slot in ("inner", *inner.slots)}}
    spec = Spec.read(fn, name=name, start=starts, runtime=inner.runtime)
    fields = {
        "learning_rate": base.defaults.get("learning_rate", REQUIRED),
        "weight_decay": base.defaults["weight_decay"] or 0.0,
        "positional": ("learning_rate", "rank", "update_proj_gap", "scale"),
        "routes": _told,
        "hidden": tuple(hidden),
        "prepare": _low_rank_arguments,
        "extras": {"weight_dimension_numbers": None},
        "needs": base.needs,
        "exceptions": base.exceptions,
        "bounds": {**base.bounds, "rank": (1, math.inf), "update_proj_gap": (1, math.inf)},
        "alternatives": {**base.alternatives, "rank": 2, "update_proj_gap": 7, "side": "short"},
    } | fields
    return make_rule(spec, doc, **fields)


galore = _low_rank(
    adam,
    "galore",
    r"""GaLore (Zhao et al. 2024, arXiv:2403.03507): $R = P^T G,\; U = \alpha P\, \hat M_R / (\sqrt{\hat V_R} + \epsilon)$.

    Adam in the space of the gradient's ``rank`` leading singular vectors $P$, which are taken anew every
    ``update_proj_gap`` steps; the moments stay as they are then, in the new coordinates. ``scale`` is $\alpha$. All
    other leaves get Adam; weight decay acts on whole parameters.

    The arguments are those of `optax.contrib.galore`, and further:

    - ``side``: the axis that is compressed. ``"long"``, as in optax, keeps the least, but drops what is outside the
      span of the gradient that $P$ was taken of, at any rank. ``"short"`` is the paper's: nothing is lost where
      ``rank`` reaches the short axis. The authors' code has it, with ``scale=0.25``.
    - ``b1``, ``b2``, ``eps``, ``eps_root``, ``nesterov``, ``bias_correction``: of `jaxsgd.adam`.
    - ``base_optimizer``: in Adam's place, an optax transformation that needs gradients only; it runs on each leaf by
      itself. For a rule of jaxsgd in its place, say ``low_rank(lion)(...)``.
    - ``weight_dimension_numbers``: `optax.contrib.GaLoreDimensionNumbers` for all leaves, or in a tree like the params
      (or a prefix, or a function of the params), None for Adam. By default the two-dimensional leaves are matrices.
      Axes that it does not name are a batch: ``GaLoreDimensionNumbers(-2, -1)`` takes each layer of a scan by itself.

    The singular vectors are computed in the precision of the moments. Where a gradient is of lower rank than ``rank``,
    the missing vectors are fixed ones, and rounding is no signal: neither depends on the machine.
    """,
    positional=(
        "learning_rate", "rank", "update_proj_gap", "scale", "base_optimizer", "weight_decay", "mask",
        "weight_dimension_numbers",
    ),
    prepare=_galore_arguments,
    extras={"base_optimizer": None, "weight_dimension_numbers": None},
)  # fmt: skip
register(galore)


# -- APOLLO --------------------------------------------------------------------------------------


def _start_seed(p, axes):
    return None if facing(p, axes, "short") is None else jnp.zeros((), jnp.int32)


def _start_size(p, axes, growth):
    found = None if is_off(growth) else facing(p, axes, "short")
    return None if found is None else real_zeros(jnp.sum(found[0], (-2, -1), keepdims=True))


def drawn(seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers that a seed stands for, of variance 1 over the number of rows."""
    return jax.random.normal(jax.random.key(seed), shape, real_dtype(dtype)).astype(dtype) / math.sqrt(shape[-2])


def _image(x: jax.Array, shape: tuple[int, ...], seed: Any, key: jax.Array, anew: jax.Array) -> tuple[Any, Any]:
    """The projection of ``x`` to ``shape``, and the seed of the random matrix: a fresh one where it is ``anew``."""
    if shape == x.shape:
        return x, seed
    fresh = jax.lax.bitcast_convert_type(jax.random.bits(key, (), jnp.uint32), jnp.int32)
    seed = jnp.where(anew, fresh, seed)
    return drawn(seed, (*x.shape[:-2], shape[-2], x.shape[-2]), x.dtype) @ x, seed


def _norms(x: jax.Array, scale_type: str) -> jax.Array:
    """The norm of each column, or of the whole matrix, with the derivative 0 where it is 0."""
    if scale_type == "tensor":
        return frobenius(x)
    total = jnp.sum(sq(x), axis=-2, keepdims=True)
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)


def grown(x: jax.Array, size: jax.Array | None, growth: Any) -> tuple[jax.Array, jax.Array | None]:
    """``x``, its norm at most ``growth`` times the one before (Fira's limiter), and its norm.

    After a norm of 0 there is no limit: it would hold a layer whose first gradient is zero for thousands of steps.
    """
    if size is None:
        return x, None
    norm, most = frobenius(x), growth * (size + 1e-8)
    over = (size > 0) & (norm > most)
    return x * jnp.where(over, most / jnp.where(over, norm, 1), 1).astype(x.dtype), jnp.where(over, most, norm)


def _apollo_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    _one_of("scale_type", arguments["scale_type"], ("channel", "tensor"))
    _whole(arguments)
    seed(arguments["key"], "apollo")
    return {**arguments, "growth": 0.0} if arguments["growth"] is None else arguments


@rule(
    start={
        "mu": lambda p, axes, rank: jnp.zeros_like(_compressed(p, axes, "short", rank)),
        "nu": lambda p, axes, rank: real_zeros(_compressed(p, axes, "short", rank)),
        "size": _start_size,
        "seed": _start_seed,
    },
    routes=_told,
    prepare=_apollo_arguments,
    hidden=("axes",),
    extras={"adam": NOT_HIDDEN, "weight_dimension_numbers": None},
    positional=("learning_rate", "rank", "update_proj_gap", "scale"),
    needs={"update_proj_gap": {"rank": 2}, "key": {"rank": 2}},
    bounds={"rank": (1, math.inf), "update_proj_gap": (1, math.inf)},
    alternatives={"rank": 2, "update_proj_gap": 7, "scale_type": "tensor", "growth": 1.5, "key": 1},
)
def apollo(
    g, mu, nu, size, seed, *, t, leaf_key, axes="two", rank=256, update_proj_gap=200, scale=1.0,
    scale_type="channel", b1=0.9, b2=0.999, eps=1e-6, growth=1.01, key=0,
):  # fmt: skip
    r"""APOLLO (Zhu et al. 2024, arXiv:2412.05270): $R = P G,\; u_j = \sqrt\alpha\, G_j\, \lVert \hat M_{R,j} / (\sqrt{\hat V_{R,j}} + \epsilon) \rVert / \lVert R_j \rVert$.

    Adam's moments are kept of $R$ only, ``rank`` rows in the place of a matrix's shorter axis; each channel $j$ of the
    gradient itself (the longer axis) is scaled as much as Adam scales its image. $P$ is random, drawn anew every
    ``update_proj_gap`` steps and is not kept: from a ``seed`` it is made again at each step. What is no hidden matrix
    gets Adam, as in `muon`: leaves below two dimensions, and those whose name matches ``adam``.

    - ``scale``: $\alpha$, whose root multiplies the step, as in the authors' code.
    - ``scale_type``: ``"channel"``, or ``"tensor"`` for one factor a matrix.
    - ``growth``: a matrix's step grows by no more than this factor at each step, before $\sqrt\alpha$ and Adam's bias
      correction (the limiter of Fira, Chen et al. 2024, arXiv:2410.01623); None or 0 for no limit.
    - ``key``: the seed of the projections. They differ between leaves and are the same on every replica.
    - ``adam``, ``weight_dimension_numbers``: as in `muon` and `galore`; the latter goes before the former.

    Where ``rank`` reaches the shorter axis, $P$ is the identity: a random matrix would lose what is there.
    """
    found = facing(g, axes, "short")
    x, back = (g, None) if found is None else found[:2]
    low, seed = _image(x, mu.shape, seed, leaf_key, (t - 1) % update_proj_gap == 0)
    mu, nu = ema(mu, low, b1), ema(nu, sq(low), b2)
    u, correction = mu / (jnp.sqrt(nu) + eps), jnp.sqrt(filled(b2, t)) / filled(b1, t)
    if back is not None:
        scaled = _norms(u, scale_type) / (_norms(low, scale_type) + 1e-8)
        u, size = grown(x * scaled.astype(x.dtype), size, growth)
        u = scale**0.5 * back(u)
    return correction * u, mu, nu, size, seed


_MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}

apollo_mini = replace(
    apollo,
    spec=replace(apollo.spec, name="apollo_mini"),
    doc=inspect.cleandoc(
        r"""APOLLO-Mini (Zhu et al. 2024, arXiv:2412.05270): $R = P G,\; U = \sqrt\alpha\, G\, \lVert \hat M_R / (\sqrt{\hat V_R} + \epsilon) \rVert / \lVert R \rVert$.

        `apollo` with one random row $P$, one factor for each matrix, and $\alpha = 128$: the state of SGD, nearly.
        """
    ),
    defaults={**apollo.defaults, **_MINI},
    alternatives={**apollo.alternatives, "scale_type": "channel"},
    needs={},
)
register(apollo_mini)
