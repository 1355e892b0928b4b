"""Saving models: the files that transformers reads too, written all together or not at all."""

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from gpt2rt.checkpoint.write import save_checkpoint, unique_tensors
from gpt2rt.config import PretrainedConfig
from gpt2rt.errors import CheckpointError


class SavingModel(nn.Module):
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
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write ``config.json``, ``generation_config.json`` and safetensors so that transformers reads them too.

        Tied weights are written once. All files are replaced together at the end; when writing fails the older ones
        stand. Weight files of an older save in the same folder are removed.

        Args:
            save_directory: a folder, made if needed.
            state_dict: weights to write instead of the model's own.
            max_shard_size: bytes, or a size such as "5GB"; larger checkpoints are split and get an index.
            variant: as in ``model.<variant>.safetensors``.
            safe_serialization: must be True; gpt2rt does not write pickles.
            is_main_process: False writes nothing, for training in several processes.
            push_to_hub: upload afterwards; the keywords are those of :meth:`push_to_hub`.
        Raises:
            CheckpointError: writing failed.
            ValueError: an argument is invalid.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: gpt2rt writes safetensors only, no pickles")
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained got unknown keywords: {', '.join(sorted(kwargs))}")
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
        save_checkpoint(save_directory, tensors, texts, max_shard_size, variant)
        if push_to_hub:
            self._upload(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> str:
        """Save the model into a temporary folder and upload it.

        Args:
            repo_id: "user/name"; made if it does not exist.
            max_shard_size: as in :meth:`save_pretrained`.
            **kwargs: ``private``, ``token``, ``revision``, ``create_pr``, ``commit_message``.
        Returns:
            the address of the commit.
        Raises:
            CheckpointError: saving or uploading failed.
        """
        with tempfile.TemporaryDirectory(prefix="gpt2rt-") as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return self._upload(folder, repo_id=repo_id, **kwargs)

    def _upload(
        self,
        folder: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload model",
    ) -> str:
        from huggingface_hub import HfApi

        name = repo_id if repo_id is not None else Path(folder).name
        api = HfApi(token=token)
        try:
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name,
                folder_path=Path(folder),
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        # the hub client has exceptions of several families
        except Exception as error:
            raise CheckpointError(f"uploading to {name!r} failed: {error}") from error
        return str(commit)
