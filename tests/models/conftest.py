"""Narrow bases in diffusers format and as single files, made once per process. Tests must not write into them."""

import functools
import shutil

import pytest
import torch
from base_files import lay_out, resolved
from safetensors.torch import load_file, save_file
from single_files import narrow_base, write_single_file


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A narrow base in diffusers format, by architecture, dtype of its weights and seed."""
    root = tmp_path_factory.mktemp("narrow")

    @functools.cache
    def make(architecture, dtype=torch.float16, seed=0):
        if dtype == torch.float32:
            return narrow_base(root / f"{architecture} {seed}", architecture, seed=seed)
        folder = shutil.copytree(make(architecture, torch.float32, seed), root / f"{architecture} {dtype} {seed}")
        for file in folder.glob("*/*.safetensors"):
            save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
        return folder

    return lambda architecture, dtype=torch.float16, seed=0: make(architecture, dtype, seed)


@pytest.fixture
def folder(folder_of, architecture):
    return folder_of(architecture)


@pytest.fixture(scope="session")
def file_of(folder_of, tmp_path_factory):
    """The single file of that base in fp16, by architecture and seed."""
    root = tmp_path_factory.mktemp("files")

    @functools.cache
    def make(architecture, seed):
        return write_single_file(
            folder_of(architecture, seed=seed), root / f"{architecture} {seed}.safetensors", architecture
        )

    return lambda architecture, seed=0: make(architecture, seed)


@pytest.fixture(scope="session")
def tensors_of(file_of):
    """The tensors of that file."""
    read = functools.cache(lambda architecture, seed: load_file(file_of(architecture, seed)))
    return lambda architecture, seed=0: read(architecture, seed)


@pytest.fixture
def written(tmp_path):
    """Writes files that are removed after the test."""
    files = []

    def write(tensors, name="base.safetensors", metadata=None):
        files.append(tmp_path / name)
        return lay_out(files[-1], tensors, metadata)

    yield write
    for file in files:
        file.unlink(missing_ok=True)


@pytest.fixture
def edited(written, tensors_of, folder_of):
    """The base of a single file with tensors added, replaced or (None) removed; its weights are holes."""

    def resolve(architecture, changes, **options):
        tensors = {name: tensor.to("meta") for name, tensor in tensors_of(architecture).items()} | changes
        file = written({name: tensor for name, tensor in tensors.items() if tensor is not None})
        return resolved(file, folder_of(architecture), **options)

    return resolve
