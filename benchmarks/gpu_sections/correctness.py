"""(a) Every kernel against its definition in float64; whole models against transformers in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2rt.lab.measure import measure, size_text
from gpt2rt.lab.problem import Place
from gpt2rt.lab.registry import OPERATIONS

from . import serving
from .models import DTYPES, FORMATS, drop, make_model, prefill_batch, random_cache, title_of, weights_of
from .persistent import BARRIER_PATIENCE_S, REPEATS, check_bits, persistent_executor, steps_of, why_not
from .session import Session

#: tokens that are fed as a prompt, and one by one after it
PROMPT, STEPS = 48, 16
#: how much larger our largest error may be than that of transformers in the same dtype
ALLOWED = 2.0


def run(session: Session) -> None:
    with torch.no_grad():
        _kernels(session, "toy")
        for name, formats, scale in _models(session):
            for format in formats:
                part = f"model {name} {format}"
                if session.over(part):
                    continue
                session.need(20)
                with session.attempt(part):
                    _model(session, name, format, scale)
                drop()
        _embedded(session)
        if not session.over("LLM"):
            session.need(60)
            with session.attempt("LLM"):
                serving.check(session)
        _persistent(session)
        if not session.toy:
            _kernels(session, "measured")


def _kernels(session: Session, which: str) -> None:
    """Toy sizes in every dtype (in one on a CPU), or the sizes that are measured in one."""
    dtypes = list(DTYPES.values()) if which == "toy" and not session.dry else [session.dtype]
    for operation in OPERATIONS.values():
        for size in (operation.toy,) if which == "toy" else operation.sizes:
            for dtype in dtypes:
                name = f"{operation.name} {size_text(size)} {str(dtype).removeprefix('torch.')}"
                if session.over(name):
                    continue
                session.need(5)
                with session.attempt(name):
                    result = measure(operation, size, Place(session.device, dtype))
                    errors = {n: f["error"] for n, f in result["forms"].items()}
                    failed = {n: f["failed"] for n, f in result["forms"].items() if f["failed"]}
                    session.check(name, result["ok"], tolerance=result["tolerance"], errors=errors, failed=failed)


def _models(session: Session) -> list[tuple[str, list[str], float]]:
    if session.toy:
        return [("toy", ["float16", "int4"], 8.0)]
    return [("124M", list(FORMATS), 3.0), ("355M", ["float16", "int4"], 3.0), ("1.5B", ["float16", "int4"], 2.0)]


def _reference(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model with the very weights of ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    plain = model
    if getattr(model, "quantization_scheme", None):
        import copy

        # the numbers that the codes stand for, not rounded again
        plain = copy.deepcopy(model).dequantize(torch.float32)
    config = plain.config.to_dict()
    kind = "OpenAIGPT" if config["model_type"] == "openai-gpt" else "GPT2"
    made = getattr(transformers, f"{kind}Config")(**config, attn_implementation="eager")
    before = torch.get_default_dtype()
    # made as it is wanted: 1.5B in float32 first and in float64 beside it would be 19 GB
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            reference = getattr(transformers, f"{kind}LMHeadModel")(made)
    finally:
        torch.set_default_dtype(before)
    reference.load_state_dict(plain.state_dict(), strict=True)
    return reference.to(device=device, dtype=dtype).eval()


def _ours(executor: Any, ids: Tensor, prompt: int, dtype: torch.dtype) -> Tensor:
    """Logits of every position: a prompt, then one token a step; [num_tokens, vocab_size] float32."""
    plan = executor.plan
    cache = random_cache(plan, 1, ids.numel(), dtype)
    table = torch.randperm(cache.pool.num_blocks, device=ids.device).to(torch.int32)[None]
    rows = [executor.step(prefill_batch(ids[:prompt], 0, table, all_logits=True), cache).logits]
    for past in range(prompt, ids.numel()):
        rows.append(executor.step(prefill_batch(ids[past : past + 1], past, table), cache).logits)
    return torch.cat(rows)


def _compare(
    session: Session,
    name: str,
    model: Any,
    ids: Tensor,
    prompt: int,
    peer_dtype: torch.dtype,
    executor: Any | None = None,
    **facts: Any,
) -> None:
    executor = executor or model.generation_executor("cuda")
    found = _ours(executor, ids, prompt, executor.plan.dtype).double()
    peer = _reference(model, session.device, peer_dtype)(ids[None], use_cache=False).logits[0].double()
    drop()
    wide = _reference(model, session.device, torch.float64)
    expected = wide(ids[None], use_cache=False).logits[0]
    error = float((found - expected).abs().max())
    peer_error = float((peer - expected).abs().max())
    session.check(
        f"{name}: logits",
        # "not >" would let NaN pass
        error <= ALLOWED * peer_error + 1e-5,
        error=error,
        transformers_error=peer_error,
        largest=float(expected.abs().max()),
        **facts,
    )
    # where rounding in this dtype cannot change the choice, ours must be that of float64
    best = expected.topk(2, dim=-1)
    decided = best.values[:, 0] - best.values[:, 1] > 2 * peer_error
    same = found.argmax(dim=-1) == best.indices[:, 0]
    session.check(
        f"{name}: greedy tokens",
        bool(same[decided].all()),
        decided=int(decided.sum()),
        equal=int(same.sum()),
        positions=ids.numel(),
    )
    if executor is model.generation_executor("cuda"):
        _generated(session, name, model, wide, ids[:prompt], ids.numel() - prompt, 2 * peer_error)


def _generated(session: Session, name: str, model: Any, wide: Any, prompt: Tensor, count: int, margin: float) -> None:
    """What ``generate`` gives, whose loop stays on the device: each token that leads by ``margin`` must be the best."""
    tokens = model.generate(prompt[None], max_new_tokens=count, do_sample=False, pad_token_id=0)
    best = wide(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2, dim=-1)
    decided = best.values[:, 0] - best.values[:, 1] > margin
    same = tokens[0, len(prompt) :] == best.indices[:, 0]
    session.check(
        f"{name}: generate",
        bool(same[decided].all()) and len(same) > 0,
        decided=int(decided.sum()),
        equal=int(same.sum()),
        tokens=len(same),
    )


def _model(session: Session, name: str, format: str, scale: float) -> None:
    model = make_model(name, format, session.device, scale=scale)
    prompt, steps = (6, 2) if session.toy else (PROMPT, STEPS)
    ids = torch.randint(0, model.config.vocab_size, (prompt + steps,), device=session.device)
    executor = model.generation_executor("cuda")
    title = f"model {title_of(name, executor.plan)}{steps_of(executor)}"
    peer_dtype = DTYPES.get(format, torch.float16)
    _compare(session, title, model, ids, prompt, peer_dtype, **weights_of(executor.plan))


def _persistent(session: Session) -> None:
    """Single steps as one launch of the persistent kernel, after a prompt by the chain."""
    models = [("toy", "float16", 8.0), ("toy", "bfloat16", 8.0)]
    if not session.toy:
        models = [
            ("124M", "float16", 3.0),
            ("124M", "bfloat16", 3.0),
            ("355M", "float16", 3.0),
            ("1.5B", "float16", 2.0),
        ]
    for name, format, scale in models:
        title = f"persistent {name} {format}"
        if session.over(title):
            continue
        session.need(20)
        with session.attempt(title, BARRIER_PATIENCE_S):
            model = make_model(name, format, session.device, scale=scale)
            executor = persistent_executor(model.generation_executor("cuda"))
            if executor is None:
                session.note(title, f"not run: {why_not(model.generation_executor('cuda').plan)}")
                continue
            prompt, steps = (6, 2) if session.toy else (PROMPT, STEPS)
            ids = torch.randint(0, model.config.vocab_size, (prompt + steps,), device=session.device)
            _compare(session, title, model, ids, prompt, DTYPES[format], executor)
            check_bits(session, title, executor, REPEATS if session.timed else 3)
        drop()


def _embedded(session: Session) -> None:
    """The trained models that ship with gpt2rt, on tokens that they choose."""
    from gpt2rt import GPT2LMHeadModel, OpenAIGPTLMHeadModel

    if session.toy:
        return
    for kind, name in ((GPT2LMHeadModel, "gpt2rt/tiny-gpt2"), (OpenAIGPTLMHeadModel, "gpt2rt/tiny-gpt1")):
        for format in ("float32", "float16"):
            part = f"{name} {format}"
            if session.over(part):
                continue
            session.need(10)
            with session.attempt(part):
                model = kind.from_pretrained(name, dtype=DTYPES[format]).to(session.device)
                start = torch.arange(5, 13, device=session.device)[None]
                ids = model.generate(start, max_new_tokens=48, do_sample=False)[0]
                _compare(session, f"{name} {format}", model, ids, 8, DTYPES[format])
