"""The harness's task files with our settings in them, and with local data sets where `--data` names a folder.

A copy of the hub's repository is used as it is (`hf download … --local-dir FOLDER/ai2_arc`); so is any folder that has
`<repository>/<config>/<split>` in it as `.parquet`, `.jsonl` or `.json`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from synthia_vllm.errors import SetupError
from synthia_vllm.eval.benchmarks import Benchmark

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
# Where the harness keeps the task files, below its folder `tasks`.
_FOLDERS = {"arc_challenge": "arc", "hellaswag": "hellaswag", "mmlu": "mmlu/default", "truthfulqa_mc2": "truthfulqa"}


def write_tasks(benchmarks: Sequence[Benchmark], harness: Path, target: Path, data: Path | None) -> None:
    """Writes into `target` the harness's task files (`harness` is its folder `tasks`) with our settings.

    Raises SetupError that says how to get it for each data set that `data` lacks.
    """
    missing = []
    for benchmark in benchmarks:
        for source in _task_files(benchmark, harness):
            task = yaml.load(source.read_text(), Loader=_Names)
            changed: dict[str, Any] = {"include": str(source)}
            if "group" not in task:
                changed |= {"task": task["task"], "num_fewshot": benchmark.shots}
                if data is not None:
                    config = benchmark.config or task["dataset_name"]
                    files = find_files(data / benchmark.folder, config, benchmark.splits)
                    if files is None:
                        missing.append((benchmark, config))
                    else:
                        changed |= _local(files)
            (target / source.name).write_text(yaml.safe_dump(changed))
    if missing:
        assert data is not None
        raise SetupError(_how_to_get(missing, data))


def find_files(folder: Path, config: str, splits: Sequence[str]) -> dict[str, list[Path]] | None:
    """The files of each split, all of one kind; None where a split has none."""
    for suffix in _BUILDERS:
        files = {split: sorted((folder / config).glob(f"{split}*{suffix}")) for split in splits}
        if all(files.values()):
            return files
    return None


def hub_command(benchmark: Benchmark, data: Path) -> str:
    return f"hf download {benchmark.dataset} --repo-type dataset --local-dir {data / benchmark.folder}"


def _local(files: dict[str, list[Path]]) -> dict[str, Any]:
    suffix = next(iter(files.values()))[0].suffix
    data_files = {split: [str(path) for path in paths] for split, paths in files.items()}
    return {"dataset_path": _BUILDERS[suffix], "dataset_name": None, "dataset_kwargs": {"data_files": data_files}}


def _task_files(benchmark: Benchmark, harness: Path) -> Iterator[Path]:
    """A benchmark's own file; of a group those of its tasks and sub-groups too."""
    folder = harness / _FOLDERS[benchmark.task]
    pattern = "*.yaml" if benchmark.config is None else f"{benchmark.task}.yaml"
    files = sorted(folder.glob(pattern))
    if not files:
        raise SetupError(f"lm-eval has no task {benchmark.task}: install a version from 0.4.9 on")
    yield from files


def _how_to_get(missing: list[tuple[Benchmark, str]], data: Path) -> str:
    lines = []
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in missing):
        configs = [config for other, config in missing if other is benchmark]
        lines += [
            f"--data {data}: the data set of {benchmark.task} is not there; get it with",
            f"  {hub_command(benchmark, data)}",
            f"or put {data / benchmark.folder}/{configs[0]}/{{{','.join(benchmark.splits)}}}.jsonl there"
            + (f" (and for {len(configs) - 1} more: {', '.join(configs[1:4])}, …)" if len(configs) > 1 else ""),
        ]
    return "\n".join(lines)


class _Names(yaml.SafeLoader):
    """Reads the harness's files for their names: what they call stays unread."""


_Names.add_constructor("!function", lambda loader, node: None)
