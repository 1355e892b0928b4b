"""llama.cpp through the C functions of llama-cpp-python (measured with 0.3.36).

Built for the machine it runs on: ``CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python gguf``. The gguf package
writes the checkpoint as an F32 file, and llama.cpp's own ``llama_model_quantize`` makes the other
formats from it, with its defaults: Q4_0 keeps the tied embedding and head in Q6_K. The cache is float16, flash
attention is left to the library (its defaults).
"""

from __future__ import annotations

import ctypes
import pathlib
import time

import numpy as np

from .weights import read_checkpoint

REQUIRES = {"llama_cpp": "llama-cpp-python"}
CONVERT_REQUIRES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}


def _write_f32(checkpoint: str, path: pathlib.Path) -> None:
    import gguf

    source = read_checkpoint(checkpoint)
    config = source.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    # names for the ids, and a merge, without which the project's server writes no answer; nothing is encoded with them
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])

    def norm(name: str, target: str) -> None:
        writer.add_tensor(f"{target}.weight", source[f"{name}.weight"])
        writer.add_tensor(f"{target}.bias", source[f"{name}.bias"])

    writer.add_tensor("token_embd.weight", source["wte.weight"])
    writer.add_tensor("position_embd.weight", source["wpe.weight"])
    norm("ln_f", "output_norm")
    linears = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for layer in range(config["n_layer"]):
        norm(f"h.{layer}.ln_1", f"blk.{layer}.attn_norm")
        norm(f"h.{layer}.ln_2", f"blk.{layer}.ffn_norm")
        for name, target in linears.items():
            weight, bias = source.linear(f"h.{layer}.{name}")
            writer.add_tensor(f"blk.{layer}.{target}.weight", weight)
            writer.add_tensor(f"blk.{layer}.{target}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(checkpoint: str, target: pathlib.Path, options: dict) -> None:
    """Write model.gguf in ``options["file_type"]``, the name of a LLAMA_FTYPE_* constant."""
    import llama_cpp

    path = target / "model.gguf"
    if options["file_type"] == "ALL_F32":
        _write_f32(checkpoint, path)
        return
    plain = target / "f32.gguf"
    _write_f32(checkpoint, plain)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{options['file_type']}")
    code = llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(parameters))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize to {options['file_type']} answered {code}")
    plain.unlink()


class Runner:
    """A loaded model; ``generate`` answers (tokens of each row, seconds from the start to each token)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import llama_cpp

        self.api, self.threads = llama_cpp, options["threads"]
        # kept: the library holds the pointer, not the Python object
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = str(converted / "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {converted / 'model.gguf'}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context, self.room = None, (0, 0)

    def _prepare(self, num_rows: int, length: int) -> None:
        """A context that holds this many rows of this length; counted as loading, not as generating."""
        if self.room[0] == num_rows and self.room[1] >= length:
            return
        api = self.api
        if self.context:
            api.llama_free(self.context)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = num_rows * -(-length // 256) * 256
        parameters.n_seq_max = num_rows
        parameters.n_batch = max(parameters.n_batch, num_rows * length)
        parameters.n_threads = parameters.n_threads_batch = self.threads
        self.context, self.room = api.llama_init_from_model(self.model, parameters), (num_rows, length)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {parameters.n_ctx} tokens")

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        api = self.api
        length = len(prompts[0])
        self._prepare(len(prompts), length + new_tokens)
        rows: list[list[int]] = [[] for _ in prompts]
        times = []
        start = time.perf_counter()
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(prompts) * length, 0, 1)
        step = [list(prompt) for prompt in prompts]
        for position in range(new_tokens):
            first = 0 if position == 0 else length + position - 1
            batch.n_tokens, wanted = 0, []
            for row, tokens in enumerate(step):
                for offset, token in enumerate(tokens):
                    at = batch.n_tokens
                    batch.token[at], batch.pos[at] = token, first + offset
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                    batch.logits[at] = offset == len(tokens) - 1
                    batch.n_tokens += 1
                wanted.append(batch.n_tokens - 1)
            code = api.llama_decode(self.context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode answered {code}")
            for row, at in enumerate(wanted):
                logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, at), shape=(self.vocab_size,))
                rows[row].append(int(logits.argmax()))
            step = [[row[-1]] for row in rows]
            times.append(time.perf_counter() - start)
        api.llama_batch_free(batch)
        return rows, times
