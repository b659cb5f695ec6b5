"""Puts a request into the journal, or goes on with one that is there."""

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from synthia_vllm.api.base import Prepared
from synthia_vllm.engine.port import Said
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import Overloaded, ReplyNotKept, RequestError
from synthia_vllm.gateway.journal.entry import Entry, Numbered
from synthia_vllm.gateway.journal.records import Position, position, said
from synthia_vllm.gateway.journal.store import TAKEN_UP, Found, Journals
from synthia_vllm.gateway.request import Exchange

FROM_THE_START = b"*"  # as a Last-Event-ID: all that there is of a reply; where nothing is, it begins
# Gives back what the limits hold for an exchange that has lost its reply: a user's name and the exchange's.
Release = Callable[[str, str], Awaitable[None]]


@dataclass(slots=True)
class Resumption:
    """What the journal has to do with one request, while that is being prepared.

    `found` is what it goes on with; `had` is how much of that the client has.
    """

    journals: Journals
    release: Release
    exchange: Exchange
    digest: str  # of what is asked
    had: Position | None = None
    found: Found | None = None

    @property
    def keeps_its_place(self) -> bool:
        """Whether it goes on with a reply that was in the engine until its gateway died, or lost it to this one."""
        return self.found is not None and not self.found.closed

    @property
    def run(self) -> tuple[str, int]:
        """The reply's own id, and the Unix time of its beginning."""
        if self.found is None:
            return self.exchange.id, int(self.exchange.arrived_at)
        return self.found.entry.run, self.found.entry.created

    async def claim(self, last_event_id: bytes) -> None:
        """For a client that comes back. Raises RequestError, ReplyNotKept, Overloaded."""
        self.had = None if last_event_id == FROM_THE_START else position(last_event_id)
        await self._claim(alive=True)
        if self.found is None and self.had is not None:
            TAKEN_UP.labels("not_kept").inc()
            raise ReplyNotKept("nothing is kept of it (any more)")

    async def claim_whole(self) -> bool:
        """For a reply that is not streamed: whether one of before goes on.

        Not one whose gateway is alive and still at it: then this is another request of the same name.
        """
        if self.found is not None:
            return False
        with contextlib.suppress(Overloaded):  # nobody can tell: it is a new one
            await self._claim(alive=False)
        return self.found is not None

    def put(self, prepared: Prepared, tokenizer: Tokenizer | None) -> Entry | None:
        """Makes of what was prepared a reply that is journaled, and goes on where it was; None where none can be.

        Raises RequestError where it does not agree with what the client has.
        """
        if not _keepable(prepared, tokenizer):
            if self.found is not None:
                raise ReplyNotKept("it has several sequences or log-probabilities")
            return None
        (sequence,) = prepared.sequences
        entry = self.found.entry if self.found is not None else self.journals.entry(self.exchange, self.digest)
        entry.stops = sequence.sampling.stop
        if self.found is not None:
            if self.had is not None:
                entry.extend(self.had)
            told = _said(entry, sequence.sampling.max_tokens, tokenizer)
            usage = self.exchange.usage
            usage.settled, usage.prompt_settled = entry.settled, entry.prompt_settled
            sequence = replace(sequence, id=self.exchange.id, said=told)
            prepared.sequences = [sequence]
            TAKEN_UP.labels("finished" if told and told[-1].finish else "resumed").inc()
        if prepared.streamed:
            prepared.reply = Numbered(prepared.reply, entry, self.had)
        return entry

    async def _claim(self, *, alive: bool) -> None:
        self.found = await self.journals.claim(self.exchange, self.digest, alive=alive)
        if self.found is not None:
            await self.release(self.exchange.account.user, self.found.before)


def _keepable(prepared: Prepared, tokenizer: Tokenizer | None) -> bool:
    """One sequence of ids, of which nothing but ids and their text is told."""
    if tokenizer is None or len(prepared.sequences) != 1:
        return False
    sampling = prepared.sequences[0].sampling
    return sampling.logprobs is None and sampling.prompt_logprobs is None and sampling.logprob_token_ids is None


def _said(entry: Entry, most: int, tokenizer: Tokenizer | None) -> list[Said]:
    try:
        told = [said(record, entry.stops) for record in entry.records]
    except ValueError as error:
        raise RequestError(f"this is no id of an event of this reply: {error}", param="Last-Event-ID") from None
    ids = [token for one in told for token in one.ids]
    if len(ids) > most or any(one.finish for one in told[:-1]):
        raise RequestError("this id is not of this reply", param="Last-Event-ID")
    if tokenizer is not None and max(ids, default=0) >= tokenizer.size:
        raise RequestError("this id has a token that the model does not know", param="Last-Event-ID")
    return told
