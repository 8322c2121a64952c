"""W&B that cannot be reached, or has bad settings: one sentence, and the run goes on. With the real W&B, except where it waits."""

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import wandb

from sushi_research.errors import UserError
from sushi_research.runs import tracking, wandb_run
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.tracking import Trackers


class Refusing(BaseHTTPRequestHandler):
    """Answers 401 to everything, as W&B does for a key that is not valid any more."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        answer = b'{"errors":[{"message":"no"}]}'
        self.send_response(401)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """The real W&B with only the given variables, as in a new process: `machine(WANDB_MODE="online")`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def prepare(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        wandb_run.stop_service()

    yield prepare
    monkeypatch.undo()
    wandb_run.stop_service()


@pytest.fixture
def refused(machine):
    """W&B with credentials that its server does not accept."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    machine(WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def start(folder, trackers):
    run = SimpleNamespace(is_main_process=True, trackers=[])
    options = {
        "run_id": "0123abcd",
        "name": "trial",
        "config": {},
        "project": "tests",
        "entity": None,
        "tags": [],
        "step": 0,
    }
    tracking.start_trackers(run, trackers, folder=folder, **options)
    return run


def ours(caplog):
    """What this package logged; W&B logs too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("sushi_research")]


def test_a_run_that_cannot_be_online_goes_on_offline(tmp_path, refused, caplog):
    """In one process, with one id: W&B refuses the second start unless its service has ended."""
    trackers = tracking.resolve_trackers("auto", False)
    assert trackers.wandb_mode == "online"
    run = start(tmp_path, trackers)
    tracking.log(run, MetricsFile(tmp_path / "metrics.jsonl"), {"loss": 0.5}, 1)
    assert len(run.trackers) == 1, caplog.text
    tracking.end_trackers(run)
    wandb_run.stop_service()  # it writes the files a little after the run is finished
    [warning] = ours(caplog)
    assert warning.startswith("W&B cannot be reached (") and "401" in warning
    assert warning.endswith(": the run goes on offline, and `wandb sync` uploads it later")
    [file] = tmp_path.glob("wandb/offline-run-*-0123abcd/*.wandb")
    assert b"loss" in file.read_bytes()


def test_a_run_that_must_be_online_is_refused(tmp_path, refused):
    with pytest.raises(
        UserError, match="tracking.wandb is online but W&B cannot be started .*401.*: try again, or set it to"
    ):
        start(tmp_path, Trackers(["wandb"], "online", False, ""))


def test_settings_that_wandb_does_not_accept(machine, tmp_path, caplog):
    machine(WANDB_MODE="sometimes")
    trackers = tracking.resolve_trackers("auto", False)
    assert trackers.names == [] and "mode is 'sometimes'" in trackers.notice
    assert trackers.notice.startswith("W&B: off") and "\n" not in trackers.notice
    machine()
    with pytest.raises(UserError, match="W&B cannot be used .mode is 'sometimes'"):
        tracking.resolve_trackers("online", False)
    machine()
    run = start(tmp_path, Trackers(["wandb"], "offline", False, ""))
    assert run.trackers == [] and "W&B cannot be started (mode is 'sometimes'" in caplog.text


def test_transformers_way_to_turn_it_off(machine):
    machine(WANDB_DISABLED="true")
    assert tracking.resolve_trackers("auto", False)[:2] == ([], None)
    with pytest.raises(UserError, match="WANDB_DISABLED is disabled"):
        tracking.resolve_trackers("online", False)


def test_an_end_that_wandb_does_not_take(tmp_path, monkeypatch, caplog):
    """The limits that the run is started with, and what is said when they end."""
    given = {}

    class Run:
        settings = SimpleNamespace(sync_dir=str(tmp_path / "a b"))

        def define_metric(self, *_, **__):
            pass

        def finish(self):
            raise TimeoutError("Timed out finishing run.")

    monkeypatch.setattr(wandb, "init", lambda settings, **_: given.update(dict(settings)) or Run())
    monkeypatch.setattr(wandb_run, "stop_service", lambda: None)
    run = start(tmp_path, Trackers(["wandb"], "online", True, ""))
    assert given["init_timeout"] <= 10 and given["finish_timeout"] <= 30 and given["finish_timeout_raises"]
    caplog.set_level(logging.WARNING)
    tracking.end_trackers(run)
    assert ours(caplog) == [
        f"wandb: W&B did not take everything in time; `wandb sync '{tmp_path / 'a b'}'` uploads the rest later"
    ]


def test_tensorboard_that_cannot_be_started(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where its folder would be")
    assert start(tmp_path, Trackers(["tensorboard"], None, True, "")).trackers == []
    assert "TensorBoard cannot be started (" in caplog.text and "the run goes on without it" in caplog.text
