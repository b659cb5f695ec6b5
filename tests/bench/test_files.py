"""Traces and populations from files: what is wrong is named with its line."""

from pathlib import Path

import click
import pytest

from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.trace import read_trace
from synthia_vllm.bench.users import read_users

HEAD = "arrival,prompt_tokens,output_tokens,user\n"


def test_a_csv_and_a_jsonl_say_the_same(tmp_path: Path) -> None:
    table, lines = tmp_path / "t.csv", tmp_path / "t.jsonl"
    table.write_text(HEAD + "0,10,20,a\n1.5, 11, 21,\n")
    lines.write_text(
        '{"arrival": 0, "prompt_tokens": 10, "output_tokens": 20, "user": "a"}\n\n'
        '{"arrival": 1.5, "prompt_tokens": 11, "output_tokens": 21}\n'
    )
    assert read_trace(table).rows == read_trace(lines).rows
    assert read_trace(table).rate == pytest.approx(2 / 1.5)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", HEAD + "0,10,20,a\nsoon,10,20,a\n", "line 3: arrival"),
        ("t.csv", HEAD + "0,0,20,a\n", "line 2: prompt_tokens"),
        ("t.csv", HEAD + "0,10\n", "line 2: 4 columns"),
        ("t.csv", "arrival,prompt_tokens\n0,1\n", "line 1: no column output_tokens"),
        ("t.csv", HEAD + "2,10,20,a\n1,10,20,a\n", "line 3: arrival 1 is before"),
        ("t.csv", HEAD, "no requests"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 1, "output_tokens": 2}\nnonsense\n', "line 2: not JSON"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 1, "output_tokens": 2, "size": 3}\n', "line 1: size"),
        ("t.txt", "", ".csv or a .jsonl"),
    ],
)
def test_a_trace_that_is_wrong_names_the_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(click.ClickException) as caught:
        read_trace(tmp_path / name)
    assert said in caught.value.message


def test_populations_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "users.yaml"
    path.write_text(
        "users:\n- {name: a, rate: 2, prompt_tokens: [8, 16], weight: 3, key: sk-a}\n"
        "- {name: b, streams: 4, output_tokens: 5}\n"
    )
    found = read_users(path, 10)
    assert found.populations[0].prompt_tokens == Span(8, 16)
    assert found.populations[1].output_tokens == Span(5, 5)
    assert found.weights == {"a": 3, "b": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("users:\n- {name: a, rate: 1}\n- {name: b}\n", "entry 2: Value error, either rate"),
        ("users:\n- {name: a, rate: -1}\n", "entry 1: rate"),
        ("users:\n- {name: a, rate: 1, prompt_tokens: [9, 3]}\n", "entry 1: prompt_tokens"),
        ("users:\n- {name: a, rate: 1}\n- {name: a, rate: 2}\n", "one name"),
        ("people: []\n", "'users:'"),
        ("users: [\n", "can't be read"),
    ],
)
def test_populations_that_are_wrong_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "users.yaml"
    path.write_text(text)
    with pytest.raises(click.ClickException) as caught:
        read_users(path, 10)
    assert said in caught.value.message
