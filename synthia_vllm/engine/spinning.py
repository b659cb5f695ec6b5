"""How long vLLM's processes on a CPU go on looking for the next message before they sleep.

vLLM 0.29 spins for a second after each message (`SpinCondition`, `distributed/device_communicators/shm_broadcast.py`),
in the engine core and in its worker. A replica that is asked for one token every two seconds, to see whether it lives,
thus keeps a core busy with nothing, and where a step takes long the core spins beside the threads that compute it.
"""

from functools import wraps
from typing import Any

# Not 0: ZeroMQ drops a notification that follows another one within a millisecond or so (its high-water mark is 1, and
# a sender looks only now and then whether the last one has gone); whoever slept then would sleep on for five seconds.
SPIN_S = 0.02


def install() -> None:
    """Makes it shorter, for readers that are made from now on."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    make = SpinCondition.__init__

    @wraps(make)
    def make_shorter(self: Any, *given: Any, **named: Any) -> None:
        make(self, *given, **({"busy_loop_s": SPIN_S} | named))

    SpinCondition.__init__ = make_shorter
