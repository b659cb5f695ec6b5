"""Whether a replica works, is busy, or hangs: judged by what it does."""

from synthia_vllm.replicas.counters import Counters

# The longest time between two signs of progress is one step of the engine, and most of a step is prompts.
_STEP_TOKENS = 8192  # of an engine that does not tell: vLLM's `max_num_batched_tokens` on GPUs
_SLOWEST_PREFILL = 100.0  # prompt tokens a second of an engine that has told nothing yet
_MARGIN = 2.0  # a step may be so much slower than those before it were on average


class Health:
    """What one replica was seen to do. Times are loop time, in seconds.

    It hangs when it has work and nothing moves for `patience` and the time of the prompt tokens in front: none of its
    counters, no byte of any reply. A request that waits in its queue is no sign of anything.
    """

    def __init__(self, patience: float, now: float) -> None:
        self.patience = patience
        self.counters: Counters | None = None  # as told last; None where it tells none
        self.answered_at = now  # whatever it was: its process lives
        self.told_at = now  # a question: it takes connections
        self.worked_at = now
        self.moved_at = now  # it worked, or there was nothing to do

    def heard(self, now: float) -> None:
        """A byte of a reply came."""
        self.answered_at = self.worked_at = self.moved_at = now

    def told(self, counters: Counters | None, now: float) -> None:
        """It told its counters."""
        before, self.counters = self.counters, counters
        self.answered_at = self.told_at = now
        if counters is not None and before is not None and counters.progress != before.progress:
            self.worked_at = self.moved_at = now

    def rested(self, now: float) -> None:
        """It had nothing to do."""
        self.moved_at = max(self.moved_at, now)

    def forgive(self, seconds: float) -> None:
        """Takes time off that this process itself did not run."""
        self.answered_at += seconds
        self.moved_at += seconds

    def works_since(self, at: float) -> bool:
        """Whether it has worked since, and takes connections."""
        return self.worked_at > at and self.told_at > at

    @property
    def tells(self) -> bool:
        """Whether its counters say what it does."""
        return self.counters is not None and bool(self.counters.progress)

    @property
    def requests(self) -> int:
        """That it has, whoever asked, as far as it tells."""
        return self.counters.requests if self.counters is not None else 0

    def deadline(self, prompt_tokens: int, requests: int) -> float:
        """For how long it may stand still; of `requests` from here, so many prompt tokens are not computed yet."""
        counters = self.counters
        if counters is None or not self.tells:
            return self.patience + prompt_tokens / _SLOWEST_PREFILL
        step = counters.step_tokens or _STEP_TOKENS
        if counters.requests > requests:
            prompt_tokens = step  # what others have asked for is not known
        rate = max(_SLOWEST_PREFILL, (counters.prefill_rate or 0.0) / _MARGIN)
        return self.patience + min(prompt_tokens, step) / rate
