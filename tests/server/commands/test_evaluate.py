import json
import sys
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.evaluation_results import EvaluationReport
from headlong.profiling.head_profile import HeadProfile
from headlong.profiling.model_identity import ModelIdentity
from headlong.profiling.needles import filler
from headlong.server import cli
from support.engines import random_profile
from support.tiny_models import save_tiny_model

SMALL = ("--lengths", "300,400", "--samples", "4", "--depths", "2")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["headlong", "eval", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return SimpleNamespace(code=stopped.value.code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def profile(llama, tmp_path):
    return random_profile(llama, tmp_path / "labels.json", seed=1)


def test_the_embedded_model_passes_its_own_gate(run, tmp_path):
    output, plot = tmp_path / "results.json", tmp_path / "picture.png"
    args = (MODEL_DIR, "--task", "needle,vt", *SMALL, "--require", "0.98")
    result = run(*args, "--output", output, "--plot", plot)
    assert result.code == 0
    assert "vt: not solved by the full cache" in result.out
    assert "The requirement leaves out what the full cache does not solve: vt (" in result.err
    assert "prefill and in decode" in result.out
    assert "[4/4] profile: vt" in result.err
    report = EvaluationReport.load(output)
    full, own = report.summary
    assert full["accuracy"]["needle"] == own["relative"] == 1.0
    assert own["kv_bytes"] < full["kv_bytes"] == 25 * 16 * 4096
    assert report.compressed_in == "prefill and decode"
    assert report.versions["torch"] == torch.__version__
    assert report.cells[0].result.wall_s > 0
    for path in (plot, tmp_path / "picture-needle.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_gate_closes(run, tmp_path):
    output = tmp_path / "results.json"
    args = (MODEL_DIR, *SMALL, "--sparsity", "0.5,1", "--output", output, "--window-size", "16",
            "--sink-size", "0")  # fmt: skip
    result = run(*args, "--require", "0.98")
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("headlong: ")]
    assert line.startswith("headlong: profile at sparsity 1 keeps 0.")
    assert line.endswith("of the full cache's accuracy, and 0.98 is required")
    # The cells are known by now, and only what is asked for is judged.
    result = run(MODEL_DIR, *SMALL, "--sparsity", "0.5", "--output", output, "--window-size", "16",
                 "--sink-size", "0", "--require", "0.98")  # fmt: skip
    assert result.code == 0
    assert result.err.count("(known") == 2
    assert "Kept from earlier runs in the report, and not shown here: 1 results" in result.out
    assert len(EvaluationReport.load(output).cells) == 3


def test_an_earlier_task_in_the_report_is_not_judged(run, tmp_path):
    output = tmp_path / "results.json"
    shared = (MODEL_DIR, *SMALL, "--sparsity", "1", "--output", output, "--sink-size", "0",
              "--window-size", "16", "--require", "0.98", "--profile")  # fmt: skip
    assert run(*shared, MODEL_DIR / "profile.json", "--task", "needle").code == 1
    # Cells of the second task are made to keep everything, as if it were an easy one.
    report = EvaluationReport.load(output)
    easy = report.cells[0].result
    for cell in list(report.cells):
        report.cells.append(cell.model_copy(update={"task": "niah_single", "result": easy}))
    report.save(output)
    result = run(*shared, MODEL_DIR / "profile.json", "--task", "niah_single")
    assert result.code == 0
    assert "needle" not in result.out
    assert "not shown here: 2 results" in result.out


def test_methods_and_controls(run, tmp_path):
    output = tmp_path / "results.json"
    args = (MODEL_DIR, *SMALL, "--sparsity", "0.5", "--methods", "retrieval,random,streaming",
            "--setting", "num_needles=1", "--setting", "retrieval.num_lengths=1",
            "--setting", "num_depths=1", "--setting", "max_context_tokens=300",
            "--window-size", "64", "--sink-size", "8", "-o", output)  # fmt: skip
    assert run(*args).code == 0
    report = EvaluationReport.load(output)
    assert [row["method"] for row in report.summary] == ["full", "retrieval", "random", "streaming"]
    assert report.methods["retrieval"].settings["num_needles"] == 1
    assert report.methods["retrieval"].scoring_s > 0
    assert {(cell.sink_size, cell.window_size) for cell in report.cells[1:]} == {(8, 64)}
    assert report.cells[-1].labels == ("0000",) * 4
    # Scores are kept with the cells.
    again = run(*args)
    assert again.code == 0
    assert "scoring" not in again.err
    assert "s left" not in again.err


def test_token_level_tasks(run, llama, profile, tmp_path):
    (tmp_path / "book.txt").write_text(filler(Random(0), 200))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One, two, three, four, five, six."}\n' * 2)
    args = (llama, "--profile", profile, "--task", "kl,perplexity", "--lengths", "100",
            "--samples", "3", "--depths", "1", "--text", tmp_path / "book.txt")  # fmt: skip
    result = run(*args, "-o", tmp_path / "a.json", "--require", "0.999")
    assert result.code == 1
    assert "labels agrees with the full cache on 0." in result.err
    kl, perplexity = EvaluationReport.load(tmp_path / "a.json").cells[2:]
    assert kl.result.tokens == perplexity.result.tokens
    assert kl.result.tokens.num_texts == 3
    assert kl.result.tokens.num_tokens == 3 * 99
    result = run(*args, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "b.json")
    assert result.code == 0
    kl = EvaluationReport.load(tmp_path / "b.json").cells[2]
    assert kl.result.tokens.num_texts == 2
    # One text is longer than the windows of the other task, and fits all the same.
    assert kl.result.tokens.num_tokens == 2 * 33 - 2


def test_a_requirement_needs_something_to_judge(run, llama, profile):
    args = (llama, "--profile", profile, "--lengths", "300", "--samples", "1", "--depths", "1")
    assert run(*args).code == 0
    result = run(*args, "--require", "0.5")
    assert result.code == 2
    assert "the full cache itself solves none of the tasks (needle " in result.err


def test_agreement_does_not_stand_in_for_answers(run, llama, profile, tmp_path):
    (tmp_path / "book.txt").write_text(filler(Random(0), 200))
    result = run(llama, "--profile", profile, "--task", "needle,kl", "--lengths", "300",
                 "--samples", "1", "--depths", "1", "--text", tmp_path / "book.txt",
                 "--require", "0")  # fmt: skip
    assert result.code == 2
    assert "solves none of the tasks (needle " in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--profile", "{profile}", "--sparsity", "0"), "sparsity 0 is the full cache itself"),
        (("--methods", "random,streaming"), "random and streaming are controls"),
        (("--profile", "{profile}", "--task", "perplexity", "--text", "{text}"),
         "perplexity has no share"),
    ],
)  # fmt: skip
def test_what_can_never_be_judged_is_not_measured(run, llama, profile, tmp_path, args, message):
    text = tmp_path / "book.txt"
    text.write_text(filler(Random(0), 50))
    given = [each.format(profile=profile, text=text) for each in args]
    result = run(llama, *given, "--lengths", "300", "--samples", "1", "--depths", "1",
                 "--require", "0.5")  # fmt: skip
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"headlong: there is nothing to require: {message}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--task", "tea"), "task 'tea' is unknown: tasks are needle, multi_needle"),
        (("--task", ","), "name at least one task"),
        (("--methods", "tea"), "method 'tea' is unknown: methods are retrieval"),
        (("--methods", "retrieval", "--setting", "tea=1"), "retrieval: tea"),
        (("--methods", "retrieval", "--setting", "razor.seed=1"), "a setting of 'razor'"),
        (("--methods", "random", "--setting", "seed=1"), "write METHOD.NAME=VALUE"),
        (("--methods", "retrieval", "--setting", "seed"), "write METHOD.NAME=VALUE"),
        (("--lengths", "300,x"), "lengths: '300,x' is no list of numbers"),
        (("--lengths", "300,2048"), "2048 tokens takes 2080 with its answer, but the model's"),
        (("--lengths", "0"), "lengths must be at least 1, got 0"),
        (("--lengths", "20"), "task needle: context_tokens=20 is too short"),
        (("--samples", "2", "--depths", "3"), "depths is 3, which is more than the 2 samples"),
        (("--samples", "0"), "samples must be at least 1"),
        (("--sparsity", "1.5"), "sparsity must be 0 to 1, got 1.5"),
        (("--sparsity", "nan"), "sparsity must be 0 to 1, got nan"),
        (("--require", "-1"), "require must be 0 or more"),
        (("--task", "perplexity"), "task perplexity needs a text file"),
        (("--task", "kl"), "task kl needs a prompts file"),
        (("--task", "kl", "--prompts", "gone.txt"), "gone.txt: no such file"),
        (("--profile", "gone.json"), "gone.json: no such file"),
        (("--output", "gone/a.json"), "cannot write gone/a.json"),
        (("--plot", "gone/a.png"), "cannot write gone/a.png"),
        (("--chat",), "no chat template"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run, llama, profile, args, message):
    given = () if "--methods" in args or "--profile" in args else ("--profile", profile)
    result = run(llama, *given, *args)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("headlong: ")]
    assert message in line


def test_files_that_cannot_be_read_are_refused(run, llama, profile, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for name, path, message in (
        ("--prompts", empty, "holds no prompt"),
        ("--prompts", binary, "is not UTF-8 text"),
        ("--text", binary, "is not UTF-8 text"),
        ("--text", empty, "not empty"),
    ):
        task = "perplexity" if name == "--text" else "kl"
        result = run(llama, "--profile", profile, "--task", task, name, path)
        assert result.code == 2
        assert message in result.err
    long = tmp_path / "long.txt"
    long.write_text("x" * 3000)
    result = run(llama, "--profile", profile, "--task", "kl", "--prompts", long)
    assert result.code == 2
    assert "a prompt has 3000 tokens, but the model's context is 2048" in result.err


def test_a_model_without_a_profile_needs_one(run, llama):
    result = run(llama)
    assert result.code == 2
    assert "brings no profile.json: give --profile or --methods" in result.err


def test_another_models_profile_is_refused(run, llama):
    result = run(llama, "--profile", MODEL_DIR / "profile.json")
    assert result.code == 2
    assert "does not fit the model" in result.err


def test_other_settings_are_not_mixed(run, llama, profile, tmp_path):
    args = (llama, "--profile", profile, "--lengths", "300", "--samples", "1", "--depths", "1",
            "-o", tmp_path / "a.json")  # fmt: skip
    assert run(*args).code == 0
    before = (tmp_path / "a.json").read_bytes()
    result = run(*args, "--seed", "5")
    assert result.code == 2
    assert "other settings (seed is 0 there and 5 here)" in result.err
    assert (tmp_path / "a.json").read_bytes() == before


def test_other_weights_in_the_same_folder_are_noticed(run, tmp_path):
    folder = save_tiny_model(tmp_path, "llama")
    profile = random_profile(folder, tmp_path / "p.json", seed=0)
    args = (folder, "--profile", profile, "--lengths", "300", "--samples", "1", "--depths", "1",
            "-o", tmp_path / "a.json")  # fmt: skip
    assert run(*args).code == 0
    save_tiny_model(tmp_path, "llama", seed=1)
    result = run(*args)
    assert result.code == 2
    assert "other settings (weights is" in result.err


def test_profiles_of_one_name_are_told_apart(run, llama, profile, tmp_path):
    (tmp_path / "b").mkdir()
    other = random_profile(llama, tmp_path / "b" / "labels.json", seed=2)
    random = random_profile(llama, tmp_path / "random.json", seed=3)
    args = (llama, "--lengths", "300", "--samples", "1", "--depths", "1", "-o", tmp_path / "o.json")
    for path in (profile, other, random):
        args += ("--profile", path)
    assert run(*args).code == 0
    cells = json.loads((tmp_path / "o.json").read_text())["cells"]
    names = [str(profile), str(other), str(random)]
    assert [cell["method"] for cell in cells] == ["full", *names]


@pytest.mark.parametrize("task", ["needle", "perplexity"])
def test_numbers_that_are_not_finite_are_refused(run, tmp_path, task):
    folder = save_tiny_model(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "book.txt").write_text("word " * 50)
    profile = random_profile(folder, tmp_path / "p.json", seed=0)
    result = run(folder, "--profile", profile, "--task", task, "--text", tmp_path / "book.txt",
                 "--lengths", "300", "--samples", "1", "--depths", "1")  # fmt: skip
    assert result.code == 2
    assert "logits at position" in result.err
    assert "not finite" in result.err


def test_shapes_of_the_controls_fit_any_model(run, llama, tmp_path):
    result = run(llama, "--methods", "random,streaming", "--sparsity", "0.5", "--lengths", "300",
                 "--samples", "1", "--depths", "1", "-o", tmp_path / "a.json")  # fmt: skip
    assert result.code == 0
    cells = EvaluationReport.load(tmp_path / "a.json").cells
    identity = ModelIdentity(num_layers=3, num_kv_heads=2)
    assert [len(cell.labels) for cell in cells] == [identity.num_layers] * 7
    assert HeadProfile.load(MODEL_DIR / "profile.json").model.num_layers == 4
