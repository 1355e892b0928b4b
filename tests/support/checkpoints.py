"""Small checkpoints to load and to damage, and tools to compare them."""

import json
import struct

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2rt import GPT2Config
from gpt2rt.models import GPT2Model, GPT2PreTrainedModel


class WithScore(GPT2PreTrainedModel):
    """A GPT-2 with a task head, as GPT2ForSequenceClassification has one."""

    def __init__(self, config, bias=False):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=bias)
        self.post_init()


def small_config(**fields):
    return GPT2Config(
        **{"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 16, "n_inner": 40, **fields}
    )


def safetensors_bytes(header, data=b""):
    """The bytes of a safetensors file, header and data as they are given."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def same_weights(a, b):
    """Whether two models hold the same values, bit for bit, under the same names."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key].to(left[key])) for key in left)


def edit(folder, change):
    """Rewrite a checkpoint's tensors: ``change`` gets the dictionary and may return another."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder
