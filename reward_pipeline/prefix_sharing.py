"""A prefix that several conversations have is computed once.

    share_prefixes(model)  # from now on, where the call is a plain one on a CPU

Chosen and rejected answers share their prompt, and so do all candidates of a best-of-n. The batch goes through the
layers as one tree of tokens without padding, and what comes out is put back to where `transformers` expects it: the
head, the pooling and the loss are its own code.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_MODELS = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}  # causal attention and positions like Llama's
ATTENTION = "shared_prefixes"  # name of `tree_attention` in transformers

Path = list[tuple[int, int]]  # a sequence: so many of the first tokens of which branch


class Branch(NamedTuple):
    """The tokens that one sequence adds to a tree."""

    size: int
    path: Path  # the whole sequence, its own tokens at the end
    mask: torch.Tensor | None  # (size, whole length) 0 or -inf, added to the attention; None where all of it is new


class Tree(NamedTuple):
    """B sequences as a tree of N tokens: a prefix that several have is in it once."""

    ids: torch.Tensor  # (1, N)
    positions: torch.Tensor  # (1, N) of the tokens in their sequences
    branches: list[Branch]  # in the order of their tokens
    places: torch.Tensor  # (T,) where in `ids` the tokens of all sequences are, in the order given


def common_length(one: list[int], other: list[int]) -> int:
    """Number of tokens with which both begin."""
    different = (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def first_tokens(path: Path, count: int) -> Path:
    """The path of the first `count` tokens of a sequence."""
    shorter = []
    for branch, size in path:
        if count > 0:
            shorter.append((branch, min(size, count)))
            count -= size
    return shorter


def prefix_tree(sequences: list[list[int]]) -> Tree:
    """The tree of B sequences, none of them empty. In sorted order each one has its longest prefix with a neighbour."""
    ids: list[int] = []
    positions: list[int] = []
    branches: list[Branch] = []
    starts: list[int] = []  # of the branches in `ids`
    places: list[list[int]] = [[]] * len(sequences)
    before: list[int] = []
    path: Path = []
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[number]
        shared = common_length(before, sequence)
        path, size = first_tokens(path, shared), len(sequence) - shared
        if size:
            path.append((len(branches), size))
            mask = torch.full((size, shared + size), -math.inf).triu(shared + 1) if shared else None
            branches.append(Branch(size, list(path), mask))
            starts.append(len(ids))
            ids += sequence[shared:]
            positions += range(shared, shared + size)
        places[number] = [place for branch, count in path for place in range(starts[branch], starts[branch] + count)]
        before = sequence
    flat = [place for each in places for place in each]
    return Tree(torch.tensor([ids]), torch.tensor([positions]), branches, torch.tensor(flat))


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree: Tree | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention along the paths of a tree, for the attention interface of `transformers`; without one, SDPA.

    Args:
        query, key, value: (1, heads, N, D); key and value may have fewer heads.

    Returns:
        (1, N, heads, D) in the type of `query`, and no weights.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # One call for each branch costs less than one for all of them, which would compute their padding. In fp32 also
    # under autocast: as fast on CPUs for long sequences, for short ones twice as fast, the backward pass included.
    sizes = [branch.size for branch in tree.branches]
    queries, keys, values = (each.float().split(sizes, dim=2) for each in (query, key, value))
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        for own, branch in zip(queries, tree.branches, strict=True):
            seen, read = (
                torch.cat([each[number][:, :, :size] for number, size in branch.path], dim=2) for each in (keys, values)
            )
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    own,
                    seen,
                    read,
                    attn_mask=branch.mask,
                    is_causal=branch.mask is None,
                    dropout_p=options.get("dropout", 0.0),
                    scale=options.get("scaling"),
                    enable_gqa=True,
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(query.dtype), None


# Registered when this file is imported: an unpickled model, in a spawned worker too, imports it because of its hooks.
AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # what a plain call attends to is as ever


def into_tree(
    base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], pooled: bool
) -> tuple[tuple[()], dict[str, Any]] | None:
    """Forward pre-hook of a base model: `input_ids` (B, L) under a mask (B, L) become a tree (1, N).

    With `pooled` the head on it reads one token of each row.


    Only where nothing else is asked for than the last hidden states of tokens that stand in one block in each row.
    Any other call is left to `transformers` as it is.
    """
    config, given = base.config, {name: value for name, value in kwargs.items() if value is not None}
    ids, mask = args[0] if args else given.pop("input_ids", None), given.pop("attention_mask", None)
    cached = given.pop("use_cache", config.use_cache)
    given.pop("margin", None)  # of the loss: TRL hands the whole batch to the model
    if cached or given or len(args) > 1 or config.output_hidden_states or config.output_attentions:
        return None
    if not (isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor)):  # a mask may be a dictionary of several
        return None
    if mask.shape != ids.shape or ids.device.type != "cpu":
        return None
    kept = mask.bool()
    starts = kept & ~torch.nn.functional.pad(kept, (1, -1))
    # Pooling reads the last token that is not the pad token, whatever the mask says about it.
    readable = kept | (ids == (-1 if config.pad_token_id is None else config.pad_token_id)) | (not pooled)
    if not ((starts.sum(dim=1) == 1).all() and readable.all()):
        return None
    tree = prefix_tree([row[own].tolist() for row, own in zip(ids, kept, strict=True)])
    # A mask with four dimensions is handed down by `transformers` as it is. Without it positions that begin again
    # would be taken for packed sequences, and an N x N mask be made.
    return (), {
        "input_ids": tree.ids,
        "position_ids": tree.positions,
        "attention_mask": kept[:, None, None],
        "use_cache": False,
        "tree": tree,
    }


def out_of_tree(base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: hidden states (1, N, H) of a tree become (B, L, H), zeros at padding."""
    tree = kwargs.get("tree")
    if tree is not None:
        kept, hidden = kwargs["attention_mask"][:, 0, 0], output.last_hidden_state[0]
        rows = hidden.new_zeros(*kept.shape, hidden.shape[1])
        rows[kept] = hidden.index_select(0, tree.places)
        output.last_hidden_state = rows


def share_prefixes(model: PreTrainedModel) -> bool:
    """Let a reward model or a policy on a CPU compute every prefix in a batch once, and no padding.

    Rewards, log-probabilities and gradients are the same up to rounding: under causal attention a token does not know
    what comes after it. The model stays one of `transformers`: copies and pickles of it do the same with their own
    weights, and a saved one is a plain one.

    Returns:
        Whether the model does so now; architectures whose attention is another one stay as they are.
    """
    config, base = model.config, model.base_model
    if config._attn_implementation == ATTENTION:
        return True
    windowed = getattr(config, "sliding_window", None) or not getattr(config, "is_causal", True)
    if config.model_type not in TREE_MODELS or windowed or config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation(ATTENTION)
    # Hooks and not another `forward`: a method bound to this model would compute with its weights in every copy. They
    # are functions of this file, so that pickle finds them.
    pooled = type(model).__name__.endswith("ForSequenceClassification")
    base.register_forward_pre_hook(partial(into_tree, pooled=pooled), with_kwargs=True)
    base.register_forward_hook(out_of_tree, with_kwargs=True)
    return True
