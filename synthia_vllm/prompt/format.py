"""Messages to prompt text and back.

vLLM is given the Jinja templates beside this module; `render()` writes the same text, many times as fast, which a test
holds it to.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Style = Literal["card", "script"]
Message = Mapping[str, Any]


def template_path(style: Style = "card") -> Path:
    """The Jinja file of a style, for vLLM's `--chat-template`."""
    return Path(__file__).with_name(f"{style}.jinja")


def render(
    messages: Sequence[Message],
    *,
    style: Style = "card",
    bos_token: str = "",
    bos_lead: str = "",
    turn_end: str = "",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The prompt text of a conversation, the same that vLLM renders with the template.

    Messages are OpenAI's: `content` is a text or a list of text parts (joined by newlines); `developer` is `system`;
    several system messages are joined by a newline and go first; consecutive messages of one role are merged. With
    `continue_final_message` the prompt ends inside the last assistant message. `bos_token` is left empty for text
    that a tokenizer will encode with its own special tokens; `bos_lead` is what must stand between it and the first
    role marker (see `engine/tokenizer.py`).

    Raises ValueError for a role or a part that Synthia has no form for, or a last message that can't be continued.
    """
    if continue_final_message:
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("continue_final_message needs a last message of role 'assistant'")
        add_generation_prompt = False
    systems, turns = _sorted(messages)
    written = [bos_token]
    if systems or style == "card":
        written.append(bos_lead)  # a turn of the script brings a blank of its own
    if systems:
        written.append(_opened("SYSTEM", "\n".join(systems), style))
    last = ""
    for role, text in turns:
        if role == last:
            written += ("\n", text)
            continue
        if last == "assistant":
            written.append(turn_end)
        written += (_between(style, first=not (systems or last)), _opened(role.upper(), text, style))
        last = role
    if add_generation_prompt:
        if last == "assistant":
            written.append(turn_end)
        written += (_between(style, first=not (systems or last)), _opened("ASSISTANT", "", style))
    return "".join(written)


def _sorted(messages: Sequence[Message]) -> tuple[list[str], list[tuple[str, str]]]:
    """The texts of the system messages, and the turns of the others as (role, text)."""
    systems, turns = [], []
    for message in messages:
        role, text = message.get("role"), _text(message.get("content"))
        if role in ("system", "developer"):
            systems.append(text)
        elif role in ("user", "assistant"):
            turns.append((role, text))
        else:
            raise ValueError(f"Synthia has no role {role!r}: use system, user or assistant")
    return systems, turns


def _opened(role: str, text: str, style: Style) -> str:
    return f"{role}: {text}" if text or style == "script" else f"{role}:"


def _between(style: Style, *, first: bool) -> str:
    """What stands in front of a turn."""
    if style == "script":
        return " \n"
    return "" if first else "\n"


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") in ("text", "input_text", "output_text"):
            texts.append(part.get("text") or "")
        else:
            raise ValueError(f"Synthia reads text only: a content part of type {part.get('type')!r} can't be used")
    return "\n".join(texts)


def parse(text: str, *, style: Style = "card", bos_token: str = "", turn_end: str = "") -> list[dict[str, str]]:
    """Rendered text back into messages; a prompt that waits for its reply ends with the last user message.

    The inverse of `render` for contents that hold no role markers (with markers the text itself is ambiguous: the
    model can't tell either). Raises ValueError for a text that does not start with a role marker.
    """
    text = text.removeprefix(bos_token)
    marks = list(_turn(style, turn_end).finditer(text))
    if not marks or marks[0].start() != 0:
        raise ValueError("a Synthia prompt starts with 'SYSTEM:', 'USER:' or 'ASSISTANT:'")
    messages = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        role = mark.group(1).lower()
        content = text[mark.end() : following.start() if following else len(text)]
        if following is None and role == "assistant" and not content:
            break  # the generation prompt
        if role == "assistant" and turn_end and following is not None:
            content = content.removesuffix(turn_end)
        messages.append({"role": role, "content": content})
    return messages


@lru_cache
def _turn(style: Style, turn_end: str) -> "re.Pattern[str]":
    """How a style opens a turn. In style `card` nothing follows the colon of an empty content."""
    if style == "script":
        return re.compile(r"(?:\A| \n)(USER|ASSISTANT|SYSTEM): ")
    empty = rf"(?=\n|\Z|{re.escape(turn_end)}(?:\n|\Z))"
    return re.compile(rf"(?:\A|\n)(USER|ASSISTANT|SYSTEM):(?: |{empty})")
