"""Nothing half-written: atomic replacement, one writer, checksums, and errors that users can mend."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

DISK_FAILURES = (
    *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
    *(". unexpected pos ", "PytorchStreamWriter failed"),  # all that torch.save says
)
CHECKSUMS = "checksums.json"  # beside the files that it is about
HASHED = {".safetensors", ".arrow", ".pt", ".pth", ".bin"}  # suffixes of these files: a flipped bit reads as a number


class InputError(ValueError):
    """Something the user can mend; the message names what is wrong and the remedy, in one line."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def disk_failure(error: BaseException | None) -> str | None:
    """What an error or one of its causes says about a disk that did not take what was written, if anything.

    The text decides, since libraries put the operating system's error into types of their own.
    """
    while error is not None:
        if any(words in str(error) for words in DISK_FAILURES):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def sole_writer(target: Path, lock_file: Path) -> Iterator[None]:
    """Keep other processes from writing `target` until the block ends; a process that dies keeps nobody out.

    Args:
        lock_file: stands for the right to write; missing directories are made.

    Raises:
        InputError: another process is writing, or the place can not be written.
    """
    lock = FileLock(lock_file, blocking=False)  # the system gives it back when a process dies, however it dies
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{target}: another run is writing it; wait for its end or choose another directory"
        ) from error
    except OSError as error:
        raise InputError(f"{target}: can not be written ({first_line(error)})") from error
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # while it is held, so that nobody's lock is deleted
        lock.release()


@contextlib.contextmanager
def replace_directory(target: str | Path, marker: str) -> Iterator[Path]:
    """Yield a temporary sibling to fill; it takes the place of `target` only when the block ends without an error.

    Args:
        target: the directory to write.
        marker: a file that every directory of this kind has; one without it is somebody else's and left alone.

    Raises:
        InputError: not writable, another process is writing it, or `target` holds files but no marker.
    """
    target = Path(target).resolve()  # the directory that a symbolic link leads to, not the link
    if not target.name:
        raise InputError(f"{target}: can not be replaced; name a directory in it")
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    with sole_writer(target, target.with_name(f".{target.name}.lock")):
        try:
            if old.exists() and not target.exists():
                old.rename(target)  # a process was killed between the two renames below
            if target.exists() and not (target / marker).exists() and (not target.is_dir() or any(target.iterdir())):
                raise InputError(f"{target}: holds other files and would be replaced; choose another directory")
            for leftover in (temporary, old):  # of a process that was killed while it wrote, or after both renames
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()
        except OSError as error:
            raise InputError(f"{target}: can not be written ({first_line(error)})") from error
        try:
            yield temporary
            if target.exists():
                target.rename(old)
            try:
                temporary.rename(target)  # no system call exchanges two directories on every platform: so twice
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[TextIO]:
    """Yield a temporary text file to fill; it takes the place of `path` only when the block ends without an error.

    Missing directories are made.

    Raises:
        InputError: a directory, or not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="replace") as file:  # lone surrogates of answers become ?
            yield file
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: can not be written ({first_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def allow_as_usual(directory: Path) -> None:
    """Give all files the permissions that new ones get: `safetensors` keeps what it writes to its owner."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing; see `replace_file`."""
    with replace_file(path) as file:
        file.write(text)


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of one that is as it was is remembered, since a model has half a gigabyte."""
    state = path.stat()
    return _file_hash(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache
def _file_hash(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def binary_files(directory: Path) -> dict[str, Path]:
    """The files in a directory and below whose formats do not notice damage, by their names in it."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in HASHED)
    return {path.relative_to(directory).as_posix(): path for path in files}


def write_checksums(directory: Path) -> None:
    """Note what the binary files of a directory look like, for `check_files`."""
    hashes = {name: file_hash(path) for name, path in binary_files(directory).items()}
    write_text(directory / CHECKSUMS, json.dumps(hashes, indent=2) + "\n")


def check_files(directory: str | Path, remedy: str) -> None:
    """Make sure that the binary files of a directory are as they were written, where checksums tell.

    Raises:
        InputError: one is missing or differs; ends with the `remedy`.
    """
    directory = Path(directory)
    try:  # the file may come from anywhere, so it may hold anything
        hashes = dict(json.loads((directory / CHECKSUMS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{directory / CHECKSUMS}: can not be read ({first_line(error)}); {remedy}") from error
    present = binary_files(directory)  # names are only looked up among these: none leads out of the directory
    for name, expected in hashes.items():
        if name not in present:
            raise InputError(f"{directory / name}: missing; {remedy}")
        if file_hash(present[name]) != expected:
            raise InputError(f"{directory / name}: damaged, or changed after it was written; {remedy}")


def at_places(places: Sequence[str]) -> str:
    """Where pairs or prompts come from, for the end of a message; empty without any."""
    return f" at {', '.join(places)}" if places else ""


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rounded(value: Any) -> Any:
    """The same figures with four decimals, for files that people read."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value
