"""One or many processes: run a script, who is first, decide once for all, stop in good order."""

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from reward_pipeline.files import InputError, disk_failure

ONE_SIGNAL = 1.0  # seconds within which several signals count as one

Outcome = TypeVar("Outcome")


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; an `InputError` or a full disk becomes one line on stderr and exit code 1, Ctrl-C exit code 130."""
    outcome: str | int | None = None
    try:
        main()
    except InputError as error:
        outcome = f"error: {error}"
    except SystemExit as end:
        outcome = end.code
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        reason = disk_failure(error)
        if reason is None:
            raise
        outcome = (
            f"error: the disk is full or can not be written ({reason}); what was finished before is kept; "
            "make room and repeat the command"
        )
    close_process_group()
    if outcome is not None:
        sys.exit(outcome)


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that `accelerate launch` or `torchrun` started.

    By the environment, so that it can be asked before the processes are connected.
    """
    from accelerate.utils.environment import get_int_from_env

    return get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"], 0) == 0


def together(act: Callable[[], Outcome], first_alone: bool = False) -> Outcome:
    """What `act` returns; all processes have to call this.

    Args:
        first_alone: only the first process acts, and all get what it returns.

    Raises:
        InputError: `act` raised one in any process. All of them raise it, so that none waits for another.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    outcomes: list[Outcome] = []
    errors: list[InputError] = []
    if not first_alone or PartialState().is_main_process:
        try:
            outcomes = [act()]
        except InputError as error:
            errors = [error]
    if errors := gather_object(errors):
        raise errors[0]
    told: list[Any] = [*outcomes, None][:1]  # those that did not act are told
    return broadcast_object_list(told)[0] if first_alone else told[0]


def decided_once(act: Callable[[], Outcome]) -> Outcome:
    """What `act` returns in the first process, for all of them; alone, without connecting anything.

    Raises:
        InputError: in all processes, where the first one raised it.
    """
    from accelerate.utils.environment import get_int_from_env

    several = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"], 1) > 1
    return together(act, first_alone=True) if several else act()


def close_process_group() -> None:
    """End the communication with other processes, if there is any.

    The threads of gloo may still hold tensors of the last exchange, and a thread that frees one while the interpreter
    is being torn down aborts the process. Closing joins these threads, but only when nothing else holds the group: a
    model in `DistributedDataParallel` does, for as long as the garbage collector has not found its trainer.
    """
    torch = sys.modules.get("torch")  # without it there is no group
    if torch and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C, and the SIGTERM of Slurm and Kubernetes, into a request to stop after the update.

    A second signal stops at once.

    Yields:
        A function that tells whether any process was asked to stop. All processes have to call it after the same
        update, so that all of them stop there.
    """
    from accelerate.utils import gather_object

    requests: list[float] = []

    def note(number: int, frame: object) -> None:
        # A launcher hands on the signal that its whole group got already: twice at once is still the first time.
        if requests and time.monotonic() - requests[0] > ONE_SIGNAL:
            raise KeyboardInterrupt
        if requests:
            return
        requests.append(time.monotonic())
        print("\nStopping after this update; Ctrl-C again to stop at once.", file=sys.stderr)

    def requested() -> bool:
        return any(gather_object([bool(requests)]))

    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
