"""Runs lm-evaluation-harness, with a cache of answers that lets an interrupted run go on."""

import hashlib
import importlib.metadata
import json
import logging
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthia_vllm.errors import SetupError
from synthia_vllm.eval.benchmarks import Benchmark
from synthia_vllm.eval.datasets import hub_command, write_tasks
from synthia_vllm.eval.scores import Evaluation, read_scores
from synthia_vllm.eval.server import Endpoint

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from synthia_vllm.eval.model import Format


def require_harness() -> str:
    """Its version. Raises SetupError where it is not installed."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise SetupError("lm-evaluation-harness is not installed: pip install 'lm-eval[api]>=0.4.9'") from None


def evaluate(
    endpoint: Endpoint,
    benchmarks: Sequence[Benchmark],
    *,
    format: "Format",
    concurrency: int,
    limit: int | None,
    data: Path | None,
    cache: Path,
) -> tuple[Evaluation, dict[str, Any]]:
    """Asks everything, in one stream of requests over all tasks; returns the scores and the harness's own results.

    Answers are in `cache` as they come. Progress is the harness's own bar. Raises SetupError for a data set that is not
    there and for a server that refuses.
    """
    import aiohttp
    import lm_eval

    from synthia_vllm.eval.model import Completions

    before = cached(cache)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="synthia-eval-") as folder, log_to(cache.with_suffix(".log")) as log:
        manager = task_manager(benchmarks, Path(folder), data)
        model = Completions(endpoint, concurrency=concurrency)
        tasks = load_tasks(benchmarks, manager, data)
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,
                use_cache=str(cache),
                limit=limit,
                apply_chat_template=format == "chat",
            )
        except aiohttp.ClientResponseError as error:
            raise SetupError(
                f"{endpoint.url} refused a request ({error.status} {error.message}); what it said is in {log}. "
                "The same command goes on where this stopped"
            ) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise SetupError(
                f"{endpoint.url} was lost: {error!r}. The same command goes on where this stopped"
            ) from None
    assert found is not None
    evaluation = Evaluation(
        model=endpoint.model,
        format=format,
        harness=require_harness(),
        limit=limit,
        answered_before=before,
        requests=cached(cache),
        seconds=round(time.monotonic() - began, 1),
        scores=read_scores(benchmarks, found),
    )
    return evaluation, dict(found)


def task_manager(benchmarks: Sequence[Benchmark], folder: Path, data: Path | None) -> "TaskManager":
    """One that knows these tasks with our settings; `folder` gets their files."""
    import lm_eval.tasks

    write_tasks(benchmarks, Path(lm_eval.tasks.__file__).parent, folder, data)
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)


def load_tasks(benchmarks: Sequence[Benchmark], manager: "TaskManager", data: Path | None) -> list[Any]:
    """The tasks with their data, downloaded if need be. Raises SetupError where that fails."""
    import datasets

    datasets.disable_progress_bars()
    tasks = []
    for benchmark in benchmarks:
        try:
            loaded = manager.load([benchmark.task])
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # none, no network, not readable
            reason = str(error).strip().splitlines()[0]
            raise SetupError(
                f"{benchmark.task}: its data set can't be read: {reason}\n"
                f"Where there is a network: {hub_command(benchmark, data or Path('FOLDER'))}\nand then --data FOLDER"
            ) from None
        groups = loaded.get("groups") or {}
        tasks.append(groups[benchmark.task] if benchmark.task in groups else loaded["tasks"][benchmark.task])
    return tasks


def cache_file(folder: Path, endpoint: Endpoint, asked: str, words: Sequence[str], format: str) -> Path:
    """Where the answers of this model are, so that another's are not taken for them.

    The URL, or the options of the server that is started, stands for what the server does not tell, such as its dtype.
    """
    weights = sorted(Path(endpoint.tokenizer).glob("*.safetensors")) if Path(endpoint.tokenizer).is_dir() else []
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    known = [asked, *words, endpoint.model, endpoint.tokenizer, endpoint.max_length, format, stamps, require_harness()]
    return folder / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def database(cache: Path) -> Path:
    """The harness puts each process's answers into a file of its own; there is one process."""
    return cache.with_name(f"{cache.name}_rank0.db")


def cached(cache: Path) -> int:
    """How many answers are there."""
    file = database(cache)
    if not file.exists():
        return 0
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM unnamed").fetchone()[0])
        except sqlite3.OperationalError:
            return 0  # made, and nothing in it yet


@contextmanager
def log_to(file: Path) -> Iterator[Path]:
    """What the harness logs goes into a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("lm_eval")
    kept = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield file
    finally:
        logger.propagate, level = kept
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
