"""Whether the Hugging Face hub answers: asked once, with a time limit of our own."""

import contextlib
import functools
import threading

import huggingface_hub.constants

HUB_TIMEOUT = 4  # seconds until the hub counts as out of reach


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers within `HUB_TIMEOUT` seconds (asked once a process; offline mode: no)."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # any failure to connect means the same: out of reach
            response = huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
            if response.status_code < 500:  # a refusal (401, 403) is an answer too
                answered.set()

    # In a thread, since a name lookup has no time limit of its own; a daemon, since the script must be able to end.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return answered.is_set()
