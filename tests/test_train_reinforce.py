"""REINFORCE: the algorithm against exact enumeration, the script on a tiny model."""

import copy
import itertools
import json
import math
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_pairs, run_main, same_weights, save_reward_model, torchrun
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import load_helpsteer_dataset
import train_reinforce as tr
from benchmarks import gradient_variance
from load_smollm_model import load_sft_model
from reward_model_demo import RewardModelEvaluator


def small_llama(vocabulary: int, seed: int = 0, spread: float = 0.5) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


class DigitTokenizer:
    """Token ids as digits."""

    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


class CountingJudge:
    """Reward: how often a token occurs."""

    def __init__(self, token: int):
        self.token = str(token)

    def get_reward_scores(self, prompts, texts):
        return [float(text.split().count(self.token)) for text in texts]


def make_run(policy, reference, judge=None, **changes) -> tr.Run:
    """A run over prompts of small token ids, in fp32 on the CPU."""
    settings = tr.Settings(**{"micro_batch_size": 4, "completions_per_step": 8, "warmup_steps": 0, **changes})
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    prompts = [
        tr.Prompt([{"role": "user", "content": "x"}], [1, *[3] * (number % 3)], f"row {number}") for number in range(64)
    ]
    return tr.Run(
        settings=settings,
        accelerator=accelerator,
        tokenizer=DigitTokenizer(),
        policy=policy,
        reference=reference,
        evaluator=judge,
        second=None,
        optimizer=optimizer,
        sampling=tr.sampling_config(settings, [2], 0),
        dtype=None,
        prompts=prompts,
        unseen=prompts[:8],
    )


def token_log_probs(model, part: tr.Completions) -> torch.Tensor:
    everything = tr.distributions(model, part.ids, part.attention_mask, part.mask.shape[1], 1.0)
    return tr.of_tokens(everything, part.ids)


# --- masks and log-probabilities -------------------------------------------------------------------------------------


def test_the_mask_ends_with_the_first_end_token():
    completions = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 2, 2], [0, 5, 3, 2]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert tr.completion_mask(completions, [2, 3]).int().tolist() == expected
    assert tr.has_ended(completions, [2, 3]).tolist() == [True, False, True, True]


def test_an_end_token_that_is_also_the_pad_token_counts_once():
    completions = torch.tensor([[5, 0, 0, 0], [5, 6, 7, 0], [5, 6, 7, 8]])
    assert tr.completion_mask(completions, [0]).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert tr.has_ended(completions, [0]).tolist() == [True, True, False]


def test_log_probabilities_equal_those_token_by_token():
    model, temperature = small_llama(12), 0.7
    prompts, completions = [[1, 4], [1, 5, 6, 7, 8]], [[9, 3, 2], [10, 2]]
    ids = torch.tensor([[0, 0, 0, *prompts[0], *completions[0]], [*prompts[1], *completions[1], 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
    everything = tr.distributions(model, ids, mask, 3, temperature)
    log_probs, entropy = tr.of_tokens(everything, ids), tr.entropies(everything)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        for place, token in enumerate(completion):
            context = torch.tensor([[*prompt, *completion[:place]]])
            expected = torch.distributions.Categorical(logits=model(context).logits[0, -1] / temperature)
            assert log_probs[row, place].item() == pytest.approx(
                expected.log_prob(torch.tensor(token)).item(), abs=1e-5
            )
            assert entropy[row, place].item() == pytest.approx(expected.entropy().item(), abs=1e-5)


def test_a_part_drops_only_padding():
    model = small_llama(12)
    ids = torch.tensor([[0, 0, 0, 1, 5, 2, 0, 0], [0, 0, 1, 4, 6, 7, 2, 0], [1, 3, 4, 5, 9, 8, 7, 6]])
    attention = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0], [1] * 8])
    completions = tr.Completions(
        ids, attention, attention[:, 4:].bool(), torch.tensor([1, 1, 0]).bool(), ["a", "b", "c"]
    )
    part = completions.part(0, 2)
    assert part.ids.tolist() == [[0, 1, 5, 2, 0], [1, 4, 6, 7, 2]] and part.texts == ["a", "b"]
    assert part.mask.tolist() == [[True, True, False], [True, True, True]]
    whole, alone = token_log_probs(model, completions), token_log_probs(model, part)
    assert torch.allclose(whole[:2, :3][part.mask], alone[part.mask], atol=1e-5)


# --- the gradient, with every completion enumerated ------------------------------------------------------------------

VOCABULARY, LENGTH, PROMPT = 4, 3, [1, 3]


def enumerated() -> tr.Completions:
    """Every completion of at most LENGTH tokens over the vocabulary, 2 being the end."""
    found = set()
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        end = tokens.index(2) + 1 if 2 in tokens else LENGTH
        found.add((*tokens[:end], *[0] * (LENGTH - end), end))
    rows = torch.tensor(sorted(found))
    ends = rows[:, -1:]
    mask = torch.arange(LENGTH)[None] < ends
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(rows), -1), rows[:, :LENGTH]], dim=1)
    attention = torch.cat([torch.ones(len(rows), len(PROMPT)), mask], dim=1).long()
    return tr.Completions(ids, attention, mask, tr.has_ended(rows[:, :LENGTH], [2]), [""] * len(rows))


def flat(gradients) -> torch.Tensor:
    return torch.cat([each.flatten() for each in gradients])


@pytest.fixture(scope="module")
def world():
    """Policy, reference, all completions and a reward for each."""
    policy, reference, completions = small_llama(VOCABULARY, 0), small_llama(VOCABULARY, 1), enumerated()
    rewards = torch.rand(len(completions.ids), generator=torch.Generator().manual_seed(0)) + 2
    return policy, reference, completions, rewards


def whole_log_probs(model, completions: tr.Completions) -> torch.Tensor:
    return (token_log_probs(model, completions) * completions.mask).sum(dim=1)


def test_the_completions_are_all_there_are(world):
    policy, _, completions, _ = world
    assert whole_log_probs(policy, completions).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_expected_gradient_is_the_exact_one(world):
    """E over all y of the REINFORCE gradient = gradient of sum_y pi(y) R(y), the KL term and the penalty included."""
    policy, reference, completions, scores = world
    beta, penalty = 0.3, 0.5
    log_probs, logs_reference = whole_log_probs(policy, completions), whole_log_probs(reference, completions).detach()
    probabilities = log_probs.exp()
    objective = scores - beta * (log_probs - logs_reference) - penalty * (~completions.ended).float()
    exact = flat(torch.autograd.grad(-(probabilities * objective).sum(), policy.parameters()))

    tokens, reference_tokens = token_log_probs(policy, completions), token_log_probs(reference, completions)
    kl = tr.sequence_kl(tokens, reference_tokens, completions.mask)
    rewards = tr.regularised_rewards(scores, kl, completions.ended, beta, penalty)
    # The mean over N completions, each weighted by N times its probability, is the expectation.
    weights = probabilities.detach() * len(scores)
    loss = tr.reinforce_loss(tokens, completions.mask, weights * (rewards - 1.7))
    estimated = flat(torch.autograd.grad(loss, policy.parameters()))
    assert not rewards.requires_grad
    assert torch.allclose(estimated, exact, atol=1e-5)
    assert exact.abs().max() > 1e-2


def test_the_baseline_keeps_the_expectation_and_lowers_the_variance(world):
    policy, _, completions, rewards = world
    probabilities = whole_log_probs(policy, completions).exp().detach()
    scores = []  # gradient of each completion's log-probability
    for row in range(len(rewards)):
        part = completions.part(row, 1)
        loss = tr.reinforce_loss(token_log_probs(policy, part), part.mask, torch.ones(1))
        scores.append(flat(torch.autograd.grad(loss, policy.parameters())))
    scores = torch.stack(scores)

    def moments(baseline: float) -> tuple[torch.Tensor, float]:
        gradients = (rewards - baseline)[:, None] * scores
        mean = (probabilities[:, None] * gradients).sum(dim=0)
        return mean, (probabilities * (gradients - mean).square().sum(dim=1)).sum().item()

    expected_reward = (probabilities * rewards).sum().item()
    (without, variance), (with_baseline, lower) = moments(0.0), moments(expected_reward)
    assert torch.allclose(without, with_baseline, atol=1e-4)
    assert lower < variance / 10


# --- baseline --------------------------------------------------------------------------------------------------------


def test_the_baseline_by_hand():
    state = {}
    assert tr.baseline_value("mean", state, first=3.0) == tr.baseline_value("ema", state, first=3.0) == 3.0
    for reward in (1.0, 2.0, 6.0):
        state = tr.updated_baseline(state, reward)
    assert tr.baseline_value("mean", state, first=9.0) == pytest.approx(3.0)
    ema = 0.1 * (0.81 * 1 + 0.9 * 2 + 6) / (1 - 0.9**3)
    assert tr.baseline_value("ema", state, first=9.0) == pytest.approx(ema)
    assert tr.baseline_value("none", state, first=9.0) == 0


def test_the_baseline_of_a_step_does_not_know_its_rewards():
    policy = small_llama(8)
    run = make_run(policy, small_llama(8), CountingJudge(5), max_new_tokens=4, missing_eos_penalty=0.5)
    entries, state = [], {}
    for step in (1, 2, 3):
        entries.append(tr.take_step(run, step, run.prompts[:8], state))
        state = tr.updated_baseline(state, entries[-1]["reward"])
    rewards = [entry["reward"] for entry in entries]
    assert entries[0]["baseline"] == pytest.approx(rewards[0], abs=1e-5)  # the first step is its own
    assert entries[1]["baseline"] == pytest.approx(rewards[0])
    assert entries[2]["baseline"] == pytest.approx((rewards[0] + rewards[1]) / 2)
    assert entries[0]["reward"] == pytest.approx(entries[0]["score"] - 0.5 * (1 - entries[0]["ended"]), abs=1e-5)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_samples_come_from_the_distribution_that_is_scored():
    """Whatever the model's own generation settings say; at a temperature other than 1."""
    model, settings = small_llama(8), tr.Settings(max_new_tokens=1, temperature=1.5)
    hostile = {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 9.0, "suppress_tokens": [5]}
    for name, value in hostile.items():
        setattr(model.generation_config, name, value)
    config = tr.sampling_config(settings, [2], 0)
    prompts = [tr.Prompt([], [1, 3, 5], "")] * 4000
    sampled = tr.sample(model, DigitTokenizer(), prompts, config, None, seed=0)
    shares = torch.bincount(sampled.ids[:, -1], minlength=8) / len(prompts)
    expected = (model(torch.tensor([[1, 3, 5]])).logits[0, -1] / 1.5).softmax(dim=0)
    assert (shares - expected).abs().max() < 0.03
    assert model.generation_config.top_k == 1  # left as it was


def test_padding_on_the_left_changes_nothing():
    model = small_llama(8)
    config = tr.sampling_config(tr.Settings(max_new_tokens=6), [2], 0)
    config.do_sample, config.top_k, config.top_p = False, None, None  # greedy: comparable from batch to batch
    prompts = [tr.Prompt([], [1, 3], "row 1"), tr.Prompt([], [1, 4, 5, 6, 7, 3, 4], "row 2")]
    together = tr.sample(model, DigitTokenizer(), prompts, config, None, seed=0).texts
    assert together == [tr.sample(model, DigitTokenizer(), [each], config, None, seed=0).texts[0] for each in prompts]


def test_prompts_are_unique_short_enough_and_open_the_answer(tokenizer):
    messages = [[{"role": "user", "content": content}] for content in ("Hi", "Hi", "word " * 60, "Name a colour.")]
    split = Dataset.from_dict({"prompt": messages, "place": ["row 1", "row 2", "row 3", "row 4"]})
    prompts = tr.unique_prompts(split, tokenizer, 32)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["Hi", "Name a colour."]
    assert [prompt.place for prompt in prompts] == ["row 1", "row 4"]
    for prompt in prompts:
        opened = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)["input_ids"]
        assert prompt.ids == opened


def test_a_prompt_that_the_template_refuses_is_named(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    messages = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]]
    split = Dataset.from_dict({"prompt": messages, "place": ["pairs.jsonl row 1"]})
    with pytest.raises(tr.InputError, match=r"pairs\.jsonl row 1: the chat template refuses"):
        tr.unique_prompts(split, refusing, 32)


def test_every_pass_sees_every_prompt_once():
    prompts = [tr.Prompt([], [number], "") for number in range(10)]
    drawn = [prompt.ids[0] for batch in itertools.islice(tr.batches(prompts, 4, seed=1), 5) for prompt in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


# --- an update -------------------------------------------------------------------------------------------------------


def test_the_first_update_starts_at_no_kl_and_moves_the_policy_alone():
    policy, reference = small_llama(8), small_llama(8)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    run = make_run(policy, reference, CountingJudge(5), max_new_tokens=4, learning_rate=1e-3)
    entry = tr.take_step(run, 1, run.prompts[:8], {})
    assert abs(entry["kl"]) < 1e-5 and entry["gradient_norm"] > 0
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    moved = max((value - before[name]).abs().max().item() for name, value in policy.state_dict().items())
    assert 0 < moved <= 1e-3 * 1.001  # the first step of Adam is at most the learning rate
    again = tr.take_step(run, 2, run.prompts[:8], tr.updated_baseline({}, entry["reward"]))
    assert abs(again["kl"]) > 1e-4


def test_micro_batches_add_up_to_one_batch():
    gradients = []
    for size in (8, 3):
        policy = small_llama(8)
        run = make_run(policy, small_llama(8, 1), max_new_tokens=4, micro_batch_size=size)
        sampled = tr.sample(policy, run.tokenizer, run.prompts[:8], run.sampling, None, seed=3)
        sums, rewards = tr.accumulate_gradient(run, sampled, torch.arange(8.0), 2.0)
        assert rewards.sum().item() == pytest.approx(sums["reward"].item(), abs=1e-4)
        gradients.append((flat(each.grad for each in policy.parameters()), sums))
    (whole, sums), (parts, other) = gradients
    assert torch.allclose(whole, parts, atol=1e-5) and whole.abs().max() > 1e-3
    assert all(other[name].item() == pytest.approx(value.item(), abs=1e-3) for name, value in sums.items())


def test_figures_by_hand():
    sums = {"completions": 2, "score": 4, "score_squared": 10, "reward": 3, "reward_squared": 5, "kl": 1, "entropy": 8}
    figures = tr.step_figures({**sums, "tokens": 16, "ended": 1}, baseline=0.5)
    assert figures == {
        "score": 2, "score_std": 1, "reward": 1.5, "baseline": 0.5, "advantage_std": 0.5, "kl": 0.5,
        "kl_per_token": 0.0625, "entropy": 0.5, "length": 8, "ended": 0.5,
    }  # fmt: skip


def test_the_learning_rate_warms_up_and_stays():
    settings = tr.Settings(learning_rate=4.0, warmup_steps=4)
    assert [tr.learning_rate(settings, step) for step in (1, 2, 4, 5, 500)] == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert tr.learning_rate(tr.Settings(learning_rate=4.0, warmup_steps=0), 1) == 4.0


@pytest.mark.parametrize("baseline", ["mean", "ema"])
def test_a_bandit_climbs_to_near_its_maximum(baseline):
    """Reward: how often token 5 stands among 6 tokens, so at most 6."""
    policy = small_llama(8, spread=0.1)
    run = make_run(
        policy, small_llama(8, spread=0.1), CountingJudge(5), max_new_tokens=6, completions_per_step=32,
        micro_batch_size=32, learning_rate=1e-2, kl_coefficient=0.0, missing_eos_penalty=0.0, baseline=baseline,
    )  # fmt: skip
    scores, state = [], {}
    for step in range(1, 81):
        entry = tr.take_step(run, step, run.prompts[:32], state)
        state = tr.updated_baseline(state, entry["reward"])
        scores.append(entry["score"])
    assert scores[0] < 1.5 and np.mean(scores[-5:]) > 5.4


def test_one_step_of_the_real_model(smollm, tokenizer, tiny_model, tmp_path):
    directory = save_reward_model(tmp_path / "judge", tiny_model, tokenizer, 0.5, 128)
    policy, reference = load_sft_model(smollm), load_sft_model(smollm)
    run = make_run(
        policy, reference, RewardModelEvaluator(directory, device="cpu"), max_new_tokens=8, learning_rate=1e-4
    )
    prompts = tr.unique_prompts(
        Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": text}] for text in ("Hi", "Name a colour, please.")],
                "place": ["row 1", "row 2"],
            }
        ),
        tokenizer,
        64,
    )
    run = run._replace(tokenizer=tokenizer, dtype=torch.bfloat16)
    entry = tr.take_step(run, 1, prompts, {})
    assert abs(entry["kl"]) < 1e-5 and entry["gradient_norm"] > 0 and 0 < entry["entropy"] < math.log(49152)
    assert not torch.equal(policy.model.norm.weight, reference.model.norm.weight)


TWO_PROCESSES = """
import sys
import torch
import test_train_reinforce as tests
import train_reinforce as tr
from load_smollm_model import run_script


def main():
    policy = tests.small_llama(8)
    run = tests.make_run(policy, tests.small_llama(8, 1), max_new_tokens=4, micro_batch_size=2)
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    alone = tests.small_llama(8)
    sampled = tr.sample(alone, run.tokenizer, run.prompts[:8], run.sampling, None, seed=3)
    mine = sampled.part(rank * 8 // world, 8 // world)
    scores = torch.arange(8.0)[rank * 8 // world :][: 8 // world]
    sums, _ = tr.accumulate_gradient(run, mine, scores, 2.0)
    total = run.accelerator.reduce(torch.stack(list(sums.values())), "sum")
    run.accelerator.clip_grad_norm_(run.policy.parameters(), 1e9)
    if rank == 0:
        torch.save({"gradient": tests.flat(each.grad for each in policy.parameters()), "sums": total}, sys.argv[1])


run_script(main)
"""


def test_two_processes_give_the_gradient_of_one(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    results = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.pt"
        torchrun(processes, script, output)
        results.append(torch.load(output, weights_only=True))
    assert torch.allclose(results[0]["gradient"], results[1]["gradient"], atol=1e-5)
    assert torch.allclose(results[0]["sums"], results[1]["sums"], atol=1e-3)
    assert results[0]["gradient"].abs().max() > 1e-3


# --- statistics of texts ---------------------------------------------------------------------------------------------


def test_distinct_and_repetition_by_hand():
    texts = ["a b c a b c", "a b c", "x y"]  # 3-grams: abc bca cab abc | abc | none
    assert tr.distinct(texts) == 3 / 5
    assert tr.repetition(texts) == pytest.approx((1 / 4 + 0) / 2)
    assert tr.distinct(["a b"]) == 1.0 and tr.repetition(["a b"]) == 0.0


def test_wilcoxon_needs_a_difference():
    assert tr.wilcoxon_p(np.zeros(5)) == 1.0
    assert tr.wilcoxon_p(np.arange(1.0, 21.0)) < 1e-4
    assert tr.wilcoxon_p(np.array([1.0, -1.0] * 10)) > 0.9


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reinforce(monkeypatch, tmp_path, write_jsonl, tiny_model, other_reward_model):
    """Call the script on a tiny model and 40 prompts; returns the output directory."""
    data = tmp_path / "data"
    source = write_jsonl(make_pairs(40), "easy.jsonl")
    run_main(
        load_helpsteer_dataset, monkeypatch, "--source", source, "--model", tiny_model, "--output", data,
        "--max_length", "64",
    )  # fmt: skip

    def call(*arguments, output="policy"):
        directory = tmp_path / output
        run_main(
            tr, monkeypatch, "--model", tiny_model, "--reward_model", other_reward_model, "--data", data,
            "--output_dir", directory, "--steps", "4", "--completions_per_step", "6", "--micro_batch_size", "4",
            "--max_new_tokens", "5", "--max_prompt_length", "32", "--evaluation_prompts", "7",
            "--learning_rate", "1e-2", "--warmup_steps", "0", "--save_steps", "2", *arguments,
        )  # fmt: skip
        return directory

    return call


def timeless(path: Path) -> list[dict]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_second")} for entry in entries]


def test_the_script_leaves_a_policy_with_its_evaluation(reinforce, tiny_model, tiny_reward_model, capsys, tmp_path):
    judge = tmp_path / "second"
    config = json.loads((Path(tiny_reward_model) / "config.json").read_text())
    judge.mkdir()
    for file in Path(tiny_reward_model).iterdir():
        (judge / file.name).write_bytes(file.read_bytes())
    (judge / "config.json").write_text(json.dumps(config | {"reward_mean": 0.0, "reward_std": 1.0}))
    output = reinforce("--second_judge", judge)
    results = json.loads((output / "evaluation.json").read_text())
    assert results["n"] == 7
    for prefix in ("", "second_judge_"):
        gain = results[f"{prefix}reward_after"] - results[f"{prefix}reward_before"]
        assert results[f"{prefix}reward_gain"] == pytest.approx(gain, abs=2e-4)
        low, high = results[f"{prefix}reward_gain_interval"]
        assert low <= results[f"{prefix}reward_gain"] <= high
        low, high = results[f"{prefix}win_rate_interval"]
        assert 0 <= low <= results[f"{prefix}win_rate"] <= high <= 1
        assert 0 <= results[f"{prefix}wilcoxon_p"] <= 1
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    assert np.mean([row["reward_after"] for row in rows]) == pytest.approx(results["reward_after"], abs=1e-4)
    rescored = RewardModelEvaluator(str(judge), device="cpu", mixed_precision=True).get_reward_scores(
        [row["prompt"] for row in rows], [row["after"] for row in rows]
    )
    assert rescored == pytest.approx([row["second_judge_after"] for row in rows], abs=0.2)

    log = timeless(output / "metrics.jsonl")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert abs(log[0]["kl"]) < 1e-5 and log[3]["kl"] > 0 and results["kl"] > 0
    for name in ("plots/training.png", "plots/before_and_after.png", "samples.md", "settings.json"):
        assert (output / name).stat().st_size > 0
    card = (output / "README.md").read_text()
    assert f"{results['win_rate']:.3f}" in card and "plots/training.png" in card
    policy = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    asked = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_tensors="pt")
    assert policy.generate(**asked, max_new_tokens=3).shape[1] <= asked["input_ids"].shape[1] + 3
    assert not torch.equal(policy.lm_head.weight, AutoModelForCausalLM.from_pretrained(tiny_model).lm_head.weight)
    assert "7 unseen prompts" in capsys.readouterr().out
    assert not (output / ".new").exists()


def test_a_stopped_run_ends_as_an_undisturbed_one(reinforce, monkeypatch, capsys):
    whole = reinforce(output="whole")
    real = tr.take_step

    def interrupted(run, step, *rest):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return real(run, step, *rest)

    monkeypatch.setattr(tr, "take_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        reinforce(output="stopped")
    assert ended.value.code == 130
    assert "Stopped at update 3 of 4" in capsys.readouterr().out
    stopped = whole.with_name("stopped")
    assert not (stopped / "config.json").exists()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "half a li')  # as if killed while writing
    monkeypatch.setattr(tr, "take_step", real)
    reinforce(output="stopped")
    assert "Resuming from" in capsys.readouterr().out
    assert same_weights(whole, stopped)
    assert timeless(whole / "metrics.jsonl") == timeless(stopped / "metrics.jsonl")
    evaluations = [json.loads((output / "evaluation.json").read_text()) for output in (whole, stopped)]
    assert evaluations[0] == evaluations[1]


def test_ctrl_c_in_the_last_update_leaves_the_evaluation_to_the_next_start(reinforce, monkeypatch, capsys):
    real = tr.take_step

    def interrupted(run, step, *rest):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return real(run, step, *rest)

    monkeypatch.setattr(tr, "take_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        reinforce()
    assert ended.value.code == 130 and "Stopped at update 4 of 4" in capsys.readouterr().out
    monkeypatch.setattr(tr, "take_step", None)  # no update is left
    output = reinforce()
    assert json.loads((output / "evaluation.json").read_text())["n"] == 7
    assert len(timeless(output / "metrics.jsonl")) == 4


def test_a_finished_run_is_evaluated_again_by_the_same_command(reinforce):
    output = reinforce()
    before = (output / "model.safetensors").read_bytes(), (output / "evaluation.json").read_text()
    assert reinforce("--evaluation_prompts", "7") == output
    assert ((output / "model.safetensors").read_bytes(), (output / "evaluation.json").read_text()) == before


def test_more_steps_make_a_finished_run_longer(reinforce):
    whole, output = reinforce("--steps", "6", output="whole"), reinforce()
    assert len(timeless(output / "metrics.jsonl")) == 4
    reinforce("--steps", "6")
    assert timeless(whole / "metrics.jsonl") == timeless(output / "metrics.jsonl")
    assert same_weights(whole, output)
    with pytest.raises(SystemExit) as ended:
        reinforce("--steps", "5")
    assert "has more updates than --steps 5" in str(ended.value.code)


def test_a_bad_flag_leaves_a_finished_run_alone(reinforce):
    output = reinforce()
    files = {path for path in output.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        reinforce("--completions_per_step", "500")
    assert {path for path in output.rglob("*") if path.is_file()} == files


def test_other_settings_do_not_continue_an_unfinished_run(reinforce, monkeypatch):
    real = tr.finish
    monkeypatch.setattr(tr, "finish", lambda *rest: None)  # killed in the evaluation
    output = reinforce()
    monkeypatch.setattr(tr, "finish", real)
    with pytest.raises(SystemExit) as ended:
        reinforce("--kl_coefficient", "0.5")
    assert "kl_coefficient 0.03 -> 0.5" in str(ended.value.code)
    reinforce("--kl_coefficient", "0.5", "--fresh")
    assert json.loads((output / "settings.json").read_text())["kl_coefficient"] == 0.5


def test_a_longer_run_that_was_stopped_is_unfinished_again(reinforce, monkeypatch):
    output, real = reinforce(), tr.finish
    monkeypatch.setattr(tr, "finish", lambda *rest: None)  # killed in the evaluation
    reinforce("--steps", "6")
    monkeypatch.setattr(tr, "finish", real)
    with pytest.raises(SystemExit) as ended:
        reinforce("--steps", "6", "--kl_coefficient", "0.5")
    assert "holds an unfinished run with other settings (kl_coefficient 0.03 -> 0.5)" in str(ended.value.code)
    assert (output / "checkpoints" / "checkpoint-6").is_dir()


def test_pairs_cut_otherwise_are_other_data(tmp_path, other_reward_model):
    metadata = {"source": "x", "digest": "d", "seed": 1, "max_length": 64, "tokenizer": "t"}
    settings = tr.Settings(reward_model=other_reward_model)
    one, other = (
        tr.run_settings(settings, {**metadata, "max_length": length}, "base", 1)["data_identity"] for length in (64, 96)
    )
    assert one != other


def test_a_spoiled_last_update_is_removed(reinforce, monkeypatch):
    real = tr.answer

    def spoiled(run, policy, title):
        answers = real(run, policy, title)
        return answers._replace(kl=answers.kl + 1000) if title == "Answers after" else answers

    monkeypatch.setattr(tr, "answer", spoiled)
    with pytest.raises(SystemExit, match="update 4: the mean KL is"):
        reinforce(output="spoiled")
    monkeypatch.setattr(tr, "answer", real)
    output = reinforce(output="spoiled")  # goes on from update 2
    assert len(timeless(output / "metrics.jsonl")) == 4 and (output / "model.safetensors").exists()
    assert same_weights(output, reinforce(output="undisturbed"))


def test_a_prompt_that_the_judge_can_not_read_is_named(reinforce, other_reward_model, tmp_path):
    judge = tmp_path / "refusing"
    shutil.copytree(other_reward_model, judge)
    template = judge / "chat_template.jinja"
    template.write_text(
        "{% if 'number 3' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + template.read_text()
    )
    with pytest.raises(SystemExit) as ended:
        reinforce("--reward_model", judge)
    assert f"{judge} can not read it" in str(ended.value.code) and "easy.jsonl row" in str(ended.value.code)


def test_a_damaged_checkpoint_is_named(reinforce, monkeypatch):
    real = tr.finish
    monkeypatch.setattr(tr, "finish", lambda *rest: None)
    checkpoint = reinforce() / "checkpoints" / "checkpoint-4"
    monkeypatch.setattr(tr, "finish", real)
    optimizer = checkpoint / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    with pytest.raises(SystemExit) as ended:
        reinforce()
    assert "optimizer.pt: damaged" in str(ended.value.code)
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(SystemExit) as ended:
        reinforce()
    assert "optimizer.pt: damaged" in str(ended.value.code)
    log = checkpoint.parent / "metrics.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    with pytest.raises(SystemExit) as ended:
        reinforce()
    assert "has 1 updates, but the checkpoint has 2" in str(ended.value.code)


def test_the_reward_model_is_not_overwritten(reinforce, other_reward_model, tmp_path):
    (Path(other_reward_model) / "checkpoints").mkdir(exist_ok=True)  # as the training leaves it
    with pytest.raises(SystemExit) as ended:
        reinforce(output=other_reward_model)
    assert "this run reads the model there" in str(ended.value.code)
    another = shutil.copytree(other_reward_model, tmp_path / "another")
    with pytest.raises(SystemExit) as ended:
        reinforce(output=another)
    assert "holds a LlamaForSequenceClassification, which would be overwritten" in str(ended.value.code)


def test_p_values_keep_their_digits():
    results = {"wilcoxon_p": 1.23456e-9, "second_judge_wilcoxon_p": None, "win_rate": 0.123456}
    assert tr.readable(results) == {"wilcoxon_p": 1.23e-9, "second_judge_wilcoxon_p": None, "win_rate": 0.1235}


def test_two_processes_run_the_whole_script(reinforce, tmp_path, monkeypatch):
    """As one process with the same prompts: the same number of completions an update, one writer, one evaluation."""
    called = []
    monkeypatch.setattr(tr, "main", lambda: called.append(sys.argv[1:]))
    output = reinforce(output="two")
    result = torchrun(2, tr.__file__, *called[0])
    assert json.loads((output / "evaluation.json").read_text())["n"] == 7
    log = timeless(output / "metrics.jsonl")
    assert len(log) == 4 and abs(log[0]["kl"]) < 1e-5 and log[0]["length"] == 5
    assert result.stdout.count("7 unseen prompts") == 1


def test_an_exploding_kl_stops_with_the_last_good_checkpoint_kept(reinforce, tmp_path):
    kl = [entry["kl"] for entry in timeless(reinforce("--save_steps", "1", output="whole") / "metrics.jsonl")]
    assert kl[2] > kl[1] > 0  # so that a limit between them is first broken at update 3
    with pytest.raises(SystemExit) as ended:
        reinforce("--save_steps", "1", "--max_kl", str((kl[1] + kl[2]) / 2))
    assert "update 3: the mean KL" in str(ended.value.code) and "--learning_rate" in str(ended.value.code)
    # Update 3 starts from the policy after update 2, so that one is spoiled.
    assert [path.name for path in (tmp_path / "policy" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "policy" / "config.json").exists()


def test_logits_that_are_not_finite_stop_the_run():
    policy = small_llama(8)
    run = make_run(policy, small_llama(8), CountingJudge(5), max_new_tokens=4, learning_rate=1e37)
    state = tr.updated_baseline({}, tr.take_step(run, 1, run.prompts[:8], {})["reward"])
    with pytest.raises(tr.DivergedError, match=r"logits are not finite at row \d.*; .*--learning_rate"):
        tr.take_step(run, 2, run.prompts[:8], state)


def test_logits_of_one_prompt_that_are_not_finite_name_its_row():
    model = small_llama(8)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.inf
        model.lm_head.weight[7] = 0
    prompts = [tr.Prompt([], [1, token], f"row {token}") for token in (5, 7, 6)]
    with pytest.raises(tr.DivergedError, match=r"logits are not finite at row 7; "):
        tr.sample(model, DigitTokenizer(), prompts, tr.sampling_config(tr.Settings(max_new_tokens=1), [2], 0), None, 0)


def test_a_score_that_is_not_finite_names_the_row_of_its_prompt():
    policy = small_llama(8)
    run = make_run(policy, small_llama(8), CountingJudge(5), max_new_tokens=4)
    prompts = [prompt._replace(messages=[{"role": "user", "content": str(prompt.place)}]) for prompt in run.prompts[:8]]
    judge = run.evaluator
    judge.get_reward_scores = lambda messages, texts: [
        math.inf if message[-1]["content"] == "row 4" else 0.0 for message in messages
    ]
    before = flat(policy.parameters())
    with pytest.raises(tr.DivergedError, match=r"update 1: .* is (nan|inf) at row 4; "):
        tr.take_step(run, 1, prompts, {})
    assert torch.equal(before, flat(policy.parameters()))


def test_what_one_process_finds_stops_all(monkeypatch):
    assert tr.found_by_all(lambda: 3) == 3
    monkeypatch.setattr(tr, "gather_object", lambda mine: [*mine, "of another process"])
    with pytest.raises(tr.DivergedError, match="of another process"):
        tr.found_by_all(lambda: 3)


@pytest.mark.parametrize("name", ["score", "kl", "gradient_norm"])
def test_a_figure_that_is_not_finite_stops_the_run(name):
    figures = {"score": 1.0, "kl": 0.0, "gradient_norm": 1.0}
    tr.check_figures(figures, 7, 100.0)
    with pytest.raises(tr.InputError, match=f"update 7: {name} is nan"):
        tr.check_figures({**figures, name: math.nan}, 7, 100.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--completions_per_step", "500"), "--completions_per_step"),
        (("--reward_model", "nowhere"), "train_reward_model.py"),
        (("--data", "nowhere"), "load_helpsteer_dataset.py"),
        (("--max_new_tokens", "40"), "reads 64 tokens"),
        (("--second_judge", "nowhere"), "nowhere"),
        (("--report_to", "no_such_tracker"), "--report_to no_such_tracker"),
    ],
)
def test_bad_input_is_named(reinforce, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as ended:
        reinforce(*arguments)
    assert message in str(ended.value.code) and "\n" not in str(ended.value.code)
    assert not (tmp_path / "policy" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no_such_flag", "1"),
        ("--baseline", "median"),
        ("--steps", "0"),
        ("--temperature", "-1"),
        ("--max_prompt_length", "5"),
        ("--save_steps", "0"),
        ("--seed", "-1"),
        ("--kl_coefficient", "nan"),
    ],
)
def test_bad_flags_end_with_a_usage_line(reinforce, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        reinforce(*arguments)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_files_of_others_are_left_alone(reinforce, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        reinforce()
    assert "--output_dir" in str(ended.value.code)
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["thesis.txt"]


def test_a_second_run_into_one_directory_is_refused(reinforce, tmp_path):
    with tr.held_output(tmp_path / "policy"), pytest.raises(SystemExit) as ended:
        reinforce()
    assert "policy: another run is writing it" in str(ended.value.code)
    assert not list((tmp_path / "policy").iterdir())


def test_the_variance_of_the_gradient_is_measured_on_a_finished_run(reinforce, monkeypatch, tmp_path, capsys):
    output = reinforce()
    run_main(gradient_variance, monkeypatch, output, "--rollouts", "3", "--output", tmp_path / "variance.json")
    result = json.loads((tmp_path / "variance.json").read_text())
    rewards = [json.loads(line)["reward"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert result["mean"]["baseline"] == pytest.approx(np.mean(rewards))
    assert result["best constant"]["variance"] <= min(result[kind]["variance"] for kind in ("none", "mean", "ema"))
    assert "best constant" in capsys.readouterr().out
