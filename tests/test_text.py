"""Streaming text: whole characters, stop strings across token borders."""

from __future__ import annotations

import redrafter_mlx  # noqa: F401

# isort: split
from redrafter_mlx.text import TextStream, _overlap


class Pieces:
    """A tokenizer whose tokens are indices into a list of strings, or of bytes."""

    def __init__(self, pieces: list[str] | list[bytes]) -> None:
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


class Trimming(Pieces):
    """One that drops the space at the beginning of a text, as SentencePiece does."""

    def decode(self, tokens: list[int]) -> str:
        return super().decode(tokens).removeprefix(" ")


def run(pieces: list[str] | list[bytes], *stop: str) -> tuple[list[str], bool]:
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


def test_a_character_in_several_tokens_comes_whole() -> None:
    pieces = [bytes([byte]) for byte in "a\u20acb\U0001f600".encode()]
    assert run(pieces)[0] == ["a", "", "", "\u20ac", "b", "", "", "", "\U0001f600", ""]


def test_bytes_that_are_no_character_do_not_hold_up_the_rest() -> None:
    out, _ = run([b"\xff"] * 8 + [b"x"])
    assert "".join(out) == "\ufffd" * 8 + "x"


def test_the_first_space_is_kept() -> None:
    """Where a tokenizer drops it at the beginning of a text, the prompt before it shows that it is no beginning."""
    pieces = [" ends", " with", " Q", " w", "o", " rds"]
    stream = TextStream(Trimming(pieces), [], [0, 1, 2])
    assert [stream.add(token) for token in (3, 4, 5)] == [" w", "o", " rds"]
    stream = TextStream(Trimming(pieces), [" w"], [0, 1, 2])
    assert (stream.add(3), stream.stopped) == ("", True)
