"""How large the changes of an adapter are and how many directions they need: by block, as lines and as a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sushi_research.adapters.entries import LowRank
from sushi_research.adapters.tools.base_weights import Weights
from sushi_research.adapters.tools.convert import source_change
from sushi_research.adapters.tools.located import Located, each_entry
from sushi_research.adapters.tools.low_rank import Factors, change_of, needs_weight, norm, rank_for, spectrum
from sushi_research.models.components import TITLES
from sushi_research.progress import progress

# The shares of a change's squared norm for which the needed rank is given.
SHARES = (0.9, 0.99)
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(?:attentions|resnets)\.(\d+)\.")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.")
_TEXT = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LayerFacts:
    """The change of one layer: the Frobenius norm, the largest singular value, and the lowest rank that keeps each of SHARES, of
    low-rank pairs; None for what is not computed of other kinds."""

    component: str
    block: str
    path: str
    norm: float
    rank: int | None
    largest: float | None
    needed: tuple[int, ...] | None


def facts_of(located: Located, weights: Weights | None = None) -> list[LayerFacts]:
    """The facts about each layer's change; without the base's weights those of a DoRA are left out."""
    found = []
    layers = [*each_entry(located.matches)]
    for component, path, entry in progress(layers, description="singular values", unit="layer", leave=False):
        if needs_weight(entry) and weights is None:
            continue
        change = (
            source_change(located, weights, component, path)
            if needs_weight(entry)
            else change_of(entry, located.shapes[component][path])
        )
        rank, largest, needed = None, None, None
        if isinstance(change, Factors) and change.is_small and isinstance(entry, LowRank):
            values = spectrum(change).values
            rank, largest = entry.rank, float(values[0])
            needed = tuple(rank_for(values, share) for share in SHARES)
        found.append(LayerFacts(component, block_of(component, path), path, norm(change), rank, largest, needed))
    return found


def block_of(component: str, path: str) -> str:
    """The block of a layer, in the words of the lines and the picture."""
    if component != "unet":
        match = _TEXT.match(path)
        return f"layer {match[1]}" if match else "end"
    if match := _BLOCK.match(path):
        return f"{match[1]} {match[2]}.{match[3]}"
    if match := _SAMPLER.match(path):
        return f"{match[1]} {match[2]} sampler"
    if path.startswith("mid_block."):
        return "mid"
    return "out" if path.startswith("conv_norm_out") or path.startswith("conv_out") else "in"


def by_block(facts: Sequence[LayerFacts]) -> dict[tuple[str, str], list[LayerFacts]]:
    """The layers of each block, in the order of the network."""
    found: dict[tuple[str, str], list[LayerFacts]] = {}
    for each in sorted(facts, key=lambda each: (each.component != "unet", each.component, _order(each))):
        found.setdefault((each.component, each.block), []).append(each)
    return found


def _order(each: LayerFacts) -> tuple[int, list[int]]:
    numbers = [int(number) for number in re.findall(r"\d+", each.block)]
    place = ["in", "down", "mid", "up", "out", "layer", "end"].index(each.block.partition(" ")[0])
    # A sampler comes after the layers of its block.
    return place, [*numbers, 99] if each.block.endswith("sampler") else numbers


def total_norm(facts: Sequence[LayerFacts]) -> float:
    """The norm of all changes together."""
    return sum(each.norm**2 for each in facts) ** 0.5


def lines(facts: Sequence[LayerFacts]) -> Iterator[tuple[str, str]]:
    """(title, text) of what is shown: the norms, the needed ranks, and a line for each block."""
    if not facts:
        return
    whole = total_norm(facts)
    for component in dict.fromkeys(each.component for each in facts):
        own = [each for each in facts if each.component == component]
        largest = max(own, key=lambda each: each.norm)
        yield (
            # The first column is narrow.
            f"change, {'text encoder 2' if component == 'text_encoder_2' else TITLES[component]}",
            f"norm {total_norm(own):.4g}, the largest of a layer {largest.norm:.4g} ({largest.path})",
        )
    if pairs := [each for each in facts if each.needed]:
        for number, share in enumerate(SHARES):
            yield f"rank for {share:.0%}", _spread([each.needed[number] for each in pairs if each.needed], pairs)
        top = max(pairs, key=lambda each: each.largest or 0)
        yield "largest singular value", f"{top.largest:.4g} ({top.path})"
    for (component, block), own in by_block(facts).items():
        share = (total_norm(own) / whole) ** 2 if whole else 0.0
        needed = [each.needed[0] for each in own if each.needed]
        ranks = f", rank for {SHARES[0]:.0%}: {_middle(needed):g}" if needed else ""
        yield (
            f"  {_short(component)} {block}",
            f"norm {total_norm(own):.3g}, {share:.1%} of the squares{ranks} ({len(own):,} layer{'s'[: len(own) > 1]})",
        )


def picture(facts: Sequence[LayerFacts], title: str) -> bytes:
    """A PNG file: the norm of the change of each block, one bar each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sushi_research.errors import printable
    from sushi_research.sampling import plots

    blocks = by_block(facts)
    figure: Any = Figure(figsize=(max(6.0, 1.5 + 0.28 * len(blocks)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    components = list(dict.fromkeys(component for component, _ in blocks))
    for number, component in enumerate(components):
        places = [place for place, (own, _) in enumerate(blocks) if own == component]
        heights = [total_norm(layers) for (own, _), layers in blocks.items() if own == component]
        axes.bar(places, heights, color=f"C{number}", label=TITLES[component])
    axes.set_xticks(range(len(blocks)), [block for _, block in blocks], rotation=90, fontsize=8)
    axes.margins(x=0.01)
    axes.set_ylabel("norm of the change", fontsize=9)
    axes.set_title(printable(title), fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return plots.figure_png(figure)


def _short(component: str) -> str:
    return {"unet": "UNet", "text_encoder": "text", "text_encoder_2": "text 2"}[component]


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _spread(values: Sequence[int], pairs: Sequence[LayerFacts]) -> str:
    ranks = {each.rank for each in pairs}
    of = f" of {ranks.pop()}" if len(ranks) == 1 else ""
    return f"{_middle(values)}{of} in the middle, {min(values)} to {max(values)}"
