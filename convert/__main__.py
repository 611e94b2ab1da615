"""Command `redrafter-convert`; in the checkout `python -m convert`."""

from __future__ import annotations

from redrafter_mlx import (
    process,
)  # first, for Ctrl-C during the imports; and it loads a faster BLAS before mlx

# isort: split
import argparse
import sys
from pathlib import Path
from typing import NoReturn

_DTYPES = ("float32", "float16", "bfloat16")


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="redrafter-convert",
        description="Convert checkpoints for redrafter.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    drafter = commands.add_parser(
        "drafter", help="a recurrent drafter, a speculator or heads -> a drafter folder"
    )
    drafter.add_argument("src", metavar="SRC", help="folder, file of weights, or owner/name on Hugging Face")
    drafter.add_argument("--target", help="model it drafts for: checked, and recorded in the config")
    drafter.add_argument(
        "--verify", metavar="TARGET",
        help="as --target, and decode a few prompts first: nothing accepted is an error",
    )  # fmt: skip
    drafter.add_argument(
        "--activation", choices=("silu", "linear"), default="silu",
        help="activation of the RNN: silu as in Apple's training (default), linear as in TensorRT-LLM",
    )  # fmt: skip

    target = commands.add_parser("target", help="a Hugging Face checkpoint or a GGUF -> an mlx-lm folder")
    target.add_argument("src", metavar="SRC", help="folder, .gguf file, or owner/name on Hugging Face")
    how = target.add_mutually_exclusive_group()
    how.add_argument("--quantize", "-q", action="store_true", help="quantize the weights")
    how.add_argument("--dequantize", "-d", action="store_true", help="unpack quantized weights")
    target.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="bits per weight with --quantize (default 4)"
    )
    target.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help="weights per scale with --quantize (default 64)"
    )

    export = commands.add_parser("export", help="a drafter folder -> Apple's format, with a full head")
    export.add_argument("src", metavar="DIR", help="drafter folder")
    export.add_argument("--target", help="model it drafts for; required for a factored head")

    for command in (drafter, target, export):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
        command.add_argument(
            "--dtype", choices=_DTYPES, help="dtype of weights that are not quantized (default: as stored)"
        )
        command.add_argument(
            "--force", action="store_true", help="replace the model in a folder that is not empty"
        )

    info = commands.add_parser("info", help="describe a checkpoint")
    info.add_argument("src", metavar="SRC", help="folder, file, or owner/name on Hugging Face")
    info.add_argument("--target", help="model a drafter is for: say what drafting costs on this machine")

    verify = commands.add_parser("verify", help="decode a few prompts: does a drafter draft for a target?")
    verify.add_argument("src", metavar="SRC", help="drafter: folder, file, or owner/name on Hugging Face")
    verify.add_argument("--target", required=True, help="model that it is to draft for")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    """Run a command. Only what it needs is imported, so that --help is instant."""
    if arguments.command == "info":
        from .info import describe

        _print(describe(arguments.src, arguments.target))
        return
    if arguments.command == "verify":
        from .verify import verify_source

        _print(verify_source(arguments.src, arguments.target).lines())
        return
    if arguments.command == "target":
        _run_target(arguments)
    elif arguments.command == "drafter":
        _run_drafter(arguments)
    else:
        from .export import ExportOptions, export_drafter

        options = ExportOptions(arguments.target, arguments.dtype, arguments.force)
        export_drafter(arguments.src, arguments.out, options, _report)
    print(arguments.out)


def _print(lines: dict[str, str]) -> None:
    for label, text in lines.items():
        print(f"{label}: {text}")


def _run_drafter(arguments: argparse.Namespace) -> None:
    from .drafter import DrafterOptions, convert_drafter

    target = arguments.target
    if arguments.verify is not None:
        if target not in (None, arguments.verify):
            raise ValueError(f"--verify {arguments.verify} and --target {target} must name the same model")
        target = arguments.verify

    def approve(folder: Path) -> None:
        if arguments.verify is not None:
            from .verify import verify_folder

            for label, text in verify_folder(folder, target, arguments.src).lines().items():
                _report(f"{label}: {text}")

    options = DrafterOptions(arguments.activation, target, arguments.dtype, arguments.force)
    convert_drafter(arguments.src, arguments.out, options, _report, approve)


def _run_target(arguments: argparse.Namespace) -> None:
    for name in ("bits", "group_size"):
        if getattr(arguments, name) is not None and not arguments.quantize:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} needs --quantize")
    from .target import TargetOptions, convert_target

    options = TargetOptions(
        bits=(arguments.bits or 4) if arguments.quantize else 0,
        group_size=arguments.group_size or 64,
        dequantize=arguments.dequantize,
        dtype=arguments.dtype,
        force=arguments.force,
    )
    convert_target(arguments.src, arguments.out, options, _report)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0 on success and 2 after a mistake of the user or in a file."""

    def command() -> int:
        _run(_parser().parse_args(argv))
        return 0

    return process.run(command, interrupted="interrupted, nothing was written")


if __name__ == "__main__":
    sys.exit(main())
