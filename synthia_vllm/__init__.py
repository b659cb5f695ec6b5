"""High-throughput serving for Synthia-v3.0-11B on vLLM.

>>> from synthia_vllm import Synthia
>>> Synthia("demo").chat([{"role": "user", "content": "Hello"}])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthia_vllm.engine.offline import Synthia as Synthia

__all__ = ["Synthia", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `import synthia_vllm` must stay light: torch and vLLM are imported when Synthia is first asked for.
    if name == "Synthia":
        from synthia_vllm.engine.offline import Synthia

        return Synthia
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
