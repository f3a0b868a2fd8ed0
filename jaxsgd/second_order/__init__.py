"""Second order: Newton, Gauss-Newton and L-BFGS, as rules, as `minimize` and as `least_squares`."""

from jaxsgd.second_order.batch_loss import split_loss
from jaxsgd.second_order.minimizer import minimize
from jaxsgd.second_order.result import Result, Status
from jaxsgd.second_order.rules import gauss_newton, lbfgs, newton, newton_cg
from jaxsgd.second_order.squares import least_squares

__all__ = [
    "Result",
    "Status",
    "gauss_newton",
    "lbfgs",
    "least_squares",
    "minimize",
    "newton",
    "newton_cg",
    "split_loss",
]
