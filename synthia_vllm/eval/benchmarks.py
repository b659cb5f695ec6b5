"""The card's four tasks at the settings of the Open LLM Leaderboard, and where their data is on the hub.

Source of tasks, shots and metrics: the model card's table and *About* of HuggingFaceH4/open_llm_leaderboard (v1).
Source of data sets: the harness's own task files. Imports nothing heavy: `--help` lists the names.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from synthia_vllm.errors import SetupError


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness. `splits` are those that are read: the questions, and what examples are drawn from."""

    task: str
    card_name: str  # what the card's table calls it
    card_metric: str
    metric: str  # what the harness calls it
    shots: int
    dataset: str  # hub id; a local copy's folder is its last part
    config: str | None  # None: each of the group's tasks has its own
    splits: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.dataset.rpartition("/")[2]


LEADERBOARD: tuple[Benchmark, ...] = (
    Benchmark(
        "arc_challenge",
        "arc_challenge",
        "acc_norm",
        "acc_norm",
        25,
        "allenai/ai2_arc",
        "ARC-Challenge",
        ("train", "test"),
    ),
    Benchmark("hellaswag", "hellaswag", "acc_norm", "acc_norm", 10, "Rowan/hellaswag", "data", ("train", "validation")),
    Benchmark("mmlu", "mmlu", "acc", "acc", 5, "cais/mmlu", None, ("dev", "test")),
    Benchmark(
        "truthfulqa_mc2",
        "truthfulqa_mc",
        "mc2",
        "acc",
        0,
        "truthfulqa/truthful_qa",
        "multiple_choice",
        ("validation",),
    ),
)
NAMES = tuple(benchmark.task for benchmark in LEADERBOARD)


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Those of these names, in the card's order. Raises SetupError for a name that is none."""
    for name in names:
        if name not in NAMES:
            raise SetupError(f"--tasks {name}: there are {', '.join(NAMES)}")
    return [benchmark for benchmark in LEADERBOARD if benchmark.task in names]
