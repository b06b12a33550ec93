"""Several streams read as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None


async def fan_in(
    sources: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """Reads all sources at once and yields what they yield, in the order of arrival.

    A source is read no faster than this generator is, so that what waits for a slow reader waits
    in the sources. Closing this generator closes every source and waits until each is closed.

    Args:
        sources: Started here, each in a task of its own.

    Yields:
        The position of a source, and its next item.

    Raises:
        Exception: The first error of a source; the others are closed.
    """
    queue: asyncio.Queue[tuple[int, T | _End]] = asyncio.Queue(maxsize=1)

    async def pump(index: int, source: AsyncGenerator[T, None]) -> None:
        error: Exception | None = None
        try:
            async with aclosing(source):
                async for item in source:
                    await queue.put((index, item))
        except Exception as raised:
            error = raised
        await queue.put((index, _End(error)))

    tasks = [asyncio.create_task(pump(*each)) for each in enumerate(sources)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await queue.get()
            if not isinstance(item, _End):
                yield index, item
                continue
            if item.error is not None:
                raise item.error
            num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
