"""Scores are those of the plain model, alone and in any company; what is built on them does what it says."""

import copy
import gc
import json
import math
import multiprocessing
import pickle
import re
import shutil
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, save_reward_model
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from trl import GRPOConfig, GRPOTrainer

from reward_pipeline import InputError, RewardModelEvaluator, conversations, models
from reward_pipeline import evaluator as room
from reward_pipeline.conversations import encode

PROMPTS = [
    "Hi",
    "Name a colour.",
    "Почему небо голубое?",
    "word " * 300,
    "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc",
]
RESPONSES = ["Hello!", "Red, or blue: " + "both " * 200, "Из-за рассеяния света. 🌤", "!", "<|im_end|> d"]


@pytest.fixture(scope="module")
def evaluator(tiny_reward_model):
    return RewardModelEvaluator(tiny_reward_model, device="cpu")


def changed(directory: str, target: Path, **settings) -> str:
    """A copy of a reward model with other settings in its config; None takes one out."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(target)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_score_is_the_same_alone_in_a_batch_and_under_padding(evaluator):
    alone = [evaluator.get_reward_score(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert len({round(score, 3) for score in alone}) == len(alone)
    for batch_size in (1, 2, 5):
        together = evaluator.get_reward_scores(PROMPTS, RESPONSES, batch_size=batch_size)
        assert together == pytest.approx(alone, abs=1e-5)
    ids = encode(evaluator.tokenizer, PROMPTS[0], RESPONSES[0], 64)
    padded = torch.tensor([ids + [evaluator.model.config.pad_token_id] * 50])
    mask = torch.tensor([[1] * len(ids) + [0] * 50])
    with torch.no_grad():
        for options in ({}, {"use_cache": False}):  # as transformers computes it, and with prefixes shared
            logits = evaluator.model(padded, attention_mask=mask, **options).logits
            assert logits.item() == pytest.approx(alone[0], abs=1e-5)


def test_many_responses_are_scored_as_in_parts(evaluator, monkeypatch):
    prompts = [f"Prompt {number % 7}" for number in range(2000)]
    responses = [f"Answer {number % 301} " + "and so on " * (number % 3) for number in range(2000)]
    sizes, steps = [], []

    def tokenize(*args, real=conversations.encode_batch, **options):
        sizes.append(len(args[1]))
        return real(*args, **options)

    monkeypatch.setattr(conversations, "encode_batch", tokenize)
    monkeypatch.setattr(conversations, "CHUNK", 256)
    together = evaluator.get_reward_scores(prompts, responses, progress=steps.append)
    assert max(sizes) == 256 and sum(sizes) == 2000
    assert sum(steps) == 2000 and len(steps) == math.ceil(len(set(zip(prompts, responses, strict=True))) / 16)
    for start in (0, 777, 1999):
        part = slice(start, start + 100)
        assert evaluator.get_reward_scores(prompts[part], responses[part]) == pytest.approx(together[part], abs=1e-5)


def test_progress_is_shown_where_it_is_asked_for(ensemble, capsys):
    ensemble.get_reward_scores(PROMPTS, RESPONSES)
    assert not capsys.readouterr().err
    ensemble.get_reward_scores(PROMPTS, RESPONSES, progress=True)
    assert "10/10" in capsys.readouterr().err  # each answer by both members


def test_scores_come_in_input_order(evaluator):
    scores = evaluator.get_reward_scores(PROMPTS, RESPONSES)
    backwards = evaluator.get_reward_scores(PROMPTS[::-1], RESPONSES[::-1])
    assert backwards[::-1] == pytest.approx(scores, abs=1e-5)
    assert all(type(score) is float for score in scores)
    assert evaluator.get_reward_scores([], []) == []


def test_equal_inputs_get_exactly_equal_scores(evaluator):
    responses = ["red", "blue " * 40, "red", "  red ", "blue " * 300, "blue " * 301]
    scores = evaluator.get_reward_scores(["Hi"] * 6, responses, batch_size=1)
    assert scores[0] == scores[2] == scores[3]
    assert scores[4] == scores[5]  # the same within max_length
    assert len(set(scores)) == 3


def test_responses_are_ranked_best_first(evaluator):
    responses = ["red", "blue", "green", "seven", "red"]
    ranking = evaluator.compare_responses("Name a colour.", responses)
    assert sorted(response for response, _ in ranking) == sorted(responses)
    scores = [score for _, score in ranking]
    assert scores == sorted(scores, reverse=True)
    for response, score in ranking:
        assert score == pytest.approx(evaluator.get_reward_score("Name a colour.", response), abs=1e-5)


def test_a_dialogue_is_scored_with_its_context(evaluator):
    turns = [("Hi", "Hello!"), ("How are you?", "Fine."), ("Good.", "Yes.")]
    scores = evaluator.evaluate_conversation(turns)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How are you?"},
    ]
    marked = "Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nHow are you?"
    assert scores[0] == pytest.approx(evaluator.get_reward_score("Hi", "Hello!"), abs=1e-5)
    assert scores[1] == pytest.approx(evaluator.get_reward_score(messages, "Fine."), abs=1e-5)
    assert scores[1] == pytest.approx(evaluator.get_reward_score(marked, "Fine."), abs=1e-5)
    assert scores[1] != pytest.approx(evaluator.get_reward_score("How are you?", "Fine."), abs=1e-3)
    assert len(scores) == 3
    assert evaluator.evaluate_conversation([]) == []
    assert evaluator.evaluate_conversation(zip(*zip(*turns, strict=True), strict=True)) == scores
    dialogue = [*messages, {"role": "assistant", "content": "Fine."}]
    assert evaluator.evaluate_conversation(dialogue) == pytest.approx(scores[:2], abs=1e-5)


def test_a_dialogue_may_be_a_message_list(evaluator):
    """Every answer is scored with all that stands before it, system turns included; the last turn may be the user's."""
    system, user, late = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        "Answer in verse.",
    )
    dialogue = [system, user, {"role": "assistant", "content": "Hello!"}, {"role": "system", "content": late}, user]
    dialogue += [{"role": "assistant", "content": "Hi, hi."}, user]
    expected = [
        evaluator.get_reward_score([system, user], "Hello!"),
        evaluator.get_reward_score(dialogue[:5], "Hi, hi."),
    ]
    assert evaluator.evaluate_conversation(dialogue) == pytest.approx(expected, abs=1e-5)
    assert evaluator.evaluate_conversation([system, user]) == []


@pytest.mark.parametrize(
    "turns",
    [
        ["Hi", "Yo"],
        "Hi",
        [("Hi", "Hello!"), {"role": "user", "content": "Bye"}],
        [("Hi",)],
        [("Hi", None)],
        {"role": "user", "content": "Hi"},
        [("Hi", "Hello!", "Bye")],
    ],
)
def test_what_is_no_dialogue_is_refused(evaluator, turns):
    with pytest.raises(TypeError, match=r"a dialogue is a message list or \(user text, answer\) pairs"):
        evaluator.evaluate_conversation(turns)


@pytest.mark.parametrize("opening", [[], [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]])
def test_an_answer_of_a_dialogue_follows_a_user_turn(evaluator, opening):
    with pytest.raises(ValueError, match=f"turn {len(opening)}: an answer follows a user turn"):
        evaluator.evaluate_conversation([*opening, {"role": "assistant", "content": "b"}])


def test_turns_in_a_list_before_the_answer_are_context(evaluator):
    """As TRL has it for completions of several turns; a list may repeat the prompt."""
    hello, question = {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "How are you?"}
    opening, fine = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Fine."}
    expected = evaluator.evaluate_conversation([("Hi", "Hello!"), ("How are you?", "Fine.")])[1]
    completions = [[hello, question, fine], [opening, hello, question, fine], [fine]]
    scores = evaluator.reward_function(["Hi", "Hi", [opening, hello, question]], completions)
    assert scores == pytest.approx([expected] * 3, abs=1e-5)
    with pytest.raises(ValueError, match=r"answers \[user: 'Bye'\], but the prompt is \[user: 'Hi'\]"):
        evaluator.get_reward_score("Hi", [{"role": "user", "content": "Bye"}, fine])


def test_max_length_comes_from_training_and_can_be_changed(evaluator):
    assert evaluator.max_length == 128
    long = "word " * 200
    default = evaluator.get_reward_score("Hi", long)
    assert default == pytest.approx(evaluator.get_reward_score("Hi", long, max_length=128), abs=1e-6)
    assert default != pytest.approx(evaluator.get_reward_score("Hi", long, max_length=64), abs=1e-3)


def test_mixed_precision_moves_scores_only_slightly(tiny_reward_model, monkeypatch):
    monkeypatch.setattr(room, "autocast_dtype", lambda device: torch.bfloat16)
    plain = RewardModelEvaluator(tiny_reward_model, device="cpu")
    mixed = RewardModelEvaluator(tiny_reward_model, device="cpu", mixed_precision=True)
    one, other = (each.get_reward_scores(PROMPTS, RESPONSES) for each in (plain, mixed))
    assert one != other
    assert one == pytest.approx(other, abs=0.1)
    assert {each.weight.dtype for each in models.inner_linear_layers(mixed.model)} == {torch.bfloat16}
    plain.dtype = torch.bfloat16  # the weights are rounded by autocast then
    assert plain.get_reward_scores(PROMPTS, RESPONSES) == other


def test_a_model_of_an_earlier_version_reads_prompts_as_it_was_trained(tiny_reward_model, evaluator, tmp_path):
    """At most half of the length for the prompt, also where the whole would fit."""
    earlier = RewardModelEvaluator(changed(tiny_reward_model, tmp_path / "earlier", reward_format=None), device="cpu")
    prompt = "word " * 80
    ids = encode(earlier.tokenizer, prompt, "yes", 128, halve_prompt=True)
    assert len(ids) < len(encode(earlier.tokenizer, prompt, "yes", 128)) < 128
    with torch.no_grad():
        expected = earlier.model(torch.tensor([ids])).logits.item()
    assert earlier.get_reward_score(prompt, "yes") == pytest.approx(expected, abs=1e-5)
    assert evaluator.get_reward_score(prompt, "yes") != pytest.approx(expected, abs=1e-3)
    assert earlier.get_reward_score("Hi", "yes") == pytest.approx(evaluator.get_reward_score("Hi", "yes"), abs=1e-5)


@pytest.mark.parametrize(
    "prompts, responses, error",
    [
        ("Hi", "Hello", TypeError),
        (["Hi"], ["a", "b"], ValueError),
        (["Hi"], [None], TypeError),
        ([None], ["a"], TypeError),
        ([[{"role": "assistant", "content": "a"}]], ["a"], ValueError),
    ],
)
def test_bad_arguments_are_refused(evaluator, prompts, responses, error):
    with pytest.raises(error):
        evaluator.get_reward_scores(prompts, responses)


def test_a_length_beyond_the_positions_of_the_model_is_refused(evaluator):
    assert math.isfinite(evaluator.get_reward_score("Hi", "Hello", max_length=2048))
    with pytest.raises(ValueError, match=f"max_length is 2049, but {evaluator.model.name_or_path} takes 2048 tokens"):
        evaluator.get_reward_score("Hi", "Hello", max_length=2049)


@pytest.mark.parametrize("empty", ["", " \n\t", [{"role": "assistant", "content": " "}]])
def test_an_empty_answer_is_refused_by_its_index(evaluator, empty):
    """Whatever reward the model would give it."""
    for use in (
        evaluator.compare_responses,
        evaluator.best_of_n,
        lambda *given: evaluator.filter_responses(*given, top_k=1),
    ):
        with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
            use("Hi", ["Hello!", empty, "Hm."])
    with pytest.raises(ValueError, match=r"responses\[0\] is empty"):
        evaluator.get_reward_score("Hi", empty)
    with pytest.raises(ValueError, match=r"responses_b\[1\] is empty"):
        evaluator.compare_models(["Hi", "Bye"], ["a", "b"], ["a", empty])
    with pytest.raises(ValueError, match="turn 3: the answer is empty"):
        evaluator.evaluate_conversation([("Hi", "Hello!"), ("Bye", " ")])


def test_an_empty_completion_is_ranked_as_the_model_ranks_it(evaluator):
    """A policy samples some, and its training goes on."""
    ids = [encode(evaluator.tokenizer, "Hi", text, 128) for text in ("", "Hello!")]
    with torch.no_grad():
        expected = [evaluator.model(torch.tensor([each])).logits.item() for each in ids]
    assert evaluator.reward_function(["Hi"] * 3, ["", "Hello!", " "]) == pytest.approx(
        [*expected, expected[0]], abs=1e-5
    )


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"max_length": 0}, {"max_length": 31}])
def test_impossible_sizes_are_refused(evaluator, options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is .* must be at least"):
        evaluator.get_reward_scores(["Hi"], ["Hello"], **options)


def test_rewards_that_are_not_finite_are_refused(tiny_reward_model):
    evaluator = RewardModelEvaluator(tiny_reward_model, device="cpu")
    with torch.no_grad():
        evaluator.model.score.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=f"{tiny_reward_model}: returned a reward that is not finite"):
        evaluator.get_reward_score("Hi", "Hello")


# --- ensembles -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(tiny_reward_model, other_reward_model):
    return RewardModelEvaluator([tiny_reward_model, other_reward_model], device="cpu")


def test_an_ensemble_scores_by_the_mean_and_shows_the_spread(ensemble, evaluator, other_reward_model):
    other = RewardModelEvaluator(other_reward_model, device="cpu")
    members = [each.get_reward_scores(PROMPTS, RESPONSES) for each in (evaluator, other)]
    assert ensemble.get_member_scores(PROMPTS, RESPONSES) == pytest.approx(np.array(members), abs=1e-5)
    scores, stds = ensemble.get_reward_scores(PROMPTS, RESPONSES, with_std=True)
    assert scores == pytest.approx(np.mean(members, axis=0), abs=1e-5)
    assert stds == pytest.approx(np.abs(np.subtract(*members)) / 2, abs=1e-5)  # of two values
    assert ensemble.get_reward_score("Hi", "Hello!", with_std=True) == pytest.approx((scores[0], stds[0]), abs=1e-5)
    assert ensemble.max_length == 128 and other.max_length == 64  # every member cuts as it was trained


def test_every_member_tells_what_it_cut(ensemble):
    prompts, answers = ["Hi", "word " * 100, "Hi"], ["yes", "yes", "no " * 100]  # of 64 tokens, and of 128
    scores, cuts = ensemble.get_member_scores_and_cuts(prompts, answers)
    assert scores == pytest.approx(ensemble.get_member_scores(prompts, answers))
    assert cuts.tolist() == [
        [[False, False], [False, False], [False, False]],
        [[False, False], [True, False], [False, True]],
    ]


def test_a_penalty_lowers_rewards_by_the_spread(ensemble, tiny_reward_model, other_reward_model):
    careful = RewardModelEvaluator([tiny_reward_model, other_reward_model], device="cpu", std_penalty=0.5)
    scores, stds = ensemble.get_reward_scores(PROMPTS, RESPONSES, with_std=True)
    expected = [score - 0.5 * std for score, std in zip(scores, stds, strict=True)]
    assert careful.get_reward_scores(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)


def test_one_model_has_no_spread(evaluator):
    assert evaluator.get_reward_score("Hi", "Hello!", with_std=True)[1] == 0.0


def test_normalised_rewards_are_in_standard_deviations(other_reward_model, tiny_reward_model):
    plain = RewardModelEvaluator(other_reward_model, device="cpu")
    normal = RewardModelEvaluator(other_reward_model, device="cpu", normalize=True)
    score = plain.get_reward_score("Hi", "Hello!")
    assert normal.get_reward_score("Hi", "Hello!") == pytest.approx((score - 1.5) / 0.25, abs=1e-5)
    with pytest.raises(InputError, match="no reward_mean"):
        RewardModelEvaluator([other_reward_model, tiny_reward_model], normalize=True)


@pytest.fixture
def with_form_term(other_reward_model, tmp_path) -> str:
    """A reward model as a training with the form term leaves it."""
    model = shutil.copytree(other_reward_model, tmp_path / "with_form_term")
    config = json.loads((model / "config.json").read_text())
    config |= {"form_model": {"exclamations": 2.0}, "form_term": True}
    config |= {"reward_with_form_mean": 3.0, "reward_with_form_std": 0.5}
    (model / "config.json").write_text(json.dumps(config))
    return str(model)


def test_there_is_one_reward_with_the_form_term_and_one_without(with_form_term, other_reward_model, tiny_reward_model):
    prompts, answers = ["Hi", "Hi", "Bye"], ["Hello!", "Hello", "So long!!"]
    plain = RewardModelEvaluator(other_reward_model, device="cpu").get_reward_scores(prompts, answers)
    assert RewardModelEvaluator(with_form_term, device="cpu").get_reward_scores(prompts, answers) == plain
    terms = [2 * math.log(2), 0.0, 2 * math.log(3)]  # log(1 + number of exclamation marks)
    whole = RewardModelEvaluator(with_form_term, device="cpu", form=True).get_reward_scores(prompts, answers)
    assert whole == pytest.approx(np.add(plain, terms), abs=1e-6)
    normal = RewardModelEvaluator(with_form_term, device="cpu", form=True, normalize=True)
    assert normal.get_reward_scores(prompts, answers) == pytest.approx((np.array(whole) - 3) / 0.5, abs=1e-6)
    both = RewardModelEvaluator([with_form_term, with_form_term], device="cpu", form=True)
    assert both.get_reward_scores(prompts, answers) == pytest.approx(whole, abs=1e-6)
    with pytest.raises(InputError, match="was trained without the form term; leave form out"):
        RewardModelEvaluator([with_form_term, tiny_reward_model], form=True)


def test_an_evaluator_needs_a_directory():
    with pytest.raises(ValueError, match="names no model"):
        RewardModelEvaluator([])


# --- choosing and comparing ------------------------------------------------------------------------------------------

ANSWERS = ["red", "blue", "green", "seven"]


def test_best_of_n_is_the_first_of_the_ranking(evaluator):
    assert evaluator.best_of_n("Name a colour.", ANSWERS) == evaluator.compare_responses("Name a colour.", ANSWERS)[0]
    assert evaluator.best_of_n("Name a colour.", ["red", " red"])[0] == "red"  # equal rewards: the first one
    for none in ([], np.array([])):
        with pytest.raises(ValueError, match="at least one"):
            evaluator.best_of_n("Name a colour.", none)
    assert evaluator.best_of_n("Name a colour.", np.array(ANSWERS)) == evaluator.best_of_n("Name a colour.", ANSWERS)


def test_filtered_responses_pass_what_was_asked_for(evaluator):
    ranking = evaluator.compare_responses("Name a colour.", ANSWERS)
    threshold = ranking[1][1] - 1e-4  # rewards differ by rounding from batch to batch
    keep = lambda **options: evaluator.filter_responses("Name a colour.", ANSWERS, **options)  # noqa: E731
    assert keep(min_score=threshold) == ranking[:2]
    assert keep(top_k=3) == ranking[:3]
    assert keep(min_score=threshold, top_k=1) == ranking[:1]
    assert keep(min_score=ranking[0][1] + 1) == keep(top_k=0) == []
    for options in ({}, {"top_k": -1}):
        with pytest.raises(ValueError, match=r"min_score or top_k|negative"):
            keep(**options)


def test_models_are_compared_prompt_by_prompt(evaluator):
    prompts = [f"Say {number}." for number in range(12)]
    a, b = [f"{number}!" for number in range(12)], [f"no {number} words" for number in range(12)]
    difference = np.subtract(evaluator.get_reward_scores(prompts, a), evaluator.get_reward_scores(prompts, b))
    result = evaluator.compare_models(prompts, a, b)
    assert result["n"] == 12
    assert result["win_rate"] == np.mean(difference > 0)
    assert result["mean_difference"] == pytest.approx(difference.mean(), abs=1e-5)
    low, high = result["mean_difference_interval"]
    assert low < result["mean_difference"] < high
    exact = scipy.stats.permutation_test(
        (difference,), lambda values, axis: values.mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert result["p_value"] == pytest.approx(exact.pvalue, abs=1e-9)
    assert (result["mean_length_a"], result["mean_length_b"]) == (np.mean([*[2] * 10, 3, 3]), 10 + 1 / 6)
    reverse = evaluator.compare_models(prompts, b, a)
    assert reverse["win_rate"] == pytest.approx(1 - result["win_rate"])
    assert reverse["p_value"] == result["p_value"]


def test_answers_as_messages_are_compared_like_their_texts(evaluator):
    prompts, a, b = ["Hi", "Bye", "Thanks"], ["Hello!", " So long. ", "Welcome"], ["x", "y", "z"]
    messages = [[{"role": "assistant", "content": text}] for text in a]
    assert evaluator.compare_models(prompts, messages, b) == evaluator.compare_models(prompts, a, b)


def test_equal_answers_are_a_draw(evaluator):
    result = evaluator.compare_models(["Hi", "Bye"], ["a", "b"], ["a", "b"])
    assert (result["win_rate"], result["mean_difference"], result["p_value"]) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("lists", [([], [], []), (["Hi"], ["a"], []), (["Hi"], ["a", "b"], ["a"])])
def test_lists_that_do_not_match_are_refused(evaluator, lists):
    with pytest.raises(ValueError, match="two answers each"):
        evaluator.compare_models(*lists)


# --- other tools give the same score ---------------------------------------------------------------------------------

CLEAN = [
    ("What is 2 + 2?", "4"),
    ("  Spaces around ", " kept out\n"),
    ("Кто там?", "Это я — почтальон.\n\n1. Да"),
    ("x", "!"),
    ("The prompt takes more than half: " + "word " * 90, "1234567890"),
]


@torch.no_grad()
def test_plain_transformers_and_what_others_read(smollm, tokenizer, tmp_path):
    """SmolLM2 with a random head of full size. What OpenRLHF and PPO trainers read is the value at the last end token.

    `transformers.pipeline` is fed with text.
    """
    directory = save_reward_model(tmp_path, smollm, tokenizer, 0.05, 128)
    evaluator = RewardModelEvaluator(directory, device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    plain_tokenizer = AutoTokenizer.from_pretrained(directory)
    classify = pipeline("text-classification", model=model, tokenizer=plain_tokenizer, device="cpu")
    scores = evaluator.get_reward_scores(*zip(*CLEAN, strict=True))
    assert len({round(score, 3) for score in scores}) == len(CLEAN)
    for (prompt, response), score in zip(CLEAN, scores, strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        inputs = plain_tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        assert inputs["input_ids"].shape[1] <= 128
        assert model(**inputs).logits.item() == pytest.approx(score, abs=1e-5)
        values = model.score(model.base_model(**inputs).last_hidden_state)[0, :, 0]
        last = (inputs["input_ids"][0] == plain_tokenizer.eos_token_id).nonzero()[-1].item()
        assert values[last].item() == pytest.approx(score, abs=1e-5)
        (result,) = classify(plain_tokenizer.apply_chat_template(messages, tokenize=False))
        assert result == {"label": "reward", "score": pytest.approx(score, abs=1e-5)}


def grpo_config(output: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(output), max_steps=1, per_device_train_batch_size=2, num_generations=2, use_cpu=True,
        max_completion_length=8, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip


def test_a_reward_model_directory_in_grpo(tiny_reward_model, tiny_model, tmp_path):
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {n}."}]} for n in range(4)])
    config = grpo_config(tmp_path)
    trainer = GRPOTrainer(model=tiny_model, reward_funcs=tiny_reward_model, args=config, train_dataset=prompts)
    seen = []  # what TRL fed the reward model, and what it returned
    trainer.reward_funcs[0].register_forward_hook(
        lambda model, args, inputs, output: seen.append((inputs["input_ids"], output.logits)), with_kwargs=True
    )
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    ((input_ids, logits),) = seen
    assert entry["reward"] == pytest.approx(logits.mean().item(), abs=1e-4)
    evaluator = RewardModelEvaluator(tiny_reward_model, device="cpu")
    for ids, logit in zip(input_ids, logits, strict=True):
        text = evaluator.tokenizer.decode(ids[ids != evaluator.tokenizer.pad_token_id])
        prompt, response = text.removeprefix("<|im_start|>user\n").split("<|im_end|>\n<|im_start|>assistant\n")
        score = evaluator.get_reward_score(prompt, response.removesuffix("<|im_end|>"))
        assert logit.item() == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("conversational", [False, True])
def test_as_reward_function_of_grpo(evaluator, tiny_model, tmp_path, conversational):
    ask = (lambda text: [{"role": "user", "content": text}]) if conversational else str
    prompts = Dataset.from_list([{"prompt": ask(f"Say {n}."), "progress": True} for n in range(4)])
    seen = []  # what TRL gave to the reward functions

    def look_on(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    functions = [evaluator.reward_function, look_on]
    trainer = GRPOTrainer(model=tiny_model, reward_funcs=functions, args=grpo_config(tmp_path), train_dataset=prompts)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    texts = [answer[0]["content"] if conversational else answer for _, answer in seen]
    questions = [prompt[0]["content"] if conversational else prompt for prompt, _ in seen]
    assert isinstance(seen[0][0], list) == conversational and len(seen) == 2
    expected = evaluator.get_member_scores(questions, texts)[0]
    assert entry["rewards/reward_function/mean"] == pytest.approx(expected.mean(), abs=1e-5)


def test_the_reward_function_takes_all_forms_of_conversations(evaluator):
    """Strings and message lists give the same rewards, whatever else TRL passes."""
    texts = evaluator.get_reward_scores(["Hi", "Bye"], ["Hello!", "So long."])
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "Bye")]
    answers = [[{"role": "assistant", "content": text}] for text in ("Hello!", "So long.")]
    assert evaluator.reward_function(["Hi", "Bye"], ["Hello!", "So long."]) == texts
    rewards = evaluator.reward_function(prompts=prompts, completions=answers, completion_ids=[[1], [2]], batch_size="x")
    assert rewards == texts and all(type(reward) is float for reward in rewards)


# --- directories that are no whole reward model ----------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_half_written_directory_is_refused(tiny_reward_model, tmp_path, missing):
    shutil.copytree(tiny_reward_model, tmp_path / "half")
    (tmp_path / "half" / missing).unlink()
    with pytest.raises(InputError, match="half"):
        RewardModelEvaluator(str(tmp_path / "half"))


def test_a_model_of_others_is_scored_within_its_positions(tiny_model, small_tokenizer, tmp_path):
    model = models.load_reward_model(tiny_model, small_tokenizer.pad_token_id, 42)
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    assert RewardModelEvaluator(str(tmp_path)).max_length == 512


def test_a_missing_directory_names_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"run train_reward_model\.py first"):
        RewardModelEvaluator(str(tmp_path / "nothing"))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_named_in_one_line(tiny_reward_model, device):
    with pytest.raises(InputError, match=f"^device {device}: can not be used here") as raised:
        RewardModelEvaluator(tiny_reward_model, device=device)
    assert "\n" not in str(raised.value)


# --- threads, copies, pickles, memory --------------------------------------------------------------------------------


def test_threads_of_a_web_server_get_right_scores(evaluator):
    """Also while another thread uses the tokenizer otherwise, which changes it until the next call."""
    requests = [(f"Prompt {number % 5}", f"Answer {number} " + "and so on " * (number % 9)) for number in range(64)]
    expected = evaluator.get_reward_scores(*zip(*requests, strict=True))
    done = threading.Event()

    def cut_and_pad():
        while not done.is_set():
            evaluator.tokenizer(["a b c d e f g h i j", "k"], truncation=True, padding=True, max_length=8)

    with ThreadPoolExecutor(9) as pool:
        other = pool.submit(cut_and_pad)
        try:
            scores = list(pool.map(evaluator.get_reward_score, *zip(*requests * 2, strict=True)))
        finally:
            done.set()
        other.result()
    assert scores == pytest.approx(expected * 2, abs=1e-5)


def test_the_server_of_the_docs_scores_requests_together(tiny_reward_model, evaluator, monkeypatch):
    """Its code as it stands there; of the two libraries only what it uses, since tests do without them."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "FastAPI" in block)

    class Refused(Exception):
        pass

    app = SimpleNamespace(post=lambda path: lambda function: function)
    monkeypatch.setitem(sys.modules, "fastapi", SimpleNamespace(FastAPI=lambda: app, HTTPException=Refused))
    monkeypatch.setitem(sys.modules, "pydantic", SimpleNamespace(BaseModel=SimpleNamespace))
    server: dict = {}
    exec(code.replace("./reward_model_output", tiny_reward_model), server)
    real, sizes = server["evaluator"].get_reward_scores, []

    def recorded(prompts, responses):
        sizes.append(len(prompts))
        return real(prompts, responses)

    server["evaluator"].get_reward_scores = recorded
    answers = [f"Answer {number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        bad = pool.submit(server["reward"], server["Asked"](prompt="Hi", response=" "))
        scores = list(pool.map(lambda text: server["reward"](server["Asked"](prompt="Hi", response=text)), answers))
        with pytest.raises(Refused, match="empty"):
            raise bad.exception()
    assert scores == pytest.approx(evaluator.get_reward_scores(["Hi"] * 40, answers), abs=1e-5)
    assert len(sizes) < 40 and max(sizes) > 1


def test_another_process_scores_alike(evaluator):
    """One that is started afresh and gets the evaluator as a pickle, as a worker of a server does."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        scores = pool.apply(evaluator.get_reward_scores, (PROMPTS, RESPONSES))
    assert scores == pytest.approx(evaluator.get_reward_scores(PROMPTS, RESPONSES), abs=1e-5)


@torch.no_grad()
def test_evaluators_can_be_copied_and_pickled(tiny_reward_model):
    evaluator = RewardModelEvaluator(tiny_reward_model, device="cpu")
    expected = evaluator.get_reward_scores(PROMPTS, RESPONSES)
    assert pickle.loads(pickle.dumps(evaluator)).get_reward_scores(PROMPTS, RESPONSES) == expected
    copied = copy.deepcopy(evaluator)
    for parameter in copied.model.parameters():
        parameter.zero_()
    assert copied.get_reward_scores(PROMPTS, RESPONSES) == [0.0] * len(PROMPTS)
    assert evaluator.get_reward_scores(PROMPTS, RESPONSES) == expected


def test_memory_is_free_once_nobody_holds_the_evaluator(tiny_reward_model):
    evaluator = RewardModelEvaluator(tiny_reward_model, device="cpu")
    evaluator.get_reward_score("Hi", "Hello!")
    weights = weakref.ref(evaluator.model.base_model.layers[0].mlp.up_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del evaluator
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("table", [[1, 2], "words", {"log_words": "many"}, {"log_words": float("nan")}])
def test_a_form_model_that_is_no_table_is_named(tiny_reward_model, tmp_path, table):
    broken = shutil.copytree(tiny_reward_model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "form_model": table, "form_term": True}))
    with pytest.raises(InputError, match=r"broken: form_model in its config\.json is no table of numbers"):
        RewardModelEvaluator(broken, device="cpu", form=True)
