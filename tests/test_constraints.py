"""Constraints that a rule can check."""

import collections
import copy

import numpy as np
import pytest
from test_pair_metrics import assistant, user

from reward_pipeline.constraints import COMMON_WORDS, KINDS, OTHER_KEYWORDS, Constraint, constrain, keeps, kept

# For each kind an argument, answers that keep it, and answers that nearly do.
ANSWERS: dict[str, tuple[str | int | None, list[str], list[str]]] = {
    "no_commas": (None, ["Tea and milk."], ["Tea, and milk.", "No.", "yes yes yes", "茶 和 奶，水 吧", "... ! ?"]),
    "lower_case": (None, ["tea is fine.", "it's 4 pm now"], ["tea is Fine.", "1 2 3 4", "tea", "茶 和 奶 水"]),
    "capitals": (None, ["TEA IS FINE.", "IT'S 4 PM NOW"], ["TEA IS fINE.", "1 2 3 4", "TEA", "茶 和 奶 水"]),
    "ends_with": (
        "Is there anything else?",
        ["Tea is fine. Is there anything else?", "Tea is fine.\n\nIs there anything else?"],
        [
            "Is there anything else?",
            "Tea is fine. Is there anything else",
            "Tea is fine. is there anything else?",
            "Tea is fine. Is there anything else? Yes.",
            "Is there anything else? " * 3,
        ],
    ),
    "begins_with": (
        "Well",
        ["Well, tea is fine.", "**well** tea is"],
        ["Wells are very deep.", "Tea is well.", "Well.", "Well well well"],
    ),
    "same_ends": (None, ["Tea is always tea.", "**Tea** is, I say, TEA!"], ["Tea is always teas.", "Tea tea", "Tea"]),
    "keyword": (
        "Coffee",
        ["I like coffee best.", "The _coffee_ is hot", "Coffee's a drink"],
        ["I like coffees best.", "Coffee", "I like tea best."],
    ),
    "avoids": ("the", ["There they are now."], ["Here is THE tea.", "Tea.", "Here is the-one."]),
    "one_sentence": (
        None,
        ["Tea is fine.", "It costs 3.14 dollars, e.g. for Mr. Smith!", "Well... yes.", '"It is."', "Born in 1990."],
        ["Tea is fine", "Tea. Milk.", "It was 1990. Then it ended.", "Tea\nMilk.", "...", "Is it?! Yes."],
    ),
    "sentences": (
        2,
        ["Tea is fine. Milk is not!", "**Tea.** “Milk.”", "Wait... No.", "1. Tea.\n2. Milk.", "i am here. you are."],
        ["Tea is fine.", "Tea. Milk. Water.", "Tea is fine. Milk is", "Tea. !!! ...", "See e.g. Dr. J. Doe."],
    ),
    "words": (
        5,
        ["One two three four five", "Don't.", "4"],
        ["1 2 3 4 5 6", "one-two-three-four-five-six", "...", "-"],
    ),
    "bullets": (
        2,
        ["- tea\n- milk", "Two drinks:\n\n* tea\n  * milk\nThat is all."],
        [
            "- tea",
            "- tea\n- milk\n- water",
            "- tea\n- ",
            "-tea\n-milk",
            "- tea\n- Tea",
            "- tea\n- ...",
            "• tea\n• milk",
        ],
    ),
    "numbered": (
        2,
        ["1. tea\n2. milk", "Two drinks:\n1) tea\n\n2) milk"],
        [
            "1. tea",
            "1. tea\n1. milk",
            "2. tea\n1. milk",
            "1. tea\n2. milk\n3. water",
            "1. tea\n2. tea",
            "1. tea\n2.",
            "1.5 teas\n2.5 milks",
            "1. tea 2. milk",
        ],
    ),
    "paragraphs": (
        2,
        ["Tea.\n\nMilk.", "Tea.\nMore tea.\n \n\nMilk."],
        ["Tea.\nMilk.", "Tea.\n\nMilk.\n\nWater.", "Tea.\n\nTea.", "Tea.\n\n..."],
    ),
    "json": (
        None,
        ['{"a": 1}', '{"a": ["tea", 2], "b": ""}', '{\n"a": false}'],
        ["{}", '{"a": ""}', '{"a": []}', '["a"]', '"a"', "1", "{'a': 1}", '{"a": 1}.', 'Here: {"a": 1}', '{"a": 1'],
    ),
    "question": (
        None,
        ["Tea is fine. How about you?", "*How about you?*"],
        ["How about you? I like tea.", "Tea is fine?!", "Tea is very fine. ?", "Tea is very fine.\n?", "?", "Fine?"],
    ),
    "quotes": (
        None,
        ['"Tea is fine."', "“Tea is ‘fine’.”"],
        ["Tea is fine.", '"Tea is fine.', '"', '""', '"..."', "'Tea'", '"Tea" is not "milk"', '“Tea"', '"Tea".'],
    ),
    "number": (None, ["There are 4 cups."], ["There are four cups.", "4", "4 4 4 4", "It is m² or ½ here."]),
    "title": (
        None,
        ["<<On tea>>\nIt is very fine.", "It is very fine. <<Tea>>"],
        [
            "<On tea> It is very fine.",
            "<<>> It is very fine.",
            "<<...>> It is very fine.",
            "<<On tea is fine>>",
            "<<On\ntea>> is very fine.",
            ">>On tea<< It is very fine.",
        ],
    ),
    "placeholders": (
        2,
        ["Dear [name], meet me in [city].", "Dear [name], it is [date] in [city]."],
        [
            "Dear [name], meet me.",
            "Dear [name], I mean [Name].",
            "[name] [city]",
            "It is done: [x] [y]",
            "As is known [1] [2]",
            "See [this one](a) or [that](b)",
            "Dear {name}, meet me in {city}.",
        ],
    ),
    "bold": (
        None,
        ["Tea is **very fine** today."],
        [
            "Tea is *very* fine.",
            "**Tea is very fine.**",
            "Tea is very **** fine.",
            "Tea is **...** very fine.",
            "Tea is **very fine.",
        ],
    ),
    "postscript": (
        None,
        ["Tea is fine.\nP.S. Milk is not fine.", "Fine. P.S.: But not with milk."],
        ["P.S. Milk is not fine.", "Tea is fine. P.S.", "Tea is fine. PS Milk is not.", "Tea is fine. P.S. P.S. P.S."],
    ),
    "two_answers": (
        None,
        ["Tea.\n******\nMilk.", "Tea. ****** Milk."],
        ["Tea. ****** Tea.", "Tea. ******", "Tea. ***** Milk.", "Tea ****** Milk ****** Water", "Tea. ****** ..."],
    ),
    "russian": (
        None,
        ["Чай очень хороший.", "Ещё Python — это язык программирования."],
        [
            "Tea is very fine.",
            "Чай.",
            "Чай чай чай чай",
            "Чай is a Russian word for tea.",
            "Вода кипить при ста градусів.",
            "1 2 3 4",
        ],
    ),
}
CASES = [
    (kind, value, text, expected)
    for kind, (value, right, wrong) in ANSWERS.items()
    for texts, expected in ((right, True), (wrong, False))
    for text in texts
]


@pytest.mark.parametrize(("kind", "value", "text", "expected"), CASES)
def test_answers_that_keep_it_and_near_misses(kind, value, text, expected):
    assert keeps(Constraint(kind, value), text) is expected
    assert keeps(Constraint(kind, value), f"\n  {text} \n") is expected


def test_there_are_answers_for_every_kind():
    assert ANSWERS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " \n\t", ".", "\u200b", "\ud800"])
def test_an_answer_that_says_nothing_keeps_nothing(kind, text):
    assert not keeps(Constraint(kind, ANSWERS[kind][0]), text)


HOSTILE = ["\n", '"', " ", "*", "**a", "<<a", "[a", "{", '{"a":', "a", "a.", "a'", "- ", "- \n", "1. ", "P.S."]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", HOSTILE)
def test_long_answers_are_read_in_one_go(kind, piece):
    # A pattern that starts again at each piece would not end while anybody waits.
    text = piece * (200_000 // len(piece))
    for answer in (text, f"<<{text}b", f"1. {text}b"):
        assert keeps(Constraint(kind, ANSWERS[kind][0]), answer) in (True, False)


# --- prompts ---------------------------------------------------------------------------------------------------------

PROMPT = [*user("Hello"), *assistant("Hi!"), *user("Describe the Volcano Etna, please, which is in 2 {value} words")]


@pytest.mark.parametrize("held_out", [False, True])
def test_the_sentence_is_joined_to_the_last_turn_of_a_copy(held_out):
    before = copy.deepcopy(PROMPT)
    forms = collections.Counter()
    for number in range(20 * len(KINDS)):
        messages, (name, value) = constrain(PROMPT, number, 0, held_out)
        assert before == PROMPT and messages[:-1] == before[:-1] and messages[-1]["role"] == "user"
        first, text, last = messages[-1]["content"].partition(before[-1]["content"])
        assert text and bool(first) != bool(last)
        sentence = first.strip() or last.strip()
        allowed = KINDS[name].held_out if held_out else KINDS[name].wordings
        assert sentence in [wording.format(value=value) for wording in allowed]
        assert value is None or str(value) in sentence
        forms[bool(first), "\n\n" in first + last] += 1
    assert len(forms) == 4 and forms[True, True] + forms[True, False] < sum(forms.values()) / 3


def test_the_seed_and_the_number_decide():
    def drawn(seed: int) -> list:
        return [constrain(PROMPT, number, seed, False) for number in range(100)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert [kind for _, (kind, _) in drawn(1)] != [kind for _, (kind, _) in drawn(2)]


def test_every_kind_comes_as_often():
    count = collections.Counter(constrain(PROMPT, number, 3, False)[1].kind for number in range(7, 7 + 3 * len(KINDS)))
    assert count == dict.fromkeys(KINDS, 3)


def test_training_sees_none_of_the_wordings_that_are_held_out():
    wordings = [wording.casefold() for kind in KINDS.values() for wording in kind.wordings + kind.held_out]
    assert len(wordings) == len(set(wordings))
    assert all(len(kind.wordings) >= 3 and len(kind.held_out) >= 2 for kind in KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_wordings_name_the_argument_where_there_is_one(kind):
    value = KINDS[kind].draw(np.random.default_rng(0), "Hello")
    assert type(value) is type(ANSWERS[kind][0])
    assert {"{value}" in wording for wording in KINDS[kind].wordings + KINDS[kind].held_out} == {value is not None}


@pytest.mark.parametrize(
    ("prompt", "keywords"),
    [
        ("Describe the Volcano Etna, which VOLCANIC rocks 12345 it's", {"Volcano", "VOLCANIC", "rocks"}),
        ("Что такое вулкан?", {"такое", "вулкан"}),
        ("Which is it?", set(OTHER_KEYWORDS)),
        ("请描述一下埃特纳火山", set(OTHER_KEYWORDS)),
        ("Donaudampfschifffahrt", set(OTHER_KEYWORDS)),
    ],
)
def test_keywords_are_words_of_the_prompt_where_it_has_any(prompt, keywords):
    generator = np.random.default_rng(0)
    assert {KINDS["keyword"].draw(generator, prompt) for _ in range(300)} == keywords


def test_a_word_to_avoid_is_one_that_answers_tend_to_use():
    assert keeps(Constraint("avoids", "a"), "Tea is fine.") and set(COMMON_WORDS) == {
        KINDS["avoids"].draw(np.random.default_rng(seed), "") for seed in range(200)
    }


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_as_trl_asks_for_them():
    answers = ["Tea and milk.", "Tea, and milk.", "One. Two.", "", "Tea and milk."]
    constraint = [Constraint("no_commas", None), ["no_commas", None], ["sentences", 2], ["words", 5], None]
    others = {"completion_ids": [[1]] * 5, "trainer_state": None, "category": ["x"] * 5}
    columns = {"prompts": [user("Tea?")] * 5, "constraint": constraint, **others}
    assert kept(completions=answers, **columns) == [1.0, 0.0, 1.0, 0.0, None]
    assert kept(completions=[assistant(answer) for answer in answers], **columns) == [1.0, 0.0, 1.0, 0.0, None]


def test_a_constraint_for_each_answer():
    with pytest.raises(ValueError, match="shorter"):
        kept([user("Tea?")] * 2, ["Tea.", "Milk."], [None])
