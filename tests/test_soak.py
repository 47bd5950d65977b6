"""Hours of use in some minutes: `make soak`."""

import os
import random
import time

import psutil
import pytest

from reward_pipeline import RewardModelEvaluator

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
GROWTH = 50e6  # bytes that the allocator may take in the last four fifths


@pytest.mark.slow
def test_scoring_for_ten_minutes_keeps_memory_flat(tiny_reward_model):
    evaluator, rng, process = RewardModelEvaluator(tiny_reward_model, device="cpu"), random.Random(0), psutil.Process()
    started, calls, resident = time.monotonic(), 0, []
    while (elapsed := time.monotonic() - started) < SECONDS:
        prompts = [f"Question {rng.random()}: " + "why? " * rng.randrange(200) for _ in range(64)]
        responses = [f"Since {rng.random()}. " + "And so on. " * rng.randrange(200) for _ in range(64)]
        evaluator.get_reward_scores(prompts, responses)
        calls += 1
        resident.append((elapsed, process.memory_info().rss))
    before = max(size for elapsed, size in resident if elapsed < SECONDS / 5)
    after = max(size for elapsed, size in resident if elapsed > SECONDS * 4 / 5)
    print(f"{64 * calls:,} responses; at most {before / 1e6:.0f} MB in the first fifth, {after / 1e6:.0f} in the last")
    assert after - before < GROWTH
