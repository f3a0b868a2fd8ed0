"""Every rule under every law."""

import jax
import laws
import pytest
from cases import case_of
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS

from jaxsgd import RULES

LONG = {"kron", "soap", "shampoo", "apollo", "apollo_mini", "galore"}
"""Rules that decompose matrices: their programs compile longest."""
LATER = ("2_transformations", "4_neighbours", "8_hyperparameters")


@pytest.mark.parametrize(
    ("law", "name"),
    [
        pytest.param(law, name, marks=[pytest.mark.slow] * (name in LONG and law in LATER))
        for law in LAWS
        for name in sorted(RULES)
    ],
)
def test_law(name, law):
    LAWS[law](RULES[name])


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from([n for n in sorted(RULES) if case_of(n).oracle is not None]),
    kind=st.sampled_from(["normal", "sparse", "heavy", "constant"]),
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_rule_follows_its_oracle_on_drawn_gradients(name, kind, seed, scale):
    """1e-12 of the trajectory, whatever the gradients: laws.py has the compiled walks, only values are drawn."""
    with jax.enable_x64(True):
        params, grads = laws.tree(seed), laws.gradients(seed, kind)
        grads = {k: scale * g for k, g in grads.items()}
        error = laws.relative(laws.run(RULES[name], {}, params, grads), laws.reference(RULES[name], {}, params, grads))
        assert error <= 1e-12
