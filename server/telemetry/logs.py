"""How the server logs: lines for people, or one JSON object a line."""

import logging
import logging.config
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from headlong.server.config import ServerConfig
from headlong.server.console import console

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that is being served, in the event loop's tasks."""

TRACE_ID: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""The trace that it belongs to, where requests are traced."""

# What ends a line somewhere, or steers a terminal.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = __name__


class AddRequestId(logging.Filter):
    """Puts the id of the request that is being served into every record, and that of its trace."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps every record."""
        if (request_id := REQUEST_ID.get()) is not None:
            record.request_id = request_id
        if (trace_id := TRACE_ID.get()) is not None:
            record.trace_id = trace_id
        return True


class TextFormatter(logging.Formatter):
    """One line a record; only a traceback has more, and these are indented.

    Control characters are escaped, so that nothing that a client sends can look like a record.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Formats the record's line."""
        line = escape_control(super().formatMessage(record))
        for name, shown in (("request_id", "id"), ("trace_id", "trace")):
            if (value := getattr(record, name, None)) is not None:
                line += f" {shown}={value}"
        return line

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Formats a traceback."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  | {escape_control(line)}" for line in lines)


def escape_control(text: str) -> str:
    """Writes control characters as Python does in strings."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def log_config(config: ServerConfig) -> dict[str, Any]:
    """Says how the server and its engine log.

    Args:
        config: Its log format and level.

    Returns:
        Plain data for `logging.config.dictConfig`.
    """
    level = config.log_level.upper()
    text = {"()": f"{_NAME}.{TextFormatter.__name__}"}
    json = {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "fmt": "%(levelname)s %(name)s %(message)s",
        "rename_fields": {"levelname": "level", "name": "logger"},
        "timestamp": "time",
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": f"{_NAME}.{AddRequestId.__name__}"}},
        "formatters": {"default": json if config.log_format == "json" else text},
        "handlers": {
            "default": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "formatter": "default",
                "filters": ["request_id"],
            }
        },
        # Of other libraries only what matters is shown, and of uvicorn only what we do not say.
        "root": {"handlers": ["default"], "level": "WARNING"},
        "loggers": {
            "headlong": {"level": level, "propagate": True},
            "uvicorn": {
                "level": level if config.log_level != "info" else "WARNING",
                "propagate": True,
            },
        },
    }


def configure_logs(config: ServerConfig) -> Callable[[str], None]:
    """Sets this process's logs up.

    Returns:
        What says a line of the start: on standard output, or in JSON logs as one of them.
    """
    logging.config.dictConfig(log_config(config))
    if config.log_format == "json":
        return logging.getLogger("headlong.start").info
    return console().print
