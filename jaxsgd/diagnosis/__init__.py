"""Diagnoses of the history of a run.

- diagnose.py: `jaxsgd.diagnose`, in the words of verdict.py; knobs.py: the settings that its advice may name;
- history.py: the histories that people keep, read into arrays;
- loss_curve.py: noise, levels, spikes and oscillation of one curve; layers.py: the same question of single layers.
"""
