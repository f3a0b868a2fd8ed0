"""The nine laws that every rule lives under, each a function of one rule.

`test_rules.py` runs them on all of `RULES`, `test_adding_a_rule.py` on rules that it registers itself. Shapes
are few and fixed, so that programs are compiled once a rule and shared by the laws.
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
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from twins import TWINS

import jaxsgd
from jaxsgd.rule import DECAYS, Rule
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


def alternative(name: str, default: Any) -> Any:
    """Another value of a hyperparameter, far enough to show."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int) and default > 0:
        return default + 1
    if default is None:
        return 0.7
    if name.startswith("eps"):
        return 0.01
    if DECAYS.fullmatch(name) and name != "weight_decay":
        return 0.5 if default != 0.5 else 0.7
    return 0.1 if default == 0 else default / 2


def settings_of(rule: Rule) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Hyperparameter -> (settings without the change, settings with it)."""
    out = {}
    for name, default in {"weight_decay": 0.0, **rule.hyper}.items():
        without = dict(rule.needs.get(name, {}))
        given = rule.defaults.get(name, default)
        given = given or 0.0 if name == "weight_decay" else given
        other = rule.alternatives[name] if name in rule.alternatives else alternative(name, given)
        out[name] = (without, {**without, name: other})
    return out


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value of its array's trajectory."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max((float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1.0)) for a, b in pairs), default=0.0)


def reference(rule: Rule, settings: dict[str, Any], params: Any, grads: Any) -> Any:
    """The trajectory by others' code, or by the twin where the oracle lacks an argument."""
    oracle = rule.oracle
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


def law_1_oracle(rule: Rule) -> None:
    """Its trajectory equals its oracle in float64 at 1e-12 over 50 steps, for every hyperparameter."""
    with jax.enable_x64(True):
        changes = settings_of(rule).items()
        cases = [{}, *(changed for name, (_, changed) in changes if f"oracle:{name}" not in rule.exceptions)]
        for settings in cases:
            for kind in ("normal", "sparse", "heavy", "constant") if not settings else ("normal",):
                params, grads = tree(1), gradients(2, kind)
                error = relative(run(rule, settings, params, grads), reference(rule, settings, params, grads))
                assert error <= 1e-12, f"{rule.name}({settings}) on {kind} gradients: {error:.1e} from its oracle"


def law_2_transformations(rule: Rule) -> None:
    """jit equals eager; vmap over the learning rate equals single runs; the update is differentiable."""
    with jax.enable_x64(True):
        tx, params = rule(RATE), tree(1)
        first, second = ({k: v[i] for k, v in gradients(3).items()} for i in (0, 1))
        update = stepper(tx)
        state = update(first, tx.init(params), params)[1]
        compiled = update(second, state, params)
        with jax.disable_jit():
            eager = update(second, state, params)
        # Programs may round differently, once: 1e-16 of the parameters (an update may be a small difference of them).
        after = lambda updates: optax.apply_updates(params, updates)
        assert relative(after(compiled[0]), after(eager[0])) < 1e-14
        assert relative(compiled[1].slots, eager[1].slots) < 1e-14

        rates = jnp.asarray([0.01, 0.02, 0.3])
        at = jax.jit(jax.vmap(lambda r: update(second, jaxsgd.with_hyper(state, learning_rate=r), params)[0]))
        many = at(rates)
        for i, rate in enumerate((0.01, 0.02, 0.3)):
            one = update(second, jaxsgd.with_hyper(state, learning_rate=rate), params)[0]
            assert relative(after(jax.tree.map(lambda x, i=i: x[i], many)), after(one)) < 1e-14

        if "derivative" in rule.exceptions:
            return
        direction = tree(5)
        moved = lambda s: update(jax.tree.map(lambda g, d: g + s * d, second, direction), state, params)[0]
        tangent = jax.jit(lambda s: jax.jvp(moved, (s,), (1.0,))[1])(0.0)
        # Central differences with step 1e-6 in float64: truncation and rounding both near 1e-10.
        difference = jax.tree.map(lambda a, b: (a - b) / 2e-6, moved(1e-6), moved(-1e-6))
        for a, b in zip(jax.tree.leaves(tangent), jax.tree.leaves(difference), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def _shape_of(state: Any) -> Any:
    return jax.tree.structure(state), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]


def law_3_structure(rule: Rule) -> None:
    """The state keeps structure, shapes, dtypes and weak types; the second call does not compile."""
    tx, params = rule(RATE), tree(1, np.float32)
    state = tx.init(params)
    update = jax.jit(stepper(tx))
    before = _shape_of(state)
    for seed in (1, 2):
        _, state = update(tree(seed, np.float32), state, params)
        assert _shape_of(state) == before
    assert update._cache_size() == 1, "the second call compiled again"
    _, state = stepper(tx)(jax.tree.map(lambda g: g.astype(jnp.bfloat16), tree(3, np.float32)), state, params)
    assert _shape_of(state) == before, "the gradient's dtype leaked into the state"


def law_4_neighbours(rule: Rule) -> None:
    """optax's combinators and Flax take it."""
    tx, params, grads = rule(RATE), tree(1, np.float32), tree(2, np.float32)
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
        if rule.spec.sums is None:  # a part of a tree has other sums
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

    if "flax" in rule.exceptions:
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
    tx = rule(RATE)
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
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (np.float32, jnp.bfloat16, np.float16):
            params, grads = tree(1, dtype), tree(2, dtype)
            tx = rule(RATE, weight_decay=0.01, dynamic=("weight_decay",))
            updates, state = stepper(tx)(grads, tx.init(params), params)
            assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype(dtype)}
            assert {x.dtype for x in jax.tree.leaves(state.slots)} <= {np.dtype(np.float32), np.dtype(np.int32)}
            assert {x.dtype for x in state.hyper.values()} == {np.dtype(np.float32)}

    if "narrow" in rule.exceptions:
        return
    # Slots driven by the gradient alone must not notice that the parameters are bf16.
    tx = rule(1e-3)
    constant = jnp.linspace(0.5, 1.5, 8)

    def march(dtype):
        def step(carry, _):
            p, s = carry
            u, s = stepper(tx)(constant.astype(dtype).astype(jnp.float32), s, p)
            return (optax.apply_updates(p, u), s), None

        p = jnp.ones(8, dtype)
        return jax.lax.scan(step, (p, tx.init(p)), length=5000)[0][1]

    narrow, full = jax.jit(lambda: (march(jnp.bfloat16), march(jnp.float32)))()
    for slot, held in narrow.slots.items():
        # bf16 rounds the gradient once (2**-9, squared in nu: 2**-8).
        if held is not None:  # a factor that a vector does not have
            np.testing.assert_allclose(held, full.slots[slot], rtol=2**-7, err_msg=f"{slot} stalls in bf16")
    for name, held in narrow.shared.items():
        np.testing.assert_allclose(held, full.shared[name], rtol=2**-7)


def law_7_edges(rule: Rule) -> None:
    """Zeros, scalars, empty trees, None leaves, complex parameters, NaN and inf are safe."""
    tx = rule(RATE)
    update = stepper(tx)
    zeros = jax.tree.map(np.zeros_like, tree(1, np.float32))
    updates, state = update(zeros, tx.init(zeros), zeros)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    if "zero" not in rule.exceptions:
        assert all(np.all(u == 0) for u in jax.tree.leaves(updates)), "a zero gradient moved a zero parameter"

    assert update({}, tx.init({}), {})[0] == {}
    holed = {"a": jnp.ones(3), "b": None}
    updates, _ = update(holed, tx.init(holed), holed)
    assert updates["b"] is None
    scalar = jnp.float32(1.5)
    assert update(scalar, tx.init(scalar), scalar)[0].shape == ()

    for bad in (np.nan, np.inf):
        poisoned = {**zeros, "vector": np.full(7, bad, np.float32)}
        frozen = rule(RATE, groups=[("vector", {"frozen": True})])
        updates, _ = stepper(frozen)(poisoned, frozen.init(zeros), zeros)
        assert np.all(updates["vector"] == 0), f"{bad} got through a frozen leaf"
        updates, _ = update(poisoned, tx.init(zeros), zeros)
        if rule.spec.sums is None:
            assert np.all(np.isfinite(updates["matrix"])), f"{bad} spread to another leaf"

    if "complex" in rule.exceptions:
        return
    # Turning the phase of parameters and gradients turns the update: nothing depends on the axes.
    rng = np.random.RandomState(0)
    z, g = (jnp.asarray(rng.standard_normal(6) + 1j * rng.standard_normal(6), jnp.complex64) for _ in range(2))
    turn = jnp.exp(1j * jnp.float32(0.7)).astype(jnp.complex64)
    updates, state = update(g, tx.init(z), z)
    turned, _ = update(turn * g, tx.init(turn * z), turn * z)
    np.testing.assert_allclose(turned, turn * updates, rtol=2e-5, atol=1e-6)
    assert all(jnp.isrealobj(v) for k, v in state.slots.items() if k.startswith(("nu", "e_", "acc")))


def law_8_hyperparameters(rule: Rule) -> None:
    """Every hyperparameter changes the trajectory."""
    with jax.enable_x64(True):
        params, grads = tree(1), gradients(2)
        usual = {"learning_rate": RATE, **rule.needs.get("learning_rate", {})}
        slow = run(rule, {**usual, "learning_rate": usual["learning_rate"] / 2}, params, grads)
        assert relative(slow, run(rule, usual, params, grads)) > 1e-6, "learning_rate changes nothing"
        for name, (without, changed) in settings_of(rule).items():
            moved = relative(run(rule, changed, params, grads), run(rule, without, params, grads))
            if moved == 0:  # what is evaluated, such as an average, counts too
                moved = relative(kept(rule, changed, params, grads), kept(rule, without, params, grads))
            assert moved > 1e-6, f"{name}={changed[name]} changes nothing"


def law_9_counts(rule: Rule) -> None:
    """Schedules see the 0-based count; the state shows what was applied."""
    seen = lambda count: 0.5 ** (count + 1)
    with jax.enable_x64(True):
        tx, params, grads = rule(seen), tree(1), tree(2)
        by_hand, _ = stepper(rule(0.5))(grads, rule(0.5).init(params), params)
        state = tx.init(params)
        assert float(jaxsgd.metrics(state)["learning_rate"]) == 0.5
        for step in range(3):
            updates, state = stepper(tx)(grads, state, params)
            if step == 0:
                assert relative(updates, by_hand) < 1e-14
            report = jaxsgd.metrics(state)
            assert int(report["step"]) == step + 1
            assert float(report["learning_rate"]) == 0.5 ** (step + 1)


LAWS = {name[4:]: law for name, law in list(globals().items()) if name.startswith("law_")}
