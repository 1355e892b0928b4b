"""What both ways into the engine share: how a model comes in, and what can be asked of it."""

from __future__ import annotations

from typing import Any

from .config import EngineConfig, split_options
from .frontend import Frontend
from .served import ServedModel

#: the model that is loaded when none is named
DEFAULT_MODEL = "gpt2rt/tiny-gpt2"


class ModelHolder:
    """A loaded model, its settings, and the maker of its requests.

    Args:
        model, tokenizer, task: as for :meth:`ServedModel.load`.
        config: settings, or None.
        options: fields of :class:`EngineConfig`, if there is no config, and keywords of ``from_pretrained``.
        defaults: fields of the config where neither says anything.

    Raises:
        TypeError: settings are given twice.
        OSError, ValueError, TypeError: as ``from_pretrained`` and :class:`EngineConfig`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: str | None,
        config: EngineConfig | None,
        options: dict[str, Any],
        defaults: dict[str, Any],
    ) -> None:
        settings, loading = split_options(options)
        if config is not None and settings:
            raise TypeError(f"{', '.join(sorted(settings))} stand in config already; give one of the two")
        self.config = EngineConfig(**{**defaults, **settings}) if config is None else config
        self._served = ServedModel.load(model, tokenizer, self.config, task=task, **loading)
        self._frontend = Frontend(self._served)

    @property
    def tokenizer(self) -> Any:
        """Of the model; None without one."""
        return self._served.tokenizer

    @property
    def model_name(self) -> str:
        """What was loaded."""
        return self._served.name

    @property
    def model(self) -> Any:
        """The model."""
        return self._served.model

    @property
    def max_model_len(self) -> int:
        """The most tokens of a request, prompt and output."""
        return self._served.max_model_len

    @property
    def vocab_size(self) -> int:
        """Tokens of the model."""
        return self._served.vocab_size

    @property
    def tasks(self) -> frozenset[str]:
        """What the model can do: "generate", "embed", "token_embed", "classify", "token_classify", "score"."""
        return self._served.tasks

    @property
    def executor_name(self) -> str:
        """What runs it: "cpu", "cuda" or "eager"."""
        return self._served.executor.name
