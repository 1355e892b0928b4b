"""The only door to gpt2rt's kernels: one function per op, with its checks, its schema and its documentation."""

from ._library import ExtensionStatus, extension_status, op_forms
from .activation import bias_gelu_new
from .attention import paged_decode_attention, paged_prefill_attention, write_kv
from .block_pool import block_pool_allocate, block_pool_free, block_pool_incref, new_block_pool
from .embedding import embedding
from .fingerprint import FINGERPRINT_KEY_BYTES, fingerprint
from .linear import PANEL, linear, linear_gelu_new, linear_residual, pack_linear, packed_linear_bytes
from .log_probabilities import MAX_BEST, log_probabilities
from .norm import add_layer_norm, layer_norm
from .packed import WEIGHT_FORMATS, packed_linear, unpack_linear
from .penalties import count_tokens, penalties, reset_counts
from .quantized import has_kernel, pack_quantized, packed_quantized_bytes, quantized_linear
from .sampling import MAX_SCORES, WEIGHT_UNIT, argmax, sample, sampling_weights, uniforms
from .step import CPU_ISAS, MAX_TOP, cpu_isa, cpu_isa_limit, cpu_step, cpu_step_workspace_bytes, has_bfloat16_products
from .step_attention import step_attention

__all__ = [
    "CPU_ISAS",
    "FINGERPRINT_KEY_BYTES",
    "MAX_BEST",
    "MAX_SCORES",
    "MAX_TOP",
    "PANEL",
    "WEIGHT_FORMATS",
    "WEIGHT_UNIT",
    "ExtensionStatus",
    "add_layer_norm",
    "argmax",
    "bias_gelu_new",
    "block_pool_allocate",
    "block_pool_free",
    "block_pool_incref",
    "count_tokens",
    "cpu_isa",
    "cpu_isa_limit",
    "cpu_step",
    "cpu_step_workspace_bytes",
    "embedding",
    "extension_status",
    "fingerprint",
    "has_bfloat16_products",
    "has_kernel",
    "layer_norm",
    "linear",
    "linear_gelu_new",
    "linear_residual",
    "log_probabilities",
    "new_block_pool",
    "op_forms",
    "pack_linear",
    "pack_quantized",
    "packed_linear",
    "packed_linear_bytes",
    "packed_quantized_bytes",
    "paged_decode_attention",
    "paged_prefill_attention",
    "penalties",
    "quantized_linear",
    "reset_counts",
    "sample",
    "sampling_weights",
    "step_attention",
    "uniforms",
    "unpack_linear",
    "write_kv",
]

# the schemas exist now: let C++ register its forms for them
extension_status()
