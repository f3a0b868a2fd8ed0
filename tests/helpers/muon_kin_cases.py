"""What is recorded of others' NorMuon, AdaMuon and PSGD Kron, and how; imports torch and them only inside functions.

A case names a rule with its arguments, the optimizer of another package with those under which both are meant to be
the same formula, and what is changed in that package while it is recorded, all of it here:

- Newton-Schulz computes in float64, where pytorch-optimizer casts to bfloat16; so does kron_torch's triangular solve,
  which it casts to float32. Nothing is compiled.
- ``signs``: AdaMuon's Newton-Schulz is given the signs of the momentum, as in the paper; the package gives it as is.
- kron_torch's noise is that of `twins_psgd.noise`.
- ``apart``: what kron_torch fits its factors to is a copy; it adds the damping noise in place, to the momentum that is
  then the step.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
import unittest.mock
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import twins_psgd

from jaxsgd.testing import SHAPES, draw_gradients, draw_params

FOLDER = pathlib.Path(__file__).parents[1] / "data"
FILES = {"normuon": "muon_kin", "adamuon": "muon_kin", "kron": "psgd"}
VERSIONS = {"muon_kin": ("pytorch-optimizer", "4.1.0"), "psgd": ("kron-torch", "0.3.3")}
STEPS = 50
KEPT = (1, 2, 3, 5, 10, 25, 50)
MATRICES = {"bias": (7,), "tall": (5, 3), "wide": (3, 7), "square": (4, 4)}
"""Kernels (in, out) are recorded as torch's weights (out, in)."""

ARRAYS = {name: shape for name, shape in SHAPES.items() if shape} | {"square": (4, 4)}
"""Not the scalar: on one kron_torch fails."""


class Case(NamedTuple):
    """One rule against one package; see above. ``leaves``: which of the rule's arrays, all if empty."""

    rule: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    gradients: str = "normal"
    signs: bool = False
    apart: bool = False
    leaves: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        known = ARRAYS if self.rule == "kron" else MATRICES
        return {name: known[name] for name in self.leaves or known}


TINY = {"eps": 1e-30, "eps_nu": 1e-15, "adam_eps": 1e-10}
"""Where they add their eps differs from the papers; so small it makes no difference."""
NORMUON, ADAMUON = {"eps": 1e-15, "update_scale": "match_rms"}, {"eps": 1e-15, "weight_decay": 0.01}
FALLING = {"min_prob": 0.1, "decay": 0.1, "flat_start": 5}

CASES = {
    "normuon": Case("normuon", {"eps": 1e-15}, TINY),
    "normuon-dion": Case(
        "normuon", {"eps": 1e-15, "ns_coeffs": "quintic"}, TINY | {"ns_coeffs": "dion"}, leaves=("wide",)
    ),
    "normuon-rms": Case("normuon", NORMUON, TINY | {"consistent_rms": 0.2}),
    "normuon-heavy": Case("normuon", NORMUON, TINY | {"consistent_rms": 0.2}, "heavy"),
    "normuon-plain": Case(
        "normuon",
        {**NORMUON, "momentum": 0.8, "beta2": 0.9, "nesterov": False, "weight_decay": 0.1, "ns_steps": 3},
        {**TINY, "beta": 0.8, "beta2": 0.9, "nesterov": False, "weight_decay": 0.1, "ns_steps": 3,
         "consistent_rms": 0.2},
        leaves=("tall", "bias"),
    ),
    "adamuon": Case("adamuon", ADAMUON, TINY | {"beta": 0.9, "sign": False, "adam_b2": 0.999}, leaves=("wide",)),
    "adamuon-signs": Case("adamuon", ADAMUON, TINY | {"beta": 0.9, "adam_b2": 0.999}, signs=True),
    "adamuon-signs-heavy": Case("adamuon", ADAMUON, TINY | {"beta": 0.9, "adam_b2": 0.999}, "heavy", signs=True),
    "adamuon-decays": Case(
        "adamuon",
        {**ADAMUON, "betas": (0.95, 0.8), "weight_decay": 0.1},
        {**TINY, "beta": 0.95, "beta2": 0.8, "sign": False, "adam_b2": 0.999, "weight_decay": 0.1},
        leaves=("tall", "bias"),
    ),
    "kron": Case("kron", {}, {}, apart=True),
    "kron-heavy": Case("kron", {}, {}, "heavy", apart=True),
    "kron-gradients": Case(
        "kron",
        {"momentum_into_precond_update": False, "b1": 0.8, "weight_decay": 0.1},
        {"momentum_into_precond_update": False, "b1": 0.8, "weight_decay": 0.1},
        leaves=("vector", "matrix"),
    ),
    "kron-rate": Case(
        "kron",
        {"preconditioner_update_probability": 0.3, "precond_lr": 0.3, "precond_init_scale": 0.5},
        {"preconditioner_update_probability": 0.3, "precond_lr": 0.3, "precond_init_scale": 0.5},
        apart=True,
        leaves=("matrix",),
    ),
    "kron-falling": Case(
        "kron", {"preconditioner_update_probability": FALLING}, {"preconditioner_update_probability": FALLING},
        apart=True, leaves=("matrix",),
    ),
    **{
        f"kron-{mode}": Case(
            "kron", {"memory_save_mode": mode}, {"memory_save_mode": mode}, apart=True, leaves=("matrix", "square")
        )
        for mode in ("one_diag", "smart_one_diag", "all_diag")
    },
    "kron-triangular-vectors": Case(
        "kron", {"min_ndim_triangular": 1, "b1": 0.0}, {"min_ndim_triangular": 1, "b1": 0.0},
        apart=True, leaves=("vector",),
    ),
    "kron-long": Case(
        "kron", {"max_size_triangular": 4}, {"max_size_triangular": 4}, apart=True, leaves=("matrix",)
    ),
}  # fmt: skip


def problem(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Start and gradients in float64."""
    return draw_params(7, case.shapes), draw_gradients(case.gradients, 8, STEPS, case.shapes)


class Noise:
    """In place of torch.randn_like: the draw of this step for the next leaf."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes, self.step = shapes, 0

    def begin(self) -> None:
        self.step, self.leaves = self.step + 1, iter(self.shapes.items())

    def __call__(self, like: Any) -> Any:
        import torch

        name, shape = next(self.leaves)
        return torch.tensor(twins_psgd.noise(name, shape, self.step)).reshape(like.shape)


@contextlib.contextmanager
def _changed(case: Case, noise: Noise) -> Iterator[Any]:
    """The class to record, with what is changed of its package."""
    import torch

    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(unittest.mock.patch.object(*args))
        if case.rule == "kron":
            patch(torch, "compile", lambda f: f)
            from kron_torch import kron

            patch(torch, "randn_like", noise)
            patch(torch.Tensor, "float", torch.Tensor.double)
            fitted = kron._update_precond
            copied = lambda q, exprs, g, *rest: fitted(q, exprs, g.clone() if case.apart else g, *rest)
            patch(kron, "_update_precond", copied)
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield kron.Kron
            return
        import pytorch_optimizer

        module = sys.modules[
            {"normuon": pytorch_optimizer.NorMuon, "adamuon": pytorch_optimizer.AdaMuon}[case.rule].__module__
        ]
        whole = module.zero_power_via_newton_schulz_5
        seen = torch.sign if case.signs else lambda x: x
        patch(module, "zero_power_via_newton_schulz_5", lambda x, **given: whole(seen(x), **given, dtype=x.dtype))
        yield {"normuon": pytorch_optimizer.NorMuon, "adamuon": pytorch_optimizer.AdaMuon}[case.rule]


RATE = 0.05


def trajectory(name: str) -> dict[str, np.ndarray]:
    """Run the package now: the parameters after each of the KEPT steps, ``{"case/leaf": (len(KEPT), ...)}``."""
    import torch

    case = CASES[name]
    start, grads = problem(case)
    noise = Noise(case.shapes)
    turn = (lambda x: x.T.copy()) if case.rule != "kron" else (lambda x: x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _changed(case, noise) as cls:
            params = {leaf: torch.nn.Parameter(torch.tensor(turn(value))) for leaf, value in start.items()}
            given = dict(case.theirs)
            if case.rule == "kron":
                from kron_torch import precond_update_prob_schedule

                falling = given.get("preconditioner_update_probability")
                if isinstance(falling, dict):
                    given["preconditioner_update_probability"] = precond_update_prob_schedule(**falling)
                optimizer = cls(list(params.values()), lr=RATE, precond_dtype=torch.float64, **given)
            else:
                matrices, others = ([p for p in params.values() if (p.ndim > 1) == hidden] for hidden in (True, False))
                groups = [
                    {"params": matrices, "use_muon": True, "lr": RATE},
                    {"params": others, "use_muon": False, "lr": RATE, "eps": 1e-10},
                ]
                optimizer = cls(groups, **given, foreach=False)
            out = {leaf: [] for leaf in params}
            for step in range(STEPS):
                noise.begin()
                for leaf, p in params.items():
                    p.grad = torch.tensor(turn(grads[leaf][step]))
                optimizer.step()
                if step + 1 in KEPT:
                    for leaf, p in params.items():
                        out[leaf].append(turn(p.detach().numpy()).copy())
        return {f"{name}/{leaf}": np.stack(values) for leaf, values in out.items()}
    finally:
        torch.set_default_dtype(before)


def record() -> None:
    """Write the tests' files: ``PYTHONPATH=. python tests/helpers/muon_kin_cases.py``, with all packages."""
    from importlib.metadata import version

    for file, (package, wanted) in VERSIONS.items():
        assert version(package) == wanted, f"{package} {version(package)}: the tests speak of {wanted}"
        names = [name for name, case in CASES.items() if FILES[case.rule] == file]
        arrays = {key: value for name in names for key, value in trajectory(name).items()}
        np.savez_compressed(FOLDER / f"{file}_trajectories.npz", **arrays)
        print(f"{len(names)} cases of {package} {wanted} written to {file}_trajectories.npz")


if __name__ == "__main__":
    record()
