"""Seams: wherever a sequence is cut, its reader has what an undisturbed one gives."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.bench.null.tokens import EOS
from synthia_vllm.engine.port import Generation, Position, Sampling
from synthia_vllm.engine.resume import ARGUMENT, resume, stateful
from synthia_vllm.engine.transcript import Transcript
from synthia_vllm.errors import UpstreamLost
from synthia_vllm.replicas.attempt import Attempt, AttemptLost
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.generate import GenerateReply
from tests.replicas.simulated_vllm import GARBAGE, PROMPT, SimulatedVllm

TEXTS = st.lists(st.sampled_from([" the", "\n", "US", "ER", ":", " USER", "x", "é", " 🙂"]), min_size=1, max_size=12)


@dataclass
class Reader:
    """What came of a sequence."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[Position] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    stop: int | str | None = None
    cached: int | None = None


class CutAttempt(Attempt):
    """An attempt at a simulated engine that is lost after so many chunks, `together` of which come in one read."""

    def __init__(self, chunks: Any, length: int, together: int) -> None:
        super().__init__(None, Endpoint("http://none", "generate", vllm=True), {})  # type: ignore[arg-type]
        self._chunks, self._length, self._together = chunks, length, together

    async def events(self, path: str, body: bytes) -> AsyncIterator[list[bytes]]:  # type: ignore[override]
        read: list[bytes] = []
        for number, data in enumerate(self._chunks(body)):
            if number == self._length:
                raise AttemptLost("died")
            read.append(data)
            if len(read) == self._together:
                yield read
                read = []
        if read:
            yield read


async def play(
    engine: SimulatedVllm,
    generation: Generation,
    cuts: Sequence[int] = (),
    sizes: Sequence[int] = (),
    together: int = 1,
) -> Reader:
    """Reads a sequence; each number of `cuts` is how many chunks an attempt has before its engine is lost."""
    transcript, reader = Transcript(generation, null_tokenizer()), Reader()
    for length in [*cuts, 10_000]:
        if len(reader.ids) >= generation.sampling.max_tokens:
            reader.finish.append("length")
            break
        asked = resume(generation, generation.prompt, reader.ids, whole=transcript.whole) if reader.ids else generation
        replayed = list(reader.ids) if stateful(generation.sampling) else []
        attempt = CutAttempt(lambda body: engine.chunks(body, sizes), length, together)
        try:
            async for delta in GenerateReply(asked, transcript, replayed).read(attempt):
                reader.text += delta.text
                reader.ids += delta.ids
                reader.logprobs += delta.logprobs or ()
                reader.cached = delta.cached
                if delta.finish:
                    reader.finish.append(delta.finish)
                    reader.stop = delta.stop_reason
            break
        except AttemptLost:
            assert length < 10_000, "the last attempt must end by itself"
    return reader


def asking(**sampling: Any) -> Generation:
    return Generation(id="1", prompt=PROMPT, sampling=Sampling(**{"max_tokens": 100} | sampling))


@pytest.mark.parametrize("state", [{}, {"seed": 2**63 - 1}, {"structured_outputs": {"regex": ".*"}}])
@given(
    words=TEXTS,
    ends=st.booleans(),
    stops=st.sampled_from([(), ("\nUSER:", " USER:", "USER:"), ("x",), ("R:\n", "🙂")]),
    min_tokens=st.sampled_from([0, 5]),
    logprobs=st.sampled_from([None, 1]),
    short=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    sizes=st.lists(st.integers(1, 3), max_size=8),
    together=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
async def test_a_cut_sequence_is_the_undisturbed_one(
    state: dict[str, Any],
    words: list[str],
    ends: bool,
    stops: tuple[str, ...],
    min_tokens: int,
    logprobs: int | None,
    short: int,
    cuts: list[int],
    sizes: list[int],
    together: int,
) -> None:
    script = null_tokenizer().encode("".join(words)) + [EOS] * ends
    engine = SimulatedVllm(script, stateful=bool(state))
    generation = asking(
        stop=stops, min_tokens=min_tokens, logprobs=logprobs, max_tokens=max(1, len(script) - short), **state
    )
    undisturbed = await play(engine, generation)
    cut = await play(engine, generation, cuts, sizes, together)
    assert (cut.text, cut.finish, cut.stop) == (undisturbed.text, undisturbed.finish, undisturbed.stop)
    assert len(cut.finish) == 1
    assert cut.ids == undisturbed.ids
    assert cut.logprobs == undisturbed.logprobs
    assert len(cut.logprobs) == (len(cut.ids) if logprobs else 0)
    assert cut.cached in (None, len(PROMPT) - 1, len(PROMPT))


async def test_a_replay_that_says_something_else_is_found() -> None:
    script = null_tokenizer().encode("abcdef")
    generation = asking(seed=7, max_tokens=6)
    transcript = Transcript(generation, null_tokenizer())
    transcript.take(script[:3])
    other = SimulatedVllm([*script[:2], GARBAGE, *script[3:]])
    attempt = CutAttempt(lambda body: other.chunks(body.replace(b"synthia_replay", b"unknown"), []), 99, 1)
    with pytest.raises(UpstreamLost, match="did not say again"):
        async for _ in GenerateReply(resume(generation, PROMPT, script[:3]), transcript, script[:3]).read(attempt):
            pass


def test_the_next_engine_is_asked_for_what_is_left() -> None:
    rest = resume(asking(max_tokens=9, min_tokens=5, temperature=0.3, logit_bias={5: 1.0}), PROMPT, [100, 101])
    assert rest.prompt == [*PROMPT, 100, 101]
    assert (rest.sampling.max_tokens, rest.sampling.min_tokens) == (7, 3)
    assert (rest.sampling.temperature, rest.sampling.logit_bias) == (0.3, {5: 1.0})


async def test_a_replay_that_ends_early_is_found() -> None:
    script = null_tokenizer().encode("abcdef")
    generation = asking(seed=7, max_tokens=6)
    transcript = Transcript(generation, null_tokenizer())
    transcript.take(script[:3])
    other = SimulatedVllm([*script[:2], EOS])
    attempt = CutAttempt(lambda body: other.chunks(body.replace(b"synthia_replay", b"unknown"), []), 99, 1)
    with pytest.raises(UpstreamLost, match="did not say again"):
        async for _ in GenerateReply(resume(generation, PROMPT, script[:3]), transcript, script[:3]).read(attempt):
            pass


async def test_a_seam_in_a_character_makes_no_stop_string_of_the_prompt() -> None:
    words = null_tokenizer()
    script = words.encode("a 🙂 b")
    generation = asking(max_tokens=len(script), stop=("USER:",))
    chat = words.encode("USER: hi\nASSISTANT:")
    engine = SimulatedVllm(script, prompt=chat)
    for cut in range(1, len(script)):
        found = await play(engine, replace(generation, prompt=chat), [cut])
        assert (found.text, found.finish) == ("a 🙂 b", ["length"])


def test_what_has_a_state_is_said_again() -> None:
    asked = asking(max_tokens=9, min_tokens=5, seed=7, extra_args={"mine": 1})
    again = resume(asked, PROMPT, [100, 101])
    assert again.prompt == PROMPT
    assert again.sampling.extra_args == {"mine": 1, ARGUMENT: [100, 101]}
    assert (again.sampling.max_tokens, again.sampling.min_tokens, again.sampling.seed) == (9, 5, 7)


def test_the_argument_is_the_one_that_our_logits_processor_reads() -> None:
    from synthia_vllm.engine import replay

    assert replay.ARGUMENT == ARGUMENT


@pytest.mark.parametrize(
    ("sampling", "state"),
    [
        ({}, False),
        ({"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.1}, False),
        ({"repetition_penalty": 1.2}, False),  # looks at prompt and reply alike
        ({"logit_bias": {5: 1.0}, "allowed_token_ids": (1, 2), "stop": ("x",), "logprobs": 3}, False),
        ({"seed": 1}, True),
        ({"seed": 1, "temperature": 0.0}, False),
        ({"presence_penalty": 0.5}, True),
        ({"frequency_penalty": -0.5}, True),
        ({"bad_words": ("x y",)}, True),
        ({"structured_outputs": {"json_object": True}}, True),
        ({"extra_args": {"mine": 1}}, True),
    ],
)
def test_what_depends_on_more_than_the_ids(sampling: dict[str, Any], state: bool) -> None:
    assert stateful(Sampling(max_tokens=5, **sampling)) is state
