"""Score the conversations of `interop.py` with what this environment has, and compare; ends with 1 where they differ.

Knows nothing of this project: `transformers` (4.46 or newer), and `--tool rewardbench` or `--tool vllm` with these.

    python benchmarks/interop_check.py interop
    python benchmarks/interop_check.py interop --tool rewardbench
"""

import argparse
import json
import sys
from pathlib import Path

TOLERANCE = 1e-5


def by_transformers(model: str, conversations: list) -> list:
    """One after another, by the classes that the directory names."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, torch_dtype=torch.float32).eval()
    rewards = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            rewards.append(classifier(**ids).logits.item())
    return rewards


def by_rewardbench(model: str, conversations: list) -> list:
    """As `rewardbench --model DIR` does it: its pipeline, on texts of the tokenizer's chat template, in batches."""
    import torch
    from rewardbench.models import REWARD_MODEL_CONFIG
    from transformers import AutoTokenizer, pipeline

    settings = REWARD_MODEL_CONFIG["default"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = settings["model_builder"](model, torch_dtype=torch.float32)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    scorer = pipeline("text-classification", model=classifier, tokenizer=tokenizer, device="cpu")
    options = {"batch_size": 8, "truncation": True, "padding": True, "max_length": 2048, "function_to_apply": "none"}
    return [each["score"] for each in scorer(texts, **options)]


def by_vllm(model: str, conversations: list) -> list:
    """Its classifier without the activation, on token ids."""
    from transformers import AutoTokenizer
    from vllm import LLM, PoolingParams

    tokenizer = AutoTokenizer.from_pretrained(model)
    engine = LLM(model, runner="pooling", dtype="float32", enforce_eager=True)
    prompts = [{"prompt_token_ids": tokenizer.apply_chat_template(messages)} for messages in conversations]
    outputs = engine.classify(prompts, pooling_params=PoolingParams(use_activation=False))
    return [output.outputs.probs[0] for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tool", choices=("transformers", "rewardbench", "vllm"), default="transformers")
    options = parser.parse_args()
    expected = json.loads((options.directory / "expected.json").read_text(encoding="utf-8"))
    conversations = [row["messages"] for row in expected["rows"]]
    score = {"transformers": by_transformers, "rewardbench": by_rewardbench, "vllm": by_vllm}[options.tool]
    rewards = score(expected["model"] or str(options.directory / "model"), conversations)
    largest = max(abs(reward - row["reward"]) for reward, row in zip(rewards, expected["rows"], strict=True))
    import transformers

    versions = f"{options.tool}, transformers {transformers.__version__}"
    print(f"{versions}: {len(rewards)} rewards, largest difference {largest:.1e}")
    sys.exit(largest > TOLERANCE)


if __name__ == "__main__":
    main()
