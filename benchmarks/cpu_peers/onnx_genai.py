"""ONNX Runtime through onnxruntime-genai (``pip install onnxruntime-genai onnx``; measured with 0.18.0 and 1.31.1).

Its model builder knows no GPT-2, so the graph is written here, out of the operators that the builder uses for other
models: GroupQueryAttention over a key-value buffer that is shared between steps, SkipLayerNormalization with the bias
of the projection before it, FastGelu with the bias of ``c_fc``, the head on the last position only. int8 and int4 are
MatMulNBits in blocks of 32 with ``accuracy_level`` 4 (activations rounded to int8), symmetric, rounded to nearest; the
embedding stays float32, which a token reads one row of.
"""

from __future__ import annotations

import json
import pathlib
import time

import numpy as np

from .weights import Checkpoint, read_checkpoint

REQUIRES = {"onnxruntime_genai": "onnxruntime-genai"}
CONVERT_REQUIRES = {"onnx": "onnx"}
BLOCK = 32


class _Graph:
    """Collects nodes and initializers; every method returns the name of its output."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.nodes: list = []
        self.initializers: list = []

    def constant(self, name: str, value: np.ndarray) -> str:
        import onnx

        self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, *, outputs: list[str] | None = None, **attributes) -> str:
        import onnx

        outputs = outputs or [name]
        standard = ("Gather", "Add", "Sub", "Cast", "ReduceSum", "Shape", "MatMul", "LayerNormalization", "Slice")
        domain = "" if op in standard else "com.microsoft"
        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def matmul(self, x: str, weight: np.ndarray, name: str) -> str:
        """x @ weight.T for weight [N, K], without bias."""
        if self.bits == 32:
            return self.node("MatMul", [x, self.constant(f"{name}.weight", weight.T)], f"{name}.matmul")
        codes, scales = quantize_blocks(weight, self.bits)
        num_out, num_in = weight.shape
        inputs = [x, self.constant(f"{name}.codes", codes), self.constant(f"{name}.scales", scales)]
        return self.node(
            "MatMulNBits",
            inputs,
            f"{name}.matmul",
            K=num_in,
            N=num_out,
            bits=self.bits,
            block_size=BLOCK,
            accuracy_level=4,
        )


def quantize_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round [N, K] to nearest in blocks of 32 along K, in MatMulNBits' layout.

    The element of largest magnitude becomes -2^(bits-1), so that the scale carries its sign; zero point 2^(bits-1).

    Returns:
        codes uint8 [N, ceil(K / 32), 32 * bits / 8], the first of two 4-bit elements in the low half of a byte; and
        scales float32 [N, ceil(K / 32)].
    """
    num_out, num_in = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -num_in % BLOCK))).reshape(num_out, -1, BLOCK)
    half = 1 << (bits - 1)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = (extreme / -half).astype(np.float32)
    ratio = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
    codes = np.clip(np.rint(ratio) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales[..., 0]


def _build(checkpoint: Checkpoint, bits: int):
    """The onnx model: one step of any number of tokens for any number of rows of equal length."""
    from onnx import TensorProto, helper

    config, heads, head_dim = checkpoint.config, checkpoint.config["n_head"], checkpoint.head_dim
    norm = {"epsilon": config.get("layer_norm_epsilon", 1e-5)}
    graph = _Graph(bits)
    one = graph.constant("one", np.array([1], np.int64))
    # GroupQueryAttention wants the index of the last position of each row, and the longest length
    counts = graph.node("ReduceSum", ["attention_mask", one], "counts", keepdims=1)
    last = graph.node("Cast", [graph.node("Sub", [counts, one], "last64")], "last", to=TensorProto.INT32)
    length = graph.node("Gather", [graph.node("Shape", ["attention_mask"], "shape"), one], "length64")
    length = graph.node("Cast", [length], "length", to=TensorProto.INT32)
    tables = [graph.constant(f"{name}.weight", checkpoint[f"{name}.weight"]) for name in ("wte", "wpe")]
    tokens = graph.node("Gather", [tables[0], "input_ids"], "tokens")
    x = graph.node("Add", [tokens, graph.node("Gather", [tables[1], "position_ids"], "positions")], "embedded")

    def gamma_beta(name: str) -> list[str]:
        return [graph.constant(f"{name}.{part}", checkpoint[f"{name}.{part}"]) for part in ("weight", "bias")]

    y = graph.node("LayerNormalization", [x, *gamma_beta("h.0.ln_1")], "h.0.ln_1", **norm)
    cache = []
    for layer in range(config["n_layer"]):
        prefix = f"h.{layer}"
        weight, bias = checkpoint.linear(f"{prefix}.attn.c_attn")
        qkv = graph.matmul(y, weight, f"{prefix}.attn.c_attn")
        qkv = graph.node("Add", [qkv, graph.constant(f"{prefix}.attn.c_attn.bias", bias)], f"{prefix}.qkv")
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        cache.append((past, present))
        attended = graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *past, last, length],
            f"{prefix}.attention",
            outputs=[f"{prefix}.attention", *present],
            num_heads=heads,
            kv_num_heads=heads,
            scale=head_dim**-0.5,
        )
        for part, function in (("attn.c_proj", None), ("mlp.c_fc", "FastGelu"), ("mlp.c_proj", None)):
            name = f"{prefix}.{part}"
            weight, bias = checkpoint.linear(name)
            source = {"attn.c_proj": attended, "mlp.c_fc": y}.get(part, y)
            product = graph.matmul(source, weight, name)
            bias_name = graph.constant(f"{name}.bias", bias)
            if function:
                y = graph.node(function, [product, bias_name], f"{name}.act")
                continue
            following = f"{prefix}.ln_2" if part == "attn.c_proj" else f"h.{layer + 1}.ln_1"
            if layer == config["n_layer"] - 1 and part == "mlp.c_proj":
                following = "ln_f"
            outputs = [f"{name}.normed", "", "", f"{name}.sum"]
            y = graph.node(
                "SkipLayerNormalization",
                [x, product, *gamma_beta(following), bias_name],
                f"{name}.add_norm",
                outputs=outputs if following != "ln_f" else outputs[:1],
                **norm,
            )
            x = outputs[3]
    ends = [graph.constant(name, np.array([value], np.int64)) for name, value in (("from", -1), ("to", 1 << 31))]
    y = graph.node("Slice", [y, *ends, one], "last_position")
    head = graph.matmul(y, checkpoint["wte.weight"], "lm_head")
    graph.nodes[-1].output[0] = "logits"
    assert head == "lm_head.matmul"

    int64, float32 = TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("input_ids", int64, ["batch", "tokens"]),
        helper.make_tensor_value_info("attention_mask", int64, ["batch", "length"]),
        helper.make_tensor_value_info("position_ids", int64, ["batch", "tokens"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", float32, ["batch", 1, config["vocab_size"]])]
    for past, present in cache:
        inputs += [helper.make_tensor_value_info(name, float32, ["batch", heads, "past", head_dim]) for name in past]
        outputs += [
            helper.make_tensor_value_info(name, float32, ["batch", heads, "total", head_dim]) for name in present
        ]
    model = helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(model, opset_imports=opsets, ir_version=9)


def convert(checkpoint: str, target: pathlib.Path, options: dict) -> None:
    """Write model.onnx (weights in a file beside it) and genai_config.json, which names its inputs and outputs."""
    import onnx

    source = read_checkpoint(checkpoint)
    config = source.config
    onnx.save(
        _build(source, options["bits"]),
        str(target / "model.onnx"),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
    )
    decoder = {
        "session_options": {"intra_op_num_threads": options["threads"], "log_id": "onnxruntime-genai"},
        "filename": "model.onnx",
        "head_size": source.head_dim,
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "num_hidden_layers": config["n_layer"],
        "num_key_value_heads": config["n_head"],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        # the genai name of a decoder without peculiarities
        "type": "llama",
        "context_length": config["n_positions"],
        "vocab_size": config["vocab_size"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": config["n_positions"], "past_present_share_buffer": True}
    text = json.dumps({"model": model, "search": search}, indent=1)
    (target / "genai_config.json").write_text(text, encoding="utf-8")


class Runner:
    """A loaded model; ``generate`` answers (tokens of each row, seconds from the start to each token)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(converted))

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        ids = np.array(prompts, dtype=np.int32)
        rows: list[list[int]] = [[] for _ in prompts]
        times = []
        start = time.perf_counter()
        parameters = self.genai.GeneratorParams(self.model)
        length = ids.shape[1] + new_tokens
        # min_length: the end token is never drawn
        parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
        generator = self.genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        for _ in range(new_tokens):
            generator.generate_next_token()
            for row, token in zip(rows, generator.get_next_tokens(), strict=True):
                row.append(int(token))
            times.append(time.perf_counter() - start)
        return rows, times
