"""Command `redrafter-convert`; in the checkout `python -m convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import redrafter_mlx  # loads a faster BLAS before mlx  # noqa: F401

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
    return parser


def _run(arguments: argparse.Namespace) -> None:
    """Run a command. Only what it needs is imported, so that --help is instant."""
    if arguments.command == "info":
        from .info import describe

        for label, text in describe(arguments.src).items():
            print(f"{label}: {text}")
        return
    if arguments.command == "target":
        _run_target(arguments)
    else:
        from .drafter import DrafterOptions, ExportOptions, convert_drafter, export_drafter

        common = {"target": arguments.target, "dtype": arguments.dtype, "force": arguments.force}
        if arguments.command == "drafter":
            options = DrafterOptions(activation=arguments.activation, **common)
            convert_drafter(arguments.src, arguments.out, options, _report)
        else:
            export_drafter(arguments.src, arguments.out, ExportOptions(**common), _report)
    print(arguments.out)


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
    try:
        _run(_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
