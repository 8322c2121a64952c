"""`run.push_to_hub` and `scripts/push_to_hub.py`: a finished run is uploaded, and a failure of that loses nothing."""

from __future__ import annotations

import pytest
from fake_hub import fake_hub
from script_runs import CONFIGS, script

from sushi_research.config.command_line import config_to_yaml, load_config
from sushi_research.errors import UserError

pytestmark = pytest.mark.parametrize("architecture", ["sd15"])


def test_a_run_is_uploaded_at_its_end_again_and_by_the_script(architecture, trainer, monkeypatch, tmp_path, capsys):
    changes = {"train.steps": 1, "lora.trigger_words": ["sks dog"], "run.push_to_hub": "mycat"}
    with fake_hub(monkeypatch, tmp_path / "hub") as hub:
        hub.refuses = 500
        assert trainer.train("run", changes) == 0
        said = capsys.readouterr().out
        run = trainer.folder("run")
        assert "upload       at the end, the adapter and a model card to mycat" in said and "finished; seconds" in said
        assert "warning: mycat could not be uploaded to the hub" in said
        assert f"to try again: python scripts/push_to_hub.py {run} mycat" in said
        assert not hub.files and (run / "run.safetensors").is_file()
        hub.refuses = 0
        assert trainer.train("run", changes) == 0  # there is nothing to train
        assert hub.files["me/mycat"]["run.safetensors"] == (run / "run.safetensors").read_bytes()
        assert b"**sks dog**" in hub.files["me/mycat"]["README.md"]
        push = script("push_to_hub")
        assert push.main(push.parse([str(run), "team/other", "--public"])) == 0
        assert "run.safetensors" in hub.files["team/other"] and not hub.private["team/other"]
        assert push.main(push.parse([str(run), "other", "--card"])) == 0 and hub.commits == 2
        assert "# run" in capsys.readouterr().out
    # A config of this run, given to another one, uploads nothing.
    assert "push_to_hub" not in config_to_yaml(trainer.config("x", changes)) + (run / "config.yaml").read_text()
    with pytest.raises(UserError, match="which is in a run folder, and no upload is taken from there"):
        (run / "config.yaml").write_text(
            (run / "config.yaml").read_text().replace("  name:", "  push_to_hub: a/b\n  name:")
        )
        load_config(CONFIGS[architecture], ["--config", str(run / "config.yaml")], script="", intro="\n".join("12345"))
    with pytest.raises(UserError, match="is not a run folder"):
        push.main(push.parse([str(run / "run.safetensors"), "mycat"]))
    with pytest.raises(UserError, match="is no name of a repository"):
        push.main(push.parse([str(run), "a/b/c"]))
