"""Prompts of a file, as data sets of chats come: ShareGPT's conversations, OpenAI's messages, plain prompts.

{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", …}]}    the first question, and its reply's length
{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}  all before the last reply, and its length
{"prompt": "…", "output_tokens": 200}                                       as it says

One a line (JSON Lines), or a JSON list of them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

# Of UTF-8 a token, about: no tokenizer is at hand for a server of which only the URL is known.
BYTES_PER_TOKEN = 4
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
          "system": "system"}  # fmt: skip
_SHAPES = '"conversations" (ShareGPT), "messages" (OpenAI) or "prompt"'


@dataclass(frozen=True)
class Entry:
    """One conversation up to a question, and how long its reply was; None where the file does not say."""

    messages: tuple[Mapping[str, str], ...]
    output_tokens: int | None

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens_of(message["content"]) for message in self.messages)


def tokens_of(text: str) -> int:
    """About."""
    return max(1, math.ceil(len(text.encode()) / BYTES_PER_TOKEN))


def read_dataset(path: Path) -> list[Entry]:
    """All entries that ask something: ShareGPT has some that don't. Raises ClickException that names line and cure."""
    found = []
    for where, raw in _raw(path):
        try:
            entry = _entry(raw)
        except ValueError as error:
            raise click.ClickException(f"{path}, {where}: {error}") from None
        found += [entry] if entry is not None else []
    if not found:
        raise click.ClickException(f"{path}: no entry in which anyone asks anything; wanted are entries with {_SHAPES}")
    return found


def _raw(path: Path) -> Iterator[tuple[str, Any]]:
    """Where it is, and the entry, undecided."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} can't be read as text in UTF-8: {error}") from error
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise click.ClickException(
                f"{path}, line {error.lineno}: {error.msg}; the file begins with [, so that one JSON list is wanted"
            ) from None
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise click.ClickException(
                    f"{path}, line {number}: {error.msg}; each line is to be one JSON object, or the file one JSON list"
                ) from None


def _entry(raw: Any) -> Entry | None:
    """None where nobody asks anything. Raises ValueError."""
    if not isinstance(raw, Mapping):
        raise ValueError(  # noqa: TRY004
            f"{type(raw).__name__}, where an object with {_SHAPES} is wanted"
        )
    told = raw.get("output_tokens")
    if told is not None and (isinstance(told, bool) or not isinstance(told, int) or told < 1):
        raise ValueError(
            f"output_tokens: {told!r}, where a number above 0 is wanted; without it, --output-tokens counts"
        )
    if "conversations" in raw:
        messages = list(_messages(raw["conversations"], "conversations", "from", "value"))
        found = _first_question(messages)
    elif "messages" in raw:
        found = _last_question(list(_messages(raw["messages"], "messages", "role", "content")))
    elif "prompt" in raw:
        if not isinstance(raw["prompt"], str) or not raw["prompt"].strip():
            raise ValueError("prompt: a text is wanted, and not an empty one")
        found = [{"role": "user", "content": raw["prompt"]}], None
    else:
        raise ValueError(f"none of {_SHAPES}, but {', '.join(map(repr, raw)) or 'nothing'}")
    if found is None:
        return None
    asked, reply = found
    return Entry(tuple(asked), told or (tokens_of(reply) if reply else None))


Messages = list[Mapping[str, str]]


def _messages(raw: Any, what: str, who: str, said: str) -> Iterable[Mapping[str, str]]:
    if not isinstance(raw, list):
        raise ValueError(f"{what}: a list is wanted")  # noqa: TRY004
    for number, turn in enumerate(raw, start=1):
        place = f"{what}, turn {number}"
        if not isinstance(turn, Mapping) or who not in turn or said not in turn:
            raise ValueError(f'{place}: an object with "{who}" and "{said}" is wanted')
        if turn[who] not in _ROLES:
            raise ValueError(f"{place}: {who} is {turn[who]!r}, where one of {', '.join(_ROLES)} is wanted")
        yield {"role": _ROLES[turn[who]], "content": _text(turn[said], place)}


def _text(content: Any, place: str) -> str:
    """OpenAI's content may be a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise ValueError(f"{place}: text is wanted; leave out entries with images, sounds and calls of tools")


def _first_question(turns: Messages) -> tuple[Messages, str | None] | None:
    """The first turn of a person, with the system message before it, as `vllm bench serve` takes it."""
    at = next((n for n, turn in enumerate(turns) if turn["role"] == "user"), None)
    if at is None or not turns[at]["content"].strip():
        return None
    following = turns[at + 1] if at + 1 < len(turns) else None
    reply = following["content"] if following is not None and following["role"] == "assistant" else None
    return [*(turn for turn in turns[:at] if turn["role"] == "system"), turns[at]], reply


def _last_question(turns: Messages) -> tuple[Messages, str | None] | None:
    asked, reply = (turns[:-1], turns[-1]["content"]) if turns and turns[-1]["role"] == "assistant" else (turns, None)
    return (asked, reply) if any(turn["role"] == "user" for turn in asked) else None
