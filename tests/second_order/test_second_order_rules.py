"""The rules that see the whole tree: their laws, their steps, and the train step that supplies the loss."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step
from jaxsgd.numerics import wide, widest
from jaxsgd.registry import TREE_RULES, UnknownRule, all_rules
from jaxsgd.second_order.curvature import conjugate_gradients
from jaxsgd.second_order.rules import gauss_newton, lbfgs, newton, newton_cg, split_loss
from jaxsgd.testing import laws_broken
from jaxsgd.testing.laws import LAWS
from jaxsgd.tuning.pick import _candidates
from jaxsgd.tuning.short_runs import UNKNOWN

MATRIX_FREE = {"newton_cg": newton_cg, "gauss_newton": gauss_newton}
KNOWN = {
    # Real parameters only: the Hessian of a real loss of complex ones is not complex linear.
    "newton": {"complex"},
    # A trial step below half a digit of bf16 does not lower the loss, so it is not taken.
    "newton_cg": {"complex", "stalls"},
    "gauss_newton": {"complex", "stalls"},
    # Unrelated gradients are no pairs of one function: the line search rejects both. NaN spreads by inner products.
    "lbfgs": {"responds", "stalls", "isolation"},
}


def supplied(make):
    """The rule with a loss whose gradient is the one that it is given: ``<g, x - p> + |x - p|^2 / 2``."""

    def build(rate):
        tx = make(rate)

        def update(updates, state, params=None, **extra_args):
            dtype = widest(x.dtype for x in jax.tree.leaves(params))

            def loss(x):
                terms = zip(*map(jax.tree.leaves, (updates, x, params)), strict=True)
                parts = (
                    jnp.real(jnp.sum(wide(jnp.conj(g), wide(p).dtype) * wide(a - p)))
                    + jnp.sum(abs(wide(a - p)) ** 2) / 2
                    for g, a, p in terms
                )
                return sum((part.astype(dtype) for part in parts), jnp.zeros((), dtype))

            value_fn = split_loss(lambda x: x, loss)
            extra = {"value": value_fn(params), "grad": updates, "value_fn": value_fn}
            return tx.update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return build


def first_of(names):
    """The names as parameters; all but one wait for make slow, since line searches compile for long."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name != "newton_cg")) for name in names]


@pytest.mark.parametrize("name", first_of(sorted(TREE_RULES)))
def test_the_laws_hold(name):
    broken = laws_broken(supplied(TREE_RULES[name]), [law for law in LAWS if law not in KNOWN[name]])
    assert not broken, "\n".join(map(str, broken))


@pytest.mark.parametrize("name", sorted(TREE_RULES))
def test_every_rule_states_its_facts(name):
    rule = TREE_RULES[name]
    assert rule.name == name and name not in jaxsgd.RULES and repr(rule) == f"<rule {name}>"
    assert re.match(r".+ \(.+ (19|20)\d\d, .+\): .+\.$", rule.title), "name (authors year, source): equation."
    assert rule.batch_scaling is None and "value_fn" in rule.needs
    for argument in rule.__signature__.parameters:
        assert f"{argument}:" in rule.doc or f"{argument}," in rule.doc, argument
    with pytest.raises(KeyError, match=f"did you mean '{name}'"):
        TREE_RULES[name + "x"]


# -- steps -----------------------------------------------------------------------------------------


def quadratic(size, condition, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    matrix = basis @ np.diag(np.geomspace(1, condition, size)) @ basis.T
    target = rng.normal(size=size)

    def loss(p):
        d = jnp.concatenate([p["a"], p["b"].reshape(-1)]) - target
        return d @ jnp.asarray(matrix) @ d / 2

    return loss, target


@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_newton_ends_a_quadratic_in_one_step(condition, x64):
    loss, target = quadratic(8, condition)
    params, tx = {"a": jnp.ones(2), "b": jnp.zeros((3, 2))}, newton()
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    found = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(np.concatenate([found["a"], found["b"].ravel()]), target, rtol=1e-12, atol=1e-12)


def test_newton_is_damped_and_goes_down_from_a_saddle(x64):
    loss, params = (lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4), jnp.array([1.0, 0.1])
    grad, hessian = jax.grad(loss)(params), np.array([2.0, -2.0 + 12 * 0.01])
    for damping in (0.0, 0.5):
        tx = newton(0.5, damping=damping)
        updates, state = tx.update(grad, tx.init(params), params, value_fn=loss)
        np.testing.assert_allclose(updates, -0.5 * grad / (abs(hessian) + damping), rtol=1e-12)
        assert updates @ grad < 0 and float(jaxsgd.metrics(state)["rejected"]) == 0
    flat = newton()
    updates, _ = flat.update(jnp.ones(2), flat.init(params), params, value_fn=lambda p: p.sum())
    np.testing.assert_allclose(updates, -1, rtol=1e-12)


def test_newton_says_how_large_a_hessian_is():
    tx = newton()
    with pytest.raises(ValueError, match=r"1,000,000 parameters have a dense Hessian of 3,725 GiB in float32; .*5,000"):
        tx.init({"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
    with pytest.raises(ValueError, match="Use newton_cg"):
        newton(max_params=3).init(jnp.ones(4))
    newton(max_params=4).init(jnp.ones(4))


def problem():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 2))
    loss = split_loss(lambda p: jnp.tanh(x @ p["w"]) @ p["v"], lambda out: jnp.mean((out - y) ** 2))
    params = {"w": jnp.asarray(rng.normal(size=(4, 3))), "v": jnp.asarray(rng.normal(size=(3, 2)))}
    return loss, params


@pytest.mark.parametrize("name", MATRIX_FREE)
def test_the_direction_is_that_of_the_dense_system(name, x64):
    loss, params = problem()
    flat, whole = jax.flatten_util.ravel_pytree(params)
    grad = jax.flatten_util.ravel_pytree(jax.grad(loss)(params))[0]
    if name == "newton_cg":
        matrix = jax.hessian(lambda v: loss(whole(v)))(flat)
    else:
        jacobian = jax.jacobian(lambda v: loss.outputs_fn(whole(v)).ravel())(flat)
        matrix = 2 / 60 * jacobian.T @ jacobian
    damping = 5.0  # above the most negative eigenvalue
    tx = MATRIX_FREE[name](damping=damping, cg_iterations=200, cg_tol=0.0)
    updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    wanted = -jnp.linalg.solve(matrix + damping * jnp.eye(len(flat)), grad)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(updates)[0], wanted, rtol=1e-9, atol=1e-12)
    quadratic_fall = grad @ wanted + wanted @ matrix @ wanted / 2
    ratio = (loss(whole(flat + wanted)) - loss(params)) / quadratic_fall
    report = jaxsgd.metrics(state)
    np.testing.assert_allclose(report["ratio"], ratio, rtol=1e-8)
    assert float(report["damping"]) == pytest.approx(damping * (2 / 3 if ratio > 0.75 else 1))


def test_conjugate_gradients_stop_where_the_model_no_longer_falls(x64):
    values = jnp.geomspace(1e-6, 1, 80)
    grads = [jnp.asarray(np.random.default_rng(0).normal(size=80))]
    solve = lambda damping, tol, most=400: conjugate_gradients(
        lambda v: [values * v[0]], grads, jnp.asarray(damping), [jnp.zeros(80)], most, tol
    )
    exact = solve(1e-2, 0.0)
    np.testing.assert_allclose(exact.direction[0], -grads[0] / (values + 1e-2), rtol=1e-9)
    early, cut = solve(1e-2, 0.05), solve(1e-2, 0.0, 7)
    assert 10 < int(early.iterations) < int(exact.iterations) and int(cut.iterations) == 7
    model = lambda d: float(grads[0] @ d + d @ ((values + 1e-2) * d) / 2)
    assert model(exact.direction[0]) <= model(early.direction[0]) < 0.9 * model(exact.direction[0])
    turned = conjugate_gradients(lambda v: [-v[0]], grads, jnp.asarray(0.1), [jnp.zeros(80)], 50, 0.0)
    assert bool(turned.negative) and int(turned.iterations) == 1 and float(grads[0] @ turned.direction[0]) < 0


@pytest.mark.parametrize("name", MATRIX_FREE)
def test_every_hyperparameter_changes_the_trajectory(name):
    loss, params = problem()

    def end(**settings):
        tx = MATRIX_FREE[name](**settings)

        @jax.jit
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
            return (optax.apply_updates(params, updates), state), loss(params)

        (last, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=8)
        assert bool(jnp.all(jnp.diff(losses) <= 1e-6)), "a step that raises the loss is not taken"
        return np.concatenate([x.ravel() for x in jax.tree.leaves(last)])

    few = {"damping": 0.1, "cg_iterations": 4}
    base = end(**few)
    for change in ({"learning_rate": 0.5}, {"cg_iterations": 2}, {"damping": 10.0}):
        assert np.abs(end(**{**few, **change}) - base).max() > 1e-4, change

    def second(warm_start):
        """A step from a state whose last direction still leads down."""
        tx, grad = MATRIX_FREE[name](damping=5.0, cg_iterations=1, warm_start=warm_start), jax.grad(loss)(params)
        before = tx.init(params)
        last = jax.tree.map(lambda g: -0.01 * jnp.sign(g), grad)
        updates, _ = tx.update(grad, before._replace(slots={"direction": last}), params, value_fn=loss)
        return np.concatenate([x.ravel() for x in jax.tree.leaves(updates)])

    assert len({float(np.abs(second(warm)).sum()) for warm in (0.0, 0.5, 1.0)}) == 3
    # Far too long a step is halved, or not taken.
    assert not np.array_equal(end(learning_rate=1e4), end(learning_rate=1e4, backtracking_steps=0))


@pytest.mark.parametrize("name", sorted(TREE_RULES))
def test_the_tools_take_the_rule_and_its_name(name):
    rule, params = TREE_RULES[name], {"w": jnp.ones((2, 2))}
    assert all_rules()[name] is rule and all_rules()["adamw"] is jaxsgd.adamw
    for given in (name, rule):
        found = _candidates([given, "adamw"], params)
        assert found == {name: (rule, rule.usual_rate or UNKNOWN), "adamw": (jaxsgd.adamw, 1e-3)}
        assert "too slow" in str(jaxsgd.diagnose(np.linspace(2, 1, 100), rule=given))
        with pytest.raises(ValueError, match=f"rule='{name}': no scaling"):
            jaxsgd.scale_learning_rate(1.0, 32, 64, given)
    for tool in (lambda: jaxsgd.diagnose(np.ones(100), rule=name + "x"), lambda: _candidates([name + "x"], params)):
        with pytest.raises(UnknownRule, match=f"did you mean '{name}'"):
            tool()


@pytest.mark.parametrize("name", [*MATRIX_FREE, "newton"])
def test_a_step_without_finite_numbers_is_not_taken(name):
    tx, params = TREE_RULES[name](), jnp.ones(3)
    for bad in (jnp.nan, jnp.inf):
        for loss in (split_loss(lambda p: p, lambda p, bad=bad: bad * jnp.sum(p**2)), split_loss(lambda p: p, jnp.sum)):
            updates, state = tx.update(jnp.full(3, bad), tx.init(params), params, value_fn=loss)
            assert np.array_equal(updates, np.zeros(3)) and float(jaxsgd.metrics(state)["rejected"]) == 1
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_newton_cg_leaves_a_saddle(x64):
    loss, params = (lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4), jnp.array([1.0, 1e-3])
    tx = newton_cg(damping=1e-2)
    state = tx.init(params)
    for _ in range(30):
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose([params[0], abs(params[1])], [0, 0.5**0.5], atol=1e-6)


# -- wrappers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TREE_RULES))
def test_wrappers_pass_the_loss_on(name):
    loss, params = problem()
    make = TREE_RULES[name]
    txs = {
        "alone": make(0.5),
        "chain": optax.chain(optax.clip_by_global_norm(1e9), make(0.5)),
        "guard": jaxsgd.guard(make(0.5)),
        "apply_if_finite": optax.apply_if_finite(make(0.5), 5),
        "MultiSteps": optax.MultiSteps(make(0.5), 1).gradient_transformation(),
        "accumulate": jaxsgd.accumulate(make(0.5), 1),
        "schedule": make(lambda count: 0.5),
    }
    if name != "lbfgs":  # optax.inject_hyperparams makes an array of its memory_size, which is a shape
        txs["inject_hyperparams"] = optax.inject_hyperparams(make)(learning_rate=0.5)
    ends = {}
    for wrapper, tx in txs.items():
        p, state = params, tx.init(params)
        for _ in range(2):
            value, grad = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=loss)
            p = optax.apply_updates(p, updates)
        ends[wrapper] = np.concatenate([x.ravel() for x in jax.tree.leaves(p)])
        np.testing.assert_allclose(ends[wrapper], ends["alone"], rtol=2e-5, atol=2e-6, err_msg=wrapper)
    assert np.abs(ends["alone"] - np.concatenate([x.ravel() for x in jax.tree.leaves(params)])).max() > 1e-3


def test_the_learning_rate_is_a_runtime_value():
    loss, params = problem()
    tx = newton_cg(0.5)
    state = jaxsgd.with_hyper(tx.init(params), learning_rate=0.0)
    updates, _ = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))


# -- the train step --------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
WEIGHTS = {"first": 0.3 * RNG.normal(size=(5, 4)), "shift": np.zeros(4), "second": 0.3 * RNG.normal(size=(4, 2))}
BATCH = {"x": RNG.normal(size=(32, 5)), "y": RNG.normal(size=(32, 2)), "w": np.arange(32.0)}


def outputs(p, batch, key):
    return jnp.tanh(batch["x"] @ p["first"] + p["shift"]) @ p["second"]


def squares(out, batch):
    return jnp.mean((out - batch["y"]) ** 2), {"mean": out.mean()}


LOSS = split_loss(outputs, squares)
STEPS = {
    "lbfgs": lambda: lbfgs(),
    "optax.lbfgs": lambda: optax.lbfgs(),
    "newton": lambda: newton(0.5, damping=0.3),
    # Where the damped Hessian is nearly singular, its inverse magnifies rounding.
    "newton_cg": lambda: newton_cg(damping=2.0),
    "gauss_newton": lambda: gauss_newton(damping=0.5),
    "chain": lambda: optax.chain(
        jaxsgd.clip_by_global_norm(1.0), newton(0.3, damping=1.0), jaxsgd.reduce_on_plateau(0.5)
    ),
}


def train(step, state, batch, count=4):
    for _ in range(count):
        state, report = step(state, batch)
    return jax.tree.map(np.asarray, state.params), float(report["loss"])


def roads(tx, dtype):
    params, batch = (jax.tree.map(lambda x: np.asarray(x, dtype), tree) for tree in (WEIGHTS, BATCH))
    mesh = Mesh(jax.devices(), ("data",))
    out = {"single": train(make_step(LOSS, tx), TrainState.create(params, tx), batch)}
    step = make_step(LOSS, tx, accumulate=4)
    out["accumulate"] = train(step, TrainState.create(params, tx), batch)
    step = make_step(LOSS, tx, axis_name="batch")
    state = jax.tree.map(lambda x: jnp.stack([x] * 8), TrainState.create(params, tx))
    parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    mapped = jaxsgd.checked(jax.pmap(step, axis_name="batch", donate_argnums=0))
    for _ in range(4):
        state, report = mapped(state, parts)
    out["pmap"] = jax.tree.map(lambda x: np.asarray(x[5]), (state.params, report["loss"]))
    for check in (True, False):
        step = make_step(LOSS, tx, axis_name="data")
        spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check)
        out[f"shard_map, check_vma={check}"] = train(
            jaxsgd.checked(jax.jit(spread, donate_argnums=0)), TrainState.create(params, tx, mesh=mesh), batch
        )
    step = make_step(LOSS, tx, mesh=mesh)
    out["mesh"] = train(step, TrainState.create(params, tx, mesh=mesh), batch)
    step = make_step(LOSS, tx, mesh=mesh, accumulate=2)
    out["mesh, ZeRO-1"] = train(step, TrainState.create(params, tx, mesh=mesh, zero1="data"), batch)
    return out


@pytest.mark.parametrize("name", first_of(["lbfgs", "newton", "newton_cg", "gauss_newton"]))
def test_every_road_leads_to_the_same_parameters(name):
    found = roads(STEPS[name](), np.float32)
    params, loss = found["single"]
    start = float(LOSS(WEIGHTS, BATCH, None)[0])
    assert loss < start
    for road, (other, other_loss) in found.items():
        gaps = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)]
        assert max(gaps) < 1e-6, (road, gaps)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5, err_msg=road)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_the_step_supplies_the_loss(name):
    tx = STEPS[name]()
    step, state = make_step(LOSS, tx), TrainState.create(WEIGHTS, tx)
    losses = []
    for _ in range(15):
        state, report = step(state, BATCH)
        losses.append(float(report["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    # optax's own line search starts with weakly typed numbers, which compiles twice.
    assert step.compiles == (2 if name == "optax.lbfgs" else 1)


def test_weights_of_microbatches_and_devices_count():
    tx = gauss_newton(damping=0.5)
    weight = lambda batch: jnp.sum(batch["w"])
    ends = []
    for accumulate, devices in ((4, 1), (2, 2)):
        step = make_step(LOSS, tx, accumulate=accumulate, weight=weight, axis_name="batch" if devices > 1 else None)
        if devices == 1:
            ends.append(train(step, TrainState.create(WEIGHTS, tx), BATCH)[0])
            continue
        # Microbatch i of a device has the examples i, i + 2, ...: in this order both have the same groups.
        order = np.concatenate([[4 * (k // 2) + k % 2 + 2 * d for k in range(16)] for d in range(2)])
        parts = jax.tree.map(lambda x, order=order: x[order].reshape(2, -1, *x.shape[1:]), BATCH)
        state = jax.tree.map(lambda x: jnp.stack([x] * 2), TrainState.create(WEIGHTS, tx))
        mapped = jax.pmap(step, axis_name="batch", devices=jax.devices()[:2])
        for _ in range(4):
            state, _ = mapped(state, parts)
        ends.append(jax.tree.map(lambda x: np.asarray(x[1]), state.params))
    unweighted = train(make_step(LOSS, tx), TrainState.create(WEIGHTS, tx), BATCH)[0]
    gap = lambda a, b: max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert gap(*ends) < 1e-6 < 1e-3 < gap(ends[0], unweighted)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(5, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.tanh(self.norm(self.first(x)))))


@pytest.mark.parametrize("name", ["newton_cg", "gauss_newton", "lbfgs"])
def test_flax_models_keep_their_state_fixed_while_the_loss_is_tried(name):
    tx = TREE_RULES[name]()
    loss_fn = split_loss(lambda model, batch, key: model(batch["x"]), squares)
    step, state = make_step(loss_fn, tx), TrainState.create(Model(nnx.Rngs(0)), tx)
    mean = np.array(state.model_state["norm"]["mean"][...])
    losses = []
    for _ in range(10):
        state, report = step(state, BATCH)
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[0] and step.compiles == 1
    after, count = state.model_state["norm"]["mean"], state.model_state["drop"]["rngs"]["count"]
    assert np.abs(np.asarray(after[...]) - mean).max() > 0
    assert int(count[...]) == 10, "one draw a step, however often the loss was evaluated"


def test_a_model_state_and_transformations_with_few_arguments():
    def outputs_fn(p, model_state, batch, key):
        return outputs(p, batch, key), {"steps": model_state["steps"] + 1}

    tx = gauss_newton()
    state = TrainState.create(WEIGHTS, tx, model_state={"steps": jnp.int32(0)})
    step = make_step(split_loss(outputs_fn, squares), tx)
    for _ in range(3):
        state, report = step(state, BATCH)
    assert int(state.model_state["steps"]) == 3 and "mean" in report["aux"]

    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: -0.1 * g * value, updates), state

    narrow = optax.GradientTransformationExtraArgs(lambda params: (), update)
    make_step(LOSS, narrow)(TrainState.create(WEIGHTS, narrow), BATCH)
    for tx in (jaxsgd.polyak_sgd(), optax.polyak_sgd(), optax.contrib.reduce_on_plateau(), jaxsgd.adamw(1e-3)):
        make_step(LOSS, tx)(TrainState.create(WEIGHTS, tx), BATCH)


def test_a_plain_rule_does_not_trace_the_loss_again():
    traces = []

    def loss_fn(p, batch, key):
        traces.append(0)
        return LOSS(p, batch, key)

    counts = []
    for tx in (jaxsgd.adamw(1e-3), newton_cg()):
        traces.clear()
        make_step(loss_fn, tx)(TrainState.create(WEIGHTS, tx), BATCH)
        counts.append(len(traces))
    assert counts[0] == 1 < counts[1]


def test_lbfgs_takes_complex_parameters_where_nothing_is_promoted():
    params = {"z": np.ones(2, np.complex64), "x": np.ones(2, np.float32)}

    def loss(p, batch):
        return jnp.sum(jnp.abs(p["z"] - (1 + 2j)) ** 2) + jnp.sum(p["x"] ** 2)

    with jax.numpy_dtype_promotion("strict"):
        tx = lbfgs()
        state, step = TrainState.create(params, tx), make_step(loss, tx)
        for _ in range(2):
            state, _ = step(state, np.zeros(1, np.float32))
    np.testing.assert_allclose(state.params["z"], np.full(2, 1 + 2j), rtol=1e-5)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: newton(-1.0), ValueError, "newton: learning_rate=-1.0: it must be 0 or more"),
        (lambda: newton(damping=jnp.nan * 1.0), (ValueError, TypeError), "damping"),
        (lambda: newton_cg(damping=0.0), ValueError, "newton_cg: damping=0.0: it must be above 0"),
        (lambda: newton_cg(cg_iterations=0), ValueError, "cg_iterations=0: at least 1"),
        (lambda: gauss_newton(cg_iterations=1.5), ValueError, "cg_iterations=1.5: a whole number"),
        (lambda: gauss_newton(warm_start=2.0), ValueError, "warm_start=2.0: it must lie in"),
        (lambda: newton_cg(cg_tol=1.0), ValueError, "cg_tol=1.0"),
        (lambda: newton().init({"n": jnp.ones(2, int)}), ValueError, "params: 'n' is int32; newton takes real"),
        (lambda: newton_cg().init({"z": jnp.ones(2, complex)}), ValueError, "params: 'z' is complex64"),
        (lambda: lbfgs().init({"n": jnp.ones(2, int)}), ValueError, "params: 'n' is int32"),
        (lambda: _updated(newton_cg()), ValueError, "value_fn: newton_cg needs it. Use jaxsgd.make_step"),
        (lambda: _updated(lbfgs()), ValueError, "value: the line search of lbfgs needs it. Use jaxsgd.make_step"),
        (lambda: _updated(gauss_newton(), value_fn=jnp.sum), ValueError, "needs the model's outputs apart"),
        (lambda: _updated(newton(), value_fn=lambda p: p), ValueError, r"value_fn: it returns float32\[2\]"),
        (lambda: split_loss(3, jnp.sum), TypeError, "outputs_fn=3: a function is needed"),
        (lambda: make_step(lambda p, b, k: LOSS(p, b, k), gauss_newton()).lower(
            TrainState.create(WEIGHTS, gauss_newton()), BATCH), ValueError, "Use jaxsgd.split_loss"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def _updated(tx, **extra):
    params = jnp.ones(2)
    return tx.update(params, tx.init(params), params, **extra)
