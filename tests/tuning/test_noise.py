"""The gradient noise scale against direct estimates, and what follows from it."""

from __future__ import annotations

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd.ensemble.losses import pure_loss
from jaxsgd.tuning.noise import NoiseScale, _estimate, _fieller, noise_scale, scale_learning_rate

CENTER = jnp.array([0.6, -0.8, 0.0])


def quadratic(params, batch):
    """The gradient is params - x: its noise is that of x."""
    return 0.5 * jnp.mean(jnp.sum((params["w"][None] - batch["x"]) ** 2, -1))


def draws(count, size=32, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    shape = (count, size, 3)
    return [{"x": x} for x in spread * rng.standard_normal(shape, np.float32)]


# -- digits ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """The 1,257 images that examples/digits.py trains on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: int(0.7 * len(labels))]
    return (images[order].reshape(-1, 8, 8, 1) / 16.0).astype(np.float32), labels[order].astype(np.int32)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.hidden(images.reshape(images.shape[0], -1))))


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def cross_entropy(model, batch, key):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {"logits": logits}


def direct(state, images, labels, at_once):
    """|G|^2 and tr(Sigma) of the whole data set, example by example."""
    fn, params = pure_loss(cross_entropy, state)

    def one(image, label):
        grads = jax.grad(fn)(params, {"image": image[None], "label": label[None]}, jax.random.key(0))
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])

    many = jax.vmap(one)
    add = jax.jit(lambda total, image, label: total + many(image, label).sum(0))
    spread = jax.jit(lambda total, mean, image, label: total + jnp.sum((many(image, label) - mean[None]) ** 2))
    chunks = [(images[i : i + at_once], labels[i : i + at_once]) for i in range(0, len(labels), at_once)]
    total, squares = jnp.zeros(sum(x.size for x in jax.tree.leaves(params))), jnp.zeros(())
    for chunk in chunks:
        total = add(total, *chunk)
    mean = total / len(labels)
    for chunk in chunks:
        squares = spread(squares, mean, *chunk)
    return float(jnp.sum(mean**2)), float(squares) / len(labels)


def compare(model, images, labels, at_once):
    """Train, and compare with the direct estimate at 0, 50 and 300 steps."""
    tx = jaxsgd.adamw(2e-3)
    state, step = jaxsgd.TrainState.create(model, tx, key=0), jaxsgd.make_step(cross_entropy, tx)
    rng, n = np.random.default_rng(0), len(labels)
    order = np.random.default_rng(1).permutation(n)
    epoch = [{"image": images[i], "label": labels[i]} for i in order[: n - n % 64].reshape(-1, 64)]
    done, found = 0, []
    for at in (0, 50, 300):
        for _ in range(done, at):
            index = rng.integers(0, n, 64)
            state, _ = step(state, {"image": images[index], "label": labels[index]})
        done = at
        norm, trace = direct(state, images, labels, at_once)
        measured = noise_scale(cross_entropy, state, epoch)
        print(f"{type(model).__name__} {at}: {measured.scale:.4g} direct {trace / norm:.4g}")
        assert measured.low < trace / norm < measured.high
        assert abs(measured.scale / (trace / norm) - 1) < 0.2
        assert abs(measured.gradient_norm_sq / norm - 1) < 0.2 and abs(measured.variance / trace - 1) < 0.2
        found.append(measured.scale)
    # From 512 examples it is said not to be told.
    few = noise_scale(cross_entropy, state, epoch[:8], population=n)
    assert not few.known and few.low < trace / norm
    assert found == sorted(found)  # it grows as the loss falls


def test_agrees_with_the_whole_data_set(digits):
    compare(MLP(nnx.Rngs(0)), *digits, at_once=len(digits[1]))


@pytest.mark.slow
def test_agrees_with_the_whole_data_set_for_a_cnn(digits):
    compare(CNN(nnx.Rngs(0)), *digits, at_once=1)


# -- the estimators ----------------------------------------------------------------------------------


def test_equals_its_formula():
    batches = draws(6, 8)
    params = {"w": CENTER}
    found = noise_scale(quadratic, params, batches, small=2, population=math.inf)
    parts = np.concatenate([b["x"] for b in batches]).astype(np.float64).reshape(24, 2, 3).mean(1)
    grads = np.asarray(CENTER, np.float64) - parts
    trace = 2 * grads.var(0, ddof=1).sum()
    norm = (grads.mean(0) ** 2).sum() - trace / 48
    pairs = grads @ grads.T
    unbiased = (pairs.sum() - np.trace(pairs)) / (24 * 23)  # every pair of parts, none with itself
    assert math.isclose(norm, unbiased, rel_tol=1e-9)
    assert found.small == 2 and found.parts == 24 and found.batch_size == 8
    assert math.isclose(found.variance, trace, rel_tol=1e-4)
    assert math.isclose(found.gradient_norm_sq, norm, rel_tol=1e-4)
    assert math.isclose(found.scale, trace / norm, rel_tol=1e-4)


def simulated(rng, gradient, count, small, unseen=1.0):
    """An estimate from parts whose gradients are Gaussian in 40 dimensions, tr(Sigma) = 40."""
    grads = np.zeros(40)
    grads[0] = gradient
    parts = grads + rng.standard_normal((count, 40)) / math.sqrt(small)
    mean = parts.mean(0)
    away = parts - mean
    return _estimate(float(mean @ mean), (away**2).sum(1), away @ mean, small, unseen)


def test_is_unbiased_and_its_interval_covers():
    rng = np.random.default_rng(0)
    runs = [simulated(rng, 1.0, 64, 4) for _ in range(600)]
    norms, traces = (np.array([r[name] for r in runs]) for name in ("gradient_norm_sq", "variance"))
    for values, truth in ((norms, 1.0), (traces, 40.0)):
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))
    for name, values in (("gradient_norm_sq_error", norms), ("variance_error", traces)):
        told = np.mean([r[name] for r in runs])
        assert 0.95 < told / values.std() < 1.25, name  # rather too large than too small
    covered = np.mean([r["low"] <= 40 <= r["high"] for r in runs])
    assert covered > 0.93
    assert np.mean([r["known"] for r in runs]) > 0.95


def test_cannot_tell_where_there_is_no_gradient():
    rng = np.random.default_rng(0)
    runs = [simulated(rng, 0.0, 64, 4) for _ in range(300)]
    assert np.mean([r["known"] for r in runs]) < 0.05
    assert all(r["high"] == math.inf and r["standard_error"] == math.inf for r in runs if not r["known"])
    told = noise_scale(quadratic, {"w": jnp.zeros(3)}, draws(8), population=math.inf)
    assert not told.known and told.low > 10
    assert (
        "is not known, only that it is above" in told.summary
        and "or more" in told.next[0]
        and "at least" in str(told.doubling())
    )
    assert told.critical_batch_size == told.low
    nothing = NoiseScale(math.inf, math.inf, 0.0, math.inf, False, -0.1, 0.2, 4.0, 1.0, 2, 64, math.inf, 9.0, 64)
    assert nothing.summary == "nothing is known of the noise scale: the gradient is lost in the noise of 128 examples"
    assert nothing.why == () and "512 examples or more" in nothing.next[0] and "at least 0" not in str(nothing)
    with pytest.raises(ValueError, match="not known"):
        scale_learning_rate(0.1, 64, 128, "noise_scale", noise_scale=told)


def test_interval_of_a_ratio():
    none, unit = np.zeros((2, 2)), np.eye(2)
    assert _fieller(6.0, 2.0, none, 2.0) == (3.0, 3.0)
    low, high = _fieller(40.0, 10.0, unit, 2.0)
    for end in (low, high):  # its ends are where above - r below is just two errors from 0
        assert math.isclose(abs(40 - end * 10), 2 * math.hypot(1, end))
    low, high = _fieller(40.0, 1.0, unit, 2.0)
    assert high == math.inf and math.isclose(40 - low, 2 * math.hypot(1, low))
    low, high = _fieller(40.0, -1.0, unit, 2.0)
    assert high == math.inf and math.isclose(40 + low, 2 * math.hypot(1, low))
    assert _fieller(40.0, 2.0, unit, 2.0) == (pytest.approx((1600 - 4) / 160), math.inf)
    assert _fieller(1.0, -3.0, unit, 2.0) == (0.0, math.inf)
    assert _fieller(0.0, 0.0, none, 2.0) == (0.0, math.inf)


def test_a_whole_data_set_has_no_error():
    x = np.random.default_rng(0).standard_normal((96, 3)).astype(np.float32)
    batches = [{"x": part} for part in np.random.default_rng(1).permutation(x).reshape(3, 32, 3)]
    found = noise_scale(quadratic, {"w": CENTER}, batches, small=1, population=96)
    grads = np.asarray(CENTER) - x
    assert math.isclose(found.gradient_norm_sq, (grads.mean(0) ** 2).sum(), rel_tol=1e-4)
    assert math.isclose(found.variance, grads.var(0, ddof=1).sum(), rel_tol=1e-4)
    assert found.standard_error == 0 and found.low == pytest.approx(found.scale) == found.high
    assert noise_scale(quadratic, {"w": CENTER}, batches, small=1, population="all") == found
    fresh = noise_scale(quadratic, {"w": CENTER}, batches, small=1, population=math.inf)
    assert fresh.standard_error > 0 and fresh.gradient_norm_sq < found.gradient_norm_sq
    assert found.as_sample == fresh.scale == fresh.as_sample
    # Where it is not said what they are, the estimate is the set's, and the doubt that of both.
    unsaid = noise_scale(quadratic, {"w": CENTER}, batches, small=1)
    assert unsaid.scale == found.scale and unsaid.as_sample == fresh.scale
    assert unsaid.low == min(found.low, fresh.low) and unsaid.high == max(found.high, fresh.high)
    assert "if the batches are all the data" in unsaid.why[0] and "if the batches" not in "".join(fresh.why)
    paired = noise_scale(quadratic, {"w": CENTER}, batches, small=2, population=96)
    assert paired.gradient_norm_sq_error == 0 < paired.variance_error  # who is with whom is drawn


def test_what_it_takes():
    batches = draws(4)
    params = {"w": CENTER}
    want = noise_scale(quadratic, params, batches, population=math.inf)
    assert want.small == 1
    for given in (iter(batches), (b for b in itertools.chain(batches, []))):  # fresh, for all that one can see
        assert noise_scale(quadratic, params, given) == want
    assert noise_scale(quadratic, params, lambda step: batches[step], count=4) == want
    endless = itertools.cycle(batches)
    assert noise_scale(quadratic, params, endless, count=4) == want
    assert noise_scale(quadratic, params, endless).parts == 3200
    # one batch, of sizes that differ, with a scalar beside the examples
    one = {"x": np.concatenate([b["x"] for b in batches]), "weight": 1.0}
    assert math.isclose(noise_scale(quadratic, params, one, small=1).as_sample, want.scale, rel_tol=1e-4)
    odd = [{"x": one["x"][:40]}, {"x": one["x"][40:]}]
    assert math.isclose(noise_scale(quadratic, params, odd).as_sample, want.scale, rel_tol=1e-4)
    assert noise_scale(quadratic, params, draws(2, 256)).small == 8


def test_parameters_that_rest_count_nothing():
    """As if the frozen parameter were a number in the loss."""
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    params = {"a": jnp.ones(3), "b": jnp.full(3, 2.0)}

    def loss(p, batch, key):
        return jnp.mean((batch @ p["a"] + batch**2 @ p["b"] - 1) ** 2)

    for tx in (
        jaxsgd.adam(0.1, groups=[("b", {"frozen": True})]),
        optax.partition({"a": optax.adam(0.1), "b": optax.set_to_zero()}, {"a": "a", "b": "b"}),
    ):
        found = jaxsgd.noise_scale(loss, params, x, small=4, tx=tx)
        alone = jaxsgd.noise_scale(
            lambda p, batch, key: loss({"a": p, "b": params["b"]}, batch, key), params["a"], x, small=4
        )
        np.testing.assert_allclose(
            (found.scale, found.gradient_norm_sq), (alone.scale, alone.gradient_norm_sq), rtol=1e-5
        )
    assert abs(jaxsgd.noise_scale(loss, params, x, small=4).scale / found.scale - 1) > 0.01
    with pytest.raises(ValueError, match="no floating or complex parameter that tx moves"):
        jaxsgd.noise_scale(loss, params, x, tx=optax.set_to_zero())
    with pytest.raises(TypeError, match="tx=.*gradient transformation"):
        jaxsgd.noise_scale(loss, params, x, tx=jaxsgd.adam)


def test_narrow_parameters_and_another_gradient():
    batches = draws(8, seed=3)
    want = noise_scale(quadratic, {"w": CENTER}, batches)

    def narrow(params, batch, key):
        return quadratic(jax.tree.map(lambda p: p.astype(jnp.float32), params), batch)

    found = noise_scale(narrow, {"w": CENTER.astype(jnp.bfloat16)}, batches)
    assert abs(found.scale / want.scale - 1) < 0.05
    state = jaxsgd.TrainState.create({"w": CENTER}, jaxsgd.sgd(0.1))
    assert noise_scale(lambda p, b, key: quadratic(p, b), state, batches) == want
    twice = noise_scale(
        quadratic, state, batches, gradient=lambda loss: lambda *a: jax.tree.map(lambda g: 2 * g, jax.grad(loss)(*a))
    )
    assert math.isclose(twice.variance, 4 * want.variance, rel_tol=1e-4)
    assert math.isclose(twice.scale, want.scale, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": []}, "there are none"),
        ({"batches": {"x": np.zeros((1, 3))}}, "1 examples in all make 1 of 1; at least 4"),
        ({"batches": draws(2), "small": 5}, "batch 0 has 32 examples, which do not divide"),
        ({"batches": draws(2), "small": 0}, "small=0"),
        ({"batches": draws(2), "count": 3}, "count=3: there are only 2"),
        ({"batches": draws(1)[0], "count": 3}, "count=3: batches is one batch"),
        ({"batches": [{"x": np.zeros((4, 3))}] * 2, "params": {"w": CENTER * 0}}, "exactly 0 at this point"),
        ({"batches": lambda step: draws(1)[0]}, "count=None: a function of the step"),
        ({"batches": draws(2), "population": 10}, "population=10: 'all', math.inf, or so many"),
        ({"batches": draws(2), "population": "some"}, "population='some'"),
        ({"batches": [{"x": np.float32(1)}]}, "no array with a first axis"),
        ({"batches": draws(2), "params": {"w": CENTER * np.nan}}, "not finite"),
    ],
)
def test_refuses_in_words(given, message):
    arguments = {"params": {"w": CENTER}, **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        noise_scale(quadratic, **arguments)


# -- what follows ------------------------------------------------------------------------------------


def known(scale):
    return NoiseScale(scale, 10.0, 80.0, 120.0, True, 1.0, 0.1, scale, 1.0, 2, 64, math.inf, scale, 64)


def test_what_a_batch_size_costs():
    found = known(100.0)
    assert found.steps(100) == found.examples(100) == 2
    assert found.steps(1e9) == pytest.approx(1) and found.examples(1e-9) == pytest.approx(1)
    # Steps times batch is what the examples are, whatever the size.
    assert found.steps(32) * 32 / 100 == pytest.approx(found.examples(32))
    twice = found.doubling()
    assert twice.batch_size == 64
    assert 1 - twice.steps_saved == pytest.approx((1 + 100 / 128) / (1 + 100 / 64))
    assert 1 + twice.examples_added == pytest.approx((1 + 128 / 100) / (1 + 64 / 100))
    assert str(twice) == "doubling the batch from 64 to 128 saves 30% of the steps and costs 39% more examples"
    assert found.learning_rate(100, 0.4) == pytest.approx(0.2)
    assert found.learning_rate(1) == pytest.approx(1 / 101)
    assert found.summary == "the noise scale is 100 +- 10 examples (95% CI 80 to 120)"
    assert "critical batch size, about 100" in found.why[0]
    with pytest.raises(ValueError, match="batch_size=0"):
        found.steps(0)


def test_scales_a_learning_rate():
    assert scale_learning_rate(0.1, 64, 256) == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 64, 256, "square_root") == pytest.approx(0.2)
    assert scale_learning_rate(0.1, 256, 64, jaxsgd.momentum) == pytest.approx(0.025)
    assert scale_learning_rate(1e-3, 64, 256, "adamw") == scale_learning_rate(1e-3, 64, 256, jaxsgd.adam) == 2e-3
    near = scale_learning_rate(0.1, 64, 256, "noise_scale", noise_scale=100.0)
    found = known(100.0)
    assert near == pytest.approx(0.1 * found.learning_rate(256) / found.learning_rate(64))
    assert near == scale_learning_rate(0.1, 64, 256, "noise_scale", noise_scale=found)
    assert scale_learning_rate(0.1, 1, 2, "noise_scale", noise_scale=1e9) == pytest.approx(0.2)
    for arguments, message in (
        ((1.0, 64, 256, "prodigy"), "it sets its own step size from the gradients, at any batch size"),
        ((0.1, 64, 256, "lion"), "no scaling of its learning rate with the batch size is published. Use jaxsgd.probe"),
        ((0.1, 64, 256, "cubic"), "'linear', 'square_root', 'noise_scale', a rule or its name"),
        ((0.1, 64, 256, "noise_scale"), "noise_scale=None"),
        ((0.0, 64, 256), "learning_rate=0.0"),
        ((0.1, 64, -1), "new_batch_size=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_learning_rate(*arguments)
    with pytest.raises(ValueError, match="it counts nothing"):
        scale_learning_rate(0.1, 64, 128, noise_scale=100.0)
    with pytest.raises(TypeError, match="rule=3"):
        scale_learning_rate(0.1, 64, 128, 3)  # type: ignore[arg-type]
