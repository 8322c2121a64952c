"""Whether adapter files were trained on the images that they are about to be measured on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sushi_research.adapters.chosen_step import chosen_step
from sushi_research.adapters.trained_images import trained_on
from sushi_research.data.samples import Sample
from sushi_research.errors import UserError, some


def require_unseen(
    adapters: Sequence[str],
    samples: Sequence[Sample],
    source: str,
    source_hash: Callable[[], str | None],
    options: str = "--data.path or --evaluation.path",
    advice: str | None = None,
) -> dict[str, bool]:
    """Adapter -> whether it is known that it was trained on none of `samples`.

    `source` is where the samples are from, `options` are those that give others, or `advice` is all that is said of it, and
    `source_hash` gives the dataset hash of all that is there, for files that do not record all their images. UserError for a file
    that was trained on some of them.
    """
    names = {sample.image_hash: sample.name for sample in samples}
    advice = (
        advice or f"give images that it has not seen ({options}), or the config.yaml of its run if that held some out"
    )
    known = {}
    for adapter in adapters:
        file = trained_on(Path(adapter))
        seen = file.seen(names.keys())
        if seen:
            raise UserError(
                f"the adapter {adapter} was trained on {len(seen)} of the {len(names)} images of {source} "
                f"({some(sorted(names[image] for image in seen), 3)}): {advice}."
            )
        if not file.is_complete and file.dataset_hash is not None and file.dataset_hash == source_hash():
            raise UserError(f"the adapter {adapter} was trained on the images of {source}: {advice}.")
        known[adapter] = file.is_complete
    return known


def chosen_on(adapters: Sequence[str], set_hash: str, image_hashes: Collection[str]) -> list[str]:
    """A sentence for each adapter whose step was chosen on these images, or on this validation set."""
    found = {adapter: chosen_step(Path(adapter)) for adapter in adapters}
    return [
        f"  {adapter}: {chosen.describe()}, whose images are among these, so its loss on them is too low to be tested: "
        "compare_runs.py excludes it"
        for adapter, chosen in found.items()
        if chosen and chosen.is_of(set_hash, image_hashes)
    ]


def may_have_seen(adapter: str, images: Collection[str]) -> bool:
    """Whether a file was trained on the images with these hashes, or does not say all that it was trained on."""
    file = trained_on(Path(adapter))
    return not file.is_complete or len(file.seen(images) or ()) == len(set(images))


def describe(known: dict[str, bool]) -> list[str]:
    """What is known about each adapter, a line each."""
    yes = "trained on none of them, by the image hashes in the file"
    no = "not known whether it was trained on them, because the file does not say"
    return [f"  {adapter}: {yes if unseen else no}" for adapter, unseen in known.items()]
