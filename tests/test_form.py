"""What can be told of an answer without reading it."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from reward_pipeline import form
from reward_pipeline.form import longer_wins, response_length


def test_length_is_that_of_the_text_whatever_holds_it():
    assert response_length("  an answer \n") == response_length([{"role": "assistant", "content": "an answer"}]) == 9


def test_longer_wins_counts_ties_half():
    assert longer_wins(["aaa", "b", "c ", "dd"], ["a", "bb", "c", "dd"]) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert longer_wins([[{"role": "assistant", "content": "aaa"}]], ["a"]) == 1


def counts(text: str) -> dict[str, float]:
    """Counts as they are: without the logarithm that all but three of them have."""
    plain = {"ends_with_a_mark", "distinct_words", "opens_sure", "opens_here", "opens_i"}
    found = zip(form.COUNTS, form.form_counts(text), strict=True)
    return {name: value if name in plain else round(math.expm1(value), 6) for name, value in found if value}


def test_counts_by_hand():
    text = """
Sure! I'm sorry, **this** is `it`:

# One
- a *point* (1)
* a **point**, a "point"
10. ten

```python
x # y
```
| a | b |
|---|---|
see https://a.b?
"""
    assert counts(text) == {
        "log_characters": len(text.strip()),
        "log_words": len(text.split()),
        "log_lines": 11,
        "paragraphs": 2,
        "bold": 2,
        "headings": 1,
        "bullets": 2,
        "numbered_items": 1,
        "code_fences": 2,
        "inline_code": 1,
        "table_rows": 2,
        "links": 1,
        "questions": 1,
        "exclamations": 1,
        "commas": 2,
        "colons": 2,
        "quotes": 2,
        "brackets": 1,
        "digits": 3,
        "opens_sure": 1,
        "refuses": 1,
        "ends_with_a_mark": 1,
        "distinct_words": pytest.approx(len(set(text.lower().split())) / len(text.split())),
    }


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("Certainly, here it is", "opens_sure"),
        ("**Of course**", "opens_sure"),
        ("Here's a list", "opens_here"),
        ("I think", "opens_i"),
        ("I’m", "opens_i"),
        ("Surely not", None),
        ("Hereditary", None),
        ("In short", None),
    ],
)
def test_openings_are_whole_words(text, opening):
    assert [name for name in counts(text) if name.startswith("opens")] == ([opening] if opening else [])


def test_thousands_of_empty_lines_are_read_in_one_go():
    # A pattern that starts again at each of them would not end while anybody waits.
    assert counts("a" + "\n" * 500_000 + "- b") == {
        "log_characters": 500_004,
        "log_words": 3,
        "log_lines": 2,
        "paragraphs": 1,
        "bullets": 1,
        "distinct_words": 1,
    }


def test_an_answer_that_says_nothing_has_no_form():
    assert counts(" \n") == {"distinct_words": 1}


def random_differences(n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Differences of pairs drawn from a Bradley-Terry model, with its weights; the last count never differs."""
    generator = np.random.default_rng(0)
    size = len(form.COUNTS)
    weights = generator.normal(0, 1, size)
    drawn = generator.normal(0, generator.uniform(0.1, 3, size), (n, size))
    drawn[:, -1] = 0
    chosen_first = generator.random(n) < 1 / (1 + np.exp(-drawn @ weights))
    return np.where(chosen_first[:, None], drawn, -drawn), weights


def test_the_fit_agrees_with_scikit_learn():
    differences, _ = random_differences()
    scale = np.sqrt((differences**2).mean(axis=0))
    scale[-1] = 1
    # Both sides of every pair, for the two classes that it needs; C is the inverse of the penalty on the sum.
    mirrored = np.concatenate([differences, -differences]) / scale
    labels = np.repeat([1, 0], len(differences))
    inverse = 1 / (form.PENALTY * len(mirrored))
    theirs = LogisticRegression(C=inverse, fit_intercept=False, tol=1e-8, max_iter=1000).fit(mirrored, labels)
    ours = form.fit_form_model(differences)
    assert list(ours) == list(form.COUNTS)
    assert list(ours.values()) == pytest.approx(theirs.coef_[0] / scale, abs=1e-3)
    assert ours["distinct_words"] == 0


def test_margins_are_weighted_differences_and_change_sign_with_the_pair():
    pairs = ["two words", "One, two!"], ["a", "b?"]
    model = {"log_words": 2.0, "exclamations": 1.0, "of another version": 5.0}
    margins = form.form_margins(model, form.form_differences(*pairs))
    expected = [2 * (math.log(3) - math.log(2)), 2 * (math.log(3) - math.log(2)) + math.log(2)]
    assert margins == pytest.approx(expected)
    assert form.form_margins(model, form.form_differences(*pairs[::-1])) == pytest.approx(-margins)


def test_what_decides_the_pairs_is_found():
    generator = np.random.default_rng(0)
    chosen = [f"**Right** {'word ' * generator.integers(1, 30)}" for _ in range(200)]
    rejected = [f"Right {'word ' * generator.integers(1, 30)}" for _ in range(200)]
    weights = form.fit_form_model(form.form_differences(chosen[:100], rejected[:100]))
    unseen = form.form_margins(weights, form.form_differences(chosen[100:], rejected[100:]))
    assert (unseen > 0).all() and longer_wins(chosen[100:], rejected[100:]) < 0.8


# --- authors ---------------------------------------------------------------------------------------------------------


def test_strengths_of_two_authors_by_hand(monkeypatch):
    pairs = ["large", "large", "small", "large", ""], ["small", "small", "large", "small", ""]
    strengths = form.fit_authors(*pairs)
    difference = strengths["large"] - strengths["small"]
    # Where the loss has no slope: sigmoid(d) is the share won, less the penalty on d / 2 and -d / 2.
    assert 1 / (1 + math.exp(-difference)) == pytest.approx(3 / 4 - form.PENALTY * difference / 2, abs=1e-5)
    monkeypatch.setattr(form, "PENALTY", 0)
    strengths = form.fit_authors(*pairs)
    assert list(strengths) == ["large", "small"]
    assert strengths["large"] - strengths["small"] == pytest.approx(math.log(3), abs=1e-4)


def drawn_authors(n: int = 2000, count: int = 30) -> tuple[list[str], list[str]]:
    """Names of the chosen and of the rejected authors of pairs drawn from a Bradley-Terry model; some wrote both."""
    generator = np.random.default_rng(0)
    strengths = generator.normal(0, 1, count)
    first, second = generator.integers(0, count, (2, n))
    swapped = generator.random(n) > 1 / (1 + np.exp(strengths[second] - strengths[first]))
    sides = np.where(swapped, second, first), np.where(swapped, first, second)
    chosen, rejected = ([f"author {number:02}" for number in side] for side in sides)
    return chosen, rejected


def test_strengths_agree_with_scikit_learn():
    chosen, rejected = drawn_authors()
    names = sorted({*chosen, *rejected})
    columns = [[float(name == author) for author in names] for name in (*chosen, *rejected)]
    differences = np.array(columns[:2000]) - np.array(columns[2000:])
    mirrored, labels = np.concatenate([differences, -differences]), np.repeat([1, 0], 2000)
    inverse = 1 / (form.PENALTY * len(mirrored))
    theirs = LogisticRegression(C=inverse, fit_intercept=False, tol=1e-8, max_iter=1000).fit(mirrored, labels)
    ours = form.fit_authors(chosen, rejected)
    assert list(ours) == names
    assert list(ours.values()) == pytest.approx(theirs.coef_[0], abs=1e-3)
    assert sum(ours.values()) == pytest.approx(0, abs=1e-6)


def test_margins_of_authors_are_unknown_where_one_of_them_is():
    margins = form.author_margins({"a": 1.5, "b": -0.5}, ["a", "b", "a", "a", ""], ["b", "a", "a", "nobody", ""])
    np.testing.assert_array_equal(margins, [2.0, -2.0, 0.0, math.nan, math.nan])
    assert np.isnan(form.author_margins({}, ["a"], ["b"])).all()
    assert form.fit_authors(["", "a", ""], ["", "", "b"]) == {}
