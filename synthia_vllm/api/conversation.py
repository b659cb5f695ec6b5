"""Conversations as every API has them: which messages Synthia's format takes, and the prompt that they become."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from synthia_vllm.api.base import Model
from synthia_vllm.engine.rendered import Rendered
from synthia_vllm.errors import ContextTooLong, RequestError
from synthia_vllm.prompt import MODEL_ALIASES, SYSTEM_PROMPTS, escape_markers, find_marker, render

MAX_MESSAGES = 16_384
MAX_PARTS = 16_384  # of one message
_TEXT_PARTS = ("text", "input_text", "output_text")
_BYTES_A_TOKEN = 3  # English has four and more, other scripts less


class Part(msgspec.Struct):
    """A part of a message; only texts can be used."""

    type: str
    text: str | None = None


Content = str | Annotated[list[Part], Meta(max_length=MAX_PARTS)]


class Message(msgspec.Struct, kw_only=True):
    """A message in OpenAI's form. No content is an empty turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    tool_calls: Any = None
    function_call: Any = None


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]


class Prompt(NamedTuple):
    """A prompt as engines take it."""

    ids: Sequence[int]  # BOS included; empty where no tokenizer is known
    text: str | None  # without BOS; None for a prompt that came as ids
    tokens: int
    exact: bool  # whether `tokens` is a count, not an estimate


def conversation(
    messages: Sequence[Message], *, model_name: str, model: Model, param: str = "messages", system: str = ""
) -> list[dict[str, str]]:
    """The messages ready for `rendered`: texts, one system message in front, the preset of the model's alias put in.

    `system` is what an API has beside its messages (`instructions`, `system`): it goes before their system messages.
    Raises RequestError that names the message, under `param`, for what Synthia's format has no place for.
    """
    systems: list[str] = [system] if system else []
    turns: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        if message.tool_calls or message.function_call:
            where = f"{param}[{index}].{'tool_calls' if message.tool_calls else 'function_call'}"
            raise RequestError("Synthia's prompt format has no tool calls", param=where)
        text = text_of(message.content, message.role, model, f"{param}[{index}].content")
        if message.role in ("system", "developer"):
            systems.append(text)
        else:
            turns.append({"role": message.role, "content": text})
    if systems:
        turns.insert(0, {"role": "system", "content": "\n".join(systems)})
    elif preset := MODEL_ALIASES.get(model_name):
        turns.insert(0, {"role": "system", "content": SYSTEM_PROMPTS[preset]})
    return turns


def text_of(content: Content | None, role: str, model: Model, param: str) -> str:
    """A content's text: parts are joined by newlines, and what users wrote is put under the policy on role markers."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _under_policy(content, role, model, param)
    texts = []
    for index, part in enumerate(content):
        where = f"{param}[{index}]"
        if part.type not in _TEXT_PARTS:
            raise RequestError(f"{where}: Synthia reads text only, not {part.type[:100]!r}", param=where)
        if part.text is None:
            raise RequestError(f"{where}.text is a text", param=f"{where}.text")
        texts.append(_under_policy(part.text, role, model, f"{where}.text"))
    return "\n".join(texts)


def check_size(text: str, model: Model, param: str) -> None:
    """Raises ContextTooLong, without tokenizing it, for a text that can't fit: the work would be for nothing."""
    if model.tokenizer is None or model.context is None:
        return
    if (fewest := model.tokenizer.fewest(text)) > model.context:
        raise ContextTooLong(fewest, 1, model.context, param=param, prompt_param=param, at_least=True)


def rendered(
    messages: Sequence[dict[str, str]], model: Model, *, continue_final_message: bool = False, param: str = "messages"
) -> Prompt:
    """The prompt of a conversation: in the model's style, with its BOS, tokenized where its tokenizer is known."""
    tokenizer = model.tokenizer
    bos = tokenizer.bos if tokenizer is not None else ""
    lead = tokenizer.lead if tokenizer is not None else ""

    def written(bos: str, lead: str) -> str:
        return render(
            messages,
            style=model.style,
            bos_token=bos,
            bos_lead=lead,
            turn_end=model.turn_end,
            continue_final_message=continue_final_message,
        )

    whole = written(bos, lead)
    text = Rendered(written("", "") if lead else whole[len(bos) :])
    if tokenizer is None:
        return Prompt((), text, estimate_tokens(text), exact=False)
    check_size(whole, model, param)
    ids = tokenizer.encode(whole)
    return Prompt(ids, text, len(ids), exact=True)


def estimate_tokens(text: str) -> int:
    """Estimates a prompt's tokens where no tokenizer is known, until the engine tells its own count."""
    return len(text.encode()) // _BYTES_A_TOKEN + 1


def refuse_tools(tools: Any, tool_choice: Any) -> None:
    """Raises RequestError for tools, and for a choice that asks for one; an empty list is none."""
    if tools:
        raise RequestError("Synthia's prompt format has no tools; send the request without them", param="tools")
    if tool_choice not in (None, "none", "auto"):
        raise RequestError("there are no tools to choose: Synthia's prompt format has none", param="tool_choice")


def check_continued(messages: Sequence[Message], continued: bool | None, generation_prompt: bool | None) -> None:
    """Raises RequestError for a `continue_final_message` that has nothing to continue."""
    if not continued:
        return
    if messages[-1].role != "assistant":
        raise RequestError(
            "continue_final_message needs a last message of role 'assistant'", param="continue_final_message"
        )
    if generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="add_generation_prompt"
        )


def _under_policy(text: str, role: str, model: Model, param: str) -> str:
    if role != "user" or model.role_markers == "allow":
        return text
    if model.role_markers == "escape":
        return escape_markers(text)
    if marker := find_marker(text):
        raise RequestError(f"{param} holds the role marker {marker!r}, which this server refuses", param=param)
    return text
