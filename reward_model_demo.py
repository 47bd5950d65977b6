"""Rank answers with a trained reward model: a demonstration, your own answers, or every row of a file.

In:  directory that `train_reward_model.py` wrote, or directory or hub id of any one-label sequence classifier with a
     chat template, whole or as a PEFT adapter.
Out: rewards; higher is better, and only differences between answers to one prompt have a meaning.

    python reward_model_demo.py
    python reward_model_demo.py --prompt "What is 2 + 2?" --responses "4" "Perhaps 5."
    python reward_model_demo.py --file pairs.jsonl --output scores.jsonl
    python reward_model_demo.py --file owner/dataset --split test --output scores.jsonl

`--file` takes every source that `load_helpsteer_dataset.py` takes. A row holds a `prompt`, and `response`, `responses`,
or `chosen` and `rejected`, or is in a published layout; rewards are added to it.
In Python: `from reward_pipeline import RewardModelEvaluator`.
"""

import argparse
import json
from pathlib import Path

from reward_pipeline.conversations import Prompt, parse_prompt
from reward_pipeline.files import write_text
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, boolean, column, filled_text

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "./reward_model_output"  # directory or hub id of the trained reward model
MIXED_PRECISION = False  # True: faster where the hardware has bf16, and rewards move by some 0.01
FORM = False  # True: with the form term of the training, which says best what people prefer in pairs like its own
# what the demonstration ranks: answers to one prompt, a dialogue being the prompt of its last answer
COMPARISONS: list[tuple[Prompt, list[str]]] = [
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
    (
        [
            {"role": "user", "content": "What does HTTP status 404 mean?"},
            {"role": "assistant", "content": "The server was reached, but has nothing at the requested address."},
            {"role": "user", "content": "And 500?"},
            {"role": "assistant", "content": "The server failed while handling the request: an error on its side."},
            {"role": "user", "content": "Which of the two can I fix as a visitor?"},
        ],
        [
            "The 404: check the address for typing errors, or look for the page from the start of the site. A 500 has "
            "to be mended by whoever runs the server; you can only try again later.",
            "Both. Restart the server and the pages will come back.",
            "Bananas are rich in potassium.",
        ],
    ),
]
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.flag("model", MODEL, filled_text, "directory or hub id of the reward model")
    parser.flag("prompt", None, filled_text, "rank --responses to this prompt")
    parser.flag("responses", None, filled_text, "answers to --prompt", nargs="+", metavar="RESPONSE")
    parser.flag("file", None, filled_text, "file, directory or hub dataset to score", metavar="SOURCE")
    parser.flag("split", None, filled_text, "of a dataset repository, with --file")
    parser.flag("columns", None, column, "names in a layout that is not known: prompt=question …", nargs="+")
    parser.flag("output", None, filled_text, "JSON file for the result (JSONL with --file)")
    parser.flag("mixed_precision", MIXED_PRECISION, boolean, "compute in bf16 where the hardware has it")
    parser.flag("form", FORM, boolean, "rewards with the form term of the training")
    options = parser.parse_args(arguments)
    if (options.prompt is None) != (options.responses is None):
        parser.error("--prompt and --responses: go together")
    if options.file and (options.prompt or not options.output):
        parser.error("--file: goes with --output, and without --prompt")
    for name in ("split", "columns"):
        if vars(options)[name] and not options.file:
            parser.error(f"--{name}: goes with --file")
    options.output = Path(options.output) if options.output else None
    if options.output and options.output.is_dir():
        parser.error(f"--output: {options.output} is a directory; name a file")
    if options.file and (source := Path(options.file)).exists():
        if not (source.is_file() or source.is_dir()):
            parser.error(f"--file: {source} can be read only once, and is read twice; save it in a file first")
        if options.output.exists() and options.output.samefile(source):
            parser.error(f"--output: must be another file than --file, which {options.output} would replace")
        if source.is_dir() and options.output.resolve().is_relative_to(source.resolve()):
            parser.error(f"--output: must lie outside of --file {source}, where it would be read as a source")
    if options.prompt:
        try:
            parse_prompt(options.prompt)
        except ValueError as error:
            parser.error(f"--prompt: {error}")
    return options


def main() -> None:
    options = parse_options()
    # Imported only now: a wrong flag is answered at once, and these take seconds.
    from reward_pipeline.evaluator import RewardModelEvaluator, check_templates

    if options.file:  # found before the model is loaded
        from reward_pipeline.file_scoring import score_file
        from reward_pipeline.sources import check_split, open_source

        check_split([options.file], options.split)
        source = open_source(options.file, options.split)
    evaluator = RewardModelEvaluator(options.model, mixed_precision=options.mixed_precision, form=options.form)

    # --- every row of a file
    if options.file:
        rows = score_file(evaluator, source, options.output, options.split, options.columns or ())
        print(f"{rows:,} rows of {source.origin} scored, written to {options.output}")
        return

    # --- the user's own answers, or those above
    comparisons = [(options.prompt, options.responses)] if options.prompt else COMPARISONS
    check_templates(evaluator, [prompt for prompt, _ in comparisons], ["prompt"] * len(comparisons))
    if trained_on_sample(Path(evaluator.model.name_or_path)):
        print("This model has seen the sample pairs of this project alone: enough to show that all runs, not to judge.")
    rankings = []
    for prompt, responses in comparisons:
        ranking = evaluator.compare_responses(prompt, responses)
        for message in parse_prompt(prompt):
            print(f"\n> {message['content']}" if message["role"] == "user" else f"  {message['content']}")
        for place, (response, reward) in enumerate(ranking, start=1):
            print(f"  {place}. {reward:+.3f}  {response}")
        entries = [{"response": response, "reward": reward} for response, reward in ranking]
        rankings.append({"prompt": prompt, "ranking": entries})

    # --- the same for programs
    result = rankings[0] if options.prompt else {"comparisons": rankings}
    own_directory = Path(options.model).expanduser()
    beside = own_directory / "demonstration.json" if own_directory.is_dir() and not options.prompt else None
    if output := options.output or beside:
        write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"\nwritten to {output}")


def trained_on_sample(model: Path) -> bool:
    """Whether the model was trained on nothing but the few pairs that come with this project."""
    try:
        metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
        return metrics["source"].removeprefix("stream of ") == "sample pairs of this project"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # somebody else's model


def __getattr__(name: str) -> type:
    # `from reward_model_demo import RewardModelEvaluator` works as it always did. By name, since an import above would
    # load torch for every `--help`.
    if name == "RewardModelEvaluator":
        from reward_pipeline import RewardModelEvaluator

        return RewardModelEvaluator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    run_script(main)
