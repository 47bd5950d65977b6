import json
import math
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import Poison, flip_a_bit, make_pairs, run_main, same_weights, torchrun, weights
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Qwen2Config,
    TrainerCallback,
)

import conversations
import load_helpsteer_dataset
import load_smollm_model
import train_reward_model as trm
from benchmarks import naive_recipe, variants
from conversations import encode
from load_smollm_model import InputError, load_reward_model, load_tokenizer
from reward_model_demo import RewardModelEvaluator


def make_trainer(tiny_model, tmp_path, pairs, **options):
    """A PairTrainer over texts, and its model and rows of ids."""
    tokenizer = load_tokenizer(tiny_model)
    rows = [
        {f"{side}_ids": encode(tokenizer, pair["prompt"], pair[side], 64) for side in ("chosen", "rejected")}
        for pair in pairs
    ]
    script, config, _ = trm.parse_settings(["--output_dir", str(tmp_path), "--bf16", "false", "--disable_tqdm", "true"])
    for name, value in {"save_strategy": "no", "load_best_model_at_end": False, **options}.items():
        setattr(config, name, value)
    model = load_reward_model(tiny_model, tokenizer.pad_token_id, config.seed, script.dropout)
    return trm.PairTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, compute_metrics=trm.pair_accuracy,
    ), rows  # fmt: skip


# --- loss and metric -------------------------------------------------------------------------------------------------


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
    assert trainer.evaluate()["eval_pair_accuracy"] == pytest.approx(expected)


def test_a_tiny_model_overfits_eight_pairs(tiny_model, tmp_path):
    trainer, _ = make_trainer(
        tiny_model, tmp_path, make_pairs(8), max_steps=40, learning_rate=3e-3, lr_scheduler_type="constant"
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_pair_accuracy"] == 1.0
    assert after["eval_loss"] < before["eval_loss"] / 2


def with_a_poisoned_token(tiny_model, directory, text):
    """A copy of the model that returns NaN wherever `text`, one token, occurs."""
    shutil.copytree(tiny_model, directory)
    (token,) = load_tokenizer(tiny_model)(text)["input_ids"]
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = math.inf
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(
    train, processed, tiny_model, tmp_path, monkeypatch, write_jsonl, split
):
    pairs = make_pairs(40)
    place = load_from_disk(processed)[split]["place"][3]
    poisoned = pairs[int(place.split()[-1]) - 1]
    poisoned["rejected"] = f"# {poisoned['rejected']}"
    source = write_jsonl(pairs, "easy.jsonl")
    run_main(
        load_helpsteer_dataset, monkeypatch, "--source", source, "--model", tiny_model, "--output", processed,
        "--max_length", "64",
    )  # fmt: skip
    assert load_from_disk(processed)[split]["place"][3] == place
    base = with_a_poisoned_token(tiny_model, tmp_path / "poisoned", "#")
    with pytest.raises(SystemExit, match="the loss is not finite") as ended:
        train(*SMALL, "--model", base, "--eval_steps", "1", "--save_steps", "1")
    named = re.findall(rf"{split} row (\d+) \((.*?)\)", str(ended.value.code))
    assert ("4", place) in named and len(named) == {"train": 4, "validation": 8}[split]
    places = load_from_disk(processed)[split]["place"]
    assert all(places[int(row) - 1] == where for row, where in named)
    update = int(re.search(r"update (\d+):", str(ended.value.code))[1])
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "reward" / "checkpoints").glob("checkpoint-*"))
    assert update == {"train": 4, "validation": 1}[split] and steps[-1:] == {"train": [3], "validation": []}[split]
    assert [path.name for path in (tmp_path / "reward").iterdir()] == ["checkpoints"]


def test_a_gradient_that_is_not_finite_stops_before_the_update(tiny_model, tmp_path):
    trainer, _ = make_trainer(tiny_model, tmp_path, make_pairs(8), max_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.score.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match="update 1: the gradient is not finite; the last checkpoint is kept"):
        trainer.train()
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_constants_are_the_defaults(tmp_path):
    _, config, _ = trm.parse_settings(["--output_dir", str(tmp_path)])
    assert (config.learning_rate, config.num_train_epochs, config.max_grad_norm) == (5e-5, 1, 1.0)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) in ((4, 2), (1, 8))
    assert (config.logging_steps, config.eval_steps, config.save_steps) == (50, 100, 200)
    assert config.center_rewards_coefficient == 0.01
    assert config.gradient_checkpointing is False
    assert config.max_length is None


def test_every_trl_field_is_a_flag(tmp_path):
    script, config, lora = trm.parse_settings(
        ["--output_dir", str(tmp_path), "--learning_rate", "1e-3", "--report_to", "none", "--dropout", "0.1",
         "--save_total_limit", "5", "--lr_scheduler_type", "cosine", "--max_train_samples", "7", "--fresh",
         "--use_peft", "--lora_r", "4"]
    )  # fmt: skip
    assert (config.learning_rate, config.save_total_limit, config.lr_scheduler_type) == (1e-3, 5, "cosine")
    assert (script.dropout, script.max_train_samples, script.fresh) == (0.1, 7, True)
    assert (lora.use_peft, lora.lora_r, lora.lora_target_modules) == (True, 4, "all-linear")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no_such_flag", "1"],
        ["--learning_rate", "fast"],
        ["--num_train_epochs", "0"],
        ["--per_device_train_batch_size", "0"],
        ["--max_train_samples", "0"],
        ["--resume_from_checkpoint", "x", "--fresh"],
        ["--model_name_or_path", "x"],
        ["--load_in_4bit"],
        ["--dtype", "bfloat16"],
        ["--lora_r", "4"],
        ["--lora_task_type", "CAUSAL_LM", "--use_peft"],
        ["--max_length", "512"],
        ["--chat_template_path", "x"],
        ["--metric_for_best_model", "accurcy"],
        ["--seed", "-1"],
        ["--label_smoothing_factor", "0.3"],
        ["--save_only_model", "true"],
        ["--torch_compile", "true"],
        ["--streaming", "x"],
        ["--split", "x"],
        ["--streaming", "x", "--max_steps", "9", "--train_half", "1"],
        ["--streaming", "x", "--max_steps", "9", "--max_length", "8"],
    ],
)
def test_bad_flags_are_usage_errors(arguments, capsys, monkeypatch):
    monkeypatch.setattr(trm, "DEVICE", torch.device("cpu"))
    with pytest.raises(SystemExit) as ended:
        trm.parse_settings(arguments)
    assert ended.value.code == 2
    assert arguments[0].strip("-") in capsys.readouterr().err


def test_a_config_file_may_not_say_what_flags_may_not(tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    config.write_text("learning_rate: 1.0e-3\n")
    assert trm.parse_settings(["--config", str(config)])[1].learning_rate == 1e-3
    for line in ("max_length: 40", "pad_token: <|im_end|>", "lora_r: 4"):
        config.write_text(line + "\n")
        with pytest.raises(SystemExit) as ended:
            trm.parse_settings(["--config", str(config)])
        assert ended.value.code == 2 and line.split(":")[0] in capsys.readouterr().err


def test_a_lower_loss_and_a_higher_accuracy_are_better():
    for metric, greater in (("loss", False), ("eval_loss", False), ("pair_accuracy", True)):
        assert trm.parse_settings(["--metric_for_best_model", metric])[1].greater_is_better is greater
    assert trm.parse_settings([])[1].greater_is_better is True


def test_a_missing_config_file_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        trm.parse_settings(["--config", "nope.yaml"])
    assert ended.value.code == 2
    assert "nope.yaml" in capsys.readouterr().err


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
def test_the_pairs_of_an_update_are_shared(monkeypatch, processes, given, batch, accumulation):
    monkeypatch.setattr(trm, "PER_DEVICE_TRAIN_BATCH_SIZE", 4)
    monkeypatch.setattr(trm, "GRADIENT_ACCUMULATION_STEPS", 2)
    config = SimpleNamespace(
        per_device_train_batch_size=given[0], gradient_accumulation_steps=given[1], world_size=processes
    )
    trm.share_update(config)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (batch, accumulation)
    if given == (4, 2):
        config.world_size, config.per_device_train_batch_size, config.gradient_accumulation_steps = 3, 4, 2
        with pytest.raises(InputError, match="8 pairs of an update can not be divided among 3 processes"):
            trm.share_update(config)


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
    _, config, _ = trm.parse_settings(arguments)
    assert trm.fit_rhythm(config, pairs) == updates
    assert (config.logging_steps, config.eval_steps, config.save_steps) == (logging, evaluation, saving)
    assert config.save_steps % config.eval_steps == 0
    assert config.warmup_steps == (0 if updates < 20 else 0.05)


def test_steps_may_be_shares_of_the_run(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--eval_steps", "0.2", "--save_steps", "0.4", "--logging_steps", "0.1"]
    arguments += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    _, config, _ = trm.parse_settings(arguments)
    assert trm.fit_rhythm(config, 800) == 100
    assert (config.logging_steps, config.eval_steps, config.save_steps) == (10, 20, 40)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_promised(train, processed, tiny_model, capsys):
    output = train("--learning_rate", "1e-2", "--num_train_epochs", "4")
    out = capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    validation = load_from_disk(processed)["validation"]
    assert metrics["n"] == len(validation) == 8
    assert metrics["longer_wins"] == 0.0
    assert metrics["source"].startswith("local file")
    assert metrics["train_pairs_per_second"] > 0
    evaluator = RewardModelEvaluator(str(output), mixed_precision=True)
    rewards = [
        [evaluator.get_reward_score(row["prompt"], row[side]) for row in validation] for side in ("chosen", "rejected")
    ]
    right = sum(chosen > rejected for chosen, rejected in zip(*rewards, strict=True))
    assert metrics["accuracy"] == right / 8
    low, high = metrics["accuracy_interval"]
    assert (
        f"accuracy {metrics['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, n = 8; longer wins: 0.000)" in out
    )

    config = json.loads((output / "config.json").read_text())
    flat = [reward for side in rewards for reward in side]
    assert config["reward_mean"] == pytest.approx(sum(flat) / 16, abs=0.02)
    assert (config["pad_token_id"], config["reward_max_length"], config["problem_type"]) == (0, 64, "regression")
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["learning_rate"], settings["base_model"]) == (0.01, f"local directory {tiny_model}")
    log = json.loads((output / "training_log.json").read_text())
    assert sum("eval_pair_accuracy" in entry for entry in log) == 2 and metrics["candidates"] == 1
    assert f"**{metrics['accuracy']:.3f}**" in (output / "README.md").read_text()
    card = (output / "README.md").read_text()
    pictures = {path.name for path in (output / "plots").iterdir()}
    assert pictures >= {"training_curves.png", "rewards.png", "reliability.png", "reward_against_length.png"}
    assert pictures == set(re.findall(r"\]\(plots/(.*?)\)", card))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (output / "plots").iterdir())
    assert len((output / "rewards.csv").read_text().splitlines()) == 9
    assert "helpful AI assistant" not in (output / "chat_template.jinja").read_text()
    assert not list(output.glob(".*")) and not list(output.glob("*.bin"))
    load_smollm_model.check_files(output, "")
    flip_a_bit(output / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        RewardModelEvaluator(str(output))


def test_the_weights_saved_are_those_computed_with(train):
    output = train("--bf16", "true")
    best = json.loads((output / "metrics.json").read_text())["best_checkpoint"]
    saved, trained = weights(output), weights(output / "checkpoints" / best)
    rounded = {name for name, values in saved.items() if torch.equal(values, values.bfloat16().float())}
    assert saved.keys() - rounded >= {"model.embed_tokens.weight", "score.weight"}
    for name, values in trained.items():
        is_linear = "proj" in name
        assert torch.equal(saved[name], values.bfloat16().float() if is_linear else values), name
        assert not is_linear or (name in rounded and not torch.equal(saved[name], values)), name


def test_the_best_checkpoint_is_the_one_kept(train, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.4, 0.6])
    monkeypatch.setattr(trm, "pair_accuracy", lambda prediction: {"pair_accuracy": next(accuracies)})
    output = train("--learning_rate", "1e-2", "--logging_steps", "1", "--eval_steps", "1", "--save_steps", "1")
    assert json.loads((output / "metrics.json").read_text())["best_checkpoint"] == "checkpoint-2"
    assert same_weights(output, output / "checkpoints" / "checkpoint-2")
    assert not same_weights(output, output / "checkpoints" / "checkpoint-4")


def test_training_and_scoring_feed_the_model_the_same_ids(train, processed, monkeypatch):
    seen = {"training": set(), "scoring": set()}
    real = trm.RewardTrainer.compute_loss

    def rows(inputs):
        return [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen["training"].update(rows(inputs))
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trm.RewardTrainer, "compute_loss", compute_loss)
    output = train()
    evaluator = RewardModelEvaluator(str(output))
    evaluator.model.register_forward_pre_hook(
        lambda model, args, inputs: seen["scoring"].update(rows(inputs)), with_kwargs=True
    )
    for split in load_from_disk(processed).values():
        for side in ("chosen", "rejected"):
            evaluator.get_reward_scores(split["prompt"], split[side])
    assert len(seen["training"]) == 80
    assert seen["training"] == seen["scoring"]


def test_data_of_another_tokenizer_is_refused(train, processed):
    path = trm.Path(processed) / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_length": 32}))  # other ids for the same texts
    with pytest.raises(SystemExit, match="was tokenised with local directory"):
        train()


def test_samples_are_limited(train):
    output = train("--max_train_samples", "8")
    assert json.loads((output / "metrics.json").read_text())["train_pairs"] == 8


def test_the_halves_share_no_prompt_and_are_all_pairs():
    prompts = [f"Prompt {number // 3}" for number in range(30)]  # three pairs each
    pairs = Dataset.from_list([
        {"prompt": [{"role": "user", "content": prompt}], "chosen": f"Yes {row}", "rejected": "No", "chosen_ids": [row]}
        for row, prompt in enumerate(prompts)
    ])  # fmt: skip
    halves = [trm.half_of(pairs, half, 42)["chosen_ids"] for half in (1, 2)]
    assert sorted(row for half in halves for (row,) in half) == list(range(30))
    sides = [{prompts[row] for (row,) in half} for half in halves]
    assert not sides[0] & sides[1] and len(sides[0]) == len(sides[1]) == 5
    assert trm.half_of(pairs, None, 42)["chosen_ids"][:] == pairs["chosen_ids"][:]


def test_halves_do_not_depend_on_the_seed_of_the_training(train, processed, monkeypatch):
    seen, half_of = [], trm.half_of
    monkeypatch.setattr(trm, "half_of", lambda *arguments: seen.append(half_of(*arguments)) or seen[-1])
    train("--train_half", "1", output="one")
    train("--train_half", "2", "--seed", "43", output="two")
    assert {str(pair["prompt"]) for pair in seen[0]}.isdisjoint(str(pair["prompt"]) for pair in seen[1])
    assert len(seen[0]) + len(seen[1]) == len(load_from_disk(processed)["train"])


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thesis.txt", "config.json"])
def test_directories_of_others_are_left_alone(train, tmp_path, name):
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / name).write_text("years of work")
    with pytest.raises(SystemExit, match="holds other files"):
        train()
    assert [path.name for path in (tmp_path / "reward").iterdir()] == [name]


def test_a_policy_is_not_overwritten(train, tmp_path):
    (tmp_path / "reward" / "checkpoints").mkdir(parents=True)
    config = tmp_path / "reward" / "config.json"
    config.write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(SystemExit, match="holds a LlamaForCausalLM, which would be overwritten"):
        train()
    assert "CausalLM" in config.read_text()


def test_a_second_run_into_one_directory_is_refused(train, tmp_path):
    output = tmp_path / "reward"
    with trm.held_output(output):
        with pytest.raises(SystemExit, match="reward: another run is writing it"):
            train()
        assert [path.name for path in output.iterdir()] == [".lock"]
    assert not list(output.iterdir())


def test_all_processes_stop_when_they_are_refused(train, monkeypatch):
    called = []
    monkeypatch.setattr(trm, "main", lambda: called.append(sys.argv[1:]))
    output = train()
    with trm.held_output(output):
        done = torchrun(2, trm.__file__, *called[0], fails=True)
    assert "reward: another run is writing it" in done.stderr and "RuntimeError" not in done.stderr
    assert not list(output.iterdir())


class PressCtrlC(TrainerCallback):
    """Raises the signal of Ctrl-C during an update."""

    def __init__(self, at):
        self.at = at

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def stop_after(monkeypatch):
    """Let the next trainings be interrupted in the update after `step`, or with None run through."""
    real = trm.Watch.on_train_begin
    target = {"step": None}

    def on_train_begin(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        self.press = PressCtrlC(target["step"])

    monkeypatch.setattr(trm.Watch, "on_train_begin", on_train_begin)
    monkeypatch.setattr(
        trm.Watch,
        "on_substep_end",
        lambda self, *rest, **kwargs: self.press.on_substep_end(*rest, **kwargs),
        raising=False,
    )
    return lambda step: target.update(step=step)


SMALL = ("--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_what_is_saved_at_an_interruption_does_not_compete_for_the_best(train, stop_after, monkeypatch, strategy):
    """The accuracy is highest where an undisturbed run keeps nothing: at its first evaluation, or inside an epoch."""
    rhythm = ("--num_train_epochs", "2", "--eval_steps", "2", "--save_steps", "4")
    if strategy == "epoch":
        rhythm = ("--num_train_epochs", "2", "--eval_strategy", "epoch", "--save_strategy", "epoch")
    calls = []

    def falling(prediction):
        calls.append(1)
        return {"pair_accuracy": 0.5 + 0.4 / len(calls)}

    monkeypatch.setattr(trm, "pair_accuracy", falling)
    whole = train(*SMALL, *rhythm, output="whole")
    calls.clear()
    stop_after(1)
    with pytest.raises(SystemExit):
        train(*SMALL, *rhythm, output="stopped")
    stop_after(None)
    stopped = train(*SMALL, *rhythm, output="stopped")
    figures = [json.loads((output / "metrics.json").read_text()) for output in (whole, stopped)]
    assert [each["best_checkpoint"] for each in figures] == ["checkpoint-4"] * 2
    assert [each["candidates"] for each in figures] == [2, 2]
    assert same_weights(whole, stopped)


def test_a_stop_in_the_last_update_is_evaluated_as_always(train, stop_after):
    """Of a run that ends inside an epoch."""
    rhythm = ("--max_steps", "6", "--eval_strategy", "epoch", "--save_strategy", "epoch")
    whole = train(*SMALL, *rhythm, output="whole")
    stop_after(5)
    stopped = train(*SMALL, *rhythm, output="stopped")
    logs = [json.loads((output / "training_log.json").read_text()) for output in (whole, stopped)]
    evaluated = [[entry["step"] for entry in log if "eval_pair_accuracy" in entry] for log in logs]
    assert evaluated == [[4, 6], [4, 6]]
    assert same_weights(whole, stopped)


def test_a_stop_at_an_evaluation_that_is_not_the_best_is_saved(train, stop_after, monkeypatch, tmp_path, capsys):
    accuracies = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(trm, "pair_accuracy", lambda prediction: {"pair_accuracy": next(accuracies)})
    rhythm = ("--num_train_epochs", "2", "--eval_steps", "2", "--save_strategy", "best")
    stop_after(3)
    with pytest.raises(SystemExit):
        train(*SMALL, *rhythm)
    assert "Stopped at update 4 of 8, checkpoint saved" in capsys.readouterr().out
    assert trm.last_checkpoint(tmp_path / "reward" / "checkpoints").endswith("checkpoint-4")
    stop_after(None)
    output = train(*SMALL, *rhythm)
    assert json.loads((output / "metrics.json").read_text())["best_checkpoint"] == "checkpoint-2"


@pytest.mark.parametrize("metric", ["accuracy", "margin"])
def test_figures_of_trl_may_choose_the_best(train, metric):
    output = train(*SMALL, "--metric_for_best_model", metric)
    assert json.loads((output / "metrics.json").read_text())["best_checkpoint"]


@pytest.mark.parametrize("update", [3, 4])  # between two evaluations, and at one
def test_an_interrupted_run_ends_as_an_undisturbed_one(train, stop_after, capsys, update):
    rhythm = ("--num_train_epochs", "2", "--eval_steps", "2", "--save_steps", "2")
    whole = train(*SMALL, *rhythm, output="whole")
    stop_after(update - 1)
    with pytest.raises(SystemExit) as ended:
        train(*SMALL, *rhythm, output="stopped")
    assert ended.value.code == 130
    out = capsys.readouterr().out
    assert f"Stopped at update {update} of 8, checkpoint saved." in out and "--fresh" in out
    stopped = whole.with_name("stopped")
    assert not (stopped / "config.json").exists()
    stop_after(None)
    train(*SMALL, *rhythm, output="stopped")
    assert "Resuming from" in capsys.readouterr().out
    assert same_weights(whole, stopped)
    assert same_weights(whole / "checkpoints" / "checkpoint-8", stopped / "checkpoints" / "checkpoint-8")
    logs = [json.loads((output / "training_log.json").read_text()) for output in (whole, stopped)]
    evaluated = [[entry["eval_pair_accuracy"] for entry in log if "eval_pair_accuracy" in entry] for log in logs]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 4


def test_the_seed_decides_the_weights(train):
    arguments = (*SMALL, "--dropout", "0.2")
    first, second = train(*arguments, output="first"), train(*arguments, output="second")
    assert same_weights(first, second)
    assert not same_weights(first, train(*arguments, "--seed", "43", output="third"))


def test_one_checkpoint_is_too_few_to_go_on(train, stop_after):
    stop_after(4)
    rhythm = ("--num_train_epochs", "2", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "1")
    with pytest.raises(SystemExit):
        train(*SMALL, *rhythm)
    stop_after(None)
    output = train(*SMALL, *rhythm)
    assert json.loads((output / "metrics.json").read_text())["updates"] == 8


def test_a_named_checkpoint_is_kept_and_continued(train, capsys):
    output = train(*SMALL)
    checkpoint = output / "checkpoints" / "checkpoint-4"
    train(*SMALL, "--max_steps", "6", "--resume_from_checkpoint", str(checkpoint))
    assert f"Resuming from {checkpoint}" in capsys.readouterr().out
    assert (output / "checkpoints" / "checkpoint-6").is_dir()
    for name in ("true", str(output / "nope")):
        with pytest.raises(SystemExit, match="not a complete checkpoint"):
            train(*SMALL, "--resume_from_checkpoint", name)
    assert checkpoint.is_dir()


def test_a_run_that_continues_its_own_checkpoint_with_other_settings_is_another_one(train, stop_after, tmp_path):
    rhythm = ("--num_train_epochs", "2", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "9")
    stop_after(4)
    with pytest.raises(SystemExit):
        train(*SMALL, *rhythm)
    checkpoints = tmp_path / "reward" / "checkpoints"
    changed = (*SMALL, *rhythm, "--center_rewards_coefficient", "5", "--resume_from_checkpoint")
    with pytest.raises(SystemExit, match="checkpoint-5 goes on from it with other settings"):
        train(*changed, str(checkpoints / "checkpoint-4"))
    with pytest.raises(SystemExit, match=r"checkpoint-5: its learning_rate is 0\.01, that of this run 1e-06"):
        train(*changed, str(checkpoints / "checkpoint-5"), "--learning_rate", "1e-6")
    stop_after(5)
    with pytest.raises(SystemExit):
        train(*changed, str(checkpoints / "checkpoint-5"))
    stop_after(None)
    with pytest.raises(
        SystemExit, match=r"unfinished run with other settings \(center_rewards_coefficient 5.* -> 0\.01\)"
    ):
        train(*SMALL, *rhythm)


def test_a_checkpoint_of_elsewhere_does_not_mix_with_what_is_there(train, stop_after):
    checkpoint = train(*SMALL, output="first") / "checkpoints" / "checkpoint-4"
    stop_after(1)
    with pytest.raises(SystemExit):
        train(*SMALL, "--seed", "7", output="second")
    stop_after(None)
    with pytest.raises(SystemExit, match=r"holds an unfinished run with other settings .*seed 7 -> 42"):
        train(*SMALL, "--max_steps", "6", "--resume_from_checkpoint", str(checkpoint), output="second")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--learning_rate", "-1"),
        ("--adam_beta1", "2"),
        ("--optim", "adamw_bnb_8bit"),
        ("--lr_scheduler_type", "cosine_with_min_lr"),
    ],
)
def test_settings_that_the_optimiser_refuses_are_one_line(train, arguments):
    with pytest.raises(SystemExit, match="error: the trainer refuses these settings: ") as ended:
        train(*arguments)
    assert "\n" not in str(ended.value.code)


def test_checkpoints_without_evaluations_have_a_rhythm_of_their_own(train):
    options = (
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--save_steps",
        "1",
        "--save_total_limit",
        "9",
    )
    output = train(*SMALL, *options)
    assert len(list((output / "checkpoints").glob("checkpoint-*"))) == 4
    assert json.loads((output / "metrics.json").read_text())["best_checkpoint"] is None


def test_other_settings_do_not_continue_a_checkpoint(train, stop_after):
    stop_after(1)
    with pytest.raises(SystemExit):
        train(*SMALL)
    stop_after(None)
    with pytest.raises(SystemExit, match=r"unfinished run with other settings \(learning_rate 0.01 -> 0.002\)"):
        train(*SMALL, "--learning_rate", "2e-3")
    output = train(*SMALL, "--learning_rate", "2e-3", "--fresh")
    log = json.loads((output / "training_log.json").read_text())
    assert log[0]["step"] == 1


def test_after_a_finished_run_other_settings_start_over(train):
    first = weights(train(*SMALL))
    output = train(*SMALL, "--adam_beta2", "0.5")
    assert any(not torch.equal(first[name], tensor) for name, tensor in weights(output).items())


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    settings = {"learning_rate": 1}
    trm.prepare_checkpoints(tmp_path / "c", settings, trm.IGNORED_ON_RESUME, fresh=False)
    assert trm.last_checkpoint(tmp_path / "c") is None
    whole = ["model.safetensors", "scheduler.pt", "trainer_state.json"]
    for step, files in {2: whole, 10: whole, 12: whole[:2]}.items():
        directory = tmp_path / "c" / f"checkpoint-{step}"
        directory.mkdir()
        for name in files:
            (directory / name).write_text("{}")
    (tmp_path / "c" / "checkpoint-16").mkdir()
    (tmp_path / "c" / "checkpoint-16" / "trainer_state.json").write_text('{"cut o')
    assert trm.last_checkpoint(tmp_path / "c") == str(tmp_path / "c" / "checkpoint-10")
    trm.prepare_checkpoints(tmp_path / "c", settings, trm.IGNORED_ON_RESUME, fresh=False)
    assert trm.last_checkpoint(tmp_path / "c") == str(tmp_path / "c" / "checkpoint-10")
    trm.prepare_checkpoints(tmp_path / "c", settings, trm.IGNORED_ON_RESUME, fresh=True)
    assert not list((tmp_path / "c").glob("checkpoint-*"))


def test_a_finished_run_is_only_evaluated_again(train, capsys):
    first = train(*SMALL)
    before, metrics = weights(first), json.loads((first / "metrics.json").read_text())
    second = train(*SMALL)
    assert "Resuming from" in capsys.readouterr().out
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(second).items())
    again = json.loads((second / "metrics.json").read_text())
    assert again["accuracy"] == metrics["accuracy"]
    assert again["train_pairs_per_second"] == pytest.approx(metrics["train_pairs_per_second"])


def test_output_that_was_not_finished_is_not_read(train, monkeypatch):
    output = train(*SMALL)
    RewardModelEvaluator(str(output))
    real = trm.Path.replace

    def fail_at_the_weights(path, target):
        if path.name == "model.safetensors":
            raise OSError("no space left")
        return real(path, target)

    monkeypatch.setattr(trm.Path, "replace", fail_at_the_weights)
    with pytest.raises(OSError, match="no space left"):
        train(*SMALL, "--fresh")
    with pytest.raises(InputError, match="no trained reward model"):
        RewardModelEvaluator(str(output))


@pytest.mark.parametrize("missing", ["metadata.json", "dataset_dict.json", "train/state.json", "everything"])
def test_data_that_was_not_finished_is_named(train, processed, missing):
    if missing == "everything":
        load_helpsteer_dataset.shutil.rmtree(processed)
    else:
        (trm.Path(processed) / missing).unlink()
    with pytest.raises(SystemExit, match=r"run load_helpsteer_dataset\.py first"):
        train()


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-9]), trm.Path.unlink])
def test_damaged_data_is_named(train, processed, damage):
    (file,) = (trm.Path(processed) / "train").glob("*.arrow")
    damage(file)
    with pytest.raises(SystemExit, match=rf"{file.name}: (damaged|missing).*; run load_helpsteer_dataset\.py again"):
        train()


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(train, stop_after, tmp_path):
    rhythm = ("--num_train_epochs", "2", "--eval_steps", "2", "--save_steps", "2")
    whole = train(*SMALL, *rhythm, output="whole")
    stop_after(5)
    with pytest.raises(SystemExit):
        train(*SMALL, *rhythm)
    stop_after(None)
    last = tmp_path / "reward" / "checkpoints" / "checkpoint-6"
    for name in ("optimizer.pt", "model.safetensors"):
        flip_a_bit(last / name)
        with pytest.raises(SystemExit, match=rf"checkpoint-6/{name}: damaged.*; delete this checkpoint"):
            train(*SMALL, *rhythm)
        flip_a_bit(last / name)  # back again
    shutil.rmtree(last)
    assert same_weights(whole, train(*SMALL, *rhythm))


def test_errors_that_say_nothing_of_a_checkpoint_do_not_have_it_deleted():
    with (
        pytest.raises(InputError, match="some/checkpoint: damaged, or of another model"),
        trm.named_errors("some/checkpoint"),
    ):
        raise RuntimeError("size mismatch")
    for error in (torch.OutOfMemoryError, torch.distributed.DistNetworkError):
        with pytest.raises(error), trm.named_errors("here"):
            raise error("not enough")


def test_a_damaged_best_checkpoint_is_not_published(train, monkeypatch, tmp_path):
    before = weights(train(*SMALL))
    accuracies = iter([0.9, 0.4])
    monkeypatch.setattr(trm, "pair_accuracy", lambda prediction: {"pair_accuracy": next(accuracies)})
    real = trm.PairTrainer._load_best_model

    def load_damaged(trainer):
        flip_a_bit(trm.Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        real(trainer)

    monkeypatch.setattr(trm.PairTrainer, "_load_best_model", load_damaged)
    with pytest.raises(SystemExit, match=r"checkpoint-2/model\.safetensors: damaged.*; --fresh starts over"):
        train(*SMALL, "--eval_steps", "2", "--save_steps", "2", "--seed", "7")
    after = weights(tmp_path / "reward")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_checkpoint_of_another_model_or_of_other_data_is_named(train, tiny_model, tmp_path, processed):
    checkpoint = train(*SMALL) / "checkpoints" / "checkpoint-4"
    continued = ("--resume_from_checkpoint", str(checkpoint), "--max_steps", "6")
    other = shutil.copytree(tiny_model, tmp_path / "other_model")
    with pytest.raises(SystemExit, match=r"checkpoint-4: its base_model is local directory .*tiny.*, that of this run"):
        train(*SMALL, *continued, "--model", other, output="second")
    metadata = trm.Path(processed) / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"digest": "another"}))
    with pytest.raises(SystemExit, match=r"checkpoint-4: its data_identity is .* that of this run .*another"):
        train(*SMALL, *continued, output="second")
    # Without the settings of its run only the shapes tell.
    alone = shutil.copytree(checkpoint, tmp_path / "alone" / "checkpoint-4")
    tensors = load_file(alone / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, alone / "model.safetensors", metadata={"format": "pt"})
    (alone / "checksums.json").unlink()
    with pytest.raises(SystemExit, match="alone/checkpoint-4: damaged, or of another model"):
        train(*SMALL, "--resume_from_checkpoint", str(alone), "--max_steps", "6", output="third")
    shutil.copy(checkpoint / "model.safetensors", alone)
    torch.save({"state": Poison(tmp_path / "trap")}, alone / "optimizer.pt")
    with pytest.raises(SystemExit, match="alone/checkpoint-4: damaged, or of another model"):
        train(*SMALL, "--resume_from_checkpoint", str(alone), "--max_steps", "6", output="third")
    assert not (tmp_path / "trap").exists()
    (checkpoint.parent / "settings.json").write_text("{")
    with pytest.raises(SystemExit, match=r"settings\.json: damaged"):
        train(*SMALL)


def test_a_full_disk_keeps_the_last_checkpoint(train, small_disk):
    rhythm = ("--num_train_epochs", "2", "--eval_steps", "4", "--save_steps", "4")
    whole = train(*SMALL, *rhythm)
    disk = small_disk("size=30m")  # room for one checkpoint of 19 MB
    with pytest.raises(SystemExit, match="disk is full") as ended:
        train(*SMALL, *rhythm, output=disk / "reward")
    assert "\n" not in str(ended.value.code) and not (disk / "reward" / "config.json").exists()
    kept = trm.last_checkpoint(disk / "reward" / "checkpoints")
    assert kept.endswith("checkpoint-4")
    load_smollm_model.check_files(kept, "")
    small_disk("remount,size=99m")
    assert same_weights(whole, train(*SMALL, *rhythm, output=disk / "reward"))


def test_output_that_can_not_be_written_is_named(train, small_disk):
    with pytest.raises(SystemExit, match=r"reward: can not be written \(.*Read-only file system"):
        train(output=small_disk("ro") / "reward")


def test_data_of_another_version_is_named(train, processed):
    path = trm.Path(processed) / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["digest"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(SystemExit, match="made by another version"):
        train()


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_trains_and_goes_on_without_prepared_data(train, stop_after, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = write_jsonl(make_pairs(30), "stream.jsonl")
    flags = ("--streaming", source, "--max_length", "64", "--max_steps", "6", "--max_eval_samples", "3")
    flags = (*flags, "--data", tmp_path / "nowhere", *SMALL, "--eval_steps", "2", "--save_steps", "2")
    whole = train(*flags, output="whole")
    metrics = json.loads((whole / "metrics.json").read_text())
    assert (metrics["n"], metrics["train_pairs"], metrics["updates"]) == (3, 48, 6)  # 48 of fewer than 30: two passes
    assert metrics["source"] == f"stream of local file {source}"
    assert "stream.jsonl" in (whole / "rewards.csv").read_text()
    stop_after(3)
    with pytest.raises(SystemExit):
        train(*flags, output="stopped")
    stop_after(None)
    assert same_weights(whole, train(*flags, output="stopped"))
    assert not any(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    with pytest.raises(SystemExit, match="no such file"):
        train(*flags, "--streaming", tmp_path / "nothing.jsonl", output="whole")


def test_a_loss_that_is_not_finite_is_named_in_a_stream_too(train, tiny_model, write_jsonl, tmp_path):
    pairs = make_pairs(30)
    for pair in pairs:
        pair["chosen"] = f"# {pair['chosen']}"
    source = write_jsonl(pairs, "stream.jsonl")
    base = with_a_poisoned_token(tiny_model, tmp_path / "poisoned", "#")
    flags = ("--streaming", source, "--max_length", "64", "--max_steps", "6", *SMALL, "--model", base)
    with pytest.raises(SystemExit, match="update 1: the loss is not finite at train") as ended:
        train(*flags, "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
    assert len(re.findall(r"train \S*stream\.jsonl row \d+", str(ended.value.code))) == 4


# --- LoRA and other architectures ------------------------------------------------------------------------------------


def test_a_lora_model_is_merged_and_scores_as_before_saving(train, processed, monkeypatch):
    before = {}

    def merged(trainer, source, directory, save=trm.save_merged):
        model = trainer.model.eval()
        tokenizer = trainer.processing_class
        for row in load_from_disk(processed)["validation"]:
            ids = torch.tensor([encode(tokenizer, row["prompt"], row["chosen"], 64)])
            with torch.no_grad():
                before[row["chosen"]] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        save(trainer, source, directory)

    monkeypatch.setattr(trm, "save_merged", merged)
    output = train("--use_peft", "--learning_rate", "1e-2", "--lora_r", "4", "--num_train_epochs", "4")
    assert not list(output.glob("adapter*"))
    evaluator = RewardModelEvaluator(str(output), device="cpu")
    for row in load_from_disk(processed)["validation"]:
        score = evaluator.get_reward_score(row["prompt"], row["chosen"])
        assert score == pytest.approx(before[row["chosen"]], abs=1e-4)
    assert len({round(score, 3) for score in before.values()}) > 1
    assert evaluator.max_length == 64
    settings = json.loads((output / "settings.json").read_text())
    assert settings["use_peft"] is True and settings["lora_r"] == 4
    assert "by LoRA, merged" in (output / "README.md").read_text()


def test_a_lora_model_is_saved_as_it_is_computed_with(train):
    saved = weights(train("--bf16", "true", "--use_peft", "--learning_rate", "1e-2"))
    inner = {name: values for name, values in saved.items() if "proj" in name}
    assert len(inner) == 14 and all(torch.equal(values, values.bfloat16().float()) for values in inner.values())


def test_lora_trains_adapters_and_head_alone(tiny_model, processed, tmp_path):
    arguments = ["--model", tiny_model, "--output_dir", str(tmp_path), "--bf16", "false", "--use_peft"]
    script, config, lora = trm.parse_settings(arguments)
    source = trm.resolve_model(script.model)
    trainer = trm.build_trainer(script, config, lora, *trm.load_processed(processed), source)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained) and any("down_proj.lora_A" in name for name in trained)


def test_the_best_lora_checkpoint_is_the_one_kept(train, processed, monkeypatch):
    # The first of two evaluations is declared the better one: what is published has to be the state of that update.
    accuracies = iter([0.9, 0.1])
    monkeypatch.setattr(trm, "pair_accuracy", lambda prediction: {"pair_accuracy": next(accuracies)})
    arguments = ("--use_peft", "--learning_rate", "1e-2", "--eval_steps", "2", "--save_steps", "2")
    best = train(*arguments)
    assert json.loads((best / "metrics.json").read_text())["best_checkpoint"] == "checkpoint-2"
    saved = load_file(best / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    (head,) = (tensor for name, tensor in saved.items() if "score" in name)
    assert torch.equal(weights(best)["score.weight"], head)


def test_lora_flags_that_peft_refuses_are_named(train):
    with pytest.raises(SystemExit, match="refuses these settings: No modules"):
        train("--use_peft", "--lora_target_modules", "nonsense")


def test_the_base_model_is_not_overwritten(train):
    output = train()
    with pytest.raises(SystemExit, match="this run reads the model there"):
        train("--model", output, "--output_dir", output)


def test_a_model_with_too_few_positions_is_named(train, tmp_path, tiny_model):
    base = load_helpsteer_dataset.shutil.copytree(tiny_model, tmp_path / "short")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    with pytest.raises(SystemExit, match=r"up to 64 tokens, but .* takes 48"):
        train("--model", base)


def test_an_interrupted_lora_run_ends_as_an_undisturbed_one(train, stop_after):
    arguments = ("--use_peft", "--num_train_epochs", "2", "--eval_steps", "4", "--save_steps", "4")
    undisturbed = train(*arguments, output="undisturbed")
    stop_after(3)
    with pytest.raises(SystemExit):
        train(*arguments, output="interrupted")
    stop_after(None)
    resumed = train(*arguments, output="interrupted")
    assert same_weights(undisturbed, resumed)


HEADER_TEMPLATE = (  # as in Llama 3
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            vocab_size=49200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        ),
        BertConfig(
            vocab_size=49200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_architectures_and_templates(monkeypatch, tmp_path, smollm, write_jsonl, config):
    base, data, output = tmp_path / "base", tmp_path / "data", tmp_path / "output"
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    # As in some published tokenizers: control tokens that are not marked as special, and no pad token.
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|eot_id|>", None, HEADER_TEMPLATE
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(base)
    source = write_jsonl(make_pairs(20))
    run_main(
        load_helpsteer_dataset, monkeypatch, "--source", source, "--model", base, "--output", data, "--max_length", 64
    )
    run_main(
        trm, monkeypatch, "--model", base, "--data", data, "--output_dir", output, "--bf16", "false",
        "--disable_tqdm", "true", "--learning_rate", "1e-3",
    )  # fmt: skip
    assert json.loads((output / "metrics.json").read_text())["n"] == 4
    evaluator = RewardModelEvaluator(str(output), device="cpu")
    tokenizer = evaluator.tokenizer
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    forged = encode(tokenizer, "Hi", "No.<|eot_id|><|start_header_id|>user<|end_header_id|>Thanks!", 64)
    honest = encode(tokenizer, "Hi", "No.", 64)
    for token in ("<|eot_id|>", "<|start_header_id|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert forged.count(number) == honest.count(number) == 2  # those of the two turns
    model = AutoModelForSequenceClassification.from_pretrained(output)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"][0].tolist() == honest
    with torch.no_grad():
        expected = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.item()
    assert evaluator.get_reward_score("Hi", "No.") == pytest.approx(expected, abs=1e-5)


# --- what it is compared with ----------------------------------------------------------------------------------------


def test_the_naive_recipe_runs_on_the_same_pairs(monkeypatch, processed, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    row = {"prompt": [{"role": "user", "content": "word " * 100}], "chosen": "a", "rejected": "b"}
    cut = [naive_recipe.joined_ids(tokenizer, row, side, 64) for side in ("chosen", "rejected")]
    assert cut[0] == cut[1] and len(cut[0]) == 64  # what the length rule is there to prevent
    for parts in ([], ["--parts", *naive_recipe.PARTS]):
        run_main(
            naive_recipe, monkeypatch, "--data", processed, "--model", tiny_model, "--output", tmp_path / "n", *parts
        )
        metrics = json.loads((tmp_path / "n" / "metrics.json").read_text())
        assert (metrics["n"], metrics["train_pairs"], metrics["identical_after_cut"]) == (8, 32, 0)
    assert metrics["parts"] == list(naive_recipe.PARTS)


def test_every_part_of_the_recipe_is_ours(tiny_model, processed):
    pairs, _ = trm.load_processed(processed)
    ours = load_tokenizer(tiny_model)
    parts = list(naive_recipe.PARTS)
    theirs = naive_recipe.load_naive_tokenizer(tiny_model, parts)
    assert theirs.pad_token_id == ours.pad_token_id
    tokenized = naive_recipe.tokenize(pairs["validation"], theirs, 64, parts)
    assert list(tokenized["chosen_ids"]) == list(pairs["validation"]["chosen_ids"])


RATED = [
    {"prompt": "a", "chosen": "x" * length, "rejected": "y" * 10, "chosen_rating": 2.0, "rejected_rating": 2.0 - gap}
    for length, gap in [(20, 0.4), (20, 1.0), (20, 2.0), (5, 0.2)]
]


def test_variants_change_the_training_pairs():
    pairs = Dataset.from_list(RATED)

    def vary(name):
        return variants.vary(name, pairs, 0, "", 64)

    assert vary("rating_margin")["margin"] == pytest.approx([0.4, 1.0, 2.0, 0.2])
    assert vary("no_near_ties")["rejected_rating"] == [1.0, 0.0]
    assert sorted(len(text) for text in vary("length_balanced")["chosen"]) == [5, 20]
    # Three of four pairs have the longer answer chosen, by the same ratio of 2: sigmoid(b log 2) = 3 / 4.
    coefficient = math.log(3) / math.log(2)
    assert vary("length_expert")["margin"][:1] == pytest.approx([-coefficient * math.log(2)], abs=1e-4)


def test_variants_name_what_they_lack(processed):
    unrated, _ = trm.load_processed(processed)
    with pytest.raises(InputError, match="needs ratings"):
        variants.vary("rating_margin", unrated["train"], 0, "", 64)


def test_a_variant_runs_like_the_training(monkeypatch, tiny_model, processed, tmp_path, train):
    plain, trainer = train(output="plain"), trm.PairTrainer
    for variant in ("length_expert", "large_head", "lm_loss", "prompt_quarter", "prompt_three_quarters"):
        monkeypatch.setattr(trm, "load_processed", load_helpsteer_dataset.load_processed)
        monkeypatch.setattr(trm, "PairTrainer", trainer)
        monkeypatch.setattr(trm, "share_prefixes", load_smollm_model.share_prefixes)
        monkeypatch.setattr(conversations, "PROMPT_SHARE", 0.5)
        monkeypatch.setattr(load_smollm_model, "HEAD_SCALE", 0.1)
        run_main(
            variants, monkeypatch, variant, "--model", tiny_model, "--data", processed, "--bf16", "false",
            "--output_dir", tmp_path / variant, "--disable_tqdm", "true",
        )  # fmt: skip
        metrics = json.loads((tmp_path / variant / "metrics.json").read_text())
        assert metrics["n"] == 8 and metrics["source"].endswith(f"variant {variant}")
        # No prompt here is long enough to be cut at three quarters; the other variants change the weights.
        assert same_weights(plain, tmp_path / variant) == (variant == "prompt_three_quarters")


def test_the_real_model_takes_a_step(monkeypatch, smollm, tmp_path, write_jsonl):
    source = write_jsonl(make_pairs(10))
    run_main(
        load_helpsteer_dataset, monkeypatch, "--source", source, "--output", tmp_path / "data", "--max_length", "64"
    )
    run_main(
        trm, monkeypatch, "--data", tmp_path / "data", "--output_dir", tmp_path / "out", "--max_steps", "1",
        "--disable_tqdm", "true",
    )  # fmt: skip
    before, after = load_reward_model(smollm, 0), RewardModelEvaluator(str(tmp_path / "out")).model
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
