"""A prefix that several conversations have is computed once."""

import math
from typing import NamedTuple

import torch.distributed.nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

TREE_MODELS = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}  # causal attention and positions like Llama's


class Branch(NamedTuple):
    """The tokens that one sequence adds to a tree."""

    size: int
    path: list[tuple[int, int]]  # the whole sequence: so many of the first tokens of which branch, its own at the end
    mask: torch.Tensor | None  # (size, whole length) 0 or -inf, added to the attention; None where all of it is new


class Tree(NamedTuple):
    """B sequences as a tree of N tokens: a prefix that several have is in it once."""

    ids: torch.Tensor  # (1, N)
    positions: torch.Tensor  # (1, N) of the tokens in their sequences
    branches: list[Branch]  # in the order of their tokens
    ends: torch.Tensor  # (B,) where in `ids` the last token of each sequence is


def common_length(one: list[int], other: list[int]) -> int:
    """Number of tokens with which both begin."""
    different = (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def first_tokens(path: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The path of the first `count` tokens of a sequence."""
    shorter = []
    for branch, size in path:
        if count > 0:
            shorter.append((branch, min(size, count)))
            count -= size
    return shorter


def prefix_tree(sequences: list[list[int]]) -> Tree:
    """The tree of B sequences, none of them empty. In sorted order each one has its longest prefix with a neighbour."""
    ids, positions, branches, starts, ends = [], [], [], [], [0] * len(sequences)
    before, path = [], []
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
        branch, last = path[-1]
        ends[number] = starts[branch] + last - 1
        before = sequence
    return Tree(torch.tensor([ids]), torch.tensor([positions]), branches, torch.tensor(ends))


def without_padding(ids: list[int], pad_token_id: int | None) -> list[int]:
    """The tokens up to the one whose reward counts: `transformers` reads the last one that is not the pad token.

    With a pad token that also ends a conversation (often it is the end token) that is not the last one.
    """
    size = len(ids)
    while size > 1 and ids[size - 1] == pad_token_id:
        size -= 1
    return ids[:size]


def tree_attention(module, query, key, value, attention_mask, *, tree: Tree, scaling: float, dropout: float = 0.0, **_):
    """Causal attention along the paths of a tree, for the attention interface of `transformers`.

    One call for each branch costs less than one for all of them, which would compute their padding. In fp32 also under
    autocast: as fast on CPUs for long sequences, for short ones twice as fast, the backward pass included.

    Args:
        query, key, value: (1, heads, N, D); key and value may have fewer heads.

    Returns:
        (1, N, heads, D) in the type of `query`, and no weights.
    """
    sizes = [branch.size for branch in tree.branches]
    queries, keys, values = (each.float().split(sizes, dim=2) for each in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(
                own,
                *(
                    torch.cat([each[number][:, :, :size] for number, size in branch.path], dim=2)
                    for each in (keys, values)
                ),
                attn_mask=branch.mask,
                is_causal=branch.mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=True,
            )
            for own, branch in zip(queries, tree.branches, strict=True)
        ]
    return torch.cat(outputs, dim=2).transpose(1, 2).to(query.dtype), None


def share_prefixes(model) -> bool:
    """Let a reward model on a CPU compute every prefix in a batch once, and no padding.

    Chosen and rejected answers share their prompt, and so do all candidates of a best-of-n. Rewards and gradients are
    the same up to rounding: under causal attention a token does not know what comes after it.

    Returns:
        Whether the model does so now; architectures whose attention is another one stay as they are.
    """
    if model.config.model_type not in TREE_MODELS or getattr(model.config, "sliding_window", None):
        return False
    model.set_attn_implementation("tree")

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **others):
        # Others, such as TRL's margin, are without effect in the plain model too.
        for name in ("inputs_embeds", "labels", "past_key_values", "position_ids"):
            if others.get(name) is not None:
                raise TypeError(f"a reward model that shares prefixes takes no {name}")
        rows = [row[kept].tolist() for row, kept in zip(input_ids, attention_mask.bool(), strict=True)]
        tree = prefix_tree([without_padding(row, model.config.pad_token_id) for row in rows])
        hidden = model.base_model(
            input_ids=tree.ids, position_ids=tree.positions, use_cache=False, tree=tree
        ).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=model.score(hidden[0, tree.ends]))

    model.forward = forward
    return True
