"""Converts, merges, extracts, resizes, inspects and verifies adapter (LoRA) files of any trainer.

    python scripts/convert_lora.py convert other.safetensors --output mine.safetensors                  # to kohya's layout
    python scripts/convert_lora.py merge a.safetensors b.safetensors --weights 1 0.5 --output both.safetensors
    python scripts/convert_lora.py merge a.safetensors --into BASE --output merged.safetensors
    python scripts/convert_lora.py extract BASE TUNED --rank 32 --output extracted.safetensors
    python scripts/convert_lora.py resize a.safetensors --kept 0.95 --output small.safetensors
    python scripts/convert_lora.py inspect a.safetensors --picture norms.png
    python scripts/convert_lora.py verify a.safetensors --base BASE

BASE and TUNED are a .safetensors file, a folder in diffusers format, or a hub id. What was written is read again, and its error
is printed. Nothing is overwritten. docs/convert.md describes what is exact and what is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sushi_research.adapters.tools import arguments as of_tools
from sushi_research.config.process import begin, run_main


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, parsed before any heavy import, so that --help and a mistyped option answer at once."""
    return of_tools.parse(arguments, __doc__)


if __name__ == "__main__":
    begin()
    ARGUMENTS = parse(sys.argv[1:])

import contextlib
import logging
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sushi_research import stopping
from sushi_research.adapters import bundled
from sushi_research.adapters.formats.writing import cast, write_entries
from sushi_research.adapters.tools import (
    convert,
    extracting,
    history,
    inspecting,
    into_base,
    kept_tokens,
    measuring,
    merging,
    outputs,
    spectrum,
    verifying,
)
from sushi_research.adapters.tools.base_weights import Weights, open_base
from sushi_research.adapters.tools.located import Entries, Located, each_entry, open_adapter
from sushi_research.adapters.tools.low_rank import Limit, change_of, summed, times
from sushi_research.errors import UserError
from sushi_research.files import remove, size_text, system_errors, write_atomic
from sushi_research.terminal import say
from sushi_research.user_files import expand_path

WIDTH = 23


@system_errors()
def main(arguments: argparse.Namespace) -> int:
    """Does what the subcommand says; returns 0."""
    # diffusers imports bitsandbytes, which warns about a missing kernel that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def kept() -> str:
        output = getattr(arguments, "output", None)
        if output is not None and os.path.exists(output):  # no command begins with one that exists
            return f"{output} is written and whole, and its error is not measured"
        return "nothing is written; the same command again starts over"

    with stopping.doing(f"working ({arguments.command})", kept):
        COMMANDS[arguments.command](arguments)
    return 0


def convert_adapter(arguments: argparse.Namespace) -> None:
    """Writes one adapter in another layout, and with a limit as low-rank pairs."""
    output = output_of(arguments)
    with base_of(arguments) as weights:
        [located] = open_all(arguments, [arguments.adapter], weights)
        limit = limit_of(arguments)
        entries = convert.reduce(located, limit, weights) if limit else located.matches
        write(arguments, output, [located], entries, weights, expected_of(located, weights))


def resize_adapter(arguments: argparse.Namespace) -> None:
    """Writes one adapter with lower ranks."""
    output = output_of(arguments)
    with base_of(arguments) as weights:
        [located] = open_all(arguments, [arguments.adapter], weights)
        limit = limit_of(arguments)
        assert limit is not None
        entries = convert.reduce(located, limit, weights)
        if all(entries[component][path] is entry for component, path, entry in each_entry(located.matches)):
            raise UserError(
                f"{located.path} has no rank above these (the largest is {convert.largest_rank(located.matches)}): give a lower "
                "--rank or --kept."
            )
        write(arguments, output, [located], entries, weights, expected_of(located, weights))


def merge_adapters(arguments: argparse.Namespace) -> None:
    """Adds adapters, or merges them into a base."""
    output = output_of(arguments)
    if arguments.into is not None:
        merge_into_base(arguments, output)
        return
    with base_of(arguments) as weights:
        located = open_all(arguments, arguments.adapters, weights)
        adapters = list(zip(located, arguments.weights, strict=True))
        entries = merging.merge(adapters, limit_of(arguments), weights)

        def expected(component: str, path: str) -> Any:
            parts = merging.parts_of(adapters, component, path)
            return summed([times(expected_of(each, weights)(component, path), factor) for each, factor in parts])

        write(arguments, output, located, entries, weights, expected)


def merge_into_base(arguments: argparse.Namespace, output: Path) -> None:
    """Writes a base with the adapters merged into its weights."""
    base = open_base(arguments.into, arguments.variant)
    outputs.require_kind(base, output)
    located = [open_adapter(path_of(name), base) for name in arguments.adapters]
    kept_tokens.require_none(located)
    adapters = list(zip(located, arguments.weights, strict=True))
    made = history.step(
        "merge into a base", output, [base.path.name, *(each.path for each in located)], settings_of(arguments)
    )
    into_base.merge_into(base, adapters, output, made)
    layers = len(into_base.changed_parameters(adapters))
    show([("written", f"{output}: {layers:,} tensors changed, each rounded once to the dtype of the base")])


def extract_adapter(arguments: argparse.Namespace) -> None:
    """Writes the difference of two models as an adapter."""
    output, limit = output_of(arguments), limit_of(arguments)
    assert limit is not None
    base, tuned = (open_base(name, arguments.variant) for name in (arguments.base, arguments.tuned))
    names = extracting.components_of(base, tuned, not arguments.unet_only)
    with Weights(base) as before, Weights(tuned) as after:
        found = extracting.extract(before, after, limit, names)

        def expected(component: str, path: str) -> Any:
            return extracting.difference(before, after, component, f"{path}.weight").flatten(1)

        write(arguments, output, [], found.entries, before, expected)
    show(
        ("left out", f"{kind} ({number:,}), norm {squares**0.5:.3g}")
        for kind, (number, squares) in found.left_out.items()
    )


def inspect_adapter(arguments: argparse.Namespace) -> None:
    """Shows what an adapter file holds."""
    path = path_of(arguments.adapter)
    picture = None if arguments.picture is None else outputs.new_file(arguments.picture, ".png", "--picture")
    facts: list[spectrum.LayerFacts] = []
    with base_of(arguments) as weights:
        show(inspecting.describe(path, weights, facts))
    if picture and not facts:
        raise UserError(f"--picture: there is no norm of {path} to draw (the note above says why).")
    if picture:
        write_atomic(picture, spectrum.picture(facts, path.name))
        show([("written", str(picture))])


def verify_adapter(arguments: argparse.Namespace) -> None:
    """Checks that an adapter fits a base, and what it would change."""
    path = path_of(arguments.adapter)
    with base_of(arguments) as weights:
        assert weights is not None
        show(verifying.verify(open_adapter(path, weights.base), weights))


COMMANDS = {
    "convert": convert_adapter,
    "merge": merge_adapters,
    "extract": extract_adapter,
    "resize": resize_adapter,
    "inspect": inspect_adapter,
    "verify": verify_adapter,
}


def write(
    arguments: argparse.Namespace,
    output: Path,
    sources: list[Located],
    entries: Entries,
    weights: Weights | None,
    expected: measuring.Expected,
) -> None:
    """Writes an adapter file, reads it again, and prints what it holds and its error."""
    base = weights.base if weights else None
    architecture = sources[0].architecture if sources else base.architecture
    layout = arguments.to or "kohya"
    inputs = [each.path for each in sources] or [Path(arguments.base).name, Path(arguments.tuned).name]
    made = history.step(arguments.command, output, inputs, settings_of(arguments))
    dtype = getattr(torch, of_tools.DTYPES[arguments.dtype]) if arguments.dtype else None
    tokens = bundled.by_key(kept_tokens.kept(sources, layout)) if sources else {}
    tokens = {key: cast(vectors, dtype or vectors.dtype, key) for key, vectors in tokens.items()}
    if dtype is None and not (
        sources and entries is sources[0].matches
    ):  # a file as it is keeps the dtype of each tensor
        dtype = convert.dtype_of(sources) if sources else torch.float16
    write_entries(
        output,
        architecture,
        entries,
        layout=layout,
        dtype=dtype,
        metadata=history.metadata_of(sources, made, architecture, entries, output, layout),
        layers_per_block=sources[0].layers_per_block if sources else base.layers_per_block,
        tokens=tokens,
    )
    try:
        written = open_adapter(output, base, architecture)
        errors = measuring.measure(written, expected, weights)
    except UserError:  # a file that exists is one that can be used
        remove(output)
        raise
    show([("written", f"{output}, {size_text(output.stat().st_size)}, {layout}'s layout")])
    if written.adapter.tokens:
        show([("new tokens", kept_tokens.line(written.adapter.tokens))])
    show([("rank", convert.ranks(written.matches))])
    show([("error", errors.line())])


def open_all(arguments: argparse.Namespace, names: Sequence[str], weights: Weights | None) -> list[Located]:
    """Opens the adapters of which one is made; UserError before any work if it cannot have their new tokens."""
    located = [open_adapter(path_of(name), weights and weights.base) for name in names]
    kept_tokens.kept(located, arguments.to or "kohya")
    return located


def expected_of(located: Located, weights: Weights | None) -> measuring.Expected:
    """The changes that a file makes; without the base's weights, those of a DoRA without its magnitude."""

    def expected(component: str, path: str) -> Any:
        entry = located.matches[component][path]
        if weights is None:
            return change_of(measuring.without_magnitude(entry), located.shapes[component][path])
        return convert.source_change(located, weights, component, path)

    return expected


@contextlib.contextmanager
def base_of(arguments: argparse.Namespace) -> Iterator[Weights | None]:
    """The base that --base names, opened; None without it."""
    if arguments.base is None:
        yield None
        return
    with Weights(open_base(arguments.base, arguments.variant)) as weights:
        yield weights


def limit_of(arguments: argparse.Namespace) -> Limit | None:
    """The limit that the options give; None without any."""
    if arguments.rank is None and arguments.kept is None:
        return None
    return Limit(arguments.rank, arguments.kept, arguments.conv_rank)


def settings_of(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """The options of a command that a file's history has: those that are given, without the names of files."""
    names = ("to", "dtype", "rank", "conv_rank", "kept", "weights", "unet_only")
    found = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in found.items() if value not in (None, False)}


def path_of(name: str) -> Path:
    """The adapter file that a word of the command line names."""
    return Path(expand_path(name, key="the adapter"))


def output_of(arguments: argparse.Namespace) -> Path:
    """The file (or folder) to write."""
    return outputs.new_file(arguments.output, "" if getattr(arguments, "into", None) else ".safetensors", "--output")


def show(lines: Iterable[tuple[str, str]]) -> None:
    """Prints lines with their titles, as scripts/inspect_model.py does."""
    for title, text in lines:
        wrapped = textwrap.wrap(text, 120 - WIDTH, break_on_hyphens=False) or [""]
        say(*(f"{'' if number else title:<{WIDTH}}{line}" for number, line in enumerate(wrapped)))


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
