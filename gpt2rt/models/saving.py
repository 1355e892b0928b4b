"""Saving models: the files that transformers reads too, written all together or not at all."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpt2rt.checkpoint.upload import PushToHub, upload, upload_options
from gpt2rt.checkpoint.write import save_checkpoint, unique_tensors

from .quantizable import QuantizableModel
from .quantized import PARTS
from .quantized_saving import LAYOUTS, describe, in_bitsandbytes, own_tensors


class SavingModel(QuantizableModel, PushToHub):
    """A module with a config, and with ``save_pretrained`` and ``push_to_hub``."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        *,
        safe_serialization: bool = True,
        quantization_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write ``config.json``, ``generation_config.json`` and safetensors so that transformers reads them too.

        Tied weights are written once. All files are replaced together at the end; when writing fails the older ones
        stand. Weight files of an older save in the same folder are removed.

        Args:
            save_directory: a folder, made if needed.
            is_main_process: False writes nothing, for training in several processes.
            state_dict: weights to write instead of the model's own.
            push_to_hub: upload the files written afterwards; further keywords are those of :meth:`push_to_hub`, and
                ``repo_id`` is the folder's name by default.
            max_shard_size: bytes, or a size such as "5GB"; larger checkpoints are split and get an index.
            variant: as in ``model.<variant>.safetensors``.
            token: access token for ``push_to_hub``.
            safe_serialization: must be True; gpt2rt does not write pickles.
            quantization_format: of a quantised model: "gpt2rt", or "bitsandbytes", which transformers reads with
                bitsandbytes; by default that of the checkpoint or config it was made from.
        Raises:
            CheckpointError: writing failed.
            ValueError: an argument is invalid, or is one of transformers' that gpt2rt does not honour.
            TypeError: an unknown keyword.
        """
        options = upload_options(kwargs, push_to_hub)
        if not safe_serialization:
            raise ValueError("safe_serialization=False: gpt2rt writes safetensors only, no pickles")
        self._check_quantization_format(quantization_format, state_dict)
        if not is_main_process:
            return
        self.config.validate()
        state = dict(self.state_dict() if state_dict is None else state_dict)
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        layers = self._quantized_layers()
        codes = {f"{name}.{part}" for name in layers for part in PARTS}
        floats = (tensor for key, tensor in state.items() if tensor.is_floating_point() and key not in codes)
        config.dtype = next((tensor.dtype for tensor in floats), None)
        ties = self._active_ties()
        # a tied layer's scales and zero points are its embedding's as well
        ties |= {
            t + part.removeprefix("weight"): s + part.removeprefix("weight") for t, s in ties.items() for part in PARTS
        }
        tensors = unique_tensors(state, ties)
        config.__dict__.pop("quantization_config", None)
        if layers:
            said = describe(self, self._quantization)
            fields = said.to_dict()
            if (quantization_format or self.quantization_method) == "bitsandbytes":
                tensors, fields = in_bitsandbytes(self, tensors, said)
            else:
                tensors = own_tensors(self, tensors, said)
            config.quantization_config = fields
        texts = {"config.json": config.to_json_string()}
        generation_config = getattr(self, "generation_config", None)
        if generation_config is not None:
            texts["generation_config.json"] = generation_config.to_json_string()
        written = save_checkpoint(save_directory, tensors, texts, max_shard_size, variant)
        if push_to_hub:
            upload(save_directory, written, token=token, **options)

    def _check_quantization_format(self, asked: str | None, state_dict: Any) -> None:
        if asked is not None and asked not in LAYOUTS:
            raise ValueError(f"quantization_format = {asked!r}, but it must be one of {', '.join(LAYOUTS)}")
        if asked is not None and not self.is_quantized:
            raise ValueError(
                f"quantization_format = {asked!r}, but no layer is quantised; load with quantization=, or use "
                "gpt2rt.quantize_model"
            )

    def _push_saves_with(self) -> tuple[str, ...]:
        return ("max_shard_size", "quantization_format")
