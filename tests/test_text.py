"""Streaming text: whole characters, stop strings across token borders."""

from __future__ import annotations

import redrafter_mlx  # noqa: F401

# isort: split
from redrafter_mlx.text import TextStream, _overlap


class Pieces:
    """A detokenizer whose tokens are indices into a list of strings."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces, self.last_segment = pieces, ""

    @property
    def detokenizer(self) -> Pieces:
        return self

    def reset(self) -> None:
        self.last_segment = ""

    def add_token(self, token: int) -> None:
        self.last_segment = self.pieces[token]

    def finalize(self) -> None:
        self.last_segment = ""


def run(pieces: list[str], *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(Pieces(pieces), stop)
    out = []
    for token in range(len(pieces)):
        out.append(stream.add(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream.stopped


def test_without_stops_everything_passes_at_once() -> None:
    assert run(["a", "", "bc"]) == (["a", "", "bc", ""], False)


def test_stop_within_a_piece() -> None:
    assert run(["ab", "cSTOPd", "e"], "STOP") == (["ab", "c", ""], True)


def test_stop_across_pieces_is_held_back() -> None:
    assert run(["ab S", "T", "OP!"], "STOP") == (["ab ", "", "", ""], True)


def test_what_only_looked_like_a_stop_is_released() -> None:
    assert run(["ab S", "T", "AY"], "STOP") == (["ab ", "", "STAY", ""], False)
    assert run(["ab ST"], "STOP") == (["ab ", "ST"], False)


def test_earliest_of_several() -> None:
    assert "".join(run(["one two three"], "three", "two")[0]) == "one "


def test_overlap() -> None:
    assert [_overlap("xaab", "aabaac"), _overlap("xa", "aab"), _overlap("x", "ab"), _overlap("ab", "ab")] == [
        3, 1, 0, 0,
    ]  # fmt: skip
