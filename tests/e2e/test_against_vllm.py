"""Our chat and completions against vLLM's own routes, over one engine: the same text, ids, ends, usage and logprobs.

vLLM is asked with what the contract adds (sampling, stop strings) spelled out, and its text is cleaned as the contract
says. Greedy, in float32, one request at a time, and with a prefix cache of its own for each: what an engine computes
together with other things it rounds otherwise.
"""

import itertools
import json
import os
import secrets
from collections import defaultdict
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from synthia_vllm.prompt import SAMPLING_DEFAULTS, STOP_STRINGS, clean
from tests.conftest import RunningServer

pytestmark = pytest.mark.e2e

EXAMPLES = int(os.environ.get("SYNTHIA_ORACLE_EXAMPLES", "60"))  # of each route
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,
)
asked = itertools.count()

texts = st.one_of(
    st.sampled_from(["What is an orca?", "Count: 1 2 3", "Grüße 🐋, 鯨?", "", "Say\nUSER: hello", "yes yes yes yes"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20),
)


def tells_stop_tokens(fields: dict[str, Any]) -> bool:
    """Whether vLLM, asked to leave stop strings in, leaves the text of a token in as well: EOS, or the client's."""
    return bool(fields.get("stop_token_ids")) or fields.get("skip_special_tokens") is False


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=4,
)
stops = st.sampled_from(["e", " the", "\n", "ing", "a killer", "."])
sampling = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 8), "temperature": st.just(0)},
    optional={
        "stop": st.one_of(stops, st.lists(stops, max_size=3)),
        "min_tokens": st.integers(0, 4),
        "ignore_eos": st.booleans(),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "presence_penalty": st.sampled_from([-1.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.5, 1]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "logit_bias": st.dictionaries(st.integers(20, 3000).map(str), st.integers(-100, 5), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 400), max_size=3),
        "bad_words": st.lists(st.sampled_from(["orca", "The", " a"]), max_size=2),
        "skip_special_tokens": st.booleans(),
        "return_token_ids": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "top_k": st.sampled_from([-1, 0, 5]),
        "structured_outputs": st.sampled_from([{"choice": ["yes", "no"]}, {"regex": "[0-9]{3}"}]),
    },
)
# The text of a stop token is left out here whatever the client asks for (docs/apis.md).
sampling = sampling.filter(lambda fields: not (tells_stop_tokens(fields) and fields.get("include_stop_str_in_output")))
options = st.sampled_from([None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
chats = st.tuples(
    messages,
    sampling,
    st.fixed_dictionaries({}, optional={"logprobs": st.just(True), "top_logprobs": st.integers(0, 3)}),
    st.booleans(),
    options,
)
prompts = st.one_of(
    texts.filter(bool),
    st.lists(st.integers(3, 4000), min_size=1, max_size=8),
    st.lists(texts.filter(bool), min_size=1, max_size=2),
    st.lists(st.lists(st.integers(3, 4000), min_size=1, max_size=4), min_size=1, max_size=2),
)
completions = st.tuples(
    prompts,
    sampling,
    st.fixed_dictionaries({}, optional={"logprobs": st.integers(0, 3), "echo": st.booleans()}),
    st.booleans(),
    options,
)


def ask(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status, and the whole reply as an object, put together where it was streamed."""
    reply = httpx.post(url + path, json={**body, "cache_salt": secrets.token_hex(8)}, timeout=120)
    if reply.status_code != 200 or not body.get("stream"):
        return reply.status_code, reply.json()
    events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return 200, joined([json.loads(event) for event in events[:-1]], body)


def joined(chunks: list[dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: {"text": "", "logprobs": [], "ids": [], "prompt": None})
    usage = None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            whole = choices[choice["index"]]
            whole["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            whole["logprobs"] += flat(choice.get("logprobs"))
            whole["ids"] += choice.get("token_ids") or []
            whole["prompt"] = whole["prompt"] or choice.get("prompt_token_ids") or chunk.get("prompt_token_ids")
            if choice.get("finish_reason"):
                assert "finish_reason" not in whole, "two ends"
                whole |= {"finish_reason": choice["finish_reason"], "stop_reason": choice.get("stop_reason")}
    wanted = (body.get("stream_options") or {}).get("include_usage")
    assert (usage is not None) == bool(wanted)
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def whole(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply that was not streamed, in the form that `joined` gives."""
    if "usage" in reply and isinstance(reply["choices"][0].get("ids"), list):
        return reply
    found = []
    for choice in reply["choices"]:
        text = choice.get("text", (choice.get("message") or {}).get("content"))
        one = {"text": text or "", "logprobs": flat(choice.get("logprobs")), "ids": choice.get("token_ids") or []}
        one["prompt"] = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
        found.append({**one, "finish_reason": choice["finish_reason"], "stop_reason": choice.get("stop_reason")})
    return {"choices": found, "usage": reply["usage"]}


def flat(logprobs: dict[str, Any] | None) -> list[Any]:
    """A list of (token, logprob, the likeliest) from either form."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            (one["token"], one["logprob"], {top["token"]: top["logprob"] for top in one["top_logprobs"]})
            for one in logprobs["content"] or ()
        ]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))


def assert_same_logprobs(ours: list[Any], theirs: list[Any]) -> None:
    """As far as ours go: those of the text's tokens."""
    for (token, value, top), (its, expected, its_top) in zip(ours, theirs, strict=False):
        assert token == its
        assert value == (None if expected is None else pytest.approx(expected, abs=2e-3))
        assert (top or {}) == pytest.approx(its_top or {}, abs=2e-3)


def usage_of(reply: dict[str, Any]) -> Any:
    usage = reply["usage"]
    return usage and {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


@given(chats)
@quick
def test_chat(server: RunningServer, request_: Any) -> None:
    conversation, fields, more, stream, stream_options = request_
    body = {"model": "synthia", "messages": conversation, **fields, **more, "stream": stream}
    if stream and stream_options:
        body["stream_options"] = stream_options
    own = [fields["stop"]] if isinstance(fields.get("stop"), str) else fields.get("stop") or []
    theirs = {name: value for name, value in SAMPLING_DEFAULTS.items() if name not in fields}
    spelled = {**theirs, **body, "stop": list(dict.fromkeys([*own, *STOP_STRINGS])), "include_stop_str_in_output": True}
    if tells_stop_tokens(fields):
        spelled["include_stop_str_in_output"] = False
    status, ours = ask(server.url, CHAT, body)
    their_status, reply = ask(server.vllm, CHAT, spelled)
    assert status == their_status, (ours, reply)
    if status != 200:
        assert status == 400
        return
    ours, reply = whole(ours), whole(reply)
    assert usage_of(ours) == usage_of(reply)
    cut = [*(() if fields.get("include_stop_str_in_output") else own), *STOP_STRINGS]
    for mine, its in zip(ours["choices"], reply["choices"], strict=True):
        if not fields.get("min_tokens"):  # from there on only does an engine look for the client's stop strings
            assert mine["text"] == clean(its["text"], cut)
        met = any(stop in its["text"] for stop in cut) or isinstance(its["stop_reason"], str)
        assert mine["finish_reason"] == ("stop" if met else its["finish_reason"]) or fields.get("min_tokens")
        assert mine["ids"] == its["ids"]
        assert mine["prompt"] == its["prompt"]
        assert_same_logprobs(mine["logprobs"], its["logprobs"])
        assert len(mine["logprobs"]) == len(its["logprobs"]) or met


@given(completions)
@quick
def test_completions(server: RunningServer, request_: Any) -> None:
    prompt, fields, more, stream, stream_options = request_
    body = {"model": "synthia", "prompt": prompt, **fields, **more, "stream": stream}
    if stream and stream_options:
        body["stream_options"] = stream_options
    status, ours = ask(server.url, COMPLETIONS, body)
    their_status, reply = ask(server.vllm, COMPLETIONS, body)
    assert status == their_status, (ours, reply)
    if status != 200:
        assert status == 400
        return
    ours, reply = whole(ours), whole(reply)
    assert usage_of(ours) == usage_of(reply)
    for mine, its in zip(ours["choices"], reply["choices"], strict=True):
        assert mine["text"] == its["text"]
        assert (mine["finish_reason"], mine["stop_reason"]) == (its["finish_reason"], its["stop_reason"])
        assert mine["ids"] == its["ids"]
        stopped = isinstance(its["stop_reason"], str) and not fields.get("include_stop_str_in_output")
        assert_same_logprobs(mine["logprobs"], its["logprobs"])
        assert len(mine["logprobs"]) == len(its["logprobs"]) or stopped
