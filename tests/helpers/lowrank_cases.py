"""What is recorded of galore-torch, apollo-torch and adam-mini, and how; imports them only inside `trajectory`.

All in float64. Two things are set that their authors leave to chance or to float32: the singular vectors are those of
the gradient in its own precision, and the random projections are drawn from NumPy's frozen stream.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np

DATA = pathlib.Path(__file__).parents[1] / "data" / "lowrank_trajectories.npz"
STEPS, RATE, RANK = 50, 0.01, 2
KEPT = (1, 2, 3, 5, 8, 10, 25, 40, 50)

MATRICES = {"tall": (6, 4), "wide": (3, 5), "square": (4, 4), "vector": (7,)}
"""Shapes as torch has them, (out, in)."""

HEAD_DIM = 4
TRANSFORMER = {
    "embed_tokens.weight": (11, 8), "layers.0.attn.q_proj.weight": (8, 8), "layers.0.attn.k_proj.weight": (4, 8),
    "layers.0.attn.v_proj.weight": (4, 8), "layers.0.attn.o_proj.weight": (8, 8), "layers.0.mlp.up.weight": (16, 8),
    "layers.0.mlp.up.bias": (16,), "layers.0.input_norm.weight": (8,), "lm_head.weight": (11, 8),
}  # fmt: skip
"""Two query heads that share one key and value."""

CASES: dict[str, tuple[str, dict, dict]] = {
    "galore": ("galore", {"eps": 0.0}, {"update_proj_gap": 1000, "scale": 0.25}),
    "galore-uncorrected": ("galore", {"correct_bias": False}, {"update_proj_gap": 1000, "scale": 0.25}),
    "galore-anew": ("galore", {"eps": 0.0, "betas": (0.0, 0.9)}, {"update_proj_gap": 5, "scale": 1.0}),
    "apollo": ("apollo", {}, {"update_proj_gap": 7, "scale": 1.0, "scale_type": "channel"}),
    "apollo-whole": ("apollo", {"betas": (0.8, 0.95)}, {"update_proj_gap": 1000, "scale": 4.0, "scale_type": "tensor"}),
    "apollo-unlimited": (
        "apollo", {"disable_nl": True}, {"update_proj_gap": 7, "scale": 1.0, "scale_type": "channel"},
    ),
    "apollo-once": ("apollo", {}, {"update_proj_gap": 1000, "scale": 1.0, "scale_type": "channel"}),
    "mini": ("mini", {}, {}),
    "mini-decay": ("mini", {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}, {}),
}  # fmt: skip
"""Case -> package, arguments of the optimizer, and what is told of each matrix."""


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    return TRANSFORMER if CASES[case][0] == "mini" else MATRICES


def problem(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Start and gradients, the same in every case of one set of shapes."""
    rng = np.random.RandomState(11)  # the legacy stream is frozen, so the file and the tests agree for good
    params = {name: rng.standard_normal(shape) for name, shape in shapes(case).items()}
    return params, {name: rng.standard_normal((STEPS, *shape)) + 0.3 for name, shape in shapes(case).items()}


def normal(name: str, shape: tuple[int, ...], interval: int) -> np.ndarray:
    """The random matrix of a leaf between two draws."""
    return np.random.RandomState(1000 * list(MATRICES).index(name) + interval).standard_normal(shape)


@contextlib.contextmanager
def prepared(package: str) -> Iterator[None]:
    """The package with its projections set, and its progress reports unheard."""
    import torch

    def basis(self, weights, rank, type):
        u, _, vh = torch.linalg.svd(weights, full_matrices=False)
        return vh[:rank] if type == "right" else u[:, :rank]

    def drawn(shape, seed, **_):
        return torch.tensor(normal(list(MATRICES)[seed % 1000 - 1], tuple(shape), seed // 1000))

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        from unittest.mock import patch

        if package == "galore":
            stack.enter_context(patch("galore_torch.galore_projector.GaLoreProjector.get_orthogonal_matrix", basis))
        if package == "apollo":
            stack.enter_context(patch("apollo_torch.random_projector.stable_randn", drawn))
            stack.enter_context(patch("apollo_torch.random_projector.next_seed", lambda seed: seed + 1000))
        yield


def trajectory(case: str) -> dict[str, np.ndarray]:
    """Run the package now: the parameters after each of the KEPT steps, ``{"case/leaf": (len(KEPT), ...)}``."""
    import torch

    package, kwargs, told = CASES[case]
    start, grads = problem(case)
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    with prepared(package):
        if package == "mini":
            from adam_mini import Adam_mini

            sizes = {"dim": 8, "n_heads": 2, "n_kv_heads": 1}
            optimizer = Adam_mini(list(params.items()), lr=RATE, verbose=False, **sizes, **kwargs)
        else:
            from apollo_torch import APOLLOAdamW
            from galore_torch import GaLoreAdamW

            about = {"rank": RANK, "proj_type": "std", **({"proj": "random"} if package == "apollo" else {}), **told}
            groups = [{"params": [p], **(about if p.ndim == 2 else {})} for p in params.values()]
            make = APOLLOAdamW if package == "apollo" else GaLoreAdamW
            optimizer = make(groups, lr=RATE, no_deprecation_warning=True, **kwargs)
        out = {name: [] for name in params}
        for step in range(STEPS):
            for name, p in params.items():
                p.grad = torch.tensor(grads[name][step])
            optimizer.step()
            if step + 1 in KEPT:
                for name, p in params.items():
                    out[name].append(p.detach().numpy().copy())
    return {f"{case}/{name}": np.stack(values) for name, values in out.items()}


def record() -> None:
    """Write the tests' file: ``python tests/helpers/lowrank_cases.py`` where the three packages are installed."""
    from importlib.metadata import version

    arrays = {key: value for case in CASES for key, value in trajectory(case).items()}
    packages = {name: version(name) for name in ("torch", "galore-torch", "apollo-torch", "adam-mini")}
    np.savez_compressed(DATA, versions=np.array([f"{k} {v}" for k, v in packages.items()]), **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{len(CASES)} cases of {packages} written to {DATA.name}")


if __name__ == "__main__":
    record()
