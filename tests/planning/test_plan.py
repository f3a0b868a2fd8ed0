"""Plans: what a step takes by its compiler, checked against arithmetic, a real run, and the program compiled anew."""

import importlib.util
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from containers import CONTAINERS
from flax import linen, nnx
from jax.sharding import PartitionSpec

import jaxsgd
from jaxsgd.planning.accounts import int8_bytes
from jaxsgd.planning.devices import known
from jaxsgd.planning.devices import lookup as describe
from jaxsgd.planning.hlo import Program
from jaxsgd.planning.plan import compare, plan
from jaxsgd.planning.reading import read, read_text
from jaxsgd.planning.targets import DoesNotFit, _does_not_fit, lookup

GIB = 2**30
adam = jaxsgd.adam(1e-3)

tpu, cuda = pytest.mark.compiler("tpu"), pytest.mark.compiler("cuda")
VENDORS = [pytest.param("v5e:2x4", marks=tpu), pytest.param("h100:8", marks=cuda)]


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def mlp(width=256, depth=3):
    """A perceptron as shapes, its loss and a batch; the layers are one scan."""
    params = {"layers": shape(depth, width, width), "scale": shape(width)}

    def loss_fn(params, batch, key):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"], params["layers"])
        return jnp.mean((out * params["scale"] - batch["y"]) ** 2)

    return loss_fn, params, {"x": shape(64, width), "y": shape(64, width)}


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "full", "count"),
    [
        ("v5e:4x4", "v5e:4x4", 16), ("V5E", "v5e:1x1", 1), ("v5p:8x8x16", "v5p:8x8x16", 1024), ("h100:8", "h100:8", 8),
        ("h100", "h100:1", 1), ("b200:2x8", "b200:2x8", 16), ("ironwood:2x2x1", "tpu7x:2x2x1", 8), ("cpu", "cpu", 1),
        ("cpu:8", "cpu:8", 8), ("v4:2x2x4", "v4:2x2x4", 16),
    ],
)  # fmt: skip
def test_names_of_topologies(topology, full, count):
    found = describe(topology)
    assert (found.name, found.count) == (full, count)


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("v5x:4x4", "did you mean 'v5e' or 'v5p'?"), ("h10:8", "did you mean 'h100'"), ("tpu", "the form is 'v5e:4x4'"),
        ("v5e:4", "has 2 axes"), ("v5e:4x4x4", "has 2 axes"), ("v5e:0x4", "no shape"), ("v5e:", "no shape"),
        ("v5e:32x32", "the largest slice of TPU v5e is v5e:16x16"), ("h100:1x2x8", "h100:2x8"), ("cpu:2x2", "cpu:8"),
        (8, "a name is needed"),
    ],
)  # fmt: skip
def test_topologies_that_are_none(topology, says):
    with pytest.raises(ValueError, match="topology=") as error:
        describe(topology)
    assert says in str(error.value)


def test_devices_are_whole():
    """Every device names its source, and its rates are of an accelerator's order."""
    for name, device in known().items():
        assert device.name == name and len(device.source) > 40
        assert 10 * GIB < device.memory < 300 * GIB
        assert device.bandwidth is not None and 5e11 < device.bandwidth < 1e13
        assert device.link is not None and 1e11 <= device.link <= 1e12
        assert 1e14 < device.flops["f32"] <= device.flops["bf16"] < 3e15
        assert bool(device.most) == (device.platform == "tpu") and bool(device.target) == (device.platform == "cuda")


@pytest.mark.parametrize("accumulate", [0, -2, 2.5])
def test_microbatches_are_a_whole_number(accumulate):
    loss_fn = lambda p, batch, key: jnp.mean(batch @ p)
    shapes = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    with pytest.raises((TypeError, ValueError), match=f"accumulate={accumulate}"):
        plan(loss_fn, shapes[0], jaxsgd.sgd(0.1), shapes[1], topology="cpu", accumulate=accumulate)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:4x4", "jaxsgd[tpu]"), ("h100:8", "jaxsgd[cuda]")])
def test_a_missing_compiler_names_its_extra(topology, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        lookup.__wrapped__(topology)
    assert extra in str(error.value) and topology in str(error.value)


# -- what a plan says ------------------------------------------------------------------------------


def test_a_plan_is_arithmetic_where_arithmetic_knows():
    """Bytes of parameters and state, and the operations of the products with the loop's count, are exact."""
    loss_fn, params, batch = mlp(width=256, depth=5)
    found = plan(loss_fn, params, adam, batch)
    count = 5 * 256 * 256 + 256
    assert found.parameters == count
    assert found.parts["params"] == found.parts["state: mu"] == found.parts["state: nu"] == 4 * count
    assert found.parts["batch"] == 2 * 64 * 256 * 4
    assert sum(found.parts.values()) == found.needs
    assert found.argument == pytest.approx(12 * count + 2 * 64 * 256 * 4, abs=100)
    # Forward, and backward to weights and to inputs; the first layer needs none to its inputs but the scan does it.
    assert sum(found.flops.values()) == 3 * 5 * 2 * 64 * 256 * 256
    assert found.fits and found.headroom == found.available - found.needs > 0
    assert found.kernels["while"] == 2 and not found.collectives and found.bound is None
    assert json.loads(json.dumps(found.to_dict()))["needs"] == found.needs
    assert "state: mu" in str(found) and found.summary.startswith("cpu fits: needs ")


def test_every_form_of_the_arguments_is_one_plan():
    """A loss or a step; shapes, arrays or a function that makes them: the same program."""
    loss_fn, shapes, batch = mlp(width=64, depth=2)
    init = lambda key: jax.tree.map(lambda s: jax.random.normal(key, s.shape), shapes)
    arrays, real = init(jax.random.key(0)), jax.tree.map(lambda s: np.zeros(s.shape, np.float32), batch)
    first = plan(loss_fn, shapes, adam, batch)
    step = jaxsgd.make_step(loss_fn, adam)
    for other in (plan(loss_fn, arrays, adam, real), plan(loss_fn, init, adam, batch), plan(step, shapes, batch=batch)):
        assert (other.needs, other.flops, other.parts) == (first.needs, first.flops, first.parts)
    halves = plan(jaxsgd.make_step(loss_fn, adam, accumulate=2), shapes, None, batch)
    assert halves.settings["accumulate"] == 2 and halves.flops == first.flops


def test_slots_of_other_optimizers_have_their_names():
    loss_fn, params, batch = mlp(width=64, depth=2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    parts = plan(loss_fn, params, tx, batch).parts
    assert parts["state: mu"] == parts["state: nu"] == parts["params"]
    packed = plan(loss_fn, params, jaxsgd.adam(1e-3, storage=jaxsgd.int8(min_size=0)), batch).parts
    assert parts["state: mu"] / 4 < packed["state: mu"] < 1.1 * parts["state: mu"] / 4


@pytest.mark.parametrize("kind", CONTAINERS)
def test_parameters_in_every_container(kind):
    """Slots are found by the parameters' names, whatever holds them, also a field called ``value``."""
    params = CONTAINERS[kind](jnp.ones((8, 16)), jnp.ones((8, 4)))
    loss = lambda p, batch, key: sum(jnp.sum(x**2) for x in jax.tree.leaves(_arrays(p)))
    parts = plan(loss, params, adam, jnp.ones(4)).parts
    assert parts["params"] == parts["state: mu"] == parts["state: nu"] == 4 * 8 * 20
    assert parts["state: other"] < 16


def _arrays(params):
    return nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params


def test_parameters_of_every_dtype():
    """Moments of narrow parameters are float32, second moments of complex ones are real."""
    params = {
        "bf16": shape(16, dtype="bfloat16"), "half": shape(16, dtype="float16"),
        "complex": shape(16, dtype="complex64"), "empty": shape(0, 4), "scalar": shape(), "none": None,
        "index": shape(3, dtype="int32"),
    }  # fmt: skip
    tx = jaxsgd.adam(1e-3, groups=[("index", {"frozen": True})])
    loss = lambda p, batch, key: sum(
        jnp.sum(jnp.abs(x) ** 2).astype(jnp.float32) for n, x in p.items() if n not in ("none", "index")
    )
    parts = plan(loss, params, tx, jnp.ones(4)).parts
    assert parts["params"] == 32 + 32 + 128 + 4 + 12
    assert parts["state: mu"] == 64 + 64 + 128 + 4 and parts["state: nu"] == 3 * 64 + 4


def test_zero1_on_eight_devices():
    """State bytes are an eighth; the step gathers the parameters and sums the gradients."""
    loss_fn, params, batch = mlp()
    whole = plan(loss_fn, params, adam, batch, topology="cpu:8")
    split = plan(loss_fn, params, adam, batch, topology="cpu:8", zero1="data")
    assert split.state_bytes <= (1 / 8 + 0.02) * whole.state_bytes
    assert whole.argument - split.argument == whole.state_bytes - split.state_bytes
    size = 4 * whole.parameters
    assert whole.collectives["all-reduce"].bytes == pytest.approx(size, rel=0.01)
    assert whole.collectives["all-reduce"].wire == pytest.approx(2 * 7 / 8 * size, rel=0.01)
    assert split.collectives["all-gather"].bytes == pytest.approx(size, rel=0.01)


def test_specs_by_either_name():
    loss_fn, params, batch = mlp()
    specs = {"layers": PartitionSpec(None, None, "model"), "scale": PartitionSpec()}
    asked = {"topology": "cpu:8", "mesh_axes": {"data": -1, "model": 4}}
    one, two = (plan(loss_fn, params, adam, batch, **asked, **{name: specs}) for name in ("specs", "param_spec"))
    assert one.parts == two.parts and one.parts["params"] == 4 * (3 * 256 * 64 + 256)
    with pytest.raises(TypeError, match="two names of one argument"):
        plan(loss_fn, params, adam, batch, specs=specs, param_spec=specs)


class Annotated(nnx.Module):
    """A product whose kernel is split over ``"model"`` by its own annotation."""

    def __init__(self, rngs):
        start = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        self.dense = nnx.Linear(64, 256, kernel_init=start, use_bias=False, rngs=rngs)


class AnnotatedLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        start = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
        return linen.Dense(256, kernel_init=start, use_bias=False)(x)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_annotations_of_the_model_count_as_split(kind):
    """A quarter of the parameters and moments on a mesh with four devices for the axis; all of them on one device."""
    net = AnnotatedLinen()
    init, loss_fn = {
        "nnx": (
            lambda key: Annotated(nnx.Rngs(key)),
            lambda model, batch, key: jnp.mean(model.dense(batch) ** 2),
        ),
        "linen": (
            lambda key: net.init(key, jnp.ones((1, 64)))["params"],
            lambda params, batch, key: jnp.mean(net.apply({"params": params}, batch) ** 2),
        ),
    }[kind]
    whole = plan(loss_fn, init, adam, shape(8, 64))
    split = plan(loss_fn, init, adam, shape(8, 64), topology="cpu:8", mesh_axes={"data": 2, "model": 4})
    for part in ("params", "state: mu", "state: nu"):
        assert whole.parts[part] == 4 * 64 * 256 == 4 * split.parts[part]
    assert whole.argument - split.argument > 3 / 4 * 3 * 4 * 64 * 256


# -- what does not fit -----------------------------------------------------------------------------


def test_what_does_not_fit_is_an_answer_and_its_suggestions_are_true():
    """A model of 700 GB on this host: in words, with numbers that the changed program then has."""
    loss_fn, params, batch = mlp(width=2**15, depth=40)
    found = plan(loss_fn, params, adam, batch, topology="cpu:8")
    assert not found.fits and found.headroom < 0
    assert "does not fit: needs" in found.summary and "f32[40,32768,32768] 160 GiB (params/layers)" in found.why[1]
    changed = {
        "ZeRO-1 (zero1='data')": (adam, "data"),
        "int8 state (storage=jaxsgd.int8())": (jaxsgd.adam(1e-3, storage=jaxsgd.int8()), None),
        "ZeRO-1 (zero1='data') and int8 state (storage=jaxsgd.int8())": (
            jaxsgd.adam(1e-3, storage=jaxsgd.int8()),
            "data",
        ),
    }
    said = {s.what: s for s in found.suggestions}
    for what, (tx, zero1) in changed.items():
        state = jaxsgd.TrainState.shapes(params, tx, mesh=lookup("cpu:8").mesh(), zero1=zero1).opt_state
        bytes_then = jaxsgd.assert_sharded(state).bytes_per_device
        assert found.needs - said[what].needs == pytest.approx(found.state_bytes - bytes_then, rel=0.01)
        assert said[what].how == "computed from the shapes of the state" and what in " ".join(found.next)
    rows = [s for s in found.suggestions if s.what.startswith("accumulate=8")]
    assert not rows or rows[0].how == "compiled"


def test_zero1_saves_what_can_be_split():
    """A parameter of odd sizes keeps its moments whole; the suggestion counts 7/8 of the others and says so."""
    loss_fn, params, batch = mlp(width=2**15, depth=40)
    odd = shape(32769, 32767)
    with_odd = lambda p, batch, key: loss_fn(p, batch, key) + jnp.mean(p["odd"] ** 2)
    found = plan(with_odd, {**params, "odd": odd}, adam, batch, topology="cpu:8")
    (said,) = (s for s in found.suggestions if s.what == "ZeRO-1 (zero1='data')")
    assert found.needs - said.needs == 7 / 8 * 2 * 4 * (40 * 2**30 + 2**15)
    assert (
        said.how == "computed from the shapes of the state; 8 GiB of the state cannot be split"
        and said.how in found.next[0]
    )


def test_only_suggestions_that_apply():
    """No ZeRO-1 on one device or where it is on already, no int8 without moments."""
    loss_fn, params, batch = mlp(width=2**15, depth=40)
    words = plan(loss_fn, params, jaxsgd.sgd(0.1), {k: shape(1, 2**15) for k in batch}).text(verbose=True)
    assert "does not fit" in words and "ZeRO" not in words and "int8" not in words and "accumulate" not in words


SHAPES = {"matrix": shape(512, 256), "vector": shape(300), "cube": shape(4, 64, 64)}
AROUND = {
    "alone": lambda rule: rule,
    "cautious": jaxsgd.cautious,
    "grokfast": jaxsgd.grokfast,
    "lookahead": jaxsgd.lookahead,
}


@pytest.mark.parametrize("name", sorted(jaxsgd.RULES))
@pytest.mark.parametrize("around", AROUND)
def test_int8_saves_what_is_said(name, around):
    """Of every rule, alone and in a wrapper: the bytes that its state has less with it; none where it is refused."""
    try:
        rule = AROUND[around](jaxsgd.RULES[name])
    except ValueError:
        return  # no such wrapper of this rule
    chained = lambda storage: optax.chain(optax.identity(), rule(1e-3, storage=storage))
    before = jaxsgd.TrainState.shapes(SHAPES, chained(None))
    said = int8_bytes(chained(None), before)
    try:
        after = jaxsgd.TrainState.shapes(SHAPES, chained(jaxsgd.int8()))
    except ValueError as error:
        assert said == 0 and re.search("it takes no slot of this rule|no slot .* with these settings", str(error))
        return
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(s.opt_state)) for s in (before, after)]
    assert said == sizes[0] - sizes[1] >= 0
    least = jaxsgd.TrainState.shapes(SHAPES, chained(jaxsgd.int8(min_size=0)))
    fewest = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(least.opt_state))
    moments = [slot for slot in rule.slots.values() if slot.kind in ("mean", "square") and slot.unless is None]
    assert fewest < sizes[0] or not moments, "it has moments, and none is packed"


def test_a_variant_is_compiled():
    loss_fn, params, batch = mlp(width=2**15, depth=40)
    less = {"half the layers": {"params": {**params, "layers": shape(4, 2**15, 2**15)}}}
    found = plan(loss_fn, params, jaxsgd.sgd(0.1), {k: shape(1, 2**15) for k in batch}, variants=less)
    (only,) = found.suggestions
    assert only.what == "half the layers" and only.how == "compiled" and 16 * GIB < only.needs < found.needs / 5


EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (42.37G) exceeds "
    "available HBM (15.75G)."
)


def test_the_words_of_the_tpu_compiler():
    class Lowered:
        def compile(self, compiler_options):
            pathlib.Path(compiler_options["xla_dump_to"], "x.after_optimizations.txt").write_text("HloModule x")
            raise jax.errors.JaxRuntimeError(EARLY)

    refusal = _does_not_fit(Lowered(), EARLY)
    assert isinstance(refusal, DoesNotFit) and refusal.text == "HloModule x"
    assert refusal.needs == round(42.37 * GIB) and refusal.has == round(15.75 * GIB)
    late = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.26G of 15.75G hbm. Exceeded hbm capacity by"
    )
    refusal = _does_not_fit(
        Lowered(), f"{late} 1.51G.\n\n  1. Size: 4.50G\n     Shape: f32[1024,1179648]{{1,0:T(8,128)}}\n"
    )
    assert isinstance(refusal, DoesNotFit) and refusal.needs == round(17.26 * GIB) and not refusal.text
    assert refusal.largest == [(round(4.5 * GIB), "f32[1024,1179648]{1,0:T(8,128)}", "")]
    other = _does_not_fit(Lowered(), "RESOURCE_EXHAUSTED: something else")
    assert isinstance(other, jax.errors.JaxRuntimeError)


# -- one clear error each --------------------------------------------------------------------------


def test_a_step_that_cannot_be_compiled():
    def reads_values(params, batch, key):
        return jnp.sum(params["w"]) if float(jnp.sum(batch["x"])) > 0 else jnp.sum(params["w"] ** 2)

    with pytest.raises(TypeError) as error:
        plan(reads_values, {"w": shape(4)}, adam, {"x": shape(8, 4)})
    words = str(error.value)
    assert "reads_values cannot be compiled" in words and "x float32[8, 4]" in words and "1 parameters" in words


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"mesh_axes": {"data": 3}}, ValueError, "cpu:8 has 8 devices, the sizes make up 3"),
        ({"mesh_axes": {"data": -1, "model": 3}}, ValueError, "8 devices"),
        ({"mesh_axes": {"data": -1, "model": -1}}, ValueError, "one of them may be -1"),
        ({"batch": {"x": shape(60, 256), "y": shape(60, 256)}}, ValueError, "60 examples, not divisible by 8 devices"),
        ({"zero1": "dta"}, ValueError, "did you mean 'data'"),
        ({"topology": "cpu:64"}, ValueError, "jax_num_cpu_devices"),
        ({"batch": None}, TypeError, "batch: the batch"),
        ({"tx": None}, TypeError, "tx: a gradient transformation"),
        ({"step_or_loss": 3}, TypeError, "a loss function, a jaxsgd.Step or a jaxsgd.LayerStep"),
    ],
)
def test_clear_errors(change, error, says):
    loss_fn, params, batch = mlp()
    given = {"step_or_loss": loss_fn, "params": params, "tx": adam, "batch": batch, "topology": "cpu:8", **change}
    with pytest.raises(error) as caught:
        plan(**given)
    assert says in str(caught.value)


# -- against a real run ----------------------------------------------------------------------------

MEASURE = '''
"""Peak memory of one step: how far the resident set of this process rises above what it was, and the arguments."""
import ctypes, gc, json, sys
libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 65536)  # large blocks are mapped, and given back when they are freed
import jax, jaxsgd, numpy as np
from jaxsgd.planning.plan import plan
sys.path.insert(0, sys.argv[2])
if sys.argv[1] == "digits":
    import digits
    from flax import linen, nnx
    image, label = digits.load()["train"]
    loss, model, batch = digits.loss_fn, digits.CNN(nnx.Rngs(0)), {"image": image[:512], "label": label[:512]}
else:
    from char_model import PRESETS, build
    built = build(PRESETS["small"])
    loss, model, batch = built.loss_fn, built.init, {"tokens": np.zeros(built.batch["tokens"].shape, np.int32)}
tx = jaxsgd.adamw(1e-3)
said = plan(loss, model, tx, batch).needs
state, step, batch = jaxsgd.TrainState.create(model, tx), jaxsgd.make_step(loss, tx), jax.device_put(batch)
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
rises = []
for i in range(6):
    gc.collect(), libc.malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    state, _ = jax.block_until_ready(step(state, batch))
    rises.append(1024 * (kib("VmHWM") - before))
leaves = [x for x in jax.tree.leaves((state, batch)) if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)]
print(json.dumps([said, sorted(rises[1:])[1] + sum(x.nbytes for x in leaves)]))
'''


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("example", ["digits", "char_lm"])
def test_the_peak_is_that_of_a_real_run(example):
    """Within 10% of what one step adds to the process's resident memory, with its arguments."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel does not tell the peak of the resident memory of a step")
    if importlib.util.find_spec("sklearn") is None and example == "digits":
        pytest.skip("scikit-learn is not installed")
    examples = pathlib.Path(__file__).parents[2] / "examples"
    command = [sys.executable, "-c", MEASURE, example, str(examples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said, measured = json.loads(done.stdout)
    assert said == pytest.approx(measured, rel=0.10)


@pytest.mark.slow
def test_the_benchmark_of_peaks():
    """Within 10% on the program that was worst, measured in a process of its own."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel does not tell the peak of the resident memory of a step")
    script = pathlib.Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
    command = [sys.executable, str(script), "--only", "scan, remat"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    name, arguments, growth, said, ratio, without = done.stdout.splitlines()[-1].strip("| ").split("|")
    assert name.strip() == "scan, remat" and float(ratio) == pytest.approx(1, abs=0.1)
    assert float(without) == pytest.approx(1, abs=0.1)


# -- side by side, and the command -----------------------------------------------------------------


def test_compare_in_every_form():
    loss_fn, params, batch = mlp(width=64, depth=2)
    ready = plan(loss_fn, params, adam, batch, label="ready")
    items = [ready, {"label": "sgd | plain", "tx": jaxsgd.sgd(0.1)}, {"zero1": "data"}]
    found = compare(items, loss_fn, params, adam, batch, topology="cpu:8")
    assert (
        [p.label for p in found] == ["ready", "sgd | plain", "cpu:8 zero1=data"]
        and found[0] is ready
        and len(found) == 3
    )
    assert found.summary.startswith("3 of 3 plans fit") and found.table.rows[2][0] == "cpu:8 zero1=data"
    whole = found.text(verbose=True)
    assert max(map(len, whole.splitlines())) <= 80 and whole.index("temporaries") < whole.index("ready fits: needs")
    lines = [line.replace("\\|", "") for line in found.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert [entry["topology"] for entry in json.loads(found.to_json())["plans"]] == ["cpu", "cpu:8", "cpu:8"]
    console = pytest.importorskip("rich.console").Console(record=True, width=200, file=io.StringIO())
    console.print(found)
    assert "ready" in console.export_text()
    with pytest.raises(ValueError, match="at least one"):
        compare([], loss_fn, params, adam, batch)


def test_memory_bars_show_every_byte():
    """The stacks end where the needs do, and those that do not fit are hatched."""
    plot = pytest.importorskip("jaxsgd.plot")
    loss_fn, params, batch = mlp(width=64, depth=2)
    small = plan(loss_fn, params, adam, batch)
    huge = plan(*mlp(width=2**15, depth=40)[:2], adam, mlp(width=2**15)[2], suggest=False)
    figure = plot.memory_bars([huge, small])
    (ax,) = figure.axes
    ends = [
        max(bar.get_x() + bar.get_width() for bar in ax.patches if round(bar.get_y() + 0.31) == row) for row in (0, 1)
    ]
    assert ends[0] * GIB == pytest.approx(huge.needs, rel=1e-6) and ends[1] * GIB == pytest.approx(
        small.needs, rel=1e-3
    )
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cpu", "cpu"]
    assert {bar.get_hatch() for bar in ax.patches} == {None, "////"}
    with pytest.raises(ValueError, match="at least one"):
        plot.memory_bars([])


# -- programs as text ------------------------------------------------------------------------------

TEXT = """HloModule m

%fused (param_0: f32[24,64,128], param_1: s32[]) -> f32[64,128] {
  %param_0 = f32[24,64,128]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64,128]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %flat = f32[64,128]{1,0} bitcast(%slice)
}

%body (carried: (s32[], f32[24,64,128], f32[32,64])) -> (s32[], f32[24,64,128], f32[32,64]) {
  %carried = (s32[], f32[24,64,128]{2,1,0}, f32[32,64]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %w = f32[24,64,128]{2,1,0} get-tuple-element(%carried), index=1
  %x = f32[32,64]{1,0:T(8,128)S(1)} get-tuple-element(%carried), index=2
  %layer = f32[64,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %product = f32[32,128]{1,0} convolution(%x, %layer), dim_labels=bf_io->bf
  %sum = f32[32,128]{1,0} all-reduce(%product), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[24,64,128]{2,1,0}, f32[32,64]{1,0:T(8,128)S(1)}) tuple(%next, %w, %x)
}

%condition (carried.1: (s32[], f32[24,64,128], f32[32,64])) -> pred[] {
  %carried.1 = (s32[], f32[24,64,128]{2,1,0}, f32[32,64]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %limit = s32[] constant(24)
  ROOT %more = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (w.1: f32[24,64,128], x.1: f32[32,64]) -> f32[32,64] {
  %w.1 = f32[24,64,128]{2,1,0} parameter(0)
  %x.1 = f32[32,64]{1,0} parameter(1)
  %start = s32[] constant(4)
  %near = f32[32,64]{1,0:T(8,128)S(1)} copy(%x.1)
  %tuple = (s32[], f32[24,64,128]{2,1,0}, f32[32,64]{1,0:T(8,128)S(1)}) tuple(%start, %w.1, %near)
  %loop = (s32[], f32[24,64,128]{2,1,0}, f32[32,64]{1,0:T(8,128)S(1)}) while(%tuple), condition=%condition, body=%body
  ROOT %last = f32[32,64]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_a_program_is_counted_as_often_as_it_runs():
    """Ten turns of a loop that counts 4, 6, ..., 22; each loads one layer of all, and what lies near is not loaded."""
    totals = Program(TEXT).totals()
    assert dict(totals.flops) == {"f32": 10 * 2 * 32 * 128 * 64}
    layer, product = 4 * 64 * 128, 4 * 32 * 128
    turn = (layer + 4 + layer) + (layer + product) + 2 * product + 3 * 4
    assert totals.bytes == pytest.approx(4 * 32 * 64 + 10 * turn, rel=1e-3)
    ((kind, _), (count, size, wire)), *rest = totals.collectives.items()
    assert not rest and (kind, count, size) == ("all-reduce", 10, 10 * product) and wire == 10 * product * 2 * 3 / 4


LIBRARY_TEXT = """HloModule m

%fused (v: f32[8,64,256], s: f32[8,256,256]) -> f32[8,64,256] {
  %v = f32[8,64,256]{2,1,0} parameter(0)
  %s = f32[8,256,256]{2,1,0} parameter(1)
  %exp = f32[8,256,256]{2,1,0} exponential(%s)
  %view = f32[8,256,256]{2,1,0} bitcast(%exp)
  ROOT %dot = f32[8,64,256]{2,1,0} dot(%v, %view), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}
}

%plain (a: f32[8,64,256], b: f32[8,256,512]) -> f32[8,64,512] {
  %a = f32[8,64,256]{2,1,0} parameter(0)
  %b = f32[8,256,512]{2,1,0} parameter(1)
  %same = f32[8,256,512]{2,1,0} bitcast(%b)
  ROOT %dot.1 = f32[8,64,512]{2,1,0} dot(%a, %same), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}
}

ENTRY %main (x: f32[8,64,256], y: f32[8,256,256], z: f32[8,256,512]) -> f32[8,64,512] {
  %x = f32[8,64,256]{2,1,0} parameter(0)
  %y = f32[8,256,256]{2,1,0} parameter(1)
  %z = f32[8,256,512]{2,1,0} parameter(2)
  %first = f32[8,64,256]{2,1,0} fusion(%x, %y), kind=kCustom, calls=%fused, backend_config={"kind":KIND}
  ROOT %last = f32[8,64,512]{2,1,0} fusion(%first, %z), kind=kCustom, calls=%plain, backend_config={"kind":KIND}
}
"""


@pytest.mark.parametrize(("kind", "size"), [('"__ynn_fusion"', 4 * 8 * 256 * 256), ('"kLoop"', 0)])
def test_the_operand_that_a_library_makes_is_counted(kind, size):
    """The exponential is an array inside the first fusion; the operands of the second one are its arguments."""
    assert read_text(LIBRARY_TEXT.replace("KIND", kind)).scratch == size


def test_attention_on_the_cpu_counts_its_softmax():
    """What the compiler leaves out of the step: the scores (rows, heads, length, length) in float32, once."""

    def loss_fn(params, batch, key):
        q, k, v = (jnp.einsum("rld,dhe->rhle", batch, w) for w in params)
        scores = jax.nn.softmax(jnp.einsum("rhqe,rhke->rhqk", q, k))
        return jnp.mean(jnp.einsum("rhqk,rhke->rhqe", scores, v) ** 2)

    found = plan(jax.checkpoint(loss_fn), [shape(64, 2, 32)] * 3, adam, shape(2, 256, 64))
    copied = found.parts["copies inside kernels (estimate)"]
    assert copied == 4 * 2 * 2 * 256 * 256 and sum(found.parts.values()) == found.needs


# -- with the compilers ----------------------------------------------------------------------------


@pytest.mark.parametrize("topology", VENDORS)
def test_vendors_zero1(topology):
    """On eight devices an eighth of the state, by the compiler's own count of the arguments."""
    loss_fn, params, batch = mlp(width=512)
    whole = plan(loss_fn, params, adam, batch, topology=topology)
    split = plan(loss_fn, params, adam, batch, topology=topology, zero1="data")
    assert split.state_bytes <= (1 / 8 + 0.02) * whole.state_bytes
    assert split.argument <= whole.argument - (7 / 8 - 0.02) * whole.state_bytes
    assert {"all-gather"} <= set(split.collectives) and whole.collectives["all-reduce"].bytes >= 4 * whole.parameters
    assert sum(whole.flops.values()) == 3 * 3 * 2 * 8 * 512 * 512
    assert whole.bound is not None and whole.bound.seconds > 0
    assert "a step takes at least" in whole.text(verbose=True)


@pytest.mark.parametrize("topology", [pytest.param("v5e:1x1", marks=tpu), pytest.param("h100:1", marks=cuda)])
def test_vendors_bytes_of_an_update(topology):
    """Adam on one large matrix moves what it must: parameters and state read and written, gradients read."""
    target = lookup(topology)
    where = jax.sharding.SingleDeviceSharding(target.devices[0])
    size = 4096 * 4096
    like = lambda tree: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree)
    params = like({"w": shape(4096, 4096)})
    state = like(jax.eval_shape(adam.init, params))

    def update(params, state, grads):
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = target.compile(jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params))
    found = read(compiled)
    assert found.bytes == pytest.approx(7 * 4 * size, rel=0.01)
    assert found.kernels["fusion"] >= 1 and found.memory.temporaries < 0.05 * 4 * size
    if target.device.platform == "tpu":
        assert found.bytes == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.01)


@pytest.mark.parametrize("topology", ["cpu", pytest.param("v5e:1x1", marks=tpu), pytest.param("h100:1", marks=cuda)])
def test_convolutions_are_counted_alike(topology):
    """Forward, and backward to weights and input; at the border the places of the window outside do not count."""

    def loss_fn(params, batch, key):
        x = batch["x"]
        for kernel in params:
            labels = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=labels)
        return jnp.mean(x**2)

    found = plan(loss_fn, [shape(3, 3, 8, 16), shape(3, 3, 16, 32)], adam, {"x": shape(16, 8, 8, 8)}, topology=topology)
    met = (3 * 8 - 2) ** 2
    assert sum(found.flops.values()) == 2 * 16 * met * (2 * 8 * 16 + 3 * 16 * 32)


@tpu
@pytest.mark.parametrize("kind", [name for name, device in known().items() if device.platform == "tpu"])
def test_the_memory_of_a_tpu_is_what_its_compiler_says(kind):
    target = lookup(f"{kind}:2x2x1" if len(known()[kind].most) == 3 else f"{kind}:2x2")
    where = jax.sharding.SingleDeviceSharding(target.devices[0])
    x = jax.ShapeDtypeStruct((2**20, 2**18), jnp.float32, sharding=where)
    with pytest.raises(DoesNotFit) as error:
        target.compile(jax.jit(lambda x: x + 1).lower(x))
    assert error.value.has == pytest.approx(target.device.memory, rel=1e-4)
    assert error.value.needs > 2**40 and "ENTRY" in error.value.text


@cuda
@pytest.mark.parametrize("kind", [name for name, device in known().items() if device.platform == "cuda"])
def test_the_cuda_compiler_takes_every_gpu(kind):
    target = lookup(f"{kind}:2x4")
    assert len(target.devices) == 8 and math.prod(target.mesh({"data": 2, "model": -1}).shape.values()) == 8
    where = jax.sharding.SingleDeviceSharding(target.devices[0])
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=where)
    found = read(target.compile(jax.jit(lambda x: x @ x).lower(x)))
    assert found.flops == {"bf16": 2 * 256**3} and found.memory.arguments == 2 * 256**2


@pytest.mark.parametrize("topology", VENDORS)
def test_vendors_do_not_fit(topology):
    """Four billion parameters in float32 with Adam's moments on each device."""
    loss_fn, params, batch = mlp(width=2**14, depth=30)
    found = plan(loss_fn, params, adam, batch, topology=topology)
    assert (
        not found.fits and found.needs > 3 * found.parts["params"] and found.available == lookup(topology).device.memory
    )
    assert "does not fit: needs" in found.summary and "f32[30,16384,16384] 30 GiB" in found.why[1]
    assert any(s.what.startswith("ZeRO-1") for s in found.suggestions) and found.kernels and found.flops


@pytest.mark.slow
@pytest.mark.parametrize("topology", [pytest.param("v5e:4x4", marks=tpu), pytest.param("h100:8", marks=cuda)])
def test_vendors_a_large_transformer(topology, monkeypatch):
    """1.3 billion parameters with AdamW: answered, and it fits with ZeRO-1 and remat."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "examples"))
    from dataclasses import replace

    from char_model import PRESETS, build

    built = build(replace(PRESETS["1.3b"], dtype="bfloat16", remat=True))
    tx = jaxsgd.adamw(1e-3)
    found = plan(built.loss_fn, built.init, tx, built.batch, topology=topology, zero1="data")
    assert found.fits and found.parameters == 1_311_082_496 and found.compile_seconds < 180
    assert found.state_bytes <= 2 * 4 * found.parameters * (1 / found.devices + 0.02)
