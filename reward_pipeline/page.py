"""The page: a Gradio application with a tab to score answers, one to vote between two, and one to read mistakes.

What a tab computes is in `comparison.py`, `arena.py` and `votes.py`. Here it is joined to what people see: texts in
their language, errors in words, and events of which only one at a time computes with models, while votes wait for none.
"""

import contextlib
import functools
import html
import json
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import pandas
from filelock import FileLock

from reward_pipeline.arena import Asked, Contestant, fight, next_prompt, read_prompt
from reward_pipeline.comparison import FEWEST, LETTERS, MOST, compare, comparison_html, signed
from reward_pipeline.evaluator import RewardModelEvaluator
from reward_pipeline.files import InputError, first_line, rounded, write_text
from reward_pipeline.mistakes import FORM_OPINIONS, filtered, read_mistakes
from reward_pipeline.page_texts import RUSSIAN, Translate, translator
from reward_pipeline.pair_metrics import number, prompt_text, span
from reward_pipeline.votes import (
    CHOICES,
    SIDES,
    Duel,
    append_vote,
    judge_votes,
    lock_file,
    read_votes,
    results,
    seen_prompts,
    vote_row,
)

MODELS = {"concurrency_id": "models", "concurrency_limit": 1}  # events that compute with models: one after the other
AFTER_VOTE = 8  # votes that the judge is asked about after a vote, the latest first; the button asks about all
SHOWN_MISTAKES = 50  # rows
NAME_LENGTH = 60  # characters of a voter's name
PROMPT_LENGTH = 160  # characters of a prompt in the table of mistakes
VOTES = {"concurrency_id": "votes", "concurrency_limit": 1}  # two quick clicks are two votes one after the other
VOTED = "voted"  # in place of a duel that has its vote
RESULT_WIDTHS = ["170px", "170px", "110px", "70px", "180px", "150px", "180px", "200px", "200px", "200px"]
MISTAKES_WIDTHS = ["90px", "150px", "90px", "450px", "180px"]
# Longer texts of the page.
PROMPT_FORMS = "A text; several turns as “User: …”, “Assistant: …”, “User: …” paragraphs, or a message list as JSON."
TYPED = "Prompt (empty: one of the prepared data that you have not voted on)"
VOTE_LABELS = ("← Left is better", "Right is better →", "Tie (T)", "Both bad (B)", "Skip (S)")
KEYS_HELP = "Keys: N for a new duel, ← and → for the better one, T, B, S; not while you type."
NO_DUEL = "There is no duel to vote on; begin a new one."
REWARDS_FILES = "A rewards.csv of train_reward_model.py or evaluate_reward_model.py."
MISTAKES_NOTE = "{} of {} pairs are wrong and pass the filters; the worst {} are shown. Click a row to read it."

# All fonts are those of the machine: the page asks nothing of any other one.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.comparison table { width: 100% } .comparison th, .comparison td { padding: 2px 8px; text-align: right }
.comparison .bars { width: 50% } .comparison .bar { height: 1.1em; background: var(--primary-500) }
.comparison pre { white-space: pre-wrap } .comparison .cut { opacity: .55 }
"""
# Keys press the buttons, so that there is one way to vote; not while somebody types or moves a marker. By their places:
# under a Russian layout T is another letter.
KEYS = {
    **{"KeyN": "new-duel", "ArrowLeft": "left", "ArrowRight": "right"},
    **{"KeyT": "tie", "KeyB": "both-bad", "KeyS": "skip"},
}
KEYBOARD = f"""
<script>
document.addEventListener("keydown", (event) => {{
    const name = {json.dumps(KEYS)}[event.code];
    const typing = event.target.closest("input, textarea, select, table, [contenteditable], [role=tab]");
    if (!name || typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const button = document.getElementById(name);
    if (button && button.offsetParent && !button.disabled) {{ event.preventDefault(); button.click(); }}
}});
</script>
"""


# What evaluators have said of votes, as `votes.judge_votes` keeps it; gone with a model that is trained anew.
Known = weakref.WeakKeyDictionary[RewardModelEvaluator, dict[str, float]]


class Arena(NamedTuple):
    """What the arena works with.

    Attributes:
        prompts: that are drawn from where nobody types one.
        votes: file.
        form_model: weights of `form.fit_form_model`, where there are any.
        judge: what loads the reward model that votes are compared with; None without one.
    """

    answering: Sequence[Contestant]
    prompts: Sequence[Asked]
    votes: Path
    form_model: Mapping[str, float] | None
    judge: Callable[[], RewardModelEvaluator] | None


@functools.lru_cache(maxsize=2)
def _evaluator(names: tuple[str, ...], state: tuple[int, ...]) -> RewardModelEvaluator:
    return RewardModelEvaluator(names)


def evaluator_of(names: Sequence[str]) -> RewardModelEvaluator:
    """The evaluator of these models; kept, until a directory changes."""
    state = [path.stat().st_mtime_ns for name in names for path in sorted(Path(name).glob("*")) if path.is_file()]
    return _evaluator(tuple(names), tuple(state))


def language_of(request: gr.Request) -> Translate:
    """What says a text in the language of the browser that asks."""
    return translator(request.headers.get("accept-language"))


@contextlib.contextmanager
def errors_in_words(request: gr.Request) -> Iterator[None]:
    """Show an error on the page, in words; what nobody foresaw also goes to the terminal, whole."""
    try:
        yield
    except InputError as error:
        raise _shown(language_of(request)(first_line(error))) from error
    except Exception as error:  # whatever a model, a disk or a library does: the page goes on
        traceback.print_exc()
        raise _shown(f"{type(error).__name__}: {first_line(error)}") from error


def _shown(words: str) -> gr.Error:
    return gr.Error(html.escape(words), title="", duration=20, print_exception=False)


def build_page(models: Sequence[str], arena: Arena, rewards: str) -> tuple[gr.Blocks, dict[str, Any]]:
    """The page, and what `launch` needs for it.

    Args:
        models: names of reward models that the first tab begins with.
        rewards: a `rewards.csv` that the last tab begins with; may be empty.
    """
    i18n = gr.I18n(en={text: text for text in RUSSIAN}, ru=RUSSIAN)
    with gr.Blocks(title="Reward model", analytics_enabled=False) as page:
        with gr.Tab(i18n("Score"), id="score"):
            score_tab(i18n, models)
        with gr.Tab(i18n("Arena"), id="arena"):
            arena_tab(i18n, page, arena)
        with gr.Tab(i18n("Mistakes"), id="mistakes"):
            mistakes_tab(i18n, page, rewards)
    page.queue(api_open=False)
    return page, {"i18n": i18n, "theme": THEME, "css": CSS, "head": KEYBOARD, "footer_links": [], "ssr_mode": False}


def serve(page: gr.Blocks, host: str, port: int, appearance: Mapping[str, Any]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        InputError: the port is taken, or the host is none of this machine.
    """
    try:
        # Left to itself, Gradio would not wait where IPython was ever loaded, and the page would end at once.
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inline=False,
            inbrowser=False,
            prevent_thread_lock=True,
            **appearance,
        )
    except OSError as error:
        raise InputError(
            f"--port {port}: can not be served at {host} ({first_line(error)}); name another one"
        ) from error
    page.block_thread()


# --- score -----------------------------------------------------------------------------------------------------------


def score_tab(i18n: gr.I18n, models: Sequence[str]) -> None:
    """Answers to a prompt, and what reward models make of them."""
    names = gr.Textbox(
        "\n".join(models),
        label=i18n("Reward models"),
        info=i18n("Directories or hub ids, one a line; several are an ensemble."),
        max_lines=5,
        elem_id="models",
    )
    prompt = gr.Textbox(label=i18n("Prompt"), info=i18n(PROMPT_FORMS), lines=3, elem_id="prompt")
    count = gr.Slider(FEWEST, MOST, FEWEST, step=1, label=i18n("Answers"), elem_id="count")
    with gr.Row():
        answers = [
            gr.Textbox(label=letter, lines=4, visible=number < FEWEST, min_width=300, elem_id=f"answer-{letter}")
            for number, letter in enumerate(LETTERS[:MOST])
        ]
    button = gr.Button(i18n("Score"), variant="primary", elem_id="score-them")
    shown = gr.HTML(elem_id="comparison")

    def show(wanted: int) -> list[Any]:
        return [gr.update(visible=number < wanted) for number in range(MOST)]

    def score(request: gr.Request, names: str, prompt: str, count: int, *answers: str) -> str:
        with errors_in_words(request):
            return scored(names, prompt, answers[: int(count)], language_of(request))

    count.change(show, count, answers, queue=False, api_visibility="private")
    button.click(score, [names, prompt, count, *answers], shown, api_visibility="private", **MODELS)


def scored(names: str, prompt: str, answers: Sequence[str], say: Translate) -> str:
    """HTML of the comparison of these answers by the models that are named, one a line.

    Raises:
        InputError: none is named or one can not be loaded; the prompt or an answer is empty.
    """
    if not (models := list(dict.fromkeys(name.strip() for name in names.splitlines() if name.strip()))):
        raise InputError("Name a reward model.")
    for letter, answer in zip(LETTERS, answers, strict=False):
        if not answer.strip():
            raise InputError(say("Answer {} is empty: fill it, or lower the number of answers.").format(letter))
    messages = read_prompt(prompt)
    return comparison_html(compare(evaluator_of(models), messages, answers), answers, say)


# --- arena -----------------------------------------------------------------------------------------------------------


def arena_tab(i18n: gr.I18n, page: gr.Blocks, arena: Arena) -> None:
    """Two answers side by side, a vote between them, and what all votes say."""
    known: Known = weakref.WeakKeyDictionary()
    draw = np.random.default_rng()
    remembered = gr.BrowserState("", storage_key="voter", secret="voter")  # in the browser, also after a restart
    duel = gr.State(None)  # a Duel that is to be voted on, or VOTED
    with gr.Row():
        voter = gr.Textbox(label=i18n("Your name"), max_length=NAME_LENGTH, elem_id="voter", scale=1)
        typed = gr.Textbox(label=i18n(TYPED), info=i18n(PROMPT_FORMS), elem_id="typed", scale=3)
    begin = gr.Button(i18n("New duel"), variant="primary", elem_id="new-duel")
    asked = gr.Textbox(label=i18n("Asked"), lines=2, max_lines=12, interactive=False, elem_id="asked")
    with gr.Row():
        left, right = (
            gr.Textbox(label=i18n(label), lines=8, max_lines=30, interactive=False, elem_id=f"{side}-answer")
            for side, label in zip(SIDES, ("Left answer", "Right answer"), strict=True)
        )
    with gr.Row():
        buttons = [
            gr.Button(i18n(label), interactive=False, elem_id=choice.replace(" ", "-"))
            for choice, label in zip(CHOICES, VOTE_LABELS, strict=True)
        ]
    status = gr.Textbox(show_label=False, interactive=False, elem_id="status")
    gr.Markdown(i18n(KEYS_HELP))
    with gr.Accordion(i18n("Result so far")):
        note = gr.Textbox(show_label=False, interactive=False, elem_id="note")
        table = gr.Dataframe(
            interactive=False, datatype="str", wrap=True, column_widths=RESULT_WIDTHS, elem_id="result"
        )
        again = gr.Button(i18n("Count again and ask the judge"), elem_id="again")

    def fought(request: gr.Request, voter: str, typed: str) -> Iterator[tuple]:
        say = language_of(request)
        with errors_in_words(request):
            votes, _ = read_votes(arena.votes)
            question = next_prompt(typed, arena.prompts, seen_prompts(votes, voter.strip()), draw)
            last = None
            # Nothing can be voted on before both answers are whole.
            yield prompt_text(question.messages), "", "", None, say("Answering …"), *closed_buttons()
            for last in fight(question, arena.answering, draw):
                yield gr.skip(), last.left, last.right, *[gr.skip()] * (2 + len(CHOICES))
            opened = [gr.update(interactive=True)] * len(CHOICES)
            yield gr.skip(), gr.skip(), gr.skip(), last, say("Who is better?"), *opened

    # Functions that make functions: of a partial one Gradio does not see that it wants the request.
    def voting(choice: str) -> Callable:
        def vote(request: gr.Request, duel: Any, voter: str) -> tuple:
            with errors_in_words(request):
                return VOTED, voted(duel, choice, voter, arena.votes, language_of(request)), *closed_buttons()

        return vote

    def counting(most: int | None) -> Callable:
        def count(request: gr.Request) -> tuple[pandas.DataFrame, str]:
            with errors_in_words(request):
                return counted(arena, known, most, language_of(request))

        return count

    shown = [asked, left, right, duel, status, *buttons]

    def stopped(request: gr.Request) -> str:
        return language_of(request)(NO_DUEL)

    ended = begin.click(fought, [voter, typed], shown, api_visibility="private", **MODELS)
    ended.failure(stopped, None, status, queue=False, api_visibility="private")
    for choice, button in zip(CHOICES, buttons, strict=True):
        saved = button.click(voting(choice), [duel, voter], [duel, status, *buttons], api_visibility="private", **VOTES)
        saved.success(counting(AFTER_VOTE), None, [table, note], api_visibility="private", **MODELS)
    again.click(counting(None), None, [table, note], api_visibility="private", **MODELS)
    page.load(counting(0), None, [table, note], api_visibility="private", **MODELS)
    page.load(lambda name: name or gr.skip(), remembered, voter, queue=False, api_visibility="private")
    voter.blur(lambda name: name.strip(), voter, remembered, queue=False, api_visibility="private")


def closed_buttons() -> list[Any]:
    """Updates after which no button votes."""
    return [gr.update(interactive=False)] * len(CHOICES)


def voted(duel: Any, choice: str, voter: str, votes: Path, say: Translate) -> str:
    """Save a vote; what to say of it.

    Raises:
        InputError: nobody says who votes, there is nothing to vote on, or it could not be saved.
    """
    if not voter.strip():
        raise InputError("Enter your name first: votes are counted by voter.")
    if not isinstance(duel, Duel):
        told = "This duel has your vote already; begin a new one." if duel == VOTED else NO_DUEL
        raise InputError(told)
    try:
        append_vote(votes, vote_row(duel, choice, voter.strip()))
    except InputError as error:
        raise InputError(f"{say('Your vote was not saved, and the duel is still there.')} {error}") from error
    return say("Saved. Left was {}, right was {}.").format(duel.left_model, duel.right_model)


def counted(arena: Arena, known: Known, most: int | None, say: Translate) -> tuple[pandas.DataFrame, str]:
    """What all votes say, as a table for people and beside the votes as JSON, and a note of what else there is to say.

    Args:
        known: what evaluators have said of votes; more is added.
        most: votes to ask the judge about, the latest first; None asks about all, 0 about none and writes nothing.

    Raises:
        InputError: the votes can not be read.
    """
    votes, broken = read_votes(arena.votes)
    notes, judged = [say("{} votes in {}.").format(len(votes), arena.votes)], None
    if broken:
        notes.append(say("{} lines of {} hold no vote and are left out.").format(broken, arena.votes))
    if arena.judge and votes:
        try:
            evaluator = arena.judge()
            judged = judge_votes(evaluator, votes, known.setdefault(evaluator, {}), most)
        except Exception as error:  # a model that broke must not hide the votes
            notes.append(first_line(error))
    rows = results(votes, arena.form_model, judged)
    if rows and most != 0:  # who only looks changes nothing: what is known here may be less than what is written
        try:
            text = json.dumps(rounded(rows), indent=2, ensure_ascii=False) + "\n"
            path = arena.votes.with_suffix(".results.json")
            with FileLock(lock_file(arena.votes)):  # of the votes: other processes count them too
                write_text(path, text)
        except (InputError, OSError) as error:  # the second one: of the lock
            notes.append(first_line(error))
    return result_table(rows, say), " ".join(notes)


def result_table(rows: Sequence[Mapping[str, Any]], say: Translate) -> pandas.DataFrame:
    """Rows of `votes.results` for people to read."""

    def share(row: Mapping[str, Any], name: str) -> str:
        return f"{number(row[name])} ({span(row[f'{name}_interval'])})"

    def agreement(row: Mapping[str, Any], name: str) -> str:
        return f"{share(row, name)}, n = {row[f'{name}_n']}" if row[f"{name}_n"] else "–"

    shown = [
        {
            "model": row["model"],
            "against": row["other"],
            "voter": row["voter"] or say("all"),
            "votes": row["votes"],
            "win rate (95 %)": share(row, "win_rate"),
            "won / lost / tie / both bad / skipped": " / ".join(
                str(row[name]) for name in ("wins", "losses", "tie", "both_bad", "skip")
            ),
            "left chosen": share(row, "left_rate"),
            "judge agrees": agreement(row, "judge"),
            "form model agrees": agreement(row, "form"),
            "longer wins": agreement(row, "longer"),
        }
        for row in rows
    ]
    return pandas.DataFrame(shown, dtype=str).rename(columns=say)


# --- mistakes --------------------------------------------------------------------------------------------------------


def mistakes_tab(i18n: gr.I18n, page: gr.Blocks, rewards: str) -> None:
    """The pairs that an evaluated model gets most wrong."""
    path = gr.Textbox(rewards, label=i18n("Evaluated pairs"), info=i18n(REWARDS_FILES), elem_id="rewards")
    with gr.Row():
        category = gr.Dropdown([], label=i18n("Category"), elem_id="category")
        form = gr.Dropdown([], label=i18n("Form model"), elem_id="form")
        least = gr.Number(
            0, minimum=0, label=i18n("Least characters"), info=i18n("of the longer answer"), elem_id="least"
        )
        most = gr.Number(
            0,
            minimum=0,
            label=i18n("Most characters"),
            info=i18n("of the longer answer; 0 is no bound"),
            elem_id="most",
        )
    button = gr.Button(i18n("Show"), variant="primary", elem_id="show")
    note = gr.Textbox(show_label=False, interactive=False, elem_id="mistakes-note")
    table = gr.Dataframe(
        interactive=False, datatype="str", wrap=True, column_widths=MISTAKES_WIDTHS, elem_id="mistakes"
    )
    asked = gr.Textbox(label=i18n("Prompt"), lines=2, max_lines=12, interactive=False, elem_id="mistaken-prompt")
    with gr.Row():
        chosen, rejected = (
            gr.Textbox(label=i18n(label), lines=6, max_lines=30, interactive=False, elem_id=f"mistaken-{side}")
            for side, label in (("chosen", "Preferred by people"), ("rejected", "Preferred by the model"))
        )
    texts = gr.State([])  # of the rows in the table, whole

    def show(request: gr.Request, path: str, category: str, form: str, least: float, most: float) -> tuple:
        say = language_of(request)
        with errors_in_words(request):
            mistakes, pairs = read_mistakes(path.strip())
            kept = filtered(mistakes, category or None, form or None, least or None, most or None)
            worst = kept.head(SHOWN_MISTAKES)
            told = say(MISTAKES_NOTE).format(len(kept), pairs, len(worst))
            names = [("", ""), *((name, name) for name in sorted({*mistakes["category"]} - {""}))]
            known = category if (category, category) in names else ""
            whole = worst[["prompt", "chosen", "rejected"]].to_numpy().tolist()
            return gr.update(choices=names, value=known), told, mistakes_table(worst, say), whole

    def opinions(request: gr.Request) -> Any:
        say = language_of(request)
        return gr.update(choices=[("", ""), *((say(name), name) for name in FORM_OPINIONS)], value="")

    def read(texts: list[list[str]], event: gr.SelectData) -> list[str]:
        return texts[event.index[0]]

    inputs, outputs = [path, category, form, least, most], [category, note, table, texts]
    button.click(show, inputs, outputs, api_visibility="private")
    table.select(read, texts, [asked, chosen, rejected], api_visibility="private")
    page.load(opinions, None, form, queue=False, api_visibility="private")
    if rewards:
        page.load(show, inputs, outputs, api_visibility="private")


def mistakes_table(mistakes: pandas.DataFrame, say: Translate) -> pandas.DataFrame:
    """Mistakes for people to choose from, a row each."""
    return pandas.DataFrame(
        {
            say("margin"): [signed(margin) for margin in mistakes["margin"]],
            say("category"): mistakes["category"].tolist(),
            say("form"): [signed(margin) for margin in mistakes["form_margin"]],
            say("prompt"): [" ".join(text.split())[:PROMPT_LENGTH] for text in mistakes["prompt"]],
            say("pair"): mistakes["place"].tolist(),
        }
    )
