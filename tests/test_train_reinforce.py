"""The REINFORCE script on a toy: a vocabulary of fourteen words, a model of a few thousand weights."""

import json
import math
import random
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, LoggerType
from conftest import (
    ROOT,
    die_at_update,
    die_while_saving,
    in_processes,
    killed,
    names_of,
    parse,
    run_main,
    same_weights,
    weights,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reward_pipeline import devices, evaluator, reinforce, rollouts, sampling
from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.models import REWARD_FORMAT, load_reward_model
from reward_pipeline.runs import held_output

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["user", "assistant", "system", *"abcdefgh"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] + ' <|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant' }}{% endif %}"
)


def save_judge(directory: Path, base: Path, tokenizer, seed: int, **config) -> None:
    model = load_reward_model(str(base), 0, seed)
    with torch.no_grad():
        model.score.weight.normal_()
    model.config.update({"reward_max_length": 64, "reward_format": REWARD_FORMAT, **config})
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A directory with `base`, two judges, and `data`: 56 training and 14 validation prompts or so."""
    root = tmp_path_factory.mktemp("toy")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    save_judge(root / "judge", root / "base", tokenizer, 1, reward_mean=0.1, reward_std=0.5)
    save_judge(root / "second", root / "base", tokenizer, 2, reward_mean=0.0, reward_std=1.0)
    letters = random.Random(0)
    prompts = {" ".join(letters.choices("abcdefgh", k=letters.randint(2, 6))): None for _ in range(72)}
    pairs = [{"prompt": prompt, "chosen": f"a {prompt}", "rejected": f"b b {prompt}"} for prompt in prompts]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(
            "load_helpsteer_dataset", monkeypatch, "--source", root / "pairs.jsonl", "--model", root / "base",
            "--output", root / "data", "--max_length", "64",
        )  # fmt: skip
    return root


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Everything in fp32, so that batches of other sizes give the same, and by one thread, as children are forked."""
    AcceleratorState._reset_state()  # of trainings in other files, in another number format
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (devices, evaluator):
            monkeypatch.setattr(module, "autocast_dtype", lambda device: None)
        yield
    torch.set_num_threads(threads)


def flags(toy: Path, output: Path, *more) -> list[str]:
    flags = [
        "--model", toy / "base", "--reward_model", toy / "judge", "--second_judge", toy / "second", "--data",
        toy / "data", "--output_dir", output, "--steps", 4, "--completions_per_step", 6, "--micro_batch_size", 4,
        "--max_new_tokens", 5, "--max_prompt_length", 16, "--evaluation_prompts", 7, "--learning_rate", 1e-2,
        "--warmup_steps", 0, "--save_steps", 2, *more,
    ]  # fmt: skip
    return [*map(str, flags)]


@pytest.fixture
def run(monkeypatch, tmp_path, toy):
    """Call the script on the toy; returns the output directory."""

    def call(*more, output="policy"):
        run_main("train_reinforce", monkeypatch, *flags(toy, tmp_path / output, *more))
        return tmp_path / output

    return call


@pytest.fixture
def refused(run, capsys):
    """Call the script, which has to end with one line; returns what it says."""

    def call(*more, output="policy") -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(*more, output=output)
        message = capsys.readouterr().err if ended.value.code == 1 else str(ended.value.code)
        assert message.startswith("error: ") and "\n" not in message.strip()
        return message

    return call


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> Path:
    """What an undisturbed run leaves; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "policy"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main("train_reinforce", monkeypatch, *flags(toy, output))
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "policy")


def timeless(output: Path) -> list[dict]:
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_second")} for entry in entries]


def same_results(one: Path, other: Path) -> bool:
    """Whether two runs ended alike, bit by bit."""
    evaluations = [(output / "evaluation.json").read_text() for output in (one, other)]
    return same_weights(one, other) and timeless(one) == timeless(other) and len(set(evaluations)) == 1


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_evaluation_is_of_the_answers_that_are_saved(finished, toy):
    results = json.loads((finished / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert results["n"] == len(rows) == 7 and results["kl"] != 0
    for name, prefix, judge in (("reward", "", "judge"), ("second_judge", "second_judge_", "second")):
        scorer = RewardModelEvaluator(str(toy / judge), device="cpu", normalize=True)
        for when in ("before", "after"):
            scores = scorer.reward_function([row["prompt"] for row in rows], [row[when] for row in rows])
            assert scores == pytest.approx([row[f"{name}_{when}"] for row in rows], abs=1e-4)
            assert np.mean(scores) == pytest.approx(results[f"{prefix}reward_{when}"], abs=1e-4)
        low, high = results[f"{prefix}reward_gain_interval"]
        assert low <= results[f"{prefix}reward_gain"] <= high
    for name in ("plots/training.png", "plots/before_and_after.png", "samples.md"):
        assert (finished / name).stat().st_size > 0
    assert f"{results['win_rate']:.3f}" in (finished / "README.md").read_text()
    assert not list(finished.glob(".*"))


def test_the_policy_is_a_plain_model_that_has_moved(finished, toy):
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert policy.generate(**asked, max_new_tokens=3).shape[1] <= asked["input_ids"].shape[1] + 3
    assert not torch.equal(policy.lm_head.weight, weights(toy / "base")["lm_head.weight"])
    assert policy.generation_config.top_k != 0  # of the sampling, not of the model


def test_the_log_is_that_of_the_algorithm(finished):
    log = timeless(finished)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert abs(log[0]["kl"]) < 1e-5 and abs(log[1]["kl"]) > 1e-4  # the policy begins as the reference, and leaves it
    for entry in log:
        assert entry["reward"] == pytest.approx(
            entry["score"] - 0.05 * entry["kl"] - 1.0 * (1 - entry["ended"]), abs=1e-5
        )
        assert entry["gradient_norm"] > 0 and 0 < entry["entropy"] < math.log(14) and 1 <= entry["length"] <= 5
        assert entry["learning_rate"] == 1e-2 and set(entry["sample"]) == {"prompt", "completion", "score"}
    assert any(0 < entry["ended"] < 1 for entry in log)
    # b is the mean of the rewards before; the first step is its own.
    rewards = [entry["reward"] for entry in log]
    expected = [rewards[0], *(np.mean(rewards[:step]) for step in (1, 2, 3))]
    assert [entry["baseline"] for entry in log] == pytest.approx(expected, abs=1e-5)


def test_every_constant_is_a_saved_setting(finished):
    settings = json.loads((finished / "settings.json").read_text())
    names = names_of("train_reinforce")
    constants = {name.lower() for name in names if name.isupper()}
    aside = {"baselines", "accelerate_trackers", "checkpoints_kept", "ignored", "ignored_on_resume"}
    assert constants - aside - {"on_mps", "min_max_length", "type_checking"} <= settings.keys()
    assert names["IGNORED_ON_RESUME"] <= settings.keys()
    assert settings["ema_decay"] == 0.9 and settings["reward_identity"] != settings["second_judge_identity"]


def test_micro_batches_add_up_to_one_batch(run, finished):
    one = timeless(run("--micro_batch_size", 10**30, "--steps", 2))
    for entry, parts in zip(one, timeless(finished), strict=False):
        del entry["sample"], parts["sample"]
        assert entry == pytest.approx(parts, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("baseline", "dtype"), [("mean", None), ("ema", torch.bfloat16)])
def test_a_bandit_climbs_to_near_its_maximum(run, monkeypatch, baseline, dtype):
    """Reward: how often the word c stands among 5 words."""
    monkeypatch.setattr(devices, "autocast_dtype", lambda device: dtype)
    monkeypatch.setattr(
        RewardModelEvaluator, "reward_function", lambda self, prompts, texts, **_: [text.count("c") for text in texts]
    )
    output = run(
        "--completions_per_step", 32, "--micro_batch_size", 32, "--steps", 40, "--save_steps", 100, "--baseline",
        baseline, "--kl_coefficient", 0, "--missing_eos_penalty", 0, "--learning_rate", 3e-2,
    )  # fmt: skip
    scores = [entry["score"] for entry in timeless(output)]
    assert scores[0] < 1.5 and np.mean(scores[-5:]) > 4.5


def test_several_completions_a_prompt_and_the_mean_of_the_others(run, monkeypatch):
    """Their prompts are as many fewer; the advantages of the completions of a prompt add up to 0."""
    seen = []
    real = reinforce.completion_figures

    def recorded(part, scores, rewards, advantages, *rest):
        seen.append((part.ids[:, : -part.mask.shape[1]].tolist(), rewards, advantages))
        return real(part, scores, rewards, advantages, *rest)

    monkeypatch.setattr(reinforce, "completion_figures", recorded)
    more = ("--completions_per_prompt", 3, "--baseline", "leave_one_out", "--steps", 2)
    log = timeless(run("--micro_batch_size", 4, *more))  # micro-batches of one prompt, since two do not fit
    assert [len(prompts) for prompts, _, _ in seen] == [3] * 4
    for prompts, rewards, advantages in seen:
        assert prompts[0] == prompts[1] == prompts[2] and advantages.sum().abs() < 1e-4
        assert advantages[0].item() == pytest.approx((rewards[0] - (rewards[1] + rewards[2]) / 2).item(), abs=1e-5)
    assert log[0]["baseline"] == pytest.approx(log[0]["reward"], abs=1e-5)


def test_a_function_is_added_to_the_judge_by_its_weight(run, toy, tmp_path, monkeypatch):
    (tmp_path / "counts.py").write_text(
        "def words(prompts, completions, **_):\n    return [len(c[0]['content'].split()) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    output = run("--reward_function", "counts:words", "--reward_function_weight", 0.5, "--steps", 1)
    entry = timeless(output)[0]
    assert entry["score"] == pytest.approx(entry["judge"] + 0.5 * entry["function"], abs=1e-5)
    assert 0 < entry["function"] <= entry["length"]
    results = json.loads((output / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    words = np.mean([len(row["after"].split()) for row in rows])
    assert results["function_reward_after"] == pytest.approx(words, abs=1e-3)


def test_a_function_alone_needs_no_judge(run, refused):
    more = ("--reward_model", "none", "--steps", 1, "--constrained_share", 1, "--max_prompt_length", 40)
    output = run("--reward_function", "reward_pipeline.constraints:kept", *more)
    results, entry = json.loads((output / "evaluation.json").read_text()), timeless(output)[0]
    assert results["reward_gain"] is None and results["second_judge_reward_gain"] is not None
    assert "judge" not in entry and entry["score"] == entry["function"]
    # It has nothing to say of prompts without a constraint.
    assert results["function_reward_gain"] is None and results["constraint_pass_gain"] is not None
    assert (output / "samples.md").exists() and (output / "plots" / "drift.png").stat().st_size > 0


def test_a_bounded_reward_is_against_one_answer_of_the_sft_model(run, toy, monkeypatch):
    """At first policy and SFT model are the same, so the rewards lie on both sides of one half."""
    drawn = []
    real = sampling.sample

    def recorded(policy, **options):
        completions = real(policy, **options)
        drawn.append((options["prompts"], completions.texts))
        return completions

    monkeypatch.setattr(sampling, "sample", recorded)
    output = run("--bounded_reward", "true", "--completions_per_prompt", 2, "--steps", 1)
    entry = timeless(output)[0]
    (prompts, texts), (asked, sft) = drawn[:2]
    assert len(prompts) == 6 and len(asked) == 3 and [each for each in asked for _ in range(2)] == prompts
    judge = RewardModelEvaluator(str(toy / "judge"), device="cpu")
    ours, theirs = (
        np.array(judge.reward_function([each.messages for each in of], answers))
        for of, answers in ((prompts, texts), (asked, sft))
    )
    expected = 1 / (1 + np.exp(-(ours - np.repeat(theirs, 2))))
    assert entry["score"] == pytest.approx(expected.mean(), abs=1e-4) and 0 < entry["score"] < 1


# --- stopped, killed, made longer ------------------------------------------------------------------------------------


def interrupt(monkeypatch, number: int, kind: signal.Signals) -> None:
    """Send a signal to this process in the so many-th update from now."""
    real, updates = reinforce.updated_baseline, iter(range(1, 100))

    def interrupted(*rest):
        if next(updates) == number:
            signal.raise_signal(kind)
        return real(*rest)

    monkeypatch.setattr(reinforce, "updated_baseline", interrupted)


def test_a_stopped_run_ends_as_an_undisturbed_one(run, finished, toy, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        interrupt(patch, 1, signal.SIGTERM)
        run()
    assert ended.value.code == 130 and "Stopped at update 1 of 4" in capsys.readouterr().out
    output = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    assert not (output / "config.json").exists()
    before, after = weights(toy / "base"), weights(output / "checkpoints" / "checkpoint-1")
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved <= 1e-2 * 1.001  # the first step of Adam is at most the learning rate

    with (output / "checkpoints" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "half a li')  # as if killed while writing
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        interrupt(patch, 3, signal.SIGINT)  # in the last update
        run()
    printed = capsys.readouterr().out
    assert ended.value.code == 130 and "Resuming from" in printed and "Stopped at update 4 of 4" in printed
    assert not (output / "config.json").exists()

    monkeypatch.setattr(reinforce, "reinforce_loss", None)  # no update is left
    assert same_results(run(), finished)


def test_a_finished_run_is_evaluated_again_only_where_the_evaluation_is_another(
    run, refused, copied, finished, toy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reinforce, "reinforce_loss", None)  # no update is left
    judge = shutil.copytree(toy / "judge", tmp_path / "moved")
    run("--reward_model", judge)
    assert "holds the result of this run" in capsys.readouterr().out
    assert same_results(copied, finished)
    assert "has the weights of --reward_model" in refused("--second_judge", judge)
    run("--evaluation_prompts", 5)
    assert "5 unseen prompts" in capsys.readouterr().out
    before, after = weights(finished), weights(copied)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert "finished run with other settings (evaluation_prompts 5 -> 7, kl_coefficient" in refused(
        "--kl_coefficient", 1
    )


def test_more_steps_make_a_finished_run_longer(run, refused, finished, monkeypatch):
    output = run("--steps", 2)
    assert len(timeless(output)) == 2

    def killed(*rest, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rollouts, "answers_of", killed)
        run()
    # Stopped in its evaluation, the longer run is not finished, and other settings continue neither.
    message = refused("--kl_coefficient", 0.5)
    assert "holds a finished run with other settings (kl_coefficient 0.05 -> 0.5, steps 2 -> 4)" in message
    assert "has more updates than --steps 3" in refused("--steps", 3)
    assert same_results(run(), finished)
    run("--kl_coefficient", 0.5, "--fresh", "--steps", 1)
    assert json.loads((output / "settings.json").read_text())["kl_coefficient"] == 0.5
    assert len(timeless(output)) == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="a forked child may not use the system's libraries there")
def test_a_killed_run_ends_as_an_undisturbed_one(run, finished, toy, tmp_path):
    for death in (partial(die_at_update, 3), partial(die_while_saving, 1)):
        killed("train_reinforce", flags(toy, tmp_path / "policy"), death)
        checkpoints = [path.name for path in (tmp_path / "policy" / "checkpoints").glob("checkpoint-*")]
        assert checkpoints == ["checkpoint-2"]
    assert same_results(run(), finished)


# --- spoiled policies ------------------------------------------------------------------------------------------------


def test_an_exploding_kl_stops_with_the_last_good_checkpoint_kept(refused, tmp_path, monkeypatch):
    real, kl = reinforce.step_figures, iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(reinforce, "step_figures", lambda *rest: real(*rest) | {"kl": next(kl)})
    message = refused("--save_steps", 1, "--max_kl", 15)
    assert "update 3: the mean KL is 20.0 nats, above --max_kl 15" in message and "--learning_rate" in message
    # Update 3 starts from the policy after update 2, so that one is spoiled.
    assert [path.name for path in (tmp_path / "policy" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "policy" / "config.json").exists()


def test_a_spoiled_last_update_is_removed(run, refused, finished, monkeypatch):
    real = rollouts.answers_of

    def spoiled(*rest, title, **options):
        answers = real(*rest, title=title, **options)
        return answers._replace(kl=answers.kl + 1000) if title == "Answers after" else answers

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "answers_of", spoiled)
        assert "update 4: the mean KL is" in refused()
    output = run()  # goes on from update 2
    assert same_results(output, finished)


def test_logits_that_are_not_finite_stop_the_run(refused, tmp_path):
    def spoil(optimizer, *rest):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(math.nan)

    hook = register_optimizer_step_post_hook(spoil)
    message = refused("--save_steps", 1)
    hook.remove()
    assert "the policy's logits are not finite at" in message and message.count("pairs.jsonl row") == 6
    assert "--learning_rate" in message
    assert not list((tmp_path / "policy" / "checkpoints").glob("checkpoint-*"))


def test_a_score_that_is_not_finite_names_the_row_of_its_prompt(refused, tmp_path, monkeypatch):
    def score(self, prompts, texts, **options):
        return [math.inf if number == 3 else 0.0 for number in range(len(texts))]

    monkeypatch.setattr(RewardModelEvaluator, "reward_function", score)
    message = refused("--steps", 1)
    assert "update 1: score is inf at" in message and message.count("pairs.jsonl row") == 1
    assert not list((tmp_path / "policy" / "checkpoints").glob("checkpoint-*"))  # nothing learned from it


# --- several processes -----------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import runpy, sys, zlib
import numpy as np
import torch
from reward_pipeline import devices, evaluator, rollouts, sampling
from reward_pipeline.reinforce import Completions, completion_mask, has_ended


def sample(policy, tokenizer, prompts, config, dtype, seeds):
    '''Completions that follow from their prompts alone, so that it does not matter which process draws them.'''
    width = max(len(prompt.ids) for prompt in prompts)
    pads = [width - len(prompt.ids) for prompt in prompts]
    drawn = [np.random.default_rng(zlib.crc32(prompt.place.encode())).integers(2, 14, 5) for prompt in prompts]
    completions = torch.tensor(np.array(drawn))
    mask = completion_mask(completions, [2])
    before = torch.tensor([[0] * pad + prompt.ids for pad, prompt in zip(pads, prompts)])
    known = torch.tensor([[0] * pad + [1] * len(prompt.ids) for pad, prompt in zip(pads, prompts)])
    texts = tokenizer.batch_decode([row[keep] for row, keep in zip(completions, mask)], skip_special_tokens=True)
    attention = torch.cat([known, mask.long()], dim=1)
    return Completions(torch.cat([before, completions], dim=1), attention, mask, has_ended(completions, [2]), texts)


rollouts.sample = sampling.sample = sample
devices.autocast_dtype = evaluator.autocast_dtype = lambda device: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_do_what_one_does(toy, tmp_path, monkeypatch):
    """The same gradient, baseline and figures at each update; one of them writes and evaluates."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(TWO_PROCESSES)
    script = ROOT / "train_reinforce.py"
    more = ["--micro_batch_size", 2]  # two micro-batches in each of two processes
    printed = in_processes(2, wrapper, script, *flags(toy, tmp_path / "two", *more))
    for module in (rollouts, sampling):
        monkeypatch.setattr(module, "sample", sampling.sample)  # so that it is put back
    monkeypatch.setattr("sys.argv", [str(wrapper), str(script), *flags(toy, tmp_path / "one", *more)])
    runpy.run_path(str(wrapper), run_name="__main__")
    one, two = timeless(tmp_path / "one"), timeless(tmp_path / "two")
    assert len(one) == len(two) == 4 and one[3]["kl"] != 0
    for entry, other in zip(one, two, strict=True):
        del entry["sample"], other["sample"]
        assert other == pytest.approx(entry, rel=1e-3, abs=1e-4)
    other = weights(tmp_path / "two")
    assert all(torch.allclose(tensor, other[name], atol=1e-3) for name, tensor in weights(tmp_path / "one").items())
    assert printed.count("7 unseen prompts") == 1
    results = [json.loads((tmp_path / each / "evaluation.json").read_text()) for each in ("one", "two")]
    assert results[1]["reward_before"] == pytest.approx(results[0]["reward_before"], abs=1e-3)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("num_processes", 4, "--completions_per_step 6 can not be divided among 4 processes"),
    ("distributed_type", DistributedType.FSDP, "FSDP: completions are sampled from whole models; use DDP"),
])  # fmt: skip
def test_processes_that_can_not_share_the_work_are_refused(refused, monkeypatch, name, value, message):
    monkeypatch.setattr(Accelerator, name, value)
    assert message in refused()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--completions_per_step", "500"), "--completions_per_step"),
        (("--model", "nowhere"), "nowhere"),
        (("--reward_model", "nowhere"), "train_reward_model.py"),
        (("--second_judge", "nowhere"), "nowhere"),
        (("--data", "nowhere"), "load_helpsteer_dataset.py"),
        (("--max_new_tokens", "48"), "reads 64 tokens"),
        (("--max_new_tokens", "49"), "reads 64 tokens"),
        (("--reward_function", "nowhere:rewards"), "--reward_function nowhere:rewards: No module"),
    ],
)
def test_bad_input_is_named_and_nothing_is_made(refused, tmp_path, arguments, message):
    assert message in refused(*arguments)
    assert not (tmp_path / "policy").exists()


def test_a_bad_flag_leaves_a_finished_run_alone(refused, copied):
    files = {path for path in copied.rglob("*") if path.is_file()}
    refused("--completions_per_step", 500)
    assert {path for path in copied.rglob("*") if path.is_file()} == files


def test_a_prompt_that_the_judge_can_not_read_is_named(refused, toy, tmp_path):
    judge = shutil.copytree(toy / "judge", tmp_path / "refusing")
    template = judge / "chat_template.jinja"
    refusing = "{% if messages[0]['content'].startswith('a') %}{{ raise_exception('no') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    message = refused("--reward_model", judge)
    assert f"{judge} can not read it" in message and "pairs.jsonl row" in message


def test_a_damaged_checkpoint_is_named(refused, copied):
    (copied / "config.json").unlink()
    checkpoint = copied / "checkpoints" / "checkpoint-4"
    optimizer = checkpoint / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    assert "optimizer.pt: damaged" in refused()
    (checkpoint / "checksums.json").unlink()
    assert "optimizer.pt: damaged" in refused()
    log = checkpoint.parent / "metrics.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    shutil.rmtree(checkpoint)
    assert "has 1 updates, but the checkpoint has 2" in refused()


def test_models_and_files_of_others_are_left_alone(refused, toy, tmp_path):
    (toy / "judge" / "checkpoints").mkdir(exist_ok=True)  # as the training leaves it
    assert "this run reads the model there" in refused("--output_dir", toy / "judge")
    another = shutil.copytree(toy / "judge", tmp_path / "another")
    assert "holds a LlamaForSequenceClassification" in refused("--output_dir", another)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "thesis.txt").write_text("mine")
    assert "--output_dir" in refused()
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["thesis.txt"]


def test_a_second_run_into_one_directory_is_refused(refused, tmp_path):
    with held_output(tmp_path / "policy"):
        assert "policy: another run is writing it" in refused()
    assert not (tmp_path / "policy").exists()


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no_such_flag", "1"),
        ("--baseline", "median"),
        ("--report_to", "no_such_tracker"),
        ("--ema_decay", "1"),
        ("--model", ""),
        *((f"--{name}", "0") for name in ("steps", "completions_per_step", "micro_batch_size", "max_new_tokens")),
        *((f"--{name}", "0") for name in ("temperature", "save_steps", "evaluation_prompts", "max_grad_norm")),
        *((f"--{name}", "0") for name in ("learning_rate", "max_kl")),
        *((f"--{name}", "-1") for name in ("warmup_steps", "kl_coefficient", "missing_eos_penalty", "seed")),
        *((f"--{name}", bad) for name in ("learning_rate", "kl_coefficient", "max_kl") for bad in ("nan", "inf")),
        ("--learning_rate", "3e38"),
        ("--seed", "99999999999999999999"),
        ("--steps", "2.5"),
        ("--max_prompt_length", "5"),
        ("--reward_model", "none"),
        ("--reward_model", "none", "--reward_function", "a:b", "--bounded_reward", "true"),
        ("--baseline", "leave_one_out"),
        ("--completions_per_step", "30", "--completions_per_prompt", "4"),
        ("--constrained_share", "1.5"),
    ],
)
def test_a_bad_flag_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("train_reinforce", *arguments)
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.startswith(f"error: {arguments[0]}") and message.count("\n") == 1


def test_flags_come_from_constants_a_file_and_the_command_line(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 7\nbaseline: ema\nfresh: true\n")
    options = parse("train_reinforce", "--config", file, "--steps", "9")
    assert (options.steps, options.baseline, options.fresh) == (9, "ema", True)
    assert options.learning_rate == names_of("train_reinforce")["LEARNING_RATE"]


def test_trackers_are_those_of_accelerate():
    assert set(names_of("train_reinforce")["ACCELERATE_TRACKERS"]) - {"none"} <= {each.value for each in LoggerType}
