"""Second order: Newton, Gauss-Newton and L-BFGS, as rules, as `minimize` and as `least_squares`."""

from jaxsgd.second_order.minimizer import minimize
from jaxsgd.second_order.result import Result, Status

__all__ = ["Result", "Status", "minimize"]
