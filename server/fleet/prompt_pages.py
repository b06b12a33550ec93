"""Names for the pages of a prompt: two prompts that begin alike have the same first names.

The name of a page depends on all tokens up to its end, as in the prefix cache. A page is that of a
router and larger than a block: it only says where the blocks should be.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256

from headlong.server.engine.request import EngineRequest
from headlong.server.engine.status import EngineInfo

PAGE_TOKENS = 64
NAME_BYTES = 16

_UNSIGNED_INT = "I"


def page_tokens(info: EngineInfo) -> int:
    """Tokens of a page; smaller ones than a block would never be found."""
    return max(PAGE_TOKENS, info.block_size)


def max_pages(info: EngineInfo) -> int:
    """Pages whose blocks one engine's cache can hold."""
    keep_all = [group.num_blocks for group in info.groups if group.window_size is None]
    num_blocks = min(keep_all or [group.num_blocks for group in info.groups])
    return num_blocks * info.block_size // page_tokens(info)


def request_pages(request: EngineRequest, num_tokens: int) -> bytes:
    """Names the full pages of a request's prompt.

    Args:
        request: Its salt and its policy are part of every name.
        num_tokens: Of a page.

    Returns:
        The names one after the other, `NAME_BYTES` each.
    """
    return page_names(
        request.prompt_token_ids, num_tokens, repr((request.cache_salt, request.kv_policy))
    )


def page_names(token_ids: Sequence[int], num_tokens: int, root: str) -> bytes:
    """Names the full pages of a prompt.

    Args:
        token_ids: The prompt.
        num_tokens: Of a page.
        root: What else decides whether two prompts share their cache.

    Returns:
        The names one after the other, `NAME_BYTES` each.
    """
    names: list[bytes] = []
    name = sha256(root.encode("utf-8", "surrogatepass")).digest()
    for end in range(num_tokens, len(token_ids) + 1, num_tokens):
        page = array(_UNSIGNED_INT, token_ids[end - num_tokens : end])
        name = sha256(name + page.tobytes()).digest()
        names.append(name[:NAME_BYTES])
    return b"".join(names)


def split_names(names: bytes) -> list[bytes]:
    """Takes apart what `page_names` put together."""
    return [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]
