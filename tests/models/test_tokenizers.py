"""The tokenizers of a base in a single file, which holds none: from folders, from the hub's cache, or one sentence."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from single_files import PREFIXES, VOCABULARY, narrow_base, write_single_file
from transformers import CLIPTokenizer

from sushi_research.conditioning import tokenize
from sushi_research.errors import UserError
from sushi_research.models import loading, sd15, sdxl, tokenizers

ENCODERS = {"sd15": sd15.TEXT_ENCODERS, "sdxl": sdxl.TEXT_ENCODERS}
REPOSITORIES = {
    "sd15": ["stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"],
    "sdxl": ["stabilityai/stable-diffusion-xl-base-1.0"],
}
CLIP = "openai/clip-vit-large-patch14"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# `!` by itself and in a word is where the two tokenizers of SDXL differ besides their padding.
CAPTIONS = ["a cat", "", "!", "what? a CAT!! on\n 12 mats", "it's \u00fc\u0308ber (1.2) <|endoftext|> too", "x" * 100]
PAIR = ("vocab.json", "merges.txt")
# Where both architectures take the same path; SDXL has two tokenizers.
ONE = pytest.mark.parametrize("architecture", ["sdxl"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {architecture: narrow_base(root / architecture, architecture) for architecture in ENCODERS}


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    return {name: write_single_file(folder, root / f"{name}.safetensors", name) for name, folder in folders.items()}


@pytest.fixture
def folder(folders, architecture):
    return folders[architecture]


@pytest.fixture
def file(files, architecture):
    return str(files[architecture])


@pytest.fixture
def vocabulary(folders, tmp_path):
    """A folder with the vocabulary and nothing else."""
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    for name in PAIR:
        shutil.copy(folders["sd15"] / "tokenizer" / name, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub, and a function that puts files into a repository of it: their names and what they are."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def put(repository, contents):
        folder = root / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)
        for name, source in contents.items():
            target = folder / "snapshots" / COMMIT / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        return folder / "snapshots" / COMMIT

    return put


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and message.endswith(".")
    return message


def assert_same_tokens(base, folder):
    """That the base tokenises as transformers does with the tokenizers of a folder in diffusers format."""
    assert tuple(base.tokenizers) == ENCODERS[base.architecture]
    for name in base.tokenizers:
        ours = base.load_tokenizer(name)
        theirs = CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        mine, yours = (tokenize(tokenizer, CAPTIONS) for tokenizer in (ours, theirs))
        assert torch.equal(mine.ids, yours.ids) and mine.cut == yours.cut
        assert mine.ids.shape == (len(CAPTIONS), 77) and mine.cut[-1] == 25
        pad = ("!", 0) if name == "text_encoder_2" else ("<|endoftext|>", VOCABULARY - 1)
        assert (ours.pad_token, ours.pad_token_id) == (theirs.pad_token, theirs.pad_token_id) == pad
        assert mine.ids[1, 2:].unique().tolist() == [pad[1]]


# --- From a folder ---


def test_from_a_model_in_diffusers_format(architecture, file, folder):
    base = loading.resolve_base(file, tokenizers=str(folder))
    for name in ENCODERS[architecture]:
        assert base.tokenizers[name].folder == folder / name.replace("text_encoder", "tokenizer")
    assert_same_tokens(base, folder)


def test_from_a_model_with_one_tokenizer(folders, files):
    base = loading.resolve_base(str(files["sdxl"]), tokenizers=str(folders["sd15"]))
    assert {tokenizer.folder for tokenizer in base.tokenizers.values()} == {folders["sd15"] / "tokenizer"}
    assert_same_tokens(base, folders["sdxl"])


def test_from_the_vocabulary_alone(file, folder, vocabulary):
    assert_same_tokens(loading.resolve_base(file, tokenizers=str(vocabulary)), folder)


@ONE
def test_from_a_fast_tokenizer_s_file_alone(file, folder, tmp_path):
    shutil.copy(folder / "tokenizer" / "tokenizer.json", tmp_path)
    assert_same_tokens(loading.resolve_base(file, tokenizers=str(tmp_path)), folder)


def test_from_the_folder_of_the_text_encoders(file, folder):
    base = loading.resolve_base(file, text_encoders=str(folder))
    assert {tokenizer.folder.parent for tokenizer in base.tokenizers.values()} == {folder}
    assert_same_tokens(base, folder)


@ONE
def test_asked_for_ones_come_before_those_of_the_text_encoders(file, folder, vocabulary):
    base = loading.resolve_base(file, text_encoders=str(folder), tokenizers=str(vocabulary))
    assert {tokenizer.folder for tokenizer in base.tokenizers.values()} == {vocabulary}


def test_the_published_layout_gives_the_same_tokens(files, vocabulary, tmp_path):
    """tokenizer and tokenizer_2 as stabilityai's repository has them: added_tokens_decoder and special_tokens_map.json."""

    def token(content, normalized):
        rest = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
        return {"content": content, **rest}

    for name, pad in {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}.items():
        folder = shutil.copytree(vocabulary, tmp_path / "published" / name)
        named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        added = {VOCABULARY - 2: token("<|startoftext|>", True), VOCABULARY - 1: token("<|endoftext|>", False)}
        added |= {0: token("!", False)} if pad == "!" else {}
        config = {
            **named,
            "add_prefix_space": False,
            "added_tokens_decoder": {number: {**entry, "special": True} for number, entry in added.items()},
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps({**named, "pad_token": pad}))
    for source in (vocabulary, tmp_path / "published"):
        base = loading.resolve_base(str(files["sdxl"]), tokenizers=str(source))
        assert_same_tokens(base, tmp_path / "published")


# --- From the hub's cache ---


def names(folder):
    return {f"{folder.name}/{path.name}": path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("architecture", "repository"), [(name, each) for name, all_ in REPOSITORIES.items() for each in all_]
)
def test_from_the_cached_repository_of_the_architecture(architecture, repository, folders, files, cache):
    folder = folders[architecture]
    root = cache(repository, {name: path for each in folder.glob("tokenizer*") for name, path in names(each).items()})
    base = loading.resolve_base(str(files[architecture]))
    for name in ENCODERS[architecture]:
        assert base.tokenizers[name].folder == root / name.replace("text_encoder", "tokenizer")
    assert_same_tokens(base, folder)


def test_a_cached_repository_without_the_second_tokenizer(folders, files, cache):
    root = cache(REPOSITORIES["sdxl"][0], names(folders["sdxl"] / "tokenizer"))
    base = loading.resolve_base(str(files["sdxl"]))
    assert base.tokenizers["text_encoder_2"].folder == root / "tokenizer"
    assert_same_tokens(base, folders["sdxl"])


@ONE
def test_from_the_cached_vocabulary_of_clip(file, folder, vocabulary, cache):
    root = cache(CLIP, {path.name: path for path in vocabulary.iterdir()})
    base = loading.resolve_base(file)
    assert {tokenizer.folder for tokenizer in base.tokenizers.values()} == {root}
    assert_same_tokens(base, folder)


@ONE
def test_a_half_cached_repository_gives_way_to_the_vocabulary_of_clip(architecture, file, folder, vocabulary, cache):
    cache(REPOSITORIES[architecture][0], {"tokenizer/vocab.json": vocabulary / "vocab.json"})
    root = cache(CLIP, {path.name: path for path in vocabulary.iterdir()})
    assert {tokenizer.folder for tokenizer in loading.resolve_base(file).tokenizers.values()} == {root}


@ONE
def test_a_folder_in_diffusers_format_needs_no_cache(folder):
    assert_same_tokens(loading.resolve_base(str(folder)), folder)


# --- None at hand ---


@ONE
@pytest.mark.parametrize("half", [None, "vocab.json", "merges.txt"])
def test_a_repository_that_is_not_cached_or_by_half_names_the_option(half, architecture, file, vocabulary, cache):
    if half:
        cache(REPOSITORIES[architecture][0], {f"tokenizer/{half}": vocabulary / half})
    message = refusal(loading.resolve_base, file)
    assert "none is in the hub's cache" in message and CLIP in message and tokenizers.OFFER in message
    assert "--model.tokenizers a folder with CLIP's vocab.json and merges.txt" in message


@ONE
@pytest.mark.parametrize("half", PAIR)
def test_a_half_cached_vocabulary_names_its_folder(half, file, vocabulary, cache):
    root = cache(CLIP, {half: vocabulary / half})
    message = refusal(loading.resolve_base, file)
    assert str(root) in message and "incomplete" in message and "--model.tokenizers" in message


@ONE
@pytest.mark.parametrize("half", PAIR)
def test_a_folder_without_a_whole_vocabulary_is_refused(half, file, vocabulary):
    (vocabulary / half).unlink()
    message = refusal(loading.resolve_base, file, tokenizers=str(vocabulary))
    assert f"model.tokenizers: {vocabulary} has no tokenizer" in message and tokenizers.OFFER in message


@ONE
def test_what_is_no_folder_is_refused(file, vocabulary):
    path = vocabulary / "vocab.json"
    message = refusal(loading.resolve_base, file, tokenizers=str(path))
    assert f"model.tokenizers: {path} is a file: give the folder" in message
    assert "model.tokenizers: someone/model" in refusal(loading.resolve_base, file, tokenizers="someone/model")
    assert "model.tokenizers: ./nowhere" in refusal(loading.resolve_base, file, tokenizers="./nowhere")


# --- Not the encoder's ---


@ONE
@pytest.mark.parametrize("size", [VOCABULARY - 1, VOCABULARY + 1, 49408])
def test_a_vocabulary_of_another_size_than_the_encoder_s_is_refused(size, folder, architecture, tmp_path):
    key = PREFIXES[architecture]["text_encoder"] + "text_model.embeddings.token_embedding.weight"
    extra = {key: torch.zeros(size, 64, dtype=torch.float16)}
    file = write_single_file(folder, tmp_path / "base.safetensors", architecture, extra=extra)
    base = loading.resolve_base(str(file), tokenizers=str(folder))
    message = refusal(base.load_tokenizer, "text_encoder")
    assert f"{folder / 'tokenizer'} has {VOCABULARY} tokens" in message and f"{file} has {size}" in message
    assert "model.tokenizers" in message
    assert message == refusal(loading.load_text_encoder, base, "text_encoder", torch.device("cpu"))
    file.unlink()


@ONE
def test_a_damaged_vocabulary_is_one_sentence(file, vocabulary):
    (vocabulary / "vocab.json").write_text("{\nnothing\n")
    base = loading.resolve_base(file, tokenizers=str(vocabulary))
    assert f"{vocabulary} could not be loaded" in refusal(base.load_tokenizer, "text_encoder")


def test_the_published_pad_token_and_length_stand_in_for_another_model_s(files, folders, vocabulary):
    config = {"pad_token": "a", "model_max_length": 512, "tokenizer_class": "CLIPTokenizer"}
    (vocabulary / "tokenizer_config.json").write_text(json.dumps(config))
    base = loading.resolve_base(str(files["sdxl"]), tokenizers=str(vocabulary))
    for name, pad in {"text_encoder": VOCABULARY - 1, "text_encoder_2": 0}.items():
        tokenizer = base.load_tokenizer(name)
        assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (pad, 77)
    assert "takes 512 tokens" in refusal(tokenizers.Tokenizer(vocabulary).load)
