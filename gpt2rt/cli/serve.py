"""``gpt2rt serve``: an OpenAI-compatible server on one model."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from gpt2rt.server.settings import EngineSettings, ServerSettings
from gpt2rt.server.sockets import address, listen

from .common import DEFAULT_MODEL, JsonFlag, UsageFault, check_dtype, check_quantization, parse_device, set_threads

EXAMPLES = (
    "Examples:\n\ngpt2rt serve\n\n"
    "gpt2rt serve ./my-gpt2 --served-model-name my-gpt2 --dtype bfloat16 --max-num-seqs 16\n\n"
    "GPT2RT_API_KEY=secret gpt2rt serve gpt2 --host 0.0.0.0 --port 8080\n\n"
    'curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" '
    '-d \'{"prompt": "ROMEO:", "max_tokens": 20}\'\n\n'
    "Each flag has an environment variable, GPT2RT_MAX_NUM_SEQS for --max-num-seqs; the flag goes before it."
)

# of the extra
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "orjson")

_MODEL = Annotated[str, typer.Argument(help="A folder, a hub id, or an embedded model.", envvar="GPT2RT_MODEL")]


def _options() -> list[inspect.Parameter]:
    """A flag for each setting, with its environment variable."""
    parameters = []
    for settings, panel in ((ServerSettings, "Server"), (EngineSettings, "Engine")):
        types = get_type_hints(settings)
        for field in dataclasses.fields(settings):
            flag = "--" + field.name.replace("_", "-")
            kind, default = types[field.name], field.default
            declared = [f"{flag}/--no-{flag[2:]}"] if field.metadata.get("negative") else [flag]
            if kind == tuple[str, ...]:
                kind, default = list[str] | None, None
            option = typer.Option(
                *declared,
                help=field.metadata["help"],
                envvar=f"GPT2RT_{field.name.upper()}",
                show_envvar=False,
                show_default=field.metadata.get("show_default", default not in (None, "", False)),
                rich_help_panel=panel,
            )
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
                )
            )
    return parameters


def command(model: str = DEFAULT_MODEL, json_line: bool = False, **options: Any) -> None:
    """Serve a model over HTTP: OpenAI's completions, chat and embeddings, streamed or not."""
    start = time.perf_counter()
    values: dict[str, Any] = {name: tuple(value or ()) if name in _LISTS else value for name, value in options.items()}
    names = {field.name for field in dataclasses.fields(ServerSettings)}
    try:
        settings = ServerSettings(**{name: value for name, value in values.items() if name in names})
    except ValueError as error:
        raise UsageFault(str(error)) from None
    engine_settings = EngineSettings(**{name: value for name, value in values.items() if name not in names})
    # all that can be wrong with the command line is found before a model is loaded
    check_dtype(engine_settings.dtype)
    check_quantization(engine_settings.quantization)
    device = parse_device(engine_settings.device)
    settings = dataclasses.replace(settings, chat_template=_template(settings.chat_template))
    if engine_settings.num_threads:
        set_threads(engine_settings.num_threads)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"the server needs {', '.join(missing)}; install it with: pip install 'gpt2rt[serve]'")
    load = _loader(model, engine_settings, device)
    # taken before the model is loaded, so that a port in use shows at once
    bound = listen(settings)
    try:
        with concurrent.futures.ThreadPoolExecutor(1, "gpt2rt imports") as thread:
            # while the weights come from the disk
            imported = thread.submit(importlib.import_module, "gpt2rt.server.run")
            engine = load()
            try:
                run_server = imported.result().run_server
            except BaseException:
                engine.shutdown()
                raise
    except BaseException:
        bound.close()
        raise

    def ready() -> None:
        line = _json_line if json_line else _line
        print(line(engine, settings, address(settings, bound), time.perf_counter() - start), flush=True)

    code = run_server(engine, settings, bound, ready)
    if code:
        sys.stdout.flush()
        raise typer.Exit(code)


# what is for reading the checkpoint
_LOADING = ("tokenizer", "revision", "subfolder", "local_files_only", "dtype", "quantization", "task")
_PARAMETERS = _options()
_LISTS = {field.name for field in dataclasses.fields(ServerSettings) if isinstance(field.default, tuple)}
# typer reads the flags from here
command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=DEFAULT_MODEL, annotation=_MODEL),
        inspect.Parameter("json_line", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonFlag),
        *_PARAMETERS,
    ]
)
command.__annotations__ = {"model": _MODEL, "json_line": JsonFlag} | {
    parameter.name: parameter.annotation for parameter in _PARAMETERS
}


def _template(given: str | None) -> str | None:
    """Jinja text: of a file, or what was given."""
    # text of a template has braces, a file's name hardly
    if given is None or "{%" in given or "{{" in given:
        return given
    try:
        with open(given, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageFault(f"--chat-template {given} cannot be read: {error}") from None


def _loader(model: str, settings: EngineSettings, device: Any) -> Callable[[], Any]:
    """What makes the engine; its settings are checked now.

    Raises:
        UsageFault: one is out of range.
    """
    from gpt2rt.engine.async_llm import AsyncLLM
    from gpt2rt.engine.config import EngineConfig
    from gpt2rt.engine.params import RequestLimits

    values = dataclasses.asdict(settings)
    del values["device"]
    loading = {name: values.pop(name) for name in _LOADING}
    if values["prefill_slowdown"] is None:
        # the engine's own choice
        del values["prefill_slowdown"]
    try:
        values["limits"] = RequestLimits(n=values.pop("max_n"), logprobs=values.pop("max_logprobs"))
        EngineConfig(**values)
    except ValueError as error:
        raise UsageFault(str(error)) from None
    return functools.partial(AsyncLLM, model, device=device, **loading, **values)


def _facts(engine: Any, settings: ServerSettings, url: str, seconds: float) -> dict[str, Any]:
    from gpt2rt.server.service import public_name

    config = engine.config
    return {
        "url": url,
        "model": list(settings.served_model_name) or [public_name(engine.model_name)],
        "max_model_len": engine.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_queued_reqs": config.max_num_queued_reqs,
        "num_blocks": engine.num_blocks,
        "block_size": engine.block_size,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "executor": engine.executor_name,
        "tasks": sorted(engine.tasks),
        "load_seconds": round(seconds, 3),
    }


def _json_line(engine: Any, settings: ServerSettings, url: str, seconds: float) -> str:
    return json.dumps(_facts(engine, settings, url, seconds))


def _line(engine: Any, settings: ServerSettings, url: str, seconds: float) -> str:
    facts = _facts(engine, settings, url, seconds)
    return (
        f"{facts['url']} serves {', '.join(facts['model'])}: context {facts['max_model_len']}, "
        f"{facts['max_num_seqs']} running + {facts['max_num_queued_reqs']} queued requests, "
        f"{facts['num_blocks']} KV blocks of {facts['block_size']} tokens ({facts['kv_cache_dtype']}), "
        f"executor {facts['executor']}; ready in {seconds:.1f} s"
    )
