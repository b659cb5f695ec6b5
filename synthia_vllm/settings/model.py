"""The model: the format of its prompts, and vLLM that runs it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from synthia_vllm.prompt import MarkerPolicy, Style


class PromptSettings(BaseModel):
    """The Synthia prompt format."""

    model_config = ConfigDict(extra="forbid")

    style: Annotated[
        Style, Field(description="card: the card's format block; script: byte for byte the card's Python")
    ] = "card"
    turn_end: Annotated[str, Field(description="text after each past answer, for instance </s>")] = ""
    role_markers: Annotated[
        MarkerPolicy, Field(description="what to do with USER: and the like inside what a user writes")
    ] = "allow"
    cache_sharing: Annotated[
        Literal["all", "group", "user"],
        Field(
            description="who finds whose beginnings in the engine's prefix cache: all; group: users alike up to the "
            "first `:` of their names; user: each his own"
        ),
    ] = "user"


class EngineSettings(BaseModel):
    """vLLM. Anything not here can be given to vLLM itself after `--`."""

    model_config = ConfigDict(extra="forbid")

    max_model_len: Annotated[
        PositiveInt | None, Field(description="context in tokens (default: what the model was made for)")
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Field(description="type of weights and KV cache")
    ] = "auto"
    kv_cache_gib: Annotated[
        PositiveFloat | None,
        Field(
            description="KV cache in GiB (default: 2 for the demo, half of a CPU's free memory, vLLM's share of a GPU)"
        ),
    ] = None
    tensor_parallel_size: Annotated[
        PositiveInt | None, Field(description="GPUs that share the model (default: as many as divide its heads)")
    ] = None
    profile: Annotated[
        str,
        Field(
            description="measured vLLM options: auto (those of this GPU and model, if any), none, a name or a "
            "file; what is given after -- wins"
        ),
    ] = "auto"
    compile: Annotated[
        bool, Field(description="torch.compile on a CPU: about a minute more to start, a little faster at few streams")
    ] = False
    fork: Annotated[
        bool | None,
        Field(
            description="on a CPU: fork vLLM's processes from one that imports beside the server; starts in half the "
            "time, computes 4 to 7 % slower (default: for the demo)"
        ),
    ] = None
