"""`synthia-vllm eval`: the card's evaluation table."""

import json
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from synthia_vllm.eval.benchmarks import NAMES, chosen


@click.command("eval")
@click.option("--url", help="A server that runs (default: one is started here and stopped at the end).")
@click.option("--api-key", envvar="SYNTHIA_API_KEY", default="none", help="--url: key, where the server wants one.")
@click.option("--served-model", help="--url: the model's name there (default: the first that it lists).")
@click.option("--tokenizer", help="--url: folder or hub id (default: where the server says its model is).")
@click.option("--model", help="Without --url: folder, hub id or 'demo' [default: as serve].")
@click.option("--tasks", default=",".join(NAMES), show_default=True, help="Which, with commas between them.")
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Local data sets (default: the hub)."
)
@click.option("--limit", type=click.IntRange(1), help="Only so many questions of each task, for a try.")
@click.option(
    "--format",
    "formats",
    type=click.Choice(["plain", "chat", "both"]),
    default="plain",
    show_default=True,
    help="plain: as the leaderboard; chat: in the Synthia format.",
)
@click.option("--concurrency", type=click.IntRange(2, 1024), default=32, show_default=True, help="Requests at once.")
@click.option("--fresh", is_flag=True, help="Ask everything again: the answers of earlier runs are thrown away.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder of the results [default: eval/TIME]."
)
@click.pass_obj
def command(words: list[str] | None, /, **options: Any) -> None:
    """Ask lm-evaluation-harness's questions and write the model card's table.

    An interrupted run goes on where it stopped when the same command is given again. Without --url, options after `--`
    go to `synthia-vllm serve`.
    """
    from synthia_vllm.eval.harness import require_harness

    benchmarks = chosen(options["tasks"].split(","))
    require_harness()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server that was started is stopped then too
    console = Console(stderr=True, soft_wrap=True)
    try:
        _run(benchmarks, options, words or [], console)
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on from here", highlight=False)
        sys.exit(130)


def _run(benchmarks: list[Any], options: dict[str, Any], words: list[str], console: Console) -> None:
    from synthia_vllm.engine.demo import cache_folder
    from synthia_vllm.eval.harness import cache_file, cached, database, evaluate
    from synthia_vllm.eval.scores import markdown, terminal
    from synthia_vllm.eval.server import find_endpoint, started

    folder = options["output"] or Path("eval", time.strftime("%Y%m%d-%H%M%S"))
    own = cache_folder() / "eval"
    with ExitStack() as stack:
        url = options["url"]
        if url is None:
            console.print("starting a server", highlight=False)
            url = stack.enter_context(started(options["model"], words, own / "serve.txt"))
        endpoint = find_endpoint(
            url, model=options["served_model"], tokenizer=options["tokenizer"], key=options["api_key"]
        )
        for format in ("plain", "chat") if options["formats"] == "both" else (options["formats"],):
            cache = cache_file(own, endpoint, options["url"] or "", words, format)
            if options["fresh"]:
                database(cache).unlink(missing_ok=True)
            if before := cached(cache):
                console.print(f"{before} answers of earlier runs are there; --fresh asks anew", highlight=False)
            evaluation, _ = evaluate(
                endpoint,
                benchmarks,
                format=format,
                concurrency=options["concurrency"],
                limit=options["limit"],
                data=options["data"],
                cache=cache,
            )
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{format}.json").write_text(json.dumps(evaluation.as_json(), indent=1) + "\n")
            (folder / f"{format}.md").write_text(markdown(evaluation))
            Console().print(terminal(evaluation))
            console.print(f"written: {folder / format}.json and .md", highlight=False)
