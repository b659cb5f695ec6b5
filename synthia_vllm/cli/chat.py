"""`synthia-vllm chat`: the card's own loop, against a running server."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from synthia_vllm.errors import SynthiaError
from synthia_vllm.prompt import SYSTEM_PROMPTS

# The card: `output_file_path = "./Synthia-v3.0-11B-conversations.jsonl"`.
CONVERSATIONS_FILE = "Synthia-v3.0-11B-conversations.jsonl"
_LOOK_S = 10.0
_PATIENCE_S = 15.0  # with a server that went away in the middle of a reply
HELP = """\
/reset          forget the conversation (the system message stays)
/system TEXT    set the system message; 'tot' is the card's Tree of Thoughts; no TEXT removes it
/save FILE      write the conversation as JSON, to be used as `messages`
/help           this
/quit           leave (also Ctrl-D)
Ctrl-C stops a reply and keeps what was said."""


class ChatError(SynthiaError):
    """The server can't be talked to."""


@dataclass
class Conversation:
    """The system message and the turns so far."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]


@click.command("chat")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--model", default="synthia", show_default=True, help="The model's name there.")
@click.option("--system", default=None, help="System message; 'tot' is the card's Tree of Thoughts.")
@click.option("--api-key", envvar="SYNTHIA_API_KEY", default="none", help="Key, where the server wants one.")
@click.option(
    "--file",
    "conversations",
    type=click.Path(dir_okay=False, path_type=Path),
    default=CONVERSATIONS_FILE,
    show_default=True,
    help="Each prompt and answer is appended here, as the card does.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=None, help="Longest reply [default: the server's].")
def command(
    url: str, model: str, system: str | None, api_key: str, conversations: Path, max_tokens: int | None
) -> None:
    """Talk to a running server: type, read, Ctrl-C stops a reply, /help lists the commands."""
    import httpx2
    from openai import OpenAI

    from synthia_vllm.client import Resuming

    # A local server needs no proxy, and a reply that is half said goes on or ends: it is not asked for again.
    url = url.rstrip("/")
    if not answers(url):
        click.echo(f"synthia-vllm: {_nobody(url)}", err=True)
        sys.exit(1)
    http = httpx2.Client(transport=Resuming(patience_s=_PATIENCE_S), timeout=600)
    client = OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=600, http_client=http)
    conversation = Conversation(SYSTEM_PROMPTS.get(system, system) if system else None)
    options = {"model": model, **({"max_tokens": max_tokens} if max_tokens else {})}
    for line in _lines():
        if line.startswith("/"):
            if not obey(line, conversation):
                break
        elif line.strip():
            conversation.turns.append({"role": "user", "content": line})
            try:
                answer = say(lambda: _stream(client, options, conversation))
            except ChatError as error:
                conversation.turns.pop()
                click.echo(f"synthia-vllm: {error}", err=True)
                if not sys.stdin.isatty():
                    sys.exit(1)
                continue
            conversation.turns.append({"role": "assistant", "content": answer})
            record(conversations, line, answer)


def answers(url: str) -> bool:
    """Whether anything speaks HTTP there: known before something is typed."""
    import httpx

    try:
        httpx.get(f"{url}/health", timeout=_LOOK_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def obey(line: str, conversation: Conversation) -> bool:
    """Runs a slash command; False where the program should end."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/quit" | "/exit":
            return False
        case "/reset":
            conversation.turns.clear()
            click.echo("(the conversation starts anew)")
        case "/system":
            conversation.system = SYSTEM_PROMPTS.get(rest, rest) or None
            click.echo(f"(system: {conversation.system or 'none'})")
        case "/save" if rest:
            try:
                Path(rest).expanduser().write_text(json.dumps(conversation.messages(), indent=1, ensure_ascii=False))
                click.echo(f"(saved to {rest})")
            except OSError as error:
                click.echo(f"(not saved: {error})")
        case "/help":
            click.echo(HELP)
        case _:
            click.echo(f"({line}: no such command, or a file name is missing)\n{HELP}")
    return True


def say(stream: Callable[[], Iterator[str]]) -> str:
    """Prints a reply as it comes; Ctrl-C ends the reply only. Returns what was said."""
    said: list[str] = []
    try:
        for text in stream():
            said.append(text)
            click.echo(text, nl=False)
    except KeyboardInterrupt:
        click.echo(" (stopped)", nl=False)
    click.echo()
    return "".join(said).strip()


def record(file: Path, prompt: str, answer: str) -> None:
    """Appends one turn, in the card's form."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


def _stream(client: Any, options: dict[str, Any], conversation: Conversation) -> Iterator[str]:
    """The texts of one reply. Closing it (also by Ctrl-C) closes the connection, which frees the engine."""
    from openai import APIConnectionError, APIStatusError, OpenAIError

    try:
        with client.chat.completions.create(messages=conversation.messages(), stream=True, **options) as chunks:
            for chunk in chunks:
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    yield text
    except APIConnectionError:
        raise ChatError(_nobody(str(client.base_url).removesuffix("/v1/"))) from None
    except APIStatusError as error:
        raise ChatError(f"the server refused: {error.message}") from None
    except OpenAIError as error:
        raise ChatError(str(error)) from None


def _nobody(url: str) -> str:
    return f"there is no server at {url}; start one with `synthia-vllm serve`, or give --url"


def _lines() -> Iterator[str]:
    """What the person types, with editing and history on a terminal; the lines of standard input elsewhere."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("You: ")
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue  # an empty line, as a shell does
        except EOFError:
            return
