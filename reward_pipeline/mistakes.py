"""The pairs that an evaluated model gets wrong, of its `rewards.csv`, the worst first."""

from pathlib import Path

import numpy as np
import pandas

from reward_pipeline.files import InputError, first_line
from reward_pipeline.statistics import TIE

NEEDED = ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "chosen_length", "rejected_length")
OPTIONAL = {"place": "", "category": "", "form_margin": np.nan}  # columns, and what they hold where there are none
# What the form model says of a pair, by its margin; it can not tell where that is 0, or where there is none.
FORM_OPINIONS = {
    "agrees with people": lambda margin: margin > TIE,
    "is wrong as well": lambda margin: margin < -TIE,
    "can not tell": lambda margin: ~(margin.abs() > TIE),
}


def with_margins(table: pandas.DataFrame) -> pandas.DataFrame:
    """The pairs in which the rejected answer has the higher reward, with `margin`, the lowest first."""
    table = table.assign(margin=table["chosen_reward"] - table["rejected_reward"])
    return table[table["margin"] < -TIE].sort_values("margin", kind="stable")


def read_mistakes(path: str | Path) -> tuple[pandas.DataFrame, int]:
    """The mistakes in a `rewards.csv`, and how many pairs it has.

    Raises:
        InputError: it can not be read, or is no such file.
    """
    try:
        # An answer may be the word null: only figures may be missing.
        texts = ["prompt", "chosen", "rejected", "place", "category"]
        with Path(path).open(encoding="utf-8", newline="") as file:  # pandas itself would also unpack and download
            table = pandas.read_csv(
                file,
                keep_default_na=False,
                na_values={"form_margin": [""]},
                dtype=dict.fromkeys(texts, str),
                index_col=False,
            )
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can not be read ({first_line(error)}); name a rewards.csv") from error
    if missing := [name for name in NEEDED if name not in table]:
        raise InputError(f"{path}: has no column {missing[0]}; name a rewards.csv of evaluate_reward_model.py")
    if table.empty:
        raise InputError(f"{path}: has no pairs; name a rewards.csv of evaluate_reward_model.py")
    table = table.assign(**{name: value for name, value in OPTIONAL.items() if name not in table})
    kinds = {name: table[name].dtype for name in (*NEEDED[3:], "form_margin")}
    if wrong := [name for name, kind in kinds.items() if kind.kind not in "if"]:
        raise InputError(f"{path}: {wrong[0]} holds what is no number; name a rewards.csv of evaluate_reward_model.py")
    return with_margins(table), len(table)


def filtered(
    mistakes: pandas.DataFrame, category: str | None, form: str | None, least: float | None, most: float | None
) -> pandas.DataFrame:
    """Those of a category, of an opinion of the form model, and of a length.

    Args:
        category, form: None takes all; `form` is one of `FORM_OPINIONS`.
        least, most: characters of the longer answer; None is no bound.
    """
    longer = mistakes[["chosen_length", "rejected_length"]].max(axis=1)
    kept = pandas.Series(True, index=mistakes.index)
    if category is not None:
        kept &= mistakes["category"] == category
    if form is not None:
        kept &= FORM_OPINIONS[form](mistakes["form_margin"])
    if least is not None:
        kept &= longer >= least
    if most is not None:
        kept &= longer <= most
    return mistakes[kept]
