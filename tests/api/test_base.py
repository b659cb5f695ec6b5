import pytest

from synthia_vllm.api.base import decode
from synthia_vllm.api.sampling import SamplingFields
from synthia_vllm.errors import MalformedBody


@pytest.mark.parametrize("body", [b'{"n": 1, "x\xa0": 1}', b'{"n": 1, "x": "\xff"}', b'{"n": 1, "x": {"y": ["\xc3"]}}'])
def test_a_body_is_utf8_also_in_fields_that_are_not_known(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        decode(body, SamplingFields)


def test_unknown_fields_may_say_anything() -> None:
    assert decode('{"n": 2, "鯨": {"🐋": ["é"]}}'.encode(), SamplingFields).n == 2
