"""Answers side by side: figures by hand and by the evaluator, and HTML in which no text is markup."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import refuse_system_turns

from reward_pipeline.comparison import Comparison, compare, comparison_html, verdict
from reward_pipeline.conversations import encode
from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import InputError
from reward_pipeline.page_texts import translator

QUESTION = [{"role": "user", "content": "Name a colour."}]
ANSWERS = ["Red.", "Is it blue? Perhaps it is.", "Seven, and eight, and nine."]
SCRIPT = "<script>alert('&')</script>"
ESCAPED = "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;"


def comparison(rewards, spreads=None, whole=None, form=None, pieces=None) -> Comparison:
    unknown = np.full(len(rewards), np.nan)
    rewards, whole, form = (unknown if each is None else np.array(each, dtype=float) for each in (rewards, whole, form))
    spreads = np.zeros(len(rewards)) if spreads is None else np.array(spreads)
    return Comparison(rewards, spreads, whole, form, pieces or [[]] * len(rewards))


def plain(text: str) -> str:
    return text


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, best, second, difference",
    [([1, 3, 2], 1, 2, 1), ([0, -math.log(3)], 0, 1, math.log(3)), ([-5, -9, -4, -4.5], 2, 3, 0.5)],
)
def test_the_verdict_is_bradley_and_terrys(scores, best, second, difference):
    assert verdict(np.array(scores, dtype=float)) == (best, second, pytest.approx(1 / (1 + math.exp(-difference))))


def test_equal_answers_are_even():
    best, second, probability = verdict(np.array([1.0, 2.0, 2.0]))
    assert {best, second} == {1, 2} and probability == 0.5


# --- HTML ------------------------------------------------------------------------------------------------------------


def items(page: str) -> list[str]:
    return re.findall("<li>(.*?)</li>", page)


def test_what_each_opinion_prefers():
    page = comparison_html(comparison([0, math.log(3)], form=[9, 0]), ["one", "two"], plain)
    assert items(page) == [
        "<b>reward model:</b> B preferred to A with 75 %",
        "<b>with the form term:</b> not known: this model was trained without it",
        "<b>form model, which does not read:</b> A preferred to B with &gt; 99 %",
    ]
    assert "What was cut" not in page and "spread" not in page


def test_the_table_has_the_best_answer_first():
    page = comparison_html(comparison([0.5, -1.25, 2], [0.1, 0, 0.25], [1, 2, 3]), ["x", "y", "z"], plain)
    rows = re.findall("<tr><th>([A-Z])</th>(.*?)</tr>", page)
    assert [letter for letter, _ in rows] == ["C", "A", "B"]
    cells = [re.findall("<td>(.*?)</td>", row) for _, row in rows]
    assert cells == [
        ["+2.000", "± 0.250", "+3.000", "–"],
        ["+0.500", "± 0.100", "+1.000", "–"],
        ["-1.250", "± 0.000", "+2.000", "–"],
    ]
    widths = [int(re.search(r"width: (\d+)%", row)[1]) for _, row in rows]
    assert widths == [100, 56, 5]  # 5 + 95 * 1.75 / 3.25


def test_no_text_is_markup():
    pieces = [[(f"user\n{SCRIPT}", True), (f"cut {SCRIPT}", False), ("end", True)], []]
    page = comparison_html(comparison([0, 1], pieces=pieces), ["not shown", f"answer {SCRIPT}"], plain)
    assert "<script" not in page and "not shown" not in page
    assert f"user\n{ESCAPED}<del class='cut'>cut {ESCAPED}</del>end" in page
    assert f"<pre>answer {ESCAPED}</pre>" in page
    assert page.count("<del") == 1 and "What was cut is struck out" in page
    assert re.findall("<details (.*?)>", page) == ["open", ""]


def test_all_words_are_translated_and_escaped():
    page = comparison_html(
        comparison([0, 1], [1, 1], pieces=[[("a", False)], []]), ["a", "b"], lambda text: f"<{text}>"
    )
    assert "<reward model>" not in page and "&lt;reward model&gt;" in page
    words = re.sub("<.*?>", " ", page)
    for text in ("reward", "spread", "with the form term", "form", "form model, which does not read"):
        assert f"&lt;{text}&gt;" in words
    assert "&lt;B preferred to A with 73 %&gt;" in words  # 1 / (1 + 1 / e)
    assert "&lt;not known: this model was trained without it&gt;" in words
    assert "&lt;What was cut is struck out: the model has not read it.&gt;" in words
    russian = comparison_html(comparison([0, 1]), ["a", "b"], translator("ru-RU,ru;q=0.9"))
    assert items(russian)[0] == "<b>модель вознаграждения:</b> B предпочтительнее A с вероятностью 73 %"


# --- figures ---------------------------------------------------------------------------------------------------------


def test_rewards_are_those_of_the_evaluator(tiny_reward_model):
    evaluator = RewardModelEvaluator(tiny_reward_model, "cpu")
    found = compare(evaluator, QUESTION, ANSWERS)
    expected = evaluator.get_reward_scores([QUESTION] * 3, ANSWERS)
    assert found.rewards == pytest.approx(expected, abs=1e-5) and np.ptp(expected) > 0.01
    assert found.spreads.tolist() == [0, 0, 0]
    assert np.isnan(found.whole).all() and np.isnan(found.form).all()
    assert found.pieces == [[], [], []]


def test_spreads_are_those_over_the_members(tiny_reward_model, other_reward_model):
    ensemble = RewardModelEvaluator([tiny_reward_model, other_reward_model], "cpu", std_penalty=0.5)
    found = compare(ensemble, QUESTION, ANSWERS)
    one, other = (
        np.array(RewardModelEvaluator(name, "cpu").get_reward_scores([QUESTION] * 3, ANSWERS))
        for name in (tiny_reward_model, other_reward_model)
    )
    assert found.rewards == pytest.approx((one + other) / 2 - 0.5 * abs(one - other) / 2, abs=1e-5)
    # Each member's rewards less their mean: where one begins has no meaning.
    one, other = one - one.mean(), other - other.mean()
    assert found.spreads == pytest.approx(abs(one - other) / 2, abs=1e-5) and found.spreads.min() > 1e-3


def with_form(directory: str, target: Path, **settings) -> str:
    """A copy of a reward model with these in its config."""
    shutil.copytree(directory, target)
    config = target / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return str(target)


def test_the_form_term_is_added_where_all_members_have_it(tmp_path, tiny_reward_model, other_reward_model):
    weights = {"questions": 2.0, "commas": -1.0}
    form = [0, 2 * math.log(2), -math.log(3)]  # no mark, one question, two commas
    trained = with_form(tiny_reward_model, tmp_path / "trained", form_model=weights, form_term=True)
    found = compare(RewardModelEvaluator(trained, "cpu"), QUESTION, ANSWERS)
    assert found.form == pytest.approx(form)
    assert found.whole == pytest.approx(found.rewards + form)
    mixed = compare(RewardModelEvaluator([trained, other_reward_model], "cpu"), QUESTION, ANSWERS)
    assert mixed.form == pytest.approx(form) and np.isnan(mixed.whole).all()
    told = with_form(tiny_reward_model, tmp_path / "told", form_model=weights, form_term=False)
    found = compare(RewardModelEvaluator(told, "cpu"), QUESTION, ANSWERS)
    assert found.form == pytest.approx(form) and np.isnan(found.whole).all()


def test_what_was_cut_is_what_the_model_has_not_read(tiny_reward_model):
    evaluator = RewardModelEvaluator(tiny_reward_model, "cpu")
    long = " ".join(f"word{number}" for number in range(200))
    found = compare(evaluator, QUESTION, ["Red.", long])
    assert found.pieces[0] == [] and [kept for _, kept in found.pieces[1]] == [True, False, True]
    read = "".join(text for text, kept in found.pieces[1] if kept)
    assert read == evaluator.tokenizer.decode(encode(evaluator.tokenizer, QUESTION, long, 128))
    assert found.pieces[1][1][0].strip() in long
    page = comparison_html(found, ["Red.", long], plain)
    assert page.count("<del class='cut'>") == 1 and "word199</del>" in page and "<pre>Red.</pre>" in page


def test_answers_and_prompts_that_can_not_be_scored(tmp_path, tiny_reward_model):
    with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
        compare(RewardModelEvaluator(tiny_reward_model, "cpu"), QUESTION, ["Red.", " "])
    refusing = refuse_system_turns(tiny_reward_model, tmp_path / "refusing")
    with pytest.raises(InputError, match=r"^the prompt: .* can not read it: .*no system role"):
        compare(RewardModelEvaluator(refusing, "cpu"), [{"role": "system", "content": "x"}, *QUESTION], ["a", "b"])


def test_a_cut_by_any_member_is_shown(tiny_reward_model, other_reward_model):
    """The second one reads 64 tokens, the first one 128."""
    ensemble = RewardModelEvaluator([tiny_reward_model, other_reward_model], "cpu")
    found = compare(ensemble, QUESTION, ["word " * 70, "Red."])
    alone = compare(RewardModelEvaluator(tiny_reward_model, "cpu"), QUESTION, ["word " * 70, "Red."])
    assert not any(alone.pieces)
    assert [kept for _, kept in found.pieces[0]] == [True, False, True] and found.pieces[1] == []
