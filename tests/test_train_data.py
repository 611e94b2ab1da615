"""Self-distillation data: what the target writes, and how it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redrafter_mlx.train.data import Generator, Watch
from redrafter_mlx.train.generate import generate_batch, sample
from redrafter_mlx.train.prompts import (
    ChatFormat,
    PromptFilter,
    is_held_out,
    normalize,
    read_excluded,
    read_prompts,
)
from redrafter_mlx.train.recipe import Recipe
from redrafter_mlx.train.rows import LoopWatch, Row, loop_start
from redrafter_mlx.train.shards import SavedAnswers, contexts_path, list_shards, read_shard, shard_path
from redrafter_mlx.train.tally import Tally

from .toy import VOCAB, make_target

# isort: split
import mlx.core as mx

EOS = 2


class ToyTokenizer:
    """Characters a, b, c ... as tokens 3, 4, 5 ...; 1 opens a turn, 2 ends it."""

    chat_template: str | None = "toy"
    eos_token_ids = {EOS}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        special = {"<": 1, ">": EOS}
        return [special.get(c, 3 + (ord(c) - ord("a")) % (VOCAB - 3)) for c in text]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(f"w{token}" for token in tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
    ) -> Any:
        text = "<sys>" + "".join(f"<{m['content']}>" for m in messages) + "<"
        return self.encode(text) if tokenize else text


def generator(folder: Path, excluded: list[str] | None = None, **changes: Any) -> Generator:
    recipe = Recipe("tiny", (0, 2), **{"rows": 4, "max_tokens": 12, **changes})
    return Generator(make_target(), ToyTokenizer(), folder, recipe, excluded or [])


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_a_loop_is_noticed_at_its_twelfth_repeated_window() -> None:
    text = list(range(100, 120)) + [1, 2, 3, 4, 5] * 20
    # windows of 8 that lie in the loop: the first five are new (period 5), those after repeat.
    # The first ends at token 20 + 8, the fifth at 20 + 12, so the twelfth repeat at 20 + 24.
    assert loop_start(text) == 20 + 12 + 12


def test_text_without_a_loop_is_kept_whole() -> None:
    assert loop_start(list(range(300))) == 300
    assert loop_start([]) == 0


def test_a_repeat_that_breaks_off_is_not_a_loop() -> None:
    phrase = list(range(18))  # 11 windows of 8: one repeat fewer than a loop takes
    watch = LoopWatch()
    assert not any(watch.push(token) for token in phrase + [50] + phrase + [51] + phrase + [52])


def test_sampling_inverts_the_cumulative_distribution() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3]], dtype=np.float32)).repeat(4, axis=0)
    uniforms = np.array([0.1, 0.21, 0.69, 0.71])
    assert sample(logits, np.ones(4), 0, uniforms).tolist() == [0, 1, 1, 2]
    assert sample(logits, np.zeros(4), 0, uniforms).tolist() == [1, 1, 1, 1]
    # of the two likeliest, renormalized: 0.625 and 0.375
    assert sample(logits, np.ones(4), 2, uniforms).tolist() == [1, 1, 2, 2]


def test_lockstep_decoding_is_the_targets_own_greedy_text() -> None:
    """Prompts of different lengths in one batch, against one forward of each whole text alone."""
    target = make_target()
    target.watch((0, 2))
    prompts = [(1, 5, 6), (1, 5, 6, 7, 8, 9, 10), (1, 5, 40, 41)]
    rows = [Row(prompt, 20, 0.0) for prompt in prompts]
    for prompt, text in zip(
        prompts, generate_batch(target, rows, frozenset({EOS}), np.random.default_rng(0)), strict=True
    ):
        whole = mx.array([[*prompt, *text.tokens]])
        logits = np.array(target.model(whole)[0])
        contexts = np.array(target.contexts(whole)[0].astype(mx.float32))
        begin = len(prompt) - 1
        end = begin + len(text.tokens)
        assert logits[begin:end].argmax(axis=-1).tolist() == text.tokens
        np.testing.assert_allclose(contexts[begin:end], np.stack(text.contexts), rtol=2e-3, atol=5e-3)


def test_a_text_ends_with_its_stop_token() -> None:
    target = make_target()
    row = Row((1, 5, 6), 20, 0.0)
    free = generate_batch(target, [row], frozenset(), np.random.default_rng(0))[0]
    stop = free.tokens[4]
    text = generate_batch(target, [row], frozenset({stop}), np.random.default_rng(0))[0]
    assert text.stopped and not free.stopped
    assert text.tokens == free.tokens[: free.tokens.index(stop) + 1]


def test_prompts_pass_once_and_excluded_ones_never() -> None:
    long = "Compose a travel blog post about a recent trip to an island far away"
    prompts = PromptFilter([long, "Who are you?"])
    assert prompts.accepts("What is  love?")
    assert not prompts.accepts("what is LOVE")
    assert not prompts.accepts(long.lower() + "!")
    assert not prompts.accepts(long + " and say why.")
    assert not prompts.accepts(long[:60])
    assert not prompts.accepts("who are you")
    assert not prompts.accepts("  ?! ")
    assert prompts.accepts("Who is she?")


def test_held_out_share_is_as_asked_and_does_not_depend_on_spelling() -> None:
    texts = [f"question number {i}" for i in range(4000)]
    held = [text for text in texts if is_held_out(text, 20)]
    assert 120 < len(held) < 290  # 200 expected, deviation 14
    assert all(is_held_out(text.upper() + "?", 20) for text in held)
    assert normalize("A,  b! ") == "a b"


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


class Killed(Exception):
    pass


def killer(after: int) -> Watch:
    """Interrupts the writing after so many steps, as Ctrl-C would."""
    steps = 0

    def on_step(_: Tally) -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            raise Killed

    return Watch(on_step)


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


def test_the_chat_format_is_read_from_the_template() -> None:
    class Plain(ToyTokenizer):
        def apply_chat_template(
            self, messages: Any, add_generation_prompt: bool = True, tokenize: bool = True
        ) -> str:
            return f"<s>{messages[0]['content']}><"

    chat = ChatFormat.of(Plain())
    assert chat.before_user == (1, 3 + 18, EOS) and chat.after_user == (EOS, 1)
    assert chat.stop == {EOS}


def test_a_target_without_a_chat_template_cannot_ask_itself(tmp_path: Path) -> None:
    tokenizer = ToyTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Generator(make_target(), tokenizer, tmp_path / "data", Recipe("tiny"))
    assert not (tmp_path / "data").exists()


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


def test_prompts_from_files(tmp_path: Path) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    turns = [turn("system", "s"), turn("user", "two"), turn("assistant", "x")]
    shared = [{"from": "human", "value": "three"}, {"from": "gpt", "value": "y"}]
    lines = [
        json.dumps({"prompt": "one"}),
        "",
        json.dumps({"messages": turns}),
        json.dumps({"conversations": shared}),
        json.dumps("four"),
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("five\n\nsix\n")
    read = read_prompts(tmp_path)
    assert [messages[-1] for messages in read] == [
        {"role": "user", "content": word} for word in ("one", "two", "three", "four", "five", "six")
    ]
    assert read[1][0]["role"] == "system"


def test_every_turn_of_a_benchmark_is_excluded(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text(
        json.dumps({"question_id": 81, "turns": ["Write about Hawaii.", "Now shorter."]})
    )
    prompts = PromptFilter(read_excluded(tmp_path / "bench.jsonl"))
    assert not prompts.accepts("write about hawaii") and not prompts.accepts("now SHORTER")
    assert prompts.accepts("Write about Maui.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "at least one prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "JSON object or string, not list"),
        ("keys.jsonl", '{"answer": "a"}', "needs 'prompt' or 'messages', but has \\['answer'\\]"),
        (
            "nobody.jsonl",
            '{"messages": [{"role": "system", "content": "a"}]}',
            "no message has the role",
        ),
        ("odd.jsonl", '{"messages": ["a"]}', "role and content"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_missing_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="found: .parquet"):
        read_prompts(tmp_path)
