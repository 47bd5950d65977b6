"""Flags over constants, checked before torch is loaded; the same names are keys of `--config file.yaml`.

    parser = Parser(__doc__)
    parser.flag("steps", STEPS, whole(1), "updates")
    options = parser.parse_args()

Only the standard library and PyYAML are imported here: a wrong flag is answered in a fraction of a second.
"""

import argparse
import difflib
import json
import math
import platform
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

Kind = Callable[[str], Any]  # text of a flag to its value; raises ArgumentTypeError with what it must be


def whole(least: int, most: float = math.inf) -> Kind:
    """A whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            bounds = f"at least {least}" if most == math.inf else f"{least} to {most:.0f}"
            raise argparse.ArgumentTypeError(f"must be a whole number, {bounds}, not {text}")
        return number

    return parse


def real(least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf) -> Kind:
    """A finite number within these bounds; `above` and `below` exclude the bound itself."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and least <= number <= most and above < number < below):
            named = {"at least": least, "at most": most, "above": above, "below": below}
            bounds = " and ".join(f"{words} {bound:g}" for words, bound in named.items() if math.isfinite(bound))
            raise argparse.ArgumentTypeError(f"must be a finite number{bounds and f', {bounds}'}, not {text}")
        return number

    return parse


def boolean(text: str) -> bool:
    """`true` or `false`, in the forms that TRL takes."""
    if text.lower() in {"true", "yes", "t", "y", "1"}:
        return True
    if text.lower() in {"false", "no", "f", "n", "0"}:
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, not {text}")


def or_none(kind: Kind) -> Kind:
    """What `kind` takes, or the word `none`."""
    return lambda text: None if text.lower() in {"none", "null"} else kind(text)


def readable_text(text: str) -> str:
    """Text that can be printed: bytes of a command line that are not UTF-8 become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def filled_text(text: str) -> str:
    """Text that names something, such as a file or a model: an empty one would mean the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return readable_text(text)


COLUMNS = (  # our names of what a row of preference data may have
    *("prompt", "chosen", "rejected", "chosen_rating", "rejected_rating", "margin", "system", "category"),
    *("chosen_author", "rejected_author", "response", "score"),
)


def column(text: str) -> str:
    """`prompt=question`: one of `COLUMNS`, and the name that it has in the data."""
    ours, _, theirs = text.partition("=")
    if ours not in COLUMNS or not theirs.strip():
        raise argparse.ArgumentTypeError(
            f"must be such as prompt=question, with one of {', '.join(COLUMNS)}, not {text}"
        )
    return readable_text(text)


def edited_constants(script: Path, recorded: dict[str, Any]) -> list[str]:
    """What constants at the top of a script are now, where they were others when it last ran; none without the script.

    A script's flags come before its constants, so the constants that it had are what was recorded, not what it used.
    """
    if not script.is_file():  # the package alone is installed
        return []
    now = runpy.run_path(str(script), run_name="constants")
    return [
        f"{name} is {now[name]} in {script.name} and was {value} when it last ran"
        for name, value in recorded.items()
        if name in now and now[name] != value
    ]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


seed_number = whole(0, 2**32 - 1)  # what NumPy, torch and `transformers` all take


def apple_silicon() -> bool:
    """Whether this is an Apple machine with a GPU of its own, where PyTorch computes on MPS; asked before torch is."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line and exit code 1, and which takes `--config file.yaml`.

    Args:
        docstring: of the script; shown by `--help`.
    """

    def __init__(self, docstring: str):
        super().__init__(
            description=docstring,
            usage="%(prog)s [flags]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="FILE", help="YAML file with any of these flags as keys")

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the flags, in one line, and exit with code 1."""
        message = " ".join(message.removeprefix("argument ").split())
        self.exit(1, f"error: {message}\n")

    def flag(
        self,
        name: str,
        default: Any,
        kind: Kind,
        help: str,
        group: argparse._ArgumentGroup | None = None,
        **options: Any,
    ) -> None:
        """Add `--name`, whose default is a constant of the script; the constant is checked as the flag is.

        Args:
            kind: how a text becomes the value; see `whole`, `real`, `boolean`.
            group: where `--help` shows it.
            options: further ones of `add_argument`, such as `choices` and `nargs`.
        """
        self.constant(name, default, kind, options.get("choices"))
        if kind is boolean:
            options |= {"nargs": "?", "const": True}
        words = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        shown = "" if default in (None, False, argparse.SUPPRESS) else f" (default: {words})".replace("%", "%%")
        options.setdefault(
            "metavar", "{" + ",".join(map(str, options["choices"])) + "}" if "choices" in options else "X"
        )
        (group or self).add_argument(f"--{name}", default=default, type=kind, help=help + shown, **options)

    def constant(self, name: str, value: Any, kind: Kind, choices: Sequence[Any] | None = None) -> None:
        """End with a line that names a constant of the script which is not what its flag, if it had one, would take."""
        try:
            for each in _listed(value):
                if each not in (None, argparse.SUPPRESS) and kind(str(each)) not in (choices or [each]):
                    raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(str, choices or [each]))}")
        except argparse.ArgumentTypeError as error:
            self.error(f"constant {name.upper()} = {value!r}: {error}")

    def parse_args(  # type: ignore[override]  # argparse has overloads for the type of the namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """The values of all flags; those of the command line come before those of `--config`.

        `--learning-rate` means `--learning_rate`, as in TRL.
        """
        given = [self._underscored(each) for each in (sys.argv[1:] if args is None else args)]
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        finder.error = self.error  # type: ignore[method-assign]
        path = finder.parse_known_args(given)[0].config
        options, unknown = self.parse_known_args([*(self._of_file(path) if path else []), *given], namespace)
        if unknown:
            names = [each.removeprefix("--") for each in self._option_string_actions]  # that all begin so says nothing
            close = difflib.get_close_matches(unknown[0].removeprefix("--").split("=")[0], names, n=1)
            self.error(f"{unknown[0]}: unknown flag; {f'did you mean --{close[0]}?' if close else '--help lists all'}")
        return options

    def _underscored(self, argument: str) -> str:
        """An argument in the spelling of this parser: `--learning-rate` and `--no_fresh` are known to users of TRL."""
        name, equals, value = argument.partition("=")
        changed = "--" + name[2:].replace("-", "_")
        if not name.startswith("--") or name in self._option_string_actions:
            return argument
        if changed in self._option_string_actions:
            return changed + equals + value
        denied = self._option_string_actions.get(changed.replace("--no_", "--", 1))
        return f"{denied.option_strings[0]}=false" if denied and denied.type is boolean and not equals else argument

    def _of_file(self, path: str) -> list[str]:
        """The settings of a YAML file as flags."""
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {path}: can not be read ({error})")
        if not isinstance(settings, dict):
            self.error(f"--config {path}: must hold `name: value` lines, with the names of flags")
        flags: list[str] = []
        for name, value in settings.items():
            flag = self._underscored(f"--{name}")
            if flag not in self._option_string_actions or name in ("config", "help"):
                self.error(f"--config {path}: {name} is no flag; --help lists all")
            if value is None and self._option_string_actions[flag].default in (None, argparse.SUPPRESS):
                continue  # `split: null` is no split named None, `tf32: null` what the library makes of it
            texts = [json.dumps(each) if isinstance(each, dict) else str(each) for each in _listed(value)]
            # In one piece, since a text may begin with a hyphen.
            flags += [flag, *texts] if isinstance(value, list) else [f"{flag}={texts[0]}"]
        return flags
