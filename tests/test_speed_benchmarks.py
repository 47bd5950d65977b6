import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pairs, run_main

import conversations
import load_smollm_model
import train_reinforce
import train_reward_model
from benchmarks import (
    dataset_scaling,
    measure,
    model_scaling,
    reinforce_speed,
    scoring_speed,
    training_speed,
    variants,
)
from load_helpsteer_dataset import open_source
from load_smollm_model import InputError


def sleeper(turns, path, name, seconds):
    for figures in turns:
        with open(path, "a") as file:
            file.write(f"{name} {os.getpid()}\n")
        time.sleep(seconds)
        figures["name"] = name


def refuser(turns):
    raise InputError("no data here")


def sudden(turns):
    next(turns)
    os._exit(3)


def test_contenders_take_turns_in_processes_of_their_own(tmp_path):
    path = str(tmp_path / "turns")
    work = {"quick": (sleeper, (path, "quick", 0.0)), "slow": (sleeper, (path, "slow", 0.3))}
    results = measure.take_turns(work, rounds=3)
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    assert [name for name, _ in lines] == ["quick", "slow"] * (measure.WARM_UP + 3)
    assert len({process for _, process in lines}) == 2 and str(os.getpid()) not in {process for _, process in lines}
    assert {name: [turn["name"] for turn in turns] for name, turns in results.items()} == {
        name: [name] * 3 for name in work
    }
    assert all(turn["seconds"] >= 0.3 and turn["peak_memory"] > 2**20 for turn in results["slow"])


def test_time_that_is_over_ends_the_rounds(tmp_path):
    results = measure.take_turns({"one": (sleeper, (str(tmp_path / "turns"), "one", 0.0))}, rounds=50, limit=0)
    assert len(results["one"]) == 1


@pytest.mark.parametrize("work, message", [(refuser, "no data here"), (sudden, "it ended before its time")])
def test_a_contender_that_fails_is_named(work, message):
    with pytest.raises(InputError, match=message):
        measure.take_turns({"it": (work, ())}, rounds=1)


def test_ratios_are_of_the_same_round():
    ours, theirs = [{"seconds": 2.0}, {"seconds": 4.0}], [{"seconds": 3.0}, {"seconds": 10.0}]
    assert measure.ratios(ours, theirs) == [1.5, 2.5]


def test_figures_of_a_training_by_hand():
    spent = ((2.0, 100), (4.0, 400), (100.0, 9000))
    turns = [{"seconds": seconds, "tokens": tokens, "peak_memory": seconds * 10} for seconds, tokens in spent]
    figures = training_speed.figures(turns, parameters=1000, rate=5.4e7)
    assert figures == {
        "seconds": 4.0, "pairs_per_second": 2.0, "tokens_per_second": 90.0, "rate_share": 0.01, "peak_memory": 1000.0
    }  # fmt: skip


def test_rates_of_reinforce_by_hand():
    turns = [
        {"tokens": 100, "seconds": 10.0, "sampling_seconds": 2.0, "peak_memory": 5},
        {"tokens": 60, "seconds": 4.0, "sampling_seconds": 1.0, "peak_memory": 9},
        {"tokens": 80, "seconds": 80.0, "sampling_seconds": 40.0, "peak_memory": 7},
    ]
    assert reinforce_speed.rates(turns) == {
        "tokens_per_second": 10.0, "sampled_tokens_per_second": 50.0, "trained_tokens_per_second": 12.5,
        "peak_memory": 9,
    }  # fmt: skip


def test_the_ratio_of_reinforce_is_of_the_same_round():
    ours = [{"tokens": 100, "seconds": seconds} for seconds in (1.0, 10.0, 4.0)]
    theirs = [{"tokens": tokens, "seconds": 10.0} for tokens in (500, 50, 100)]
    assert reinforce_speed.ratio(ours, theirs) == 2.0  # of 2, 2 and 2.5; the medians' is 2.5


def test_both_reinforce_contenders_take_turns(tiny_model, other_reward_model, processed, tmp_path, monkeypatch):
    monkeypatch.setattr(train_reinforce, "sample", train_reinforce.sample)  # `ours` replaces it
    settings = train_reinforce.Settings(
        model=tiny_model, reward_model=other_reward_model, data=processed, output_dir=str(tmp_path / "out"),
        completions_per_step=2, max_new_tokens=4, max_prompt_length=32,
    )  # fmt: skip
    for contender in (reinforce_speed.ours, reinforce_speed.plain):
        turns = [{}, {}]
        contender(iter(turns), settings)
        assert all(2 <= turn["tokens"] <= 8 and turn["sampling_seconds"] > 0 for turn in turns)


RATES = {"bf16_rate": 1e10, "fp16_rate": 1e9, "fp32_rate": 1e8}
OWN = {None: "fp32_rate", torch.float16: "fp16_rate", torch.bfloat16: "bf16_rate"}


def rates_divided_by(module, monkeypatch, path: Path, *arguments) -> dict[str, float]:
    """By which rate a benchmark divides, by contender; each takes 2 seconds for 100 tokens, with 1000 parameters."""
    turn = {"seconds": 2.0, "tokens": 100, "sampling_seconds": 1.0, "peak_memory": 1, "loss": 0.0, "scores": [1.0, 0.0]}
    monkeypatch.setattr(measure, "machine", lambda: {"device": "", "threads": 1, "torch": "", **RATES})
    monkeypatch.setattr(measure, "body_parameters", lambda model: 1000)
    monkeypatch.setattr(measure, "take_turns", lambda contenders, *_: {name: [turn] for name in contenders})
    run_main(module, monkeypatch, "--json", path, *arguments)
    operations = {reinforce_speed: reinforce_speed.OPERATIONS, scoring_speed: measure.FORWARD}
    summary = json.loads(path.read_text())["summary"]
    return {
        name: operations.get(module, measure.TRAINING) * each.get("parameters", 1000) * 50 / each["rate_share"]
        for name, each in summary.items()
    }


@pytest.mark.parametrize("dtype", OWN)
def test_shares_are_of_the_rate_of_the_type_computed_in(
    dtype, tiny_model, tiny_reward_model, tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setattr(measure, "autocast_dtype", lambda device: dtype)
    path, own = tmp_path / "figures.json", RATES[OWN[dtype]]
    bf16, fp32 = RATES["bf16_rate"], RATES["fp32_rate"]

    monkeypatch.setattr(training_speed, "prepare", lambda *_: None)
    monkeypatch.setattr(training_speed, "tokens_per_pair", lambda _: {"tokens": 2, "tokens_shared": 1})
    found = rates_divided_by(training_speed, monkeypatch, path, "--model", tiny_model)
    assert found == pytest.approx({"ours": own, "trl": bf16, "plain": fp32})

    monkeypatch.setattr(model_scaling, "make_model", lambda shape, source, directory: shape["hidden_size"])
    found = rates_divided_by(model_scaling, monkeypatch, path)
    assert found == pytest.approx(dict.fromkeys(model_scaling.SHAPES, own))

    one = conversations.encode_batch(tokenizer, ["Hello"], ["Good day."], 64)[0]
    monkeypatch.setattr(scoring_speed, "encode_batch", lambda *_: [one._replace(ids=[5] * 25)] * 4)
    found = rates_divided_by(scoring_speed, monkeypatch, path, "--model", tiny_reward_model, "--limit", 1)
    in_fp32 = dict.fromkeys(["fp32", "one by one", "pipeline"], fp32)
    assert found == pytest.approx({"bf16": own, **in_fp32, "together": own, "apart": own})

    monkeypatch.setattr(reinforce_speed, "load_sft_model", lambda path: None)
    found = rates_divided_by(reinforce_speed, monkeypatch, path)
    assert found == pytest.approx({"ours": bf16 if dtype is torch.bfloat16 else fp32, "plain": fp32})


@pytest.mark.parametrize("dtype", OWN)
def test_the_rate_of_the_own_type_is_measured_and_shown(dtype, monkeypatch):
    monkeypatch.setattr(measure, "autocast_dtype", lambda device: dtype)
    monkeypatch.setattr(measure, "matrix_rate", lambda dtype, device: RATES[f"{measure.DTYPES[dtype]}_rate"])
    machine = measure.machine()
    rate = measure.rate_in(measure.own_dtype(), machine)
    assert rate == RATES[OWN[dtype]]
    assert f"{OWN[dtype].removesuffix('_rate')} {rate / 1e9:,.0f} GFLOP/s" in measure.describe_machine(machine)


class Pipe:
    """What a contender is asked and reports; it is asked as often as it listens."""

    def __init__(self):
        self.reports = []

    def recv(self) -> bool:
        return True

    def send(self, figures: dict) -> None:
        self.reports.append(figures)


def parse(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["training_speed.py", *map(str, arguments)])
    return training_speed.parse_options(argparse.ArgumentParser())


def test_a_training_reports_as_many_rounds_as_are_accepted(tiny_model, tmp_path, write_jsonl, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training_speed.py"])
    monkeypatch.setattr(training_speed, "UPDATES", 6)
    monkeypatch.setattr(training_speed, "QUIET", [*training_speed.QUIET, "--bf16", "false"])
    training_speed.prepare([write_jsonl(make_pairs(20))], tiny_model, 64, tmp_path)
    pipe = Pipe()
    training_speed.run_ours(measure.turns(pipe), str(tmp_path), tiny_model)
    most = len(pipe.reports) - measure.WARM_UP
    assert parse(monkeypatch, "--rounds", most).rounds == most
    for rounds, message in ((most + 1, f"at most {most}"), (0, "must be above 0")):
        with pytest.raises(SystemExit):
            parse(monkeypatch, "--rounds", rounds)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", [training_speed, model_scaling])
def test_too_many_rounds_are_refused_before_the_work(module, monkeypatch):
    monkeypatch.setattr(training_speed, "prepare", lambda *_: pytest.fail("the work began"))
    with pytest.raises(SystemExit) as ended:
        run_main(module, monkeypatch, "--rounds", training_speed.UPDATES)
    assert ended.value.code == 2


def test_the_sample_is_the_default_also_where_the_hub_can_be_reached(monkeypatch):
    (default,) = parse(monkeypatch).pairs
    assert "sample" in open_source(default, None).origin


def test_our_losses_are_those_of_plain_trl(tiny_model, tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr("sys.argv", ["training_speed.py"])
    monkeypatch.setattr(training_speed, "UPDATES", 24)  # fewer would have no warm-up
    monkeypatch.setattr(training_speed, "QUIET", [*training_speed.QUIET, "--bf16", "false"])
    monkeypatch.setattr(training_speed.ours, "LEARNING_RATE", 3e-3)
    training_speed.prepare([str(write_jsonl(make_pairs(40)))], str(tiny_model), 64, tmp_path)
    ours, trl, plain = ([{} for _ in range(24)] for _ in range(3))
    unpadded = {"bf16": False}
    padded = {**unpadded, "gradient_checkpointing": False, "pad_to_multiple_of": 64}
    training_speed.run_ours(iter(ours), str(tmp_path), str(tiny_model))
    training_speed.run_theirs(iter(trl), str(tmp_path), str(tiny_model), unpadded)
    training_speed.run_theirs(iter(plain), str(tmp_path), str(tiny_model), padded)
    assert abs(ours[0]["loss"] - ours[-1]["loss"]) > 0.1
    for theirs in (trl, plain):
        assert training_speed.loss_difference(ours, theirs) < 1e-3
    assert training_speed.loss_difference(ours, ours[::-1]) > 0.1


def test_the_exponent_of_a_power_is_found():
    sizes = [1, 10, 100, 1000]
    assert dataset_scaling.exponent(sizes, [5.0, *(5 + 3 * size**1.5 for size in sizes[1:])]) == pytest.approx(1.5)


def test_a_larger_size_that_took_no_longer_has_no_exponent(monkeypatch, capsys):
    assert dataset_scaling.exponent([1, 10, 100], [5.0, 5.0, 50.0]) is None
    assert dataset_scaling.exponent([1, 10, 100], [5.0, 6.0, 4.0]) is None
    figures = {"seconds": 3.0, "peak_memory": 1, "peak_with_files": 1, "written": 1}
    monkeypatch.setattr(dataset_scaling, "measure_preparation", lambda *_: figures)
    monkeypatch.setattr(dataset_scaling, "write_pairs", lambda *_: None)
    run_main(dataset_scaling, monkeypatch, "--sizes", 2, 4, 8)
    assert "to the power of – beyond" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(4, 2), (2, 2), (0, 2)])
def test_sizes_that_do_not_ascend_are_refused(sizes, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(dataset_scaling, monkeypatch, "--sizes", *sizes)
    assert "error: " in capsys.readouterr().err


def test_every_text_of_the_scaling_benchmark_is_another_one(tmp_path):
    dataset_scaling.write_pairs(tmp_path / "pairs.jsonl", 200)
    texts = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert len(set(texts)) == 200
    words = np.array([len(line.split()) for line in texts])
    assert 110 < words.mean() < 170


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_variants_refuse_a_stream(variant, monkeypatch):
    for module, name in (
        (conversations, "PROMPT_SHARE"), (load_smollm_model, "HEAD_SCALE"), (train_reward_model, "PairTrainer"),
        (train_reward_model, "share_prefixes"), (train_reward_model, "load_processed"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is set back
    monkeypatch.setattr(train_reward_model, "main", lambda: pytest.fail("the training began"))
    with pytest.raises(SystemExit) as ended:
        run_main(variants, monkeypatch, variant, "--streaming", "sample", "--max_steps", "1")
    assert "--streaming" in ended.value.code and "\n" not in ended.value.code
