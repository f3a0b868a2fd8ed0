"""Rules against the packages of their authors and against pytorch-optimizer: recorded trajectories in float64."""

import functools
import importlib.util
import re
import unittest.mock

import authors_cases as recorded
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd.testing import draw_gradients, draw_params, loss_of

LIVE = all(importlib.util.find_spec(name) for name in ("torch", "schedulefree", "pytorch_optimizer"))
TOLERANCE = 1e-9
HOOKED = [name for name, case in recorded.CASES.items() if re.findall(r"\w+", case.rule)[-1] in jaxsgd.RULES]


def rule_of(name):
    """A rule by its name in `RULES`, or a wrapper's with the rule inside: ``"grokfast(sgd)"``."""
    *wrappers, base = re.findall(r"\w+", name)
    rule = jaxsgd.RULES[base]
    for wrapper in reversed(wrappers):
        rule = getattr(jaxsgd, wrapper)(rule)
    return rule


@functools.cache
def walker(name):
    """One compiled walk for all kinds of gradients: ``(params, gradients) -> (visited, evaluated)``."""
    case = recorded.CASES[name]
    square = lambda key: optax.stateless(lambda grads, _: jax.tree.map(jnp.square, grads))
    given = {"hessian_diagonal_fn": square} if case.theirs.startswith("hessian") else {}
    tx = optax.with_extra_args_support(rule_of(case.rule)(**case.ours, **given))
    averages = case.theirs.startswith("closure")  # it keeps x, and goes to y to ask for gradients

    @jax.jit
    def run(params, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params, value=loss_of(params), obj_fn=loss_of)
            params = optax.apply_updates(params, updates)
            return (params, state), jaxsgd.eval_params(state, params) if averages else params

        (params, state), visited = jax.lax.scan(step, (params, tx.init(params)), grads)
        return visited, jaxsgd.eval_params(state, params)

    return run


@functools.cache
def ours(name, kind):
    """Our trajectory as the file has it: ``(kept steps, evaluated)``, each a dict of leaves."""
    leaves = recorded.CASES[name].leaves
    drawn = []

    def fixed(key, shape, dtype):
        drawn.append(shape)
        return jnp.asarray(recorded.noise(shape), dtype)

    with jax.enable_x64(True), unittest.mock.patch("jax.random.normal", fixed):
        visited, evaluated = jax.device_get(walker(name)(*recorded.problem(kind, leaves)))
    if drawn:
        jax.clear_caches()  # of the rule's programs, which have these numbers
    kept = np.array(recorded.KEPT) - 1
    return {k: visited[k][kept] for k in leaves}, {k: evaluated[k][None] for k in leaves}


@functools.cache
def data():
    with np.load(recorded.DATA) as file:
        return {key: file[key] for key in file.files}


def errors(mine, theirs):
    """The error of each step: the largest difference over the largest value of the leaf's trajectory."""
    each = [np.abs(mine[k] - x).reshape(len(x), -1).max(1) / np.abs(x).max() for k, x in theirs.items()]
    return np.max(each, axis=0)


@functools.cache
def compared(name):
    """The error of each kept step, the worst over kinds of gradients, and that of what is evaluated."""
    case, steps, evaluated = recorded.CASES[name], [], [0.0]
    leaves = case.leaves
    for kind in case.kinds:
        walked, at_end = ours(name, kind)
        steps.append(errors(walked, recorded.unpacked(data()[f"{name}/{kind}"], leaves)))
        if f"{name}/{kind}/eval" in data():
            evaluated.append(errors(at_end, recorded.unpacked(data()[f"{name}/{kind}/eval"], leaves)).max())
    return np.max(steps, axis=0), max(evaluated)


def measured():
    """Rule -> package -> the worst relative error over the cases that agree; what parts is in `EXCEPTIONS`."""
    table = {}
    for name in HOOKED:
        if name not in recorded.EXCEPTIONS:
            case, (steps, evaluated) = recorded.CASES[name], compared(name)
            row = table.setdefault(case.rule, {})
            row[case.package] = max(row.get(case.package, 0.0), float(steps.max()), float(evaluated))
    return table


@pytest.mark.parametrize("name", [name for name in HOOKED if name not in recorded.EXCEPTIONS])
def test_agrees(name):
    steps, evaluated = compared(name)
    assert steps.max() <= TOLERANCE, dict(zip(recorded.KEPT, steps, strict=True))
    assert evaluated <= TOLERANCE, "eval_params"


@pytest.mark.parametrize("name", [name for name in HOOKED if name in recorded.EXCEPTIONS])
def test_exception_is_true(name):
    """What is named as an exception parts where it says, and as far."""
    reason, first, size = recorded.EXCEPTIONS[name]
    steps, _ = compared(name)
    parted = [step for step, error in zip(recorded.KEPT, steps, strict=True) if error > TOLERANCE]
    assert reason.endswith(".") and parted, f"{name} agrees to {steps.max():.1e}: no exception"
    assert parted[0] == first
    assert size / 10 < steps.max() < size * 10


@pytest.mark.skipif(not LIVE, reason="the packages are not installed; the recorded trajectories are compared")
@pytest.mark.parametrize("package", recorded.VERSIONS)
def test_recording_is_what_they_do(package):
    kept = np.array(recorded.KEPT) - 1
    for name, case in recorded.CASES.items():
        for kind in case.kinds if case.package == package else ():
            visited, _ = recorded.trajectory(name, kind)
            live = recorded.packed({k: x[kept] for k, x in visited.items()}, len(kept))
            np.testing.assert_allclose(live, data()[f"{name}/{kind}"], rtol=1e-9, atol=1e-12, err_msg=f"{name}/{kind}")


@pytest.mark.parametrize("kind", recorded.GRADIENTS)
def test_the_problem_is_that_of_jaxsgd_testing(kind):
    params, grads = recorded.problem(kind)
    theirs = draw_params(0), draw_gradients(kind, 1, recorded.STEPS)
    jax.tree.map(np.testing.assert_array_equal, (params, grads), theirs)
    assert params.keys() == grads.keys() == recorded.SHAPES.keys()


def test_every_case_is_whole():
    for name, case in recorded.CASES.items():
        assert case.package in recorded.VERSIONS, name
        for kind in case.kinds:
            found = data()[f"{name}/{kind}"]
            assert found.shape[0] == len(recorded.KEPT) and np.isfinite(found).all(), f"{name}/{kind}"
    assert set(recorded.EXCEPTIONS) <= set(recorded.CASES)
    assert recorded.DATA.stat().st_size < 1_500_000
