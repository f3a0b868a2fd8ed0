"""The curvature of a loss, and the learning rates that it allows.

- sharpness.py: `jaxsgd.sharpness`, with eigenvalues by lanczos.py;
- linear_response.py: what a rule makes of a small gradient, read off its answers (rule_response.py).
"""
