"""Made by `python tools/stubs.py` from the rules' signatures; not written by hand."""

# pyright: reportIncompatibleMethodOverride=false
# (a rule's call is narrower than that of its class)
from typing import Any

import optax

from jaxsgd import checkpoint as checkpoint
from jaxsgd import planning as planning
from jaxsgd import plot as plot
from jaxsgd import testing as testing
from jaxsgd import torch as torch
from jaxsgd.lift import Transformation
from jaxsgd.paths import Groups
from jaxsgd.transforms.accumulation import Accumulate as Accumulate
from jaxsgd.transforms.accumulation import AccumulateState as AccumulateState
from jaxsgd.diagnosis.diagnose import Diagnosis as Diagnosis
from optax.transforms._accumulation import EmaState as EmaState
from jaxsgd.rules.lowrank import GaLoreDimensionNumbers as GaLoreDimensionNumbers
from jaxsgd.transforms.clip import GlobalNormState as GlobalNormState
from jaxsgd.transforms.guarding import GuardState as GuardState
from jaxsgd.backward import LayerStep as LayerStep
from jaxsgd.transforms.monitoring import LeafMonitorState as LeafMonitorState
from jaxsgd.transforms.mechanic import MechanizeState as MechanizeState
from jaxsgd.rules.matrix import MuonDimensionNumbers as MuonDimensionNumbers
from jaxsgd.rules.matrix import NOT_HIDDEN as NOT_HIDDEN
from jaxsgd.tuning.scaling import NoiseScale as NoiseScale
from jaxsgd.transforms.averages import ParamsEmaState as ParamsEmaState
from jaxsgd.tuning.pick import Pick as Pick
from jaxsgd.transforms.plateau import PlateauState as PlateauState
from jaxsgd.tuning.probe_result import Probe as Probe
from jaxsgd.registry import RULES as RULES
from jaxsgd.tuning.range_test import RangeTest as RangeTest
from jaxsgd.record import Recorder as Recorder
from jaxsgd.registry import Rule as Rule
from jaxsgd.transforms.sharpness_aware import SamState as SamState
from jaxsgd.rules.averaging import ScheduleFreeState as ScheduleFreeState
from jaxsgd.curvature.sharpness import Sharpness as Sharpness
from jaxsgd.state import State as State
from jaxsgd.train import Step as Step
from jaxsgd.storage import Storage as Storage
from jaxsgd.ensemble.sweep_result import Sweep as Sweep
from jaxsgd.registry import TREE_RULES as TREE_RULES
from jaxsgd.train_state import TrainState as TrainState
from jaxsgd.transforms.accumulation import accumulate as accumulate
from jaxsgd.transforms.accumulation import accumulate_gradients as accumulate_gradients
from jaxsgd.rules.wrappers import adaptive_clip as adaptive_clip
from jaxsgd.sharding import assert_sharded as assert_sharded
from jaxsgd.statistics import batch_statistics as batch_statistics
from jaxsgd.storage import cast as cast
from jaxsgd.rules.wrappers import cautious as cautious
from jaxsgd.rules.wrappers import cautious_decay as cautious_decay
from jaxsgd.rules.wrappers import centralized as centralized
from jaxsgd.train import check_donation as check_donation
from jaxsgd.train import checked as checked
from jaxsgd.transforms.clip import clip_by_global_norm as clip_by_global_norm
from jaxsgd.description import describe as describe
from jaxsgd.diagnosis.diagnose import diagnose as diagnose
from jaxsgd.transforms.averages import ema as ema
from jaxsgd.rules.averaging import eval_params as eval_params
from jaxsgd.rank_one import factored as factored
from jaxsgd.blockwise import fp8 as fp8
from jaxsgd.second_order.rules import gauss_newton as gauss_newton
from jaxsgd.rules.curvature import gauss_newton_bartlett as gauss_newton_bartlett
from jaxsgd.rules.wrappers import grokfast as grokfast
from jaxsgd.transforms.guarding import guard as guard
from jaxsgd.transforms.guarding import guard_report as guard_report
from jaxsgd.rules.curvature import hutchinson as hutchinson
from jaxsgd.sharding import init_sharded as init_sharded
from jaxsgd.blockwise import int4 as int4
from jaxsgd.blockwise import int8 as int8
from jaxsgd.second_order.rules import lbfgs as lbfgs
from jaxsgd.second_order.squares import least_squares as least_squares
from jaxsgd.rules.momentum import look_ahead as look_ahead
from jaxsgd.rules.averaging import lookahead as lookahead
from jaxsgd.rules.lowrank import low_rank as low_rank
from jaxsgd.backward import make_layer_step as make_layer_step
from jaxsgd.train import make_step as make_step
from jaxsgd.transforms.mechanic import mechanize as mechanize
from jaxsgd.state import metrics as metrics
from jaxsgd.migration import migrate as migrate
from jaxsgd.second_order.minimizer import minimize as minimize
from jaxsgd.transforms.monitoring import monitor as monitor
from jaxsgd.transforms.monitoring import monitor_report as monitor_report
from jaxsgd.second_order.rules import newton as newton
from jaxsgd.second_order.rules import newton_cg as newton_cg
from jaxsgd.tuning.noise import noise_scale as noise_scale
from jaxsgd.transforms.sharpness_aware import normalize as normalize
from jaxsgd.transforms.averages import params_ema as params_ema
from jaxsgd.tuning.pick import pick as pick
from jaxsgd.storage import plain as plain
from jaxsgd.planning.plan import plan as plan
from jaxsgd.tuning.probe import probe as probe
from jaxsgd.tuning.range_test import range_test as range_test
from jaxsgd.transforms.plateau import reduce_on_plateau as reduce_on_plateau
from jaxsgd.transforms.guarding import resume as resume
from jaxsgd.registry import rule as rule
from jaxsgd.transforms.sharpness_aware import sam as sam
from jaxsgd.tuning.scaling import scale_learning_rate as scale_learning_rate
from jaxsgd.rules.averaging import schedule_free as schedule_free
from jaxsgd.rules.averaging import schedule_free_eval_params as schedule_free_eval_params
from jaxsgd.sharding import shard_batch as shard_batch
from jaxsgd.curvature.sharpness import sharpness as sharpness
from jaxsgd.second_order.batch_loss import split_loss as split_loss
from jaxsgd.sharding import state_sharding as state_sharding
from jaxsgd.ensemble.sweep import sweep as sweep
from jaxsgd.applying import update_params as update_params
from jaxsgd.state import with_hyper as with_hyper
from jaxsgd.registry import wrapper as wrapper

Schedule = optax.Schedule
__version__: str
__all__: list[str]

class _acprop(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-16,
        eps_root: float | Schedule = 1e-16,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        *,
        stale_mean: bool = False,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

acprop: _acprop

class _adabelief(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-16,
        eps_root: float | Schedule = 1e-16,
        *,
        nesterov: bool = False,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adabelief: _adabelief

class _adadelta(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        rho: float | Schedule = 0.9,
        eps: float | Schedule = 1e-06,
        weight_decay: float | Schedule = 0.0,
        weight_decay_mask: Any = None,
        *,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adadelta: _adadelta

class _adafactor(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule | None = None,
        min_dim_size_to_factor: float | Schedule = 128,
        decay_rate: float | Schedule = 0.8,
        decay_offset: float | Schedule = 0,
        multiply_by_parameter_scale: bool = True,
        clipping_threshold: float | Schedule = 1.0,
        momentum: Any = None,
        dtype_momentum: Any = None,
        weight_decay_rate: Any = None,
        eps: float | Schedule = 1e-30,
        factored: bool = True,
        weight_decay_mask: Any = None,
        *,
        independent_decay: bool = False,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adafactor: _adafactor

class _adagrad(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        initial_accumulator_value: float | Schedule = 0.1,
        eps: float | Schedule = 1e-07,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adagrad: _adagrad

class _adalomo(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        decay_rate: float | Schedule = 0.8,
        clipping_threshold: float | Schedule = 1.0,
        eps: float | Schedule = 1e-30,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adalomo: _adalomo

class _adam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        mu_dtype: Any = None,
        *,
        nesterov: bool = False,
        bias_correction: bool = True,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adam: _adam

class _adam_mini(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.001,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0,
        *,
        blocks: Any = (),
        head_dim: Any = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adam_mini: _adam_mini

class _adamax(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adamax: _adamax

class _adamaxw(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0001,
        mask: Any = None,
        *,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adamaxw: _adamaxw

class _adamuon(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        ns_coeffs: Any = ...,
        ns_steps: float | Schedule = 5,
        beta: float | Schedule = 0.95,
        beta2: float | Schedule = 0.95,
        weight_decay: float | Schedule = 0.01,
        *,
        eps: float | Schedule = 1e-07,
        eps_nu: float | Schedule = 1e-08,
        nesterov: bool = False,
        sign: bool = True,
        consistent_rms: float | Schedule = 0.2,
        adam_b1: float | Schedule = 0.9,
        adam_b2: float | Schedule = 0.95,
        adam_eps: float | Schedule = 1e-08,
        preconditioning: str = 'frobenius',
        adam_weight_decay: float | Schedule = 0.0,
        adam_learning_rate: Any = None,
        muon_weight_dimension_numbers: Any = None,
        adam: str = '(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?|(^|/)(?!\\w*(multi|att))\\w*head(_?\\d+)?(/|$)|logits|classifier|readout|norm|(^|/)ln(_\\w+|\\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$',
        mesh: Any = None,
        ns_dtype: Any = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adamuon: _adamuon

class _adamw(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        mu_dtype: Any = None,
        weight_decay: float | Schedule = 0.0001,
        mask: Any = None,
        *,
        nesterov: bool = False,
        bias_correction: bool = True,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adamw: _adamw

class _adan(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.98,
        b2: float | Schedule = 0.92,
        b3: float | Schedule = 0.99,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        *,
        weight: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adan: _adan

class _ademamix(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        b3: float | Schedule = 0.9999,
        alpha: float | Schedule = 5.0,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        mu_dtype: Any = None,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        *,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

ademamix: _ademamix

class _adopt(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.9999,
        eps: float | Schedule = 1e-06,
        mu_dtype: Any = None,
        *,
        nesterov: bool = False,
        use_clipping: bool = True,
        clip_value_fn: Any = None,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

adopt: _adopt

class _amsgrad(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        mu_dtype: Any = None,
        bias_correction_mu: bool = True,
        bias_correction_nu: bool = True,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

amsgrad: _amsgrad

class _apollo(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        rank: float | Schedule = 256,
        update_proj_gap: float | Schedule = 200,
        scale: float | Schedule = 1.0,
        *,
        scale_type: str = 'channel',
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-06,
        growth: float | Schedule = 1.01,
        key: float | Schedule = 0,
        adam: str = '(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?|(^|/)(?!\\w*(multi|att))\\w*head(_?\\d+)?(/|$)|logits|classifier|readout|norm|(^|/)ln(_\\w+|\\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$',
        weight_dimension_numbers: Any = None,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

apollo: _apollo

class _apollo_mini(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        rank: float | Schedule = 1,
        update_proj_gap: float | Schedule = 200,
        scale: float | Schedule = 128.0,
        *,
        scale_type: str = 'tensor',
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-06,
        growth: float | Schedule = 1.01,
        key: float | Schedule = 0,
        adam: str = '(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?|(^|/)(?!\\w*(multi|att))\\w*head(_?\\d+)?(/|$)|logits|classifier|readout|norm|(^|/)ln(_\\w+|\\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$',
        weight_dimension_numbers: Any = None,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

apollo_mini: _apollo_mini

class _cocob(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        alpha: float | Schedule = 100.0,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        *,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

cocob: _cocob

class _dadapt_adamw(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        betas: Any = ...,
        eps: float | Schedule = 1e-08,
        estim_lr0: float | Schedule = 1e-06,
        weight_decay: float | Schedule = 0.0,
        *,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

dadapt_adamw: _dadapt_adamw

class _dion(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.01,
        rank_fraction: float | Schedule = 1,
        beta: float | Schedule = 0.95,
        weight_decay: float | Schedule = 0.01,
        *,
        eps: float | Schedule = 1e-08,
        key: float | Schedule = 0,
        adam_b1: float | Schedule = 0.9,
        adam_b2: float | Schedule = 0.95,
        adam_eps: float | Schedule = 1e-08,
        adam_weight_decay: float | Schedule = 0.0,
        adam_learning_rate: Any = None,
        muon_weight_dimension_numbers: Any = None,
        adam: str = '(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?|(^|/)(?!\\w*(multi|att))\\w*head(_?\\d+)?(/|$)|logits|classifier|readout|norm|(^|/)ln(_\\w+|\\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$',
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

dion: _dion

class _dog(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        init_step: Any = ...,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        *,
        init_kind: str = 'heuristic',
        init_value: float | Schedule = 1e-06,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

dog: _dog

class _dowg(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        init_estim_sq_dist: Any = None,
        eps: float | Schedule = 0.0001,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        *,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

dowg: _dowg

class _fromage(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        min_norm: float | Schedule = 1e-06,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

fromage: _fromage

class _galore(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        rank: float | Schedule = 128,
        update_proj_gap: float | Schedule = 200,
        scale: float | Schedule = 1.0,
        base_optimizer: Any = None,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        weight_dimension_numbers: Any = None,
        *,
        side: str = 'long',
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        nesterov: bool = False,
        bias_correction: bool = True,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

galore: _galore

class _grams(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

grams: _grams

class _kron(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.0003,
        b1: float | Schedule = 0.9,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        *,
        preconditioner_update_probability: Any = None,
        max_size_triangular: float | Schedule = 8192,
        min_ndim_triangular: float | Schedule = 2,
        memory_save_mode: Any = None,
        momentum_into_precond_update: bool = True,
        precond_lr: float | Schedule = 0.1,
        precond_init_scale: float | Schedule = 1.0,
        merge_dims: bool = True,
        key: float | Schedule = 0,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

kron: _kron

class _lamb(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-06,
        eps_root: float | Schedule = 0.0,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        *,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

lamb: _lamb

class _lars(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        weight_decay: float | Schedule = 0.0,
        weight_decay_mask: Any = None,
        trust_coefficient: float | Schedule = 0.001,
        eps: float | Schedule = 0.0,
        trust_ratio_mask: bool = True,
        momentum: float | Schedule = 0.9,
        nesterov: bool = False,
        *,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

lars: _lars

class _lion(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.99,
        mu_dtype: Any = None,
        weight_decay: float | Schedule = 0.001,
        mask: Any = None,
        *,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

lion: _lion

class _madgrad(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.9,
        weight_decay: float | Schedule = 0.0,
        eps: float | Schedule = 1e-06,
        *,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

madgrad: _madgrad

class _mars(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.95,
        b2: float | Schedule = 0.99,
        eps: float | Schedule = 1e-08,
        gamma: float | Schedule = 0.025,
        max_norm: float | Schedule = 1.0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

mars: _mars

class _momentum(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.9,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

momentum: _momentum

class _momo(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        beta: float | Schedule = 0.9,
        lower_bound: float | Schedule = 0.0,
        weight_decay: float | Schedule = 0.0,
        adapt_lower_bound: bool = False,
        *,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

momo: _momo

class _momo_adam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.01,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        lower_bound: float | Schedule = 0.0,
        weight_decay: float | Schedule = 0.0,
        adapt_lower_bound: bool = False,
        *,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

momo_adam: _momo_adam

class _muon(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        ns_coeffs: Any = ...,
        ns_steps: float | Schedule = 5,
        beta: float | Schedule = 0.95,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0,
        weight_decay_mask: Any = None,
        mu_dtype: Any = None,
        *,
        nesterov: bool = True,
        adaptive: bool = False,
        bias_correction: bool = True,
        consistent_rms: Any = None,
        adam_b1: float | Schedule = 0.9,
        adam_b2: float | Schedule = 0.999,
        adam_eps: Any = None,
        adam_eps_root: float | Schedule = 0.0,
        adam_nesterov: bool = True,
        preconditioning: str = 'frobenius',
        adam_weight_decay: float | Schedule = 0.0,
        adam_learning_rate: Any = None,
        muon_weight_dimension_numbers: Any = None,
        adam: str = '(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?|(^|/)(?!\\w*(multi|att))\\w*head(_?\\d+)?(/|$)|logits|classifier|readout|norm|(^|/)ln(_\\w+|\\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$',
        mesh: Any = None,
        ns_dtype: Any = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

muon: _muon

class _muon_jordan(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.02,
        ns_coeffs: Any = ...,
        ns_steps: float | Schedule = 5,
        beta: float | Schedule = 0.95,
        eps: float | Schedule = 1e-07,
        weight_decay: float | Schedule = 0.0,
        weight_decay_mask: Any = None,
        mu_dtype: Any = None,
        *,
        nesterov: bool = True,
        adaptive: bool = False,
        bias_correction: bool = False,
        consistent_rms: Any = None,
        adam_b1: float | Schedule = 0.9,
        adam_b2: float | Schedule = 0.95,
        adam_eps: float | Schedule = 1e-10,
        adam_eps_root: float | Schedule = 0.0,
        adam_nesterov: bool = False,
        preconditioning: str = 'frobenius',
        adam_weight_decay: float | Schedule = 0.0,
        adam_learning_rate: float | Schedule = 0.0003,
        muon_weight_dimension_numbers: Any = None,
        adam: str = '(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?|(^|/)(?!\\w*(multi|att))\\w*head(_?\\d+)?(/|$)|logits|classifier|readout|norm|(^|/)ln(_\\w+|\\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$',
        mesh: Any = None,
        ns_dtype: str = 'bfloat16',
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

muon_jordan: _muon_jordan

class _nadam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        mu_dtype: Any = None,
        *,
        nesterov: bool = True,
        bias_correction: bool = True,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

nadam: _nadam

class _nadamw(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        mu_dtype: Any = None,
        weight_decay: float | Schedule = 0.0001,
        mask: Any = None,
        *,
        nesterov: bool = True,
        bias_correction: bool = True,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

nadamw: _nadamw

class _nesterov(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.9,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

nesterov: _nesterov

class _noisy_sgd(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        eta: float | Schedule = 0.01,
        gamma: float | Schedule = 0.55,
        key: float | Schedule = 0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

noisy_sgd: _noisy_sgd

class _normuon(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        ns_coeffs: Any = ...,
        ns_steps: float | Schedule = 5,
        beta: float | Schedule = 0.95,
        beta2: float | Schedule = 0.95,
        weight_decay: float | Schedule = 0.0,
        *,
        eps: float | Schedule = 1e-07,
        eps_nu: float | Schedule = 1e-10,
        nesterov: bool = True,
        consistent_rms: Any = None,
        adam_b1: float | Schedule = 0.9,
        adam_b2: float | Schedule = 0.95,
        adam_eps: float | Schedule = 1e-10,
        preconditioning: str = 'frobenius',
        adam_weight_decay: float | Schedule = 0.0,
        adam_learning_rate: Any = None,
        muon_weight_dimension_numbers: Any = None,
        adam: str = '(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?|(^|/)(?!\\w*(multi|att))\\w*head(_?\\d+)?(/|$)|logits|classifier|readout|norm|(^|/)ln(_\\w+|\\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$',
        mesh: Any = None,
        ns_dtype: Any = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

normuon: _normuon

class _novograd(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.25,
        eps: float | Schedule = 1e-06,
        eps_root: float | Schedule = 0.0,
        weight_decay: float | Schedule = 0.0,
        *,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

novograd: _novograd

class _optax_muon(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        ns_coeffs: Any = ...,
        ns_steps: float | Schedule = 5,
        beta: float | Schedule = 0.95,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0,
        weight_decay_mask: Any = None,
        mu_dtype: Any = None,
        *,
        nesterov: bool = True,
        adaptive: bool = False,
        bias_correction: bool = True,
        consistent_rms: Any = None,
        adam_b1: float | Schedule = 0.9,
        adam_b2: float | Schedule = 0.999,
        adam_eps: Any = None,
        adam_eps_root: float | Schedule = 0.0,
        adam_nesterov: bool = True,
        preconditioning: str = 'frobenius',
        adam_weight_decay: float | Schedule = 0.0,
        adam_learning_rate: Any = None,
        muon_weight_dimension_numbers: Any = None,
        adam: Any = None,
        mesh: Any = None,
        ns_dtype: Any = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

optax_muon: _optax_muon

class _optimistic_adam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        optimism: Any = None,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        mu_dtype: Any = None,
        *,
        nesterov: bool = True,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

optimistic_adam: _optimistic_adam

class _optimistic_adam_v2(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        *,
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 1.0,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        nesterov: bool = True,
        mu_dtype: Any = None,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

optimistic_adam_v2: _optimistic_adam_v2

class _optimistic_gradient_descent(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 1.0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

optimistic_gradient_descent: _optimistic_gradient_descent

class _polyak_sgd(Rule):
    def __call__(
        self,
        max_learning_rate: float | Schedule = 1.0,
        scaling: float | Schedule = 1.0,
        f_min: float | Schedule = 0.0,
        eps: float | Schedule = 0.0,
        variant: str = 'sps',
        *,
        learning_rate: float | Schedule | None = None,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

polyak_sgd: _polyak_sgd

class _prodigy(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        betas: Any = ...,
        beta3: Any = None,
        eps: float | Schedule = 1e-08,
        estim_lr0: float | Schedule = 1e-06,
        estim_lr_coef: float | Schedule = 1.0,
        weight_decay: float | Schedule = 0.0,
        safeguard_warmup: bool = False,
        *,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        bias_correction: bool = True,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

prodigy: _prodigy

class _radam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        threshold: float | Schedule = 5.0,
        *,
        nesterov: bool = False,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

radam: _radam

class _rmsprop(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        decay: float | Schedule = 0.9,
        eps: float | Schedule = 1e-08,
        initial_scale: float | Schedule = 0.0,
        eps_in_sqrt: bool = True,
        centered: bool = False,
        momentum: Any = None,
        nesterov: bool = False,
        bias_correction: bool = False,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

rmsprop: _rmsprop

class _rprop(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        eta_minus: float | Schedule = 0.5,
        eta_plus: float | Schedule = 1.2,
        min_step_size: float | Schedule = 1e-06,
        max_step_size: float | Schedule = 50.0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

rprop: _rprop

class _schedule_free_adamw(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.0025,
        warmup_steps: Any = None,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0,
        weight_lr_power: float | Schedule = 2.0,
        state_dtype: Any = None,
        *,
        r: float | Schedule = 0.0,
        eps_root: float | Schedule = 0.0,
        bias_correction: bool = True,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

schedule_free_adamw: _schedule_free_adamw

class _schedule_free_radam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.0025,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0,
        r: float | Schedule = 0.0,
        weight_lr_power: float | Schedule = 2.0,
        silent_sgd_phase: bool = True,
        *,
        warmup_steps: Any = None,
        state_dtype: Any = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

schedule_free_radam: _schedule_free_radam

class _schedule_free_sgd(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 1.0,
        warmup_steps: Any = None,
        b1: float | Schedule = 0.9,
        weight_decay: float | Schedule = 0.0,
        weight_lr_power: float | Schedule = 2.0,
        state_dtype: Any = None,
        *,
        r: float | Schedule = 0.0,
        momentum: Any = None,
        accumulator_dtype: Any = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

schedule_free_sgd: _schedule_free_sgd

class _sgd(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        momentum: Any = None,
        nesterov: bool = False,
        accumulator_dtype: Any = None,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

sgd: _sgd

class _shampoo(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        eps: float | Schedule = 0.0001,
        precondition_frequency: float | Schedule = 1,
        graft: bool = True,
        max_precond_dim: float | Schedule = 10000,
        *,
        stagger: bool = False,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

shampoo: _shampoo

class _sign_sgd(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

sign_sgd: _sign_sgd

class _signum(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        beta: float | Schedule = 0.9,
        accumulator_dtype: Any = None,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

signum: _signum

class _simplified_ademamix(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.99,
        b2: float | Schedule = 0.95,
        alpha: float | Schedule = 0.0,
        eps: float | Schedule = 1e-08,
        eps_root: float | Schedule = 0.0,
        weight_decay: float | Schedule = 0.0,
        mask: Any = None,
        *,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

simplified_ademamix: _simplified_ademamix

class _sm3(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.9,
        *,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

sm3: _sm3

class _soap(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule = 0.003,
        b1: float | Schedule = 0.95,
        b2: float | Schedule = 0.95,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.01,
        *,
        shampoo_beta: Any = None,
        precondition_frequency: float | Schedule = 10,
        max_precond_dim: float | Schedule = 10000,
        bias_correction: bool = True,
        stagger: bool = False,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

soap: _soap

class _sophia(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.965,
        b2: float | Schedule = 0.99,
        eps: float | Schedule = 1e-08,
        weight_decay: float | Schedule = 0.0001,
        weight_decay_mask: Any = None,
        gamma: float | Schedule = 0.01,
        clip_threshold: float | Schedule = 1.0,
        update_interval: float | Schedule = 10,
        hessian_diagonal_fn: Any = None,
        mu_dtype: Any = None,
        verbose: bool = False,
        print_win_rate_every_n_steps: float | Schedule = 0,
        *,
        key: float | Schedule = 0,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

sophia: _sophia

class _torch_adafactor(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        decay_rate: float | Schedule = 0.8,
        eps1: Any = None,
        eps2: float | Schedule = 0.001,
        d: float | Schedule = 1.0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_adafactor: _torch_adafactor

class _torch_adagrad(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        initial_accumulator_value: float | Schedule = 0.0,
        eps: float | Schedule = 1e-10,
        lr_decay: float | Schedule = 0.0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_adagrad: _torch_adagrad

class _torch_amsgrad(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_amsgrad: _torch_amsgrad

class _torch_asgd(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        lambd: float | Schedule = 0.0001,
        alpha: float | Schedule = 0.75,
        t0: float | Schedule = 1000000.0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_asgd: _torch_asgd

class _torch_nadam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        momentum_decay: float | Schedule = 0.004,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_nadam: _torch_nadam

class _torch_radam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_radam: _torch_radam

class _torch_rmsprop(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        alpha: float | Schedule = 0.99,
        eps: float | Schedule = 1e-08,
        momentum: float | Schedule = 0.0,
        centered: bool = False,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_rmsprop: _torch_rmsprop

class _torch_rprop(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        eta_minus: float | Schedule = 0.5,
        eta_plus: float | Schedule = 1.2,
        min_step_size: float | Schedule = 1e-06,
        max_step_size: float | Schedule = 50.0,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_rprop: _torch_rprop

class _torch_sgd(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.0,
        dampening: float | Schedule = 0.0,
        nesterov: bool = False,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_sgd: _torch_sgd

class _torch_sparse_adam(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-08,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

torch_sparse_adam: _torch_sparse_adam

class _velocity(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.9,
        *,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

velocity: _velocity

class _yogi(Rule):
    def __call__(
        self,
        learning_rate: float | Schedule,
        b1: float | Schedule = 0.9,
        b2: float | Schedule = 0.999,
        eps: float | Schedule = 0.001,
        *,
        eps_root: float | Schedule = 0.0,
        initial_accumulator_value: float | Schedule = 1e-06,
        initial_mean: float | Schedule = 0.0,
        weight_decay: float | Schedule | None = None,
        mask: Any = None,
        groups: Groups = (),
        storage: Storage | dict[str, Storage] | None = None,
        dynamic: tuple[str, ...] = (),
        norms: bool = False,
        rounding: str | None = None,
    ) -> Transformation: ...

yogi: _yogi
