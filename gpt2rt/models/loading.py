"""``from_pretrained``: models with the weights of a checkpoint.

The module tree is built on the meta device, so nothing is allocated or initialised that the checkpoint will provide;
config, key names, shapes and dtypes are checked against the headers of the files, and only then each tensor is read
straight into its own memory, or quantised as it comes. Either a complete model comes out or an exception.
"""

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpt2rt.checkpoint.load import (
    choose_device,
    choose_dtype,
    compare_tied,
    fill_model,
    initialize_missing,
    require_filled,
)
from gpt2rt.checkpoint.matching import Match, check_layers, check_tensors, listing, match_names
from gpt2rt.checkpoint.options import refuse_options
from gpt2rt.checkpoint.resolve import Source
from gpt2rt.checkpoint.weights import RenamedWeights, TensorWeights, Weights, open_weights
from gpt2rt.config import PretrainedConfig, refuse_remote_code
from gpt2rt.errors import CheckpointError, ConfigError, RequestError
from gpt2rt.generation.runtime import note_loaded

from .empty import NoFill, no_init_weights
from .quantized_loading import (
    QuantizedFill,
    agree,
    asked_quantization,
    file_names,
    open_stored,
    stored_quantization,
)
from .saving import SavingModel

# names of the attention computation that a model accepts; all give the same numbers within rounding
ATTENTION_IMPLEMENTATIONS = ("gpt2rt", "eager", "sdpa")


def check_attn_implementation(name: str | None) -> None:
    """Raise ValueError unless ``name`` is None or one of ``ATTENTION_IMPLEMENTATIONS``."""
    if name not in (None, *ATTENTION_IMPLEMENTATIONS):
        raise ValueError(
            f"attn_implementation = {name!r}, but it must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )


def _unset_foreign_ids(settings: Any, vocab_size: int, path: Path) -> None:
    """Treat special ids outside the vocabulary as unset, as the config does."""
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, field, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        kept = [token for token in ids if type(token) is not int or 0 <= token < vocab_size]
        if kept == ids:
            continue
        setattr(settings, field, kept if isinstance(value, list) and kept else None)
        # transformers writes 50256 beside any vocabulary
        if value != 50256:
            warnings.warn(
                f"{path}: {field} = {value!r} lies outside the vocabulary of {vocab_size} tokens and is treated as "
                "unset",
                stacklevel=4,
            )


class LoadingModel(SavingModel):
    """A model with ``from_pretrained``."""

    config_class: ClassVar[type[PretrainedConfig]] = PretrainedConfig

    # regular expressions over file keys: buffers that old checkpoints hold and that carry no weights
    _keys_to_ignore_on_load_unexpected: ClassVar[tuple[str, ...]] = (r"(^|\.)(attn|crossattention)\.(masked_)?bias$",)
    # heads without which the model would talk nonsense: never made up when the checkpoint lacks them
    _required_heads: ClassVar[tuple[str, ...]] = ("lm_head.",)

    name_or_path: str

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has ``generate``."""
        return callable(getattr(cls, "generate", None))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PretrainedConfig | str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        use_safetensors: bool | None = None,
        from_tf: bool = False,
        from_flax: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        weights_only: bool = True,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        subfolder: str = "",
        variant: str | None = None,
        device: str | int | torch.device | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        generation_config: Any = None,
        output_loading_info: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        check_finite: bool = True,
        strict: bool | None = None,
        trust_remote_code: bool | None = None,
        quantization: Any = None,
        quantization_config: Any = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool | None = None,
        disable_mmap: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """A model with the weights of a checkpoint, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, an embedded id (``gpt2rt/tiny-gpt2``) or a hub id; None with
                ``config`` and ``state_dict``.
            *model_args: passed to the class after the config.
            config: a config, or where to read it, instead of the checkpoint's own; it is copied.
            cache_dir, force_download, local_files_only, token, revision, subfolder: as in ``huggingface_hub``.
            ignore_mismatched_sizes: initialise heads (never the bare model) whose shape differs.
            use_safetensors: True: only safetensors; False: only other files; None: the first there is of safetensors,
                ``.bin``, TensorFlow's ``tf_model.h5`` (needs h5py) and Flax's ``flax_model.msgpack``.
            from_tf: read only ``tf_model.h5``, even where there are safetensors.
            from_flax: read only ``flax_model.msgpack``, likewise.
            key_mapping: regular expression -> replacement; in turn they rename the checkpoint's tensors by ``re.sub``.
            weights_only: must be True; ``.bin`` files are only ever read by torch's restricted unpickler.
            dtype, torch_dtype: of the weights: a dtype or its name; "auto": as stored; None: as stored, but float16 on
                a CPU becomes float32, because CPUs compute float16 slowly and its range is small.
            variant: as in ``model.<variant>.safetensors``.
            device: where to put the model, the CPU by default.
            device_map: a device, ``{"": device}`` or "auto" (CUDA if there is one); models are not split.
            attn_implementation: "gpt2rt" (also the default), "eager" or "sdpa"; kept in the config.
            generation_config: instead of the checkpoint's own.
            output_loading_info: return the pair (model, dictionary with ``missing_keys``, ``unexpected_keys``,
                ``mismatched_keys`` and ``error_msgs``).
            state_dict: weights to use instead of those in files.
            check_finite: refuse weights with NaN or infinity, at the cost of one pass over memory.
            strict: None: task heads that the checkpoint lacks are initialised with a warning, and other missing weights
                are errors; False: also an untied output layer; True: nothing may be missing or unexpected.
            trust_remote_code: must not be True.
            quantization: "int8", "int4", "nf4", "fp4", a ``QuantizationConfig`` or its dictionary: round the weights of
                a float checkpoint to the nearest codes as they are read; see docs/quantization.md.
            quantization_config: the same as an object or a dictionary in the shape of transformers'
                ``BitsAndBytesConfig``.
            load_in_4bit, load_in_8bit: True means ``BitsAndBytesConfig`` with this one field.
            disable_mmap: None or True: weights are read into memory of their own. False: those of safetensors files
                are private views of the files, so that loading takes neither time nor memory and processes share it;
                but whoever then writes into such a file changes the weights, and whoever cuts it off kills the
                process. Replacing a file by renaming, as ``save_pretrained`` does, is harmless.
            **kwargs: fields that override the config.
        Raises:
            CheckpointError: (an OSError) files are missing, unreachable, damaged, or do not fit config and class.
            ConfigError: (a ValueError) the config breaks a rule or is that of another kind of model.
            ValueError: an argument has an invalid value, or is one of transformers' that gpt2rt does not honour.
            TypeError: an unknown keyword.
        """
        kwargs = refuse_options(kwargs)
        refuse_remote_code(trust_remote_code)
        if not weights_only:
            raise ValueError("weights_only=False: gpt2rt never unpickles arbitrary objects; leave the argument out")
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype = {dtype!r} and torch_dtype = {torch_dtype!r} differ; pass one of them")
        check_attn_implementation(attn_implementation)
        wanted = asked_quantization(quantization, quantization_config, load_in_4bit, load_in_8bit)
        target = choose_device(device, device_map)
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": subfolder,
        }
        source = None
        if pretrained_model_name_or_path is not None:
            source = Source(pretrained_model_name_or_path, **hub)
        elif config is None or state_dict is None:
            raise ValueError("pretrained_model_name_or_path is None: then both config and state_dict must be given")
        model_config, raw_config = cls._load_config(config, source, hub, kwargs)
        if attn_implementation is not None:
            model_config._attn_implementation = attn_implementation

        stored = stored_quantization(model_config, source)
        agree(stored, wanted, model_config.name_or_path)
        if state_dict is not None:
            weights: Weights = TensorWeights(state_dict, "state_dict", Path("state_dict"))
        else:
            assert source is not None
            weights = open_weights(source, use_safetensors, variant, from_tf, from_flax, file_names(stored))
        if key_mapping:
            weights = RenamedWeights(weights, key_mapping)
        if disable_mmap is False:
            weights.map_files()
        with weights:
            if stored is not None:
                weights = open_stored(weights, stored)
            model, match = cls._build_and_match(model_config, model_args, weights, ignore_mismatched_sizes, strict)
            layers = QuantizedFill(model, weights, match, stored, wanted)
            asked_dtype = dtype if dtype is not None else torch_dtype
            chosen = choose_dtype(asked_dtype, weights.infos, layers.float_match(match), target)

            def fill(part: Match) -> None:
                jobs = layers.jobs(part, chosen, target, check_finite)
                fill_model(model, weights, part, chosen, target, check_finite, jobs)

            fill(match)
            tied = model._active_ties()
            untied = compare_tied(weights, match, tied)
            if untied:
                # the file knows better than its config: two tensors were trained
                warnings.warn(
                    f"{weights.where}: {listing(untied)} differs from the embedding that the config ties it to, so it "
                    "is kept apart; set tie_word_embeddings=False in config.json",
                    stacklevel=2,
                )
                model.config.tie_word_embeddings = False
                copies = Match(sources={key: match.tied_copies[key] for key in untied})
                layers.check(copies)
                fill(copies)
            fresh = [*match.missing, *(key for key, _, _ in match.mismatched)]
            initialize_missing(model, fresh, model._init_weights, chosen, target)
            model.tie_weights()
            require_filled(model, weights.where)
        layers.finish()
        for module in model.modules():
            # mypy takes every attribute of a module for a tensor or module
            module._is_hf_initialized = True  # type: ignore[assignment]
        model.config.dtype = chosen
        model.name_or_path = model.config.name_or_path
        model._set_generation_config(generation_config, source, raw_config)
        model.eval()
        cls._report(match, weights.where, model)
        if state_dict is None and not fresh and model.can_generate():
            note_loaded(model)
        if output_loading_info:
            return model, {
                "missing_keys": set(fresh),
                "unexpected_keys": set(match.unexpected),
                "mismatched_keys": set(match.mismatched),
                "error_msgs": [],
            }
        return model

    @classmethod
    def _load_config(
        cls, config: Any, source: Source | None, hub: dict[str, Any], overrides: dict[str, Any]
    ) -> tuple[PretrainedConfig, dict[str, Any]]:
        """The model's config, and what its file said (for the sampling settings that old files keep there)."""
        if isinstance(config, PretrainedConfig):
            if not isinstance(config, cls.config_class):
                raise TypeError(
                    f"config is a {type(config).__name__}, {cls.__name__} needs a {cls.config_class.__name__}"
                )
            values = copy.deepcopy(config).to_dict()
            result, unused = cls.config_class.from_dict(values, return_unused_kwargs=True, **overrides)
            result._attn_implementation = config._attn_implementation
            raw: dict[str, Any] = {}
        else:
            where = config if config is not None else source
            if isinstance(where, Source):
                values = cls.config_class.read_source(where)
            else:
                assert where is not None
                values, _ = cls.config_class.get_config_dict(where, **hub)
            raw = dict(values)
            result, unused = cls.config_class.from_dict(values, return_unused_kwargs=True, **overrides)
            if source is not None:
                result.name_or_path = source.name
        if unused:
            raise TypeError(
                f"{cls.__name__}.from_pretrained got unknown keywords: {', '.join(map(repr, sorted(unused)))}; they "
                f"are neither its arguments nor fields of {cls.config_class.__name__}"
            )
        return result, raw

    @classmethod
    def _build_and_match(
        cls,
        config: PretrainedConfig,
        model_args: tuple[Any, ...],
        weights: Weights,
        ignore_mismatched_sizes: bool,
        strict: bool | None,
    ) -> tuple[Self, Match]:
        """The model on the meta device, and which tensors fill it; all that can be checked without reading them is."""
        where = weights.where
        check_layers(weights.infos, config.num_hidden_layers, where)
        with no_init_weights(), torch.device("meta"), NoFill():
            model = cls(config, *model_args)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        match = match_names(
            weights.infos,
            shapes,
            cls.base_model_prefix,
            cls._keys_to_ignore_on_load_unexpected,
            model._active_ties(),
            where,
            model._embedding_aliases(),
        )
        head = [] if model.base_model is model else [k for k in shapes if not k.startswith(f"{cls.base_model_prefix}.")]
        may_differ = head if ignore_mismatched_sizes else ()
        check_tensors(weights.infos, match, shapes, may_differ, apart=getattr(weights, "matrices", ()))
        may_miss = [] if strict else [k for k in head if strict is False or not k.startswith(cls._required_heads)]
        absent = [key for key in match.missing if key not in may_miss]
        if absent:
            hint = "the checkpoint is incomplete or belongs to another class"
            if all(key.startswith(cls._required_heads) for key in absent):
                hint = (
                    "pass tie_word_embeddings=True if the output layer shares the embedding, or strict=False to draw it"
                )
            raise CheckpointError(f"{where} lacks {len(absent)} weights of {cls.__name__}: {listing(absent)}; {hint}")
        if strict and match.unexpected:
            raise CheckpointError(
                f"{where} holds {len(match.unexpected)} tensors that {cls.__name__} does not have: "
                f"{listing(match.unexpected)}"
            )
        return model, match

    def _embedding_aliases(self) -> dict[str, str]:
        """The embedding's key -> the output layer's name, under which alone some files hold the tensor of both."""
        tied = getattr(self.config, "tie_word_embeddings", False)
        if not tied or self.get_output_embeddings() is not None:
            return {}
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        return {f"{prefix}{self._input_embedding_name}.weight": "lm_head.weight"}

    @classmethod
    def _report(cls, match: Match, where: str, model: "LoadingModel") -> None:
        """One warning each for what was made up and for what was left over."""
        fresh = [*match.missing, *(f"{key} (shape {list(a)} in the file)" for key, a, _ in match.mismatched)]
        if fresh:
            warnings.warn(
                f"{where} does not provide {listing(fresh)}: newly initialised, train before use", stacklevel=3
            )
        unexpected = match.unexpected
        if model.base_model is model and getattr(model.config, "tie_word_embeddings", False):
            # the bare model has no use for a second copy of its own embedding
            unexpected = [name for name in unexpected if name != "lm_head.weight"]
        if unexpected:
            warnings.warn(
                f"{where} holds tensors that {cls.__name__} does not use: {listing(unexpected)}", stacklevel=3
            )

    def _set_generation_config(self, given: Any, source: Source | None, raw_config: dict[str, Any]) -> None:
        if given is not None and not self.can_generate():
            raise ValueError(f"generation_config was given, but {type(self).__name__} does not generate")
        if not self.can_generate():
            return
        from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object
        from gpt2rt.generation import GenerationConfig

        if given is not None:
            if not hasattr(given, "to_dict"):
                raise TypeError(f"generation_config is a {type(given).__name__}, expected a GenerationConfig")
            # transformers' own class has the same fields
            kept = isinstance(given, GenerationConfig)
            self.generation_config = given if kept else GenerationConfig.from_dict(given.to_dict())
            return
        path = source.find("generation_config.json") if source is not None else None
        try:
            if path is not None:
                self.generation_config = GenerationConfig.from_dict(read_json_object(path, MAX_SETTINGS_BYTES))
                _unset_foreign_ids(self.generation_config, self.config.vocab_size, path)
                return
            # old checkpoints keep their sampling settings in config.json; special tokens come from the checked config
            special = {
                name: getattr(self.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            }
            self.generation_config = GenerationConfig.from_model_config({**raw_config, **special})
        except RequestError as error:
            where = path if path is not None else f"{self.name_or_path}: config.json"
            raise ConfigError(f"{where}: {error}") from None
