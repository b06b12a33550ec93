"""benchmarks/gpu.py from end to end: every part, tiny, on the CPU and in a process of its own."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.triton import triton_suite

pytestmark = triton_suite

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PARTS = ("kernels-check", "ceilings", "kernels", "context", "decode", "prefill", "tuning")
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("fastapi", "pydantic_settings", "uvicorn")))
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(
    *arguments: str | Path, interpreter: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *interpreter, str(SCRIPT), *map(str, arguments)]
    # From another folder and without the installed package's help: a checkout is all it needs.
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=SCRIPT.parents[2], timeout=200
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a dry run of everything, for which the HTTP server's packages are not needed."""
    path = tmp_path_factory.mktemp("dry") / "gpu.json"
    done = run(
        "--dry-run", "--only", ",".join(PARTS), "--output", path, interpreter=("-c", WITHOUT)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["benchmark"], summary["wrong"]) == ("gpu", [])
    return path


def statuses(parts: Mapping[str, Mapping[str, Mapping[str, object]]]) -> Counter[object]:
    return Counter(entry["status"] for found in parts.values() for entry in found.values())


def test_every_measurement_of_every_part_is_made(measured: Path) -> None:
    parts = json.loads(measured.read_text(encoding="utf-8"))["parts"]
    assert tuple(parts) == PARTS
    assert set(statuses(parts)) == {"ok"}
    assert measured.with_suffix(".png").exists()


def test_a_second_run_measures_nothing(measured: Path) -> None:
    before = measured.read_bytes()
    done = run("--dry-run", "--output", measured)
    assert done.returncode == 0, done.stderr
    assert "kernels: " not in done.stdout.partition("dry run on")[0]
    assert measured.read_bytes() == before


def test_a_part_that_is_asked_for_is_measured_anew(measured: Path) -> None:
    kept = json.loads(measured.read_text(encoding="utf-8"))["parts"]
    done = run("--dry-run", "--only", "ceilings", "--output", measured)
    assert done.returncode == 0, done.stderr
    parts = json.loads(measured.read_text(encoding="utf-8"))["parts"]
    assert parts["ceilings"] != kept["ceilings"]
    assert {**parts, "ceilings": None} == {**kept, "ceilings": None}


def test_without_time_everything_is_skipped_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run("--dry-run", "--minutes", "0", "--output", path)
    assert done.returncode == 0, done.stderr
    assert set(statuses(json.loads(path.read_text(encoding="utf-8"))["parts"])) == {"skipped"}
    assert "prefill: tiny 40 retrieval 50%: skipped: needs about" in done.stdout


def test_a_file_of_results_is_reported_anywhere(measured: Path) -> None:
    done = run("--report", measured)
    assert done.returncode == 0, done.stderr
    assert "engine, decode of one sequence" in done.stdout
    assert "more context: blocks to the host and back" in done.stdout
