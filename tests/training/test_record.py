"""Metrics are fetched together, and are what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsgd
from jaxsgd import record


def report(i):
    return {
        "step": jnp.int32(i), "loss": jnp.float32(0.1 * i), "bad": jnp.isnan(jnp.float32(i)),
        "aux": {"half": jnp.bfloat16(i), "tokens": jnp.uint32(2**31 + i)},
    }  # fmt: skip


def test_one_transfer_every_so_many_steps(monkeypatch):
    fetched, gotten = [], []
    fetch, get = record._fetch, jax.device_get
    monkeypatch.setattr(record, "_fetch", lambda x: fetched.append(x.shape) or fetch(x))
    monkeypatch.setattr(jax, "device_get", lambda x: gotten.append(len(x)) or get(x))
    recorder = jaxsgd.Recorder(every=5)
    due = [len(recorder.add(report(i))) for i in range(12)]
    assert due == [0, 0, 0, 0, 5, 0, 0, 0, 0, 5, 0, 0]
    assert fetched == [(5, 5), (5, 5)] and gotten == []
    assert [r["step"] for r in recorder.flush()] == [10, 11] and gotten == [2]
    assert recorder.flush() == []
    assert [r["step"] for r in recorder.records] == list(range(12))
    for i, r in enumerate(recorder.records):
        assert r["loss"] == float(np.float32(0.1 * i)) and r["half"] == i and r["bad"] is False
        assert isinstance(r["step"], int) and r["tokens"] == 2**31 + i


def test_numbers_keep_their_bits(x64):
    recorder = jaxsgd.Recorder(every=1)
    (got,) = recorder.add({"pi": jnp.float64(np.pi), "nan": jnp.float32(np.nan), "count": jnp.int64(2**40), "low": -3})
    assert got["pi"] == np.pi and np.isnan(got["nan"]) and got["count"] == 2**40 and got["low"] == -3


def test_errors_name_the_metric():
    recorder = jaxsgd.Recorder(every=3)
    with pytest.raises(ValueError, match=r"metrics: 'logits' has the shape \(2,\); scalars are recorded"):
        recorder.add({"loss": jnp.float32(0), "aux": {"logits": jnp.zeros(2)}})
    recorder.add({"loss": jnp.float32(0)})
    with pytest.raises(ValueError, match=r"metrics: now \['los'\], in the steps before \['loss'\]"):
        recorder.add({"los": jnp.float32(0)})
    with pytest.raises(ValueError, match="every=0"):
        jaxsgd.Recorder(every=0)


def test_aux_does_not_take_the_place_of_a_metric():
    """A VAE or a GAN returns such a dict."""
    loss_fn = lambda p, b, key: (jnp.sum(p * b), {"loss": -11.0, "step": 7, "accuracy": 0.5})
    tx = jaxsgd.sgd(0.1)
    state, recorder = jaxsgd.TrainState.create(jnp.ones(3), tx), jaxsgd.Recorder(every=1)
    for _ in range(2):
        state, report = jaxsgd.make_step(loss_fn, tx, donate=False)(state, jnp.full(3, 7.0))
        (record,) = recorder.add(report)
    assert record["loss"] != -11 and record["aux/loss"] == -11 and record["step"] == 2 and record["aux/step"] == 7
    assert record["accuracy"] == 0.5
    rates = [1e-3, 1e-2]
    found = jaxsgd.sweep(
        jaxsgd.make_step(loss_fn, tx), jaxsgd.TrainState.create(jnp.ones(3), tx), [jnp.full(3, 1.0)] * 20,
        learning_rate=rates,
    )  # fmt: skip
    assert found.best["learning_rate"] == np.float32(1e-2) and (found.metrics["aux/loss"] == -11).all()
