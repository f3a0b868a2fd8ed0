"""References and exceptions of the rules in matrix, muon_kin, psgd and lowrank."""

from __future__ import annotations

import jax
import optax
from case import Case


def _last_two(params):
    """The default of `muon` for leaves without names, as optax's dimension numbers."""
    return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(-2, -1) if p.ndim > 1 else None, params)


def _optax_on_last_two(
    learning_rate, ns_steps=5, beta=0.95, eps=1e-8, weight_decay=0.0, nesterov=True, adam_b1=0.9, adam_b2=0.999,
    adam_eps_root=0.0, consistent_rms=None,
):  # fmt: skip
    """optax told to batch over leading axes; not ``adaptive``, where it takes one dual norm for a whole batch."""
    return optax.contrib.muon(muon_weight_dimension_numbers=_last_two, **locals())


LOW_RANK = {"rank": 2, "update_proj_gap": 7, "side": "short"}
APOLLO = {"rank": 2, "update_proj_gap": 7, "scale_type": "tensor", "growth": 1.5, "key": 1}

CASES = {
    # matrix
    "muon": Case(oracle=_optax_on_last_two, alternatives={"adam_eps": 0.01}),
    "optax_muon": Case(oracle=optax.contrib.muon, like="muon"),
    "muon_jordan": Case(like="muon"),
    "soap": Case(alternatives={"max_precond_dim": 4, "shampoo_beta": 0.5}),
    "shampoo": Case(alternatives={"max_precond_dim": 4, "precondition_frequency": 3, "eps": 1e-2}),
    # muon_kin
    "normuon": Case(alternatives={"adam_eps": 0.01}),
    "adamuon": Case(alternatives={"adam_eps": 0.01}),
    "dion": Case(
        needs={"key": {"rank_fraction": 0.5}}, alternatives={"adam_eps": 0.01, "key": 1, "rank_fraction": 0.5}
    ),
    # psgd
    "kron": Case(
        alternatives={"max_size_triangular": 4, "key": 1, "memory_save_mode": "one_diag"},
        exceptions={"complex": "the noise is drawn on the axes, it does not turn with the gradient"},
    ),
    # lowrank; optax's galore takes its projector in float32
    "galore": Case(oracle=None, alternatives=LOW_RANK),
    "apollo": Case(needs={"update_proj_gap": {"rank": 2}, "key": {"rank": 2}}, alternatives=APOLLO),
    "apollo_mini": Case(alternatives=APOLLO | {"scale_type": "channel"}),
}
