"""Answers before and after become figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_reward_model
from datasets import Dataset

from reward_pipeline import plots, policy_metrics
from reward_pipeline.constraints import Constraint
from reward_pipeline.conversations import encode
from reward_pipeline.files import InputError
from reward_pipeline.form import COUNTS, form_scores
from reward_pipeline.models import weights_digest
from reward_pipeline.rollouts import Answers
from reward_pipeline.sampling import PolicyPrompt


def test_distinct_and_repetition_by_hand():
    texts = ["a b c a b c", "a b c", "x y"]  # 3-grams: abc bca cab abc | abc | none
    assert policy_metrics.distinct(texts) == 3 / 5
    assert policy_metrics.repetition(texts) == pytest.approx((1 / 4 + 0) / 2)
    assert policy_metrics.distinct(["a b"]) == 1.0 and policy_metrics.repetition(["a b"]) == 0.0


def test_both_sides_are_cut_to_the_words_of_the_shorter_one():
    cut = policy_metrics.cut_to_equal_words(["a b  c", "d"], ["e f", "g h"])
    assert cut == (["a b", "d"], ["e f", "g"])


def answers(texts: list[str], lengths: list[int], ended: list[bool], kl: list[float]) -> Answers:
    return Answers(texts, np.array(lengths), np.array(ended), np.array(kl))


PROMPTS = [PolicyPrompt([{"role": "user", "content": text}], [1], text) for text in ("p", "q", "r", "s")]
BEFORE = answers(["a b c", "a b c", "d", ""], [4, 4, 2, 2], [True, True, False, True], [0, 0, 0, 0])
AFTER = answers(["a b c a b c", "x y z", "d e", "f"], [7, 4, 3, 4], [True, True, True, True], [1, 2, 3, 4])


VALIDATION = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"Say {number}."}],
            "chosen": [{"role": "assistant", "content": f"{number}!"}],
            "rejected": [{"role": "assistant", "content": "no" * number}],
            "place": f"pairs.jsonl row {number}",
        }
        for number in range(1, 9)
    ]
)


FORM_MODEL = {"bold": 2.0}


def count_words(prompts, completions, **columns) -> list[float]:
    return [len(completion[0]["content"].split()) for completion in completions]


class WordCountingJudge:
    """Reward: the number of words, times a factor."""

    def __init__(self, factor: float):
        self.factor = factor

    def get_member_scores(self, prompts, responses, progress):
        assert [prompt[-1]["content"] for prompt in prompts] == ["p", "q", "r", "s"] * 2
        return np.array([[self.factor * len(text.split()) for text in responses]])

    def combine(self, scores):
        return scores[0]


def test_the_comparison_by_a_judge_by_hand():
    judged = policy_metrics.compare_answers(WordCountingJudge(2.0), PROMPTS, BEFORE, AFTER)
    assert judged["rewards_before"].tolist() == [6, 6, 2, 0] and judged["rewards_after"].tolist() == [12, 6, 4, 2]
    assert (judged["reward_before"], judged["reward_after"], judged["reward_gain"]) == (3.5, 6.0, 2.5)
    assert judged["win_rate"] == (1 + 0.5 + 1 + 1) / 4
    for figure in ("reward_gain", "win_rate"):
        low, high = judged[f"{figure}_interval"]
        assert low < judged[figure] < high
    assert 0.05 < judged["wilcoxon_p"] < 1  # four prompts can not be more significant than 1 in 8


def test_the_evaluation_by_hand(tmp_path):
    judged, second = (
        policy_metrics.compare_answers(WordCountingJudge(factor), PROMPTS, BEFORE, AFTER) for factor in (2.0, -1.0)
    )
    opinions = {"reward": judged, "second_judge": second, "function": None}
    results = policy_metrics.evaluation(BEFORE, AFTER, opinions, FORM_MODEL)
    assert results["n"] == 4
    assert results["reward_gain"] == 2.5 and results["second_judge_reward_gain"] == -1.25
    assert results["second_judge_win_rate"] == 1 - results["win_rate"]
    assert (results["length_before"], results["length_after"], results["length_ratio"]) == (3.0, 4.5, 1.5)
    assert (results["ended_before"], results["ended_after"], results["kl"]) == (0.75, 1.0, 2.5)
    # Cut to equal length: before abc abc, after abc xyz.
    assert (results["distinct3_before"], results["distinct3_after"], results["distinct3_ratio"]) == (0.5, 1.0, 2.0)
    assert (results["repetition_before"], results["repetition_after"]) == (0.0, pytest.approx((1 / 4 + 0) / 2))
    function = policy_metrics.compare_by_function("mine:words", count_words, PROMPTS, BEFORE, AFTER)
    alone = policy_metrics.evaluation(
        BEFORE, AFTER, {"reward": None, "second_judge": None, "function": function}, FORM_MODEL
    )
    assert alone.keys() == results.keys()
    assert {alone[name] for name in ("reward_gain", "win_rate", "second_judge_reward_gain")} == {None}
    assert (alone["function_reward_gain"], alone["function_win_rate"]) == (1.25, results["win_rate"])

    unrated = policy_metrics.compare_by_function("mine:none", lambda **columns: [None] * 4, PROMPTS, BEFORE, AFTER)
    assert unrated is None
    none = {"reward": None, "second_judge": None, "function": unrated}
    plots.plot_before_and_after(BEFORE, AFTER, unrated, tmp_path / "before_and_after.png")
    assert (tmp_path / "before_and_after.png").stat().st_size > 0
    assert policy_metrics.evaluation(BEFORE, AFTER, none, FORM_MODEL)["function_win_rate"] is None

    rows = policy_metrics.sample_rows(PROMPTS, BEFORE, AFTER, opinions)
    assert rows[0] == {
        "prompt": PROMPTS[0].messages, "before": "a b c", "after": "a b c a b c", "reward_before": 6.0,
        "reward_after": 12.0, "second_judge_before": -3.0, "second_judge_after": -6.0,
    }  # fmt: skip


def test_the_drift_of_form_by_hand():
    before, after = ["plain", "**bold** word"], ["**bold**", "**bold** **twice**"]
    drift = policy_metrics.form_drift(before, after, FORM_MODEL)
    bold = drift["form_counts"]["bold"]
    assert drift["form_counts"].keys() == COUNTS.keys()
    assert (bold["answers_before"], bold["answers_after"]) == (1, 2)
    assert (bold["before"], bold["after"]) == pytest.approx((np.log(2) / 2, (np.log(2) + np.log(3)) / 2))
    assert drift["form_score_before"] == pytest.approx(form_scores(FORM_MODEL, before).mean())
    assert drift["form_score_gain"] == pytest.approx(2 * (np.log(3) / 2))  # from 0, log 2 to log 2, log 3


def test_constraints_are_counted_by_kind():
    prompts = [
        PolicyPrompt([], [1], place, Constraint(*each))
        for place, each in zip("abcd", (("words", 2), ("words", 2), ("words", 2), ("json", None)), strict=True)
    ]
    before = answers(["a b c", "a b", "a b c", "{}"], [3] * 4, [True] * 4, [0] * 4)
    after = answers(["a", "a b", "a b c", '{"a": 1}'], [3] * 4, [True] * 4, [0] * 4)
    plain_prompts = [PolicyPrompt([], [1], place) for place in "xdcba"]  # one had no room for a constraint
    plain = (
        answers(["a b", "{}", "a b c", "a b c", "a b"], [3] * 5, [True] * 5, [0] * 5),
        answers(["a b", "a", "a b c", "a b", "a b"], [3] * 5, [True] * 5, [0] * 5),
    )
    figures = policy_metrics.constraint_figures(prompts, (before, after), plain_prompts, plain)
    third, thirds = pytest.approx(1 / 3), pytest.approx(2 / 3)
    assert figures["constraint_kinds"] == {
        "json": {"n": 1, "before": 0.0, "after": 1.0, "unasked_before": 0.0, "unasked_after": 0.0},
        "words": {"n": 3, "before": third, "after": thirds, "unasked_before": third, "unasked_after": thirds},
    }
    names = ("before", "after", "gain")
    assert [figures[f"constraint_unasked_{name}"] for name in names] == [0.25, 0.5, 0.25]
    assert [figures[f"constraint_read_{name}"] for name in names] == [0.0, 0.25, 0.25]
    assert (figures["constraint_n"], figures["constraint_pass_before"], figures["constraint_pass_after"]) == (
        4,
        0.25,
        0.75,
    )
    low, high = figures["constraint_pass_gain_interval"]
    assert low < figures["constraint_pass_gain"] == 0.5 < high
    rows = policy_metrics.sample_rows(prompts, before, after, {})
    assert [(row["kept_before"], row["kept_after"]) for row in rows] == [
        (False, True), (True, True), (False, False), (False, True),
    ]  # fmt: skip
    assert rows[3]["kind"] == "json" and rows[0]["value"] == 2
    none = policy_metrics.constraint_figures([], (before, after), plain_prompts, plain)
    assert none.keys() == figures.keys() and none["constraint_n"] == 0 and none["constraint_pass_gain"] is None


def test_a_gain_that_is_form_alone_is_none_at_equal_form():
    """A judge that counts bold words, and a policy that writes more of them; then one that also likes the answers."""
    generator = np.random.default_rng(0)
    texts = [
        [" ".join(["word", *["**b**"] * count]) for count in generator.integers(low, low + 3, 200)] for low in (0, 1)
    ]
    before, after = (answers(each, [1] * 200, [True] * 200, [0] * 200) for each in texts)
    old, new = (np.array([np.log1p(text.count("**b**")) for text in each]) for each in texts)
    form_alone = policy_metrics.compare_rewards(old, new, before, after)
    assert form_alone["reward_gain_interval"][0] > 0.2
    assert form_alone["reward_gain_at_equal_form"] == pytest.approx(0, abs=1e-2)
    better = policy_metrics.compare_rewards(old, new + 0.5 + generator.normal(0, 0.2, 200), before, after)
    low, high = better["reward_gain_at_equal_form_interval"]
    assert low < 0.5 < high and low > 0


def test_p_values_keep_their_digits():
    results = {"wilcoxon_p": 1.23456e-9, "second_judge_wilcoxon_p": None, "win_rate": 0.123456}
    rounded = {"wilcoxon_p": 1.23e-9, "second_judge_wilcoxon_p": None, "win_rate": 0.1235}
    assert policy_metrics.rounded_evaluation(results) == rounded


# --- judges ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tiny_model, small_tokenizer) -> Path:
    """A judge of 64 tokens."""
    directory = Path(save_reward_model(tmp_path_factory.mktemp("judge"), tiny_model, small_tokenizer, 0.3, 64))
    change_config(directory, reward_mean=1.5, reward_std=0.25)
    return directory


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def load(path: Path, prompt: int, completion: int):
    device = torch.device("cpu")
    return policy_metrics.load_judge("reward_model", str(path), PROMPTS, prompt, completion, device, VALIDATION)


def test_a_judge_without_figures_of_its_training_is_measured(judge, monkeypatch, capsys):
    """Its rewards for the answers of our validation pairs have a mean of 0 and a deviation of 1."""
    monkeypatch.setattr(policy_metrics, "SCALE_PAIRS", 5)
    change_config(judge, reward_mean=None, reward_std=None)
    try:
        loaded = load(judge, 48, 15)
    finally:
        change_config(judge, reward_mean=1.5, reward_std=0.25)
    pairs = VALIDATION[:5]
    rewards = loaded.get_reward_scores(pairs["prompt"] * 2, pairs["chosen"] + pairs["rejected"])
    assert (np.mean(rewards), np.std(rewards)) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert "has no reward_mean and reward_std; measured on 5 validation pairs" in capsys.readouterr().out
    assert loaded.members[0].std != 1
    with torch.no_grad():
        loaded.model.score.weight.zero_()
    with pytest.raises(InputError, match="gives all validation answers the same reward"):
        policy_metrics.measured_scale(loaded, VALIDATION)


def test_a_judge_reads_whole_prompts_and_completions(judge, small_tokenizer):
    """What closes a completion, here its end token, takes room too; a prompt of over half of the room is not cut."""
    assert len(encode(small_tokenizer, "Hi", "a", 64)) == len(encode(small_tokenizer, "Hi", "", 64)) + 1
    loaded = load(judge, 48, 15)
    assert policy_metrics.judge_identity(loaded) == {"weights": weights_digest(judge), "max_length": 64}
    with pytest.raises(InputError, match=r"--reward_model .*: reads 64 tokens, but prompts of 48 .* have 65; lower"):
        load(judge, 48, 16)


def test_a_judge_of_an_earlier_version_reads_prompts_of_half_its_room(judge):
    change_config(judge, reward_format=1)
    try:
        load(judge, 32, 31)
        with pytest.raises(InputError, match="reads 64 tokens, 32 of them of the prompt, but prompts of 33"):
            load(judge, 33, 5)
    finally:
        change_config(judge, reward_format=2)
