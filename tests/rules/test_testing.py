"""The conformance kit: it passes what is right, finds what is wrong, and says where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsgd
from jaxsgd import RULES, testing
from jaxsgd.registry import make_rule
from jaxsgd.slots import Mean
from jaxsgd.testing import check_draw, check_laws, check_rule, compare, each_law, laws_broken, strategies

pytestmark = pytest.mark.slow  # half a minute on two cores; CI runs it


def off_from(step, size):
    """SGD whose step is too long by ``size`` from one step on."""

    def update(grads, state, params=None):
        wrong = jnp.where(state + 1 >= step, 1 + size, 1.0)
        return jax.tree.map(lambda g: -0.1 * g * wrong.astype(g.dtype), grads), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def test_five_lines_are_enough():
    check_laws(jaxsgd.adam(1e-2))
    check_rule(jaxsgd.adam(1e-2), like=optax.adam(1e-2))
    check_rule(optax.rmsprop(1e-2), like=jaxsgd.rmsprop(1e-2), gradients=testing.GRADIENTS)


@pytest.mark.parametrize(("step", "size"), [(1, 1e-9), (7, 1e-3), (50, 1e-6)])
def test_it_says_where_two_rules_part(step, size):
    found = compare(off_from(step, size), optax.sgd(0.1))
    assert [c.first for c in found] == [step] * 4
    assert all(c.leaf in testing.SHAPES and step <= c.step <= 50 and 0 < c.error < 10 * size * 50 for c in found)
    with pytest.raises(AssertionError) as failure:
        check_rule(off_from(step, size), like=optax.sgd(0.1))
    assert f"normal    part at step {step}; worst" in str(failure.value) and "against" in str(failure.value)


def test_what_agrees_says_to_how_many_digits():
    (found,) = compare(optax.sgd(0.1), optax.sgd(0.1), gradients=["heavy"])
    assert found.first is None and str(found) == "heavy     agree to 0.0e+00"
    # float32 would hide this one.
    assert compare(off_from(1, 1e-9), optax.sgd(0.1), rtol=1e-7)[0].first is None


def test_nan_on_one_side_is_a_difference():
    bad = optax.chain(optax.sgd(0.1), optax.stateless(lambda u, p: jax.tree.map(lambda x: x * jnp.nan, u)))
    (found,) = compare(bad, optax.sgd(0.1), gradients=["normal"])
    assert found.first == 1 and found.error == np.inf
    assert compare(bad, bad, gradients=["normal"])[0].first is None


def test_it_finds_that_amsgrad_differs_from_torch():
    found = compare(optax.amsgrad(1e-2), jaxsgd.torch.Adam(lr=1e-2, amsgrad=True))
    assert {c.gradients: c.first for c in found} == {"normal": 2, "sparse": 2, "heavy": 2, "constant": None}


def test_it_finds_that_rprop_comes_a_step_late():
    assert "first_step" in {b.law for b in laws_broken(optax.rprop(1e-2))}


def test_eight_bit_floats_are_a_storage_and_no_narrow_state():
    def stored(storage):
        return functools.partial(jaxsgd.adamw, storage=storage)

    assert not laws_broken(stored(jaxsgd.fp8(min_size=0)), ["moments"])
    (broken,) = laws_broken(stored(jaxsgd.cast("bfloat16")), ["moments"])
    assert "kept in bfloat16: slots/mu/" in broken.seen


def test_every_law_holds_with_eight_bit_floats():
    check_laws(functools.partial(jaxsgd.adamw, storage=jaxsgd.fp8(min_size=0)))


BROKEN = {"gradient_dtype", "moments", "stalls", "strict"}


def test_it_finds_what_bf16_does_to_optax():
    broken = {b.law: b.seen for b in laws_broken(optax.adam(1e-2))}
    assert set(broken) == BROKEN
    assert "bfloat16 became float32" in broken["gradient_dtype"] and "mu/cube" in broken["moments"]
    check_laws(optax.adam(1e-2), without=tuple(BROKEN))
    with pytest.raises(AssertionError, match="laws that do not hold:\n  gradient_dtype"):
        check_laws(optax.adam(1e-2))


def breaks(law):
    """A transformation that breaks one law, or a function that makes one."""
    sgd = optax.sgd(0.1)

    def make(update, init=sgd.init):
        return optax.GradientTransformation(init, update)

    def each(change):
        return make(lambda g, s, p=None: (jax.tree.map(change, g), s))

    def grows(g, s, p=None):
        return sgd.update(g, s[0])[0], (s[0], jnp.asarray(s[1], jnp.float32))

    def late(g, s, p=None):
        return jax.tree.map(jnp.zeros_like, g) if s is None else s, g

    def narrow(g, s, p=None):
        return g, jax.tree.map(lambda v, x: (0.999 * v + 0.001 * x * x).astype(v.dtype), s, g)

    def refuse(x):
        if not np.isfinite(x).all():
            raise ValueError("not finite")
        return x

    def late_schedule(rate):
        return optax.sgd((lambda count: rate(count + 1)) if callable(rate) else rate)

    def ignored(storage=None, **rest):
        return rest | {"storage": {}}

    def trace(g, mu: Mean):
        return mu + g, mu + g

    return {
        "scan": make(grows, lambda p: (sgd.init(p), jnp.zeros((), jnp.int32))),
        "vmap": lambda rate: optax.sgd(float(rate)),
        "derivative": each(jax.lax.stop_gradient),
        "structure": make(grows, lambda p: (sgd.init(p), 0)),
        "moments": make(lambda g, s, p=None: (g, s), lambda p: jax.tree.map(jnp.zeros_like, p)),
        "gradient_dtype": make(lambda g, s, p=None: (g, g), lambda p: jax.tree.map(jnp.zeros_like, p)),
        "strict": each(lambda x: x * jnp.ones((), jnp.float32)),
        "stalls": make(narrow, lambda p: jax.tree.map(jnp.zeros_like, p)),
        "responds": make(lambda g, s, p=None: (s, s), lambda p: p),
        "first_step": make(late, lambda p: jax.tree.map(jnp.zeros_like, p)),
        "schedule": late_schedule,
        "zero": each(lambda x: x / jnp.abs(x)),
        "rest": each(lambda x: x + 1),
        "empty": make(lambda g, s, p=None: (dict.fromkeys(g, 0.0), s)),
        "complex": each(lambda x: x.real.astype(x.dtype)),
        "isolation": make(lambda g, s, p=None: (jax.tree.map(lambda x: x * optax.tree.norm(g), g), s)),
        "non_finite": make(lambda g, s, p=None: (g, jax.tree.map(lambda x: jax.pure_callback(refuse, x, x), g)),
                           lambda p: p),
        "jit": each(lambda x: x if isinstance(x, jax.core.Tracer) else 2 * x),
        "recompiles": make(lambda g, s, p=None: (g, s + jnp.float32(1)), lambda p: 0),
        "storage": make_rule(trace, call=ignored),
    }[law]  # fmt: skip


@pytest.mark.parametrize("law", testing.LAWS)
def test_each_law_can_fail(law):
    assert law in {b.law for b in laws_broken(breaks(law), [law])}
    assert laws_broken(jaxsgd.momentum, [law]) == []


def test_a_rule_is_checked_with_all_laws_and_a_transformation_with_most():
    """What is about learning rates and storage needs the rule."""
    needs_the_rule = {"vmap", "schedule", "storage"}
    for law in needs_the_rule:
        assert laws_broken(breaks(law), [law]) != [] == laws_broken(optax.sgd(0.1), [law])
    check_laws(jaxsgd.adam)
    check_laws(optax.sgd)


OURS, THEIRS, OFF = jaxsgd.adamw(0.05), optax.adamw(0.05), off_from(3, 1e-6)


@settings(deadline=None, max_examples=15)
@given(problem=strategies.problems(steps=10))
def test_five_lines_of_hypothesis(problem):
    check_draw(OURS, THEIRS, *problem)


@settings(deadline=None, max_examples=5)
@given(problem=strategies.problems(steps=10, kinds=["normal", "heavy"]))
def test_drawn_gradients_find_a_difference(problem):
    with pytest.raises(AssertionError, match="drawn     part at step 3; worst"):
        check_draw(OFF, optax.sgd(0.1), *problem)


@each_law(optax.adam(1e-2), without=tuple(BROKEN))
def test_one_line_for_every_law(law):
    law()


def test_a_law_that_does_not_hold_fails_by_its_name():
    (marked,) = [m for m in test_one_line_for_every_law.pytestmark if m.name == "parametrize"]
    mark = each_law(optax.adam(1e-2)).mark
    assert marked.kwargs["ids"] == [name for name in mark.kwargs["ids"] if name not in BROKEN]
    for law, name in zip(mark.args[1], mark.kwargs["ids"], strict=True):
        if name in BROKEN:
            with pytest.raises(AssertionError, match=f"{name}: "):
                law()


FACTORIES = {f"optax.{f.__name__}": f for f in (optax.adam, optax.sgd, optax.lion, optax.rmsprop)} | RULES


@pytest.mark.parametrize("name", sorted(FACTORIES))
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_drawn_hyperparameters_are_valid_calls(name, data):
    drawn = data.draw(strategies.hyperparameters(FACTORIES[name]))
    assert 1e-4 <= drawn["learning_rate"] <= 0.1
    FACTORIES[name](**drawn)


def test_hyperparameters_may_be_settled():
    with pytest.raises(TypeError, match="beta: adam has no such argument"):
        strategies.hyperparameters(optax.adam, beta=0.9)


@settings(deadline=None, max_examples=50)
@given(
    drawn=strategies.hyperparameters(optax.adamw, b1=0.5, b2=st.sampled_from([0.9, 0.99])),
    params=strategies.param_trees(dtypes=strategies.dtypes()),
    shaped=strategies.shapes().flatmap(strategies.param_trees),
    grads=strategies.gradients(steps=3, kinds=["sparse"]),
)
def test_strategies_draw_what_they_say(drawn, params, shaped, grads):
    assert drawn["b1"] == 0.5 and drawn["b2"] in (0.9, 0.99) and "mask" not in drawn
    assert {k: x.shape for k, x in params.items()} == dict(testing.SHAPES)
    assert {x.dtype for x in params.values()} < {np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16, "f8")}
    assert 1 <= len(shaped) <= 4 and all(x.ndim <= 3 and max(x.shape, default=0) <= 5 for x in shaped.values())
    assert {k: g.shape for k, g in grads.items()} == {k: (3, *shape) for k, shape in testing.SHAPES.items()}


def test_bad_input_in_words():
    with pytest.raises(ValueError, match="kind='norml': known are normal"):
        testing.draw_gradients("norml", 0)
    for ask in (lambda: laws_broken(optax.sgd(0.1), ["jet"]), lambda: each_law(optax.sgd(0.1), without=["jet"])):
        with pytest.raises(ValueError, match="laws: 'jet' is unknown"):
            ask()
    with pytest.raises(ValueError, match="kinds: 'spares' is unknown; known are normal"):
        strategies.gradients(kinds=["spares"])
