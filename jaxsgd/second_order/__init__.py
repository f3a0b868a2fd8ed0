"""Second order: Newton, Gauss-Newton and L-BFGS, as rules, as `minimize` and as `least_squares`."""
