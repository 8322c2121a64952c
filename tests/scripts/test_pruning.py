"""scripts/cache_dataset.py --prune: the caches then have what one config needs, and nothing else."""

import shutil

import pytest
from script_runs import Trainer, script

from sushi_research.errors import UserError


@pytest.mark.parametrize("architecture", ["sd15"])
def test_what_another_data_set_needed_is_removed(architecture, bases, photos, tmp_path, capsys):
    cache_dataset = script("cache_dataset")
    trainer = Trainer(architecture, bases[architecture], photos, tmp_path / "runs", tmp_path / "cache")
    some = tmp_path / "some"
    some.mkdir()
    for name in ("2.webp", "2.txt", "3.png", "3.txt"):
        shutil.copy(photos / name, some)
    config = trainer.config("unused", {"data.path": str(some), "data.flip": 0.5})

    def run(config, **options) -> str:
        capsys.readouterr()
        assert cache_dataset.main(config, **options) == 0
        return capsys.readouterr().out

    run(trainer.config("unused"))
    assert "2 image entries and 0 captions to encode" in run(config)
    before = sorted((tmp_path / "cache").rglob("shard-*"))
    damaged = tmp_path / "cache" / "latents" / f"shard-{'0' * 32}.arrow.damaged"
    damaged.write_bytes(b"1234")
    dry = run(config.model_copy(update={"dry_run": True}), prune=True)
    # Of nine image entries it needs two and their mirror images; of eight captions its two and the empty one.
    for line in (
        f"not needed: 5 of 9 entries (1 KiB) in {tmp_path}/cache/latents",
        f"not needed: 5 of 8 entries (25 KiB) in {tmp_path}/cache/text_sd15",
        f"not needed: 1 damaged or left files (4 bytes)\n            {damaged}",
    ):
        head, size, tail = line.partition("(")
        assert head in dry and tail.partition(")")[2] in dry
    assert sorted((tmp_path / "cache").rglob("shard-*")) == sorted([*before, damaged])

    assert "done: that was removed" in run(config, prune=True)
    assert not damaged.exists()
    assert "0 image entries and 0 captions to encode" in run(config)
    assert "5 image entries and 5 captions to encode" in run(trainer.config("unused"))


def test_several_processes_do_not_prune(monkeypatch):
    from types import SimpleNamespace

    with pytest.raises(
        UserError, match="--prune works in one process: run it with python instead of accelerate launch"
    ):
        script("cache_dataset").remove_unneeded(SimpleNamespace(world=2), None)
