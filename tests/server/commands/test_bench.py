import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from aiohttp import web

from headlong.server import cli
from support.scripted_endpoint import MODEL, Endpoint, answer_at_once, in_thread, piece, usage

SMALL = ("--random-input-len", "4", "--random-output-len", "3")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["headlong", "bench", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return SimpleNamespace(code=stopped.value.code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def endpoint():
    with in_thread(Endpoint(answer_at_once)) as endpoint:
        yield endpoint


def refused_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def one_line(result):
    """The one line in which a command says why it ended with 2."""
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("headlong: ")
    return line.removeprefix("headlong: ")


def test_our_own_server_in_a_closed_loop(run, live, engine, tmp_path):
    output, plot = tmp_path / "report.json", tmp_path / "picture.png"
    args = ("--model", "alias", *SMALL, "--num-prompts", 6, "--max-concurrency", 2)
    args += ("--num-warmups", 2, "--goodput", "ttft:60000", "e2e:60000", "--output", output)
    engine.cached = 5
    result = run(live, *args, "--plot", plot)
    assert result.code == 0
    assert "requests     6 completed in " in result.out
    assert "goodput" in result.out and "100.0% of the requests" in result.out
    assert f"Wrote {output}" in result.out
    assert "prompts are counted in words" in result.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    # One that is tried first, and the warm-up.
    assert len(engine.seen) == 1 + 2 + 6
    assert all(params.ignore_eos and params.temperature == 0 for _, params in engine.seen)
    report = json.loads(output.read_text())
    summary = report["runs"][0]["summary"]
    assert (summary["num_completed"], summary["errors"]) == (6, {})
    assert summary["num_output_tokens"] == 18
    assert summary["num_input_tokens"] == sum(len(prompt) for prompt, _ in engine.seen[3:])
    assert summary["cached_share"] == pytest.approx(30 / summary["num_input_tokens"])
    assert summary["goodput_share"] == 1.0
    assert report["runs"][0]["requests"] is None
    config = report["config"]
    assert (config["model"], config["num_prompts"], config["random_input_len"]) == ("alias", 6, 4)


def test_our_own_server_in_a_chat(run, live, engine, tmp_path):
    trace, output = tmp_path / "trace.jsonl", tmp_path / "report.json"
    messages = [{"role": "user", "content": "Hi"}]
    lines = [{"timestamp": at, "messages": messages, "max_tokens": 4} for at in (0.0, 0.01)]
    trace.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = run("--base-url", f"{live}/v1", "--model", "alias", "--trace", trace,
                 "--output", output, "--save-detailed")  # fmt: skip
    assert result.code == 0
    assert "counted in words" not in result.err
    assert [row["text"] for row in json.loads(output.read_text())["runs"][0]["requests"]] == [
        "Hello wörld"
    ] * 2


def test_a_sweep(run, endpoint, tmp_path):
    output, plot = tmp_path / "report.json", tmp_path / "picture.png"
    result = run(endpoint.url, *SMALL, "--num-prompts", 4, "--request-rate", 50,
                 "--request-rate", 100, "--output", output, "--plot", plot)  # fmt: skip
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[:3]] == ["asked/s", "50", "100"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "picture-100.png", "picture-50.png", "picture.png"
    ]  # fmt: skip
    rates = [each["summary"]["asked_rate"] for each in json.loads(output.read_text())["runs"]]
    assert rates == [50.0, 100.0]
    prompts = [body["prompt"] for body in endpoint.bodies[1:]]
    assert len(set(prompts)) == len(prompts) == 8


def test_failures_are_counted_and_told(run):
    async def script(exchange):
        if exchange.number % 2:
            return web.json_response({"error": {"message": "the queue is full"}}, status=429)
        return await answer_at_once(exchange)

    with in_thread(Endpoint(script)) as endpoint:
        result = run(endpoint.url, *SMALL, "--num-prompts", 4, "--max-concurrency", 1)
    assert result.code == 0
    assert "2 completed, 2 failed (2 rejected)" in result.out
    assert "Note: rejected: the queue is full (status 429)" in result.err


def test_if_all_fail_the_exit_code_says_so(run):
    async def script(exchange):
        if exchange.number:
            return web.Response(status=500, text="broken")
        return await answer_at_once(exchange)

    with in_thread(Endpoint(script)) as endpoint:
        result = run(endpoint.url, *SMALL, "--num-prompts", 2)
    assert result.code == 1
    assert "0 completed, 2 failed (2 http)" in result.out


def test_a_peer_without_ignore_eos_and_end_mark(run):
    """As `transformers serve` answers."""

    async def script(exchange):
        if "ignore_eos" in exchange.body:
            detail = "Unexpected fields in the request: {'ignore_eos'}"
            return web.json_response({"detail": detail}, status=422)
        await exchange.begin()
        await exchange.write(piece("a ") + piece("b"))
        await exchange.write(piece("", finish="stop", usage=usage(4, 2)))
        return exchange.response

    with in_thread(Endpoint(script)) as endpoint:
        refused = one_line(run(endpoint.url, *SMALL, "--num-prompts", 2))
        result = run(endpoint.url, *SMALL, "--num-prompts", 2, "--no-ignore-eos")
    assert refused.endswith("leave the field out with --no-ignore-eos")
    assert result.code == 0
    assert "2 completed in" in result.out
    assert "8 in, 4 out" in result.out


def test_needles_are_judged(run):
    async def script(exchange):
        content = exchange.body["messages"][-1]["content"]
        await exchange.begin()
        await exchange.write(piece(content, chat=True, finish="stop", usage=usage(100, 9)))
        return exchange.response

    with in_thread(Endpoint(script)) as endpoint:
        result = run(endpoint.url, "--workload", "needle", "--context-len", 200,
                     "--num-prompts", 3)  # fmt: skip
    assert result.code == 0
    # Whoever repeats the whole text says the fact too.
    assert "accuracy     100.0% of 3 judged answers are right" in result.out


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("flag", "Bearer from-flag"),
        ("file", "Bearer from-file"),
        ("environment", "Bearer from-environment"),
        ("nowhere", None),
    ],
)
def test_where_the_key_comes_from(run, endpoint, tmp_path, monkeypatch, source, expected):
    path = tmp_path / "key"
    path.write_text("from-file\n")
    if source != "nowhere":
        monkeypatch.setenv("HEADLONG_API_KEY", "from-environment,another")
    flags = {"flag": ("--api-key", "from-flag"), "file": ("--api-key-file", path)}.get(source, ())
    output = tmp_path / "report.json"
    assert run(endpoint.url, *SMALL, "--num-prompts", 1, "--output", output, *flags).code == 0
    assert set(endpoint.authorizations) == {expected}
    assert "from-" not in output.read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--goodput", "ttft"), "goodput ttft must be a number of milliseconds, got ''"),
        (("--goodput", "speed:5"), "goodput limit 'speed:5' is unknown"),
        (("--goodput", "ttft:5", "ttft:6"), "goodput limit ttft is given twice"),
        (("--model", ""), "model must not be empty"),
        (("--trace", "a", "--trace-block-size", 0), "--trace-block-size must be at least 1, got 0"),
        (("--timeout", 0), "--timeout must be above 0 and finite, got 0"),
        (("--timeout", "nan"), "--timeout must be above 0 and finite, got nan"),
        (("--base-url", "http://other"), "contradict each other"),
        (("--save-detailed",), "--save-detailed needs --output"),
        (("--output", "/dev/null/x.json"), "cannot write /dev/null/x.json: its folder does not"),
        (("--output", "."), "cannot write .: it is a folder"),
        (("--plot", "a.pdf"), "--plot must name a .png file, got a.pdf"),
        (("--output", "a.png", "--plot", "a.png"), "name the same file, a.png"),
        (("--api-key", "two words"), "--api-key: the key may only hold visible ASCII"),
        (("--api-key", "a", "--api-key-file", "b"), "contradict each other"),
        (("--api-key-file", "/no/such"), "--api-key-file /no/such cannot be read: No such file"),
        (
            ("--tokenizer", "/no/such"),
            "/no/such: the tokenizer cannot be loaded: there is no such folder",
        ),
        (("--random-input-len", 0), "--random-input-len must be at least 1, got 0"),
        (("--document-len", 9), "--document-len belongs to --workload chat, not to random"),
        (("--trace", "/no/such.jsonl"), "/no/such.jsonl"),
        (("--burstiness", 2), "--burstiness needs --request-rate"),
        (("--request-rate", "inf"), "--request-rate must be above 0 and finite, got inf"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sent(run, endpoint, args, message):
    assert message in one_line(run(endpoint.url, *args))
    assert not endpoint.exchanges


def test_a_broken_line_of_a_trace_is_named(run, endpoint, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "prompt": "a"}\n{"timestamp": 1, "prompt": \n')
    assert f"{path}:2: is not JSON" in one_line(run(endpoint.url, "--trace", path))
    assert not endpoint.exchanges


def test_a_trace_is_not_written_over(run, endpoint, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "prompt": "a"}\n')
    link = tmp_path / "link.json"
    link.symlink_to(path)
    for output in (path, link):
        line = one_line(run(endpoint.url, "--trace", path, "--output", output))
        assert line == f"cannot write {output}: it is the trace"
    assert path.read_text().startswith('{"timestamp"')
    assert not endpoint.exchanges


def test_a_trace_with_blocks_of_another_size(run, endpoint, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}\n'
        '{"timestamp": 9, "input_length": 6, "output_length": 1, "hash_ids": [1, 3]}\n'
    )
    assert "5 tokens are 1 blocks of 512" in one_line(run(endpoint.url, "--trace", path))
    result = run(endpoint.url, "--trace", path, "--trace-block-size", 3)
    assert result.code == 0
    # One that is tried first.
    first, second = (body["prompt"].split() for body in endpoint.bodies[1:])
    assert (len(first), len(second)) == (5, 6)
    assert (first[:3] == second[:3], first[3] == second[3]) == (True, False)
    assert "planned" in result.out and "prompts are counted in words" in result.err


def test_an_endpoint_that_cannot_be_reached(run):
    url = f"http://127.0.0.1:{refused_port()}"
    assert one_line(run(url, *SMALL)) == f"cannot reach {url}: Connection refused"
    assert "base-url must begin with http://" in one_line(run("localhost:8000"))


def test_a_model_that_is_not_served(run, live):
    line = one_line(run(live, *SMALL, "--model", "gpt"))
    assert line.startswith(f"{live} fails a first request: 404")
    assert "lists 2 models: fake/model, alias; name one with --model" in one_line(run(live))


def test_a_comparison(run, endpoint, tmp_path):
    for name, count in (("a", 2), ("b", 3)):
        output = tmp_path / f"{name}.json"
        assert run(endpoint.url, *SMALL, "--num-prompts", count, "--output", output).code == 0
    result = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert result.code == 0 or result.code is None
    assert result.out.splitlines()[0].split() == [
        "figure", "a", "b", "difference", "ratio", "better"
    ]  # fmt: skip
    assert "Note: num_prompts differs: 2 and 3" in result.err
    found = run("compare", "--json", tmp_path / "a.json", tmp_path / "b.json")
    assert json.loads(found.out)["comparisons"][0]["figures"]["failed requests"]["better"] == "same"
    missing = tmp_path / "c.json"
    assert one_line(run("compare", tmp_path / "a.json", missing)) == f"{missing}: no such file"


@pytest.mark.parametrize("args", [("--help",), ("run", "--help")])
def test_the_help_shows_the_options_and_speaks_of_comparisons(run, args):
    result = run(*args)
    assert result.code == 0
    for text in ("--request-rate", "--goodput", "--workload", "bench compare A.json B.json"):
        assert text in result.out


def test_ctrl_c_still_reports(tmp_path):
    waiting = threading.Event()

    async def script(exchange):
        if exchange.number < 3:
            return await answer_at_once(exchange)
        await exchange.begin()
        waiting.set()
        await asyncio.Event().wait()
        return exchange.response

    output = tmp_path / "report.json"
    with in_thread(Endpoint(script)) as endpoint:
        process = subprocess.Popen(
            [sys.executable, "-c", "from headlong.server.cli import main; main()", "bench",
             endpoint.url, *SMALL, "--num-prompts", "5", "--max-concurrency", "1",
             "--output", str(output)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            assert waiting.wait(60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "2 completed in" in out
    assert "interrupted: 1 requests in flight were given up, 2 were not sent" in err
    assert json.loads(output.read_text())["runs"][0]["summary"]["interrupted"] is True
    assert MODEL in output.read_text()
