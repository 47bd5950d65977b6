"""Figures become model cards and tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from reward_pipeline.files import replace_file
from reward_pipeline.pair_metrics import Columns, intervals, number, span
from reward_pipeline.plots import plot_evaluation

SHOWN_SAMPLES = 12  # in samples.md


def write_evaluation(columns: Columns, metrics: dict[str, Any], directory: Path) -> list[str]:
    """`rewards.csv`, a row a pair, and `plots/` of one evaluation; returns the names of the plots."""
    (directory / "plots").mkdir()
    with replace_file(directory / "rewards.csv") as file:
        pandas.DataFrame(columns).to_csv(file, index=False)
    return plot_evaluation(columns, metrics, directory / "plots")


def model_card(
    metrics: dict[str, Any], settings: dict[str, Any], metadata: dict[str, Any], plots: Sequence[str]
) -> str:
    """README.md of a trained model: numbers and pictures first, then how they came about and how to use it.

    Args:
        metrics: `pair_metrics` on the validation split, with the training's own figures.
        settings: resolved settings of the training.
        metadata: of the processed data.
        plots: names of the pictures in `plots/`.
    """
    pictures = "\n".join(f"![{Path(name).stem.replace('_', ' ')}](plots/{name})" for name in plots)
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, trl, reward-trainer]
---
# Reward model

A one-label sequence classifier that scores how good an answer to a prompt is. Higher is better; only differences
between answers to one prompt have a meaning.

| on the validation split | |
|---|---|
| pairs / prompts, all unseen in training | {metrics["n"]:,} / {metrics["prompts"]:,} |
| accuracy, ties half | **{metrics["accuracy"]:.3f}** (95 % interval {intervals(metrics)}) |
| baseline: the longer answer wins | {metrics["longer_wins"]:.3f} |
| gain over it | {metrics["gain_over_longer_wins"]:+.3f} ({span(metrics["gain_over_longer_wins_interval"])}) |
| accuracy where the chosen answer is the shorter one | {number(metrics["shorter_chosen_accuracy"])} \
({span(metrics["shorter_chosen_interval"])}, n = {metrics["shorter_chosen_n"]:,}) |
| expected calibration error, Brier score | {metrics["ece"]:.3f}, {metrics["brier"]:.3f} |
| mean margin | {metrics["mean_margin"]:.3f} |
| reward mean, standard deviation | {metrics["reward_mean"]:.3f}, {metrics["reward_std"]:.3f} |
| rank correlation with length: rewards, margins | {number(metrics["spearman_reward_length"])}, \
{number(metrics["spearman_margin_length"])} |

The weights are the best of {metrics["candidates"]} checkpoint(s), chosen on up to
{settings["max_eval_samples"]} of these pairs: with several of them the accuracy is slightly optimistic.

{pictures}

## Origin
- base model: {settings["base_model"]}{", by LoRA, merged" if settings["use_peft"] else ""}
- data: {metadata["source"]}; {metrics["train_pairs"]:,} training pairs of at most {metadata["max_length"]} tokens
- {metrics["updates"]:,} updates of {metrics["pairs_per_update"]} pairs, learning rate {settings["learning_rate"]},
  {settings["num_train_epochs"]} epoch(s), centering {settings["center_rewards_coefficient"]}, seed {settings["seed"]};
  all settings in `settings.json`
- {metrics["train_seconds"]:,.0f} s in updates on {metrics["device"]}

## Use
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".")
messages = [{{"role": "user", "content": "What is 2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**inputs).logits.item())
```

## Limits
Reads {metadata["max_length"]} tokens: of a longer answer only the beginning counts, of a longer prompt start and end.
A small model: expect it to notice form, topic and language before facts.
"""


def samples_table(rows: Sequence[dict[str, Any]]) -> str:
    """Some of the answers before and after, in Markdown: evenly spread over the gain in reward."""
    ranked = sorted(rows, key=lambda row: row["reward_after"] - row["reward_before"])
    shown = [ranked[place] for place in np.linspace(0, len(ranked) - 1, min(SHOWN_SAMPLES, len(ranked))).astype(int)]
    lines = ["| prompt | before | after | reward |", "|---|---|---|---|"]
    for row in shown:
        cells = [row["prompt"][-1]["content"], row["before"], row["after"]]
        cells = [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells]
        lines.append(f"| {' | '.join(cells)} | {row['reward_before']:+.2f} → {row['reward_after']:+.2f} |")
    return "\n".join(lines) + "\n"
