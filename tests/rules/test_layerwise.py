"""Rules that measure a step against its layer."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsgd
from jaxsgd.testing import check_rule

BY_NAME = {"scalar": False, "vector": False, "matrix": True, "cube": True}


@pytest.mark.parametrize("mask", [BY_NAME, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)])
def test_the_mask_of_lars_is_a_tree_or_a_function_as_in_optax(mask):
    check_rule(jaxsgd.lars(0.1, trust_ratio_mask=mask), like=optax.lars(0.1, trust_ratio_mask=mask))
    assert "trust_ratio_mask=False" in jaxsgd.describe(
        jaxsgd.lars(0.1, trust_ratio_mask=mask), {k: jnp.ones((2,) * (2 * v)) for k, v in BY_NAME.items()}
    )


def test_the_mask_of_lars_may_be_a_prefix():
    params = {"bias": {"a": jnp.ones(3), "b": jnp.ones(2)}, "kernel": jnp.ones((2, 2))}
    tx = jaxsgd.lars(0.1, momentum=0.0, trust_ratio_mask={"bias": False, "kernel": True})
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(updates["bias"]["a"][0]) == pytest.approx(-0.1)
    assert float(updates["kernel"][0, 0]) == pytest.approx(-0.1 * 0.001)
