"""Self-distillation data: what the target writes, and how it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redrafter_mlx.train.data import Watch
from redrafter_mlx.train.prompts import (
    normalize,
)
from redrafter_mlx.train.recipe import Recipe
from redrafter_mlx.train.shards import SavedAnswers, contexts_path, list_shards, read_shard, shard_path
from redrafter_mlx.train.tally import Tally

from .training import (
    Killed,
    asked,
    generator,
    killer,
)

# isort: split


def test_shards_hold_what_was_written(tmp_path: Path) -> None:
    made = generator(tmp_path)
    shards = made.run(6, asked("aa", "bbb", "cc", "dd", "aa", "ee"))
    assert shards == list_shards(tmp_path)
    assert len(shards) == 2  # four and one: "aa" came twice
    for shard in shards:
        with np.load(shard) as data:
            contexts = np.load(contexts_path(shard))
            assert contexts.shape == (len(data["tokens"]), 3 * 32) and contexts.dtype == np.float16
            assert data["starts"][0] == 0 and data["starts"][-1] == len(contexts)
            assert len(data["prompts"]) == len(data["starts"]) - 1 == len(data["temperatures"])
            assert len(contexts) > 0


def assert_same(one: Path, other: Path) -> None:
    """The same text in the same shards; contexts may differ by how two orders of summation round."""
    shards = list_shards(one)
    assert shards and [path.name for path in shards] == [path.name for path in list_shards(other)]
    for shard in shards:
        (mine, contexts), (theirs, others) = read_shard(shard), read_shard(other / shard.name)
        assert mine.answers == theirs.answers and mine.prompts == theirs.prompts
        assert mine.temperatures.tolist() == theirs.temperatures.tolist()
        np.testing.assert_allclose(contexts.astype(float), others.astype(float), atol=5e-3)


@pytest.mark.parametrize("after", [3, 9, 20, 30])
def test_an_interrupted_run_continues_to_the_same_data(tmp_path: Path, after: int) -> None:
    """Within the first shard and within later ones; what was written of a shard is not written again."""
    prompts = asked(*(f"q{c * n}" for n, c in enumerate("abcdefghijkl")))
    generator(tmp_path / "whole").run(12, prompts)
    cut = generator(tmp_path / "cut")
    with pytest.raises(Killed):
        cut.run(12, prompts, killer(after))
    kept = list((tmp_path / "cut").glob("begun-*-answers.npz"))
    assert len(kept) == 1
    with np.load(kept[0]) as data:
        before = len(data["tokens"])
        assert len(data["contexts"]) == before > 0
    tallies: list[int] = []
    generator(tmp_path / "cut").run(12, prompts, Watch(lambda tally: tallies.append(tally.answer_tokens)))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    shards_before = list(read_shard(path)[0] for path in list_shards(tmp_path / "whole"))
    saved = sum(len(shard.tokens) for shard in shards_before[: int(kept[0].name[6:11])])
    assert tallies[-1] == sum(len(shard.tokens) for shard in shards_before) - saved - before
    assert not list((tmp_path / "cut").glob("begun-*"))


@pytest.mark.parametrize("after", [60, 92])
def test_questions_are_kept_too(tmp_path: Path, after: int) -> None:
    """Interrupted in a round of questions or behind it, a run asks the same and answers the same."""
    generator(tmp_path / "whole", rows=5).run(5)
    with pytest.raises(Killed):
        generator(tmp_path / "cut", rows=5).run(5, watch=killer(after))
    assert list((tmp_path / "cut").glob("begun-*-questions-0.npz"))
    generator(tmp_path / "cut", rows=5).run(5)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_journal_of_other_prompts_or_that_is_damaged_is_not_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        generator(tmp_path / "cut").run(4, asked("aa", "bb", "cc", "dd"), killer(5))
    journal = next((tmp_path / "cut").glob("begun-*"))
    other = generator(tmp_path / "whole")
    other.run(2, asked("ee", "ff"))
    generator(tmp_path / "cut").run(2, asked("ee", "ff"))
    assert "belongs to other prompts" in caplog.text
    assert_same(tmp_path / "whole", tmp_path / "cut")
    journal.write_bytes(b"")
    for path in list_shards(tmp_path / "cut"):
        path.unlink()
    generator(tmp_path / "cut").run(2, asked("ee", "ff"))
    assert "is damaged" in caplog.text
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("damage", ["shard-00000.npz", "shard-00000.contexts.npy", "shard-00001.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None], ids=["empty", "cut", "missing"])
def test_a_damaged_shard_is_written_again(
    tmp_path: Path, damage: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = asked("aa", "bb", "cc", "dd", "ee", "ff")
    generator(tmp_path / "whole").run(6, prompts)
    generator(tmp_path / "cut").run(6, prompts)
    path = tmp_path / "cut" / damage
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    generator(tmp_path / "cut").run(6, prompts)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert (damage in caplog.text) == (content is not None)


def test_contexts_that_do_not_belong_to_their_shard_are_named(tmp_path: Path) -> None:
    [path] = generator(tmp_path).run(4, asked("aa", "bb", "cc", "dd"))
    np.save(contexts_path(path), np.zeros((3, 96), dtype=np.float16))
    with pytest.raises(ValueError, match=r"shard-00000.contexts.npy is damaged .* not float16 of \(3, 96\)"):
        read_shard(path)


def test_a_later_run_may_ask_for_more_or_fewer_answers(tmp_path: Path) -> None:
    prompts = asked(*(f"q{c}" for c in "abcdefghijkl"))
    assert len(generator(tmp_path).run(4, prompts)) == 1
    assert len(generator(tmp_path).run(10, prompts)) == 3
    assert [path.name for path in generator(tmp_path).run(4, prompts)] == ["shard-00000.npz"]
    texts = SavedAnswers.of(list_shards(tmp_path)).prompts
    assert len(texts) == len(set(texts)) == 10


def test_time_that_is_up_ends_the_writing_and_keeps_it(tmp_path: Path) -> None:
    prompts = asked(*(f"q{c}" for c in "abcdefghijkl"))
    seen: list[Tally] = []
    watch = Watch(seen.append, lambda tally: tally.positions >= 30)
    used = generator(tmp_path).run(None, prompts, watch)
    found = SavedAnswers.of(used)
    assert 30 <= found.num_tokens < 30 + 4
    assert len(used) < 3 and all(found.tokens)


def test_states_stay_within_the_disk_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To the next whole shard, said once, and a later call with more room goes on to the same data."""
    prompts = asked(*(f"q{c}" for c in "abcdefghijkl"))
    whole = generator(tmp_path / "whole")
    whole.run(12, prompts)
    assert len(list_shards(tmp_path / "whole")) == 3
    first = contexts_path(shard_path(tmp_path / "whole", 0)).stat().st_size
    small = generator(tmp_path / "small")
    small.budget = first + 1
    used = small.run(12, prompts)
    assert used == list_shards(tmp_path / "small") and len(used) == 2
    assert "training on what is there" in caplog.text
    text = SavedAnswers.of(list_shards(tmp_path / "whole"))
    again = generator(tmp_path / "again")
    again.budget = first + 1
    again.run_text(text)
    assert len(list_shards(tmp_path / "again")) == 2
    generator(tmp_path / "small").run(12, prompts)
    assert_same(tmp_path / "small", tmp_path / "whole")


def test_text_given_keeps_several_answers_to_a_prompt(tmp_path: Path) -> None:
    """The same answer again, and what answers an excluded prompt, are left out."""
    prompts = ["aa", "bb", "aa", "aa", "cc"]
    text = SavedAnswers(prompts, [0.0, 0.0, 1.0, 0.0, 0.0], [[5, 6], [7], [8, 9, 5], [5, 6], [4]])
    kept = SavedAnswers.of(generator(tmp_path, excluded=["cc"]).run_text(text))
    assert kept.num_tokens == 6
    assert list(zip(kept.prompts, kept.tokens, strict=True)) == [
        ("aa", [5, 6]),
        ("bb", [7]),
        ("aa", [8, 9, 5]),
    ]


@pytest.mark.slow
def test_the_target_asks_itself(tmp_path: Path) -> None:
    """A random target writes nonsense, but finished, new and excluded questions are told apart."""
    made = generator(tmp_path, rows=16)
    made.run(16)
    with np.load(shard_path(tmp_path, 0)) as data:
        texts = [str(text) for text in data["prompts"]]
    assert texts and len({normalize(text) for text in texts}) == len(texts)
    again = generator(tmp_path / "again", excluded=texts[:1], rows=16)
    again.run(16)
    with np.load(shard_path(tmp_path / "again", 0)) as data:
        assert texts[0] not in [str(text) for text in data["prompts"]]


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    generator(tmp_path)
    with pytest.raises(ValueError, match="max_tokens 12 there, 13 now"):
        generator(tmp_path, max_tokens=13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"greedy": 1.5}, "greedy must be between 0 and 1, not 1.5"),
        ({"temperatures": (0.0,)}, "temperatures must be positive"),
    ],
)
def test_bad_recipes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe("tiny", **change)


def test_prompts_that_leave_no_room_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = generator(tmp_path)
    assert made.target.max_length == 512
    used = made.run(4, asked("aa", "b" * 500, "cc"))
    assert SavedAnswers.of(used).prompts == ["aa", "cc"]
    assert "more than the 512 that tiny-llama is made for" in caplog.text
