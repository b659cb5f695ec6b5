from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from synthia_vllm.prompt import SYSTEM_PROMPTS, find_marker, parse, render, template_path
from tests.card import format_block, run_card_loop

SPECIAL = ["two\nlines", "emoji 🐋👩‍👩‍👧", "says USER: inside", "trailing blanks  ", "", "  leading", "ASSISTANT: x"]


def conversation(turns: int, system: str | None) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    users = [SPECIAL[turn % len(SPECIAL)] + f" {turn}" * (turn % 2) for turn in range(turns)]
    answers = [f"answer {turn}\nwith 🐋" for turn in range(turns)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    for turn in range(turns):
        messages.append({"role": "user", "content": users[turn]})
        if turn + 1 < turns:
            messages.append({"role": "assistant", "content": answers[turn]})
    return messages, users, answers


@pytest.mark.parametrize("turns", [1, 2, 5, 20])
@pytest.mark.parametrize("system", [None, "Be brief.", SYSTEM_PROMPTS["tot"], "two\nlines "])
def test_script_style_is_what_the_cards_python_builds(turns: int, system: str | None, tmp_path: Path) -> None:
    messages, users, answers = conversation(turns, system)
    assert render(messages, style="script") == run_card_loop(system, users, answers, tmp_path)[-1]


def test_card_style_is_the_cards_format_block() -> None:
    messages = [
        {"role": "system", "content": SYSTEM_PROMPTS["tot"]},
        {"role": "user", "content": "What is the difference between an Orca, Dolphin and a Seal?"},
    ]
    assert render(messages) == format_block()


@pytest.mark.parametrize("turns", [1, 2, 5, 20])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_card_style_repeats_the_block_for_every_turn(turns: int, system: str | None) -> None:
    messages, users, answers = conversation(turns, system)
    expected = [] if system is None else [f"SYSTEM: {system}"]
    for turn in range(turns):
        expected.append(f"USER: {users[turn]}" if users[turn] else "USER:")
        expected.append(f"ASSISTANT: {answers[turn]}" if turn + 1 < turns else "ASSISTANT:")
    assert render(messages, bos_token="<s>") == "<s>" + "\n".join(expected)


def test_system_messages_are_joined_and_go_first() -> None:
    messages = [
        {"role": "system", "content": "one"},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": "two"},
    ]
    assert render(messages) == "SYSTEM: one\ntwo\nUSER: hi\nASSISTANT:"


def test_consecutive_messages_of_one_role_are_merged() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert render(messages) == "USER: a\nb\nASSISTANT:"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render([{"role": "user", "content": parts}]) == "USER: a\nb\nASSISTANT:"


@pytest.mark.parametrize("style", ["card", "script"])
def test_turn_end_follows_past_answers_only(style: Any) -> None:
    messages, _, _ = conversation(3, None)
    text = render(messages, style=style, turn_end="</s>")
    assert text.count("</s>") == 2
    assert not text.endswith("</s>")


@pytest.mark.parametrize("style", ["card", "script"])
def test_a_last_answer_is_continued(style: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "An orca is"}]
    text = render(messages, style=style, turn_end="</s>", continue_final_message=True)
    assert text.endswith("ASSISTANT: An orca is")


def test_only_an_answer_can_be_continued() -> None:
    with pytest.raises(ValueError, match="assistant"):
        render([{"role": "user", "content": "hi"}], continue_final_message=True)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    ],
)
def test_what_the_format_has_no_form_for_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Synthia"):
        render([message])


plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: find_marker(text) is None)


@pytest.mark.parametrize("style", ["card", "script"])
@given(system=st.none() | plain, texts=st.lists(plain, min_size=1, max_size=6), turn_end=st.sampled_from(["", "</s>"]))
def test_parse_is_the_inverse_of_render(style: Any, system: str | None, texts: list[str], turn_end: str) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    if style == "card" and any(message["content"].startswith("\n") for message in messages):
        return  # "USER:" before a newline is how an empty content looks
    text = render(messages, style=style, bos_token="<s>", turn_end=turn_end)
    waits_for_reply = messages[-1]["role"] == "user"
    parsed = parse(text, style=style, bos_token="<s>", turn_end=turn_end)
    assert parsed == messages or (not waits_for_reply and parsed[: len(messages)] == messages)


contents = st.one_of(
    st.none(),
    st.sampled_from([*SPECIAL, "USER:"]),
    st.lists(st.sampled_from(SPECIAL).map(lambda text: {"type": "text", "text": text}), max_size=3),
)
roles = st.sampled_from(["system", "developer", "user", "assistant"])


@lru_cache
def engines_template(style: Any) -> Any:
    """As transformers sets it up (`utils/chat_template_utils.py`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(template_path(style).read_text(encoding="utf-8"))


@pytest.mark.parametrize("style", ["card", "script"])
@settings(deadline=None)
@given(
    messages=st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), max_size=8),
    turn_end=st.sampled_from(["", "</s>"]),
    lead=st.sampled_from(["", " "]),
    waits=st.booleans(),
)
def test_render_writes_what_the_engines_template_does(
    style: Any, messages: list[dict[str, Any]], turn_end: str, lead: str, waits: bool
) -> None:
    given: dict[str, Any] = {"bos_token": "<s>", "bos_lead": lead, "turn_end": turn_end, "add_generation_prompt": waits}
    assert render(messages, style=style, **given) == engines_template(style).render(messages=messages, **given)


def test_parse_refuses_other_text() -> None:
    with pytest.raises(ValueError, match="SYSTEM:"):
        parse("Hello")
