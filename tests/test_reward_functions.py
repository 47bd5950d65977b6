"""Rewards beside the judge's."""

import math
import sys

import pytest
import torch

from reward_pipeline import constraints, reward_functions
from reward_pipeline.constraints import Constraint
from reward_pipeline.files import InputError
from reward_pipeline.sampling import PolicyPrompt

PROMPTS = [
    PolicyPrompt([{"role": "user", "content": "q"}], [1], "pairs.jsonl row 1", Constraint("words", 2)),
    PolicyPrompt([{"role": "user", "content": "r"}], [1], "pairs.jsonl row 2"),
]
MODULE = """
THING = 3

def by_hand(prompts, completions, constraint, place, **columns):
    assert not columns
    assert prompts == [[{"role": "user", "content": text}] for text in "qr"]
    assert place == ["pairs.jsonl row 1", "pairs.jsonl row 2"] and constraint == [("words", 2), None]
    return [len(completion[-1]["content"]) for completion in completions[:1]] + [None]

def one(prompts, completions, **columns):
    return [1.0]

def broken(prompts, completions, **columns):
    raise KeyError("colour")

def infinite(prompts, completions, **columns):
    return [0, float("inf")]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "rewards_by_hand.py").write_text(MODULE)
    (tmp_path / "rewards_that_fail.py").write_text("import no_such_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("rewards_by_hand", None)


def rewards_by(name: str) -> list[float | None]:
    function = reward_functions.load_reward_function(f"rewards_by_hand:{name}")
    return reward_functions.function_rewards(f"rewards_by_hand:{name}", function, PROMPTS, ["four", ""])


def test_a_function_is_called_as_trl_calls_it(module):
    assert rewards_by("by_hand") == [4.0, None]
    function = reward_functions.load_reward_function("rewards_by_hand:by_hand")
    parts = reward_functions.parts_of_rewards(PROMPTS, ["four", ""], None, ("mine", function), {"bold": 1.0})
    assert parts["function"] == [4.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", "returned 1 rewards for 2 completions"),
        ("broken", "KeyError: 'colour'"),
        ("infinite", "inf for an answer to pairs.jsonl row 2"),
    ],
)
def test_what_a_function_does_wrong_is_named(module, name, message):
    with pytest.raises(InputError, match=f"--reward_function rewards_by_hand:{name}: {message}"):
        rewards_by(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewards_by_hand", "give it as module:function"),
        (":one", "give it as module:function"),
        ("rewards_by_hand:two", "no attribute 'two'"),
        ("rewards_by_hand:THING", "is a int, not a function"),
        ("no_such_rewards:one", "No module named 'no_such_rewards'"),
        ("rewards_that_fail:one", "No module named 'no_such_module'"),
    ],
)
def test_a_name_that_stands_for_no_function_is_refused(module, name, message):
    with pytest.raises(InputError, match=f"--reward_function {name}: .*{message}|{message}"):
        reward_functions.load_reward_function(name)


def test_the_parts_of_a_reward():
    function = "reward_pipeline.constraints:kept", constraints.kept
    parts = reward_functions.parts_of_rewards(PROMPTS, ["two words", "**b**"], None, function, {"bold": 2.0})
    assert parts == {"function": [1.0, 0.0], "form_score": [0.0, pytest.approx(2 * math.log(2))]}


def test_a_bounded_reward_is_the_probability_of_being_preferred():
    """Rewards of 1 and 0 standard deviations of 2 nats are 2 nats apart."""
    found = reward_functions.bounded(torch.tensor([1.0, 0.5, -9.0]), torch.tensor([0.0, 0.5, 9.0]), 2.0)
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0.5, 1 / (1 + math.exp(36))])
