"""Checkpoints of transformers' TensorFlow and Flax classes, with names and orientation as the models here have them.

transformers 5 removed those classes; the files stay. The names follow ``modeling_tf_pytorch_utils.py`` and
``modeling_flax_pytorch_utils.py`` of transformers 4.57:

    TensorFlow  <layer>/<model>/<layer>/h_._0/attn/c_attn/weight:0    "_._" separates the index of a list; matrices of
                c_attn, c_proj, c_fc, q_attn stand as here [in, out], their biases as [1, n]; ``kernel`` (of summary and
                score) is transposed; gamma, beta, embeddings -> weight, bias, weight
    Flax        transformer/h/0/attn/c_attn/kernel                    every ``kernel`` is transposed: FlaxConv1D keeps
                [out, in], Dense keeps [in, out]; scale, embedding -> weight
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from gpt2rt.checkpoint.hdf5_file import read_hdf5
from gpt2rt.checkpoint.msgpack_file import read_msgpack
from gpt2rt.checkpoint.stored import StoredTensor
from gpt2rt.errors import CheckpointError


class Format(NamedTuple):
    """A kind of checkpoint file of another framework; see :func:`convert` for the keys."""

    filename: str
    read: Callable[[Path], dict[str, StoredTensor]]
    key_of: Callable[[str], str]
    # the same for the names in an index of shards
    index_key_of: Callable[[str], str]


def tensorflow_key(name: str) -> str:
    """The key of a TensorFlow variable before its last level is renamed: ``transformer.h.0.attn.c_attn.weight``."""
    levels = name.removesuffix(":0").replace("_._", "/").split("/")
    # a file of one model repeats the layer after the model's own name; a shard, and safetensors, start with the layer
    again = next((i for i, level in enumerate(levels[1:], start=1) if level == levels[0]), 0)
    return ".".join(levels[again:])


def tensorflow_index_key(name: str) -> str:
    """The key of a name in ``tf_model.h5.index.json``, which starts with the model's own name."""
    return tensorflow_key(name.partition("/")[2])


def flax_key(name: str) -> str:
    """The key of a Flax parameter before its last level is renamed."""
    return name.replace("/", ".")


TENSORFLOW = Format("tf_model.h5", read_hdf5, tensorflow_key, tensorflow_index_key)
FLAX = Format("flax_model.msgpack", read_msgpack, flax_key, flax_key)

# last level there -> here
_RENAMED = dict.fromkeys(("kernel", "gamma", "scale", "embedding", "embeddings"), "weight") | {"beta": "bias"}


def final_key(key: str) -> str:
    """The key with its last level as the models here call it."""
    head, _, last = key.rpartition(".")
    return f"{head}.{_RENAMED.get(last, last)}".lstrip(".")


def convert(found: Mapping[str, StoredTensor], key_of: Callable[[str], str], path: Path) -> dict[str, StoredTensor]:
    """Tensors under the keys and in the shapes of the models here.

    Args:
        found: name in the file -> tensor.
        key_of: of a :class:`Format`.
        path: the file, for messages.
    Returns:
        key -> tensor; ``shape`` is still that of the file where ``transposed`` is set.
    Raises:
        CheckpointError: two names mean the same key.
    """
    converted: dict[str, StoredTensor] = {}
    origin: dict[str, str] = {}
    for name, stored in found.items():
        key = final_key(key_of(name))
        last = key_of(name).rpartition(".")[2]
        if key in converted:
            raise CheckpointError(f"{path} holds both {origin[key]!r} and {name!r}, which are the same weight {key!r}")
        if last == "bias" and len(stored.shape) == 2 and stored.shape[0] == 1:
            # TFConv1D keeps its bias as one row
            stored = stored._replace(shape=stored.shape[1:])
        converted[key] = stored._replace(transposed=last == "kernel" and len(stored.shape) == 2)
        origin[key] = name
    return converted
