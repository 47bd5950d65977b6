"""Sharing changes what is computed, not what comes out, and a sharing model stays one of transformers."""

import copy
import math
import pickle
import sys
import warnings

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForSequenceClassification

import reward_pipeline
from reward_pipeline import prefix_sharing
from reward_pipeline.prefix_sharing import ATTENTION, TREE_MODELS, prefix_tree, share_prefixes

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 1,
    "initializer_range": 0.2,
}  # fmt: skip
PROMPT, OTHER = [5, 6, 7, 8, 9], [5, 6, 11]
ROWS = [[*PROMPT, 20, 21], [*OTHER, 30], [*PROMPT, 20, 22, 23, 24], [*OTHER, 31, 32, 33], [*PROMPT, 20, 21]]
DISTINCT = 5 + 2 + 3 + 1 + 1 + 3  # tokens of the tree of these


def new_model(kind="llama", seed=0, **options):
    torch.manual_seed(seed)
    options = SHAPE | ({"sliding_window": None} if kind == "mistral" else {}) | options
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **options)).eval()


def sharing(model):
    """A copy that shares."""
    model = copy.deepcopy(model)
    assert share_prefixes(model)
    return model


def batch(rows=ROWS, pad=0, left=False):
    width = max(map(len, rows))
    padding = [[pad] * (width - len(row)) for row in rows]
    masks = [[0] * len(fill) + [1] * len(row) if left else [1] * len(row) + [0] * len(fill)
             for row, fill in zip(rows, padding, strict=True)]  # fmt: skip
    ids = [fill + row if left else row + fill for row, fill in zip(rows, padding, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks), "use_cache": False}


@torch.no_grad()
def rewards(model, **inputs):
    return model(**(inputs or batch())).logits[:, 0]


def reward_and_gradient(model, **inputs):
    model.zero_grad()
    logits = model(**inputs).logits
    (logits[:, 0] * torch.arange(1.0, len(logits) + 1)).sum().backward()
    return logits.detach(), torch.cat([each.grad.flatten() for each in model.parameters()])


def assert_same_rewards_and_gradients(model, **inputs):
    plain, gradient = reward_and_gradient(model, **inputs)
    shared, shared_gradient = reward_and_gradient(sharing(model), **inputs)
    assert torch.allclose(shared, plain, atol=1e-5) and plain.std() > 0.01
    assert torch.allclose(shared_gradient, gradient, atol=1e-5 * float(gradient.abs().max()))


def count_tokens(model) -> list[tuple[int, int]]:
    """The shapes that the first layer gets from now on."""
    shapes: list[tuple[int, int]] = []
    model.base_model.layers[0].register_forward_pre_hook(lambda layer, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


# --- what is computed ------------------------------------------------------------------------------------------------


def test_prefix_tree_by_hand():
    tree = prefix_tree([[1, 2, 3], [1, 2, 4, 5], [6], [1, 2], [1, 2, 4, 5], [1, 2, 4, 7]])
    assert tree.ids.tolist() == [[1, 2, 3, 4, 5, 7, 6]]
    assert tree.positions.tolist() == [[0, 1, 2, 2, 3, 3, 0]]
    assert tree.places.tolist() == [0, 1, 2, 0, 1, 3, 4, 6, 0, 1, 0, 1, 3, 4, 0, 1, 3, 5]
    never = -math.inf
    assert [(size, path, mask if mask is None else mask.tolist()) for size, path, mask in tree.branches] == [
        (2, [(0, 2)], None),
        (1, [(0, 2), (1, 1)], [[0, 0, 0]]),
        (2, [(0, 2), (2, 2)], [[0, 0, 0, never], [0, 0, 0, 0]]),
        (1, [(0, 2), (2, 1), (3, 1)], [[0, 0, 0, 0]]),
        (1, [(4, 1)], None),
    ]


@pytest.mark.parametrize("kind", sorted(TREE_MODELS))
def test_shared_prefixes_change_neither_rewards_nor_gradients(kind):
    model = new_model(kind)
    assert_same_rewards_and_gradients(model, **batch())
    shared = sharing(model)
    tokens = count_tokens(shared)
    rewards(shared)
    assert tokens == [(1, DISTINCT)]


def test_the_margins_of_a_batch_leave_prefixes_shared():
    model = new_model()
    assert_same_rewards_and_gradients(model, **batch(), margin=torch.tensor([0.5]))
    shared = sharing(model)
    tokens = count_tokens(shared)
    rewards(shared, **batch(), margin=torch.tensor([0.5]))
    assert tokens == [(1, DISTINCT)]


def test_padding_on_the_left_is_left_out_too():
    model = new_model()
    assert_same_rewards_and_gradients(model, **batch(left=True))
    shared = sharing(model)
    tokens = count_tokens(shared)
    assert torch.allclose(rewards(shared, **batch(left=True)), rewards(model), atol=1e-5)
    assert tokens == [(1, DISTINCT)]


def test_the_pad_token_may_end_a_turn():
    """The reward is read before it, as in the plain model, also where nothing is padded."""
    model = new_model(pad_token_id=2)
    ids = torch.tensor([[5, 6, 2, 7, 2, 2], [5, 6, 2, 8, 2, 2], [5, 6, 2, 8, 9, 2], [2, 2, 2, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    assert_same_rewards_and_gradients(model, input_ids=ids, attention_mask=mask, use_cache=False)


def test_labels_give_the_loss_of_the_plain_model():
    model = new_model(problem_type="regression")
    inputs = batch() | {"labels": torch.arange(5.0)}
    plain, shared = model(**inputs), sharing(model)
    tokens = count_tokens(shared)
    assert torch.allclose(shared(**inputs).loss, plain.loss, atol=1e-5)
    assert tokens == [(1, DISTINCT)]


def test_gradient_checkpointing_and_dropout_reach_the_tree():
    model = sharing(new_model(attention_dropout=0.5)).train()
    torch.manual_seed(0)
    plain = reward_and_gradient(model, **batch())
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    checkpointed = reward_and_gradient(model, **batch())
    assert all(map(torch.equal, plain, checkpointed))
    assert not torch.equal(rewards(model), rewards(model))


# --- calls that are left alone ---------------------------------------------------------------------------------------


def without(name):
    return {key: value for key, value in batch().items() if key != name}


def holes():
    inputs = batch()
    inputs["attention_mask"][:, 1] = 0
    return inputs


def masked_text():
    """A mask over tokens that pooling reads all the same."""
    inputs = batch([row + [1] * (9 - len(row)) for row in ROWS])
    inputs["attention_mask"] = batch()["attention_mask"]
    return inputs


OTHER_CALLS = {
    "no mask": lambda: without("attention_mask"),
    "cache": lambda: without("use_cache"),
    "hidden states": lambda: batch() | {"output_hidden_states": True},
    "positions": lambda: batch() | {"position_ids": torch.arange(9)[None]},
    "causal mask": lambda: batch() | {"attention_mask": torch.ones(5, 1, 9, 9).tril().bool()},
    "nothing kept": lambda: batch() | {"attention_mask": torch.zeros(5, 9, dtype=int)},
    "holes": holes,
    "masked text": masked_text,
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_any_other_call_is_exactly_that_of_the_plain_model(call):
    inputs, model = OTHER_CALLS[call](), new_model()
    plain, shared = model(**inputs), sharing(model)(**inputs)
    assert torch.equal(shared.logits, plain.logits) or plain.logits.isnan().all()
    if call == "hidden states":
        assert all(map(torch.equal, shared.hidden_states, plain.hidden_states))
    if call == "cache":
        assert shared.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length() == 9


def test_embeddings_and_a_continued_cache_are_those_of_the_plain_model():
    model = new_model()
    shared = sharing(model)
    ids = torch.tensor([PROMPT])
    embeddings = model.get_input_embeddings()(ids)
    inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(rewards(shared, **inputs), rewards(model, **inputs))
    mask, more = torch.ones(1, 7, dtype=int), torch.tensor([[20, 21]])
    caches = [each(ids).past_key_values for each in (model, shared)]
    plain, continued = (
        rewards(each, input_ids=more, attention_mask=mask, past_key_values=cache, use_cache=True)
        for each, cache in zip((model, shared), caches, strict=True)
    )
    assert torch.equal(plain, continued)


def test_masks_by_kind_of_attention_are_heeded():
    model = new_model("qwen2")
    masks = {"full_attention": torch.ones(5, 1, 9, 9).tril().bool()}
    inputs = batch() | {"attention_mask": masks}
    assert torch.equal(rewards(sharing(model), **inputs), rewards(model, **inputs))


def test_settings_of_the_config_are_heeded():
    model = new_model()
    model.config.output_hidden_states = True
    plain, shared = model(**batch()), sharing(model)(**batch())
    assert all(map(torch.equal, shared.hidden_states, plain.hidden_states))


def test_other_attentions_stay_as_they_are():
    eager = new_model()
    eager.set_attn_implementation("eager")
    models = [new_model("mistral", sliding_window=4), new_model("gemma", head_dim=8), new_model(is_causal=False), eager]
    for model in models:
        before = model.config._attn_implementation
        assert not share_prefixes(model)
        assert model.config._attn_implementation == before


def test_sharing_twice_is_sharing_once():
    model = new_model()
    expected = rewards(model)
    assert share_prefixes(model) and share_prefixes(model)
    assert torch.allclose(rewards(model), expected, atol=1e-5)


# --- copies, files and processes -------------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_score_by_their_own_weights():
    one, other = new_model(seed=1), new_model(seed=2)
    shared = sharing(one)
    zeroed = copy.deepcopy(shared)
    for parameter in zeroed.parameters():
        parameter.zero_()
    assert not rewards(zeroed).any()
    loaded = copy.deepcopy(shared)
    loaded.load_state_dict(other.state_dict())
    assert torch.allclose(rewards(loaded), rewards(other), atol=1e-5)
    plain, average = copy.deepcopy(one), copy.deepcopy(shared)
    for mean, *parts in zip(average.parameters(), one.parameters(), other.parameters(), strict=True):
        mean.copy_((parts[0] + parts[1]) / 2)
    plain.load_state_dict(average.state_dict())
    assert torch.allclose(rewards(average), rewards(plain), atol=1e-5)
    assert torch.allclose(rewards(shared), rewards(one), atol=1e-5)  # and the first one is what it was
    assert not torch.allclose(rewards(average), rewards(one), atol=1e-3)


def test_quantised_weights_are_used():
    model = new_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has a successor in torchao
        quantised = torch.ao.quantization.quantize_dynamic(sharing(model), {torch.nn.Linear}, dtype=torch.qint8)
    tokens = count_tokens(quantised)
    difference = (rewards(quantised) - rewards(model)).abs()
    assert 1e-4 < difference.max() < rewards(model).std()
    assert tokens == [(1, DISTINCT)]


def test_pickles_and_files_share_too(tmp_path, monkeypatch):
    model = sharing(new_model())
    expected = rewards(model)
    torch.save(model, tmp_path / "model.pt")
    content = pickle.dumps(model)
    # A spawned worker knows nothing of this project before it unpickles what it is given.
    monkeypatch.setattr(reward_pipeline, "prefix_sharing", prefix_sharing)
    monkeypatch.delitem(sys.modules, prefix_sharing.__name__)
    monkeypatch.delitem(AttentionInterface._global_mapping, ATTENTION)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, ATTENTION)
    for copied in (pickle.loads(content), torch.load(tmp_path / "model.pt", weights_only=False)):
        tokens = count_tokens(copied)
        assert torch.equal(rewards(copied), expected)
        assert tokens == [(1, DISTINCT)]


def test_a_sharing_model_is_saved_as_a_plain_one(tmp_path):
    model = sharing(new_model())
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.architectures == ["LlamaForSequenceClassification"]
    assert plain.config._attn_implementation == "sdpa"
    assert torch.allclose(rewards(plain), rewards(model), atol=1e-5)


def test_a_wrapped_model_shares(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = new_model()
        plain, gradient = reward_and_gradient(model, **batch())
        shared = sharing(model)
        tokens = count_tokens(shared)
        wrapped, wrapped_gradient = reward_and_gradient(torch.nn.parallel.DistributedDataParallel(shared), **batch())
    finally:
        torch.distributed.destroy_process_group()
    assert tokens == [(1, DISTINCT)]
    assert torch.allclose(wrapped, plain, atol=1e-5)
    assert torch.allclose(wrapped_gradient, gradient, atol=1e-5 * float(gradient.abs().max()))
