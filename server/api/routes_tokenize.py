"""``POST /tokenize``, ``POST /detokenize``, ``GET /tokenizer_info`` and ``GET /version``."""

import asyncio
from importlib.metadata import version

from fastapi import APIRouter
from starlette.responses import Response

from headlong.server.api.schemas_tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChat,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    Version,
)
from headlong.server.api.serving import Serving
from headlong.server.api.strict_json import StrictJSONRoute
from headlong.server.api.tool_choice import plan_tools
from headlong.server.api.unsupported import (
    DETOKENIZE_FIELDS,
    TOKENIZE_CHAT_FIELDS,
    TOKENIZE_TEXT_FIELDS,
    refuse_unsupported,
)
from headlong.server.http_errors import BODY_ERRORS, error_docs


def tokenize_router(serving: Serving) -> APIRouter:
    """Makes the endpoints around the tokenizer. They take no place in the engine's queue."""
    router = APIRouter(route_class=StrictJSONRoute)
    encoder = serving.prompts
    tokenizer = encoder.tokenizer

    @router.post(
        "/tokenize",
        response_model=TokenizeResponse,
        responses=error_docs(*BODY_ERRORS),
    )
    async def tokenize(body: TokenizeRequest) -> Response:
        """Tells the tokens of a text, or of a conversation."""
        if body.model is not None:
            serving.require_model(body.model)
        if isinstance(body, TokenizeChat):
            refuse_unsupported(body.model_extra, TOKENIZE_CHAT_FIELDS)
            plan = plan_tools(body, serving.tool_style)
            tokens = await encoder.tokenize_chat(body, plan.template_tools)
        else:
            refuse_unsupported(body.model_extra, TOKENIZE_TEXT_FIELDS)
            special = body.add_special_tokens is not False
            tokens = await encoder.tokenize(body.prompt, special=special)
        answer = TokenizeResponse(
            count=len(tokens), max_model_len=serving.limits.max_model_len, tokens=tokens
        )
        if body.return_token_strs:
            strings = await asyncio.to_thread(tokenizer.convert_ids_to_tokens, tokens)
            answer.token_strs = [*strings]
        content = answer.model_dump_json(exclude_unset=True)
        return Response(content, media_type="application/json")

    @router.post("/detokenize", responses=error_docs(*BODY_ERRORS))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """Tells the text of token ids."""
        if body.model is not None:
            serving.require_model(body.model)
        refuse_unsupported(body.model_extra, DETOKENIZE_FIELDS)
        return DetokenizeResponse(prompt=await encoder.detokenize(body.tokens))

    @router.get("/tokenizer_info", responses=error_docs(401, 500))
    async def tokenizer_info() -> TokenizerInfo:
        """Describes the tokenizer."""
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=serving.limits.vocab_size,
            model_max_length=serving.limits.max_model_len,
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            unk_token=named.get("unk_token"),
            special_tokens=list(tokenizer.all_special_tokens),
            chat_template=encoder.template.source,
        )

    @router.get("/version", responses=error_docs(401, 500))
    async def server_version() -> Version:
        """Tells the server's version."""
        return Version(version=version("headlong"))

    return router
