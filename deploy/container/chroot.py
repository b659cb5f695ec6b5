"""Executes the Dockerfile's steps in a bare Debian root and asks the server there: `deploy/container/check-chroot`.

What a container engine would do with the target `cpu`, with debootstrap and chroot: one root for the build's stages and
one for the image's, so that what only the build installs is missing where it would be missing. The server runs as the
image's user, on a root file system that can't be written. Needs root; runs in a mount namespace of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import httpx

from deploy.container import dockerfile
from synthia_vllm.free_ports import free_ports

_ROOT = Path(__file__).parents[2]
_DOCKERFILE = Path(__file__).parent / "Dockerfile"
_RELEASE = "bookworm"  # the base image's
_PASSED = ("PIP_", "SSL_", "REQUESTS_", "http_proxy", "https_proxy", "no_proxy")
_MOUNTS_ON_ONE_ANOTHER = 3  # /dev before and after the root is bound to itself
_CHAT = {"model": "synthia", "messages": [{"role": "user", "content": "What is an orca?"}], "max_tokens": 8}


class Root:
    """A file system that instructions are executed in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.user, self.folder = "0:0", "/"
        self.entry: list[str] = []
        self.command: list[str] = []

    def inside(self, path: str) -> Path:
        return self.path / path.lstrip("/")

    def execute(self, stage: dockerfile.Stage, others: dict[str, "Root"]) -> None:
        """All instructions of a stage; what only says something of the image is passed over."""
        for word, text in stage.instructions:
            if word in ("RUN", "COPY"):
                click.echo(f"[{stage.name}] {word} {text[:100]}", err=True)
            if word == "RUN":
                self.run(["/bin/bash", "-o", "pipefail", "-c", dockerfile.command(text)])
            elif word == "COPY":
                self._copy(text.split(), others)
            elif word == "ENV":
                self.environment |= dockerfile.variables(text)
            elif word == "WORKDIR":
                self.folder = text
                self.inside(text).mkdir(parents=True, exist_ok=True)
            elif word == "USER":
                self.user = text
            elif word == "ENTRYPOINT":
                self.entry = dockerfile.words(text)
            elif word == "CMD":
                self.command = dockerfile.words(text)

    def run(self, words: list[str]) -> None:
        handed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
        subprocess.run(self.words(words), env=self.environment | handed, check=True, stdout=sys.stderr)

    def words(self, words: list[str]) -> list[str]:
        """A command as the image's user in the image's folder."""
        into = ["chroot", f"--userspec={self.user}", str(self.path)]
        return [*into, "/usr/bin/env", f"--chdir={self.folder}", *words]

    def _copy(self, words: list[str], others: dict[str, "Root"]) -> None:
        source = _ROOT
        if words[0].startswith("--from="):
            source = others[words.pop(0).partition("=")[2]].path
        *names, target = words
        for name in names:
            there = source / name.lstrip("/")
            path = self.inside(target if target.startswith("/") else f"{self.folder}/{target}")
            into = path / there.name if target.endswith("/") else path
            into.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "--archive", "--no-target-directory", str(there), str(into)], check=True)


@click.command()
@click.option("--mirror", help="Debian mirror (default: debootstrap's own)")
@click.option(
    "--hand-in", multiple=True, type=click.Path(path_type=Path), help="a file or folder that is to be read there too"
)
@click.option("--folder", type=click.Path(path_type=Path), help="where to work; several GB (default: a temporary one)")
@click.option("--keep", is_flag=True, help="leave the roots where they are")
def main(mirror: str | None, hand_in: tuple[Path, ...], folder: Path | None, keep: bool) -> None:
    """Execute the steps of the target `cpu` in a bare Debian root, and ask the server there.

    pip's and apt's own settings are those of this machine: PIP_… of the environment, and what --hand-in names.
    """
    work = Path(tempfile.mkdtemp(prefix="synthia-chroot-", dir=folder))
    began = time.monotonic()
    try:
        build, image = _roots(work, mirror, hand_in)
        stages = dockerfile.read(_DOCKERFILE)
        for stage in dockerfile.chain(stages, "build-cpu"):
            build.execute(stage, {})
        for stage in dockerfile.chain(stages, "cpu"):
            image.execute(stage, {"build-cpu": build})
        click.echo(f"built after {time.monotonic() - began:.0f} s")
        _ask(image)
        click.echo(f"the server answered as user {image.user} after {time.monotonic() - began:.0f} s")
    finally:
        if not keep:
            _remove(work)


def _roots(work: Path, mirror: str | None, hand_in: tuple[Path, ...]) -> tuple[Root, Root]:
    """Two bare systems with /proc, /dev and the network's settings."""
    base, image = work / "build", work / "image"
    words = ["debootstrap", "--variant=minbase", _RELEASE, str(base), *([mirror] if mirror else [])]
    subprocess.run(words, check=True, stdout=sys.stderr)
    for path in (Path("/etc/resolv.conf"), Path("/etc/hosts")):
        shutil.copy(path, base / str(path).lstrip("/"))
    subprocess.run(["cp", "--archive", str(base), str(image)], check=True)
    for root in (base, image):
        subprocess.run(["mount", "--types", "proc", "proc", str(root / "proc")], check=True)
        subprocess.run(["mount", "--rbind", "/dev", str(root / "dev")], check=True)
        for path in hand_in:
            _show(path.resolve(), root / str(path).lstrip("/"))
    return Root(base), Root(image)


def _show(path: Path, there: Path) -> None:
    """The file or folder of this machine, to be read there."""
    if path.is_dir():
        there.mkdir(parents=True, exist_ok=True)
    else:
        there.parent.mkdir(parents=True, exist_ok=True)
        there.touch()
    subprocess.run(["mount", "--bind", str(path), str(there)], check=True)
    subprocess.run(["mount", "--options", "remount,bind,ro", str(there)], check=True)


def _ask(image: Root) -> None:
    """Starts the image's command on a root that can't be written and waits for a reply of the model."""
    path, user = str(image.path), image.user.partition(":")[0]
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "--options", "remount,bind,ro", path], check=True)
    for name, mode in (("tmp", "1777"), ("data", "0700")):
        options = f"mode={mode},uid={user},gid={user}"
        subprocess.run(["mount", "--types", "tmpfs", "--options", options, "tmpfs", f"{path}/{name}"], check=True)
    # What a container has. /dev/shm comes along, where vLLM's processes meet, and vLLM reads the cores from /sys.
    subprocess.run(["mount", "--types", "proc", "proc", f"{path}/proc"], check=True)
    subprocess.run(["mount", "--types", "sysfs", "--options", "ro", "sysfs", f"{path}/sys"], check=True)
    subprocess.run(["mount", "--rbind", "/dev", f"{path}/dev"], check=True)
    (port,) = free_ports(1)
    # This machine's address only, where no key is asked for.
    words = [*image.entry, "serve", "--port", str(port), "--log-file", "-", "--engine.max-model-len", "1024"]
    words += ["--engine.kv-cache-gib", "0.25"]
    process = subprocess.Popen(image.words(words), env=image.environment, start_new_session=True)
    try:
        _wait(process, f"http://127.0.0.1:{port}/ready")
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=_CHAT, timeout=120, trust_env=False)
        click.echo(reply.raise_for_status().json()["choices"][0]["message"]["content"])
        process.send_signal(signal.SIGTERM)
        code = process.wait(90)
        if code:
            raise click.ClickException(f"SIGTERM ended it with {code}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise click.ClickException(f"the server ended with {process.returncode}")
        try:
            if httpx.get(url, timeout=10, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise click.ClickException(f"not ready after {timeout:.0f} s")


def _remove(work: Path) -> None:
    """Unmounts what is below and removes the folder; never follows a mount into /dev."""
    for _ in range(_MOUNTS_ON_ONE_ANOTHER):
        for mount in sorted(_mounts(work), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
    if not _mounts(work):
        shutil.rmtree(work, ignore_errors=True)


def _mounts(work: Path) -> list[str]:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(str(work))]


if __name__ == "__main__":
    main()
