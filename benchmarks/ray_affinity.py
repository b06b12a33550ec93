"""Prefix affinity: how often two replicas behind Ray Serve find a shared prefix, beside one.

    python benchmarks/ray_affinity.py

The embedded model runs behind ``headlong serve-ray`` three times: as one replica, as two with
prefix affinity, and as two with random routing. Each is sent the same prompts by ``headlong
bench``: a few long prefixes in a random order, each prompt with a suffix of its own. The hit rate
is that of prompt tokens, over all replicas. Each replica alone has room for all prefixes, so that
what differs is where requests go.
"""

import argparse
import json
import os
import secrets
import subprocess
import tempfile
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from headlong.demo.paths import MODEL_DIR
from local_server import BIN, serving

CASES = {
    "one": ("--num-replicas=1",),
    "prefix": ("--num-replicas=2", "--routing=prefix"),
    "random": ("--num-replicas=2", "--routing=random"),
}
ENGINE = (
    "--device=cpu", "--kv-cache-memory-bytes=268435456", "--max-model-len=4096",
    "--max-num-seqs=32", "--num-cpus-per-replica=0.5", "--served-model-name=demo",
)  # fmt: skip
WITHIN = 0.1


def hit_rate(url: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    totals = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    queries = totals["headlong:prefix_cache_queries_total"]
    return totals["headlong:prefix_cache_hits_total"] / queries


def measure(url: str, options: argparse.Namespace, report: Path) -> dict[str, float]:
    load = (
        str(BIN / "headlong"), "bench", "run", url, "--workload=shared-prefix",
        f"--tokenizer={MODEL_DIR}", f"--num-prefixes={options.prefixes}",
        f"--prefix-len={options.prefix_tokens}", f"--suffix-len={options.suffix_tokens}",
        f"--num-prompts={options.prompts}", f"--max-concurrency={options.concurrency}",
        "--output-len=8", "--ignore-eos", f"--output={report}",
    )  # fmt: skip
    subprocess.run(load, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads(report.read_text(encoding="utf-8"))["runs"][0]["summary"]
    return {
        "hit_rate": round(hit_rate(url), 4),
        "ttft_p50_ms": round(summary["ttft_ms"]["p50"], 1),
        "requests_per_s": round(summary["request_throughput"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefixes", type=int, default=12, help="(default 12)")
    parser.add_argument("--prefix-tokens", type=int, default=512, help="of each (default 512)")
    parser.add_argument("--suffix-tokens", type=int, default=32, help="of each (default 32)")
    parser.add_argument("--prompts", type=int, default=72, help="in all (default 72)")
    parser.add_argument("--concurrency", type=int, default=4, help="clients (default 4)")
    options = parser.parse_args()
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex()  # one here leaves no file
    found: dict[str, dict[str, float]] = {}
    # Ray's sockets lie there, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder
        for name, flags in CASES.items():
            command = (str(BIN / "headlong"), "serve-ray", str(MODEL_DIR), *ENGINE, *flags)
            with serving(command, Path(folder) / f"{name}.log") as url:
                found[name] = measure(url, options, Path(folder) / f"{name}.json")
    print(f"{'replicas, routing':<20}{'hit rate':>10}{'TTFT p50':>12}{'requests/s':>12}")
    for name, figures in found.items():
        label = "1" if name == "one" else f"2, {name}"
        print(
            f"{label:<20}{figures['hit_rate']:>9.1%}{figures['ttft_p50_ms']:>10.1f}ms"
            f"{figures['requests_per_s']:>12.2f}"
        )
    one = found["one"]["hit_rate"]
    within = found["prefix"]["hit_rate"] >= (1 - WITHIN) * one
    print(f"prefix affinity within {WITHIN:.0%} of one replica: {'yes' if within else 'NO'}")
    print(
        json.dumps(
            {
                "benchmark": "ray_affinity",
                **{name: getattr(options, name) for name in vars(options)},
                "found": found,
                "prefix_over_one": round(found["prefix"]["hit_rate"] / one, 4),
                "random_over_one": round(found["random"]["hit_rate"] / one, 4),
                "cores": os.cpu_count(),
            }
        )
    )
    if not within:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
