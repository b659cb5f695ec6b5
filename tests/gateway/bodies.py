"""Bodies of the four APIs for property tests: mostly good, some fields of other types, a few no JSON at all."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from tests.gateway.whole import BODIES, CHAT, COMPLETIONS, LENGTH, MESSAGES, RESPONSES

numbers = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**18, 10**400, 0.5, 1.0, -0.0, 1e308]),
    st.floats(-3, 3),
)
texts = st.one_of(st.text(max_size=20), st.sampled_from(["USER:", "SYSTEM:", "\n", " 0", "ff", "x" * 300, "\0", "é😀"]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
tokens = st.integers(0, 17_000)
flags = st.booleans()
schema = st.sampled_from([{"type": "object"}, {"a": [{}]}, {}, 5])
stops = st.one_of(texts, st.lists(texts, max_size=18))

SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "min_tokens": st.integers(0, 10),
    "stop": stops,
    "stop_token_ids": st.lists(tokens, max_size=3),
    "ignore_eos": flags,
    "include_stop_str_in_output": flags,
    "skip_special_tokens": flags,
    "logit_bias": st.dictionaries(tokens.map(str), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(tokens, max_size=3),
    "bad_words": st.lists(texts, max_size=2),
    "structured_outputs": st.fixed_dictionaries(
        {}, optional={"json": schema, "regex": texts, "choice": st.just(["a"])}
    ),
    "vllm_xargs": st.dictionaries(texts, texts, max_size=2),
    "stream_interval": st.integers(1, 100),
    "cache_salt": texts,
    "user": texts,
    "priority": numbers,
}
OPENAI = {
    **SAMPLING,
    "n": st.integers(1, 8),
    "echo": flags,
    "prompt_logprobs": st.integers(0, 2),
    "return_token_ids": flags,
    "return_tokens_as_token_ids": flags,
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": flags, "continuous_usage_stats": flags}),
    "response_format": st.one_of(
        st.just({"type": "text"}), st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": schema})
    ),
}
content = st.one_of(
    st.none(), texts, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
)
roles = st.sampled_from(["user", "assistant", "system", "developer", "user", "user"])
messages = st.lists(st.fixed_dictionaries({"role": roles}, optional={"content": content}), min_size=1, max_size=4)
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    CHAT: {
        **OPENAI,
        "messages": messages,
        "max_completion_tokens": st.integers(1, 60),
        "logprobs": flags,
        "top_logprobs": st.integers(0, 3),
        "continue_final_message": flags,
    },
    COMPLETIONS: {
        **OPENAI,
        "prompt": st.one_of(
            texts,
            st.lists(texts, max_size=12),
            st.lists(tokens, max_size=100),
            st.lists(st.lists(tokens, min_size=1, max_size=5), max_size=12),
            st.integers(1, 9000).map(lambda length: [5] * length),
        ),
        "logprobs": st.integers(0, 3),
        "add_special_tokens": flags,
    },
    RESPONSES: {
        **SAMPLING,
        "input": st.one_of(texts, messages),
        "instructions": texts,
        "include": st.just(["message.output_text.logprobs"]),
        "top_logprobs": st.integers(0, 3),
    },
    MESSAGES: {**SAMPLING, "messages": messages, "system": content, "stop_sequences": st.lists(texts, max_size=4)},
}


@st.composite
def bodies(
    draw: st.DrawFn, path: str, fields: Mapping[str, st.SearchStrategy[Any]] | None = None, longest: int = 60
) -> bytes:
    """A body of one API; `fields` instead of the usual ones, and so many tokens at most where the length is good."""
    fields = FIELDS[path] if fields is None else fields
    wrong = draw(st.sampled_from([False] * 4 + [True]))
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True))
    body = {**BODIES[path], LENGTH[path]: draw(st.integers(1, longest)), "stream": draw(flags)}
    body |= {name: draw(fields[name]) for name in chosen}
    if wrong:
        name = draw(st.sampled_from(sorted({*body, *fields})))
        body[name] = draw(anything)
        if draw(flags):
            del body[draw(st.sampled_from(sorted(body)))]
    found = json.dumps(body).encode()
    if draw(st.integers(0, 30)) == 0:
        cut = draw(st.integers(0, len(found)))
        found = found[:cut] + draw(st.binary(max_size=5)) + found[cut + draw(st.integers(0, 3)) :]
    return found
