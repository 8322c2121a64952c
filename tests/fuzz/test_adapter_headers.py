"""Adapter files with headers and tensors that no trainer writes: one sentence, little memory, and nothing is written."""

import itertools
import math
import struct

import pytest

from testing.fuzz import adapter_files, tensor_files, worker
from testing.fuzz.readers import READERS

READER = next(reader for reader in READERS if reader.name == "adapters")
LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP, ALPHA = (f"{LAYER}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
ONE = struct.pack("<f", 1.0)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    adapter_files.make_adapters(folder)
    return folder


@pytest.fixture
def outcome(template, tmp_path):
    """What the reader does with the bytes of a file: ("accepted" or "refused", "") or ("failed", why)."""
    return lambda data: worker.attempt(READER, template, tmp_path / "input", "kohya.safetensors", data)


def pair(rank=2, size=8, dtype="F32", value=ONE):
    return {DOWN: (dtype, [rank, size], value * rank * size), UP: (dtype, [size, rank], value * rank * size)}


def header(**changes):
    """A file whose header has other offsets, dtypes or shapes than its bytes: by the part of the name."""
    data = tensor_files.joined(pair())
    entries, body = tensor_files.parse(data)
    for part, change in changes.items():
        entries[f"{LAYER}.lora_{part}.weight"] |= change
    return tensor_files.with_header(entries, body)


HEADERS = {
    "overlapping offsets": header(up={"data_offsets": [0, 64]}),
    "half overlapping offsets": header(up={"data_offsets": [32, 96]}),
    "negative offsets": header(down={"data_offsets": [-64, 0]}),
    "reversed offsets": header(down={"data_offsets": [64, 0]}),
    "offsets beyond the file": header(up={"data_offsets": [64, 2**62]}),
    "offsets of 2^64": header(up={"data_offsets": [2**64 - 64, 2**64]}),
    "offsets that are no integers": header(up={"data_offsets": [64.0, "128"]}),
    "a gap": header(up={"data_offsets": [80, 128]}),
    "a shape of more elements than bytes": header(down={"shape": [2, 2**40]}),
    "a shape whose product overflows": header(down={"shape": [2**33, 2**33]}),
    "negative sizes": header(down={"shape": [-2, -8]}),
    "an unknown dtype": header(down={"dtype": "F4"}),
    "sixty dimensions": header(down={"shape": [*[1] * 58, 2, 8]}),
}
TENSORS = {
    "NaN": pair(value=struct.pack("<f", math.nan)),
    "infinity": pair(value=struct.pack("<f", -math.inf)),
    "complex": pair(dtype="C64", value=ONE * 2),
    "integers": pair(dtype="I32", value=struct.pack("<i", 3)),
    "booleans": pair(dtype="BOOL", value=b"\1"),
    "rank 0": pair(rank=0),
    "a scalar": {DOWN: ("F32", [], ONE), UP: ("F32", [], ONE)},
    "an alpha that is complex": pair() | {ALPHA: ("C64", [], ONE * 2)},
    "an alpha of NaN": pair() | {ALPHA: ("F32", [], struct.pack("<f", math.nan))},
    "an alpha of a million numbers": pair() | {ALPHA: ("F32", [10**6], ONE * 10**6)},
    "an alpha of no number": pair() | {ALPHA: ("F32", [0], b"")},
    "a layer of a million inputs and outputs": {
        DOWN: ("F32", [1, 10**6], ONE * 10**6),
        UP: ("F32", [10**6, 1], ONE * 10**6),
    },
    "a LoKr of a million inputs and outputs": {
        f"{LAYER}.lokr_{part}": ("F32", [1000, 1000], ONE * 10**6) for part in ("w1", "w2")
    },
    "a LoHa of a million inputs and outputs": {
        f"{LAYER}.hada_w{number}_{side}": ("F32", [10**6, 1] if side == "a" else [1, 10**6], ONE * 10**6)
        for number, side in itertools.product("12", "ab")
    },
    "a LoHa of scalars": {f"{LAYER}.hada_w{number}_{side}": ("F32", [], ONE) for number in "12" for side in "ab"},
    "a Tucker core of 2^20": pair() | {f"{LAYER}.lora_mid.weight": ("F32", [2, 2, 2**9, 2**9], ONE * 2**20)},
    "keys of many modules": {f"{DOWN.replace('_q', f'_q{number}')}": ("F32", [1], ONE) for number in range(20_000)},
    "many parts of one module": {f"{LAYER}.part{number}": ("F32", [1], ONE) for number in range(20_000)},
    "a name of a megabyte": {"lora_unet_" + "x" * 2**20 + ".alpha": ("F32", [], ONE)},
    "a name without letters": {"": ("F32", [], ONE)} | pair(),
}


@pytest.mark.parametrize("what", [*HEADERS, *TENSORS])
def test_a_hostile_file_is_refused_in_one_sentence(outcome, what):
    data = HEADERS[what] if what in HEADERS else tensor_files.joined(TENSORS[what])
    assert outcome(data) == ("refused", "")


def test_an_absurd_rank_is_read_in_the_memory_of_its_file(outcome):
    """A rank above the layer's size is no fault by itself; 2 x 32 MiB of matrices."""
    assert outcome(tensor_files.joined(pair(rank=2**20))) == ("accepted", "")


def test_sound_files_are_accepted(outcome, template):
    for path in sorted(template.iterdir()):
        assert outcome(path.read_bytes()) == ("accepted", ""), path.name
