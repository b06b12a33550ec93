"""Server-sent events, read as they come.

Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream".
"""

import re

MAX_EVENT_BYTES = 1 << 20

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """Cuts the bytes of an event stream into the data of its events.

    Everything but data is skipped: comments, names, ids. A server that never ends a line or an
    event is stopped at `MAX_EVENT_BYTES`.
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._num_bytes = 0
        self._after_return = False

    def feed(self, chunk: bytes) -> list[bytes]:
        r"""Takes the next bytes, cut anywhere.

        Returns:
            The data of the events that they end; several data lines of one event are joined by
            ``\n``.

        Raises:
            ValueError: An event is too large.
        """
        if self._after_return and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        if chunk:
            self._after_return = chunk.endswith(b"\r")
        *lines, rest = _LINE_END.split(chunk)
        events: list[bytes] = []
        for line in lines:
            if self._line:
                self._take(b"".join((*self._line, line)), events)
                self._line.clear()
            else:
                self._take(line, events)
        if rest:
            self._line.append(rest)
            self._grow(len(rest))
        return events

    def end(self) -> list[bytes]:
        """Says that nothing more comes.

        Returns:
            The event that was not yet ended by an empty line, if there is one: servers leave the
            last one out.
        """
        events = self.feed(b"\n\n")
        return [event for event in events if event]

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
            self._num_bytes = 0
            return
        name, _, value = line.partition(b":")
        if name.removeprefix(b"\xef\xbb\xbf") == b"data":
            self._grow(len(value))
            self._data.append(value.removeprefix(b" "))

    def _grow(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
