"""Reading our Dockerfile: stages and their instructions, as far as it uses them."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One `FROM`: what it is built on, and its instructions in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def read(path: Path) -> dict[str, Stage]:
    """Stages by name. Raises ValueError for a FROM without a name: every stage of ours has one."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, keyword, name = rest.split()
            if keyword != "AS":
                raise ValueError(line)
            current = stages[name] = Stage(name, base)
        elif current is not None:
            current.instructions.append((word, rest.strip()))
    return stages


def chain(stages: dict[str, Stage], target: str) -> list[Stage]:
    """The stages that a target is made of, the first of them on the base image."""
    found = [stages[target]]
    while found[0].base in stages:
        found.insert(0, stages[found[0].base])
    return found


def command(text: str) -> str:
    """A RUN's shell command without the builder's own flags."""
    return re.sub(r"^(--\S+\s+)+", "", text)


def words(text: str) -> list[str]:
    """CMD or ENTRYPOINT in exec form. Raises ValueError for the shell form, which would swallow signals."""
    return [str(word) for word in json.loads(text)]


def variables(text: str) -> dict[str, str]:
    """An ENV's."""
    return dict(pair.split("=", 1) for pair in shlex.split(text))
