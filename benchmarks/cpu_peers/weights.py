"""Read a GPT-2 checkpoint folder with numpy alone: the converters run in environments without gpt2rt or torch."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """config.json as a dict, and the float32 tensors by their published names (``wte.weight``, ``h.0.ln_1.bias``)."""

    config: dict
    tensors: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def linear(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(weight [out_features, in_features], bias [out_features]) of a Conv1D, which stores [in, out]."""
        return np.ascontiguousarray(self[f"{name}.weight"].T), self[f"{name}.bias"]

    @property
    def head_dim(self) -> int:
        return self.config["n_embd"] // self.config["n_head"]


def read_checkpoint(folder: str | pathlib.Path) -> Checkpoint:
    """Map the float32 tensors of ``model.safetensors``: eight bytes of header length, the header as JSON, the data."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    path = folder / "model.safetensors"
    if not path.is_file():
        raise OSError(f"{folder} holds no model.safetensors; sharded checkpoints are not read here")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{path}: {name} is {entry['dtype']}, expected F32; save the model in float32")
        begin, end = entry["data_offsets"]
        values = data[begin:end].view(np.float32)
        assert values.size == math.prod(entry["shape"])
        tensors[name.removeprefix("transformer.")] = values.reshape(entry["shape"])
    return Checkpoint(config, tensors)
