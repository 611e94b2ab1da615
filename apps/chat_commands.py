"""What can be typed in a conversation besides messages: `/help` and the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter_mlx.prompts import decode_text

from . import options as opt
from . import saved
from .console import columns, note, note_missing_drafter

if TYPE_CHECKING:
    from .conversation import Conversation


@dataclass(slots=True)
class Chat:
    """A conversation and what belongs to its view."""

    conversation: Conversation
    model: str = ""
    """as `--model` has it"""
    lookup: bool = True
    history: Path | None = None
    """as `--lookup` and `--history` have them, for another model"""
    path: Path | None = None
    """where every answer is saved; None: nowhere"""
    shows_drafts: bool = True
    """Color accepted draft tokens."""
    attached: list[str] = field(default_factory=list)
    """Texts of files that go with the next message."""
    next_message: str | None = None
    """What is to be said without being typed again."""
    next_edit: str = ""
    """What the next prompt begins with."""

    def save(self) -> None:
        """Keep the conversation in its file, if it has one and something was said."""
        if self.path is not None and self.conversation.messages:
            self.save_as(self.path)

    def save_as(self, path: Path) -> None:
        talk = self.conversation
        saved.save(path, saved.Saved(self.model, talk.system, talk.messages))

    def load(self, path: Path) -> None:
        """Go on with the conversation of a file, with the model that is loaded.

        Raises:
            FileNotFoundError, ValueError: there is none.
        """
        found, talk = saved.load(path), self.conversation
        talk.reset()
        talk.system = found.system
        talk.messages.extend(found.messages)

    def with_files(self, text: str) -> str:
        """A message with the attached files before it."""
        whole = "\n\n".join([*self.attached, text])
        self.attached.clear()
        return whole


def run_command(chat: Chat, line: str) -> bool:
    """Do what a line that begins with a slash says; False: leave.

    Raises:
        ValueError, OSError: there is no such command, or it cannot be done.
    """
    name, _, rest = line.partition(" ")
    if name in LEAVING:
        return False
    command = COMMANDS.get(name)
    if command is None:
        raise ValueError(f"no command {name}; /help lists them")
    if rest.strip() and not command.argument:
        raise ValueError(f"{name} takes nothing behind it, not {rest.strip()!r}")
    command.do(chat, rest.strip())
    return True


def _help(chat: Chat, rest: str) -> None:
    names = {f"{name} {command.argument}".strip(): command.help for name, command in COMMANDS.items()}
    names["/quit"] = "leave (or Ctrl-D)"
    width = max(map(len, names)) if columns() >= 80 else 0
    note("\n".join(f"{name:{width}}  {text}" for name, text in names.items()))
    note("A line that ends in \\ goes on in the next one, as with Alt-Enter. Ctrl-C stops an answer.")


def _reset(chat: Chat, rest: str) -> None:
    chat.conversation.reset()
    note("the conversation is forgotten")


def _system(chat: Chat, rest: str) -> None:
    talk = chat.conversation
    if not rest:
        note(talk.system or "no system message but the chat template's own")
        return
    system = None if rest == "none" else rest
    talk.check_system(system)
    talk.system = system
    note("no system message" if system is None else "the system message holds from the next turn on")


def _save(chat: Chat, rest: str) -> None:
    if not rest and chat.path is None:
        chat.path = saved.new_name()
    path = saved.named(rest) if rest else chat.path
    assert path is not None
    chat.save_as(path)
    note(f"saved in {path}")


def _load(chat: Chat, rest: str) -> None:
    path = saved.named(rest) if rest else saved.last()
    chat.load(path)
    note(f"{len(chat.conversation.messages) // 2} exchanges of {path}")


def _retry(chat: Chat, rest: str) -> None:
    chat.next_message = chat.conversation.undo()
    if chat.conversation.settings.sampling.seed is not None:
        note("with the same seed comes the same answer: /seed none")


def _edit(chat: Chat, rest: str) -> None:
    before = chat.conversation.undo()
    if rest:
        chat.next_message = rest
    else:
        chat.next_edit = before


def _stats(chat: Chat, rest: str) -> None:
    stats = chat.conversation.last
    if stats is None:
        note("nothing was said yet")
        return
    for key, value in stats.to_dict().items():
        if key != "token_ids":
            note(f"{key}: {value}")


def _draft(chat: Chat, rest: str) -> None:
    talk = chat.conversation
    if rest in ("show", "hide"):
        chat.shows_drafts = rest == "show"
    elif rest:
        talk.change(replace(talk.settings, draft=opt.check_draft(rest)))
    shown = "colored" if chat.shows_drafts else "not colored"
    note(f"draft {talk.settings.draft}, accepted draft tokens {shown}")


def _sampling(name: str, kind: type[int] | type[float]) -> Callable[[Chat, str], None]:
    def change(chat: Chat, rest: str) -> None:
        talk = chat.conversation
        if rest:
            try:
                value: Any = None if rest == "none" and name == "seed" else kind(rest)
            except ValueError:
                raise ValueError(f"{name} must be a number, not {rest!r}") from None
            sampling = replace(talk.settings.sampling, **{name: value})
            talk.change(replace(talk.settings, sampling=sampling))
        note(f"{name} {getattr(talk.settings.sampling, name)}")

    return change


def _model(chat: Chat, rest: str) -> None:
    from .conversation import Conversation

    talk = chat.conversation
    if rest:
        loaded = opt.load_model(rest, None, chat.lookup, chat.history)
        new = Conversation(loaded, talk.settings, talk.system, messages=list(talk.messages))
        chat.conversation, chat.model = new, rest
        note_missing_drafter(
            loaded, talk.settings.draft if isinstance(talk.settings.draft, str) else "", None
        )
    drafter = "no drafter" if chat.conversation.model.drafter is None else "a drafter"
    note(f"{chat.model}, with {drafter}")


def _copy(chat: Chat, rest: str) -> None:
    said = [message["content"] for message in chat.conversation.messages if message["role"] == "assistant"]
    if not said:
        raise ValueError("nothing was said yet that could be copied")
    for command in (["pbcopy"], ["wl-copy"], ["xclip", "-selection", "clipboard"]):
        if shutil.which(command[0]) and (command[0] == "pbcopy" or os.environ.get("DISPLAY")):
            subprocess.run(command, input=said[-1].encode(), check=False, capture_output=True)
            note(f"the last answer is in the clipboard ({command[0]})")
            return
    if not sys.stdout.isatty():
        raise ValueError("there is no clipboard here: no pbcopy, wl-copy or xclip, and no terminal")
    # OSC 52, by which a terminal takes text, also from a machine far away (xterm's ctlseqs)
    print(f"\x1b]52;c;{b64encode(said[-1].encode()).decode()}\x07", end="", flush=True)
    note("the last answer was given to the terminal's clipboard")


def _file(chat: Chat, rest: str) -> None:
    if not rest:
        raise ValueError("/file needs a path")
    path = Path(rest).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    text = decode_text(path.read_bytes(), str(path))
    chat.attached.append(f"{path.name}:\n```\n{text.rstrip()}\n```")
    note(f"{path.name}, {len(text)} characters, goes with the next message")


@dataclass(frozen=True, slots=True)
class _Command:
    do: Callable[[Chat, str], None]
    argument: str
    """what may stand behind the name; empty where nothing may"""
    help: str


COMMANDS = {
    "/help": _Command(_help, "", "this"),
    "/reset": _Command(_reset, "", "forget the conversation"),
    "/system": _Command(_system, "[TEXT|none]", "set or show the system message"),
    "/save": _Command(_save, "[NAME]", "save the conversation"),
    "/load": _Command(_load, "[NAME]", "go on with a saved conversation; the last one by default"),
    "/retry": _Command(_retry, "", "another answer to the last message"),
    "/edit": _Command(_edit, "[TEXT]", "change the last message and send it again"),
    "/file": _Command(_file, "PATH", "attach a file's text to the next message"),
    "/copy": _Command(_copy, "", "copy the last answer to the clipboard"),
    "/stats": _Command(_stats, "", "figures of the last answer"),
    "/draft": _Command(_draft, "[auto|off|WxL|show|hide]", "what is drafted, and whether it is colored"),
    "/temperature": _Command(_sampling("temperature", float), "[T]", "sampling temperature"),
    "/seed": _Command(_sampling("seed", int), "[N|none]", "random seed"),
    "/model": _Command(_model, "[NAME]", "go on with another model"),
}
LEAVING = ("/quit", "/exit", "/bye")
COMMANDS["/clear"], COMMANDS["/?"] = COMMANDS["/reset"], COMMANDS["/help"]
