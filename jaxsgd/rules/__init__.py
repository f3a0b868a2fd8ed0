"""The update rules, a family a file. Importing this package fills `RULES`.

A family lists its public names in its own ``__all__``, so that adding a rule to one touches one file.
"""

import importlib
import pkgutil

from jaxsgd.registry import RULES

FAMILIES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
"""The modules that rules are written in."""

__all__ = ["FAMILIES", "RULES"]
