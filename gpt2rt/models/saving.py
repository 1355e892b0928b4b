"""Saving models: the files that transformers reads too, written all together or not at all."""

import copy
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from gpt2rt.checkpoint.upload import PushToHub, upload, upload_options
from gpt2rt.checkpoint.write import save_checkpoint, unique_tensors
from gpt2rt.config import PretrainedConfig


class SavingModel(nn.Module, PushToHub):
    """A module with a config, and with ``save_pretrained`` and ``push_to_hub``."""

    # state-dict key of a tied weight -> key of the weight it shares, both in the class' own names
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    config: PretrainedConfig

    def _active_ties(self) -> dict[str, str]:
        """The tied weights, if this model's config ties them."""
        return dict(self._tied_weights_keys) if getattr(self.config, "tie_word_embeddings", True) else {}

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
        Raises:
            CheckpointError: writing failed.
            ValueError: an argument is invalid, or is one of transformers' that gpt2rt does not honour.
            TypeError: an unknown keyword.
        """
        options = upload_options(kwargs, push_to_hub)
        if not safe_serialization:
            raise ValueError("safe_serialization=False: gpt2rt writes safetensors only, no pickles")
        if not is_main_process:
            return
        self.config.validate()
        state = dict(self.state_dict() if state_dict is None else state_dict)
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
        texts = {"config.json": config.to_json_string()}
        generation_config = getattr(self, "generation_config", None)
        if generation_config is not None:
            texts["generation_config.json"] = generation_config.to_json_string()
        tensors = unique_tensors(state, self._active_ties())
        written = save_checkpoint(save_directory, tensors, texts, max_shard_size, variant)
        if push_to_hub:
            upload(save_directory, written, token=token, **options)

    def _push_saves_with(self) -> tuple[str, ...]:
        return ("max_shard_size",)
