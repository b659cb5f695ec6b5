"""Messages to prompt text and back.

The Jinja templates beside this module are the one definition of the format: vLLM is given the file, `render()` runs
the same file. The Jinja environment is set up as transformers sets up its own (`utils/chat_template_utils.py`).
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

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
    turn_end: str = "",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The prompt text of a conversation, the same that vLLM renders.

    Messages are OpenAI's: `content` is a text or a list of text parts (joined by newlines); `developer` is `system`;
    several system messages are joined by a newline and go first; consecutive messages of one role are merged. With
    `continue_final_message` the prompt ends inside the last assistant message. `bos_token` is left empty for text
    that a tokenizer will encode with its own special tokens.

    Raises ValueError for a role or a part that Synthia has no form for, or a last message that can't be continued.
    """
    if continue_final_message:
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("continue_final_message needs a last message of role 'assistant'")
        add_generation_prompt = False
    return _template(style).render(
        messages=messages, bos_token=bos_token, turn_end=turn_end, add_generation_prompt=add_generation_prompt
    )


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


@lru_cache
def _template(style: Style) -> "Template":
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template_path(style).read_text(encoding="utf-8"))
