"""Pictures show what was computed."""

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd import plot


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
