"""The constants of the contract, and the role markers inside user text."""

import re
from collections.abc import Mapping
from typing import Literal

# The card's `split("USER:")`. The forms with white space come first, so that an engine that excludes the stop string
# from its text leaves no trailing blank behind.
STOP_STRINGS: tuple[str, ...] = ("\nUSER:", " USER:", "USER:", "\nSYSTEM:", " SYSTEM:", "SYSTEM:")

# A client's own stop strings, beside ours.
MAX_CLIENT_STOPS = 16

# The card's `generate_text`: temperature, top_p, top_k and `generate_len`, in OpenAI's names.
SAMPLING_DEFAULTS: Mapping[str, float] = {"temperature": 0.75, "top_p": 1.0, "top_k": 50, "max_tokens": 1024}

SYSTEM_PROMPTS: Mapping[str, str] = {
    # The card: "To evoke generalized Tree of Thought + Chain of Thought reasoning".
    "tot": (
        "Elaborate on the topic using a Tree of Thoughts and backtrack when necessary to construct a clear, cohesive "
        "Chain of Thought reasoning. Always answer without hesitation."
    ),
}

# Served beside the model's own name; the value is the preset that a request without a system message gets.
MODEL_ALIASES: Mapping[str, str | None] = {"synthia": None, "synthia-tot": "tot"}

MarkerPolicy = Literal["allow", "escape", "reject"]

_MARKER = re.compile(r"\b(SYSTEM|USER|ASSISTANT):")


def find_marker(text: str) -> str | None:
    """The first role marker in a text (`USER:` and so on), which the model would take for a new turn."""
    found = _MARKER.search(text)
    return found.group() if found else None


def escape_markers(text: str) -> str:
    """Takes the power from role markers: `USER:` becomes `USER :`, which reads the same and opens no turn."""
    return _MARKER.sub(r"\1 :", text)
