"""Speed of a training step against the size of the model.

In:  the pairs of `--pairs`, any source that `load_helpsteer_dataset.py` reads; the sample by default.
Out: a table on the terminal and, with `--json`, a file with all figures.

    python benchmarks/model_scaling.py
    python benchmarks/model_scaling.py --pairs my_pairs.jsonl --json model_scaling.json

The models are Llama models with random weights and the tokenizer of SmolLM2; two have the shapes of SmolLM2-135M and
SmolLM2-360M, one is smaller. A turn is one update with 8 pairs, by the trainer of `train_reward_model.py`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure, training_speed
from reward_pipeline.models import PACKAGED_MODEL, load_reward_model, load_tokenizer, resolve_model
from reward_pipeline.processes import run_script

SHAPES = {
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "heads": (6, 2)},
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": (9, 3)},
    "SmolLM2-360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "heads": (15, 5)},
}


def make_model(shape: dict, source: str, directory: Path) -> int:
    """Save a model of this shape, otherwise configured like the one in `source`; returns its parameters in layers."""
    sizes = {name: value for name, value in shape.items() if name != "heads"}
    heads, key_value_heads = shape["heads"]
    config = AutoConfig.from_pretrained(
        source, **sizes, num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=64
    )
    tokenizer = load_tokenizer(source)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return measure.body_parameters(load_reward_model(str(directory), tokenizer.pad_token_id, seed=0))


def main() -> None:
    options = training_speed.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        training_speed.prepare(options.pairs, PACKAGED_MODEL, options.max_length, directory)
        tokens = training_speed.tokens_per_pair(directory)
        source = resolve_model().path
        parameters = {shape: make_model(SHAPES[shape], source, directory / shape) for shape in SHAPES}
        machine = measure.machine()
        contenders = {shape: (training_speed.run_ours, (name, str(directory / shape))) for shape in SHAPES}
        results = measure.take_turns(contenders, options.rounds)
    print(measure.describe_machine(machine))
    rows, summary, rate = [], {}, measure.rate_in(measure.own_dtype(), machine)
    for shape, turns in results.items():
        each = training_speed.figures(turns, parameters[shape], rate)
        summary[shape] = {"parameters": parameters[shape], **each}
        rows.append(
            [shape, f"{parameters[shape] / 1e6:.0f} M", f"{each['pairs_per_second']:.2f}", f"{each['rate_share']:.2f}",
             measure.gibibytes(each["peak_memory"])]
        )  # fmt: skip
    measure.print_table(["", "parameters in layers", "pairs/s", "share of the rate", "peak memory"], rows)
    seconds = [1 / each["pairs_per_second"] for each in summary.values()]
    slope, _ = np.polyfit(np.log([*parameters.values()]), np.log(seconds), 1)
    print(f"time grows as parameters to the power of {slope:.2f}; a pair has {tokens['tokens']:.0f} tokens")
    measure.write_figures(
        options.json, {"machine": machine, **tokens, "exponent": slope, "summary": summary, "turns": results}
    )


if __name__ == "__main__":
    run_script(main)
