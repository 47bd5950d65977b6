"""`RewardModelEvaluator`: score, rank, filter and compare answers with reward models. As a script: a demonstration.

In:  directories that `train_reward_model.py` wrote, or any one-label sequence classifiers with a chat template.
Out: rewards as floats; higher is better, only differences for one prompt have a meaning.

    python reward_model_demo.py
    python reward_model_demo.py --prompt "What is 2 + 2?" --responses "4" "Perhaps 5."
    python reward_model_demo.py --file pairs.jsonl --output scores.jsonl

A line of `--file` holds a `prompt`, and `response`, `responses`, or `chosen` and `rejected`; rewards are added to it.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from tqdm.auto import tqdm

from conversations import Messages, encode_stream, first_refused, parse_prompt, response_length, response_text
from load_smollm_model import (
    InputError,
    autocast,
    autocast_dtype,
    check_prompt,
    first_line,
    inner_linear_layers,
    load_trained_reward_model,
    pick_device,
    replace_file,
    run_script,
    share_prefixes,
    write_text,
)

# ---------------------------------------------------------------------------------------------------------------------
MODEL_PATH = "./reward_model_output"  # directory of the trained reward model
BATCH_SIZE = 16  # conversations scored at once
MAX_LENGTH = 1024  # tokens, for models whose config does not say what they were trained with
CHUNK = 1024  # lines of --file in memory at once
RESAMPLES = 5000  # of a bootstrap interval or a permutation test
# ---------------------------------------------------------------------------------------------------------------------

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
TIE = 1e-6  # rewards of one and the same input can differ by rounding, depending on its place in the batch
CHUNK_DRAWS = 2**22  # random numbers in memory at once

Prompt = str | Sequence[dict[str, str]]


class Member(NamedTuple):
    """One reward model of an evaluator."""

    tokenizer: Any
    model: Any
    max_length: int  # tokens
    mean: float  # of its rewards at training; 0 and 1 where they are not asked for
    std: float
    shares: bool  # whether it computes prefixes in common once


class RewardModelEvaluator:
    """Scores answers with a reward model or an ensemble; a score does not depend on what else is in the batch.

    An ensemble's reward is the mean of its members' rewards minus `std_penalty` standard deviations (population
    formula over the members), which is cautious where they disagree (uncertainty-weighted optimisation,
    arXiv 2310.02743).

    Args:
        model_path: directory of a trained reward model; several directories are an ensemble.
        device: where to compute; by default CUDA, then MPS, then CPU.
        mixed_precision: compute in bf16 (fp16 on older GPUs) where the hardware has it: faster, and scores of a model
            trained so move by less than 0.01. Off by default, so that scores are those of the plain fp32 model.
        normalize: shift and scale rewards by the mean and standard deviation that they had on the validation split of
            the training, each model by its own: 0 is then an average answer, 1 one standard deviation above it.
        std_penalty: standard deviations to subtract from the mean of an ensemble.

    Attributes:
        members: the models in the order given; `tokenizer`, `model` and `max_length` are those of the first.

    Raises:
        InputError: a directory holds no complete one-label reward model, or, with `normalize`, no mean and deviation.
    """

    def __init__(
        self,
        model_path: str | Sequence[str] = MODEL_PATH,
        device: str | None = None,
        mixed_precision: bool = False,
        normalize: bool = False,
        std_penalty: float = 0.0,
    ):
        self.device = torch.device(device) if device else pick_device()
        self.dtype = autocast_dtype(self.device) if mixed_precision else None
        self.std_penalty = std_penalty
        paths = [model_path] if isinstance(model_path, str | Path) else list(model_path)
        if not paths:
            raise ValueError("model_path names no directory")
        self.members = [load_member(str(path), self.device, self.dtype, normalize) for path in paths]
        self.tokenizer, self.model, self.max_length = self.members[0][:3]

    # --- scores

    def get_reward_score(
        self, prompt: Prompt, response: str, max_length: int | None = None, with_std: bool = False
    ) -> float | tuple[float, float]:
        """Reward of one response. `prompt`: string, string with `<extra_id_1>` turns, or message list.

        With `with_std` also the spread of the ensemble's members (0 for a single model).
        """
        result = self.get_reward_scores([prompt], [response], max_length=max_length, with_std=with_std)
        return (result[0][0], result[1][0]) if with_std else result[0]

    def get_reward_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: bool = False,
        with_std: bool = False,
    ) -> list[float] | tuple[list[float], list[float]]:
        """Rewards of N (prompt, response) pairs, in input order.

        Args:
            prompts: N prompts, in any form that `get_reward_score` takes.
            responses: N answers.
            batch_size: conversations per forward pass; they are sorted, so that little is padded and, on a CPU, the
                prompt of several answers is computed once in a batch. Equal conversations are scored once.
            max_length: limit in tokens; by default the one of the training.
            progress: show a progress bar.
            with_std: return the spread of the ensemble's members as a second list.

        Raises:
            TypeError, ValueError: as `conversations.encode_batch`, or `batch_size` is below 1; InputError for a reward
                that is not finite.
        """
        scores = self.get_member_scores(prompts, responses, batch_size, max_length, progress)
        combined = self.combine(scores).tolist()
        return (combined, scores.std(axis=0).tolist()) if with_std else combined

    def get_member_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """(M, N) rewards by each of the M members, float64; arguments and errors as `get_reward_scores`."""
        if isinstance(prompts, str) or isinstance(responses, str):
            raise TypeError("get_reward_scores takes lists; for one response use get_reward_score")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        return np.array(
            [
                self._score(
                    member,
                    prompts,
                    responses,
                    batch_size,
                    member.max_length if max_length is None else max_length,
                    progress,
                )
                for member in self.members
            ]
        ).reshape(len(self.members), len(responses))

    def combine(self, scores: np.ndarray) -> np.ndarray:
        """(N,) rewards of the ensemble from its members' (M, N)."""
        return scores.mean(axis=0) - self.std_penalty * scores.std(axis=0)

    # --- what scores are good for

    def compare_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[tuple[str, float]]:
        """The responses with their rewards, best first (equal ones in the order given)."""
        scores = self.get_reward_scores([prompt] * len(responses), responses)
        return sorted(zip(responses, scores, strict=True), key=lambda item: item[1], reverse=True)

    def best_of_n(self, prompt: Prompt, responses: Sequence[str]) -> tuple[str, float]:
        """The best of the responses and its reward (the first of equal ones).

        Raises:
            ValueError: there are no responses.
        """
        if not len(responses):
            raise ValueError("best_of_n needs at least one response")
        return self.compare_responses(prompt, responses)[0]

    def filter_responses(
        self, prompt: Prompt, responses: Sequence[str], min_score: float | None = None, top_k: int | None = None
    ) -> list[tuple[str, float]]:
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
        self, prompts: Sequence[Prompt], responses_a: Sequence[str], responses_b: Sequence[str]
    ) -> dict[str, Any]:
        """A/B test of two models' answers to the same N prompts. Answers to equal prompts count as one cluster.

        Returns:
            `n`; `win_rate`, the share of prompts at which A's answer has the higher reward (ties half), and
            `win_rate_interval`; `mean_difference`, reward of A minus reward of B, and `mean_difference_interval`;
            `p_value` of that difference (`paired_p_value`); `mean_length_a`, `mean_length_b` in characters, since a
            reward model may prefer the longer answer. Intervals are 95 % (`rate_interval`, `bootstrap_interval`).

        Raises:
            ValueError: the lists differ in length or are empty.
        """
        if not len(prompts) == len(responses_a) == len(responses_b) > 0:
            lengths = f"{len(prompts)}, {len(responses_a)} and {len(responses_b)}"
            raise ValueError(f"compare_models needs a prompt and two answers each, not {lengths}")
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

    def evaluate_conversation(self, turns: Sequence[tuple[str, str]]) -> list[float]:
        """Reward of every answer of a dialogue, each with the turns before it as context.

        Args:
            turns: (user text, answer) in the order of the dialogue; here the texts are taken literally.
        """
        prompts: list[Messages] = []
        history: Messages = []
        turns = list(turns)
        for prompt, response in turns:
            history = [*history, {"role": "user", "content": prompt}]
            prompts.append(history)
            history = [*history, {"role": "assistant", "content": response}]
        return self.get_reward_scores(prompts, [response for _, response in turns])

    # --- how they come about

    @torch.inference_mode()
    def _score(
        self,
        member: Member,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        batch_size: int,
        max_length: int,
        progress: bool,
    ) -> list[float]:
        """Rewards by one member, in input order."""
        encoded = encode_stream(member.tokenizer, prompts, responses, max_length)
        # As bytes they take a tenth of the memory, and big-endian ones sort as the numbers do.
        inputs = [np.array(one.ids, ">i4").tobytes() for one in encoded]
        # Neighbours have much in common: the prompt, or at least the length.
        distinct = sorted(dict.fromkeys(inputs), key=None if member.shares else len, reverse=True)
        scores: dict[bytes, float] = {}
        for start in tqdm(range(0, len(distinct), batch_size), desc="Scoring", unit=" batches", disable=not progress):
            batch = distinct[start : start + batch_size]
            rows = [np.frombuffer(ids, ">i4").tolist() for ids in batch]
            scores.update(zip(batch, self._forward(member.model, rows), strict=True))
        if not all(map(math.isfinite, scores.values())):
            raise InputError(
                f"{member.model.name_or_path}: returned a reward that is not finite; its weights are damaged: "
                "restore it or train it again"
            )
        return [(scores[ids] - member.mean) / member.std for ids in inputs]

    def _forward(self, model, batch: list[list[int]]) -> list[float]:
        """Rewards of token ids, padded on the right to the longest."""
        width = max(map(len, batch))
        pad = model.config.pad_token_id
        input_ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in batch], device=self.device)
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        attention_mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        with autocast(self.device, self.dtype):
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits[:, 0].float().tolist()


def load_member(path: str, device: torch.device, dtype: torch.dtype | None, normalize: bool) -> Member:
    """Load one trained reward model, to compute in `dtype`; see `RewardModelEvaluator`."""
    tokenizer, model = load_trained_reward_model(path)
    mean, std = 0.0, 1.0
    if normalize:
        mean, std = getattr(model.config, "reward_mean", None), getattr(model.config, "reward_std", None)
        if mean is None or not std:
            raise InputError(f"{path}: config.json has no reward_mean and reward_std above 0, so no normalize=True")
    longest = min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH))
    max_length = getattr(model.config, "reward_max_length", longest)
    shares = device.type == "cpu" and share_prefixes(model)
    if dtype:
        for layer in inner_linear_layers(model):
            layer.weight.data = layer.weight.to(dtype)  # once, and not by autocast in every batch
    return Member(tokenizer, model.to(device), max_length, mean, std, shares)


# --- statistics of paired scores -------------------------------------------------------------------------------------


def wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) 1 where the score is higher than the other one, 0.5 where both are equal up to `TIE`, else 0."""
    margin = np.asarray(scores, float) - np.asarray(others, float)
    return np.where(np.abs(margin) <= TIE, 0.5, (margin > 0).astype(float))


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `successes` may count ties as half."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def rate_interval(values: np.ndarray, groups: Sequence | None = None) -> list[float] | None:
    """95 % interval of a share: `bootstrap_interval`, and Wilson's where all groups are alike, such as 12 wins of 12.

    Resamples of groups that do not differ do not either. Wilson's then takes each group as one observation.

    Args:
        values: (N,) between 0 and 1.
        groups: as for `bootstrap_interval`.
    """
    bounds = bootstrap_interval(values, groups)
    if bounds is None or bounds[1] - bounds[0] > 1e-9:
        return bounds
    count = len(group_sums(values, groups)[0])
    return list(wilson_interval(float(np.mean(values)) * count, count))


def bootstrap_interval(values: np.ndarray, groups: Sequence | None = None) -> list[float] | None:
    """95 % bootstrap interval of the mean by expanded percentiles, drawing whole groups where they are given.

    Pairs that share a prompt are not independent; drawn one by one they would make the interval too narrow
    (cluster bootstrap: Field and Welsh 2007). With few groups the plain percentiles are too narrow as well; these are
    moved outwards as Student's t is wider than the normal distribution (Hesterberg 2015, arXiv 1411.5279).

    Args:
        values: (N,) floats; for a paired comparison their differences.
        groups: (N,) labels, such as prompts; by default every value is its own group.

    Returns:
        Lower and upper bound; None for fewer than two groups, which tell nothing about their spread.
    """
    sums, sizes = group_sums(values, groups)
    if len(sums) < 2:
        return None
    tail = scipy.stats.norm.cdf(-math.sqrt(len(sums) / (len(sums) - 1)) * scipy.stats.t.ppf(0.975, len(sums) - 1))
    generator = np.random.default_rng(0)
    means = []
    chunk = max(1, CHUNK_DRAWS // len(sums))
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        counts = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=size)  # (size, groups)
        means.append(counts @ sums / (counts @ sizes))
    return [float(bound) for bound in np.quantile(np.concatenate(means), [tail, 1 - tail])]


def paired_p_value(differences: np.ndarray, groups: Sequence | None = None) -> float:
    """Two-sided p-value of the mean difference by a sign-flip permutation test; a group's values flip together."""
    sums, _ = group_sums(differences, groups)
    if len(sums) < 2:
        return 1.0  # one group alone can not be significant
    result = scipy.stats.permutation_test(
        (sums, np.zeros_like(sums)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, CHUNK_DRAWS // len(sums)),
        rng=0,
    )
    return float(result.pvalue)


def group_sums(values: np.ndarray, groups: Sequence | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values in each group."""
    values = np.asarray(values, float)
    if groups is None:
        return values, np.ones(len(values))
    number = {label: index for index, label in enumerate(dict.fromkeys(groups))}
    group = np.array([number[label] for label in groups], dtype=int)
    return np.bincount(group, weights=values), np.bincount(group).astype(float)


# --- files -----------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places and checked rows of a JSONL file: `prompt` with `response`, `responses`, or `chosen` and `rejected`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield (place := f"{path} row {number}"), check_line(place, line)
    except OSError as error:
        raise InputError(f"{path}: can not be read ({first_line(error)})") from error


def check_line(place: str, line: bytes) -> dict[str, Any]:
    """Parse one line of UTF-8 text.

    Raises:
        InputError: names the row and what is missing in it.
    """
    needed = "prompt, and response, responses, or chosen and rejected"
    try:
        row = json.loads(line.decode("utf-8-sig"))
        parse_prompt(row["prompt"])
        for answer in answers(row):
            response_text(answer)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON ({error.msg}); one object a line is expected") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text; convert the file first") from error
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply; needs {needed}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{place}: needs {needed} ({type(error).__name__}: {error})") from error
    return row


def answers(row: dict[str, Any]) -> list:
    """The answers of a row, whichever columns hold them."""
    if "responses" in row:
        if not isinstance(row["responses"], list):
            raise TypeError("responses is not a list")
        return row["responses"]
    return [row["response"]] if "response" in row else [row["chosen"], row["rejected"]]


def with_rewards(row: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
    """The row and its rewards, named after the columns that they belong to."""
    if "responses" in row:
        return {**row, "rewards": rewards}
    if "response" in row:
        return {**row, "reward": rewards[0]}
    return {**row, "chosen_reward": rewards[0], "rejected_reward": rewards[1]}


def check_templates(evaluator: RewardModelEvaluator, prompts: Sequence[Prompt], places: Sequence[str]) -> None:
    """Make sure that the chat template of every member takes every prompt; some refuse system turns.

    Raises:
        InputError: names the first place whose prompt is refused.
    """
    for start, member in itertools.product(range(0, len(prompts), CHUNK), evaluator.members):
        if refused := first_refused(member.tokenizer, prompts[start : start + CHUNK], member.max_length):
            index, reason = refused
            raise InputError(f"{places[start + index]}: {member.model.name_or_path} can not read it: {reason}")


def score_file(evaluator: RewardModelEvaluator, source: Path, target: Path) -> int:
    """Score every line of a JSONL file into another one, which appears only when it is complete; returns the lines."""
    total, lines = 0, read_lines(source)
    while chunk := list(itertools.islice(lines, CHUNK)):  # a first pass: a bad row is found before the work is done
        check_templates(evaluator, [row["prompt"] for _, row in chunk], [place for place, _ in chunk])
        total += len(chunk)
    if not total:
        raise InputError(f"{source}: the file is empty")
    rows = (row for _, row in read_lines(source))
    with replace_file(target) as file, tqdm(total=total, desc="Scoring", unit=" rows") as bar:
        while chunk := list(itertools.islice(rows, CHUNK)):
            flat = [(row["prompt"], response_text(answer)) for row in chunk for answer in answers(row)]
            scores = iter(evaluator.get_reward_scores(*zip(*flat, strict=True)) if flat else [])
            for row in chunk:
                rewards = list(itertools.islice(scores, len(answers(row))))
                file.write(json.dumps(with_rewards(row, rewards), ensure_ascii=False) + "\n")
            bar.update(len(chunk))
    return total


# --- the demonstration -----------------------------------------------------------------------------------------------

COMPARISONS = [
    (
        "How do I keep basil fresh for a week?",
        [
            "Trim the stems and stand the bunch in a glass of water at room temperature, loosely covered with a bag. "
            "Change the water every other day and keep it out of the fridge: cold turns the leaves black.",
            "Basil is a plant. Plants are fresh when they are fresh, and you should keep them fresh.",
            "The capital of Australia is Canberra.",
        ],
    ),
    (
        "Столица Франции — какой это город? Ответь одним предложением.",
        ["Столица Франции — Париж.", "Столица Франции — Берлин.", "I like trains."],
    ),
]
DIALOGUE = [
    ("What does HTTP status 404 mean?", "The server was reached, but it has nothing at the requested address."),
    ("And 500?", "The server failed while handling the request: an error on its side, not in the address."),
    ("Which of the two can I fix as a visitor?", "Bananas are rich in potassium."),
]


def show_ranking(evaluator: RewardModelEvaluator, prompt: str, responses: list[str]) -> dict[str, Any]:
    """Print the responses best first; returns what was printed."""
    ranking = evaluator.compare_responses(prompt, responses)
    print(f"\n> {prompt}")
    for place, (response, reward) in enumerate(ranking, start=1):
        print(f"  {place}. {reward:+.3f}  {response}")
    return {"prompt": prompt, "ranking": [{"response": response, "reward": reward} for response, reward in ranking]}


def demonstrate(evaluator: RewardModelEvaluator) -> dict[str, Any]:
    """Rank answers in English and Russian and score a dialogue; returns what was printed."""
    comparisons = [show_ranking(evaluator, prompt, responses) for prompt, responses in COMPARISONS]
    print("\nA dialogue, each answer with the turns before it as context:")
    rewards = evaluator.evaluate_conversation(DIALOGUE)
    dialogue = []
    for (prompt, response), reward in zip(DIALOGUE, rewards, strict=True):
        print(f"  {reward:+.3f}  {prompt} -> {response}")
        dialogue.append({"prompt": prompt, "response": response, "reward": reward})
    return {"comparisons": comparisons, "dialogue": dialogue}


def readable(argument: str) -> str:
    """An argument of the command line that can be printed: bytes that are not UTF-8 become `?`."""
    return argument.encode("utf-8", "replace").decode("utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_PATH, help="directory of the reward model (default: %(default)s)")
    parser.add_argument("--prompt", type=readable, help="rank --responses to this prompt")
    parser.add_argument(
        "--responses", type=readable, nargs="+", metavar="RESPONSE", help="two or more answers to --prompt"
    )
    parser.add_argument("--file", type=Path, help="JSONL file to score")
    parser.add_argument("--output", type=Path, help="JSON file for the result (JSONL with --file)")
    options = parser.parse_args()
    if bool(options.prompt) != bool(options.responses):
        parser.error("--prompt and --responses go together")
    if options.file and (options.prompt or not options.output):
        parser.error("--file goes with --output, and without --prompt")
    return options


def main() -> None:
    options = parse_options()
    if options.prompt:
        check_prompt(options.prompt)
    evaluator = RewardModelEvaluator(options.model)
    if options.file:
        count = score_file(evaluator, options.file, options.output)
        print(f"{count:,} rows scored, written to {options.output}")
        return
    if options.prompt:
        check_templates(evaluator, [options.prompt], ["prompt"])
        result = show_ranking(evaluator, options.prompt, options.responses)
    else:
        result = demonstrate(evaluator)
        options.output = options.output or Path(options.model) / "demonstration.json"
    if options.output:
        write_text(options.output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    run_script(main)
