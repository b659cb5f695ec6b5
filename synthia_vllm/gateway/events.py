"""Server-sent events in a stream of bytes."""

from collections.abc import Iterator


def take_events(buffer: bytearray) -> Iterator[bytes]:
    """Takes the whole events off the front of a buffer, each with the blank line that ends it."""
    while (end := buffer.find(b"\n\n")) >= 0:
        event = bytes(buffer[: end + 2])
        del buffer[: end + 2]
        yield event


def is_one_event(body: bytes) -> bool:
    """Whether these bytes are one whole event, which is how vLLM sends."""
    return 0 < body.find(b"\n\n") == len(body) - 2
