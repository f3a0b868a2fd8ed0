"""What is recorded of the authors' own packages, and how; imports torch and them only inside functions.

A case names one rule of jaxsgd with its arguments, and one optimizer of another package with the arguments under
which both are meant to be the same formula. Each is walked for 50 steps in float64 over four kinds of gradients on
four shapes; the file keeps the parameters after the steps in KEPT.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

DATA = pathlib.Path(__file__).parents[1] / "data" / "authors_trajectories.npz"
STEPS = 50
KEPT = (1, 2, 3, 6, 10, 12, 26, 50)
SHAPES = {"scalar": (), "vector": (7,), "matrix": (5, 3), "cube": (4, 3, 2)}
ALL, MATRIX = tuple(SHAPES), ("matrix",)
NOT_CUBE, NOT_SCALAR = ("scalar", "vector", "matrix"), ("vector", "matrix", "cube")

GRADIENTS: dict[str, Callable[[np.random.RandomState, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape) + 0.2,
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.uniform(size=shape) < 0.3),
    "heavy": lambda rng, shape: np.clip(rng.standard_cauchy(shape), -1e4, 1e4),
    "constant": lambda rng, shape: np.broadcast_to(rng.standard_normal(shape[1:]), shape).copy(),
}
"""The draws of `jaxsgd.testing`, here without JAX; a test holds them equal."""

VERSIONS = {
    "schedulefree": "1.4.1", "prodigyopt": "1.1.2", "lion-pytorch": "0.2.5", "pytorch-optimizer": "4.1.0",
    "muon-optimizer": "0.1.0", "dowg": "0.3.1", "heavyball": "3.2.1", "galore-torch": "1.0", "adam-mini": "1.1.1",
    "apollo-torch": "1.0.3", "kron-torch": "0.3.3",
}  # fmt: skip
MODULES = {"muon-optimizer": "muon"}
"""Where the module's name is not the package's with underscores."""


class Case(NamedTuple):
    """One rule against one package.

    Attributes:
      rule: a name in `jaxsgd.RULES`, or a wrapper's with the rule inside: ``"grokfast(sgd)"``.
      package: the name on PyPI, a key of `VERSIONS`.
      theirs: the optimizer's class, or a name in `BUILDERS`.
      given: its arguments.
      ours: the rule's arguments.
      leaves: the shapes of the tree that both can take.
      turned: how our axes become theirs: "swap" the last two, "reverse" all of them, or None.
      kinds: of gradients, keys of `GRADIENTS`.
      wide: read float32 as float64 while recording, because the package casts to it; "casts": the casts only.
    """

    rule: str
    package: str
    theirs: str
    given: dict[str, Any]
    ours: dict[str, Any]
    leaves: tuple[str, ...] = ALL
    turned: str | None = None
    wide: bool | str = False
    kinds: tuple[str, ...] = ("normal", "sparse", "heavy", "constant")


PO, HB = "pytorch-optimizer", "heavyball"
BETAS = {"betas": (0.8, 0.95)}
B = {"b1": 0.8, "b2": 0.95}
DECAY = {"weight_decay": 0.1}
DECOUPLED = {"weight_decay": 0.1, "weight_decouple": True}
TINY = 1e-300
"""Stands for an epsilon of 0, where 0 itself would make 0/0."""
SLOWED = {"warmup_steps": 8, "r": 0.5, "weight_lr_power": 1.5, **DECAY}
SCALARS_PLAIN = [("scalar|vector", {"trust_ratio_mask": False})]

CASES: dict[str, Case] = {
    # -- schedulefree: the parameters in train mode are y; what eval() gives is kept beside them.
    "schedule_free_sgd": Case(
        "schedule_free_sgd", "schedulefree", "SGDScheduleFree", {"lr": 0.3, "momentum": 0.8, **SLOWED},
        {"learning_rate": 0.3, "b1": 0.8, **SLOWED}),
    "schedule_free_sgd-default": Case("schedule_free_sgd", "schedulefree", "SGDScheduleFree", {}, {}),
    "schedule_free_sgd-reference": Case(
        "schedule_free_sgd", "schedulefree", "SGDScheduleFreeReference", {"lr": 0.3, "momentum": 0.8, **SLOWED},
        {"learning_rate": 0.3, "b1": 0.8, **SLOWED}),
    "schedule_free_adamw": Case(
        "schedule_free_adamw", "schedulefree", "AdamWScheduleFree", {"lr": 0.05, "eps": 1e-4, **BETAS, **SLOWED},
        {"learning_rate": 0.05, "eps": 1e-4, **B, **SLOWED}),
    "schedule_free_adamw-default": Case("schedule_free_adamw", "schedulefree", "AdamWScheduleFree", {}, {}),
    "schedule_free_adamw-closure": Case(
        "schedule_free_adamw", "schedulefree", "closure:AdamWScheduleFreeClosure", {"lr": 0.05, **BETAS, **SLOWED},
        {"learning_rate": 0.05, **B, **SLOWED}),
    "schedule_free_radam": Case("schedule_free_radam", "schedulefree", "RAdamScheduleFree", {}, {}),
    "schedule_free_radam-sgd": Case(
        "schedule_free_radam", "schedulefree", "RAdamScheduleFree",
        {"lr": 0.05, "betas": (0.7, 0.95), "eps": 1e-4, "r": 1.0, "weight_lr_power": 1.0, "silent_sgd_phase": False,
         **DECAY},
        {"learning_rate": 0.05, "b1": 0.7, "b2": 0.95, "eps": 1e-4, "r": 1.0, "weight_lr_power": 1.0,
         "silent_sgd_phase": False, **DECAY}),
    "schedule_free_radam-never": Case(  # so short a memory never ends the silent phase, and nothing moves
        "schedule_free_radam", "schedulefree", "RAdamScheduleFree", {"betas": (0.9, 0.5)}, {"b2": 0.5}),
    "schedule_free_sgd-wrapper": Case(  # it swaps bytes of what has an axis
        "schedule_free_sgd", "schedulefree", "wrapper:SGD",
        {"base": {"lr": 0.1, "momentum": 0.5}, "momentum": 0.8, "r": 0.5, "weight_decay_at_y": 0.1},
        {"learning_rate": 0.1, "momentum": 0.5, "b1": 0.8, "r": 0.5, **DECAY}, NOT_SCALAR),
    # -- prodigyopt
    "prodigy": Case("prodigy", "prodigyopt", "Prodigy", {"use_bias_correction": True}, {}),
    "prodigy-all": Case(
        "prodigy", "prodigyopt", "Prodigy",
        {"lr": 0.5, **BETAS, "beta3": 0.9, "eps": 1e-3, "d0": 0.01, "d_coef": 3.0,
         "use_bias_correction": True, **DECAY},
        {"learning_rate": 0.5, "betas": (0.8, 0.95), "beta3": 0.9, "eps": 1e-3, "estim_lr0": 0.01,
         "estim_lr_coef": 3.0, **DECAY}),
    "prodigy-safeguard": Case(
        "prodigy", "prodigyopt", "Prodigy", {"d0": 1e-3, "safeguard_warmup": True, "use_bias_correction": True},
        {"estim_lr0": 1e-3, "safeguard_warmup": True}),
    "prodigy-default": Case("prodigy", "prodigyopt", "Prodigy", {}, {"bias_correction": False}),
    # -- lion-pytorch
    "lion": Case("lion", "lion-pytorch", "Lion", {"lr": 0.01, **BETAS, **DECAY}, {"learning_rate": 0.01, **B, **DECAY}),
    "lion-decoupled": Case(  # its decay is not multiplied by the learning rate
        "lion", "lion-pytorch", "Lion", {"lr": 0.01, "weight_decay": 0.005, "decoupled_weight_decay": True},
        {"learning_rate": 0.01, "weight_decay": 0.5}),
    "cautious-lion": Case(
        "cautious(lion)", "lion-pytorch", "cautious_lion.Lion", {"lr": 0.01, **DECAY},
        {"learning_rate": 0.01, **DECAY}),
    "cautious_decay-lion": Case(
        "cautious_decay(lion)", "lion-pytorch", "cautious_lion.Lion",
        {"lr": 0.01, "cautious_factor": 1.0, "cautious_wd": True, **DECAY}, {"learning_rate": 0.01, **DECAY},
        wide=True, kinds=("normal", "heavy", "constant")),
    "cautious_decay-lion-zeros": Case(
        "cautious_decay(lion)", "lion-pytorch", "cautious_lion.Lion",
        {"lr": 0.01, "cautious_factor": 1.0, "cautious_wd": True, **DECAY}, {"learning_rate": 0.01, **DECAY},
        wide=True, kinds=("sparse",)),
    # -- muon-optimizer
    "muon_jordan": Case(
        "muon_jordan", "muon-optimizer", "muon:SingleDeviceMuonWithAuxAdam", {}, {}, turned="swap", wide=True),
    # -- dowg: it works only with a closure, and starts from 1 - eps
    "dowg": Case(
        "dowg", "dowg", "loss:ScalarDoWG", {"eps": 0.75, "clip": float("inf")}, {"eps": 0.25}, NOT_SCALAR),
    "dowg-clip": Case("dowg", "dowg", "loss:ScalarDoWG", {"eps": 0.75}, {"eps": 0.25}, NOT_SCALAR,
                      kinds=("sparse", "heavy")),
    # -- galore-torch and apollo-torch; what is no matrix goes to Adam, the stack of the cube too
    "galore": Case(
        "galore", "galore-torch", "lowrank:adamw.AdamW", {"lr": 0.01, "eps": TINY, "matrices": {
            "rank": 2, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}},
        {"learning_rate": 0.01, "eps": TINY, "rank": 2, "scale": 0.25, "side": "short"}, wide=True),
    "galore-renewed": Case(
        "galore", "galore-torch", "lowrank:adamw.AdamW", {"lr": 0.01, "eps": TINY, **BETAS, "matrices": {
            "rank": 1, "update_proj_gap": 7, "scale": 0.25, "proj_type": "std"}},
        {"learning_rate": 0.01, "eps": TINY, "rank": 1, "update_proj_gap": 7, "scale": 0.25, "side": "short", **B},
        wide=True, kinds=("constant",)),  # the moments outlive a basis, whose signs are the solver's
    "apollo": Case(
        "apollo", "apollo-torch", "lowrank:apollo.AdamW", {"lr": 0.01, "eps": 1e-3, **BETAS, "matrices": {
            "rank": 3, "update_proj_gap": 5, "scale": 4.0, "scale_type": "channel", "proj": "random",
            "proj_type": "std"}},
        {"learning_rate": 0.01, "eps": 1e-3, "rank": 3, "scale": 4.0, **B}, NOT_CUBE),
    "apollo-mini": Case(
        "apollo_mini", "apollo-torch", "lowrank:apollo.AdamW", {"lr": 0.01, "eps": 1e-3, "matrices": {
            "rank": 3, "update_proj_gap": 5, "scale": 4.0, "scale_type": "tensor", "proj": "random",
            "proj_type": "std"}},
        {"learning_rate": 0.01, "eps": 1e-3, "rank": 3, "scale": 4.0}, NOT_CUBE),
    # -- adam-mini: a matrix of an MLP has a block for each output, a name it does not know is one block
    "adam_mini": Case(
        "adam_mini", "adam-mini", "named:Adam_mini", {"lr": 0.01, "eps": 1e-4, **BETAS, **DECAY, "verbose": False},
        {"learning_rate": 0.01, "eps": 1e-4, **B, **DECAY}, NOT_CUBE, "swap", wide=True),
    # -- kron-torch: it would fit to noise of its own; here that is `noise`, in both
    "kron": Case(
        "kron", "kron-torch", "kron:Kron", {"lr": 0.01, "momentum_into_precond_update": False},
        {"learning_rate": 0.01, "momentum_into_precond_update": False}, leaves=NOT_SCALAR, wide="casts",
        kinds=("normal", "heavy", "constant")),
    "kron-all": Case(
        "kron", "kron-torch", "kron:Kron",
        {"lr": 0.01, "b1": 0.8, "max_size_triangular": 5, "precond_lr": 0.3, "precond_init_scale": 2.0,
         "momentum_into_precond_update": False, "preconditioner_update_probability": 0.4},
        {"learning_rate": 0.01, "b1": 0.8, "max_size_triangular": 5, "precond_lr": 0.3, "precond_init_scale": 2.0,
         "momentum_into_precond_update": False, "preconditioner_update_probability": 0.4},
        leaves=NOT_SCALAR, wide="casts", kinds=("normal", "heavy", "constant")),
    "kron-default": Case("kron", "kron-torch", "kron:Kron", {}, {}, leaves=NOT_SCALAR, wide="casts",
                         kinds=("normal", "heavy", "constant")),
    "kron-zeros": Case(
        "kron", "kron-torch", "kron:Kron", {"momentum_into_precond_update": False},
        {"momentum_into_precond_update": False}, leaves=NOT_SCALAR, wide="casts", kinds=("sparse",)),
    # -- heavyball: its epsilon is the least denominator, ours is added to it
    "hb-adamw": Case(
        "adamw", HB, "heavyball:AdamW", {"lr": 0.01, "eps": TINY, **BETAS, **DECAY},
        {"learning_rate": 0.01, "eps": TINY, **B, **DECAY}),
    "hb-adamw-eps": Case(
        "adamw", HB, "heavyball:AdamW", {"lr": 0.01, "eps": 1e-3}, {"learning_rate": 0.01, "eps": 1e-3, "b2": 0.99}),
    "hb-nadam": Case(
        "torch_nadam", HB, "heavyball:NAdam", {"lr": 0.01, "eps": TINY, **BETAS},
        {"learning_rate": 0.01, "eps": TINY, **B}),
    "hb-rmsprop": Case(
        "rmsprop", HB, "heavyball:RMSprop", {"lr": 0.01, "eps": TINY, **BETAS},
        {"learning_rate": 0.01, "eps": TINY, "decay": 0.95, "bias_correction": True}),
    "hb-ademamix": Case(
        "ademamix", HB, "heavyball:AdEMAMix", {"lr": 0.01, "eps": TINY, "betas": (0.8, 0.95, 0.99), "alpha": 2.0},
        {"learning_rate": 0.01, "eps": TINY, "b3": 0.99, "alpha": 2.0, **B}),
    "hb-adopt": Case(
        "adopt", HB, "heavyball:ADOPT", {"lr": 0.01, "eps": 1e-6, **BETAS},
        {"learning_rate": 0.01, "use_clipping": False, **B}),
    "hb-schedule_free_adamw": Case(
        "schedule_free_adamw", HB, "heavyball:SFAdamW", {"lr": 0.05, "eps": TINY, "r": 0.5, **BETAS, **DECAY},
        {"learning_rate": 0.05, "eps": TINY, "r": 0.5, **B, **DECAY}),
    "hb-sgd": Case(
        "sgd", HB, "heavyball:SGD", {"lr": 0.05, "beta": 0.8, **DECAY},
        {"learning_rate": 0.05, "momentum": 0.8, **DECAY}),
    "hb-muon": Case(
        "muon_jordan", HB, "heavyball:Muon", {"lr": 0.05, "betas": (0.8, 0.9), "nesterov": False, **DECAY},
        {"learning_rate": 0.05, "beta": 0.8, "eps": TINY, "nesterov": False, "ns_coeffs": "dion", **DECAY},
        MATRIX, "swap", wide=True),
    "hb-muon-nesterov": Case(
        "muon_jordan", HB, "heavyball:Muon", {"lr": 0.05, "betas": (0.8, 0.9)},
        {"learning_rate": 0.05, "beta": 0.8, "eps": TINY, "ns_coeffs": "dion"}, MATRIX, "swap", wide=True),
    # -- pytorch-optimizer
    "po-adam_mini": Case(  # one block for each name that it does not know
        "adam_mini", PO, "model:AdamMini", {"lr": 0.01, "eps": 1e-4, **BETAS, **DECAY},
        {"learning_rate": 0.01, "eps": 1e-4, "blocks": [("matrix|cube", "all")], **B, **DECAY}, wide=True),
    "po-adabelief": Case(
        "adabelief", PO, "AdaBelief", {"lr": 0.01, "eps": 1e-10, **BETAS, **DECOUPLED},
        {"learning_rate": 0.01, "eps": 1e-10, "eps_root": 1e-10, **B, **DECAY}),
    "po-adadelta": Case(
        "adadelta", PO, "AdaDelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-4, **DECAY},
        {"learning_rate": 0.5, "rho": 0.8, "eps": 1e-4, **DECAY}),
    "po-adafactor": Case(
        "adafactor", PO, "AdaFactor", {"lr": 0.05, "betas": (0.9, 0.999), "relative_step": False},
        {"learning_rate": 0.05, "momentum": 0.9, "min_dim_size_to_factor": 2}, turned="reverse"),
    "po-adafactor-decay": Case(
        "adafactor", PO, "AdaFactor",
        {"lr": 0.05, "betas": (None, 0.999), "relative_step": False, "scale_parameter": False, "decay_rate": -0.6,
         "clip_threshold": 0.5, **DECOUPLED},
        {"learning_rate": 0.05, "min_dim_size_to_factor": 2, "multiply_by_parameter_scale": False, "decay_rate": 0.6,
         "clipping_threshold": 0.5, **DECAY}, turned="reverse"),
    "po-adalomo": Case(
        "adalomo", PO, "lomo:AdaLOMO", {"lr": 0.02, **DECAY}, {"learning_rate": 0.02, **DECAY},
        leaves=("vector", "matrix"), wide=True),
    "po-adamax": Case(
        "adamaxw", PO, "AdaMax", {"lr": 0.01, "eps": 1e-3, **BETAS, **DECOUPLED},
        {"learning_rate": 0.01, "eps": 1e-3, **B, **DECAY}),
    "po-adan-half": Case(
        "adan", PO, "Adan", {"lr": 0.01, "betas": (0.9, 0.5, 0.95), **DECOUPLED},
        {"learning_rate": 0.01, "b1": 0.9, "b2": 0.5, "b3": 0.95, "eps_root": 0.0, **DECAY}),
    "po-adan": Case("adan", PO, "Adan", {"lr": 0.01}, {"learning_rate": 0.01, "eps_root": 0.0}),
    "po-ademamix": Case(
        "ademamix", PO, "AdEMAMix", {"lr": 0.01, "betas": (0.8, 0.95, 0.99), "alpha": 2.0, **DECOUPLED},
        {"learning_rate": 0.01, "b3": 0.99, "alpha": 2.0, **B, **DECAY}),
    "po-simplified_ademamix-b2=0": Case(  # an average where ours is a sum: alpha and the learning rate take 1 - b1
        "simplified_ademamix", PO, "SimplifiedAdEMAMix",
        {"lr": 0.05, "betas": (0.8, 0.0), "alpha": 0.1, "eps": 0.1, "weight_decay": 0.02},
        {"learning_rate": 0.01, "b1": 0.8, "b2": 0.0, "alpha": 0.5, "eps": 0.1, **DECAY}, wide=True),
    "po-simplified_ademamix": Case(
        "simplified_ademamix", PO, "SimplifiedAdEMAMix", {"lr": 0.05, **BETAS}, {"learning_rate": 0.01, **B}),
    "po-adopt": Case(
        "adopt", PO, "ADOPT", {"lr": 0.01, **BETAS, "clip_lambda": lambda step: (step - 1) ** 0.25, **DECOUPLED},
        {"learning_rate": 0.01, **B, **DECAY}),
    "po-adopt-default": Case("adopt", PO, "ADOPT", {"lr": 0.01}, {"learning_rate": 0.01}),
    "po-dadapt": Case(
        "dadapt_adamw", PO, "DAdaptAdam", {"lr": 0.5, "d0": 0.01, "bias_correction": True, **BETAS, **DECOUPLED},
        {"learning_rate": 0.5, "estim_lr0": 0.01, "betas": (0.8, 0.95), **DECAY}),
    "po-fromage": Case("fromage", PO, "Fromage", {"lr": 0.05}, {"learning_rate": 0.05}),
    "po-galore": Case(
        "galore", PO, "lowrank:GaLore", {"lr": 0.01, "eps": TINY, "matrices": {
            "rank": 2, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}},
        {"learning_rate": 0.01, "eps": TINY, "rank": 2, "scale": 0.25, "side": "short"}, wide=True),
    "po-grams": Case(
        "grams", PO, "Grams", {"lr": 0.01, "eps": 1e-6, **BETAS, **DECOUPLED},
        {"learning_rate": 0.01, "eps": 1e-6, **B, **DECAY}),
    "po-lamb": Case(
        "lamb", PO, "Lamb", {"lr": 0.01, "eps": TINY, "adam_debias": True, **BETAS},
        {"learning_rate": 0.01, "eps": TINY, **B}),
    "po-lamb-default": Case("lamb", PO, "Lamb", {}, {"learning_rate": 1e-3}),
    "po-lars": Case(
        "lars", PO, "LARS", {"lr": 0.5, "momentum": 0.8, "trust_coefficient": 0.01, "nesterov": True},
        {"learning_rate": 0.5, "momentum": 0.8, "trust_coefficient": 0.01, "nesterov": True, "groups": SCALARS_PLAIN}),
    "po-lars-decay": Case(
        "lars", PO, "LARS", {"lr": 0.5, **DECAY}, {"learning_rate": 0.5, **DECAY}, leaves=("matrix", "cube")),
    "po-lion": Case("lion", PO, "Lion", {"lr": 0.01, **BETAS, **DECOUPLED}, {"learning_rate": 0.01, **B, **DECAY}),
    "po-madgrad": Case(
        "madgrad", PO, "MADGRAD", {"lr": 0.01, "momentum": 0.8, **DECAY},
        {"learning_rate": 0.01, "momentum": 0.8, **DECAY}),
    "po-mars": Case(
        "mars", PO, "mars:MARS", {"lr": 0.01, "optimize_1d": True, "gamma": 0.05, "eps": TINY, **BETAS, **DECOUPLED},
        {"learning_rate": 0.01, "gamma": 0.05, "eps": TINY, **B, **DECAY}),
    "po-mars-default": Case("mars", PO, "MARS", {"optimize_1d": True}, {"learning_rate": 3e-3}),
    "po-muon": Case(
        "muon_jordan", PO, "muon:Muon", {"lr": 0.05, "momentum": 0.8, "adamw_lr": 0.01},
        {"learning_rate": 0.05, "beta": 0.8, "eps": TINY, "adam_learning_rate": 0.01, "adam_eps": 1e-10},
        leaves=NOT_CUBE, turned="swap", wide=True),
    "po-normuon": Case(
        "normuon", PO, "muon:NorMuon", {"lr": 0.05, "eps": TINY, "adamw_lr": 0.01, "update_scale": "match_rms"},
        {"learning_rate": 0.05, "eps": TINY, "eps_nu": TINY, "adam_learning_rate": 0.01, "consistent_rms": 0.2},
        NOT_CUBE, "swap", wide=True),
    "po-adamuon": Case(  # the norm of the step is given, so that it matters not that v is corrected
        "adamuon", PO, "muon:AdaMuon", {"lr": 0.05, "betas": (0.8, 0.9), "eps": TINY, "adamw_lr": 0.01},
        {"learning_rate": 0.05, "beta": 0.8, "beta2": 0.9, "sign": False, "eps": TINY, "eps_nu": TINY,
         "adam_learning_rate": 0.01, "adam_b2": 0.999, "adam_eps": TINY, "weight_decay": 0.0},
        NOT_CUBE, "swap", wide=True),
    "po-novograd": Case(
        "novograd", PO, "NovoGrad", {"lr": 0.01, "eps": 1e-3, **BETAS, **DECAY},
        {"learning_rate": 0.01, "eps": 1e-3, **B, **DECAY}),
    "po-polyak": Case(
        "polyak_sgd", PO, "loss:AliG", {"max_lr": 0.2}, {"max_learning_rate": 0.2, "eps": 1e-6}, wide=True),
    "po-prodigy": Case(
        "prodigy", PO, "Prodigy", {"d0": 0.01, "d_coef": 0.5, "bias_correction": True, **BETAS, **DECOUPLED},
        {"estim_lr0": 0.01, "estim_lr_coef": 0.5, "betas": (0.8, 0.95), **DECAY}),
    "po-radam": Case(
        "radam", PO, "RAdam", {"lr": 0.01, "eps": TINY, "degenerated_to_sgd": True, **BETAS, **DECOUPLED},
        {"learning_rate": 0.01, "eps": TINY, **B, **DECAY}),
    "po-torch_radam": Case(
        "torch_radam", PO, "RAdam", {"lr": 0.01, "eps": 1e-3, "degenerated_to_sgd": True, **BETAS, **DECOUPLED},
        {"learning_rate": 0.01, "eps": 1e-3, **B, **DECAY}),
    "po-schedule_free_sgd": Case(
        "schedule_free_sgd", PO, "ScheduleFreeSGD", {"lr": 0.3, "momentum": 0.8, **SLOWED},
        {"learning_rate": 0.3, "b1": 0.8, **SLOWED}),
    "po-schedule_free_adamw": Case(  # it adds 1e-15 under the root
        "schedule_free_adamw", PO, "ScheduleFreeAdamW", {"lr": 0.05, "eps": 1e-4, **BETAS, **SLOWED},
        {"learning_rate": 0.05, "eps": 1e-4, "eps_root": 1e-15, **B, **SLOWED}),
    "po-schedule_free_radam": Case(
        "schedule_free_radam", PO, "ScheduleFreeRAdam", {"lr": 0.05, "eps": 1e-4, "r": 0.5, **BETAS, **DECAY},
        {"learning_rate": 0.05, "eps": 1e-4, "r": 0.5, **B, **DECAY}),
    "po-sgd": Case(
        "sgd", PO, "SGDW", {"lr": 0.1, "momentum": 0.8, "nesterov": True, **DECOUPLED},
        {"learning_rate": 0.1, "momentum": 0.8, "nesterov": True, **DECAY}),
    "po-torch_sgd": Case(
        "torch_sgd", PO, "SGDW", {"lr": 0.1, "momentum": 0.8, "dampening": 0.5, **DECOUPLED},
        {"learning_rate": 0.1, "momentum": 0.8, "dampening": 0.5, **DECAY}),
    "po-sign_sgd": Case("sign_sgd", PO, "SignSGD", {"momentum": 0.0}, {"learning_rate": 1e-3}),
    "po-signum": Case(
        "signum", PO, "SignSGD", {"lr": 0.01, "momentum": 0.8, **DECOUPLED},
        {"learning_rate": 0.01, "beta": 0.8, **DECAY}),
    "po-shampoo": Case(
        "shampoo", PO, "Shampoo", {"lr": 0.1, "matrix_eps": 1e-4}, {"learning_rate": 0.1, "graft": False}, MATRIX),
    "po-sm3": Case(
        "sm3", PO, "SM3", {"lr": 0.1, "momentum": 0.8, "eps": 1e-8}, {"learning_rate": 0.1, "momentum": 0.8}),
    "po-sophia-b1=0": Case(  # given the square of the gradient before, since ours divides by the average as it was
        "sophia", PO, "hessian:SophiaH", {"lr": 0.01, "betas": (0.0, 0.9), "p": 0.5, "eps": 1e-3, **DECOUPLED},
        {"learning_rate": 0.01, "b1": 0.0, "b2": 0.9, "gamma": 1.0, "clip_threshold": 0.5, "eps": 1e-3,
         "update_interval": 1, **DECAY}),
    "po-sophia": Case(
        "sophia", PO, "hessian:SophiaH", {"lr": 0.01, "betas": (0.8, 0.9), "p": 0.5, "eps": 1e-3},
        {"learning_rate": 0.01, "b1": 0.8, "b2": 0.9, "gamma": 1.0, "clip_threshold": 0.5, "eps": 1e-3,
         "update_interval": 1, "weight_decay": 0.0}),
    "po-soap-one-side": Case(
        "soap", PO, "SOAP", {"lr": 0.01, "max_precondition_dim": 4, "precondition_frequency": 3},
        {"learning_rate": 0.01, "max_precond_dim": 4, "precondition_frequency": 3}, NOT_CUBE, wide=True),
    "po-soap": Case("soap", PO, "SOAP", {"lr": 0.01}, {"learning_rate": 0.01}, NOT_CUBE, wide=True),
    "po-yogi": Case(
        "yogi", PO, "Yogi", {"lr": 0.01, "initial_accumulator": 0.01, **BETAS, **DECOUPLED},
        {"learning_rate": 0.01, "initial_accumulator_value": 0.01, "initial_mean": 0.01, **B, **DECAY}),
    "po-lookahead": Case(
        "lookahead(sgd)", PO, "lookahead:SGDW", {"base": {"lr": 0.1, "momentum": 0.8}, "k": 4, "alpha": 0.3},
        {"learning_rate": 0.1, "momentum": 0.8, "sync_period": 4, "slow_step_size": 0.3}),
    "po-centralized": Case(
        "centralized(sgd)", PO, "filter:centralize_gradient", {"lr": 0.1}, {"learning_rate": 0.1}, turned="reverse"),
    "po-adaptive_clip": Case(
        "adaptive_clip(sgd)", PO, "filter:agc", {"lr": 0.1, "agc_clip_val": 0.1},
        {"learning_rate": 0.1, "clipping": 0.1}, NOT_CUBE, "reverse"),
    "po-grokfast": Case(
        "grokfast(sgd)", PO, "filter:gradfilter_ema", {"lr": 0.1, "alpha": 0.9, "lamb": 1.0},
        {"learning_rate": 0.1, "alpha": 0.9, "lamb": 1.0}),
    "po-cautious": Case("cautious(lion)", PO, "Lion", {"lr": 0.01, "cautious": True}, {"learning_rate": 0.01}),
}  # fmt: skip

EXCEPTIONS: dict[str, tuple[str, int, float]] = {
    "cautious_decay-lion-zeros": (
        "It does not decay where the step is 0 (u x > 0); ours does, with the paper's u x >= 0.", 1, 8e-03),
    "dowg-clip": (
        "By default it clips each coordinate of the gradient to 0.5 within the step, which the paper does not.", 1, 2),
    "kron-default": (
        "The noise that damps the fit is added in place and so enters the step; ours fits with it and steps without.",
        1, 2e-05),
    "kron-zeros": ("It fits preconditioners to a gradient of zeros too; ours leaves them.", 26, 5e-04),
    "hb-adamw-eps": ("Its denominator is max(root, eps); ours is root + eps, as the paper's.", 1, 2e-02),
    "hb-adopt": (
        "It corrects the bias of both averages; the paper starts v at the square of the first gradient.", 2, 0.6),
    "hb-muon-nesterov": ("Its look-ahead is g + m; that of Jordan is (1 - beta) g + beta m.", 2, 0.1),
    "po-simplified_ademamix": (
        "It divides by the root of the bias correction where v calls for a product: steps are 1 / (1 - b2^t) as long.",
        1, 0.8),
    "po-adopt-default": (
        "It clips the n-th scaled gradient at (n + 1)^(1/4); the paper, optax and ours at n^(1/4).", 2, 3e-03),
    "po-lamb-default": (
        "It corrects the mean's bias after the trust ratio: the first steps are 1 / (1 - b1^t) as long.", 1, 3e-02),
    "po-lars-decay": (
        "Its trust ratio adds up norms, as the paper does; ours takes that of the gradient with its decay, as optax.",
        1, 2e-02),
    "po-mars-default": ("It adds 1e-15 under the root, and eps before the bias correction.", 1, 3e-07),
    "po-sophia": ("It does not correct the bias of the mean, as its authors do not; ours does, as optax's.", 2, 4e-03),
    "po-soap": (
        "A gradient of rank 3 leaves two directions of the 5 x 5 factor to the eigensolver; ours takes fixed ones.",
        2, 1e-02),
    "po-cautious": (
        "It scales what is left by n / (kept + 1); the paper, lion-pytorch and ours by n / kept.", 1, 0.1),
}  # fmt: skip
"""Case -> why the two part, the first of the KEPT steps at which they do, and how far (the order of magnitude)."""

NOT_COMPARED: dict[tuple[str, str], str] = {
    ("schedule_free", "schedulefree"): (
        "Its wrapper keeps z in the base's own state: only a base that does not look at it first, such as SGD, can "
        "run, and no scalar."),
    ("prodigy", "prodigyopt"): "Of its arguments growth_rate, slice_p and decouple=False are none of ours.",
    ("dowg", "dowg"): "Scalars raise; its other class, by coordinates, is another rule.",
    ("kron", "kron-torch"): "Scalars raise.",
    ("kron", PO): "It does not damp the fit, and a tensor of three axes has three factors.",
    ("kron", HB): "It does not run in float64.",
    ("apollo", "apollo-torch"): "Its projections are of torch's generator; all but they are compared.",
    ("apollo", PO): "Its projections are of torch's generator.",
    ("adam_mini", "adam-mini"): "It takes no tensor of three axes.",
    ("muon_jordan", PO): "A tensor of three axes is one matrix there, a batch of them in ours.",
    ("muon_jordan", HB): "A vector is not orthogonalised, and not handed to Adam either.",
    ("normuon", PO): "A tensor of three axes is one matrix there, a batch of them in ours.",
    ("adamuon", PO): "A tensor of three axes is one matrix there, a batch of them in ours.",
    ("adalomo", PO): "Scalars and tensors of three axes raise.",
    ("shampoo", PO): "A vector has a full factor there, Adagrad in ours; a tensor of three axes has three.",
    ("soap", PO): "A tensor of three axes has three bases there; in ours it is a batch.",
    ("soap", HB): "It lifts the null space of a factor by 1e-8 of its size and keeps the columns' order.",
    ("adaptive_clip(sgd)", PO): "Of a tensor of three axes it takes norms along the middle one only.",
}  # fmt: skip
"""(Rule, package) -> what is left out of the comparison, and why."""


def problem(kind: str, leaves: tuple[str, ...] = ALL) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Start and gradients in float64, those of `jaxsgd.testing` for the seeds 0 and 1."""
    of_params, of_grads = np.random.RandomState(0), np.random.RandomState(1)
    params = {name: of_params.standard_normal(shape) for name, shape in SHAPES.items()}
    grads = {name: np.asarray(GRADIENTS[kind](of_grads, (STEPS, *shape))) for name, shape in SHAPES.items()}
    return {name: params[name] for name in leaves}, {name: grads[name] for name in leaves}


def turn(x: np.ndarray, how: str | None) -> np.ndarray:
    """From our layout to theirs and back: each way is its own inverse."""
    if x.ndim < 2 or how is None:
        return x
    return np.ascontiguousarray(x.T if how == "reverse" else np.swapaxes(x, -1, -2))


@contextlib.contextmanager
def _in_float64(wide: bool | str) -> Any:
    """float64 by default; where ``wide``, float32 means float64 too and the casts to narrower dtypes do nothing."""
    import torch

    before, narrow = torch.get_default_dtype(), torch.float32
    casts = {name: getattr(torch.Tensor, name) for name in ("float", "bfloat16")}
    torch.set_default_dtype(torch.float64)
    try:
        if wide is True:
            torch.float32 = torch.float64
        for name in casts if wide else ():
            setattr(torch.Tensor, name, torch.Tensor.double)
        yield
    finally:
        torch.float32 = narrow
        for name, cast in casts.items():
            setattr(torch.Tensor, name, cast)
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _defaults(functions: list[Any], **values: Any) -> Any:
    """Other defaults of functions for a while, of parameters that their callers never pass."""
    before = [fn.__defaults__ for fn in functions]
    for fn in functions:
        known = fn.__code__.co_varnames[: fn.__code__.co_argcount][-len(fn.__defaults__) :]
        fn.__defaults__ = tuple(values.get(n, d) for n, d in zip(known, fn.__defaults__, strict=True))
    try:
        yield
    finally:
        for fn, defaults in zip(functions, before, strict=True):
            fn.__defaults__ = defaults


Step = Callable[[dict[str, Any]], None]


def _plain(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """The usual: a class of the parameters and arguments, and a step."""
    for part in name.split("."):
        module = importlib.import_module(f"{module.__name__}.{part}") if part.islower() else getattr(module, part)
    optimizer = module(params.get("groups", list(params.values())), **case.given)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer, lambda _: optimizer.step()


def _loss(params: dict[str, Any]) -> Any:
    """The loss that `jaxsgd.testing` hands to rules that ask for it."""
    return 2 + sum((p.detach() ** 2).mean() for p in params.values())


def _with_loss(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    optimizer, _ = _plain(case, module, name, params)
    return optimizer, lambda _: optimizer.step(lambda: float(_loss(params)))


def _with_closure(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """The closure puts the gradients, at the point to which the optimizer has moved the parameters."""
    optimizer, _ = _plain(case, module, name, params)

    def step(grads: dict[str, Any]) -> None:
        def closure() -> float:
            for name, p in params.items():
                p.grad = grads[name].clone()
            return 0.0

        optimizer.step(closure)

    return optimizer, step


def _wrapped(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """An optimizer around one of torch.optim."""
    import torch

    given = dict(case.given)
    base = getattr(torch.optim, name)(list(params.values()), **given.pop("base"))
    optimizer = module.ScheduleFreeWrapper(base, **given)
    optimizer.train()
    return optimizer, lambda _: optimizer.step()


def _lookahead(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    given = dict(case.given)
    optimizer = module.Lookahead(getattr(module, name)(list(params.values()), **given.pop("base")), **given)
    return optimizer, lambda _: optimizer.step()


def _filtered(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """What changes gradients, before plain SGD."""
    import torch

    given = dict(case.given)
    optimizer = torch.optim.SGD(list(params.values()), lr=given.pop("lr"))
    model, held = torch.nn.ParameterDict(params), {}
    homes = {"agc": "agc", "centralize_gradient": "gradient_centralization", "gradfilter_ema": "grokfast"}
    change = getattr(importlib.import_module(f"{module.__name__}.optimizer.{homes[name]}"), name)

    def step(_: dict[str, Any]) -> None:
        if name == "gradfilter_ema":
            held["slow"] = change(model, held.get("slow"), **given)
        for p in params.values() if name != "gradfilter_ema" else ():
            changed = change(p.detach(), p.grad, **given) if name == "agc" else change(p.grad, **given)
            p.grad = p.grad if changed is None else changed  # some work in place
        optimizer.step()

    return optimizer, step


def _muon(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """Matrices to Muon, all others to Adam. Newton-Schulz is asked for bfloat16; `_in_float64` takes that away."""
    groups = [
        {"params": [p for p in params.values() if (p.ndim > 1) == hidden], "use_muon": hidden}
        for hidden in (True, False)
    ]
    optimizer = getattr(module, name)(groups, **case.given)
    return optimizer, lambda _: optimizer.step()


def _adalomo(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """It steps within the backward pass, so the gradients are those of a linear loss."""
    import torch

    optimizer = getattr(module, name)(torch.nn.ParameterDict(params), loss_scale=None, **case.given)

    def step(grads: dict[str, Any]) -> None:
        for p in params.values():
            p.grad = None
        with torch.enable_grad():
            loss = sum((p * grads[name]).sum() for name, p in params.items())
            optimizer.fused_backward(loss, case.given["lr"])

    return optimizer, step


def _heavyball(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """Without its compiler, and with its state in float64."""
    module.utils.compile_mode = module.utils.compile_mode_recommended_to_none = None
    optimizer = getattr(module, name)(list(params.values()), storage_dtype="float64", **case.given)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer, lambda _: optimizer.step()


def _low_rank(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """Matrices in a group of their own, with a rank. APOLLO draws its projections; here they are the identity."""
    import torch

    given = dict(case.given)
    low = given.pop("matrices")
    rest = {"params": [p for p in params.values() if p.ndim != 2]}
    groups = [{"params": [p for p in params.values() if p.ndim == 2], **low}, rest]
    optimizer, step = _plain(case._replace(given=given), module, name, {"groups": groups})
    if case.package == "apollo-torch":
        drawn = importlib.import_module("apollo_torch.random_projector").GradientProjector
        drawn.get_orthogonal_matrix = lambda self, weights, rank, type, seed: torch.eye(rank)  # noqa: A006
    return optimizer, step


def _named(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """By names: the matrix is one of an MLP."""
    named = [("mlp.matrix" if n == "matrix" else n, p) for n, p in params.items()]
    optimizer = getattr(module, name)(named, **case.given)
    return optimizer, lambda _: optimizer.step()


def _of_model(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    import torch

    optimizer = getattr(module, name)(torch.nn.ParameterDict(params), **case.given)
    return optimizer, lambda _: optimizer.step()


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in the place of random ones, where both sides draw."""
    return 1.5 * np.sin(1.0 + 2.0 * np.arange(np.prod(shape, dtype=int))).reshape(shape)


def _kron(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """Without its compiler, preconditioners in float64, and fitted to `noise`."""
    import torch

    torch.compiler.set_stance("force_eager")
    optimizer = getattr(module, name)(list(params.values()), precond_dtype=torch.float64, **case.given)

    def step(_: dict[str, Any]) -> None:
        drawn = torch.randn_like
        torch.randn_like = lambda x: torch.tensor(noise(tuple(x.shape)))
        try:
            optimizer.step()
        finally:
            torch.randn_like = drawn

    return optimizer, step


def _with_hessian(case: Case, module: Any, name: str, params: dict[str, Any]) -> tuple[Any, Step]:
    """In the place of the Hessian's diagonal the square of the gradient of the step before."""
    optimizer, _ = _plain(case, module, name, params)
    before = {name: p.detach() * 0 for name, p in params.items()}

    def step(grads: dict[str, Any]) -> None:
        optimizer.step(hessian=[before[name] ** 2 for name in params])
        before.update(grads)

    return optimizer, step


BUILDERS = {
    "": _plain, "closure": _with_closure, "filter": _filtered, "heavyball": _heavyball, "hessian": _with_hessian,
    "kron": _kron, "lomo": _adalomo, "lookahead": _lookahead, "loss": _with_loss, "lowrank": _low_rank, "mars": _plain,
    "model": _of_model, "muon": _muon, "named": _named, "wrapper": _wrapped,
}  # fmt: skip


def trajectory(name: str, kind: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Run the package now: parameters after every step, and where it has an ``eval`` what that gives at the end."""
    import torch

    case = CASES[name]
    builder, _, theirs = case.theirs.rpartition(":")
    module = importlib.import_module(MODULES.get(case.package, case.package.replace("-", "_")))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_float64(case.wide))
        if case.package == PO:
            matrix = importlib.import_module("pytorch_optimizer.optimizer.utils.matrix")
            stack.enter_context(_defaults([matrix.zero_power_via_newton_schulz_5], dtype=torch.float64))
            stack.enter_context(_defaults([module.AdaFactor.__init__], momentum_dtype=torch.float64))
        if builder == "mars":  # 1e-15 under the root, which no argument changes
            base = importlib.import_module("pytorch_optimizer.base.optimizer").BaseOptimizer
            stack.enter_context(_defaults([base.apply_ams_bound, base.apply_ams_bound_foreach], exp_avg_sq_eps=0.0))
        start, grads = problem(kind, case.leaves)
        params = {n: torch.nn.Parameter(torch.tensor(turn(p, case.turned))) for n, p in start.items()}
        optimizer, step = BUILDERS[builder](case, module, theirs, params)
        out = {n: [] for n in params}
        for i in range(STEPS):
            now = {n: torch.tensor(turn(g[i], case.turned)) for n, g in grads.items()}
            for n, p in params.items():
                p.grad = now[n].clone()
            step(now)
            for n, p in params.items():
                out[n].append(turn(p.detach().numpy().copy(), case.turned))
        visited = {n: np.stack(values) for n, values in out.items()}
        if not hasattr(optimizer, "eval"):
            return visited, None
        optimizer.eval()
        return visited, {n: turn(p.detach().numpy().copy(), case.turned) for n, p in params.items()}


def packed(leaves: dict[str, np.ndarray], steps: int) -> np.ndarray:
    """All leaves side by side: ``(steps, elements)``."""
    return np.concatenate([np.asarray(x).reshape(steps, -1) for x in leaves.values()], axis=1)


def unpacked(array: np.ndarray, leaves: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The reverse of `packed`."""
    ends = np.cumsum([int(np.prod(SHAPES[n])) for n in leaves])
    return {n: x.reshape(-1, *SHAPES[n]) for n, x in zip(leaves, np.split(array, ends[:-1], axis=1), strict=True)}


def record() -> None:
    """Write the tests' file: ``python tests/helpers/authors_cases.py`` where the packages are installed."""
    from importlib.metadata import version

    for package, wanted in VERSIONS.items():
        assert version(package) == wanted, f"{package} {version(package)}: the cases are of {wanted}"
    arrays, kept = {}, np.array(KEPT) - 1
    for name, case in CASES.items():
        for kind in case.kinds:
            visited, evaluated = trajectory(name, kind)
            arrays[f"{name}/{kind}"] = packed({n: x[kept] for n, x in visited.items()}, len(KEPT))
            if evaluated is not None:
                arrays[f"{name}/{kind}/eval"] = packed(evaluated, 1)
    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, **arrays)
    print(f"{len(CASES)} cases written to {DATA.name}, {DATA.stat().st_size:,} bytes")


if __name__ == "__main__":
    record()
