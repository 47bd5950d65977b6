import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_pairs
from datasets import Dataset
from scipy.stats import spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from reward_pipeline import pair_metrics as pm
from reward_pipeline import reading
from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.statistics import bootstrap_interval, rate_interval, wins


def scored(chosen, rejected, /, **columns) -> pm.Columns:
    """Columns of N scored pairs; what a test does not care about is filled in."""
    n = len(chosen)
    filled = {
        "pairs": ["file"] * n,
        "place": [f"row {number}" for number in range(n)],
        "prompt": [f"question {number}" for number in range(n)],
        "chosen": [f"good {number}" for number in range(n)],
        "rejected": [f"bad {number}" for number in range(n)],
        "prompt_key": list(range(n)),
        "chosen_length": [10] * n,
        "rejected_length": [5] * n,
        "chosen_rating": [math.nan] * n,
        "rejected_rating": [math.nan] * n,
        "rating_gap": [math.nan] * n,
        "category": [""] * n,
        "form_margin": [math.nan] * n,
        "chosen_author": [""] * n,
        "rejected_author": [""] * n,
        "author_margin": [math.nan] * n,
        "prompt_cut": [False] * n,
        "response_cut": [False] * n,
        **columns,
    }
    rewards = {"chosen_reward": np.array(chosen, float), "rejected_reward": np.array(rejected, float)}
    return {name: np.array(values) for name, values in filled.items()} | rewards


def random_columns(n: int = 400, seed: int = 0) -> pm.Columns:
    generator = np.random.default_rng(seed)
    return scored(
        generator.normal(0.4, 1, n),
        generator.normal(0, 1, n),
        chosen_length=generator.integers(1, 500, n),
        rejected_length=generator.integers(1, 500, n),
        prompt_key=generator.integers(0, 150, n),
        rating_gap=generator.choice([0.2, 0.6, 1.4], n),
        category=generator.choice(["code", "maths", ""], n),
    )


@pytest.fixture(scope="module")
def drawn():
    """Random columns with their metrics; tests leave both as they are."""
    columns = random_columns()
    return columns, pm.pair_metrics(columns)


def test_metrics_by_hand():
    metrics = pm.pair_metrics(
        scored(
            [2.0, 1.0, 0.0, 3.0],
            [1.0, 1.0, 1.0, -1.0],
            chosen_length=[8, 1, 1, 4],
            rejected_length=[5, 2, 3, 4],
            prompt_key=[7, 7, 8, 9],
            prompt_cut=[True, False, False, False],
            response_cut=[True, True, False, True],
        )
    )
    assert (metrics["n"], metrics["prompts"], metrics["ties"]) == (4, 3, 1)
    assert metrics["accuracy"] == 0.625  # right, tie, wrong, right
    assert metrics["longer_wins"] == 0.375  # right, wrong, wrong, equal
    assert metrics["gain_over_longer_wins"] == 0.25
    assert (metrics["shorter_chosen_n"], metrics["shorter_chosen_accuracy"]) == (2, 0.25)
    assert metrics["shorter_chosen_interval"] == rate_interval(np.array([0.5, 0.0]), [7, 8])
    assert metrics["mean_margin"] == 1.0
    assert metrics["reward_mean"] == 1.0
    assert metrics["reward_std"] == pytest.approx(np.sqrt((1 + 0 + 1 + 4 + 0 + 0 + 0 + 4) / 8))
    probability = [1 / (1 + math.exp(-margin)) for margin in (1, 0, -1, 4)]
    assert metrics["brier"] == pytest.approx(sum((1 - p) ** 2 for p in probability) / 4)
    assert metrics["cut_share"] == {"prompt": 0.25, "response": 0.75}


def test_what_is_not_known_has_no_figure():
    metrics = pm.pair_metrics(scored([1.0], [0.0]))
    assert (metrics["shorter_chosen_n"], metrics["shorter_chosen_accuracy"]) == (0, None)
    assert metrics["accuracy_interval"] is metrics["shorter_chosen_interval"] is None  # one prompt has no spread
    assert metrics["spearman_reward_length"] == pytest.approx(1)
    assert metrics["spearman_margin_length"] is None  # one pair has no ranks
    assert "1.000 (95 % interval –, n = 1; longer wins: 1.000, form model: –)" in pm.metrics_line(metrics)


def test_the_form_model_beside_the_model_by_hand():
    metrics = pm.pair_metrics(
        scored(
            [2.0, 1.0, 0.0, 3.0, 1.0],
            [1.0, 0.0, 1.0, 3.0, 0.0],  # right, right, wrong, tie, right
            form_margin=[0.5, -0.1, -2.0, 0.0, math.nan],  # right, wrong, wrong, tie, not known
            prompt_key=[1, 2, 3, 3, 4],
        )
    )
    assert metrics["form_wins"] == (1 + 0 + 0 + 0.5) / 4
    assert metrics["gain_over_form"] == (0 + 1 + 0 + 0) / 4
    assert metrics["gain_over_form_interval"] == bootstrap_interval(np.array([0.0, 1, 0, 0]), [1, 2, 3, 3])
    assert (metrics["form_wrong_n"], metrics["form_wrong_accuracy"]) == (2, 0.5)
    assert metrics["form_wrong_interval"] == rate_interval(np.array([1.0, 0.0]), [2, 3])
    # |margins| 0, 0.1, 0.5 and 2: a quarter of the way through them is at 0.075.
    assert (metrics["form_even_n"], metrics["form_even_accuracy"], metrics["form_even_interval"]) == (1, 0.5, None)
    assert metrics["spearman_margin_form"] == pytest.approx(spearmanr([1, 1, -1, 0], [0.5, -0.1, -2, 0]).statistic)


def test_without_a_form_model_its_figures_are_unknown():
    metrics = pm.pair_metrics(scored([1.0, 0.0], [0.0, 1.0]))
    figures = {name: value for name, value in metrics.items() if "form" in name}
    assert {name for name, value in figures.items() if value == 0} == {"form_wrong_n", "form_even_n"}
    assert {value for name, value in figures.items() if not name.endswith("_n")} == {None}


def test_the_authors_beside_the_model_by_hand():
    metrics = pm.pair_metrics(
        scored(
            [2.0, 1.0, 0.0, 3.0, 1.0],
            [1.0, 0.0, 1.0, 3.0, 0.0],  # right, right, wrong, tie, right
            author_margin=[0.5, -0.1, -2.0, 0.0, math.nan],  # right, wrong, wrong, tie (one wrote both), not known
            prompt_key=[1, 2, 3, 3, 4],
        )
    )
    assert (metrics["author_n"], metrics["author_wins"]) == (4, (1 + 0 + 0 + 0.5) / 4)
    assert metrics["gain_over_authors"] == (0 + 1 + 0 + 0) / 4
    assert metrics["gain_over_authors_interval"] == bootstrap_interval(np.array([0.0, 1, 0, 0]), [1, 2, 3, 3])
    assert pm.gain(metrics, "authors").startswith("+0.250 (")


def test_without_authors_their_figures_are_unknown():
    metrics = pm.pair_metrics(scored([1.0, 0.0], [0.0, 1.0]))
    assert {name: value for name, value in metrics.items() if "author" in name} == {
        "author_n": 0, "author_wins": None, "gain_over_authors": None, "gain_over_authors_interval": None
    }  # fmt: skip


def test_checks_of_reading_by_hand():
    nan = math.nan
    metrics = pm.pair_metrics(
        scored(
            [2.0, 1.0, 0.0, 3.0, 1.0],
            [1.0, 0.0, 1.0, 3.0, 0.0],  # right, right, wrong, tie, right
            shuffled_chosen_reward=[0.0, 1.0, 0.0, nan, 2.0],
            shuffled_rejected_reward=[1.0, 0.0, 0.0, nan, 3.0],  # wrong, right, tie, not checked, wrong
            other_reward=[1.0, nan, 1.0, nan, 1.0],  # right, not checked, wrong, not checked, tie
            prompt_key=[1, 2, 3, 3, 4],
        )
    )
    assert (metrics["shuffled_prompt_n"], metrics["shuffled_prompt_accuracy"]) == (4, 1.5 / 4)
    assert metrics["shuffled_prompt_loss"] == (1 + 0 - 0.5 + 1) / 4
    assert metrics["shuffled_prompt_loss_interval"] == bootstrap_interval(np.array([1, 0, -0.5, 1]), [1, 2, 3, 4])
    assert (metrics["own_prompt_n"], metrics["own_prompt_accuracy"]) == (3, 0.5)
    assert metrics["own_prompt_interval"] == rate_interval(np.array([1, 0, 0.5]), [1, 3, 4])


@pytest.mark.parametrize("columns", [{}, {"shuffled_chosen_reward": [math.nan] * 2, "other_reward": [math.nan] * 2}])
def test_what_was_not_checked_of_reading_is_unknown(columns):
    metrics = pm.pair_metrics(scored([1.0, 0.0], [0.0, 1.0], **columns))
    figures = {name: value for name, value in metrics.items() if name.startswith(("shuffled_prompt", "own_prompt"))}
    assert {name for name, value in figures.items() if value == 0} == {"shuffled_prompt_n", "own_prompt_n"}
    assert len(figures) == 7 and sum(value is None for value in figures.values()) == 5


def test_calibration_error_by_hand():
    def logit(p):
        return math.log(p / (1 - p))

    # Confidence 0.62 twice, one of them right; 0.97 once, right; a tie at 0.5.
    bins = pm.reliability(np.array([logit(0.62), -logit(0.62), logit(0.97), 0.0]), np.array([1, 2, 1, 3]))
    assert [each["n"] for each in bins] == [1, 2, 1]
    assert [each["confidence"] for each in bins] == pytest.approx([0.5, 0.62, 0.97])
    assert [each["accuracy"] for each in bins] == [0.5, 0.5, 1.0]
    assert [each["accuracy_interval"] is None for each in bins] == [True, False, True]
    assert pm.calibration_error(bins) == pytest.approx((0 + 2 * 0.12 + 0.03) / 4)


def test_the_highest_confidence_has_a_bin():
    (only,) = pm.reliability(np.array([800.0, -800.0]), np.array([1, 2]))
    assert (only["n"], only["confidence"], only["accuracy"]) == (2, 1.0, 0.5)


def test_calibration_agrees_with_scikit_learn(drawn):
    columns, metrics = drawn
    margins = columns["chosen_reward"] - columns["rejected_reward"]
    probability = 1 / (1 + np.exp(-margins))
    # sklearn needs both classes: mirror every pair. Its bins are those of [0, 1], ours those of the upper half.
    labels, mirrored = np.repeat([1, 0], len(margins)), np.concatenate([probability, 1 - probability])
    assert metrics["brier"] == pytest.approx(brier_score_loss(labels, mirrored))
    share, confidence = calibration_curve(labels, mirrored, n_bins=2 * pm.CONFIDENCE_BINS)
    upper = confidence > 0.5
    assert [each["accuracy"] for each in metrics["reliability"]] == pytest.approx(share[upper])
    assert [each["confidence"] for each in metrics["reliability"]] == pytest.approx(confidence[upper])


def test_rank_correlations_agree_with_scipy(drawn):
    columns, metrics = drawn
    rewards = [*columns["chosen_reward"], *columns["rejected_reward"]]
    lengths = [*columns["chosen_length"], *columns["rejected_length"]]
    assert metrics["spearman_reward_length"] == pytest.approx(spearmanr(rewards, lengths).statistic)
    margins = columns["chosen_reward"] - columns["rejected_reward"]
    extra = columns["chosen_length"] - columns["rejected_length"]
    assert metrics["spearman_margin_length"] == pytest.approx(spearmanr(margins, extra).statistic)


def test_intervals_hold_their_estimates_and_repeated_pairs_do_not_narrow_them(drawn):
    columns, metrics = drawn
    low, high = metrics["gain_over_longer_wins_interval"]
    assert low < metrics["gain_over_longer_wins"] < high
    # Every pair ten times under the same prompt: n is larger, what is known is not.
    again = pm.pair_metrics(pm.join_columns([columns] * 10))
    assert again["n"] == 4000 and again["accuracy"] == pytest.approx(metrics["accuracy"])
    for key in ("accuracy_interval", "shorter_chosen_interval", "gain_over_longer_wins_interval"):
        assert again[key] == pytest.approx(metrics[key], rel=1e-6), key
    for one, other in zip(again["by_category"], metrics["by_category"], strict=True):
        assert one["accuracy_interval"] == pytest.approx(other["accuracy_interval"], rel=1e-6)


def test_groups_hold_every_pair_once(drawn):
    columns, metrics = drawn
    right = wins(columns["chosen_reward"], columns["rejected_reward"])
    assert [each["group"] for each in metrics["by_category"]] == ["code", "maths"]
    for each in metrics["by_category"]:
        inside = columns["category"] == each["group"]
        assert (each["n"], each["accuracy"]) == (inside.sum(), pytest.approx(right[inside].mean()))
        assert each["accuracy_interval"] == rate_interval(right[inside], columns["prompt_key"][inside])
    for key in ("by_length", "by_rating_gap"):
        assert sum(each["n"] for each in metrics[key]) == 400
        assert sum(each["n"] * each["accuracy"] for each in metrics[key]) == pytest.approx(right.sum())
    longest = np.maximum(columns["chosen_length"], columns["rejected_length"])
    assert [each["n"] for each in metrics["by_length"]] == pytest.approx([100] * 4, abs=3)
    assert metrics["by_length"][-1]["group"].endswith(f" to {longest.max()}")


def test_groups_by_hand():
    group, names = pm.quantile_groups(np.array([1, 2, 3, 4, 5]), 2)
    assert (group.tolist(), names) == ([0, 0, 0, 1, 1], ["1 to 3", "3 to 5"])
    group, names = pm.quantile_groups(np.array([0.2, 0.4, 3.4 - 3.2, 1.0 - 0.6]), 2)  # equal but for rounding
    assert (group.tolist(), names) == ([0, 1, 0, 1], ["0.2 to 0.3", "0.3 to 0.4"])
    group, names = pm.quantile_groups(np.array([100.0, 100, 100, 250]), 4)  # equal edges are one
    assert (group.tolist(), names) == ([0, 0, 0, 1], ["100 to 138", "138 to 250"])
    group, names = pm.quantile_groups(np.array([2.0, 2.0]), 4)
    assert (group.tolist(), names) == ([0, 0], ["2"])


def test_pairs_without_ratings_or_categories_have_no_such_groups():
    metrics = pm.pair_metrics(scored([1.0, 0.0], [0.0, 1.0], rating_gap=[math.nan, 0.5]))
    assert metrics["by_category"] == []
    assert [(each["n"], each["accuracy"]) for each in metrics["by_rating_gap"]] == [(1, 0.0)]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_prompts_are_shown_as_people_read_them():
    assert pm.prompt_text(user("Why?")) == "Why?"
    turns = [{"role": "system", "content": "Be brief."}, *user("Why?"), *assistant("So."), *user("How?")]
    assert pm.prompt_text(turns) == "System: Be brief.\n\nUser: Why?\n\nAssistant: So.\n\nUser: How?"


def rows_of(pairs: list[dict]) -> Dataset:
    """Pairs of texts as an evaluation reads them."""
    unknown = {
        "chosen_rating": None,
        "rejected_rating": None,
        "category": "",
        "chosen_author": "",
        "rejected_author": "",
    }
    return Dataset.from_list(
        [
            {
                "prompt": user(pair["prompt"]),
                **{side: assistant(pair[side]) for side in ("chosen", "rejected")},
                **unknown,
                "place": f"row {number}",
            }
            for number, pair in enumerate(pairs)
        ]
    )


def rewarding(reward) -> SimpleNamespace:
    """An evaluator of one model whose reward is a function of two texts, the prompt and the answer."""

    def score(prompts, answers, progress):
        rewards = [reward(pm.prompt_text(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return np.array([rewards], float), np.zeros((1, len(rewards), 2), dtype=bool)

    member = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace()))
    return SimpleNamespace(members=[member], get_member_scores_and_cuts=score, combine=lambda scores: scores[0])


def answer_length(prompt: str, answer: str) -> int:
    return len(answer)


def shared_words(prompt: str, answer: str) -> int:
    return len(set(prompt.split()) & set(answer.split()))


def named_pairs(*names: str) -> list[dict]:
    """The chosen answer has the name in its prompt, the rejected one is shorter."""
    return [{"prompt": f"Say {name}", "chosen": f"{name} now", "rejected": "no"} for name in names]


@pytest.mark.parametrize("reward, accuracy, shuffled, own", [(answer_length, 1, 1, 0.5), (shared_words, 1, 0.5, 1)])
def test_only_a_model_that_reads_needs_the_prompt(reward, accuracy, shuffled, own):
    columns, _ = pm.score_pairs(rewarding(reward), rows_of(named_pairs("Ann", "Bob", "Cem", "Dan")), "file")
    metrics = pm.pair_metrics(columns)
    assert (metrics["accuracy"], metrics["shuffled_prompt_accuracy"]) == (accuracy, shuffled)
    assert metrics["shuffled_prompt_loss"] == accuracy - shuffled
    assert metrics["own_prompt_accuracy"] == own
    assert metrics["shuffled_prompt_n"] == metrics["own_prompt_n"] == 4


def test_some_pairs_are_checked_and_parts_are_scored_as_the_whole(monkeypatch):
    """What a process scores does not depend on what the others do."""
    monkeypatch.setattr(reading, "READING_PAIRS", 3)
    pairs = rows_of(named_pairs("Ann", "Bobby", "Cem", "Dan", "Elvira"))
    evaluator = rewarding(lambda prompt, answer: len(prompt) * 100 + len(answer))
    whole, margins = pm.score_pairs(evaluator, pairs, "file")
    assert np.isfinite(whole["chosen_reward"]).all()
    for name in ("shuffled_chosen_reward", "shuffled_rejected_reward", "other_reward"):
        assert np.isfinite(whole[name]).tolist() == [True, False, True, False, True]
    # Nearest to "Cem now" is "Ann now", nearest to "Elvira now" is "Bobby now".
    assert whole["other_reward"][[2, 4]].tolist() == [707, 1009]
    parts = [pm.score_pairs(evaluator, pairs, "file", part) for part in (np.array([0, 1]), np.array([2, 3, 4]))]
    joined = pm.join_columns([columns for columns, _ in parts])
    assert joined.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(joined[name], values)
    np.testing.assert_array_equal(np.concatenate([each for _, each in parts], axis=1), margins)


def test_scored_pairs_carry_their_texts_rewards_and_cuts(tiny_reward_model):
    pairs = [{**pair, "prompt": user(pair["prompt"])} for pair in make_pairs(4)]
    pairs[1]["rejected"] = "no " * 500  # of 128 tokens
    pairs[2]["prompt"] = [*user("Hi"), *assistant("Hello"), *user("why " * 500)]
    # Over half of the limit, so cut beside an answer that does not fit with it, and not beside one that does.
    pairs[3] |= {"prompt": user("why " * 80), "rejected": "no " * 500}
    rows = [
        {
            **pair,
            **{side: assistant(pair[side]) for side in ("chosen", "rejected")},
            **{"chosen_rating": 3.5, "rejected_rating": 1.0, "place": f"row {number}", "category": "numbers"},
            **{"chosen_author": ["a", "b", "", "b"][number], "rejected_author": ["b", "a", "", "c"][number]},
        }
        for number, pair in enumerate(pairs)
    ]
    evaluator = RewardModelEvaluator(tiny_reward_model)
    config = evaluator.members[0].model.config
    config.form_model, config.form_term = {"log_words": 2.0}, True  # as training leaves it
    config.author_strengths = {"a": 1.5, "b": -0.5}
    columns, margins = pm.score_pairs(evaluator, Dataset.from_list(rows), "file")
    assert columns["chosen"].tolist() == [pair["chosen"] for pair in pairs]
    assert columns["prompt"][0] == pairs[0]["prompt"][0]["content"]
    assert columns["prompt"][2].startswith("User: Hi\n\nAssistant: Hello\n\nUser: why why")
    assert columns["rating_gap"].tolist() == [2.5] * 4
    words = [[len(pair[side].split()) for side in ("chosen", "rejected")] for pair in pairs]
    assert columns["form_margin"] == pytest.approx([2 * (math.log1p(a) - math.log1p(b)) for a, b in words])
    assert columns["chosen_form"] == pytest.approx([2 * math.log1p(a) for a, _ in words])
    assert columns["rejected_form"] == pytest.approx([2 * math.log1p(b) for _, b in words])
    assert columns["chosen_author"].tolist() == ["a", "b", "", "b"]
    np.testing.assert_array_equal(columns["author_margin"], [2.0, -2.0, math.nan, math.nan])
    assert (columns["prompt_cut"].tolist(), columns["response_cut"].tolist()) == (
        [False, False, True, True],
        [False, True, False, True],
    )
    for number, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            score = evaluator.get_reward_score(pair["prompt"], pair[side])
            assert columns[f"{side}_reward"][number] == pytest.approx(score, abs=1e-5)
    shuffled, matched = reading.reading_partners(*(columns[name] for name in ("prompt_key", "chosen", "chosen_length")))
    for number, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            score = evaluator.get_reward_score(pairs[shuffled[number]]["prompt"], pair[side])
            assert columns[f"shuffled_{side}_reward"][number] == pytest.approx(score, abs=1e-5)
        score = evaluator.get_reward_score(pair["prompt"], pairs[matched[number]]["chosen"])
        assert columns["other_reward"][number] == pytest.approx(score, abs=1e-5)
    assert margins.tolist() == [(columns["chosen_reward"] - columns["rejected_reward"]).tolist()]
    whole = pm.pair_metrics(columns)["with_form"]
    sums = columns["chosen_reward"] - columns["rejected_reward"] + columns["form_margin"]
    assert whole["accuracy"] == np.mean(sums > 0)
    assert whole["mean_margin"] == pytest.approx(sums.mean())
    config.form_term = False  # the same counts as a baseline alone
    assert pm.pair_metrics(pm.score_pairs(evaluator, Dataset.from_list(rows), "file")[0])["with_form"] is None
    config.form_term = True
    together = pm.score_together(evaluator, Dataset.from_list(rows), "file")
    assert together.keys() == columns.keys()
    for name, values in columns.items():
        np.testing.assert_array_equal(together[name], values)
