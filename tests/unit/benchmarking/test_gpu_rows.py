"""The rows of bench-gpu, rehearsed on a CPU; which rows are left out, and what is shown of them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarking import gpu, gpu_pack, gpu_rows
from sushi_research.errors import UserError
from testing.real_configs import NARROW_UNETS

# Fewer layers still.
SMALL = {
    "sd15": NARROW_UNETS["sd15"] | {"layers_per_block": 1},
    "sdxl": NARROW_UNETS["sdxl"] | {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]},
}
CARD = {"name": "NVIDIA H100 80GB HBM3", "gib": 79.0, "is_rehearsal": False}


@pytest.fixture
def small(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(gpu_rows, "NARROW_UNETS", SMALL)
    return tmp_path


def test_recorded_micro_batches_equal_eager_ones(small: Path) -> None:
    found = gpu_rows.equality(small, 0.0, dry=True, architecture="sd15")
    assert found["path"] == "recorded"
    assert found["deterministic_recorded_is_eager"] is True and found["deterministic_recorded_differs"] == 0


@pytest.mark.parametrize(
    "name", ["sdxl-b4-feed-forward", "sdxl-nf4", "sdxl-b1-eager"], ids=lambda name: name.removeprefix("sdxl-")
)
def test_a_row_trains(name: str, small: Path) -> None:
    row = next(row for row in gpu.ROWS if row.name == name)
    found = gpu_rows.train(small, 0.0, dry=True, **row.arguments)
    assert found["loss_is_finite"] and found["steps"] >= 3 and found["first_ms"] > 0
    assert found["path"] == ("eager" if name.endswith("eager") else "recorded") and found["said"] == []
    assert not any("tflops" in key for key in found), "a rehearsal has no FLOPs of the real size"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "1e9"])
def test_minutes_out_of_range_are_refused(minutes: str, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--minutes", minutes])
    assert "must be above 0 and at most 1440" in capsys.readouterr().err
    assert gpu.parse(["--minutes", "0.5"]).minutes == 0.5


def test_the_probe_measures_products_and_copies(small: Path) -> None:
    found = gpu_rows.probe(small, 0.0, dry=True)
    assert found["matmul_tflops"] > 0 and found["copy_tb_per_second"] > 0 and len(found) == 6


def test_every_row_has_its_function_and_its_time() -> None:
    assert {row.function for row in gpu.ROWS} == gpu_rows.FUNCTIONS.keys()
    assert [row.name for row in gpu.ROWS if row.kind == "sustained"] == ["sdxl-b1", "sdxl-b4"]
    assert len({row.name for row in gpu.ROWS}) == len(gpu.ROWS)
    large = next(row for row in gpu.ROWS if row.name == "sdxl-b16")
    assert "needs about 92 GiB" in gpu.left_out(large, CARD, 1000)["left_out"]
    assert gpu.left_out(large, CARD | {"gib": 139.0}, 1000) is None
    assert "ONLY=sdxl-b16" in gpu.left_out(large, CARD | {"gib": 139.0}, 30)["left_out"]


def test_a_row_that_fails_ends_its_process_and_no_other(monkeypatch, tmp_path: Path) -> None:
    def probe(bases: Path, seconds: float, *, dry: bool) -> dict:
        raise RuntimeError("a kernel failed\nand more")

    def train(bases: Path, seconds: float, *, dry: bool, **arguments: object) -> dict:
        return {"steps": 3}

    monkeypatch.setattr(gpu_rows, "FUNCTIONS", {"probe": probe, "train": train})
    started = []

    def run(command: list[str], *_: object) -> str:
        started.append(command)
        return f"its process ended with status {gpu.measure_rows(gpu.parse(command[3:]))}"

    monkeypatch.setattr(gpu, "_run", run)
    arguments = gpu.parse(["--dry", "--only", "probe", "sd15-b8", "sdxl-b1"])
    found = gpu.measure(arguments, tmp_path / "bases")["rows"]
    assert [row["row"] for row in found] == ["probe", "sdxl-b1", "sd15-b8"] and len(started) == 2
    assert found[0]["failed"] == "RuntimeError: a kernel failed" and found[1]["steps"] == 3
    assert gpu.describe(found[0]).endswith("FAILED: RuntimeError: a kernel failed")
    monkeypatch.setattr(gpu, "_run", lambda *_: "its process ended with status -9")
    found = gpu.measure(arguments, tmp_path / "other")["rows"]
    assert [row["failed"] for row in found] == ["its process ended with status -9"] * 3


def test_a_table_has_the_rows_that_trained() -> None:
    shown = {
        "row": "sdxl-b1",
        "kind": "sustained",
        "card": "H200",
        "path": "recorded",
        "first_ms": 80.0,
        "settled_ms": 85.0,
    }
    shown |= {
        "first_images_per_second": 12.5,
        "settled_images_per_second": 11.8,
        "first_tflops": 182.0,
        "settled_tflops": 172.0,
    }
    shown |= {"allocated_gib": 5.5, "reserved_gib": 6.0, "on_the_card_gib": 7.0}
    rows = [{"row": "probe", "kind": "short", "failed": "x"}, shown]
    assert gpu.table_rows({"rows": rows}) == [
        "| H200 | sdxl-b1 | recorded | 80.0, 85.0 | 12.50, 11.80 | 182, 172 | 5.50, 6.00, 7.00 |  |"
    ]


def test_a_packed_bitsandbytes_has_the_library_of_one_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = ["bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/a.py"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names:
            file.writestr(name, name)
        file.writestr("b.dist-info/RECORD", "".join(f"{name},x,1\n" for name in names))
    gpu_pack.slim(wheel, ("cuda130.so", "cpu.so"))
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == [*names[1:], "b.dist-info/RECORD"]
        assert "cuda118" not in file.read("b.dist-info/RECORD").decode()
    with pytest.raises(UserError, match="no library"):
        gpu_pack.slim(wheel, ("cuda999.so",))
    assert len(gpu_pack.versions(gpu_pack.ROOT / "constraints.txt")) == len(gpu_pack.PACKAGES)
