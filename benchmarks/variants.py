"""Variants of the training that were measured and did not become part of it; see `docs/experiments.md`.

In:  as `train_reward_model.py`, whose flags it takes but for `--streaming`, and the name of a variant.
Out: as `train_reward_model.py`.

    python benchmarks/variants.py length_expert --max_train_samples 1000 --output_dir length_expert

rating_margin    the rating gap becomes a margin in the loss: -log sigmoid(r_chosen - r_rejected - gap)
no_near_ties     training pairs whose ratings differ by at most 0.4 are left out
length_balanced  training pairs whose longer answer is the chosen one are thinned out until they are half
length_expert    product of experts (arXiv 1909.03683): the loss sees margin + b * log(length ratio), with b fitted to
                 the training pairs beforehand, so that the reward learns what length does not explain
large_head       the head as it is drawn, ten times as large as in the training
lm_loss          0.1 x language-model loss on the chosen conversation is added (GRM, arXiv 2406.10216)
prompt_quarter, prompt_three_quarters
                 share of max_length that the prompt may use, instead of half; evaluated so at the end of the training,
                 but not by other scripts later
"""

import sys
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.special
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline import conversations, models, prefix_sharing, processed, reward_training
from reward_pipeline.files import InputError
from reward_pipeline.form import response_length
from reward_pipeline.pairs import draw
from reward_pipeline.processes import run_script

NEAR_TIE = 0.4  # rating gap, on a scale of 0 to 4 in steps of 0.2
LM_WEIGHT = 0.1
PROMPT_SHARES = {"prompt_quarter": 0.25, "prompt_three_quarters": 0.75}
VARIANTS = (
    *("rating_margin", "no_near_ties", "length_balanced", "length_expert", "large_head", "lm_loss"),
    *PROMPT_SHARES,
)


def rating_gaps(pairs: Dataset) -> np.ndarray:
    chosen, rejected = (np.array(pairs[f"{side}_rating"], dtype=float) for side in ("chosen", "rejected"))
    if np.isnan(chosen - rejected).any():
        raise InputError("this variant needs ratings for all training pairs, as HelpSteer2 has them")
    return chosen - rejected


def log_length_ratios(pairs: Dataset) -> np.ndarray:
    """log(characters of the chosen / of the rejected answer)."""
    chosen, rejected = (np.array([*map(response_length, pairs[side])]) for side in ("chosen", "rejected"))
    return np.log(np.maximum(chosen, 1) / np.maximum(rejected, 1))


def length_coefficient(ratios: np.ndarray) -> float:
    """b that maximises the likelihood of sigmoid(b * ratio) being 1 for every pair."""
    fit = scipy.optimize.minimize_scalar(lambda b: -scipy.special.log_expit(b * ratios).mean(), bounds=(-10, 10))
    return float(fit.x)


def balanced(ratios: np.ndarray, seed: int) -> np.ndarray:
    """Indices of as many pairs with a longer as with a shorter chosen answer, in ascending order."""
    longer, others = np.flatnonzero(ratios > 0), np.flatnonzero(ratios <= 0)
    size = min(len(longer), len(others))
    draw = np.random.default_rng(seed).choice
    return np.sort(np.concatenate([draw(side, size, replace=False) for side in (longer, others)]))


def recut(pairs: Dataset, model: str, max_length: int) -> Dataset:
    """Token ids anew, by the length rule as it now is."""
    tokenizer = models.load_tokenizer(models.resolve_model(model).path)
    columns = processed.token_columns(pairs[:], tokenizer, max_length)
    for name in ("chosen_ids", "rejected_ids", "length"):
        pairs = pairs.remove_columns(name).add_column(name, columns[name])
    return pairs


class LanguageModelTrainer(reward_training.PairTrainer):
    """Adds the language-model loss on the chosen conversations; the head is the embedding, as in SmolLM2."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            rows = len(inputs["input_ids"]) // 2  # the first half are the chosen ones
            ids, mask = inputs["input_ids"][:rows], inputs["attention_mask"][:rows]
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            kept = mask[:, 1:].bool()
            logits = torch.nn.functional.linear(hidden[kept], model.model.embed_tokens.weight)
            loss = loss + LM_WEIGHT * torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][kept])
        return (loss, outputs) if return_outputs else loss


def vary(variant: str, pairs: Dataset, seed: int, model: str, max_length: int) -> Dataset:
    """The training pairs of a variant."""
    if variant == "rating_margin":
        return pairs.add_column("margin", rating_gaps(pairs))
    if variant == "no_near_ties":
        return pairs.select(np.flatnonzero(rating_gaps(pairs) > NEAR_TIE + 1e-6))
    if variant == "length_balanced":
        return pairs.select(balanced(log_length_ratios(pairs), seed))
    if variant == "length_expert":
        ratios = log_length_ratios(pairs)
        coefficient = length_coefficient(ratios)
        print(f"length coefficient {coefficient:.3f}")
        return pairs.add_column("margin", -coefficient * ratios)
    if variant in PROMPT_SHARES:
        return recut(pairs, model, max_length)
    return pairs


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"usage: variants.py {{{','.join(VARIANTS)}}} [flags of train_reward_model.py]\n\n{__doc__}")
    variant = sys.argv.pop(1)
    script = measure.script("train_reward_model")
    options = script["parse_options"]()
    if options.streaming:
        raise InputError("variants.py needs prepared data (--data); a variant does not go with --streaming")
    if variant == "lm_loss" and getattr(options, "use_peft", False):
        raise InputError("lm_loss does not go with --use_peft")

    # The script looks these up in the rooms, so it takes what is put there.
    conversations.PROMPT_SHARE = PROMPT_SHARES.get(variant, conversations.PROMPT_SHARE)
    if variant == "large_head":
        models.HEAD_SCALE = 1.0
    if variant == "lm_loss":
        reward_training.PairTrainer = LanguageModelTrainer
        prefix_sharing.share_prefixes = lambda model: False  # its loss is on whole conversations
    load = processed.load_processed

    def load_varied(directory: str):
        splits, metadata = load(directory)
        drawn = splits["train"].select(draw(len(splits["train"]), options.max_train_samples, options.seed))
        splits["train"] = vary(variant, drawn, options.seed, options.model, metadata["max_length"])
        if not len(splits["train"]):
            raise InputError(f"{variant} leaves no training pair")
        if variant in PROMPT_SHARES:
            splits["validation"] = recut(splits["validation"], options.model, metadata["max_length"])
        # Other data than those of the directory: no run may take a checkpoint of one for its own.
        identity = {name: f"{metadata[name]}, variant {variant}" for name in ("digest", "source")}
        return splits, {**metadata, **identity}

    processed.load_processed = load_varied
    script["main"]()


if __name__ == "__main__":
    run_script(main)
