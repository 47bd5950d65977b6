"""TRL's flags as its source has them, against the classes themselves."""

import argparse
import dataclasses
import shlex

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import ModelConfig, RewardConfig

from reward_pipeline import trl_flags
from reward_pipeline.settings import Parser


@pytest.mark.parametrize(
    "configuration, dataclass", [(trl_flags.REWARD_CONFIG, RewardConfig), (trl_flags.MODEL_CONFIG, ModelConfig)]
)
def test_the_source_has_the_fields_of_the_class(configuration, dataclass):
    found = trl_flags.fields(configuration)
    assert set(found) == {each.name for each in dataclasses.fields(dataclass) if each.init}
    for each in dataclasses.fields(dataclass):
        if each.init and isinstance(each.metadata.get("help"), str):
            assert found[each.name].help in ("", each.metadata["help"].replace("%%", "%")), each.name
    assert sum(not field.help for field in found.values()) <= 3  # texts that are put together by code


def test_values_become_what_trl_makes_of_them():
    """TRL's own parser is the independent implementation."""
    arguments = shlex.split(
        "--output_dir x --learning_rate 1e-3 --max_steps 7 --logging_steps 5 --lr_scheduler_type cosine --tf32 false"
        " --optim adafactor --eval_strategy epoch --save_total_limit 3 --include_for_metrics loss inputs --seed 7"
        " --lr_scheduler_kwargs '{\"num_cycles\":2}' --gradient_checkpointing --center_rewards_coefficient 0.5"
        " --adam_beta1 0.8 --dataloader_num_workers 2 --report_to none --warmup_steps 0.1 --eval_steps 0.25"
        " --lora_r 4 --lora_target_modules q_proj v_proj --use_peft --lora_dropout 0.1"
    )
    parser = Parser("")
    trl_flags.add_trl_flags(parser, {}, {})
    ours = vars(parser.parse_args(arguments))
    theirs = HfArgumentParser((RewardConfig, ModelConfig)).parse_args(arguments)
    given = {each.removeprefix("--") for each in arguments if each.startswith("--")}
    for name in given - {"report_to", "lr_scheduler_kwargs"}:
        assert ours[name] == getattr(theirs, name), name
    assert ours.keys() - {"config"} == given  # what is not given is left to TRL
    config = RewardConfig(**trl_flags.fields_given(trl_flags.REWARD_CONFIG, ours), use_cpu=True, bf16=False)
    assert config.report_to == [] and config.lr_scheduler_kwargs == {"num_cycles": 2}


def test_bare_flags_and_choices_are_those_of_trl():
    theirs = {action.dest: action for action in HfArgumentParser((RewardConfig, ModelConfig))._actions}
    for configuration in (trl_flags.REWARD_CONFIG, trl_flags.MODEL_CONFIG):
        for name, field in trl_flags.fields(configuration).items():
            kind, options = trl_flags.kind_of(name, field)
            if theirs[name].nargs == "?" and kind is not trl_flags.boolean:
                assert options == {"nargs": "?", "const": True}, name
            for value in map(str, theirs[name].choices or []):
                assert kind(value) == value, name
            if theirs[name].choices:
                with pytest.raises(argparse.ArgumentTypeError, match="must be one of"):
                    kind("of_mine")


def test_one_text_is_no_list_where_it_means_something_else():
    parser = Parser("")
    trl_flags.add_trl_flags(parser, {}, {})

    def given(*texts):
        options = vars(parser.parse_args(["--optim_target_modules", *texts, "--lora_target_modules", *texts]))
        both = trl_flags.fields_given(trl_flags.REWARD_CONFIG, options) | trl_flags.fields_given(
            trl_flags.MODEL_CONFIG, options
        )
        return both["optim_target_modules"], both["lora_target_modules"]

    assert given("all-linear") == ("all-linear", ["all-linear"])
    assert given("q_proj", "v_proj") == (["q_proj", "v_proj"], ["q_proj", "v_proj"])


def test_enumerations_are_those_of_transformers():
    found = trl_flags.enumerations()
    for name in ("lr_scheduler_type", "eval_strategy", "save_strategy", "hub_strategy", "optim"):
        (kind,) = [kind for kind in found if kind in trl_flags.fields(trl_flags.REWARD_CONFIG)[name].annotation]
        default = next(each.default for each in dataclasses.fields(TrainingArguments) if each.name == name)
        assert str(getattr(default, "value", default)) in found[kind]


@pytest.mark.parametrize(
    "name, text",
    [
        ("learning_rate", "inf"), ("learning_rate", "-1"), ("weight_decay", "nan"), ("max_grad_norm", "nan"),
        ("num_train_epochs", "nan"), ("num_train_epochs", "0"), ("max_steps", "0"), ("max_steps", "-5"),
        ("eval_steps", "-1"), ("eval_steps", "1.5"), ("save_steps", "0"), ("seed", "99999999999999999999"),
        ("seed", "-1"), ("dataloader_num_workers", "-1"), ("adam_beta1", "2"), ("optim", "adamw_of_mine"),
        ("center_rewards_coefficient", "nan"), ("save_total_limit", "0"), ("lr_scheduler_type", "linar"),
        ("per_device_train_batch_size", "0"), ("gradient_accumulation_steps", "0"), ("bf16", "perhaps"),
        ("liger_kernel_config", "[1]"), ("lr_scheduler_kwargs", "linear.json"), ("log_level", "loud"), ("lora_r", "0"),
        ("train_sampling_strategy", "by_length"), ("dataloader_multiprocessing_context", "thread"),
        ("include_num_input_tokens_seen", "some"), ("ddp_backend", "tcp"), ("lora_dropout", "1"), ("eval_delay", "-1"),
    ],
)  # fmt: skip
def test_values_without_meaning_are_refused_with_the_name_of_the_flag(name, text, capsys):
    parser = Parser("")
    trl_flags.add_trl_flags(parser, {}, {})
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--{name}", text])
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.startswith(f"error: --{name}: must be ") and printed.count("\n") == 1


@pytest.mark.parametrize("name, text, value", [
    ("max_steps", "-1", -1), ("eval_steps", "0.5", 0.5), ("save_steps", "20", 20), ("data_seed", "none", None),
    ("center_rewards_coefficient", "none", None), ("save_total_limit", "none", None), ("max_length", "64", 64),
    ("include_num_input_tokens_seen", "false", False), ("include_num_input_tokens_seen", "non_padding", "non_padding"),
    ("accelerator_config", "own.json", "own.json"), ("lr_scheduler_kwargs", '{"a": true}', {"a": True}),
])  # fmt: skip
def test_values_with_a_meaning_of_their_own(name, text, value):
    parser = Parser("")
    trl_flags.add_trl_flags(parser, {}, {})
    assert getattr(parser.parse_args([f"--{name}", text]), name) == value


def test_unsupported_flags_give_the_reason_and_are_not_shown(capsys):
    parser = Parser("")
    trl_flags.add_trl_flags(parser, {"learning_rate": 2e-5}, {"dtype": "weights stay in fp32"})
    assert parser.parse_args([]).learning_rate == 2e-5
    shown = parser.format_help()
    assert "--learning_rate" in shown and "2e-05" in shown and "--dtype" not in shown
    for given, words in (
        ({"dtype": "x"}, "--dtype: not supported here, weights stay"),
        ({"lora_r": 3}, "--lora_r: needs"),
    ):
        with pytest.raises(SystemExit):
            trl_flags.refuse_unsupported(parser, given, {"dtype": "weights stay in fp32"})
        assert words in capsys.readouterr().err
    trl_flags.refuse_unsupported(parser, {"lora_r": 3, "use_peft": True}, {})


def test_a_tracker_that_is_not_installed_is_found_out(monkeypatch):
    installed = {"wandb", "tensorboardX"}
    monkeypatch.setattr(trl_flags.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert trl_flags.missing_tracker(["none", "wandb", "tensorboard", "own_tracker"]) is None
    assert trl_flags.missing_tracker(["wandb", "mlflow"]) == "mlflow"


def test_a_json_object_is_one():
    assert trl_flags.json_object('{"a": 1}') == {"a": 1}
    assert trl_flags.json_or_text("fsdp.json") == "fsdp.json"
    for text in ("[1]", "{", "3"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a JSON object"):
            trl_flags.json_object(text)
