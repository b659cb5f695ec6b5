"""The model card's Python, run as it is written: what the card builds as prompts and takes as answers."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CARD = Path(__file__).with_name("model_card.md")


def card_code() -> str:
    """The card's Python block."""
    text = CARD.read_text(encoding="utf-8")
    return text.split("```python\n", 1)[1].split("```", 1)[0]


def format_block() -> str:
    """The card's *prompt format* block."""
    text = CARD.read_text(encoding="utf-8")
    return text.split("### Here is prompt format:\n\n```\n", 1)[1].split("\n```", 1)[0]


def run_card_loop(system: str | None, users: list[str], answers: list[str], folder: Path) -> list[str]:
    """Runs the card's `while True` loop on given inputs and answers; returns the prompts it builds.

    Only the model is replaced (its `generate_text`), and the system text where another is wanted.
    """
    source = card_code().split("conversation = f", 1)[1]
    first_line, loop = source.split("\n", 1)
    prompts: list[str] = []
    replies: Iterator[str] = iter(answers)
    inputs: Iterator[str] = iter(users)

    def generate_text(prompt: str) -> str:
        prompts.append(prompt)
        return next(replies)

    scope: dict[str, Any] = {
        "generate_text": generate_text,
        "input": lambda _: next(inputs),
        "print": lambda *_: None,
        "json": json,
        "output_file_path": str(folder / "conversations.jsonl"),
        "conversation": "" if system is None else f"SYSTEM: {system}",
    }
    assert first_line.startswith('"SYSTEM: Elaborate')
    with contextlib.suppress(StopIteration):
        exec(compile(loop, "model card", "exec"), scope)
    return prompts


def card_answer(generated: str) -> str:
    """The card's line that takes the answer out of the generated text, as it is written there."""
    line = next(line for line in card_code().splitlines() if line.strip().startswith("answer = string"))
    scope: dict[str, Any] = {"string": generated}
    exec(line.strip(), scope)
    return str(scope["answer"])
