"""TRL's own flags: read from its source, checked, and handed to its configurations.

Every field of `trl.RewardConfig`, and TRL's fields for LoRA, is a flag of `train_reward_model.py`. To know them one
would import `trl`, which loads torch and takes ten seconds; the fields are plain assignments in the source, which takes
some hundredths of a second to read.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from reward_pipeline.conversations import MIN_MAX_LENGTH
from reward_pipeline.settings import Kind, Parser, boolean, or_none, real, seed_number, whole

# Where the fields of a RewardConfig come from, the most special ones last, and the enumerations of their values.
REWARD_CONFIG = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/reward_config.py", "RewardConfig"),
)
MODEL_CONFIG = (("trl", "trainer/model_config.py", "ModelConfig"),)
ENUMERATIONS = (("transformers", "training_args.py"), ("transformers", "trainer_utils.py"))

# TRL's defaults are for language models and name no layers.
LORA_DEFAULTS = {"lora_task_type": "SEQ_CLS", "lora_target_modules": ["all-linear"]}
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
# Trackers and the packages of which one has to be there.
TRACKERS = {
    **{
        name: (name,)
        for name in ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb")
    },
    "azure_ml": ("azureml",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
METRICS = ("accuracy", "margin", "loss")  # of an evaluation
JSON_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # fields that may also name a file with the object


def updates(text: str) -> int:
    """Number of updates, or -1 for as many as the epochs have."""
    return -1 if text == "-1" else whole(1)(text)


def rhythm(text: str) -> float:
    """A number of updates, or below 1 a share of the run."""
    value = real(above=0)(text)
    return value if value < 1 else whole(1)(text.removesuffix(".0"))


def one_of(values: Sequence[str]) -> Kind:
    """One of these texts."""

    def parse(text: str) -> str:
        if text not in values:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(values)}, not {text}")
        return text

    return parse


def counted_tokens(text: str) -> bool | str:
    """Which tokens are counted: `all`, `non_padding`, or true or false."""
    return text if text in ("all", "non_padding") else boolean(text)


# What the fields may be; the libraries would take other values without a word, or end in a traceback.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), real(least=0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), real(least=0, below=1)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), rhythm),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), whole(1)),
    **dict.fromkeys(("gradient_accumulation_steps", "lora_r", "lora_alpha", "ddp_timeout"), whole(1)),
    **dict.fromkeys(("save_total_limit", "dataset_num_proc", "dataloader_prefetch_factor"), or_none(whole(1))),
    **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps", "ddp_bucket_cap_mb"), or_none(whole(1))),
    "warmup_steps": lambda text: 0.0 if text in ("0", "0.0") else rhythm(text),
    "center_rewards_coefficient": or_none(real(least=0)),
    **dict.fromkeys(("log_level", "log_level_replica"), one_of(LOG_LEVELS)),
    "data_seed": or_none(seed_number),
    "dataloader_num_workers": whole(0),
    "eval_delay": real(least=0),
    "include_num_input_tokens_seen": counted_tokens,
    "max_length": whole(MIN_MAX_LENGTH),
    "max_steps": updates,
    "neftune_noise_alpha": or_none(real(least=0)),
    "num_train_epochs": real(above=0),
    "seed": seed_number,
}


class Field(NamedTuple):
    """One field of a configuration, as its source has it."""

    annotation: str
    help: str
    options: dict[str, Any]  # of "choices", "nargs" and "const", what its metadata has


@cache
def class_of(package: str, module: str, name: str) -> ast.ClassDef:
    """A class in the source of an installed package, which is not imported."""
    return next(each for each in classes(package, module) if each.name == name)


@cache
def classes(package: str, module: str) -> tuple[ast.ClassDef, ...]:
    """All classes of a module."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; pip install -r requirements.txt")
    source = Path(found.origin).parent / module
    return tuple(each for each in ast.parse(source.read_text("utf-8")).body if isinstance(each, ast.ClassDef))


@cache
def fields(configuration: tuple[tuple[str, str, str], ...]) -> dict[str, Field]:
    """The fields of a dataclass and of those that it inherits from, by name."""
    found = {}
    for package, module, name in configuration:
        for node in class_of(package, module, name).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = field_of(node)
    return found


def field_of(node: ast.AnnAssign) -> Field:
    """A field with what its metadata says in plain values; what code would put together there is left out."""
    found: dict[str, Any] = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            for key, value in zip(part.keys, part.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in ("help", "choices", "nargs", "const"):
                    with contextlib.suppress(ValueError):  # of a value that is no literal
                        found[key.value] = ast.literal_eval(value)
    return Field(ast.unparse(node.annotation), found.pop("help", "").replace("%%", "%"), found)


@cache
def enumerations() -> dict[str, list[str]]:
    """The values of the enumerations that annotations name."""
    return {
        each.name: [
            node.value.value
            for node in each.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ]
        for package, module in ENUMERATIONS
        for each in classes(package, module)
        if any(isinstance(base, ast.Name) and base.id == "ExplicitEnum" for base in each.bases)
    }


def kind_of(name: str, field: Field) -> tuple[Kind, dict[str, Any]]:
    """How the text of a flag becomes a value of this field, and further options of `add_argument`."""
    annotation, options = field.annotation, {each: field.options[each] for each in field.options.keys() - {"choices"}}
    optional = or_none if "None" in annotation else lambda kind: kind
    for enumeration, values in enumerations().items():
        if enumeration in annotation and "list" not in annotation:
            return one_of(values), {}
    if name in KINDS:
        return KINDS[name], {"nargs": "?", "const": True} if "bool" in annotation else {}
    if "choices" in field.options:
        return optional(one_of(field.options["choices"])), {}
    if "dict" in annotation:
        return json_or_text if name in JSON_FILES else json_object, {}
    if "list" in annotation:
        return str, {"nargs": "+"}
    for part, kind in (("str", str), ("bool", boolean), ("int", whole(-(2**63))), ("float", real())):
        if part in annotation:
            return kind if kind is boolean else optional(kind), options
    return str, {}


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text}")
    return value


def json_or_text(text: str) -> dict[str, Any] | str:
    """A JSON object, or a text such as the name of a file with one."""
    return json_object(text) if text.startswith("{") else text


def add_trl_flags(parser: Parser, defaults: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    """Add a flag for every field of `RewardConfig` and of `ModelConfig`.

    Args:
        defaults: values of fields where nothing is given; the others get no value then, and so TRL's own default.
        unsupported: fields that would be without effect here, or undo what the data was prepared with, and why. They
            are known, so that `refuse_unsupported` can name the reason, and not shown.
    """
    for title, configuration in (("of trl.RewardConfig", REWARD_CONFIG), ("of TRL for LoRA", MODEL_CONFIG)):
        group = parser.add_argument_group(f"flags {title}")
        for name, field in fields(configuration).items():
            kind, options = kind_of(name, field)
            hidden = name in unsupported
            words = argparse.SUPPRESS if hidden else field.help.replace("%", "%%")
            default = argparse.SUPPRESS if hidden else defaults.get(name, argparse.SUPPRESS)
            parser.flag(name, default, kind, words, group, **options)


def lora_fields() -> set[str]:
    """The fields of TRL that only LoRA heeds."""
    return {name for name in fields(MODEL_CONFIG) if name.startswith("lora_")} | {"use_rslora", "use_dora"}


def refuse_unsupported(parser: Parser, given: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    """End with a line that names the first given flag of TRL that does not go, and why."""
    for name in given:
        if name in unsupported:
            parser.error(f"--{name}: not supported here, {unsupported[name]}")
        if name in lora_fields() and not given.get("use_peft"):
            parser.error(f"--{name}: needs --use_peft")


def fields_given(configuration: tuple[tuple[str, str, str], ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given settings that are fields of this configuration.

    Where a text has another meaning than a list of it (`all-linear`, a pattern), one value is the text, as in TRL.
    """
    found = {name: given[name] for name in fields(configuration) if name in given}
    for name, value in found.items():
        if "str | list" in fields(configuration)[name].annotation and isinstance(value, list) and len(value) == 1:
            found[name] = value[0]
    return found


def missing_tracker(names: Sequence[str]) -> str | None:
    """The package of the first of these trackers that is not installed, if any; unknown names are TRL's to judge."""
    found = importlib.util.find_spec
    return next((TRACKERS[name][0] for name in names if name in TRACKERS and not any(map(found, TRACKERS[name]))), None)
