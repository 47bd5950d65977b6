"""`RewardModelEvaluator`: score, rank, filter and compare answers with reward models.

    evaluator = RewardModelEvaluator("./reward_model_output")
    evaluator.get_reward_score("What is 2 + 2?", "4")
    evaluator.compare_responses("What is 2 + 2?", ["Perhaps 5.", "4"])  # best first

Higher is better; only differences between answers to one prompt have a meaning.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from reward_pipeline.conversations import (
    ASKING,
    Messages,
    Prompt,
    Response,
    dialogue_messages,
    encode_stream,
    first_refused,
    parse_prompt,
    response_text,
)
from reward_pipeline.devices import autocast, autocast_dtype, pick_device
from reward_pipeline.files import InputError, first_line
from reward_pipeline.form import form_scores, response_length
from reward_pipeline.models import (
    inner_linear_layers,
    load_trained_reward_model,
    positions,
    trained_with_halved_prompts,
)
from reward_pipeline.prefix_sharing import share_prefixes
from reward_pipeline.statistics import bootstrap_interval, paired_p_value, rate_interval, wins

MODEL_PATH = "./reward_model_output"  # directory or hub id of the trained reward model
BATCH_SIZE = 16  # conversations scored at once
MAX_LENGTH = 1024  # tokens, for models whose config does not say what they were trained with

AnyResponse = TypeVar("AnyResponse", bound=Response)  # strings come back as strings, message lists as message lists


class Member(NamedTuple):
    """One reward model of an evaluator."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    max_length: int  # tokens
    mean: float  # of its rewards at training; 0 and 1 where they are not asked for
    std: float
    shares: bool  # whether it computes prefixes in common once
    halve_prompt: bool  # whether it was trained with prompts cut as earlier versions did
    form_model: dict[str, float] | None  # whose score of an answer is added to the reward, where that is asked for


class RewardModelEvaluator:
    """Scores answers with a reward model or an ensemble.

    In fp32 a score does not depend on what else is in the batch, up to rounding (1e-5). Several threads may use one
    evaluator at once, and it can be copied, pickled and sent to another process.

    An ensemble's reward is the mean of its members' rewards minus `std_penalty` standard deviations (population
    formula over the members), which is cautious where they disagree (uncertainty-weighted optimisation,
    arXiv 2310.02743).

    Args:
        model_path: directory or hub id of a trained reward model, whole or as an adapter of PEFT; see
            `models.load_trained_reward_model`. Several are an ensemble.
        device: where to compute; by default CUDA, then MPS, then CPU.
        mixed_precision: compute in bf16 (fp16 on older GPUs) where the hardware has it: faster, but a score then also
            depends on what else is in the batch, by up to some 0.01 (0.03 if the model was trained in fp32). Off by
            default, so that scores are those of the plain fp32 model and can be repeated.
        normalize: shift and scale rewards by the mean and standard deviation that they had on the validation split of
            the training, each model by its own: 0 is then an average answer, 1 one standard deviation above it.
        std_penalty: standard deviations to subtract from the mean of an ensemble.
        form: add the form term that the training had beside the reward: what the form model makes of an answer.
            Together they say best which answer people prefer, in pairs like those of the training. Off, a reward is the
            model's alone, as plain `transformers` gives it: what is left of a preference beyond length and mark-up, and
            the one to optimise a policy for.

    Attributes:
        members: the models in the order given; `model` and `max_length` are those of the first.
        precision: the number format that it computes in, such as `bfloat16`.
        tokenizer: a copy of the first one's. A call with truncation or padding changes a tokenizer until the next call,
            also for other threads, so scoring keeps its own to itself.

    Raises:
        InputError: a name stands for no complete one-label reward model, or, with `normalize`, no mean and deviation,
            or, with `form`, a model that was trained without the form term; the device is not there.
    """

    def __init__(
        self,
        model_path: str | Path | Sequence[str | Path] = MODEL_PATH,
        device: str | torch.device | None = None,
        mixed_precision: bool = False,
        normalize: bool = False,
        std_penalty: float = 0.0,
        form: bool = False,
    ):
        self.device = pick_device() if device is None else present_device(device)
        self.dtype = autocast_dtype(self.device) if mixed_precision else None
        self.precision = str(self.dtype or torch.float32).removeprefix("torch.")
        self.std_penalty = std_penalty
        paths = [model_path] if isinstance(model_path, str | Path) else list(model_path)
        if not paths:
            raise ValueError("model_path names no model")
        self.members = [load_member(str(path), self.device, self.dtype, normalize, form) for path in paths]
        own_tokenizer, self.model, self.max_length = self.members[0][:3]
        self.tokenizer = copy.deepcopy(own_tokenizer)

    # --- scores

    @overload
    def get_reward_score(
        self, prompt: Prompt, response: Response, max_length: int | None = None, with_std: Literal[False] = False
    ) -> float: ...
    @overload
    def get_reward_score(
        self, prompt: Prompt, response: Response, max_length: int | None = None, *, with_std: Literal[True]
    ) -> tuple[float, float]: ...
    def get_reward_score(
        self, prompt: Prompt, response: Response, max_length: int | None = None, with_std: bool = False
    ) -> float | tuple[float, float]:
        """Reward of one response. `prompt`: string, string with `<extra_id_1>` turns, or message list.

        With `with_std` also the spread of the ensemble's members (0 for a single model). An empty response is refused,
        as in `get_reward_scores`.
        """
        scores, stds = self.get_reward_scores([prompt], [response], max_length=max_length, with_std=True)
        return (scores[0], stds[0]) if with_std else scores[0]

    @overload
    def get_reward_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        batch_size: int = ...,
        max_length: int | None = ...,
        progress: bool | Callable[[int], object] = ...,
        with_std: Literal[False] = ...,
    ) -> list[float]: ...
    @overload
    def get_reward_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        batch_size: int = ...,
        max_length: int | None = ...,
        progress: bool | Callable[[int], object] = ...,
        *,
        with_std: Literal[True],
    ) -> tuple[list[float], list[float]]: ...
    def get_reward_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: bool | Callable[[int], object] = False,
        with_std: bool = False,
    ) -> list[float] | tuple[list[float], list[float]]:
        """Rewards of N (prompt, response) pairs, in input order.

        Empty answers are refused: no training sees one, so the reward that a model gives it means nothing, and it could
        be the highest of all. For those of a policy, which have to get a number, see `reward_function`.

        Args:
            prompts: N prompts, in any form that `get_reward_score` takes.
            responses: N answers: strings, or message lists that end with the answer. The turns before it are context:
                they may repeat the prompt, and go on after it.
            batch_size: conversations per forward pass; they are sorted, so that little is padded and, on a CPU, the
                prompt of several answers is computed once in a batch. Equal conversations are scored once.
            max_length: limit in tokens; by default the one of the training.
            progress: show a progress bar; or a function that is told after every batch how many of the N answers
                were scored in it, once for each member of an ensemble.
            with_std: return the spread of the ensemble's members as a second list.

        Raises:
            TypeError, ValueError: as `conversations.encode_batch`; an answer is empty or white space alone (the message
                has its index), `batch_size` is below 1, or `max_length` beyond the positions of a member; InputError
                for a reward that is not finite.
        """
        check_filled(responses)
        scores = self.get_member_scores(prompts, responses, batch_size, max_length, progress)
        combined = self.combine(scores).tolist()
        return (combined, scores.std(axis=0).tolist()) if with_std else combined

    def get_member_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: bool | Callable[[int], object] = False,
    ) -> np.ndarray:
        """(M, N) rewards by each of the M members, float64; as `get_reward_scores`, empty answers included."""
        return self.get_member_scores_and_cuts(prompts, responses, batch_size, max_length, progress)[0]

    @torch.inference_mode()
    def get_member_scores_and_cuts(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: bool | Callable[[int], object] = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `get_member_scores`; also (M, N, 2) bool, whether each of them read a cut prompt, and a cut answer."""
        if isinstance(prompts, str) or isinstance(responses, str):
            raise TypeError("get_reward_scores takes lists; for one response use get_reward_score")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        scores = np.empty((len(self.members), len(responses)))
        cuts: np.ndarray = np.zeros((*scores.shape, 2), dtype=bool)
        with tqdm(total=scores.size, desc="Scoring", unit=" answers", disable=progress is not True) as bar:
            advance = progress if callable(progress) else bar.update
            for row, cut, member in zip(scores, cuts, self.members, strict=True):
                limit = member.max_length if max_length is None else max_length
                if limit > (most := positions(member.model)):
                    raise ValueError(f"max_length is {limit}, but {member.model.name_or_path} takes {most} tokens")
                encoded = encode_stream(member.tokenizer, prompts, responses, limit, halve_prompt=member.halve_prompt)
                inputs = []
                for number, one in enumerate(encoded):
                    # As bytes they take a tenth of the memory, and big-endian ones sort as the numbers do.
                    inputs.append(np.array(one.ids, ">i4").tobytes())
                    cut[number] = one.prompt_cut, one.response_cut
                row[:] = self._rewards(member, inputs, batch_size, advance)
                if member.form_model:
                    row += form_scores(member.form_model, responses)
                row -= member.mean
                row /= member.std
        return scores, cuts

    def combine(self, scores: np.ndarray) -> np.ndarray:
        """(N,) rewards of the ensemble from its members' (M, N)."""
        return scores.mean(axis=0) - self.std_penalty * scores.std(axis=0)

    def reward_function(self, prompts: Sequence[Prompt], completions: Sequence[Response], **kwargs: Any) -> list[float]:
        """Rewards in the form that TRL's online trainers call: `reward_funcs=[evaluator.reward_function]`.

        A policy samples an empty completion now and then, and its training must not stop: here such a one is ranked as
        the model ranks it, wherever that is.

        Args:
            prompts: N prompts, strings or message lists; either way they are formatted by the chat template.
            completions: N answers, strings or message lists (one assistant message, as TRL makes them).
            kwargs: the data set's other columns and what else TRL passes; not used.
        """
        return self.combine(self.get_member_scores(prompts, completions)).tolist()

    # --- what scores are good for

    def compare_responses(self, prompt: Prompt, responses: Sequence[AnyResponse]) -> list[tuple[AnyResponse, float]]:
        """The responses with their rewards, best first (equal ones in the order given)."""
        scores = self.get_reward_scores([prompt] * len(responses), responses)
        return sorted(zip(responses, scores, strict=True), key=lambda item: item[1], reverse=True)

    def best_of_n(self, prompt: Prompt, responses: Sequence[AnyResponse]) -> tuple[AnyResponse, float]:
        """The best of the responses and its reward (the first of equal ones).

        Raises:
            ValueError: there are no responses.
        """
        if not len(responses):
            raise ValueError("best_of_n needs at least one response")
        return self.compare_responses(prompt, responses)[0]

    def filter_responses(
        self,
        prompt: Prompt,
        responses: Sequence[AnyResponse],
        min_score: float | None = None,
        top_k: int | None = None,
    ) -> list[tuple[AnyResponse, float]]:
        """Responses worth keeping with their rewards, best first.

        Args:
            min_score: keep those with at least this reward. Rewards of different models have different scales;
                with `normalize` a threshold means the same for all.
            top_k: keep the best so many. With both, a response has to pass both.

        Raises:
            ValueError: neither is given, or `top_k` is negative.
        """
        if min_score is None and top_k is None:
            raise ValueError("filter_responses needs min_score or top_k")
        if top_k is not None and top_k < 0:
            raise ValueError("top_k must not be negative")
        ranking = self.compare_responses(prompt, responses)
        return [item for item in ranking if min_score is None or item[1] >= min_score][:top_k]

    def compare_models(
        self, prompts: Sequence[Prompt], responses_a: Sequence[Response], responses_b: Sequence[Response]
    ) -> dict[str, Any]:
        """A/B test of two models' answers to the same N prompts. Answers to equal prompts count as one cluster.

        Returns:
            `n`; `win_rate`, the share of prompts at which A's answer has the higher reward (ties half), and
            `win_rate_interval`; `mean_difference`, reward of A minus reward of B, and `mean_difference_interval`;
            `p_value` of that difference (`paired_p_value`); `mean_length_a`, `mean_length_b` in characters, since a
            reward model may prefer the longer answer. Intervals are 95 % (`rate_interval`, `bootstrap_interval`).

        Raises:
            ValueError: the lists differ in length or are empty, or an answer is.
        """
        if not len(prompts) == len(responses_a) == len(responses_b) > 0:
            lengths = f"{len(prompts)}, {len(responses_a)} and {len(responses_b)}"
            raise ValueError(f"compare_models needs a prompt and two answers each, not {lengths}")
        check_filled(responses_a, "responses_a")
        check_filled(responses_b, "responses_b")
        scores = self.get_reward_scores([*prompts, *prompts], [*responses_a, *responses_b])
        a, b = np.array(scores).reshape(2, len(prompts))
        groups = [repr(parse_prompt(prompt)) for prompt in prompts]
        won = wins(a, b)
        return {
            "n": len(prompts),
            "win_rate": float(won.mean()),
            "win_rate_interval": rate_interval(won, groups),
            "mean_difference": float((a - b).mean()),
            "mean_difference_interval": bootstrap_interval(a - b, groups),
            "p_value": paired_p_value(a - b, groups),
            "mean_length_a": float(np.mean([response_length(response_text(each)) for each in responses_a])),
            "mean_length_b": float(np.mean([response_length(response_text(each)) for each in responses_b])),
        }

    def evaluate_conversation(self, turns: Iterable[tuple[str, str]] | Messages) -> list[float]:
        """Reward of every answer of a dialogue, each with the turns before it as context.

        Args:
            turns: a message list, whose system and tool turns are context, and tool calls too, or (user text, answer)
                pairs; in the order of the dialogue.

        Raises:
            TypeError: they are neither.
            ValueError: as `get_reward_scores`; an answer is empty, or does not follow a user turn.
        """
        messages = dialogue_messages(turns)
        answers = [
            place
            for place, message in enumerate(messages)
            if message["role"] == "assistant" and "tool_calls" not in message
        ]
        for place in answers:
            if not place or messages[place - 1]["role"] not in ASKING:
                raise ValueError(f"turn {place}: an answer follows a user turn, and this one does not")
            if not messages[place]["content"].strip():
                raise ValueError(f"turn {place}: the answer is empty")
        return self.get_reward_scores(
            [messages[:place] for place in answers], [messages[place]["content"] for place in answers]
        )

    # --- how they come about

    def _rewards(
        self, member: Member, inputs: list[bytes], batch_size: int, advance: Callable[[int], object]
    ) -> list[float]:
        """Rewards of token ids (big-endian int32) by one member, in input order."""
        times = Counter(inputs)
        # Neighbours have much in common: the prompt, or at least the length. The longest come first: what does not fit
        # into memory fails at once.
        distinct = sorted(times, key=None if member.shares else len, reverse=True)
        scores: dict[bytes, float] = {}
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            rows = [np.frombuffer(ids, ">i4").tolist() for ids in batch]
            scores.update(zip(batch, self._forward(member.model, rows), strict=True))
            advance(sum(times[ids] for ids in batch))
        if not all(map(math.isfinite, scores.values())):
            raise InputError(
                f"{member.model.name_or_path}: returned a reward that is not finite; its weights are damaged: "
                "restore it or train it again"
            )
        return [scores[ids] for ids in inputs]

    def _forward(self, model: PreTrainedModel, batch: list[list[int]]) -> list[float]:
        """Rewards of token ids, padded on the right to the longest."""
        width = max(map(len, batch))
        pad = model.config.pad_token_id
        input_ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in batch], device=self.device)
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        attention_mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        with autocast(self.device, self.dtype):
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits[:, 0].float().tolist()


def check_filled(responses: Sequence[Response], name: str = "responses") -> None:
    """Make sure that no response is empty or white space alone.

    Raises:
        TypeError, ValueError: as `conversations.response_text`.
        ValueError: one is; its index stands behind `name`.
    """
    if isinstance(responses, str):
        raise TypeError(f"{name} is a list; for one response use get_reward_score")
    for index, response in enumerate(responses):
        if not response_text(response).strip():
            raise ValueError(f"{name}[{index}] is empty, and a reward for no answer means nothing; leave it out")


def present_device(name: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        InputError: there is none, or this PyTorch can not use it.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # the way to ask that all kinds of devices have in common
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name}: can not be used here ({first_line(error)})") from error
    return device


def load_member(path: str, device: torch.device, dtype: torch.dtype | None, normalize: bool, form: bool) -> Member:
    """Load one trained reward model, to compute in `dtype`; see `RewardModelEvaluator`."""
    tokenizer, model = load_trained_reward_model(path)
    form_model = getattr(model.config, "form_model", None) if form else None
    if form and not (form_model and getattr(model.config, "form_term", False)):
        raise InputError(f"{path}: was trained without the form term; leave form out, or train with --form_term true")
    mean, std = 0.0, 1.0
    if normalize:
        reward = "reward_with_form" if form else "reward"
        if (scale := trained_scale(model.config, reward)) is None:
            raise InputError(f"{path}: config.json has no {reward}_mean and {reward}_std above 0, so no normalize=True")
        mean, std = scale
    max_length = getattr(model.config, "reward_max_length", min(MAX_LENGTH, positions(model)))
    halve_prompt = trained_with_halved_prompts(model.config)
    shares = device.type == "cpu" and share_prefixes(model)
    if dtype:
        for layer in inner_linear_layers(model):
            layer.weight.data = layer.weight.to(dtype)  # once, and not by autocast in every batch
    return Member(tokenizer, model.to(device), max_length, mean, std, shares, halve_prompt, form_model)


def trained_scale(config: PreTrainedConfig, reward: str = "reward") -> tuple[float, float] | None:
    """Mean and standard deviation of the rewards on the validation split of the training, where the config has them."""
    mean, std = (getattr(config, f"{reward}_{name}", None) for name in ("mean", "std"))
    return (mean, std) if mean is not None and std else None


def check_templates(evaluator: RewardModelEvaluator, prompts: Sequence[Prompt], places: Sequence[str]) -> None:
    """Make sure that the chat template of every member takes every prompt; some refuse system turns.

    Raises:
        InputError: names the first place whose prompt is refused.
    """
    for member in evaluator.members:
        if refused := first_refused(member.tokenizer, prompts):
            index, reason = refused
            raise InputError(f"{places[index]}: {member.model.name_or_path} can not read it: {reason}")
