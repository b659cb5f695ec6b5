"""Data sets as they come: ShareGPT's, OpenAI's, plain; and what is said of one that is none."""

import json
from pathlib import Path
from typing import Any

import click
import pytest

from synthia_vllm.bench.dataset import Entry, read_dataset, tokens_of


def entries(tmp_path: Path, text: str) -> list[Entry]:
    path = tmp_path / "chats"
    path.write_text(text)
    return read_dataset(path)


def one(tmp_path: Path, **entry: Any) -> tuple[list[tuple[str, str]], int | None]:
    found = entries(tmp_path, json.dumps(entry))[0]
    return [(message["role"], message["content"]) for message in found.messages], found.output_tokens


def test_of_sharegpt_the_first_question_and_the_length_of_its_reply(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("gpt", "Hello!"), ("human", "Why?"), ("gpt", "x" * 80), ("human", "And?")]
    said = [{"from": who, "value": text} for who, text in turns]
    assert one(tmp_path, id="a", conversations=said) == ([("system", "Be brief."), ("user", "Why?")], 20)


def test_of_messages_all_before_the_last_reply(tmp_path: Path) -> None:
    turns = [("user", "Why?"), ("assistant", "Because."), ("user", "And?"), ("assistant", "y" * 41)]
    said = [{"role": who, "content": text} for who, text in turns]
    assert one(tmp_path, messages=said) == (turns[:3], 11)
    assert one(tmp_path, messages=said[:3]) == (turns[:3], None)


def test_parts_of_text_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert one(tmp_path, messages=[{"role": "user", "content": parts}]) == ([("user", "Why?")], None)


def test_a_prompt_may_say_how_long_its_reply_is(tmp_path: Path) -> None:
    assert one(tmp_path, prompt="Why?", output_tokens=7) == ([("user", "Why?")], 7)
    assert one(tmp_path, prompt="Why?") == ([("user", "Why?")], None)


def test_a_list_and_lines_are_the_same(tmp_path: Path) -> None:
    wanted = [{"prompt": "a"}, {"prompt": "b\u2028c"}]
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in wanted) + "\n\n"
    assert entries(tmp_path, lines) == entries(tmp_path, json.dumps(wanted, indent=1))


def test_conversations_in_which_nobody_asks_anything_are_left_out(tmp_path: Path) -> None:
    assert len(entries(tmp_path, '[{"conversations": []}, {"prompt": "Why?"}]')) == 1


@pytest.mark.parametrize(("text", "tokens"), [("", 1), ("four", 1), ("four " * 40, 50), ("\u6f22" * 40, 30)])
def test_tokens_are_counted_roughly(text: str, tokens: int) -> None:
    assert tokens_of(text) == tokens


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt"', "line 2: Expecting ':' delimiter; each line is to be one JSON object"),
        ('[\n{"prompt": "a"},\n', "line 3: Expecting value; the file begins with [, so that one JSON list is wanted"),
        ('{"prompt": "a"}\n\n{"text": "b"}', 'line 3: none of "conversations" (ShareGPT), "messages" (OpenAI)'),
        ('[{"prompt": "a"}, 7]', "entry 2: int, where an object with"),
        ('{"prompt": " "}', "line 1: prompt: a text is wanted, and not an empty one"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens: 0, where a number above 0 is wanted; without it"),
        ('{"conversations": [{"value": "a"}]}', 'conversations, turn 1: an object with "from" and "value" is wanted'),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "messages, turn 1: role is 'tool', where one of human"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "leave out entries with images"),
        ('{"messages": 3}', "messages: a list is wanted"),
        ("[]", "no entry in which anyone asks anything"),
    ],
)
def test_what_is_none_is_told_with_its_line_and_the_cure(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(click.ClickException) as told:
        entries(tmp_path, text)
    assert said in told.value.message
    assert str(tmp_path / "chats") in told.value.message
