"""The real server with the demo model, as its users' clients use it."""

import json
import re
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest

from synthia_vllm.engine.demo import demo_model
from synthia_vllm.prompt import STOP_STRINGS, SYSTEM_PROMPTS, render
from tests.card import card_answer
from tests.conftest import RunningServer
from tests.prompt.test_format import conversation
from tests.running import until

pytestmark = pytest.mark.e2e

ORCA: list[Any] = [{"role": "user", "content": "What is an orca?"}]


@pytest.fixture
def oai(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model())


GREEDY = {"temperature": 0}  # a sampled reply may be empty


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"model": "synthia", "messages": ORCA, **body})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def stream(client: httpx.Client, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
    body = {"model": "synthia", "stream": True, **({"messages": ORCA} if "prompt" not in body else {}), **body}
    with client.stream("POST", path, json=body) as response:
        lines = [line[5:].strip() for line in response.iter_lines() if line.startswith("data:")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_printed_curl_command_works(server: RunningServer) -> None:
    command = re.search(r"curl .*?\n.*?'\n", server.announcement, re.DOTALL)
    assert command
    words = shlex.split(command.group().replace("\\\n", " "))
    done = subprocess.run([*words, "--silent"], capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_openai_chat_as_documented(oai: openai.OpenAI) -> None:
    reply = oai.chat.completions.create(model="synthia", messages=ORCA, max_tokens=20, temperature=0)
    assert reply.choices[0].message.content
    assert reply.usage
    assert reply.usage.completion_tokens == 20
    chunks = list(
        oai.chat.completions.create(
            model="synthia",
            messages=ORCA,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 20


def test_openai_responses_as_documented(oai: openai.OpenAI) -> None:
    reply = oai.responses.create(model="synthia", input="What is an orca?", max_output_tokens=20, temperature=0)
    assert reply.output_text == reply.output_text.strip() != ""
    text = ""
    with oai.responses.stream(model="synthia", input="What is an orca?", max_output_tokens=20, temperature=0) as events:
        for event in events:
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type in ("response.completed", "response.incomplete"):  # cut at 20 tokens
                final = event.response
        assert final.output_text == text == text.strip()


def test_openai_models_and_completions(oai: openai.OpenAI) -> None:
    names = {model.id for model in oai.models.list()}
    assert {"SmolLM2-135M-Instruct", "synthia", "synthia-tot"} <= names
    assert oai.models.retrieve("synthia").id == "synthia"
    assert oai.completions.create(model="synthia", prompt="Orcas are", max_tokens=5, temperature=0).choices[0].text


def test_anthropic_as_documented(server: RunningServer) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    reply = client.messages.create(model="synthia", max_tokens=20, system="Be brief.", messages=ORCA, extra_body=GREEDY)
    assert reply.content[0].type == "text"
    assert reply.content[0].text.strip() == reply.content[0].text != ""
    with client.messages.stream(model="synthia", max_tokens=20, messages=ORCA, extra_body=GREEDY) as events:
        text = "".join(events.text_stream)
    assert text == text.strip() != ""
    assert client.messages.count_tokens(model="synthia", messages=ORCA).input_tokens > 5


@pytest.mark.parametrize("turns", [1, 2, 5, 20])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_engine_gets_the_contracts_ids(
    client: httpx.Client, tokenizer: Any, turns: int, system: str | None
) -> None:
    messages, _, _ = conversation(turns, system)
    text = render(messages, bos_token=tokenizer.bos_token)
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert expected.count(tokenizer.bos_token_id) == 1
    tokens = client.post("/tokenize", json={"model": "synthia", "messages": messages}).json()["tokens"]
    reply = ask(client, messages=messages, max_tokens=1, return_token_ids=True)
    assert tokens == reply["prompt_token_ids"] == expected
    # A client can't add a second BOS or bring its own template.
    extras: dict[str, Any] = {"add_special_tokens": True, "chat_template_kwargs": {"bos_token": ""}}
    assert ask(client, messages=messages, max_tokens=1, return_token_ids=True, **extras)["prompt_token_ids"] == expected


def test_the_tot_alias_adds_the_preset(client: httpx.Client, tokenizer: Any) -> None:
    tokens = client.post("/tokenize", json={"model": "synthia-tot", "messages": ORCA}).json()["tokens"]
    assert SYSTEM_PROMPTS["tot"] in tokenizer.decode(tokens)


def test_replies_are_the_cards_answer_on_the_same_tokens(client: httpx.Client, tokenizer: Any) -> None:
    """Prompts that make the model write turns of its own, so that stop strings are met."""
    shots = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": f"{'Q' if i % 2 == 0 else 'A'}{i}"} for i in range(9)
    ]
    stopped = 0
    for seed in range(12):
        body = {"messages": shots, "max_tokens": 80, "seed": seed, "return_token_ids": True}
        whole = ask(client, **body)["choices"][0]
        generated = tokenizer.decode(whole["token_ids"], skip_special_tokens=True)
        assert whole["message"]["content"] == card_answer(generated.split("SYSTEM:")[0])
        deltas = [c["delta"].get("content") for chunk in stream(client, **body) for c in chunk["choices"]]
        texts = [delta for delta in deltas if delta]
        assert "".join(texts) == whole["message"]["content"]
        assert not texts or (texts[0].strip() and texts[-1].strip())
        stopped += any(marker in generated for marker in STOP_STRINGS)
    assert stopped, "the model never wrote a stop string: the prompts must be changed"


def test_no_reply_holds_a_marker_even_where_the_engine_must_go_on(client: httpx.Client) -> None:
    """min_tokens makes the engine ignore stop strings; a guided choice makes the model write them."""
    guided = {"structured_outputs": {"choice": [" \n yes \nUSER: forged turn"]}, "max_tokens": 30}
    for extra in (guided, guided | {"min_tokens": 8}):
        choice = ask(client, **extra)["choices"][0]
        assert choice["message"]["content"] == "yes"
        assert choice["finish_reason"] == "stop"
        deltas = [c["delta"].get("content") for chunk in stream(client, **extra) for c in chunk["choices"]]
        assert "".join(delta or "" for delta in deltas) == "yes"
    body = {
        "model": "synthia",
        "max_output_tokens": 30,
        "structured_outputs": guided["structured_outputs"],
        "input": "x",
    }
    assert client.post("/v1/responses", json=body).json()["output"][0]["content"][0]["text"] == "yes"


def test_a_clients_stop_works_beside_ours(client: httpx.Client) -> None:
    guided = {"structured_outputs": {"choice": ["one two three"]}, "stop": [" three"]}
    assert ask(client, **guided)["choices"][0]["message"]["content"] == "one two"
    deltas = [c["delta"].get("content") or "" for chunk in stream(client, **guided) for c in chunk["choices"]]
    assert "".join(deltas) == "one two"


def test_completions_are_untouched(client: httpx.Client, tokenizer: Any) -> None:
    forced = {"structured_outputs": {"choice": [" a \nUSER: b "]}, "max_tokens": 30}
    body = {"model": "synthia", "prompt": "Say", **forced}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == " a \nUSER: b "
    ids = tokenizer.encode("Orcas are whales", add_special_tokens=False)
    body = {"model": "synthia", "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"].startswith("Orcas are whales")
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1


def test_n_logprobs_seed_and_usage(client: httpx.Client) -> None:
    reply = ask(client, n=3, logprobs=True, top_logprobs=2, max_tokens=6, seed=1)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert all(len(choice["logprobs"]["content"]) == 6 for choice in reply["choices"])
    assert reply["usage"]["completion_tokens"] == 18
    again = ask(client, n=3, logprobs=True, top_logprobs=2, max_tokens=6, seed=1)
    texts = [[choice["message"]["content"] for choice in answer["choices"]] for answer in (reply, again)]
    assert texts[0] == texts[1]
    chunks = stream(client, n=2, logprobs=True, max_tokens=6, ignore_eos=True, stream_options={"include_usage": True})
    counted = [0, 0]
    for chunk in chunks:
        for choice in chunk["choices"]:
            counted[choice["index"]] += len((choice.get("logprobs") or {}).get("content") or ())
    assert counted == [6, 6]
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_a_seed_says_the_same_whatever_steps_its_prompt_was_computed_in(client: httpx.Client) -> None:
    """On CPUs vLLM's own worker ends where a prompt with a seed takes more than one step (`engine.cpu_worker`)."""

    def said(together: int) -> list[str]:
        # Not in the prefix cache: else the second time would take one step.
        prompt = [f"{number} and {number} is " * 60 for number in range(together)]
        body = {"model": "synthia", "prompt": prompt, "seed": 5, "max_tokens": 8, "cache_salt": str(time.time_ns())}
        reply = client.post("/v1/completions", json=body).raise_for_status().json()
        return [choice["text"] for choice in reply["choices"]]

    alone = said(1)
    assert said(1) == alone
    assert len(said(3)) == 3


def test_response_format_json_schema(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"big": {"type": "boolean"}},
        "required": ["big"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "size", "schema": schema, "strict": True}}
    content = ask(client, response_format=wanted, max_tokens=60, temperature=0)["choices"][0]["message"]["content"]
    assert isinstance(json.loads(content)["big"], bool)


def test_the_allowed_tokens_of_one_hold_nobody_else(client: httpx.Client, tokenizer: Any) -> None:
    """In vLLM's batch a request gets the list of the one whose place it takes (`engine.token_masks`)."""
    completion = {"model": "synthia", "prompt": "A", "stream": True, "ignore_eos": True}
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    with (
        client.stream("POST", "/v1/completions", json={**completion, "max_tokens": 100}) as first,
        client.stream(
            "POST", "/v1/completions", json={**completion, "max_tokens": 3000, "allowed_token_ids": [a]}
        ) as listed,
    ):
        lines = listed.iter_lines()  # kept: httpx closes the stream when it goes
        next(lines)
        first.read()  # its place is free, and the other request moves into it
        next(lines)
        body = {"model": "synthia", "prompt": "A", "max_tokens": 8, "structured_outputs": {"regex": "[0-9]{3}"}}
        replies = [client.post("/v1/completions", json=body).json() for _ in range(3)]
    assert [reply["choices"][0]["text"].strip().isdigit() for reply in replies] == [True] * 3, replies


def test_a_final_message_is_continued(client: httpx.Client, tokenizer: Any) -> None:
    messages = [*ORCA, {"role": "assistant", "content": "An orca is a"}]
    reply = ask(
        client, messages=messages, continue_final_message=True, max_tokens=5, return_token_ids=True, temperature=0
    )
    assert tokenizer.decode(reply["prompt_token_ids"]).endswith("ASSISTANT: An orca is a")
    assert reply["choices"][0]["message"]["content"].startswith(" ")


def test_a_nearly_full_context_shortens_the_default_length(client: httpx.Client) -> None:
    reply = ask(client, messages=[{"role": "user", "content": "word " * 4030}], ignore_eos=True, n=1)
    assert reply["usage"]["prompt_tokens"] > 4096 - 1024
    assert reply["usage"]["total_tokens"] <= 4096


CHAT = "/v1/chat/completions"
BAD: list[tuple[str, Any, int, str]] = [
    (CHAT, {"messages": ORCA, "model": "nothing"}, 404, "model"),
    (CHAT, {"messages": ORCA, "max_tokens": -1}, 400, "max_tokens"),
    (CHAT, {"messages": ORCA, "max_tokens": 10**9}, 400, "max_tokens"),
    (CHAT, {"messages": ORCA, "max_tokens": 10**30}, 400, "max_tokens"),
    (CHAT, {"messages": ORCA, "max_tokens": "many"}, 400, "max_tokens"),
    (CHAT, {"messages": ORCA, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": ORCA, "temperature": -1}, 400, "temperature"),
    (CHAT, {"messages": ORCA, "top_p": 7}, 400, "top_p"),
    (CHAT, {"messages": ORCA, "n": 0}, 400, "n"),
    (CHAT, {"messages": ORCA, "stream": "perhaps"}, 400, "stream"),
    (CHAT, {"messages": ORCA, "seed": "x"}, 400, "seed"),
    (CHAT, {"messages": ORCA, "logit_bias": {"x": "y"}}, 400, "logit_bias"),
    (CHAT, {"messages": ORCA, "response_format": {"type": "json_schema"}}, 400, "json_schema"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
    ("/v1/completions", {"prompt": {"a": 1}}, 400, "prompt"),
    ("/v1/completions", {"prompt": [10**8]}, 400, "10000000"),
    ("/v1/completions", {"prompt": "x", "max_tokens": -5}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "word " * 9000}, 400, "context"),
    ("/v1/messages", {"messages": ORCA, "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/messages", {"messages": ORCA, "max_tokens": 5, "tools": [{"name": "x", "input_schema": {}}]}, 400, "tools"),
    ("/v1/responses", {"input": "x", "max_output_tokens": "x"}, 400, "max_output_tokens"),
    ("/tokenize", {"prompt": 5}, 400, "prompt"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    (CHAT, b'{"messages": ', 400, "body"),
    (CHAT, b'{"messages": "\xff\xfe"}', 400, "body"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "body"),
    ("/v1/completions", b'{"prompt": "\\udfff"}', 400, "body"),
    (CHAT, b"x" * 10_000_000, 413, "body"),
]


@pytest.mark.parametrize(("path", "body", "status", "named"), BAD)
def test_bad_input_is_a_clear_error_and_the_server_goes_on(
    client: httpx.Client, path: str, body: Any, status: int, named: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps({"model": "synthia", **body}).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() >= ({"message", "type"} if path == "/v1/messages" else {"message", "type", "param", "code"})
    assert named in f"{error.get('param')} {error['message']}"
    assert client.get("/health").status_code == 200


def of_vllm(client: httpx.Client, name: str) -> float:
    """What the engine itself tells under this name."""
    found = re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found.group(1))


def running(client: httpx.Client) -> float:
    return of_vllm(client, "num_requests_running")


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_sequence(client: httpx.Client, server: RunningServer, streamed: bool) -> None:
    body = {"model": "synthia", "messages": ORCA, "max_tokens": 3000, "min_tokens": 3000, "stream": streamed}
    with httpx.Client(base_url=server.url, timeout=httpx.Timeout(60, read=60 if streamed else 1)) as leaving:
        if streamed:
            with leaving.stream("POST", CHAT, json=body) as response:
                lines = response.iter_lines()
                for _ in range(12):
                    next(lines)
                until(lambda: running(client) == 1, "it is the only one that runs")
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(CHAT, json=body)
    until(lambda: running(client) == 0, "its sequence is gone")


def test_many_clients_at_once(client: httpx.Client) -> None:
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda seed: ask(client, seed=seed, max_tokens=16), range(32)))
    assert len({reply["id"] for reply in replies}) == 32


def test_request_ids_are_echoed(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"


def test_ready_while_the_engine_generates(client: httpx.Client) -> None:
    assert client.get("/ready").status_code == 200
