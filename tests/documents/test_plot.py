"""Pictures show what was computed."""

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd import plot
from jaxsgd.tuning.pick import Entry
from jaxsgd.tuning.probe_result import Rate


def test_a_path_is_the_loop_by_hand():
    fn, start = plot.LANDSCAPES["bowl"].fn, plot.LANDSCAPES["bowl"].start
    visited = plot.path(jaxsgd.sgd(0.1), fn, start, 5)
    w = np.array(start)
    for step in range(5):
        np.testing.assert_allclose(visited[step], w, rtol=1e-5)
        w = w - 0.1 * np.array([2 * w[0], 8 * w[1]])
    assert visited.shape == (6, 2)
    # gradient_at moves where the gradient is taken.
    ahead = plot.path(jaxsgd.velocity(0.03), fn, start, 5, gradient_at=jaxsgd.look_ahead)
    assert np.abs(ahead - plot.path(jaxsgd.velocity(0.03), fn, start, 5)).max() > 0.01


@pytest.mark.parametrize("name", plot.LANDSCAPES)
def test_landscapes_are_what_they_say(name):
    land = plot.LANDSCAPES[name]
    assert land.bounds[0] <= land.start[0] <= land.bounds[1] and land.bounds[2] <= land.start[1] <= land.bounds[3]
    lowest = float(land.fn(jnp.asarray(land.minimum)))
    near = [
        float(land.fn(jnp.asarray(land.minimum) + 0.05 * jnp.asarray(d))) for d in ((1, 0), (-1, 0), (0, 1), (0, -1))
    ]
    assert all(value > lowest for value in near) and float(land.fn(jnp.asarray(land.start))) > lowest


@pytest.mark.parametrize("name", plot.LANDSCAPES)
def test_paths_draws_a_panel_each(name, tmp_path):
    figure = plot.paths({"sgd": jaxsgd.sgd(1e-3), "adam": jaxsgd.adam(0.1), "optax": optax.sgd(1e-3)}, name, 10)
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title().split(":")[0] for ax in panels] == ["sgd", "adam", "optax"]
    line = panels[1].lines[0].get_xydata()
    np.testing.assert_allclose(
        line, plot.path(jaxsgd.adam(0.1), plot.LANDSCAPES[name].fn, plot.LANDSCAPES[name].start, 10)
    )
    image = matplotlib.image.imread(plot.save(figure, tmp_path / "new" / "paths.png"))
    assert image.std() > 0.05, "an empty picture"


def test_a_diverging_path_says_so():
    figure = plot.paths({"sgd": jaxsgd.sgd(10.0)}, "rosenbrock", 40)
    assert figure.axes[0].get_title() == "sgd: diverged"


def test_loss_curves_show_the_losses():
    figure = plot.loss_curves({"a": [3.0, 2.0, 1.0], "b": ([10, 20], [0.5, 0.25])}, title="T")
    (ax,) = figure.axes
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 3], [2, 2], [3, 1]])
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[10, 0.5], [20, 0.25]])
    assert ax.get_yscale() == "log" and ax.get_title(loc="left") == "T"
    assert plot.loss_curves({"a": [1.0, -1.0]}).axes[0].get_yscale() == "linear"
    smoothed = plot.loss_curves({"a": [4.0, 0.0, 0.0]}, smooth=0.5, log=False).axes[0].lines
    np.testing.assert_array_equal(smoothed[1].get_ydata(), [4, 2, 1])


def test_bad_input_in_words():
    with pytest.raises(ValueError, match="landscape='bowls': known are bowl"):
        plot.paths({"sgd": jaxsgd.sgd(0.1)}, "bowls")
    with pytest.raises(ValueError, match="transformations: at least one"):
        plot.paths({})
    with pytest.raises(ValueError, match="curves: at least one"):
        plot.loss_curves({})
    with pytest.raises(ValueError, match="smooth=1.5"):
        plot.loss_curves({"a": [1.0]}, smooth=1.5)


# -- the tools for the learning rate --------------------------------------------------------------


def drawn(figure, tmp_path):
    """The lines of every panel, by label; the figure can be written."""
    assert plot.save(figure, tmp_path / "picture.png").stat().st_size > 5_000
    return {line.get_label(): line for ax in figure.axes for line in ax.get_lines()}


def swept(**changes):
    losses = np.array([[4.0, 3.0, 2.0], [4.0, 2.0, 1.0], [4.0, 3.0, 2.5], [4.0, np.nan, np.nan]], np.float32)
    fields = {
        "values": {"learning_rate": np.array([0.1, 0.3, 0.1, 1.0]), "seed": np.array([0, 0, 1, 0])},
        "metrics": {"loss": losses}, "diverged_at": np.array([-1, -1, -1, 1]), "final": np.array([2.0, 1, 2.5, np.inf]),
        "window": 1, "states": None, "strategy": "map", "reason": "", "compiles": 1, "compile_seconds": 0.0,
        "seconds": 0.0,
    }  # fmt: skip
    return jaxsgd.Sweep(**{**fields, **changes})


def test_a_sweep_shows_means_and_who_diverged(tmp_path):
    figure = plot.sweep(swept())
    lines = drawn(figure, tmp_path)
    np.testing.assert_allclose(lines["diverged"].get_xdata(), [1.0])
    assert lines["diverged"].get_marker() == "^" and lines["diverged, or off the scale"].get_xdata()[0] == 1
    means = next(line for line in figure.axes[1].get_lines() if len(line.get_xdata()) == 2)
    np.testing.assert_allclose(means.get_xydata(), [[0.1, 2.25], [0.3, 1.0]])
    with pytest.raises(ValueError, match="by='b1': swept were learning_rate, seed"):
        plot.sweep(swept(), by="b1")
    with pytest.raises(ValueError, match="no states"):
        swept().member(0)
    everything_lost = {"diverged_at": np.zeros(4, int), "final": np.full(4, np.inf)}
    drawn(plot.sweep(swept(**everything_lost)), tmp_path)


def test_good_curves_fill_a_sweep_whatever_the_others_do(tmp_path):
    """Spikes of a thousand times the loss, and a run that grows: the best curves still take most of the height."""
    calm = 0.1 + 2 * np.exp(-np.arange(100) / 20)
    spiked, grown = calm.copy(), 2 * np.exp(np.arange(100) / 10)
    spiked[[30, 60, 61, 90]] = 2000.0
    losses = np.stack([calm, spiked, grown]).astype(np.float32)
    fields = {"values": {"learning_rate": np.array([0.1, 0.3, 1.0])}, "metrics": {"loss": losses}}
    fields |= {"diverged_at": np.array([-1, -1, -1]), "final": losses[:, -5:].mean(1)}
    figure = plot.sweep(swept(**fields))
    lines = drawn(figure, tmp_path)
    left, right = figure.axes
    assert left.get_ylim()[1] < 20 and right.get_ylim()[1] < 20
    assert right.get_lines()[0].get_xdata()[-1] == 0.3 and lines["off the scale"].get_xdata()[0] == 1.0
    bold = [line for line in left.get_lines() if line.get_alpha() is None and len(line.get_xdata()) == 100]
    assert bold[-1].get_ydata().max() < 3, "the best is drawn last"


def test_numbers_on_axes_have_one_size():
    figure = plot.loss_curves({"a": np.linspace(3.0, 0.7, 20)})
    figure.draw_without_rendering()
    (ax,) = figure.axes
    labels = [t for t in (*ax.get_yticklabels(which="both"), *ax.get_xticklabels()) if t.get_text()]
    assert {t.get_fontsize() for t in labels} == {8.0}
    assert {"1", "2"} <= {t.get_text() for t in labels}, "plain numbers, between the decades too"


def test_a_probe_and_its_range_test_are_drawn(tmp_path):
    rates = np.geomspace(1e-4, 1e-1, 4)
    ends, verdicts = [2.0, 1.0, 0.5, np.inf], ["too low", "good", "good", "diverged"]
    rows = tuple(
        Rate(r, 10, 2.1, e, 2.1 - e, v, 0.0, "") for r, e, v in zip(rates.tolist(), ends, verdicts, strict=True)
    )
    losses = np.geomspace(2.0, 1.0, 20)
    test = jaxsgd.RangeTest(np.geomspace(1e-6, 1, 20), losses, losses, 1e-2, 1e-3, None, 20)
    found = jaxsgd.Probe(5e-3, (2e-3, 1e-2), "high", ("why",), rows, np.ones((4, 10)), 10, 0.01, 40, 0.1, 1e-3, test)
    figure = plot.probe(found)
    lines, points = drawn(figure, tmp_path), {c.get_label(): c.get_offsets() for c in figure.axes[0].collections}
    assert lines["suggested 0.005"].get_xdata()[0] == 5e-3 and lines["steepest 0.01"].get_xdata()[0] == 1e-2
    assert list(lines["diverged"].get_xdata()) == [0.1] and len(points["good"]) == 2
    assert "valley 0.001" in drawn(plot.range_test(test), tmp_path)
    nothing = jaxsgd.Probe(None, None, "low", ("noise",), rows, np.ones((4, 10)), 10, 0.5, 40, 0.1, 1e-3)
    assert "no good rate" in plot.probe(nothing).axes[0].get_title(loc="left")


def test_sharpness_noise_curve_and_race_are_drawn(tmp_path):
    hessian = np.array([1.0, 5.0, 40.0, -2.0], np.float32)
    params, tx = {"w": jnp.ones(4)}, jaxsgd.momentum(0.1)
    sharp = jaxsgd.sharpness(lambda p, batch: 0.5 * jnp.sum(batch * p["w"] ** 2), params, hessian, tx=tx)
    figure = plot.sharpness(sharp)
    drawn(figure, tmp_path)
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["stable below:\nmomentum", "learning rate"]
    widths = [bar.get_width() for bar in figure.axes[1].patches]
    np.testing.assert_allclose(widths, [3.8 / 40, 0.1], rtol=1e-3)
    shown = [line.get_xdata() for line in figure.axes[0].get_lines() if line.get_marker() == "|"]
    low, high = figure.axes[0].get_xlim()
    assert all(low < x < high for values in shown for x in values), "no eigenvalue is cut off"
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].get_xticklabels() if t.get_text()]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False)), "numbers do not touch"

    known = {
        "scale": 50.0, "standard_error": 5.0, "low": 40.0, "high": 60.0, "known": True, "gradient_norm_sq": 1.0,
        "gradient_norm_sq_error": 0.1, "variance": 50.0, "variance_error": 2.0, "small": 2, "parts": 100,
        "population": None, "as_sample": 51.0, "batch_size": 64,
    }  # fmt: skip
    lines = drawn(plot.noise_scale(jaxsgd.NoiseScale(**known)), tmp_path)
    sizes, steps = lines["steps"].get_data()
    np.testing.assert_allclose(steps, 1 + 50 / sizes, rtol=1e-6)
    with pytest.raises(ValueError, match="could not be told"):
        plot.noise_scale(jaxsgd.NoiseScale(**{**known, "known": False}))

    losses = np.exp(-np.arange(100) / 10.0)
    figure = jaxsgd.diagnose(losses).plot()
    drawn(figure, tmp_path)
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), losses)
    assert figure.axes[0].get_title(loc="left") == "Verdict: good"

    scores = {"adamw": np.array([1.0, 1.2, 1.4]), "momentum": np.array([2.0, 2.2, np.inf])}
    entries = tuple(
        Entry(
            name, 1e-2, s, 3.0, float(s.mean()), 0.1, 1e-3, 1e-1, (True, True), False, np.ones(1), np.ones((1, 1)), {},
            0, 10, 5, 1,
        )
        for name, s in scores.items()
    )  # fmt: skip
    race = jaxsgd.Pick("adamw", "adamw", 1e-2, "adamw wins", entries, (), "training loss", 100, 3, 1000, 900, 0.3)
    figure = plot.pick(race)
    drawn(figure, tmp_path)
    assert figure.axes[0].get_title(loc="left") == "Winner: adamw"
    assert [len(line.get_xdata()) for line in figure.axes[0].get_lines() if line.get_marker() == "o"] == [3, 2]


def test_second_order_rules_walk_too():
    """Their extra arguments are those of the train step."""
    bowl = plot.landscapes.LANDSCAPES["bowl"]
    for tx in (jaxsgd.newton(), jaxsgd.lbfgs(), jaxsgd.sophia(0.1)):
        points = plot.landscapes.path(tx, bowl.fn, bowl.start, 6)
        assert points.shape == (7, 2) and bowl.fn(points[-1]) < bowl.fn(points[0])
