"""A learning rate you can trust: sweeps, probes, sharpness, noise scale, verdicts.

Floor 6.
"""
