import json
import math
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import save_reward_model
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from trl import GRPOConfig, GRPOTrainer

import conversations
import load_smollm_model
import reward_model_demo as demo
from conversations import encode
from load_smollm_model import InputError
from reward_model_demo import RewardModelEvaluator

PROMPTS = [
    "Hi",
    "Name a colour.",
    "Почему небо голубое?",
    "word " * 300,
    "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc",
]
RESPONSES = ["Hello!", "Red, or blue: " + "both " * 200, "Из-за рассеяния света. 🌤", "", "<|im_end|> d"]


@pytest.fixture(scope="module")
def evaluator(tiny_reward_model):
    return RewardModelEvaluator(tiny_reward_model, device="cpu")


@pytest.fixture(scope="module")
def real_reward_model(tmp_path_factory, smollm, tokenizer):
    """SmolLM2 with a random head of full size."""
    return save_reward_model(tmp_path_factory.mktemp("real_reward"), smollm, tokenizer, 0.05, 256)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", ["tiny_reward_model", "real_reward_model"])
def test_a_score_is_the_same_alone_in_a_batch_and_under_padding(directory, request):
    evaluator = RewardModelEvaluator(request.getfixturevalue(directory), device="cpu")
    alone = [evaluator.get_reward_score(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert len({round(score, 3) for score in alone}) == len(alone)
    for batch_size in (1, 2, 5):
        together = evaluator.get_reward_scores(PROMPTS, RESPONSES, batch_size=batch_size)
        assert together == pytest.approx(alone, abs=1e-5)
    ids = encode(evaluator.tokenizer, PROMPTS[0], RESPONSES[0], 64)
    padded = torch.tensor([ids + [evaluator.model.config.pad_token_id] * 50])
    mask = torch.tensor([[1] * len(ids) + [0] * 50])
    with torch.no_grad():
        assert evaluator.model(padded, attention_mask=mask).logits.item() == pytest.approx(alone[0], abs=1e-5)


def test_many_responses_are_scored_as_in_parts(evaluator, monkeypatch):
    prompts = [f"Prompt {number % 7}" for number in range(2000)]
    responses = [f"Answer {number % 301} " + "and so on " * (number % 3) for number in range(2000)]
    sizes = []

    def tokenize(*args, real=conversations.encode_batch):
        sizes.append(len(args[1]))
        return real(*args)

    monkeypatch.setattr(conversations, "encode_batch", tokenize)
    monkeypatch.setattr(conversations, "CHUNK", 256)
    together = evaluator.get_reward_scores(prompts, responses)
    assert max(sizes) == 256 and sum(sizes) == 2000
    for start in (0, 777, 1999):
        part = slice(start, start + 100)
        assert evaluator.get_reward_scores(prompts[part], responses[part]) == pytest.approx(together[part], abs=1e-5)


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


def test_max_length_comes_from_training_and_can_be_changed(evaluator):
    assert evaluator.max_length == 128
    long = "word " * 200
    default = evaluator.get_reward_score("Hi", long)
    assert default == pytest.approx(evaluator.get_reward_score("Hi", long, max_length=128), abs=1e-6)
    assert default != pytest.approx(evaluator.get_reward_score("Hi", long, max_length=64), abs=1e-3)


def test_mixed_precision_moves_scores_only_slightly(tiny_reward_model, monkeypatch):
    monkeypatch.setattr(demo, "autocast_dtype", lambda device: torch.bfloat16)
    plain = RewardModelEvaluator(tiny_reward_model, device="cpu")
    mixed = RewardModelEvaluator(tiny_reward_model, device="cpu", mixed_precision=True)
    one, other = (each.get_reward_scores(PROMPTS, RESPONSES) for each in (plain, mixed))
    assert one != other
    assert one == pytest.approx(other, abs=0.1)
    assert {each.weight.dtype for each in load_smollm_model.inner_linear_layers(mixed.model)} == {torch.bfloat16}
    plain.dtype = torch.bfloat16  # the weights are rounded by autocast then
    assert plain.get_reward_scores(PROMPTS, RESPONSES) == other


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


def test_an_evaluator_needs_a_directory():
    with pytest.raises(ValueError, match="names no directory"):
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


def test_the_bootstrap_interval_agrees_with_scipy():
    values = np.random.default_rng(1).normal(size=300)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=demo.RESAMPLES, method="percentile", rng=1
    ).confidence_interval
    assert demo.bootstrap_interval(values) == pytest.approx([expected.low, expected.high], abs=0.01)


@pytest.mark.parametrize("count", [5, 8])
def test_the_interval_of_few_groups_covers_what_it_says(count, monkeypatch):
    """Plain percentiles cover some 0.86 of the true means with so few."""
    monkeypatch.setattr(demo, "RESAMPLES", 1000)
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        low, high = demo.bootstrap_interval(generator.normal(size=count))
        covered.append(low <= 0 <= high)
    assert 0.9 < np.mean(covered) < 0.975


def test_a_rate_without_spread_has_the_interval_of_its_groups():
    wilson = scipy.stats.binomtest(6, 6).proportion_ci(0.95, method="wilson")
    groups = np.repeat(np.arange(6), 2)
    assert demo.rate_interval(np.ones(12), groups) == pytest.approx([wilson.low, wilson.high], abs=1e-6)
    half = np.tile([1.0, 0.0], 6)  # one of two right at every prompt
    wilson = scipy.stats.binomtest(3, 6).proportion_ci(0.95, method="wilson")
    assert demo.rate_interval(half, groups) == pytest.approx([wilson.low, wilson.high], abs=1e-6)
    some = np.array([1.0, 0.0, 1.0, 1.0])
    assert demo.rate_interval(some) == demo.bootstrap_interval(some)
    assert demo.rate_interval([1.0, 1.0], ["a", "a"]) is None


def test_groups_are_drawn_as_a_whole():
    values = np.random.default_rng(1).normal(size=200)
    alone = demo.bootstrap_interval(values)
    assert demo.bootstrap_interval(np.repeat(values, 5), np.repeat(np.arange(200), 5)) == pytest.approx(alone)
    assert demo.bootstrap_interval([3.0, 4.0], ["a", "a"]) is None  # one prompt tells nothing about others


def test_the_interval_does_not_depend_on_how_it_is_cut_into_chunks(monkeypatch):
    values = np.arange(50.0)
    whole = demo.bootstrap_interval(values)
    monkeypatch.setattr(demo, "CHUNK_DRAWS", 1000)
    assert demo.bootstrap_interval(values) == whole


def test_one_prompt_alone_is_never_significant():
    assert demo.paired_p_value(np.array([1.0, 2.0, 3.0]), ["same"] * 3) == 1.0
    assert demo.paired_p_value(np.array([1.0, 2.0, 3.0])) == 0.25  # 2 of 8 signs are as extreme


# --- other tools give the same score ---------------------------------------------------------------------------------

CLEAN = [
    ("What is 2 + 2?", "4"),
    ("  Spaces around ", " kept out\n"),
    ("Кто там?", "Это я — почтальон.\n\n1. Да"),
    ("x", ""),
]


def test_plain_transformers_and_pipeline(real_reward_model):
    evaluator = RewardModelEvaluator(real_reward_model, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(real_reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(real_reward_model)
    classify = pipeline("text-classification", model=real_reward_model, tokenizer=real_reward_model, device="cpu")
    for prompt, response in CLEAN:
        ours = evaluator.get_reward_score(prompt, response)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            assert model(**inputs).logits.item() == pytest.approx(ours, abs=1e-5)
        (result,) = classify(tokenizer.apply_chat_template(messages, tokenize=False))
        assert result == {"label": "reward", "score": pytest.approx(ours, abs=1e-5)}


def test_as_reward_function_of_grpo(tiny_reward_model, tiny_model, tmp_path):
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {n}."}]} for n in range(4)])
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, use_cpu=True,
        max_completion_length=8, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
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
        score = evaluator.get_reward_score(prompt, response.removesuffix("<|im_end|>\n"))
        assert logit.item() == pytest.approx(score, abs=1e-4)


# --- directories that are no whole reward model ----------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_half_written_directory_is_refused(tiny_reward_model, tmp_path, missing):
    shutil.copytree(tiny_reward_model, tmp_path / "half")
    (tmp_path / "half" / missing).unlink()
    with pytest.raises(InputError, match="half"):
        RewardModelEvaluator(str(tmp_path / "half"))


def test_a_model_of_others_is_scored_within_its_positions(tiny_model, tokenizer, tmp_path):
    model = load_smollm_model.load_reward_model(tiny_model, tokenizer.pad_token_id)
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert RewardModelEvaluator(str(tmp_path)).max_length == 512


def test_a_missing_directory_names_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"run train_reward_model\.py first"):
        RewardModelEvaluator(str(tmp_path / "nothing"))


# --- the script ------------------------------------------------------------------------------------------------------


def run(monkeypatch, model, *arguments):
    monkeypatch.setattr("sys.argv", ["reward_model_demo.py", "--model", str(model), *map(str, arguments)])
    load_smollm_model.run_script(demo.main)


def test_demonstration_in_two_languages(monkeypatch, tiny_reward_model, tmp_path, capsys):
    shutil.copytree(tiny_reward_model, tmp_path / "model")
    run(monkeypatch, tmp_path / "model")
    result = json.loads((tmp_path / "model" / "demonstration.json").read_text())
    assert len(result["comparisons"]) == 2 and len(result["dialogue"]) == 3
    for comparison in result["comparisons"]:
        rewards = [entry["reward"] for entry in comparison["ranking"]]
        assert rewards == sorted(rewards, reverse=True)
    assert "Париж" in capsys.readouterr().out


def test_prompt_and_responses(monkeypatch, evaluator, tiny_reward_model, tmp_path, capsys):
    run(monkeypatch, tiny_reward_model, "--prompt", "Hi", "--responses", "a", "b", "--output", tmp_path / "r.json")
    ranking = json.loads((tmp_path / "r.json").read_text())["ranking"]
    assert [(entry["response"], pytest.approx(entry["reward"], abs=1e-5)) for entry in ranking] == [
        (response, score) for response, score in evaluator.compare_responses("Hi", ["a", "b"])
    ]
    assert f"{ranking[0]['reward']:+.3f}" in capsys.readouterr().out


def test_bytes_that_are_not_text_are_ranked_and_printed(monkeypatch, tiny_reward_model, capsys):
    run(monkeypatch, tiny_reward_model, "--prompt", "caf\udce9", "--responses", "a", "\udcff")
    assert "> caf?" in capsys.readouterr().out


@pytest.fixture
def without_system_turns(tiny_reward_model, tmp_path):
    """A reward model whose chat template refuses system turns, as Gemma's does."""
    directory = tmp_path / "refusing"
    shutil.copytree(tiny_reward_model, directory)
    template = directory / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    return directory


def test_a_prompt_that_the_template_refuses_is_named(monkeypatch, without_system_turns, write_jsonl, tmp_path):
    marked = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nHi"
    source = write_jsonl([{"prompt": "Hi", "response": "a"}, {"prompt": marked, "response": "a"}])
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, without_system_turns, "--file", source, "--output", tmp_path / "scores.jsonl")
    assert f"{source} row 2: {without_system_turns} can not read it: the chat template refuses" in str(ended.value.code)
    assert not (tmp_path / "scores.jsonl").exists()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, without_system_turns, "--prompt", marked, "--responses", "a", "b")
    assert "no system turns" in str(ended.value.code)


def test_a_directory_as_output_is_refused_before_anything_is_scored(
    monkeypatch, tiny_reward_model, write_jsonl, tmp_path
):
    monkeypatch.setattr(RewardModelEvaluator, "get_reward_scores", None)
    source = write_jsonl([{"prompt": "Hi", "response": "a"}])
    with pytest.raises(SystemExit, match="is a directory; name a file"):
        run(monkeypatch, tiny_reward_model, "--file", source, "--output", tmp_path)


def test_a_file_is_scored_line_by_line(monkeypatch, evaluator, tiny_reward_model, write_jsonl, tmp_path):
    monkeypatch.setattr(demo, "CHUNK", 2)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": "Hi", "response": "a", "id": 7},
        {"prompt": "Hi", "responses": ["a", "b", "ё"]},
        {"prompt": "Hi", "chosen": "a", "rejected": messages},
        {"prompt": "Hi", "responses": []},
        {"prompt": "Hi", "response": "a", "note": "\ud800"},
    ]
    source = write_jsonl(rows[:4])
    with open(source, "a") as file:
        file.write(json.dumps(rows[4]) + "\n")
    run(monkeypatch, tiny_reward_model, "--file", source, "--output", tmp_path / "new" / "scores.jsonl")
    scored = [json.loads(line) for line in (tmp_path / "new" / "scores.jsonl").read_text().splitlines()]
    a, b, yo = (evaluator.get_reward_score("Hi", text) for text in ("a", "b", "ё"))
    assert scored == [
        {**rows[0], "reward": pytest.approx(a, abs=1e-5)},
        {**rows[1], "rewards": pytest.approx([a, b, yo], abs=1e-5)},
        {**rows[2], "chosen_reward": pytest.approx(a, abs=1e-5), "rejected_reward": pytest.approx(b, abs=1e-5)},
        {**rows[3], "rewards": []},
        {**rows[4], "reward": pytest.approx(a, abs=1e-5), "note": "?"},
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "row 2: not valid JSON"),
        (b"\xff", "row 2: not UTF-8 text; convert the file first"),
        ("[" * 10**5, "row 2: nested too deeply"),
        ('{"response": "a"}', "row 2: needs prompt"),
        ('{"prompt": "a"}', "row 2: needs prompt"),
        ('{"prompt": "a", "response": null}', "row 2: needs prompt"),
        ("[]", "row 2: needs prompt"),
        ('{"prompt": "a", "responses": "text"}', "responses is not a list"),
    ],
)
def test_a_bad_line_is_named_and_nothing_written(monkeypatch, tiny_reward_model, tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    source.write_bytes(b'{"prompt": "a", "response": "b"}\n' + line + b"\n")
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tiny_reward_model, "--file", source, "--output", tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_prompt_that_is_answered_already_is_named(monkeypatch, tiny_reward_model):
    with pytest.raises(SystemExit, match="must end with a user turn"):
        run(monkeypatch, tiny_reward_model, "--prompt", "a\n<extra_id_1>Assistant\nb", "--responses", "c", "d")


@pytest.mark.parametrize("arguments", [["--prompt", "a"], ["--responses", "a"], ["--file", "x.jsonl"], ["--nonsense"]])
def test_bad_flags_are_usage_errors(monkeypatch, tiny_reward_model, arguments):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tiny_reward_model, *arguments)
    assert ended.value.code == 2
