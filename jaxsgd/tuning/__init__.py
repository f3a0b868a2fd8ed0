"""A learning rate you can trust, and what follows from it.

- probe.py: the suggestion, with range_test.py beside it, both on short_runs.py;
- pick.py: which rule to use, from the trials of race.py;
- noise.py: the gradient's noise, and scaling.py: batch sizes and learning rates that follow from it.
"""
