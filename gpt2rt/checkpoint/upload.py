"""Uploading what was saved to a model hub."""

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gpt2rt.checkpoint.options import SAVE_REFUSED, SAVE_WITHOUT_EFFECT, refuse_options
from gpt2rt.errors import CheckpointError

# keywords of an upload, beside token
UPLOAD_KEYWORDS = frozenset({"repo_id", "private", "revision", "create_pr", "commit_message", "commit_description"})


def upload(
    folder: str | os.PathLike[str],
    names: Collection[str],
    *,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload files of a folder in one commit.

    Args:
        folder: where they are.
        names: of the files; others in the folder stay where they are.
        repo_id: "user/name", or "name" in the user's own space; made if it does not exist. None: the folder's name.
        private: of a repository that is made.
        token: access token; None or True uses the stored one.
        revision: the branch to commit to, made if it does not exist.
        create_pr: open a pull request instead.
        commit_message, commit_description: of the commit.
    Returns:
        the address of the commit, or of the pull request.
    Raises:
        CheckpointError: uploading failed.
    """
    from huggingface_hub import HfApi

    name = repo_id if repo_id is not None else Path(folder).resolve().name
    api = HfApi(token=token)
    try:
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=Path(folder),
            allow_patterns=list(names),
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {', '.join(sorted(names))}"[:80],
            commit_description=commit_description,
        )
    # the hub client has exceptions of several families
    except Exception as error:
        raise CheckpointError(f"uploading to {name!r} failed: {error}") from error
    # a commit's address is its text in some versions of the client and a field in others
    return str(getattr(commit, "pr_url", None) or getattr(commit, "commit_url", None) or commit)


def upload_options(kwargs: Mapping[str, Any], push_to_hub: bool) -> dict[str, Any]:
    """The keywords of :func:`upload` among the further ones of a ``save_pretrained``.

    Raises:
        ValueError: one is a keyword of transformers' that gpt2rt does not honour.
        TypeError: one is unknown, or has no effect without ``push_to_hub``.
    """
    options = refuse_options(kwargs, "save_pretrained", SAVE_REFUSED, SAVE_WITHOUT_EFFECT)
    unknown = sorted(set(options) - (UPLOAD_KEYWORDS if push_to_hub else frozenset()))
    if unknown:
        hint = "; they need push_to_hub=True" if UPLOAD_KEYWORDS.issuperset(unknown) else ""
        raise TypeError(f"save_pretrained got unknown keywords: {', '.join(unknown)}{hint}")
    return options


class PushToHub:
    """Adds ``push_to_hub`` to a class with ``save_pretrained(folder)``."""

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save into a temporary folder and upload all of it in one commit.

        Args:
            repo_id: "user/name", or "name" in the user's own space; made if it does not exist.
            **kwargs: ``private``, ``token``, ``revision``, ``create_pr``, ``commit_message``, ``commit_description``,
                and for models ``max_shard_size`` and ``quantization_format``, as in ``save_pretrained``.
        Returns:
            the address of the commit, or of the pull request.
        Raises:
            CheckpointError: saving or uploading failed.
            ValueError: a keyword of transformers' that gpt2rt does not honour.
            TypeError: an unknown keyword.
        """
        kwargs = refuse_options(kwargs, "push_to_hub", SAVE_REFUSED, SAVE_WITHOUT_EFFECT)
        saving = {name: kwargs.pop(name) for name in self._push_saves_with() if name in kwargs}
        unknown = sorted(set(kwargs) - UPLOAD_KEYWORDS - {"token"})
        if unknown:
            raise TypeError(f"push_to_hub got unknown keywords: {', '.join(unknown)}")
        with tempfile.TemporaryDirectory(prefix="gpt2rt-") as folder:
            # the class that this is mixed into has it
            self.save_pretrained(folder, **saving)  # type: ignore[attr-defined]
            return upload(folder, os.listdir(folder), repo_id=repo_id, **kwargs)

    def _push_saves_with(self) -> tuple[str, ...]:
        """Keywords of ``push_to_hub`` that go to ``save_pretrained``."""
        return ()
