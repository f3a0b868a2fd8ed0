"""What is recorded of torch.optim, and how to record it; imports torch only inside `trajectory`."""

from __future__ import annotations

import pathlib

import numpy as np

DATA = pathlib.Path(__file__).parent / "data" / "torch_trajectories.npz"
STEPS = 50
KEPT = (1, 2, 3, 5, 10, 25, 26, 27, 40, 50)
SHAPES = {"scalar": (), "vector": (7,), "matrix": (5, 3), "cube": (4, 3, 2)}
DROP_AT, DROP_TO = 25, 0.1
"""Cases marked "drop" multiply the learning rate by DROP_TO from step DROP_AT (0-based) on."""

CASES: dict[str, tuple[str, dict, bool]] = {
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
}


def problem() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Start and gradients in float64, the same in every case: noise with a drift and a few exact zeros."""
    rng = np.random.RandomState(7)  # the legacy stream is frozen, so the file and the tests agree for good
    params = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    grads = {name: rng.standard_normal((STEPS, *shape)) + 0.3 for name, shape in SHAPES.items()}
    for g in grads.values():
        g[rng.uniform(size=g.shape) < 0.05] = 0.0
    return params, grads


def trajectory(case: str) -> dict[str, np.ndarray]:
    """Run torch now: the parameters after each of the KEPT steps, ``{"case/leaf": (len(KEPT), ...)}``."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        cls, kwargs, drop = CASES[case]
        start, grads = problem()
        params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
        optimizer = getattr(torch.optim, cls)(list(params.values()), **kwargs)
        out = {name: [] for name in SHAPES}
        for step in range(STEPS):
            if drop and step == DROP_AT:
                for group in optimizer.param_groups:
                    group["lr"] *= DROP_TO
            for name, p in params.items():
                p.grad = torch.tensor(grads[name][step])
            optimizer.step()
            if step + 1 in KEPT:
                for name, p in params.items():
                    out[name].append(p.detach().numpy().copy())
        return {f"{case}/{name}": np.stack(values) for name, values in out.items()}
    finally:
        torch.set_default_dtype(before)


def record() -> None:
    """Write the file that the tests read: ``python tests/torch_cases.py`` where torch is installed."""
    import torch

    arrays = {key: value for case in CASES for key, value in trajectory(case).items()}
    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, torch_version=np.array(torch.__version__), **arrays)
    print(f"{len(CASES)} cases of torch {torch.__version__} written to {DATA.name}")


if __name__ == "__main__":
    record()
