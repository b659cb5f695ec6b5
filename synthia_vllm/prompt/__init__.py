"""The Synthia prompt contract: format, stop strings, sampling defaults, system prompts.

Source of every rule: the model card (migtissera/Synthia-v3.0-11B), *Here is prompt format* (style `card`) and its
Python example (style `script`). Imports neither torch nor vLLM nor anything else of ours.
"""

from synthia_vllm.prompt.contract import (
    MAX_CLIENT_STOPS,
    MODEL_ALIASES,
    SAMPLING_DEFAULTS,
    STOP_STRINGS,
    SYSTEM_PROMPTS,
    MarkerPolicy,
    escape_markers,
    find_marker,
)
from synthia_vllm.prompt.format import Style, parse, render, template_path
from synthia_vllm.prompt.reply import ReplyFilter, clean
from synthia_vllm.prompt.stops import StopCutter

__all__ = [
    "MAX_CLIENT_STOPS",
    "MODEL_ALIASES",
    "SAMPLING_DEFAULTS",
    "STOP_STRINGS",
    "SYSTEM_PROMPTS",
    "MarkerPolicy",
    "ReplyFilter",
    "StopCutter",
    "Style",
    "clean",
    "escape_markers",
    "find_marker",
    "parse",
    "render",
    "template_path",
]
