"""Whatever computes with positions learns where the nodes of a tree stand: each node's logits are those of its path."""

from __future__ import annotations

import pytest

from benchmarks.families import SEQUENCE, build

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx.target import Target
from redrafter_mlx.target.positions import Positions
from redrafter_mlx.tree import TokenTree, ancestor_mask, chain

PARENTS = (0, 0, 0, 2, 2, 3, 1)
DEPTH = (0, 1, 1, 2, 2, 3, 2)
PATHS = ([0, 2, 3, 5], [0, 2, 4], [0, 1, 6])

# each another way to compute with positions: rope by another name or as a function, learned positions, a scale by
# position, a rope that takes one number, shared keys, a window
FAMILIES = (
    "qwen", "talkie", "nanochat", "gpt2", "gpt_bigcode", "ministral3", "mistral4", "internlm3", "afm7", "gemma3n",
    "gemma4_text", "muse_spark", "deepseek_v32",
)  # fmt: skip


def small_tree(seed: int) -> TokenTree:
    tokens = np.random.default_rng(seed).integers(1, SEQUENCE, len(PARENTS))
    parents = mx.array(PARENTS, dtype=mx.int32)
    depth = mx.array(DEPTH, dtype=mx.int32)
    return TokenTree(mx.array(tokens, dtype=mx.int32), parents, depth, ancestor_mask(parents, 3), 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_stand_where_their_depth_says(family: str) -> None:
    model, alone = build(family), build(family)
    target = Target(model, family)
    prompt = [(7 * i * i + 3) % SEQUENCE for i in range(61)]  # the next rows cross position 64
    cache, tree = target.new_cache(), small_tree(1)
    target.extend(mx.array(prompt), cache)
    got = np.array(target.verify(tree, cache).logits.astype(mx.float32))
    for path in PATHS:
        own = make_prompt_cache(alone)
        alone(mx.array([prompt]), cache=own)
        for node in path:
            want = np.array(alone(tree.tokens[node].reshape(1, 1), cache=own)[0, 0].astype(mx.float32))
            np.testing.assert_allclose(got[node], want, atol=3e-2 if family == "muse_spark" else 2e-3)


def test_other_models_of_the_process_are_left_alone() -> None:
    alone, model = build("nanochat"), build("nanochat")
    before = type(alone.layers[0].attn)
    Target(model, "nanochat")
    assert type(alone.layers[0].attn) is before and not hasattr(alone, "_positions")
    assert type(model.layers[0].attn) is not before


def test_rows_are_consecutive_outside_of_a_verification() -> None:
    positions = Positions()
    assert positions.at(5, 7) is None
    with positions.under(small_tree(0)):
        assert positions.at(5, 7).tolist() == [5 + depth for depth in DEPTH]
        assert positions.at(mx.array(5), 7) is positions.at(5, 7), "one vector serves all layers"
        assert positions.at(5, 3) is None, "other rows than the tree's"
    assert positions.at(5, 7) is None
    with positions.under(chain(mx.array([4]))):
        assert positions.at(5, 1) is None


def test_a_rope_can_be_looked_into() -> None:
    target = Target(build("llama"), "llama")
    rope = target.model.layers[0].self_attn.rope
    assert rope.dims == rope.inner.dims and rope.base == rope.inner.base
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = rope.nothing_like_it
