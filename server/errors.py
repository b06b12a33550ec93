"""Everything that Headlong raises on purpose, and what each error is over HTTP.

HeadlongError                    500
├── InvalidRequestError          400   the request is wrong, and says where
│   └── ContextLengthError       400   code "context_length_exceeded"
├── AuthenticationError          401   no API key, or one that is not known
├── ModelNotFoundError           404   the request names a model that is not served
├── ResponseNotFoundError        404   responses are asked for, and none are stored
├── RequestTimeoutError          408   the rest of the request did not come
├── RequestTooLargeError         413   the body is over the limit
├── UnsupportedMediaTypeError    415   the body is no JSON by its Content-Type
├── QueueFullError               429   try again later
├── DrainingError                503   the server finishes what it has and takes nothing new
├── EngineDeadError              503   the engine stopped; the process is about to end
├── RequestAbortedError          500   the engine gave the request up
├── DeadlineExceededError        504   the request's time was over before its completion was
└── ConfigError                  (start only) a flag, checkpoint or profile that cannot be used
"""

from typing import ClassVar


class HeadlongError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One sentence for the person who has to act on it.
        param: The request field or flag at fault, if there is one.

    Attributes:
        retry_after_s: Seconds after which the same request may succeed, if that is likely.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str | None] = None
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(HeadlongError):
    """The request is malformed, out of range or asks for what is not supported."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt and completion together do not fit the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(HeadlongError):
    """The request carries no API key, or one that this server does not know."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFoundError(HeadlongError):
    """The request names a model that this server does not serve."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class ResponseNotFoundError(HeadlongError):
    """The request names a response, and this server stores none."""

    status = 404
    type = "invalid_request_error"
    code = "response_not_found"


class RequestTimeoutError(HeadlongError):
    """The rest of the request did not come in time."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class RequestTooLargeError(HeadlongError):
    """The body is larger than the server reads."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaTypeError(HeadlongError):
    """The body's Content-Type is not JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QueueFullError(HeadlongError):
    """As many requests wait as may wait.

    Args:
        message: One sentence.
        retry_after_s: When to try again, in seconds.
    """

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(HeadlongError):
    """The server is shutting down: it finishes what it has and takes nothing new."""

    status = 503
    type = "service_unavailable"
    code = "draining"
    retry_after_s = 1


class EngineDeadError(HeadlongError):
    """The engine stopped on an unexpected error; nothing can be served any more."""

    status = 503
    type = "service_unavailable"
    code = "engine_dead"


class RequestAbortedError(HeadlongError):
    """The engine gave up this request, and goes on with the others."""

    code = "request_aborted"


class DeadlineExceededError(HeadlongError):
    """The request's time was over before its completion was."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class ConfigError(HeadlongError):
    """A flag, a checkpoint or a profile that the server cannot start with."""
