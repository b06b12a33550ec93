"""benchmarks/gpu.py from end to end: every part, tiny, on the CPU and in a process of its own."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gpu
import gpu_context_engine
import gpu_report
import pytest

from support.triton import triton_suite

pytestmark = triton_suite

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PARTS = ("kernels-check", "ceilings", "kernels", "context", "decode", "prefill", "tuning")
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("fastapi", "pydantic_settings", "torchao", "uvicorn")))
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a dry run of everything, for which packages that are not needed are away."""
    path = tmp_path_factory.mktemp("dry") / "gpu.json"
    script = [str(SCRIPT), "--dry-run", "--only", ",".join(PARTS), "--output", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *script],
        capture_output=True,
        text=True,
        check=False,
        # From another folder and without the installed package's help: a checkout is all it needs.
        cwd=SCRIPT.parents[2],
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["benchmark"], summary["wrong"]) == ("gpu", [])
    return path


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later run in this process finds is what the first one found."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (gpu, gpu_context_engine):
        monkeypatch.setattr(module, "find_spec", lambda name: None)


def copied(measured: Path, folder: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copy(measured, folder / "gpu.json"))


def output(path: Path) -> tuple[str, str]:
    return "--output", str(path)


def statuses(parts: Mapping[str, Mapping[str, Mapping[str, object]]]) -> Counter[object]:
    return Counter(entry["status"] for found in parts.values() for entry in found.values())


def test_every_measurement_of_every_part_is_made(measured: Path) -> None:
    parts = json.loads(measured.read_text(encoding="utf-8"))["parts"]
    assert tuple(parts) == PARTS == tuple(gpu.PARTS)
    assert statuses(parts)["skipped"] == 1
    assert set(statuses(parts)) == {"ok", "skipped"}
    assert "torchao" in parts["context"]["engine 100 int4, int8 weights"]["why"]
    assert measured.with_suffix(".png").exists()


def test_a_second_run_measures_nothing_that_is_there(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(measured, tmp_path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["parts"]["ceilings"].popitem()
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert gpu.main(["--dry-run", *output(path)]) == 0
    shown, _, _ = capsys.readouterr().out.partition("dry run on")
    first, second = (line.partition("] ")[2] for line in shown.splitlines() if line)
    assert first.startswith("ceilings: matmul bfloat16 64: median_ms ")
    assert second.startswith("context: engine 100 int4, int8 weights: skipped: ")


def test_a_part_that_is_asked_for_is_measured_anew(measured: Path, tmp_path: Path) -> None:
    path = copied(measured, tmp_path)
    kept = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert gpu.main(["--dry-run", "--only", "ceilings", *output(path)]) == 0
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert parts["ceilings"] != kept["ceilings"]
    assert {**parts, "ceilings": None} == {**kept, "ceilings": None}


def test_without_time_everything_is_skipped_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--minutes", "0", *output(path)]) == 0
    assert set(statuses(json.loads(path.read_text(encoding="utf-8"))["parts"])) == {"skipped"}
    assert "prefill: tiny 40 retrieval 50%: skipped: needs about" in capsys.readouterr().out


def test_a_file_of_results_is_reported_anywhere(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--report", str(measured)]) == 0
    shown = capsys.readouterr().out
    for title, table in gpu_report.TABLES:
        assert f"\n{title}\n" in shown, table
    assert "\n  1 x 100          int4 " in shown
