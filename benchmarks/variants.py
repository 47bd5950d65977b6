"""Variants of the training that were measured and did not become part of it; see `docs/experiments.md`.

In:  as `train_reward_model.py`, whose flags it takes but for `--streaming`, and the name of a variant.
Out: as `train_reward_model.py`.

    python benchmarks/variants.py broken_copies --output_dir broken_copies

broken_copies   as many more negatives that keep the form of the chosen answer: with other digits in its numbers, its
                sentences in another order, or a third of them from another answer (arXiv 2506.16507)
grouped_pairs   the pairs of a prompt come one after the other, so that on a CPU an answer that several have in common
                is computed once
open_cuts       an answer that was cut has no end token, so that the model sees that it was; evaluated so at the end of
                the training, but not by other scripts later
scaled_ratings  a pair counts by its rating gap: scaled Bradley-Terry (arXiv 2410.01257)
mean_weights    the mean of the weights over the last 30 % of the updates instead of the last ones (arXiv 2401.12187)
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline import conversations, models, processed, reward_training
from reward_pipeline.conversations import Encoded, response_text
from reward_pipeline.files import InputError
from reward_pipeline.negatives import mismatched_pairs
from reward_pipeline.pairs import prompt_key
from reward_pipeline.processes import run_script

SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+(?=\S)")
AVERAGED_FROM = 0.7  # of the updates
VARIANTS = ("broken_copies", "grouped_pairs", "open_cuts", "scaled_ratings", "mean_weights")


# --- broken_copies


def other_digits(text: str, generator: np.random.Generator) -> str:
    """The text with another digit in the place of each."""
    return re.sub(r"\d", lambda digit: str((int(digit[0]) + generator.integers(1, 10)) % 10), text)


def rearranged(text: str, other: str, generator: np.random.Generator) -> str:
    """The text with its sentences in another order, or with a third of them taken from another text."""
    sentences, gaps = SENTENCE_GAP.split(text), [*SENTENCE_GAP.findall(text), ""]
    if generator.random() < 0.5:
        sentences = generator.permutation(np.array(sentences, dtype=object)).tolist()
    else:
        for place in generator.choice(len(sentences), -(-len(sentences) // 3), replace=False):
            sentences[place] = generator.choice(np.array(SENTENCE_GAP.split(other), dtype=object))
    return "".join(sentence + gap for sentence, gap in zip(sentences, gaps, strict=True))


def broken_copies(pairs: dict[str, list], share: float, generator: np.random.Generator) -> dict[str, list]:
    """As `negatives.mismatched_pairs`, and as many pairs whose rejected answer is a broken copy of the chosen one."""
    mismatched, drawn = (mismatched_pairs(pairs, share, generator) for _ in range(2))
    made: dict[str, list] = {name: list(column) for name, column in mismatched.items()}
    for index, (chosen, other) in enumerate(zip(drawn["chosen"], drawn["rejected"], strict=True)):
        text = response_text(chosen)
        ways = [other_digits(text, generator), rearranged(text, response_text(other), generator)]
        ways = [way for way in ways if way.strip() != text.strip()]
        if ways:
            copy = [{"role": "assistant", "content": str(generator.choice(np.array(ways, dtype=object)))}]
            row = {name: column[index] for name, column in drawn.items()} | {"rejected": copy}
            for name, value in row.items():
                made[name].append(value)
    return made


# --- open_cuts


def assemble_open(prompt: list[int], response: list[int], closing: list[int], max_length: int, halve: bool) -> Encoded:
    """As `conversations._assemble`, without what closes an answer where it was cut."""
    closed = assemble(prompt, response, closing, max_length, halve)
    return assemble(prompt, response, [], max_length, halve) if closed.response_cut else closed


assemble = conversations._assemble  # whatever takes its place


def recut(pairs: Dataset, model: str, max_length: int) -> Dataset:
    """Token ids anew, by the length rule as it now is."""
    tokenizer = models.load_tokenizer(models.resolve_model(model).path)
    columns = processed.token_columns(pairs[:], tokenizer, max_length)
    for name in ("chosen_ids", "rejected_ids", "length"):
        pairs = pairs.remove_columns(name).add_column(name, columns[name])
    return pairs


# --- variants of the trainer


class GroupedPairs(reward_training.PairTrainer):
    """Prompts in random order, each with all of its pairs."""

    def _get_train_sampler(self, dataset: Dataset | None = None) -> list[int]:
        _, prompt = np.unique([prompt_key(each) for each in self.train_dataset["prompt"]], return_inverse=True)
        generator = np.random.default_rng(self.args.seed)
        order = generator.permutation(prompt.max() + 1)[prompt]
        return np.lexsort((generator.random(len(order)), order)).tolist()


class ScaledRatings(reward_training.PairTrainer):
    """The loss of a rated pair is multiplied by its rating gap over the mean gap of the training pairs."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        collate = self.data_collator

        def collate_with_gaps(examples):
            return {**collate(examples), "weight": torch.tensor(rating_gaps(examples) / mean_gap).nan_to_num(nan=1.0)}

        gaps = rating_gaps(self.train_dataset.select_columns(["chosen_rating", "rejected_rating"]))
        if np.isnan(gaps).all():
            raise InputError("scaled_ratings needs rated pairs, as HelpSteer2 has them")
        mean_gap = np.nanmean(gaps)
        self.data_collator = collate_with_gaps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = inputs.pop("weight").float()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        each = torch.nn.functional.logsigmoid(chosen - rejected - inputs.get("margin", 0.0))
        loss = loss + ((1 - weight) * each).mean()  # the mean of the plain ones becomes that of the weighted ones
        return (loss, outputs) if return_outputs else loss


class MeanWeights(TrainerCallback):
    """Puts the mean of the weights over the last updates in place of the last ones."""

    total: dict[str, torch.Tensor] | None = None
    count = 0

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > AVERAGED_FROM * state.max_steps:
            weights = dict(model.named_parameters())
            self.total = self.total or {name: torch.zeros_like(each) for name, each in weights.items()}
            self.count += 1
            for name, each in weights.items():
                self.total[name] += each
                if state.global_step == state.max_steps:
                    each.copy_(self.total[name] / self.count)


class MeanTrainer(reward_training.PairTrainer):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.add_callback(MeanWeights())


TRAINERS = {"grouped_pairs": GroupedPairs, "scaled_ratings": ScaledRatings, "mean_weights": MeanTrainer}


def rating_gaps(pairs: Iterable[dict[str, Any]]) -> np.ndarray:
    """(N,) rating of the chosen answer minus that of the rejected one, NaN where unknown."""
    return np.array([[each["chosen_rating"], each["rejected_rating"]] for each in pairs], dtype=float) @ [1, -1]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"usage: variants.py {{{','.join(VARIANTS)}}} [flags of train_reward_model.py]\n\n{__doc__}")
    variant = sys.argv.pop(1)
    script = measure.script("train_reward_model")
    options = script["parse_options"]()
    if options.streaming:
        raise InputError("variants.py needs prepared data (--data); a variant does not go with --streaming")

    # The script looks these up in the rooms, so it takes what is put there.
    reward_training.PairTrainer = TRAINERS.get(variant, reward_training.PairTrainer)
    if variant == "broken_copies":
        processed.mismatched_pairs = broken_copies
    if variant == "open_cuts":
        conversations._assemble = assemble_open
    load = processed.load_processed

    def load_varied(directory: str):
        splits, metadata = load(directory)
        if variant == "open_cuts":
            splits = {name: recut(each, options.model, metadata["max_length"]) for name, each in splits.items()}
        # Other data than those of the directory: no run may take a checkpoint of one for its own.
        identity = {name: f"{metadata[name]}, variant {variant}" for name in ("digest", "source")}
        return splits, {**metadata, **identity}

    processed.load_processed = load_varied
    script["main"]()


if __name__ == "__main__":
    run_script(main)
