"""The quality benchmarks: the usual recipe, variants, and comparisons of runs."""

import importlib.util
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import scipy.special
import torch
from accelerate.state import AcceleratorState
from conftest import make_pairs, parse, run_main
from test_pair_metrics import random_columns
from test_reward_training import make_trainer
from transformers import AutoTokenizer
from trl import RLOOTrainer

from benchmarks import (
    compare_runs,
    gradient_variance,
    hold_out,
    measure,
    naive_recipe,
    ngram_model,
    reinforce_speed,
    variants,
)
from reward_pipeline import (
    cards,
    conversations,
    models,
    reinforce,
    reward_training,
    rollouts,
)
from reward_pipeline import (
    processed as processed_room,
)
from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import InputError
from reward_pipeline.form import COUNTS, form_differences, form_margins
from reward_pipeline.pair_metrics import pair_metrics
from reward_pipeline.processed import PAIR_FEATURES, load_processed, read_pairs
from reward_pipeline.sampling import sample
from reward_pipeline.statistics import wins


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Pictures cost more than a training of this size."""
    monkeypatch.setattr(cards, "plot_evaluation", lambda *rest: [])
    monkeypatch.setattr(reward_training, "plot_curves", lambda *rest: None)


# --- the usual recipe ------------------------------------------------------------------------------------------------


def test_the_naive_recipe_runs_on_the_same_pairs(monkeypatch, processed, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    row = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row["prompt"] = [{"role": "user", "content": "word " * 100}]
    cut = [naive_recipe.joined_ids(tokenizer, row, side, 64) for side in ("chosen", "rejected")]
    assert cut[0] == cut[1] and len(cut[0]) == 64  # what the length rule is there to prevent
    for parts in ([], ["--parts", *naive_recipe.PARTS]):
        flags = ["--data", processed, "--model", tiny_model, "--output", tmp_path / "naive", *parts]
        run_main("benchmarks/naive_recipe", monkeypatch, *flags)
        metrics = json.loads((tmp_path / "naive" / "metrics.json").read_text())
        assert (metrics["n"], metrics["train_pairs"], metrics["identical_after_cut"]) == (8, 32, 0)
    assert metrics["parts"] == list(naive_recipe.PARTS)


def test_every_part_of_the_recipe_is_ours(small_tokenizer, prepared):
    pairs, _ = load_processed(str(prepared))
    parts = list(naive_recipe.PARTS)
    published = small_tokenizer.name_or_path  # with the template as it comes
    theirs = naive_recipe.load_naive_tokenizer(published, parts)
    assert theirs.pad_token_id == small_tokenizer.pad_token_id
    tokenized = naive_recipe.tokenize(pairs["validation"], theirs, 64, parts)
    assert list(tokenized["chosen_ids"]) == list(pairs["validation"]["chosen_ids"])
    usual = naive_recipe.tokenize(pairs["validation"], naive_recipe.load_naive_tokenizer(published, []), 64, [])
    assert all(ids != own for ids, own in zip(usual["chosen_ids"], tokenized["chosen_ids"], strict=True))


# --- variants --------------------------------------------------------------------------------------------------------


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def rooms(monkeypatch):
    """Sets back what a variant replaces, at the end and when it is called."""
    replaced = [(conversations, "_assemble"), (reward_training, "PairTrainer")]
    replaced += [(processed_room, "mismatched_pairs"), (processed_room, "load_processed")]
    own = [(room, name, getattr(room, name)) for room, name in replaced]

    def set_back():
        for each in own:
            monkeypatch.setattr(*each)

    set_back()
    return set_back


def test_broken_copies_keep_the_form_and_not_the_content():
    generator = np.random.default_rng(0)
    assert re.fullmatch(r"[^1][^2]\.[^0] km, [^7]", variants.other_digits("12.0 km, 7", generator))
    text, other = "One is. Two is!\nThree is? Four", "Five. Six."
    ways = {variants.rearranged(text, other, generator) for _ in range(60)}
    own = ["One is.", "Two is!", "Three is?", "Four"]
    for way in ways:
        sentences = re.fullmatch(r"(.*?[.!?]|Four) (.*?[.!?]|Four)\n(.*?[.!?]|Four) (.*)", way).groups()
        foreign = [each for each in sentences if each in ("Five.", "Six.")]
        assert sorted(sentences) == sorted(own) or (len(foreign) == 2 and set(sentences) - set(foreign) < set(own))
    pairs = {
        "prompt": [[{"role": "user", "content": f"prompt {number}"}] for number in range(40)],
        "chosen": [answer(f"It is {number}. It was {number}. Good.") for number in range(40)],
        "rejected": [answer("Poor. Bad. Wrong.") for _ in range(40)],
        "place": [f"row {number}" for number in range(40)],
    }
    made = variants.broken_copies(pairs, 0.5, np.random.default_rng(0))
    assert {name: len(column) for name, column in made.items()} == dict.fromkeys(pairs, 40)
    for chosen, rejected in zip(made["chosen"][20:], made["rejected"][20:], strict=True):
        assert len(chosen[0]["content"].split()) - 2 <= len(rejected[0]["content"].split()) and chosen != rejected


def test_an_open_cut_has_no_end_and_what_fits_is_as_ever():
    prompt, closing = [1, 2, 3], [9]
    assert variants.assemble_open(prompt, [5] * 4, closing, 8, False).ids == [1, 2, 3, 5, 5, 5, 5, 9]
    cut = variants.assemble_open(prompt, [5, 6, 7, 8, 5, 6], closing, 8, False)
    assert (cut.ids, cut.response_cut) == ([1, 2, 3, 5, 6, 7, 8, 5], True)
    assert len(variants.assemble_open([1] * 9, [5] * 9, closing, 8, False).ids) == 8


def flags_of(train, tmp_path, *more) -> list[str]:
    flags = train.arguments(tmp_path / "out", "--eval_strategy", "no", "--save_strategy", "no", *more)
    return [*flags, "--load_best_model_at_end", "false"]


def test_a_variant_trains_other_weights_and_is_other_data(monkeypatch, tmp_path, train, rooms, write_jsonl, tiny_model):
    # Several pairs a prompt, answers that do not fit into 64 tokens, ratings.
    rated = {"chosen_rating": 3.0, "category": ""}
    pairs = [
        {
            "prompt": f"Say something, {number // 4}.",
            **{side: (pair[side] + f" {number}. ") * 9 for side in ("chosen", "rejected")},
            **rated,
            "rejected_rating": number % 3,
        }
        for number, pair in enumerate(make_pairs(40))
    ]
    flags = ["--source", write_jsonl(pairs), "--model", tiny_model, "--output", tmp_path / "long"]
    run_main("load_helpsteer_dataset", monkeypatch, *flags, "--max_length", "64")

    def keep_weights(trainer, *rest):
        trained.append({name: each.clone() for name, each in trainer.model.state_dict().items()})
        raise measure.Over  # nothing is saved

    trained = []
    monkeypatch.setattr(reward_training, "save_trained", keep_weights)
    more = (
        "--data",
        str(tmp_path / "long"),
        "--max_steps",
        "6",
        "--learning_rate",
        "1e-3",
        "--mismatched_share",
        "0.5",
    )
    flags = flags_of(train, tmp_path, *more)
    with pytest.raises(measure.Over):
        measure.run("train_reward_model", *flags)
    for variant in variants.VARIANTS:
        rooms()
        monkeypatch.setattr("sys.argv", ["variants.py", variant, *flags])
        with pytest.raises(measure.Over):
            variants.main()
        _, metadata = processed_room.load_processed(str(tmp_path / "long"))
        assert all(metadata[name].endswith(f", variant {variant}") for name in ("digest", "source"))
        for number, run in enumerate(trained[:-1]):  # the plain training and the variants before
            differs = any(not torch.equal(each, trained[-1][name]) for name, each in run.items())
            assert differs, (variant, number)


def test_grouped_pairs_come_prompt_by_prompt(monkeypatch, tmp_path, train, rooms, tiny_model, write_jsonl):
    pairs = [{**pair, "prompt": f"Say {number // 4}."} for number, pair in enumerate(make_pairs(40))]
    flags = ["--source", write_jsonl(pairs), "--model", tiny_model, "--output", tmp_path / "grouped"]
    run_main("load_helpsteer_dataset", monkeypatch, *flags, "--max_length", "64")

    def look(trainer, **options):
        order = trainer._get_train_sampler()
        prompts = [str(trainer.train_dataset[index]["prompt"]) for index in order]
        assert sorted(order) == list(range(len(trainer.train_dataset)))
        assert len([*itertools.groupby(prompts)]) == len(set(prompts)) and prompts != sorted(prompts)
        raise measure.Over

    monkeypatch.setattr(variants.GroupedPairs, "train", look)
    flags = flags_of(train, tmp_path, "--data", str(tmp_path / "grouped"))
    monkeypatch.setattr("sys.argv", ["variants.py", "grouped_pairs", *flags])
    with pytest.raises(measure.Over):
        variants.main()


def test_weights_are_averaged_over_the_last_third():
    model, callback = torch.nn.Linear(1, 1, bias=False), variants.MeanWeights()
    for step in range(1, 10):
        with torch.no_grad():
            model.weight.fill_(step**2)
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), None, model=model)
    assert model.weight.item() == pytest.approx((49 + 64 + 81) / 3)  # of 9 updates, those after 6.3


def test_a_loss_scaled_by_ratings_by_hand(tiny_model, tmp_path):
    ratings = [(4.0, 3.0), (4.0, 1.0), (None, None)]  # gaps of 1, 3 and unknown, which counts once
    rated = [dict(zip(("chosen_rating", "rejected_rating"), each, strict=True)) for each in ratings]
    options = {"kind": variants.ScaledRatings, "extra": rated, "center_rewards_coefficient": None}
    trainer, rows = make_trainer(tiny_model, tmp_path, make_pairs(3), **options)
    with torch.no_grad():
        margins = [
            trainer.model(torch.tensor([row["chosen_ids"]])).logits.item()
            - trainer.model(torch.tensor([row["rejected_ids"]])).logits.item()
            for row in rows
        ]
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    each = [math.log1p(math.exp(-margin)) for margin in margins]
    assert loss.item() == pytest.approx((0.5 * each[0] + 1.5 * each[1] + each[2]) / 3, abs=1e-6)


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_variants_refuse_a_stream(variant, monkeypatch, rooms):
    monkeypatch.setattr("sys.argv", ["variants.py", variant, "--streaming", "sample", "--max_steps", "1"])
    with pytest.raises(InputError, match="--streaming"):
        variants.main()


def test_unrated_pairs_can_not_be_scaled(tiny_model, tmp_path):
    unrated = [{"chosen_rating": None, "rejected_rating": None}] * 2
    with pytest.raises(InputError, match="needs rated pairs"):
        make_trainer(tiny_model, tmp_path, make_pairs(2), kind=variants.ScaledRatings, extra=unrated)


# --- comparisons of runs ---------------------------------------------------------------------------------------------


def write_run(columns, directory) -> None:
    directory.mkdir()
    cards.write_evaluation(columns, pair_metrics(columns), directory)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Columns of two evaluated runs, and the directory that they are in; tests leave both as they are."""
    directory = tmp_path_factory.mktemp("runs")
    columns = {"first": random_columns(), "second": random_columns()}
    columns["second"]["chosen_reward"] = columns["second"]["chosen_reward"] + 1
    columns["first"]["chosen"] = np.array(["1", '"', "two\nlines, and\ra comma", *["x"] * 397], dtype=object)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "plot_evaluation", lambda *rest: [])
        for name, each in columns.items():
            write_run(each, directory / name)
    return columns, directory


def test_rewards_are_read_as_they_were_written(runs):
    columns, directory = runs
    again = compare_runs.read_columns(str(directory / "first"))
    assert again.keys() == {*compare_runs.NEEDED, *compare_runs.MAY_BE_MISSING}
    for name in compare_runs.NEEDED:
        np.testing.assert_array_equal(again[name], columns["first"][name])


def test_runs_are_compared_with_the_form_term_where_they_have_one(runs, tmp_path, monkeypatch, capsys):
    columns, directory = runs
    term = {"chosen_form": np.zeros(400), "rejected_form": 100.0 * (np.arange(400) % 4 == 0)}  # wrong in a quarter
    write_run({**columns["first"], **term}, tmp_path / "whole")
    run_main("benchmarks/compare_runs", monkeypatch, "--form", "true", directory / "first", tmp_path / "whole")
    rows = [line.split("|")[3].split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    reward = wins(columns["first"]["chosen_reward"], columns["first"]["rejected_reward"])
    assert rows == [f"{each.mean():.3f}" for each in (reward, reward * (np.arange(400) % 4 != 0))]
    run_main("benchmarks/compare_runs", monkeypatch, directory / "first", tmp_path / "whole")
    assert len({line.split("|")[3] for line in capsys.readouterr().out.splitlines()[2:]}) == 1


def test_runs_are_compared_pair_by_pair(runs, monkeypatch, capsys):
    columns, directory = runs
    accuracy = [pair_metrics(each)["accuracy"] for each in columns.values()]
    first, second = compare_runs.compare(columns)
    assert first[0] == "first" and first[3] == ""
    assert second[3].startswith(f"{accuracy[1] - accuracy[0]:+.3f} (")
    low, high = second[3].split("(")[1].rstrip(")").split(" to ")
    assert 0 < float(low) < accuracy[1] - accuracy[0] < float(high)
    run_main("benchmarks/compare_runs", monkeypatch, directory / "first", directory / "second")
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in (*first[1:], *second[1:]))


def test_runs_on_other_pairs_are_refused(runs):
    columns, _ = runs
    with pytest.raises(InputError, match="other pairs than first"):
        compare_runs.compare({**columns, "second": random_columns(seed=1)})


def test_a_run_without_rewards_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no readable rewards\.csv"):
        compare_runs.read_columns(str(tmp_path))
    (tmp_path / "rewards.csv").write_text("prompt_key,chosen_reward\n1,0.5\n")
    with pytest.raises(InputError, match="no column category"):
        compare_runs.read_columns(str(tmp_path))


@pytest.mark.parametrize(
    "column, value",
    [
        ("chosen_reward", ""), ("rejected_reward", "high"), ("chosen_reward", "True"), ("rejected_reward", "inf"),
        ("chosen_length", "nan"), ("rejected_length", ""),
    ],
)  # fmt: skip
def test_what_is_no_number_is_named_with_its_line(tmp_path, column, value, monkeypatch):
    path = tmp_path / "run" / "rewards.csv"
    path.parent.mkdir()
    table = pandas.DataFrame(random_columns(20)).astype(str)
    table.loc[4, "category"] = "two\nlines"
    table.loc[5, "chosen"] = "x" * 200_000
    table.loc[7:9, column] = value
    table.to_csv(path, index=False)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    with pytest.raises(SystemExit) as ended:
        run_main("benchmarks/compare_runs", monkeypatch, path.parent)
    # Line 1 is the header, so row 7 would be line 9, but for the empty line and the category in two lines.
    assert f"{path}, line 11: {column} is {value!r}, not a number; evaluate" in ended.value.code


def test_rewards_that_are_all_text_are_named(tmp_path):
    path = tmp_path / "rewards.csv"
    pandas.DataFrame(random_columns(20)).assign(rejected_reward="x").to_csv(path, index=False)
    with pytest.raises(InputError, match="line 2: rejected_reward is 'x'"):
        compare_runs.read_columns(str(tmp_path))


# --- pairs held out --------------------------------------------------------------------------------------------------


def hold(monkeypatch, tiny_model, directory, *sources, share="0.2", more=()):
    """Run the script; returns both files."""
    files = directory / "train.jsonl", directory / "validation.jsonl"
    flags = ["--train", files[0], "--validation", files[1], "--model", tiny_model, "--validation_share", share]
    run_main("benchmarks/hold_out", monkeypatch, *sources, *flags, *more)
    return files


def test_the_sides_are_those_of_the_data_script(monkeypatch, tiny_model, tmp_path, write_jsonl):
    easy = [{**pair, "chosen_model": "large", "rejected_model": "small"} for pair in make_pairs(30)]
    swapped = {**easy[0], "chosen": easy[0]["rejected"], "rejected": easy[0]["chosen"]}
    sources = ["sample", write_jsonl([*easy, easy[1], swapped, {"prompt": "no answers"}])]
    monkeypatch.setattr("reward_pipeline.plots.plot_lengths", lambda *rest: None)
    flags = ["--model", tiny_model, "--output", tmp_path / "processed", "--max_length", "2048"]
    run_main("load_helpsteer_dataset", monkeypatch, "--source", *sources, *flags, "--validation_share", "0.3")
    splits, metadata = load_processed(str(tmp_path / "processed"))
    assert metadata["rows"]["dropped_total"] == 4 and metadata["identical_after_cut"]["train"] == 0
    files = hold(monkeypatch, tiny_model, tmp_path, *sources, share="0.3")
    for name, file in zip(("train", "validation"), files, strict=True):
        again = read_pairs(str(file))
        for column in PAIR_FEATURES.keys() - {"place"}:
            assert again[column][:] == splits[name][column][:]
        assert {rating is None for rating in again["chosen_rating"]} == {True, False}
        assert set(again["chosen_author"]) == {"large", ""}


def test_a_line_has_what_is_known(monkeypatch, tiny_model, tmp_path, write_jsonl):
    source = write_jsonl([{**pair, "category": "numbers"} for pair in make_pairs(5)])
    train, validation = (file.read_text().splitlines() for file in hold(monkeypatch, tiny_model, tmp_path, source))
    assert (len(train), len(validation)) == (4, 1)
    assert json.loads(train[0]) in [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "chosen": answer(pair["chosen"]),
            "rejected": answer(pair["rejected"]),
            "category": "numbers",
        }
        for pair in make_pairs(5)
    ]


def test_prompts_held_out_of_another_set_are_not_trained_on(monkeypatch, tiny_model, tmp_path, write_jsonl):
    source, other = write_jsonl(make_pairs(20)), write_jsonl([*make_pairs(7), *make_pairs(30)[25:]], "other.jsonl")
    whole = [file.read_text().splitlines() for file in hold(monkeypatch, tiny_model, tmp_path, source)]
    sides = hold(monkeypatch, tiny_model, tmp_path, source, more=("--unseen", other))
    train, validation = (file.read_text().splitlines() for file in sides)
    unseen = {pair["prompt"] for pair in make_pairs(7)}
    assert validation == whole[1]
    assert train == [line for line in whole[0] if json.loads(line)["prompt"][0]["content"] not in unseen] != whole[0]
    with pytest.raises(SystemExit) as ended:
        hold(monkeypatch, tiny_model, tmp_path, source, more=("--unseen", source))
    assert "--unseen: has the prompts of all training pairs" in ended.value.code


def test_no_source_is_replaced(monkeypatch, tiny_model, tmp_path, write_jsonl):
    source = write_jsonl(make_pairs(5), "train.jsonl")
    before = (tmp_path / "train.jsonl").read_text()
    for named in (source, str(tmp_path), str(tmp_path / "nowhere" / ".." / "train.jsonl")):
        with pytest.raises(SystemExit) as ended:
            hold(monkeypatch, tiny_model, tmp_path, named)
        assert f"--train {source}: belongs to the source {named}; name another" in ended.value.code
    with pytest.raises(SystemExit) as ended:
        run_main("benchmarks/hold_out", monkeypatch, "sample", "--train", source, "--validation", source)
    assert f"both are {source}" in ended.value.code
    with pytest.raises(SystemExit) as ended:
        flags = ["--train", hold_out.SAMPLE_FILE, "--validation", tmp_path / "validation.jsonl"]
        run_main("benchmarks/hold_out", monkeypatch, "sample", *flags)
    assert "belongs to the source sample" in ended.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"] and hold_out.SAMPLE_FILE.is_file()
    assert (tmp_path / "train.jsonl").read_text() == before


def test_both_files_are_written_or_neither(monkeypatch, tiny_model, tmp_path, write_jsonl):
    source = write_jsonl(make_pairs(5))
    (tmp_path / "out" / "validation.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        hold(monkeypatch, tiny_model, tmp_path / "out", source)
    assert "validation.jsonl: is a directory" in ended.value.code
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["validation.jsonl"]


# --- n-grams and form ------------------------------------------------------------------------------------------------


def ngram_differences(chosen: list[str], rejected: list[str]):
    return ngram_model.answer_features(chosen) - ngram_model.answer_features(rejected)


def test_an_answer_has_its_words_its_neighbours_and_its_form():
    features = ngram_model.answer_features(["Red, blue; red blue!", answer("red blue"), ""])
    words = features[:, : ngram_model.HASHED].toarray()
    assert words.sum(axis=1).tolist() == [4, 3, 0]  # red, blue, red blue, blue red, each once
    assert {*np.flatnonzero(words[1])} < {*np.flatnonzero(words[0])} and words.max() == 1
    counts = features[:, ngram_model.HASHED :].toarray()
    assert counts[:1] - counts[1:2] == pytest.approx(form_differences(["Red, blue; red blue!"], ["red blue"]))


def test_the_order_of_words_is_read_where_form_tells_nothing():
    chosen, rejected = (
        [f"say {words} {n}" for n in range(10, 40)] for words in ("yellow before orange", "orange before yellow")
    )
    assert not form_differences(chosen, rejected).any()
    weights = ngram_model.fit(ngram_differences(chosen[:20], rejected[:20]))
    assert (ngram_differences(chosen[20:], rejected[20:]) @ weights > 0).all()
    swapped = ngram_model.fit(ngram_differences(rejected[:20], chosen[:20]))
    assert swapped == pytest.approx(-weights, abs=1e-6)


def test_the_fit_is_the_minimum_of_its_loss():
    generator = np.random.default_rng(0)
    vocabulary = np.array(["red", "blue", "**green**", "yes!", "no?", "a, b", "(c)"])
    chosen, rejected = (
        [" ".join(generator.choice(vocabulary, generator.integers(2, 9))) for _ in range(100)] for _ in range(2)
    )
    differences = ngram_differences(chosen, rejected)
    weights = ngram_model.fit(differences)
    # By hand: in features of scale s the penalty |v|^2 / 2 is against C times the loss, of both orientations alike.
    scale = np.full(ngram_model.HASHED + len(COUNTS), 0.3)
    counts = form_differences(chosen, rejected)
    for number in range(len(COUNTS)):
        mean_square = (counts[:, number] ** 2).mean()
        scale[ngram_model.HASHED + number] = 1 / math.sqrt(mean_square) if mean_square else 1.0
    pull = 2 * 0.01 * scale * (differences.T @ scipy.special.expit(-(differences @ weights)))
    assert abs(weights / scale).max() > 0.02
    assert weights / scale == pytest.approx(pull, abs=2e-4)


def test_ngrams_are_compared_with_an_evaluated_model(monkeypatch, prepared, tiny_reward_model, tmp_path, capsys):
    model, ngrams = tmp_path / "model", tmp_path / "ngrams"
    run_main("benchmarks/ngram_model", monkeypatch, "--data", prepared, "--output", ngrams)
    assert capsys.readouterr().out.startswith("accuracy 1.000 (")  # the rejected answers decline, all in the same words
    flags = ["--model", tiny_reward_model, "--pairs", prepared, "--output", model]
    run_main("evaluate_reward_model", monkeypatch, *flags)
    ours, theirs = (pandas.read_csv(run / "rewards.csv") for run in (ngrams, model))
    assert {*ours.columns} <= {*theirs.columns} and not ours[["prompt_cut", "response_cut"]].any(axis=None)
    capsys.readouterr()
    run_main("benchmarks/compare_runs", monkeypatch, ngrams, model)
    assert "| 1.000 (" in capsys.readouterr().out
    metrics = json.loads((ngrams / "metrics.json").read_text())
    assert (metrics["n"], metrics["train_pairs"], metrics["accuracy"]) == (8, 32, 1)

    splits, metadata = load_processed(str(prepared))
    weights = ngram_model.fit(ngram_differences(splits["train"]["chosen"], splits["train"]["rejected"]))
    texts = splits["validation"]["chosen"], splits["validation"]["rejected"]
    margins = ours["chosen_reward"] - ours["rejected_reward"]
    assert margins.to_numpy() == pytest.approx(ngram_differences(*texts) @ weights)
    expected = form_margins(metadata["form_model"], form_differences(*texts))
    assert ours["form_margin"].to_numpy() == pytest.approx(expected)


def test_ngrams_score_other_pairs(monkeypatch, prepared, tmp_path, write_jsonl):
    easy = make_pairs(45)[40:]
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in easy[:2]]
    files = [write_jsonl(easy, "first.jsonl"), write_jsonl(swapped, "second.jsonl")]
    flags = ["--data", prepared, "--pairs", *files, "--output", tmp_path / "out"]
    run_main("benchmarks/ngram_model", monkeypatch, *flags)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["n"], metrics["prompts"]) == (7, 5) and metrics["accuracy"] == pytest.approx(5 / 7, abs=1e-4)
    table = pandas.read_csv(tmp_path / "out" / "rewards.csv")
    assert table["pairs"].tolist() == [files[0]] * 5 + [files[1]] * 2
    assert table["chosen_reward"][5] == table["rejected_reward"][0]  # an answer has one reward


def test_without_scikit_learn_the_remedy_is_named(monkeypatch, prepared, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        run_main("benchmarks/ngram_model", monkeypatch, "--data", prepared, "--output", tmp_path / "out")
    assert "pip install -r requirements-dev.txt" in ended.value.code and not (tmp_path / "out").exists()


# --- the variance of a gradient --------------------------------------------------------------------------------------


@pytest.fixture
def gradients():
    """Gradients g and h of 9 rollouts with 5 parameters."""
    generator = torch.Generator().manual_seed(0)
    g, h = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator)
    return g + 2 * h, h


def products(gradients):
    return gradient_variance.products((g.clone(), h.clone()) for g, h in zip(*gradients, strict=True))


def test_variance_is_the_trace_of_the_covariance(gradients):
    g, h = gradients
    for baseline in (0.0, 1.3, -2.0):
        expected = np.trace(np.cov((g - baseline * h).numpy().T))
        assert gradient_variance.variance(*products(gradients), baseline) == pytest.approx(expected, rel=1e-4)


def test_the_best_constant_is_the_lowest_point(gradients):
    rows, sums = products(gradients)
    best = gradient_variance.best_baseline(rows, sums)
    lowest = gradient_variance.variance(rows, sums, best)
    assert all(gradient_variance.variance(rows, sums, best + step) > lowest for step in (-0.1, 0.1))
    assert lowest < gradient_variance.variance(rows, sums, 0.0) / 2


def test_the_ratio_has_an_interval_around_it(gradients):
    rows, sums = products(gradients)
    result = gradient_variance.figures(rows, sums, {"none": 0.0, "mean": 2.0})
    assert result["none"]["ratio"] == 1 and result["none"]["squared_norm_ratio_interval"] == [1.0, 1.0]
    low, high = result["mean"]["squared_norm_ratio_interval"]
    share = gradient_variance.squared_norm(rows, 2.0).mean() / gradient_variance.squared_norm(rows, 0.0).mean()
    assert low < share < high


@pytest.fixture
def policy_run(tmp_path, tiny_model, other_reward_model, prepared):
    """A directory as `train_reinforce.py` leaves it, of a policy with other weights than the SFT model's."""
    directory = tmp_path / "policy"
    shutil.copytree(tiny_model, directory)
    policy = models.load_sft_model(tiny_model)
    with torch.no_grad():
        for each in policy.parameters():
            each.mul_(1.1)
    policy.save_pretrained(directory)
    flags = ["--model", tiny_model, "--reward_model", other_reward_model, "--data", prepared]
    flags += ["--completions_per_step", 3, "--micro_batch_size", 2, "--max_new_tokens", 6, "--max_prompt_length", 32]
    settings = vars(parse("train_reinforce", *flags, "--ema_decay", 0.5)) | {"base_model": "a directory"}
    (directory / "settings.json").write_text(json.dumps(settings))
    (directory / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n{"step": 2, "reward": 4.0}\n')
    return directory


def test_both_gradients_make_that_of_any_baseline(policy_run, monkeypatch):
    monkeypatch.setattr(gradient_variance, "computing_type", lambda device: None)  # in fp32, also where there is bf16
    options, state = gradient_variance.read_run(policy_run)
    assert reinforce.baseline_value("mean", state, 0.0, options.ema_decay) == 2.5
    assert reinforce.baseline_value("ema", state, 0.0, options.ema_decay) == pytest.approx((0.25 + 2.0) / 0.75)
    run = reinforce_speed.open_run(options, str(policy_run))
    judge = RewardModelEvaluator(options.reward_model, mixed_precision=True, normalize=True)
    prompts = sorted(run.prompts[:3], key=lambda prompt: len(prompt.ids))
    g, h = gradient_variance.gradients(run, judge, options, prompts, rollout=1)

    # At once, with the baseline in the loss.
    seeds = reinforce.random_seeds(len(prompts), options.seed, 0, 1)
    completions = sample(run.policy, run.tokenizer, prompts, run.sampling, None, seeds)
    scores = torch.tensor(judge.reward_function([prompt.messages for prompt in prompts], completions.texts))
    log_probs, others = (
        reinforce.log_probabilities(reinforce.token_distributions(model, completions, options.temperature), completions)
        for model in (run.policy, run.reference)
    )
    kl = reinforce.sequence_kl(log_probs, others, completions.mask)
    assert kl.abs().min() > 0.1
    rewards = scores - options.kl_coefficient * kl.detach() - options.missing_eos_penalty * ~completions.ended
    ((1.3 - rewards) * (log_probs * completions.mask).sum(dim=1)).mean().backward()
    expected = torch.cat([each.grad.flatten() for each in run.policy.parameters()])
    assert (g - 1.3 * h - expected).norm() < 1e-4 * expected.norm()


def test_a_run_becomes_a_table(policy_run, tmp_path, monkeypatch, capsys):
    flags = ["--rollouts", "3", "--output", tmp_path / "variance.json"]
    run_main("benchmarks/gradient_variance", monkeypatch, policy_run, *flags)
    result = json.loads((tmp_path / "variance.json").read_text())
    kinds = ["none", "mean", "ema", "best constant"]
    assert list(result) == ["rollouts", *kinds] and result["mean"]["baseline"] == 2.5
    assert min(result[kind]["variance"] for kind in kinds) == result["best constant"]["variance"]
    assert all(kind in capsys.readouterr().out for kind in kinds[:1])
    (policy_run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no finished run here"):
        gradient_variance.read_run(policy_run)


def test_rloo_is_evaluated_as_our_own_runs_are(
    policy_run, prepared, tiny_model, other_reward_model, tmp_path, monkeypatch, capsys
):
    """On the prompts in our order, and with the same answers of the SFT model."""
    asked, real = [], RLOOTrainer._generate
    monkeypatch.setattr(
        RLOOTrainer, "_generate", lambda self, prompts, *rest: (asked.extend(prompts), real(self, prompts, *rest))[1]
    )
    flags = ["--model", tiny_model, "--reward_model", other_reward_model, "--data", prepared, "--steps", 2]
    flags += ["--completions_per_step", 4, "--micro_batch_size", 2, "--max_new_tokens", 6, "--max_prompt_length", 32]
    flags += ["--evaluation_prompts", 3, "--completions_per_prompt", 2]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for script, output in (("benchmarks/rloo_trainer", theirs), ("train_reinforce", ours)):
        AcceleratorState._reset_state()
        run_main(script, monkeypatch, *flags, "--output_dir", output)
    results = [json.loads((each / "evaluation.json").read_text()) for each in (ours, theirs)]
    assert results[0].keys() == results[1].keys() and not list(theirs.glob("*.safetensors"))
    for name in ("reward_before", "length_before", "constraint_n", "constraint_pass_before"):
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-3)
    splits, _ = load_processed(prepared)
    tokenizer = models.load_tokenizer(tiny_model)
    prompts, _ = rollouts.read_prompts(splits, tokenizer, "data", 32, 2, 3, 42)
    batches = itertools.islice(rollouts.batches(prompts, 2, 42), 2)
    expected = [prompt.messages for batch in batches for prompt in batch for _ in range(2)]
    assert sorted(map(str, asked)) == sorted(map(str, expected))

    capsys.readouterr()
    run_main("benchmarks/compare_policies", monkeypatch, ours, theirs)
    printed = capsys.readouterr().out
    assert "| ours " in printed and "| theirs " in printed and "not alike" not in printed
    with pytest.raises(SystemExit):
        run_main("benchmarks/compare_policies", monkeypatch, tmp_path)
