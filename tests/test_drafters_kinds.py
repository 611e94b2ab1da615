"""Drafter folders: what is written is read again, and whatever is wrong in one is a single clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.toy import make_drafter, make_target

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters import recurrent_network
from redrafter_mlx.drafters.kinds import load_drafter, load_recurrent, save_drafter
from redrafter_mlx.drafters.quantization import quantize
from redrafter_mlx.drafters.recurrent_config import changed
from redrafter_mlx.files import named_weights

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A drafter with a draft vocabulary of the target's tokens 0, 2, ... 62."""
    drafter = make_drafter(make_target(), draft_vocab_size=32)
    drafter.d2t = mx.arange(32, dtype=mx.int32)
    save_drafter(drafter, tmp_path / "d")
    return tmp_path / "d"


def edit(folder: Path, **changes: object) -> None:
    """Change keys of the config; None takes one out."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, **changes: Any) -> None:
    weights = dict(mx.load(str(folder / WEIGHTS)))
    mx.eval(weights)
    mx.save_safetensors(str(folder / WEIGHTS), {**weights, **changes})


def test_save_and_load(tmp_path: Path) -> None:
    drafter = make_drafter(
        make_target(),
        head="factored",
        context_layers=(1,),
        draft_vocab_size=32,
        calibration=(1.1, 1.2),
        exit_dim=48,
    )
    save_drafter(drafter, tmp_path / "d", extra=[("README.md", "card")])
    again = load_recurrent(tmp_path / "d")
    assert again.config == drafter.config and not again.training
    mine, theirs = named_weights(drafter), named_weights(again)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert mx.array_equal(array, theirs[name]), name
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["README.md", "config.json", WEIGHTS]
    assert (tmp_path / "d" / "README.md").read_text() == "card"
    assert [p.name for p in tmp_path.iterdir()] == ["d"], "no temporary folder stays"


def test_laid_out_weights_are_saved_as_they_were(tmp_path: Path) -> None:
    target = make_target()
    drafter = make_drafter(target, exit_dim=48)
    before = named_weights(drafter)
    drafter.eval()
    drafter.attach(target)
    save_drafter(drafter, tmp_path / "d")
    again = named_weights(load_recurrent(tmp_path / "d"))
    assert again.keys() == before.keys()
    assert all(mx.array_equal(array, again[name]) for name, array in before.items())


def test_quantized_drafter_round_trip(tmp_path: Path) -> None:
    target = make_target()
    drafter = make_drafter(target)
    hidden, tokens = mx.random.normal((2, 32), key=mx.random.key(0)), mx.array([[1, 2], [3, 4]])
    want = drafter.logits(hidden, tokens, target.embed)
    quantize(drafter, {"bits": 8, "group_size": 32})
    drafter.config = changed(drafter.config, quantization={"bits": 8, "group_size": 32})
    save_drafter(drafter, tmp_path / "q")
    again = load_recurrent(tmp_path / "q")
    assert isinstance(again.lm_head[-1], nn.QuantizedLinear)
    got = again.logits(hidden, tokens, target.embed)
    assert mx.array_equal(got, drafter.logits(hidden, tokens, target.embed))
    assert mx.abs(got - want).max().item() < 0.05 * mx.abs(want).max().item()


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 3, "group_size": 64}, {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        {"bits": 8, "group_size": 32, "mode": "mxfp8"}, {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    ],
)  # fmt: skip
def test_every_format_that_a_config_may_name(tmp_path: Path, quantization: dict[str, Any]) -> None:
    drafter = make_drafter(make_target())
    quantize(drafter, quantization)
    drafter.config = changed(drafter.config, quantization=quantization)
    save_drafter(drafter, tmp_path / "q")
    again = load_recurrent(tmp_path / "q")
    assert again.config.quantization == quantization
    assert named_weights(again).keys() == named_weights(drafter).keys()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_weights_in_another_dtype(folder: Path, dtype: mx.Dtype) -> None:
    weights = named_weights(load_recurrent(folder, dtype))
    assert weights.pop("d2t").dtype == mx.int32
    assert {array.dtype for array in weights.values()} == {dtype}


def test_apples_superfluous_tensor_is_left_out(folder: Path) -> None:
    edit_weights(folder, **{"emb_norm.weight": mx.ones((32,))})
    assert "emb_norm.weight" not in named_weights(load_recurrent(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"exit_dim": 0}, "exit_dim must be a positive integer"),
        ({"head": "half"}, "head must be 'full' or 'factored'"),
        ({"activation": "relu"}, "activation must be"),
        ({"num_draft_layers": 2}, "lm_head.1.linear.weight .* is missing.*lm_head.2.weight"),
        ({"rnn": False}, "rnn_u.bias .* is not expected.*rnn_w.weight"),
        ({"draft_vocab_size": 31}, "d2t has shape .*, expected .*lm_head.1.weight has shape .*expected"),
    ],
)
def test_bad_config_is_one_clear_error(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_drafter(folder)


# JSON has no other values than these kinds. A number is right where one is meant, so it is not among the bad ones.
INTEGERS: tuple[Any, ...] = ("5", 1.5, True, [1], {}, 2**31, 10**400, -1, float("nan"))
BAD: dict[str, tuple[Any, ...]] = {
    "vocab_size": (*INTEGERS, 0),
    "hidden_size": (*INTEGERS, 0),
    "exit_dim": (*INTEGERS, 0),
    "num_draft_layers": INTEGERS,
    "draft_vocab_size": (*INTEGERS, 0, 65),
    "rnn": ("true", 1, 0, [], {}),
    "head": (1, True, ["full"], {}, ""),
    "activation": (1, True, ["silu"], {}, ""),
    "context_layers": (5, 1.5, True, "0", ["a"], [1.0], [True], [None], [-1], [[1]], {}),
    "calibration": (5, True, "1", [None], ["1"], [True], [0], [-1.0], [float("nan")], [float("inf")], {}),
    "embedding_scale": ("1", True, [1.0], {}, float("nan"), float("inf")),
    "quantization": (
        4, "q4", ["a"], True, {}, {"bits": 4}, {"group_size": 32}, {"bits": "4", "group_size": "32"},
        {"bits": 4, "group_size": 0}, {"bits": 1, "group_size": 32}, {"bits": 4.0, "group_size": 32},
        {"bits": 4, "group_size": 32.0}, {"bits": [4], "group_size": 32}, {"bits": True, "group_size": 32},
        {"bits": 4, "group_size": 16}, {"bits": 4, "group_size": 32, "mode": "best"},
        {"bits": 4, "group_size": 32, "mode": ["affine"]}, {"bits": 8, "group_size": 32, "mode": "mxfp4"},
        {"bits": 4, "group_size": 32, "mode": "nvfp4"}, {"bits": 4, "group_size": 32, "x": 1},
    ),
    "target": (1, "tiny", ["tiny"], True),
    "training": (1, "long", [1], True),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(key, v, id=f"{key}-{str(v)[:40]}") for key, values in BAD.items() for v in values],
)
def test_a_value_that_cannot_be_is_one_error_that_names_the_key(folder: Path, key: str, value: Any) -> None:
    edit(folder, **{key: value})
    with pytest.raises(ValueError, match=rf"config\.json: {key}\b.* must .* not ") as caught:
        load_drafter(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(folder))


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn", "head", "activation",
        "context_layers", "calibration", "embedding_scale", "target", "training",
    ],
)  # fmt: skip
def test_null_is_no_value(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: None}))
    with pytest.raises(ValueError, match=rf"config\.json: {key} must be .* not None"):
        load_drafter(folder)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "exit_dim"])
def test_sizes_that_the_tensors_do_not_have_are_compared_and_not_made(folder: Path, key: str) -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    edit(folder, **{key: 1 << 24}, **({"draft_vocab_size": 1 << 24} if key == "vocab_size" else {}))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit its config: .*16777216"):
        load_drafter(folder)
    assert mx.get_peak_memory() - before < 1 << 24


@pytest.mark.parametrize("count", [4_000, 1_000_000])
def test_more_blocks_than_tensors_are_refused_before_one_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(recurrent_network, "ResBlock", lambda size: pytest.fail("a block was made"))
    edit(folder, num_draft_layers=count)
    with pytest.raises(ValueError, match=f"num_draft_layers is {count}, and it holds 7 tensors"):
        load_drafter(folder)


@pytest.mark.parametrize("kind", ["llama", "", None, 5, ["a"], {}, True])
def test_an_unknown_kind(folder: Path, kind: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(ValueError, match=r"config\.json is not a drafter: model_type is .*, known are "):
        load_drafter(folder)


def test_apples_config_without_a_kind_is_a_recurrent_drafter(folder: Path) -> None:
    edit(folder, model_type=None)
    load_recurrent(folder)


def test_unknown_keys_are_listed(folder: Path) -> None:
    edit(folder, color="red", emb_norm=False, shape=1)
    with pytest.warns(UserWarning, match="keys not known here: color, shape$"):
        load_drafter(folder)


@pytest.mark.parametrize(
    ("d2t", "message"),
    [
        ({31: 33}, r"d2t\[31\] names the token 64, and the target's are 0\.\.63"),
        ({31: 2**31 - 1}, r"d2t\[31\] names the token 2147483678, "),
        ({0: -1}, r"d2t\[0\] names the token -1, "),
        ({5: -(2**31)}, r"d2t\[5\] names the token -2147483643, "),
        ({3: 4, 4: 3}, "d2t names the token 7 twice"),
    ],
)
def test_a_draft_vocabulary_that_the_target_does_not_have(
    folder: Path, d2t: dict[int, int], message: str
) -> None:
    values = np.arange(32)
    values[list(d2t)] = list(d2t.values())
    edit_weights(folder, d2t=mx.array(values, dtype=mx.int32))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}"):
        load_drafter(folder)


@pytest.mark.parametrize("dtype", [mx.int64, mx.int16, mx.uint8, mx.uint32])
def test_a_draft_vocabulary_in_other_integers(folder: Path, dtype: mx.Dtype) -> None:
    edit_weights(folder, d2t=mx.arange(32, dtype=dtype))
    ids = load_recurrent(folder).target_ids()
    assert ids is not None and ids.dtype == mx.int32 and ids.tolist() == list(range(0, 64, 2))


def test_a_draft_vocabulary_must_be_integers(folder: Path) -> None:
    edit_weights(folder, d2t=mx.arange(32, dtype=mx.float32))
    with pytest.raises(ValueError, match="d2t must hold integers, not float32"):
        load_drafter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["rnn_u.bias", "lm_head.0.linear.weight", "lm_head.1.weight"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_weights_that_are_not_finite(folder: Path, name: str, value: float, dtype: mx.Dtype) -> None:
    array = dict(mx.load(str(folder / WEIGHTS)))[name]
    flat = array.reshape(-1).astype(dtype)
    flat[-1] = value
    edit_weights(folder, **{name: flat.reshape(array.shape)})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} holds values that are not finite"):
        load_drafter(folder)


def test_weights_that_are_no_floats(folder: Path) -> None:
    edit_weights(folder, **{"rnn_u.bias": mx.zeros((32,), dtype=mx.int32)})
    with pytest.raises(ValueError, match=r"rnn_u\.bias cannot be of dtype int32"):
        load_drafter(folder)


def test_all_that_does_not_fit_is_one_message(folder: Path) -> None:
    weights = dict(mx.load(str(folder / WEIGHTS)))
    mx.eval(weights)
    weights["rnn_w.bias"] = weights.pop("rnn_u.bias")
    weights["d2t"] = mx.arange(5)
    mx.save_safetensors(str(folder / WEIGHTS), weights)
    with pytest.raises(ValueError, match="rnn_u.bias .* is missing; rnn_w.bias .* is not expected; d2t has"):
        load_drafter(folder)


def test_damaged_files(folder: Path) -> None:
    weights = folder / WEIGHTS
    data = weights.read_bytes()
    for keep in (0, 4, 100, len(data) - 1):
        weights.write_bytes(data[:keep])
        with pytest.raises(ValueError, match="cut short"):
            load_drafter(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_drafter(folder)
    for text, message in (("{", "is not JSON"), ("[]", "must hold a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_drafter(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_drafter(folder)
