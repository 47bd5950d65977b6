"""The same alignment by TRL's `RLOOTrainer`, to stand beside `train_reinforce.py`.

In:  as `train_reinforce.py`, whose flags it takes; the judge's `reward_function` is TRL's reward function.
Out: in `--output_dir` `evaluation.json`, of the same figures, and `settings.json`; the policy is not kept.

    python benchmarks/rloo_trainer.py --reward_model judge_1 --second_judge judge_2 --output_dir rloo
    python benchmarks/rloo_trainer.py --completions_per_prompt 8 --reward_model judge_1 --output_dir rloo_8

Prompts, their order, completions an update, temperature, learning rate, warm-up, KL coefficient and the penalty of what
did not end are the same. What differs is TRL's: the baseline of a completion is the mean of the others of its prompt,
probability ratios are clipped, completions come from `generate`.
"""

import json
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline import devices, models, policy_metrics, processed, rollouts, sampling
from reward_pipeline.files import replace_directory, write_text
from reward_pipeline.processes import run_script

COMPLETIONS_PER_PROMPT = 4  # where the flag is left at its default of 1, for which there is no leave-one-out


def main() -> None:
    script = measure.script("train_reinforce")
    options = script["parse_options"]()
    if options.completions_per_prompt == 1:
        options.completions_per_prompt = COMPLETIONS_PER_PROMPT
    accelerator = Accelerator(cpu=devices.pick_device().type == "cpu", mixed_precision="no")
    device = accelerator.device
    dtype = torch.bfloat16 if devices.autocast_dtype(device) is torch.bfloat16 else None
    splits, metadata = processed.load_processed(options.data)
    path = models.resolve_model(options.model).path
    tokenizer = models.load_tokenizer(path)
    lengths, per_step = (options.max_prompt_length, options.max_new_tokens), options.completions_per_step
    amounts = per_step // options.completions_per_prompt, options.evaluation_prompts
    prompts, unseen = rollouts.read_prompts(splits, tokenizer, options.data, lengths[0], *amounts, options.seed)
    joined = rollouts.constrained(unseen, tokenizer, lengths[0], options.seed, share=1, held_out=True)
    constrained = [prompt for prompt in joined if prompt.constraint]
    load_judge = partial(policy_metrics.load_judge, device=device, validation=splits["validation"])
    judge = load_judge("reward_model", options.reward_model, [*prompts, *unseen], *lengths)
    second_judge = options.second_judge and load_judge("second_judge", options.second_judge, unseen, *lengths)
    policy, reference = (models.load_sft_model(path).to(device) for _ in range(2))
    end_ids = models.end_token_ids(policy, tokenizer)

    def missing_end(completion_ids: list[list[int]], **columns) -> list[float]:
        """The penalty of `train_reinforce.py`."""
        return [-options.missing_eos_penalty * (ids[-1] not in end_ids) for ids in completion_ids]

    batches = islice(rollouts.batches(prompts, amounts[0], options.seed), options.steps)
    in_order = [{"prompt": prompt.messages} for batch in batches for prompt in batch]
    with replace_directory(Path(options.output_dir), marker="evaluation.json") as directory:
        config = RLOOConfig(
            output_dir=str(directory / "trl"),
            num_generations=options.completions_per_prompt,
            per_device_train_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=per_step // options.micro_batch_size,
            max_steps=options.steps,
            shuffle_dataset=False,
            max_completion_length=options.max_new_tokens,
            temperature=options.temperature,
            beta=options.kl_coefficient,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.max_grad_norm,
            weight_decay=0.0,
            bf16=dtype is not None,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        )
        trainer = RLOOTrainer(
            model=policy,
            reward_funcs=[judge.reward_function, missing_end],
            args=config,
            train_dataset=Dataset.from_list(in_order),
            processing_class=tokenizer,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        policy = trainer.accelerator.unwrap_model(trainer.model).eval()

        sampled = sampling.sampling_config(lengths[1], options.temperature, end_ids, tokenizer.pad_token_id)
        alike = {"config": sampled, "dtype": dtype, "seed": options.seed, "micro_batch_size": options.micro_batch_size}
        answers_of = partial(
            rollouts.answers_of, accelerator, tokenizer, batch_size=script["EVALUATION_BATCH_SIZE"], **alike
        )
        sides = [
            (answers_of(reference, reference=None, prompts=asked, title="Answers before"),
             answers_of(policy, reference=reference, prompts=asked, title="Answers after"))
            for asked in (unseen, constrained)
        ]  # fmt: skip
        judges = judge, second_judge, None
        outcome = policy_metrics.outcome(unseen, sides[0], constrained, sides[1], *judges, metadata["form_model"])
        results = policy_metrics.rounded_evaluation(outcome.results)
        for name, content in {"evaluation": results, "settings": vars(options) | {"seconds": seconds}}.items():
            write_text(directory / f"{name}.json", json.dumps(content, indent=2) + "\n")
    print(script["report"](outcome.results, options.output_dir))


if __name__ == "__main__":
    run_script(main)
