"""`RewardModelEvaluator`: score, rank and compare answers with a trained reward model. As a script: a demonstration.

In:  the directory that `train_reward_model.py` wrote, or any one-label sequence classifier with a chat template.
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
from typing import Any

import torch
from tqdm.auto import tqdm

from conversations import Messages, encode_batch, parse_prompt, response_text
from load_smollm_model import (
    InputError,
    autocast,
    autocast_dtype,
    check_prompt,
    first_line,
    load_trained_reward_model,
    pick_device,
    replace_file,
    run_script,
    write_text,
)

# ---------------------------------------------------------------------------------------------------------------------
MODEL_PATH = "./reward_model_output"  # directory of the trained reward model
BATCH_SIZE = 16  # conversations scored at once
MAX_LENGTH = 1024  # tokens, for models whose config does not say what they were trained with
CHUNK = 1024  # lines of --file in memory at once
# ---------------------------------------------------------------------------------------------------------------------

Prompt = str | Sequence[dict[str, str]]


class RewardModelEvaluator:
    """Scores answers with a reward model; a score does not depend on what else is in the batch.

    Args:
        model_path: directory of a trained reward model.
        device: where to compute; by default CUDA, then MPS, then CPU.
        mixed_precision: compute in bf16 (fp16 on older GPUs) where the hardware has it: some three times as fast,
            scores move in the third digit. Off by default, so that scores are those of the plain fp32 model.

    Raises:
        InputError: the directory holds no complete one-label reward model.
    """

    def __init__(self, model_path: str = MODEL_PATH, device: str | None = None, mixed_precision: bool = False):
        self.device = torch.device(device) if device else pick_device()
        self.dtype = autocast_dtype(self.device) if mixed_precision else None
        self.tokenizer, model = load_trained_reward_model(model_path)
        self.model = model.to(self.device)
        self.max_length = getattr(model.config, "reward_max_length", MAX_LENGTH)

    def get_reward_score(self, prompt: Prompt, response: str, max_length: int | None = None) -> float:
        """Reward of one response. `prompt`: string, string with `<extra_id_1>` turns, or message list."""
        return self.get_reward_scores([prompt], [response], max_length=max_length)[0]

    def compare_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[tuple[str, float]]:
        """The responses with their rewards, best first (equal ones in the order given)."""
        scores = self.get_reward_scores([prompt] * len(responses), responses)
        return sorted(zip(responses, scores, strict=True), key=lambda item: item[1], reverse=True)

    def evaluate_conversation(self, turns: Sequence[tuple[str, str]]) -> list[float]:
        """Reward of every answer of a dialogue, each with the turns before it as context.

        Args:
            turns: (user text, answer) in the order of the dialogue; here the texts are taken literally.
        """
        prompts: list[Messages] = []
        history: Messages = []
        for prompt, response in turns:
            history = [*history, {"role": "user", "content": prompt}]
            prompts.append(history)
            history = [*history, {"role": "assistant", "content": response}]
        return self.get_reward_scores(prompts, [response for _, response in turns])

    @torch.inference_mode()
    def get_reward_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        batch_size: int = BATCH_SIZE,
        max_length: int | None = None,
        progress: bool = False,
    ) -> list[float]:
        """Rewards of N (prompt, response) pairs, in input order.

        Args:
            prompts: N prompts, in any form that `get_reward_score` takes.
            responses: N answers.
            batch_size: conversations per forward pass; they are sorted by length, so that little is padded, and equal
                ones are scored once.
            max_length: limit in tokens; by default the one of the training.
            progress: show a progress bar.

        Raises:
            TypeError, ValueError: as `conversations.encode_batch`; InputError for a reward that is not finite.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise TypeError("get_reward_scores takes lists; for one response use get_reward_score")
        encoded = encode_batch(self.tokenizer, prompts, responses, max_length or self.max_length)
        inputs = [tuple(one.ids) for one in encoded]
        distinct = sorted(dict.fromkeys(inputs), key=len, reverse=True)
        scores: dict[tuple[int, ...], float] = {}
        for start in tqdm(range(0, len(distinct), batch_size), desc="Scoring", unit=" batches", disable=not progress):
            batch = distinct[start : start + batch_size]
            scores.update(zip(batch, self._forward(batch), strict=True))
        if not all(map(math.isfinite, scores.values())):
            raise InputError("the reward model returned a reward that is not finite: its weights are damaged")
        return [scores[ids] for ids in inputs]

    def _forward(self, batch: list[tuple[int, ...]]) -> list[float]:
        """Rewards of token ids, padded on the right to the longest."""
        width = max(map(len, batch))
        pad = self.model.config.pad_token_id
        input_ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in batch], device=self.device)
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        attention_mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        with autocast(self.device, self.dtype):
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits[:, 0].float().tolist()


# --- files -----------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Checked rows of a JSONL file: `prompt` with `response`, `responses`, or `chosen` and `rejected`."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield check_line(f"{path} row {number}", line)
    except OSError as error:
        raise InputError(f"{path}: can not be read ({first_line(error)})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; convert it first") from error


def check_line(place: str, line: str) -> dict[str, Any]:
    """Parse one line.

    Raises:
        InputError: names the row and what is missing in it.
    """
    try:
        row = json.loads(line)
        parse_prompt(row["prompt"])
        for answer in answers(row):
            response_text(answer)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON ({error.msg}); one object a line is expected") from error
    except (KeyError, TypeError, ValueError) as error:
        needed = "prompt, and response, responses, or chosen and rejected"
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


def score_file(evaluator: RewardModelEvaluator, source: Path, target: Path) -> int:
    """Score every line of a JSONL file into another one, which appears only when it is complete; returns the lines."""
    total = sum(1 for _ in read_lines(source))  # a first pass, so that a bad row is found before the work is done
    if not total:
        raise InputError(f"{source}: the file is empty")
    rows = read_lines(source)
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


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_PATH, help="directory of the reward model (default: %(default)s)")
    parser.add_argument("--prompt", help="rank --responses to this prompt")
    parser.add_argument("--responses", nargs="+", metavar="RESPONSE", help="two or more answers to --prompt")
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
        result = show_ranking(evaluator, options.prompt, options.responses)
    else:
        result = demonstrate(evaluator)
        options.output = options.output or Path(options.model) / "demonstration.json"
    if options.output:
        write_text(options.output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    run_script(main)
