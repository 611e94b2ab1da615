"""`redrafter chat` at a terminal of 40 columns: a pseudo-terminal on one side, a terminal emulator on the other."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyte
import pytest

from tests.cases.models import CONFIG, edit_config, edit_weights, successor_model, vocabulary

# isort: split
import mlx.core as mx

ROOT = Path(__file__).parent.parent
COLUMNS, ROWS = 40, 30

pytestmark = pytest.mark.slow


class Terminal:
    """A running chat and the screen it writes on."""

    def __init__(self, cache: Path, *arguments: object) -> None:
        self._screen = pyte.HistoryScreen(COLUMNS, ROWS, history=1000, ratio=1)
        self._stream, self._lock, self.raw = pyte.ByteStream(self._screen), threading.Lock(), b""
        master, slave = pty.openpty()
        self._master = master
        self.resize(COLUMNS, ROWS)
        # A terminal says where its cursor is when it is asked.
        self._screen.write_process_input = lambda data: os.write(master, data.encode())
        environment = {
            **os.environ, "TERM": "xterm-256color", "REDRAFTER_CACHE": str(cache)
        }  # fmt: skip
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apps", "chat", *map(str, arguments)], cwd=ROOT, env=environment,
            stdin=slave, stdout=slave, stderr=slave, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(slave)
        threading.Thread(target=self._read, daemon=True).start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        with self._lock:
            self._screen.resize(rows, columns)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:
                return
            with self._lock:
                self.raw += data
                self._stream.feed(data)

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def screen(self) -> str:
        with self._lock:
            return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def wait(self, what: Callable[[str], bool]) -> str:
        """The screen once it is as wanted."""
        end = time.monotonic() + 180
        while time.monotonic() < end:
            screen = self.screen()
            if what(screen):
                return screen
            time.sleep(0.02)
        raise AssertionError(f"the screen stays\n{self.screen()}")

    def say(self, text: str, answer: str) -> str:
        """Type a message and wait until the prompt comes back below the answer."""
        self.send(text + "\r")
        return self.wait(
            lambda screen: answer in screen[max(0, screen.rfind(text.split("\r")[-1])) :] and _asks(screen)
        )

    def close(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        return self.process.wait()


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _asks(screen: str) -> bool:
    """Whether the last prompt is empty, with only the toolbar below it."""
    lines = [line for line in screen.splitlines() if line.strip()]
    return any(line.strip() == ">" for line in lines[-3:])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers "abc." to everything."""
    return successor_model(tmp_path_factory.mktemp("model") / "abc")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says "abc. abc. abc. " for ever."""
    folder, names = successor_model(tmp_path_factory.mktemp("endless") / "abc"), vocabulary()

    def change(weights: dict[str, mx.array]) -> None:
        output = np.array(weights["lm_head.weight"])
        for last, following in ((".", "Ġ"), ("Ġ", "a")):
            output[:, names.index(last)] = 0
            output[names.index(following), names.index(last)] = 1
        weights["lm_head.weight"] = mx.array(output)

    assert CONFIG["max_position_embeddings"] < 100_000
    return edit_config(edit_weights(folder, change), max_position_embeddings=100_000)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def make(*arguments: object) -> Terminal:
        opened.append(Terminal(tmp_path / "cache", *arguments, "--temperature", 0))
        return opened[-1]

    yield make
    for terminal in opened:
        terminal.close()


def test_three_turns_saved_and_picked_up(
    model: Path, terminals: Callable[..., Terminal], tmp_path: Path
) -> None:
    chat = terminals("-m", model)
    words = chat.wait(_asks).split()
    chat.wait(lambda screen: "draft auto, temperature 0" in screen.splitlines()[-1])  # the toolbar
    assert {"/help", "answer,", "Ctrl-D", "leaves"} <= set(words), "notes break between words"
    chat.say("hello", "abc.")
    chat.say("more", "reused")
    chat.say("\x1b[200~two\rpasted lines\x1b[201~", "reused")
    chat.say("/stats", "generated_tokens: 5")
    path = tmp_path / "talk.json"
    chat.say(f"/save {path}", "saved in")
    said = [message["content"] for message in json.loads(path.read_text())["messages"]]
    assert said == ["hello", "abc.", "more", "abc.", "two\npasted lines", "abc."]
    chat.say("/reset", "forgotten")
    chat.say(f"/load {path}", "3 exchanges")
    chat.say("/retry", "abc.")
    chat.send("/he\t")
    chat.wait(lambda screen: "> /help" in screen)
    chat.send("\r")
    chat.wait(lambda screen: "as with Alt-Enter" in " ".join(screen.split()) and _asks(screen))
    chat.send("/quit\r")
    assert chat.process.wait(60) == 0

    again = terminals("-m", model, "--resume")
    again.wait(lambda screen: "3 exchanges" in screen and _asks(screen))
    again.send("\x1b[A\x1b[A\x1b[A")  # the history of the run before
    again.wait(lambda screen: "> /retry" in screen)
    again.send("\x15/bye\r")
    assert again.process.wait(60) == 0
    assert b"Traceback" not in chat.raw + again.raw


def test_ctrl_c_stops_an_answer_and_twice_at_the_prompt_leaves(
    endless: Path, terminals: Callable[..., Terminal]
) -> None:
    chat = terminals("-m", endless, "--max-tokens", 90_000)
    chat.wait(_asks)
    chat.send("go\r")
    screen = chat.wait(lambda screen: screen.count("abc.") > 40)
    *whole, _ = [line.split() for line in screen.splitlines() if line.startswith("abc. abc.")]
    assert len(whole) > 3 and all(set(words) == {"abc."} for words in whole), "lines break between words"
    live = chat.wait(lambda screen: "tokens/s" in screen.splitlines()[-1])
    assert live.splitlines()[-1].split()[0].isdigit(), "the figures stand in the last row alone"
    chat.resize(30, 20)
    chat.wait(lambda screen: len(screen.splitlines()) == 20 and "tokens," in screen.splitlines()[-1])
    chat.send("\x03")
    chat.wait(lambda screen: "stopped" in screen and _asks(screen))
    chat.send("\x03")
    chat.wait(lambda screen: "Ctrl-C again or" in screen and _asks(screen))
    assert chat.process.poll() is None, "one Ctrl-C does not leave"
    chat.send("\x03")
    assert chat.process.wait(60) == 0
    assert b"Traceback" not in chat.raw
