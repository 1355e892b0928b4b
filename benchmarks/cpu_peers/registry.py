"""Every peer: its family, the width of its weights, and what its family needs to know."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        family: module of this package; ``--peer-python`` gives all peers of a family an environment.
        width: of the weights, the class it is compared in: "fp32", "bf16", "int8", "int4" or "nf4".
        bits: per weight with its scales that a token reads: of the layers' matrices, and of the head.
        options: passed to the family's ``convert`` and ``Runner``, beside ``threads``.
        slow_start: it takes minutes to start, so it runs only when it is asked for by name.
    """

    family: str
    width: str
    bits: tuple[float, float]
    options: dict = dataclasses.field(default_factory=dict)
    slow_start: bool = False


def _both(bits: float) -> tuple[float, float]:
    return bits, bits


PEERS = {
    "gpt2rt-fp32": Peer("gpt2rt_peer", "fp32", _both(32), {"dtype": "float32"}),
    "gpt2rt-bf16": Peer("gpt2rt_peer", "bf16", _both(16), {"dtype": "bfloat16"}),
    "gpt2rt-int8": Peer("gpt2rt_peer", "int8", _both(8), {"quantization": {"scheme": "int8"}}),
    # groups of 64 with a float16 scale; embedding and head stay int8
    "gpt2rt-int4": Peer("gpt2rt_peer", "int4", (4.25, 8), {"quantization": {"scheme": "int4"}}),
    "gpt2rt-int4-g32": Peer(
        "gpt2rt_peer", "int4", _both(4.5), {"quantization": {"scheme": "int4", "group_size": 32, "embeddings": "int4"}}
    ),
    # blocks of 64 with a float32 scale
    "gpt2rt-nf4": Peer("gpt2rt_peer", "nf4", (4.5, 8), {"quantization": {"scheme": "nf4"}}),
    "hf-eager-fp32": Peer("transformers_peer", "fp32", _both(32), {"dtype": "float32", "attention": "eager"}),
    "hf-sdpa-fp32": Peer("transformers_peer", "fp32", _both(32), {"dtype": "float32", "attention": "sdpa"}),
    "hf-sdpa-bf16": Peer("transformers_peer", "bf16", _both(16), {"dtype": "bfloat16", "attention": "sdpa"}),
    # the head stays bfloat16
    "hf-bnb-nf4": Peer("transformers_peer", "nf4", (4.5, 16), {"dtype": "bfloat16", "attention": "sdpa", "nf4": True}),
    "torch-compile-fp32": Peer("torch_compiled", "fp32", _both(32), {"dtype": "float32"}, True),
    "torch-compile-bf16": Peer("torch_compiled", "bf16", _both(16), {"dtype": "bfloat16"}, True),
    "torchao-int8": Peer("torch_compiled", "int8", _both(8), {"dtype": "bfloat16", "int8": True}, True),
    # a float32 scale for each 32 weights
    "ort-fp32": Peer("onnx_genai", "fp32", _both(32), {"bits": 32}),
    "ort-int8": Peer("onnx_genai", "int8", _both(9), {"bits": 8}),
    "ort-int4": Peer("onnx_genai", "int4", _both(5), {"bits": 4}),
    "ov-fp32": Peer("openvino_peer", "fp32", _both(32), {"weights": None, "precision": "f32"}),
    "ov-bf16": Peer("openvino_peer", "bf16", _both(16), {"weights": None, "precision": "bf16"}),
    "ov-int8": Peer("openvino_peer", "int8", _both(8), {"weights": {"bits": 8}}),
    # nncf keeps the head in int8
    "ov-int4": Peer(
        "openvino_peer", "int4", (4.25, 8), {"weights": {"bits": 4, "sym": True, "group_size": 64, "ratio": 1.0}}
    ),
    "ct2-fp32": Peer("ctranslate2_peer", "fp32", _both(32), {"compute_type": "float32"}),
    "ct2-int8": Peer("ctranslate2_peer", "int8", _both(8), {"compute_type": "int8"}),
    "lcpp-f32": Peer("llama_cpp_peer", "fp32", _both(32), {"file_type": "ALL_F32"}),
    "lcpp-bf16": Peer("llama_cpp_peer", "bf16", _both(16), {"file_type": "MOSTLY_BF16"}),
    "lcpp-q8_0": Peer("llama_cpp_peer", "int8", _both(8.5), {"file_type": "MOSTLY_Q8_0"}),
    # the head is Q6_K
    "lcpp-q4_0": Peer("llama_cpp_peer", "int4", (4.5, 6.5625), {"file_type": "MOSTLY_Q4_0"}),
}


def family_module(peer: Peer) -> ModuleType:
    return importlib.import_module(f"{__package__}.{peer.family}")
