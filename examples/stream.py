"""Prints a reply as it comes, and its bill at the end: `python examples/stream.py "What is an orca?"`."""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("SYNTHIA_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SYNTHIA_API_KEY", "none"),
)
question = " ".join(sys.argv[1:]) or "What is an orca?"
chunks = client.chat.completions.create(
    model="synthia",
    messages=[{"role": "user", "content": question}],
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in chunks:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n({chunk.usage.completion_tokens} tokens)", file=sys.stderr)
