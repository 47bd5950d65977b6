"""The pictures of the README, and its tables of results.

In:  `results.json`, beside this file.
Out: `images/pipeline.png`, `images/accuracy.png`; the two tables, as Markdown, on the terminal.

    python docs/pictures.py
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
RESULTS = HERE / "results.json"
IMAGES = HERE / "images"
DPI = 150
# colours; a page may be dark or light, so the pictures bring a white ground of their own
INK, SCRIPT, PLACE = "#222222", "#cfe2f7", "#eeeeee"  # lines and words, a script, what scripts read and write
MODEL, BASELINE = "#3b78b4", "#a8a8a8"  # what a model reaches, what is reached without one
# ---------------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 1.64, 0.6  # of a box
BOXES = {  # place of the middle, words, colour
    "pairs": (0, 2, "preference pairs:\nhub, files, sample", PLACE),
    "prepare": (2.1, 2, "load_helpsteer_\ndataset.py", SCRIPT),
    "look": (2.1, 0.4, "load_smollm_\nmodel.py", SCRIPT),
    "processed": (4.2, 2, "processed_\nhelpsteer/", PLACE),
    "base": (4.2, 0.4, "SmolLM2-135M-\nInstruct", PLACE),
    "train": (6.3, 2, "train_reward_\nmodel.py", SCRIPT),
    "align": (6.3, 0.4, "train_\nreinforce.py", SCRIPT),
    "judge": (8.4, 2, "reward_model_\noutput/", PLACE),
    "policy": (8.4, 0.4, "reinforce_\noutput/", PLACE),
    "demo": (10.5, 2, "reward_model_\ndemo.py", SCRIPT),
    "evaluate": (10.5, 1.2, "evaluate_reward_\nmodel.py", SCRIPT),
}
ARROWS = {
    "pairs": ["prepare"],
    "prepare": ["processed"],
    "processed": ["train", "align"],
    "base": ["look", "train", "align"],
    "train": ["judge"],
    "judge": ["demo", "evaluate", "align"],
    "align": ["policy"],
}


def draw_pipeline() -> Figure:
    """The scripts, and what they read and write."""
    figure = Figure(figsize=(10.5, 2.3), facecolor="white", layout="constrained")
    axes = figure.subplots()
    boxes = {}
    for name, (x, y, words, colour) in BOXES.items():
        shape = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor=colour,
            edgecolor=INK,
            linewidth=0.8,
        )
        boxes[name] = axes.add_patch(shape)
        axes.text(x, y, words, ha="center", va="center", fontsize=9.5, color=INK)
    for start, ends in ARROWS.items():
        for end in ends:
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "patchA": boxes[start], "patchB": boxes[end]}
            axes.annotate("", BOXES[end][:2], BOXES[start][:2], arrowprops={**arrow, "shrinkA": 0, "shrinkB": 2})
    axes.set(xlim=(-0.95, 11.45), ylim=(0, 2.4))
    axes.axis("off")
    return figure


def draw_accuracy(results: dict[str, Any]) -> Figure:
    """Bars from chance on, with their intervals."""
    rows = [(each, BASELINE) for each in results["baselines"]] + [(each, MODEL) for each in results["accuracy"]]
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for place, (each, colour) in enumerate(rows):
        axes.barh(place, each["value"] - 0.5, left=0.5, height=0.62, color=colour)
        end = each["value"]
        if each["low"] is not None:
            end = each["high"]
            axes.plot([each["low"], end], [place, place], color=INK, linewidth=1.4, marker="|", markersize=8)
        axes.text(end + 0.004, place, figure_of(each), va="center", color=INK)
    axes.set_yticks(range(len(rows)), [each["label"] for each, _ in rows])
    axes.invert_yaxis()
    last = max(each["high"] or each["value"] for each, _ in rows)
    axes.set(
        xlim=(0.5, last + 0.04),
        xlabel=f"accuracy on {results['n']:,} pairs with {results['prompts']:,} unseen prompts\n"
        "0.5 is chance; intervals are 95 %, over prompts",
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def figure_of(each: dict[str, Any]) -> str:
    """A rate with three decimals, with two where no interval says what the third one is worth."""
    return f"{each['value']:.{2 if each['low'] is None else 3}f}"


def accuracy_table(results: dict[str, Any]) -> str:
    """The bars as Markdown."""
    lines = ["| | accuracy (95 %) |", "|---|---|"]
    for each in results["baselines"] + results["accuracy"]:
        interval = "" if each["low"] is None else f" ({each['low']:.3f} to {each['high']:.3f})"
        lines.append(f"| {each['label']} | {figure_of(each)}{interval} |")
    return "\n".join(lines)


def reinforce_table(results: dict[str, Any]) -> str:
    """Before and after, by each judge, as Markdown."""
    lines = ["| reward by | before | after | gain at equal form (95 %) | win rate (95 %) |", "|---|---|---|---|---|"]
    for each in results["reinforce"]["judges"]:
        rate = f"{each['win_rate']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
        equal = f"{each['equal_form']:+.3f} ({each['equal_low']:.3f} to {each['equal_high']:.3f})"
        lines.append(f"| {each['label']} | {each['before']:+.3f} | {each['after']:+.3f} | {equal} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    IMAGES.mkdir(exist_ok=True)
    draw_pipeline().savefig(IMAGES / "pipeline.png", dpi=DPI)
    draw_accuracy(results).savefig(IMAGES / "accuracy.png", dpi=DPI)
    print(f"{accuracy_table(results)}\n\n{reinforce_table(results)}")


if __name__ == "__main__":
    main()
