"""The command line: its subcommands, and how mistakes are reported.

Nothing heavy is imported here: a subcommand's module imports mlx when it runs, so `--help`
is instant.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from redrafter_mlx import __version__, process

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
    return process.run(lambda: _invoke(arguments or ["--help"]))


def _invoke(arguments: list[str]) -> int:
    """Run what the arguments ask for, without typer's own ways to end a process.

    Raises:
        ValueError: an option or command that there is not, or an option's value.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("redrafter", list(arguments)) as context:
            result = command.invoke(context)
    except typer.Exit as left:  # --help
        return left.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.TyperException as error:
        raise ValueError(_message(error, arguments)) from None
    return result if isinstance(result, int) else 0


def _message(error: typer.TyperException, arguments: list[str]) -> str:
    text = error.format_message()
    if text.startswith("No such option") and arguments[0] in ("generate", "demo"):
        text += f" (a prompt that begins with a dash goes behind --: redrafter {arguments[0]} -- '- a list')"
    return text
