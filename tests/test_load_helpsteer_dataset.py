import copy
import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_pairs, run_main
from datasets import Dataset, Features, Image, Value, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

import load_helpsteer_dataset as lhd
import load_smollm_model
from conversations import encode
from load_smollm_model import InputError

USER = {"role": "user", "content": "Name a colour."}
PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}
HUB_PAIR = {
    "prompt": "Name a colour.",
    "chosen": [USER, {"role": "assistant", "content": "Red."}],
    "chosen_rating": 3.2,
    "rejected": [USER, {"role": "assistant", "content": "Seven."}],
    "rejected_rating": 0.4,
}


def rows_of(path, split=None):
    return [row.values for row in lhd.open_source(str(path), split).rows]


def prepared(monkeypatch, tmp_path, tiny_model, *arguments):
    """Run the script; returns the dataset and its metadata."""
    output = tmp_path / "out"
    run_main(lhd, monkeypatch, "--model", tiny_model, "--output", output, *arguments)
    return load_from_disk(str(output)), json.loads((output / "metadata.json").read_text())


# --- rows become pairs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        HUB_PAIR,
        {**PAIR, "chosen_rating": "3.2", "rejected_rating": 0.4},
        {**PAIR, "chosen_score": 3.2, "rejected_score": 0.4},
        {key: value for key, value in HUB_PAIR.items() if key != "prompt"},
        {**HUB_PAIR, "prompt": [USER]},
    ],
)
def test_every_published_schema_gives_the_same_pair(row):
    assert lhd.check_pair(row) == {
        "prompt": [USER], "chosen": "Red.", "rejected": "Seven.", "chosen_rating": 3.2, "rejected_rating": 0.4,
    }  # fmt: skip


def test_multi_turn_prompts_become_turns():
    prompt = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nName a colour."
    chosen, rejected = (
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": a}] for a in ("Red", "7")
    )
    for packed in ({"prompt": prompt}, {"prompt": [{"role": "user", "content": prompt}]}, {}):
        pair = lhd.check_pair({**packed, "chosen": chosen, "rejected": rejected})
        assert [message["role"] for message in pair["prompt"]] == ["user", "assistant", "user"]
        assert pair["chosen_rating"] is None


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": ...}, "missing column chosen"),
        ({"rejected": ...}, "missing column rejected"),
        ({"prompt": ...}, "missing column prompt"),
        ({"prompt": None}, "null"),
        ({"chosen": None}, "null"),
        ({"prompt": "  \n"}, "empty prompt"),
        ({"prompt": 5}, "prompt is not a conversation that ends with a user turn"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "prompt is not a conversation that ends with a user turn",
        ),
        ({"rejected": " "}, "empty response"),
        ({"rejected": 7}, "response is not a text or message list"),
        ({"rejected": [USER]}, "response is not a text or message list"),
        ({"rejected": " Red. "}, "chosen equals rejected"),
        (
            {"chosen": [{"role": "user", "content": "Else?"}, {"role": "assistant", "content": "Red."}]},
            "response repeats another prompt",
        ),
        ({"chosen_rating": "good", "rejected_rating": 1}, "rating is not a number"),
        ({"chosen_rating": float("nan"), "rejected_rating": 1}, "rating is not a number"),
        ({"chosen_rating": 10**400, "rejected_rating": 1}, "rating is not a number"),
        ({"chosen_rating": True, "rejected_rating": 0}, "rating is not a number"),
        ({"chosen_rating": 1, "rejected_rating": 1.2}, "rating says the rejected is better"),
        ({"chosen_rating": 2, "rejected_rating": 2.0}, "tied ratings"),
    ],
)
def test_bad_rows_are_named(change, reason):
    row = {key: value for key, value in {**PAIR, **change}.items() if value is not ...}
    with pytest.raises(lhd.BadRow, match=f"^{reason}$"):
        lhd.check_pair(row)


def raw(prompt, response, *attributes):
    return {"prompt": prompt, "response": response, **dict(zip(lhd.ATTRIBUTES, attributes, strict=True))}


def test_raw_helpsteer_rows_are_binarised_by_their_mean():
    rows = [
        raw("a", "worse", 3, 3, 4, 2, 2),  # mean 2.8
        raw("a", "better", 4, 4, 4, 2, 2),  # mean 3.2
        raw("b", "x", 4, 4, 4, 1, 1),
        raw("b", "y", 1, 1, 4, 4, 4),  # the same mean
        raw("c", "alone", 1, 1, 1, 1, 1),
        raw("d", "x", 1, None, 1, 1, 1),
        raw("d", "y", 1, 1, 1, 1, 1),
        PAIR,
    ]
    joined = list(lhd.join_raw_rows(lhd.Row(f"row {i}", row) for i, row in enumerate(rows, start=1)))
    assert joined[0].values == {
        "prompt": "a", "chosen": "better", "rejected": "worse", "chosen_rating": 3.2, "rejected_rating": 2.8,
    }  # fmt: skip
    with pytest.raises(lhd.BadRow, match="tied ratings"):
        lhd.check_pair(joined[1].values)
    assert [row.problem for row in joined[2:]] == ["no second response to the prompt", "rating is not a number", None]
    assert joined[-1].values == PAIR


# --- sources ---------------------------------------------------------------------------------------------------------


def write_csv(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_all_file_types_give_the_same_rows(tmp_path):
    rows = [{**PAIR, "chosen": 'Red,\n"deep" ё'}, {**PAIR, "prompt": "Another\nprompt"}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "b.json").write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "c.json").write_text(lines)
    write_csv(tmp_path / "d.csv", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.json", "d.csv", "e.parquet"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    for path in files:
        assert rows_of(path) == rows, path
    assert rows_of(tmp_path) == rows * 9


def test_csv_rows_are_counted_with_blank_lines_and_keep_their_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected\nA,B,C\n\n\nD,,F\nG,"H, i",J,,\nK,L,M,N\nO,P\n')
    pairs = [(row.location, pair, reason) for row, pair, reason in lhd.checked_pairs(lhd.open_source(str(path)).rows)]
    assert [(place.split(" row ")[1], reason) for place, _, reason in pairs] == [
        ("2", None),
        ("5", "empty response"),
        ("6", None),
        ("7", "more cells than columns; text with commas needs quotes"),
        ("8", "null"),
    ]
    assert [pair["chosen"] for _, pair, _ in pairs if pair] == ["B", "H, i"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('prompt,chosen,rejected\nA,B,C\nD,"E is unclosed,F\nG,H,I\nJ,K,L\n', r"after row 2: .*end of data"),
        ('prompt,chosen,rejected\nA,B,C\nD,"E is unclosed,F\nG,"H",I\n', r"after row 2: "),
        ("prompt,chosen,chosen,note,note\nA,B,C\n", "row 1: has two columns 'chosen'"),
    ],
)
def test_a_csv_file_that_would_lose_rows_or_cells_is_refused(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"a\.csv.*{message}"):
        list(lhd.open_source(str(path)).rows)


def test_a_file_has_no_split(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("")
    file, directory = str(tmp_path / "a.csv"), str(tmp_path / "data")
    for names in (["sample"], ["sample", file]):
        with pytest.raises(InputError, match="files have no splits; leave --split test out"):
            lhd.open_sources(names, "test")
    assert len(lhd.open_sources([file, directory], "test")) == 2


def test_csv_cells_may_hold_message_lists(tmp_path):
    cells = {side: json.dumps(HUB_PAIR[side]) for side in ("chosen", "rejected")}
    write_csv(tmp_path / "a.csv", [{**HUB_PAIR, **cells}, {**HUB_PAIR, **cells, "chosen": '[{"role": "user", }]'}])
    good, bad = lhd.open_source(str(tmp_path / "a.csv")).rows
    assert lhd.check_pair(good.values)["chosen"] == "Red."
    assert bad.problem == "message list is not valid JSON"


def test_locations_name_file_and_row(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n{broken\n\xff\xfe\n[1]\n" + b"[" * 100_000 + b"\n")
    rows = [(row.location, row.problem) for row in lhd.open_source(str(path)).rows]
    assert rows == [
        (f"{path} row 1", None),
        (f"{path} row 3", "not valid JSON"),
        (f"{path} row 4", "not valid UTF-8"),
        (f"{path} row 5", "not an object with named columns"),
        (f"{path} row 6", "not valid JSON"),
    ]


def hub_layout(directory: Path, splits: dict[str, list[dict]]) -> str:
    """A dataset repository as the hub stores it: Parquet files, and a README whose metadata names the splits."""
    (directory / "data").mkdir(parents=True)
    entries = []
    for name, rows in splits.items():
        file = f"data/{name}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / file)
        entries.append(f"  - split: {name}\n    path: data/{name}-*")
    metadata = "configs:\n- config_name: default\n  data_files:\n" + "\n".join(entries)
    (directory / "README.md").write_text(f"---\n{metadata}\n---\n# A dataset\n")
    return str(directory)


def test_hub_layout_with_its_splits(tmp_path):
    other = {**HUB_PAIR, "prompt": "other"}
    path = hub_layout(tmp_path / "repo", {"helpfulness_split": [other], "average_rating_split": [HUB_PAIR]})
    assert [row["prompt"] for row in rows_of(path)] == ["Name a colour."]
    assert [row["prompt"] for row in rows_of(path, "helpfulness_split")] == ["other"]
    assert [row.values["prompt"] for row in lhd.open_source(path, "helpfulness_split", True).rows] == ["other"]
    with pytest.raises(InputError, match="choose one of its splits"):
        lhd.open_source(path, "no_such_split")


def test_the_hub_is_asked_for_the_default_split(tmp_path, monkeypatch):
    """The hub's path, with its layout served from a local directory."""
    path = hub_layout(
        tmp_path / "repo", {"average_rating_split": [HUB_PAIR], "train": [{**HUB_PAIR, "prompt": "other"}]}
    )
    real_load, real_names = lhd.load_dataset, lhd.get_dataset_split_names
    asked = []

    def serve(name, revision, **options):
        asked.append((name, revision, options.get("split")))
        return (real_load if options else real_names)(path, **options)

    class Api:
        def dataset_info(self, name):
            return type("Info", (), {"sha": "abc"})

    monkeypatch.setattr(lhd, "HfApi", Api)
    monkeypatch.setattr(lhd, "load_dataset", serve)
    monkeypatch.setattr(lhd, "get_dataset_split_names", serve)
    monkeypatch.setattr(lhd, "hub_reachable", lambda: True)
    (source,) = lhd.open_sources(None, None)
    assert [lhd.check_pair(row.values)["chosen"] for row in source.rows] == ["Red."]
    assert asked == [(lhd.HUB_DATASET, "abc", None), (lhd.HUB_DATASET, "abc", "average_rating_split")]
    assert source.origin == "hub esfrankel17/HelpSteer2_binarized, average_rating_split, revision abc"


def test_without_network_the_sample_is_used_and_said(capsys):
    (source,) = lhd.open_sources(None, None)
    assert source.name == "sample"
    assert "hub can not be reached" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hub", "nvidia/HelpSteer2"])
def test_a_named_hub_source_out_of_reach_is_an_error(name):
    with pytest.raises(InputError, match="can not be reached"):
        lhd.open_sources([name], None)


def flipped(content: bytes) -> bytes:
    """The bytes with some in the middle inverted."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", b"text", "unknown file type"),
        ("x.parquet", b"not parquet", "can not be read to its end"),
        ("x.jsonl.gz", b"not gzip", "can not be read to its end"),
        ("x.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 1000)[:-20], "can not be read to its end"),
        ("x.jsonl.gz", flipped(gzip.compress(json.dumps(PAIR).encode() * 1000)), "can not be read to its end"),
        ("x.json", b'[{"prompt": "a"}, {"pro', "can not be read to its end"),
        ("x.json", b'[{"prompt": "a"}, {"prompt": "\xff"}]', r"can not be read to its end \(after row 1"),
        ("x.csv", "prompt,chosen,rejecté\n".encode("latin-1"), "row 1: not valid UTF-8; convert the file"),
        ("x.csv", "prompt,chosen,rejected\n".encode("utf-16"), "row 1: not valid UTF-8; convert the file"),
        ("x.csv", b'"prompt";"chosen";"rejected"\n', "row 1: has one column, .*; cells must be separated by commas"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}:? {message}"):
        rows_of(path)


def test_rows_that_are_not_utf8_are_named(tmp_path):
    good = {**PAIR, "chosen": "Rouge, ça va."}
    for name in ("x.jsonl", "x.csv"):
        lines = [json.dumps(row, ensure_ascii=False) for row in (good, good)]
        if name == "x.csv":
            lines = ["prompt,chosen,rejected", *[",".join(good[key] for key in ("prompt", "chosen", "rejected"))] * 2]
            lines = [line.replace("Rouge, ça va.", '"Rouge, ça va."') for line in lines]
        content = [*(line.encode() for line in lines[:-1]), lines[-1].encode("latin-1")]
        (tmp_path / name).write_bytes(b"\n".join(content))
        (first, _), (second, reason) = [
            (row, pair or reason) for row, pair, reason in lhd.checked_pairs(lhd.open_source(str(tmp_path / name)).rows)
        ]
        assert first.values["chosen"] == "Rouge, ça va." and reason == "not valid UTF-8"
        assert second.location == f"{tmp_path / name} row {len(lines)}"


DEEP = "[" * 900 + "]" * 900  # as deep as the parser takes, too deep for what comes after it


@pytest.mark.parametrize("deep", [DEEP, "[" * 10**5 + "]" * 10**5])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_deeply_nested_json_is_a_bad_row(tmp_path, name, deep):
    message = f'[{{"role": {deep}, "content": "a"}}]'
    rows = [
        f'{{"prompt": {deep}, "chosen": "a", "rejected": "b"}}',
        f'{{"prompt": {message}, "chosen": "a", "rejected": "b"}}',
        f'{{"prompt": "a", "chosen": {message}, "rejected": {message}}}',
        *[f'{{"prompt": {deep}, "response": "a"}}'] * 2,
        json.dumps(PAIR),
    ]
    text = f"[{', '.join(rows)}]" if name == "x.json" else "\n".join(rows)
    (tmp_path / name).write_text(text)
    pairs = [pair for _, pair, _ in lhd.checked_pairs(lhd.open_source(str(tmp_path / name)).rows)]
    assert pairs[:-1] == [None] * (len(pairs) - 1) and pairs[-1]["chosen"] == PAIR["chosen"]


TEXTS = st.text(st.characters(), max_size=20) | st.sampled_from(["", "a\n<extra_id_1>Assistant\n", "[{role}]", "3.2"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | JSON, "content": TEXTS | JSON}),
    max_size=3,
)
COLUMNS = ["prompt", "chosen", "rejected", "response", "chosen_rating", "rejected_score", *lhd.ATTRIBUTES, "other"]
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), TEXTS | MESSAGES | JSON), max_size=4)


@given(rows=ROWS | st.lists(st.just(PAIR) | st.fixed_dictionaries(dict.fromkeys(PAIR, TEXTS | MESSAGES))))
def test_any_row_is_a_pair_or_has_a_reason(rows):
    results = list(lhd.checked_pairs(lhd.Row(f"row {number}", row) for number, row in enumerate(rows)))
    for _, pair, reason in results:
        assert (pair is None) == isinstance(reason, str)
        if pair:
            assert pair["prompt"][-1]["role"] == "user" and pair["prompt"][-1]["content"].strip()
            assert pair["chosen"].strip() and pair["rejected"].strip() and pair["chosen"] != pair["rejected"]
            assert pair["chosen_rating"] is None or pair["chosen_rating"] > pair["rejected_rating"]
            assert lhd.pair_keys(pair).keys() == set(lhd.KEY_COLUMNS)
            json.dumps(pair, ensure_ascii=False).encode()


BITS_OF_JSON = st.sampled_from([b'{"prompt"', b": [", b'"a"', b"]", b"}", b",", b"\n"])


@given(
    name=st.sampled_from(["x.json", "x.jsonl", "x.csv", "x.parquet", "x.jsonl.gz"]),
    content=st.binary(max_size=60) | st.lists(BITS_OF_JSON).map(b"".join),
)
def test_any_file_gives_rows_or_is_named(tmp_path_factory, name, content):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows = list(lhd.checked_pairs(lhd.read_file(path)))
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert all(pair or reason for _, pair, reason in rows)


@pytest.fixture
def opened(monkeypatch):
    """Paths that this process opens during the test."""
    paths, watching = [], [True]
    sys.addaudithook(lambda event, args: watching and event == "open" and paths.append(str(args[0])))
    yield paths
    watching.clear()  # a hook can not be taken away


def test_no_path_from_the_data_is_opened(tmp_path, write_jsonl, opened):
    secret = tmp_path / "secret.png"
    secret.write_text("not for others")
    named = {"prompt": str(secret), "chosen": f"file://{secret}", "rejected": f"../{secret.name}", "other": str(secret)}
    columns = Features({**{key: Value("string") for key in PAIR}, "picture": Image()})
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text("---\n---\n")
    pictured = {**PAIR, "picture": {"path": str(secret), "bytes": None}}
    pyarrow.parquet.write_table(Dataset.from_list([pictured], features=columns).data.table, hub / "train.parquet")
    sources = [write_jsonl([named]), str(hub)]
    opened.clear()
    for source in sources:
        ((_, pair, reason),) = lhd.checked_pairs(lhd.open_source(source).rows)
        assert pair and not reason
    assert any(path.endswith("train.parquet") or path.endswith(".arrow") for path in opened)
    assert not [path for path in opened if "secret" in path]


def test_missing_sources_are_named(tmp_path):
    for name in ("nope.jsonl", str(tmp_path / "nope"), "data/nope.csv"):
        with pytest.raises(InputError, match="nope"):
            lhd.open_source(name)
    with pytest.raises(InputError, match="no data files"):
        lhd.open_source(str(tmp_path))


# --- duplicates and splits -------------------------------------------------------------------------------------------


def test_duplicates_and_contradictions():
    key = np.array([7, 1, 7, 2, 2, 3, 3, 3])
    swapped = np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=bool)
    kept, duplicates, contradicting = lhd.unique_pairs(key, swapped)
    assert kept.tolist() == [0, 1, 5]  # 7 twice, 2 against itself, 3 three times the same
    assert (duplicates.tolist(), contradicting.tolist()) == ([2, 6, 7], [3, 4])


def test_keys_tell_equal_from_swapped_pairs():
    pair = lhd.check_pair(PAIR)
    swapped = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    spaced = {**pair, "chosen": f" {pair['chosen']}\n"}
    one, other, same = (lhd.pair_keys(each) for each in (pair, swapped, spaced))
    assert one == same
    assert one["pair_key"] == other["pair_key"] and one["swapped"] != other["swapped"]
    assert lhd.pair_keys({**pair, "chosen": "Blue."})["pair_key"] != one["pair_key"]


def test_split_sizes_of_the_hub_dataset():
    train, validation = lhd.split_by_prompt(np.arange(8678), 0.2, 42)
    assert (len(train), len(validation)) == (6942, 1736)
    assert sorted([*train, *validation]) == list(range(8678))


def test_no_prompt_on_both_sides():
    prompts = np.random.default_rng(0).integers(0, 60, size=300)
    train, validation = lhd.split_by_prompt(prompts, 0.2, 42)
    assert not set(prompts[train]) & set(prompts[validation])
    assert abs(len(validation) - 60) <= 3
    again = lhd.split_by_prompt(prompts, 0.2, 42)
    assert np.array_equal(again[1], validation)
    assert not np.array_equal(lhd.split_by_prompt(prompts, 0.2, 43)[1], validation)


def test_two_prompts_are_enough_and_one_is_not():
    train, validation = lhd.split_by_prompt(np.array([5, 5, 5, 9]), 0.2, 0)
    assert (train.tolist(), validation.tolist()) == ([0, 1, 2], [3])
    with pytest.raises(InputError, match="one prompt"):
        lhd.split_by_prompt(np.array([5, 5]), 0.2, 0)


def test_longer_wins_counts_ties_half():
    assert lhd.longer_wins(["aaa", "b", "c ", "dd"], ["a", "bb", "c", "dd"]) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)


# --- the script ------------------------------------------------------------------------------------------------------


def test_from_rows_to_disk(monkeypatch, tmp_path, tiny_model, write_jsonl, capsys, tokenizer):
    good = make_pairs(20)
    bad = [
        good[0],  # duplicate
        {**good[1], "chosen": good[1]["rejected"], "rejected": good[1]["chosen"]},  # contradicts
        {**good[2], "chosen": None},
        {**good[3], "chosen": ""},
        {"prompt": "p"},
        {**good[4], "prompt": "rated", "chosen_rating": 1, "rejected_rating": 3},
    ]
    first = write_jsonl([*good[:15], *bad], "first.jsonl")
    second = write_jsonl(good[15:], "second.jsonl")
    splits, metadata = prepared(monkeypatch, tmp_path, tiny_model, "--source", first, second, "--max_length", "64")
    assert (metadata["rows"]["read"], metadata["rows"]["pairs"]) == (26, 26)
    assert metadata["rows"]["dropped"] == {
        "null": 1, "empty response": 1, "missing column chosen": 1, "rating says the rejected is better": 1,
        "duplicate pair": 1, "contradicting pair": 2,
    }  # fmt: skip
    assert metadata["rows"]["kept"] == 19 == 26 - metadata["rows"]["dropped_total"]
    places = {
        reason: [place.split(" row ")[1] for place in found]
        for reason, found in metadata["rows"]["first_dropped"].items()
    }
    assert (places["null"], places["duplicate pair"], places["contradicting pair"]) == (["18"], ["16"], ["2", "17"])
    assert metadata["splits"] == {"train": 15, "validation": 4}
    assert metadata["source"] == f"local file {first} + local file {second}"
    assert metadata["longer_wins"]["train"] == 0
    assert splits["train"].column_names == [
        "prompt", "chosen", "rejected", "chosen_rating", "rejected_rating", "place", "chosen_ids", "rejected_ids",
        "length",
    ]  # fmt: skip
    for row in splits["validation"]:
        assert row["chosen_ids"] == encode(tokenizer, row["prompt"], row["chosen"], 64)
        assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    out = capsys.readouterr().out
    assert "contradicting pair" in out and "26 read, with 26 pairs: 7 dropped, 0 over the limit, 19 kept" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "checksums.json", "train", "validation", "dataset_dict.json", "metadata.json", "length_histogram.png",
    }  # fmt: skip


def test_statistics_by_hand(monkeypatch, tmp_path, tiny_model, write_jsonl):
    rows = [
        # in tokens: 9 of the template around prompts of 1, 50, 1; answers of 2 and 60, 2 and 4, 1 and 1; 2 that close
        {"prompt": "a", "chosen": "a a", "rejected": "a" + " a" * 59, "chosen_rating": 3, "rejected_rating": 2},
        {"prompt": "a" + " a" * 49, "chosen": "a a", "rejected": "a a a a", "chosen_rating": 3, "rejected_rating": 1},
        {"prompt": "b", "chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": 1},
    ]
    _, metadata = prepared(monkeypatch, tmp_path, tiny_model, "--source", write_jsonl(rows), "--max_length", "64")
    assert metadata["truncated_share"] == pytest.approx({"prompt": 1 / 3, "response": 1 / 3, "pair": 2 / 3})
    assert metadata["over_max_length_share"] == pytest.approx(2 / 3)
    assert metadata["length_percentiles"]["chosen"]["p50"] == 2
    assert metadata["length_percentiles"]["rejected"]["p100"] == 60
    assert metadata["length_percentiles"]["prompt"]["p100"] == 59
    assert (metadata["rating_gap"]["n"], metadata["rating_gap"]["mean"]) == (3, 2.0)


def test_pairs_that_the_cut_makes_equal_are_left_out_of_train(monkeypatch, tmp_path, tiny_model, write_jsonl):
    same = "start" + " a" * 200
    rows = [{"prompt": f"p {i}", "chosen": f"{same} good", "rejected": f"{same} bad"} for i in range(5)]
    rows += [{"prompt": f"q {i}", "chosen": "good", "rejected": "bad"} for i in range(5)]
    splits, metadata = prepared(monkeypatch, tmp_path, tiny_model, "--source", write_jsonl(rows), "--max_length", "64")
    assert sum(metadata["identical_after_cut"].values()) == 5
    in_train = metadata["identical_after_cut"]["train"]
    assert metadata["splits"]["train"] == 8 - in_train == len(splits["train"])
    reason = "identical once cut to max_length (training pair)"
    assert metadata["rows"]["dropped"] == {reason: in_train}
    assert len(metadata["rows"]["first_dropped"][reason]) == min(in_train, 3)
    assert metadata["rows"]["kept"] == 10 - in_train
    assert len(splits["validation"]) == 2


def test_limit_draws_a_fixed_sample(monkeypatch, tmp_path, tiny_model, write_jsonl):
    source = write_jsonl(make_pairs(50))
    kept = []
    for _ in range(2):
        splits, metadata = prepared(monkeypatch, tmp_path, tiny_model, "--source", source, "--limit", "10")
        kept.append([row["chosen"] for split in splits.values() for row in split])
        assert (metadata["rows"]["kept"], metadata["rows"]["not_drawn"]) == (10, 40)
    assert kept[0] == kept[1]
    assert kept[0] != [pair["chosen"] for pair in make_pairs(10)]


@pytest.mark.parametrize(
    "rows, message",
    [([], "the source is empty"), ([{"question": "a"}], r"1 of 1 pairs: missing column chosen \(first: .* row 1\)")],
)
def test_nothing_usable_keeps_what_was_there(monkeypatch, tmp_path, tiny_model, write_jsonl, rows, message):
    prepared(monkeypatch, tmp_path, tiny_model, "--source", write_jsonl(make_pairs(10)))
    with pytest.raises(SystemExit, match=message):
        prepared(monkeypatch, tmp_path, tiny_model, "--source", write_jsonl(rows, "bad.jsonl"))
    assert len(load_from_disk(str(tmp_path / "out"))["train"]) == 8
    assert not list(tmp_path.glob(".*"))


def test_raw_rows_are_counted_as_rows_and_pairs(monkeypatch, tmp_path, tiny_model, write_jsonl):
    rows = [raw(f"p {i}", answer, *marks) for i in range(4) for answer, marks in (("x", [1] * 5), ("y", [2] * 5))]
    rows += [raw("tie", answer, *[1] * 5) for answer in "xy"]
    _, metadata = prepared(monkeypatch, tmp_path, tiny_model, "--source", write_jsonl(rows))
    counts = metadata["rows"]
    assert (counts["read"], counts["pairs"], counts["dropped"], counts["kept"]) == (10, 5, {"tied ratings": 1}, 4)


def test_the_digest_tells_other_pairs_apart(monkeypatch, tmp_path, tiny_model, write_jsonl):
    pairs = make_pairs(10)
    other = [*pairs[:9], {**pairs[9], "rejected": "No clue about 9, ask somebody else please."}]  # the same lengths
    digests = [
        prepared(monkeypatch, tmp_path, tiny_model, "--source", write_jsonl(rows, name))[1]["digest"]
        for rows, name in ((pairs, "a.jsonl"), (pairs[::-1], "b.jsonl"), (other, "c.jsonl"))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_other_directories_are_not_replaced(monkeypatch, tmp_path, tiny_model, write_jsonl):
    source = write_jsonl(make_pairs(10))
    with pytest.raises(SystemExit, match="holds other files"):
        run_main(lhd, monkeypatch, "--model", tiny_model, "--source", source, "--output", tmp_path)
    assert Path(source).is_file()


def test_a_full_disk_keeps_what_was_there(monkeypatch, small_disk, tiny_model, write_jsonl):
    output = small_disk("size=1m") / "data"
    arguments = ("--model", tiny_model, "--output", output, "--max_length", 64)
    run_main(lhd, monkeypatch, "--source", write_jsonl(make_pairs(10)), *arguments)
    with pytest.raises(SystemExit, match=r"(disk is full|can not be written).*No space left on device") as ended:
        run_main(lhd, monkeypatch, "--source", write_jsonl(make_pairs(4000)), *arguments)
    assert "\n" not in str(ended.value.code)
    splits, metadata = lhd.load_processed(str(output))
    assert metadata["splits"] == {"train": 8, "validation": 2} == {name: len(split) for name, split in splits.items()}
    assert [path.name for path in output.parent.iterdir()] == ["data"]


def test_output_that_can_not_be_written_is_named(monkeypatch, small_disk, tmp_path, tiny_model, write_jsonl):
    source = write_jsonl(make_pairs(10))
    (tmp_path / "file").write_text("")
    for parent, reason in ((small_disk("ro"), "Read-only file system"), (tmp_path / "file", "exists|directory")):
        with pytest.raises(SystemExit, match=rf"data: can not be written \(.*({reason})"):
            run_main(lhd, monkeypatch, "--model", tiny_model, "--source", source, "--output", parent / "data")


@pytest.mark.parametrize("flag", [["--max_length", "8"], ["--limit", "1"], ["--no_such_flag", "1"]])
def test_bad_flags_are_usage_errors(monkeypatch, flag):
    with pytest.raises(SystemExit) as ended:
        run_main(lhd, monkeypatch, *flag)
    assert ended.value.code == 2


# --- the sample ------------------------------------------------------------------------------------------------------


def test_the_sample_keeps_its_promises():
    rows = [row.values for row in lhd.open_source("sample").rows]
    pairs = [lhd.check_pair(row) for row in rows]
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == len(rows) >= 240
    assert sum("<extra_id_1>" in prompt for prompt in prompts) >= 24
    assert sum(any("а" <= letter <= "я" for letter in prompt) for prompt in prompts) >= 24
    assert {row["category"] for row in rows} == {
        "open_question", "closed_question", "summarising", "rewriting", "brainstorming", "code", "arithmetic",
        "classification",
    }  # fmt: skip
    assert 0.45 <= lhd.longer_wins([pair["chosen"] for pair in pairs], [pair["rejected"] for pair in pairs]) <= 0.55
    for row in rows:
        for rating in (row["chosen_rating"], row["rejected_rating"]):
            assert 0 <= rating <= 4 and round(rating * 5, 6) == round(rating * 5)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_the_sides_of_a_stream_share_no_prompt_and_are_all_pairs(write_jsonl, tokenizer):
    rows = [{**pair, "prompt": f"Prompt {number // 2}"} for number, pair in enumerate(make_pairs(400))]
    source = write_jsonl([*rows, {"prompt": "no answers"}])

    def sides(seed):
        return [
            [json.dumps(pair) for pair in lhd.stream_pairs(source, None, tokenizer, seed, side)]
            for side in (False, True)
        ]

    train, validation = sides(42)
    assert len(train) + len(validation) == 400
    prompts = [{str(json.loads(pair)["prompt"]) for pair in side} for side in (train, validation)]
    assert not prompts[0] & prompts[1]
    assert 20 < len(prompts[1]) < 60  # 200 prompts, a fifth of them expected, standard deviation 6
    assert sides(42)[1] == validation != sides(43)[1]


def test_rows_whose_roles_the_template_refuses_are_dropped(write_jsonl, tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    source = write_jsonl([PAIR, {**PAIR, "prompt": system}])
    found = list(lhd.readable_pairs(lhd.open_source(source).rows, refusing))
    assert [reason for *_, reason in found] == [None, "the chat template refuses these messages (no)"]
    assert found[0][1] and found[1][1] is None
    assert [reason for *_, reason in lhd.readable_pairs(lhd.open_source(source).rows, tokenizer)] == [None, None]


def test_a_row_whose_text_the_template_refuses_is_named(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if 'secret' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "a secret", "Bye")]
    batch = {"prompt": prompts, "chosen": ["a"] * 3, "rejected": ["b"] * 3, "place": ["row 1", "row 2", "row 3"]}
    with pytest.raises(InputError, match=r"^row 2: .*refuses these messages \(no\)"):
        lhd.token_columns(batch, refusing, 64)


def test_a_stream_that_breaks_off_is_named(tmp_path):
    (tmp_path / "README.md").write_text("")
    rows = [{**PAIR, "prompt": f"{number}?"} for number in range(3000)]
    for name, part in (("a", rows[:1500]), ("b", rows[1500:])):
        Dataset.from_list(part).to_parquet(tmp_path / f"train-{name}.parquet")
    path = tmp_path / "train-b.parquet"
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train: can not be read to its end \(after row [12]\d{3}: "):
        list(lhd.open_source(str(tmp_path), streaming=True).rows)


def test_a_changed_source_is_another_stream(write_jsonl, tmp_path, tiny_model):
    source = write_jsonl(make_pairs(60))
    model = load_smollm_model.ModelSource(tiny_model, "tiny")

    def digest():
        return lhd.stream_processed(source, None, model, 64, 3, 42)[1]["digest"]

    before = digest()
    assert digest() == before
    write_jsonl(make_pairs(61))
    assert digest() != before


def test_a_stream_of_ids_is_endless_and_leaves_out_what_teaches_nothing(write_jsonl, tiny_model, tokenizer):
    start = "word " * 100
    same = [{"prompt": f"Go {number}", "chosen": f"{start}yes", "rejected": f"{start}no"} for number in range(9)]
    source = write_jsonl([*same, *make_pairs(20)])
    splits, metadata = lhd.stream_processed(source, None, lhd.resolve_model(tiny_model), 64, 2, 42)
    assert metadata["max_length"] == 64 and len(splits["validation"]) == 2
    training = list(lhd.stream_pairs(source, None, tokenizer, 42, validation=False))
    differing = [pair for pair in training if not pair["chosen"].startswith(start)]
    assert len(differing) < len(training)
    known = [tuple(encode(tokenizer, pair["prompt"], pair["chosen"], 64)) for pair in differing]
    drawn = [[tuple(row["chosen_ids"]) for row in splits["train"].take(3 * len(known))] for _ in range(2)]
    assert drawn[0] == drawn[1]
    first = drawn[0][: len(known)]
    assert sorted(first) == sorted(known) and first != known
    assert {drawn[0].count(ids) for ids in known} == {3}


def test_streams_without_usable_pairs_are_named(write_jsonl, tiny_model):
    keys = [lhd.pair_keys(lhd.check_pair(pair))["prompt_key"] for pair in make_pairs(50)]
    held_out = [pair for pair, key in zip(make_pairs(50), keys, strict=True) if lhd.is_validation_prompt(key, seed=42)]
    for side, rows in {"validation": [{"prompt": "no answers"}], "training": held_out}.items():
        with pytest.raises(InputError, match=f"no usable {side} pair"):
            lhd.stream_processed(write_jsonl(rows), None, lhd.resolve_model(tiny_model), 64, 2, 42)


def test_only_the_first_of_several_processes_prepares(monkeypatch, tmp_path, write_jsonl, tiny_model):
    source = write_jsonl(make_pairs(10))
    monkeypatch.setenv("RANK", "1")
    run_main(lhd, monkeypatch, "--source", source, "--model", tiny_model, "--output", tmp_path / "data")
    assert not (tmp_path / "data").exists()
