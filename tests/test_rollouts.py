"""Prompts and sampled completions."""

import copy
import itertools
import math
import re

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from test_reinforce import small_llama

from reward_pipeline import models, rollouts
from reward_pipeline.devices import autocast_dtype
from reward_pipeline.files import InputError
from reward_pipeline.reinforce import DivergedError, log_probabilities, sequence_kl
from reward_pipeline.rollouts import PolicyPrompt


class DigitTokenizer:
    """Token ids as digits."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


def test_samples_come_from_the_distribution_that_is_scored():
    """Whatever the model's own generation settings say; at a temperature other than 1."""
    model = small_llama(8)
    hostile = {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 9.0, "suppress_tokens": [5]}
    for name, value in hostile.items():
        setattr(model.generation_config, name, value)
    config = sampling.sampling_config(1, 1.5, [2], 0)
    prompts = [PolicyPrompt([], [1, 3, 5], "")] * 4000
    sampled = rollouts.sample(model, DigitTokenizer(), prompts, config, None, seed=0)
    shares = torch.bincount(sampled.ids[:, -1], minlength=8) / len(prompts)
    expected = (model(torch.tensor([[1, 3, 5]])).logits[0, -1] / 1.5).softmax(dim=0)
    assert (shares - expected).abs().max() < 0.03
    assert model.generation_config.top_k == 1  # left as it was


def test_padding_on_the_left_changes_nothing():
    model = small_llama(8)
    config = sampling.sampling_config(6, 1.0, [2], 0)
    config.do_sample, config.top_k, config.top_p = False, None, None  # greedy: comparable from batch to batch
    prompts = [PolicyPrompt([], [1, 3], "row 1"), PolicyPrompt([], [1, 4, 5, 6, 7, 3, 4], "row 2")]
    together = rollouts.sample(model, DigitTokenizer(), prompts, config, None, seed=0).texts
    assert together == [
        rollouts.sample(model, DigitTokenizer(), [each], config, None, seed=0).texts[0] for each in prompts
    ]


def test_logits_of_one_prompt_that_are_not_finite_name_its_row():
    model = small_llama(8)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.inf
        model.lm_head.weight[7] = 0
    prompts = [PolicyPrompt([], [1, token], f"row {token}") for token in (5, 7, 6)]
    with pytest.raises(DivergedError, match=r"logits are not finite at row 7; "):
        rollouts.sample(model, DigitTokenizer(), prompts, sampling.sampling_config(1, 1.0, [2], 0), None, 0)


def split_of(*contents: str) -> Dataset:
    messages = [[{"role": "user", "content": content}] for content in contents]
    return Dataset.from_dict({"prompt": messages, "place": [f"row {row}" for row in range(1, len(contents) + 1)]})


def test_prompts_are_unique_short_enough_and_open_the_answer(tokenizer):
    prompts = rollouts.unique_prompts(split_of("Hi", "Hi", "word " * 60, "Name a colour."), tokenizer, 32)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["Hi", "Name a colour."]
    assert [prompt.place for prompt in prompts] == ["row 1", "row 4"]
    for prompt in prompts:
        opened = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)["input_ids"]
        assert prompt.ids == opened
    longest = len(prompts[1].ids)
    assert len(rollouts.unique_prompts(split_of("Name a colour."), tokenizer, longest)) == 1
    assert rollouts.unique_prompts(split_of("Name a colour."), tokenizer, longest - 1) == []


def test_a_prompt_that_the_template_refuses_is_named(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    messages = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]]
    split = Dataset.from_dict({"prompt": messages, "place": ["pairs.jsonl row 1"]})
    with pytest.raises(InputError, match=r"pairs\.jsonl row 1: the chat template refuses"):
        rollouts.unique_prompts(split, refusing, 32)


def test_too_few_prompts_are_told_with_what_to_change(tokenizer):
    splits = {"train": split_of("a", "b", "c", "word " * 60), "validation": split_of("d", "e", "f")}
    train, validation = rollouts.read_prompts(splits, tokenizer, "data", 32, 3, 2, 0)
    assert len(train) == 3 and len(validation) == 2
    with pytest.raises(InputError, match="data: 3 training and 3 validation prompts have at most 32 tokens, 4 and 1"):
        rollouts.read_prompts(splits, tokenizer, "data", 32, 4, 2, 0)


def test_every_pass_sees_every_prompt_once():
    prompts = [PolicyPrompt([], [number], "") for number in range(10)]
    drawn = [prompt.ids[0] for batch in itertools.islice(rollouts.batches(prompts, 4, seed=1), 5) for prompt in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


def test_a_model_without_room_for_prompt_and_completion_is_refused():
    rollouts.check_room(small_llama(8), "base", 64)
    with pytest.raises(InputError, match=re.escape("more than the 64 tokens that base takes")):
        rollouts.check_room(small_llama(8), "base", 65)


def test_answers_stand_in_the_order_of_the_prompts_with_their_kl():
    policy, reference = small_llama(8, 0), small_llama(8, 1)
    prompts = [PolicyPrompt([], [1, *[3] * (number % 3)], f"row {number}") for number in range(7)]
    config = sampling.sampling_config(4, 0.8, [2], 0)
    options = {"prompts": prompts, "config": config, "dtype": None, "seed": 5, "batch_size": 3, "title": "Answers"}
    accelerator = Accelerator(cpu=True)

    def answers_of(model, micro_batch_size):
        arguments = accelerator, DigitTokenizer(), reference, model
        return rollouts.answers_of(*arguments, **options, micro_batch_size=micro_batch_size)

    after, before = answers_of(policy, 2), answers_of(reference, 2)
    assert not before.kl.any()
    assert answers_of(policy, 8).kl == pytest.approx(after.kl, abs=1e-4)
    expected = []
    for start in (0, 3, 6):
        seed = rollouts.step_seed(5, 0, start)
        sampled = rollouts.sample(policy, DigitTokenizer(), prompts[start : start + 3], config, None, seed)
        log_probs, others = (log_probabilities(model, sampled, 0.8)[0] for model in (policy, reference))
        kl = sequence_kl(log_probs, others, sampled.mask).tolist()
        lengths = sampled.mask.sum(dim=1).tolist()
        expected += zip(sampled.texts, lengths, sampled.ended.tolist(), kl, strict=True)
    texts, lengths, ended, kl = zip(*expected, strict=True)
    assert after.texts == list(texts) and after.lengths.tolist() == list(lengths)
    assert after.ended.tolist() == list(ended) and after.kl == pytest.approx(kl, abs=1e-4)
    assert [len(text.split()) for text in after.texts] == after.lengths.tolist()


def test_the_real_model_in_the_type_of_this_machine(smollm, tokenizer):
    """Texts that begin as answers do; a policy that is the reference is at no KL from it."""
    model, dtype = models.load_sft_model(smollm), autocast_dtype(torch.device("cpu"))  # emulated bf16 takes minutes
    prompts = rollouts.unique_prompts(split_of("Hi", "Name a colour, please."), tokenizer, 64)
    config = sampling.sampling_config(8, 1.0, models.end_token_ids(model, tokenizer), tokenizer.pad_token_id)
    sampled = rollouts.sample(model, tokenizer, prompts, config, dtype, seed=0)
    assert all(re.search("[a-z]", text) for text in sampled.texts)
    with torch.no_grad():
        one, entropy = log_probabilities(model, sampled, 1.0, dtype)
        other, _ = log_probabilities(model, sampled, 1.0, dtype)
    assert one.dtype is torch.float32
    assert not sequence_kl(one, other, sampled.mask).any()
    per_token = entropy[sampled.mask]
    assert 0 < per_token.mean() < math.log(49152) / 2  # far surer than guessing
