"""Server-sent events in a stream of bytes (WHATWG HTML, 9.2.5 and 9.2.6)."""

_BOM = b"\xef\xbb\xbf"
MAX_EVENT = 4 * 2**20  # bytes


class EventTooLong(ValueError):
    """One event is longer than any engine's is."""


class EventReader:
    """Takes bytes as they come and gives each whole event's data. Events without data, such as comments, give nothing.

    `event:` and `id:` are read over: engines say in the data what it is. An event that the stream's end cuts off is
    none. Raises EventTooLong.
    """

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._limit = limit
        self._line: list[bytes] = []  # parts of a line whose end has not come
        self._data: list[bytes] | None = None  # lines of the event whose end has not come
        self._size = 0  # of both
        self._after_cr = False  # an LF that comes first belongs to the CR before it
        self._between = True  # nothing is open
        self._bom: bytes | None = b""  # of the stream's first bytes, what may be a BOM; None: that is settled

    def feed(self, part: bytes) -> list[bytes]:
        """The data of the events that end in these bytes."""
        # What nearly every read of nearly every engine is: one event, or several, `data: …` and LF twice each.
        if self._between and part.endswith(b"\n\n") and part.startswith(b"data: ") and b"\r" not in part:
            self._bom = None
            body = part[6:-2]
            if b"\n" not in body:
                return [body]
            events = body.split(b"\n\ndata: ")
            if body.count(b"\n") == 2 * (len(events) - 1):
                return events
        return self._feed(part)

    def _feed(self, part: bytes) -> list[bytes]:
        if self._bom is not None:
            part = self._bom + part
            if len(part) < len(_BOM) and _BOM.startswith(part):
                self._bom = part
                return []
            self._bom = None
            part = part.removeprefix(_BOM)
        if not part:
            return []
        if self._after_cr and part.startswith(b"\n"):
            part = part[1:]
        self._after_cr = part.endswith(b"\r")
        *ends, rest = part.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        found: list[bytes] = []
        for end in ends:
            line = b"".join((*self._line, end)) if self._line else end
            self._line.clear()
            self._take(line, found)
        if rest:
            self._line.append(rest)
        self._grow(len(rest))
        self._between = not self._line and self._data is None and not self._after_cr
        return found

    def _take(self, line: bytes, found: list[bytes]) -> None:
        if not line:
            if self._data is not None:
                found.append(b"\n".join(self._data))
            self._data, self._size = None, 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            if self._data is None:
                self._data = []
            self._data.append(value.removeprefix(b" "))
            self._grow(len(line))

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._limit:
            raise EventTooLong(f"an event of over {self._limit} bytes")
