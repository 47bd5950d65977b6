"""The Hugging Face hub: whether anything answers there, patience with it, and what it says in one line."""

import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from reward_pipeline.files import InputError, disk_failure, first_line

CONNECT_TIMEOUT = 5  # seconds until an address that nothing answers at counts as out of reach
ANSWER_TIMEOUT = 30  # seconds for the first answer of what does
PAUSES = (1, 2, 4, 8)  # seconds before another try, unless the hub says how long
LONGEST_PAUSE = 60  # seconds, whatever it says
PASSING = (429, 500, 502, 503, 504)  # HTTP status codes of what passes: too many requests, a server that is down
# What a directory of results has and nobody else needs. A pickle among it could hold a token.
KEPT_HERE = ["checkpoints/**", "checkpoints.old/**", "runs/**", ".*", ".*/**", "*.bin", "*.pt", "*.pth", "*.pkl"]
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


def check_login(token: str | None) -> None:
    """Make sure that somebody is logged in at the hub, before hours of work are to be uploaded there.

    Raises:
        InputError: nobody is, or the hub can not be reached.
    """
    if not hub_reachable():
        raise InputError("--push_to_hub: the hub can not be reached; leave the flag out, and repeat the command later")
    try:
        patiently(lambda: HfApi(token=token).whoami())
    except Exception as error:  # `LocalTokenNotFoundError`, a refusal, a broken connection
        raise InputError(
            f"--push_to_hub: the hub knows nobody by this token ({first_line(error)}); {LOG_IN}"
        ) from error


def push_directory(
    directory: Path, name: str, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload a finished directory to a model repository, which is made where there is none.

    Args:
        name: of the repository, with its owner or without: the owner is then who the token belongs to.
        private: whether a new repository is; None leaves it to the hub.
        revision: branch; None is the main one.

    Returns:
        Its address.

    Raises:
        InputError: it was not uploaded; the directory is what it was.
    """
    api = HfApi(token=token)
    try:
        repository = patiently(lambda: api.create_repo(name, private=private, exist_ok=True))
        if revision:
            patiently(lambda: api.create_branch(repository.repo_id, branch=revision, exist_ok=True))
        patiently(
            lambda: api.upload_folder(
                repo_id=repository.repo_id, folder_path=directory, revision=revision, ignore_patterns=KEPT_HERE
            )
        )
    except Exception as error:
        raise InputError(
            f"{hub_reason(name, error)}. {directory}/ is complete; the same command uploads it, and trains nothing"
        ) from error
    return str(repository)


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
