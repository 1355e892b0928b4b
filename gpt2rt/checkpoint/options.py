"""Keywords of transformers' ``from_pretrained`` and ``save_pretrained`` that gpt2rt does not honour, with the reasons.

docs/loading.md prints these tables.
"""

from collections.abc import Mapping
from typing import Any

_ONE_DEVICE = "gpt2rt runs a model on one device"
_NO_ADAPTERS = "gpt2rt loads no adapters; merge the adapter into the weights first"
_NO_CODE = "gpt2rt never runs code from a checkpoint"
_NO_OFFLOAD = "gpt2rt does not offload weights"

# of from_pretrained: name -> (values that ask for nothing and are accepted, why anything else is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_kwargs": ((None,), _NO_ADAPTERS),
    "adapter_name": ((None,), _NO_ADAPTERS),
    "allow_all_kernels": ((None, False), "gpt2rt always uses its own kernels"),
    "code_revision": ((None,), _NO_CODE),
    "custom_pipeline": ((None,), _NO_CODE),
    "device_mesh": ((None,), _ONE_DEVICE),
    "distributed_config": ((None,), _ONE_DEVICE),
    "experts_implementation": ((None,), "GPT-2 has no experts"),
    "fusion_config": ((None,), "gpt2rt fuses its own graph and takes no fusion config"),
    "gguf_file": ((None,), "gpt2rt does not read GGUF; convert the file to safetensors"),
    "kernel_config": ((None,), "gpt2rt always uses its own kernels"),
    "max_memory": ((None,), "gpt2rt puts a model on one device and does not split it"),
    "mirror": ((None,), "set the environment variable HF_ENDPOINT instead"),
    "offload_buffers": ((None, False), _NO_OFFLOAD),
    "offload_folder": ((None,), _NO_OFFLOAD),
    "offload_state_dict": ((None, False), _NO_OFFLOAD),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY instead"),
    "tp_plan": ((None,), _ONE_DEVICE),
    "tp_size": ((None,), _ONE_DEVICE),
    "tqdm_class": ((None,), "gpt2rt shows huggingface_hub's progress bars; HF_HUB_DISABLE_PROGRESS_BARS=1 hides them"),
    "use_auth_token": ((None,), "pass token instead"),
}

# of from_pretrained: name -> why any value gives the same
WITHOUT_EFFECT: dict[str, str] = {
    "_fast_init": "loaded weights are never initialised first",
    "low_cpu_mem_usage": "models are always built empty and filled tensor by tensor",
    "resume_download": "downloads always resume",
    "use_kernels": "gpt2rt always uses its own kernels",
}

# of save_pretrained, as above
SAVE_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "distributed_checkpoint": ((None, False), "gpt2rt saves from one process"),
    "save_function": ((None,), "gpt2rt writes safetensors itself"),
    "tags": ((None,), "gpt2rt writes no model card; add tags on the model's page"),
    "use_auth_token": ((None,), "pass token instead"),
    "use_temp_dir": ((None,), "push_to_hub always uploads from a temporary folder"),
}

# of save_pretrained, as above
SAVE_WITHOUT_EFFECT: dict[str, str] = {
    "save_original_format": "names and layout are those of the original checkpoints either way",
    "save_peft_format": "there are no adapters to save",
}


def refuse_options(
    kwargs: Mapping[str, Any],
    call: str = "from_pretrained",
    refused: Mapping[str, tuple[tuple[Any, ...], str]] = REFUSED,
    without_effect: Mapping[str, str] = WITHOUT_EFFECT,
) -> dict[str, Any]:
    """``kwargs`` without the names that gpt2rt knows but does not honour.

    Raises:
        ValueError: one of them asks for something; the message says why it is refused.
    """
    for name, (harmless, reason) in refused.items():
        # identity: a tensor or an array must not be compared
        if name in kwargs and not any(kwargs[name] is value for value in harmless):
            raise ValueError(f"{call}: {name} is not supported: {reason}")
    return {name: value for name, value in kwargs.items() if name not in refused and name not in without_effect}
