"""Writes checkpoints as transformers' TensorFlow and Flax classes wrote them, from a state dict of ours.

Layouts, read from transformers 4.57.6 and checked against files that those classes wrote (tests/checkpoint/golden):

- ``TFPreTrainedModel.save_pretrained`` calls Keras' ``save_weights``: a group per layer (``transformer``, ``score``,
  ``multiple_choice_head``) with the attribute ``weight_names``; in it a dataset per variable, named by the variable:
  ``<model>/<layer>/h_._0/attn/c_attn/weight:0``. The root has ``layer_names``, ``backend``, ``keras_version``, and an
  empty group ``top_level_model_weights``. Shards hold ``<layer>/...`` without the model's name; their index has it.
- Variables: ``TFConv1D`` weight [in, out], bias [1, out]; ``LayerNormalization`` gamma, beta; GPT-2's ``Embedding``
  embeddings; GPT's ``TFSharedEmbeddings`` weight and ``positions_embed/embeddings``; ``Dense`` kernel [in, out].
- ``FlaxPreTrainedModel.save_pretrained`` writes ``flax.serialization.to_bytes``: ``FlaxConv1D`` kernel [out, in],
  ``Dense`` kernel [in, out], ``LayerNorm`` scale, ``Embed`` embedding.
"""

import json
import re

import h5py
import msgpack
import numpy as np
import torch

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.(weight|bias)$")
NORM = re.compile(r"(^|\.)ln_\w+\.(weight|bias)$")


def own_tensors(model):
    """The state dict without the second name of the shared embedding."""
    state = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", True):
        state = {key: value for key, value in state.items() if key != "lm_head.weight"}
    return {key: value.detach().float().numpy() for key, value in state.items()}


def tensorflow_variable(key, value):
    """(name below the model's own name, array) of one tensor."""
    layer, _, rest = key.partition(".")
    if layer not in ("transformer", "score", "multiple_choice_head"):
        layer, rest = "transformer", key
    rest = re.sub(r"^h/(\d+)/", r"h_._\1/", rest.replace(".", "/"))
    if CONV1D.search(key):
        value = value[None] if key.endswith("bias") else value
    elif NORM.search(key):
        rest = rest.removesuffix("weight") + "gamma" if rest.endswith("weight") else rest.removesuffix("bias") + "beta"
    elif rest.startswith(("wte/", "wpe/", "positions_embed/")):
        rest = rest.removesuffix("weight") + "embeddings"
    elif layer != "transformer" and key.endswith("weight"):
        rest, value = rest.removesuffix("weight") + "kernel", value.T
    return f"{layer}/{rest}:0", np.ascontiguousarray(value)


def write_h5(path, model, name="tfgpt2lm_head_model"):
    """A whole model in one file, as Keras' ``save_weights`` writes it."""
    variables = dict(tensorflow_variable(key, value) for key, value in own_tensors(model).items())
    with h5py.File(path, "w") as file:
        layers = sorted({variable.split("/")[0] for variable in variables})
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.21.0"
        file.create_group("top_level_model_weights").attrs["weight_names"] = np.empty(0)
        for layer in layers:
            group = file.create_group(layer)
            held = {f"{name}/{v}": value for v, value in variables.items() if v.split("/")[0] == layer}
            group.attrs["weight_names"] = [variable.encode() for variable in held]
            for variable, value in held.items():
                group.create_dataset(variable, value.shape, dtype=value.dtype)[...] = value


def write_h5_shards(folder, model, name="tfgpt2lm_head_model_1", count=3):
    """The same in shards with an index, the first of which is empty, as ``tf_shard_checkpoint`` leaves it."""
    variables = dict(tensorflow_variable(key, value) for key, value in own_tensors(model).items())
    names = [f"tf_model-{number + 1:05d}-of-{count:05d}.h5" for number in range(count)]
    home = {variable: names[1 + number % (count - 1)] for number, variable in enumerate(variables)}
    for shard in names:
        with h5py.File(folder / shard, "w") as file:
            for variable, value in variables.items():
                if home[variable] == shard:
                    file.create_dataset(variable, value.shape, dtype=value.dtype)[...] = value
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in variables.values())},
        "weight_map": {f"{name}/{variable}": shard for variable, shard in home.items()},
    }
    (folder / "tf_model.h5.index.json").write_text(json.dumps(index))


def flax_parameter(key, tensor):
    """(levels, array) of one tensor; bfloat16 stays a torch tensor."""
    levels = key.split(".")
    if levels[-1] == "weight":
        if levels[-2].startswith("ln_"):
            levels[-1] = "scale"
        elif levels[-2] in ("wte", "wpe"):
            levels[-1] = "embedding"
        else:
            levels[-1], tensor = "kernel", tensor.t()
    return levels, tensor.contiguous()


def flax_array(tensor, shape=None, dtype=None, code=1):
    """An array as ``flax.serialization`` packs it."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    name = dtype or str(tensor.dtype).removeprefix("torch.")
    return msgpack.ExtType(code, msgpack.packb((shape or tuple(tensor.shape), name, data), use_bin_type=True))


def flax_chunks(tensor, size):
    """An array in flat pieces of ``size`` elements, as flax writes those beyond 1 GiB."""
    flat = tensor.contiguous().view(-1)
    pieces = [flax_array(flat[start : start + size]) for start in range(0, flat.numel(), size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(tensor.shape)},
        "chunks": {str(i): piece for i, piece in enumerate(pieces)},
    }


def flax_tree(state, pack=flax_array):
    tree = {}
    for key, tensor in state.items():
        levels, tensor = flax_parameter(key, tensor.detach())
        node = tree
        for level in levels[:-1]:
            node = node.setdefault(level, {})
        node[levels[-1]] = pack(tensor)
    return tree


def flax_state(model):
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state = {key: value for key, value in state.items() if key != "lm_head.weight"}
    return state


def write_msgpack(path, model, pack=flax_array):
    path.write_bytes(msgpack.packb(flax_tree(flax_state(model), pack), strict_types=True))


def write_msgpack_shards(folder, model, count=3):
    state = flax_state(model)
    names = [f"flax_model-{number + 1:05d}-of-{count:05d}.msgpack" for number in range(count)]
    home = {key: names[number % count] for number, key in enumerate(state)}
    for shard in names:
        part = {key: value for key, value in state.items() if home[key] == shard}
        (folder / shard).write_bytes(msgpack.packb(flax_tree(part), strict_types=True))
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in state.values())},
        "weight_map": {"/".join(flax_parameter(key, state[key])[0]): shard for key, shard in home.items()},
    }
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps(index))
