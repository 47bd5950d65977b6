"""Answers to one prompt side by side: rewards, probabilities, what was cut and what form makes of them, as HTML."""

import html
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from reward_pipeline.conversations import Messages, marked_cuts
from reward_pipeline.evaluator import Member, RewardModelEvaluator, check_filled, check_templates
from reward_pipeline.form import form_scores
from reward_pipeline.page_texts import Translate
from reward_pipeline.pair_metrics import form_terms

LETTERS = string.ascii_uppercase  # names of the answers
FEWEST, MOST = 2, 10  # answers


class Comparison(NamedTuple):
    """What a reward model or an ensemble makes of N answers to one prompt; arrays are (N,) float64.

    Attributes:
        rewards: without the form term.
        spreads: standard deviations over the members of an ensemble, of rewards less each member's mean over the N
            answers, since only differences have a meaning; 0 of a single model.
        whole: rewards with the form term; NaN where a member was trained without it.
        form: scores of the first member's form model; NaN where it has none.
        pieces: of each answer the conversation as the member reads it that reads least of it, see
            `conversations.marked_cuts`; empty where none cuts.
    """

    rewards: np.ndarray
    spreads: np.ndarray
    whole: np.ndarray
    form: np.ndarray
    pieces: list[list[tuple[str, bool]]]


def compare(evaluator: RewardModelEvaluator, prompt: Messages, answers: Sequence[str]) -> Comparison:
    """Score answers to one prompt.

    Raises:
        InputError: a chat template refuses the prompt, or a reward is not finite.
        ValueError: an answer is empty.
    """
    check_filled(answers)
    check_templates(evaluator, [prompt], ["the prompt"])
    scores, cuts = evaluator.get_member_scores_and_cuts([prompt] * len(answers), answers)
    rewards, first = evaluator.combine(scores), evaluator.members[0]
    weights = getattr(first.model.config, "form_model", None)
    return Comparison(
        rewards=rewards,
        spreads=(scores - scores.mean(axis=1, keepdims=True)).std(axis=0),
        whole=rewards + form_terms(evaluator, answers),
        form=form_scores(weights, answers) if weights else np.full(len(answers), np.nan),
        pieces=[
            max(
                (_pieces(each, prompt, answer) for each, cut in zip(evaluator.members, cut, strict=True) if cut.any()),
                key=_unread,
                default=[],
            )
            for answer, cut in zip(answers, cuts.swapaxes(0, 1), strict=True)
        ],
    )


def _pieces(member: Member, prompt: Messages, answer: str) -> list[tuple[str, bool]]:
    return marked_cuts(member.tokenizer, prompt, answer, member.max_length, halve_prompt=member.halve_prompt)


def _unread(pieces: Sequence[tuple[str, bool]]) -> int:
    """Characters that were cut."""
    return sum(len(text) for text, kept in pieces if not kept)


def verdict(scores: np.ndarray) -> tuple[int, int, float]:
    """The best answer, the second best one, and the probability of the first over the second (Bradley-Terry)."""
    second, best = np.argsort(scores, kind="stable")[-2:]
    return int(best), int(second), float(scipy.special.expit(scores[best] - scores[second]))


def comparison_html(comparison: Comparison, answers: Sequence[str], say: Translate) -> str:
    """The comparison as HTML; all texts in it are escaped.

    Args:
        say: what translates the words between the figures.
    """
    opinions = {
        say("reward model"): comparison.rewards,
        say("with the form term"): comparison.whole,
        say("form model, which does not read"): comparison.form,
    }
    lines = []
    for name, scores in opinions.items():
        if np.isfinite(scores).all():
            best, second, probability = verdict(scores)
            words = say("{} preferred to {} with {} %").format(LETTERS[best], LETTERS[second], _percent(probability))
        else:
            words = say("not known: this model was trained without it")
        lines.append(f"<li><b>{html.escape(name)}:</b> {html.escape(words)}</li>")
    parts = [f"<ul>{''.join(lines)}</ul>", _bars(comparison, say)]
    if any(comparison.pieces):
        parts.append(f"<p>{html.escape(say('What was cut is struck out: the model has not read it.'))}</p>")
    for letter, answer, pieces in zip(LETTERS, answers, comparison.pieces, strict=False):
        text = "".join(
            html.escape(piece) if kept else f"<del class='cut'>{html.escape(piece)}</del>"
            for piece, kept in pieces or [(answer, True)]
        )
        parts.append(f"<details {'open' if pieces else ''}><summary>{letter}</summary><pre>{text}</pre></details>")
    return f"<div class='comparison'>{''.join(parts)}</div>"


def _bars(comparison: Comparison, say: Translate) -> str:
    """A row for each answer, the best first; bars begin at the lowest reward, since only differences have a meaning."""
    rewards, ensemble = comparison.rewards, comparison.spreads.any()
    widths = 5 + 95 * (rewards - rewards.min()) / max(float(np.ptp(rewards)), 1e-9)
    heads = ["", "", say("reward"), *([say("spread")] if ensemble else []), say("with the form term"), say("form")]
    rows = [f"<tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"]
    for number in np.argsort(-rewards, kind="stable"):
        figures = [signed(rewards[number]), *([f"± {comparison.spreads[number]:.3f}"] if ensemble else [])]
        figures += [signed(comparison.whole[number]), signed(comparison.form[number])]
        cells = "".join(f"<td>{each}</td>" for each in figures)
        bar = f"<div class='bar' style='width: {widths[number]:.0f}%'></div>"
        rows.append(f"<tr><th>{LETTERS[number]}</th><td class='bars'>{bar}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _percent(probability: float) -> str:
    """Whole per cents, but never 100 of something that is not certain."""
    return "> 99" if probability > 0.995 else f"{100 * probability:.0f}"


def signed(value: float) -> str:
    """A figure with its sign and three decimals; a dash where it is not known."""
    return f"{value:+.3f}" if np.isfinite(value) else "–"
