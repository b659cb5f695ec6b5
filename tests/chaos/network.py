"""A network between gateway and replicas that loses packets: two namespaces, of which the nearer forwards, or does not.

    this machine -- 198.18.7.1 / 198.18.7.2 [near] 198.18.7.5 / 198.18.7.6 [far]: the replicas

Packets are dropped where they are forwarded, in both directions, as on a real line; `tc netem` would do it too, but
many kernels are built without it. Addresses are of RFC 2544's range, for benchmarks.
"""

import os
import re
import shutil
import subprocess

import pytest

from tests.services import REQUIRED

FAR = "198.18.7.6"
_TABLE = "synthia_chaos"
_NOT_HERE = ("not permitted", "not supported", "No such file", "Unknown device type", "denied")


class Impossible(Exception):
    """This machine has no namespaces, or no packet filter."""


class Line:
    """The two namespaces and what connects them; `prefix` runs a command in the far one.

    Raises Impossible where the kernel or the rights don't allow it.
    """

    def __init__(self) -> None:
        self.near, self.far = (f"synthia-{name}-{os.getpid()}" for name in ("near", "far"))
        self._here = f"syn{os.getpid() % 10**7}"  # an interface's name is at most 15 long
        self.prefix = ["ip", "netns", "exec", self.far]

    def make(self) -> None:
        for space in (self.near, self.far):
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "link", "add", self._here, "type", "veth", "peer", "name", "up0", "netns", self.near)
        _run("ip", "-n", self.near, "link", "add", "down0", "type", "veth", "peer", "name", "up0", "netns", self.far)
        _run("ip", "addr", "add", "198.18.7.1/30", "dev", self._here)
        _run("ip", "-n", self.near, "addr", "add", "198.18.7.2/30", "dev", "up0")
        _run("ip", "-n", self.near, "addr", "add", "198.18.7.5/30", "dev", "down0")
        _run("ip", "-n", self.far, "addr", "add", f"{FAR}/30", "dev", "up0")
        _run("ip", "link", "set", self._here, "up")
        for space, device in ((self.near, "up0"), (self.near, "down0"), (self.far, "up0")):
            _run("ip", "-n", space, "link", "set", device, "up")
        _run("ip", "route", "add", "198.18.7.4/30", "via", "198.18.7.2")
        _run("ip", "-n", self.far, "route", "add", "default", "via", "198.18.7.5")
        _run("ip", "netns", "exec", self.near, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self.lose(0)

    def lose(self, percent: int) -> None:
        """So many of 100 packets, in each direction."""
        self._rule(f"numgen random mod 100 < {percent} counter drop")

    def cut(self) -> None:
        self._rule("counter drop")

    def heal(self) -> None:
        self.lose(0)

    def dropped(self) -> int:
        """Packets, since the line was last changed."""
        words = ["ip", "netns", "exec", self.near, "nft", "list", "table", "inet", _TABLE]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return int(re.search(r"counter packets (\d+)", told)[1])  # type: ignore[index]

    def remove(self) -> None:
        """The interfaces go with their namespaces; what still runs in one keeps it, so end that first."""
        for words in (["link", "del", self._here], ["netns", "del", self.near], ["netns", "del", self.far]):
            subprocess.run(["ip", *words], capture_output=True, check=False)

    def _rule(self, rule: str) -> None:
        _run("ip", "netns", "exec", self.near, "nft", "-f", "-", given=_table(_TABLE, "forward", rule))


class BlackHole:
    """Swallows what goes to a port of this machine, and what comes from it, as a host that is gone does.

    Raises Impossible where the kernel or the rights don't allow it.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._name = f"{_TABLE}_{port}"

    def open(self) -> None:
        port = f"tcp dport {self._port} drop\n tcp sport {self._port} drop"
        _run("nft", "-f", "-", given=_table(self._name, "input", port))

    def close(self) -> None:
        _run("nft", "-f", "-", given=f"table inet {self._name} {{}}\ndelete table inet {self._name}\n")


def _table(name: str, hook: str, rule: str) -> str:
    """A table of nft's with one rule in it, in place of what was there under its name."""
    chain = f"chain way {{\n type filter hook {hook} priority 0\n {rule}\n}}\n"
    return f"table inet {name} {{}}\ndelete table inet {name}\ntable inet {name} {{\n{chain}}}\n"


def need_root(*tools: str) -> None:
    """Skips where this user or machine can't; a missing tool fails instead, if services are required."""
    if os.geteuid() != 0:
        pytest.skip("namespaces and mounts need root")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (Debian: iproute2, nftables)"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason}; {REQUIRED}=1 asks for it")
        pytest.skip(reason)


def _run(*words: str, given: str | None = None) -> None:
    done = subprocess.run(words, input=given, text=True, capture_output=True, check=False, timeout=20)
    if done.returncode:
        told = f"{' '.join(words)}: {done.stderr.strip()}"
        raise Impossible(told) if any(text in told for text in _NOT_HERE) else RuntimeError(told)
