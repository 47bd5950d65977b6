"""A page in the browser: score answers, vote between two, read the mistakes of a reward model.

In:  a trained reward model, the SFT model, the aligned policy where it is there, and prompts of `processed_helpsteer/`.
Out: `votes.jsonl`, a pair a vote, and `votes.results.json`, what all votes say.

    pip install -r requirements-app.txt
    python reward_model_app.py
    python reward_model_app.py --reward_model judge_1 judge_2 --arena HuggingFaceTB/SmolLM2-135M-Instruct my_policy
    python reward_model_app.py --arena answers_of_one.jsonl answers_of_the_other.jsonl --votes votes.jsonl
    python load_helpsteer_dataset.py --source votes.jsonl

Without a policy the SFT model answers on both sides, at two temperatures. The page is for this machine alone unless
`--host` says otherwise; nothing is shared, and nothing is sent anywhere. Models that are named by hub id are fetched.
"""

import argparse
import importlib.util
import os
from pathlib import Path

from reward_pipeline.files import InputError
from reward_pipeline.processes import run_script
from reward_pipeline.settings import Parser, filled_text, or_none, real, whole

# ---------------------------------------------------------------------------------------------------------------------
REWARD_MODEL = ["./reward_model_output"]  # directories or hub ids, several are an ensemble; "none": there is none
SFT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub id or local directory
POLICY = "./reinforce_output"  # written by train_reinforce.py; fights the SFT model, where it is there
ARENA = None  # two other models, or two files of answers
DATA = "processed_helpsteer"  # directory written by load_helpsteer_dataset.py; its validation prompts are asked
VOTES = "votes.jsonl"  # file that votes are appended to
REWARDS = None  # rewards.csv whose mistakes are shown; None takes that of the reward model
TEMPERATURES = (1.0, 1.0)  # of sampling, of the first and the second model
SFT_TEMPERATURES = (1.0, 0.5)  # where the SFT model is on both
MAX_NEW_TOKENS = 256  # tokens of an answer
HOST = "127.0.0.1"  # "0.0.0.0" lets other machines in
PORT = 7860
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags over the constants above."""
    parser = Parser(__doc__)
    parser.flag("reward_model", REWARD_MODEL, filled_text, "several are an ensemble; none: there is none", nargs="+")
    parser.flag("sft_model", SFT_MODEL, filled_text, "hub id or local directory")
    parser.flag("policy", POLICY, filled_text, "written by train_reinforce.py; fights the SFT model where it is there")
    parser.flag("arena", ARENA, filled_text, "two other models, or two files of answers", nargs=2, metavar="NAME")
    parser.flag("data", DATA, filled_text, "directory written by load_helpsteer_dataset.py")
    parser.flag("votes", VOTES, filled_text, "file that votes are appended to", metavar="FILE")
    parser.flag("rewards", REWARDS, or_none(filled_text), "rewards.csv whose mistakes are shown", metavar="FILE")
    parser.flag("temperatures", None, real(least=0.01), "of sampling, the first and the second of --arena", nargs=2)
    parser.flag("max_new_tokens", MAX_NEW_TOKENS, whole(1), "tokens of an answer")
    parser.flag("host", HOST, filled_text, "0.0.0.0 lets other machines in")
    parser.flag("port", PORT, whole(1, 65535), "of the page")
    parser.constant("temperatures", TEMPERATURES, real(least=0.01))
    parser.constant("sft_temperatures", SFT_TEMPERATURES, real(least=0.01))
    options = parser.parse_args(arguments)
    if "none" in options.reward_model and len(options.reward_model) > 1:
        parser.error("--reward_model: none stands alone")
    if importlib.util.find_spec("gradio") is None:
        parser.error("gradio is not installed; pip install -r requirements-app.txt")
    return options


def main() -> None:
    options = parse_options()
    # Before Gradio is imported, which reads it then; and so that the page needs no other machine.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from reward_pipeline import arena, page, votes
    from reward_pipeline.processed import load_processed

    # --- what is asked, and what is known of form
    prompts, form_model = [], None
    if (Path(options.data) / "metadata.json").is_file():
        splits, metadata = load_processed(options.data)
        prompts, form_model = arena.unseen(splits["validation"]), metadata["form_model"]
    elif options.data != DATA:
        raise InputError(f"{options.data}: no complete dataset here; run load_helpsteer_dataset.py first")
    else:
        print(f"{options.data}/ is not there, so prompts have to be typed; load_helpsteer_dataset.py makes it.")

    # --- who judges
    models = [] if options.reward_model == ["none"] else options.reward_model
    judge = (lambda: page.evaluator_of(models)) if models else None
    if judge:
        judge()  # loaded now: a name that stands for no reward model is told at once
    beside = Path(models[0]) / "rewards.csv" if models else None
    rewards = options.rewards or (str(beside) if beside and beside.is_file() else "")

    # --- who answers
    temperatures = options.temperatures or TEMPERATURES
    if options.arena:
        names = options.arena
    elif (Path(options.policy) / "config.json").is_file():
        names = [options.sft_model, options.policy]
    elif options.policy != POLICY:
        raise InputError(f"{options.policy}: holds no policy; run train_reinforce.py first")
    else:
        names, temperatures = [options.sft_model] * 2, options.temperatures or SFT_TEMPERATURES
    answering = arena.contestants(names, temperatures, options.max_new_tokens)
    if answering[0].prompts is not None:
        prompts = arena.in_common(answering)
    print(f"In the arena: {answering[0].name} and {answering[1].name}; {len(prompts):,} prompts.")

    # --- the page
    given, broken = votes.read_votes(options.votes)
    if broken and not given:
        raise InputError(f"{options.votes}: holds other lines than votes; name another file by --votes")
    print(f"{len(given):,} votes in {options.votes}" + (f"; {broken} lines hold none" if broken else "") + ".")
    fights = page.Arena(answering, prompts, Path(options.votes), form_model, judge)
    blocks, appearance = page.build_page(models, fights, rewards)
    page.serve(blocks, options.host, options.port, appearance)


if __name__ == "__main__":
    run_script(main)
