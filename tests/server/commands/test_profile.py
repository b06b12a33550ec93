import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.head_profile import HeadProfile, ModelIdentity
from headlong.server import cli

Run = Callable[..., SimpleNamespace]

PROFILE = HeadProfile(
    model=ModelIdentity(architecture="qwen3", num_layers=2, num_kv_heads=2, head_dim=64),
    method="retrieval",
    scores=((0.1, 0.9), (0.3, 0.2)),
    sink_size=4,
    window_size=28,
    sparsity=0.75,
)
COMMANDS = ("score", "show", "compare", "convert", "methods")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``headlong profile``; gives its exit code, output and error output."""

    def call(*args: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["headlong", "profile", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return SimpleNamespace(code=stopped.value.code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "p.json"
    PROFILE.save(path)
    return path


def check_refused(result: SimpleNamespace, message: str) -> None:
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("headlong: ")
    assert result.err.count("\n") == 1
    assert not result.out


def test_help_lists_the_commands_and_imports_no_torch(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    # Where a CI asks for colours, typer colours each word.
    words = re.sub(r"\x1b\[[0-9;]*m", "", result.out).split()
    assert "headlong profile MODEL [OPTIONS] | COMMAND [ARGS]" in " ".join(words)
    assert set(COMMANDS) <= set(words)
    code = (
        "import sys; from headlong.server.cli import app; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(app, ['profile', '--help']).exit_code == 0;"
        "assert CliRunner().invoke(app, ['profile', 'm', '--help']).exit_code == 0;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [(), ("score",)])
@pytest.mark.parametrize("options_first", [False, True])
def test_a_model_is_scored(
    run: Run, tmp_path: Path, command: tuple[str, ...], options_first: bool
) -> None:
    output, picture = tmp_path / "p.json", tmp_path / "p.png"
    options = ("--method", "razor", "--setting", "num_tokens=20", "-o", output, "--plot", picture)
    args = (*options, MODEL_DIR) if options_first else (MODEL_DIR, *options)
    result = run(*command, *args)
    assert result.code == 0
    profile = HeadProfile.load(output)
    assert profile.method == "razor"
    assert profile.settings["num_tokens"] == 20
    assert (profile.threshold, profile.sink_size, profile.window_size) == (0.5, 4, 4000)
    lines = result.out.splitlines()
    assert lines[0].startswith("layer 0  ")
    assert "KV heads retrieve" in lines[-3]
    assert lines[-2:] == [f"Wrote {output}", f"Wrote {picture}"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scoring_takes_sizes_and_labelling(run: Run, tmp_path: Path) -> None:
    result = run(
        MODEL_DIR, "--method", "razor", "--setting", "num_tokens=20", "-o", tmp_path / "p.json",
        "--sparsity", "0.25", "--sink-size", "2", "--window-size", "9", "--note", "n",
    )  # fmt: skip
    assert result.code == 0
    profile = HeadProfile.load(tmp_path / "p.json")
    assert (profile.sparsity, profile.threshold) == (0.25, None)
    assert (profile.sink_size, profile.window_size, profile.provenance.note) == (2, 9, "n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "tea-leaves"], "method must be one of retrieval, "),
        (["--method", "razor", "--setting", "cups=3"], "razor: cups: Extra inputs"),
        (["--method", "razor", "--setting", "num_tokens=1"], "razor: num_tokens: "),
        (["--method", "razor", "--setting", "num_tokens=9999"], "num_tokens is 9999, but "),
        (["--sparsity", "0.5", "--threshold", "0.1"], "give --sparsity or --threshold, not both"),
        (["--sparsity", "1.5"], "sparsity: Input should be less than or equal to 1"),
        (["--window-size", "0"], "window_size: Input should be greater than or equal to 1"),
        (["--plot", "nowhere/p.png"], "cannot write nowhere/p.png: its folder does not exist"),
    ],
)
def test_scoring_refuses(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(MODEL_DIR, *args)
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_show(run: Run, saved: Path) -> None:
    result = run("show", saved)
    assert result.code == 0
    assert "labelling  sparsity 0.75: 1 of 4 KV heads retrieve" in result.out
    assert "layer 0  · ●  1\nlayer 1  · ·  0\n" in result.out
    assert "1048576" in result.out
    assert "score >= 0.2: 3 of 4" in run("show", saved, "--threshold", "0.2").out


def test_show_as_json(run: Run, saved: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    result = run("show", saved, "--json", "--sparsity", "0.5", "--plot", picture)
    assert result.code == 0
    shown = json.loads(result.out)
    assert {
        "retrieval_heads_per_layer": [1, 1],
        "sparsity": 0.5,
        "method": "retrieval",
        "sink_size": 4,
        "window_size": 28,
        "num_layers": 2,
        "num_kv_heads": 2,
        "labels": [[False, True], [True, False]],
    }.items() <= shown.items()
    assert [size["context_tokens"] for size in shown["cache"]] == [8192, 32768, 131072, 1048576]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_and_compare_take_duo_attentions_folders(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "p.json"
    PROFILE.save(saved)
    assert run("convert", saved, "-o", tmp_path / "duo", "--to", "duo").code == 0
    shown = json.loads(run("show", tmp_path / "duo", "--json").out)
    assert (shown["method"], shown["retrieval_heads_per_layer"]) == ("duo_attention", [1, 1])
    assert run("compare", tmp_path / "duo", saved).code == 0


def test_compare(run: Run, saved: Path, tmp_path: Path) -> None:
    PROFILE.changed(method="razor", scores=((0.9, 0.1), (0.3, 0.2))).save(tmp_path / "q.json")
    result = run("compare", saved, tmp_path / "q.json", "--json")
    assert result.code == 0
    compared = json.loads(result.out)
    assert compared["methods"] == ["retrieval", "razor"]
    assert compared["spearman"] == pytest.approx(-0.8)
    assert [row["sparsity"] for row in compared["overlaps"]] == [i / 10 for i in range(1, 10)]
    lines = run("compare", saved, tmp_path / "q.json").out.splitlines()
    assert lines[0] == "methods   retrieval, razor"
    assert len(lines) == 5 + 9


def test_convert(run: Run, saved: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    heads = [f"{layer}-{head}" for layer in range(4) for head in range(8)]
    scores.write_text(json.dumps({name: [i / 32] for i, name in enumerate(heads)}))
    output = tmp_path / "ours.json"
    result = run(
        "convert", scores, "-o", output, "--model", MODEL_DIR, "--fold", "mean",
        "--sparsity", "0.25", "--sink-size", "2", "--window-size", "9",
    )  # fmt: skip
    assert (result.code, result.out) == (0, f"Wrote {output}\n")
    profile = HeadProfile.load(output)
    assert profile.model.architecture == "qwen3"
    assert profile.settings["fold"] == "mean"
    assert (profile.sparsity, profile.sink_size, profile.window_size) == (0.25, 2, 9)
    assert run("convert", scores, "-o", output, "--num-kv-heads", "4").code == 0
    assert HeadProfile.load(output).threshold == 0.1


def test_convert_rescales(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "p.json"
    PROFILE.changed(scores=((5.0, 1.0), (3.0, 2.0))).save(source)
    check_refused(
        run("convert", source, "-o", tmp_path / "duo", "--to", "duo"), "KV head 0 has 5.0; rescale"
    )
    args = ("convert", source, "-o", tmp_path / "duo", "--to", "duo", "--rescale", "min-max")
    assert run(*args).code == 0
    shown = json.loads(run("show", tmp_path / "duo", "--json").out)
    assert shown["scores"] == {"least": 0.0, "median": 0.375, "greatest": 1.0}


def test_methods(run: Run) -> None:
    listed = run("methods").out
    assert "retrieval: Scores query heads by how much of a needle they copy." in listed
    assert "  induction_rate=0.14  (number >= 0.0 and <= 1.0)\n" in listed
    assert "The paper keeps the best 14 %" not in listed
    one = run("methods", "razor").out
    assert "The paper keeps the best 14 %" in one
    assert "4 sink tokens and 4000 recent tokens" in one
    assert "retrieval:" not in one
    check_refused(run("methods", "runes"), "method must be one of retrieval, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not JSON"),
        ('{"scores": [[NaN]]}', "holds NaN, which is not a finite number"),
        ('{"0-0": [1]}', "format_version is None, this version reads 1"),
        ('{"format_version": 1}', "model: Field required"),
    ],
)
@pytest.mark.parametrize("command", ["show", "compare"])
def test_broken_files(run: Run, tmp_path: Path, command: str, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    check_refused(run(command, path, *([path] if command == "compare" else [])), message)


def test_other_refusals(run: Run, saved: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.json"
    for args in (("show", gone), ("compare", saved, gone), ("convert", gone, "-o", saved)):
        check_refused(run(*args), "gone.json: no such file")
    both = ("--sparsity", "0.5", "--threshold", "0.1")
    check_refused(run("show", saved, *both), "give --sparsity or --threshold, not both")
    check_refused(
        run("convert", saved, "-o", gone, *both), "give --sparsity or --threshold, not both"
    )
    check_refused(run("show", saved, "--sparsity", "2"), "sparsity: Input should be less than")
    check_refused(run("show", saved, "--threshold", "nan"), "threshold: Input should be a finite")
    check_refused(run("show", saved, "--plot", "nowhere/p.png"), "cannot write nowhere/p.png")
    check_refused(
        run("compare", saved, MODEL_DIR / "profile.json"), "of different models: num_layers is 2"
    )
    check_refused(
        run("convert", saved, "-o", gone, "--model", MODEL_DIR), "num_layers is 2 in the profile"
    )
    check_refused(run("convert", saved, "-o", gone, "--model", gone), "config cannot be loaded")
