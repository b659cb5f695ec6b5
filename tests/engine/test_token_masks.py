"""vLLM's batch: whose mask of allowed tokens a request gets, before and after it is put right."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from synthia_vllm.engine import token_masks

ALLOWED = 13


def request(name: str, allowed: list[int] | None = None) -> CachedRequestState:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, allowed_token_ids=allowed)
    return CachedRequestState(name, [1], [], sampling, None, ([0],), 0, [])


def batch() -> InputBatch:
    return InputBatch(4, 16, 16, torch.device("cpu"), 32, block_sizes=[16], kernel_block_sizes=[16],
                      max_num_blocks_per_req=[1])  # fmt: skip


@contextmanager
def as_vllm_has_it() -> Iterator[None]:
    token_masks.install()
    ours = InputBatch.add_request
    InputBatch.add_request = ours.__wrapped__
    try:
        yield
    finally:
        InputBatch.add_request = ours


def forbidden_for_the_last(kept: InputBatch) -> int:
    """One that ends makes a gap, the one with a list moves into it, and another takes its old place."""
    kept.add_request(request("ends"))
    kept.add_request(request("listed", [ALLOWED]))
    kept.remove_request("ends")
    kept.condense()
    kept.refresh_metadata()
    place = kept.add_request(request("other"))
    return int(kept.allowed_token_ids_mask_cpu_tensor[place].sum())


def test_vllm_holds_a_request_to_the_list_of_another() -> None:
    with as_vllm_has_it():
        found = forbidden_for_the_last(batch())
    assert found == 31, "vLLM has mended it: engine/token_masks.py can go"


def test_a_request_without_a_list_is_held_to_none() -> None:
    token_masks.install()
    kept = batch()
    assert forbidden_for_the_last(kept) == 0
    assert int(kept.allowed_token_ids_mask_cpu_tensor[kept.req_id_to_index["listed"]].sum()) == 31, "its own"


@pytest.mark.parametrize("allowed", [[ALLOWED], [1, 2, 3]])
def test_a_list_is_kept(allowed: list[int]) -> None:
    token_masks.install()
    kept = batch()
    place = kept.add_request(request("listed", allowed))
    assert (~kept.allowed_token_ids_mask_cpu_tensor[place]).nonzero().flatten().tolist() == allowed
