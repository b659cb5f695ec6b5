"""What the requests of one conversation share, so that each finds the replica that has the KV cache of the last one."""

from collections.abc import Mapping, Sequence

from synthia_vllm.api.base import Asker
from synthia_vllm.engine.port import Affinity, affinity_key

_PREFIX = 1024  # of a prompt that is no conversation: enough to tell one from another
_ASKED = "\nASSISTANT:"  # ends a user's message in a prompt that its client has put into Synthia's format


def conversation_affinity(asker: Asker, messages: Sequence[Mapping[str, str]]) -> Affinity:
    """X-Session-Id, else the conversation as it was before its newest user message, up to the user message before.

    That is what the request before this one ended with, so its replica was remembered under it; this one's is to be
    remembered for what it ends with. Conversations that only begin alike have homes of their own from there on.
    """
    if asker.session:
        return _session(asker)
    spoken = [f"{message['role']}\0{message['content']}\0" for message in messages]
    asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
    newest = _key(asker, spoken[: asked[-1] + 1] if asked else spoken)
    if len(asked) < 2:
        continued = any(message["role"] == "assistant" for message in messages)
        return Affinity(newest, continued=continued, next=newest)
    return Affinity(_key(asker, spoken[: asked[-2] + 1]), continued=True, next=newest)


def prompt_affinity(asker: Asker, prompt: str | Sequence[int]) -> Affinity:
    """X-Session-Id, else as of a conversation where a text is one in Synthia's format, else how the prompt begins."""
    if asker.session:
        return _session(asker)
    asked = prompt.rfind(_ASKED) if isinstance(prompt, str) else -1
    if isinstance(prompt, str) and asked >= 0:
        newest, before = affinity_key(asker.user, prompt[:asked]), prompt.rfind(_ASKED, 0, asked)
        if before < 0:
            return Affinity(newest, continued=False, next=newest)
        return Affinity(affinity_key(asker.user, prompt[:before]), continued=True, next=newest)
    return Affinity(affinity_key(asker.user, str(prompt[:_PREFIX])), continued=False)


def _session(asker: Asker) -> Affinity:
    return Affinity(affinity_key(asker.user, f"session {asker.session}"), continued=True)


def _key(asker: Asker, spoken: Sequence[str]) -> bytes:
    return affinity_key(asker.user, "".join(spoken))
