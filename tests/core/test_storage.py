"""Eight-bit moments, and 16-bit parameters that do not lose small steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsgd
from jaxsgd import RULES, fp8, int4, int8
from jaxsgd.blockwise import (
    FLOATS,
    MEANS,
    MINIFLOATS,
    SQUARES,
    Blocks,
    Floats,
    decode,
    dynamic_map,
    encode_like,
    octave_codes,
    octave_values,
)
from jaxsgd.storage import accepts

WIDE = jax.random.normal(jax.random.key(0), (64, 600))


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_the_paper(signed):
    """Written as the paper and its authors' library have it: a table of 256 values."""
    counts = [2 ** (i if signed else i + 1) for i in range(7)]
    edges = [np.linspace(0.1, 1, count + 1) * 10.0 ** (i - 6) for i, count in enumerate(counts)]
    middles = np.concatenate([(e[1:] + e[:-1]) / 2 for e in edges])
    table = np.sort(np.concatenate([middles, -middles if signed else [], [0.0, 1.0]]))
    index = jnp.arange(256) - (127 if signed else 0)
    np.testing.assert_allclose(dynamic_map(index, signed), table, rtol=1e-6)
    # Nearest means nearest, for values of all sizes.
    x = np.concatenate([np.linspace(0, 1, 9999), 10.0 ** np.linspace(-8, 0, 9999)]).astype(np.float32)
    kept = int8(min_size=0, block=2**20, stochastic=False, map="dynamic").of_kind("mean" if signed else "square")
    back = kept.unpack(kept.pack(jnp.asarray(x)))
    nearest = np.abs(x[:, None] - table).min(axis=1)
    np.testing.assert_allclose(np.abs(back - x), nearest, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_the_octaves_go_to_the_nearest_value(signed):
    """Written as a table: in each octave eight values at equal distances, twice those of the octave below."""
    octaves = 16 if signed else 32
    table = np.concatenate([2.0**k * (1 + np.arange(8) / 8) - 1 for k in range(octaves)])
    table = table / table[-1]
    x = np.concatenate([np.linspace(0, 1, 9999), 10.0 ** np.linspace(-10, 0, 9999)]).astype(np.float32)
    kept = int8(min_size=0, block=2**20, stochastic=False).of_kind("mean" if signed else "square")
    back = kept.unpack(kept.pack(jnp.asarray(np.concatenate([x, -x]) if signed else x)))
    nearest = np.abs(x[:, None] - table).min(axis=1)
    for half in np.split(np.abs(back), 2) if signed else [back]:
        np.testing.assert_allclose(np.abs(half - x), nearest, rtol=1e-3, atol=3e-7)


def test_the_largest_value_of_a_map_is_exactly_1():
    for octaves in (*MEANS.values(), *SQUARES.values(), *MINIFLOATS.values()):
        assert octaves.top * (np.float32(1) / octaves.top) == 1
        assert octaves.value(jnp.int32(octaves.codes - 1)) == 1


def test_signs_of_octaves():
    """A code keeps the sign of its value; 0, -0 and NaN count as positive."""
    unit = jnp.asarray([-1, -0.5, -0.0, 0, 0.5, 1, jnp.nan, -jnp.nan], jnp.float32)
    codes = octave_codes(unit, None, True)
    np.testing.assert_array_equal(codes, [-127, codes[1], 0, 0, -codes[1], 127, 127, 127])
    np.testing.assert_array_equal(octave_values(-codes, True), -octave_values(codes, True))
    assert codes[1] < 0 and not np.signbit(octave_values(codes, True)[2])


def test_the_key_of_a_step_is_hashed_once_for_all_leaves():
    def count(leaves):
        params = {str(i): jnp.zeros((32, 128 * (i + 1))) for i in range(leaves)}
        tx = jaxsgd.adamw(1e-3, storage=int8())
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params)).count(" xor ")

    assert count(3) == count(1) > 0


def test_a_key_packs_as_what_is_drawn_from_it():
    kept, key = int8(), jax.random.key(3)
    x = jax.random.normal(jax.random.key(0), (32, 128))
    jax.tree.map(np.testing.assert_array_equal, kept.pack(x, key), kept.pack(x, kept.drawn(key)))


@pytest.mark.parametrize("kind", ["mean", "square"])
def test_four_bits_are_sixteen_values_of_which_a_square_is_never_0(kind):
    kept = int4(min_size=0, block=2**20, stochastic=False).of_kind(kind)
    octaves, least = (4, 1) if kind == "mean" else (8, 0)
    table = np.concatenate([2.0**k * (1 + np.arange(2) / 2) - least for k in range(octaves)])
    table = table / table[-1]
    x = np.linspace(-1 if kind == "mean" else 0, 1, 9998).astype(np.float32)[None]
    packed = kept.pack(jnp.asarray(x))
    assert packed.nibbles.shape == (1, 4999) and packed.nibbles.dtype == (jnp.int8 if kind == "mean" else jnp.uint8)
    back = np.abs(kept.unpack(packed))
    np.testing.assert_allclose(np.abs(back - np.abs(x)), np.abs(np.abs(x).T - table).min(axis=1)[None], atol=1e-6)
    assert len(np.unique(back)) == len(table)
    np.testing.assert_array_equal(decode(packed), kept.unpack(packed))
    np.testing.assert_array_equal(encode_like(packed, kept.unpack(packed)).nibbles, packed.nibbles)


@pytest.mark.parametrize("kind", ["mean", "square"])
def test_four_bits_have_the_right_mean_and_do_not_drift(kind):
    kept = int4(min_size=0).of_kind(kind)
    x = jnp.abs(WIDE[:2, :512]) + 0.1 if kind == "square" else WIDE[:2, :512]
    again = jax.jit(jax.vmap(lambda seed: kept.unpack(kept.pack(x, jax.random.key(seed)))))(jnp.arange(4_000))
    back = np.asarray(again, np.float64)
    distance = back.max(axis=0) - back.min(axis=0)
    assert np.max(np.abs(back.mean(0) - x) - 0.05 * distance) < 2e-3
    first = kept.pack(x, jax.random.key(0))
    for seed in range(50):
        assert all(map(np.array_equal, kept.pack(kept.unpack(first), jax.random.key(seed)), first))


def test_pain_9_four_bits_are_an_eighth_of_the_state():
    params = {"kernel": jnp.zeros((512, 1024)), "odd": jnp.zeros((512, 1025)), "bias": jnp.zeros(1024)}
    state = jaxsgd.adamw(1e-3, storage=int4()).init(params)
    held = sum(leaf.nbytes for slot in state.slots.values() for leaf in jax.tree.leaves(slot["kernel"]))
    assert held / params["kernel"].size == 1.0625
    assert state.slots["mu"]["odd"].dtype == state.slots["nu"]["bias"].dtype == jnp.float32, "they stay whole"
    with pytest.raises(ValueError, match="block=1: two neighbours share a byte"):
        int4(block=1)


@pytest.mark.parametrize("format", FLOATS)
@pytest.mark.parametrize("kind", ["mean", "square"])
def test_eight_bit_floats_are_those_of_the_format(format, kind):
    """To nearest they are what a conversion gives, subnormal numbers included; each finite number keeps its bits."""
    kept = fp8(min_size=0, block=2**20, stochastic=False, mean=format, square=format).of_kind(kind)
    top = float(jnp.finfo(FLOATS[format]).max)
    x = np.concatenate([[0.0, 1.0], np.linspace(0, 1, 9999), 10.0 ** np.linspace(-12, 0, 9999)]).astype(np.float32)
    x = np.concatenate([x, -x]) if kind == "mean" else x
    packed = kept.pack(jnp.asarray(x))
    assert isinstance(packed, Floats) and packed.floats.dtype == FLOATS[format] and packed.scale == 1
    wanted = (x * np.float32(top)).astype(FLOATS[format])
    np.testing.assert_array_equal(np.asarray(packed.floats).astype(np.float32), wanted.astype(np.float32))
    np.testing.assert_allclose(kept.unpack(packed), wanted.astype(np.float32) / top, rtol=2e-7)
    assert np.all(np.asarray(kept.unpack(packed))[x == 0] == 0)

    every = np.arange(256, dtype=np.uint8).view(FLOATS[format]).astype(np.float32)
    every = every[np.isfinite(every) & (~np.signbit(every) | (kind == "mean") & (every != 0))]
    held = Floats(jnp.asarray(every, FLOATS[format])[None], jnp.full((1, 1), 0.37))
    np.testing.assert_array_equal(decode(held), kept.unpack(held))
    at_random = dataclasses.replace(kept, stochastic=True)
    again = jax.jit(jax.vmap(lambda seed: at_random.pack(kept.unpack(held), jax.random.key(seed))))(jnp.arange(2_000))
    for part, got, before in zip(Floats._fields, again, held, strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), np.broadcast_to(before, got.shape), err_msg=part)


@pytest.mark.parametrize("kind", ["mean", "square"])
def test_eight_bit_floats_have_the_right_mean(kind):
    kept = fp8(min_size=0).of_kind(kind)
    x = jnp.abs(WIDE[:2, :512]) ** 3 if kind == "square" else WIDE[:2, :512] ** 3
    again = jax.jit(jax.vmap(lambda seed: kept.unpack(kept.pack(x, jax.random.key(seed)))))(jnp.arange(10_000))
    back = np.asarray(again, np.float64)
    # Of 10,000 draws of two neighbours the mean deviates by 0.005 distances; six deviations of 1,024 means.
    distance = back.max(axis=0) - back.min(axis=0)
    # A neighbour that is a quarter of the value away may not be drawn if its share is below 8 in 10,000.
    assert np.max(np.abs(back.mean(0) - x) - 0.03 * distance - np.abs(x) / 4 * 8 / 10_000) < 1e-5


@pytest.mark.parametrize("square", FLOATS)
def test_a_second_moment_stalls_if_it_is_rounded_to_nearest(square):
    """With ``b2=0.999`` a step changes it by less than half the distance of two neighbours."""
    large = jnp.full((1, 128), 10.0)
    grads = [jnp.concatenate([large, jnp.full((1, 128), small)], axis=1) for small in (1.0, 3.0)]

    def small_squares(**options):
        tx = jaxsgd.adam(1e-3, storage={"nu": fp8(min_size=0, square=square, **options)})
        step = lambda i, state: tx.update(jnp.where(i < 100, *grads), state, grads[0])[1]
        state = jax.jit(lambda: jax.lax.fori_loop(0, 1100, step, tx.init(grads[0])))()
        return float(decode(state.slots["nu"])[0, 128:].mean())

    first = 1 - 0.999**100
    truth = 0.999**1000 * first + (1 - 0.999**1000) * 9
    assert small_squares() == pytest.approx(truth, rel=0.05), "the mean of 128 walks, each off by 20% or so"
    assert small_squares(stochastic=False) < truth / 3, "it moves with the scale of its block alone"


@pytest.mark.parametrize("kind", ["mean", "square"])
def test_numbers_that_are_not_finite_stay_so_in_their_block(kind):
    kept = fp8(min_size=0, mean="e4m3", square="e4m3").of_kind(kind)
    x = jnp.ones((4, 512)).at[0, 3].set(jnp.nan).at[1, 3].set(jnp.inf).at[2, :256].set(3e38)

    @jax.jit
    def twice(x):
        once = kept.pack(x, jax.random.key(0))
        return once.floats.astype(jnp.float32), kept.unpack(kept.pack(kept.unpack(once), jax.random.key(1)))

    floats, back = twice(x)
    assert np.isfinite(floats[2:]).all(), "e4m3fn has no inf: what is larger than 448 would be NaN"
    assert not np.isfinite(back[:2, 3]).any()
    assert np.isfinite(back[:, 256:]).all() and np.isfinite(back[2:]).all()


def test_the_square_of_a_small_gradient_beside_a_large_one_is_not_0():
    """e4m3 spans 2e5, so that moments of gradients a thousandth of the largest are divided by eps; e5m2 spans 4e9."""
    g = jnp.full((64, 256), 1e-3).at[:, 0].set(1.0)

    def largest(square):
        """The largest step where the gradient is 0 after ten steps, with a step of Adam about 1."""
        tx = jaxsgd.adam(1.0, storage={"nu": fp8(min_size=0, square=square)})
        step = lambda i, carry: tx.update(jnp.where(i < 10, g, 0), carry[1], g)
        return float(jnp.max(jnp.abs(jax.jit(lambda: jax.lax.fori_loop(0, 11, step, (g, tx.init(g)))[0])())))

    assert largest("e5m2") < 1.3
    assert largest("e4m3") > 1000


def test_eight_bit_floats_in_words():
    for options, words in {"block": (100, "block=100: a power of two"), "min_size": (-1, "min_size=-1")}.items():
        with pytest.raises(ValueError, match=words[1]):
            fp8(**{options: words[0]})
    with pytest.raises(ValueError, match="square='e3m4': no format of eight-bit floats. Use 'e4m3' or 'e5m2'"):
        fp8(square="e3m4")
    with pytest.raises(ValueError, match="mean='float8_e4m3fn': no format"):
        fp8(mean="float8_e4m3fn")
    tx, other = (jaxsgd.rmsprop(0.1, storage=fp8(min_size=0, square=square)) for square in FLOATS)
    with pytest.raises(ValueError, match=r"keeps float8_e4m3fn, this storage keeps float8_e5m2. Use jaxsgd.migrate"):
        other.update(WIDE, tx.init(WIDE), WIDE)


def test_a_state_moves_between_eight_and_four_bits_and_float32():
    params = {"w": WIDE}
    ways = [jaxsgd.adam(0.1), *(jaxsgd.adam(0.1, storage=storage) for storage in (int4(), int8(), fp8()))]
    _, truth = ways[0].update(params, ways[0].init(params), params)
    state, texts = truth, []
    for tx in (ways[3], ways[1], ways[2], ways[1], ways[0]):
        state, report = jaxsgd.migrate(state, tx, params)
        texts.append(str(report))
    hows = ("packed at 8", "repacked at 4", "repacked at 8", "repacked at 4", "unpacked from 4")
    for text, how in zip(texts, hows, strict=True):
        assert f"mu, nu of w (76,800 elements): {how} bits" in text
    largest = float(jnp.max(jnp.abs(truth.slots["mu"]["w"])))
    np.testing.assert_allclose(state.slots["mu"]["w"], truth.slots["mu"]["w"], atol=0.19 * largest)  # half of 4 / 11


def test_four_bits_shard_like_their_parameter():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for spec in (PartitionSpec("data", None), PartitionSpec(None, "data")):
        split = NamedSharding(mesh, spec)
        params = jax.device_put(jnp.ones((64, 2048)), split)
        tx = jaxsgd.adam(0.1, storage=int4())
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert state.slots["mu"].nibbles.sharding.is_equivalent_to(split, 2)


@pytest.mark.parametrize("map", ["octaves", "dynamic"])
@pytest.mark.parametrize("kind", ["mean", "square"])
def test_a_value_of_the_map_never_moves(map, kind):
    """So that a moment without gradients keeps its value, however often it is rounded at random."""
    kept = int8(min_size=0, map=map).of_kind(kind)
    codes = np.arange(256) - 128 if kind == "mean" else np.arange(256)
    codes = np.clip(codes, -127, 127) if (map, kind) == ("octaves", "mean") else codes
    form = type(kept.zeros(jax.ShapeDtypeStruct((1, 256), jnp.float32)))
    packed = form(jnp.asarray(codes[None], jnp.int8 if kind == "mean" else jnp.uint8), jnp.full((1, 1), 0.37))
    again = jax.jit(jax.vmap(lambda seed: kept.pack(kept.unpack(packed), jax.random.key(seed)).scale))
    np.testing.assert_array_equal(again(jnp.arange(8)), 0.37 * np.ones((8, 1, 1), np.float32))
    repacked = jax.jit(jax.vmap(lambda seed: kept.pack(kept.unpack(packed), jax.random.key(seed))[0]))
    np.testing.assert_array_equal(repacked(jnp.arange(20_000)), np.broadcast_to(packed[0], (20_000, 1, 256)))


@pytest.mark.parametrize("map", ["octaves", "dynamic"])
@pytest.mark.parametrize("kind", ["mean", "square"])
def test_over_the_keys_each_element_has_the_right_mean(map, kind):
    kept = int8(min_size=0, map=map).of_kind(kind)
    x = jnp.abs(WIDE[:2, :512]) ** 3 if kind == "square" else WIDE[:2, :512] ** 3
    x = x.at[:, ::256].set(100.0)  # the dynamic map ends at -0.993 of the largest
    packed = jax.jit(jax.vmap(lambda seed: kept.unpack(kept.pack(x, jax.random.key(seed)))))
    back = np.asarray(packed(jnp.arange(10_000)), np.float64)
    # Of 10,000 draws of two neighbours the mean deviates by 0.005 distances; six deviations of 1,024 means.
    distance = back.max(axis=0) - back.min(axis=0)
    # A neighbour that is an eighth of the value away may not be drawn if its share is below 8 in 10,000.
    assert np.max(np.abs(back.mean(0) - x) - 0.03 * distance - np.abs(x) / 8 * 8 / 10_000) < 1e-5
    # And the errors at two keys have nothing to do with each other: their product is 1/12 at most, on 10,000 keys.
    error = (back - x) / np.where(distance > 0, distance, 1)
    assert abs(np.mean(error[1:] * error[:-1])) < 4e-3


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), exponent=st.integers(-30, 30), stochastic=st.booleans())
def test_what_is_packed_comes_back_to_two_digits(seed, exponent, stochastic):
    x = WIDE * 10.0**exponent
    kept = int8(min_size=0, stochastic=stochastic)
    packed = kept.pack(x, jax.random.key(seed))
    assert isinstance(packed, Blocks) and packed.codes.shape == x.shape and packed.scale.shape == (64, 3)
    back = kept.unpack(packed)
    # Neighbours are at most 1 / 15 of the block's largest apart, and 1 / 8 of a value as long as it is no tiny part.
    assert float(jnp.max(jnp.abs(back - x) / jnp.max(jnp.abs(x)))) < 0.067
    large = jnp.abs(x) > 1e-3 * jnp.max(jnp.abs(x))
    assert float(jnp.max(jnp.where(large, jnp.abs(back / x - 1), 0))) < 0.13


@pytest.mark.parametrize("shape", [(4096,), (3, 5000), (7, 11, 300), (5000, 1)])
def test_any_shape_and_zeros(shape):
    for kept in (*(int8(stochastic=False, map=map) for map in ("octaves", "dynamic")), fp8(stochastic=False)):
        x = jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
        assert np.max(np.abs(kept.unpack(kept.pack(x)) - x)) < 0.036  # half of 32 / 448 in e4m3
        assert not np.any(kept.unpack(kept.pack(jnp.zeros(shape))))
        written, packed = kept.zeros(jax.ShapeDtypeStruct(shape, x.dtype)), kept.pack(jnp.zeros(shape))
        jax.tree.map(np.testing.assert_array_equal, written, packed)


def test_the_mean_of_a_stochastic_code_is_the_value():
    kept, x = int8(min_size=0), jnp.full((100_000,), 0.123).at[0].set(1.0)
    assert float(kept.unpack(kept.pack(x, jax.random.key(1)))[1:].mean()) == pytest.approx(0.123, rel=1e-3)


def test_pain_9_eight_bits_are_a_quarter_of_the_state_and_train_alike():
    rng = np.random.RandomState(0)
    x, weight = jnp.asarray(rng.standard_normal((256, 64)), jnp.float32), rng.standard_normal((64, 128))
    y = x @ jnp.asarray(weight, jnp.float32)
    params = {"kernel": jnp.zeros((64, 128)), "embed": jnp.zeros((64, 128)), "bias": jnp.zeros(128)}

    def trained(**options):
        tx = jaxsgd.adam(0.03, **options)
        loss = lambda p: jnp.mean((x @ (p["kernel"] + p["embed"]) + p["bias"] - y) ** 2)

        def step(carry, _):
            p, state = carry
            value, grads = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grads, state, p)
            return (optax.apply_updates(p, updates), state), value

        (_, state), losses = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=300))()
        return state, losses

    packed, losses = trained(storage=int8(), groups=[("embed", {"storage": {}})])
    _, truth = trained()
    assert losses[-1] < 1e-3 * losses[0] and truth[-1] < 1e-3 * truth[0]
    for slot in ("mu", "nu"):
        held = packed.slots[slot]
        assert held["kernel"].codes.dtype == (jnp.int8 if slot == "mu" else jnp.uint8)
        # One byte an element, and a scale of four for each row of 128.
        assert sum(leaf.nbytes for leaf in held["kernel"]) == 64 * 128 + 64 * 4
        assert held["embed"].dtype == held["bias"].dtype == jnp.float32, "groups and small arrays opt out"


def test_pain_9_packed_state_shards_like_its_parameter():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data", None))
    params = jax.device_put(jnp.ones((64, 600)), split)
    tx = jaxsgd.adam(0.1, storage=int8())
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    for slot in ("mu", "nu"):
        assert state.slots[slot].codes.sharding.is_equivalent_to(split, 2)
        assert state.slots[slot].codes.addressable_shards[0].data.shape == (8, 600)


def test_pain_9_what_is_no_moment_stays_whole():
    state = jaxsgd.schedule_free_sgd(0.1, momentum=0.9, storage=int8(min_size=0)).init(WIDE)
    assert state.slots["z"].dtype == jnp.float32 and state.slots["trace"].codes.dtype == jnp.int8
    with pytest.raises(ValueError, match="no slot trace with these settings; kept are: z"):
        jaxsgd.schedule_free_sgd(0.1, storage=int8(min_size=0))
    with pytest.raises(ValueError, match=r"does not take a slot of the kind 'iterate'"):
        jaxsgd.schedule_free_sgd(0.1, storage={"z": int8()})
    with pytest.raises(ValueError, match="block=0"):
        int8(block=0)
    with pytest.raises(ValueError, match="min_size=-1"):
        int8(min_size=-1)
    with pytest.raises(ValueError, match="map='linear': known are octaves, dynamic"):
        int8(map="linear")


def test_an_average_that_may_be_negative_keeps_its_sign():
    """Sophia's estimate of the Hessian's diagonal is real, and no second moment."""
    p = jnp.linspace(-1, 1, 300)
    loss = lambda p: jnp.sum(jnp.sin(3 * p))
    whole, packed = jaxsgd.sophia(0.1), jaxsgd.sophia(0.1, storage=int8(min_size=0, stochastic=False))
    truth, held = (tx.update(jax.grad(loss)(p), tx.init(p), p, obj_fn=loss)[1].slots["nu"] for tx in (whole, packed))
    assert isinstance(held, Blocks) and float(truth.min()) < -0.08
    # Neighbours are at most 1 / 15 of the block's largest apart, and rounding to nearest is off by half of it.
    np.testing.assert_allclose(int8(min_size=0).unpack(held), truth, atol=0.034 * float(jnp.max(jnp.abs(truth))))


def marched(tx, dtype=jnp.bfloat16, steps=1000):
    """Ones that are to lose 1e-3 a step."""

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jnp.ones_like(p, jnp.float32), state, p)
        return (optax.apply_updates(p, updates), state), None

    p = jnp.ones((512,), dtype)
    return jax.jit(lambda: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0])()


def test_pain_10_a_thousand_small_steps_move_bf16_weights():
    stuck, _ = marched(jaxsgd.sgd(1e-3))
    assert np.all(stuck == 1), "to nearest, 1 - 0.001 is 1"
    at_random, _ = marched(jaxsgd.sgd(1e-3, rounding="stochastic"))
    kept, state = marched(jaxsgd.sgd(1e-3, rounding="compensated"))
    assert at_random.dtype == kept.dtype == jnp.bfloat16
    # The sum of 1,000 roundings of one neighbour distance (2**-8) each has a deviation below 0.13.
    assert abs(float(at_random.astype(jnp.float32).mean())) < 0.02
    whole = kept.astype(jnp.float32) + state.slots["rounded_off"].astype(jnp.float32)
    # What is kept has eight digits of its own: 1e-3 is rounded to them once a step.
    np.testing.assert_allclose(whole, 0, atol=5e-3)


def test_pain_10_float16_and_float32():
    kept, _ = marched(jaxsgd.sgd(1e-4, rounding="compensated"), jnp.float16)
    np.testing.assert_allclose(kept, 0.9, atol=2e-3)
    for rounding in ("stochastic", "compensated"):
        wide, state = marched(jaxsgd.sgd(1e-3, rounding=rounding), jnp.float32, 10)
        np.testing.assert_allclose(wide, 0.99, rtol=1e-6)
        assert state.slots.get("rounded_off") is None


def test_pain_10_every_replica_rounds_alike():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx, p = jaxsgd.sgd(1e-3, rounding="stochastic"), jnp.ones((64, 8), jnp.bfloat16)
    grads = jnp.ones((64, 8))
    alone, _ = jax.jit(tx.update)(grads, tx.init(p), p)
    for spec in (PartitionSpec(), PartitionSpec("data", None)):
        put = lambda x, spec=spec: jax.device_put(x, NamedSharding(mesh, spec))
        there, _ = jax.jit(tx.update)(put(grads), tx.init(put(p)), put(p))
        np.testing.assert_array_equal(there, alone)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("around", ["accumulate", "accumulate 2", "sam", "opaque sam", "guard"])
def test_what_is_around_a_rule_leaves_its_rounded_steps(around, rounding):
    """Their sum with the parameter is exact; in the parameter's dtype it would be rounded once more."""
    make = {
        "accumulate": lambda tx: jaxsgd.accumulate(tx, 1),
        "accumulate 2": lambda tx: jaxsgd.accumulate(tx, 2),
        "sam": lambda tx: jaxsgd.sam(tx, optax.sgd(0.5)),
        "opaque sam": lambda tx: jaxsgd.sam(tx, optax.sgd(0.5), opaque_mode=True),
        "guard": jaxsgd.guard,
    }[around]
    calls = 2 if around in ("accumulate 2", "sam") else 1
    alone, inside = jaxsgd.sgd(1.0, rounding=rounding), make(jaxsgd.sgd(1.0, rounding=rounding))
    start = jnp.full(4, 0.0099, jnp.bfloat16)
    params, state, wanted, kept = start, inside.init(start), start, alone.init(start)
    extra = {"grad_fn": lambda p, i: grads} if around == "opaque sam" else {}
    for i in range(20):
        grads = jnp.asarray([-1.003, -0.7531, 0.3377, 2.2222], jnp.bfloat16) * (-1) ** i
        updates, kept = alone.update(grads, kept, wanted)
        wanted = optax.apply_updates(wanted, updates)
        for _ in range(calls):
            updates, state = inside.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params.astype(jnp.float32), wanted.astype(jnp.float32))


def test_rounding_in_words():
    with pytest.raises(ValueError, match="rounding='stochastic': w is float16"):
        jaxsgd.sgd(1e-3, rounding="stochastic").init({"w": jnp.ones(2, jnp.float16)})
    with pytest.raises(ValueError, match="rounding='kahan': known are None, 'stochastic', 'compensated'"):
        jaxsgd.sgd(0.1, rounding="kahan")
    tx = jaxsgd.sgd(0.1, rounding="stochastic")
    with pytest.raises(ValueError, match="params: sgd needs them"):
        tx.update(WIDE, tx.init(WIDE))
    with pytest.raises(ValueError, match="made by another optimizer"):
        tx = jaxsgd.sgd(0.1, rounding="compensated")
        tx.update(WIDE, jaxsgd.sgd(0.1).init(WIDE), WIDE)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_any_rule_with_eight_bits_and_compensated_weights(name):
    params = {"w": jnp.ones((16, 24), jnp.bfloat16), "b": jnp.ones((24,), jnp.bfloat16)}
    takes = any(accepts(int8(), RULES[name].slots[slot].kind) for slot in RULES[name](0.01).lift.slots)
    tx = RULES[name](0.01, storage=int8(min_size=0) if takes else None, rounding="compensated")

    def step(carry, key):
        params, state = carry
        grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
        loss = lambda p: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p))
        extended = optax.with_extra_args_support(tx)
        updates, state = extended.update(grads, state, params, value=loss(params), obj_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 20)
    end, state = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys)[0])()
    assert {x.dtype for x in jax.tree.leaves(end)} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((end, state)))
    # Steps of some rules begin far below a digit of bf16: they are in what was rounded off.
    lost = state.slots["rounded_off"]
    assert any(bool(jnp.any(end[k] != params[k]) | jnp.any(lost[k] != 0)) for k in params)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size, block", [(600, 256), (512, 256), (100, 256), (257, 1), (7, 2)])
@pytest.mark.parametrize("map", ["octaves", "dynamic"])
def test_blocks_say_what_packed_them(signed, size, block, map):
    packer = int8(block=block, min_size=0, stochastic=False, map=map)
    packer = packer if signed else packer.of_kind("square")
    x = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    x = x if signed else x * x
    packed = packer.pack(jnp.asarray(x))
    np.testing.assert_array_equal(decode(packed), packer.unpack(packed))
    jax.tree.map(np.testing.assert_array_equal, encode_like(packed, jnp.asarray(x)), packed)
