"""Every rule under every law."""

import jax
import laws
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS

from jaxsgd import RULES

QUICK = {f"jaxsgd.rules.{family}" for family in ("adaptive", "averaging", "momentum", "sign", "torch")}
COSTLY = ("2_transformations", "4_neighbours", "6_dtypes")
"""Laws that compile a rule a dozen times in other company; outside QUICK families they run with the slow tests."""


def cases():
    for name in sorted(RULES):
        for law in LAWS:
            slow = law in COSTLY and RULES[name].module not in QUICK
            yield pytest.param(name, law, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "law"), list(cases()))
def test_law(name, law):
    LAWS[law](RULES[name])


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from([name for name in sorted(RULES) if RULES[name].oracle is not None]),
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
