"""The library under the scripts: one room a subject, see `docs/files.md`.

from reward_pipeline import RewardModelEvaluator
"""

import os
from typing import TYPE_CHECKING

# Before any library of the hub is loaded, which all read these once. A mirror's address ends without a slash: some of
# them would ask for `//api`. TRL counts trainings unless it is told not to.
if "HF_ENDPOINT" in os.environ:
    os.environ["HF_ENDPOINT"] = os.environ["HF_ENDPOINT"].rstrip("/")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

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
