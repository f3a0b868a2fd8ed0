"""Transformations of whole trees: clipping, a guard, accumulation, averages, measurements.

All are `optax.GradientTransformationExtraArgs` for `optax.chain`. The structure, shapes and dtypes of their states
never change, so that they can be scanned and vmapped, and compile once.
"""

from jaxsgd.transforms.accumulate import Accumulate, AccumulateState, accumulate, accumulate_gradients
from jaxsgd.transforms.clip import GlobalNormState, clip_by_global_norm
from jaxsgd.transforms.ema import EmaState, ParamsEmaState, ema, params_ema
from jaxsgd.transforms.guard import GuardState, guard, guard_report, resume
from jaxsgd.transforms.mechanize import MechanizeState, mechanize
from jaxsgd.transforms.monitor import LeafMonitorState, monitor, monitor_report
from jaxsgd.transforms.plateau import PlateauState, reduce_on_plateau
from jaxsgd.transforms.sam import SamState, normalize, sam

__all__ = [
    "Accumulate",
    "AccumulateState",
    "EmaState",
    "GlobalNormState",
    "GuardState",
    "LeafMonitorState",
    "MechanizeState",
    "ParamsEmaState",
    "PlateauState",
    "SamState",
    "accumulate",
    "accumulate_gradients",
    "clip_by_global_norm",
    "ema",
    "guard",
    "guard_report",
    "mechanize",
    "monitor",
    "monitor_report",
    "normalize",
    "params_ema",
    "reduce_on_plateau",
    "resume",
    "sam",
]
