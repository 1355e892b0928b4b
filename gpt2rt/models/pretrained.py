"""The base of all models: what they are built from, and what they share beside loading and saving."""

from typing import Any, ClassVar

import torch
from torch import nn

from gpt2rt.config import PretrainedConfig

from .empty import initializes
from .loading import LoadingModel, check_attn_implementation


class PreTrainedModel(LoadingModel):
    """Base class of all models.

    A subclass sets ``config_class``, defines ``_init_weights(module)`` and calls ``post_init()`` at the end of its
    ``__init__``. A model with a head keeps the bare model under the attribute named by ``base_model_prefix``.

    Args:
        config: an instance of ``config_class``; checked again, since its fields can be assigned freely.
    Raises:
        TypeError: ``config`` is of another class.
        ConfigError: a field of ``config`` breaks its rule.
    """

    main_input_name: ClassVar[str] = "input_ids"

    def __init__(self, config: PretrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got {type(config).__name__}; to load a "
                f"checkpoint use {type(self).__name__}.from_pretrained(name)"
            )
        config.validate()
        self.config = config
        self.name_or_path = config.name_or_path

    # ---- initialisation --------------------------------------------------------------------------------------------

    def post_init(self) -> None:
        """Initialise the modules that are new since the last call, and tie weights; the last line of ``__init__``."""
        if initializes():
            self.initialize_weights()
        self.tie_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Run ``_init_weights`` once over every module that has not seen it, children first."""

        def visit(module: nn.Module) -> None:
            if getattr(module, "_is_hf_initialized", False):
                return
            for child in module.children():
                visit(child)
            self._init_weights(module)
            # transformers' mark, so that its composite models, which take these as parts, leave them alone too;
            # mypy takes every attribute of a module for a tensor or module
            module._is_hf_initialized = True  # type: ignore[assignment]

        visit(self)

    # ---- what every model answers ----------------------------------------------------------------------------------

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Note the name in the config: "gpt2rt", "eager" or "sdpa". All of them give the same numbers within rounding.

        Raises:
            ValueError: another name.
        """
        check_attn_implementation(attn_implementation)
        self.config._attn_implementation = attn_implementation

    def get_decoder(self) -> nn.Module:
        """The bare model, in transformers' words for models of any kind."""
        return self.base_model
