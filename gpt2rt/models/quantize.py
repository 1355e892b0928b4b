"""``quantize_model``: a float model becomes a quantised one, each weight on its own or with a calibration text.

With a calibration text (``method="gptq"``; Frantar et al., arXiv:2210.17323) the blocks are taken one after another,
and inside a block its layers in the order they run. The inputs of a layer are gathered behind the layers that are
quantised already, so that it fits what it will see. Only one block's inputs and one layer's Hessian are held at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpt2rt.quantization.blockwise import NestedScales, quantize_blocks
from gpt2rt.quantization.config import QuantizationConfig
from gpt2rt.quantization.gptq import Hessian, quantize_gptq
from gpt2rt.quantization.resolve import resolve_quantization
from gpt2rt.quantization.rtn import check_weight, quantize_rtn
from gpt2rt.quantization.weight import QuantizedWeight

from .layers import Conv1D
from .quantized import QuantizedLayer, float_form, quantized_form, replace_with_quantized
from .quantized_loading import formats

#: tokens of a calibration text that are used unless a caller says otherwise
CALIBRATION_TOKENS = 65536

# tokens that run through a block together
_BATCH_TOKENS = 4096

# characters of a token at most, on average over a text
_MAX_TOKEN_CHARACTERS = 16

_NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def quantize_model(
    model: Any,
    config: Any,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    max_calibration_tokens: int = CALIBRATION_TOKENS,
    progress: bool = True,
) -> Any:
    """Quantise the weights of a model, in place.

    Args:
        model: a float model of either family, with any head.
        config: a QuantizationConfig, or what :func:`gpt2rt.quantization.resolve_quantization` takes, such as "int4".
        calibration: for ``method="gptq"``: texts, which need ``tokenizer``, or token ids as lists or tensors. They are
            joined and cut into windows of ``n_positions`` tokens.
        tokenizer: the model's.
        max_calibration_tokens: tokens used, from the beginning of the calibration; more take more time.
        progress: show a bar on stderr.
    Returns:
        ``model``, with quantised layers. If an exception ends it, the model is as it was.
    Raises:
        ValueError: the model is quantised already, a weight is not finite, or the calibration is missing, useless or
            given for nothing.
    """
    config = resolve_quantization(config)
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError("the model is quantised already; load its float checkpoint, or call model.dequantize() first")
    ties = model._active_ties()
    # a tied layer takes the weight of the other
    wanted = {key.removesuffix(".weight"): form for key, form in formats(model, config).items() if key not in ties}
    windows = None
    if config.method == "gptq":
        windows = _windows(calibration, tokenizer, model.config, max_calibration_tokens)
    elif calibration is not None:
        raise ValueError("a calibration text has no use with method='rtn'; pass QuantizationConfig(..., method='gptq')")
    with _restored(model), _bar(len(wanted), progress) as advance:
        if windows is None:
            weights, stored = {}, {}
            for name, form in wanted.items():
                weights[name], stored[name] = _rounded(name, model.get_submodule(name), form, config)
                advance()
            replace_with_quantized(model, weights, config)
            for name, scales in stored.items():
                model.get_submodule(name).file_scales = scales
            return model
        _compensate(model, wanted, config, windows, advance)
        return replace_with_quantized(model, {}, config)


def _rounded(
    name: str, module: nn.Module, form: str, config: QuantizationConfig
) -> tuple[QuantizedWeight | Tensor, NestedScales | None]:
    """The weight of a float layer in another format, each element on its own; and its scales as files hold them."""
    weight = _weight(module)
    if form in _NARROW:
        return weight.to(_NARROW[form]), None
    with _named(name):
        if form == config.scheme and config.double_quant:
            check_weight(weight)
            assert config.group_size is not None
            return quantize_blocks(weight, form, config.group_size, double_quant=True)
        return quantize_rtn(weight, config, scheme=form), None


def _weight(module: nn.Module) -> Tensor:
    """[out_features, in_features], detached."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if isinstance(module, Conv1D) else weight


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors inside say which weight they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}.weight cannot be quantised: {error}") from error


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """If an exception leaves the block, the model's layers and config are those from before."""
    layers, recorded = dict(model.named_modules()), vars(model.config).copy()
    try:
        yield
    except BaseException:
        for name, module in layers.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        vars(model.config).clear()
        vars(model.config).update(recorded)
        model.tie_weights()
        raise


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; call what it gives after each of ``total`` steps."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("quantising weights", total=total)
        yield lambda: bar.advance(task)


# ---- with a calibration text -----------------------------------------------------------------------------------------


class _Reached(Exception):
    """A hook has seen what it waited for; the rest of the forward pass is not needed."""


def _windows(calibration: Any, tokenizer: Any, config: Any, max_tokens: int) -> list[Tensor]:
    """The calibration's tokens as batches [windows, n_positions] int64; a text shorter than that is one window.

    Raises:
        ValueError: there is none, it needs a tokenizer, or its ids are not the model's.
    """
    if calibration is None:
        raise ValueError(
            "method='gptq' needs a calibration: some tens of thousands of tokens of text like what the model will see; "
            "pass calibration=[text, ...] and tokenizer=, or use method='rtn'"
        )
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"max_calibration_tokens = {max_tokens!r}, but it must be an integer >= 1")
    parts = [calibration] if isinstance(calibration, str | Tensor) else calibration
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            if tokenizer is None:
                raise ValueError("a calibration text needs the model's tokenizer: pass tokenizer=, or token ids")
            # of a long text only the beginning is needed, and encoding takes time
            ids += tokenizer.encode(part[: _MAX_TOKEN_CHARACTERS * max_tokens], add_special_tokens=False, verbose=False)
        else:
            tokens = torch.as_tensor(part)
            if tokens.is_floating_point():
                raise ValueError(f"a calibration is texts or token ids, got numbers of {tokens.dtype}")
            ids += tokens.reshape(-1).tolist()
        if len(ids) >= max_tokens:
            break
    ids = ids[:max_tokens]
    if not ids:
        raise ValueError("the calibration has no tokens")
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise ValueError(
            f"the calibration holds token ids from {min(ids)} to {max(ids)}, but the vocabulary has ids 0 to "
            f"{config.vocab_size - 1}; was it encoded with another model's tokenizer?"
        )
    length = min(config.n_positions, len(ids))
    count = len(ids) // length
    windows = torch.tensor(ids[: count * length]).view(count, length)
    return list(windows.split(max(1, _BATCH_TOKENS // length)))


@torch.no_grad()
def _compensate(
    model: Any, wanted: dict[str, str], config: QuantizationConfig, windows: list[Tensor], advance: Callable[[], None]
) -> None:
    """Quantise a model layer by layer, in place."""
    names = {module: name for name, module in model.named_modules()}
    linear = {name: form for name, form in wanted.items() if isinstance(model.get_submodule(name), Conv1D)}
    # embeddings are looked up, so there is nothing that could make up for their errors; but the blocks see them
    tables = {name: form for name, form in wanted.items() if name not in linear}
    rounded = {name: _rounded(name, model.get_submodule(name), form, config)[0] for name, form in tables.items()}
    replace_with_quantized(model, rounded)
    for _ in tables:
        advance()
    training = model.training
    model.eval()
    try:
        batches = _block_inputs(model, windows)
        for block in model.base_model.h:
            done: dict[str, QuantizedWeight] = {}
            inside = {module: names[module] for module in block.modules() if names.get(module) in linear}
            for module in _in_order(block, inside, batches[0]):
                hessian = _gather(block, module, batches)
                name = inside[module]
                with _named(name):
                    done[name] = quantize_gptq(_weight(module), hessian.mean(), config)
                # many tokens run through the block yet: faster as floats
                form = quantized_form(module, done[name], model.dtype)
                model.set_submodule(name, float_form(form, model.dtype))
                advance()
            for batch in batches:
                batch[0] = _first(block(*batch))
            replace_with_quantized(model, done)
    finally:
        model.train(training)


def _block_inputs(model: Any, windows: Iterable[Tensor]) -> list[list[Any]]:
    """What the first block is called with for each batch of windows: its hidden states, then the other arguments."""
    batches: list[list[Any]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...]) -> None:
        batches.append(list(args))
        raise _Reached

    hook = model.base_model.h[0].register_forward_pre_hook(catch)
    try:
        for window in windows:
            with contextlib.suppress(_Reached):
                keywords = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
                model.base_model(window.to(model.device), **keywords)
    finally:
        hook.remove()
    return batches


def _in_order(block: nn.Module, layers: Iterable[nn.Module], batch: list[Any]) -> list[nn.Module]:
    """Those of ``layers`` that the block runs, in the order it runs them.

    Raises:
        ValueError: one is not run.
    """
    layers, ran = list(layers), []
    hooks = [layer.register_forward_pre_hook(lambda module, _args: ran.append(module)) for layer in layers]
    try:
        block(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [layer for layer in layers if layer not in ran]
    if idle:
        raise ValueError(
            f"{len(idle)} of {len(layers)} layers of a block do not run on plain text, such as those of cross "
            "attention, so gptq knows nothing of their inputs; name them in skip_modules, or use method='rtn'"
        )
    return ran


def _gather(block: nn.Module, layer: nn.Module, batches: list[list[Any]]) -> Hessian:
    """H of one layer's inputs."""
    hessian: Hessian | None = None

    def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal hessian
        x = args[0]
        hessian = hessian or Hessian(x.size(-1), x.device)
        hessian.add(x)
        raise _Reached

    hook = layer.register_forward_pre_hook(add)
    try:
        for batch in batches:
            with contextlib.suppress(_Reached):
                block(*batch)
    finally:
        hook.remove()
    assert hessian is not None
    return hessian


def _first(output: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return output[0] if isinstance(output, tuple) else output
