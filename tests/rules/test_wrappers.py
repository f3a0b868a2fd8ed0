"""Rules made of rules: each under the laws, wherever it fits, and by what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import LAWS

import jaxsgd
from jaxsgd import RULES, adam, adaptive_clip, cautious, cautious_decay, centralized, grokfast, lookahead, sgd

pytestmark = pytest.mark.slow  # half a minute on two cores; CI runs it

WRAPPED = {
    rule.name: rule
    for rule in (
        cautious(adam), cautious_decay(adam), grokfast(sgd), centralized(sgd), adaptive_clip(sgd), lookahead(sgd),
    )
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", WRAPPED)
def test_law(name, law):
    LAWS[law](WRAPPED[name])


@pytest.mark.parametrize("wrapper", [cautious, cautious_decay, grokfast, centralized, adaptive_clip, lookahead])
@pytest.mark.parametrize("base", ["adamw", "lion", "rmsprop", "nesterov", "adadelta"])
def test_any_rule_can_be_wrapped(wrapper, base):
    rule = wrapper(RULES[base])
    assert rule.name not in RULES and base in rule.doc
    tx, params = rule(0.05, weight_decay=0.01), {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    updates, state = tx.update(jax.tree.map(lambda p: 0.3 * p, params), tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert all(jnp.all(u < 0) for u in jax.tree.leaves(updates)) or wrapper is centralized


def test_wrappers_nest():
    tx = cautious(grokfast(adam))(0.1, lamb=1.0)
    updates, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)
    with pytest.raises(ValueError, match="lookahead_sgd has 'slow' too"):
        lookahead(lookahead(sgd))


def test_a_hyperparameter_that_the_base_settles_and_has_itself_is_its_own():
    """Schedule-free settles the b1 of the rule inside, and has a b1 of its own."""
    state = cautious(jaxsgd.schedule_free(adam))(0.1, b1=0.8).init(jnp.ones(3))
    assert set(state.slots) == {"z", "nu"} and float(state.hyper["b1"]) == np.float32(0.8)


def test_wrappers_keep_the_kinds_of_slots():
    base, wrapped = adam.slots, cautious(grokfast(adam)).slots
    assert {name: wrapped[name].kind for name in base} == {name: slot.kind for name, slot in base.items()}
    assert wrapped["slow"].kind == "mean" and lookahead(adam).slots["slow"].kind == "iterate"
    state = cautious(adam)(1e-3, storage=jaxsgd.int8()).init(jnp.ones(65536))
    assert all(isinstance(held, jaxsgd.blockwise.Blocks) for held in state.slots.values())


def test_lookahead_is_optax_lookahead():
    params = {"w": jnp.asarray([1.0, -2.0])}
    theirs = optax.lookahead(optax.sgd(0.1, 0.9), sync_period=5, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced(params)
    ours = lookahead(sgd)(0.1, momentum=0.9, sync_period=5)
    state, their_state = ours.init(params), theirs.init(pair)
    for key in jax.random.split(jax.random.key(0), 12):
        grads = optax.tree.random_like(key, params)
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, their_state = theirs.update(grads, their_state, pair)
        pair = optax.apply_updates(pair, updates)
        np.testing.assert_allclose(params["w"], pair.fast["w"], rtol=1e-5)
        np.testing.assert_allclose(state.slots["slow"]["w"], pair.slow["w"], rtol=1e-5)


def test_adaptive_clip_is_optax_adaptive_grad_clip():
    params = {"w": jnp.arange(12.0).reshape(4, 3) - 5, "b": jnp.ones(3), "s": jnp.ones(())}
    grads = jax.tree.map(lambda p: jnp.cos(3 * p) + 0.1, params)
    rule, theirs = adaptive_clip(sgd)(1.0), optax.adaptive_grad_clip(0.01)
    ours, _ = rule.update(grads, rule.init(params), params)
    want, _ = theirs.update(grads, theirs.init(params), params)
    for name in params:
        np.testing.assert_allclose(-ours[name], want[name], rtol=1e-5)


def test_centralized_takes_the_mean_over_the_inputs_of_each_output():
    """A Flax kernel is (in, out). optax.centralize takes the first axis for the outputs, as torch lays them out."""
    g = jnp.arange(6.0).reshape(2, 3)
    tx = centralized(sgd)(1.0)
    updates, _ = tx.update(g, tx.init(g), g)
    np.testing.assert_allclose(-updates.sum(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(-updates, [[-1.5] * 3, [1.5] * 3])
    theirs, _ = optax.centralize().update(g.T, optax.EmptyState())
    np.testing.assert_allclose(-updates, theirs.T)


def test_cautious_rests_where_it_would_climb():
    tx, p = cautious(adam)(0.1), jnp.zeros(4)
    state = tx.init(p)
    for _ in range(5):
        _, state = tx.update(jnp.ones(4), state, p)
    updates, _ = tx.update(jnp.asarray([1.0, 1.0, 1.0, -0.1]), state, p)
    assert updates[3] == 0 and jnp.all(updates[:3] < -0.1)  # the momentum of the last coordinate points up the slope


@pytest.mark.parametrize("name", ["adam", "prodigy", "lamb", "momo", "adadelta", "madgrad", "torch_asgd"])
def test_cautious_leaves_decay_in_the_rules_own_form(name):
    """Decay that is a part of the gradient is masked with it; any other passes as the rule makes it."""
    params, grads = jnp.asarray([3.0, -2.0, 1.0, 4.0]), jnp.asarray([1.0, 1.0, -0.1, -0.5])

    def stepped(rule, decay):
        tx = rule(0.1, weight_decay=decay)
        state = tx.init(params)
        for scale in (1.0, -0.2):  # where the average and the gradient differ in sign, a step rests
            updates, state = tx.update(scale * grads, state, params, value=jnp.float32(1.0))
        return updates

    with_decay, without = stepped(RULES[name], 0.1), stepped(RULES[name], 0.0)
    own = with_decay if RULES[name].coupled else without
    agrees = own * (-0.2 * grads) < 0
    wanted = jnp.where(agrees, own / jnp.maximum(agrees.mean(), 1e-3), 0) + (with_decay - own)
    np.testing.assert_allclose(stepped(cautious(RULES[name]), 0.1), wanted, rtol=1e-5, atol=1e-7)


def test_cautious_decay_is_in_the_units_of_a_rule_that_has_its_own():
    tx, params, grads = cautious_decay(RULES["prodigy"])(1.0, weight_decay=0.5), jnp.ones(3), jnp.asarray([1.0, -1, 1])
    updates, _ = tx.update(grads, tx.init(params), params)
    base, plain = (RULES["prodigy"](1.0, weight_decay=decay) for decay in (0.5, 0.0))
    decayed, rest = (each.update(grads, each.init(params), params)[0] for each in (base, plain))
    np.testing.assert_allclose(updates, jnp.where(rest <= 0, decayed, rest), rtol=1e-6)


def test_cautious_decay_pulls_only_along():
    tx = cautious_decay(sgd)(0.1, weight_decay=0.5)
    p = jnp.asarray([1.0, 1.0])
    updates, _ = tx.update(jnp.asarray([1.0, -1.0]), tx.init(p), p)
    np.testing.assert_allclose(updates, [-0.15, 0.1])
    assert "weight_decay" in jaxsgd.metrics(tx.init(p))


def test_a_wrapped_rule_keeps_its_own_arguments_and_its_routing_by_name():
    params = {"embed": jnp.ones((6, 4)), "dense/kernel": jnp.ones((4, 4))}
    grads = jax.tree.map(lambda p: p + jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), params)
    plain = jaxsgd.muon(0.1, ns_coeffs="polar_express", adam="embed")
    wrapped = jaxsgd.grokfast(jaxsgd.muon)(0.1, lamb=0.0, ns_coeffs="polar_express", adam="embed")
    expected, found = (tx.update(grads, tx.init(params), params)[0] for tx in (plain, wrapped))
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    assert "axes=None" in str(jaxsgd.describe(wrapped, params)), "the embedding goes to Adam"
    with pytest.raises(ValueError, match="preconditioning='nothing'"):
        jaxsgd.grokfast(jaxsgd.muon)(0.1, preconditioning="nothing")
