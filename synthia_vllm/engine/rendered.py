"""The text of a conversation's prompt, told apart from what clients write for a completion."""


class Rendered(str):
    """A prompt in the conversation's format, without BOS, which goes in front of it once.

    The text of a completion is plain: it gets what the engine's tokenizer adds by its own rule, and no more.
    """

    __slots__ = ()
