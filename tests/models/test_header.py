"""The header of a .safetensors file: what is accepted is as safetensors says, what is refused is one sentence."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from single_files import BITS

from sushi_research.errors import UserError
from sushi_research.models.header import MAX_HEADER, PICKLES, Header, Tensor, read_header, require_safetensors


def entry(dtype="U8", shape=(2,), offsets=(0, 2), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def packed(header: bytes | str | dict, data: bytes = b"") -> bytes:
    header = json.dumps(header) if isinstance(header, dict) else header
    header = header.encode() if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + data


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and message.endswith(".")
    return message


def agrees(path: Path) -> Header:
    """Our reading of a sound file, after a comparison with safetensors' own."""
    header = read_header(path)
    with safe_open(path, "numpy") as theirs:
        assert set(theirs.keys()) == set(header.tensors)
        assert (theirs.metadata() or {}) == header.metadata
        for name, tensor in header.tensors.items():
            view = theirs.get_slice(name)
            assert (view.get_dtype(), tuple(view.get_shape())) == (tensor.dtype, tensor.shape)
            assert 8 < tensor.begin <= tensor.end <= path.stat().st_size
            assert 8 * (tensor.end - tensor.begin) == math.prod(tensor.shape) * BITS[tensor.dtype]
    return header


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a file under one name over and over, as a fuzz test needs it."""
    path = tmp_path_factory.mktemp("headers") / "model.safetensors"
    return lambda content: (path.write_bytes(content), path)[1]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "ss_tags": json.dumps({"a": {"\u00e9\n": 1}})}])
def test_what_save_file_writes(tmp_path, metadata):
    path = tmp_path / "MODEL.SAFETENSORS"
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"layers.{i}.weight": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"v_pred": torch.tensor([]), "alpha": torch.tensor(4.0), "none": torch.zeros(0, 3), "": torch.ones(1)}
    save_file(tensors, path, metadata=metadata)
    header, content = agrees(path), path.read_bytes()
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert content[found.begin : found.end] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert list(header.tensors.values()) == sorted(header.tensors.values(), key=lambda tensor: tensor.begin)


def test_every_dtype_of_safetensors_is_known(write):
    with pytest.raises(SafetensorError) as caught, safe_open(write(packed({"a": entry("X")})), "numpy"):
        pass
    assert set(re.findall("`(\\w+)`", str(caught.value))) - {"X"} == set(BITS)
    for dtype, bits in BITS.items():
        agrees(write(packed({"a": entry(dtype, [4], [0, bits // 2])}, bytes(bits // 2))))


def test_unusual_but_sound(write):
    nothing = entry(shape=[0], offsets=[0, 0])
    for header, size in (
        ("{}", 0),
        ('  {"__metadata__": {}}\n \t', 0),
        ({"b": entry(offsets=[2, 4]), "a": entry()}, 4),
        ({"z": entry(shape=[0], offsets=[2, 2]), "a": entry(), "b": entry(offsets=[2, 4])}, 4),
        ({"v_pred": nothing, "ztsnr": nothing}, 0),
        ({"odd": entry(shape=[1], offsets=[0, 1]), "off its alignment": entry("F64", [], [1, 9])}, 9),
        ({"\U0001f363\n\x00": entry(shape=[1] * 100, offsets=[0, 1])}, 1),
    ):
        agrees(write(packed(header, bytes(size))))


def test_a_pickle_is_refused_and_never_opened(tmp_path, write, monkeypatch):
    opened, on = [], {"now": False}
    monkeypatch.setitem(on, "now", True)  # an audit hook stays for good: this one is switched off at the end
    sys.addaudithook(lambda event, args: on["now"] and event == "open" and opened.append(str(args[0])))
    read_header(sound := write(packed("{}")))
    assert str(sound) in opened
    for suffix in (*PICKLES, ".CKPT", ".Pt"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(packed("{}"))
        opened.clear()
        assert re.search(f"model{suffix} is a pickle .* run code .* .safetensors file", refusal(path))
        assert not opened
    for name in ("model", "model.gguf", "model.safetensors.part", "model.safetensors.index.json", "."):
        with pytest.raises(UserError, match=r"not a \.safetensors file"):
            require_safetensors(Path(name))


def test_what_is_no_file(tmp_path, write, monkeypatch):
    path = tmp_path / "model.safetensors"
    assert "does not exist" in refusal(path)
    assert "cannot be read" in refusal(Path("a\0.safetensors"))
    assert "model\\n.safetensors does not exist" in refusal(tmp_path / "model\n.safetensors")
    path.mkdir()
    assert "is a folder" in refusal(path)
    path.rmdir()
    path.symlink_to(path)
    assert "cannot be read (Too many levels" in refusal(path)
    path.unlink()
    os.mkfifo(path)
    assert "a pipe" in refusal(path)
    write(packed("{}")).replace(path)
    monkeypatch.setattr("builtins.open", lambda *_: os.open(tmp_path, os.O_WRONLY))  # an OSError even for root
    assert "cannot be read (Is a directory)" in refusal(path)


def test_no_torch_is_needed(write):
    code = (
        "import sys, pathlib; from sushi_research.models.header import read_header\n"
        "read_header(pathlib.Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, write(packed({"a": entry()}, b"ab"))], check=True)


# --- Defects ---

RAW = '"dtype":"U8","shape":[2],"data_offsets":[0,2]'
LONG, LINES, DEEP = "x" * 1000, "x\ny\x1b[2J\u2028", [[[[[[]] * 99] * 99]]]
NO_SIZES = (None, True, "1", 1, {}, [True], [1.0], [-1], ["1"], [[1]], [2**64], [10**400], [LONG] * 9, DEEP)
NO_NUMBERS = ("-0", "2.0", "1e0", "1e400", "NaN", "-Infinity", "2" * 20, "2" * 99999)
NO_ENTRIES = (None, 1, "a", LONG, DEEP, ["U8", [2]], {}, {"dtype": "U8"}, {LINES: 1})
NO_JSON = (b"\xff", "\ufeff{}", "{} {}", "{'a': 1}", "[" * 5000, "[" * (MAX_HEADER - 1), "[]", "NaN", "1" * 5000, '"a"')


def spans(**of: tuple[int, int]) -> dict:
    return {name: entry(shape=[end - begin], offsets=[begin, end]) for name, (begin, end) in of.items()}


# Kind of defect -> (what is said of it, whole files (bytes) or headers, which two bytes of data follow).
DEFECTS = {
    "empty": ("is empty (0 bytes)", [b""]),
    "cut within the header": ("is cut short (its header has", [packed("{}")[:-1], packed({"a": entry()})[:30]]),
    "no length of a header": (
        "is not a safetensors file (it begins with",
        [b"1234567", bytes(8), b"\xff" * 99, b"Entry not found"],
    ),
    "a git-lfs pointer": (
        "is a git-lfs pointer, not the file itself",
        [b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"],
    ),
    "a web page": ("is a web page (HTML)", [b"\n<!DOCTYPE html><html></html>", b"<html><body></body></html>"]),
    "a pickle": (
        "is a pickle under another name",
        [pickle.dumps({"a": list(range(9))}, protocol) for protocol in (2, 4)],
    ),
    "a zip archive": ("is a zip archive, as PyTorch's pickles are", [b"PK\x03\x04" + bytes(99)]),
    "no JSON": ("is damaged (invalid", [packed(header) for header in NO_JSON]),
    "a deep entry": ("recursion limit", ['{"a":' * 5000]),
    "a name twice": (
        " twice)",
        [
            f'{{"a":{{{RAW}}},"\\u0061":{{{RAW}}}}}',
            f'{{"a":{{{RAW}}},"a":{{{RAW.replace("U8", "I8")}}}}}',  # safetensors 0.8 takes the second dtype
            f'{{"{LONG}":{{{RAW}}},"{LONG}":{{{RAW}}}}}',
            f'{{"__metadata__":{{"k\\n":"v","k\\n":"v"}},"a":{{{RAW}}}}}',
        ],
    ),
    "a field twice": (
        "duplicate field `",
        [f'{{"a":{{"dtype":"U8",{RAW}}}}}', '{"__metadata__":{},"__metadata__":{}}'],
    ),
    "metadata that is no text": (
        "is damaged (invalid JSON",
        [{"__metadata__": {"k": value}} for value in (None, 1, math.nan, ["a"], {}, "\ud800")]
        + [{"__metadata__": value} for value in ([], "a", 1)],
    ),
    "no entry": ("is damaged (invalid", [{"t": value} for value in NO_ENTRIES]),
    "an entry that is a list": ("not as safetensors writes it", [{"t": ["U8", [2], [0, 2]]}]),
    "an unknown dtype": ("of an unknown dtype", [{"t": entry(value)} for value in ("u8", "", "F32 ", LONG, LINES)]),
    "no sizes": (
        "is damaged (",
        [{"t": entry(shape=value)} for value in NO_SIZES]
        + [{"t": entry(offsets=value)} for value in (*NO_SIZES, [], [1], [0, 1, 2], [2, 0])]
        + [f'{{"t":{{{RAW}}}}}'.replace("[2]", f"[{number}]") for number in NO_NUMBERS],
    ),
    "too large a shape": ("overflow", [{"t": entry(shape=value)} for value in ([2**63], [9] * 9999, [10**18, 100])]),
    "another size": ("invalid shape", [{"t": entry(shape=value)} for value in ([], [1], [3], [0], [2**40])]),
    "gaps and overlaps": (
        "invalid offset for tensor",
        [spans(t=(1, 2)), spans(a=(0, 2), b=(1, 4)), spans(a=(0, 2), empty=(1, 1)), spans(a=(0, 2), empty=(3, 3))],
    ),
    "bytes of nobody": ("bytes at its end belong to no tensor", [spans(a=(0, 1)), "{}"]),
    "cut within the data": ("cut short (1,298 bytes are missing)", [spans(a=(0, 1), b=(1, 1239), c=(1239, 1300))]),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_defects(write, kind):
    said, contents = DEFECTS[kind]
    for content in contents:
        assert said in refusal(write(content if isinstance(content, bytes) else packed(content, b"ab")))


def test_the_memory_is_bounded(write):
    tracemalloc.start()
    for length in (MAX_HEADER + 1, 9 * 10**9, 2**40, 2**64 - 1):
        os.truncate(path := write(length.to_bytes(8, "little")), 10**10)
        assert ("less metadata" if length < 10**10 else "is not a safetensors") in refusal(path)
    size = 10**10 - 1000
    os.truncate(path := write(packed(json.dumps(spans(a=(0, size))).ljust(1000 - 8))), 10**10)
    assert read_header(path) == Header(path, {"a": Tensor("U8", (size,), 1000, 10**10)}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# --- Fuzz ---

FUZZ = settings(max_examples=200)
NAMES = st.sampled_from(["a", "b", "v_pred", "", "dtype"]) | st.text(max_size=5)
METADATA = st.dictionaries(NAMES, st.text(max_size=9), max_size=3)
DTYPES, SHAPES = st.sampled_from(list(BITS)), st.lists(st.integers(0, 3), max_size=2)
TENSORS = st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=5)
VALUES = st.sampled_from([None, True, "", "U8", "F4", "\ud800", 1.5, -1, 2**63, 10**400, math.nan, math.inf, 1, 2, 4])
JUNK = st.recursive(VALUES, lambda some: st.lists(some, max_size=3) | st.dictionaries(NAMES, some, max_size=2))
FIELDS, SURPLUS = st.sampled_from(["dtype", "shape", "data_offsets", "more"]), st.sampled_from([0, 0, 0, -1, 1])
FAULTS = st.lists(st.tuples(st.integers(0, 4), st.dictionaries(FIELDS, JUNK, max_size=2) | JUNK), max_size=2)


def check(path: Path) -> bool:
    """Whether a file is accepted, and then by safetensors too; a refusal is one sentence."""
    try:
        read_header(path)
    except UserError:
        assert refusal(path)
        return False
    return bool(agrees(path))


def laid_out(tensors) -> tuple[list[tuple[str, dict]], int]:
    """The entries of tensors one after another, and the bytes they take. Four elements take whole bytes in every dtype."""
    entries, end = [], 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 2
        entries.append((name, entry(dtype, [*shape, 4], [begin, end])))
    return entries, end


@FUZZ
@given(TENSORS, METADATA, st.randoms(use_true_random=False), st.integers(0, 9))
def test_fuzz_sound_files(write, tensors, metadata, random, padding):
    pairs, size = laid_out(tensors)
    pairs.append(("__metadata__", metadata))
    random.shuffle(pairs)
    assert check(write(packed(json.dumps(dict(pairs)) + " " * padding, bytes(size))))


ENTRIES, SIZE = laid_out({"a": ("F32", [2]), "b": ("F4", []), "v": ("U8", [0])})
SOUND = packed({"__metadata__": {"format": "pt"}, **dict(ENTRIES)}, bytes(SIZE))
PLACES, CUTS = st.integers(0, len(SOUND) - 1), st.integers(0, 3) | st.just(len(SOUND))
PIECES = st.binary(max_size=9) | st.sampled_from([bytes([byte]) for byte in b'0123489-.,:"[]{} '])
FLIPS = st.lists(st.tuples(PLACES, st.integers(0, 7)), max_size=2)


@FUZZ
@given(FLIPS, st.lists(st.tuples(PLACES, CUTS, PIECES), max_size=2), st.booleans())
def test_fuzz_mutations(write, flips, replacements, mend_length):
    content = bytearray(SOUND)
    for place, bit in flips:
        content[place] ^= 1 << bit
    for place, cut, piece in replacements:
        content[place : place + cut] = piece
    # With a length that is right again, faults inside the header come to light.
    check(write(packed(bytes(content[8:-SIZE]), bytes(SIZE)) if mend_length else bytes(content)))


@FUZZ
@given(TENSORS.filter(bool), FAULTS, st.lists(st.tuples(NAMES, JUNK), max_size=1), METADATA | JUNK, SURPLUS)
def test_fuzz_wrong_values(write, tensors, faults, more, metadata, surplus):
    pairs, size = laid_out(tensors)
    for number, fault in faults:
        name, fields = pairs[number % len(pairs)]
        both = isinstance(fault, dict) and isinstance(fields, dict)
        pairs[number % len(pairs)] = (name, fields | fault if both else fault)
    pairs += [("__metadata__", metadata), *more]
    header = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs)  # the same key twice, too
    check(write(packed(f"{{{header}}}", bytes(max(size + surplus, 0)))))
