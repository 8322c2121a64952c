"""How the images of a set are fitted to buckets, as a config says, and what is said of those that do not fit well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sushi_research.config import TrainingConfig
from sushi_research.config.sets import ResolvedSet
from sushi_research.data.buckets import (
    HEIGHT,
    RESIZED_HEIGHT,
    RESIZED_WIDTH,
    WIDTH,
    BucketRule,
    Fitting,
    distortion,
)
from sushi_research.data.findings import LARGE_CROP
from sushi_research.data.items import make_items, once_each
from sushi_research.data.samples import Samples
from sushi_research.data.scan import Crop, Problems, Scan
from sushi_research.errors import some


def drop_too_small(scan: Scan, fitting: Fitting) -> None:
    """Makes a problem of each sample that fits no bucket, and records which lose or are squeezed much.

    A note says which samples are too small for one of several resolutions.
    """
    samples = replace(Samples.of(scan.samples), sets=np.zeros(len(scan.samples), np.int16))
    items, too_small = make_items(replace(samples, repeats=np.ones(len(samples), np.int32)), [fitting])
    fits = np.bincount(items.rows, minlength=len(samples))
    if too_small:
        scan.samples = Samples.of(scan.samples).take(fits > 0)
        scan.problems = Problems.of(scan.problems, too_small)
    if fewer := np.flatnonzero((fits > 0) & (fits < len(fitting.rules))).tolist():
        names = some([samples.names[row].as_py() for row in fewer[:3]] + [""] * (len(fewer) - 3), 3)
        resolutions = ", ".join(str(rule.resolution) for rule in fitting.rules)
        scan.notes.append(f"too small for one of the resolutions {resolutions}, and used at the others: {names}")
    items = once_each(items)
    columns = items.geometries.astype(np.float64).T
    if fitting.crop == "none":
        stretched = distortion(items.geometries)
        much = np.flatnonzero(stretched > LARGE_CROP)
        order = much[np.argsort(-stretched[much], kind="stable")].tolist()
        if order:
            worst = [f"{samples.names[int(items.rows[at])].as_py()} ({stretched[at]:.0%})" for at in order[:3]]
            more = f" and {len(order) - 3} more" if len(order) > 3 else ""
            scan.notes.append(f"squeezed by more than {LARGE_CROP:.0%} to fit a bucket: {', '.join(worst)}{more}")
        return
    if fitting.crop == "box":
        return  # what is cut away was asked for
    lost = 1 - columns[HEIGHT] * columns[WIDTH] / (columns[RESIZED_HEIGHT] * columns[RESIZED_WIDTH])
    crops = [
        Crop(
            samples.names[int(items.rows[at])].as_py(),
            round(float(lost[at]), 3),
            "x".join(str(int(items.geometries[at, side])) for side in (WIDTH, HEIGHT)),
        )
        for at in np.flatnonzero(lost > LARGE_CROP).tolist()
    ]
    scan.cropped = sorted(crops, key=lambda crop: (-crop.lost, crop.name))


def bucket_rule(config: TrainingConfig, resolution: int | None = None, upscale: bool | None = None) -> BucketRule:
    """The bucket rule of a config: that of data.resolution, or of another resolution of a set."""
    resolution = resolution or config.data.resolution
    return BucketRule(
        resolution=resolution,
        step=config.data.bucket_step,
        min_side=config.data.bucket_min_side or resolution // 2,
        max_side=config.data.bucket_max_side or resolution * 2,
        upscale=config.data.upscale if upscale is None else upscale,
    )


def fitting_of(config: TrainingConfig, each: ResolvedSet | None) -> Fitting:
    """How the images of a set are fitted to buckets; of None, images that are in no set (`evaluation.path`), as `data` says."""
    data = config.data
    resolutions = each.resolutions if each else data.resolutions or (data.resolution,)
    shared = each or data
    rules = tuple(bucket_rule(config, side, shared.upscale) for side in sorted(set(resolutions)))
    return Fitting(rules, shared.crop, shared.crops if shared.crop == "random" else 1)
