"""What the routes need to know to serve a model."""

import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from headlong.server.disconnect import cancel_on_disconnect
from headlong.server.errors import InvalidRequestError, ModelNotFoundError
from headlong.server.http_errors import shorten
from headlong.server.prompts import PromptEncoder
from headlong.server.sampling import ModelLimits
from headlong.server.schemas_common import SamplingFields
from headlong.server.unsupported import Neutral, refuse_unsupported

if TYPE_CHECKING:
    from headlong.server.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class Serving:
    """One engine and how it is offered.

    Attributes:
        engine: Runs the requests.
        prompts: Encodes their prompts.
        limits: What they are checked against.
        model_names: All names of the model.
        created: When the server started, in seconds of Unix time.
    """

    engine: "AsyncEngine"
    prompts: PromptEncoder
    limits: ModelLimits
    model_names: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    def require_model(self, name: str) -> None:
        """Checks that a model is served here.

        Raises:
            ModelNotFoundError: It is not.
        """
        if name not in self.model_names:
            raise ModelNotFoundError(
                f"the model {shorten(name, 100)!r} does not exist, this server has "
                + ", ".join(repr(each) for each in self.model_names),
                "model",
            )

    def admit(self, request: SamplingFields, unsupported: Neutral) -> None:
        """Checks what needs no tokens: the model and the fields that are refused.

        Args:
            request: A request that fits its schema.
            unsupported: Known fields that the endpoint does not support.

        Raises:
            ModelNotFoundError: The model is not served.
            InvalidRequestError: A field is not supported, or does not fit the others.
        """
        self.require_model(request.model)
        refuse_unsupported(request.model_extra, unsupported)
        if request.stream_options is not None and not request.stream:
            raise InvalidRequestError("stream_options needs stream to be true", "stream_options")


async def respond(request: Request, work: Coroutine[object, object, BaseModel]) -> Response:
    """Answers with what `work` returns, unless the client leaves first.

    Args:
        request: Its body has been read.
        work: Cancelled when the client leaves.

    Returns:
        The JSON response.

    Raises:
        ClientDisconnect: The client left.
    """
    body = await cancel_on_disconnect(request.receive, work)
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")
