"""The update rules, a family a file. Importing this package fills `RULES`."""

from jaxsgd.rule import RULES
from jaxsgd.rules import adaptive, averaging, momentum, sign, torch

__all__ = ["RULES", "adaptive", "averaging", "momentum", "sign", "torch"]
