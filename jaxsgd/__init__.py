"""jaxsgd: the optimization toolkit for JAX. Every update rule, one equation each, proven.

A family of rules lists its public names in its own ``__all__``, so that adding a rule touches one file.
`jaxsgd.plot` needs matplotlib and is imported on demand.
"""

# ruff: noqa: F403, F405
from jaxsgd import torch
from jaxsgd import transforms as _transforms
from jaxsgd.lift import describe
from jaxsgd.migration import migrate
from jaxsgd.plan import plan
from jaxsgd.probe import (
    Diagnosis,
    NoiseScale,
    Pick,
    Probe,
    RangeTest,
    Sharpness,
    Sweep,
    diagnose,
    noise_scale,
    pick,
    probe,
    range_test,
    scale_learning_rate,
    sharpness,
    sweep,
)
from jaxsgd.record import Recorder
from jaxsgd.rule import RULES, Rule, rule
from jaxsgd.rules import adam_variants as _adam_variants
from jaxsgd.rules import adaptive as _adaptive
from jaxsgd.rules import adaptive_lr as _adaptive_lr
from jaxsgd.rules import averaging as _averaging
from jaxsgd.rules import curvature as _curvature
from jaxsgd.rules import factored as _factored
from jaxsgd.rules import layerwise as _layerwise
from jaxsgd.rules import lowrank as _lowrank
from jaxsgd.rules import matrix as _matrix
from jaxsgd.rules import momentum as _momentum
from jaxsgd.rules import muon_kin as _muon_kin
from jaxsgd.rules import psgd as _psgd
from jaxsgd.rules import sign as _sign
from jaxsgd.rules import torch as _torch
from jaxsgd.rules import wrappers as _wrappers
from jaxsgd.rules.adam_variants import *
from jaxsgd.rules.adaptive import *
from jaxsgd.rules.adaptive_lr import *
from jaxsgd.rules.averaging import *
from jaxsgd.rules.curvature import *
from jaxsgd.rules.factored import *
from jaxsgd.rules.layerwise import *
from jaxsgd.rules.lowrank import *
from jaxsgd.rules.matrix import *
from jaxsgd.rules.momentum import *
from jaxsgd.rules.muon_kin import *
from jaxsgd.rules.psgd import *
from jaxsgd.rules.sign import *
from jaxsgd.rules.torch import *
from jaxsgd.rules.wrappers import *
from jaxsgd.sharding import assert_sharded, init_sharded, shard_batch, state_sharding
from jaxsgd.state import State, metrics, with_hyper
from jaxsgd.storage import Storage, cast, int8, plain
from jaxsgd.train import Step, check_donation, checked, make_step
from jaxsgd.train_state import TrainState
from jaxsgd.transforms import *

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "Diagnosis",
    "NoiseScale",
    "Pick",
    "Probe",
    "RangeTest",
    "Recorder",
    "Rule",
    "Sharpness",
    "State",
    "Step",
    "Storage",
    "Sweep",
    "TrainState",
    "assert_sharded",
    "cast",
    "check_donation",
    "checked",
    "describe",
    "diagnose",
    "init_sharded",
    "int8",
    "make_step",
    "metrics",
    "migrate",
    "noise_scale",
    "pick",
    "plain",
    "plan",
    "probe",
    "range_test",
    "rule",
    "scale_learning_rate",
    "shard_batch",
    "sharpness",
    "state_sharding",
    "sweep",
    "torch",
    "with_hyper",
]
__all__ += _adam_variants.__all__
__all__ += _layerwise.__all__
__all__ += _lowrank.__all__
__all__ += _factored.__all__
__all__ += _adaptive_lr.__all__
__all__ += _matrix.__all__
__all__ += _adaptive.__all__
__all__ += _averaging.__all__
__all__ += _momentum.__all__
__all__ += _curvature.__all__
__all__ += _muon_kin.__all__
__all__ += _psgd.__all__
__all__ += _sign.__all__
__all__ += _torch.__all__
__all__ += _wrappers.__all__
__all__ += _transforms.__all__
