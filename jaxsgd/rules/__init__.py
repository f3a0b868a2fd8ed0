"""The update rules, a family a file. Importing this package fills `RULES`."""

from jaxsgd.rule import RULES
from jaxsgd.rules import (
    adam_variants,
    adaptive,
    adaptive_lr,
    averaging,
    curvature,
    factored,
    layerwise,
    lowrank,
    matrix,
    momentum,
    muon_kin,
    psgd,
    sign,
    torch,
    wrappers,
)

__all__ = [
    "RULES",
    "matrix",
    "adaptive_lr",
    "factored",
    "layerwise",
    "lowrank",
    "adam_variants",
    "adaptive",
    "averaging",
    "momentum",
    "curvature",
    "muon_kin",
    "psgd",
    "sign",
    "torch",
    "wrappers",
]
