import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import HUB_PAIR, PAIR
from datasets import Dataset, DatasetDict, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st

from reward_pipeline import sources
from reward_pipeline.conversations import response_text
from reward_pipeline.files import InputError
from reward_pipeline.form import longer_wins
from reward_pipeline.schemas import check_pair, checked_pairs


def rows_of(path, split=None):
    return [row.values for row in sources.open_source(str(path), split).rows]


def write_csv(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def pyarrow_bytes(rows):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


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


RUSSIAN = [{"prompt": "Сколько будет 2 + 2?", "chosen": "4; ровно, без остатка", "rejected": "Не знаю | спроси"}] * 2
ROWS = [PAIR, {**PAIR, "prompt": "Another\nprompt"}, {**PAIR, "chosen": "Красный.\u2028Да"}]


def table(rows, separator=",", line_end="\r\n", above=""):
    text = io.StringIO(above)
    text.seek(0, io.SEEK_END)
    writer = csv.DictWriter(text, rows[0], delimiter=separator, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def zipped(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(f"inside/{name.replace('__', '.')}", text)
    return content.getvalue()


def arrow(rows, form):
    content, found = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with form(content, found.schema) as writer:
        writer.write_table(found)
    return content.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.JSONL", lines(ROWS)),
        ("a.ndjson", lines(ROWS)),
        ("a.jsonl.bz2", bz2.compress(lines(ROWS).encode())),
        ("a.jsonl.XZ", lzma.compress(lines(ROWS).encode())),
        ("a.jsonl.zst", pyarrow.compress(lines(ROWS).encode(), "zstd", asbytes=True)),
        ("a.csv.zst", pyarrow.compress(table(ROWS).encode(), "zstd", asbytes=True)),
        ("a.zip", zipped(a__jsonl=lines(ROWS[:1]), b__csv=table(ROWS[1:]), c__txt="no data")),
        ("a.arrow", arrow(ROWS, pyarrow.ipc.new_stream)),
        ("a.arrow", arrow(ROWS, pyarrow.ipc.new_file)),
        ("a.parquet.gz", gzip.compress(pyarrow_bytes(ROWS))),
        # encodings
        *((f"a.{kind}", text.encode(encoding))
          for encoding in ("utf-16", "utf-32", "utf-8-sig", "utf-16-le", "utf-16-be")
          for kind, text in (("jsonl", lines(ROWS)), ("csv", table(ROWS)), ("json", json.dumps(ROWS)))),
        # separators and ends of lines
        ("a.csv", table(ROWS, ";")),
        ("a.csv", table(ROWS, "\t")),
        ("a.tsv", table(ROWS, "\t", "\n")),
        ("a.txt", table(ROWS, "\t").encode("utf-16")),
        ("a.txt", lines(ROWS)),
        ("a.csv", table(ROWS, "|", above="sep=|\r\n")),
        ("a.csv", table(ROWS, above="\r\n\r\n")),
        ("a.csv", table(ROWS, line_end="\r")),
        ("a.jsonl", lines(ROWS, "\r")),
        ("a.jsonl", lines(ROWS, "\r\n")),
        # forms of JSON
        ("a.json", json.dumps({"data": ROWS}, indent=2)),
        ("a.json", json.dumps({"version": 1, "train": ROWS})),
        ("a.json", json.dumps({"mine": ROWS})),
        ("a.json", json.dumps({"features": [], "rows": [{"row_idx": 0, "row": row} for row in ROWS]})),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.json", json.dumps({name: [row[name] for row in ROWS] for name in PAIR})),
        ("a.json", json.dumps({name: {str(number): row[name] for number, row in enumerate(ROWS)} for name in PAIR})),
        ("a.json", json.dumps({str(number): row for number, row in enumerate(ROWS)})),
        ("a.json", json.dumps({"columns": list(PAIR), "index": [], "data": [list(row.values()) for row in ROWS]})),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=1)),
        ("a.json", json.dumps({"schema": {"fields": []}, "data": ROWS})),
    ],
)  # fmt: skip
def test_every_form_of_a_table_gives_the_same_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("text", [json.dumps(PAIR), json.dumps(PAIR, indent=1)])
@pytest.mark.parametrize("messages", [False, True])
def test_one_row_alone_is_a_row(tmp_path, text, messages):
    row = {name: [{"role": "user", "content": text}] for name, text in PAIR.items()} if messages else PAIR
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1 if "\n" in text else None))
    assert rows_of(tmp_path / "a.json") == [row]


@pytest.mark.parametrize(
    "encoding, shown", [("cp1251", "Windows-1251"), ("koi8-r", "KOI8-R"), ("cp1252", "Windows-1252")]
)
def test_other_encodings_are_named_row_by_row(tmp_path, encoding, shown):
    rows = [{**PAIR, "chosen": "Ça va très bien."}] if encoding == "cp1252" else RUSSIAN
    for name, content in (("a.jsonl", lines([PAIR, *rows])), ("a.csv", table([PAIR, *rows]))):
        (tmp_path / name).write_bytes(content.encode(encoding))
        good, *bad = sources.open_source(str(tmp_path / name)).rows
        assert good.values == PAIR and all(
            f"({shown}, perhaps; iconv -f {shown.upper()} " in row.problem for row in bad
        )


def test_a_comma_after_every_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ROWS, ",\n"))
    assert {row.problem for row in sources.open_source(str(tmp_path / "a.jsonl")).rows} == {
        "not valid JSON; a comma ends the line: only an array in brackets has them"
    }


MIXED = [
    {"prompt": [{"role": "user", "content": "Hi", "name": "Ann"}], "chosen": "a", "rejected": "b"},
    {"prompt": "Yo", "chosen": [{"role": "assistant", "content": "c"}], "rejected": "d"},
]


def test_what_datasets_keeps_as_json_is_decoded_in_every_container(tmp_path):
    """Columns of mixed types, and rows with optional keys."""
    (tmp_path / "rows.jsonl").write_text(lines(MIXED))
    mixed = Dataset.from_list(MIXED, on_mixed_types="use_json")
    mixed.to_parquet(tmp_path / "rows.parquet")
    mixed.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": mixed, "test": mixed.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "README.md").write_text("# Pairs\n")
    (tmp_path / "repository" / "train.jsonl").write_text(lines(MIXED))
    for name in ("rows.jsonl", "rows.parquet", "saved", "splits", "repository"):
        rows = rows_of(tmp_path / name)
        assert [check_pair(row) for row in rows] == [check_pair(row) for row in MIXED], name
    assert len(rows_of(tmp_path / "splits", "test")) == 1
    with pytest.raises(InputError, match="holds one split; leave --split test out"):
        sources.open_source(str(tmp_path / "saved"), "test")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="saved: can not be read as a saved dataset"):
        sources.open_source(str(tmp_path / "saved"))


def test_what_a_directory_has_beside_data_is_named(tmp_path, capsys):
    for name in ("a.jsonl", "deep/B.JSONL", "notes.txt", "c.xlsx", "d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines([PAIR]))
    assert rows_of(tmp_path) == [PAIR] * 2
    assert "2 files of types that are not read are left out: c.xlsx, d.tar" in capsys.readouterr().out


def test_the_directory_of_the_scripts_is_no_source(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "a.jsonl").write_text(lines([PAIR]))
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", str(tmp_path)):
        with pytest.raises(InputError, match="the scripts write here too; name a file"):
            sources.open_source(name)


def test_csv_rows_are_counted_with_blank_lines_and_keep_their_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected\nA,B,C\n\n\nD,,F\nG,"H, i",J,,\nK,L,M,N\nO,P\n')
    pairs = [(row.location, pair, reason) for row, pair, reason in checked_pairs(sources.open_source(str(path)).rows)]
    assert [(place.split(" row ")[1], reason) for place, _, reason in pairs] == [
        ("2", None),
        ("5", "empty response"),
        ("6", None),
        ("7", "more cells than columns; text with commas needs quotes"),
        ("8", "null"),
    ]
    assert [response_text(pair["chosen"]) for _, pair, _ in pairs if pair] == ["B", "H, i"]


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
        list(sources.open_source(str(path)).rows)


def test_a_file_has_no_split(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("")
    file, directory = str(tmp_path / "a.csv"), str(tmp_path / "data")
    for names in (["sample"], ["sample", file]):
        with pytest.raises(InputError, match="files have no splits; leave --split test out"):
            sources.open_sources(names, "test")
    assert len(sources.open_sources([file, directory], "test")) == 2


def test_locations_name_file_and_row(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n{broken\n\xff\xfe\n[1]\n" + b"[" * 100_000 + b"\n")
    rows = [(row.location, row.problem) for row in sources.open_source(str(path)).rows]
    assert rows == [
        (f"{path} row 1", None),
        (f"{path} row 3", "not valid JSON"),
        (f"{path} row 4", "not valid UTF-8 (Windows-1252, perhaps; iconv -f WINDOWS-1252 -t UTF-8 would convert it)"),
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
    assert [row.values["prompt"] for row in sources.open_source(path, "helpfulness_split", True).rows] == ["other"]
    with pytest.raises(InputError, match="choose one of its splits"):
        sources.open_source(path, "no_such_split")


def test_without_network_the_sample_is_used_and_said(capsys):
    (source,) = sources.open_sources(None, None)
    assert source.name == "sample"
    assert "hub can not be reached" in capsys.readouterr().out


def test_a_package_without_the_sample_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLE_FILE", tmp_path / "sample_data" / "helpsteer_sample.jsonl")
    for names in (["sample"], None):
        with pytest.raises(InputError, match=r"sample: .* is missing; .*the project's directory.*--source$"):
            sources.open_sources(names, None)


@pytest.mark.parametrize("name", ["hub", "nvidia/HelpSteer2"])
def test_a_named_hub_source_out_of_reach_is_an_error(name):
    with pytest.raises(InputError, match="can not be reached"):
        sources.open_sources([name], None)


def flipped(content: bytes) -> bytes:
    """The bytes with some in the middle inverted."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", b"text", "unknown file type"),
        ("x.parquet", b"not parquet", "can not be read to its end"),
        ("x.zip", b"not an archive", "can not be read to its end"),
        ("x.zip", zipped(c__txt="no data"), "no data files in it"),
        ("x.jsonl.zst", b"not packed", "can not be read to its end"),
        ("x.arrow", b"not arrow", "can not be read to its end"),
        ("x.jsonl.gz", b"not gzip", "can not be read to its end"),
        ("x.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 1000)[:-20], "can not be read to its end"),
        ("x.jsonl.gz", flipped(gzip.compress(json.dumps(PAIR).encode() * 1000)), "can not be read to its end"),
        ("x.json", b'[{"prompt": "a"}, {"pro', "can not be read to its end"),
        ("x.json", b'[{"prompt": "a"}, {"prompt": "\xff"}]', r"can not be read to its end \(after row 1"),
        (
            "x.csv",
            "prompt,chosen,rejecté\n".encode("latin-1"),
            r"row 1: not valid UTF-8 \(Windows-1252.*; convert the file",
        ),
        ("x.csv", b'"prompt:chosen:rejected"\n', "row 1: has one column, .*; cells must be separated by commas"),
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
            (row, pair or reason) for row, pair, reason in checked_pairs(sources.open_source(str(tmp_path / name)).rows)
        ]
        assert first.values["chosen"] == "Rouge, ça va." and reason.startswith("not valid UTF-8 (Windows-1252")
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
    pairs = [pair for _, pair, _ in checked_pairs(sources.open_source(str(tmp_path / name)).rows)]
    assert pairs[:-1] == [None] * (len(pairs) - 1) and response_text(pairs[-1]["chosen"]) == PAIR["chosen"]


KEYS = st.sampled_from(["data", "train", "columns", "rows", "row", "0", "1", "prompt", "chosen"])
BITS_OF_JSON = st.sampled_from([b'{"prompt"', b": [", b'"a"', b"]", b"}", b",", b"\n"])


@given(
    name=st.sampled_from(
        ["x.json", "x.jsonl", "x.csv", "x.tsv", "x.txt", "x.parquet", "x.arrow", "x.zip", "x.jsonl.gz", "x.csv.zst"]
    ),
    content=st.binary(max_size=60)
    | st.lists(BITS_OF_JSON).map(b"".join)
    | st.builds(
        lambda text, encoding: text.encode(encoding, "replace"), st.text(), st.sampled_from(["utf-16", "cp1251"])
    )
    | st.recursive(st.integers() | st.text(max_size=3), lambda each: st.lists(each) | st.dictionaries(KEYS, each)).map(
        lambda value: json.dumps(value).encode()
    ),
)
def test_any_file_gives_rows_or_is_named(tmp_path_factory, name, content):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows = list(checked_pairs(sources.read_file(path)))
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
    names = [write_jsonl([named]), str(hub)]
    opened.clear()
    for name in names:
        ((_, pair, reason),) = checked_pairs(sources.open_source(name).rows)
        assert pair and not reason
    assert any(path.endswith("train.parquet") or path.endswith(".arrow") for path in opened)
    assert not [path for path in opened if "secret" in path]


def test_missing_sources_are_named(tmp_path):
    for name in ("nope.jsonl", str(tmp_path / "nope"), "data/nope.csv"):
        with pytest.raises(InputError, match="nope"):
            sources.open_source(name)
    with pytest.raises(InputError, match="no data files"):
        sources.open_source(str(tmp_path))


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
        list(sources.open_source(str(tmp_path), streaming=True).rows)


def test_the_sample_keeps_its_promises():
    rows = [row.values for row in sources.open_source("sample").rows]
    pairs = [check_pair(row) for row in rows]
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == len(rows) >= 240
    assert sum("<extra_id_1>" in prompt for prompt in prompts) >= 24
    assert sum(any("а" <= letter <= "я" for letter in prompt) for prompt in prompts) >= 24
    assert {row["category"] for row in rows} == {
        "open_question", "closed_question", "summarising", "rewriting", "brainstorming", "code", "arithmetic",
        "classification",
    }  # fmt: skip
    answers = [[response_text(pair[side]) for pair in pairs] for side in ("chosen", "rejected")]
    assert 0.45 <= longer_wins(*answers) <= 0.55
    for row in rows:
        for rating in (row["chosen_rating"], row["rejected_rating"]):
            assert 0 <= rating <= 4 and round(rating * 5, 6) == round(rating * 5)
