"""Which images are held out of training: by content alone, with near-duplicates on one side.

A near-duplicate is a resized, recompressed, brightened, slightly cropped or mirrored copy; turned and upside-down ones are
not found. A picture's fingerprint is its miniature, and two are compared by tangent distance (Simard, LeCun and Denker 1993):
how much of one is left over when all is taken away that contrast, a shift or a zoom could make of the other.

Measured on 185 photos (158 of them google/dreambooth's, of 30 subjects), 300 synthetic ones and 200 of the demo's 624 scenes,
with copies that had all of this done to them at once: 2-5 % of width and height cut off, resized 0.5-2 x, light and contrast within
10 %, JPEG of quality 30-90, half of them mirrored. Found were 97.8, 99.7 and 100 %; with one change that is not a cut, every
copy but 1 % of the scenes at 10 % more light and contrast, which burns out white; with 5 % cut off every side, 80, 57 and 40 %.
Hashes of 64 bits are blind to what tells drawings of one style apart: at a radius of 10, which finds 94 and 96 % of the photos'
copies, they chain 624 (dHash) and 594 (pHash) of the scenes into one group; here the largest has 10.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from sushi_research import randomness
from sushi_research.errors import UserError

# Pixels. A finer miniature tells more apart, but a cut must stay small against a pixel for the first order to do.
SIDE = 8
# The share of a miniature's variance that may be left over. Of the 17,020 pairs of photos 7 are nearer: six of one cartoon
# figure on white and one real copy. At 0.08 one copy in 60 of photos is missed more; at 0.12 photos of faces begin to merge.
RADIUS = 0.1
# JPEG's luma and chroma, the chroma doubled: drawings often differ in a colour alone (half as many scenes are near so).
LUMA_CHROMA = np.array([[0.299, 0.587, 0.114], [-0.3374, -0.6626, 1.0], [1.0, -0.8374, -0.1626]])
# Images compared with all others at once: 250 MB and 12 s for 10,000 images on one busy core.
BLOCK = 64
# Every run shares it: a split that followed the run's seed would train one run on what another is judged by.
SEED = 0


def fingerprint(pixels: np.ndarray) -> int:
    """What near-duplicates have nearly in common, of an RGB picture [height, width, 3] uint8 of any size.

    The int's bytes, big-endian, are the picture shrunk to [SIDE, SIDE, 3] by averaging, whatever its shape.
    """
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)
    miniature = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    return int.from_bytes(miniature.tobytes(), "big")


def near_duplicate_groups(fingerprints: Mapping[str, int]) -> list[list[str]]:
    """The images, given as content hash and `fingerprint`, in groups: copies of copies are together, most are alone.

    Every image is in exactly one group; groups and their members are sorted, whatever the order given. All pairs are
    compared, in bounded memory. A picture of a single colour is no copy of anything.
    """
    hashes = sorted(fingerprints)
    miniatures, mirrored, planes = _tangent_planes([fingerprints[image_hash] for image_hash in hashes])
    label = np.arange(len(hashes))
    for start in range(0, len(hashes), BLOCK):
        block = slice(start, start + BLOCK)
        for turned in (miniatures, mirrored):
            # Earlier columns had this block among their own columns.
            near = _is_near(planes[block], turned[start:])
            for row, found in enumerate(near, start):
                others = start + np.flatnonzero(found)
                others = others[label[others] != label[row]]
                # The other direction, as a near-flat picture is near to much that is not near to it. Mirroring is its
                # own inverse: a against b mirrored leaves over what a mirrored against b does.
                others = others[_is_near(planes[others], turned[row : row + 1])[:, 0]]
                label[np.isin(label, label[others])] = label[row]
    groups: dict[int, list[str]] = {}
    for image_hash, group in zip(hashes, label.tolist(), strict=True):
        groups.setdefault(group, []).append(image_hash)
    return list(groups.values())


def held_out(groups: Iterable[Iterable[str]], fraction: float) -> frozenset[str]:
    """The hashes of the images that are held out, of all images in groups (those of `near_duplicate_groups`).

    Each group has a number, uniform in [0, 1), made from its smallest hash, and is held out where that is below
    `fraction`: each image is with that probability, however large its group. So names, order and unrelated images do
    not matter, and a larger fraction holds out the same images and more. What can move between two runs is a group
    whose smallest hash changed: by a near-duplicate that was added or removed, or that joins two groups into one.

    Raises UserError when `fraction` is not within 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"The held-out fraction is {fraction}: give a share of the images between 0 and 1.")
    # Not the smallest of the members' own numbers: a large group would be held out more often than a single image.
    members = [sorted(group) for group in groups]
    chosen = (group for group in members if randomness.uniform(SEED, "held out", group[0]) < fraction)
    return frozenset(image_hash for group in chosen for image_hash in group)


def _tangent_planes(fingerprints: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N miniatures about their mean colour and the same mirrored, [N, D] float64, D = 3 SIDE^2, and planes [N, 4, D].

    A plane's rows are orthonormal, or zero where a picture has less structure. They span the miniature itself (so
    contrast costs nothing, as light costs nothing about the mean) and its first-order changes under a shift along
    either axis and a zoom, which is what a crop amounts to.
    """
    size = len(fingerprints)
    data = b"".join(value.to_bytes(3 * SIDE**2, "big") for value in fingerprints)
    pixels = np.frombuffer(data, np.uint8).reshape(size, SIDE, SIDE, 3).astype(np.float64)
    pixels = (pixels - pixels.mean(axis=(1, 2), keepdims=True)) @ LUMA_CHROMA.T
    down, right = np.gradient(pixels, axis=(1, 2))
    place = np.arange(SIDE) - (SIDE - 1) / 2
    zoom = down * place[:, None, None] + right * place[:, None]
    changes = np.stack([pixels, down, right, zoom], axis=1)
    changes -= changes.mean(axis=(2, 3), keepdims=True)
    _, lengths, planes = np.linalg.svd(changes.reshape(size, 4, 3 * SIDE**2), full_matrices=False)
    # Directions of no length but rounding are not the picture's.
    planes *= (lengths > 1e-9 * lengths[:, :1])[:, :, None]
    return pixels.reshape(size, 3 * SIDE**2), pixels[:, :, ::-1].reshape(size, 3 * SIDE**2), planes


def _is_near(planes: np.ndarray, miniatures: np.ndarray) -> np.ndarray:
    """Whether each of M miniatures [M, D] lies within RADIUS of each of N planes [N, 4, D]: bool [N, M]."""
    along = planes.reshape(-1, planes.shape[-1]) @ miniatures.T
    np.square(along, out=along)
    variance = np.square(miniatures).sum(axis=1)
    return variance - along.reshape(*planes.shape[:2], len(miniatures)).sum(axis=1) < RADIUS * variance
