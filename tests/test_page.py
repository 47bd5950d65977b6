"""The page in a real browser, on tiny models."""

import json
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path

import gradio  # noqa: F401  # once, and not in every forked server
import numpy as np
import pytest
from conftest import ROOT, forked, free_port, given, run_main
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from reward_pipeline import page  # noqa: F401
from reward_pipeline.mistakes import read_mistakes
from reward_pipeline.votes import read_votes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PATIENCE = 30_000  # milliseconds, on a machine that does other work too
# Directory for pictures, `docs/images` for those of the docs, and the reward model in them in place of a random one.
PICTURES, PICTURED = (
    name and Path(name).resolve() for name in map(os.environ.get, ("PAGE_PICTURES", "PAGE_REWARD_MODEL"))
)
SCRIPT = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        # Without its sandbox, which root can not have; it opens this page alone.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(chromium):
    """Open a tab of the page in a context of its own, as another person would; it may ask no other machine."""
    contexts = []

    def open_one(port: int, tab: int, locale: str = "en-US"):
        contexts.append(chromium.new_context(locale=locale, viewport={"width": 1200, "height": 900}))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(PATIENCE)
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(f"http://127.0.0.1:{port}")
        opened.get_by_role("tab").nth(tab).click()
        return opened

    asked: list[str] = []
    yield open_one
    for context in contexts:
        context.close()
    assert {url.split("/")[2].split(":")[0] for url in asked if url.startswith(("http", "ws"))} <= {"127.0.0.1"}


@pytest.fixture
def serve(tmp_path):
    """Start the script, wait for the page; returns its process and its port."""
    servers = []

    def start(*arguments) -> tuple:
        port = free_port()
        output = tmp_path / f"server-{port}"
        servers.append(forked(ROOT / "reward_model_app.py", [*arguments, "--port", port], output=output))
        for _ in range(PATIENCE // 100):
            assert servers[-1].is_alive(), output.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                return servers[-1], port
            except OSError:
                time.sleep(0.1)
        raise AssertionError("no page")

    yield start
    for server in servers:
        server.kill()
        server.join()


@pytest.fixture
def flags(page_flags) -> dict:
    return page_flags | {"--max_new_tokens": 8}


def field(tab, name: str):
    """A text field, of one line or of several."""
    return tab.locator(f"#{name} textarea, #{name} input")


def begin(tab, voter: str, ready: str = "Who is better?") -> None:
    """Begin a duel, and wait until it can be voted on."""
    field(tab, "voter").fill(voter)
    tab.locator("#new-duel").click()
    wait_until_said(tab, ready)
    expect(tab.locator("#left")).to_be_enabled(timeout=PATIENCE)


def said(tab, name: str = "status") -> str:
    return field(tab, name).input_value()


def wait_until_said(tab, words: str, name: str = "status") -> None:
    expect(field(tab, name)).to_have_value(words, timeout=PATIENCE)


def wait_for_error(tab, words: str) -> None:
    tab.locator(".toast-body").filter(has_text=words).first.wait_for()


def wait_until_saved(tab) -> None:
    expect(field(tab, "status")).to_have_value(re.compile("^Saved"), timeout=PATIENCE)


def test_scores_stay_with_their_answers_and_a_script_stays_text(
    serve, open_tab, flags, tiny_reward_model, other_reward_model
):
    _, port = serve(*given(flags))
    tab = open_tab(port, 0)
    field(tab, "models").fill(f"{tiny_reward_model}\n{other_reward_model}")
    tab.locator("#prompt textarea").fill(f"Say {SCRIPT}")
    tab.locator("#count input[type=number]").fill("3")
    tab.locator("#count input[type=number]").press("Tab")
    for letter, answer in zip("ABC", (SCRIPT, "word " * 300, "Red."), strict=True):
        tab.locator(f"#answer-{letter} textarea").fill(answer)
    tab.locator("#score-them").click()
    tab.locator("#comparison table").wait_for()
    shown = tab.locator("#comparison").inner_text()
    assert shown.count("±") == 3 and SCRIPT in shown
    assert len(tab.locator("#comparison del.cut").all()) >= 1
    assert {each.inner_text() for each in tab.locator("#comparison tr > th:first-child").all()} >= {*"ABC"}
    assert tab.evaluate("window.hit") is None
    # An error names what is missing, and a script in it is text as well.
    tab.locator("#answer-C textarea").fill(" ")
    tab.locator("#score-them").click()
    wait_for_error(tab, "Answer C is empty")
    tab.locator("#answer-C textarea").fill("Red.")
    field(tab, "models").fill(SCRIPT)
    tab.locator("#score-them").click()
    wait_for_error(tab, SCRIPT)
    assert tab.evaluate("window.hit") is None


def test_a_vote_survives_a_kill_and_trains(serve, open_tab, flags, tmp_path, monkeypatch, tiny_model, train):
    """All kinds of votes by mouse and keyboard, a `kill -9`, a restart; then the votes become training pairs."""
    server, port = serve(*given(flags))
    tab = open_tab(port, 1)
    for number, press in enumerate(["#left", "#right", "#tie", "#both-bad", "#skip", "ArrowLeft", "ArrowRight", "b"]):
        begin(tab, "Ada <b>")
        question = said(tab, "asked")
        if press.startswith("#"):
            tab.locator(press).click()
        else:
            tab.evaluate("document.activeElement.blur()")
            tab.keyboard.press(press)
        expect(tab.locator("#left")).to_be_disabled(timeout=PATIENCE)
        wait_until_saved(tab)
        votes, broken = read_votes(flags["--votes"])  # what is said to be saved is
        assert (len(votes), broken) == (number + 1, 0)
        assert votes[-1]["prompt"][-1]["content"] == question and votes[-1]["voter"] == "Ada <b>"
    assert [vote["vote"] for vote in votes] == ["left", "right", "tie", "both bad", "skip", "left", "right", "both bad"]
    assert len({json.dumps(vote["prompt"]) for vote in votes}) == 8  # new prompts come first

    os.kill(server.pid, signal.SIGKILL)
    server.join()
    _, port = serve(*given(flags))
    again = open_tab(port, 1)
    wait_until_said(again, f"8 votes in {flags['--votes']}.", "note")
    expect(again.locator("#result")).to_contain_text("Ada <b>")
    expect(again.locator("#result")).to_contain_text("/ 1 / 2 / 1")
    again.locator("#again").click()
    # The judge, the form model and the length each have an opinion of four votes.
    again.wait_for_function("document.querySelector('#result').innerText.split('n = 4').length > 3")
    (row,) = json.loads(flags["--votes"].with_suffix(".results.json").read_text())
    assert row["judge_n"] == row["form_n"] == row["wins"] + row["losses"] == 4
    # Who only looks sees what the judge said, and changes nothing that is written.
    onlooker = open_tab(port, 1)
    onlooker.wait_for_function("document.querySelector('#result').innerText.split('n = 4').length > 3")
    assert json.loads(flags["--votes"].with_suffix(".results.json").read_text()) == [row]

    run_main(
        "load_helpsteer_dataset", monkeypatch, "--source", flags["--votes"], "--model", tiny_model,
        "--output", tmp_path / "voted", "--max_length", "64",
    )  # fmt: skip
    metadata = json.loads((tmp_path / "voted" / "metadata.json").read_text())
    assert sum(metadata["splits"].values()) == 4
    assert metadata["rows"]["dropped"] == {"tie": 1, "both answers are bad": 2, "vote was skipped": 1}
    trained = train("--data", tmp_path / "voted", "--max_steps", "1")
    assert (trained / "metrics.json").is_file()


def test_two_people_and_two_processes_lose_no_vote(serve, open_tab, flags):
    (_, port), (_, other) = serve(*given(flags)), serve(*given(flags))
    tabs = [open_tab(port, 1), open_tab(port, 1), open_tab(other, 1)]
    for number, tab in enumerate(tabs):  # all wait at once
        field(tab, "voter").fill(f"voter {number}")
        tab.locator("#new-duel").click()
    for tab in tabs:
        wait_until_said(tab, "Who is better?")
    for tab in tabs:
        tab.locator("#left").click()
    for tab in tabs:
        wait_until_saved(tab)
    votes, broken = read_votes(flags["--votes"])
    assert ({vote["voter"] for vote in votes}, len(votes), broken) == ({"voter 0", "voter 1", "voter 2"}, 3, 0)


def test_no_name_and_a_full_disk_are_told_and_the_duel_stays(serve, open_tab, flags, small_disk):
    disk = small_disk("size=16k")
    (disk / "filling").write_bytes(bytes(16 * 1024))
    flags["--votes"] = disk / "votes.jsonl"
    flags["--max_new_tokens"] = 64
    _, port = serve(*given(flags))
    tab = open_tab(port, 1)
    begin(tab, "")
    tab.locator("#left").click()
    wait_for_error(tab, "Enter your name first")
    field(tab, "voter").fill("Ada")
    tab.locator("#left").click()
    wait_for_error(tab, "Your vote was not saved, and the duel is still there.")
    (disk / "filling").unlink()
    tab.locator("#left").click()
    wait_until_saved(tab)
    votes, broken = read_votes(flags["--votes"])
    assert ([vote["voter"] for vote in votes], broken) == (["Ada"], 0)
    # A duel that can not be is told and over.
    field(tab, "typed").fill("User: Hi\n\nAssistant: Hello!")
    field(tab, "typed").blur()
    tab.locator("#new-duel").click()
    wait_for_error(tab, "must end with a user turn")
    wait_until_said(tab, "There is no duel to vote on; begin a new one.")


def test_a_broken_reward_model_loses_no_vote(serve, open_tab, flags, tmp_path):
    flags["--reward_model"] = shutil.copytree(flags["--reward_model"], tmp_path / "judge")
    _, port = serve(*given(flags))
    (tmp_path / "judge" / "config.json").write_text("{")
    tab = open_tab(port, 1)
    begin(tab, "Ada")
    tab.locator("#tie").click()
    expect(field(tab, "note")).to_have_value(re.compile("judge"), timeout=PATIENCE)
    assert said(tab, "note").startswith("1 votes in")
    assert len(read_votes(flags["--votes"])[0]) == 1


def test_the_page_speaks_the_language_of_the_browser(serve, open_tab, flags, monkeypatch):
    # As where IPython was loaded: the page stays all the same.
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    _, port = serve(*given(flags))
    tab = open_tab(port, 1, "ru-RU")
    expect(tab.get_by_role("tab").nth(0)).to_have_text("Оценка")
    expect(tab.locator("#new-duel")).to_have_text("Новая дуэль")
    begin(tab, "Ада", "Какой ответ лучше?")
    field(tab, "voter").fill("")
    # The key of T, which is another letter there.
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'е', code: 'KeyT', bubbles: true}))"
    tab.evaluate(press)
    wait_for_error(tab, "Сначала введите имя")


def test_pictures_of_all_tabs(serve, open_tab, flags, tmp_path, monkeypatch):
    """On answers from files and pairs of the sample; the docs show what this takes (see `PICTURES`)."""
    lines = (ROOT / "sample_data" / "helpsteer_sample.jsonl").read_text().splitlines(keepends=True)
    pairs = [json.loads(line) for line in lines]
    single = [pair for pair in pairs if len(pair["prompt"]) < 60 and len(pair["chosen"]) < 400][:12]
    for side in ("chosen", "rejected"):
        rows = [{"prompt": pair["prompt"], "response": pair[side]} for pair in single]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sample.jsonl").write_text("".join(lines[::5]))
    (tmp_path / "reward_model_output").symlink_to(PICTURED or flags["--reward_model"])
    monkeypatch.chdir(tmp_path)  # no picture shows where this is
    run_main(
        "evaluate_reward_model", monkeypatch, "--pairs", "sample.jsonl", "--model", "reward_model_output",
        "--output", "evaluation",
    )  # fmt: skip
    flags |= {"--rewards": "evaluation/rewards.csv", "--votes": "votes.jsonl", "--reward_model": "reward_model_output"}
    _, port = serve(*given(flags), "--arena", "chosen.jsonl", "rejected.jsonl")
    tab = open_tab(port, 0)
    tab.locator("#prompt textarea").fill("User: Name a river.\n\nAssistant: The Volga.\n\nUser: How long is it?")
    tab.locator("#answer-A textarea").fill("The Volga is about 3,500 km long.")
    tab.locator("#answer-B textarea").fill("**Rivers** are long.\n\n- Some are longer.")
    tab.locator("#score-them").click()
    tab.locator("#comparison table").wait_for()
    taken = [picture(tab, tmp_path, "score")]

    tab.get_by_role("tab").nth(1).click()
    for choice in ("#left", "#right", "#left"):
        begin(tab, "Ada")
        tab.locator(choice).click()
        wait_until_saved(tab)
    wait_until_said(tab, "3 votes in votes.jsonl.", "note")
    taken.append(picture(tab, tmp_path, "arena"))

    tab.get_by_role("tab").nth(2).click()
    tab.locator("#mistakes").get_by_role("gridcell").first.click()
    tab.wait_for_function("document.querySelector('#mistaken-chosen textarea').value.length > 0")
    answers = [tab.locator(f"#mistaken-{side} textarea").input_value() for side in ("chosen", "rejected")]
    mistakes, _ = read_mistakes(tmp_path / "evaluation" / "rewards.csv")
    assert answers == mistakes.iloc[0][["chosen", "rejected"]].tolist()
    taken.append(picture(tab, tmp_path, "mistakes"))
    for image in taken:
        assert np.asarray(Image.open(image).convert("L")).std() > 5  # something is on it


def picture(tab, directory: Path, name: str) -> Path:
    path = (PICTURES or directory) / f"page_{name}.png"
    tab.mouse.move(0, 0)
    tab.screenshot(path=path, full_page=True, animations="disabled")
    return path
