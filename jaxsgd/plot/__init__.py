"""Pictures: paths on landscapes, loss curves, memory, and what the tools for the learning rate found.

It needs matplotlib: install it with ``jaxsgd[plot]``. Every function returns a `matplotlib.figure.Figure` of
its own and leaves pyplot's global state alone; `save` writes one. The result of a tool draws itself: ``result.plot()``.
"""

from jaxsgd.plot.landscapes import LANDSCAPES, Landscape, path, paths
from jaxsgd.plot.rates import probe, range_test
from jaxsgd.plot.style import save
from jaxsgd.plot.tools import diagnosis, noise_scale, pick, sharpness, sweep
from jaxsgd.plot.training import loss_curves, memory_bars

__all__ = [
    "LANDSCAPES",
    "Landscape",
    "diagnosis",
    "loss_curves",
    "memory_bars",
    "noise_scale",
    "path",
    "paths",
    "pick",
    "probe",
    "range_test",
    "save",
    "sharpness",
    "sweep",
]
