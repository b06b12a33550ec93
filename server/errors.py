"""Everything that Headlong raises on purpose, and what each error is over HTTP.

HeadlongError                    500
├── InvalidRequestError          400   the request is wrong, and says where
│   └── ContextLengthError       400   code "context_length_exceeded"
├── ModelNotFoundError           404   the request names a model that is not served
├── RequestTooLargeError         413   the body is over the limit
├── UnsupportedMediaTypeError    415   the body is no JSON by its Content-Type
├── QueueFullError               429   try again later
├── EngineDeadError              503   the engine stopped; the process is about to end
├── RequestAbortedError          500   the engine gave the request up
└── ConfigError                  (start only) a flag, checkpoint or profile that cannot be used
"""

from typing import ClassVar


class HeadlongError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One sentence for the person who has to act on it.
        param: The request field or flag at fault, if there is one.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str | None] = None

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


class ModelNotFoundError(HeadlongError):
    """The request names a model that this server does not serve."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


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


class EngineDeadError(HeadlongError):
    """The engine stopped on an unexpected error; nothing can be served any more."""

    status = 503
    type = "service_unavailable"
    code = "engine_dead"


class RequestAbortedError(HeadlongError):
    """The engine gave up this request, and goes on with the others."""

    code = "request_aborted"


class ConfigError(HeadlongError):
    """A flag, a checkpoint or a profile that the server cannot start with."""
