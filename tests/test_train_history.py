"""Training on the answers of one's own use, as `generate --history` has kept them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redrafter_mlx.drafters.history import History
from redrafter_mlx.train.data import Generator
from redrafter_mlx.train.generate import generate_batch
from redrafter_mlx.train.history import answer_spans, read_history
from redrafter_mlx.train.prompts import ChatFormat, tokenize
from redrafter_mlx.train.recipe import Recipe
from redrafter_mlx.train.request import Inputs, Request
from redrafter_mlx.train.rows import Row
from redrafter_mlx.train.settings import Origin
from redrafter_mlx.train.shards import read_shard

from .toy import VOCAB, make_target
from .training import EOS, ToyTokenizer, asked


class Chat(ToyTokenizer):
    """With a mark of its own before an answer, as chat templates have."""

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True, tokenize: bool = True
    ) -> Any:
        return "<sys>" + "".join(f"<{m['content']}>" for m in messages) + "!<"


CHAT = ChatFormat((1, 9), (2, 1, 8), frozenset({2}))


def test_answers_follow_what_closes_a_users_turn() -> None:
    """1 9 opens a user's turn, 2 1 8 closes it; 2 ends an answer. Two turns, the second cut by the length limit."""
    conversation = [1, 9, 30, 31, 2, 1, 8, 40, 41, 2, 1, 9, 32, 2, 1, 8, 42]
    assert [conversation[a:b] for a, b in answer_spans(conversation, CHAT)] == [[40, 41, 2], [42]]
    assert list(answer_spans([1, 9, 30, 2, 1, 8], CHAT)) == [], "asked, and not answered"
    assert list(answer_spans([30, 31, 32], CHAT)) == []


def kept(folder: Path, temperature: float) -> list[list[int]]:
    """A history of three answers that the target wrote."""
    target, tokenizer = make_target(), Chat()
    history = History(folder, target.name, VOCAB)
    prompts = [tokenize(tokenizer, messages) for messages in asked("hello", "what", "name three")]
    rows = [Row(tuple(prompt), 20, temperature) for prompt in prompts]
    answers = generate_batch(target, rows, frozenset({EOS}), np.random.default_rng(0), cut_loops=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        history.add([*prompt, *answer.tokens])
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_a_history_become_a_shard(tmp_path: Path, temperature: float) -> None:
    """Their states are those in which they were chosen, and whether they were greedy is found out."""
    answers = kept(tmp_path / "history", temperature)
    target, tokenizer = make_target(), Chat()
    text = read_history(tmp_path / "history", target, tokenizer)
    assert text.tokens == answers
    made = Generator(target, tokenizer, tmp_path / "data", Recipe(target.name, prompts="history"))
    [path] = made.run_text(text)
    shard, contexts = read_shard(path)
    assert shard.answers == answers and shard.temperatures.tolist() == [temperature] * 3
    chosen = (contexts.astype(np.float32) @ np.array(target.output_rows()).T).argmax(axis=-1)
    assert ((chosen == shard.tokens).mean() > 0.9) == (temperature == 0)


def test_a_history_is_read_with_its_target(tmp_path: Path) -> None:
    kept(tmp_path / "history", 0.0)
    target, tokenizer = make_target(), Chat()
    request = Request(tmp_path / "out", from_history=tmp_path / "history", num_answers=2)
    request = replace(request, settings=replace(request.settings, windows=1, window=8))
    inputs = Inputs.read(request).with_history(request, target, tokenizer)
    assert inputs.text is not None and len(inputs.text.tokens) == 2 and inputs.text.asked is not None
    few = replace(request, settings=replace(request.settings, window=64))
    with pytest.raises(ValueError, match=r"2 answers have at most \d+ tokens, and one batch takes 64"):
        Inputs.read(few).with_history(few, target, tokenizer)
    assert (
        Inputs([], None, [], None, Origin("")).with_history(Request(tmp_path), target, tokenizer).text is None
    )


def test_histories_that_cannot_be_used(tmp_path: Path) -> None:
    target, tokenizer = make_target(), Chat()
    with pytest.raises(FileNotFoundError, match="--from-history: no folder .*none"):
        Inputs.read(Request(tmp_path / "out", from_history=tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="holds no texts of tiny-llama"):
        read_history(tmp_path, target, tokenizer)
    History(tmp_path, target.name, VOCAB).add([30, 31, 32])
    with pytest.raises(ValueError, match="holds no answer in the chat format of tiny-llama"):
        read_history(tmp_path, target, tokenizer)
    with pytest.raises(ValueError, match="give one of --text t or --from-history h, not both"):
        Request(tmp_path, text=Path("t"), from_history=Path("h"))
    with pytest.raises(
        ValueError, match="--minutes decides how much text is written, and --from-history h gives it"
    ):
        Request(tmp_path, from_history=Path("h"), minutes=5, num_answers=None)
