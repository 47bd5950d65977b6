"""The Hugging Face hub: whether anything answers there, patience with it, and what it says in one line."""

import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from reward_pipeline.files import disk_failure, first_line

CONNECT_TIMEOUT = 5  # seconds until an address that nothing answers at counts as out of reach
ANSWER_TIMEOUT = 30  # seconds for the first answer of what does
PAUSES = (1, 2, 4, 8)  # seconds before another try, unless the hub says how long
LONGEST_PAUSE = 60  # seconds, whatever it says
PASSING = (429, 500, 502, 503, 504)  # HTTP status codes of what passes: too many requests, a server that is down
HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of the library that `huggingface_hub` asks by, for a broken connection too
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"

# A stalled download by the library for xet storage shows nothing for half an hour, and Ctrl-C does not end it; plain
# HTTP gives up after ten seconds of silence, tries again and goes on where it stopped.
if "HF_HUB_DISABLE_XET" not in os.environ:
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True

Result = TypeVar("Result")


@functools.cache
def hub_reachable() -> bool:
    """Whether anything answers at the hub's address, whatever it says (asked once a process; offline mode: no)."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # any failure to connect means the same: out of reach
            timeout = CONNECT_TIMEOUT, *[ANSWER_TIMEOUT] * 3  # to connect, read, write, and wait for a connection
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=timeout)
            answered.set()  # a refusal (401, 503) is an answer too
        finished.set()

    # In a thread, since a name lookup has no time limit of its own; a daemon, since the script must be able to end.
    finished = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    finished.wait(CONNECT_TIMEOUT + ANSWER_TIMEOUT)
    return answered.is_set()


def patiently(ask: Callable[[], Result]) -> Result:
    """What `ask` returns; it is tried again where the hub is busy or down for a moment."""
    for pause in PAUSES:
        try:
            return ask()
        except Exception as error:  # `datasets` wraps the errors of the hub in many of its own
            if (status := status_of(error)) not in PASSING:
                raise
            seconds = min(_retry_after(error) or pause, LONGEST_PAUSE)
            print(f"The hub answers {status}; trying again in {seconds:g} s.")
            time.sleep(seconds)
    return ask()


@contextlib.contextmanager
def from_cache_alone() -> Iterator[None]:
    """Let `datasets` and `huggingface_hub` ask nobody until the block ends."""
    import datasets.config  # not everybody who asks for a model has it

    modules = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def status_of(error: BaseException) -> int | None:
    """HTTP status code of the answer that an error or one of its causes is about."""
    answer = next((each for each in _chain(error) if isinstance(each, HfHubHTTPError)), None)
    return getattr(answer.response, "status_code", None) if answer else None


def passing(error: BaseException) -> bool:
    """Whether an error says that the hub is busy, down or out of reach, and nothing of what was asked for."""
    if isinstance(error, LocalEntryNotFoundError) and len(_chain(error)) == 1:
        return True
    silent = (HTTP_ERROR, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    status = status_of(error)
    return status in PASSING if status else any(isinstance(each, silent) for each in _chain(error))


def hub_reason(name: str, error: BaseException) -> str:
    """Why the hub did not give a repository, and what to do, in one line."""
    chain, status = _chain(error), status_of(error)

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    if is_a(HFValidationError):
        return f"{name}: neither a directory here nor a hub id"
    if full := disk_failure(error):
        return f"{name}: can not be downloaded ({full}); make room, or set HF_HOME to another disk"
    if is_a(GatedRepoError) or "is a gated dataset" in str(error):  # `datasets` keeps the first to itself
        return f"{name}: is gated; ask for access on its page of the hub, then {LOG_IN}"
    if is_a(DisabledRepoError):
        return f"{name}: the hub has disabled it"
    if is_a(RepositoryNotFoundError):
        return f"{name}: no such repository on the hub, or a private one; check the name, or {LOG_IN}"
    if status == 401:
        return f"{name}: the hub refuses the token (401); {LOG_IN} anew, or unset it"
    if status:
        later = "try again later" if status in PASSING else LOG_IN
        return f"{name}: the hub answers {status} ({first_line(error)}); {later}"
    if is_a(json.JSONDecodeError):
        return f"{name}: what answers at {huggingface_hub.constants.ENDPOINT} is not the hub; a login page, perhaps"
    if passing(error):
        return f"{name}: the connection to the hub broke ({first_line(chain[-1])}); repeat the command, it goes on"
    return f"{name}: can not be read from the hub ({type(error).__name__}: {first_line(error)})"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) and cause not in found:
        found.append(cause)
    return found


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the hub asked to wait, if it did (a date, the other form of this header, is left aside)."""
    answer = next(each for each in _chain(error) if isinstance(each, HfHubHTTPError))
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        return float(answer.response.headers.get("Retry-After"))
    return None
