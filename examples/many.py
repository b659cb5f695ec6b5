"""Asks many questions at once, which is what the server is for: `python examples/many.py < questions.txt`."""

import asyncio
import os
import sys

from openai import AsyncOpenAI

client = AsyncOpenAI(
    base_url=os.environ.get("SYNTHIA_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SYNTHIA_API_KEY", "none"),
    max_retries=5,  # a 429 or 503 says in Retry-After when to come again, and the client waits so long
)


async def ask(question: str) -> str:
    reply = await client.chat.completions.create(
        model="synthia", messages=[{"role": "user", "content": question}], max_tokens=32
    )
    return reply.choices[0].message.content or ""


async def main() -> None:
    questions = [line.strip() for line in sys.stdin if line.strip()]
    for question, answer in zip(questions, await asyncio.gather(*map(ask, questions)), strict=True):
        print(f"{question}\n  {answer}")


asyncio.run(main())
