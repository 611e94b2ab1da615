"""The command line: its subcommands, and how mistakes are reported.

Nothing heavy is imported here: a subcommand's module imports mlx when it runs, so `--help`
is instant.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from redrafter_mlx import __version__

from .bench import bench
from .chat import chat
from .demo import demo
from .generate import generate
from .train import train
from .tune import tune

app = typer.Typer(
    name="redrafter",
    help="Language models that decode faster and say the same: recurrent drafting for MLX.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (chat, generate, demo, train, tune, bench):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"redrafter {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details to stderr.")] = False,
) -> None:
    """Options that come before the subcommand."""
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("redrafter_mlx").setLevel(level)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0 on success and 2 after a mistake of the user or in a file."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        result = app(args=arguments or ["--help"], prog_name="redrafter", standalone_mode=False)
    except typer.TyperException as error:
        return _mistake(error.format_message())
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            _silence_stdout()
            return 0  # the reader, `head` say, has seen enough
        return _mistake(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def _mistake(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _silence_stdout() -> None:
    """Keep the interpreter from complaining about the closed pipe when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
