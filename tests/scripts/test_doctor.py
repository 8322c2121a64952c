"""scripts/doctor.py: what it says of this machine, and which faults it calls problems."""

from __future__ import annotations

import argparse
import http.server
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import config as accelerate_config
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config import config_args
from script_runs import script

from sushi_research.errors import UserError
from sushi_research.models.hub_access import HubAccess
from sushi_research.runs import installed

DOCTOR = script("doctor")


@pytest.fixture
def doctor(capsys, tmp_path, monkeypatch):
    """Runs the script with a config; returns its exit status and its findings: {what: (state, text)}."""
    monkeypatch.chdir(tmp_path)

    def run(text: str = "") -> tuple[int, dict[str, tuple[str, str]]]:
        (tmp_path / "config.yaml").write_text(text)
        status = DOCTOR.main(argparse.Namespace(config=[str(tmp_path / "config.yaml")] if text else []))
        lines = capsys.readouterr().out.splitlines()
        return status, {line[9:23].strip(): (line[:9].strip(), line[23:]) for line in lines}

    return run


@pytest.fixture
def launcher_config(monkeypatch, tmp_path):
    """Puts a config file of accelerate in place of the user's."""

    def write(text: str) -> Path:
        path = tmp_path / "default_config.yaml"
        path.write_text(
            f"compute_environment: LOCAL_MACHINE\nnum_machines: 1\nnum_processes: 1\nmachine_rank: 0\n{text}"
        )
        for module in (accelerate_config, config_args, accelerate_launch):
            monkeypatch.setattr(module, "default_config_file", str(path))
        return path

    return write


def test_a_machine_without_problems(doctor, launcher_config):
    file = launcher_config("distributed_type: 'NO'\nmixed_precision: 'no'\n")
    status, found = doctor()
    assert status == 0 and not [each for each in found.values() if each[0] == "problem"]
    assert found["torch"][1].startswith(torch.__version__)
    assert found["accelerate"] == ("ok", f"{file}: `accelerate launch` starts 1 process, mixed precision no")
    assert found["cache.folder"][1].endswith("free on its disk") and "cache: " in found["cache.folder"][1]
    assert found["W&B"][1].startswith("offline (WANDB_MODE") and found["hub"][1].startswith("HF_HUB_OFFLINE is set")


def test_what_the_launcher_asks_for_and_the_scripts_refuse(doctor, launcher_config):
    launcher_config("distributed_type: FSDP\nfsdp_config: {}\nmixed_precision: bf16\n")
    status, found = doctor("train: {precision: fp32}")
    assert (
        status == 2
        and found["accelerate"][0] == "problem"
        and "the launcher asks for --use_fsdp" in found["accelerate"][1]
    )
    assert found["precision"][0] == "note" and "fp32 (the config says fp32); but bf16 under" in found["precision"][1]
    launcher_config("distributed_type: NOTHING\n")
    status, found = doctor()
    assert status == 2 and "run `accelerate config` again" in found["accelerate"][1]


def test_the_settings_of_a_config(doctor, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/shard").write_bytes(bytes(3 * 2**20))
    status, found = doctor("model: {base: owner/name}\nrun: {folder: file}\ntracking: {wandb: online}\n")
    assert status == 2
    assert found["run.folder"][0] == "problem" and "is no folder" in found["run.folder"][1]
    assert "3 MiB in it" in found["cache.folder"][1]
    assert found["W&B"][0] == "problem" and found["hub"][0] == "problem"
    assert "model.base owner/name is not in the hub cache" in found["hub"][1]


def test_another_python_is_told_without_a_traceback():
    # Without site there are no installed packages.
    command = [sys.executable, "-I", "-S", DOCTOR.__file__]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and not found.stderr
    assert "does not have sushi_research, pydantic, " in found.stdout and "activate the environment" in found.stdout


def test_a_base_that_is_not_there_is_a_problem(doctor, tmp_path):
    status, found = doctor("model: {base: /models/none.safetensors}")
    assert status == 2 and found["hub"][0] == "ok", found["hub"]
    assert found["model.base"][0] == "problem" and "is neither a folder nor a file" in found["model.base"][1]
    (tmp_path / "base").mkdir()
    assert doctor("model: {base: base}")[0] == 0


def test_a_value_that_is_not_valid_is_refused(doctor):
    with pytest.raises(UserError, match=r"train.precision is 5 in .*config.yaml: must be auto, bf16, fp16 or fp32"):
        doctor("train: {precision: 5}")


def test_versions_against_the_ranges_and_the_tested_ones(doctor, monkeypatch):
    real = installed.version
    monkeypatch.setattr(installed, "version", lambda name: "4.1.0" if name == "datasets" else real(name))
    status, found = doctor()
    assert status == 0, {what: each for what, each in found.items() if each[0] == "problem"}
    assert found["versions"][0] == "note" and "datasets 4.1.0 (tested: 5.2.0)" in found["versions"][1]
    monkeypatch.setattr(installed, "version", lambda name: "1.0" if name == "peft" else real(name))
    status, found = doctor()
    assert (status, found["versions"][0]) == (2, "problem") and "peft is 1.0 (needed: <1,>=0.18)" in found["versions"][
        1
    ]


def test_the_hub_is_asked_once_and_not_waited_for(doctor, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        log_message = staticmethod(lambda *_: None)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [each[:2] for each in DOCTOR.check_hub(None, HubAccess())] == [("ok", "hub")]
        server.shutdown()
    [(state, _, text)] = DOCTOR.check_hub(None, HubAccess())
    assert state == "note" and "it cannot be reached (http://127.0.0.1:" in text
    monkeypatch.setattr(HubAccess, "_ask", lambda self: None)
    assert "no answer within 0.05 s" in next(DOCTOR.check_hub(None, HubAccess(seconds=0.05)))[2]


def test_a_gpu_that_torch_does_not_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = SimpleNamespace(stdout="GPU 0: a GPU\n")
    monkeypatch.setattr(DOCTOR.subprocess, "run", lambda *_, **__: run)
    assert [state for state, what, _ in DOCTOR.check_devices() if what == "GPU"] == ["problem"]
    run.stdout = "No devices were found\n"
    assert [state for state, what, _ in DOCTOR.check_devices() if what == "GPU"] == ["note"]
