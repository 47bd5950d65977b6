"""The pairs that a model gets wrong, against tables made by hand."""

import csv

import pytest

from reward_pipeline.files import InputError
from reward_pipeline.mistakes import FORM_OPINIONS, filtered, read_mistakes

COLUMNS = [
    *("place", "category", "prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"),
    *("chosen_length", "rejected_length", "form_margin"),
]
PAIR = {"place": "f row 1", "category": "x", "prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 0.0}
PAIR |= {"rejected_reward": 1.0, "chosen_length": 1, "rejected_length": 1, "form_margin": 0.5}


@pytest.fixture
def table(tmp_path):
    """Write pairs, each with what differs from `PAIR`, and leave some columns out."""

    def write(*changes: dict, without=()) -> str:
        path = tmp_path / "rewards.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [name for name in COLUMNS if name not in without], extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**PAIR, **change} for change in changes)
        return str(path)

    return write


def test_mistakes_come_with_the_lowest_margin_first(table):
    rewards = {"close": (0.5, 0.75), "right": (2, 1), "worst": (-3, 1), "tie": (1, 1), "rounding": (1, 1 + 1e-8)}
    rewards |= {"as close": (1, 1.25), "wrong": (0, 2)}
    path = table(*({"prompt": prompt, "chosen_reward": a, "rejected_reward": b} for prompt, (a, b) in rewards.items()))
    mistakes, pairs = read_mistakes(path)
    assert pairs == 7
    assert mistakes["prompt"].tolist() == ["worst", "wrong", "close", "as close"]  # equal ones as they stand
    assert mistakes["margin"].tolist() == [-4, -2, -0.25, -0.25]


@pytest.mark.parametrize("word", ["null", "NA", "nan", "None", "", "007", "1e5", "true", 'two\nlines, “and” "more"'])
def test_texts_stay_texts(table, word):
    """Also where each answer of a column reads as a number, or as nothing."""
    texts = dict.fromkeys(("prompt", "chosen", "rejected", "place", "category"), word)
    mistakes, _ = read_mistakes(table(texts, texts))
    assert mistakes[[*texts]].values.tolist() == [[word] * 5] * 2


def test_columns_that_may_be_missing(table):
    mistakes, pairs = read_mistakes(table({}, {}, without=("place", "category", "form_margin")))
    assert (len(mistakes), pairs) == (2, 2)
    assert mistakes[["place", "category"]].values.tolist() == [["", ""]] * 2
    assert mistakes["form_margin"].isna().all()


FILTERED = [
    {"prompt": "agrees", "category": "x", "form_margin": 0.5, "chosen_length": 10, "rejected_length": 3},
    {"prompt": "wrong", "category": "y", "form_margin": -0.5, "chosen_length": 3, "rejected_length": 20},
    {"prompt": "zero", "category": "x", "form_margin": 0.0, "chosen_length": 30, "rejected_length": 30},
    {"prompt": "rounding", "category": "", "form_margin": -1e-9, "chosen_length": 40, "rejected_length": 1},
    {"prompt": "unknown", "category": "x", "form_margin": "", "chosen_length": 1, "rejected_length": 50},
]


@pytest.mark.parametrize(
    "filters, kept",
    [
        ((None, None, None, None), ["agrees", "wrong", "zero", "rounding", "unknown"]),
        (("x", None, None, None), ["agrees", "zero", "unknown"]),
        (("", None, None, None), ["rounding"]),
        (("z", None, None, None), []),
        ((None, "agrees with people", None, None), ["agrees"]),
        ((None, "is wrong as well", None, None), ["wrong"]),
        ((None, "can not tell", None, None), ["zero", "rounding", "unknown"]),
        ((None, None, 30, None), ["zero", "rounding", "unknown"]),
        ((None, None, None, 20), ["agrees", "wrong"]),
        ((None, None, 11, 30), ["wrong", "zero"]),
        (("x", "can not tell", 31, 50), ["unknown"]),
    ],
)
def test_filters_keep_what_they_say(table, filters, kept):
    mistakes, _ = read_mistakes(table(*FILTERED))
    assert filtered(mistakes, *filters)["prompt"].tolist() == kept
    assert len(mistakes) == 5  # which are not changed


def test_without_form_margins_the_form_model_can_not_tell(table):
    mistakes, _ = read_mistakes(table({}, {}, without=("form_margin",)))
    assert [len(filtered(mistakes, None, opinion, None, None)) for opinion in FORM_OPINIONS] == [0, 0, 2]


def refusal(path) -> str:
    with pytest.raises(InputError) as refused:
        read_mistakes(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["prompt", "rejected", "chosen_reward", "rejected_length"])
def test_a_missing_column_is_named(table, name):
    path = table({}, without=(name,))
    assert refusal(path) == f"{path}: has no column {name}; name a rewards.csv of evaluate_reward_model.py"


NUMBERS = ("chosen_reward", "rejected_reward", "chosen_length", "rejected_length", "form_margin")


@pytest.mark.parametrize("name", NUMBERS)
def test_text_in_place_of_numbers_is_named(table, name):
    path = table({}, {name: "high"})
    assert refusal(path).startswith(f"{path}: {name} holds what is no number")


def test_words_for_yes_and_no_are_no_rewards(table):
    path = table({"chosen_reward": "False", "rejected_reward": "True"})
    assert refusal(path).startswith(f"{path}: chosen_reward holds what is no number")


@pytest.mark.parametrize("name", NUMBERS[:4])
def test_an_empty_number_is_named(table, name):
    path = table({}, {name: ""})
    assert refusal(path).startswith(f"{path}: {name} holds what is no number")


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty.csv", b""),
        ("picture.csv", b"\x89PNG\r\n\x1a\n\x00\xff\xfe"),
        ("quote.csv", b'prompt,chosen\n"a,b\n'),
        ("metrics.json", b'{"accuracy": 0.7}'),
        ("rewards.csv.gz", b"not packed"),
        ("model.zip", b"not packed"),
    ],
)
def test_another_file_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: ")


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for path in (tmp_path / "missing.csv", tmp_path):
        assert refusal(path).startswith(f"{path}: can not be read (")
