"""The exceptions that gpt2rt raises on purpose.

Each one belongs to the family that transformers raises in the same place (``OSError`` for files, ``ValueError`` for
arguments), so code written for transformers catches them too. A message says what was wrong, with the value, what was
expected, and how to mend it.
"""


class CheckpointError(OSError):
    """A checkpoint, config or tokenizer file is missing, unreachable, damaged or does not fit the model."""


class ConfigError(ValueError):
    """A model configuration breaks one of its rules; the message names field, value and rule."""


class TokenizerError(ValueError):
    """A tokenizer's files are damaged or unsafe, or a text cannot be tokenised."""


class RequestError(ValueError):
    """One generation request is invalid; it fails alone and before any work is done for it."""


class NumericsError(RuntimeError):
    """A computation for one sequence produced NaN or infinity."""


class CacheFullError(RuntimeError):
    """The KV cache cannot hold what was asked of it."""


class OutOfBlocksError(CacheFullError):
    """The block pool has fewer free blocks than an allocation needs; nothing was allocated."""


class QueueFullError(RuntimeError):
    """An engine has as many requests waiting as it may have; nothing was queued.

    Attributes:
        retry_after: seconds after which another attempt is worth it.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailedError(RuntimeError):
    """A step of one request raised, and ended that request alone; ``__cause__`` says what went wrong."""


class EngineDeadError(RuntimeError):
    """The engine has stopped for good, by a fault or a shutdown; it takes no requests and ends those it had."""
