"""How the files in this folder were made: by the TensorFlow and Flax classes, which transformers 5 no longer has.

Run once, in an environment of its own, with transformers 4.57.6, tensorflow-cpu 2.21, tf-keras 2.21, flax 0.12 and jax
0.10; the tests only read the result. ``expected.json`` holds what those classes compute from the same weights.
"""

import json
import os
import pathlib

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
import transformers as t

HERE = pathlib.Path(__file__).resolve().parent
SIZES = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 6}
IDS = np.array([[1, 5, 7, 9]])


def record(folder, outputs):
    values = {name: np.asarray(value, np.float32).tolist() for name, value in outputs.items()}
    (folder / "expected.json").write_text(json.dumps({"input_ids": IDS.tolist(), **values}) + "\n")


def tensorflow(name, model, folder):
    rng = np.random.default_rng(0)
    inputs = tf.constant(IDS[None] if "Double" in name else IDS)
    model(inputs)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape).astype("float32") * 0.5)
    model.save_pretrained(folder)
    outputs = model(inputs)
    record(folder, {key: outputs[key] for key in ("logits", "mc_logits") if key in outputs})


def flax(model, folder):
    rng = np.random.default_rng(0)
    model.params = jax.tree_util.tree_map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5, p.dtype), model.params)
    model.save_pretrained(folder)
    record(folder, {"logits": model(IDS)["logits"]})


if __name__ == "__main__":
    gpt2 = t.GPT2Config(**SIZES, n_inner=12, bos_token_id=0, eos_token_id=0)
    tensorflow("TFGPT2DoubleHeadsModel", t.TFGPT2DoubleHeadsModel(gpt2), HERE / "tf-gpt2-double-heads")
    # its blocks compute GELU by erf, whatever config.afn says; gelu_python is the name of that function here
    gpt1 = t.OpenAIGPTConfig(**SIZES, afn="gelu_python", num_labels=3, pad_token_id=0)
    tensorflow(
        "TFOpenAIGPTForSequenceClassification",
        t.TFOpenAIGPTForSequenceClassification(gpt1),
        HERE / "tf-openai-gpt-classifier",
    )
    untied = t.GPT2Config(
        **SIZES, n_inner=12, tie_word_embeddings=False, add_cross_attention=True, bos_token_id=0, eos_token_id=0
    )
    flax(t.FlaxGPT2LMHeadModel(untied), HERE / "flax-gpt2")
