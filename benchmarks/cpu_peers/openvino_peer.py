"""OpenVINO (``pip install optimum-intel nncf openvino``; measured with 2.2.0, 3.4.0 and 2026.4.1).

optimum-intel exports the checkpoint as a stateful graph (the key-value cache lives in the runtime) and compresses the
weights with nncf; it wants an older transformers than gpt2rt's tests, hence an environment of its own
(``--peer-python openvino=/path/to/python``). The graph then runs through the runtime's own inference request, without
transformers' loop. As OpenVINO GenAI does, the head is cut down to the last position.
"""

from __future__ import annotations

import pathlib
import time

import numpy as np

REQUIRES = {"openvino": "openvino"}
CONVERT_REQUIRES = {"openvino": "openvino", "optimum.intel": "optimum-intel", "nncf": "nncf"}


def convert(checkpoint: str, target: pathlib.Path, options: dict) -> None:
    """Write openvino_model.xml and .bin; ``options["weights"]``: arguments of OVWeightQuantizationConfig, or None."""
    import openvino
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    weights = options["weights"]
    quantization = OVWeightQuantizationConfig(**weights) if weights else None
    model = OVModelForCausalLM.from_pretrained(
        checkpoint,
        export=True,
        compile=False,
        # None would mean int8 for large models
        load_in_8bit=False if quantization is None else None,
        quantization_config=quantization,
        local_files_only=True,
    )
    graph = model.model
    _keep_last_position(graph)
    openvino.save_model(graph, str(target / "openvino_model.xml"), compress_to_fp16=False)


def _keep_last_position(graph) -> None:
    """Cut the rows that enter the head's matrix product down to the last one of each sequence."""
    from openvino import opset13

    node = graph.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input_value(0)
    numbers = [np.array([value], np.int64) for value in (-1, np.iinfo(np.int64).max, 1, 1)]
    last = opset13.slice(rows, *numbers)
    node.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()


class Runner:
    """A loaded model; ``generate`` answers (tokens of each row, seconds from the start to each token)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import openvino

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options["threads"]}
        if options.get("precision"):
            settings["INFERENCE_PRECISION_HINT"] = options["precision"]
        compiled = openvino.Core().compile_model(str(converted / "openvino_model.xml"), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.inputs = {name for port in compiled.inputs for name in port.names}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        ids = np.array(prompts, dtype=np.int64)
        num_rows, length = ids.shape
        mask = np.ones((num_rows, length + new_tokens), dtype=np.int64)
        beams = np.arange(num_rows, dtype=np.int32)
        rows: list[list[int]] = [[] for _ in prompts]
        times = []
        start = time.perf_counter()
        self.request.reset_state()
        past = 0
        for _ in range(new_tokens):
            total = past + ids.shape[1]
            feed = {"input_ids": ids, "attention_mask": mask[:, :total], "beam_idx": beams}
            if "position_ids" in self.inputs:
                feed["position_ids"] = np.tile(np.arange(past, total, dtype=np.int64), (num_rows, 1))
            self.request.infer(feed, share_inputs=True)
            tokens = self.request.get_tensor("logits").data[:, -1].argmax(-1)
            ids, past = tokens[:, None].astype(np.int64), total
            for row, token in zip(rows, tokens, strict=True):
                row.append(int(token))
            times.append(time.perf_counter() - start)
        return rows, times
