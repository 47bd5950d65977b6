"""Completions, sampled token by token."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_reinforce import small_llama
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from reward_pipeline import sampling
from reward_pipeline.reinforce import DivergedError, token_distributions
from reward_pipeline.sampling import PolicyPrompt


class DigitTokenizer:
    """Token ids as digits."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]

    def decode(self, row, skip_special_tokens):
        return " ".join(map(str, row.tolist()))


class ByteTokenizer:
    """Token ids as bytes, of which it takes two or four for some characters; control tokens are none."""

    BYTES = (b"", b"", b"", b"\xc3", b"\xa9", b"\xf0\x9f", b"\xa6\x94", b"a")

    def batch_decode(self, rows, skip_special_tokens):
        return [b"".join(self.BYTES[number] for number in row).decode("utf-8", "replace") for row in rows]

    def decode(self, row, skip_special_tokens):
        return self.batch_decode([row.tolist()], skip_special_tokens)[0]


def sampled(model, prompts, new_tokens=6, temperature=1.0, seeds=None):
    config = sampling.sampling_config(new_tokens, temperature, [2], 0)
    return sampling.sample(model, DigitTokenizer(), prompts, config, None, seeds or range(len(prompts)))


def prompts_of(*ids: list[int]) -> list[PolicyPrompt]:
    return [PolicyPrompt([], each, f"row {number}") for number, each in enumerate(ids, start=1)]


def test_samples_come_from_the_distribution_that_is_scored():
    """Whatever the model's own generation settings say; at a temperature other than 1."""
    model = small_llama(8)
    hostile = {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 9.0, "suppress_tokens": [5]}
    for name, value in hostile.items():
        setattr(model.generation_config, name, value)
    prompts = prompts_of([1, 3, 5]) * 4000
    drawn = sampled(model, prompts, new_tokens=1, temperature=1.5)
    shares = torch.bincount(drawn.ids[:, -1], minlength=8) / len(prompts)
    expected = (model(torch.tensor([[1, 3, 5]])).logits[0, -1] / 1.5).softmax(dim=0)
    assert (shares - expected).abs().max() < 0.03


def other_models():
    """Attention in windows, over layers of two kinds, and learned positions; all with room for 64 tokens."""
    sizes = {
        "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0,
    }  # fmt: skip
    yield lambda: small_llama(8)
    yield lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=4))
    yield lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    )
    yield lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    )


@pytest.mark.parametrize("make", other_models(), ids=["llama", "mistral", "gemma3", "gpt2"])
def test_every_token_is_the_one_that_its_number_says(make):
    """From logits of whole sequences without padding or cache, one row at a time. Rows end at different times."""
    torch.manual_seed(0)
    model = make().eval()
    prompts = prompts_of([1, 3], *[[1, 4, 5, 6, 7, 3, 4]] * 3, [1, 5], [1, 6, 6, 6], *[[1, 7, 3]] * 6)
    drawn = sampled(model, prompts, seeds=range(100, 112))
    assert 0 < drawn.ended.sum() < len(prompts)
    width = 7
    for row, prompt in enumerate(prompts):
        sequence = list(prompt.ids)
        for number in np.random.default_rng(100 + row).random(6, dtype=np.float32):
            with torch.no_grad():
                shares = model(torch.tensor([sequence]), use_cache=False).logits[0, -1].softmax(dim=0)
            sequence.append(int((shares.cumsum(dim=0) <= number).sum().clamp(max=7)))
            if sequence[-1] == 2:
                break
        own = drawn.ids[row][drawn.attention_mask[row].bool()].tolist()
        assert own == sequence and drawn.ended[row].item() == (sequence[-1] == 2)
        assert drawn.texts[row] == " ".join(map(str, sequence[len(prompt.ids) :]))
        assert drawn.attention_mask[row, :width].sum() == len(prompt.ids)
        assert not drawn.ids[row][~drawn.attention_mask[row].bool()].any()


def test_a_prompt_that_stands_several_times_is_read_once(monkeypatch):
    model, read = small_llama(8), []
    hook = model.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
    prompts = prompts_of([1, 3], [1, 4, 5])
    several = sampled(model, [each for each in prompts for _ in range(4)])
    hook.remove()
    assert read[0] == 2 and read[1] <= 8
    alone = [sampled(model, [each], seeds=[number]).texts[0] for number, each in enumerate([*prompts[:1] * 4])]
    assert several.texts[:4] == alone and len(set(alone)) > 1


def test_groups_of_prompts_are_put_together(monkeypatch):
    model = small_llama(8)
    prompts = prompts_of([1, 3], [1, 4], [1, 4, 5, 6], [1, 5, 5, 5, 5, 5])
    whole = sampled(model, prompts)
    monkeypatch.setattr(sampling, "PROMPTS_AT_ONCE", 1)
    assert torch.equal(sampled(model, prompts).ids, whole.ids)


def test_a_number_at_the_very_end_gives_a_token_that_has_a_probability():
    logits = torch.tensor([[0.0, 1.0, -math.inf, -math.inf], [-math.inf, 0.0, 0.0, -math.inf]])
    last = torch.tensor([1.0, 1.0])  # what a product with the greatest number below 1 can be rounded to
    assert sampling.drawn(logits, last).tolist() == [1, 2]
    assert sampling.drawn(logits, torch.zeros(2)).tolist() == [0, 1]


def test_completions_that_have_ended_leave_the_batch():
    model, sizes = small_llama(8), []
    hook = model.register_forward_pre_hook(lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    drawn = sampled(model, prompts_of(*[[1, 3 + number % 5] for number in range(16)]), new_tokens=12)
    hook.remove()
    lengths = drawn.mask.sum(dim=1)
    assert sizes[2:] == [int((lengths > place).sum()) for place in range(1, len(sizes) - 1)]
    assert sizes[-1] < 16


def test_log_probabilities_are_those_of_the_cache():
    """The distributions that are scored, over right-padded rows, and those that were sampled from are the same."""
    model = small_llama(8)
    drawn = sampled(model, prompts_of([1, 3], [1, 4, 5, 6, 7, 3, 4]))
    distributions = token_distributions(model, drawn, 1.0)
    for row, place in drawn.mask.nonzero().tolist():
        before = drawn.ids[row, : 7 + place][drawn.attention_mask[row, : 7 + place].bool()]
        expected = model(before[None]).logits[0, -1].log_softmax(dim=0)
        assert torch.allclose(distributions[row, place], expected, atol=1e-5)


def test_logits_of_one_prompt_that_are_not_finite_name_its_row():
    model = small_llama(8)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.inf
        model.lm_head.weight[7] = 0
    with pytest.raises(DivergedError, match=r"logits are not finite at row 2; "):
        sampled(model, prompts_of([1, 5], [1, 7], [1, 6]), new_tokens=1)


# --- as it grows -----------------------------------------------------------------------------------------------------


def streamed(model, tokenizer, seed: int, temperature: float = 1.0) -> list[str]:
    """What a stream says after each token of a completion, and the text of `sample` after all of these."""
    (prompt,) = prompts_of([1, 3, 5])
    config = sampling.sampling_config(8, temperature, [2], 0)
    whole = sampling.sample(model, tokenizer, [prompt], config, None, [seed])
    return [*sampling.stream(model, tokenizer, prompt, config, seed), whole.texts[0]]


def test_a_stream_grows_by_tokens_to_the_sample_of_its_seed():
    model, lengths = small_llama(8), []
    for seed in range(12):
        *texts, whole = streamed(model, DigitTokenizer(), seed)
        assert texts[-1] == whole
        assert [text.split() for text in texts] == [whole.split()[:end] for end in range(1, len(texts) + 1)]
        lengths.append(len(texts))
    assert min(lengths) < max(lengths) == 8  # some end by themselves


def test_a_stream_shows_no_part_of_a_character_that_is_to_come():
    model, rewritten = small_llama(8), 0
    for seed in range(12):
        *texts, whole = streamed(model, ByteTokenizer(), seed, temperature=9.0)
        assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
        rewritten += "é" in whole or "🦔" in whole
    assert rewritten


def test_a_stream_ends_with_the_text_of_the_sample_whatever_its_last_token():
    """Also where that is a part of a character, which then stays one."""
    model, broken = small_llama(8), 0
    for seed in range(12):
        *texts, whole = streamed(model, ByteTokenizer(), seed, temperature=9.0)
        broken += whole.endswith("\ufffd")
        assert texts[-1] == whole
    assert broken


def test_a_stream_leaves_gradients_as_they_were():
    """Between its tokens, and where nobody hears it to its end."""
    (prompt,) = prompts_of([1, 3, 5])
    config = sampling.sampling_config(8, 1.0, [], 0)
    model, within = small_llama(8), []
    model.register_forward_pre_hook(lambda *given: within.append(torch.is_grad_enabled()))
    growing = sampling.stream(model, DigitTokenizer(), prompt, config, 0)
    next(growing)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        next(growing)
        assert not torch.is_grad_enabled()
    next(growing)
    assert torch.is_grad_enabled()
    growing.close()
    assert torch.is_grad_enabled() and within == [False] * 3


def test_a_stream_of_logits_that_are_not_finite_stops():
    model = small_llama(8)
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    config = sampling.sampling_config(4, 1.0, [2], 0)
    with pytest.raises(DivergedError, match="logits are not finite at the row"):
        [*sampling.stream(model, DigitTokenizer(), PolicyPrompt([], [1, 5], "the row"), config, 0)]
