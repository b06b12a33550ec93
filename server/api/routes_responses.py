"""``POST /v1/responses``, and why there is nothing to get from it later."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from headlong.server.api.responses_answer import ResponseAnswer
from headlong.server.api.responses_request import blaming_input, chat_request, response_structure
from headlong.server.api.schemas_responses import ResponsesRequest
from headlong.server.api.schemas_responses_output import ResponseObject
from headlong.server.api.serving import Caller, Serving
from headlong.server.api.streaming import event_stream_docs
from headlong.server.api.strict_json import StrictJSONRoute
from headlong.server.api.tool_choice import plan_tools
from headlong.server.errors import ResponseNotFoundError
from headlong.server.http_errors import GENERATION_ERRORS, error_docs, shorten


def responses_router(serving: Serving) -> APIRouter:
    """Makes the endpoints for responses."""
    router = APIRouter(route_class=StrictJSONRoute)

    @router.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses=event_stream_docs() | error_docs(*GENERATION_ERRORS),
    )
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answers a conversation, as items; nothing is stored."""
        serving.require_model(body.model)
        chat = chat_request(body)
        plan = plan_tools(chat, serving.tool_style, response_structure(body, chat))

        async def prepare(caller: Caller) -> ResponseAnswer:
            with blaming_input():
                prompt = await serving.prompts.chat_prompt(chat, plan.template_tools)
                generation = serving.generation(
                    "resp_",
                    chat,
                    [prompt],
                    caller,
                    structure=plan.structure,
                    keep_special_tokens=plan.keep_special_tokens,
                )
            return ResponseAnswer(generation, body, plan)

        return await serving.respond(request, chat, 1, prepare)

    # Without these, a client would be told that the path does not exist, or only for POST.
    @router.get("/v1/responses/{response_id}", include_in_schema=False)
    @router.delete("/v1/responses/{response_id}", include_in_schema=False)
    @router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
    @router.get("/v1/responses/{response_id}/input_items", include_in_schema=False)
    async def stored_response(response_id: str) -> Response:
        """Says that there is no such response."""
        raise ResponseNotFoundError(
            f"there is no response {shorten(response_id, 80)!r}: this server stores none, and one "
            "that is being made ends when its client closes the connection",
            "response_id",
        )

    return router
