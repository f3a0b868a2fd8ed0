"""Many runs of one train step from one compile.

- feed.py and losses.py: the user's batches and loss, in one form;
- population.py: the runs, on concrete.py, which lets Python code test a rate;
- divergence.py: when a finite loss has diverged;
- sweep.py: `jaxsgd.sweep`, with its result in sweep_result.py.
"""
