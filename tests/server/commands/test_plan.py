import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from headlong.demo.paths import MODEL_DIR
from headlong.server import cli
from headlong.server.commands.plan import parse_lengths
from headlong.server.errors import ConfigError
from support.llama3 import write_config

Run = Callable[..., SimpleNamespace]
KEYS = {
    "weights_bytes",
    "kv_bytes_per_token",
    "kv_bytes_per_sequence",
    "max_context_tokens",
    "cache_tokens",
    "groups",
    "sequences",
    "sequence_bytes",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``headlong plan``; gives its exit code, output and error output."""

    def call(*args: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["headlong", "plan", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return SimpleNamespace(code=stopped.value.code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def llama3(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_one_json_object_without_weights_or_network(tmp_path: Path) -> None:
    """As a user runs it, in a process of its own, with a file that transformers warns of."""
    llama3 = write_config(tmp_path, bos_token_id=-5)
    code = "import sys; from headlong.server.cli import main; main()"
    options = "--gpu a100-80g --sparsity 0.5 --dtype bfloat16 --kv-cache-dtype auto --json"
    arguments = [sys.executable, "-c", code, "plan", str(llama3), *options.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bos_token_id must be" in done.stderr
    made = json.loads(done.stdout)
    assert set(made) >= KEYS | {"full_cache"}
    assert set(made["full_cache"]) == KEYS
    assert made["weights_bytes"] == made["full_cache"]["weights_bytes"] == 16_060_523_008
    assert made["kv_bytes_per_token"] == 65_536
    assert made["kv_bytes_per_sequence"] == 26_214_400
    assert made["max_context_tokens"] == 895_664
    assert made["full_cache"]["kv_bytes_per_token"] == 131_072
    assert made["full_cache"]["kv_bytes_per_sequence"] == 0
    assert made["full_cache"]["max_context_tokens"] == 448_032
    assert made["model_max_context"] == 8192
    assert made["quantization"] is None
    assert (made["compensation"], made["retrieval_budget"]) == ("off", None)
    assert made["sparsity"] == 0.5
    assert made["labels"] == "even"
    assert made["sequences"] == {"8192": 103, "32768": 27, "131072": 6, "1048576": 0}
    assert sum(group["kv_bytes_per_token"] for group in made["groups"]) == 65_536


def test_a_table_for_people(run: Run, llama3: Path) -> None:
    result = run(llama3, "--gpu", "a100-80g", "--sparsity", 0.5)
    assert result.code == 0
    for line in (
        r"weights +14\.96 GiB +16 060 523 008",
        r"KV cache +54\.69 GiB",
        r"bytes for each token +65 536 +131 072 +0\.50x",
        r"longest context, tokens +895 664 +448 032 +2\.00x",
        r"sequences of 128k +6 +3 +2\.00x",
        r"streaming +128 heads +sink 128 \+ window 256 tokens +26 214 400 B",
        r"made for 8 192 tokens",
    ):
        assert re.search(line, result.out), line


def test_duo_attentions_setting_fits_80_gb(run: Run, tmp_path: Path) -> None:
    """DuoAttention (arXiv 2410.10819): 3.30 M tokens with 8-bit weights and a 4-bit KV cache."""
    longer = write_config(tmp_path, max_position_embeddings=1 << 22)
    options = (
        "--gpu", "a100-80g", "--sparsity", 0.5, "--quantization", "int8wo",
        "--kv-cache-dtype", "int4",
    )  # fmt: skip
    made = json.loads(run(longer, *options, "--max-model-len", 3_300_000, "--json").out)
    assert made["max_context_tokens"] >= 3_300_000
    assert made["weights_bytes"] < 8.5 * 2**30
    assert made["kv_bytes_per_token"] == 32 * 8 * 68
    assert (made["quantization"], made["kv_cache_dtype"]) == ("int8wo", "int4")
    assert made["arena_bytes"] > 57 * 10**9
    told = "--quantization int8wo: weights of linear layers in 8 bits, computed in bfloat16."
    assert told in made["notes"]


def test_a_format_for_each_kind_of_head(run: Run, llama3: Path) -> None:
    options = ("--gpu", "h100-80g", "--sparsity", 0.5, "--kv-cache-dtype")
    formats = "retrieval=int4,streaming=bf16"
    made = json.loads(run(llama3, *options, formats, "--json").out)
    assert made["kv_cache_dtype"] == formats
    assert made["kv_bytes_per_token"] == 128 * 136
    assert made["kv_bytes_per_sequence"] == 26_214_400
    assert made["full_cache"]["kv_bytes_per_token"] == 128 * (136 + 512)


def test_what_pages_hold_beside_k_and_v_is_counted(run: Run, llama3: Path) -> None:
    options = ("--gpu", "h100-80g", "--sparsity", 0.5, "--json")
    plain = json.loads(run(llama3, *options).out)
    more = json.loads(run(llama3, *options, "--retrieval-budget", 4096, "--compensation", "on").out)
    assert more["kv_bytes_per_token"] == plain["kv_bytes_per_token"] * (512 + 64) // 512
    assert more["kv_bytes_per_sequence"] == plain["kv_bytes_per_sequence"] * (8192 + 1024) // 8192
    assert (more["compensation"], more["retrieval_budget"]) == ("on", 4096)


def test_a_model_folders_own_profile_is_used(run: Run) -> None:
    options = (MODEL_DIR, "--gpu", "1GiB", "--lengths", "512,1k", "--dtype", "float32", "--json")
    made = json.loads(run(*options).out)
    assert made["labels"] == "profile"
    assert made["kv_bytes_per_token"] < made["full_cache"]["kv_bytes_per_token"]
    assert list(made["sequences"]) == ["512", "1024"]
    plain = json.loads(run(*options, "--profile", "none").out)
    assert plain["labels"] == "full"
    assert plain["kv_bytes_per_token"] == plain["full_cache"]["kv_bytes_per_token"]


@pytest.mark.parametrize("extra", [(), ("--sparsity", 0.5), ("--sparsity", 1.0)])
def test_a_plot(run: Run, llama3: Path, tmp_path: Path, extra: tuple[object, ...]) -> None:
    picture = tmp_path / "plan.png"
    result = run(llama3, "--gpu", "h200", "--plot", picture, *extra)
    assert result.code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {picture}" in result.out


def test_json_stays_one_object_beside_a_plot(run: Run, llama3: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    options = ("--kv-cache-memory-bytes", 1 << 30, "--plot", picture, "--json")
    made = json.loads(run(llama3, *options).out)
    assert made["gpu"] is None
    assert made["kv_cache_bytes"] == 1 << 30
    assert picture.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "h800"), "--gpu 'h800' is not known; known are"),
        (("--gpu", "t4"), "compute capability 7.5"),
        (("--gpu", "8GiB"), "--gpu: .* hold no sequence"),
        ((), "--gpu: either gpu or"),
        (("--gpu", "h200", "--kv-cache-memory-bytes", "1000"), "--gpu: either gpu or"),
        (("--gpu", "h200", "--sparsity", "1.5"), "--sparsity must be in 0 to 1"),
        (("--gpu", "h200", "--sparsity", "nan"), "--sparsity must be in 0 to 1"),
        (("--gpu", "h200", "--sparsity", "0.5", "--window-size", "0"), "--window-size must"),
        (("--gpu", "h200", "--sink-size", "4"), "--sink-size must be left out"),
        (("--gpu", "h200", "--threshold", "0.5"), "--threshold must be left out"),
        (("--gpu", "h200", "--kv-cache-dtype", "int3"), "--kv-cache-dtype must be one of auto,"),
        (("--gpu", "h200", "--kv-cache-dtype", "float16"), "layers make bfloat16 K and V"),
        (("--gpu", "h200", "--quantization", "int4wo", "--dtype", "float16"), "in bfloat16"),
        (("--gpu", "h200", "--retrieval-budget", "16"), "--retrieval-budget must be at least 8"),
        (("--gpu", "h200", "--lengths", "8x"), "--lengths: '8x' is no length"),
        (("--gpu", "h200", "--lengths", ""), "--lengths: '' is no length"),
        (("--gpu", "h200", "--profile", "nowhere.json"), "nowhere.json: no such file"),
        (("--gpu", "h200", "--plot", "/nowhere/p.png"), "its folder does not exist"),
        (("--gpu", "h200", "--block-size", "7"), "--block-size must be a power of two"),
        (("--gpu", "h200", "--max-model-len", "9000"), "--max-model-len is 9000, but the model"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, llama3: Path, options: tuple[str, ...], message: str
) -> None:
    result = run(llama3, *options)
    assert result.code == 2
    assert re.search(message, result.err), result.err
    assert result.err.startswith("headlong: ")
    assert result.err.count("\n") == 1
    assert not result.out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere.json", "MODEL: nowhere.json: no such file"),
        ("a/b/c", "MODEL: a/b/c: no such file"),
        ("headlong/no-such-model-here", "MODEL: cannot plan for headlong/no-such-model-here"),
    ],
)
def test_a_model_that_is_not_to_be_had(
    run: Run, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run(model, "--gpu", "h200")
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


def test_help_names_the_options_and_imports_no_torch() -> None:
    code = (
        "import sys; from headlong.server.cli import app; from typer.testing import CliRunner;"
        "made = CliRunner().invoke(app, ['plan', '--help'], env={'COLUMNS': '200'});"
        "assert made.exit_code == 0 and 'a100-80g' in made.output, made.output;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lengths() -> None:
    assert parse_lengths("8k, 1M,300,8K") == (8192, 1 << 20, 300)
    for text in ("k", "-1", "1.5k", "1g", "8k,,1M"):
        with pytest.raises(ConfigError, match="is no length"):
            parse_lengths(text)
