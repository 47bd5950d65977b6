"""What the page says is there in both languages."""

import ast

import pytest
from conftest import ROOT

from reward_pipeline.page_texts import RUSSIAN, translator

SPEAKING = ("page.py", "comparison.py")


def said() -> set[str]:
    """All texts that the page translates where it says them."""
    found = set()
    for name in SPEAKING:
        tree = ast.parse((ROOT / "reward_pipeline" / name).read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("i18n", "say"):
                (text,) = node.args
                found.add(text.value if isinstance(text, ast.Constant) else constants.get(getattr(text, "id", None)))
    return found - {None}


def test_every_text_has_a_translation():
    assert len(said()) > 30  # they were found
    assert said() <= RUSSIAN.keys()


def test_no_translation_is_left_over():
    """Each key is written somewhere in the package, where it is said or raised."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "reward_pipeline").glob("*.py")]
    literals = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert [text for text in RUSSIAN if literals.count(text) < 2] == []


def test_values_stand_in_both_languages():
    assert [text for text, russian in RUSSIAN.items() if text.count("{}") != russian.count("{}")] == []


@pytest.mark.parametrize(
    "asked, language", [("ru", "ru"), ("ru-RU,ru;q=0.9,en;q=0.8", "ru"), ("en-US,ru;q=0.5", "en"), (None, "en")]
)
def test_the_first_language_decides(asked, language):
    assert translator(asked)("Score") == {"ru": RUSSIAN["Score"], "en": "Score"}[language]
    assert translator(asked)("never said") == "never said"
