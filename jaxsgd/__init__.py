"""jaxsgd: the optimization toolkit for JAX. Every update rule, one equation each, proven.

A family of rules lists its public names in its own ``__all__``, so that adding a rule touches one file.
`jaxsgd.plot` needs matplotlib and is imported on demand.
"""

# ruff: noqa: F403, F405
from jaxsgd import torch
from jaxsgd.lift import describe
from jaxsgd.rule import RULES, Rule, rule
from jaxsgd.rules import adaptive as _adaptive
from jaxsgd.rules import averaging as _averaging
from jaxsgd.rules import momentum as _momentum
from jaxsgd.rules import sign as _sign
from jaxsgd.rules import torch as _torch
from jaxsgd.rules.adaptive import *
from jaxsgd.rules.averaging import *
from jaxsgd.rules.momentum import *
from jaxsgd.rules.sign import *
from jaxsgd.rules.torch import *
from jaxsgd.state import State, metrics, with_hyper
from jaxsgd.storage import Storage, cast, plain
from jaxsgd.train import Step, TrainState, make_step

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "Rule",
    "State",
    "Step",
    "Storage",
    "TrainState",
    "cast",
    "describe",
    "make_step",
    "metrics",
    "plain",
    "rule",
    "torch",
    "with_hyper",
]
__all__ += _adaptive.__all__
__all__ += _averaging.__all__
__all__ += _momentum.__all__
__all__ += _sign.__all__
__all__ += _torch.__all__
