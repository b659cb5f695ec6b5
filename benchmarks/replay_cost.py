"""What the replay costs: requests that don't use it (with and without the processor, in turn), and those that do.

One engine in this process's children, the demo model. The processor is taken out of its batch and put back between
rounds, so that nothing else differs.

    python -m benchmarks.replay_cost [--rounds 6] [--output benchmarks/results/replay_cost.json]
"""

import os
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from synthia_vllm.bench import rounds as interleaved
from synthia_vllm.bench.machine import machine
from synthia_vllm.engine.arguments import CPU_WORKER, cpu_environment
from synthia_vllm.engine.demo import demo_model

PROMPT = "SYSTEM: You are helpful.\nUSER: Tell me about the moon and number {}.\nASSISTANT:"
REPLAYED = 150  # tokens
KINDS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.75, "top_k": 50}}


def switch(worker: Any, installed: bool) -> float:
    """Puts the processor into the worker's batch or takes it out; the worker's processor time so far, in seconds."""
    batch = worker.model_runner.input_batch
    processors = batch.logitsprocs.non_argmax_invariant
    worker.replay = getattr(worker, "replay", None) or processors[-1]
    processors[:] = [one for one in processors if one is not worker.replay] + [worker.replay] * installed
    batch.logitsprocs_need_output_token_ids = installed  # vLLM sets it where a processor was given
    return time.process_time()


@click.command()
@click.option("--rounds", default=6, show_default=True)
@click.option("--sequences", default=64, show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path(__file__).with_name("results") / "replay_cost.json",
    show_default="benchmarks/results/replay_cost.json",
)
def main(rounds: int, sequences: int, output: Path) -> None:
    os.environ |= cpu_environment() | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    from synthia_vllm.engine.replay import ARGUMENT

    llm = LLM(
        str(demo_model()), enforce_eager=True, worker_cls=CPU_WORKER, max_model_len=1024, generation_config="vllm",
        kv_cache_memory_bytes=3 * 2**30 // 10, logits_processors=["synthia_vllm.engine.replay:Replay"],
    )  # fmt: skip
    encode = llm.get_tokenizer().encode
    results: interleaved.Results = {}

    def generate(prompts: list[list[int]], **named: Any) -> tuple[float, list[int]]:
        params = [SamplingParams(ignore_eos=True, seed=i, **named) for i, _ in enumerate(prompts)]
        began = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - began, list(outputs[0].outputs[0].token_ids)

    prompts = [encode(PROMPT.format(number)) for number in range(sequences)]
    generate(prompts, max_tokens=8)
    for kind, sampling in KINDS.items():
        for number in range(rounds):
            for name in interleaved.in_turn(("without", "with"), number):
                began = llm.collective_rpc(switch, args=(name == "with",))[0]
                seconds, _ = generate(prompts, max_tokens=64, **sampling)
                ended = llm.collective_rpc(switch, args=(name == "with",))[0]
                interleaved.add(results, f"{kind}: tokens/s", name, sequences * 64 / seconds)
                interleaved.add(results, f"{kind}: worker's processor seconds", name, ended - began)

    llm.collective_rpc(switch, args=(True,))
    seeded = {"temperature": 0.75, "top_k": 50, "max_tokens": REPLAYED}
    same = True
    for prompt in prompts[:3]:
        plain, ids = generate([prompt], **seeded)
        again, repeated = generate([prompt], **seeded, extra_args={ARGUMENT: ids})
        as_prompt, _ = generate([[*prompt, *ids]], **seeded | {"max_tokens": 1})
        same &= repeated == ids
        for name, seconds in (("generated", plain), ("replayed", again), ("as a prompt", as_prompt)):
            interleaved.add(results, f"{REPLAYED} tokens: seconds", name, seconds)
    pairs = (("with", "without"), ("replayed", "generated"))
    told = {"sequences": sequences, "replayed_text_is_the_same": same}
    interleaved.write(interleaved.report(machine(), results, pairs, **told), output, Console())
    if not same:
        raise SystemExit("a replayed reply was another than the one it repeats")


if __name__ == "__main__":
    main()
