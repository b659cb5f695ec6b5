import pytest

from synthia_vllm.metrics import busy
from synthia_vllm.metrics.busy import LoopBusy


def test_a_minute_of_a_busy_loop_is_told_once_and_again_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(busy._log, "warning", lambda _, share, **__: told.append(share))
    now = cpu = 0.0
    loop = LoopBusy(lambda: now, lambda: cpu)

    def run(seconds: int, share: float) -> None:
        nonlocal now, cpu
        for _ in range(seconds):
            loop.tick()
            now, cpu = now + 1, cpu + share
        loop.tick()

    run(59, 0.9)
    assert (told, loop.share) == ([], pytest.approx(0.9))
    run(30, 0.9)
    assert told == [0.9]
    run(60, 0.5)
    assert loop.share == pytest.approx(0.5)
    run(70, 0.85)
    assert len(told) == 2
