"""REINFORCE against exact enumeration: every completion of a small model, with its probability."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reward_pipeline import reinforce
from reward_pipeline.files import InputError
from reward_pipeline.reinforce import Completions


def small_llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def token_log_probs(model, completions: Completions) -> torch.Tensor:
    return reinforce.log_probabilities(reinforce.token_distributions(model, completions, 1.0), completions)


# --- masks and log-probabilities -------------------------------------------------------------------------------------


def test_the_mask_ends_with_the_first_end_token():
    completions = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 2, 2], [0, 5, 3, 2]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert reinforce.completion_mask(completions, [2, 3]).int().tolist() == expected
    assert reinforce.has_ended(completions, [2, 3]).tolist() == [True, False, True, True]


def test_an_end_token_that_is_also_the_pad_token_counts_once():
    completions = torch.tensor([[5, 0, 0, 0], [5, 6, 7, 0], [5, 6, 7, 8]])
    assert reinforce.completion_mask(completions, [0]).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert reinforce.has_ended(completions, [0]).tolist() == [True, True, False]


def test_log_probabilities_equal_those_token_by_token():
    model, temperature = small_llama(12), 0.7
    prompts, answers = [[1, 4], [1, 5, 6, 7, 8]], [[9, 3, 2], [10, 2]]
    ids = torch.tensor([[0, 0, 0, *prompts[0], *answers[0]], [*prompts[1], *answers[1], 0]])
    attention = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
    completions = Completions(ids, attention, attention[:, 5:].bool(), torch.ones(2).bool(), ["", ""])
    distributions = reinforce.token_distributions(model, completions, temperature)
    log_probs, entropy = reinforce.log_probabilities(distributions, completions), reinforce.entropies(distributions)
    assert log_probs.requires_grad and not entropy.requires_grad
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for place, token in enumerate(answer):
            context = torch.tensor([[*prompt, *answer[:place]]])
            expected = torch.distributions.Categorical(logits=model(context).logits[0, -1] / temperature)
            assert log_probs[row, place].item() == pytest.approx(
                expected.log_prob(torch.tensor(token)).item(), abs=1e-5
            )
            assert entropy[row, place].item() == pytest.approx(expected.entropy().item(), abs=1e-5)


def test_a_part_drops_only_padding():
    model = small_llama(12)
    ids = torch.tensor([[0, 0, 0, 1, 5, 2, 0, 0], [0, 0, 1, 4, 6, 7, 2, 0], [1, 3, 4, 5, 9, 8, 7, 6]])
    attention = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0], [1] * 8])
    completions = Completions(ids, attention, attention[:, 4:].bool(), torch.tensor([1, 1, 0]).bool(), ["a", "b", "c"])
    part = completions.part(0, 2)
    assert part.ids.tolist() == [[0, 1, 5, 2, 0], [1, 4, 6, 7, 2]] and part.texts == ["a", "b"]
    assert part.mask.tolist() == [[True, True, False], [True, True, True]]
    whole, alone = token_log_probs(model, completions), token_log_probs(model, part)
    assert torch.allclose(whole[:2, :3][part.mask], alone[part.mask], atol=1e-5)
    assert torch.equal(completions.part(0, 10**30).ids, ids)


# --- the gradient, with every completion enumerated ------------------------------------------------------------------

VOCABULARY, LENGTH, PROMPT = 4, 3, [1, 3]


def enumerated() -> Completions:
    """Every completion of at most LENGTH tokens over the vocabulary, 2 being the end."""
    found = set()
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        end = tokens.index(2) + 1 if 2 in tokens else LENGTH
        found.add((*tokens[:end], *[0] * (LENGTH - end), end))
    rows = torch.tensor(sorted(found))
    mask = torch.arange(LENGTH)[None] < rows[:, -1:]
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(rows), -1), rows[:, :LENGTH]], dim=1)
    attention = torch.cat([torch.ones(len(rows), len(PROMPT)), mask], dim=1).long()
    return Completions(ids, attention, mask, reinforce.has_ended(rows[:, :LENGTH], [2]), [""] * len(rows))


def flat(gradients) -> torch.Tensor:
    return torch.cat([each.flatten() for each in gradients])


@pytest.fixture(scope="module")
def world():
    """Policy, reference, all completions and a reward for each."""
    policy, reference, completions = small_llama(VOCABULARY, 0), small_llama(VOCABULARY, 1), enumerated()
    rewards = torch.rand(len(completions.ids), generator=torch.Generator().manual_seed(0)) + 2
    return policy, reference, completions, rewards


def whole_log_probs(model, completions: Completions) -> torch.Tensor:
    return (token_log_probs(model, completions) * completions.mask).sum(dim=1)


def test_the_completions_are_all_there_are(world):
    policy, _, completions, _ = world
    assert whole_log_probs(policy, completions).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_expected_gradient_is_the_exact_one(world):
    """E over all y of the REINFORCE gradient = gradient of sum_y pi(y) R(y), the KL term and the penalty included."""
    policy, reference, completions, scores = world
    beta, penalty = 0.3, 0.5
    log_probs, logs_reference = whole_log_probs(policy, completions), whole_log_probs(reference, completions).detach()
    probabilities = log_probs.exp()
    objective = scores - beta * (log_probs - logs_reference) - penalty * (~completions.ended).float()
    exact = flat(torch.autograd.grad(-(probabilities * objective).sum(), policy.parameters()))

    tokens, reference_tokens = token_log_probs(policy, completions), token_log_probs(reference, completions)
    kl = reinforce.sequence_kl(tokens, reference_tokens, completions.mask)
    rewards = reinforce.regularised_rewards(scores, kl, completions.ended, beta, penalty)
    # The mean over N completions, each weighted by N times its probability, is the expectation.
    weights = probabilities.detach() * len(scores)
    loss = reinforce.reinforce_loss(tokens, completions.mask, weights * (rewards - 1.7))
    estimated = flat(torch.autograd.grad(loss, policy.parameters()))
    assert not rewards.requires_grad
    assert torch.allclose(estimated, exact, atol=1e-5)
    assert exact.abs().max() > 1e-2


def test_the_baseline_keeps_the_expectation_and_lowers_the_variance(world):
    policy, _, completions, rewards = world
    probabilities = whole_log_probs(policy, completions).exp().detach()
    scores = []  # gradient of each completion's log-probability
    for row in range(len(rewards)):
        part = completions.part(row, 1)
        loss = reinforce.reinforce_loss(token_log_probs(policy, part), part.mask, torch.ones(1))
        scores.append(flat(torch.autograd.grad(loss, policy.parameters())))
    scores = torch.stack(scores)

    def moments(baseline: float) -> tuple[torch.Tensor, float]:
        gradients = (rewards - baseline)[:, None] * scores
        mean = (probabilities[:, None] * gradients).sum(dim=0)
        return mean, (probabilities * (gradients - mean).square().sum(dim=1)).sum().item()

    expected_reward = (probabilities * rewards).sum().item()
    (without, variance), (with_baseline, lower) = moments(0.0), moments(expected_reward)
    assert torch.allclose(without, with_baseline, atol=1e-4)
    assert lower < variance / 10


# --- baseline, learning rate, seeds ----------------------------------------------------------------------------------


def test_the_baseline_by_hand():
    state = {}
    for kind in ("mean", "ema"):
        assert reinforce.baseline_value(kind, state, first=3.0, ema_decay=0.9) == 3.0
    for reward in (1.0, 2.0, 6.0):
        state = reinforce.updated_baseline(state, reward, ema_decay=0.9)
    assert reinforce.baseline_value("mean", state, first=9.0, ema_decay=0.9) == pytest.approx(3.0)
    ema = 0.1 * (0.81 * 1 + 0.9 * 2 + 6) / (1 - 0.9**3)
    assert reinforce.baseline_value("ema", state, first=9.0, ema_decay=0.9) == pytest.approx(ema)
    assert reinforce.baseline_value("none", state, first=9.0, ema_decay=0.9) == 0


def test_without_decay_the_baseline_is_the_last_reward():
    state = {}
    for reward in (1.0, 2.0, 6.0):
        state = reinforce.updated_baseline(state, reward, ema_decay=0.0)
    assert reinforce.baseline_value("ema", state, first=9.0, ema_decay=0.0) == 6.0


def test_the_learning_rate_warms_up_and_stays():
    assert [reinforce.warmed_up(4.0, 4, step) for step in (1, 2, 4, 5, 500)] == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert reinforce.warmed_up(4.0, 0, 1) == 4.0


def test_seeds_differ_from_completion_to_completion_step_to_step_and_process_to_process():
    several = [reinforce.random_seeds(4, *numbers) for numbers in itertools.product((0, 42), range(5), range(3))]
    seeds = [seed for each in several for seed in each]
    assert len(set(seeds)) == len(seeds) == 120
    assert reinforce.random_seeds(4, 42, 1, 0) == reinforce.random_seeds(4, 42, 1, 0)


def test_leave_one_out_by_hand():
    """Two prompts with three completions each."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert reinforce.leave_one_out(rewards, 3).tolist() == [4.0, 3.5, 1.5, 1.5, 1.5, 0.0]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    completions = Completions(torch.zeros(2, 6), torch.ones(2, 6), mask, torch.tensor([False, True]), ["", ""])
    entropy = torch.tensor([[1.0, 2.0, 3.0, 99.0], [2.0, 99.0, 99.0, 99.0]])
    scores, rewards, kl = torch.tensor([3.0, 1.0]), torch.tensor([2.5, 0.5]), torch.tensor([1.5, -0.5])
    advantages, judge = torch.tensor([2.0, 1.0]), torch.tensor([7.0, 5.0])
    table = reinforce.completion_figures(completions, scores, rewards, advantages, kl, entropy, [judge])
    assert table.tolist() == [[3, 2.5, 2, 1.5, 6, 3, 0, 7], [1, 0.5, 1, -0.5, 2, 1, 1, 5]]
    assert reinforce.step_figures(table, ["judge"]) == {
        "score": 2, "score_std": 1, "reward": 1.5, "baseline": 0, "advantage_std": 0.5, "kl": 0.5,
        "kl_per_token": 0.25, "entropy": 2, "length": 2, "ended": 0.5, "judge": 6,
    }  # fmt: skip


def test_rows_whose_reward_is_not_finite_are_named():
    table = torch.zeros(4, 6)
    table[1, 1], table[3, 1] = math.nan, -math.inf
    assert reinforce.non_finite_places(table, ["a", "b", "c", "d"]) == ["b", "d"]


@pytest.mark.parametrize("name", ["score", "kl", "gradient_norm"])
def test_a_figure_that_is_not_finite_stops_the_run(name):
    figures = {"score": 1.0, "kl": 0.0, "gradient_norm": 1.0}
    reinforce.check_figures(figures, 7, 100.0)
    with pytest.raises(InputError, match=f"update 7: {name} is nan at row 3; .*--learning_rate"):
        reinforce.check_figures({**figures, name: math.nan}, 7, 100.0, ["row 3"])


def test_a_policy_far_from_the_reference_stops_the_run():
    reinforce.check_figures({"kl": 99.9}, 7, 100.0)
    with pytest.raises(reinforce.DivergedError, match=r"update 7: the mean KL is 100\.1 nats, above --max_kl 100"):
        reinforce.check_figures({"kl": 100.1}, 7, 100.0)


def test_only_the_checkpoint_of_a_spoiled_policy_is_removed(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for error, is_first, left in (
        (InputError, True, 2),
        (reinforce.DivergedError, False, 2),
        (reinforce.DivergedError, True, 1),
    ):
        with pytest.raises(error), reinforce.without_spoiled_checkpoint(tmp_path, [{}, {}], is_first):
            raise error("found in update 3")
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-1", "checkpoint-2"][:left]
