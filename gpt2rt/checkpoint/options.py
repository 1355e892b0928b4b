"""Keywords of transformers' ``from_pretrained`` that gpt2rt does not honour, each with the reason."""

from typing import Any

# name -> (values that ask for nothing and are accepted, why anything else is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_kwargs": ((None,), "gpt2rt loads no adapters; merge the adapter into the weights first"),
    "adapter_name": ((None,), "gpt2rt loads no adapters; merge the adapter into the weights first"),
    "allow_all_kernels": ((None, False), "gpt2rt always uses its own kernels"),
    "custom_pipeline": ((None,), "gpt2rt never runs code from a checkpoint"),
    "code_revision": ((None,), "gpt2rt never runs code from a checkpoint"),
    "device_mesh": ((None,), "gpt2rt runs a model on one device"),
    "distributed_config": ((None,), "gpt2rt runs a model on one device"),
    "experts_implementation": ((None,), "GPT-2 has no experts"),
    "from_flax": ((None, False), "gpt2rt reads safetensors and pytorch .bin only; convert the checkpoint"),
    "from_tf": ((None, False), "gpt2rt reads safetensors and pytorch .bin only; convert the checkpoint"),
    "fusion_config": ((None,), "gpt2rt fuses its own graph and takes no fusion config"),
    "gguf_file": ((None,), "gpt2rt does not read GGUF; convert the file to safetensors"),
    "kernel_config": ((None,), "gpt2rt always uses its own kernels"),
    "key_mapping": ((None,), "gpt2rt knows GPT-2's key names only; rename the keys and pass state_dict"),
    "load_in_4bit": ((None, False), "gpt2rt does not quantise yet"),
    "load_in_8bit": ((None, False), "gpt2rt does not quantise yet"),
    "max_memory": ((None,), "gpt2rt puts a model on one device and does not split it"),
    "mirror": ((None,), "set the environment variable HF_ENDPOINT instead"),
    "offload_buffers": ((None, False), "gpt2rt does not offload weights"),
    "offload_folder": ((None,), "gpt2rt does not offload weights"),
    "offload_state_dict": ((None, False), "gpt2rt does not offload weights"),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY instead"),
    "quantization_config": ((None,), "gpt2rt does not quantise yet"),
    "resume_download": ((None, False, True), "downloads always resume"),
    "tp_plan": ((None,), "gpt2rt runs a model on one device"),
    "tp_size": ((None,), "gpt2rt runs a model on one device"),
    "tqdm_class": ((None,), "gpt2rt shows huggingface_hub's progress bars; HF_HUB_DISABLE_PROGRESS_BARS=1 hides them"),
    "use_kernels": ((None, False, True), "gpt2rt always uses its own kernels"),
    # without effect here: weights are always built empty, and read into their own memory instead of being mapped
    "low_cpu_mem_usage": ((None, False, True), ""),
    "disable_mmap": ((None, False, True), ""),
    "_fast_init": ((None, False, True), ""),
}


def refuse_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` without the names that gpt2rt knows but does not honour.

    Raises:
        ValueError: one of them asks for something; the message says why it is refused.
    """
    for name, (harmless, reason) in REFUSED.items():
        # identity: a tensor or an array must not be compared
        if name in kwargs and not any(kwargs[name] is value for value in harmless):
            raise ValueError(f"from_pretrained: {name} is not supported: {reason}")
    return {name: value for name, value in kwargs.items() if name not in REFUSED}
