"""Functions are replaced in the modules of one model alone."""

from __future__ import annotations

from tests.toy import make_model

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models import gemma2, llama

from redrafter_mlx.rebinding import rebind

TOKENS = mx.array([[3, 1, 4, 1, 5]])


def test_a_replacement_is_called_with_the_arguments_of_what_it_replaces() -> None:
    """`swiglu` of llama becomes a function of which the model's output is seen to depend."""
    model, other = make_model("llama"), make_model("llama")
    want = np.array(other(TOKENS))
    theirs, seen = llama.swiglu, []

    def make(before):  # type: ignore[no-untyped-def]
        assert before is theirs
        return lambda gate, x: (seen.append(gate.shape), before(gate, x))[1]

    rebind(model, {"swiglu": make})
    np.testing.assert_array_equal(np.array(model(TOKENS)), want)
    assert len(seen) == len(model.layers)
    other(TOKENS)
    assert len(seen) == len(model.layers), "the other model calls mlx-lm's own"
    assert llama.swiglu is theirs and isinstance(model.layers[0].mlp, llama.MLP)


def test_nothing_is_done_where_nothing_fits() -> None:
    model = make_model("gemma2")
    before = [type(module) for module in model.modules()]
    rebind(model, {"swiglu": lambda theirs: None, "no_such_function": lambda theirs: theirs})
    assert [type(module) for module in model.modules()] == before
    assert isinstance(model.layers[0], gemma2.TransformerBlock)
