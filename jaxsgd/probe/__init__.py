"""A learning rate you can trust.

Each tool has a room, `jaxsgd` has their names:

- sweep.py: many values from one compile (swept.py), on population.py, which the next three train on too;
- probing.py: the suggestion, with range_test.py beside it, both on trainings.py;
- pick.py: which rule, from the trainings of race.py;
- sharpness.py: eigenvalues by lanczos.py, what a rule makes of them by stability.py, which asks the rule by asking.py;
- noise.py: the gradient's noise, and scaling.py: what follows from it;
- diagnose.py: what a history (history.py) shows, by curves.py and layers.py;
- losses.py and feed.py: the user's loss and batches, in one form; limits.py: when a finite loss has diverged.
"""

from jaxsgd.probe.diagnose import Diagnosis, diagnose
from jaxsgd.probe.noise import NoiseScale, noise_scale, scale_learning_rate
from jaxsgd.probe.pick import Pick, pick
from jaxsgd.probe.probing import Probe, probe
from jaxsgd.probe.range_test import RangeTest, range_test
from jaxsgd.probe.sharpness import Sharpness, sharpness
from jaxsgd.probe.sweep import Sweep, sweep

__all__ = [
    "Diagnosis",
    "NoiseScale",
    "Pick",
    "Probe",
    "RangeTest",
    "Sharpness",
    "Sweep",
    "diagnose",
    "noise_scale",
    "pick",
    "probe",
    "range_test",
    "scale_learning_rate",
    "sharpness",
    "sweep",
]
