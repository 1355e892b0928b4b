"""The model that an engine runs: its weights, tokenizer, tasks and cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpt2rt.cache import PagedKVCache
from gpt2rt.errors import RequestError, TokenizerError
from gpt2rt.generation.processors import as_list
from gpt2rt.generation.reserve import block_bytes, new_cache
from gpt2rt.generation.runtime import executor_for
from gpt2rt.generation.starts import BLOCK_SIZE
from gpt2rt.models.layers import project

from .config import EngineConfig, machine_bytes
from .outputs import PoolingOutput
from .params import PoolingParams

_CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}
#: what ``task`` may be, and the auto class that loads a checkpoint for it
_LOADERS = {
    "generate": "AutoModelForCausalLM",
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "token_classify": "AutoModelForTokenClassification",
}
# what a tokenizer's files may take to be found, in seconds
_HEAD_START_S = 0.02


class ServedModel:
    """A model as an engine uses it.

    Args:
        model: one of gpt2rt's, in evaluation mode.
        tokenizer: gives that of the model, or None: then prompts are ids and outputs have no text.
        config: of the engine.
        name: what it is called.

    Attributes:
        tokenizer: what was given.
        executor: runs its steps.
        tasks: "generate", "embed", "token_embed", "classify", "token_classify", "score": what it can do.
        eos_token_ids: its end tokens.
        max_model_len: the most tokens of a request.
        longest_token: bytes of the tokenizer's longest token, 0 if unknown.

    Raises:
        ValueError: the executor cannot run it, or ``max_model_len`` is more than its positions.
    """

    def __init__(self, model: Any, tokenizer: Callable[[], Any], config: EngineConfig, name: str) -> None:
        self.model = model.eval()
        self.name = name
        self.config = config
        self.executor = executor_for(model, config.executor)
        if config.num_threads and hasattr(self.executor, "num_threads"):
            self.executor.num_threads = config.num_threads
        plan = self.executor.plan
        self.vocab_size = plan.vocab_size
        self.max_model_len = config.max_model_len or plan.n_positions
        if self.max_model_len > plan.n_positions:
            raise ValueError(
                f"max_model_len={self.max_model_len} is more than the model's {plan.n_positions} positions; lower it"
            )
        self.tasks = _tasks(model)
        ends: list[int] = []
        if "generate" in self.tasks:
            ends = as_list(model.generation_config.eos_token_id)
        self.eos_token_ids = frozenset(token for token in ends if token < self.vocab_size)
        # where it is loaded in another thread, the weights were packed meanwhile
        self.tokenizer = tokenizer()
        self.longest_token = _longest_token(self.tokenizer)

    @classmethod
    def load(
        cls, model: Any, tokenizer: Any, config: EngineConfig, *, task: str | None = None, **options: Any
    ) -> ServedModel:
        """From a checkpoint's name, or a model.

        Args:
            model: a folder, hub id, embedded id, or a model.
            tokenizer: the same, or a tokenizer; None: the checkpoint's own, if the model is given by name.
            config: of the engine.
            task: "generate", "embed", "classify" or "token_classify": the class that is loaded; None: what the
                checkpoint's ``architectures`` says.
            **options: of ``from_pretrained``: dtype, quantization, revision, subfolder, device, ...

        Raises:
            ValueError: ``task`` is none of these.
            OSError, ValueError: as ``from_pretrained``.
        """
        if task is not None and task not in _LOADERS:
            raise ValueError(f"task must be one of {', '.join(_LOADERS)}, got {task!r}")
        if not isinstance(model, str):
            if hasattr(model, "__fspath__"):
                model = model.__fspath__()
            elif options:
                raise TypeError(f"{', '.join(sorted(options))} are for loading, but the model is an object already")
            else:
                name = getattr(model, "name_or_path", "") or type(model).__name__
                loaded = _tokenizer(tokenizer)
                return cls(model, lambda: loaded, config, name)
        hub = {key: options[key] for key in _HUB_KEYWORDS if key in options}
        with concurrent.futures.ThreadPoolExecutor(1, "gpt2rt tokenizer") as thread:
            loading = (
                thread.submit(_tokenizer, model, **hub) if tokenizer is None else thread.submit(_tokenizer, tokenizer)
            )
            # what is missing shows before weights are read, and those that come from afar wait for it
            concurrent.futures.wait([loading], _HEAD_START_S if os.path.isdir(model) else None)
            if loading.done():
                loading.result()
            return cls(_load(model, task, hub, options), loading.result, config, model)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.executor.plan.device

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        name = self.config.kv_cache_dtype
        dtype = self.executor.cache_dtype if name == "auto" else _CACHE_DTYPES[name]
        if dtype is torch.float8_e4m3fn and self.executor.name == "cpu":
            raise ValueError(
                "kv_cache_dtype='float8' has no kernels in the cpu executor; use 'int8', which is as small"
            )
        return dtype

    @property
    def block_size(self) -> int:
        """Tokens in a block of the KV cache."""
        return BLOCK_SIZE

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the KV cache, in all layers."""
        return block_bytes(self.executor.plan, self.cache_dtype)

    def num_blocks(self, spare: int) -> int:
        """Blocks of the KV cache.

        Args:
            spare: bytes that it may take where the config does not say.

        Raises:
            ValueError: ``kv_cache_memory_bytes`` has no room for a single block.
        """
        config = self.config
        if config.num_blocks is not None:
            return config.num_blocks
        memory = config.kv_cache_memory_bytes
        full = config.max_num_seqs * math.ceil(self.max_model_len / BLOCK_SIZE)
        num_blocks = min(full, max(0, spare if memory is None else memory) // self.block_bytes)
        if self.device.type == "cpu" and num_blocks > 1:
            # an odd number: the layers then begin at different places of their 2 MiB pages, and the system clears one
            # page now and then instead of those of all layers at once, which made one step 75 ms longer
            num_blocks -= num_blocks % 2 == 0
        if num_blocks < 1 and (memory is not None or self.device.type == "cpu"):
            raise ValueError(
                f"{spare if memory is None else memory} bytes hold no block of the KV cache ({self.block_bytes} "
                "bytes); raise kv_cache_memory_bytes"
            )
        return num_blocks

    def new_cache(self, num_blocks: int | None = None) -> PagedKVCache:
        """The KV cache.

        Args:
            num_blocks: how large; None: as the config says, and where it does not, in a quarter of the machine's
                memory.

        Raises:
            RequestError: it does not fit into memory.
            ValueError: it has no room for a single block, or its dtype has no kernels.
        """
        if num_blocks is None:
            num_blocks = self.num_blocks(machine_bytes() // 4)
        who, remedy = "the engine's sequences", "lower num_blocks"
        # not rounded up: there is one cache for the life of the engine, and its size was chosen
        return new_cache(self.executor, num_blocks, who, remedy, self.cache_dtype, exact=True)

    # ---- heads -----------------------------------------------------------------------------------------------------

    def pooled_place(self, prompt_ids: list[int], params: PoolingParams) -> int:
        """Which token's hidden state a pooling request wants; -1: those of all.

        Raises:
            RequestError: this model has no such task.
        """
        if params.task not in self.tasks:
            raise RequestError(
                f"{type(self.model).__name__} has no task {params.task!r}; it has {', '.join(sorted(self.tasks))}"
            )
        if params.task.startswith("token_") or (params.task == "embed" and params.pooling == "mean"):
            return -1
        last = len(prompt_ids) - 1
        pad = self.model.config.pad_token_id
        if params.task == "classify" and pad is not None and _has_layer(self.model, "score"):
            # the rightmost token that is no padding, as the model's forward chooses; where all are, the first
            return next((place for place in range(last, -1, -1) if prompt_ids[place] != pad), 0)
        return last

    @torch.no_grad()
    def pool(self, hidden: Tensor, params: PoolingParams) -> PoolingOutput:
        """What a task makes of hidden states.

        Args:
            hidden: [tokens, n_embd] float32, those that :meth:`pooled_place` asked for.
            params: the task.

        Returns:
            float32 on the CPU, see :class:`PoolingOutput`.
        """
        rows = hidden
        if params.task.endswith("classify"):
            rows = self._logits(hidden)
            if params.use_activation:
                rows = self._activated(rows)
        elif params.pooling == "mean" and params.task == "embed":
            rows = hidden.mean(dim=0, keepdim=True)
        if params.task.endswith("embed") and params.normalize:
            rows = torch.nn.functional.normalize(rows, dim=-1)
        rows = rows.float().cpu()
        return PoolingOutput(rows if params.task.startswith("token_") else rows[0])

    def _logits(self, hidden: Tensor) -> Tensor:
        """[tokens, num_labels] float32."""
        model: Any = self.model
        if hasattr(model, "multiple_choice_head"):
            head = model.multiple_choice_head
            dtype = next((p.dtype for p in head.parameters()), hidden.dtype)
            return head(hidden.to(dtype)[:, None, :]).reshape(len(hidden), -1).float()
        head = next(getattr(model, name) for name in ("score", "classifier", "qa_outputs") if _has_layer(model, name))
        return project(head, hidden.to(head.weight.dtype)).float()

    def _activated(self, logits: Tensor) -> Tensor:
        """Probabilities: none for regression and for the places of answers, the sigmoid for one or for many labels."""
        model: Any = self.model
        kind = getattr(model.config, "problem_type", None)
        if kind == "regression" or hasattr(model, "qa_outputs") or hasattr(model, "multiple_choice_head"):
            return logits
        if kind == "multi_label_classification" or logits.size(-1) == 1:
            return torch.sigmoid(logits)
        return torch.softmax(logits, dim=-1)


_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _has_layer(model: Any, name: str) -> bool:
    # language models have a method score
    return isinstance(getattr(model, name, None), nn.Module)


def _tasks(model: Any) -> frozenset[str]:
    tasks = set()
    if hasattr(model, "qa_outputs") or hasattr(model, "classifier"):
        return frozenset({"token_classify"})
    if _has_layer(model, "score"):
        tasks.add("classify")
        if model.config.num_labels == 1:
            tasks.add("score")
        return frozenset(tasks)
    if hasattr(model, "lm_head"):
        tasks.add("generate")
    summary = getattr(model, "multiple_choice_head", None)
    if summary is not None and summary.summary_type in ("cls_index", "last"):
        tasks.add("classify")
    return frozenset(tasks | {"embed", "token_embed", "score"})


def _load(name: str, task: str | None, hub: dict[str, Any], options: dict[str, Any]) -> Any:
    import gpt2rt.models
    from gpt2rt.config.auto import read_config
    from gpt2rt.models import auto

    if task is not None:
        return getattr(auto, _LOADERS[task]).from_pretrained(name, **options)
    config_class, fields = read_config(name, **hub)
    known = [
        kind
        for kind in fields.get("architectures") or ()
        if isinstance(kind, str) and kind in gpt2rt.models.__all__ and _is_model_of(kind, config_class)
    ]
    loader = getattr(gpt2rt.models, known[0]) if known else auto.AutoModelForCausalLM
    return loader.from_pretrained(name, **options)


def _is_model_of(name: str, config_class: type) -> bool:
    import gpt2rt.models

    kind = getattr(gpt2rt.models, name)
    return getattr(kind, "config_class", None) is config_class and hasattr(kind, "from_pretrained")


def _tokenizer(tokenizer: Any, **hub: Any) -> Any:
    if not isinstance(tokenizer, str):
        return tokenizer
    from gpt2rt.tokenizers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, **hub)
    # the first texts do not wait for what these make; what is wrong with its settings they will hear
    with contextlib.suppress(TokenizerError):
        loaded.encode("a")
    _longest_token(loaded)
    return loaded


def _longest_token(tokenizer: Any) -> int:
    """Bytes of the longest token of a byte-level tokenizer; 0 where tokens are not bytes of the text."""
    if tokenizer is None or not hasattr(tokenizer, "errors"):
        return 0
    return max((len(tokenizer.id_to_bytes(token)) for token in range(len(tokenizer))), default=0)
