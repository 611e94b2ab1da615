"""`redrafter chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter_mlx.prompts import check_text

from . import options as opt
from .console import GaveUpNote, note, note_missing_drafter
from .generate import summary
from .piped import read_line

if TYPE_CHECKING:
    from .conversation import Conversation

HELP = """\
/reset         forget the conversation
/system TEXT   start over with this system message; without TEXT: show it
/stats         figures of the last answer
/quit          leave (or Ctrl-D)
/help          this
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""


def chat(  # noqa: PLR0913  (typer: one argument per option)
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = None,
    draft: opt.DraftOption = "auto",
    max_tokens: opt.MaxTokensOption = 512,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    stop: opt.StopOption = None,
    temperature: opt.TemperatureOption = 0.7,
    top_p: opt.TopPOption = 0.95,
    top_k: opt.TopKOption = 0,
    min_p: opt.MinPOption = 0.0,
    seed: opt.SeedOption = None,
    kv_bits: opt.KVBitsOption = None,
) -> None:
    """Talk with a model. /help lists what else can be typed."""
    settings = opt.generation_options(
        draft, max_tokens, stop, temperature, top_p, top_k, min_p, seed, kv_bits
    )
    if system is not None:
        check_text(system, "--system")
    from .conversation import Conversation

    loaded = opt.load_model(model, drafter)
    conversation = Conversation(loaded, settings, system)
    note_missing_drafter(loaded, draft, drafter)
    if sys.stdin is not None and sys.stdin.isatty():
        note(f"{model}: /help for help, Ctrl-C stops an answer, Ctrl-D leaves")
    run(conversation)


def run(conversation: Conversation) -> None:
    """Read a line, answer it, until the end of input, /quit, or Ctrl-C twice."""
    interrupted, gave_up = False, GaveUpNote(conversation.model)
    while True:
        try:
            line = _read_line()
        except EOFError:
            return
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if interrupted:
                return
            interrupted = True
            note("Ctrl-C again or Ctrl-D to leave")
            continue
        interrupted = False
        if line.startswith("/"):
            if line.split()[0] in ("/quit", "/exit"):
                return
            _command(conversation, line)
        elif line:
            interrupted = _turn(conversation, line)
            gave_up.after_answer()


def _turn(conversation: Conversation, text: str) -> bool:
    """Stream the answer; True when Ctrl-C stopped it."""
    try:
        stream = conversation.say(text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    if conversation.dropped:
        note(f"the context is full: the oldest {conversation.dropped} exchanges are forgotten")
    finish = None
    # closed here, also by a second Ctrl-C, so that history and cache hold what was said
    with _ctrl_c() as pressed, closing(stream):
        for chunk in stream:
            print(chunk.text, end="", flush=True)
            finish = chunk.finish_reason
            if pressed:
                break
    print(flush=True)
    if pressed and finish is None:
        note("stopped")
    elif finish == "length":
        note("cut at the length limit (--max-tokens)")
    note(_status(conversation))
    return bool(pressed)


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in the list given, so that a step ends whole; the second raises."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)


def _command(conversation: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        note("the conversation is forgotten")
    elif name == "/system" and rest:
        conversation.reset()
        conversation.system = rest
        note("a new conversation with this system message")
    elif name == "/system":
        note(conversation.system or "no system message but the chat template's own")
    elif name == "/stats":
        _stats(conversation)
    elif name == "/help":
        note(HELP)
    else:
        print(f"error: no command {name}; /help lists them", file=sys.stderr)


def _stats(conversation: Conversation) -> None:
    stats = conversation.last
    if stats is None:
        note("nothing was said yet")
        return
    for key, value in stats.to_dict().items():
        if key != "token_ids":
            note(f"{key}: {value}")


def _status(conversation: Conversation) -> str:
    stats = conversation.last
    if stats is None:
        return "nothing was said"
    used, limit = stats.prompt_tokens + stats.generated_tokens, conversation.model.target.max_length
    return f"{summary([stats])}, context {used}{f' of {limit}' if limit else ''}"


def _read_line() -> str:
    """A message from the terminal or a pipe, with its continued lines.

    Raises:
        EOFError, KeyboardInterrupt: end of input; Ctrl-C.
    """
    lines: list[str] = []
    while True:
        line = _input(". " if lines else "> ")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines).strip()


def _input(prompt: str) -> str:
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal and sys.stdout.isatty():
        try:
            import readline  # noqa: F401  (gives input() its line editing)
        except ImportError:
            pass
        return check_text(input(prompt), "the message")
    if is_terminal:
        print(prompt, end="", file=sys.stderr, flush=True)
    return check_text(read_line(), "the message")
