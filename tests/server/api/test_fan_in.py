import asyncio
from contextlib import aclosing

import pytest

from headlong.server.api.fan_in import fan_in


class Source:
    def __init__(self, items, *, error=None, hang=False):
        self.items, self.error, self.hang, self.closed = items, error, hang, False

    async def read(self):
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.error:
                raise self.error
            if self.hang:
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.closed = True


def collect(*sources, limit=None):
    async def main():
        got = []
        async with aclosing(fan_in([source.read() for source in sources])) as items:
            async for item in items:
                got.append(item)
                if len(got) == limit:
                    break
        assert all(source.closed for source in sources)
        return got

    return asyncio.run(main())


def test_every_item_arrives_in_its_sources_order():
    got = collect(Source("abc"), Source(""), Source("de"))
    assert [item for index, item in got if index == 0] == list("abc")
    assert [item for index, item in got if index == 2] == list("de")
    assert len(got) == 5


def test_no_sources():
    assert collect() == []


def test_closing_closes_all():
    collect(Source("ab", hang=True), Source("", hang=True), limit=2)


def test_an_error_closes_the_others():
    good, bad = Source("a", hang=True), Source("b", error=ValueError("bad"))
    with pytest.raises(ValueError, match="bad"):
        collect(good, bad)
    assert good.closed
    assert bad.closed
