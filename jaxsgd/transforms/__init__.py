"""Transformations of whole trees that optax lacks: clipping, a guard, accumulation, averages, measurements.

Floor 4. All are `optax.GradientTransformationExtraArgs`, take part in `optax.chain`, and keep a state whose
structure, shapes and dtypes never change, so that they can be scanned, vmapped and compiled once.
"""

from jaxsgd.transforms.accumulate import Accumulate, AccumulateState, accumulate, accumulate_gradients
from jaxsgd.transforms.clip import ClipState, clip_by_global_norm
from jaxsgd.transforms.ema import EmaState, ema
from jaxsgd.transforms.guard import GuardState, guard, guard_report, resume
from jaxsgd.transforms.mechanize import MechanizeState, mechanize
from jaxsgd.transforms.monitor import MonitorState, monitor, monitor_report
from jaxsgd.transforms.plateau import PlateauState, reduce_on_plateau
from jaxsgd.transforms.sam import SamState, normalize, sam

__all__ = [
    "Accumulate",
    "AccumulateState",
    "ClipState",
    "EmaState",
    "GuardState",
    "MechanizeState",
    "MonitorState",
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
    "reduce_on_plateau",
    "resume",
    "sam",
]
