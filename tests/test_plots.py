import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_pair_metrics import random_columns, scored

from reward_pipeline import plots
from reward_pipeline.pair_metrics import pair_metrics


@pytest.fixture
def figures(monkeypatch) -> dict[str, Figure]:
    """The figures that are saved, by file name; nothing is written."""
    saved = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: saved.update({path.name: figure}))
    return saved


def levels(axes) -> dict[str, float]:
    """Heights of the horizontal lines across a plot, by label."""
    lines = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    return {line.get_label(): line.get_ydata()[0] for line in lines if not line.get_label().startswith("_")}


def test_the_histogram_of_margins_shows_the_accuracy():
    columns = scored([2.0, 1.0, 0.0, 3.0, 0.5], [1.0, 1.0, 1.0, -1.0, 0.4])  # margins 1, 0, -1, 4, 0.1
    metrics = pair_metrics(columns)
    (axes,) = plots.plot_margins(columns, metrics).axes
    assert float(axes.get_title().split()[-1]) == metrics["accuracy"] == 0.7  # three are right, and half of the tie
    right, wrong = ([patch for patch in side.patches if patch.get_height()] for side in axes.containers)
    assert sum(bar.get_height() for bar in right) == 3 and sum(bar.get_height() for bar in wrong) == 2
    assert min(bar.get_x() for bar in right) >= 0 and min(bar.get_x() for bar in wrong) <= -1
    assert [text.get_text().split(": ")[1] for text in axes.get_legend().get_texts()] == ["3 pairs", "2 pairs"]


def test_equal_rewards_everywhere_can_be_drawn():
    columns = scored([1.0, 1.0], [1.0, 1.0])
    (axes,) = plots.plot_margins(columns, pair_metrics(columns)).axes
    assert sum(patch.get_height() for side in axes.containers for patch in side.patches) == 2


def test_groups_stand_beside_chance_and_their_own_baseline():
    groups = [
        {"group": "code", "n": 3, "accuracy": 0.6, "accuracy_interval": [0.2, 0.9], "longer_wins": 0.4},
        {"group": "$x$", "n": 1, "accuracy": 1.0, "accuracy_interval": None, "longer_wins": 0.0},
    ]
    (axes,) = plots.plot_groups(groups, "category").axes
    assert levels(axes) == {"chance": 0.5}
    baselines, bars = (
        next(each for each in axes.collections if (each.get_label() == label) == wanted)
        for label, wanted in (("longer wins", True), ("longer wins", False))
    )
    assert [segment[0][1] for segment in baselines.get_segments()] == [0.4, 0.0]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([0.2, 0.9])
    assert len(bars.get_segments()[1]) == 0  # no interval, no bar
    assert [label.get_text() for label in axes.get_xticklabels()] == ["code\nn = 3", "$x$\nn = 1"]


def test_plots_take_any_name_and_many_categories(tmp_path):
    columns = random_columns()
    columns["category"] = np.array([f"$x_$ {number % 30}" for number in range(400)])
    names = plots.plot_evaluation(columns, pair_metrics(columns), tmp_path)
    assert {"margins.png", "accuracy_by_category.png"} <= set(names)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_curves_have_the_lines_that_a_model_must_beat(figures, tmp_path):
    history = [
        {"step": 1, "loss": 0.7, "accuracy": 0.5, "learning_rate": 1e-5, "grad_norm": 2.0},
        {"step": 2, "eval_loss": 0.6, "eval_accuracy": 0.55},
        {"step": 2, "loss": 0.5, "accuracy": 0.6, "learning_rate": 0.0, "grad_norm": 1.0},
    ]
    plots.plot_curves(history, {"longer wins": 0.53, "form model": 0.6, "none": None}, tmp_path / "curves.png")
    panes = {axes.get_ylabel(): axes for axes in figures["curves.png"].axes}
    assert levels(panes["loss (nats)"]) == {"ln 2, equal rewards": pytest.approx(math.log(2))}
    assert levels(panes["accuracy (share of pairs)"]) == {"longer wins": 0.53, "form model": 0.6, "chance": 0.5}
    validation = next(line for line in panes["accuracy (share of pairs)"].lines if line.get_label() == "validation")
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([2], [0.55])
    assert {axes.get_xlabel() for axes in panes.values()} == {"updates"}


def test_lengths_are_drawn_against_the_limit(figures, tmp_path):
    lengths = {"chosen": np.array([10, 20, 30, 300]), "rejected": np.array([10, 40, 64, 65])}
    plots.plot_lengths(lengths, 64, tmp_path / "lengths.png")
    (axes,) = figures["lengths.png"].axes
    assert "25.0% are over the limit" in axes.get_title()  # 300 and 65; 64 fits
    assert axes.lines[0].get_xdata()[0] == 64
    assert "whole conversation" in axes.get_xlabel()
