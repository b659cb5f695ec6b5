"""One command for a machine with an NVIDIA GPU and no network.

    python -m benchmarks.gpu            everything
    python -m benchmarks.gpu measure    only the figures
    python -m benchmarks.gpu tune       only the search for a profile

`--geometry tiny` tries the kit itself in a few minutes, also without a GPU.
"""

import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.gpu.geometry import GEOMETRIES, make_model
from benchmarks.gpu.goodput import Objective
from benchmarks.gpu.measure import STREAMS, Loads, measure_all, stated
from benchmarks.gpu.search import CPU_KNOBS, KNOBS, SPECULATION
from benchmarks.gpu.servers import Bench
from benchmarks.gpu.table import markdown, results
from benchmarks.gpu.tune import Tuner, profile_name, tune
from benchmarks.gpu.versions import check_versions
from benchmarks.load.peers import Plan
from benchmarks.load.prompts import Span
from benchmarks.load.records import Recorder, default_path, new_run
from benchmarks.load.run import numbers, take_roofline
from synthia_vllm.engine import profiles
from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.demo import cache_folder
from synthia_vllm.engine.hardware import inspect_machine
from synthia_vllm.errors import SynthiaError

# For `tiny`: it is the kit that is tried, not the machine.
SMALL = Loads((1, 4), 1, Span(16, 16), Span(16, 16), 10.0, Objective(1000, 250, 2, 1, 0.5, Span(16, 16), Span(8, 8), 8))


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(["measure", "tune"]))
@click.option("--geometry", type=click.Choice(list(GEOMETRIES)), default="synthia", show_default=True)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Real weights instead of random ones.",
)
@click.option("--streams", callback=numbers, metavar="N,N", help="Of the closed loops (default: 1,8,32,64,128,256).")
@click.option("--rounds", type=click.IntRange(1), help="Interleaved repeats (default: 3).")
@click.option("--pairs", type=click.IntRange(1), help="tune: repeats of each comparison (default: 3).")
@click.option(
    "--profiles",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=profiles.FOLDER,
    show_default="synthia_vllm/engine/profiles",
    help="tune: where the profile goes.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="measure: the figures (default: benchmarks/results/gpu.json, with --geometry tiny bench/gpu-tiny.json).",
)
def main(parts: tuple[str, ...], geometry: str, model: Path | None, output: Path | None, **options: Any) -> None:
    """Measure Synthia's geometry on this GPU against the card's script and plain vLLM, and tune it."""
    console = Console(soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {text}", highlight=False, markup=False)

    try:
        check_versions(say)
        machine = inspect_machine()
        if not machine.gpus and geometry != "tiny":
            raise click.ClickException("no NVIDIA GPU answers here; --geometry tiny tries the kit on the CPU")
        say("making the model" if model is None else f"the model is {model}")
        bench = Bench(
            model or make_model(GEOMETRIES[geometry], cache_folder() / "models" / f"random-{geometry}"), machine
        )
        with tempfile.TemporaryDirectory(prefix="synthia-gpu-") as name:
            wanted = parts or ("measure", "tune")
            if "measure" in wanted:
                target = output or Path("bench/gpu-tiny.json" if geometry == "tiny" else "benchmarks/results/gpu.json")
                _measure(bench, _loads(geometry, options), target, Path(name), say, console)
            if "tune" in wanted:
                file = options["folder"] / f"{profile_name(bench, geometry)}.yaml"
                _tune(bench, geometry, model, options, file, Path(name), say)
    except SynthiaError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        say("interrupted: what was measured so far is kept")
        sys.exit(130)


def _loads(geometry: str, options: dict[str, Any]) -> Loads:
    known = SMALL if geometry == "tiny" else Loads()
    return Loads(
        tuple(int(count) for count in options["streams"] or known.streams or STREAMS),
        options["rounds"] or known.rounds,
        known.prompt,
        known.output,
        known.limit_s,
        known.objective,
    )


def _measure(bench: Bench, loads: Loads, output: Path, logs: Path, say: Any, console: Console) -> None:
    config = json.loads((bench.model / "config.json").read_text())
    recorder = Recorder(new_run("gpu", stated(loads), {"name": "random", **config}), default_path("gpu"))
    say("measuring what this machine can do")
    take_roofline(recorder, Plan(str(bench.model), EnginePlan(str(bench.model), "random", []), 0, 1), say)
    goodput = measure_all(bench, loads, recorder, logs, say)
    report = results(recorder.run, goodput)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(markdown(report), highlight=False, markup=False)
    say(f"written: {output}, and every request in {recorder.path}")


def _tune(
    bench: Bench, geometry: str, model: Path | None, options: dict[str, Any], file: Path, logs: Path, say: Any
) -> None:
    small = geometry == "tiny"
    knobs = {**KNOBS, **(SPECULATION if model else {})} if bench.machine.gpus else CPU_KNOBS
    pairs = options["pairs"] or (1 if small else 3)
    tuner = Tuner(bench, SMALL.objective if small else Objective(), pairs, logs, say, dummy=model is None)
    profile = tune(tuner, knobs, file)
    say(f"written: {file}: {profile.options or 'no option won'}")


if __name__ == "__main__":
    main()
