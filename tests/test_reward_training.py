"""The trainer: loss and metric by hand, NaN, the rhythm of a run, and the lines of its log."""

import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import make_pairs, parse
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers.integrations import TensorBoardCallback
from trl import RewardConfig

from reward_pipeline import reward_training
from reward_pipeline.conversations import encode
from reward_pipeline.files import InputError
from reward_pipeline.models import load_reward_model, load_tokenizer
from reward_pipeline.reward_training import duration, fit_rhythm, log_line, share_update, tokens_of
from reward_pipeline.trl_flags import REWARD_CONFIG, fields_given


def config_of(*arguments) -> RewardConfig:
    """What `train_reward_model.py` makes of these flags on a CPU without bf16."""
    given = vars(parse("train_reward_model", *arguments))
    fixed = {"use_cpu": True, "bf16": False, "max_length": None, "disable_dropout": False, "disable_tqdm": True}
    return RewardConfig(**fields_given(REWARD_CONFIG, given) | fixed | {"remove_unused_columns": False})


def make_trainer(tiny_model, tmp_path, pairs, kind=reward_training.PairTrainer, extra=None, **options):
    """A PairTrainer over texts, and its rows of ids; `extra` are further columns of the rows."""
    tokenizer = load_tokenizer(tiny_model)
    rows = [
        {f"{side}_ids": encode(tokenizer, pair["prompt"], pair[side], 64) for side in ("chosen", "rejected")} | more
        for pair, more in zip(pairs, extra or [{}] * len(pairs), strict=True)
    ]
    config = config_of("--output_dir", tmp_path)
    for name, value in {"save_strategy": "no", "load_best_model_at_end": False, **options}.items():
        setattr(config, name, value)
    model = load_reward_model(tiny_model, tokenizer.pad_token_id, config.seed)
    return kind(
        model=model, args=config, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, compute_metrics=reward_training.pair_accuracy,
    ), rows  # fmt: skip


@pytest.mark.parametrize("centering", [None, 0.01])
def test_loss_is_bradley_terry_with_centering(tiny_model, tmp_path, centering):
    trainer, rows = make_trainer(tiny_model, tmp_path, make_pairs(5), center_rewards_coefficient=centering)
    with torch.no_grad():
        trainer.model.score.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        chosen, rejected = (
            torch.cat([trainer.model(torch.tensor([row[f"{side}_ids"]])).logits[:, 0] for row in rows])
            for side in ("chosen", "rejected")
        )
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    by_hand = -sum(
        math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    )
    by_hand = by_hand / 5 + (centering or 0) * ((chosen + rejected) ** 2).mean().item()
    assert loss.item() == pytest.approx(by_hand, abs=1e-5)
    assert by_hand != pytest.approx(-logsigmoid(torch.zeros(1)).item(), abs=1e-3)


def test_evaluation_counts_every_pair_once_and_ties_half(tiny_model, tmp_path):
    pairs = make_pairs(10)
    pairs += [{**pair, "rejected": pair["chosen"]} for pair in pairs[:1]]  # a tie, alone in the last batch
    trainer, rows = make_trainer(tiny_model, tmp_path, pairs, per_device_eval_batch_size=5)
    with torch.no_grad():
        trainer.model.score.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
        margins = [
            trainer.model(torch.tensor([row["chosen_ids"]])).logits.item()
            - trainer.model(torch.tensor([row["rejected_ids"]])).logits.item()
            for row in rows
        ]
    expected = (sum(margin > 0 for margin in margins[:-1]) + 0.5) / 11
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected)


def test_the_form_term_is_a_part_of_the_loss_and_of_the_accuracy_alone(tiny_model, tmp_path):
    pairs = [
        {**pair, "rejected": pair["rejected"] + "!" * 9 * (number % 2)} for number, pair in enumerate(make_pairs(6))
    ]
    texts = [
        {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")} for pair in pairs
    ]
    trainer, rows = make_trainer(
        tiny_model,
        tmp_path,
        pairs,
        extra=[{**text, "place": "here"} for text in texts],
        center_rewards_coefficient=None,
    )
    weights = {"exclamations": 5.0, "log_words": -0.5}
    trainer.data_collator = reward_training.place_collator(trainer.processing_class.pad_token_id, None, weights)
    form = [
        5.0 * (math.log1p(pair["chosen"].count("!")) - math.log1p(pair["rejected"].count("!")))
        - 0.5 * (math.log1p(len(pair["chosen"].split())) - math.log1p(len(pair["rejected"].split())))
        for pair in pairs
    ]
    with torch.no_grad():
        trainer.model.score.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
        margins = [
            trainer.model(torch.tensor([row["chosen_ids"]])).logits.item()
            - trainer.model(torch.tensor([row["rejected_ids"]])).logits.item()
            for row in rows
        ]
        loss = trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(trainer.data_collator(rows)))
    sums = [one + other for one, other in zip(margins, form, strict=True)]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-each)) for each in sums) / 6, abs=1e-5)
    right = sum(each > 0 for each in sums) / 6
    assert right != sum(each > 0 for each in margins) / 6
    assert trainer._metrics["train"]["accuracy"] == [pytest.approx(right)]
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right)


def test_a_tiny_model_overfits_eight_pairs(tiny_model, tmp_path):
    trainer, _ = make_trainer(
        tiny_model, tmp_path, make_pairs(8), max_steps=40, learning_rate=3e-3, lr_scheduler_type="constant"
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] == 1.0
    assert after["eval_loss"] < before["eval_loss"] / 2


def test_a_gradient_that_is_not_finite_stops_before_the_update(tiny_model, tmp_path):
    trainer, _ = make_trainer(tiny_model, tmp_path, make_pairs(8), max_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.score.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match="update 1: the gradient is not finite; the last checkpoint is kept"):
        trainer.train()
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_errors_that_say_nothing_of_a_checkpoint_do_not_have_it_deleted():
    with (
        pytest.raises(InputError, match="some/checkpoint: damaged, or of another model"),
        reward_training.named_errors("some/checkpoint"),
    ):
        raise RuntimeError("size mismatch")
    for error in (torch.OutOfMemoryError, torch.distributed.DistNetworkError):
        with pytest.raises(error), reward_training.named_errors("here"):
            raise error("not enough")


@pytest.mark.parametrize(
    "processes, given, batch, accumulation",
    [
        (1, (4, 2), 4, 2),
        (2, (4, 2), 4, 1),
        (4, (4, 2), 2, 1),
        (8, (4, 2), 1, 1),
        (8, (4, 3), 4, 3),
        (3, (16, 2), 16, 2),
    ],
)
def test_the_pairs_of_an_update_are_shared(processes, given, batch, accumulation):
    config = SimpleNamespace(
        per_device_train_batch_size=given[0], gradient_accumulation_steps=given[1], world_size=processes
    )
    share_update(config, 4, 2)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (batch, accumulation)
    if given == (4, 2):
        config.world_size, config.per_device_train_batch_size, config.gradient_accumulation_steps = 3, 4, 2
        with pytest.raises(InputError, match="8 pairs of an update can not be divided among 3 processes"):
            share_update(config, 4, 2)


@pytest.mark.parametrize(
    "pairs, updates, logging, evaluation, saving",
    [(8000, 1000, 50, 100, 200), (1, 1, 1, 1, 1), (16, 2, 1, 1, 2), (240, 30, 3, 15, 30), (1200, 150, 15, 75, 150)],
)
def test_every_run_logs_evaluates_and_saves(tmp_path, pairs, updates, logging, evaluation, saving):
    arguments = [
        "--output_dir",
        str(tmp_path),
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "2",
    ]
    config = config_of(*arguments)
    assert fit_rhythm(config, pairs, 0.05) == updates
    assert (config.logging_steps, config.eval_steps, config.save_steps) == (logging, evaluation, saving)
    assert config.save_steps % config.eval_steps == 0
    assert config.warmup_steps == (0 if updates < 20 else 0.05)


def test_steps_may_be_shares_of_the_run(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--eval_steps", "0.2", "--save_steps", "0.4", "--logging_steps", "0.1"]
    arguments += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    config = config_of(*arguments)
    assert fit_rhythm(config, 800, 0.05) == 100
    assert (config.logging_steps, config.eval_steps, config.save_steps) == (10, 20, 40)


def test_the_log_is_lines_with_one_accuracy():
    train = {"loss": 0.61234, "accuracy": 0.75, "margin": 0.3, "learning_rate": 5e-5, "grad_norm": 1.5, "epoch": 0.1}
    assert log_line(train, 50, 700) == (
        "update 50/700  loss 0.6123  accuracy 0.750  margin +0.300  learning rate 5.00e-05  grad norm 1.50"
    )
    assert log_line({"eval_loss": 0.6, "eval_accuracy": 0.625}, 50, 700) == (
        "update 50/700  validation  loss 0.6000  accuracy 0.625"
    )
    assert log_line({"train_runtime": 3.0, "train_loss": 0.5}, 700, 700) == ""


def test_logs_lie_beside_the_checkpoints_and_end_with_the_final_figures(tmp_path):
    board = TensorBoardCallback.__new__(TensorBoardCallback)  # TensorBoard itself need not be installed
    board.logging_dir, handler = None, Mock(callbacks=[board])
    trainer = SimpleNamespace(callback_handler=handler, args="args", state="state", control="control")
    reward_training.keep_logs(trainer, tmp_path)
    assert Path(board.logging_dir).parent == tmp_path / "runs"
    reward_training.tell_trackers(trainer, {"n": 3, "accuracy": 0.5, "accuracy_interval": [0, 1], "form_wins": None})
    handler.on_log.assert_called_once_with("args", "state", "control", {"final/n": 3, "final/accuracy": 0.5})


def test_a_warm_up_that_counts_updates_stays_in_a_short_run(tmp_path):
    for usual, kept in ((3, 3), (0.05, 0)):
        config = config_of("--output_dir", str(tmp_path), "--warmup_steps", str(usual))
        fit_rhythm(config, 8, usual)
        assert config.warmup_steps == kept


def test_durations_in_words():
    assert [duration(seconds) for seconds in (12.4, 95, 3600, 7380)] == ["12 s", "2 min", "1 h 0 min", "2 h 3 min"]


def test_tokens_are_those_of_both_sides(monkeypatch):
    monkeypatch.setattr(reward_training, "READ_AT_ONCE", 2)
    pairs = Dataset.from_list([{"chosen_ids": [1] * n, "rejected_ids": [2] * (n + 1), "place": ""} for n in range(5)])
    assert tokens_of(pairs) == sum(2 * n + 1 for n in range(5))
    assert tokens_of(pairs.select([4, 0])) == 9 + 1


def test_the_expected_time_is_told_once_the_speed_is_known(monkeypatch, capsys):
    clock = {"now": 0.0}
    monkeypatch.setattr(reward_training.time, "perf_counter", lambda: clock["now"])
    watch = reward_training.Watch(lambda: False)
    state = SimpleNamespace(log_history=[], max_steps=10, global_step=0, is_world_process_zero=True)
    watch.on_train_begin(None, state, None)
    for step in range(1, 9):
        watch.on_step_begin(None, state, None)
        clock["now"] += 600 if step <= 3 else 60  # the first ones are slow
        state.global_step = step
        watch.on_step_end(None, state, None)
        clock["now"] += 5000  # an evaluation
    assert capsys.readouterr().out == "expected       4 min for the other 4 updates, evaluations not counted\n"
    assert watch.seconds == 3 * 600 + 5 * 60
