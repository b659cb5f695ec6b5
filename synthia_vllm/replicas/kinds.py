"""How each kind of engine is asked."""

from collections.abc import Sequence

from synthia_vllm.engine.port import Generation
from synthia_vllm.engine.transcript import Transcript
from synthia_vllm.replicas.completions import CompletionsReply
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.generate import GenerateReply
from synthia_vllm.replicas.reply import Reply


def reply_of(endpoint: Endpoint, generation: Generation, transcript: Transcript, replayed: Sequence[int] = ()) -> Reply:
    """The reader of this engine's reply."""
    kind = GenerateReply if endpoint.kind == "generate" else CompletionsReply
    return kind(generation, transcript, replayed)
