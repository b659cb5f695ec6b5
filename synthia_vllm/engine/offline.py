"""Synthia without a server: vLLM's `LLM` with the prompt contract applied."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from synthia_vllm.engine.arguments import plan_engine
from synthia_vllm.engine.hardware import inspect_machine
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import SetupError
from synthia_vllm.prompt import SAMPLING_DEFAULTS, STOP_STRINGS, SYSTEM_PROMPTS, clean, template_path
from synthia_vllm.settings import EngineSettings, PromptSettings, Settings

Messages = Sequence[Mapping[str, Any]]


class Synthia:
    """The model in this process, for scripts and batches.

    >>> synthia = Synthia("demo")
    >>> synthia.chat([{"role": "user", "content": "What is an orca?"}])

    `model` is a folder, a hub id or "demo"; `prompt` and `engine` are the settings' groups; `options` are vLLM's
    engine arguments by their Python names. Raises SetupError where the model is missing or does not fit, and for
    `engine.fork`. As with vLLM itself, the script's own code belongs under `if __name__ == "__main__":`, since workers
    are spawned.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        prompt: PromptSettings | None = None,
        engine: EngineSettings | None = None,
        **options: Any,
    ) -> None:
        if engine is not None and engine.fork:
            raise SetupError(
                "engine.fork: vLLM's processes are spawned here, `serve` and `batch` fork them; leave it out"
            )
        # What is not given is as the environment says, and a file that it names.
        given: dict[str, Any] = {"model": model, "prompt": prompt, "engine": engine}
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        plan = plan_engine(settings, inspect_machine(), shlex.split(options.pop("vllm_arguments", "")))
        plan.apply_environment()
        self.settings = settings
        self.llm = _start(plan.arguments, options)
        self._template_kwargs = {
            "bos_lead": Tokenizer.of(self.llm.get_tokenizer()).lead,
            "turn_end": settings.prompt.turn_end,
        }
        self._template = template_path(settings.prompt.style).read_text(encoding="utf-8")

    def chat(self, messages: Messages | Sequence[Messages], *, system: str | None = None, **sampling: Any) -> Any:
        """Replies to one conversation (a text) or to many (a list of texts, in order).

        `system` is a preset's name (`tot`) or a text, for conversations without a system message. `sampling` are
        vLLM's SamplingParams; what is not given is as in the card. With `continue_final_message=True` the last
        assistant message is continued.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        going_on = bool(sampling.pop("continue_final_message", False))
        outputs = self.llm.chat(
            [self._with_system(conversation, system) for conversation in conversations],
            self._sampling(sampling),
            chat_template=self._template,
            chat_template_content_format="string",
            chat_template_kwargs=self._template_kwargs,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
            use_tqdm=not single,
        )
        replies = [clean(output.outputs[0].text, keep_leading=going_on) for output in outputs]
        return replies[0] if single else replies

    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> Any:
        """Replies to prompts already in the Synthia format, as the card's `generate_text` does."""
        single = isinstance(prompts, str)
        outputs = self.llm.generate(
            [prompts] if single else list(prompts), self._sampling(sampling), use_tqdm=not single
        )
        replies = [clean(output.outputs[0].text) for output in outputs]
        return replies[0] if single else replies

    def _sampling(self, given: Mapping[str, Any]) -> Any:
        from vllm import SamplingParams

        own = given.get("stop") or []
        stops = [*([own] if isinstance(own, str) else own), *STOP_STRINGS]
        return SamplingParams(**{**SAMPLING_DEFAULTS, **given, "stop": stops})

    @staticmethod
    def _with_system(messages: Messages, system: str | None) -> list[dict[str, Any]]:
        conversation = [dict(message) for message in messages]
        if system is None or any(message["role"] in ("system", "developer") for message in conversation):
            return conversation
        return [{"role": "system", "content": SYSTEM_PROMPTS.get(system, system)}, *conversation]


def _start(arguments: list[str], options: Mapping[str, Any]) -> Any:
    """vLLM's LLM from the same arguments that its server gets."""
    from dataclasses import fields

    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from synthia_vllm.engine.server import parse_arguments

    engine = EngineArgs.from_cli_args(parse_arguments(arguments))
    given = {field.name: getattr(engine, field.name) for field in fields(engine)}
    return LLM.from_engine_args(EngineArgs(**{**given, **options}))
