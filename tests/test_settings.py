import contextlib
import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from reward_pipeline import settings
from reward_pipeline.settings import Parser, boolean, edited_constants, filled_text, or_none, readable_text, real, whole


def small_parser() -> Parser:
    parser = Parser("What it does: 100 % of it.")
    parser.flag("steps", 10, whole(1, 1000), "updates")
    parser.flag("learning_rate", 1e-3, real(above=0), "of the optimizer")
    parser.flag("shuffle", False, boolean, "draw the pairs in another order")
    parser.flag("model", ["first"], filled_text, "one or several", nargs="+")
    parser.flag("kind", "kl", readable_text, "of the baseline", choices=["kl", "none"])
    parser.flag("limit", None, or_none(whole(2)), "of the pairs")
    return parser


def refusal(capsys, *arguments: str, parser: Parser | None = None) -> str:
    """The one line that a wrong command line is answered with."""
    with pytest.raises(SystemExit) as ended:
        (parser or small_parser()).parse_args(arguments)
    out, error = capsys.readouterr()
    assert ended.value.code == 1 and not out
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").strip()


def test_defaults_are_the_constants_and_flags_replace_them():
    options = vars(small_parser().parse_args([]))
    assert options == {
        "steps": 10, "learning_rate": 1e-3, "shuffle": False, "model": ["first"], "kind": "kl", "limit": None,
        "config": None,
    }  # fmt: skip
    given = ["--steps", "3", "--learning_rate=2e-4", "--shuffle", "--model", "a", "b", "--kind=none", "--limit", "7"]
    changed = {"steps": 3, "learning_rate": 2e-4, "shuffle": True, "model": ["a", "b"], "kind": "none", "limit": 7}
    assert vars(small_parser().parse_args(given)) == options | changed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps: must be a whole number, 1 to 1000, not 0"),
        (["--steps", "1001"], "--steps: must be a whole number, 1 to 1000, not 1001"),
        (["--steps", "2.5"], "--steps: must be a whole number, 1 to 1000, not 2.5"),
        (["--steps"], "--steps: expected one argument"),
        (["--learning_rate", "0"], "--learning_rate: must be a finite number, above 0, not 0"),
        (["--learning_rate", "nan"], "--learning_rate: must be a finite number, above 0, not nan"),
        (["--learning_rate", "inf"], "--learning_rate: must be a finite number, above 0, not inf"),
        (["--shuffle", "perhaps"], "--shuffle: must be true or false, not perhaps"),
        (["--model", " "], "--model: must not be empty"),
        (["--kind", "no"], "--kind: invalid choice: 'no'"),
        (["--limit", "1"], "--limit: must be a whole number, at least 2, not 1"),
        (["--learning_rte", "1"], "--learning_rte: unknown flag; did you mean --learning_rate?"),
        (["--learning-rte=1"], "--learning-rte=1: unknown flag; did you mean --learning_rate?"),
        (["--qqq"], "--qqq: unknown flag; --help lists all"),
        (["--step", "5"], "--step: unknown flag; did you mean --steps?"),  # no abbreviations: later flags change them
        (["stray"], "stray: unknown flag; --help lists all"),
    ],
)
def test_wrong_flags_are_one_line(capsys, arguments, message):
    assert refusal(capsys, *arguments).startswith(message)


def test_hyphens_are_taken_for_underscores_in_names_only():
    options = small_parser().parse_args(["--learning-rate=0.5", "--model", "a-b", "learning-rate"])
    assert options.learning_rate == 0.5 and options.model == ["a-b", "learning-rate"]
    assert small_parser().parse_args(["--model=--x-y"]).model == ["--x-y"]


@pytest.mark.parametrize("text", ["true", "True", "yes", "1", "t", "Y"])
def test_boolean_forms(text):
    assert boolean(text) is True
    assert boolean({"true": "false", "True": "FALSE", "yes": "no", "1": "0", "t": "f", "Y": "N"}[text]) is False
    options = small_parser().parse_args
    assert options(["--shuffle", text]).shuffle is options(["--shuffle"]).shuffle is True
    assert options(["--shuffle=false"]).shuffle is False


def test_none_is_a_word():
    assert or_none(whole(1))("None") is or_none(whole(1))("null") is None
    assert or_none(whole(1))("4") == 4


BOUNDS = st.floats(-1e6, 1e6)


@given(number=st.floats(), least=BOUNDS, most=BOUNDS, above=BOUNDS, below=BOUNDS)
def test_bounds_hold(number, least, most, above, below):
    kind = real(least, most, above, below)
    inside = math.isfinite(number) and least <= number <= most and above < number < below
    with contextlib.nullcontext() if inside else pytest.raises(settings.argparse.ArgumentTypeError):
        assert kind(repr(number)) == number


def test_texts_can_be_printed():
    assert readable_text("broken \udcff") == "broken ?"


def test_seeds_are_those_that_all_libraries_take():
    assert settings.seed_number("4294967295") == 2**32 - 1
    for text in ("-1", "4294967296"):
        with pytest.raises(settings.argparse.ArgumentTypeError, match="0 to 4294967295"):
            settings.seed_number(text)


@pytest.mark.parametrize(
    "constant, kind, options, message",
    [
        (0, whole(1), {}, "constant STEPS = 0: must be a whole number, at least 1, not 0"),
        ("many", whole(1), {}, "constant STEPS = 'many': must be a whole number"),
        (["a", ""], filled_text, {"nargs": "+"}, "constant STEPS = ['a', '']: must not be empty"),
        ("c", readable_text, {"choices": ["a", "b"]}, "constant STEPS = 'c': must be one of a, b"),
    ],
)
def test_constants_are_checked_as_flags_are(capsys, constant, kind, options, message):
    with pytest.raises(SystemExit) as ended:
        Parser("").flag("steps", constant, kind, "updates", **options)
    assert ended.value.code == 1 and capsys.readouterr().err.startswith(f"error: {message}")


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        small_parser().parse_args(["--help"])
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "What it does: 100 % of it." in out and "updates (default: 10)" in out and "{kl,none}" in out
    assert "--config" in out and "(default: None)" not in out


# --- settings in a file ----------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """Write a file of settings and return its flags."""

    def write(text: str) -> list[str]:
        (tmp_path / "run.yaml").write_text(text)
        return ["--config", str(tmp_path / "run.yaml")]

    return write


def test_flags_come_before_the_file_and_the_file_before_constants(written):
    flags = written("steps: 5\nlearning-rate: 0.5\nshuffle: true\nmodel: [a, b]\nlimit: null\n")
    options = small_parser().parse_args(["--steps", "7", *flags])
    assert (options.steps, options.learning_rate, options.shuffle) == (7, 0.5, True)
    assert (options.model, options.kind, options.limit) == (["a", "b"], "kl", None)
    assert small_parser().parse_args(["--model", "c", *flags]).model == ["c"]
    assert small_parser().parse_args(["--config=" + flags[1]]).steps == 5


def test_nothing_in_a_file_is_none_and_no_text(written):
    parser = Parser("")
    parser.flag("split", None, filled_text, "of a dataset")
    parser.flag("limit", 5, or_none(whole(1)), "of the pairs")
    parser.flag("tf32", settings.argparse.SUPPRESS, boolean, "left to a library")
    options = parser.parse_args(written("split: null\nlimit:\ntf32: null\n"))
    assert options.split is options.limit is None and "tf32" not in options


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: 0\n", "--steps: must be a whole number, 1 to 1000, not 0"),
        ("steps: [1, 2]\n", "2: unknown flag"),
        ("stepps: 1\n", "run.yaml: stepps is no flag; --help lists all"),
        ("config: other.yaml\n", "run.yaml: config is no flag"),
        ("help: true\n", "run.yaml: help is no flag"),
        ("- steps\n", "run.yaml: must hold `name: value` lines"),
        ("", "run.yaml: must hold `name: value` lines"),
        ("steps: [\n", "run.yaml: can not be read"),
    ],
)
def test_wrong_files_are_one_line(capsys, written, text, message):
    assert message in refusal(capsys, *written(text))


def test_missing_files_are_one_line(capsys, tmp_path):
    assert "no.yaml: can not be read" in refusal(capsys, "--config", str(tmp_path / "no.yaml"))
    assert "--config: expected one argument" in refusal(capsys, "--config")


# --- the scripts: flags come before everything that takes seconds to load -------------------------------------------

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if '__name__ == "__main__"' in path.read_text())
ALL_SCRIPTS = """
import contextlib, importlib.machinery, io, json, runpy, sys

LARGE = {"torch", "transformers", "accelerate", "trl", "peft", "datasets", "pandas", "matplotlib", "scipy"}


class Refusal:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in LARGE else None
        if spec:
            spec.loader = self  # it can be found, and its files be read, but not be imported
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        imported.append(module.__name__)
        raise ImportError(f"{module.__name__} is imported before the flags are checked")


sys.meta_path.insert(0, Refusal())
answers = {}
for script in sys.argv[1:]:
    for flag in ("--help", "--nonsense"):
        sys.argv, imported = [f"{script}.py", flag], []
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
            try:
                runpy.run_path(f"{script}.py", run_name="__main__")
            except SystemExit as end:
                code = end.code
            except Exception as failure:
                code = repr(failure)
        answers[script + flag] = [code, out.getvalue(), error.getvalue(), imported]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, list]:
    """What every script answers to two flags, and which large libraries it imported for that; all in one process."""
    command = [sys.executable, "-c", ALL_SCRIPTS, *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_light(answers, script):
    code, out, error, imported = answers[script + "--help"]
    assert (code or 0, error, imported) == (0, "", [])
    assert f"usage: {script}.py [flags]" in out and f"python {script}.py" in out and "--config" in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_answered_at_once(answers, script):
    code, out, error, imported = answers[script + "--nonsense"]
    assert (code, out, imported) == (1, "", [])
    assert error == "error: --nonsense: unknown flag; --help lists all\n"


def test_constants_that_were_edited_since_are_named(tmp_path):
    script = tmp_path / "prepare.py"
    script.write_text(
        "import sys\nMAX_LENGTH = 128 if sys.platform == 'nowhere' else 512\nSEED = 42\nassert __name__ != '__main__'\n"
    )
    assert edited_constants(script, {"MAX_LENGTH": 512, "SEED": 42}) == []
    recorded = {"MAX_LENGTH": 256, "SEED": 42, "GONE": 1}
    assert edited_constants(script, recorded) == ["MAX_LENGTH is 512 in prepare.py and was 256 when it last ran"]
    assert edited_constants(tmp_path / "none.py", recorded) == []
