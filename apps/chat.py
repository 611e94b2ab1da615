"""`redrafter chat`: a conversation in the terminal, or one line after the other from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from redrafter_mlx.prompts import check_text

from . import options as opt
from .chat_commands import Chat, run_command
from .console import DrafterNotes, columns, note, note_missing_drafter, write_answer
from .generate import summary
from .piped import read_line
from .terminal import StatusLine, has_color, is_terminal

Reader = Callable[[str], str]
"""Reads a message that begins with the text given; raises EOFError, KeyboardInterrupt or ValueError."""


def chat(  # noqa: PLR0913  (typer: one argument per option)
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = None,
    lookup: opt.LookupOption = True,
    history: opt.HistoryOption = None,
    draft: opt.DraftOption = "auto",
    max_tokens: opt.MaxTokensOption = 512,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last conversation; /load NAME takes another.")
    ] = False,
    stop: opt.StopOption = None,
    temperature: opt.ModelsTemperatureOption = None,
    top_p: opt.ModelsTopPOption = None,
    top_k: opt.ModelsTopKOption = None,
    min_p: opt.ModelsMinPOption = None,
    repetition_penalty: opt.ModelsRepetitionPenaltyOption = None,
    seed: opt.SeedOption = None,
    kv_bits: opt.KVBitsOption = None,
) -> None:
    """Talk with a model. /help lists what else can be typed.

    Without a terminal, every line of standard input is a message.
    """
    if system is not None:
        check_text(system, "--system")
        if resume:
            raise ValueError("--resume goes on with the conversation's own system message: no --system")
    given = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    options = opt.checked_options(draft, max_tokens, stop, given, kv_bits)
    from . import saved
    from .conversation import Conversation
    from .defaults import chat_sampling

    path = saved.last() if resume else None
    if is_terminal():
        note(f"loading {model}")
    loaded = opt.load_model(model, drafter, lookup, history)
    settings = opt.with_sampling(options, chat_sampling(model, given))
    talk = Chat(Conversation(loaded, settings, system), model, lookup, history, path)
    if path is not None:
        talk.load(path)
        note(f"{len(talk.conversation.messages) // 2} exchanges of {path}")
    note_missing_drafter(loaded, draft, drafter)
    run(talk)


def run(chat: Chat) -> None:
    """Read a message, answer it, until the end of input, /quit, or Ctrl-C twice at the prompt."""
    read: Reader = _read_line
    if is_terminal():
        from . import saved
        from .terminal import message_reader

        chat.path = chat.path or saved.new_name()
        note(f"{chat.model}: /help for help, Ctrl-C stops an answer, Ctrl-D leaves")
        read = message_reader(lambda: _toolbar(chat))
    _converse(chat, read)


def _converse(chat: Chat, read: Reader) -> None:
    interrupted, notes = False, DrafterNotes(chat.conversation.model)
    while True:
        try:
            text = _next(chat, read)
            interrupted = False
            if text.startswith("/") and not run_command(chat, text):
                return
            if text and not text.startswith("/"):
                _turn(chat, text)
                notes.after_answer(chat.conversation.last)
        except EOFError:
            return
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if interrupted:
                return
            interrupted = True
            note("Ctrl-C again or Ctrl-D to leave")


def _next(chat: Chat, read: Reader) -> str:
    """The next message or command: one that a command left, or what is typed."""
    if chat.next_message is not None:
        text, chat.next_message = chat.next_message, None
        return text
    begin, chat.next_edit = chat.next_edit, ""
    return check_text(read(begin), "the message")


def _turn(chat: Chat, text: str) -> None:
    """Stream the answer to `text`, until Ctrl-C.

    Raises:
        ValueError: the message is refused, by the chat template or for its length.
    """
    talk = chat.conversation
    stream = talk.say(chat.with_files(text))
    if talk.dropped:
        note(f"the context is full: the oldest {talk.dropped} exchanges are forgotten")
    finish = None
    # closed here, also by a second Ctrl-C, so that history and cache hold what was said
    with _ctrl_c() as pressed, closing(stream), _view(chat) as (write, status):
        for chunk in stream:
            write(chunk.text, chunk.source)
            if status is not None:
                status.show(chunk.stats)
            finish = chunk.finish_reason
            if pressed:
                break
    if pressed and finish is None:
        note("stopped")
    elif finish == "length":
        note("cut at the length limit (--max-tokens)")
    note(_status(chat))
    chat.save()


@contextmanager
def _view(chat: Chat) -> Iterator[tuple[Callable[[str, str | None], None], StatusLine | None]]:
    """What writes an answer: styled above a status line in a terminal, as it is elsewhere."""
    from .markdown import MarkdownStream

    if not is_terminal() or not has_color():

        def plain(text: str, source: str | None) -> None:
            write_answer(text)

        try:
            yield plain, None
        finally:
            print(flush=True)
        return
    from .terminal import status_line

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    view = MarkdownStream(write, columns, chat.shows_drafts)
    with status_line() as status:
        try:
            yield view.add, status
        finally:
            view.finish()


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


def _status(chat: Chat) -> str:
    stats = chat.conversation.last
    if stats is None:
        return "nothing was said"
    used, limit = stats.prompt_tokens + stats.generated_tokens, chat.conversation.model.target.max_length
    return f"{summary([stats])}, context {used}{f' of {limit}' if limit else ''}"


def _toolbar(chat: Chat) -> str:
    talk = chat.conversation
    parts = [
        Path(chat.model).name,
        f"draft {talk.settings.draft}",
        f"temperature {talk.settings.sampling.temperature:g}",
    ]
    if chat.attached:
        parts.append(f"{len(chat.attached)} attached")
    return ", ".join([*parts, "/help"])


def _read_line(begin: str = "") -> str:
    """A message where there is no terminal that can do more, with its continued lines; `begin` comes first.

    Raises:
        EOFError, KeyboardInterrupt, ValueError: end of input; Ctrl-C; a line that is not UTF-8.
    """
    is_asked = sys.stdin is not None and sys.stdin.isatty()
    lines: list[str] = [begin] if begin else []
    while True:
        if is_asked:
            print(". " if lines else "> ", end="", file=sys.stderr, flush=True)
        line = read_line()
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines).strip()
