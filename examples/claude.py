"""Streams a reply by Anthropic's client, which finds the same model: `python examples/claude.py "What is an orca?"`."""

import os
import sys

from anthropic import Anthropic

client = Anthropic(
    base_url=os.environ.get("SYNTHIA_URL", "http://127.0.0.1:8000"),
    api_key=os.environ.get("SYNTHIA_API_KEY", "none"),
)
question = " ".join(sys.argv[1:]) or "What is an orca?"
with client.messages.stream(
    model="synthia",
    system="You answer in one sentence.",
    messages=[{"role": "user", "content": question}],
    max_tokens=64,
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
