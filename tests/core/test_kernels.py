"""One kernel unpacks, steps and packs: the numbers are the same. Here it is interpreted; compilers prove its form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsgd
from jaxsgd import fp8, int8, leaf, symmetric
from jaxsgd.planning.targets import lookup

RULES = ("adamw", "lion", "momentum", "nesterov", "adagrad", "rmsprop", "yogi", "adan", "schedule_free_adamw")


def _steps(tx, params, count=3, applies=False):
    """The updates of some steps at the same parameters, or the parameters after each."""
    step = (lambda grads, state, params: jaxsgd.update_params(tx, grads, state, params)) if applies else tx.update
    state, out, step = tx.init(params), [], jax.jit(step)
    for i in range(count):
        grads = jax.tree.map(lambda p, i=i: ((i + 1) * jnp.sin((i + 1) * 40 * p)).astype(p.dtype), params)
        new, state = step(grads, state, params)
        out.append(new)
    return out, state


@pytest.fixture
def interpreted(monkeypatch, retraced):
    """The TPU's kernel in place of the step; how often it was asked for, and gave a result."""
    made, kernel = [], leaf._step_in_kernel

    def everywhere(*arguments, tpu=None, default, **others):
        if tpu is None:
            return default(*arguments)
        with monkeypatch.context() as m:
            m.setattr(leaf, "in_kernel", lambda *a, on, **k: made.append(real(*a, on="interpret", **k)) or made[-1])
            return kernel(*tpu.args, *arguments, on="interpret")

    real = leaf.in_kernel
    monkeypatch.setattr(leaf, "platform_of", lambda arrays: "tpu")
    monkeypatch.setattr(leaf.jax.lax, "platform_dependent", everywhere)
    return made


def _same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        digit = 2**-7 if a.dtype == jnp.bfloat16 else 1e-5
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # A step that is the difference of two parameters has their rounding, 5e-7 at 4. And the compiler may fuse a
        # product and a sum in one program only: a code then goes to its other neighbour.
        assert a.shape == b.shape and np.mean(~np.isclose(a, b, rtol=digit, atol=5e-7)) < 1e-3


@pytest.mark.parametrize("applies", [False, True], ids=["update", "parameters"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_in_a_kernel_is_the_rule(rule, applies, interpreted, request):
    params, tx = {"w": jax.random.normal(jax.random.key(1), (70, 512))}, jaxsgd.RULES[rule](1e-2, storage=int8())
    got = _steps(tx, params, applies=applies)
    assert interpreted and all(out is not None for out in interpreted)
    request.getfixturevalue("monkeypatch").undo()
    jax.clear_caches()
    _same(got, _steps(jaxsgd.RULES[rule](1e-2, storage=int8()), params, applies=applies))


@pytest.mark.parametrize("applies", [False, True], ids=["update", "parameters"])
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [((3, 40, 256), "float32", {}), ((64, 768), "bfloat16", {}), ((64, 768), "bfloat16", {"rounding": "compensated"})],
    ids=str,
)
def test_shapes_and_dtypes_in_a_kernel(shape, dtype, options, applies, interpreted, request):
    params = {"w": jax.random.normal(jax.random.key(1), shape).astype(dtype)}
    make = functools.partial(jaxsgd.adamw, 1e-2, storage=int8(), **options)
    got = _steps(make(), params, applies=applies)
    assert interpreted and all(out is not None for out in interpreted)
    request.getfixturevalue("monkeypatch").undo()
    jax.clear_caches()
    _same(got, _steps(make(), params, applies=applies))


def test_eight_bit_floats_in_a_kernel(interpreted, request):
    params = {"w": jax.random.normal(jax.random.key(1), (70, 512))}
    got = _steps(jaxsgd.adamw(1e-2, storage=fp8()), params)
    assert interpreted and all(out is not None for out in interpreted)
    assert got[1].slots["mu"]["w"].floats.dtype == jnp.float8_e4m3fn
    request.getfixturevalue("monkeypatch").undo()
    jax.clear_caches()
    _same(got, _steps(jaxsgd.adamw(1e-2, storage=fp8()), params))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_with_eight_bit_floats_are_lowered(platform, monkeypatch, retraced):
    """To the code that the compilers of Mosaic and Triton read, which not on each device have eight-bit floats."""
    monkeypatch.setattr(leaf, "platform_of", lambda arrays: platform)
    tx, params = jaxsgd.adamw(1e-3, storage=fp8()), jax.ShapeDtypeStruct((64, 512), jnp.float32)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = [line for line in program.splitlines() if "custom_call" in line and "@Sharding" not in line]
    assert len(calls) == 1, program


@pytest.mark.parametrize(
    ("platform", "make", "calls"),
    [
        ("tpu", lambda: jaxsgd.adamw(1e-3, storage=int8()), 1),
        ("cuda", lambda: jaxsgd.lion(1e-3, storage=fp8()), 1),
        ("cuda", lambda: jaxsgd.muon(1e-3), 2 * 5),
        ("cuda", lambda: jaxsgd.soap(1e-3), 2),
    ],
    ids=["int8 on TPU", "fp8 on GPU", "muon on GPU", "soap on GPU"],
)
def test_kernels_in_shard_map(platform, make, calls, monkeypatch, retraced):
    """Its check asks of each result over which axes it varies."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for module in (leaf, symmetric):
        monkeypatch.setattr(module, "platform_of", lambda arrays: platform)
    tx, params, split = make(), jax.ShapeDtypeStruct((512, 512), jnp.float32), PartitionSpec("data")

    def step(params, state, grads):
        return jaxsgd.update_params(tx, jax.lax.pmean(grads, "data"), state, params)

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(), split), out_specs=PartitionSpec()
    )
    grads = jax.ShapeDtypeStruct((8 * 512, 512), jnp.float32)
    traced = jax.jit(mapped).trace(params, jax.eval_shape(tx.init, params), grads)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    kernels = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
    assert program.count(f"custom_call @{kernels[platform]}") == calls


@pytest.mark.parametrize(
    ("shape", "storage"), [((40_000,), int8()), ((64, 1000), int8()), ((64, 512), int8(block=64))], ids=str
)
def test_what_no_kernel_can_do_is_done_without(shape, storage, interpreted, request):
    params = {"w": jax.random.normal(jax.random.key(1), shape)}
    got = _steps(jaxsgd.adamw(1e-2, storage=storage), params)
    assert interpreted and all(out is None for out in interpreted)
    request.getfixturevalue("monkeypatch").undo()
    jax.clear_caches()
    _same(got, _steps(jaxsgd.adamw(1e-2, storage=storage), params))


@pytest.mark.parametrize(
    "topology",
    [
        pytest.param(name, marks=pytest.mark.compiler(platform))
        for name, platform in {"v5e:1x1": "tpu", "h100:1": "cuda"}.items()
    ],
)
@pytest.mark.parametrize("applies", [False, True], ids=["update", "parameters"])
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_the_compilers_make_one_kernel_of_it(rule, applies, topology):
    target = lookup(topology)
    there = NamedSharding(target.mesh(), PartitionSpec())
    tx, params = jaxsgd.RULES[rule](1e-3, storage=int8()), {"w": jax.ShapeDtypeStruct((2048, 4096), jnp.float32)}
    on = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there))
    state = jax.eval_shape(tx.init, params)
    update = (lambda g, s, p: jaxsgd.update_params(tx, g, s, p)) if applies else tx.update
    donated = (1, 2) if applies else 1
    step = target.compile(jax.jit(update, donate_argnums=donated).lower(on(params), on(state), on(params)))
    program = step.as_text()
    assert (
        sum(program.count(f'custom_call_target="{name}"') for name in ("tpu_custom_call", "__gpu$xla.gpu.triton")) == 1
    )
    large = [line for line in program.splitlines() if "2048,4096]" in line or "32768,256]" in line]
    assert not any(" fusion(" in line or " copy(" in line for line in large), "no other kernel touches the whole"
    assert step.memory_analysis().temp_size_in_bytes < 0.05 * 4 * 2048 * 4096
