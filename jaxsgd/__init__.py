"""75 optimizers for JAX, with a train step and tools to tune, plan and checkpoint a run.

A family of rules lists its public names in its own ``__all__``, so that adding a rule touches one file.
`jaxsgd.plot`, `jaxsgd.checkpoint` and `jaxsgd.testing` are imported when they are first used.
"""

# ruff: noqa: F403, F405
import importlib as _importlib
from types import ModuleType as _ModuleType

from jaxsgd import torch
from jaxsgd import transforms as _transforms
from jaxsgd.applying import update_params
from jaxsgd.backward import LayerStep, make_layer_step
from jaxsgd.blockwise import fp8, int4, int8
from jaxsgd.curvature.sharpness import Sharpness, sharpness
from jaxsgd.description import describe
from jaxsgd.diagnosis.diagnose import Diagnosis, diagnose
from jaxsgd.ensemble.sweep import Sweep, sweep
from jaxsgd.migration import migrate
from jaxsgd.planning.plan import plan
from jaxsgd.rank_one import factored
from jaxsgd.record import Recorder
from jaxsgd.registry import RULES, TREE_RULES, Rule, rule, wrapper
from jaxsgd.rules import FAMILIES
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
from jaxsgd.second_order import (
    gauss_newton,
    lbfgs,
    least_squares,
    minimize,
    newton,
    newton_cg,
    split_loss,
)
from jaxsgd.sharding import assert_sharded, init_sharded, shard_batch, state_sharding
from jaxsgd.state import State, metrics, with_hyper
from jaxsgd.statistics import batch_statistics
from jaxsgd.storage import Storage, cast, plain
from jaxsgd.train import Step, check_donation, checked, make_step
from jaxsgd.train_state import TrainState
from jaxsgd.transforms import *
from jaxsgd.tuning.noise import NoiseScale, noise_scale, scale_learning_rate
from jaxsgd.tuning.pick import Pick, pick
from jaxsgd.tuning.probe import probe
from jaxsgd.tuning.probe_result import Probe
from jaxsgd.tuning.range_test import RangeTest, range_test

__version__ = "0.1.0"

_ON_DEMAND = ("checkpoint", "planning", "plot", "testing")


def __getattr__(name: str) -> _ModuleType:
    """A room that is imported when it is first used, since it needs an extra or takes long."""
    if name in _ON_DEMAND:
        return _importlib.import_module(f"jaxsgd.{name}")
    raise AttributeError(f"module 'jaxsgd' has no attribute {name!r}")


__all__ = [
    "RULES",
    "TREE_RULES",
    "Diagnosis",
    "LayerStep",
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
    "batch_statistics",
    "cast",
    "check_donation",
    "checked",
    "describe",
    "diagnose",
    "factored",
    "fp8",
    "gauss_newton",
    "init_sharded",
    "int4",
    "int8",
    "lbfgs",
    "least_squares",
    "make_layer_step",
    "make_step",
    "metrics",
    "migrate",
    "minimize",
    "newton",
    "newton_cg",
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
    "split_loss",
    "state_sharding",
    "sweep",
    "torch",
    "update_params",
    "with_hyper",
    "wrapper",
]
__all__ += [name for family in FAMILIES for name in family.__all__]
__all__ += _transforms.__all__
