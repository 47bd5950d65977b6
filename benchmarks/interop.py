"""Do other versions and tools give a reward model's answers the same rewards? What they have to give.

In:  a reward model, by default a tiny random one with SmolLM2's tokenizer, saved as the training saves models.
Out: `--output`, a directory with `model/` (only for the random one) and `expected.json`: conversations with the rewards
     that `RewardModelEvaluator` gives in fp32.

    python benchmarks/interop.py --output interop
    python benchmarks/interop.py --model reward_model_output --output interop

`interop_check.py`, which knows nothing of this project, compares them in another environment; `make interop` makes one
for each version and runs both.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import replace_directory, write_text
from reward_pipeline.models import REWARD_FORMAT, load_tokenizer, positions, resolve_model, save_tokenizer
from reward_pipeline.processes import run_script
from reward_pipeline.schemas import check_pair
from reward_pipeline.settings import Parser, filled_text, whole
from reward_pipeline.sources import open_source


def save_random_model(directory: Path) -> None:
    """A reward model of two small layers, whose rewards differ clearly from answer to answer."""
    tokenizer = load_tokenizer(resolve_model().path)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
        **{"initializer_range": 0.2, "num_labels": 1, "problem_type": "regression"},
        **{"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id},
    )
    model = LlamaForSequenceClassification(config)
    model.config.reward_max_length, model.config.reward_format = 2048, REWARD_FORMAT
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, model)


def main() -> None:
    flags = Parser(__doc__)
    flags.flag("model", None, filled_text, "reward model (default: a tiny random one)")
    flags.flag("output", "interop", filled_text, "directory, replaced as a whole")
    flags.flag("pairs", 20, whole(1), "of the sample, whose answers are scored")
    options = flags.parse_args()
    with replace_directory(options.output, marker="expected.json") as directory:
        if options.model is None:
            save_random_model(directory / "model")
        evaluator = RewardModelEvaluator(options.model or directory / "model", device="cpu")
        pairs = [check_pair(row.values) for row in itertools.islice(open_source("sample").rows, options.pairs)]
        answers = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        # Uncut: what others do with what is too long is their own affair.
        prompts, said = [prompt for prompt, _ in answers], [answer for _, answer in answers]
        rewards = evaluator.get_reward_scores(prompts, said, max_length=positions(evaluator.model))
        rows = [
            {"messages": [*prompt, *answer], "reward": reward}
            for (prompt, answer), reward in zip(answers, rewards, strict=True)
        ]
        write_text(directory / "expected.json", json.dumps({"model": options.model, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} conversations written to {options.output}/")


if __name__ == "__main__":
    run_script(main)
