"""Asks one question, by OpenAI's client: `python examples/chat.py "What is an orca?"`."""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("SYNTHIA_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SYNTHIA_API_KEY", "none"),  # `synthia-vllm keys create --user NAME` makes one
)
reply = client.chat.completions.create(
    model="synthia",  # `synthia-tot` adds the card's Tree-of-Thoughts system message
    messages=[
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": " ".join(sys.argv[1:]) or "What is an orca?"},
    ],
    max_tokens=64,
)
print(reply.choices[0].message.content)
assert reply.usage is not None
print(f"({reply.usage.prompt_tokens} tokens in, {reply.usage.completion_tokens} out)", file=sys.stderr)
