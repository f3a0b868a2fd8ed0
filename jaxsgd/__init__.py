"""jaxsgd: the optimization toolkit for JAX. Every update rule, one equation each, proven.

A family of rules lists its public names in its own ``__all__``, so that adding a rule touches one file.
`jaxsgd.plot` needs matplotlib and is imported on demand.
"""

# ruff: noqa: F403, F405
from jaxsgd import torch
from jaxsgd.lift import describe
from jaxsgd.rule import RULES, Rule, rule
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
    *RULES,
    "RULES",
    "Rule",
    "State",
    "Step",
    "Storage",
    "TrainState",
    "cast",
    "describe",
    "eval_params",
    "look_ahead",
    "make_step",
    "metrics",
    "plain",
    "rule",
    "schedule_free",
    "torch",
    "with_hyper",
]
