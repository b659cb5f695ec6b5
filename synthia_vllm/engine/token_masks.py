"""vLLM's masks of `allowed_token_ids`, each kept to the request that asked for it.

vLLM's batch has a row a request. A row that moved into a gap leaves its mask behind (`InputBatch.condense`,
https://github.com/vllm-project/vllm/issues/43894), and a request that gets the old place without a list of its own is
held to the list of somebody else. Seen with 0.29.0: another user's grammar then had no token left, and its request
was refused. Private to vLLM; `tests/engine/test_token_masks.py` fails when it moves, or when vLLM mends it.
"""

from functools import cache, wraps
from typing import Any


@cache
def install() -> None:
    """Clears a place's mask whenever a request without a list takes it; of vLLM's first model runner."""
    from vllm.v1.worker.gpu_input_batch import InputBatch

    add = InputBatch.add_request

    @wraps(add)
    def add_request(self: Any, request: Any) -> int:
        place = int(add(self, request))
        masks = self.allowed_token_ids_mask_cpu_tensor
        if masks is not None and not getattr(request.sampling_params, "allowed_token_ids", None):
            masks[place].fill_(False)  # True is forbidden
        return place

    InputBatch.add_request = add_request
