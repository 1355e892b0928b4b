"""An engine without a model: its tokens, its pace and its faults are what a test says."""

import asyncio
import itertools
import types

from gpt2rt import GPT2Tokenizer
from gpt2rt.engine.config import EngineConfig
from gpt2rt.engine.inputs import check_token_ids, prompt_parts
from gpt2rt.engine.outputs import CompletionOutput, RequestOutput
from gpt2rt.engine.params import RequestOutputKind
from gpt2rt.engine.stats import EngineStats
from gpt2rt.errors import EngineDeadError, RequestError
from gpt2rt.tokenizers.bytelevel import byte_to_char


def byte_tokenizer(**options):
    """Every byte is a token; 256 is the end of a text."""
    vocab = {char: byte for byte, char in byte_to_char().items()} | {"<|endoftext|>": 256}
    return GPT2Tokenizer(vocab, [], eos_token="<|endoftext|>", **options)


class ScriptedEngine:
    """What the server uses of ``AsyncLLM``: each request gets ``piece`` again and again, up to its ``max_tokens``.

    Attributes:
        piece: the text of each token.
        delay: seconds before each token.
        gate: tokens come only while it is set.
        fault: an exception that a request meets at token ``fault_at``; None: none.
        refusal: an exception that every request is answered with at once; None: none.
        live: requests in work; ``ended``: name -> why ("done", "abort", "closed" by the reader, "fault").
        silent_abort: an aborted request ends without a last output.
    """

    def __init__(self, *, max_model_len=100_000, **config):
        self.config = EngineConfig(**config)
        self.tokenizer = byte_tokenizer()
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(n_embd=4, id2label={}))
        self.model_name = "scripted"
        self.max_model_len = max_model_len
        self.vocab_size = 257
        self.tasks = frozenset({"generate"})
        self.num_blocks, self.block_size, self.kv_cache_dtype, self.executor_name = 8, 16, "float32", "scripted"
        self.observer = None
        self.piece, self.delay, self.fault, self.fault_at, self.refusal = "ab ", 0.0, None, 0, None
        self.gate = asyncio.Event()
        self.gate.set()
        self.silent_abort = False
        self.live, self.ended, self.seen = set(), {}, []
        self.dead_error = None
        self.was_shut_down = False
        self._aborted = set()
        self._names = itertools.count()

    @property
    def errored(self):
        return self.dead_error is not None

    def die(self):
        """The engine's thread ends by a fault."""
        self.dead_error = RuntimeError("the scripted engine died")
        self.gate.set()

    async def tokenize(self, text, *, add_special_tokens=True, split_special_tokens=None, cut=None):
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def generate(
        self, prompt, sampling_params, request_id=None, *, priority=0, cache_salt=None, split_special_tokens=None
    ):
        self._check_alive()
        if self.refusal is not None:
            raise self.refusal
        _, ids = prompt_parts(prompt)
        ids = check_token_ids(ids, self.vocab_size)
        name = request_id or f"scripted-{next(self._names)}"
        if name in self.live:
            raise RequestError(f"request_id {name!r} is in use")
        self.live.add(name)
        self.seen.append((name, sampling_params, priority, cache_salt))
        self.ended[name] = "closed"
        try:
            for output in self._outputs(name, ids, sampling_params):
                await self._pace(name)
                made = output(name in self._aborted)
                if made is None:
                    continue
                if made.finished:
                    self.ended[name] = "abort" if name in self._aborted else "done"
                    if name in self._aborted and self.silent_abort:
                        return
                yield made
                if made.finished:
                    return
        finally:
            self.live.discard(name)
            self._aborted.discard(name)

    async def _pace(self, name):
        while not self.gate.is_set() and name not in self._aborted:
            await asyncio.sleep(0.005)
        if name not in self._aborted:
            await asyncio.sleep(self.delay)
        try:
            self._check_alive()
        except EngineDeadError:
            self.ended[name] = "fault"
            raise

    def _outputs(self, name, ids, params):
        whole = params.output_kind is RequestOutputKind.FINAL_ONLY

        def make(step, aborted):
            if self.fault is not None and step == self.fault_at:
                self.ended[name] = "fault"
                raise self.fault
            last = step == params.max_tokens - 1
            reason = "abort" if aborted else "length" if last else None
            if whole and reason is None:
                return None
            count = step + 1 if whole else 1
            choices = [
                CompletionOutput(index, self.piece * count, [97] * count, finish_reason=reason)
                for index in range(params.n)
            ]
            return RequestOutput(name, None, ids, None, choices, finished=reason is not None)

        for step in range(params.max_tokens):
            yield lambda aborted, step=step: make(step, aborted)

    async def abort(self, request_id):
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        self._aborted |= self.live & set(names)

    def _check_alive(self):
        if self.dead_error is not None:
            raise EngineDeadError("the scripted engine has stopped") from self.dead_error

    async def check_health(self):
        self._check_alive()

    def stats(self):
        return EngineStats(len(self.live), 0, self.num_blocks, self.num_blocks, 0.0, 0, 0, 0, 0, 0, 0, 0, {})

    def shutdown(self):
        self.was_shut_down = True
