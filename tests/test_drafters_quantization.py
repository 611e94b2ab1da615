"""Quantization of a drafter: what a config may ask for, and which layers are rounded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.toy import make_drafter, make_target

# isort: split
import mlx.nn as nn

from redrafter_mlx.drafters.quantization import check_quantization, quantize


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "must have bits and group_size"),
        ({"bits": 4, "group_size": 32, "scheme": "k"}, "must have bits and group_size"),
        ({"bits": 7, "group_size": 32}, "bits of mode affine must be 2, 3, 4, 5, 6 or 8, not 7"),
        ({"bits": True, "group_size": 32}, "bits of mode affine must be .*, not True"),
        ({"bits": 4, "group_size": 16}, "group_size of mode affine must be 32, 64 or 128, not 16"),
        ({"bits": 8, "group_size": 32, "mode": "mxfp4"}, "bits of mode mxfp4 must be 4, not 8"),
        ({"bits": 8, "group_size": 32, "mode": "int"}, "mode must be affine, .* or nvfp4, not 'int'"),
    ],
)
def test_what_mlx_does_not_have_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"quantization {message}"):
        check_quantization(values)


def test_layers_that_groups_do_not_divide_stay_as_they_are() -> None:
    drafter = make_drafter(make_target(), exit_dim=48)
    quantize(drafter, {"bits": 8, "group_size": 32})
    assert isinstance(drafter.rnn_u, nn.QuantizedLinear), "32 inputs"
    assert not isinstance(drafter.lm_head[0].linear, nn.QuantizedLinear), "48 inputs"
