"""What else than the judge's opinion a completion may be rewarded for, in the form that TRL's online trainers take.

def short(prompts, completions, **columns) -> list[float]:
    return [-len(completion[-1]["content"]) / 100 for completion in completions]

python train_reinforce.py --reward_function my_rewards:short --reward_function_weight 0.5
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import InputError, first_line
from reward_pipeline.form import form_scores
from reward_pipeline.sampling import PolicyPrompt

RewardFunction = Callable[..., Sequence[float | None]]


def load_reward_function(name: str) -> RewardFunction:
    """The function that `module:function` names; a module in the working directory is found as well.

    Raises:
        InputError: there is no such module or function, or the module can not be imported.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise InputError(f"--reward_function {name}: give it as module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything
        raise InputError(f"--reward_function {name}: {first_line(error) or type(error).__name__}") from error
    if not callable(found):
        raise InputError(f"--reward_function {name}: is a {type(found).__name__}, not a function")
    return found


def function_rewards(
    name: str, function: RewardFunction, prompts: Sequence[PolicyPrompt], texts: Sequence[str]
) -> list[float | None]:
    """Rewards of N completions by a function, called as TRL calls it for conversations.

    It gets `prompts` and `completions` as message lists, and lists of N as further columns: `constraint`, of
    `constraints.constrain` or None, and `place`, where the prompt comes from. None instead of a reward stands for "not
    applicable", as in TRL.

    Args:
        name: of the function, for messages.

    Raises:
        InputError: it raises anything, or does not return N finite numbers.
    """
    columns = {"constraint": [prompt.constraint for prompt in prompts], "place": [prompt.place for prompt in prompts]}
    try:
        returned = function(
            prompts=[prompt.messages for prompt in prompts],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            **columns,
        )
        rewards = [None if reward is None else float(reward) for reward in returned]
    except Exception as error:
        raise InputError(f"--reward_function {name}: {type(error).__name__}: {first_line(error)}") from error
    if len(rewards) != len(texts):
        raise InputError(f"--reward_function {name}: returned {len(rewards)} rewards for {len(texts)} completions")
    for prompt, reward in zip(prompts, rewards, strict=True):
        if reward is not None and not math.isfinite(reward):
            raise InputError(f"--reward_function {name}: {reward} for an answer to {prompt.place}")
    return rewards


def parts_of_rewards(
    prompts: Sequence[PolicyPrompt],
    texts: Sequence[str],
    judge: RewardModelEvaluator | None,
    function: tuple[str, RewardFunction] | None,
    form_model: Mapping[str, float],
) -> dict[str, list[float]]:
    """What N completions are rewarded for, `judge` and `function`, where there is one; and `form_score`, for the log.

    What the function finds not applicable counts as 0.

    Args:
        function: with its name.
        form_model: weights of `form.fit_form_model`.
    """
    parts: dict[str, list[float]] = {}
    if judge:
        # It reads the whole completion and gives one number for it, for an empty one too.
        parts["judge"] = judge.reward_function([prompt.messages for prompt in prompts], texts)
    if function:
        parts["function"] = [reward or 0.0 for reward in function_rewards(*function, prompts, texts)]
    return parts | {"form_score": form_scores(form_model, texts).tolist()}


def bounded(rewards: torch.Tensor, of_sft: torch.Tensor, std: float) -> torch.Tensor:
    """(B,) sigmoid of how much better than the SFT model's own answer a completion is (PAR, arXiv 2502.18770).

    The reward model was trained to make it the probability that people prefer the completion. Above 0.5 it grows ever
    slower, so that little is to be had from a reward that is high for a wrong reason.

    Args:
        rewards, of_sft: (B,) of the completion and of the SFT model's answer to its prompt, in standard deviations.
        std: the deviation in nats of log odds.
    """
    return torch.sigmoid((rewards - of_sft) * std)
