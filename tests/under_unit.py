"""Runs a command under the system call filters of a systemd unit: `python -m tests.under_unit UNIT COMMAND …`.

systemd puts them on a service when it is process 1, which it is not where tests run. Here the unit's own lines are
read, systemd names what is in its groups, and libseccomp, which systemd uses itself, makes the filters. Of the unit:
RestrictAddressFamilies= and SystemCallFilter=.
"""

import ctypes
import errno
import os
import shutil
import socket
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EQUAL = 4  # SCMP_CMP_EQ
_FAMILIES = 64  # more than Linux has
# The unit's user is not root, for whom alone SQLite sets the owner of its files.
_OF_ROOT = {"fchown"}


UNIT = Path(__file__).parents[1] / "deploy" / "systemd" / "synthia.service"


class _Argument(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def lines(unit: str, name: str) -> list[str]:
    """The words of all lines of this name."""
    found = [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{name}=")]
    return [word for line in found for word in line.split()]


def calls(words: list[str], groups: dict[str, list[str]]) -> set[str]:
    """System calls by name, of calls and of systemd's groups (`@system-service`)."""
    found: set[str] = set()
    for word in words:
        found |= calls(groups[word], groups) if word.startswith("@") else {word}
    return found


def systemd_groups() -> dict[str, list[str]]:
    words = ["systemd-analyze", "syscall-filter", "--no-pager"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    groups: dict[str, list[str]] = {}
    name = ""
    for line in told.splitlines():
        if line.startswith("@"):
            groups[name := line.strip()] = []
        elif name and line.startswith(" ") and not line.strip().startswith("#"):
            groups[name].append(line.strip())
    return groups


def allowed_calls(unit: str) -> set[str]:
    """What SystemCallFilter= leaves: its first line says what is allowed, those with a tilde take away."""
    groups = systemd_groups()
    wanted = calls(["@default"], groups)  # always there
    for line in unit.splitlines():
        if line.startswith("SystemCallFilter=~"):
            wanted -= calls(line.partition("~")[2].split(), groups)
        elif line.startswith("SystemCallFilter="):
            wanted |= calls(line.partition("=")[2].split(), groups)
    return wanted


def put_on(unit: str) -> None:
    """Puts the filters on this process, for good, and on all that it starts."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    names = allowed_calls(unit)  # starts a process, which the filters may not like
    if os.geteuid() == 0:
        names |= _OF_ROOT
    families = {getattr(socket, name).value for name in lines(unit, "RestrictAddressFamilies")}
    refused = library.seccomp_syscall_resolve_name(b"socket")
    context = ctypes.c_void_p(library.seccomp_init(_ALLOW))
    for family in set(range(_FAMILIES)) - families:
        compared = _Argument(0, _EQUAL, family, 0)
        _checked(
            library.seccomp_rule_add_array(context, _ERRNO | errno.EAFNOSUPPORT, refused, 1, ctypes.byref(compared))
        )
    _checked(library.seccomp_load(context))
    context = ctypes.c_void_p(library.seccomp_init(_KILL))
    for name in sorted(names):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # else this kernel's library does not know it, or another architecture has it
            _checked(library.seccomp_rule_add_array(context, _ALLOW, number, 0, None))
    _checked(library.seccomp_load(context))


def _checked(code: int) -> None:
    if code < 0:
        raise OSError(-code, os.strerror(-code))


def can() -> bool:
    """Whether systemd's and libseccomp's parts of it are installed."""
    return shutil.which("systemd-analyze") is not None and find_library("seccomp") is not None


if __name__ == "__main__":
    put_on(Path(sys.argv[1]).read_text())
    os.execvp(sys.argv[2], sys.argv[2:])
