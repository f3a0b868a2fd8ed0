"""What is recorded of torch.optim, and how to record it; imports torch only inside functions."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxsgd.testing import SHAPES, draw_gradients, draw_params

DATA = pathlib.Path(__file__).parents[1] / "data" / "torch_trajectories.npz"
STEPS = 50
KEPT = (1, 2, 3, 5, 10, 25, 26, 27, 40, 50)
MATRICES = {"tall": (5, 3), "wide": (3, 7)}
"""The leaves of Muon, which takes matrices only."""
DROP_AT, DROP_TO = 25, 0.1
"""Cases marked "drop" multiply the learning rate by DROP_TO from step DROP_AT (0-based) on."""
DISTRIBUTIONS = ("normal", "sparse", "heavy", "constant")
"""Kinds of `jaxsgd.testing.draw_gradients`; the cases named in EVERYWHERE are recorded under each."""


class Case(NamedTuple):
    """One run of torch. ``gradients``: a kind of DISTRIBUTIONS, or "mixed", those of `problem`.

    torch's Muon orthogonalises in bfloat16, which no other program rounds alike. It is recorded without that
    rounding, so that everything else of it can be compared closely, and as it is where ``as_it_is``.
    """

    cls: str
    kwargs: dict[str, Any]
    drop: bool = False
    gradients: str = "mixed"
    as_it_is: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return MATRICES if self.cls == "Muon" else dict(SHAPES)


_SETTINGS: dict[str, tuple] = {
    "sgd": ("SGD", {}, False),
    "sgd-momentum": ("SGD", {"momentum": 0.9, "lr": 0.1}, True),
    "sgd-dampening": ("SGD", {"momentum": 0.9, "dampening": 0.5, "lr": 0.1}, False),
    "sgd-nesterov": ("SGD", {"momentum": 0.8, "nesterov": True, "lr": 0.1, "weight_decay": 0.01}, True),
    "sgd-maximize": ("SGD", {"momentum": 0.9, "maximize": True, "weight_decay": 0.1}, False),
    "adam": ("Adam", {}, False),
    "adam-drop": ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}, True),
    "adam-l2": ("Adam", {"lr": 0.01, "weight_decay": 0.1}, False),
    "adam-decoupled": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}, False),
    "adam-amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.9)}, True),
    "adam-maximize": ("Adam", {"maximize": True, "weight_decay": 0.1}, False),
    "adamw": ("AdamW", {}, False),
    "adamw-drop": ("AdamW", {"lr": 0.01, "weight_decay": 0.2}, True),
    "adamw-amsgrad": ("AdamW", {"amsgrad": True, "betas": (0.9, 0.9)}, False),
    "nadam": ("NAdam", {}, False),
    "nadam-drop": ("NAdam", {"lr": 0.01, "momentum_decay": 0.1, "weight_decay": 0.1}, True),
    "nadam-decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, False),
    "adamax": ("Adamax", {}, False),
    "adamax-drop": ("Adamax", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}, True),
    "rmsprop": ("RMSprop", {}, False),
    "rmsprop-momentum": ("RMSprop", {"momentum": 0.9, "alpha": 0.9}, True),
    "rmsprop-centered": ("RMSprop", {"centered": True, "weight_decay": 0.1}, False),
    "rmsprop-centered-momentum": ("RMSprop", {"centered": True, "momentum": 0.5}, True),
    "adagrad": ("Adagrad", {}, False),
    "adagrad-decay": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}, False),
    "adagrad-start": ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}, True),
    "adadelta": ("Adadelta", {}, False),
    "radam": ("RAdam", {}, False),
    "radam-drop": ("RAdam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, True),
    "radam-decoupled": ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, False),
    "asgd": ("ASGD", {}, False),
    "asgd-drop": ("ASGD", {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 10, "weight_decay": 0.1}, True),
    "adadelta-drop": ("Adadelta", {"lr": 2.0, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1}, True),
    "sgd-dampening-drop": (
        "SGD",
        {"momentum": 0.9, "dampening": 0.3, "lr": 0.1, "weight_decay": 0.1, "maximize": True},
        True,
    ),
    "sgd-nesterov-maximize": ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}, True),
    "adam-amsgrad-l2": ("Adam", {"amsgrad": True, "betas": (0.9, 0.9), "weight_decay": 0.1, "maximize": True}, True),
    "adamw-maximize": ("AdamW", {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}, True),
    "adamw-amsgrad-drop": ("AdamW", {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.9), "maximize": True}, True),
    "nadam-maximize": (
        "NAdam",
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        True,
    ),
    "nadam-decoupled-drop": (
        "NAdam",
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        True,
    ),
    "adamax-maximize": ("Adamax", {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}, True),
    "rmsprop-all": (
        "RMSprop",
        {"centered": True, "momentum": 0.9, "alpha": 0.9, "weight_decay": 0.1, "maximize": True},
        True,
    ),
    "rmsprop-maximize": ("RMSprop", {"lr": 0.05, "eps": 1e-4, "weight_decay": 0.1, "maximize": True}, True),
    "adagrad-maximize": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}, True),
    "adadelta-maximize": ("Adadelta", {"weight_decay": 0.1, "maximize": True}, True),
    "radam-maximize": ("RAdam", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": True}, True),
    "radam-decoupled-drop": (
        "RAdam",
        {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        True,
    ),
    "asgd-maximize": ("ASGD", {"lr": 0.1, "t0": 10, "weight_decay": 0.1, "maximize": True}, True),
    "rprop": ("Rprop", {}, False),
    "rprop-drop": ("Rprop", {"lr": 0.1, "etas": (0.7, 1.5), "step_sizes": (0.02, 0.2)}, True),
    "rprop-maximize": ("Rprop", {"lr": 1e-3, "step_sizes": (0.01, 50), "maximize": True}, True),
    "adafactor": ("Adafactor", {}, False),
    "adafactor-drop": ("Adafactor", {"lr": 0.5, "beta2_decay": -0.5, "d": 1.2, "weight_decay": 0.1}, True),
    "adafactor-eps": ("Adafactor", {"eps": (0.5, 1.5), "lr": 0.1}, True),
    "adafactor-maximize": ("Adafactor", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}, True),
    "muon": ("Muon", {}, False),
    "muon-drop": ("Muon", {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.3}, True),
    "muon-plain": ("Muon", {"lr": 0.02, "nesterov": False, "momentum": 0.9, "ns_steps": 3, "weight_decay": 0.0}, True),
    "muon-rms": ("Muon", {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}, True),
    "muon-eps": (
        "Muon",
        {"lr": 0.02, "eps": 2.0, "ns_coefficients": (1.875, -1.25, 0.375), "adjust_lr_fn": "original"},
        True,
    ),
    "sparse-adam": ("SparseAdam", {}, False),
    "sparse-adam-drop": ("SparseAdam", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4}, True, "sparse"),
    "sparse-adam-maximize": ("SparseAdam", {"lr": 0.05, "maximize": True}, True, "sparse"),
    "muon-bfloat16": ("Muon", {"lr": 0.02}, True, "mixed", True),
}
CASES = {_name: Case(*_settings) for _name, _settings in _SETTINGS.items()}

EVERYWHERE = (
    "sgd", "sgd-nesterov", "adam", "adam-amsgrad", "adamw", "nadam", "adamax", "rmsprop", "rmsprop-centered-momentum",
    "adagrad", "adadelta", "radam", "asgd", "rprop", "adafactor", "muon", "sparse-adam", "muon-bfloat16",
)  # fmt: skip
for _name in EVERYWHERE:
    CASES |= {f"{_name}@{kind}": CASES[_name]._replace(gradients=kind) for kind in DISTRIBUTIONS}


def problem(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Start and gradients in float64. "mixed" is noise with a drift and a few exact zeros."""
    if case.gradients != "mixed":
        return draw_params(7, case.shapes), draw_gradients(case.gradients, 8, STEPS, case.shapes)
    rng = np.random.RandomState(7)  # the legacy stream is frozen, so the file and the tests agree for good
    params = {name: rng.standard_normal(shape) for name, shape in case.shapes.items()}
    grads = {name: rng.standard_normal((STEPS, *shape)) + 0.3 for name, shape in case.shapes.items()}
    for g in grads.values():
        g[rng.uniform(size=g.shape) < 0.05] = 0.0
    return params, grads


def _rows(g: Any) -> Any:
    """A sparse tensor of the rows that are not all zero, as an embedding's gradient has the rows looked up."""
    import torch

    if g.ndim == 0:
        return g.to_sparse()
    touched = (g != 0).reshape(len(g), -1).any(1).nonzero().T
    return torch.sparse_coo_tensor(touched, g[touched[0]], g.shape, check_invariants=True)


@contextlib.contextmanager
def _float64(as_it_is: bool) -> Iterator[None]:
    """Within it torch makes float64 arrays, and casts to bfloat16 are copies instead unless ``as_it_is``."""
    import torch

    before, cast = torch.get_default_dtype(), torch.Tensor.bfloat16
    torch.set_default_dtype(torch.float64)
    if not as_it_is:
        torch.Tensor.bfloat16 = lambda x: x.clone()
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = cast
        torch.set_default_dtype(before)


def trajectory(name: str) -> dict[str, np.ndarray]:
    """Run torch now: the parameters after each of the KEPT steps, ``{"case/leaf": (len(KEPT), ...)}``."""
    import torch

    case = CASES[name]
    with _float64(case.as_it_is):
        start, grads = problem(case)
        params = {leaf: torch.nn.Parameter(torch.tensor(value)) for leaf, value in start.items()}
        optimizer = getattr(torch.optim, case.cls)(list(params.values()), **case.kwargs)
        out = {leaf: [] for leaf in params}
        for step in range(STEPS):
            if case.drop and step == DROP_AT:
                for group in optimizer.param_groups:
                    group["lr"] *= DROP_TO
            for leaf, p in params.items():
                g = torch.tensor(grads[leaf][step])
                p.grad = _rows(g) if case.cls == "SparseAdam" else g
            optimizer.step()
            if step + 1 in KEPT:
                for leaf, p in params.items():
                    out[leaf].append(p.detach().numpy().copy())
        return {f"{name}/{leaf}": np.stack(values) for leaf, values in out.items()}


def record() -> None:
    """Write the tests' file: ``PYTHONPATH=. python tests/helpers/torch_cases.py``, with torch installed."""
    import torch

    arrays = {key: value for case in CASES for key, value in trajectory(case).items()}
    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, torch_version=np.array(torch.__version__), **arrays)
    print(f"{len(CASES)} cases of torch {torch.__version__} written to {DATA.name}")


if __name__ == "__main__":
    record()
