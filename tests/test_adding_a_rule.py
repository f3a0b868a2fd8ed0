"""Adding a rule touches one file: a rule registered here is in the catalogue and under the laws."""

import inspect
import textwrap

import jax.numpy as jnp
import optax
import pytest
from laws import LAWS

import jaxsgd
from jaxsgd import RULES, catalog
from jaxsgd.numerics import ema

SOURCE = '''
@jaxsgd.rule(oracle=lambda learning_rate, b1=0.9: optax.chain(optax.ema(b1, debias=False), optax.scale(-learning_rate)))
def toy(g, mu, *, b1=0.9):
    r"""Toy (Nobody 2026, arXiv:0000.00000): $m \\leftarrow \\beta_1 m + (1 - \\beta_1) g,\\; u = m$."""
    mu = ema(mu, g, b1)
    return mu, mu
'''


@pytest.fixture
def define():
    """Define rules from source, as one file would, and forget them afterwards."""
    before = set(RULES)

    def make(source):
        names = {"jaxsgd": jaxsgd, "optax": optax, "ema": ema, "jnp": jnp, "__name__": "one_file"}
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
    assert "[`toy`](docs/rules.md#toy) | Toy | $m" in catalog.table({})
    assert catalog.entry(toy, {"toy": {"optax": 1e-15}})["agrees with"] == "optax"
    assert "### toy" in catalog.page({}) and "toy: not measured" in str(catalog.faults({}))
    assert list(inspect.signature(toy).parameters)[:2] == ["learning_rate", "b1"]
    assert toy.__doc__.startswith("Toy (Nobody 2026") and toy.module == "one_file"


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
        exec(textwrap.dedent(SOURCE), {"jaxsgd": jaxsgd, "optax": optax, "ema": ema})


def test_a_signature_without_a_role_is_refused(define):
    with pytest.raises(TypeError, match=r"'\*args' carries no role"):
        define("@jaxsgd.rule()\ndef toy(g, *args):\n    return g")
    with pytest.raises(TypeError, match=r"start\['nu'\] is neither a slot"):
        define("@jaxsgd.rule(start={'nu': lambda p: p})\ndef toy(g, mu):\n    return g, mu")
