"""Property tests for update rules: yours, optax's, ours. Public, for any optax gradient transformation.

Five lines in your test file::

    from jaxsgd.testing import check_laws, check_rule

    def test_my_rule():
        check_laws(my_rule)
        check_rule(my_rule(1e-2), like=optax.adam(1e-2))

`check_rule` runs two transformations side by side in float64 over several kinds of gradients. It reports where they
differ: the worst leaf, the step, the relative error. `check_laws` checks the laws of every transformation. For example,
jit changes nothing, the state keeps its structure, 16-bit weights do not ruin it, and NaN stays where it is. It takes a
transformation, or a function of the learning rate that makes one. With a function, schedules, `jax.vmap` over the rate
and storage are checked too. `compare` and `laws_broken` give the same findings without raising. `each_law` makes a
pytest test of every law. `check_draw` is `check_rule` for gradients that Hypothesis draws
(`jaxsgd.testing.strategies`).
"""

from jaxsgd.testing.laws import LAWS, Broken, check_laws, each_law, laws_broken
from jaxsgd.testing.walks import (
    GRADIENTS,
    SHAPES,
    Comparison,
    check_draw,
    check_rule,
    compare,
    draw_gradients,
    draw_params,
    loss_of,
    walk,
)

__all__ = [
    "GRADIENTS",
    "LAWS",
    "SHAPES",
    "Broken",
    "Comparison",
    "check_draw",
    "check_laws",
    "check_rule",
    "compare",
    "draw_gradients",
    "draw_params",
    "each_law",
    "laws_broken",
    "loss_of",
    "walk",
]
