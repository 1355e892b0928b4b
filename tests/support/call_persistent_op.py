"""Calls the op of the persistent kernel in the library named, and prints what each call raised, as JSON.

Run by tests/test_cuda_persistent_op.py in a process of its own, under a stand-in for torch's CUDA functions. The op is
sent to its CUDA implementation with tensors of the CPU: it checks them and then finds no device.
"""

import json
import sys

import torch

torch.ops.load_library(sys.argv[1])

from gpt2rt.kernels.persistent_decode import DecodeLayer, pack_decode_weights, workspace_floats  # noqa: E402

HEADS, DIM, INNER, VOCAB, SPLITS = 2, 24, 70, 33, 2
E = HEADS * DIM
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def right() -> dict[str, object]:
    """Arguments by name, in order, that the kernel could run on."""
    half, ones = torch.float16, torch.ones
    layer = DecodeLayer(
        (ones(E), ones(E)),
        (ones(3 * E, E, dtype=half), None),
        (ones(E, E, dtype=half), None),
        (ones(E), ones(E)),
        (ones(INNER, E, dtype=half), None),
        (ones(E, INNER, dtype=half), None),
        1.0,
    )
    weights = pack_decode_weights([layer], (ones(E), ones(E)), ones(VOCAB, E, dtype=half), eps=1e-5)
    return {
        "stream": weights.stream,
        "norms": weights.norms,
        "scales": weights.scales,
        "eps": weights.eps,
        "activation": 1,
        "wte": ones(VOCAB, E, dtype=half),
        "wpe": ones(64, E, dtype=half),
        "input_ids": torch.zeros(1, dtype=torch.int64),
        "position_ids": torch.zeros(1, dtype=torch.int64),
        "slot_mapping": torch.zeros(1, dtype=torch.int64),
        "seq_lens": torch.ones(1, dtype=torch.int32),
        "block_table": torch.zeros((1, 4), dtype=torch.int32),
        "cache": torch.zeros((1, 2, 4, HEADS, 16, DIM), dtype=half),
        "workspace": torch.zeros(workspace_floats(E, E, INNER, HEADS, SPLITS)),
        "barrier": torch.zeros(1, dtype=torch.int32),
        "logits": torch.zeros(1, VOCAB),
        "hidden": torch.zeros(1, E),
        "chosen": torch.zeros(1, dtype=torch.int64),
        "inner": INNER,
        "num_splits": SPLITS,
        "blocks": 0,
    }


def outcome(call) -> str:
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    op, blocks = torch.ops.gpt2rt.persistent_decode_cuda.default, torch.ops.gpt2rt.persistent_blocks_cuda.default
    half, arguments = torch.float16, right()
    assert list(arguments) == [argument.name for argument in op._schema.arguments]
    wrong = {
        "right": {},
        "without hidden and chosen": {"hidden": None, "chosen": None},
        "stream too short": {"stream": arguments["stream"][:-16]},
        "stream not aligned": {"stream": torch.zeros(arguments["stream"].numel() + 8, dtype=torch.uint8)[8:]},
        "norms of half": {"norms": arguments["norms"].half()},
        "scales of two layers": {"scales": torch.ones(2)},
        "activation 7": {"activation": 7},
        "wte of another dtype": {"wte": arguments["wte"].bfloat16()},
        "wte of more rows": {"wte": torch.ones((VOCAB + 1, E), dtype=half)},
        "wpe too narrow": {"wpe": torch.ones((64, E - 8), dtype=half)},
        "wpe by columns": {"wpe": torch.ones((E, 64), dtype=half).t()},
        "ids of int32": {"input_ids": torch.zeros(1, dtype=torch.int32)},
        "no positions": {"position_ids": torch.zeros(0, dtype=torch.int64)},
        "lengths of int64": {"seq_lens": torch.ones(1, dtype=torch.int64)},
        "table of one dimension": {"block_table": torch.zeros(4, dtype=torch.int32)},
        "cache of float32": {"cache": arguments["cache"].float()},
        "cache of five dimensions": {"cache": arguments["cache"][0]},
        "cache not contiguous": {"cache": arguments["cache"].transpose(3, 4)},
        "head_dim 20": {"cache": torch.zeros((1, 2, 4, HEADS, 16, 20), dtype=half)},
        "workspace too small": {"workspace": arguments["workspace"][:-4]},
        "workspace for other splits": {"num_splits": 3},
        "barrier of two words": {"barrier": torch.zeros(2, dtype=torch.int32)},
        "logits of half": {"logits": arguments["logits"].half()},
        "hidden too long": {"hidden": torch.zeros(E + 1)},
        "chosen of two rows": {"chosen": torch.zeros(2, dtype=torch.int64)},
        "another inner size": {"inner": INNER + 8},
        "no splits": {"num_splits": 0},
    }
    found = {}
    for name, changes in wrong.items():
        values = {**arguments, **changes}.values()
        found[name] = outcome(lambda values=values: op.redispatch(KEYS, *values))
    like = torch.zeros(1, dtype=half)
    found["blocks"] = outcome(lambda: blocks.redispatch(KEYS, like, HEADS, DIM, E, INNER))
    found["blocks, head_dim 136"] = outcome(lambda: blocks.redispatch(KEYS, like, 1, 136, 136, INNER))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
