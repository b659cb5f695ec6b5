"""vLLM's queue between the engine core and its worker, whose reader sleeps soon: real processes, real messages."""

import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from synthia_vllm.engine import spinning

MESSAGES = 1500
FOR_EVER_MS = 10**8


@pytest.fixture
def installed() -> Iterator[None]:
    before = SpinCondition.__init__
    spinning.install()
    yield
    SpinCondition.__init__ = before


def read_all(handle: Any, ready: Connection) -> None:
    """In another process. A notification that is lost is waited for without end, instead of for vLLM's five seconds."""
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = FOR_EVER_MS
    spinning.install()
    queue = MessageQueue.create_from_handle(handle, 0)
    ready.send("begins")
    queue.wait_until_ready()
    for number in range(MESSAGES):
        assert queue.dequeue(indefinite=True) == number
    ready.send(queue._spin_condition.busy_loop_s)


def test_no_message_is_slept_through(installed: None) -> None:
    """With pauses around the time after which the reader sleeps, bursts and rests."""
    context = multiprocessing.get_context("spawn")
    queue = MessageQueue(1, 1, max_chunk_bytes=2**16, max_chunks=10)
    ours, theirs = context.Pipe()
    reader = context.Process(target=read_all, args=(queue.export_handle(), theirs))
    reader.start()
    try:
        assert ours.poll(120), "the other process has started"
        ours.recv()
        queue.wait_until_ready()
        pauses = random.Random(1)
        for number in range(MESSAGES):
            queue.enqueue(number)
            if number % 3 == 0:
                time.sleep(pauses.uniform(0.0, 1.5 * spinning.SPIN_S))
        assert ours.poll(60), "a message was slept through"
        assert ours.recv() == spinning.SPIN_S
    finally:
        reader.kill()
        reader.join()


def test_who_is_told_another_time_keeps_it(installed: None) -> None:
    def spins(**named: Any) -> float:
        found: float = SpinCondition(True, zmq.Context.instance(), "inproc://nobody", **named).busy_loop_s
        return found

    assert [spins(), spins(busy_loop_s=0.5)] == [spinning.SPIN_S, 0.5]
