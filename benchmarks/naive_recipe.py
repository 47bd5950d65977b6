"""The usual recipe, for comparison: the same pairs, seed and number of updates, prepared the way most public code does.

What it does differently from `train_reward_model.py`: default system prompt in every conversation, prompt and answer
joined and cut on the right to the same number of tokens, pad token = end-of-turn token, head as drawn and rounded to
bf16, no centering, and the last state of the training instead of the best checkpoint.

In:  `processed_helpsteer/` (texts, split and `max_length` of it) and the settings of `train_reward_model.py`.
Out: accuracy on the whole validation split on the terminal and in `--output`.

    python benchmarks/naive_recipe.py --max_train_samples 2000 --output naive.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_reward_model as ours
from evaluate_reward_model import pair_metrics, summary
from load_helpsteer_dataset import draw, load_processed
from load_smollm_model import (
    MODEL_NAME,
    autocast,
    autocast_dtype,
    keep_freed_memory,
    resolve_model,
    run_script,
    write_text,
)

PASSED_ON = (
    *(
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "weight_decay",
    ),
    *("warmup_steps", "lr_scheduler_type", "max_grad_norm", "bf16", "fp16", "use_cpu", "gradient_checkpointing"),
)


def joined_ids(tokenizer, row: dict, side: str, max_length: int) -> list[int]:
    """Whole conversation through the template as it comes, cut on the right."""
    messages = [*row["prompt"], {"role": "assistant", "content": row[side]}]
    return tokenizer.apply_chat_template(messages)["input_ids"][:max_length]


def tokenize(pairs: Dataset, tokenizer, max_length: int) -> Dataset:
    return pairs.map(
        lambda row: {f"{side}_ids": joined_ids(tokenizer, row, side, max_length) for side in ("chosen", "rejected")},
        remove_columns=[name for name in pairs.column_names if name not in ("chosen", "rejected")],
        desc="Tokenising",
    )


@torch.inference_mode()
def score(model, batches: list[list[list[int]]], pad_token_id: int) -> list[float]:
    """Rewards of token id lists, batch by batch."""
    rewards = []
    for batch in tqdm(batches, desc="Scoring"):
        width = max(map(len, batch))
        ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        with autocast(model.device, autocast_dtype(model.device)):
            rewards += model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().tolist()
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=ours.DATA_DIR, help="directory of load_helpsteer_dataset.py")
    parser.add_argument("--max_train_samples", type=int, default=ours.MAX_TRAIN_SAMPLES, help="pairs, drawn at random")
    parser.add_argument("--seed", type=int, default=ours.SEED, help="of drawing, head and order")
    parser.add_argument("--model", default=MODEL_NAME, help="base model: hub id or local directory")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if ours.DEVICE.type == "cpu":
        keep_freed_memory()

    splits, metadata = load_processed(options.data)
    path = resolve_model(options.model).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    drawn = draw(len(splits["train"]), options.max_train_samples, options.seed)
    train = tokenize(splits["train"].select(drawn), tokenizer, metadata["max_length"])
    validation = tokenize(splits["validation"], tokenizer, metadata["max_length"])

    settings = {name: value for name, value in ours.default_config().items() if name in PASSED_ON}
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            **settings,
            seed=options.seed,
            output_dir=scratch,
            max_length=None,
            save_strategy="no",
            report_to="none",
        )
        set_seed(options.seed)  # before the head is drawn, so that the run can be repeated
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        trainer = RewardTrainer(model=model, args=config, train_dataset=train, processing_class=tokenizer)
        trainer.train()

    ids = [*validation["chosen_ids"], *validation["rejected_ids"]]
    rewards = score(model.eval(), [ids[start : start + 16] for start in range(0, len(ids), 16)], tokenizer.pad_token_id)
    half = len(validation)
    metrics = pair_metrics(rewards[:half], rewards[half:], validation["chosen"], validation["rejected"])
    metrics["identical_after_cut"] = sum(a == b for a, b in zip(ids[:half], ids[half:], strict=True))
    metrics |= {"train_pairs": len(train), "seed": options.seed, "source": metadata["source"]}
    print(json.dumps(metrics, indent=2))
    print(summary(metrics))
    if options.output:
        write_text(options.output, json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
