"""What a streamed token costs the process that speaks the API: `synthia-vllm serve` against vLLM's own server.

    python -m benchmarks.api_process [--model one-layer] [--rounds 3] [--streams 64]

one-layer   the demo model's first layer alone: the API process is the limit, and what it costs is measured
demo        the whole demo model: what is left of the difference in tokens/s and in the time to the first token

vllm   vLLM's server with our arguments and environment
ours   `synthia-vllm serve`, open mode, log on

Both get the same chats. Both run all the time, and each round loads them one after the other; ratios are taken within a
round. The processor time is that of the API process and its threads, without the engine's processes.
"""

import json
import shutil
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console

from benchmarks.serving import commands
from synthia_vllm.bench import rounds as interleaved
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.processes import RunningServer, running
from synthia_vllm.bench.streams import chat, first_tokens, load, port_of, processor_seconds
from synthia_vllm.engine.arguments import plan_engine
from synthia_vllm.engine.demo import demo_model
from synthia_vllm.engine.hardware import inspect_machine
from synthia_vllm.prompt import SAMPLING_DEFAULTS, STOP_STRINGS
from synthia_vllm.settings import EngineSettings, Settings

CONTEXT, KV_CACHE_GIB = 2048, 1.0
WARM_UP_TOKENS = 20
SERVERS = {"vllm": "tuned", "ours": "ours"}  # by the names of `benchmarks.serving`
COST, RATE, CHUNKS, TTFT = "processor, µs a token", "tokens/s", "chunks a token", "TTFT at 1 stream, ms"
_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@click.command()
@click.option("--model", type=click.Choice(["one-layer", "demo"]), default="one-layer", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repeats.")
@click.option("--streams", type=click.IntRange(1), default=64, show_default=True, help="At once.")
@click.option("--requests", type=click.IntRange(1), default=2, show_default=True, help="Of each, one after another.")
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="Of each reply.")
@click.option(
    "--first-tokens", type=click.IntRange(1), default=20, show_default=True, help="Requests for TTFT a round."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="[default: benchmarks/results/api_process.json, or api_process_demo.json]",
)
def main(
    model: str, rounds: int, streams: int, requests: int, tokens: int, first_tokens: int, output: Path | None
) -> None:
    """Measure the API process a token, tokens/s and the time to the first token, ours against vLLM's."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    where = machine()
    results: interleaved.Results = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="synthia-bench-")))
        served = str(one_layer(folder / "one-layer")) if model == "one-layer" else model
        engine = EngineSettings(max_model_len=CONTEXT, kv_cache_gib=KV_CACHE_GIB)
        plan = plan_engine(Settings(model=served, engine=engine), inspect_machine())
        known = commands(served, plan, KV_CACHE_GIB)
        servers = {}
        for name, command in SERVERS.items():
            console.print(f"starting {name}", highlight=False)
            servers[name] = stack.enter_context(running(name, *known[command], folder))
        salts = count()
        for number in range(-1, rounds):  # round -1 warms up and is not counted
            found = uvloop.run(one_round(servers, number, salts, model, streams, requests, tokens, first_tokens))
            if number >= 0:
                for figure, values in found.items():
                    for name, value in values.items():
                        interleaved.add(results, figure, name, value)
            console.print(f"round {number + 1} of {rounds} done", highlight=False)
    told = {"model": model, "rounds": rounds, "streams": streams, "requests": requests, "tokens": tokens}
    report = interleaved.report(where, results, [("ours", "vllm")], **told)
    name = "api_process.json" if model == "one-layer" else "api_process_demo.json"
    interleaved.write(report, output or Path(__file__).with_name("results") / name, console)


async def one_round(
    servers: dict[str, RunningServer],
    number: int,
    salts: "count[int]",
    model: str,
    streams: int,
    requests: int,
    tokens: int,
    singles: int,
) -> dict[str, dict[str, float]]:
    """Each figure of each server."""
    found: dict[str, dict[str, float]] = {COST: {}, RATE: {}, CHUNKS: {}, TTFT: {}}

    def ask(length: int) -> bytes:
        return chat("synthia", length, salt=f"{next(salts)}", **fields(model, length))

    for name in interleaved.in_turn(list(servers), number):
        server = servers[name]
        port = port_of(server.url)
        await load(port, [[ask(WARM_UP_TOKENS)] for _ in range(streams)])
        clients = [[ask(tokens) for _ in range(requests if number >= 0 else 1)] for _ in range(streams)]
        before = processor_seconds(server.pid)
        all_of_it = await load(port, clients)
        found[COST][name] = 1e6 * (processor_seconds(server.pid) - before) / all_of_it.tokens
        found[RATE][name] = all_of_it.tokens / all_of_it.seconds
        found[CHUNKS][name] = all_of_it.chunks / all_of_it.tokens
    ports = {name: port_of(server.url) for name, server in servers.items()}
    for name, times in (await first_tokens(ports, lambda: ask(8), singles)).items():
        found[TTFT][name] = 1000 * statistics.median(times)
    return found


def fields(model: str, tokens: int) -> dict[str, Any]:
    """Sampling as the card has it, said to both, and a reply of so many tokens.

    The demo writes stop strings: both look for them, from the last token on. One layer alone never does.
    """
    card = {name: value for name, value in SAMPLING_DEFAULTS.items() if name != "max_tokens"} | {"ignore_eos": True}
    return card if model == "one-layer" else {**card, "stop": list(STOP_STRINGS), "min_tokens": tokens}


def one_layer(folder: Path) -> Path:
    """Makes a checkpoint of the demo model's first layer, with its tokenizer; it says words without any sense.

    With the demo's own last layer it would say blanks alone, which nobody sends on.
    """
    import torch
    from safetensors.torch import load_file, save_file

    demo = demo_model()
    folder.mkdir()
    weights = load_file(demo / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers." not in name or ".layers.0." in name}
    config = json.loads((demo / "config.json").read_text())
    shape, chance = (config["vocab_size"], config["hidden_size"]), torch.Generator().manual_seed(1)
    kept["lm_head.weight"] = (0.02 * torch.randn(shape, generator=chance)).to(torch.bfloat16)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    changed = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | changed))
    for name in _FILES:
        shutil.copy(demo / name, folder)
    return folder


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
