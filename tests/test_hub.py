import errno
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import ROOT
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import httpx2

from reward_pipeline import hub


@pytest.fixture
def answering_hub(monkeypatch):
    """Let the hub answer a probe by calling a function."""

    def answer_by(function):
        session = type("Session", (), {"head": lambda self, url, timeout: function()})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_session", session)
        hub.hub_reachable.cache_clear()

    yield answer_by
    hub.hub_reachable.cache_clear()


def answer(status):
    return type("Response", (), {"status_code": status})


@pytest.mark.parametrize("status, expected", [(200, True), (307, True), (401, True), (503, True)])
def test_the_answer_of_the_hub_decides(answering_hub, status, expected):
    answering_hub(lambda: answer(status))
    assert hub.hub_reachable() is expected


def test_a_silent_hub_counts_as_out_of_reach(answering_hub, monkeypatch):
    release = threading.Event()
    answering_hub(release.wait)  # a name lookup that never returns
    for name in ("CONNECT_TIMEOUT", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(hub, name, 0.05)
    assert hub.hub_reachable() is False
    release.set()


def test_a_refused_connection_counts_as_out_of_reach(answering_hub):
    def refuse():
        raise ConnectionError

    answering_hub(refuse)
    assert hub.hub_reachable() is False


def test_offline_mode_asks_nobody(answering_hub, monkeypatch):
    asked = []
    answering_hub(lambda: asked.append(1))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.hub_reachable() is False and not asked


def test_the_hub_is_asked_once(answering_hub):
    asked = []
    answering_hub(lambda: asked.append(1) or answer(200))
    assert [hub.hub_reachable(), hub.hub_reachable()] == [True, True] and asked == [1]


def refusal(status, **headers):
    response = httpx2.Response(
        status, headers=headers, request=httpx2.Request("GET", "http://127.0.0.1/api/models/a/b")
    )
    error = ValueError("of a library")
    error.__cause__ = HfHubHTTPError("refused", response=response)
    return error


def test_patience_is_for_what_passes_and_as_long_as_the_hub_says(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=slept.append))
    answers = [refusal(429, **{"Retry-After": "7"}), refusal(503), refusal(500, **{"Retry-After": "9999"}), "there"]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert hub.patiently(ask) == "there"
    assert slept == [7, hub.PAUSES[1], hub.LONGEST_PAUSE]
    for error in (refusal(403), KeyError("no answer of the hub")):
        answers[:] = [error, "never asked"]
        with pytest.raises(type(error)):
            hub.patiently(ask)
        assert answers == ["never asked"]


def test_a_full_disk_is_no_matter_of_the_hub():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "make room, or set HF_HOME" in hub.hub_reason("a/b", error) and not hub.passing(error)


def test_the_environment_of_the_libraries_is_set_before_they_are_loaded():
    code = "import reward_pipeline, os; print(os.environ['HF_ENDPOINT'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1/hf/", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_DISABLE_TELEMETRY", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["http://127.0.0.1:1/hf", "1"]
