"""Recurrent drafters of ours as Apple's trainer saves them, for programs that read that format.

Letters: H hidden size, X exit_dim, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from redrafter_mlx.drafters.kinds import WEIGHTS, load_recurrent
from redrafter_mlx.drafters.recurrent import MODEL_TYPE, DrafterConfig, RecurrentDrafter, changed, full_head
from redrafter_mlx.files import write_safetensors

from .drafter import cast_all, load_target
from .source import Report, check_output, dtype_name, dtype_of, locate, output_folder

_NEVER = -1e4  # logit of a token outside a reduced vocabulary; fits float16, and exp(-1e4) is 0


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export a drafter."""

    target: str | None = None
    """the model whose output rows a factored head needs"""
    dtype: str | None = None
    force: bool = False


def export_drafter(folder: str, out: Path, options: ExportOptions, report: Report) -> None:
    """Write one of our drafters as Apple's trainer saves it: Apple's names, a full head, floats.

    Raises:
        FileNotFoundError, ValueError: no drafter there, or one that Apple's format cannot express.
    """
    check_output(out, options.force)
    drafter = load_recurrent(locate(folder, "drafter"))
    config = drafter.config
    if config.context_layers:
        raise ValueError(
            f"{folder} reads the target's layers {list(config.context_layers)}; Apple's format "
            "knows the last hidden state only. A drafter that can be exported is trained with "
            "`redrafter train --context-layers none`"
        )
    if config.quantization:
        report("the weights are quantized: they are exported as rounded")
        dequantize_model(drafter)
        drafter.config = changed(config, quantization=None)
    if config.head == "factored":
        if options.target is None:
            raise ValueError(
                f"--target is needed: {folder} has head 'factored' and reads the target's output rows"
            )
        drafter.attach(load_target(options.target))
        drafter = full_head(drafter)
    if config.draft_vocab_size is not None:
        drafter = full_vocabulary(drafter)
        report(
            f"a feature is added (exit_dim {drafter.config.exit_dim}) so that tokens outside the "
            f"drafter's {config.draft_vocab_size} are never drafted"
        )
    if config.activation == "linear":
        report("its RNN is linear: right for TensorRT-LLM, while Apple's code would apply SiLU")
    if config.calibration:
        report("the calibration of its probabilities is left out: Apple's format has no place for it")
    if config.embedding_scale != 1.0:
        report(f"it reads embeddings scaled by {config.embedding_scale}; Apple's format does not say so")
    arrays = dict(tree_flatten(drafter.parameters()))
    dtypes = {array.dtype for array in arrays.values()}
    widest = next(iter(dtypes)) if len(dtypes) == 1 else mx.float32
    with output_folder(out, options.force) as part:
        _save_as_apple(drafter.config, cast_all(arrays, dtype_of(options.dtype) or widest, folder), part)
        load_recurrent(part)


def _save_as_apple(config: DrafterConfig, arrays: dict[str, mx.array], part: Path) -> None:
    values = {
        "architectures": ["Drafter"],
        "exit_dim": config.exit_dim,
        "hidden_size": config.hidden_size,
        "model_type": MODEL_TYPE,
        "num_draft_layers": config.num_draft_layers,
        "num_lookback_tokens": -1,
        "rnn": config.rnn,
        "torch_dtype": dtype_name(next(iter(arrays.values())).dtype),
        "vocab_size": config.vocab_size,
    }
    (part / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    write_safetensors(part / WEIGHTS, arrays, {"format": "pt"})


def full_vocabulary(drafter: RecurrentDrafter) -> RecurrentDrafter:
    """A full head over a reduced vocabulary as one over all V tokens, with the same probabilities.

    The head has no bias, so a feature that is always 1 is added behind the others (a residual block
    adds SiLU(0) = 0 to it), and the output matrix gives it -1e4 for the tokens that were left out.
    """
    config = drafter.config
    ids = drafter.target_ids()
    assert ids is not None and config.head == "full", "see export_drafter"
    old = dict(tree_flatten(drafter.parameters()))
    size = config.exit_dim
    extra = 2 if size + 1 == 2 * config.hidden_size else 1  # exit_dim 2H would mean: no input_proj
    head = f"lm_head.{config.num_draft_layers}.weight"
    dtype = old[head].dtype
    new = {name: array for name, array in old.items() if name.startswith("rnn_")}
    weight = old.get("input_proj.weight", mx.eye(size, dtype=dtype))
    bias = old.get("input_proj.bias", mx.zeros((size,), dtype=dtype))
    one = mx.array([1.0] + [0.0] * (extra - 1), dtype=dtype)
    new["input_proj.weight"] = mx.pad(weight, [(0, extra), (0, 0)])  # (X + extra, 2H)
    new["input_proj.bias"] = mx.concatenate([bias, one])
    for i in range(config.num_draft_layers):
        name = f"lm_head.{i}.linear"
        new[f"{name}.weight"] = mx.pad(old[f"{name}.weight"], [(0, extra), (0, extra)])
        new[f"{name}.bias"] = mx.pad(old[f"{name}.bias"], (0, extra))
    rows = mx.zeros((config.vocab_size, size + extra), dtype=dtype)
    rows[:, size] = _NEVER
    rows[ids] = mx.pad(old[head], [(0, 0), (0, extra)])
    new[head] = rows
    full = RecurrentDrafter(changed(config, draft_vocab_size=None, exit_dim=size + extra))
    full.load_weights(list(new.items()))
    return full
