"""A machine's wall clock that a test sets, for the processes it starts; the monotonic one goes on as it is."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services import missing

_SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    static int file = -1;
    char text[32] = {0};
    if (file < 0) file = open(getenv("CLOCK_OFFSET"), O_RDONLY | O_CLOEXEC);
    return file >= 0 && pread(file, text, sizeof text - 1, 0) > 0 ? atol(text) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (where) *where = exact.tv_sec;
    return exact.tv_sec;
}
"""


@dataclass
class WallClock:
    """`environment` is for the processes whose clock it is."""

    environment: dict[str, str]

    def set(self, seconds: int) -> None:
        """So far from the true time."""
        Path(self.environment["CLOCK_OFFSET"]).write_text(f"{seconds}\n".ljust(20))


@pytest.fixture
def wall_clock(tmp_path: Path) -> WallClock:
    if shutil.which("cc") is None:
        missing("there is no C compiler to make a clock that can be set (apt-get install gcc)")
    source, shim = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(_SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source], check=True)
    clock = WallClock({"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(tmp_path / "offset")})
    clock.set(0)
    return clock
