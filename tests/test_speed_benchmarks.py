import os
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_pairs

from benchmarks import dataset_scaling, measure, reinforce_speed, training_speed
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


def test_every_text_of_the_scaling_benchmark_is_another_one(tmp_path):
    dataset_scaling.write_pairs(tmp_path / "pairs.jsonl", 200)
    texts = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert len(set(texts)) == 200
    words = np.array([len(line.split()) for line in texts])
    assert 110 < words.mean() < 170
