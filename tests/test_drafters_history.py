"""Earlier texts kept between runs: what is stored, its bound, and damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.toy import make_target

# isort: split
from redrafter_mlx.drafters.history import History
from redrafter_mlx.drafters.lookup import Lookup
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.tree import Beam


def test_an_earlier_text_is_looked_up_in_a_later_run(tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    History(tmp_path / "h", "toy", 64).add([1, 2, 3, 4, 5])
    offer = Lookup(History(tmp_path / "h", "toy", 64)).start([9, 2, 3]).offer(Beam(1, 4))
    assert offer is not None and offer.tokens == [4, 5], "and no further than that text went"
    assert Lookup(History(tmp_path / "h", "other", 64)).start([9, 2, 3]).offer(Beam(1, 4)) is None


def test_the_likelier_of_text_and_history_is_offered_first(tmp_path: Path) -> None:
    history = History(tmp_path, "toy", 64)
    history.add([7, 2, 3, 4])
    lookup = Lookup(history)
    text = lookup.start([3, 8, 7, 2, 3])
    offer = text.offer(Beam(1, 2))
    assert offer is not None and offer.tokens == [4], "three tokens match there, one here"
    for _ in range(200):
        lookup.rates[True].history.observe(3, False)
    text.keep([5])
    again = lookup.start([3, 8, 7, 2, 3]).offer(Beam(1, 2))
    assert again is not None and again.tokens == [8], "what was found in history has been wrong"


def test_a_text_that_goes_on_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    history = History(tmp_path, "toy", 64)
    history.add([1, 2, 3])
    history.add([1, 2, 3, 4, 5])
    assert np.load(history.path).tolist() == [1, 2, 3, 4, 5, -1]


def test_the_oldest_texts_go_first(tmp_path: Path) -> None:
    history = History(tmp_path, "toy", 64, most_tokens=10)
    for first in range(6):
        history.add([first, 60, 61, 62])
    kept = np.load(history.path)
    assert kept.tolist() == [4, 60, 61, 62, -1, 5, 60, 61, 62, -1]
    history.add(list(range(30)))
    assert np.load(history.path).tolist() == [*range(20, 30), -1], "of a text that is too long, its end"


@pytest.mark.parametrize(
    "content",
    [np.array([1, 64, -1], dtype=np.int32), np.array([1, 2]), np.array([[1, -1]], dtype=np.int32),
     np.array([1, 2], dtype=np.int32), np.array([-2, -1], dtype=np.int32), np.array([], dtype=np.int32),
     np.array([{"a": 1}], dtype=object), b"", b"not numpy"],
)  # fmt: skip
def test_a_damaged_history_is_an_error_that_names_it(content: np.ndarray | bytes, tmp_path: Path) -> None:
    path = History(tmp_path, "toy", 64).path
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match="toy-64.npy is not a history of texts"):
        History(tmp_path, "toy", 64)


def test_generation_keeps_texts_and_drafts_from_them(tmp_path: Path) -> None:
    target = make_target("llama", 3)
    prompt, folder = [3, 4, 5], tmp_path / "kept"
    first = Model(target, lookup=Lookup(History(folder, target.name, target.vocab_size)))
    _, once = generate(first, prompt, max_tokens=60, draft="1x8")
    second = Model(target, lookup=Lookup(History(folder, target.name, target.vocab_size)))
    _, again = generate(second, prompt, max_tokens=60, draft="1x8")
    assert again.token_ids == once.token_ids
    assert again.tokens_per_step > 3 > once.tokens_per_step, "the second answer is looked up in the first"


def test_a_text_that_cannot_be_kept_is_answered_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = make_target("llama", 3)
    (tmp_path / "kept").write_text("a file where the folder should be")
    model = Model(target, lookup=Lookup(History(tmp_path / "kept", target.name, target.vocab_size)))
    _, stats = generate(model, [3, 4, 5], max_tokens=6)
    assert stats.generated_tokens == 6 and "could not be kept" in caplog.text
