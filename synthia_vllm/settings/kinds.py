"""Kinds of values that several groups have."""

from typing import Annotated

from pydantic import AfterValidator

from synthia_vllm.secret_urls import open_url


class Untold:
    """Of a field whose value is in the open where it is right; a wrong one may be a secret, and is not repeated."""


Url = Annotated[str, AfterValidator(open_url), Untold]
