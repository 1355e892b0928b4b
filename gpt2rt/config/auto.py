"""``AutoConfig``: the config class that a checkpoint's ``config.json`` asks for."""

import os
from typing import Any

from gpt2rt.config.base import PretrainedConfig, _guessed_type, check_model_type, refuse_remote_code
from gpt2rt.config.gpt2 import GPT2Config
from gpt2rt.config.openai_gpt import OpenAIGPTConfig
from gpt2rt.errors import ConfigError

# model type -> config class; AutoConfig.register adds to it
CONFIG_CLASSES: dict[str, type[PretrainedConfig]] = {"gpt2": GPT2Config, "openai-gpt": OpenAIGPTConfig}


def read_config(
    pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any
) -> tuple[type[PretrainedConfig], dict[str, Any]]:
    """The config class of a checkpoint and the content of its ``config.json``.

    Args:
        pretrained_model_name_or_path: a folder, a JSON file, an embedded id or a hub id.
        **hub: where to look, see :class:`gpt2rt.checkpoint.resolve.Source`.
    Raises:
        CheckpointError: the file is missing, unreachable, not JSON or not an object.
        ConfigError: it is the config of a model that gpt2rt does not run.
    """
    from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object
    from gpt2rt.checkpoint.resolve import find_config

    values = read_json_object(find_config(pretrained_model_name_or_path, **hub), MAX_SETTINGS_BYTES)
    check_model_type(values, os.fspath(pretrained_model_name_or_path), tuple(CONFIG_CLASSES))
    # a file that names neither type nor classes passed the check by GPT-2's field names
    model_type = values.get("model_type") or _guessed_type(values, values.get("architectures") or []) or "gpt2"
    return CONFIG_CLASSES[model_type], values


class AutoConfig:
    """Chooses the config class by ``model_type``; use :meth:`from_pretrained`."""

    def __init__(self) -> None:
        raise OSError("AutoConfig is made by AutoConfig.from_pretrained(name), or by AutoConfig.for_model(model_type)")

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """A new config of this kind, with the defaults of its class and ``kwargs`` as fields.

        Raises:
            ConfigError: (a ValueError) there is no such model type, or a field breaks its rule.
        """
        if model_type not in CONFIG_CLASSES:
            raise ConfigError(f"model_type = {model_type!r}, but it must be one of {', '.join(CONFIG_CLASSES)}")
        return CONFIG_CLASSES[model_type](*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = "main",
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The config of a checkpoint, in the class that its ``model_type`` names.

        Arguments, results and errors are those of :meth:`PretrainedConfig.from_pretrained`. A file without
        ``model_type`` is told by its architectures and field names.
        """
        from gpt2rt.checkpoint.options import refuse_options

        refuse_remote_code(trust_remote_code)
        kwargs = refuse_options(kwargs)
        config_class, values = read_config(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            subfolder=subfolder,
        )
        values["_name_or_path"] = str(pretrained_model_name_or_path)
        return config_class.from_dict(values, return_unused_kwargs, **kwargs)

    @staticmethod
    def register(model_type: str, config: type[PretrainedConfig], exist_ok: bool = False) -> None:
        """Make ``config`` the class of ``model_type``.

        Args:
            model_type: as in ``config.json``.
            config: a subclass of :class:`PretrainedConfig` whose ``model_type`` is the same.
            exist_ok: replace a class that is registered for it.
        Raises:
            ValueError: the class has another ``model_type``, or there is a class for it already.
        """
        if config.model_type != model_type:
            raise ValueError(
                f"{config.__name__}.model_type is {config.model_type!r}, but it is registered as {model_type!r}; give "
                "both the same name"
            )
        if model_type in CONFIG_CLASSES and not exist_ok:
            raise ValueError(
                f"{CONFIG_CLASSES[model_type].__name__} is already registered for model_type {model_type!r}; pass "
                "exist_ok=True to replace it"
            )
        CONFIG_CLASSES[model_type] = config
