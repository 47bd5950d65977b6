"""The speed benchmarks: turns, figures by hand, and that every contender does what it says."""

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import contenders
import numpy as np
import pytest
import torch
from conftest import make_pairs

from benchmarks import dataset_scaling, measure, model_scaling, reinforce_speed, scoring_speed, training_speed
from reward_pipeline import reward_training, rollouts
from reward_pipeline.devices import autocast_dtype
from reward_pipeline.files import InputError
from reward_pipeline.sources import open_source


def run_benchmark(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, arguments)])
    module.main()


class Pipe:
    """What a contender is asked and reports; it is asked as often as it listens."""

    def __init__(self):
        self.reports = []

    def recv(self) -> bool:
        return True

    def send(self, figures) -> None:
        self.reports.append(figures)


# --- turns -----------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_in_processes_of_their_own_until_the_time_is_over(tmp_path, monkeypatch):
    path = str(tmp_path / "turns")
    work = {name: (contenders.sleeper, (path, name, seconds)) for name, seconds in (("quick", 0.0), ("slow", 0.3))}
    # A clock that is asked at the beginning and after every round.
    clock = SimpleNamespace(monotonic=itertools.count().__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr(measure, "time", clock)
    results = measure.take_turns(work, rounds=50, limit=measure.WARM_UP + 2)
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    assert [name for name, _ in lines] == ["quick", "slow"] * (measure.WARM_UP + 3)
    assert len({process for _, process in lines}) == 2 and str(os.getpid()) not in {process for _, process in lines}
    assert {name: [turn["name"] for turn in turns] for name, turns in results.items()} == {
        name: [name] * 3 for name in work
    }
    assert all(turn["seconds"] >= 0.3 and turn["peak_memory"] > 2**20 for turn in results["slow"])


def test_a_contender_that_dies_is_named():
    with pytest.raises(InputError, match="it ended before its time"):
        measure.take_turns({"it": (contenders.sudden, ())}, rounds=1)


def test_what_a_contender_can_not_work_with_is_said_by_the_benchmark(capsys):
    def refuse(turns):
        print("a line of its own")
        raise InputError("no data here")

    pipe = Pipe()
    measure.contend(refuse, pipe, ())
    measure.contend(lambda turns: measure.next_turn(iter([])), pipe, ())  # it is asked for no more turns
    assert not any(capsys.readouterr())
    (error,) = pipe.reports
    with pytest.raises(InputError, match="no data here"):
        measure.ask("it", SimpleNamespace(send=lambda _: None, recv=lambda: error))


# --- figures by hand -------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_round():
    ours, theirs = ([{"seconds": seconds} for seconds in each] for each in ((2.0, 4.0, 1.0), (3.0, 10.0, 1.0)))
    assert measure.faster_by(ours, theirs) == 1.5
    ours = [{"tokens": 100, "seconds": seconds} for seconds in (1.0, 10.0, 4.0)]
    theirs = [{"tokens": tokens, "seconds": 10.0} for tokens in (500, 50, 100)]
    assert measure.faster_by(ours, theirs) == 2.0  # of 2, 2 and 2.5; the medians' is 2.5


def test_figures_of_a_training():
    spent = ((2.0, 100), (4.0, 400), (100.0, 9000))
    turns = [{"seconds": seconds, "tokens": tokens, "peak_memory": seconds * 10} for seconds, tokens in spent]
    figures = training_speed.figures(turns, parameters=1000, rate=5.4e7)
    assert figures == {
        "seconds": 4.0, "pairs_per_second": 2.0, "tokens_per_second": 90.0, "rate_share": 0.01, "peak_memory": 1000.0
    }  # fmt: skip


def test_rates_of_reinforce():
    turns = [
        {"tokens": 100, "seconds": 10.0, "sampling_seconds": 2.0, "peak_memory": 5},
        {"tokens": 60, "seconds": 4.0, "sampling_seconds": 1.0, "peak_memory": 9},
        {"tokens": 80, "seconds": 80.0, "sampling_seconds": 40.0, "peak_memory": 7},
    ]
    assert reinforce_speed.rates(turns) == {
        "tokens_per_second": 10.0, "sampled_tokens_per_second": 50.0, "trained_tokens_per_second": 12.5,
        "peak_memory": 9,
    }  # fmt: skip


def test_the_exponent_of_a_power_is_found():
    sizes = [1, 10, 100, 1000]
    assert dataset_scaling.exponent(sizes, [5.0, *(5 + 3 * size**1.5 for size in sizes[1:])]) == pytest.approx(1.5)
    assert dataset_scaling.exponent([1, 10, 100], [5.0, 5.0, 50.0]) is None
    assert dataset_scaling.exponent([1, 10, 100], [5.0, 6.0, 4.0]) is None


# --- what the machine computes in ------------------------------------------------------------------------------------

RATES = {"bf16_rate": 1e10, "fp16_rate": 1e9, "fp32_rate": 1e8}
OWN = {None: "fp32_rate", torch.float16: "fp16_rate", torch.bfloat16: "bf16_rate"}
TURN = {"seconds": 2.0, "tokens": 100, "sampling_seconds": 1.0, "peak_memory": 1, "loss": 0.0, "scores": [1.0, 0.0]}


def without_work(monkeypatch) -> None:
    monkeypatch.setattr(training_speed, "prepare", lambda *_: None)
    monkeypatch.setattr(training_speed, "tokens_per_pair", lambda _: {"tokens": 2, "tokens_shared": 1})
    monkeypatch.setattr(model_scaling, "make_model", lambda shape, source, directory: shape["hidden_size"])
    monkeypatch.setattr(measure, "take_turns", lambda contenders, *_: {name: [TURN] for name in contenders})


def rates_divided_by(module, monkeypatch, path: Path, *arguments) -> dict[str, float]:
    """By which rate a benchmark divides, by contender; each takes 2 seconds for 100 tokens, with 1000 parameters."""
    run_benchmark(module, monkeypatch, "--json", path, *arguments)
    operations = {reinforce_speed: reinforce_speed.OPERATIONS, scoring_speed: measure.FORWARD}
    summary = json.loads(path.read_text())["summary"]
    return {
        name: operations.get(module, measure.TRAINING) * each.get("parameters", 1000) * 50 / each["rate_share"]
        for name, each in summary.items()
    }


@pytest.mark.parametrize("dtype", OWN)
def test_shares_are_of_the_rate_of_the_type_computed_in(dtype, tiny_model, tiny_reward_model, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "autocast_dtype", lambda device: dtype)
    monkeypatch.setattr(measure, "machine", lambda: {"device": "", "threads": 1, "torch": "", **RATES})
    monkeypatch.setattr(measure, "body_parameters", lambda model: 1000)
    without_work(monkeypatch)
    path, own = tmp_path / "figures.json", RATES[OWN[dtype]]
    bf16, fp32 = RATES["bf16_rate"], RATES["fp32_rate"]

    found = rates_divided_by(training_speed, monkeypatch, path, "--model", tiny_model)
    assert found == pytest.approx({"ours": own, "trl": own, "plain": fp32})

    found = rates_divided_by(model_scaling, monkeypatch, path)
    assert found == pytest.approx(dict.fromkeys(model_scaling.SHAPES, own))

    monkeypatch.setattr(scoring_speed, "token_ids", lambda *_: [[5] * 25] * 4)
    found = rates_divided_by(scoring_speed, monkeypatch, path, "--model", tiny_reward_model, "--limit", 1)
    in_fp32 = dict.fromkeys(["fp32", "one by one", "pipeline"], fp32)
    assert found == pytest.approx({"bf16": own, **in_fp32, "together": own, "apart": own})

    monkeypatch.setattr(reinforce_speed, "load_sft_model", lambda path: None)
    found = rates_divided_by(reinforce_speed, monkeypatch, path)
    assert found == pytest.approx({"ours": bf16 if dtype is torch.bfloat16 else fp32, "plain": fp32})


@pytest.mark.parametrize("dtype", OWN)
def test_only_what_the_machine_computes_in_is_measured_and_shown(dtype, monkeypatch):
    monkeypatch.setattr(measure, "autocast_dtype", lambda device: dtype)
    monkeypatch.setattr(measure, "matrix_rate", lambda dtype, device: RATES[f"{measure.DTYPES[dtype]}_rate"])
    machine = measure.machine()
    assert {name for name in machine if name.endswith("_rate")} == {"fp32_rate", OWN[dtype]}
    rate = measure.rate_in(measure.own_dtype(), machine)
    assert rate == RATES[OWN[dtype]]
    assert f"{OWN[dtype].removesuffix('_rate')} {rate / 1e9:,.0f} GFLOP/s" in measure.describe_machine(machine)


@pytest.mark.parametrize("capabilities, native", [({"avx2": True}, False), ({"avx2": True, "avx512_bf16": True}, True)])
def test_trl_is_compared_without_bf16_where_a_cpu_would_emulate_it(
    capabilities, native, tiny_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(measure, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert measure.autocast_dtype is autocast_dtype
    asked, taken, path = [], {}, tmp_path / "figures.json"
    monkeypatch.setattr(measure, "matrix_rate", lambda dtype, device: asked.append(dtype) or 1e9)
    without_work(monkeypatch)
    take_turns = measure.take_turns
    monkeypatch.setattr(measure, "take_turns", lambda work, *rest: taken.update(work) or take_turns(work, *rest))
    run_benchmark(training_speed, monkeypatch, "--model", tiny_model, "--json", path)
    assert taken["trl"][1][2] == ({} if native else {"bf16": False, "fp16": False})  # {} are TRL's defaults
    assert set(asked) == ({torch.bfloat16, torch.float32} if native else {torch.float32})
    printed, summary = capsys.readouterr().out, json.loads(path.read_text())["summary"]
    own = "bf16" if native else "fp32"
    assert {name: each["computed_in"] for name, each in summary.items()} == {"ours": own, "trl": own, "plain": "fp32"}
    assert ("TRL's default, bf16, would be emulated here: it is compared in fp32" in printed) == (not native)


# --- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [training_speed, model_scaling])
def test_too_many_rounds_are_refused_before_the_work(module, monkeypatch, capsys):
    monkeypatch.setattr(training_speed, "prepare", lambda *_: pytest.fail("the work began"))
    for rounds in (0, training_speed.UPDATES):
        with pytest.raises(SystemExit) as ended:
            run_benchmark(module, monkeypatch, "--rounds", rounds)
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"error: --rounds: must be a whole number, 1 to 62, not {rounds}\n"


def test_the_sample_is_the_default_also_where_the_hub_can_be_reached():
    (default,) = training_speed.parser("").parse_args([]).pairs
    assert "sample" in open_source(default, None).origin


def test_our_losses_are_those_of_plain_trl(tiny_model, tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr("sys.argv", ["training_speed.py"])
    monkeypatch.setattr(reward_training, "PairTrainer", reward_training.PairTrainer)  # `run_ours` replaces it
    monkeypatch.setattr(training_speed, "UPDATES", 20)  # fewer would have no warm-up
    monkeypatch.setattr(training_speed, "QUIET", [*training_speed.QUIET, "--bf16", "false"])
    monkeypatch.setitem(training_speed.TRAINING["TRL_DEFAULTS"], "learning_rate", 3e-3)
    training_speed.prepare([write_jsonl(make_pairs(40))], tiny_model, 64, tmp_path)
    tokens = training_speed.tokens_per_pair(tmp_path)
    assert 0.5 * tokens["tokens"] < tokens["tokens_shared"] < tokens["tokens"] < 128

    pipe, trl, plain = Pipe(), [{} for _ in range(20)], [{} for _ in range(20)]
    padded = {"bf16": False, "gradient_checkpointing": False, "pad_to_multiple_of": 64}
    for work, turns, options in (
        (training_speed.run_ours, measure.turns(pipe), ()),
        (training_speed.run_theirs, iter(trl), ({"bf16": False},)),
        (training_speed.run_theirs, iter(plain), (padded,)),
    ):
        with pytest.raises(measure.Over):
            work(turns, str(tmp_path), tiny_model, *options)

    # As many rounds as are accepted: the last update ends with the training, and not with a next one.
    ours, most = pipe.reports, len(pipe.reports) - measure.WARM_UP
    assert training_speed.parser("").parse_args(["--rounds", str(most)]).rounds == most == 18
    with pytest.raises(SystemExit):
        training_speed.parser("").parse_args(["--rounds", str(most + 1)])

    assert abs(ours[0]["loss"] - ours[-1]["loss"]) > 0.1
    for theirs in (trl, plain):
        assert training_speed.loss_difference(ours, theirs[:-1]) < 1e-3
        assert [turn["tokens"] for turn in ours] == [turn["tokens"] for turn in theirs[:-1]]
    assert training_speed.loss_difference(ours, ours[::-1]) > 0.1


def test_both_reinforce_contenders_take_turns(tiny_model, other_reward_model, prepared, tmp_path, monkeypatch):
    for name in ("sample", "batches"):
        monkeypatch.setattr(rollouts, name, getattr(rollouts, name))  # `ours` replaces them
    monkeypatch.setattr("sys.argv", ["reinforce_speed.py"])
    flags = ["--model", tiny_model, "--reward_model", other_reward_model, "--data", prepared]
    flags += ["--output_dir", tmp_path / "out", "--completions_per_step", 2, "--max_new_tokens", 4]
    flags = [str(each) for each in (*flags, "--max_prompt_length", 32)]
    turns = [{}, {}], [{}, {}]
    reinforce_speed.plain(iter(turns[1]), flags)
    with pytest.raises(measure.Over):
        reinforce_speed.ours(iter(turns[0]), flags)
    for each in (*turns[0], *turns[1]):
        assert 2 <= each["tokens"] <= 8 and each["sampling_seconds"] > 0
    # Both updates, and only these, are the script's own.
    log = [json.loads(line) for line in (tmp_path / "out" / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert [2 * entry["length"] for entry in log] == [turn["tokens"] for turn in turns[0]]


def test_all_ways_of_scoring_give_the_same_scores(tiny_reward_model):
    prompts, responses = ["Hello", "Count to 3.", "Hello"], ["Hi.", "1, 2, 3", "x " * 200]
    found = []
    for work, *options in (
        (scoring_speed.by_evaluator, False), (scoring_speed.one_by_one,), (scoring_speed.by_pipeline,),
    ):  # fmt: skip
        turn = {}
        work(iter([turn]), tiny_reward_model, prompts, responses, *options)
        found.append(turn["scores"])
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0] == pytest.approx(found[2], abs=1e-5)
    turn = {}
    scoring_speed.apart(iter([turn]), tiny_reward_model, prompts[0], responses)
    assert turn["scores"] == pytest.approx([found[0][0], turn["scores"][1], found[0][2]], abs=0.1)  # in bf16


# --- preparation -----------------------------------------------------------------------------------------------------


def test_a_larger_size_that_took_no_longer_has_no_exponent(monkeypatch, capsys):
    figures = {"seconds": 3.0, "peak_memory": 1, "peak_with_files": 1, "written": 1}
    monkeypatch.setattr(dataset_scaling, "measure_preparation", lambda *_: figures)
    monkeypatch.setattr(dataset_scaling, "write_pairs", lambda *_: None)
    monkeypatch.setattr(measure, "matrix_rate", lambda *_: 1e9)
    run_benchmark(dataset_scaling, monkeypatch, "--sizes", 2, 4, 8)
    assert "to the power of – beyond" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(4, 2), (2, 2), (0, 2)])
def test_sizes_that_do_not_ascend_are_refused(sizes, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_benchmark(dataset_scaling, monkeypatch, "--sizes", *sizes)
    assert "error: --sizes: " in capsys.readouterr().err


def test_every_text_of_the_scaling_benchmark_is_another_one(tmp_path):
    dataset_scaling.write_pairs(tmp_path / "pairs.jsonl", 200)
    texts = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert len(set(texts)) == 200
    words = np.array([len(line.split()) for line in texts])
    assert 110 < words.mean() < 170
