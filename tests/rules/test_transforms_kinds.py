"""Kinds of input through every transformation: leaves, containers, ways to run, shapes that changed, Flax variables.

Law: the kind of a leaf changes its rounding, nothing else. Each kind is compared with the same numbers in float32.
"""

import collections
import copy
import functools
import inspect
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd.transforms import (
    Accumulate,
    GlobalNormState,
    accumulate,
    accumulate_gradients,
    clip_by_global_norm,
    ema,
    guard,
    guard_report,
    mechanize,
    monitor,
    monitor_report,
    normalize,
    params_ema,
    reduce_on_plateau,
    resume,
    sam,
)

FLOAT0 = jax.dtypes.float0


def momentum(rate=0.25, decay=0.5):
    """A plain optimizer with one slot, which takes leaves of every kind."""

    def moves(x):
        return jnp.issubdtype(jnp.result_type(x), jnp.inexact)

    def wide(x):
        x = jnp.asarray(x)
        return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)

    def init(params):
        return optax.TraceState(jax.tree.map(lambda p: jnp.zeros_like(wide(p)) if moves(p) else jnp.zeros(()), params))

    def update(updates, state, params=None):
        trace = jax.tree.map(lambda m, g: decay * m + wide(g) if moves(g) else m, state.trace, updates)
        steps = jax.tree.map(
            lambda m, g: (-rate * m).astype(g.dtype) if moves(g) else g, trace, jax.tree.map(jnp.asarray, updates)
        )
        return steps, optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


TRANSFORMS = {
    "clip": lambda: optax.chain(clip_by_global_norm(2.0), momentum()),
    "guard": lambda: guard(momentum(), z_score=4.0, window=4),
    "accumulate": lambda: accumulate(momentum(), 2),
    "ema": lambda: optax.chain(ema(0.5), momentum()),
    "params_ema": lambda: optax.chain(momentum(), params_ema(0.5)),
    "monitor": lambda: monitor(momentum()),
    "mechanize": lambda: mechanize(momentum(1.0, 0.0), weight_decay=0.0, s_init=0.25),
    "plateau": lambda: optax.chain(momentum(), reduce_on_plateau(0.5, 1)),
    "sam": lambda: sam(momentum(), optax.chain(normalize(), momentum())),
    "sam opaque": lambda: sam(momentum(), optax.chain(normalize(), momentum()), opaque_mode=True),
}

X = np.asarray([[1.0, -2.0], [0.5, 0.25]], np.float32)  # exact in every dtype
NARROW = {"bfloat16": 2**-7, "float16": 2**-10, "float8_e4m3fn": 2**-3, "float8_e5m2": 2**-2}
"""The rounding of each dtype, relative."""

LEAVES = {
    "float32": jnp.asarray(X),
    "numpy": X.copy(),
    "numpy scalar": np.float32(0.5),
    "python float": 0.5,
    "scalar": jnp.asarray(0.5),
    "empty": jnp.zeros((0, 3)),
    "none": None,
    **{name: jnp.asarray(X, name) for name in NARROW},
    "complex64": jnp.asarray(X[0] + 1j * X[1], jnp.complex64),
    "int32": jnp.arange(3),
    "numpy int": np.arange(3),
    "python int": 3,
    "bool": jnp.asarray([True, False]),
}


def is_inexact(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def gradients(factor, leaves):
    """``factor`` times the leaves in their kinds; of integers what `jax.grad` gives."""

    def one(x):
        if not is_inexact(x):
            return np.zeros(np.shape(x), FLOAT0)
        if isinstance(x, jax.Array):
            return jnp.asarray(factor).astype(x.dtype) * x
        return factor * x if isinstance(x, float) else np.asarray(factor * x, x.dtype)

    return jax.tree.map(one, leaves)


def apply(params, updates):
    def one(p, u):
        if is_inexact(p):
            return (jnp.asarray(p) + jnp.asarray(u)).astype(jnp.result_type(p))
        assert u.dtype == FLOAT0 or u.dtype == jnp.result_type(p)
        return p

    return jax.tree.map(one, params, updates)


FACTORS = (0.5, -1.0, 2.0, 0.25)


def step(tx, params, state, factor, leaves):
    """One step on gradients that do not follow the parameters: rounding in one leaf stays out of the others."""
    grads = gradients(factor, leaves)
    updates, state = tx.update(grads, state, params, value=1.0 * factor, grad_fn=lambda p, i: gradients(2.0, leaves))
    return apply(params, updates), state


def walk(tx, params, leaves=None, one_step=step):
    leaves, state = params if leaves is None else leaves, tx.init(params)
    for factor in FACTORS:
        params, state = one_step(tx, params, state, factor, leaves)
    return params, state


def jitted(tx, params, leaves):
    grads = {factor: gradients(factor, leaves) for factor in (*FACTORS, 2.0)}
    update = jax.jit(lambda g, s, p, v, h: tx.update(g, s, p, value=v, grad_fn=lambda q, i: h))
    state = tx.init(params)
    for factor in FACTORS:
        updates, state = update(grads[factor], state, params, factor, grads[2.0])
        params = apply(params, updates)
    assert update._cache_size() <= 2  # numbers are arrays after the first step
    return params, state


def scanned(tx, params, leaves):
    """Two walks at once, the second of which is the one that is asked for."""
    params = jax.tree.map(jnp.asarray, params)
    leaves = jax.tree.map(jnp.asarray, leaves)

    def run(scale):
        def body(carry, factor):
            return step(tx, *carry, factor, leaves), None

        return jax.lax.scan(body, (params, tx.init(params)), scale * jnp.asarray(FACTORS))[0]

    return jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(run))(jnp.asarray([0.5, 1.0])))


def without_jit(tx, params, leaves):
    with jax.disable_jit():
        return walk(tx, params, leaves)


MODES = {"eager": walk, "jit": jitted, "disable_jit": without_jit, "scan, vmap": scanned}


def real(tree):
    """The floating leaves in float32, complex ones as two."""
    floats = {k: v for k, v in tree.items() if v is not None and is_inexact(v)}
    return {
        k: jnp.stack([v.real, v.imag]) if jnp.iscomplexobj(v) else jnp.asarray(v, "float32") for k, v in floats.items()
    }


def assert_close(ours, other):
    """Equal up to some roundings in the leaf's own dtype."""
    for name, value in real(ours).items():
        rounding = len(FACTORS) * NARROW.get(name, 1e-5)
        np.testing.assert_allclose(value, other[name], rounding, rounding, err_msg=name)


# -- leaves ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """The walk of each transformation on the same numbers, all of them float32 arrays."""
    return functools.cache(lambda kind: walk(TRANSFORMS[kind](), real(LEAVES)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_kind_of_leaf(kind, mode, reference):
    tx = TRANSFORMS[kind]()
    params, state = MODES[mode](tx, LEAVES, LEAVES)
    want, want_state = reference(kind)
    assert_close(params, want)
    for name, leaf in LEAVES.items():
        if leaf is not None:
            assert jnp.result_type(params[name]) == jnp.result_type(leaf), name
            if not is_inexact(leaf):
                np.testing.assert_array_equal(params[name], leaf)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, tx.init(LEAVES))
    if kind == "clip":
        np.testing.assert_allclose(state[0].gradient_norm, want_state[0].gradient_norm, 1e-6)
    if kind == "params_ema":
        assert_close(state[1].average, want_state[1].average)
        np.testing.assert_array_equal(state[1].average["int32"], LEAVES["int32"])
    if kind == "monitor":
        for name, value in monitor_report(want_state).items():
            np.testing.assert_allclose(monitor_report(state)[name], value, 0.5 if "float8" in name else 0.05)


# -- containers ------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["x", "value"])


@jax.tree_util.register_dataclass
@dataclass
class Registered:
    x: object
    value: object


@flax.struct.dataclass
class Struct:
    x: object
    value: object


@jax.tree_util.register_pytree_node_class
class Callable:
    """A model that is its own tree of parameters, as in Equinox."""

    def __init__(self, x, value):
        self.x, self.value = x, value

    def __call__(self, x):
        raise AssertionError("parameters are not to be called")

    def tree_flatten(self):
        return (self.x, self.value), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


CONTAINERS = {
    "dict": lambda x, y: {"x": x, "value": y},
    "list": lambda x, y: [x, None, [y]],
    "tuple": lambda x, y: (x, (), y),
    "namedtuple": Pair,
    "dataclass": Registered,
    "flax.struct": Struct,
    "FrozenDict": lambda x, y: FrozenDict({"x": x, "y": {"value": y}}),
    "nnx.State": lambda x, y: nnx.State({"x": nnx.Param(x), "y": nnx.Param(y)}),
    "callable": Callable,
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_container(kind):
    """The same numbers in another container give the same numbers in that container."""
    x, y = jnp.asarray(X), jnp.ones(3)
    want, _ = walk(TRANSFORMS[kind](), CONTAINERS["dict"](x, y))
    for name, container in CONTAINERS.items():
        tree = container(x, y)
        params, state = walk(TRANSFORMS[kind](), tree)
        assert jax.tree.structure(params) == jax.tree.structure(tree), name
        by_shape = [{p.shape: np.asarray(p) for p in jax.tree.leaves(tree)} for tree in (params, want)]
        jax.tree.map(partial(np.testing.assert_array_equal, err_msg=name), *by_shape)


# -- states of other parameters --------------------------------------------------------------------

KEPT = [kind for kind in TRANSFORMS if kind not in ("clip", "plateau", "monitor")]
"""Those with a copy of the parameters, or of another state."""


@pytest.mark.parametrize("kind", KEPT)
def test_a_state_of_other_shapes_is_refused(kind):
    """(8, 1) meets (8, 10): the arrays would broadcast."""
    tx = TRANSFORMS[kind]()
    old, new = {"a": {"w": jnp.ones((8, 1))}}, {"a": {"w": jnp.ones((8, 10))}}
    for update in (step, jax.jit(step, static_argnums=(0, 3))):
        with pytest.raises(ValueError, match=r"a/w.*\(8, 10\).*\(8, 1\)"):
            update(tx, new, tx.init(old), 1.0, new)


def test_gradients_of_other_shapes_are_refused():
    params, grads = {"w": jnp.ones((8, 10))}, {"w": jnp.ones((8, 1))}
    for kind in ("params_ema", "mechanize", "sam", "monitor", "accumulate"):
        tx = {**TRANSFORMS, "params_ema": lambda: params_ema(0.9)}[kind]()
        with pytest.raises(ValueError, match=r"'w'.*\(8, 1\).*\(8, 10\)"):
            tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match="num_betas=3; the state has 6"):
        mechanize(momentum(), num_betas=3).update(params, mechanize(momentum()).init(params), params)
    plain, more = optax.scale(-1.0), {"w": jnp.ones(2), "v": jnp.ones(2)}
    for tx in (params_ema(0.9), ema(0.9), mechanize(plain), sam(plain, plain), monitor(plain), accumulate(plain, 2)):
        for old, new in ((params, more), (more, params)):
            with pytest.raises(ValueError, match=r"'v'.*Use a state that tx.init\(params\) made"):
                tx.update(new, tx.init(old), new)
    real, imaginary = {"w": jnp.ones(2)}, {"w": 1j * jnp.ones(2)}
    with pytest.raises(ValueError, match="'w' is complex64; the state is float32"):
        accumulate(momentum(), 2).update(imaginary, accumulate(momentum(), 2).init(real))


def test_leaves_that_are_no_numbers_are_refused():
    for kind in ("accumulate", "ema", "params_ema", "mechanize", "sam"):
        make = {**TRANSFORMS, "ema": lambda: ema(0.9), "params_ema": lambda: params_ema(0.9)}[kind]
        for leaf, word in (("adam", "a str"), (jnp.tanh, "tanh"), (jax.random.key(0), "key")):
            with pytest.raises(TypeError, match=f"'act'.*{word}"):
                make().init({"w": jnp.ones(2), "act": leaf})
    for wrap in (guard, monitor, mechanize, lambda tx: accumulate(tx, 2), lambda tx: sam(tx, normalize())):
        with pytest.raises(TypeError, match="a gradient transformation such as"):
            wrap(jnp.tanh)
    for wrong in ("1", None, np.ones(2)):
        with pytest.raises(TypeError, match="max_norm"):
            clip_by_global_norm(wrong)
    for tx in (guard(momentum()), reduce_on_plateau()):
        with pytest.raises(ValueError, match="value: it is complex64"):
            tx.update({"w": 1.0}, tx.init({"w": 1.0}), {"w": 1.0}, value=1j)


# -- Flax variables --------------------------------------------------------------------------------


def train_step(traces):
    @nnx.jit
    def step(model, optimizer, x):
        traces.append(x)
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - 1) ** 2).mean())(model)
        optimizer.update(model, grads, value=loss)

    return step


def test_guard_on_an_nnx_optimizer():
    """`resume` keeps Flax's variables: nothing is compiled again, nothing drops out of a checkpoint."""
    traces = []
    model, step = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), train_step(traces)
    tx = monitor(guard(optax.adam(0.1), max_consecutive=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step(model, optimizer, jnp.ones((4, 2)))
    before = nnx.state(optimizer, nnx.OptState)
    kernel = np.array(model.kernel[...])
    step(model, optimizer, jnp.full((4, 2), jnp.nan, jnp.float32))
    report = guard_report(optimizer.opt_state)
    assert report["halted"] is True and report["skipped"] == 1 and "halted: 1 steps" in report["verdict"]
    np.testing.assert_array_equal(model.kernel[...], kernel)

    optimizer.opt_state = resume(optimizer.opt_state)
    assert jax.tree.map(jnp.shape, nnx.state(optimizer, nnx.OptState)) == jax.tree.map(jnp.shape, before)
    assert guard_report(optimizer.opt_state)["halted"] is False
    step(model, optimizer, jnp.ones((4, 2)))
    assert len(traces) == 1 and np.abs(model.kernel[...] - kernel).max() > 0
    for name, value in monitor_report(optimizer.opt_state).items():
        assert type(value) is type(jnp.ones(1)) and value > 0, name


def test_flush_on_an_nnx_optimizer():
    traces = []
    model, step = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), train_step(traces)
    tx = accumulate(optax.sgd(1.0), 4)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.state(optimizer, nnx.OptState)
    step(model, optimizer, jnp.ones((4, 2)))
    params = nnx.state(model, nnx.Param)
    grads = nnx.grad(lambda m: ((m(jnp.ones((4, 2))) - 1) ** 2).mean())(model)
    updates, state = tx.flush(optimizer.opt_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    np.testing.assert_allclose(updates["kernel"][...], -grads["kernel"][...], 1e-6)
    optimizer.opt_state = state
    nnx.update(model, optax.apply_updates(params, updates))
    assert jax.tree.map(jnp.shape, nnx.state(optimizer, nnx.OptState)) == jax.tree.map(jnp.shape, before)
    step(model, optimizer, jnp.ones((4, 2)))
    assert len(traces) == 1 and int(optimizer.opt_state.step[...]) == 1


def test_accumulate_knows_its_parts():
    inner = optax.sgd(1.0)
    tx = accumulate(inner, 3)
    for same in (tx, copy.copy(tx)):
        assert isinstance(same, Accumulate) and same.every == 3 and repr(same).endswith(", every=3)")
        params = {"w": jnp.ones(2), "n": jnp.arange(2)}
        state = same.update(gradients(1.0, params), same.init(params), params)[1]
        updates, _ = accumulate(momentum(1.0), 3).flush(state._replace(inner=momentum().init(params)), params)
        np.testing.assert_allclose(updates["w"], -1.0)
        assert updates["n"].dtype == jnp.int32 and not updates["n"].any()
    init, update = tx
    assert (init, update) == (tx.init, tx.update)


# -- optax's names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ema", "clip_by_global_norm", "mechanize", "sam", "normalize", "reduce_on_plateau"])
def test_calls_are_optax_calls(name):
    """The same parameters in the same order with the same defaults; further ones are keyword-only."""
    theirs = inspect.signature(getattr(optax, name, None) or getattr(optax.contrib, name)).parameters
    ours = inspect.signature(getattr(jaxsgd.transforms, name)).parameters
    shared = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in shared] == [(p.name, p.default) for p in theirs.values()]


def test_no_other_class_has_a_name_of_optax():
    for name in jaxsgd.transforms.__all__:
        theirs = getattr(optax, name, getattr(optax.contrib, name, None))
        assert theirs is None or inspect.isfunction(theirs) or theirs is getattr(jaxsgd, name), name


@pytest.mark.parametrize("arguments", [(0.9,), (0.5, False), (0.0,), (0.9, True, jnp.float64)])
def test_ema_is_optax_ema(arguments, x64):
    params = {"w": jnp.asarray(X, jnp.float64), "z": jnp.ones(2, jnp.complex128), "none": None}
    ours, theirs = ema(*arguments), optax.ema(*arguments[:2])
    state, their_state = ours.init(params), theirs.init(params)
    for factor in FACTORS:
        grads = gradients(factor, params)
        updates, state = ours.update(grads, state)
        their_updates, their_state = theirs.update(grads, their_state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-300), updates, their_updates)
    assert isinstance(state, optax.EmaState) and int(optax.tree.get(state, "count")) == len(FACTORS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12), state.ema, their_state.ema)


def test_ema_of_bf16_does_not_stall():
    grads = jnp.ones(2, jnp.bfloat16)
    tx = ema(0.999, debias=False)
    updates, state = jax.lax.scan(lambda s, _: tx.update(grads, s)[::-1], tx.init(grads), length=1000)[::-1]
    assert updates.dtype == jnp.bfloat16 and state.ema.dtype == jnp.float32
    np.testing.assert_allclose(state.ema, 1 - 0.999**1000, 1e-4)
    assert ema(0.9, accumulator_dtype="bfloat16").init(grads).ema.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="decay=1"):
        ema(1.0)
    rated = optax.inject_hyperparams(ema)(decay=0.9)
    np.testing.assert_allclose(rated.update(jnp.ones(2), rated.init(jnp.ones(2)))[0], 1, 1e-6)


def test_monitor_takes_optax_measurements():
    measures = {"norm": optax.tree.norm, "big": optax.measure_with_ema(lambda u: optax.tree.norm(u) > 1, decay=0.9)}
    params = {"w": jnp.ones(4)}
    ours, theirs = monitor(measures), optax.monitor(measures)
    got, want = (tx.update(params, tx.init(params), params) for tx in (ours, theirs))
    assert jax.tree.structure(got) == jax.tree.structure(want) and float(optax.tree.get(got[1], "norm")) == 2
    with pytest.raises(ValueError, match="axis_name='data'"):
        monitor(measures, axis_name="data")


def test_clip_without_a_state():
    grads = {"w": jnp.full(4, 2.0)}
    tx = clip_by_global_norm(1.0)
    for state in (None, optax.EmptyState()):
        updates, same = jax.jit(tx.update)(grads, state)
        np.testing.assert_allclose(updates["w"], 0.5)
        assert same == state
    with pytest.raises(TypeError, match="GlobalNormState"):
        clip_by_global_norm(lambda count: 1.0).update(grads, None)
    with pytest.raises(TypeError, match="GlobalNormState"):
        tx.update(grads, optax.TraceState(grads))


def test_clip_takes_a_schedule_in_plain_python():
    def schedule(count):
        return [1.0, 0.5][int(count)] if count < 2 else 0.25

    tx = clip_by_global_norm(schedule)
    grads, state = {"w": jnp.full(4, 2.0)}, GlobalNormState(jnp.zeros((), jnp.int32), jnp.zeros(()))
    for want in (1.0, 0.5, 0.25, 0.25):
        updates, state = tx.update(grads, state)
        np.testing.assert_allclose(optax.tree.norm(updates), want, 1e-6)


# -- gradients of microbatches ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_accumulate_gradients_of_every_kind_of_leaf(steps):
    """The mean over microbatches is the gradient of the whole batch; of integers float0, as `jax.grad` gives."""
    batch = jnp.asarray([1.0, 2.0, 6.0])

    def loss_fn(params, x, key):
        floats = [p for p in jax.tree.leaves(params) if is_inexact(p)]
        squares = [jnp.sum(jnp.abs(jnp.asarray(p).astype("c8" if jnp.iscomplexobj(p) else "f4")) ** 2) for p in floats]
        return sum(squares) * jnp.mean(x) + 0 * params["int32"].sum(), {"n": jnp.asarray(x.shape[0])}

    fn = accumulate_gradients(loss_fn, steps)
    want = jax.grad(lambda p: loss_fn(p, batch, None)[0], allow_int=True)(LEAVES)
    run = jax.jit(fn)
    for call in (fn, run):
        (loss, aux), grads = call(LEAVES, batch)
        assert float(loss) == pytest.approx(float(loss_fn(LEAVES, batch, None)[0]), 1e-6) and int(aux["n"]) == 3
        assert jax.tree.structure(grads) == jax.tree.structure(want)
        for name, g in grads.items():
            if g is not None and is_inexact(LEAVES[name]):
                wide = "complex64" if jnp.iscomplexobj(g) else "float32"
                assert g.dtype == wide, name
                np.testing.assert_allclose(g, np.asarray(want[name]).astype(wide), NARROW.get(name, 1e-6), err_msg=name)
            elif g is not None:
                assert g.dtype == FLOAT0 and g.shape == np.shape(LEAVES[name]), name
    with jax.disable_jit():
        again = fn(LEAVES, batch)[1]
    np.testing.assert_allclose(again["complex64"], grads["complex64"], 1e-6)


def test_accumulate_gradients_of_integers_on_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    fn = accumulate_gradients(lambda p, x, key: (p["w"] * x).sum(), 2, axis_name="data")
    for check_vma in (True, False):
        run = jax.shard_map(
            lambda p, x: fn(p, x)[1], mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
        )
        grads = jax.jit(run)(params, jnp.arange(8.0).reshape(4, 2))
        np.testing.assert_allclose(grads["w"], [3, 4])
        assert grads["n"].dtype == FLOAT0


def test_averages_take_their_decay_under_inject_hyperparams():
    params, grads = jnp.arange(3.0), jnp.ones(3)
    for make in (jaxsgd.ema, jaxsgd.params_ema):
        injected, plain = optax.inject_hyperparams(make)(decay=0.9), make(0.9)
        state, kept = injected.init(params), plain.init(params)
        for i in range(3):
            updates, state = jax.jit(injected.update)(grads * i, state, params)
            wanted, kept = plain.update(grads * i, kept, params)
            np.testing.assert_allclose(updates, wanted, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(state.inner_state), jax.tree.leaves(kept), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
