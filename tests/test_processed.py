import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import flip_a_bit, make_pairs
from datasets import Dataset, DatasetDict, concatenate_datasets

from reward_pipeline import processed
from reward_pipeline.conversations import encode, response_text
from reward_pipeline.files import InputError, write_checksums
from reward_pipeline.models import ModelSource
from reward_pipeline.pairs import is_validation_prompt, pair_keys
from reward_pipeline.schemas import check_pair

METADATA = {
    "source": "a test", "digest": "1", "split_digests": {"train": "2", "validation": "3"}, "id_digests": {},
    "validation_share": 0.5, "seed": 42, "max_length": 64, "tokenizer": "tiny",
}  # fmt: skip


def checked(rows: list[dict]) -> Dataset:
    """Pairs as they are before they are tokenised."""
    pairs = [check_pair(row) for row in rows]
    return Dataset.from_list([{**pair, **pair_keys(pair), "place": f"row {i}"} for i, pair in enumerate(pairs, 1)])


@pytest.fixture
def directory(tmp_path, tokenizer) -> Path:
    """A processed directory of four pairs, two a split."""
    rows = [{**pair, "category": "numbers", "chosen_rating": 3, "rejected_rating": 1} for pair in make_pairs(4)]
    splits = processed.tokenize_pairs(checked(rows), tokenizer, 64, "pairs").remove_columns(processed.COUNT_COLUMNS)
    halves = {"train": splits.select([0, 1]), "validation": splits.select([2, 3])}
    DatasetDict(halves).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(METADATA))
    write_checksums(tmp_path / "data")
    return tmp_path / "data"


# --- written and read ------------------------------------------------------------------------------------------------


def test_a_row_whose_text_the_template_refuses_is_named(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if 'secret' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "a secret", "Bye")]
    batch = {"prompt": prompts, "chosen": ["a"] * 3, "rejected": ["b"] * 3, "place": ["row 1", "row 2", "row 3"]}
    with pytest.raises(InputError, match=r"^row 2: .*refuses these messages \(no\)"):
        processed.token_columns(batch, refusing, 64)


def test_columns_of_tokens_tell_what_was_cut(tokenizer):
    words = [(1, 2, 60), (50, 2, 30), (40, 9, 1)]  # of prompt, chosen and rejected: only the last pair fits
    rows = [{"prompt": "a " * prompt, "chosen": "a " * one, "rejected": "b " * other} for prompt, one, other in words]
    split = processed.tokenize_pairs(checked(rows), tokenizer, 64, "pairs")
    whole = processed.whole_columns(split, ["chosen_whole_length", "rejected_whole_length", "length"])
    for side in ("chosen", "rejected"):
        expected = [len(encode(tokenizer, pair["prompt"], pair[side], 10_000)) for pair in split]
        assert whole[f"{side}_whole_length"].tolist() == expected
    assert whole["length"].max() <= 64
    fits = np.maximum(whole["chosen_whole_length"], whole["rejected_whole_length"]) <= 64
    cut = processed.whole_columns(split, ["prompt_cut", "response_cut"])
    assert fits.tolist() == [False, False, True] == (~(cut["prompt_cut"] | cut["response_cut"])).tolist()


def test_the_digest_is_of_the_pairs_and_not_of_their_order():
    keys = np.array([5, 6, 7])
    swapped = np.array([True, False, False])
    digest = processed.digest(keys, swapped)
    assert processed.digest(keys[::-1], swapped[::-1]) == digest
    assert len({digest, processed.digest(keys, ~swapped), processed.digest(keys[:2], swapped[:2])}) == 3


def test_a_directory_is_read_as_it_was_written(directory):
    splits, metadata = processed.load_processed(str(directory))
    assert metadata == METADATA
    assert [response_text(row["chosen"]) for row in splits["validation"]] == [
        pair["chosen"] for pair in make_pairs(4)[2:]
    ]


def test_damage_is_named(directory):
    flip_a_bit(next((directory / "train").glob("*.arrow")))
    with pytest.raises(InputError, match=r"arrow: damaged, or changed .*; run load_helpsteer_dataset\.py again"):
        processed.load_processed(str(directory))


@pytest.mark.parametrize("content", [None, "{", "[]", "3"])
def test_metadata_that_is_missing_or_broken_is_named(directory, content):
    path = directory / "metadata.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=r"no complete dataset here|made by another version"):
        processed.load_processed(str(directory))


def as_text(split: Dataset, side: str) -> Dataset:
    texts = [response_text(answer) for answer in split[side]]
    return split.remove_columns(side).add_column(side, texts)


@pytest.mark.parametrize("change", ["text", "category", "validation_share"])
def test_data_of_an_earlier_version_is_named(directory, tmp_path, change):
    splits, metadata = processed.load_processed(str(directory))
    if change == "text":
        splits = DatasetDict({name: as_text(as_text(split, "chosen"), "rejected") for name, split in splits.items()})
    elif change == "category":
        splits = splits.remove_columns("category")
    else:
        del metadata["validation_share"]
    splits.save_to_disk(tmp_path / "earlier")
    (tmp_path / "earlier" / "metadata.json").write_text(json.dumps(metadata))
    message = "earlier: made by another version of load_helpsteer_dataset.py; run it again$"
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        processed.load_processed(str(tmp_path / "earlier"))


def test_pairs_are_the_same_from_the_directory_and_from_the_source(directory, write_jsonl, capsys):
    rows = [{**pair, "category": "numbers", "chosen_rating": 3, "rejected_rating": 1} for pair in make_pairs(4)]
    source = write_jsonl([*rows, {"prompt": "no answers"}])
    from_source, held_out = processed.read_pairs(source), processed.read_pairs(str(directory))
    assert "can not be used (1: " in capsys.readouterr().out
    assert from_source.features == held_out.features == processed.PAIR_FEATURES
    assert held_out["place"] == [f"{directory}, validation row {number}" for number in (1, 2)]
    assert from_source["place"][3] == f"{source} row 4"
    for name in set(processed.PAIR_FEATURES) - {"place"}:
        assert from_source[name][2:] == held_out[name][:]
    trained = processed.read_pairs(str(directory), "train")
    assert trained["chosen"][:] == from_source["chosen"][:2]
    with pytest.raises(InputError, match="choose one of its splits by --split: train, validation"):
        processed.read_pairs(str(directory), "test")


def test_pairs_without_ratings_have_typed_columns(write_jsonl):
    pairs = processed.read_pairs(write_jsonl(make_pairs(2)))
    assert pairs.features == processed.PAIR_FEATURES and pairs["chosen_rating"][:] == [None, None]
    with pytest.raises(InputError, match="no usable pair; 1 of 1 pairs: missing column chosen"):
        processed.read_pairs(write_jsonl([{"prompt": "no answers"}]))


def test_pairs_with_tool_calls_are_left_out_where_no_template_is_known(write_jsonl, capsys):
    call = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}]}
    called = [{"role": "user", "content": "Hi"}, call, {"role": "tool", "content": "4"}]
    pairs = processed.read_pairs(write_jsonl([*make_pairs(2), {**make_pairs(1)[0], "prompt": called}]))
    assert len(pairs) == 2 and "can not be used (1: " in capsys.readouterr().out


def test_columns_named_by_the_user_are_read(directory, write_jsonl, tiny_model):
    pairs = make_pairs(40)
    source = write_jsonl(
        [{"question": each["prompt"], "answers": [each["chosen"], each["rejected"]]} for each in pairs]
    )
    columns = ["prompt=question", "chosen=answers.0", "rejected=answers.1"]
    plain = write_jsonl(pairs, "plain.jsonl")
    read, expected = processed.read_pairs(source, columns=columns), processed.read_pairs(plain)
    for name in ("prompt", "chosen", "rejected"):
        assert read[name][:] == expected[name][:]
    splits = [
        processed.stream_processed(
            each, None, ModelSource(tiny_model, "tiny"), 64, 2, 0.2, mismatched_share=0.0, seed=42, columns=names
        )[0]
        for each, names in ((source, columns), (plain, []))
    ]
    named, known = ([row["chosen_ids"] for row in each["train"].take(20)] for each in splits)
    assert named == known
    with pytest.raises(InputError, match="holds prepared data, whose columns are known; leave --columns out"):
        processed.read_pairs(str(directory), columns=columns)


def test_ids_of_another_tokenizer_are_refused(directory, tokenizer):
    splits, _ = processed.load_processed(str(directory))
    processed.check_tokens(splits["train"], tokenizer, 64, "tiny")
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("user", "human").replace("message['role']", "'human'")
    with pytest.raises(InputError, match="tokenised with tiny; run"):
        processed.check_tokens(splits["train"], other, 64, "tiny")


def test_another_split_of_the_same_pairs_is_other_data():
    identity = processed.data_identity(METADATA)
    for change in ({"validation_share": 0.3}, {"split_digests": {"train": "3", "validation": "2"}}):
        assert processed.data_identity({**METADATA, **change}) != identity
    for change in ({"source": "a copy"}, {"tokenizer": "the same from the hub, another revision"}):
        assert processed.data_identity({**METADATA, **change}) == identity


def test_the_digest_of_ids_tells_where_they_are():
    rows = [{"chosen_ids": [1, 2], "rejected_ids": [3]}, {"chosen_ids": [4], "rejected_ids": [5, 6]}]
    pairs = Dataset.from_list(rows)
    same = [
        pairs,
        concatenate_datasets([pairs.select([0]), pairs.select([1])]),
        Dataset.from_list([*rows, *rows]).select([2, 1]),
    ]
    assert len({processed.id_digest(each) for each in same}) == 1
    others = [
        [rows[1], rows[0]],
        [{"chosen_ids": [1], "rejected_ids": [3]}, {"chosen_ids": [2, 4], "rejected_ids": [5, 6]}],
        [{"chosen_ids": [3], "rejected_ids": [1, 2]}, {"chosen_ids": [5, 6], "rejected_ids": [4]}],
    ]
    assert len({processed.id_digest(Dataset.from_list(each)) for each in [rows, *others]}) == 4


# --- streams ---------------------------------------------------------------------------------------------------------


def stream(source: str, model: str, share: float = 0.2, mismatched: float = 0.0) -> tuple[dict, dict]:
    return processed.stream_processed(
        source, None, ModelSource(model, "tiny"), 64, 2, validation_share=share, mismatched_share=mismatched, seed=42
    )


def test_the_sides_of_a_stream_share_no_prompt_and_are_all_pairs(write_jsonl, tokenizer):
    rows = [{**pair, "prompt": f"Prompt {number // 2}"} for number, pair in enumerate(make_pairs(400))]
    source = write_jsonl([*rows, {"prompt": "no answers"}])

    def sides(share, seed):
        return [
            [json.dumps(pair) for pair in processed.stream_pairs(source, None, tokenizer, share, seed, side)]
            for side in (False, True)
        ]

    train, validation = sides(0.2, 42)
    assert len(train) + len(validation) == 400
    prompts = [{str(json.loads(pair)["prompt"]) for pair in side} for side in (train, validation)]
    assert not prompts[0] & prompts[1]
    assert 20 < len(prompts[1]) < 60  # 200 prompts, a fifth of them expected, standard deviation 6
    assert sides(0.2, 42)[1] == validation != sides(0.2, 43)[1]
    assert set(validation) < set(sides(0.5, 42)[1])


def test_a_stream_of_ids_is_endless_and_leaves_out_what_teaches_nothing(write_jsonl, tiny_model, small_tokenizer):
    start = "word " * 100
    same = [{"prompt": f"Go {number}", "chosen": f"{start}yes", "rejected": f"{start}no"} for number in range(9)]
    source = write_jsonl([*same, *make_pairs(20)])
    splits, metadata = stream(source, tiny_model)
    assert metadata["max_length"] == 64 and len(splits["validation"]) == 2
    assert splits["validation"].features["chosen"] == processed.PAIR_FEATURES["chosen"]
    training = list(processed.stream_pairs(source, None, small_tokenizer, 0.2, 42, validation=False))
    differing = [pair for pair in training if not response_text(pair["chosen"]).startswith(start)]
    assert len(differing) < len(training)
    known = [tuple(encode(small_tokenizer, pair["prompt"], pair["chosen"], 64)) for pair in differing]
    drawn = [[tuple(row["chosen_ids"]) for row in splits["train"].take(3 * len(known))] for _ in range(2)]
    assert drawn[0] == drawn[1]
    first = drawn[0][: len(known)]
    assert sorted(first) == sorted(known) and first != known
    assert {drawn[0].count(ids) for ids in known} == {3}


def test_a_stream_has_answers_to_other_prompts_among_its_pairs(write_jsonl, tiny_model, small_tokenizer):
    source = write_jsonl(make_pairs(40))
    pairs = [
        tuple(tuple(encode(small_tokenizer, pair["prompt"], pair[side], 64)) for side in ("chosen", "rejected"))
        for pair in processed.stream_pairs(source, None, small_tokenizer, 0.2, 42, validation=False)
    ]
    extra = round(0.5 * len(pairs))
    rows = list(stream(source, tiny_model, mismatched=0.5)[0]["train"].take(len(pairs) + extra))
    seen = [(tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) for row in rows]
    assert set(pairs) < set(seen)
    made = [row for row, ids in zip(rows, seen, strict=True) if ids not in pairs]
    assert len(made) == extra
    for row in made:
        assert tuple(row["chosen_ids"]) in {chosen for chosen, _ in pairs}
        assert tuple(row["rejected_ids"]) not in {rejected for _, rejected in pairs}
        assert ", with the answer of " in row["place"]


def test_mismatched_pairs_are_tokenised_as_all_others(tiny_model, prepared, small_tokenizer):
    train = processed.load_processed(str(prepared))[0]["train"]
    max_length = json.loads((prepared / "metadata.json").read_text())["max_length"]
    files = set(prepared.iterdir())
    made, again = (processed.mismatched_ids(train, 0.5, small_tokenizer, max_length, seed) for seed in (1, 1))
    assert made.features == train.features and made[:] == again[:]
    assert len(made) == round(0.5 * len(train))
    known = {json.dumps(row["prompt"]): row for row in train}
    for row in made:
        own = known[json.dumps(row["prompt"])]
        assert (row["chosen"], row["chosen_ids"]) == (own["chosen"], own["chosen_ids"])
        assert row["rejected"] not in (own["chosen"], own["rejected"])
        assert row["rejected_ids"] == encode(small_tokenizer, row["prompt"], row["rejected"], max_length)
    assert processed.mismatched_ids(train, 0.5, small_tokenizer, max_length, 2)[:] != made[:]
    assert len(processed.mismatched_ids(train, 0.0, small_tokenizer, max_length, 1)) == 0
    assert set(prepared.iterdir()) == files  # nothing is left beside the data


def test_a_changed_source_or_share_is_another_stream(write_jsonl, tiny_model):
    source = write_jsonl(make_pairs(30))
    before = processed.data_identity(stream(source, tiny_model)[1])
    assert processed.data_identity(stream(source, tiny_model)[1]) == before
    assert processed.data_identity(stream(source, tiny_model, share=0.3)[1]) != before
    os.utime(source, ns=(0, 0))
    assert processed.data_identity(stream(source, tiny_model)[1])["digest"] != before["digest"]


def test_streams_without_usable_pairs_are_named(write_jsonl, tiny_model):
    keys = [pair_keys(check_pair(pair))["spelling_key"] for pair in make_pairs(50)]
    held_out = [pair for pair, key in zip(make_pairs(50), keys, strict=True) if is_validation_prompt(key, 0.2, 42)]
    for side, rows in {"validation": [{"prompt": "no answers"}], "training": held_out}.items():
        with pytest.raises(InputError, match=f"no usable {side} pair"):
            stream(write_jsonl(rows), tiny_model)
