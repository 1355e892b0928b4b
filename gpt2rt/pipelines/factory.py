"""``gpt2rt.pipeline``: from a task and a checkpoint to a pipeline that is ready to call."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from gpt2rt.checkpoint.options import refuse_options
from gpt2rt.config import PretrainedConfig, refuse_remote_code
from gpt2rt.config.auto import AutoConfig
from gpt2rt.models import auto

from .base import Pipeline, torch_device
from .feature_extraction import FeatureExtractionPipeline
from .question_answering import QuestionAnsweringPipeline
from .text_classification import TextClassificationPipeline, ZeroShotClassificationPipeline
from .text_generation import TextGenerationPipeline
from .token_classification import TokenClassificationPipeline


class Task(NamedTuple):
    """What a task needs.

    Attributes:
        pipeline: the pipeline class.
        model: the auto class that loads its models.
        default: the model that is used when none is named, or None.
    """

    pipeline: type[Pipeline]
    model: Any
    default: str | None = None


TASKS: dict[str, Task] = {
    "feature-extraction": Task(FeatureExtractionPipeline, auto.AutoModel),
    "question-answering": Task(QuestionAnsweringPipeline, auto.AutoModelForQuestionAnswering),
    "text-classification": Task(TextClassificationPipeline, auto.AutoModelForSequenceClassification),
    "text-generation": Task(TextGenerationPipeline, auto.AutoModelForCausalLM, "gpt2rt/tiny-gpt2"),
    "token-classification": Task(TokenClassificationPipeline, auto.AutoModelForTokenClassification),
    "zero-shot-classification": Task(ZeroShotClassificationPipeline, auto.AutoModelForSequenceClassification),
}

ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}

# ends of class names -> the task that such a model was made for
_TASK_OF_CLASS = {
    "LMHeadModel": "text-generation",
    "DoubleHeadsModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}

# keywords of from_pretrained that may stand beside the pipeline's own
_QUANTIZATION_KEYWORDS = ("quantization", "quantization_config", "load_in_4bit", "load_in_8bit")

# where the checkpoint is looked for: keywords of model_kwargs that the config and the tokenizer need too
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "subfolder")


def supported_tasks() -> list[str]:
    """The names of all tasks, aliases included."""
    return sorted([*TASKS, *ALIASES])


def find_task(name: str) -> tuple[str, Task]:
    """The task of a name or alias.

    Raises:
        KeyError: there is none.
    """
    task = ALIASES.get(name, name)
    if task not in TASKS:
        raise KeyError(f"Unknown task {name!r}, available tasks are {', '.join(supported_tasks())}")
    return task, TASKS[task]


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: str | os.PathLike[str] | PretrainedConfig | None = None,
    tokenizer: Any = None,
    *,
    framework: str | None = None,
    revision: str | None = None,
    use_fast: bool = True,
    token: str | bool | None = None,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    trust_remote_code: bool | None = None,
    model_kwargs: dict[str, Any] | None = None,
    pipeline_class: type[Pipeline] | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline for a task.

    Args:
        task: "text-generation", "text-classification" (or "sentiment-analysis"), "zero-shot-classification",
            "token-classification" (or "ner"), "question-answering" or "feature-extraction". None: what the model was
            made for, by its class or by the ``architectures`` of its config.
        model: a folder, an embedded id, a hub id, or a model of gpt2rt. Only text-generation has a default,
            ``gpt2rt/tiny-gpt2``.
        config: a config, or where to read it, instead of the checkpoint's own.
        tokenizer: where to read it, or a tokenizer; by default that of the checkpoint.
        framework: None or "pt".
        revision, token: of a hub model.
        use_fast: accepted; there is one kind of tokenizer.
        device: -1 for the CPU, n for ``cuda:n``, or a device. None: the first CUDA device if there is one, else the
            CPU; a model that is given as an object stays where it is.
        device_map: as in ``from_pretrained``; not together with ``device``.
        dtype, torch_dtype: of the weights, as in ``from_pretrained``.
        trust_remote_code: must not be True.
        model_kwargs: further keywords of ``from_pretrained``. Those that quantise (``quantization``,
            ``quantization_config``, ``load_in_4bit``, ``load_in_8bit``) may also be given here directly.
        pipeline_class: instead of the task's own.
        **kwargs: ``batch_size``, and the task's own keywords as defaults of its calls; see the pipeline's class.
    Raises:
        KeyError: there is no such task.
        ValueError: the model does not fit the task, or an argument has an invalid value.
        CheckpointError: (an OSError) files are missing or damaged.
        TypeError: an unknown keyword.
    """
    refuse_remote_code(trust_remote_code)
    options = dict(model_kwargs or {})
    options |= {name: kwargs.pop(name) for name in _HUB_KEYWORDS if name in kwargs}
    quantizing = {name: kwargs.pop(name) for name in _QUANTIZATION_KEYWORDS if name in kwargs}
    options |= {name: value for name, value in quantizing.items() if value is not None}
    for name in ("code_revision", "use_auth_token", "feature_extractor", "image_processor", "processor"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"pipeline: {name} is not supported: gpt2rt's models read texts and need no such part")
    if framework not in (None, "pt"):
        raise ValueError(f"framework = {framework!r}, but gpt2rt runs on torch alone; leave it out")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if task is not None:
        task, chosen = find_task(task)
        if model is None:
            if tokenizer is not None or config is not None:
                raise ValueError("a tokenizer or config was given without a model; pass model= too")
            model = chosen.default
    if model is None:
        asked = "neither task nor model" if task is None else f"no model, and {task} has no default"
        raise ValueError(f"pipeline got {asked}; pass model=, a folder, a hub id or a model")
    if torch_dtype is not None and dtype is None:
        dtype = torch_dtype
    for name, value in (("dtype", dtype), ("device_map", device_map)):
        if value is not None and name in options:
            raise ValueError(f"{name} was given twice, as a keyword and in model_kwargs; give it once")
    if device is not None and (device_map is not None or "device_map" in options):
        raise ValueError("device and device_map were both given; pass one of them")

    where = {"revision": revision or "main", "token": token}
    hub = {**where, **{name: options[name] for name in _HUB_KEYWORDS if name in options}}
    loads = isinstance(model, str)
    if task is None:
        task = _infer_task(model, config, hub)
    task, chosen = find_task(task)
    if isinstance(tokenizer, tuple):
        # transformers' form: a name with options
        tokenizer, tokenizer_options = tokenizer[0], dict(tokenizer[1])
    else:
        tokenizer_options = {}
    tokenizer_options.pop("use_fast", None)
    if tokenizer is None:
        tokenizer = model if loads else config
        if not isinstance(tokenizer, str | os.PathLike):
            raise ValueError(
                "the model was given as an object, so which tokenizer it needs is unknown; pass tokenizer="
            )
    if isinstance(tokenizer, str | os.PathLike):
        from gpt2rt.tokenizers import AutoTokenizer

        # another checkpoint than the model's has its own branches
        places = hub if tokenizer == model else {name: v for name, v in hub.items() if name != "revision"}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **{**places, **tokenizer_options})
    if loads:
        if device is None and device_map is None and "device_map" not in options and "device" not in options:
            device = 0 if torch.cuda.is_available() else -1
        arguments = {**where, **refuse_options(options)}
        given = {"config": config, "dtype": dtype, "device_map": device_map}
        arguments |= {name: value for name, value in given.items() if value is not None}
        if device is not None:
            arguments["device"] = torch_device(device)
        model = chosen.model.from_pretrained(model, **arguments)
        device = None
    elif options or dtype is not None or device_map is not None:
        names = sorted({*options, *(["dtype"] if dtype is not None else []), *(["device_map"] if device_map else [])})
        raise ValueError(f"{', '.join(names)} say how to load a model, but the model was given as an object")
    return (pipeline_class or chosen.pipeline)(model, tokenizer, task=task, device=device, **kwargs)


def _infer_task(model: Any, config: Any, hub: dict[str, Any]) -> str:
    """The task that a model was made for."""
    if not isinstance(model, str):
        names = [kind.__name__ for kind in type(model).__mro__]
    else:
        if not isinstance(config, PretrainedConfig):
            config = AutoConfig.from_pretrained(model if config is None else config, **hub)
        names = list(config.architectures or [])
    for name in names:
        for end, task in _TASK_OF_CLASS.items():
            if name.endswith(end):
                return task
    raise ValueError(
        f"the task cannot be told from {', '.join(names) or 'a config without architectures'}; pass task=, one of "
        f"{', '.join(supported_tasks())}"
    )
