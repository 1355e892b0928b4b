"""Auto classes: the model class that a checkpoint's ``config.json`` asks for, for one kind of task."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from gpt2rt.config import PretrainedConfig
from gpt2rt.config.auto import read_config

# keywords of from_pretrained that say where files are; the config is looked up with them
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class _BaseAutoModel:
    """Chooses a model class by the type of a config; a subclass says which classes there are.

    ``_class_names`` maps a model type to the name of the class in :mod:`gpt2rt.models`; ``register`` adds to
    ``_registered``, which goes before it.
    """

    _class_names: ClassVar[dict[str, str]] = {}
    _registered: ClassVar[dict[type[PretrainedConfig], type]] = {}

    def __init_subclass__(cls) -> None:
        cls._registered = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is made by {name}.from_pretrained(name) or {name}.from_config(config)")

    @classmethod
    def model_class(cls, config_class: type[PretrainedConfig]) -> type:
        """The model class for configs of ``config_class``.

        Raises:
            ValueError: there is none; the message names those there are.
        """
        if config_class in cls._registered:
            return cls._registered[config_class]
        name = cls._class_names.get(config_class.model_type)
        if name is None:
            known = [*cls._class_names.values(), *(kind.__name__ for kind in cls._registered.values())]
            raise ValueError(
                f"{cls.__name__} has no class for {config_class.__name__} (model_type {config_class.model_type!r}), "
                f"and neither has transformers; it makes {', '.join(known)}"
            )
        return getattr(importlib.import_module("gpt2rt.models"), name)

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        """A new model with random weights for a config.

        Args:
            config: decides the class.
            **kwargs: ``dtype`` (or ``torch_dtype``): of the weights; ``attn_implementation``: as in
                ``from_pretrained``; ``trust_remote_code``: must not be True.
        Raises:
            ValueError: there is no class for this config, or a keyword has an invalid value.
            TypeError: ``config`` is no config, or an unknown keyword.
        """
        from gpt2rt.config import refuse_remote_code, torch_dtype_of

        from .pretrained import check_attn_implementation

        if not isinstance(config, PretrainedConfig):
            raise TypeError(f"config is a {type(config).__name__}, expected a config such as GPT2Config")
        kind = cls.model_class(type(config))
        refuse_remote_code(kwargs.pop("trust_remote_code", None))
        dtype = kwargs.pop("dtype", None)
        dtype = torch_dtype_of(kwargs.pop("torch_dtype", None) if dtype is None else dtype)
        attention = kwargs.pop("attn_implementation", None)
        if kwargs:
            raise TypeError(f"{cls.__name__}.from_config got unknown keywords: {', '.join(sorted(kwargs))}")
        if attention is not None:
            check_attn_implementation(attention)
            config._attn_implementation = attention
        model = kind(config)
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """A model with the weights of a checkpoint, in the class that its config asks for.

        Arguments, result and errors are those of :meth:`PreTrainedModel.from_pretrained`.

        Raises:
            ConfigError: (a ValueError) the checkpoint holds a model that gpt2rt does not run.
            ValueError: this kind of model does not exist for the checkpoint's ``model_type``.
        """
        config = kwargs.get("config")
        if isinstance(config, PretrainedConfig):
            config_class: type[PretrainedConfig] = type(config)
        else:
            where = pretrained_model_name_or_path if config is None else config
            if where is None:
                raise ValueError("pretrained_model_name_or_path is None: then both config and state_dict must be given")
            hub = {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}
            config_class, _ = read_config(where, **hub)
        kind: Any = cls.model_class(config_class)
        return kind.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def register(cls, config_class: type[PretrainedConfig], model_class: type, exist_ok: bool = False) -> None:
        """Let this auto class make ``model_class`` for configs of ``config_class``.

        Args:
            config_class: also to be registered with :class:`AutoConfig` if its model type is new.
            model_class: its ``config_class`` must be the same.
            exist_ok: replace the class that is made now.
        Raises:
            ValueError: the classes do not belong together, or there is a class for this config already.
        """
        own = getattr(model_class, "config_class", None)
        if own is not config_class:
            raise ValueError(
                f"{model_class.__name__}.config_class is {getattr(own, '__name__', own)}, but it is registered for "
                f"{config_class.__name__}; they must be the same"
            )
        if not exist_ok and (config_class in cls._registered or config_class.model_type in cls._class_names):
            raise ValueError(
                f"{cls.__name__} already has a class for {config_class.__name__}; pass exist_ok=True to replace it"
            )
        cls._registered[config_class] = model_class


class AutoModel(_BaseAutoModel):
    """The bare model: hidden states, no head."""

    _class_names: ClassVar[dict[str, str]] = {"gpt2": "GPT2Model", "openai-gpt": "OpenAIGPTModel"}


class AutoModelForCausalLM(_BaseAutoModel):
    """The model that continues texts."""

    _class_names: ClassVar[dict[str, str]] = {"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel"}


class AutoModelForSequenceClassification(_BaseAutoModel):
    """The model that classifies texts."""

    _class_names: ClassVar[dict[str, str]] = {
        "gpt2": "GPT2ForSequenceClassification",
        "openai-gpt": "OpenAIGPTForSequenceClassification",
    }


class AutoModelForTokenClassification(_BaseAutoModel):
    """The model that classifies tokens."""

    _class_names: ClassVar[dict[str, str]] = {"gpt2": "GPT2ForTokenClassification"}


class AutoModelForQuestionAnswering(_BaseAutoModel):
    """The model that marks an answer in a text."""

    _class_names: ClassVar[dict[str, str]] = {"gpt2": "GPT2ForQuestionAnswering"}
