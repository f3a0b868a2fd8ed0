"""Adding a rule touches one file: one that is registered here is known wherever rules are."""

import inspect
import textwrap

import catalog
import jax
import jax.numpy as jnp
import optax
import pytest
from case import Case
from cases import CASES
from laws import LAWS

import jaxsgd
from jaxsgd import RULES
from jaxsgd.forms import forms
from jaxsgd.hyper import Decay
from jaxsgd.numerics import ema
from jaxsgd.slots import Mean
from jaxsgd.tuning.short_runs import usual_rate

SOURCE = '''
@jaxsgd.rule(usual_rate=0.3, batch_scaling="sqrt")
def toy(g, mu: Mean, *, b1: Decay = 0.9):
    r"""Toy (Nobody 2026, arXiv:0000.00000): $m \\leftarrow \\beta_1 m + (1 - \\beta_1) g,\\; u = m$."""
    mu = ema(mu, g, b1)
    return mu, mu
'''

AVERAGED = Case(
    oracle=lambda learning_rate, b1=0.9: optax.chain(optax.ema(b1, debias=False), optax.scale(-learning_rate))
)
"""The same rule by optax."""


@pytest.fixture
def define(monkeypatch):
    """Define rules from source, as one file would, and forget them afterwards."""
    before = set(RULES)
    monkeypatch.setitem(CASES, "toy", AVERAGED)

    def make(source):
        names = {"jaxsgd": jaxsgd, "ema": ema, "jnp": jnp, "Mean": Mean, "Decay": Decay, "__name__": "one_file"}
        exec(textwrap.dedent(source), names)
        return next(RULES[name] for name in RULES if name not in before)

    yield make
    for name in set(RULES) - before:
        del RULES[name]


@pytest.mark.parametrize("law", LAWS)
def test_one_file_is_enough(define, law):
    LAWS[law](define(SOURCE))


def test_it_is_in_the_catalogue_and_callable(define):
    toy = define(SOURCE)
    assert "[`toy`](#toy) | Toy | $m" in catalog.table({})
    assert catalog.entry(toy, {"toy": {"optax": 1e-15}})["agrees with"] == "optax"
    assert "### toy" in catalog.page({}) and "toy: not measured" in str(catalog.faults({}))
    assert list(inspect.signature(toy).parameters)[:2] == ["learning_rate", "b1"]
    assert toy.title.startswith("Toy (Nobody 2026") and toy.title in " ".join(toy.__doc__.split())
    assert toy.__doc__.startswith("toy(learning_rate") and toy.module == "one_file"


def bowl(params, batch):
    return jnp.mean((params["w"] - batch) ** 2)


def test_the_tools_know_its_learning_rate(define):
    """Its usual rate, inside whatever it is chained with, and how the rate goes with the batch size."""
    toy = define(SOURCE)

    def clipped(learning_rate):
        return jaxsgd.guard(optax.chain(optax.clip_by_global_norm(1.0), toy(learning_rate)))

    for rule in (toy, clipped, jaxsgd.cautious(toy)):
        assert usual_rate(rule)[0] == 0.3
    found = jaxsgd.probe(bowl, {"w": jnp.zeros(3)}, jnp.ones(3), toy, steps=200)
    assert found.usual == 0.3 and not any("usual rate" in reason for reason in found.why)
    assert jaxsgd.scale_learning_rate(0.1, 64, 256, "toy") == jaxsgd.scale_learning_rate(0.1, 64, 256, toy) == 0.2


def test_its_state_is_known(define):
    """Storage, migration, planning and sharpness ask the kind of its slot."""
    toy, params = define(SOURCE), {"w": jnp.ones((64, 64))}
    eight = toy(0.1, storage=jaxsgd.int8())
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tx.init(params).slots)) for tx in (toy(0.1), eight)]
    assert sizes == [4 * 64 * 64, 64 * 64 + 4 * 64]
    (form,) = forms(optax.chain(optax.identity(), eight), params)
    assert (form.container, form.slot.name, form.slot.kind, form.parameter) == ("1", "mu", "mean", "w")
    state = toy(0.1).update(params, toy(0.1).init(params), params)[1]
    packed, report = jaxsgd.migrate(state, eight, params)
    assert report.complete and jax.tree.structure(packed) == jax.tree.structure(eight.init(params))
    loss = lambda p, x, key: jnp.sum(p["w"] ** 2)
    found = jaxsgd.sharpness(loss, params, jnp.ones(1), tx=toy(0.1), progress=False)
    assert found.rule == "toy" and found.threshold == pytest.approx(2 * 1.9 / 0.1 / 2, rel=1e-3)
    planned = jaxsgd.plan(loss, params, toy(0.1), jnp.ones(1))
    assert planned.parts["state: mu"] == 4 * 64 * 64


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (SOURCE.replace("return mu, mu", "return 1.001 * mu, mu"), "1_oracle"),
        (SOURCE.replace("ema(mu, g, b1)", "ema(mu, g, 0.9)"), "8_hyperparameters"),
        (SOURCE.replace("return mu, mu", "return jnp.abs(mu) + 1e-3, mu"), "7_edges"),
        (SOURCE.replace("ema(mu, g, b1)", "ema(mu, g, b1) * jnp.asarray(1.0, jnp.float64)"), "6_dtypes"),
        (SOURCE.replace("return mu, mu", "return (mu if float(g.sum()) > 0 else -mu), mu"), "2_transformations"),
    ],
)
def test_the_laws_catch_a_broken_rule(define, broken, law):
    with pytest.raises(Exception):
        LAWS[law](define(broken))


def test_a_name_is_registered_once(define):
    define(SOURCE)
    with pytest.raises(ValueError, match="rule 'toy' exists already"):
        define(SOURCE)


def test_a_signature_without_a_role_is_refused(define):
    with pytest.raises(TypeError, match=r"'\*args' carries no role"):
        define("@jaxsgd.rule\ndef toy(g, *args):\n    return g")
    with pytest.raises(TypeError, match="slot 'mu': the annotation"):
        define("@jaxsgd.rule\ndef toy(g, mu: Decay):\n    return g, mu")
    with pytest.raises(ValueError, match="batch_scaling='cubic': known are 'linear', 'sqrt'"):
        define("@jaxsgd.rule(batch_scaling='cubic')\ndef toy(g):\n    return g")
