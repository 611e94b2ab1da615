"""A target's `config.json` as mlx-lm's models read it, whoever wrote it: for loading, conversion and training alike.

transformers 5 writes RoPE settings as `rope_parameters`; most of mlx-lm's models read `rope_theta` and `rope_scaling`
and would take a default base without a word.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ROPE_TYPES = frozenset({
    "default", "linear", "llama3", "yarn", "deepseek_yarn", "telechat3-yarn", "longrope", "su", "dynamic", "mrope",
    "proportional", "ntk",
})  # fmt: skip
STRETCHED = ("linear", "yarn", "deepseek_yarn", "telechat3-yarn", "dynamic", "ntk")
"""Scalings by whose factor a model reads more positions than it was first trained for."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
OPTIONAL_SIZES = (
    "head_dim",
    "num_key_value_heads",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "sliding_window",
)
"""Sizes that may be null, or 0 where there is no such thing."""

LARGEST = 1 << 24
"""Bound on any size: nothing is built before it is compared with the tensors."""

EPSILONS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "norm_epsilon",
    "layernorm_epsilon",
)
"""What families call the number that a normalization adds before its square root."""

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def normalize_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config, checked, with RoPE settings under the names that mlx-lm's models read.

    Raises:
        ValueError: no `model_type`; an impossible size; RoPE settings that are unknown, contradict each other, or
            would be ignored.
    """
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{where} has no model_type, which says what kind of model it is")
    out = dict(config)
    inner = out.get("text_config")
    if inner is None:
        out.pop("text_config", None)
    elif not isinstance(inner, dict):
        raise ValueError(f"{where}: text_config must be an object, not {str(inner)[:40]!r}")
    else:
        out["text_config"] = _normalized_part(inner, str(inner.get("model_type", out["model_type"])), where)
    return _normalized_part(out, out["model_type"], where)


def _normalized_part(config: dict[str, Any], model_type: str, where: str) -> dict[str, Any]:
    out = dict(config)
    _check_values(out, where)
    given = out.get("rope_parameters")
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{where}: rope_parameters must be an object, not {given!r}")
    if given:
        if any(isinstance(value, dict) for value in given.values()):
            _by_layer_type(out, given, model_type, where)
        else:
            _flatten(out, given, model_type, where)
    _check_scaling(out.get("rope_scaling"), where)
    return out


def _check_values(config: dict[str, Any], where: str) -> None:
    """Check the values that decide what is built, before anything is.

    Raises:
        ValueError: one that is not of its type or size, by its key.
    """
    for key in SIZES:
        value = config.get(key, 1)
        if type(value) is not int or not 0 < value <= LARGEST:
            raise ValueError(f"{where}: {key} must be an integer from 1 to {LARGEST}, not {str(value)[:40]}")
    for key in OPTIONAL_SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= LARGEST):
            raise ValueError(
                f"{where}: {key} must be an integer from 0 to {LARGEST}, not {str(value)[:40]!r}"
            )
    for key in LENGTH_KEYS:
        value = config.get(key, 1)
        if type(value) is not int or value < 1:
            hint = "; leave the key out where no limit is known" if value is None else ""
            raise ValueError(f"{where}: {key} must be a positive integer, not {str(value)[:40]}{hint}")
    if not isinstance(tied := config.get("tie_word_embeddings"), bool | None):
        raise ValueError(f"{where}: tie_word_embeddings must be true or false, not {str(tied)[:40]!r}")
    check_token_ids(config, where)
    _check_numbers(config, where)


def _check_numbers(config: dict[str, Any], where: str) -> None:
    """Check the numbers that the layers compute with.

    Raises:
        ValueError: one that is none, or with which a model computes nothing useful, by its key.
    """

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    for key in EPSILONS:
        value = config.get(key)
        if value is not None and not (is_number(value) and 0 <= value < 1):
            raise ValueError(f"{where}: {key} must be a number from 0 to 1, not {str(value)[:40]!r}")
    theta = config.get("rope_theta", 1e4)
    if not (is_number(theta) and 1 < theta < 1e30):
        raise ValueError(f"{where}: rope_theta must be a number greater than 1, not {str(theta)[:40]!r}")


def _flatten(out: dict[str, Any], given: dict[str, Any], model_type: str, where: str) -> None:
    """Move `rope_parameters` to where the model's module reads them."""
    kind = given.get("rope_type", given.get("type", "default"))
    for name in ("rope_theta", "partial_rotary_factor"):
        if given.get(name) is not None:
            _put(out, name, given[name], model_type, where)
    if kind != "default":
        rest = {k: v for k, v in given.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
        scaling = {**rest, "rope_type": kind, "type": kind}
        known = out.get("rope_scaling")
        if known is not None and any(known.get(key, value) != value for key, value in scaling.items()):
            raise ValueError(
                f"{where}: rope_scaling {known} and rope_parameters {given} contradict each other"
            )
        if known is None:
            _put(out, "rope_scaling", scaling, model_type, where)


def _by_layer_type(out: dict[str, Any], given: dict[str, Any], model_type: str, where: str) -> None:
    """`rope_parameters` with an object for each type of layer: full and sliding attention."""
    if "rope_parameters" in _arguments(model_type):
        return  # the model's module reads them itself
    full, sliding = given.get("full_attention"), given.get("sliding_attention")
    if not isinstance(full, dict) or set(given) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{where}: rope_parameters for the layer types {sorted(given)} cannot be honored")
    _flatten(out, full, model_type, where)
    if isinstance(sliding, dict) and sliding != full:
        if sliding.get("rope_type", "default") != "default" or "rope_local_base_freq" not in _arguments(
            model_type
        ):
            raise ValueError(
                f"{where}: rope_parameters of sliding_attention cannot be honored by {model_type}"
            )
        _put(out, "rope_local_base_freq", sliding["rope_theta"], model_type, where)


def _put(out: dict[str, Any], name: str, value: Any, model_type: str, where: str) -> None:
    known, arguments = out.get(name), _arguments(model_type)
    if known is not None and known != value:
        raise ValueError(f"{where}: {name} is {known}, and rope_parameters has {value}")
    if arguments and name not in arguments and "rope_parameters" not in arguments and name != "rope_theta":
        raise ValueError(f"{where}: mlx-lm's {model_type} does not read {name}, so {value} cannot be honored")
    out[name] = value


def _check_scaling(scaling: Any, where: str) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise ValueError(f"{where}: rope_scaling must be an object, not {scaling!r}")
    kinds = {scaling[key] for key in ("rope_type", "type") if isinstance(scaling.get(key), str)}
    unknown = sorted(kinds - ROPE_TYPES)
    if unknown:
        raise ValueError(
            f"{where}: RoPE scaling {unknown[0]!r} is not known; known are {', '.join(sorted(ROPE_TYPES))}"
        )


def _arguments(model_type: str) -> frozenset[str]:
    """Names that mlx-lm's module for `model_type` reads from a config; none where there is no such module."""
    from mlx_lm.utils import MODEL_REMAPPING

    try:
        module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    except ImportError:
        return frozenset()
    return frozenset(getattr(module.ModelArgs, "__dataclass_fields__", {}))


def max_length(config: dict[str, Any]) -> int | None:
    """Positions that the model reads, a stretching RoPE scaling included; None where the config does not say."""
    parts = [config, config.get("text_config")]
    for part in parts:
        if not isinstance(part, dict):
            continue
        limit = next(
            (part[key] for key in LENGTH_KEYS if isinstance(part.get(key), int) and part[key] > 0), None
        )
        if limit is None:
            continue
        scaling = part.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type"))
        factor = scaling.get("factor")
        if kind in STRETCHED and isinstance(factor, (int, float)) and factor > 1:
            before = scaling.get("original_max_position_embeddings") or limit
            limit = max(limit, int(factor * before))
        return int(limit)
    return None


def eos_token_ids(*configs: dict[str, Any]) -> frozenset[int]:
    """`eos_token_id`, one or several, of `config.json` and `generation_config.json`."""
    found: set[int] = set()
    for config in configs:
        for part in (config, config.get("text_config")):
            value = part.get("eos_token_id") if isinstance(part, dict) else None
            values = value if isinstance(value, list) else [value]
            found.update(each for each in values if isinstance(each, int) and not isinstance(each, bool))
    return frozenset(found)


def check_token_ids(config: dict[str, Any], where: str) -> None:
    """Check the ids of the end and the beginning of a text.

    Raises:
        ValueError: one that is neither a token's id, nor null, nor a list of ids.
    """
    for key in ("eos_token_id", "bos_token_id"):
        value = config.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        wrong = next((each for each in values if type(each) is not int or not 0 <= each < 1 << 31), None)
        if wrong is not None:
            raise ValueError(
                f"{where}: {key} must be a token's id or a list of them, not {str(value)[:40]!r}"
            )


_SAID = "8b1f said"  # words that no template writes by itself


def turn_end(tokenizer: TokenizerWrapper) -> int | None:
    """The token by which the chat template ends an assistant's turn; None where there is no such single token."""
    if not tokenizer.has_chat_template:
        return None
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _SAID}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # whatever a template does: then it does not say how a turn ends
        return None
    rest = text.rpartition(_SAID)[2].lstrip()
    ids = tokenizer.encode(rest, add_special_tokens=False) if rest else []
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return ids[0] if ids and ids[0] in added else None
