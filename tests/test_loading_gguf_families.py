"""Every architecture that is read from a GGUF: the logits of the mlx-lm model it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import ggufs

# isort: split
import mlx.core as mx

from redrafter_mlx.loading.gguf import load_gguf
from redrafter_mlx.loading.gguf.families import FAMILIES


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))


PROMPT = mx.array([[5, 9, 40, 7, 8, 3, 100, 260, 17, 17, 30, 4]])  # longer than the sliding windows


def relative_error(got: mx.array, want: mx.array) -> float:
    return float(mx.abs(got - want).max() / mx.abs(want).max())


@pytest.mark.parametrize("name", ggufs.CASES)
def test_the_logits_of_the_model_it_was_written_from(tmp_path: Path, name: str) -> None:
    """Float32 throughout; what is left is the rounding of 1 + w for the norms of Gemma."""
    want = ggufs.write(tmp_path / "m.gguf", name)(PROMPT)
    model, _, config = load_gguf(tmp_path / "m.gguf")
    assert relative_error(model(PROMPT), want) < 1e-5
    assert config["max_position_embeddings"] == (256 if name == "gemma2" else 512), "gemma2: its window"


def test_every_family_has_a_case() -> None:
    assert {case.arch or name for name, case in ggufs.CASES.items()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gemma", "gpt-oss", "phi3"])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("Q8_0", 0.05), ("Q5_0", 0.35), ("BF16", 0.1), ("MXFP4", 1.0)]
)
def test_packed_layers_of_a_family(tmp_path: Path, name: str, kind: str, tolerance: float) -> None:
    """Experts, heads that are embeddings, and rows in llama.cpp's order, packed; tolerances are the types' rounding."""
    want = ggufs.write(tmp_path / "m.gguf", name, kind=kind)(PROMPT)
    model, _, _ = load_gguf(tmp_path / "m.gguf")
    assert relative_error(model(PROMPT), want) < tolerance
    packed = "scales" in model.layers[0].self_attn.o_proj
    assert packed == (kind != "BF16")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"attention.key_length": 32}, "heads of 32"),
        ("llama", {"rope.dimension_count": 8}, "rotates 8 of the 16 values"),
        ("llama", {"rope.scaling.type": "yarn"}, "lacks the metadata key llama.rope.scaling.factor"),
        ("llama", {"rope.scaling.type": "wavy"}, "RoPE scaling 'wavy'"),
        ("qwen3moe", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "computes no scaling"),
        ("qwen2-yarn", {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is not known"),
        ("qwen3moe", {"expert_used_count": None}, "lacks the metadata key qwen3moe.expert_used_count"),
        ("granite", {"logit_scale": 0.0}, "granite.logit_scale must be above 0"),
        ("gemma3", {"attention.sliding_window": 0}, "sliding_window must be an integer from 1"),
        ("gpt-oss", {"attention.head_count": 3}, "gpt_oss|does not fit"),
        ("phi3-long", {"rope.dimension_count": 8}, "must hold 4 factors"),
    ],
)
def test_settings_that_mlx_lm_does_not_compute(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    ggufs.write(tmp_path / "m.gguf", name, **changes)
    with pytest.raises(ValueError, match=said) as error:
        load_gguf(tmp_path / "m.gguf")
    assert str(tmp_path) in str(error.value)


def test_tensors_that_are_not_known_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors_of = ggufs.tensors_of

    def with_more(*args: Any) -> dict[str, Any]:
        tensors = tensors_of(*args)
        return {
            **tensors,
            "blk.0.attn_q.scale": tensors["output_norm.weight"],
            "mm.0.weight": tensors["output.weight"],
        }

    monkeypatch.setattr(ggufs, "tensors_of", with_more)
    ggufs.write(tmp_path / "m.gguf", "llama")
    with pytest.raises(ValueError, match=r"llama does not have: blk\.0\.attn_q\.scale, mm\.0\.weight"):
        load_gguf(tmp_path / "m.gguf")


def test_a_gpu_computes_in_bfloat16_where_float16_overflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDRAFTER_PRETEND_GPU", "1")
    for name, dtype in (("gemma", mx.bfloat16), ("llama", mx.float16)):
        ggufs.write(tmp_path / "m.gguf", name, kind="Q8_0")
        model, _, _ = load_gguf(tmp_path / "m.gguf")
        assert model.layers[0].self_attn.o_proj.scales.dtype == dtype
