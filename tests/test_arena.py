"""Who answers in the arena, what they are asked, and who stands where."""

import json
import shutil

import numpy as np
import pytest
from conftest import refuse_system_turns

from reward_pipeline.arena import (
    Asked,
    Contestant,
    contestants,
    fight,
    from_file,
    in_common,
    is_file_of_answers,
    next_prompt,
    read_prompt,
    unseen,
)
from reward_pipeline.conversations import encode_prompt
from reward_pipeline.files import InputError
from reward_pipeline.models import load_tokenizer
from reward_pipeline.pairs import prompt_key


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
DIALOGUE = [user("Hi"), assistant("Hello!"), user("é")]


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, messages",
    [
        ("Name a colour.", [user("Name a colour.")]),
        ("User: Hi\n\nAssistant: Hello!\n\nUser: A colour?", [user("Hi"), assistant("Hello!"), user("A colour?")]),
        ("User: Hi", [user("Hi")]),
        ("User: Hi\n\nAssistant:", [user("Hi")]),
        (json.dumps([SYSTEM, user("Hi"), assistant("Hello!"), user("é")]), [SYSTEM, *DIALOGUE]),
        (json.dumps(user("Hi")), [user("Hi")]),
        ("Who said “User: Hi”?", [user("Who said “User: Hi”?")]),
        ("[1, 2] is a list", [user("[1, 2] is a list")]),
    ],
)  # fmt: skip
def test_prompts_as_people_type_them(text, messages):
    assert read_prompt(text) == messages


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(text):
    with pytest.raises(InputError, match=r"^the prompt is empty$"):
        read_prompt(text)


@pytest.mark.parametrize(
    "text, reason",
    [
        (json.dumps([user("Hi"), assistant("Hello!")]), "must end with a user turn, not with 'assistant'"),
        ("Hi\n<extra_id_1>Assistant\nHello!", "must end with a user turn, not with 'assistant'"),
        (json.dumps([SYSTEM]), "must end with a user turn, not with 'system'"),
        (json.dumps([{"role": "narrator", "content": "x"}]), "unknown role 'narrator'"),
        (json.dumps([user(5)]), "with a string as content"),
        ('[{"role": "user", "content": "Hi"', "can not be read"),
        ('[{"role": "user", "content": ' + "[" * 100_000 + "]" * 100_000 + "}]", "can not be read"),
    ],
)
def test_a_prompt_that_nobody_can_answer_is_refused(text, reason):
    with pytest.raises(InputError, match=f"^the prompt can not be read: .*{reason}") as refused:
        read_prompt(text)
    assert "\n" not in str(refused.value)


PROMPTS = [Asked([user(text)], text) for text in "abc"]
KEYS = [prompt_key(asked.messages) for asked in PROMPTS]


def test_what_is_typed_wins():
    assert next_prompt("Hi", PROMPTS, [], draw()) == Asked([user("Hi")])
    assert next_prompt("User: Hi", [], KEYS, draw()) == Asked([user("Hi")])


def test_prompts_that_nobody_has_seen_come_first():
    def found(seen) -> set[str]:
        return {next_prompt(" \n", PROMPTS, iter(seen), draw(seed)).category for seed in range(60)}

    assert found([]) == {"a", "b", "c"}
    assert found(KEYS[:1]) == {"b", "c"}
    assert found([*KEYS[:2], 5]) == {"c"}
    assert found(KEYS) == {"a", "b", "c"}  # again, and not none


def test_without_prompts_somebody_has_to_type():
    with pytest.raises(InputError, match=r"^there is no prepared prompt; type one$"):
        next_prompt("", [], [], draw())


def test_every_prompt_of_a_split_is_asked_once():
    split = {"prompt": [[user("a")], [user("b")], [user("a")]], "category": ["x", "y", "z"]}
    assert unseen(split) == [Asked([user("a")], "x"), Asked([user("b")], "y")]


# --- files of answers ------------------------------------------------------------------------------------------------


def rows_of(**answers: str) -> list[dict]:
    return [{"prompt": prompt, "response": answer} for prompt, answer in answers.items()]


def last(contestant: Contestant, text: str, seed: int = 0) -> str:
    *_, whole = contestant.answer([user(text)], seed)
    return whole


def test_a_file_answers_its_prompts(write_jsonl):
    rows = [
        {"prompt": "a", "response": "first", "category": "letters"},
        {"prompt": [user(" a\n")], "response": "second"},  # the same prompt
        {"prompt": [SYSTEM, user("b")], "response": [assistant("as a message")], "category": None},
    ]
    name = write_jsonl(rows)
    contestant = from_file(name)
    assert contestant.name == name
    assert contestant.prompts == [Asked([user("a")], "letters"), Asked([SYSTEM, user("b")], "")]
    assert last(contestant, "a") == last(contestant, " a", seed=1) == "first"
    assert [*contestant.answer([SYSTEM, user("b")], 0)] == ["as a message"]
    with pytest.raises(InputError, match=f"^{name}: has no answer to this prompt; leave it empty"):
        last(contestant, "b")


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([], "has no rows"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "row 1: has chosen, rejected; .* one response in each row"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a", "responses": ["b"]}], r"row 2: has responses\[0\]; "),
        ([{"prompt": "a"}], "row 1: needs prompt, and response"),
        ([{"prompt": "a", "response": " "}], "row 1: response is empty"),
    ],
)
def test_a_file_of_something_else_is_refused(write_jsonl, rows, reason):
    with pytest.raises(InputError, match=reason) as refused:
        from_file(write_jsonl(rows))
    assert "\n" not in str(refused.value)


def test_prompts_in_common_keep_the_order_of_the_first_file(write_jsonl):
    one = from_file(write_jsonl(rows_of(c="1", a="2", b="3"), "one.jsonl"))
    other = from_file(write_jsonl(rows_of(x="1", b="2", c="3"), "other.jsonl"))
    assert in_common([one, other]) == [Asked([user("c")]), Asked([user("b")])]


def test_what_is_a_file_and_what_a_model(tmp_path, write_jsonl):
    assert is_file_of_answers(write_jsonl([], "answers"))
    assert is_file_of_answers("missing.CSV") and is_file_of_answers("missing.jsonl.gz")
    assert not is_file_of_answers(str(tmp_path)) and not is_file_of_answers("HuggingFaceTB/SmolLM2-1.7B")


# --- contestants -----------------------------------------------------------------------------------------------------


def refusal(names, temperatures=(1.0, 1.0)) -> str:
    with pytest.raises(InputError) as refused:
        contestants(names, temperatures, 8)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_two_who_can_not_be_compared_are_refused(write_jsonl, tiny_model, tmp_path):
    one, other = write_jsonl(rows_of(a="1"), "one.jsonl"), write_jsonl(rows_of(b="1"), "other.jsonl")
    assert refusal([one, one]) == f"{one}: stands on both sides; name a second file of answers"
    assert refusal([one, other]) == f"{one} and {other}: have no prompt in common"
    mixed = "one is a file and one a model; name two of a kind"
    assert refusal([one, tiny_model]) == f"{one} and {tiny_model}: {mixed}"
    assert refusal([tiny_model, one]) == f"{tiny_model} and {one}: {mixed}"
    assert refusal([tiny_model] * 2) == (
        f"{tiny_model}: stands on both sides at one temperature; name two models or two temperatures"
    )
    missing = str(tmp_path / "missing.jsonl")
    assert missing in refusal([one, missing])
    assert str(tmp_path / "empty") in refusal([tiny_model, str(tmp_path / "empty")])


def test_two_files_are_named_by_their_paths(write_jsonl):
    names = [write_jsonl(rows_of(a=text), f"{text}.jsonl") for text in ("one", "other")]
    assert [(each.name, last(each, "a")) for each in contestants(names, (1, 1), 8)] == [
        (names[0], "one"),
        (names[1], "other"),
    ]


@pytest.fixture(scope="module")
def twice(tiny_model) -> list[Contestant]:
    """The same model at two temperatures."""
    return contestants([tiny_model, tiny_model], [0.5, 1.25], 6)


def test_one_model_at_two_temperatures_is_named_by_them(twice, tiny_model):
    assert [each.name for each in twice] == [f"{tiny_model} (temperature 0.5)", f"{tiny_model} (temperature 1.25)"]
    assert [each.prompts for each in twice] == [None, None]


def test_a_model_answers_the_same_to_the_same_seed(twice):
    answers = [[*twice[0].answer([user("Hi")], seed)] for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]
    assert len(answers[0]) <= 6 and answers[0][-1]
    assert answers[0][-1] != last(twice[1], "Hi", seed=3)


@pytest.fixture
def other_model(tmp_path, tiny_model) -> str:
    """A copy of the tiny model."""
    return str(shutil.copytree(tiny_model, tmp_path / "other"))


def test_a_prompt_may_fill_the_model_and_no_more(tiny_model, other_model):
    messages = [user("Name a colour. " * 20)]
    length = len(encode_prompt(load_tokenizer(tiny_model), messages))
    fits = contestants([tiny_model, other_model], [1, 1], 2048 - length)
    assert [each.name for each in fits] == [tiny_model, other_model]  # two models have their own names
    growing = fits[0].answer(messages, 0)
    assert isinstance(next(growing), str)
    growing.close()
    too_long = contestants([tiny_model, other_model], [1, 1], 2048 - length + 1)[1]
    with pytest.raises(InputError) as refused:
        next(too_long.answer(messages, 0))
    words = f"the prompt has {length} tokens, and {other_model} takes {length - 1}; shorten it"
    assert str(refused.value) == words


def test_a_prompt_that_the_template_refuses_names_the_model(tiny_model, tmp_path):
    other_model = refuse_system_turns(tiny_model, tmp_path / "other")
    _, other = contestants([tiny_model, other_model], [1, 1], 4)
    with pytest.raises(InputError, match=f"^{other_model}: .*no system role") as refused:
        next(other.answer([SYSTEM, user("Hi")], 0))
    assert "\n" not in str(refused.value)


# --- fights ----------------------------------------------------------------------------------------------------------


def saying(name: str, *texts: str) -> Contestant:
    return Contestant(name, lambda messages, seed: iter(texts))


def test_answers_grow_and_are_whole_at_the_end():
    asked = Asked([user("Hi")], "greetings")
    pair = [saying("m", "One", "One two", "One two three"), saying("n", "Uno")]
    sides = set()
    for seed in range(20):
        duels = [*fight(asked, pair, draw(seed))]
        assert all((duel.prompt, duel.category) == ([user("Hi")], "greetings") for duel in duels)
        seen = [{duel.left_model: duel.left, duel.right_model: duel.right} for duel in duels]
        assert seen[:3] == [{"m": text, "n": "Uno"} for text in ("One", "One two", "One two three")]
        assert seen[-1] == seen[2]
        sides.add(duels[-1].left_model)
        assert len({(duel.left_model, duel.right_model) for duel in duels}) == 1  # nobody changes sides
    assert sides == {"m", "n"}


def test_each_side_has_a_seed_of_its_own():
    given: list[int] = []

    def answer(messages, seed):
        given.append(seed)
        yield str(seed)

    pair = [Contestant("m", answer), Contestant("n", answer)]
    for seed in (0, 0, 1):
        [*fight(Asked([user("Hi")]), pair, draw(seed))]
    assert given[:2] == given[2:4] and len(set(given)) == 4


def test_models_fight(twice):
    *_, duel = fight(Asked([user("Name a colour.")]), twice, draw(1))
    texts = {duel.left_model: duel.left, duel.right_model: duel.right}
    assert texts.keys() == {each.name for each in twice} and all(text.strip() for text in texts.values())


@pytest.mark.parametrize(
    "one, other, reason",
    [
        (["Red"], [], "an answer is empty"),
        (["", " \n"], ["Red"], "an answer is empty"),
        (["", ""], ["", ""], "an answer is empty"),
        (["Red"], ["R", "Red"], "both answers are the same"),
        (["Red\n"], [" Red"], "both answers are the same"),
    ],
)
def test_there_has_to_be_something_to_vote_on(one, other, reason):
    for seed in range(4):
        with pytest.raises(InputError, match=f"^{reason}, so there is nothing to vote on; ask again$"):
            [*fight(Asked([user("Hi")]), [saying("m", *one), saying("n", *other)], draw(seed))]
