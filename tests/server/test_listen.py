"""The real server on a real socket: what reaches it before any of our code runs."""

import asyncio
import json
import logging
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from headlong.server.app import create_app
from headlong.server.config import ServerConfig
from headlong.server.listen import bind, listen
from support.certificates import PASSWORD, make_certificates, needs_openssl

PATIENCE_S = 30


@contextmanager
def serving(engine, **given):
    """Runs `listen` in a thread; gives its port."""
    config = ServerConfig(served_model_name=("m",), port=0, shutdown_timeout=5, **given)
    gone = asyncio.Event()
    loops = []

    async def wait_dead():
        loops.append(asyncio.get_running_loop())
        await gone.wait()

    engine.wait_dead = wait_dead
    with bind(config.host, config.port) as sock:
        thread = threading.Thread(
            target=listen, args=(create_app(engine, config), engine, sock, config)
        )
        thread.start()
        port = sock.getsockname()[1]
        try:
            deadline = time.monotonic() + PATIENCE_S
            # It listens once the application has started.
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline
            yield port
        finally:
            loops[0].call_soon_threadsafe(gone.set)
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def exchange(port, *pieces):
    """Sends until that is refused; gives the response's beginning and how much was taken."""
    taken, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
                taken += len(piece)
        except OSError:
            pass
        try:
            while part := client.recv(65536):
                answer += part
        except OSError:
            pass
    return answer, taken


def resident_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.mark.parametrize(
    "start",
    [b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: ", b"GET /", b"GET /health HTTP/1.1\r\nX"],
)
def test_endless_headers_are_refused_in_constant_memory(engine, start):
    piece = b"a" * 65536
    with serving(engine, max_header_bytes=8192) as port:
        before = resident_bytes()
        answer, taken = exchange(port, start, *[piece] * 256)
        assert resident_bytes() - before < 8 << 20
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        assert taken < 256 * len(piece) or answer.startswith(b"HTTP/1.1 4")
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_many_headers_are_refused(engine):
    lines = [f"X-{number}: {'a' * 20}\r\n".encode() for number in range(10_000)]
    with serving(engine) as port:
        answer, _ = exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n", b"".join(lines), b"\r\n")
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        headers = {"X-Large": "a" * 60_000}
        assert httpx.get(f"http://127.0.0.1:{port}/health", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /health\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\r\n folded\x00\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(engine, request_text):
    with serving(engine) as port:
        answer, _ = exchange(port, request_text)
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_an_unexpected_error_is_logged_with_the_requests_id(engine, capfd):
    engine.failure = RuntimeError("broken\n2026-01-01 INFO forged: line")
    with serving(engine, log_format="json") as port:
        response = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"model": "m", "prompt": "hi"},
            headers={"X-Request-Id": "mine"},
        )
        assert response.status_code == 500
        assert response.headers["x-request-id"] == "mine"
        logging.getLogger().handlers[0].flush()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (trace,) = [line for line in lines if "exc_info" in line]
    assert (trace["request_id"], trace["logger"]) == ("mine", "uvicorn.error")
    assert "RuntimeError: broken" in trace["exc_info"]
    paths = [line["path"] for line in lines if line["logger"] == "headlong.access"]
    assert paths == ["/v1/completions"]
    assert not any(line["logger"] == "uvicorn.access" for line in lines)


HEADERS = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000\r\n\r\n"
)


@pytest.mark.parametrize("sent", [(), (b"GET /hea",), (b"GET /health HTTP/1.1\r\nHost: x\r\n",)])
def test_headers_that_do_not_come_end_the_connection(engine, sent):
    with serving(engine, receive_timeout=0.2) as port:
        assert exchange(port, *sent)[0] == b""


def test_half_a_second_request_ends_the_connection(engine):
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(engine, receive_timeout=0.2) as port:
        assert exchange(port, whole + whole[:-2])[0].count(b"HTTP/1.1 200") == 1


def test_a_body_that_does_not_come_is_told_so(engine):
    with serving(engine, receive_timeout=0.2) as port:
        answer, _ = exchange(port, HEADERS, b'{"model"')
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_the_rest_of_a_refused_body_does_not_hold_the_connection(engine):
    with serving(engine, receive_timeout=0.2, max_body_bytes=10) as port:
        answer, _ = exchange(port, HEADERS, b'{"model"')
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_request_that_takes_longer_than_its_headers_may(engine):
    engine.hang_at = 1
    with serving(engine, receive_timeout=0.1) as port:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=0.6)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"model": "m", "prompt": "hi"})
        client.close()
        assert engine.idle.wait(PATIENCE_S)


def test_half_a_body_does_not_keep_the_server_nor_break_it(engine, capfd):
    with serving(engine) as port:
        client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        client.sendall(HEADERS + b'{"model"')
        # By the answer to this one, the server has read the other.
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    assert client.recv(1) == b""
    client.close()
    logging.getLogger().handlers[0].flush()
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "ERROR" not in err


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls"))


@needs_openssl
def test_tls(engine, certificates):
    cert, locked = certificates / "cert.pem", certificates / "locked.pem"
    trusting = ssl.create_default_context(cafile=cert)
    with serving(
        engine, ssl_certfile=cert, ssl_keyfile=locked, ssl_keyfile_password=PASSWORD
    ) as port:
        assert httpx.get(f"https://127.0.0.1:{port}/health", verify=trusting).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://127.0.0.1:{port}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health")


@needs_openssl
def test_tls_with_certificates_of_clients(engine, certificates):
    cert, key = certificates / "cert.pem", certificates / "key.pem"
    stranger = ssl.create_default_context(cafile=cert)
    known = ssl.create_default_context(cafile=cert)
    known.load_cert_chain(cert, key)
    with serving(engine, ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert) as port:
        url = f"https://127.0.0.1:{port}/health"
        assert httpx.get(url, verify=known).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(url, verify=stranger)
