"""jaxsgd.torch under optax.inject_hyperparams, and on complex parameters."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd import torch as ours

STEPS, CHANGE_AT = 6, 3
SHAPES = {"w": (4, 3), "v": (3, 4)}
"""Matrices, which every name takes."""
SETTINGS = [
    *((name, {}) for name in ours.__all__),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"dampening": 0.5}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("ASGD", {"lambd": 0.1, "t0": 2.0, "weight_decay": 0.1}),
    ("Rprop", {"etas": (0.6, 1.5)}),
    ("Adafactor", {"eps": (1e-3, 1e-2), "weight_decay": 0.1}),
    ("Muon", {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
]
CHANGES = [
    ("SGD", "momentum", 0.9, 0.5),
    ("SGD", "dampening", 0.1, 0.5),
    ("SGD", "weight_decay", 0.1, 0.3),
    ("Adam", "eps", 1e-3, 0.1),
    ("NAdam", "momentum_decay", 0.1, 0.2),
    ("RMSprop", "alpha", 0.9, 0.5),
    ("Adagrad", "lr_decay", 0.1, 0.5),
    ("Adadelta", "rho", 0.9, 0.5),
    ("ASGD", "lambd", 0.1, 0.5),
    ("Adafactor", "beta2_decay", -0.8, -0.5),
    ("Muon", "ns_steps", 5, 3),
    ("SparseAdam", "eps", 1e-3, 0.1),
]
"""Name, argument, value, value from step CHANGE_AT on."""
REAL_ONLY = {"Adafactor", "Muon", "SparseAdam"}


def problem(shapes, dtype=np.float64):
    rng = np.random.RandomState(0)

    def draw(shape):
        x = rng.standard_normal(shape)
        return np.asarray(x + 1j * rng.standard_normal(shape) if np.issubdtype(dtype, np.complexfloating) else x, dtype)

    return {k: draw(s) for k, s in shapes.items()}, [{k: draw(s) for k, s in shapes.items()} for _ in range(STEPS)]


def run(updates, state, change, shapes=SHAPES):
    """The parameters after each step, by the update ``updates(step)``; ``change`` maps the state at CHANGE_AT."""
    params, grads = problem(shapes)
    visited = []
    for step, g in enumerate(grads):
        state = change(state) if step == CHANGE_AT else state
        update, state = updates(step)(g, state, params)
        params = optax.apply_updates(params, update)
        visited.append(params)
    return jax.tree.map(lambda *x: np.stack(x), *visited)


def injected(name, settings, argument, value):
    tx = optax.inject_hyperparams(getattr(ours, name))(**settings)
    update = jax.jit(tx.update)

    def change(state):
        state.hyperparams[argument] = jnp.asarray(value, state.hyperparams[argument].dtype)
        return state

    return run(lambda step: update, tx.init(problem(SHAPES)[0]), change)


def assert_close(actual, expected):
    for k, value in expected.items():
        np.testing.assert_allclose(actual[k], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_the_learning_rate_changes_in_mid_run(x64, name, settings):
    tx = getattr(ours, name)(**settings)
    update = jax.jit(tx.update)
    rate = inspect.signature(getattr(ours, name)).parameters["lr"].default / 3
    expected = run(
        lambda step: update, tx.init(problem(SHAPES)[0]), functools.partial(jaxsgd.with_hyper, learning_rate=rate)
    )
    assert_close(injected(name, settings, "lr", rate), expected)


@pytest.mark.parametrize(("name", "argument", "first", "then"), CHANGES)
def test_any_number_changes_in_mid_run(x64, name, argument, first, then):
    """Against two transformations with other constants, the second of which takes over the state."""
    settings = {"momentum": 0.8} if name == "SGD" and argument != "momentum" else {}
    before, after = (getattr(ours, name)(**settings, **{argument: value}) for value in (first, then))

    def change(state):
        return jaxsgd.with_hyper(state, weight_decay=then) if argument == "weight_decay" else state

    expected = run(lambda step: (before if step < CHANGE_AT else after).update, before.init(problem(SHAPES)[0]), change)
    assert_close(injected(name, {**settings, argument: first}, argument, then), expected)


def test_nesterov_is_checked_where_the_numbers_are_known():
    nesterov = optax.inject_hyperparams(ours.SGD)
    nesterov(momentum=0.9, nesterov=True).init(jnp.ones(2))
    ours.SGD(momentum=jnp.float32(0.9), dampening=jnp.float32(0), nesterov=True)
    ours.SGD(momentum=optax.linear_schedule(0.5, 0.9, 10), nesterov=True)
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0"):
        ours.SGD(momentum=0, nesterov=True)


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures_name_every_argument(name):
    parameters = inspect.signature(getattr(ours, name)).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    shared = {k: parameters[k].default for k in ("groups", "storage", "dynamic", "norms", "mask", "rounding")}
    assert shared == {"groups": (), "storage": None, "dynamic": (), "norms": False, "mask": None, "rounding": None}
    assert all(parameters[k].kind is inspect.Parameter.KEYWORD_ONLY for k in shared)


# -- complex parameters ----------------------------------------------------------------------------


def as_real(x):
    return np.stack([np.real(x), np.imag(x)], -1)


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name not in REAL_ONLY])
@pytest.mark.parametrize("maximize", [False, True])
def test_complex_numbers_are_two_real_ones(x64, name, maximize):
    decay = {} if name == "Rprop" else {"weight_decay": 0.1}
    tx = getattr(ours, name)(maximize=maximize, **decay)
    update = jax.jit(tx.update)
    z, gradients = problem({"w": (2, 3)}, np.complex128)
    state, x = tx.init(z), {"w": as_real(z["w"])}
    other = tx.init(x)
    shapes = jax.tree.map(lambda s: (s.shape, s.dtype), state)
    for g in gradients:
        updates, state = update(g, state, z)
        z = optax.apply_updates(z, updates)
        updates, other = update({"w": as_real(g["w"])}, other, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(as_real(z["w"]), x["w"], rtol=1e-12, atol=1e-14)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == shapes
    # As in torch, a moment has the shape and the dtype of its parameter.
    assert {s.dtype for s in jax.tree.leaves(state.slots) if s.shape == (2, 3)} <= {np.dtype(np.complex128)}


def test_adam_on_complex_numbers_by_hand(x64):
    """The first step of Adam is the sign of each part."""
    z = jnp.asarray([1.0 + 2.0j])
    tx = ours.Adam(lr=0.1, eps=0.0)
    updates, _ = tx.update(jnp.asarray([3.0 - 4.0j]), tx.init(z), z)
    np.testing.assert_allclose(updates, [-0.1 + 0.1j], rtol=1e-12)


@pytest.mark.parametrize("name", sorted(REAL_ONLY))
def test_complex_parameters_are_refused_where_torch_refuses(name):
    params = {"w": jnp.ones((2, 2), jnp.complex64), "v": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="'w' is complex64; as in torch, complex parameters are not supported"):
        getattr(ours, name)().init(params)
    getattr(ours, name)(groups=[("w", {"frozen": True})]).init(params)


def test_a_real_gradient_of_a_complex_parameter():
    z = jnp.asarray([1.0 + 2.0j])
    tx = ours.Adam(lr=0.1)
    expected, _ = tx.update(jnp.asarray([3.0 + 0.0j]), tx.init(z), z)
    updates, _ = tx.update(jnp.asarray([3.0]), tx.init(z), z)
    np.testing.assert_array_equal(updates, expected)
