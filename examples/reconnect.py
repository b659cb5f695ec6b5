"""Prints a reply that goes on where its connection broke: `python examples/reconnect.py "What is an orca?"`."""

import os
import sys

import httpx2
from openai import OpenAI

from synthia_vllm.client import Resuming

client = OpenAI(
    base_url=os.environ.get("SYNTHIA_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SYNTHIA_API_KEY", "none"),
    http_client=httpx2.Client(transport=Resuming(), timeout=600),
)
question = " ".join(sys.argv[1:]) or "What is an orca?"
chunks = client.chat.completions.create(
    model="synthia", messages=[{"role": "user", "content": question}], max_tokens=64, stream=True
)
for chunk in chunks:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
