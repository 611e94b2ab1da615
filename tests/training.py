"""What the tests of training share: a corpus that is known exactly, a trainer of it, a tokenizer of letters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.target import Target
from redrafter_mlx.train.corpus import Corpus, WindowShape
from redrafter_mlx.train.data import Generator, Watch
from redrafter_mlx.train.initial import new_drafter
from redrafter_mlx.train.loss import Batch, Objective
from redrafter_mlx.train.recipe import Recipe
from redrafter_mlx.train.rows import Answer
from redrafter_mlx.train.settings import Settings
from redrafter_mlx.train.shards import (
    save_shard,
    shard_path,
)
from redrafter_mlx.train.tally import Tally
from redrafter_mlx.train.trainer import Trainer
from tests.toy import _COMMON, FAMILIES, HIDDEN, VOCAB, make_model, make_target

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers

LAYERS = (0, 2)


SETTINGS = Settings(
    epochs=2,
    windows=4,
    window=8,
    validate_every=5,
    objective=Objective(depths=3),
    learning_rate=3e-3,
)


def write_corpus(folder: Path, target: Target, answers: int = 60, length: int = 24) -> Path:
    """Greedy continuations of random prompts, without the generator: the corpus is then known
    exactly."""
    rng = np.random.default_rng(0)
    tokens = mx.array(rng.integers(3, VOCAB, (answers, 4)))
    for _ in range(length):
        following = mx.argmax(target.model(tokens)[:, -1], axis=-1)[:, None]
        tokens = mx.concatenate([tokens, following], axis=1)
    contexts = np.array(target.contexts(tokens).astype(mx.float32))
    written = [
        Answer(row[4:].tolist(), list(context[3:-1]))
        for row, context in zip(np.array(tokens), contexts, strict=True)
    ]
    for index in range(2):
        half = slice(index, None, 2)
        prompts = [f"prompt {i}" for i in range(answers)][half]
        save_shard(shard_path(folder, index), prompts, [0.0] * len(prompts), written[half])
    return folder


def config(**changes: Any) -> DrafterConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "exit_dim": 64, "num_draft_layers": 1,
        "head": "factored",
        "draft_vocab_size": 40, "context_layers": LAYERS, **changes,
    }  # fmt: skip
    return DrafterConfig(**values)


def attached(target: Target, **changes: Any) -> RecurrentDrafter:
    """A new drafter that is still being trained."""
    drafter = RecurrentDrafter(config(**changes))
    drafter.attach(target)
    return drafter


def trainer(target: Target, data: Path, out: Path, **changes: Any) -> Trainer:
    corpus = Corpus([data])
    settings = replace(SETTINGS, **changes)
    return Trainer(new_drafter(config(), target, corpus, 0), target, corpus, out, settings)


def a_batch(data: Path, depths: int = 3) -> Batch:
    return next(Corpus([data]).epoch(0, 0, WindowShape(3, 8, depths)))


def final_weights(folder: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(folder / "last.safetensors"))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = final_weights(one), final_weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        # Not bit for bit: MKL rounds by memory alignment, which two runs do not share.
        # A lost moment, step or batch moves weights by about the learning rate, 3e-3.
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5, rtol=1e-4, err_msg=name)


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


TEMPLATE = (
    "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
)


def tiny_target(path: Path, family: str) -> Path:
    """A random model of 64 words as a folder, with a chat template; w2 ends a turn."""
    path.mkdir(exist_ok=True)
    model = make_model(family)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {**_COMMON, **FAMILIES[family], "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def without(command: list[str], option: str) -> list[str]:
    """A command line less one option and its value."""
    at = command.index(option)
    return command[:at] + command[at + 2 :]


def arguments(folder: Path, out: Path) -> list[str]:
    options = "--self-prompt 48 --rows 12 --max-tokens 24 --epochs 40 --validate-every 10 --draft-vocab 40"
    return ["train", "--model", str(folder), "--out", str(out), *options.split()]
