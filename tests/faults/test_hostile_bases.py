"""Bases that are broken, cut or made to do harm, as a user meets them: one sentence that names the file, in little memory."""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from single_files import BITS, narrow_base, write_single_file

from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache
from sushi_research.models import loading
from sushi_research.models.header import MAX_HEADER, PICKLES, read_header

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
TOKENS, TEXT_WIDTH = (
    f"{CLIP}embeddings.token_embedding.weight",
    f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight",
)
WEIGHTS, COMMIT = "diffusion_pytorch_model.safetensors", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A narrow SD1.5 base as (single file, folder)."""
    root = tmp_path_factory.mktemp("good")
    folder = narrow_base(root / "folder", "sd15")
    return write_single_file(folder, root / "good.safetensors", "sd15"), folder


@pytest.fixture(scope="module")
def entries(good):
    """name -> [dtype, shape] of the single file."""
    return {name: [at.dtype, list(at.shape)] for name, at in read_header(good[0]).tensors.items()}


@pytest.fixture
def resolve(good):
    return lambda source: loading.resolve_base(str(source), tokenizers=str(good[1]))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(bases, tmp_path):
    return shutil.copytree(bases["sdxl"], tmp_path / "base")


def use(source, only=None, **options):
    """All that a run does with a base: finds it, hashes and loads each part of it; `only`: that one component's folder."""
    base = loading.resolve_base(str(source), **options)
    hash_cache = HashCache(Path(tempfile.gettempdir()) / "no such folder" / "hashes.json")
    for name, part in base.parts.items():
        if only in (None, name):
            base.hash(name, hash_cache)
            part.load(torch.float32, CPU)
    for name in base.tokenizers:
        if only in (None, name.replace("text_encoder", "tokenizer")):
            base.load_tokenizer(name)


def refusal(call, source, named=None, **options):
    """The sentence of a UserError that names `named`, or the source."""
    with pytest.raises(UserError) as caught:
        call(source, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    assert message.endswith((".", ": check the path and the permissions"))
    assert str(named or source) in message
    return message


def laid_out(entries):
    """The header fields of tensors one after another, and the bytes that they take."""
    fields, end = {}, 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + -(-math.prod(shape) * BITS[dtype] // 8)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return fields, end


def write(path, entries, header=None):
    """Writes tensors as a hole that takes no room, with the JSON text `header` where one is given."""
    fields, size = laid_out(entries)
    content = (header or json.dumps(fields)).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    os.truncate(path, 8 + len(content) + size)
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- files that are something else, and cut ones ---

CONTENTS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "zeros": bytes(100_000),
    "a page": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>" * 100,
    "an answer": b'{"error": "Repository not found"}',
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"6ce0" * 16
    + b"\nsize 4265146304\n",
    "a zip, as pickles are": b"PK\x03\x04\x00\x00\x08\x08" + bytes(100_000),
    "an old pickle": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100_000),
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(100_000),
    "no tensors": (2).to_bytes(8, "little") + b"{}",
    "a deep header": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
}

ADVICE = {
    "a page": "is a web page (HTML), not the file itself: download the file",
    "a git-lfs pointer": "run `git lfs pull`, or download the file",
    "a zip, as pickles are": "take the model's .safetensors file",
    "an old pickle": "take the model's .safetensors file",
}


def test_a_file_that_is_something_else(file, resolve):
    for name, content in CONTENTS.items():
        with case(name):
            file.write_bytes(content)
            what_to_do = ADVICE.get(name, "download it again")
            assert what_to_do in refusal(resolve, file)


def test_a_pickle_is_not_opened(tmp_path, monkeypatch, resolve):
    opened, on = [], {"now": False}
    monkeypatch.setitem(on, "now", True)  # an audit hook stays for good: this one is switched off at the end
    sys.addaudithook(lambda event, arguments: on["now"] and event == "open" and opened.append(str(arguments[0])))
    for suffix in PICKLES:
        path = tmp_path / f"model{suffix}"
        torch.save({"a": torch.ones(1)}, path)
        before = opened.count(str(path))
        path.read_bytes()
        assert opened.count(str(path)) == before + 1
        assert "is a pickle" in refusal(resolve, path)
        assert opened.count(str(path)) == before + 1, suffix


def test_a_download_that_was_cut(good, file, resolve):
    content = good[0].read_bytes()
    for share in (0.0001, 0.01, 0.5, 0.999999):
        file.write_bytes(content[: int(share * len(content))])
        assert "cut short" in refusal(resolve, file)


LIES = {
    "invalid offset": lambda fields: fields | {TOKENS: fields[TOKENS] | {"data_offsets": [0, 65792]}},
    "expected usize": lambda fields: fields | {TOKENS: fields[TOKENS] | {"data_offsets": [-65792, 0]}},
    "overflow": lambda fields: fields | {TOKENS: fields[TOKENS] | {"shape": [2**62, 2**62, 0]}},
    "unknown dtype": lambda fields: fields | {TOKENS: fields[TOKENS] | {"dtype": "Q4_K"}},
    # Equal offsets: safetensors 0.8 accepts this, and reads the second entry.
    "twice": lambda fields: f'{json.dumps(fields)[:-1]}, "{TOKENS}": {json.dumps(fields[TOKENS])}}}',
    "at its end": lambda fields: {name: fields[name] for name in list(fields)[:-1]},
    "has a header of": lambda fields: json.dumps(fields).ljust(MAX_HEADER + 1),
}


def test_a_header_that_lies(entries, file, resolve):
    for named, lie in LIES.items():
        with case(named):
            header = lie(laid_out(entries)[0])
            text = header if isinstance(header, str) else json.dumps(header)
            assert named in refusal(resolve, write(file, entries, text))


# --- absurd shapes ---


def many(pattern, count, *shape):
    return {pattern.format(number): ["F16", [*shape]] for number in range(count)}


ABSURD = {
    "no rows of 2^58": {TEXT_WIDTH: ["F16", [0, 2**58]]},
    "no channels": {f"{UNET}input_blocks.0.0.weight": ["F16", [0, 2**50, 1, 1]]},
    "2^34 tokens": {TOKENS: ["F16", [2**34, 64]]},
    "tokens 2^33 wide": {TOKENS: ["F16", [1, 2**33]]},
    "tokens 100,000 wide": {TOKENS: ["F16", [1, 100_000]]},
    "no tokens 2^56 wide": {TOKENS: ["F16", [0, 2**56]]},
    "2^33 inside a layer": {f"{CLIP}encoder.layers.0.mlp.fc1.weight": ["F16", [2**33]]},
    "a text 2^33 wide": {TEXT_WIDTH: ["F16", [1, 2**33]]},
    "33 channels": many(f"{UNET}input_blocks.{{}}.0.out_layers.3.weight", 3, 33),
    "2^33 channels": many(f"{UNET}input_blocks.{{}}.0.out_layers.3.weight", 3, 2**33),
    "2^33 latents": {f"{VAE}post_quant_conv.weight": ["F16", [2**33]]},
    "a VAE 7 wide": many(f"{VAE}encoder.down.{{}}.block.0.conv1.weight", 4, 7),
    "levels": many(f"{VAE}encoder.down.{{}}.block.0.conv1.weight", 5000, 64),
    "blocks": many(f"{UNET}input_blocks.{{}}.0.out_layers.3.weight", 5000, 32),
    "transformer blocks": many(f"{UNET}input_blocks.1.1.transformer_blocks.{{}}.norm1.bias", 5000, 0),
    "layers": many(f"{CLIP}encoder.layers.{{}}.mlp.fc1.bias", 5000, 256),
    "99 layers": many(f"{CLIP}encoder.layers.{{}}.mlp.fc1.bias", 99, 256),
    "keys of nobody": many("key {}", 5000, 1),
    "a newline in a key": {"a\n\x1b[2Jb": ["F16", [1]]},
    "a key of no name": {"": ["F16", [1]]},
    "a key of a million letters": {"x" * 10**6: ["F16", [1]]},
}


def test_absurd_shapes_and_names_are_refused_in_little_memory(entries, file, resolve, good):
    resolve(good[0])  # the libraries are imported before the memory is watched
    for name, absurd in ABSURD.items():
        with case(name):
            length = 8 + int.from_bytes(write(file, entries | absurd).open("rb").read(8), "little")
            tracemalloc.start()
            try:
                refusal(resolve, file)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < 2**23 + 40 * length


# --- paths ---


def test_links_to_nothing_and_to_themselves_and_what_is_no_file(tmp_path, resolve):
    for name in ("loop", "loop.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / name)
        (tmp_path / f"no {name}").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (*tmp_path.iterdir(), tmp_path / "loop" / "model.safetensors", Path("/dev/zero")):
        refusal(resolve, path)


def test_a_folder_named_as_a_file(tmp_path, folder, resolve):
    (tmp_path / "x.safetensors").mkdir()
    assert "it has no model_index.json" in refusal(resolve, tmp_path / "x.safetensors")
    assert resolve(folder.rename(tmp_path / "y.safetensors")).architecture == "sdxl"


def test_a_path_that_is_odd(tmp_path, resolve, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a\nb.safetensors", {})
    for name in ("/a\nb", "a\nb/c", "a\nb.safetensors", "~no-such-user/x", "/" + "x" * 300):
        with case(repr(name)):
            with pytest.raises(UserError) as caught:
                resolve(name)
            assert str(caught.value).isprintable()


# --- folders ---


def gone(path):
    path.unlink()


def emptied(path):
    os.truncate(path, 0)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def page(path):
    path.write_text("<!DOCTYPE html>\n<html>")


def looped(path):
    path.unlink()
    path.symlink_to(path)


def dangling(path):
    path.unlink()
    path.symlink_to("../../blobs/none")


LINKS = (gone, looped, dangling)
FAULTS = (*LINKS, emptied, cut, page)


def test_a_fault_in_any_file_of_a_folder(folder, bases):
    for path in sorted(path for path in folder.rglob("*.*") if path.is_file()):
        for fault in FAULTS:
            # The tokens lie in tokenizer.json, or in the two others where it is not there.
            if path.name not in ("vocab.json", "merges.txt") and (path.name != "tokenizer.json" or fault not in LINKS):
                with case(f"{path}, {fault.__name__}"):
                    fault(path)
                    refusal(use, folder, only=path.parent.name)
                    path.unlink(missing_ok=True)
                    shutil.copy(bases["sdxl"] / path.relative_to(folder), path)
    use(folder)


PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")


def test_a_component_that_is_missing_empty_a_file_or_a_loop(folder, bases):
    for name in PARTS:
        path = folder / name
        shutil.rmtree(path)
        file = lambda path=path: path.rmdir() or path.write_text("{}")  # noqa: E731
        for number, make in enumerate((lambda: None, path.mkdir, file, lambda path=path: looped(path))):
            with case(f"{name}, {number}"):
                make()
                refusal(use, folder, only=name)
        path.unlink()
        shutil.copytree(bases["sdxl"] / name, path)


def test_a_vocabulary_in_two_files_as_published_is_whole_or_refused(folder):
    """SD1.5 and SDXL have no tokenizer.json. Without its merges a caption becomes other tokens."""
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    edit(tokenizer / "vocab.json", **{"ab</w>": 514, "cd</w>": 515})
    for fault in (gone, cut, emptied):
        (tokenizer / "merges.txt").write_text("#version: 0.2\na b</w>\nc d</w>\n")
        base = loading.resolve_base(str(folder))
        assert base.tokenizers["text_encoder"].load()("ab cd")["input_ids"][1:3] == [514, 515]
        fault(tokenizer / "merges.txt")
        with case(fault.__name__), pytest.raises(UserError, match=re.escape(str(tokenizer))):
            base.tokenizers["text_encoder"].load()


def test_merges_that_are_no_text_next_to_a_whole_tokenizer(folder):
    (folder / "tokenizer" / "merges.txt").write_bytes(b"\xff\xfe\x00")
    refusal(use, folder)


CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in ("unet", "vae"))]


def test_a_config_that_is_no_object(folder, bases):
    texts = ("[]", "null", "[" * 10**5, '{"a":' * 10**5, '{"a":' + "1" * 5000 + "}", "\0", b"\xff\xfe{")
    for name in (*CONFIGS, "text_encoder/config.json", "text_encoder_2/config.json"):
        for number, text in enumerate(texts):
            with case(f"{name}, text {number}"):
                (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
                refusal(loading.resolve_base, str(folder), named=folder / name)
        shutil.copy(bases["sdxl"] / name, folder / name)


SIZES = {
    "unet": "block_out_channels cross_attention_dim in_channels layers_per_block norm_num_groups down_block_types "
    "addition_time_embed_dim projection_class_embeddings_input_dim transformer_layers_per_block",
    "vae": "block_out_channels latent_channels norm_num_groups up_block_types",
    "text_encoder": "hidden_size intermediate_size num_attention_heads num_hidden_layers",
    "text_encoder_2": "hidden_size projection_dim max_position_embeddings",
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_in_a_config_that_make_no_model(name, folder):
    file = folder / name / "config.json"
    usual = file.read_text()
    for key in SIZES[name].split():
        for value in ("A\nB", [1, 2, 3], {}, 7, 1e300):
            with case(f"{key} is {value!r}"):
                edit(file, **{key: value})
                with pytest.raises(UserError) as caught:
                    use(folder, only=name)
                assert str(caught.value).isprintable()
        file.write_text(usual)


KINDS = [(CONFIGS[0], "_class_name"), (CONFIGS[1], "prediction_type"), (CONFIGS[1], "beta_schedule")]
KINDS += [("unet/config.json", "addition_embed_type"), ("unet/config.json", "down_block_types")]


def test_a_newline_in_a_config_is_not_shown_as_one(folder, bases):
    for name, key in KINDS:
        with case(f"{name}, {key}"):
            edit(folder / name, **{key: "A\nB"})
            if key == "_class_name":
                shutil.rmtree(folder / "unet")
            refusal(use, folder, only="unet")
        shutil.copytree(bases["sdxl"], folder, dirs_exist_ok=True)


def test_a_config_that_asks_for_a_billion_layers(folder, bases):
    for name, key in (
        ("unet", "layers_per_block"),
        ("unet", "transformer_layers_per_block"),
        ("vae", "layers_per_block"),
        ("text_encoder", "num_hidden_layers"),
    ):
        with case(f"{name}, {key}"):
            edit(folder / name / "config.json", **{key: 10**9})
            assert f"{key} is 1000000000, more than any" in refusal(use, folder, named=folder / name, only=name)
        shutil.copy(bases["sdxl"] / name / "config.json", folder / name)


def test_weights_that_are_not_finite(folder):
    for name, value in {"unet": math.nan, "vae": math.inf, "text_encoder_2": -math.inf}.items():
        path = next((folder / name).glob("*.safetensors"))
        tensors = load_file(path)
        save_file(tensors | {min(tensors): torch.full_like(tensors[min(tensors)], value)}, path, {"format": "pt"})
        assert "not finite" in refusal(use, folder, named=folder / name, only=name)
        save_file(tensors, path, {"format": "pt"})


# --- shards ---


@pytest.fixture
def shards(folder):
    """The index and the shards of a folder's UNet."""
    unet = loading.load_unet(loading.resolve_base(str(folder)), torch.float32, CPU)
    (folder / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    use(folder, only="unet")
    return folder / "unet" / f"{WEIGHTS}.index.json", sorted((folder / "unet").glob("*-of-*"))


def test_a_fault_in_a_shard_or_in_the_index(folder, shards):
    assert len(shards[1]) > 1
    for path in (shards[1][-1], shards[0]):
        whole = path.read_bytes()
        for fault in FAULTS:
            with case(f"{path}, {fault.__name__}"):
                fault(path)
                refusal(use, folder, named=folder / "unet", only="unet")
            path.unlink(missing_ok=True)
            path.write_bytes(whole)


def test_an_index_that_does_not_fit_its_shards(folder, shards):
    index = shards[0].read_text()
    known = json.loads(index)["weight_map"]
    fewer = {name: shard for name, shard in known.items() if name != "conv_in.bias"}
    wrong = [fewer | {"conv_in.bias": name} for name in ("x-00009-of-00009.safetensors", "../../../etc/passwd", 1)]
    for weight_map in (*wrong, fewer, {}, [], None, "x"):
        with case(str(weight_map)[-80:]):
            edit(shards[0], weight_map=weight_map)
            refusal(use, folder, named=folder / "unet", only="unet")
            shards[0].write_text(index)


# --- the hub's cache ---


@pytest.fixture
def cache(monkeypatch, tmp_path, bases, good):
    """The hub's cache as its library lays it out, with the tiny SDXL base and a single file: the snapshot's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--owner--name"
    for name in ("blobs", "refs"):
        (root / name).mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    files = {path.relative_to(bases["sdxl"]): path for path in bases["sdxl"].rglob("*.*") if path.is_file()}
    for name, path in (files | {Path("model.safetensors"): good[0]}).items():
        blob = shutil.copy(path, root / "blobs" / hashlib.sha256(str(name).encode()).hexdigest())
        link = root / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root / "snapshots" / COMMIT


def half(link):
    """What an interrupted download leaves behind, of a file that the library had linked before; returns the blob."""
    blob = link.resolve()
    os.truncate(blob.rename(f"{blob}.incomplete"), 10)
    return blob


def test_a_snapshot_that_was_downloaded_by_half(cache):
    use("owner/name")
    assert loading.resolve_base("owner/name").revision == COMMIT
    for link in (*cache.rglob("*config.json"), cache / "model_index.json", *cache.glob("*/*.safetensors")):
        content = link.read_bytes()
        blob = half(link)
        refusal(use, "owner/name", named=cache, only=link.parent.name)
        blob.write_bytes(content)
    use("owner/name")


def test_a_single_file_in_the_cache_is_used(cache, good):
    use("owner/name/model.safetensors", tokenizers=str(good[1]))


def test_a_cache_without_what_is_asked_for(cache):
    assert "could not be fetched" in refusal(loading.resolve_base, "owner/name", revision="v2")
    assert "could not be fetched" in refusal(loading.resolve_base, "owner/name/other.safetensors")
    half(cache / "model.safetensors")
    assert "could not be fetched" in refusal(loading.resolve_base, "owner/name/model.safetensors")
    (cache.parents[1] / "refs" / "main").write_bytes(b"\xff\n")
    assert "could not be fetched" in refusal(loading.resolve_base, "owner/name")


# --- permissions ---


@contextmanager
def without(path):
    """The permission to read `path` is taken away, and from root its powers."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    try:
        os.seteuid(user or 65534)
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


FILES = ("text_encoder/model.safetensors", f"unet/{WEIGHTS}", "tokenizer/vocab.json")


def test_what_may_not_be_read(bases, good):
    with tempfile.TemporaryDirectory() as root:  # pytest's own folder is closed to others
        os.chmod(root, 0o755)
        folder, file = (
            shutil.copytree(bases["sd15"], Path(root, "base")),
            Path(shutil.copy(good[0], f"{root}/x.safetensors")),
        )
        use(folder)
        for name in (*CONFIGS, ".", "unet", "tokenizer", *FILES):
            with case(name), without(folder / name):
                assert "ermission" in refusal(use, folder)
        use(file, tokenizers=str(folder))
        with without(file):
            assert "ermission" in refusal(use, file, tokenizers=str(folder))


# --- fuzz ---

PREFIX, COUNT, DTYPE = st.sampled_from([UNET, VAE, CLIP]), st.integers(0, 10**6), st.sampled_from(list(BITS))
SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 9, 31, 64, 77, 100, 128, 1024, 2560, 2**20]), max_size=4)
NAME = st.text(max_size=9) | st.sampled_from(["v_pred", "ztsnr", "betas", "edm_mean", f"{UNET}label_emb.0.0.weight"])
MUTATION = st.one_of(
    st.tuples(st.just("drop"), COUNT, st.none()),
    st.tuples(st.just("rename"), COUNT, NAME),
    st.tuples(st.just("number"), COUNT, st.integers(0, 30)),
    st.tuples(st.just("reshape"), COUNT, SHAPE),
    st.tuples(st.just("turn"), COUNT, st.none()),
    st.tuples(st.just("dtype"), COUNT, DTYPE),
    st.tuples(st.just("all"), PREFIX, DTYPE),
    st.tuples(st.just("move"), PREFIX, PREFIX | st.sampled_from(["", "unet."])),
    st.tuples(st.just("lose"), PREFIX, st.none()),
    st.tuples(st.just("add"), NAME, SHAPE),
)


def mutated(entries, kind, place, value):
    """The tensors after one accident, to those below a prefix or to the one of a number."""
    if kind == "add":
        return entries | {place: ["F16", value]}
    names = list(entries)
    below = place if isinstance(place, str) else names[place % len(names)] if names else ""
    found = {}
    for name, (dtype, shape) in entries.items():
        if not name.startswith(below):
            found[name] = [dtype, shape]
        elif kind in ("all", "dtype"):
            found[name] = [value, shape]
        elif kind in ("reshape", "turn"):
            found[name] = [dtype, shape[::-1] if value is None else value]
        elif kind not in ("drop", "lose"):
            name = re.sub(r"\d+", str(value), name, count=1) if kind == "number" else name.replace(below, value, 1)
            found[name] = [dtype, shape]
    return found


@pytest.fixture(scope="module")
def resolve_after(entries, good, tmp_path_factory):
    """A base or a refusal, of the good file's header after some accidents."""
    path, options = tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors", {"tokenizers": str(good[1])}

    def run(mutations, twice):
        found = entries
        for mutation in mutations:
            found = mutated(found, *mutation)
        fields = json.dumps(laid_out(found)[0])
        write(path, found, f"{fields[:-1]},{fields[1:]}" if twice and found else fields)
        return found, loading.resolve_base(str(path), **options)

    return run


@settings(max_examples=60)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4), twice=st.sampled_from([False] * 9 + [True]))
def test_fuzz_accidents_to_a_header(mutations, twice, resolve_after):
    try:
        entries, base = resolve_after(mutations, twice)
    except UserError as error:
        assert str(error).isprintable() and "fuzz.safetensors" in str(error)
    else:
        # Each tensor is used by a component, or on the list of what nobody needs.
        used = {name for part in base.parts.values() for name in part.tensors}
        assert used | base.ignored.keys() == entries.keys() and not used & base.ignored.keys()
