"""The config of a recurrent drafter checks itself and survives its JSON."""

from __future__ import annotations

from typing import Any

import pytest

from redrafter_mlx.drafters.recurrent_config import DrafterConfig


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 0}, {"hidden_size": -1}, {"exit_dim": 1 << 25}, {"exit_dim": True},
        {"num_draft_layers": -1}, {"head": "half"}, {"activation": "relu"}, {"draft_vocab_size": 65},
        {"draft_vocab_size": 0}, {"calibration": (1.0, 0.0)}, {"context_layers": (-1,)},
        {"quantization": {"bits": 7, "group_size": 32}},
    ],
)  # fmt: skip
def test_a_config_checks_itself(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        DrafterConfig(**{"vocab_size": 64, "hidden_size": 32, "exit_dim": 64, "num_draft_layers": 1} | values)


def test_a_config_as_json_and_back() -> None:
    config = DrafterConfig(
        64, 32, 48, 0, rnn=False, head="factored", draft_vocab_size=9, context_layers=(1, 2), calibration=(1.5,),
        quantization={"bits": 4, "group_size": 32}, target={"name": "tiny"},
    )  # fmt: skip
    values = config.to_dict()
    assert DrafterConfig.from_dict(values, "here") == (config, [])
    assert values["rnn"] is False and values["num_draft_layers"] == 0
    assert "calibration" not in DrafterConfig(64, 32, 64, 1).to_dict(), "Apple's code reads these too"
    with pytest.raises(ValueError, match="here is not a recurrent drafter"):
        DrafterConfig.from_dict({**values, "model_type": "llama"}, "here")
