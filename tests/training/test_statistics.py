"""Averaged weights with batch statistics of their own."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd import TrainState, make_step

DIGITS = load_digits()
ORDER = np.random.default_rng(0).permutation(1797)
IMAGES, LABELS = (DIGITS.data / 16).astype(np.float32)[ORDER], DIGITS.target[ORDER]
TRAIN, TEST = slice(0, 1408), slice(1408, None)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.97, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def loss_fn(model, batch, key):
    del key
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def batches(size, count):
    for i in range(count):
        index = np.random.default_rng(i).choice(1408, size, replace=False)
        yield IMAGES[index], LABELS[index]


def accuracy(model):
    model.eval()
    return float(jnp.mean(model(IMAGES[TEST]).argmax(-1) == LABELS[TEST]))


def by_hand(state, stats_of):
    """The model with the statistics of the whole training set in one pass, layer by layer."""
    model = state.model_with(state.model_state)
    hidden = model.first(IMAGES[TRAIN])
    model.norm.mean.set_value(hidden.mean(0))
    model.norm.var.set_value(hidden.var(0))
    return model


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(jaxsgd.sgd(0.5), jaxsgd.params_ema(0.98)),
        jaxsgd.schedule_free_sgd(1.0),
        optax.chain(optax.adam(1e-2), jaxsgd.params_ema(0.98)),
    ],
    ids=["sgd, average", "schedule-free", "adam, average"],
)
def test_an_average_evaluates_as_with_statistics_by_hand(tx):
    state, step = TrainState.create(Net(nnx.Rngs(0)), tx), make_step(loss_fn, tx)
    for batch in batches(64, 60):
        state, _ = step(state, batch)
    statistics = jaxsgd.batch_statistics(state, loss_fn, batches(256, 8))
    model, wanted = state.model_with(statistics), by_hand(state, statistics)
    np.testing.assert_allclose(model.norm.mean[...], wanted.norm.mean[...], atol=0.1)
    np.testing.assert_allclose(model.norm.var[...], wanted.norm.var[...], rtol=0.2, atol=0.01)
    assert abs(accuracy(model) - accuracy(wanted)) <= 0.01
    with pytest.warns(UserWarning, match="its weights are averages, its batch statistics those of the trained"):
        _ = state.model
    jax.tree.map(np.testing.assert_array_equal, _kept(statistics), _kept(state.model_state))
    step(state, next(batches(64, 1)))  # the state can go on: nothing was donated


def _kept(model_state):
    """Counts and keys of the dropout."""
    rest = nnx.filter_state(model_state, nnx.Not(nnx.BatchStat))
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(rest)
    ]


def test_the_mean_is_exact_whatever_the_momentum():
    """Two batches of equal size: the mean of their own statistics, to rounding."""
    state = TrainState.create(Net(nnx.Rngs(0)), jaxsgd.sgd(0.1))
    pair = list(batches(128, 2))
    statistics = state.model_with(jaxsgd.batch_statistics(state, loss_fn, pair)).norm
    hidden = [state.model.first(images) for images, _ in pair]
    np.testing.assert_allclose(statistics.mean[...], np.mean([h.mean(0) for h in hidden], 0), atol=2e-5)
    np.testing.assert_allclose(statistics.var[...], np.mean([h.var(0) for h in hidden], 0), atol=2e-5)


def test_weights_without_average_give_no_warning():
    state = TrainState.create(Net(nnx.Rngs(0)), jaxsgd.adam(1e-2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accuracy(state.model) >= 0


class Linen(linen.Module):
    training: bool = True

    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=not self.training, momentum=0.9)(linen.Dense(8)(x))
        x = linen.BatchNorm(use_running_average=not self.training, momentum=0.5, name="other")(x)
        return linen.Dense(10)(x)


def linen_loss(params, stats, batch, key, training=True):
    model = Linen(training)
    variables = {"params": params, "batch_stats": stats["batch_stats"]}
    logits, new = model.apply(variables, batch[0], mutable=["batch_stats"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    return loss, ({"batch_stats": new["batch_stats"], "seen": stats["seen"] + 1.0}, None)


def linen_state():
    variables = Linen().init(jax.random.key(0), IMAGES[:2])
    carried = {"batch_stats": variables["batch_stats"], "seen": jnp.zeros(())}
    return TrainState.create(variables["params"], jaxsgd.sgd(0.1), model_state=carried)


def test_linen_models_and_what_is_no_average():
    state = linen_state()
    found = jaxsgd.batch_statistics(state, linen_loss, batches(128, 3))
    dense = state.params["Dense_0"]
    hidden = [images @ dense["kernel"] + dense["bias"] for images, _ in batches(128, 3)]
    np.testing.assert_allclose(
        found["batch_stats"]["BatchNorm_0"]["mean"], np.mean([h.mean(0) for h in hidden], 0), atol=2e-5
    )
    np.testing.assert_allclose(found["batch_stats"]["other"]["mean"], np.zeros(8), atol=1e-5)
    np.testing.assert_allclose(found["batch_stats"]["other"]["var"], np.ones(8), atol=1e-3)
    assert found["seen"] == 0  # a counter is no average


def test_wrong_calls_are_refused_in_words():
    state = linen_state()
    with pytest.raises(ValueError, match="batches: there is none"):
        jaxsgd.batch_statistics(state, linen_loss, [])
    with pytest.raises(ValueError, match="loss_fn: it updates no running average"):
        jaxsgd.batch_statistics(
            state, lambda p, s, b, k: linen_loss(p, {**s, "seen": s["seen"] - 1.0}, b, k, False), batches(8, 1)
        )
    with pytest.raises(ValueError, match="the statistics of the first one are not finite"):
        jaxsgd.batch_statistics(state, linen_loss, [(np.full((8, 64), np.nan, np.float32), LABELS[:8])])
    bare = TrainState.create({"w": jnp.ones(3)}, jaxsgd.sgd(0.1))
    with pytest.raises(ValueError, match="state: its model carries no statistics"):
        jaxsgd.batch_statistics(bare, lambda p, b, k: p["w"].sum(), batches(8, 1))
