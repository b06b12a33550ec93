"""Memory stays where the start put it."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory_flat.py"


def test_500_mixed_requests_do_not_move_the_peak() -> None:
    """In a process of its own, since a peak is a whole process's and never falls."""
    command = (sys.executable, str(BENCHMARK), "--longest-prompt", "512")
    # One thread, as in the other tests: allocators keep a pool for each.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["requests"] == 500
    assert result["owned_blocks"] == 0
    assert result["growth"] < 0.05
