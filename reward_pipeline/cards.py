"""Figures become model cards and tables."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from reward_pipeline.files import replace_file, write_text
from reward_pipeline.mistakes import with_margins
from reward_pipeline.models import PACKAGE, PACKAGED_MODEL
from reward_pipeline.pair_metrics import Columns, difference, gain, number, span
from reward_pipeline.plots import plot_evaluation

SHOWN_SAMPLES = 12  # in samples.md
SHOWN_MARKS = ("bold", "headings", "bullets", "numbered_items", "code_fences")  # of form, in the card of a policy
SHOWN_MISTAKES = 20  # in mistakes.md
MISTAKE_LENGTH = 600  # characters of a text in it
FORM_TERM = """
This is the reward **without** the form term: what is left of a preference beyond length and mark-up, and the one to
optimise a policy for. The training added to it what the form model makes of an answer (`form_model` in `config.json`:
a weight for each count), and the sum is what says best which answer people prefer:

```python
from reward_pipeline import RewardModelEvaluator

RewardModelEvaluator(".", form=True).get_reward_score("What is 2 + 2?", "4")
```
"""
ROUNDED = """ There small margins depend on the batch;
`evaluate_reward_model.py --full_precision` gives figures that are the same on every machine."""
MARKUP = re.compile(r"[\\`*_\[\]|~$]")  # what would be read as Markdown within a cell


def write_evaluation(columns: Columns, metrics: dict[str, Any], directory: Path) -> list[str]:
    """`rewards.csv`, a row a pair, `mistakes.md` and `plots/` of one evaluation; returns the names of the plots."""
    (directory / "plots").mkdir()
    with replace_file(directory / "rewards.csv") as file:
        pandas.DataFrame(columns).to_csv(file, index=False)
    write_text(directory / "mistakes.md", mistakes_page(columns))
    return plot_evaluation(columns, metrics, directory / "plots")


def mistakes_page(columns: Columns) -> str:
    """The pairs that the model gets most wrong, in Markdown: their margins are the furthest below 0."""
    table = pandas.DataFrame(columns)
    wrong = with_margins(table)

    def answer(row: dict[str, Any], side: str) -> str:
        rated = "" if math.isnan(row[f"{side}_rating"]) else f", rated {row[f'{side}_rating']:g}"
        return f"**{row[f'{side}_reward']:+.3f}{rated}:** {cell(row[side], MISTAKE_LENGTH)}"

    lines = [
        "# Worst mistakes",
        "",
        f"In {len(wrong):,} of {len(table):,} pairs the rejected answer has the higher reward. These are at most "
        f"{SHOWN_MISTAKES} of them, the largest differences first. An answer stands after its reward and rating; texts "
        f"are cut to {MISTAKE_LENGTH} characters, `rewards.csv` has them whole.",
        "",
        "| margin | pair | prompt | chosen | rejected |",
        "|---|---|---|---|---|",
    ]
    for row in wrong.head(SHOWN_MISTAKES).to_dict("records"):
        cells = [f"{row['margin']:+.3f}", cell(row["place"]), cell(row["prompt"], MISTAKE_LENGTH)]
        lines.append(f"| {' | '.join([*cells, answer(row, 'chosen'), answer(row, 'rejected')])} |")
    return "\n".join(lines) + "\n"


def cell(text: str, limit: int | None = None) -> str:
    """Any text as one cell of a Markdown table, shown literally; what is longer than `limit` characters is cut."""
    text = " ".join(text.split())
    if limit and len(text) > limit:
        text = text[:limit] + " …"
    return MARKUP.sub(r"\\\g<0>", text).replace("&", "&amp;").replace("<", "&lt;")


def hub_ids(origin: str) -> list[str]:
    """Hub ids in words such as `hub org/name, train, revision 1a2b + local file pairs.csv`."""
    return re.findall(r"(?:^|\+ )(?:stream of )?hub ([^,\s]+)", origin)


def front_matter(base_model: str, source: str, **fields: Any) -> str:
    """What the hub reads of a card. Whatever can not be told from the origins is left out, not guessed.

    Args:
        base_model: origin of the base model in words, as `resolve_model` gives it.
        source: origin of the data in words, several joined by ` + `.
        fields: further ones of `ModelCardData`.
    """
    base = PACKAGED_MODEL if base_model.startswith(f"package {PACKAGE} ") else next(iter(hub_ids(base_model)), None)
    datasets = hub_ids(source)
    english = len(datasets) == len(source.split(" + ")) and all("helpsteer2" in name.lower() for name in datasets)
    data = ModelCardData(
        base_model=base,
        datasets=datasets or None,
        language="en" if english else None,
        license="apache-2.0" if base and base.startswith("HuggingFaceTB/SmolLM2") else None,
        library_name="transformers",
        **fields,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def dataset_card(metadata: dict[str, Any]) -> str:
    """README.md of prepared data: where the pairs come from, what became of them, and what the columns are.

    Args:
        metadata: of the processed data.
    """
    rows, sizes, origins = metadata["rows"], metadata["splits"], hub_ids(metadata["source"])
    data = DatasetCardData(
        source_datasets=origins or None,
        task_categories=["text-classification"],
        tags=["preference", "reward-modeling", "trl"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{name}/*.arrow"} for name in sizes],
            }
        ],
    )
    return f"""---
{data.to_yaml()}
---
# Preference pairs

{sizes["train"]:,} training and {sizes["validation"]:,} validation pairs, split by prompt with seed {metadata["seed"]},
from {metadata["source"]}.
Of {rows["pairs"]:,} pairs read {rows["dropped_total"]:,} were dropped; `metadata.json` says why and where.
The licence is that of the source.

`prompt`, `chosen` and `rejected` are message lists (TRL's conversational preference format), `chosen_rating` and
`rejected_rating` numbers or nothing, `category`, `chosen_author` and `rejected_author` texts, empty where unknown.
`chosen_ids` and `rejected_ids` are at most {metadata["max_length"]} token ids of {metadata["tokenizer"]}.

| | train | validation |
|---|---|---|
| longer answer wins | {number(metadata["longer_wins"]["train"])} | {number(metadata["longer_wins"]["validation"])} |
| form model | {number(metadata["form_wins"]["train"])} | {number(metadata["form_wins"]["validation"])} |

```python
from datasets import load_from_disk

pairs = load_from_disk("path of this directory")
```
"""


def reward_model_card(
    metrics: dict[str, Any], settings: dict[str, Any], metadata: dict[str, Any], plots: Sequence[str]
) -> str:
    """README.md of a trained reward model: numbers and pictures first, then how they came about and how to use it.

    Args:
        metrics: `pair_metrics` on the validation split, with the training's own figures.
        settings: resolved settings of the training.
        metadata: of the processed data.
        plots: names of the pictures in `plots/`.
    """
    source = metadata["source"]
    accuracy = EvalResult(
        task_type="text-classification",
        task_name="preference pairs",
        dataset_type=next(iter(hub_ids(source)), "preference-pairs"),
        dataset_name=source,
        dataset_split="validation",
        metric_type="accuracy",
        metric_name=f"pairwise accuracy, ties half (n = {metrics['n']}, 95 % interval "
        f"{span(metrics['accuracy_interval'])}; longer wins: {metrics['longer_wins']:.3f}, "
        f"form model: {number(metrics['form_wins'])})",
        metric_value=round(metrics["accuracy"], 4),
    )
    about = front_matter(
        settings["base_model"],
        source,
        pipeline_tag="text-classification",
        tags=["reward-model", "trl", "reward-trainer"],
        metrics=["accuracy"],
        model_name="reward model",
        eval_results=[accuracy],
    )
    sure = metrics["with_form"] or metrics  # a training with the form term made the sum a probability
    authors = (
        f"| baseline: who wrote it (n = {metrics['author_n']:,}) | {number(metrics['author_wins'])}, gain over it "
        f"{gain(metrics, 'authors')} |\n"
        if metrics["author_n"]
        else ""
    )
    pictures = "\n".join(f"![{Path(name).stem.replace('_', ' ')}](plots/{name})" for name in plots)
    return f"""{about}# Reward model

A one-label sequence classifier that scores how good an answer to a prompt is. Higher is better; only differences
between answers to one prompt have a meaning.

| on the validation split | |
|---|---|
| pairs / prompts, all unseen in training | {metrics["n"]:,} / {metrics["prompts"]:,} |
| accuracy, ties half | **{metrics["accuracy"]:.3f}** (95 % interval {span(metrics["accuracy_interval"])}) |
| baseline: the longer answer wins | {metrics["longer_wins"]:.3f} |
| gain over it | {gain(metrics, "longer_wins")} |
| baseline: the form model, which counts and does not read | {number(metrics["form_wins"])} |
| gain over it | {gain(metrics, "form")} |
| accuracy on the pairs that the form model gets wrong | {number(metrics["form_wrong_accuracy"])} \
({span(metrics["form_wrong_interval"])}, n = {metrics["form_wrong_n"]:,}) |
{authors}| accuracy where the chosen answer is the shorter one | {number(metrics["shorter_chosen_accuracy"])} \
({span(metrics["shorter_chosen_interval"])}, n = {metrics["shorter_chosen_n"]:,}) |
| accuracy with the prompts shuffled among the pairs, lost by it | {number(metrics["shuffled_prompt_accuracy"])}, \
{difference(metrics["shuffled_prompt_loss"], metrics["shuffled_prompt_loss_interval"])}, \
n = {metrics["shuffled_prompt_n"]:,} |
| accuracy of the own answer against another prompt's of the same length | {number(metrics["own_prompt_accuracy"])} \
({span(metrics["own_prompt_interval"])}, n = {metrics["own_prompt_n"]:,}) |
{form_rows(metrics["with_form"])}\
| expected calibration error, Brier score{" (with form)" if metrics["with_form"] else ""} | {sure["ece"]:.3f}, \
{sure["brier"]:.3f} |
| mean margin | {metrics["mean_margin"]:.3f} |
| reward mean, standard deviation | {metrics["reward_mean"]:.3f}, {metrics["reward_std"]:.3f} |
| rank correlation with length: rewards, margins | {number(metrics["spearman_reward_length"])}, \
{number(metrics["spearman_margin_length"])} |

The weights are the best of {metrics["candidates"]} checkpoint(s), chosen on up to
{settings["max_eval_samples"]} of these pairs: with several of them the accuracy is slightly optimistic.
Scored in {metrics["precision"]}.{"" if metrics["precision"] == "float32" else ROUNDED}

{pictures}

The pairs that it gets most wrong are in `mistakes.md`, all of them with their rewards in `rewards.csv`.

## Origin
- base model: {settings["base_model"]}{", by LoRA, merged" if settings["use_peft"] else ""}
- data: {source}; {metrics["train_pairs"]:,} training pairs of at most {metadata["max_length"]} tokens, answers to other
  prompts among them ({settings["mismatched_share"]:g} a pair)
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
{FORM_TERM if metrics["with_form"] else ""}
## Limits
A prompt is a message list that ends with a user turn (a plain text is one user turn), in the chat template saved here;
no system prompt is added. Reads {metadata["max_length"]} tokens. A conversation that fits is never cut; otherwise a
prompt of more than half of them loses its middle, and the answer its end. A small model: expect it to notice form,
topic and language before facts.
"""


def form_rows(whole: dict[str, Any] | None) -> str:
    """Rows of the card for the reward with the form term."""
    if not whole:
        return ""
    return f"""| **with the form term:** accuracy | **{whole["accuracy"]:.3f}** ({span(whole["accuracy_interval"])}) |
| gain over the form model | {gain(whole, "form")} |
"""


def policy_card(results: dict[str, Any], settings: dict[str, Any], log: Sequence[dict[str, float]]) -> str:
    """README.md of the policy.

    Args:
        results: content of `evaluation.json`.
        settings: resolved settings of the run.
        log: an entry an update.
    """

    def row(name: str, prefix: str) -> str:
        if results[f"{prefix}win_rate"] is None:
            return f"| {name} | – | – | – | – |"
        return (
            f"| {name} | {results[f'{prefix}reward_before']:+.3f} → {results[f'{prefix}reward_after']:+.3f} | "
            f"{results[f'{prefix}reward_gain']:+.3f} ({span(results[f'{prefix}reward_gain_interval'])}, "
            f"p = {results[f'{prefix}wilcoxon_p']:.2g}) | {results[f'{prefix}reward_gain_at_equal_form']:+.3f} "
            f"({span(results[f'{prefix}reward_gain_at_equal_form_interval'])}) | "
            f"{results[f'{prefix}win_rate']:.3f} ({span(results[f'{prefix}win_rate_interval'])}) |"
        )

    def counted(name: str) -> str:
        each = results["form_counts"][name]
        words = name.replace("_", " ")
        return f"| answers with {words} | {each['answers_before']} | {each['answers_after']} |"

    about = front_matter(
        settings["base_model"], settings["source"], pipeline_tag="text-generation", tags=["reinforce", "rlhf"]
    )
    constraints = "".join(
        f"| {kind.replace('_', ' ')} | {each['n']} | {each['before']:.3f} | {each['after']:.3f} |\n"
        for kind, each in results["constraint_kinds"].items()
    )
    marks = "\n".join(counted(name) for name in SHOWN_MARKS)
    return f"""{about}# Policy aligned by REINFORCE

Sampled answers to {results["n"]:,} prompts that the training did not see, before (SFT) and after, with the same random
numbers. Intervals are 95 %.

| by | mean reward | gain | gain at equal form | win rate against SFT |
|---|---|---|---|---|
{row("the reward model of the training", "")}
{row("second reward model", "second_judge_")}
{row("the reward function", "function_")}

The gain at equal form is what no change of length or mark-up explains: the intercept of a regression of the differences
in reward on the differences in 25 counts of form.

| | before | after |
|---|---|---|
| length (tokens) | {results["length_before"]:.1f} | {results["length_after"]:.1f} |
| distinct 3-grams | {results["distinct3_before"]:.3f} | {results["distinct3_after"]:.3f} |
| repetition of 3-grams | {results["repetition_before"]:.3f} | {results["repetition_after"]:.3f} |
| share that ended | {results["ended_before"]:.3f} | {results["ended_after"]:.3f} |
| KL to SFT (nats per answer) | 0 | {results["kl"]:.2f} |
| form model's score (nats) | {results["form_score_before"]:+.3f} | {results["form_score_after"]:+.3f} |
{marks}

![training](plots/training.png)
![before and after](plots/before_and_after.png)
![drift of form](plots/drift.png)

## Constraints that a rule checks
Answers to {results["constraint_n"]:,} of these prompts with a constraint joined to each, in wordings that no training
sees: {number(results["constraint_pass_before"])} → {number(results["constraint_pass_after"])} keep it, a gain of
{difference(results["constraint_pass_gain"], results["constraint_pass_gain_interval"])}. Of the answers without it
{number(results["constraint_unasked_before"])} → {number(results["constraint_unasked_after"])} would keep it by chance.

| constraint | n | before | after |
|---|---|---|---|
{constraints}
## Origin
- SFT model: {settings["base_model"]}; reward model: {settings["reward_model"]}; prompts: {settings["source"]}
- {len(log):,} updates of {settings["completions_per_step"]} completions of at most {settings["max_new_tokens"]} tokens,
  temperature {settings["temperature"]}, learning rate {settings["learning_rate"]}, KL coefficient
  {settings["kl_coefficient"]}, baseline "{settings["baseline"]}", seed {settings["seed"]}; the others are in
  `settings.json`

Rewards are in standard deviations of the reward model on its validation split. A higher reward is not the same as a
better answer: read `samples.md`.
"""


def samples_page(rows: Sequence[dict[str, Any]], constrained: Sequence[dict[str, Any]]) -> str:
    """Some of the answers before and after, in Markdown: evenly spread over the gain in reward, if there
    is one, and with constraints.

    Args:
        rows, constrained: of `policy_metrics.sample_rows`.
    """
    by = next((name for name in ("reward", "function") if f"{name}_before" in rows[0]), None)
    ranked = sorted(rows, key=lambda row: row[f"{by}_after"] - row[f"{by}_before"]) if by else rows
    lines = ["| prompt | before | after | reward |", "|---|---|---|---|"]
    for row in spread(ranked):
        cells = map(cell, (row["prompt"][-1]["content"], row["before"], row["after"]))
        rewards = f"{row[f'{by}_before']:+.2f} → {row[f'{by}_after']:+.2f}" if by else ""
        lines.append(f"| {' | '.join(cells)} | {rewards} |")
    if constrained:
        lines += ["", "With a constraint:", "", "| prompt | before | after | kept |", "|---|---|---|---|"]
    for row in spread(constrained):
        cells = map(cell, (row["prompt"][-1]["content"], row["before"], row["after"]))
        kept = ["yes" if row[f"kept_{when}"] else "no" for when in ("before", "after")]
        lines.append(f"| {' | '.join(cells)} | {' → '.join(kept)} |")
    return "\n".join(lines) + "\n"


def spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `SHOWN_SAMPLES` of the rows, at equal distances, the first and the last among them."""
    return [rows[place] for place in np.linspace(0, len(rows) - 1, min(SHOWN_SAMPLES, len(rows))).astype(int)]
