"""What the replay costs: requests that don't use it (with and without the processor, in turn), and those that do.

One engine in this process's children, the demo model. The processor is taken out of its batch and put back between
rounds, so that nothing else differs. `python -m benchmarks.replay_cost --rounds 6`
"""

import os
import statistics
import time
from typing import Any

import click

from synthia_vllm.engine.arguments import CPU_WORKER, cpu_environment
from synthia_vllm.engine.demo import demo_model

PROMPT = "SYSTEM: You are helpful.\nUSER: Tell me about the moon and number {}.\nASSISTANT:"
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
def main(rounds: int, sequences: int) -> None:
    os.environ |= cpu_environment() | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    from synthia_vllm.engine.replay import ARGUMENT

    llm = LLM(
        str(demo_model()), enforce_eager=True, worker_cls=CPU_WORKER, max_model_len=1024, generation_config="vllm",
        kv_cache_memory_bytes=3 * 2**30 // 10, logits_processors=["synthia_vllm.engine.replay:Replay"],
    )  # fmt: skip
    encode = llm.get_tokenizer().encode

    def generate(prompts: list[list[int]], **named: Any) -> tuple[float, list[int]]:
        params = [SamplingParams(ignore_eos=True, seed=i, **named) for i, _ in enumerate(prompts)]
        began = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - began, list(outputs[0].outputs[0].token_ids)

    prompts = [encode(PROMPT.format(number)) for number in range(sequences)]
    generate(prompts, max_tokens=8)
    for kind, sampling in KINDS.items():
        rates: dict[bool, list[float]] = {False: [], True: []}
        spent: dict[bool, list[float]] = {False: [], True: []}
        for number in range(rounds * 2):
            installed = (number + number // 2) % 2 == 1  # without, with, with, without, …
            began = llm.collective_rpc(switch, args=(installed,))[0]
            seconds, _ = generate(prompts, max_tokens=64, **sampling)
            rates[installed].append(sequences * 64 / seconds)
            spent[installed].append(llm.collective_rpc(switch, args=(installed,))[0] - began)
        for installed in (False, True):
            shown = " ".join(f"{rate:.0f}" for rate in rates[installed])
            print(f"{kind} installed={installed}: tokens/s {shown}; worker {statistics.median(spent[installed]):.2f} s")
        middle = [statistics.median(of[True]) / statistics.median(of[False]) for of in (rates, spent)]
        print(f"{kind}: with / without: tokens/s {middle[0]:.3f}, worker's processor time {middle[1]:.3f}", flush=True)

    llm.collective_rpc(switch, args=(True,))
    seeded = {"temperature": 0.75, "top_k": 50, "max_tokens": 150}
    for prompt in prompts[:3]:
        plain, ids = generate([prompt], **seeded)
        again, same = generate([prompt], **seeded, extra_args={ARGUMENT: ids})
        as_prompt, _ = generate([[*prompt, *ids]], **seeded | {"max_tokens": 1})
        times = f"generated {plain:.2f} s, replayed {again:.2f} s, as a prompt {as_prompt:.2f} s"
        print(f"150 tokens: {times}; the same: {same == ids}")


if __name__ == "__main__":
    main()
