"""The command line of scripts/convert_lora.py. It imports nothing that takes long, so that --help answers at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from sushi_research.config.arguments import Parser

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def parse(arguments: Sequence[str], description: str | None) -> argparse.Namespace:
    """Parses a command line; it ends the process for one that makes no sense."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_base(parser: argparse.ArgumentParser, text: str, required: bool = False) -> None:
        parser.add_argument("--base", metavar="BASE", required=required, help=text)
        parser.add_argument("--variant", metavar="NAME", help="the variant of a base in diffusers format, such as fp16")

    written, limited, based = (Parser(add_help=False) for _ in range(3))
    written.add_argument("--output", required=True, metavar="FILE", help="what to write; it must not exist")
    written.add_argument("--to", choices=("kohya", "peft"), help="its layout: kohya (the default), or peft (diffusers)")
    written.add_argument("--dtype", choices=tuple(DTYPES), help="its dtype (default: that of what is read)")
    limited.add_argument("--rank", type=int, metavar="R", help="reduce each layer to this rank at most")
    limited.add_argument("--conv-rank", type=int, metavar="R", help="the same for convolutions larger than 1x1")
    share = "reduce each layer to the lowest rank that keeps this share (0 to 1) of the squares of its change"
    limited.add_argument("--kept", type=float, metavar="SHARE", help=share)
    add_base(based, "the base; a DoRA needs it where its change is computed")

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text.capitalize() + ".", parents=[*parents])

    one = "an adapter file of any trainer"
    convert = add("convert", "writes an adapter in another layout or dtype", written, limited, based)
    convert.add_argument("adapter", help=one)
    merge = add("merge", "adds adapters, or merges them into a base", written, limited, based)
    merge.add_argument("adapters", nargs="+", metavar="adapter", help=one)
    merge.add_argument("--weights", nargs="+", type=float, metavar="W", help="what each is multiplied by (default: 1)")
    merge.add_argument("--into", metavar="BASE", help="write this base with the adapters merged into its weights")
    extract = add("extract", "writes the difference of two models as an adapter", written, limited)
    extract.add_argument("base", help="the model before its training")
    extract.add_argument("tuned", help="the model after it")
    extract.add_argument("--variant", metavar="NAME", help="the variant of models in diffusers format, such as fp16")
    extract.add_argument("--unet-only", action="store_true", help="leave out the text encoders")
    resize = add("resize", "writes an adapter with lower ranks", written, limited, based)
    resize.add_argument("adapter", help=one)
    inspect = add("inspect", "shows kind, ranks, alphas, norms, singular values and metadata", based)
    inspect.add_argument("adapter", help=one)
    inspect.add_argument("--picture", metavar="FILE", help="draw the norm of each block into this PNG file")
    verify = add("verify", "checks that an adapter fits a base, and what it would change")
    add_base(verify, "the base", required=True)
    verify.add_argument("adapter", help=one)
    if not arguments:
        parser.error(f"give a command, one of {', '.join(commands.choices)}: --help describes them")
    found = parser.parse_args(arguments)
    _require_sense(commands.choices[found.command], found)
    return found


def _require_sense(parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    """Ends the process with a sentence for options that make no sense together."""
    limits = [getattr(found, name, None) for name in ("rank", "conv_rank", "kept")]
    rank, conv_rank, kept = limits
    if found.command in ("resize", "extract") and rank is None and kept is None:
        parser.error("give --rank, --kept or both: how far it is reduced")
    if rank is not None and rank < 1:
        parser.error(f"--rank is {rank}: give 1 or more")
    lowest = 0 if found.command == "extract" else 1
    if conv_rank is not None and conv_rank < lowest:
        parser.error(f"--conv-rank is {conv_rank}: give {lowest} or more")
    if conv_rank is not None and rank is None and kept is None:
        parser.error("--conv-rank goes with --rank or --kept")
    if kept is not None and not 0 < kept <= 1:
        parser.error(f"--kept is {kept:g}: give a share above 0, at most 1")
    if found.command == "merge":
        found.weights = found.weights or [1.0] * len(found.adapters)
        if len(found.weights) != len(found.adapters):
            parser.error(
                f"--weights has {len(found.weights)} numbers for {len(found.adapters)} adapters: give one for each"
            )
        if not all(math.isfinite(weight) and weight for weight in found.weights):
            parser.error(
                "--weights holds a number that is not finite, or 0: leave out an adapter that shall have no effect"
            )
        if found.into is None and len(found.adapters) == 1 and found.weights == [1.0]:
            parser.error("one adapter with the weight 1 is that adapter: give more, another weight, or --into BASE")
        if found.into is not None and any(each is not None for each in (*limits, found.base, found.to, found.dtype)):
            parser.error(
                "--into writes a base in its own dtypes, so --rank, --conv-rank, --kept, --base, --to and --dtype do not go with it"
            )
