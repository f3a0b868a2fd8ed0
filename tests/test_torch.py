"""jaxsgd.torch against torch.optim: recorded trajectories always, live ones where torch is installed."""

import importlib.util
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch_cases as recorded

import jaxsgd
from jaxsgd import torch as ours

LIVE = importlib.util.find_spec("torch") is not None


def trajectory(case):
    cls, kwargs, drop = recorded.CASES[case]
    make = getattr(ours, cls)
    if drop:
        rate = kwargs.get("lr", inspect.signature(make).parameters["lr"].default)
        falling = lambda count: jnp.where(count < recorded.DROP_AT, rate, rate * recorded.DROP_TO)
        kwargs = {**kwargs, "lr": falling}
    tx = make(**kwargs)
    params, grads = recorded.problem()

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g)[1])
    kept = np.array(recorded.KEPT) - 1
    return {f"{case}/{k}": np.asarray(v)[kept] for k, v in run(params, grads).items()}


@pytest.mark.parametrize("case", recorded.CASES)
def test_recorded(x64, case):
    with np.load(recorded.DATA) as data:
        for key, value in trajectory(case).items():
            np.testing.assert_allclose(value, data[key], rtol=1e-10, atol=0)


@pytest.mark.skipif(not LIVE, reason="torch is not installed; the recorded trajectories are compared")
@pytest.mark.parametrize("case", recorded.CASES)
def test_live(x64, case):
    live = recorded.trajectory(case)
    for key, value in trajectory(case).items():
        np.testing.assert_allclose(value, live[key], rtol=1e-10, atol=0)


@pytest.mark.skipif(not LIVE, reason="torch is not installed; its signatures cannot be read")
@pytest.mark.parametrize("name", ours.__all__)
def test_signatures(name):
    import torch

    theirs = list(inspect.signature(getattr(torch.optim, name)).parameters.values())[1:]
    mine = inspect.signature(getattr(ours, name)).parameters
    for p in theirs:
        assert p.name in mine and mine[p.name].kind == p.kind, p
        assert mine[p.name].default == p.default, p


def test_every_name_is_recorded():
    assert {cls for cls, _, _ in recorded.CASES.values()} == set(ours.__all__)
    with np.load(recorded.DATA) as data:
        assert str(data["torch_version"]) >= "2.13"


def test_it_imports_as_torch_does():
    from jaxsgd.torch import AdamW

    assert AdamW is jaxsgd.torch.AdamW


def test_jaxsgd_arguments_work_there_too():
    params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = jaxsgd.torch.Adam(lr=0.1, weight_decay=0.5, groups=[("bias", {"weight_decay": 0.0})])
    updates, state = tx.update(params, tx.init(params), params)
    assert float(jaxsgd.metrics(state)["learning_rate"]) == np.float32(0.1)
    # Adam's first step is the sign of the gradient; decay enters the moments.
    assert float(state.slots["mu"]["w"][0, 0]) == pytest.approx(0.15)
    assert float(state.slots["mu"]["bias"][0]) == pytest.approx(0.1)
    jaxsgd.torch.AdamW(foreach=True, fused=True, capturable=True, differentiable=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ours.SGD(nesterov=True), ValueError, "nesterov=True needs momentum > 0 and dampening=0"),
        (lambda: ours.SGD(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "dampening=0.1"),
        (lambda: ours.Adam(betas=0.9), TypeError, r"betas=0.9: two numbers are needed"),
        (lambda: ours.Adam(betas=(0.9, 1.0)), ValueError, r"b2=1.0"),
        (lambda: ours.RMSprop(alpha=1.0), ValueError, r"alpha=1.0: it must lie in \[0, 1\)"),
        (lambda: ours.AdamW(lr=-1), ValueError, "learning_rate=-1"),
        (lambda: ours.AdamW(learning_rate=1), TypeError, "learning_rate"),
    ],
)
def test_bad_calls_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_average_of_asgd_is_what_eval_params_gives(x64):
    params, grads = recorded.problem()
    tx = ours.ASGD(lr=0.1, t0=3)
    state, visited = tx.init(params), []
    for step in range(10):
        updates, state = tx.update({k: g[step] for k, g in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params["vector"])
    # Until t0 the average is the point itself; then it is the mean of all points from there.
    np.testing.assert_allclose(jaxsgd.eval_params(state, params)["vector"], np.mean(visited[4:], axis=0), rtol=1e-12)
