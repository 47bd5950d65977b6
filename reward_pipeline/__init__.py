"""The library under the scripts: one room a subject, see `docs/files.md`.

from reward_pipeline import RewardModelEvaluator
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reward_pipeline.evaluator import RewardModelEvaluator
    from reward_pipeline.files import InputError

__all__ = ["InputError", "RewardModelEvaluator"]


def __getattr__(name: str) -> object:
    # Loaded when they are asked for: the flags of a script are parsed by this package before torch is imported.
    if name == "RewardModelEvaluator":
        from reward_pipeline.evaluator import RewardModelEvaluator

        return RewardModelEvaluator
    if name == "InputError":
        from reward_pipeline.files import InputError

        return InputError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
