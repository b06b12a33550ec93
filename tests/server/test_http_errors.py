import pytest
from starlette.exceptions import HTTPException

from headlong.server import errors
from headlong.server.http_errors import error_response


def all_errors(base=errors.HeadlongError):
    for kind in base.__subclasses__():
        yield kind
        yield from all_errors(kind)


def make(kind):
    return kind("m", 3) if kind is errors.QueueFullError else kind("m")


@pytest.mark.parametrize("kind", [errors.HeadlongError, *all_errors()])
def test_every_error_is_answered_by_its_status(kind):
    response = error_response(make(kind))
    assert response.status_code == kind.status
    assert response.headers["content-type"] == "application/json"


def test_when_to_come_back():
    assert error_response(errors.QueueFullError("m", 12)).headers["retry-after"] == "12"
    assert error_response(errors.DrainingError("m")).headers["retry-after"] == "1"
    assert "retry-after" not in error_response(errors.EngineDeadError("m")).headers


def test_how_to_send_a_key():
    # Chromium reads no more than one challenge of a header.
    headers = error_response(errors.AuthenticationError("m")).headers
    bearer, basic = headers.getlist("www-authenticate")
    assert bearer.startswith("Bearer realm=")
    assert basic.startswith("Basic realm=")
    assert "www-authenticate" not in error_response(errors.InvalidRequestError("m")).headers


def test_headers_of_http_errors_stay():
    response = error_response(HTTPException(405, headers={"Allow": "GET"}))
    assert (response.status_code, response.headers["allow"]) == (405, "GET")


def test_nothing_is_told_of_other_errors():
    response = error_response(ValueError("secret"))
    assert response.status_code == 500
    assert b"secret" not in response.body


def test_messages_are_bounded():
    assert len(error_response(errors.InvalidRequestError("x" * 10**6, "y" * 10**6)).body) < 3000
