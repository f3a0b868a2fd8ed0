"""Transformations of whole trees: clipping, a guard, accumulation, averages, measurements.

All are `optax.GradientTransformationExtraArgs` for `optax.chain`. The structure, shapes and dtypes of their states
never change, so that they can be scanned and vmapped, and compile once.
"""

from jaxsgd.transforms.accumulation import Accumulate, AccumulateState, accumulate, accumulate_gradients
from jaxsgd.transforms.averages import EmaState, ParamsEmaState, ema, params_ema
from jaxsgd.transforms.clip import GlobalNormState, clip_by_global_norm
from jaxsgd.transforms.guarding import GuardState, guard, guard_report, resume
from jaxsgd.transforms.mechanic import MechanizeState, mechanize
from jaxsgd.transforms.monitoring import LeafMonitorState, monitor, monitor_report
from jaxsgd.transforms.plateau import PlateauState, reduce_on_plateau
from jaxsgd.transforms.sharpness_aware import SamState, normalize, sam

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
