import contextlib
import functools
import io
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import trl
from conftest import die, killed, make_pairs, parse, run_main
from datasets import DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reward_pipeline import files, processed, schemas
from reward_pipeline.conversations import encode
from reward_pipeline.form import fit_form_model, form_differences, form_margins
from reward_pipeline.layouts import ATTRIBUTES
from reward_pipeline.pairs import pair_keys

SCRIPT = "load_helpsteer_dataset"
COLUMNS = [
    *("prompt", "chosen", "rejected", "chosen_rating", "rejected_rating"),
    *("category", "chosen_author", "rejected_author", "place"),
    *("chosen_ids", "rejected_ids", "length"),
]


def prepare(output: Path, model: str, *arguments) -> tuple[DatasetDict, dict]:
    """Run the script; returns the dataset and its metadata."""
    with pytest.MonkeyPatch.context() as patch:
        run_main(SCRIPT, patch, "--model", model, "--output", output, *arguments)
    return load_from_disk(str(output)), json.loads((output / "metadata.json").read_text())


@pytest.fixture
def no_plot(monkeypatch):
    """Without the histogram, which is half of the time of a small run; the run below draws it."""
    monkeypatch.setattr("reward_pipeline.plots.plot_lengths", lambda *rest: None)


@pytest.fixture
def prepared(no_plot, tmp_path, tiny_model):
    """Call the script with further arguments."""
    return functools.partial(prepare, tmp_path / "out", tiny_model)


def raw(prompt: str, response: str, *attributes: int) -> dict:
    return {"prompt": prompt, "response": response, **dict(zip(ATTRIBUTES, attributes, strict=True))}


# --- one run, looked at from several sides ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A run over two sources with good and bad rows: where it wrote, what it returned and what it printed."""
    directory = tmp_path_factory.mktemp("run")
    authors = [("small", "large") if number % 4 == 0 else ("large", "small") for number in range(20)]
    good = [
        {**pair, "category": "numbers", "chosen_model": author, "rejected_model": other}
        for pair, (author, other) in zip(make_pairs(20), authors, strict=True)
    ]
    bad = [
        good[0],  # duplicate
        {**good[1], "chosen": good[1]["rejected"], "rejected": good[1]["chosen"]},  # contradicts
        {**good[2], "chosen": None},
        {**good[3], "chosen": ""},
        {"prompt": "p"},
        {**good[4], "prompt": "rated", "chosen_rating": 1, "rejected_rating": 3},
    ]
    raw_rows = [raw(f"p {i}", answer, *marks) for i in range(4) for answer, marks in (("x", [1] * 5), ("y", [2] * 5))]
    raw_rows += [raw("tie", answer, *[1] * 5) for answer in "xy"]
    sources = {"first.jsonl": [*good[:15], *bad], "second.jsonl": [*good[15:], *raw_rows]}
    for name, rows in sources.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(directory / name) for name in sources]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        splits, metadata = prepare(directory / "out", tiny_model, "--source", *paths, "--max_length", "64")
    return {
        "directory": directory / "out", "sources": paths, "splits": splits, "metadata": metadata,
        "printed": printed.getvalue(),
    }  # fmt: skip


def test_every_row_is_kept_or_counted_by_its_reason(run):
    rows, metadata = run["metadata"]["rows"], run["metadata"]
    assert (rows["read"], rows["pairs"]) == (36, 31)  # ten raw rows are five pairs
    assert rows["dropped"] == {
        "null": 1, "empty response": 1, "missing column chosen: there are prompt (--columns takes other names)": 1,
        "rating says the rejected is better": 1,
        "duplicate pair": 1, "contradicting pair": 2, "tied ratings": 1,
    }  # fmt: skip
    assert rows["kept"] == 23 == 31 - rows["dropped_total"]
    places = {reason: [place.split(" row ")[1] for place in found] for reason, found in rows["first_dropped"].items()}
    assert (places["null"], places["duplicate pair"], places["contradicting pair"]) == (["18"], ["16"], ["2", "17"])
    assert metadata["splits"] == {"train": 18, "validation": 5}
    assert metadata["source"] == " + ".join(f"local file {path}" for path in run["sources"])
    assert "contradicting pair" in run["printed"]
    assert run["printed"].count("read as         TRL, explicit prompt: a prompt and two answers\n") == 1
    assert "36 read, with 31 pairs: 8 dropped, 0 over the limit, 23 kept" in run["printed"]


def test_what_is_written(run, small_tokenizer):
    splits, metadata = run["splits"], run["metadata"]
    assert {name: len(split) for name, split in splits.items()} == metadata["splits"]
    for name, split in splits.items():
        assert split.column_names == COLUMNS
        texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in split]
        wins = [(len(chosen) > len(rejected)) + (len(chosen) == len(rejected)) / 2 for chosen, rejected in texts]
        assert metadata["longer_wins"][name] == pytest.approx(np.mean(wins))
        margins = form_margins(metadata["form_model"], form_differences(split["chosen"], split["rejected"]))
        assert metadata["form_wins"][name] == pytest.approx(np.mean((np.sign(margins) + 1) / 2))
    train = splits["train"]
    assert metadata["form_model"] == pytest.approx(fit_form_model(form_differences(train["chosen"], train["rejected"])))
    for row in splits["validation"]:
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in row[side]] == ["assistant"]
            assert row[f"{side}_ids"] == encode(small_tokenizer, row["prompt"], row[side], 64)
        assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert row["category"] == ("numbers" if row["prompt"][0]["content"].startswith("Write the number") else "")
    assert {path.name for path in run["directory"].iterdir()} == {
        "README.md", "checksums.json", "train", "validation", "dataset_dict.json", "metadata.json",
        "length_histogram.png",
    }  # fmt: skip
    read, known = processed.load_processed(str(run["directory"]))
    assert known == metadata and read["train"][:] == splits["train"][:]


def test_the_authors_of_the_answers_are_a_baseline(run):
    wins, strengths = run["metadata"]["author_wins"], run["metadata"]["author_strengths"]
    assert strengths.keys() == {"large", "small"} and strengths["large"] > strengths["small"]
    for name, split in run["splits"].items():  # of the pairs that name them: the raw rows do not
        assert wins[name] == pytest.approx(np.mean([author == "large" for author in split["chosen_author"] if author]))
    assert f"\nauthors         {wins['train']:.3f} train, {wins['validation']:.3f} validation\n" in run["printed"]


def test_where_authors_are_not_known_there_is_no_such_baseline(prepared, write_jsonl, capsys):
    rows = make_pairs(10)
    splits, metadata = prepared("--source", write_jsonl(rows))
    assert metadata["author_strengths"] is metadata["author_wins"] is None
    assert "\nauthors  " not in capsys.readouterr().out
    for place in splits["train"]["place"]:
        rows[int(place.split()[-1]) - 1] |= {"chosen_model": "a", "rejected_model": "b"}
    _, metadata = prepared("--source", write_jsonl(rows))
    assert metadata["author_wins"] == {"train": 1.0, "validation": None}
    assert "\nauthors         1.000 train\n" in capsys.readouterr().out


def trainer_options(tmp_path, **options) -> dict:
    return {
        "output_dir": tmp_path, "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "bf16": False,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip


def test_dpo_trainer_takes_the_splits_as_they_are(run, tiny_model, small_tokenizer, tmp_path):
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=trl.DPOConfig(**trainer_options(tmp_path)),
        train_dataset=run["splits"]["train"],
        eval_dataset=run["splits"]["validation"],
        processing_class=small_tokenizer,
    )
    # Our columns of ids hold whole conversations; TRL's of the same names must be its own, of the answers alone.
    whole, row = run["splits"]["train"][0], trainer.train_dataset[0]
    for side in ("chosen", "rejected"):
        assert 0 < len(row[f"{side}_ids"]) < len(whole[f"{side}_ids"])
        assert row["prompt_ids"] + row[f"{side}_ids"] == whole[f"{side}_ids"]
    assert trainer.train().training_loss == pytest.approx(math.log(2))  # before the first step policy = reference
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("ids", [True, False])
def test_reward_trainer_takes_the_splits_as_they_are(run, tiny_model, small_tokenizer, tmp_path, ids):
    """With our ids, and without them by tokenising the same texts to the same ids."""
    splits = run["splits"] if ids else run["splits"].remove_columns(["chosen_ids", "rejected_ids"])
    trainer = trl.RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1),
        args=trl.RewardConfig(**trainer_options(tmp_path)),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=small_tokenizer,
    )
    for side in ("chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[side][:] == run["splits"]["train"][side][:]
    assert math.isfinite(trainer.train().training_loss) and math.isfinite(trainer.evaluate()["eval_loss"])


# --- what becomes of the pairs ---------------------------------------------------------------------------------------


def test_statistics_by_hand(prepared, write_jsonl):
    rows = [
        # in tokens: 9 of the template around prompts of 1, 50, 1; answers of 2 and 60, 2 and 4, 1 and 1; one that ends
        {"prompt": "a", "chosen": "a a", "rejected": "a" + " a" * 59, "chosen_rating": 3, "rejected_rating": 2},
        {"prompt": "a" + " a" * 49, "chosen": "a a", "rejected": "a a a a", "chosen_rating": 3, "rejected_rating": 1},
        {"prompt": "b", "chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": 1},
    ]
    _, metadata = prepared("--source", write_jsonl(rows), "--max_length", "63")
    lengths = metadata["length_percentiles"]
    # The second pair is cut on one side only: with the longer answer it has 64 tokens, with the shorter one 62.
    assert metadata["truncated_share"] == pytest.approx({"prompt": 1 / 3, "response": 1 / 3, "pair": 2 / 3})
    assert metadata["over_max_length_share"] == pytest.approx(2 / 3)
    assert (lengths["chosen"]["p50"], lengths["rejected"]["p100"], lengths["prompt"]["p100"]) == (2, 60, 59)
    assert (lengths["conversation"]["p50"], lengths["conversation"]["p100"]) == (64, 71)
    assert lengths["longer_side_after_cut"]["p100"] == 63
    assert (metadata["rating_gap"]["n"], metadata["rating_gap"]["mean"]) == (3, 2.0)


def test_pairs_that_the_cut_makes_equal_are_left_out_of_train(prepared, write_jsonl):
    same = "start" + " a" * 200
    rows = [{"prompt": f"p {i}", "chosen": f"{same} good", "rejected": f"{same} bad"} for i in range(5)]
    rows += [{"prompt": f"q {i}", "chosen": "good", "rejected": "bad"} for i in range(5)]
    splits, metadata = prepared("--source", write_jsonl(rows), "--max_length", "64")
    assert sum(metadata["identical_after_cut"].values()) == 5
    in_train = metadata["identical_after_cut"]["train"]
    assert metadata["splits"]["train"] == 8 - in_train == len(splits["train"])
    reason = "identical once cut to max_length (training pair)"
    assert metadata["rows"]["dropped"] == {reason: in_train}
    assert len(metadata["rows"]["first_dropped"][reason]) == min(in_train, 3)
    assert metadata["rows"]["kept"] == 10 - in_train
    assert len(splits["validation"]) == 2
    for name, split in splits.items():  # each split's digest is of the pairs that are in it
        keys = [pair_keys(row) for row in split]
        columns = [np.array([key[column] for key in keys]) for column in ("pair_key", "swapped")]
        assert metadata["split_digests"][name] == processed.digest(*columns)


def test_the_draw_and_the_split_follow_from_their_flags(prepared, write_jsonl):
    source = write_jsonl(make_pairs(50))

    def of(*arguments):
        splits, metadata = prepared("--source", source, "--limit", "10", *arguments)
        assert (metadata["rows"]["kept"], metadata["rows"]["not_drawn"]) == (10, 40)
        return [row["chosen"][0]["content"] for row in itertools.chain(*splits.values())], metadata

    texts, metadata = of()
    assert texts != [pair["chosen"] for pair in make_pairs(10)]
    assert of() == (texts, metadata)
    same_pairs, other_split = of("--validation_share", "0.4")
    assert sorted(same_pairs) == sorted(texts) and other_split["splits"] == {"train": 6, "validation": 4}
    assert other_split["digest"] == metadata["digest"]
    assert processed.data_identity(other_split) != processed.data_identity(metadata)
    assert of("--seed", "43")[1]["digest"] != metadata["digest"]


# --- flags, and what can go wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_length", "8"], "--max_length: must be a whole number, at least 32"),
        (["--limit", "1"], "--limit: must be a whole number, at least 2"),
        (["--validation_share", "1"], "--validation_share: must be a finite number, above 0 and below 1"),
        (["--validation_share", "nan"], "--validation_share: must be"),
        (["--seed", "99999999999999999999"], "--seed: must be"),
        (["--source", "a.csv", ""], "--source: must not be empty"),
        (["--output="], "--output: must not be empty"),
        (["--no_such_flag", "1"], "--no_such_flag: unknown flag"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        parse(SCRIPT, *flags)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_settings_may_stand_in_a_file(tmp_path):
    (tmp_path / "data.yaml").write_text("source: [a.csv, b.csv]\nlimit: 100\nvalidation_share: 0.1\n")
    options = parse(SCRIPT, "--config", tmp_path / "data.yaml", "--limit", "none")
    assert (options.source, options.limit, options.validation_share) == (["a.csv", "b.csv"], None, 0.1)


def test_nothing_is_made_before_everything_is_found(monkeypatch, tmp_path, tiny_model, write_jsonl):
    source = write_jsonl(make_pairs(3))
    output = tmp_path / "new" / "data"
    for model, name in ((str(tmp_path / "nobody"), source), (tiny_model, str(tmp_path / "nothing.csv"))):
        with pytest.raises(SystemExit, match=r"nobody|nothing"):
            run_main(SCRIPT, monkeypatch, "--model", model, "--source", name, "--output", output)
        assert not output.parent.exists()


def test_columns_named_by_the_user_are_said(prepared, write_jsonl, capsys):
    rows = [{"question": f"q {i}", "better": f"good {i}", "worse": f"bad {i}"} for i in range(6)]
    names = ("prompt=question", "chosen=better", "rejected=worse")
    splits, metadata = prepared("--source", write_jsonl(rows), "--columns", *names)
    assert sum(map(len, splits.values())) == 6
    said = f"columns named by --columns: {', '.join(names)}"
    assert metadata["rows"]["read_as"] == [said, "TRL, explicit prompt: a prompt and two answers"]
    assert f"read as         {said}\n" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"--columns: no column best in .* row 6 and those before it; there are question,"
    ):
        prepared("--source", write_jsonl(rows), "--columns", "chosen=best")
    for wrong in ("answer=better", "prompt", "prompt="):
        with pytest.raises(SystemExit):
            prepared("--columns", wrong)
        assert "error: --columns: must be such as prompt=question, with one of prompt," in capsys.readouterr().err


def test_nothing_usable_keeps_what_was_there(prepared, tmp_path, write_jsonl):
    prepared("--source", write_jsonl(make_pairs(10)))
    missing = r"1 of 1 pairs: missing column chosen: there are question \(--columns .*\) \(first: .* row 1\)"
    for rows, message in (([], "the source is empty"), ([{"question": "a"}], missing)):
        with pytest.raises(SystemExit, match=message):
            prepared("--source", write_jsonl(rows, "bad.jsonl"))
    against = [make_pairs(1)[0], {**make_pairs(1)[0], "chosen": make_pairs(1)[0]["rejected"]}]
    against[1]["rejected"] = against[0]["chosen"]
    with pytest.raises(SystemExit, match="every pair contradicts another one"):
        prepared("--source", write_jsonl(against, "bad.jsonl"))
    assert len(load_from_disk(str(tmp_path / "out"))["train"]) == 8
    assert not list(tmp_path.glob(".*"))


def test_output_that_can_not_be_written_is_named(monkeypatch, small_disk, tmp_path, tiny_model, write_jsonl):
    source = write_jsonl(make_pairs(10))
    (tmp_path / "file").write_text("")
    for output, reason in (
        (tmp_path, "holds other files"),
        (tmp_path / "file" / "data", r"data: can not be written \(.*(exists|directory)"),
        (small_disk("ro") / "data", r"data: can not be written \(.*Read-only file system"),
    ):
        with pytest.raises(SystemExit, match=reason):
            run_main(SCRIPT, monkeypatch, "--model", tiny_model, "--source", source, "--output", output)
    assert Path(source).is_file()


def test_a_full_disk_keeps_what_was_there(monkeypatch, small_disk, tiny_model, write_jsonl):
    output = small_disk("size=1m") / "data"
    arguments = ("--model", tiny_model, "--output", output, "--max_length", 64)
    run_main(SCRIPT, monkeypatch, "--source", write_jsonl(make_pairs(10)), *arguments)
    with pytest.raises(SystemExit, match=r"(disk is full|can not be written).*No space left on device") as ended:
        run_main(SCRIPT, monkeypatch, "--source", write_jsonl(make_pairs(4000)), *arguments)
    assert "\n" not in str(ended.value.code)
    splits, metadata = processed.load_processed(str(output))
    assert metadata["splits"] == {"train": 8, "validation": 2} == {name: len(split) for name, split in splits.items()}
    assert [path.name for path in output.parent.iterdir()] == ["data"]


def test_only_the_first_of_several_processes_prepares(monkeypatch, tmp_path, write_jsonl, tiny_model):
    source = write_jsonl(make_pairs(10))
    monkeypatch.setenv("RANK", "1")
    run_main(SCRIPT, monkeypatch, "--source", source, "--model", tiny_model, "--output", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --- killed ----------------------------------------------------------------------------------------------------------


def die_at_call(room, function: str, number: int) -> None:
    """Die by SIGKILL when a function is called for the so many-th time."""
    calls, real = itertools.count(1), getattr(room, function)

    def mortal(*rest, **options):
        if next(calls) == number:
            die()
        return real(*rest, **options)

    setattr(room, function, mortal)


def test_a_killed_preparation_is_repeated_to_the_same_result(no_plot, tiny_model, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(processed, "ROWS", 50)  # several batches of few pairs
    arguments = ["--source", write_jsonl(make_pairs(150)), "--max_length", "64"]
    moments = random.Random(0)
    for room, function, last in (
        (schemas, "check_pair", 150),
        (processed, "encode_batch", 8),
        (processed, "digest", 3),
        (files, "write_text", 1),
        (files, "write_checksums", 1),
    ):
        death = functools.partial(die_at_call, room, function, moments.randint(1, last))
        killed(SCRIPT, ["--model", tiny_model, "--output", tmp_path / "killed", *arguments], death)
        assert not (tmp_path / "killed").exists()
    ours, theirs = (prepare(tmp_path / name, tiny_model, *arguments) for name in ("killed", "undisturbed"))
    assert ours[1] == theirs[1]
    assert {name: split[:] for name, split in ours[0].items()} == {name: split[:] for name, split in theirs[0].items()}
    assert list(tmp_path.glob(".killed*")) == []


def test_what_looks_wrong_is_printed_and_kept(prepared, write_jsonl, capsys, monkeypatch):
    topics = ("tomatoes", "cats", "rivers", "old maps", "bread", "rain", "bees", "chess", "songs", "trains")
    rows = [
        {"prompt": f"Tell me all that you know about {topic}", "chosen": "A lot.", "rejected": "no"} for topic in topics
    ]
    spelled = [{**row, "prompt": row["prompt"].upper() + "!", "chosen": "B."} for row in rows[:3]]
    odd = {**rows[0], "prompt": "What is it about?", "chosen": "What is it about? It is about bees."}
    long = [{**rows[0], "prompt": f"{'one two three four five six ' * 4}{word}"} for word in ("seven", "eight")]
    source = write_jsonl([*rows, *spelled, odd, *long, *[{"prompt": "x"}] * 8])
    _, metadata = prepared("--source", source, "--validation_share", "0.5", "--seed", "1")
    warned, printed = metadata["rows"]["warnings"], capsys.readouterr().out
    assert metadata["spellings"] == 3 and "3 pairs have another pair's prompt, spelled otherwise" in printed
    assert [count["count"] for words, count in warned.items() if "repeats its prompt" in words] == [1]
    assert any("33% of the pairs were dropped for one reason: missing column" in words for words in warned)
    assert all(words in printed and count["first"][0] in printed for words, count in warned.items())
    monkeypatch.setattr(processed, "MOST_COMPARED", 5)
    assert not any("nearly" in words for words in prepared("--source", source)[1]["rows"]["warnings"])
