import threading

import huggingface_hub
import pytest

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


@pytest.mark.parametrize("status, expected", [(200, True), (307, True), (401, True), (503, False)])
def test_the_answer_of_the_hub_decides(answering_hub, status, expected):
    answering_hub(lambda: answer(status))
    assert hub.hub_reachable() is expected


def test_a_silent_hub_counts_as_out_of_reach(answering_hub, monkeypatch):
    release = threading.Event()
    answering_hub(release.wait)  # a name lookup that never returns
    monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.1)
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
