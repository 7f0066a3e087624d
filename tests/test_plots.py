"""Figures: the artists hold the numbers they were given."""

import builtins
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from blr_optax import metrics, plots


@pytest.fixture
def calibration():
    return calibration_of_noise()


@functools.cache
def calibration_of_noise():
    @jax.jit
    def calibrate():
        probs = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (200, 4)))
        labels = jax.random.randint(jax.random.key(1), (200,), 0, 4)
        return metrics.calibration(probs, labels, bins=10)

    return jax.device_get(calibrate())


def heights(container):
    return [bar.get_height() for bar in container]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_reliability_diagram_shows_the_bins(calibration):
    fig = plots.reliability_diagram(calibration)
    diagram, counts = fig.axes
    accuracy, gap = diagram.containers
    filled = np.asarray(calibration.count) > 0
    assert 0 < filled.sum() < 10  # the test has empty bins to leave out
    np.testing.assert_allclose(heights(accuracy), calibration.accuracy[filled])
    tops = [bar.get_y() + bar.get_height() for bar in gap]
    np.testing.assert_allclose(tops, calibration.confidence[filled], rtol=1e-6)
    np.testing.assert_allclose(heights(counts.containers[0]), calibration.count[filled])
    np.testing.assert_allclose(
        [bar.get_x() for bar in accuracy], calibration.edges[:-1][filled], rtol=1e-6
    )
    assert f"ECE {float(calibration.ece):.3f}" in diagram.texts[0].get_text()
    assert f"MCE {float(calibration.mce):.3f}" in diagram.texts[0].get_text()
    assert (diagram.get_xlabel(), diagram.get_ylabel()) == ("confidence", "accuracy")
    assert counts.get_ylabel() == "examples"
    assert legend(diagram) == ["calibrated", "accuracy", "gap"]


def test_reliability_diagram_wants_one_class(calibration):
    probs, labels = np.full((4, 2), 0.5, np.float32), np.array([0, 1, 0, 1])
    classwise = jax.device_get(jax.jit(metrics.classwise_calibration)(probs, labels))
    with pytest.raises(ValueError, match=r"calibration has ece of shape \(2,\).*one class"):
        plots.reliability_diagram(classwise)
    fig = plots.reliability_diagram(jax.tree.map(lambda x: x[1], classwise))
    assert heights(fig.axes[0].containers[0]) == [0.5]


def test_entropy_histogram_has_two_unit_areas_over_common_bins():
    inside, outside = np.linspace(0, 0.5, 100), np.linspace(0.2, 1.3, 80)
    (ax,) = plots.entropy_histogram(inside, outside, bins=13, labels=("seen", "unseen")).axes
    assert legend(ax) == ["seen", "unseen"]
    assert "nats" in ax.get_xlabel()
    outlines = [patch.get_xy() for patch in ax.patches]
    assert len(outlines) == 2
    for values, xy in zip((inside, outside), outlines, strict=True):
        density, _ = np.histogram(values, np.linspace(0, 1.3, 14), density=True)
        drawn = xy[1 : 2 * 13 + 1 : 2, 1]
        np.testing.assert_allclose(drawn, density)


def test_regression_band_is_deviations_wide_and_sorted():
    x, mean = np.array([2.0, 0.0, 1.0]), np.array([20.0, 0.0, 10.0])
    fig = plots.regression_band(x, mean, 1.0, 3.0, data=([0.5], [4.0]), deviations=3)
    (ax,) = fig.axes
    line, data = ax.lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0], [1, 10], [2, 20]])
    np.testing.assert_array_equal(data.get_xydata(), [[0.5, 4.0]])
    both, weights = ax.collections
    for band, half in ((weights, 3 * 1.0), (both, 3 * 2.0)):
        at_zero = [y for path in band.get_paths() for x, y in path.vertices if x == 0]
        assert (min(at_zero), max(at_zero)) == (-half, half)
    assert legend(ax) == ["epistemic + aleatoric (3 sd)", "epistemic (3 sd)", "mean", "data"]


def test_regression_band_without_noise_has_one_band():
    (ax,) = plots.regression_band(jnp.arange(4.0), jnp.ones(4), jnp.ones(4)).axes
    assert legend(ax) == ["epistemic (2 sd)", "mean"]


def test_training_curves_draws_each_curve_at_its_steps():
    curves = {"a": jnp.array([3.0, 2.0, 1.0]), "b": np.array([1.0, 0.5, 0.25])}
    (ax,) = plots.training_curves(curves, steps=[0, 10, 20], xlabel="epoch", yscale="log").axes
    assert legend(ax) == ["a", "b"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("epoch", "loss", "log")
    for line, values in zip(ax.lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([[0, 10, 20], values], -1))
    assert ax.lines[0].get_color() != ax.lines[1].get_color()
    (ax,) = plots.training_curves({"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]}).axes
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 3]


def drawings(calibration):
    return [
        lambda **kw: plots.reliability_diagram(calibration, **kw),
        lambda **kw: plots.entropy_histogram([0.1, 0.2], [0.5], **kw),
        lambda **kw: plots.regression_band([0.0, 1.0], [0.0, 1.0], 1.0, **kw),
        lambda **kw: plots.training_curves({"a": [1.0, 2.0]}, **kw),
    ]


def test_given_axes_are_drawn_on_and_their_figure_is_returned(calibration, tmp_path):
    fig = Figure(layout="constrained")
    for ax, draw in zip(fig.subplots(2, 2).flat, drawings(calibration), strict=True):
        assert draw(ax=ax) is fig
        assert ax.has_data()
    fig.savefig(tmp_path / "panels.png")
    assert (tmp_path / "panels.png").stat().st_size > 10_000


def test_new_figures_leave_no_global_state(calibration):
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot.get_fignums() if pyplot else None
    assert all(isinstance(draw(), Figure) for draw in drawings(calibration))
    if pyplot:
        assert pyplot.get_fignums() == before
    else:
        assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_error_says_what_to_install(calibration, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith(("matplotlib", "mpl_toolkits")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for draw in drawings(calibration):
        with pytest.raises(ImportError, match=r"pip install 'blr_optax\[plot\]'"):
            draw()


def test_an_underconfident_model_shows_its_accuracy():
    """Accuracy 0.9 in a bin of confidence 0.6: the bar is seen up to 0.9, the gap over it."""
    probs = np.tile(np.array([[0.6, 0.4]], np.float32), (10, 1))
    labels = (np.arange(10) == 0).astype(int)
    found = jax.device_get(jax.jit(functools.partial(metrics.calibration, bins=5))(probs, labels))
    fig = plots.reliability_diagram(found)
    accuracy, gap = fig.axes[0].containers
    assert heights(accuracy) == [pytest.approx(0.9)]
    assert gap[0].get_facecolor()[3] == 0  # transparent: what is behind it is seen
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    x, y = fig.axes[0].transData.transform((0.7, 0.75))  # inside the gap, above the confidence
    row, column = pixels.shape[0] - int(y), int(x)
    around = pixels[row - 8 : row + 8, column - 8 : column + 8]
    blue = np.array([0x00, 0x72, 0xB2])
    assert np.mean(np.abs(around[..., :3].astype(int) - blue).max(-1) < 10) > 0.3


def luminance(color):
    """Relative luminance of WCAG 2."""
    rgb = np.asarray(to_rgb(color))
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_a_gap_is_seen_on_the_bar_and_on_white_in_the_colour_of_the_legend(calibration):
    both = calibration._replace(accuracy=1 - calibration.confidence)  # too sure, and not enough
    diagram = plots.reliability_diagram(both).axes[0]
    accuracy, gap = diagram.containers
    _, _, shown = diagram.get_legend().legend_handles
    for patch in (*gap, shown):
        assert patch.get_edgecolor() == gap[0].get_edgecolor() and patch.get_hatch() == "//"
        assert patch.get_facecolor()[3] == 0
    signs = np.sign([bar.get_height() for bar in gap])
    assert set(signs) == {-1.0, 1.0}
    line = luminance(gap[0].get_edgecolor()[:3])
    bar = luminance(accuracy[0].get_facecolor()[:3])
    assert (1.05 / (line + 0.05)) > 2 and (line + 0.05) / (bar + 0.05) > 2


@pytest.mark.parametrize("count", [10, 5_000, 400_000])
def test_nothing_is_cut_off_at_the_edges(calibration, count):
    """All that is drawn, labels included, lies on the figure, and panels do not overlap."""
    found = calibration._replace(count=np.full(len(calibration.count), float(count)))
    alone = plots.reliability_diagram(found)
    many = Figure(figsize=(9, 5), layout="constrained")
    for ax in many.subplots(1, 2):
        plots.reliability_diagram(found, ax=ax)
    for fig in (alone, many, *(draw() for draw in drawings(calibration)[1:])):
        renderer = FigureCanvasAgg(fig).get_renderer()
        fig.draw(renderer)
        (left, low), (right, high) = fig.get_tightbbox(renderer).get_points()
        width, height = fig.get_size_inches()
        assert left >= 0 and low >= 0 and right <= width and high <= height
        boxes = [ax.get_tightbbox(renderer) for ax in fig.axes]
        for i, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[:i])


def test_axes_placed_by_hand_have_a_panel_too(calibration):
    fig = Figure()
    ax = fig.add_axes((0.2, 0.2, 0.6, 0.6))
    assert plots.reliability_diagram(calibration, ax=ax) is fig
    FigureCanvasAgg(fig).draw()
    lower, upper = (one.get_position(original=False) for one in fig.axes)
    assert upper.y0 > lower.y1 and upper.y1 == pytest.approx(0.8)
