"""lm-eval over HTTP against lm-eval over transformers: the same log likelihoods, to 1e-4.

Run by run.py, in the clients' environment.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

TOLERANCE = 1e-4
NUM_DOCUMENTS = 40
TASK = "headlong_local"
WORDS = ["access", "code", "Alice", "the", "of", "river", "4821", "is", "what", "and", "garden"]


def write_task(folder: Path) -> None:
    """A multiple-choice task of random words, of a few to some hundred tokens."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    documents = [
        {
            "context": words(rng.choice((2, 20, 100))),
            "choices": [words(rng.randrange(1, 6)) for _ in range(3)],
            "label": rng.randrange(3),
        }
        for _ in range(NUM_DOCUMENTS)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    (folder / f"{TASK}.yaml").write_text(
        f"""task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""
    )


def likelihoods(folder: Path, name: str, model: str, model_args: str) -> dict[str, list[float]]:
    """Log likelihood of each choice of each document, as lm-eval logs them."""
    output = folder / name
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", model_args),
        *("--tasks", TASK, "--include_path", str(folder), "--output_path", str(output)),
        *("--log_samples", "--batch_size", "4", "--device", "cpu"),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"lm_eval {name} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    (samples,) = output.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return {
        row["doc_hash"] + str(row["doc_id"]): [float(each[0][0]) for each in row["resps"]]
        for row in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    write_task(options.folder)
    served = likelihoods(
        options.folder,
        "served",
        "local-completions",
        f"model={options.model},base_url={options.url}/v1/completions,num_concurrent=4,"
        f"max_retries=1,tokenized_requests=True,tokenizer={options.checkpoint}",
    )
    expected = likelihoods(
        options.folder, "transformers", "hf", f"pretrained={options.checkpoint},dtype=float32"
    )
    if served.keys() != expected.keys() or len(served) != NUM_DOCUMENTS:
        raise SystemExit(f"{len(served)} documents were served, {len(expected)} expected")
    pairs = [
        (ours, theirs)
        for key in expected
        for ours, theirs in zip(served[key], expected[key], strict=True)
    ]
    worst = max(abs(ours - theirs) for ours, theirs in pairs)
    print(f"lm_eval: {len(pairs)} log likelihoods, largest difference {worst:.1e}")
    # `not <=`, so that NaN fails.
    if not worst <= TOLERANCE:
        raise SystemExit(f"log likelihoods differ by {worst}, over {TOLERANCE}")


if __name__ == "__main__":
    main()
