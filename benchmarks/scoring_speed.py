"""Speed of scoring: `get_reward_scores` against the usual ways, on the same answers, and how much bf16 moves scores.

In:  a trained reward model, and pairs from any source that `load_helpsteer_dataset.py` reads; the sample by default.
Out: tables on the terminal and, with `--json`, a file with all figures.

    python benchmarks/scoring_speed.py
    python benchmarks/scoring_speed.py --model reward_model_output --pairs my_pairs.jsonl --json scoring_speed.json

bf16        `get_reward_scores` with `mixed_precision=True` (fp16 or fp32 where the hardware has no bf16)
fp32        `get_reward_scores` as it is by default
one by one  the plain `transformers` model in fp32, one conversation at a time
pipeline    `pipeline("text-classification", batch_size=16)` on the formatted conversations
together    16 candidates of one prompt in one call, as bf16; a prompt as long as an answer
apart       the same in a call each
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline.conversations import encode_batch, response_text
from reward_pipeline.devices import pick_device
from reward_pipeline.evaluator import MODEL_PATH, RewardModelEvaluator
from reward_pipeline.models import load_trained_reward_model, trained_with_halved_prompts
from reward_pipeline.processed import read_pairs
from reward_pipeline.processes import run_script
from reward_pipeline.settings import filled_text, whole

CANDIDATES = 16
CANDIDATE_TOKENS = 128  # of the prompt, and of each of its candidates
MIXED_PRECISION = {"bf16", "together", "apart"}


def token_ids(tokenizer, config, prompts: list, responses: list[str]) -> list[list[int]]:
    """What the evaluator feeds a model with this config."""
    halved = trained_with_halved_prompts(config)
    encoded = encode_batch(tokenizer, prompts, responses, config.reward_max_length, halve_prompt=halved)
    return [one.ids for one in encoded]


def by_evaluator(turns, model: str, prompts: list, responses: list[str], mixed_precision: bool) -> None:
    evaluator = RewardModelEvaluator(model, mixed_precision=mixed_precision)
    for figures in turns:
        figures["scores"] = evaluator.get_reward_scores(prompts, responses)


def one_by_one(turns, model: str, prompts: list, responses: list[str]) -> None:
    tokenizer, network = load_trained_reward_model(model)
    network.to(pick_device())
    for figures in turns:
        figures["scores"] = []
        for ids in token_ids(tokenizer, network.config, prompts, responses):
            with torch.inference_mode():
                logits = network(torch.tensor([ids], device=network.device), use_cache=False).logits
            figures["scores"].append(float(logits))


def by_pipeline(turns, model: str, prompts: list, responses: list[str]) -> None:
    tokenizer, network = load_trained_reward_model(model)
    # Decoded again from the ids, so that the pipeline reads what the others read.
    texts = [tokenizer.decode(ids) for ids in token_ids(tokenizer, network.config, prompts, responses)]
    classify = pipeline(
        "text-classification", model=network, tokenizer=tokenizer, device=pick_device(), batch_size=16,
        function_to_apply="none",
    )  # fmt: skip
    for figures in turns:
        figures["scores"] = [one["score"] for one in classify(texts, add_special_tokens=False)]


def apart(turns, model: str, prompt: str, responses: list[str]) -> None:
    evaluator = RewardModelEvaluator(model, mixed_precision=True)
    for figures in turns:
        figures["scores"] = [evaluator.get_reward_score(prompt, response) for response in responses]


def candidates(tokenizer) -> tuple[str, list[str]]:
    """A prompt and its answers, each with about `CANDIDATE_TOKENS` tokens."""
    words = tokenizer.encode("a mountain village wakes slowly under snow while two old friends carry bread home ")

    def text(seed: int) -> str:
        order = np.random.default_rng(seed).choice(words, CANDIDATE_TOKENS - 10)
        return tokenizer.decode(order)

    return text(0), [text(seed) for seed in range(1, CANDIDATES + 1)]


def accuracy(scores: list[float]) -> float:
    """Share of pairs in order; the first half are the chosen answers."""
    chosen, rejected = np.array(scores).reshape(2, -1)
    return float((chosen > rejected).mean())


def main() -> None:
    parser = measure.parser(__doc__, rounds=5)
    parser.flag("model", MODEL_PATH, filled_text, "trained reward model", metavar="DIR")
    parser.flag("pairs", "sample", filled_text, "source of pairs", metavar="SOURCE")
    parser.flag("limit", 64, whole(1), "pairs")
    options = parser.parse_args()
    pairs = read_pairs(options.pairs)
    pairs = pairs.select(range(min(options.limit, len(pairs))))
    prompts = [*pairs["prompt"], *pairs["prompt"]]
    responses = [response_text(answer) for side in ("chosen", "rejected") for answer in pairs[side]]
    tokenizer, network = load_trained_reward_model(options.model)
    parameters, config = measure.body_parameters(network), network.config
    del network
    prompt, answers = candidates(tokenizer)
    work, together = (options.model, prompts, responses), (options.model, [prompt] * CANDIDATES, answers)
    machine = measure.machine()
    results = measure.take_turns(
        {
            "bf16": (by_evaluator, (*work, True)),
            "fp32": (by_evaluator, (*work, False)),
            "one by one": (one_by_one, work),
            "pipeline": (by_pipeline, work),
        },
        options.rounds,
        measure.TIME_LIMIT * 3 / 4,
    )
    same_prompt = measure.take_turns(
        {
            "together": (by_evaluator, (*together, True)),
            "apart": (apart, (options.model, prompt, answers)),
        },
        options.rounds,
        measure.TIME_LIMIT / 4,
    )
    print(measure.describe_machine(machine))
    exact, summary = np.array(results["one by one"][0]["scores"]), {}
    for group, inputs in ((results, work), (same_prompt, together)):
        first, encoded = next(iter(group)), token_ids(tokenizer, config, *inputs[1:])
        tokens = sum(map(len, encoded))
        rows = []
        for name, turns in group.items():
            seconds = measure.median(turns, "seconds")
            operations = measure.FORWARD * parameters * tokens / seconds
            dtype = measure.own_dtype() if name in MIXED_PRECISION else torch.float32
            each = summary[name] = {
                "texts_per_second": len(encoded) / seconds,
                "rate_share": operations / measure.rate_in(dtype, machine),
                "peak_memory": measure.most_memory(turns),
                f"{first}_is_faster": measure.faster_by(group[first], turns),
            }
            row = [name, f"{each['texts_per_second']:.1f}", f"{each['rate_share']:.2f}"]
            row += [measure.gibibytes(each["peak_memory"]), f"{each[f'{first}_is_faster']:.2f}"]
            if group is results:
                scores = turns[0]["scores"]
                each["largest_difference"] = float(np.abs(np.array(scores) - exact).max())
                each["accuracy"] = accuracy(scores)
                row += [f"{each['largest_difference']:.1e}", f"{each['accuracy']:.4f}"]
            rows.append(row)
        header = ["", "texts/s", "share of the rate", "peak memory", f"{first} is faster by"]
        header += ["largest difference", "accuracy"]
        measure.print_table(header[: len(rows[0])], rows)
    measure.write_figures(options.json, {"machine": machine, "summary": summary, "turns": results | same_prompt})


if __name__ == "__main__":
    run_script(main)
