"""CTranslate2 (``pip install ctranslate2``; measured with 4.8.5).

The model is written through the package's own specification classes, as its transformers converter does, which would
want a tokenizer; ids stand for tokens ("7" is token 7). int8 is the package's own quantisation at load time.
"""

from __future__ import annotations

import pathlib
import time

from .weights import read_checkpoint

REQUIRES = CONVERT_REQUIRES = {"ctranslate2": "ctranslate2"}


def convert(checkpoint: str, target: pathlib.Path, options: dict) -> None:
    """Write model.bin, config.json and vocabulary.json in CTranslate2's format."""
    from ctranslate2.specs import common_spec, transformer_spec

    source = read_checkpoint(checkpoint)
    config = source.config
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["n_layer"], config["n_head"], pre_norm=True, activation=common_spec.Activation.GELUTanh
    )

    def norm(target_spec, name: str) -> None:
        target_spec.gamma, target_spec.beta = source[f"{name}.weight"], source[f"{name}.bias"]

    def linear(target_spec, name: str) -> None:
        target_spec.weight, target_spec.bias = source.linear(name)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = source["wte.weight"]
    decoder.position_encodings.encodings = source["wpe.weight"]
    decoder.projection.weight = source["wte.weight"]
    norm(decoder.layer_norm, "ln_f")
    for number, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{number}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{number}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{number}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{number}.ln_2")
        linear(layer.ffn.linear_0, f"h.{number}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{number}.mlp.c_proj")
    spec.register_vocabulary([str(token) for token in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config.get("layer_norm_epsilon", 1e-5)
    spec.validate()
    spec.optimize(quantization=None)
    spec.save(str(target))


class Runner:
    """A loaded model; ``generate`` answers (tokens of each row, seconds from the start to each token)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(converted),
            device="cpu",
            compute_type=options["compute_type"],
            inter_threads=1,
            intra_threads=options["threads"],
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        tokens = [[str(token) for token in prompt] for prompt in prompts]
        # the callback is called once a row and step; the last row's call ends the step
        times = [0.0] * new_tokens

        def note(step) -> bool:
            times[step.step] = time.perf_counter() - start
            return False

        start = time.perf_counter()
        results = self.generator.generate_batch(
            tokens,
            # without this the prompt is read token by token
            include_prompt_in_result=False,
            max_length=new_tokens,
            # no row ends early
            min_length=new_tokens,
            sampling_topk=1,
            callback=note,
        )
        return [[int(token) for token in result.sequences[0]] for result in results], times
