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
from test_sampling import DigitTokenizer

from reward_pipeline import models, rollouts, sampling
from reward_pipeline.devices import autocast_dtype
from reward_pipeline.files import InputError
from reward_pipeline.reinforce import entropies, log_probabilities, random_seeds, sequence_kl, token_distributions
from reward_pipeline.sampling import PolicyPrompt


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


@pytest.fixture
def answers_of():
    """`rollouts.answers_of` on seven prompts of tiny models; by default with KL to a reference."""
    reference = small_llama(8, 1)
    config = sampling.sampling_config(4, 0.8, [2], 0)
    options = {"prompts": SEVEN, "config": config, "dtype": None, "seed": 5, "batch_size": 3, "title": "Answers"}

    def call(policy, micro_batch_size=2, **changes):
        settings = options | {"reference": reference, "micro_batch_size": micro_batch_size} | changes
        return rollouts.answers_of(Accelerator(cpu=True), DigitTokenizer(), policy, **settings)

    call.reference, call.config = reference, config
    return call


SEVEN = [PolicyPrompt([], [1, *[3] * (number % 3)], f"row {number}") for number in range(7)]


def test_answers_stand_in_the_order_of_the_prompts_with_their_kl(answers_of):
    policy = small_llama(8, 0)
    after = answers_of(policy)
    assert answers_of(policy, micro_batch_size=8).kl == pytest.approx(after.kl, abs=1e-4)
    seeds = random_seeds(7, 5, 0, 0)
    for number, prompt in enumerate(SEVEN):
        alone = sampling.sample(policy, DigitTokenizer(), [prompt], answers_of.config, None, [seeds[number]])
        log_probs, others = (
            log_probabilities(token_distributions(model, alone, 0.8), alone) for model in (policy, answers_of.reference)
        )
        assert alone.texts == [after.texts[number]] and len(alone.texts[0].split()) == after.lengths[number]
        assert alone.ended.tolist() == [after.ended[number]]
        assert sequence_kl(log_probs, others, alone.mask).item() == pytest.approx(after.kl[number], abs=1e-4)


def test_no_prompts_have_no_answers(answers_of):
    """Where no constraint fits into a prompt."""
    none = answers_of(small_llama(8), prompts=[])
    assert none.texts == [] and len(none.lengths) == len(none.kl) == 0


def test_the_reference_is_at_no_kl_from_itself(answers_of):
    measured, left = (answers_of(answers_of.reference, reference=each) for each in (answers_of.reference, None))
    assert not measured.kl.any() and not left.kl.any() and measured.texts == left.texts


def test_a_share_of_the_prompts_gets_a_constraint_where_there_is_room(tokenizer):
    prompts = rollouts.unique_prompts(split_of(*(f"Name the colour {number}." for number in range(40))), tokenizer, 64)
    half = rollouts.constrained(prompts, tokenizer, 200, seed=1, share=0.5, held_out=False)
    assert [prompt.place for prompt in half] == [prompt.place for prompt in prompts]
    asked = [prompt for prompt in half if prompt.constraint]
    assert len(asked) == 20 and len({prompt.constraint.kind for prompt in asked}) == 20
    for prompt, plain in zip(half, prompts, strict=True):
        assert prompt == plain or plain.messages[0]["content"] in prompt.messages[0]["content"]
        opened = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)["input_ids"]
        assert prompt.ids == opened
    longest = max(len(prompt.ids) for prompt in prompts)
    assert rollouts.constrained(prompts, tokenizer, longest, seed=1, share=1, held_out=True) == prompts  # no room


def test_the_real_model_in_the_type_of_this_machine(smollm, tokenizer):
    """Texts that begin as answers do; a policy that is the reference is at no KL from it."""
    model, dtype = models.load_sft_model(smollm), autocast_dtype(torch.device("cpu"))  # emulated bf16 takes minutes
    prompts = rollouts.unique_prompts(split_of("Hi", "Name a colour, please."), tokenizer, 64)
    config = sampling.sampling_config(8, 1.0, models.end_token_ids(model, tokenizer), tokenizer.pad_token_id)
    sampled = sampling.sample(model, tokenizer, prompts, config, dtype, [0, 1])
    assert all(re.search("[a-z]", text) for text in sampled.texts)
    with torch.no_grad():
        one, other = (token_distributions(model, sampled, 1.0, dtype) for _ in range(2))
    assert one.dtype is torch.float32
    log_probs, others = log_probabilities(one, sampled), log_probabilities(other, sampled)
    assert not sequence_kl(log_probs, others, sampled.mask).any()
    per_token = entropies(one)[sampled.mask]
    assert per_token.min() >= 0 and per_token.max() < math.log(model.config.vocab_size)
