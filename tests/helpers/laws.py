"""The laws that every rule lives under, each a function of one rule.

`test_rules.py` runs them on all of `RULES`, `test_adding_a_rule.py` on rules that it registers itself. The laws of any
transformation are in `jaxsgd.testing`. Shapes are few and fixed, so that programs are compiled once a rule and shared.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import case_of
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from twins import TWINS

from jaxsgd import testing
from jaxsgd.hyper import Bounds
from jaxsgd.registry import Rule
from jaxsgd.testing import SHAPES, draw_gradients, draw_params, loss_of

STEPS = 50
RATE = 0.05


def tree(seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, dtype) for name, x in draw_params(seed).items()}


def gradients(seed: int, kind: str = "normal") -> dict[str, np.ndarray]:
    return draw_gradients(kind, seed, STEPS)


def stepper(tx: Any) -> Any:
    """``(grads, state, params) -> (updates, state)`` with the loss given to whoever asks for it."""
    tx = optax.with_extra_args_support(tx)
    return lambda grads, state, params: tx.update(grads, state, params, value=loss_of(params), obj_fn=loss_of)


def walk(tx: Any) -> Any:
    """A compiled ``(params, gradients) -> parameters after each step``."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params, value=loss_of(params), obj_fn=loss_of)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        (_, state), visited = jax.lax.scan(step, (params, tx.init(params)), grads)
        return visited, state

    return run


def floats(rule: Rule) -> dict[str, float]:
    """The hyperparameters with a default that is a float: one program serves all of their values."""
    known = {"learning_rate": RATE, "weight_decay": rule.defaults["weight_decay"] or 0.0, **rule.hyper}
    known |= {name: rule.defaults[name] for name in rule.hyper}
    return {name: value for name, value in known.items() if type(value) is float}


@functools.cache
def _family(make: Any, static: tuple, names: tuple[str, ...]) -> Any:
    """A compiled ``(values of names, params, gradients) -> parameters after each step``, or None where ``make``
    wants constants."""

    @jax.jit
    def run(values, params, grads):
        return walk(make(**dict(static), **values))(params, grads)

    try:
        jax.eval_shape(run, dict.fromkeys(names, 0.5), tree(1), gradients(2))
    except Exception:  # whatever a rule says to an array where it wants a number
        return None
    return run


def walked(rule: Rule, make: Any, settings: dict[str, Any], takes: Any, params: Any, grads: Any) -> Any:
    """``make(**settings)`` walked: defaults as constants, changed ones with all floats as arguments of one program."""
    usual = {name: value for name, value in floats(rule).items() if name in takes}
    changed = {name for name, value in settings.items() if name != "learning_rate" and type(value) is float}
    if changed and changed <= usual.keys():
        static = {name: value for name, value in settings.items() if name not in usual}
        values = usual | {name: value for name, value in settings.items() if name in usual}
        constants = {name: value for name, value in values.items() if type(value) is not float}
        values = {name: value for name, value in values.items() if name not in constants}
        run = _family(make, tuple(sorted((static | constants).items())), tuple(sorted(values)))
        if run is not None:
            return jax.device_get(run(values, params, grads))
    return jax.device_get(_constants(make, tuple(sorted(settings.items())))(params, grads))


@functools.cache
def _constants(make: Any, settings: tuple) -> Any:
    return walk(make(**dict(settings)))


def run(rule: Rule, settings: dict[str, Any], params: Any, grads: Any) -> Any:
    return walked(rule, rule, {"learning_rate": RATE, **settings}, rule.defaults, params, grads)[0]


def kept(rule: Rule, settings: dict[str, Any], params: Any, grads: Any) -> Any:
    """What the rule remembers at the end."""
    return walked(rule, rule, {"learning_rate": RATE, **settings}, rule.defaults, params, grads)[1].slots


def alternative(rule: Rule, name: str, default: Any) -> Any:
    """Another value of a hyperparameter, far enough to show."""
    domain = rule.hypers[name].domain if name in rule.hypers else None
    if isinstance(default, bool):
        return not default
    if isinstance(default, int) and default > 0:
        return default + 1
    if default is None:
        return 0.7
    if name.startswith("eps"):
        return 0.01
    if isinstance(domain, Bounds) and (domain.low, domain.high) == (0, 1):
        return 0.5 if default != 0.5 else 0.7
    return 0.1 if default == 0 else default / 2


def settings_of(rule: Rule) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Hyperparameter -> (settings without the change, settings with it)."""
    out, case = {}, case_of(rule.name)
    for name, default in {"weight_decay": 0.0, **rule.hyper}.items():
        without = dict(case.needs.get(name, {}))
        given = rule.defaults.get(name, default)
        given = given or 0.0 if name == "weight_decay" else given
        other = case.alternatives[name] if name in case.alternatives else alternative(rule, name, given)
        out[name] = (without, {**without, name: other})
    return out


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value of its array's trajectory."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max((float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1.0)) for a, b in pairs), default=0.0)


def reference(rule: Rule, settings: dict[str, Any], params: Any, grads: Any) -> Any:
    """The trajectory by others' code, or by the twin where the oracle lacks an argument."""
    oracle = case_of(rule.name).oracle
    given = {"learning_rate": RATE, **settings}
    takes = inspect.signature(oracle).parameters if oracle is not None else {}
    decay = given.pop("weight_decay", rule.defaults["weight_decay"]) or 0.0
    scheduled = any(callable(value) for value in given.values())
    if oracle is not None and all(name in takes for name in given) and not scheduled:
        decaying = {"weight_decay": decay} if "weight_decay" in takes else {}
        if decaying or not decay:
            return walked(rule, oracle, {**given, **decaying}, takes, params, grads)[0]
    if rule.name not in TWINS:
        assert decay and oracle is not None, f"{rule.name} with {settings}: nothing to compare with; add a twin"
        return _with_decay(oracle(**given), decay, params, grads)
    kept = {k: rule.defaults[k] for k in rule.hyper}
    given = {**kept, **given}
    out = {k: TWINS[rule.name](params[k], grads[k], weight_decay=decay, **given) for k in params}
    return {k: np.stack(v) for k, v in out.items()}


def _with_decay(tx: Any, decay: float, params: Any, grads: Any) -> Any:
    """Decoupled decay by hand, for an oracle without the argument."""

    def update(g, state, p, **extra):
        updates, state = optax.with_extra_args_support(tx).update(g, state, p, **extra)
        return jax.tree.map(lambda u, q: u - RATE * decay * q, updates, p), state

    return jax.device_get(walk(optax.GradientTransformationExtraArgs(tx.init, update))(params, grads))[0]


# -- the laws ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def of(rule: Rule) -> Any:
    """The transformation that most laws look at: one, so that they share its compiled programs."""
    return rule(RATE)


def hold(subject: Any, *names: str) -> None:
    """Fail unless these public laws hold."""
    for name in names:
        seen = testing.LAWS[name](subject)
        assert seen is None, f"{name}: {seen}"


def law_1_oracle(rule: Rule) -> None:
    """Its trajectory equals its oracle in float64 at 1e-12 over 50 steps, for every hyperparameter."""
    with jax.enable_x64(True):
        changes = settings_of(rule).items()
        cases = [
            {},
            *(changed for name, (_, changed) in changes if f"oracle:{name}" not in case_of(rule.name).exceptions),
        ]
        for settings in cases:
            for kind in ("normal", "sparse", "heavy", "constant") if not settings else ("normal",):
                params, grads = tree(1), gradients(2, kind)
                error = relative(run(rule, settings, params, grads), reference(rule, settings, params, grads))
                assert error <= 1e-12, f"{rule.name}({settings}) on {kind} gradients: {error:.1e} from its oracle"


def law_2_transformations(rule: Rule) -> None:
    """jit equals eager; vmap over the learning rate equals single runs; the update is differentiable."""
    hold(rule, "vmap")
    hold(of(rule), "jit", *(() if "derivative" in case_of(rule.name).exceptions else ("derivative",)))


def law_3_structure(rule: Rule) -> None:
    """The state keeps structure, shapes, dtypes and weak types; the second call does not compile."""
    hold(of(rule), "structure", "recompiles", "gradient_dtype")


def law_4_neighbours(rule: Rule) -> None:
    """optax's combinators and Flax take it."""
    tx, params, grads = of(rule), tree(1, np.float32), tree(2, np.float32)
    twice = lambda t: stepper(t)(grads, stepper(t)(grads, t.init(params), params)[1], params)
    labels = {"scalar": "a", "vector": "b", "matrix": "a", "cube": "b"}
    everywhere, nowhere = dict.fromkeys(SHAPES, True), dict.fromkeys(SHAPES, False)

    structural = [name for name, default in rule.defaults.items() if isinstance(default, int)]
    injected = optax.inject_hyperparams(rule, static_args=structural)

    @jax.jit  # one program of all of them
    def neighbours():
        steps = optax.MultiSteps(tx, 2)
        state = steps.init(params)
        for _ in range(4):
            updates, state = steps.update(grads, state, params, value=loss_of(params), obj_fn=loss_of)
        out = {
            "chain": twice(optax.chain(optax.identity(), tx))[0],
            "masked": twice(optax.masked(tx, everywhere))[0],
            "apply_if_finite": twice(optax.apply_if_finite(tx, 3))[0],
            "MultiSteps": updates,
            "inject_hyperparams": twice(injected(learning_rate=RATE))[0],
        }
        if rule.sums is None:  # a part of a tree has other sums
            out["partition"] = twice(optax.partition({"a": rule(RATE), "b": rule(RATE)}, labels))[0]
        return twice(tx), twice(optax.masked(tx, nowhere))[0], out

    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    (plain, plain_state), untouched, found = neighbours()
    for name, other in found.items():
        # Another program around the same arithmetic may round differently, once; inject_hyperparams passes each
        # hyperparameter as a float32 array, 1 - 0.999 included.
        close = 2e-4 if name == "inject_hyperparams" else 1e-6
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=close, atol=close, err_msg=name)
    assert untouched.keys() == grads.keys() and all(np.array_equal(untouched[k], grads[k]) for k in grads)

    assert int(optax.tree.get(plain_state, "count")) == 2
    assert float(optax.tree.get(plain_state, "learning_rate")) == np.float32(RATE)
    replaced = optax.tree.set(plain_state, learning_rate=jnp.float32(0.5))
    assert float(replaced.hyper["learning_rate"]) == 0.5
    names = {k: k for k in params}
    marked = optax.tree.map_params(tx, lambda _, name: name, plain_state, names, is_leaf=lambda x: x is None)
    assert all(marked.slots[slot] == names for slot in plain_state.slots)
    assert marked.count is plain_state.count

    if "flax" in case_of(rule.name).exceptions:
        return
    train = flax.training.train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    train = train.apply_gradients(grads=grads)
    expected = optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    for k in params:
        np.testing.assert_array_equal(train.params[k], expected[k])

    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, gradient)
    optimizer.update(model, gradient)
    ones = jax.tree.map(jnp.ones_like, before)
    state = tx.init(before)
    for _ in range(2):
        updates, state = tx.update(ones, state, before)
        before = optax.apply_updates(before, updates)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def law_5_sharding(rule: Rule) -> None:
    """Shardings of params carry over to slots, on 8 devices, after init and after update."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = {"w": jax.device_put(jnp.ones((16, 4)), split), "b": jax.device_put(jnp.ones((4,)), whole)}
    grads = jax.tree.map(lambda p: p * 0.5, params)
    tx = of(rule)
    state = tx.init(params)
    for moment in ("init", "update"):
        if moment == "update":
            updates, state = jax.jit(stepper(tx))(grads, state, params)
            assert updates["w"].sharding.is_equivalent_to(split, 2)
        for slot, held in state.slots.items():
            if jax.tree.map(jnp.shape, held) != jax.tree.map(jnp.shape, params):
                continue  # a slot of another shape has a layout of its own
            assert held["w"].sharding.is_equivalent_to(split, 2), f"{slot} after {moment}: {held['w'].sharding}"
            assert held["b"].sharding.is_equivalent_to(whole, 1), f"{slot} after {moment}: {held['b'].sharding}"


def law_6_dtypes(rule: Rule) -> None:
    """Strict promotion holds; bf16 params keep f32 state, and 5,000 bf16 steps do not stall."""
    tx = rule(RATE, weight_decay=0.01, dynamic=("weight_decay",))
    hold(tx, "strict", "moments")
    for dtype in (np.float32, jnp.bfloat16, np.float16):
        params = tree(1, dtype)
        _, state = jax.eval_shape(stepper(tx), tree(2, dtype), jax.eval_shape(tx.init, params), params)
        assert {x.dtype for x in jax.tree.leaves(state.slots)} <= {np.dtype(np.float32), np.dtype(np.int32)}
        assert {x.dtype for x in state.hyper.values()} == {np.dtype(np.float32)}
    if "narrow" not in case_of(rule.name).exceptions:
        hold(rule(1e-3), "stalls")


def law_7_edges(rule: Rule) -> None:
    """Zeros, scalars, empty trees, None leaves, complex parameters, NaN and inf are safe."""
    tx, exceptions = of(rule), case_of(rule.name).exceptions
    hold(tx, "zero", "empty", "non_finite")
    hold(tx, *(name for name, part in {"rest": "zero", "complex": "complex"}.items() if part not in exceptions))
    if rule.sums is None:
        hold(tx, "isolation")

    zeros = jax.tree.map(np.zeros_like, tree(1, np.float32))
    frozen = rule(RATE, groups=[("vector", {"frozen": True})])
    for bad in (np.nan, np.inf):
        poisoned = {**zeros, "vector": np.full(7, bad, np.float32)}
        updates, _ = stepper(frozen)(poisoned, frozen.init(zeros), zeros)
        assert np.all(updates["vector"] == 0), f"{bad} got through a frozen leaf"
    if "complex" not in exceptions:
        state = jax.eval_shape(tx.init, jnp.ones(6, jnp.complex64))
        squares = [x for name, x in state.slots.items() if rule.slots[name].kind == "square"]
        assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(squares))


def law_8_hyperparameters(rule: Rule) -> None:
    """Every hyperparameter changes the trajectory."""
    with jax.enable_x64(True):
        params, grads = tree(1), gradients(2)
        usual = {"learning_rate": RATE, **case_of(rule.name).needs.get("learning_rate", {})}
        slow = run(rule, {**usual, "learning_rate": usual["learning_rate"] / 2}, params, grads)
        assert relative(slow, run(rule, usual, params, grads)) > 1e-6, "learning_rate changes nothing"
        for name, (without, changed) in settings_of(rule).items():
            moved = relative(run(rule, changed, params, grads), run(rule, without, params, grads))
            if moved == 0:  # what is evaluated, such as an average, counts too
                moved = relative(kept(rule, changed, params, grads), kept(rule, without, params, grads))
            assert moved > 1e-6, f"{name}={changed[name]} changes nothing"


def law_9_counts(rule: Rule) -> None:
    """Schedules see the 0-based count; the state shows what was applied."""
    hold(rule, "schedule")


def law_10_storage(rule: Rule) -> None:
    """Every storage that is accepted changes the bytes of the state as computed."""
    hold(rule, "storage")


LAWS = {name[4:]: law for name, law in list(globals().items()) if name.startswith("law_")}
