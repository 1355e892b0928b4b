"""Where a checkpoint's files are: a folder, an embedded model of this package, or a repository on a hub.

Only files that are asked for are fetched. All files of one checkpoint come from one commit, even if the branch moves
while they are read.
"""

import contextlib
import os
import reprlib
from pathlib import Path, PurePosixPath
from typing import Any

from gpt2rt.errors import CheckpointError

EMBEDDED_PREFIX = "gpt2rt/"

# files of other formats, recognised by name in a local folder to say what they are
FOREIGN_FILES = {
    "model.ckpt.index": "the TensorFlow checkpoint of OpenAI's GPT-2 release",
    "params_0.npy": "the numpy files of OpenAI's GPT release",
    "model.onnx": "an ONNX graph",
    "adapter_model.safetensors": "an adapter without its base model",
    "adapter_model.bin": "an adapter without its base model",
    "saved_model.pb": "a TensorFlow SavedModel",
}
# endings of the same kind
FOREIGN_SUFFIXES = {".gguf": "GGUF", ".ggml": "GGML", ".pt": "a pickle without a published layout"}

# seconds to wait for the hub's answer about one file; HF_HUB_ETAG_TIMEOUT overrides it
HUB_TIMEOUT_S = 5.0


def embedded_folder() -> Path:
    """The folder of the models that come with the package."""
    return Path(__file__).resolve().parent.parent / "assets"


def embedded_models() -> list[str]:
    """The ids of the models that come with the package, such as ``gpt2rt/tiny-gpt2``."""
    root = embedded_folder()
    return sorted(EMBEDDED_PREFIX + path.parent.name for path in root.glob("*/config.json"))


class Source:
    """The files of one checkpoint.

    A name is looked up in this order: an embedded id (``gpt2rt/...``); an existing local folder; a hub id.

    Args:
        name: a folder, an embedded id or a hub id.
        cache_dir: the hub cache, by default that of ``huggingface_hub``.
        force_download: fetch again what is in the cache.
        local_files_only: never ask the hub; ``HF_HUB_OFFLINE=1`` means the same for all calls.
        token: access token; True or None uses the stored one, False sends none.
        revision: branch, tag or commit.
        subfolder: where in the folder or repository the files are.
    Raises:
        CheckpointError: the folder or embedded model does not exist, or ``subfolder`` leads outside.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = "main",
        subfolder: str = "",
    ) -> None:
        self.name = _checked_name(name)
        self.revision = revision or "main"
        self._subfolder = _check_subfolder(subfolder)
        self._cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self._force_download = force_download
        self._local_files_only = local_files_only
        self._token = token
        self._commit: str | None = None
        # whether this object has asked the hub, and why that failed
        self._asked = False
        self._unreachable: str | None = None
        self._fetched: dict[str, Path | None] = {}
        # the local folder, or None for a hub repository
        self.folder = self._local_folder()

    def _local_folder(self) -> Path | None:
        known = embedded_models() if self.name.startswith(EMBEDDED_PREFIX) else []
        if self.name in known:
            path = embedded_folder() / self.name.removeprefix(EMBEDDED_PREFIX)
        else:
            path = Path(self.name).expanduser()
        if path.is_dir():
            folder = path / self._subfolder
            if not folder.is_dir():
                raise CheckpointError(f"{path} has no subfolder {self._subfolder!r}")
            return folder
        if path.exists():
            raise CheckpointError(f"{path} is a file, expected a folder with config.json and weights; pass the folder")
        if self.name.startswith(EMBEDDED_PREFIX):
            raise CheckpointError(
                f"{self.name!r} is no embedded model; known: {', '.join(known) or 'none in this installation'}"
            )
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1 or "\\" in self.name
        if looks_local:
            raise CheckpointError(f"the folder {self.name!r} does not exist (current folder: {os.getcwd()})")
        return None

    @property
    def is_hub(self) -> bool:
        """Whether the files come from a hub."""
        return self.folder is None

    def find(self, filename: str) -> Path | None:
        """The local path of a file, fetched if needed; None if the checkpoint has no such file.

        Raises:
            CheckpointError: the hub cannot be asked and has to be, the download failed, or what has this name in a
                folder is no file.
        """
        if self.folder is not None:
            path = self.folder / filename
            if path.is_file():
                return path
            if os.path.lexists(path):
                raise CheckpointError(
                    f"{path} is a link to nothing, a folder or a device, expected a regular file; put the file itself "
                    "there, or remove it"
                )
            return None
        if filename not in self._fetched:
            self._fetched[filename] = self._download(filename)
        return self._fetched[filename]

    def require(self, filename: str) -> Path:
        """The local path of a file that the checkpoint must have.

        Raises:
            CheckpointError: it does not have it, or the hub cannot be reached.
        """
        path = self.find(filename)
        if path is None:
            # without a config the folder may hold another kind of checkpoint; any other file is just missing
            foreign = self.foreign_hint() if filename == "config.json" else ""
            raise CheckpointError(f"{self.describe()} has no {filename}{foreign}{self.offline_hint()}")
        return path

    def foreign_hint(self) -> str:
        """The end of a "has no such file" message that names what a local folder holds instead, or an empty string."""
        if self.folder is None:
            return ""
        found = [f"{name} ({what})" for name, what in FOREIGN_FILES.items() if (self.folder / name).is_file()]
        for path in sorted(self.folder.iterdir()):
            if path.suffix in FOREIGN_SUFFIXES:
                found.append(f"{path.name} ({FOREIGN_SUFFIXES[path.suffix]})")
        return f"; found {', '.join(found[:3])}, which gpt2rt does not read: convert it to safetensors" if found else ""

    def describe(self) -> str:
        """The checkpoint in words, for messages."""
        if self.folder is not None:
            return str(self.folder)
        where = f", subfolder {self._subfolder!r}" if self._subfolder else ""
        return f"{self.name} (revision {self.revision!r}{where})"

    # ---- the hub ---------------------------------------------------------------------------------------------------

    def _offline(self) -> str | None:
        """The switch that forbids asking the hub, or None."""
        from huggingface_hub import constants

        if self._local_files_only:
            return "local_files_only=True"
        return "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else None

    def offline_hint(self) -> str:
        """The end of a "has no such file" message when only the cache could be asked, else an empty string."""
        if self.folder is not None:
            return ""
        switch = self._offline()
        if switch is not None:
            return f" in the cache, and {switch} forbids asking the hub; load it once with that switch off"
        if self._unreachable is not None:
            return (
                f" in the cache, and the hub cannot be reached ({self._unreachable}); check the connection and "
                "HF_ENDPOINT. For files fetched before, HF_HUB_OFFLINE=1 (or local_files_only=True) avoids asking"
            )
        return ""

    def _download(self, filename: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if self._commit is not None and not self._force_download:
            known, path = self._cached(filename)
            if known:
                return path
        if not self._asked and not self._offline():
            self._asked = True
            self._unreachable = self._probe(filename)
        try:
            found = hf_hub_download(
                self.name,
                filename,
                subfolder=self._subfolder or None,
                revision=self._commit or self.revision,
                cache_dir=self._cache_dir,
                token=self._token,
                local_files_only=self._local_files_only or self._unreachable is not None,
                force_download=self._force_download,
                library_name="gpt2rt",
                etag_timeout=_timeout(),
            )
        except LocalEntryNotFoundError as error:
            if self._offline() is None and self._unreachable is None:
                self._unreachable = _reason(error)
            # it may not exist at all, which only require() minds
            return None
        except GatedRepoError as error:
            raise CheckpointError(
                f"{self.describe()} is gated: ask for access on its page, then pass token=... or run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{self.name} has no revision {self.revision!r}; is it a branch, tag or commit?"
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self.describe()}: the hub knows no such repository, or your token may not see it. Check the name; "
                "for a private repository pass token=... or run `hf auth login`; for files fetched "
                "before set HF_HUB_OFFLINE=1"
            ) from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise CheckpointError(f"{self.name!r} is neither an existing folder nor a valid hub id: {error}") from error
        # httpx and requests have exceptions of their own that are no OSError; all of them mean a failed download
        except Exception as error:
            raise CheckpointError(
                f"fetching {filename} of {self.describe()} failed: {_reason(error)}. For files fetched before, "
                "HF_HUB_OFFLINE=1 (or local_files_only=True) avoids asking the hub"
            ) from error
        path = Path(found)
        if self._commit is None:
            self._commit = _commit_of(path)
        return path

    def _probe(self, filename: str) -> str | None:
        """Ask the hub once, without the long retries of a download; the reason if there is no answer, else None."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalTokenNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            url = hf_hub_url(self.name, filename, subfolder=self._subfolder or None, revision=self.revision)
            get_hf_file_metadata(url, token=self._token, timeout=_timeout())
        except (
            EntryNotFoundError,
            HFValidationError,
            LocalTokenNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        ):
            # an answer: the download will meet it again and turn it into a message
            return None
        # no connection, time-outs, proxies, servers in trouble: exceptions of several families
        except Exception as error:
            return _reason(error)
        return None

    def _cached(self, filename: str) -> tuple[bool, Path | None]:
        """(does the cache know the answer, the path or None for "the repository has no such file")."""
        from huggingface_hub import try_to_load_from_cache

        inside = str(PurePosixPath(self._subfolder) / filename) if self._subfolder else filename
        found = try_to_load_from_cache(self.name, inside, cache_dir=self._cache_dir, revision=self._commit)
        if isinstance(found, str):
            return True, Path(found)
        # a marker object says that the repository was asked before and has no such file
        return found is not None, None


def find_config(name: str | os.PathLike[str], **hub: Any) -> Path:
    """The ``config.json`` of a checkpoint, or ``name`` itself if that is a file.

    Args:
        name: a JSON file, a folder, an embedded id or a hub id.
        **hub: of :class:`Source`.
    Raises:
        CheckpointError: there is none, or the hub cannot be reached.
    """
    path = Path(_checked_name(name)).expanduser()
    return path if path.is_file() else Source(name, **hub).require("config.json")


def _checked_name(name: Any) -> str:
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"the checkpoint is given as a {type(name).__name__}, expected a folder, an embedded id "
            "('gpt2rt/tiny-gpt2') or a hub id"
        )
    text = os.fspath(name)
    # the limits of Linux; beyond them asking for the file fails in a less readable way
    if not text or len(text) > 4095 or max(map(len, text.split("/"))) > 255 or "\0" in text:
        raise CheckpointError(
            f"{reprlib.repr(text)} is no name of a folder or hub id: it is empty, too long or has a NUL in it"
        )
    return text


def _timeout() -> float:
    """Seconds to wait for an answer about one file."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else HUB_TIMEOUT_S


def _check_subfolder(subfolder: str | None) -> str:
    path = PurePosixPath(subfolder or "")
    if path.is_absolute() or ".." in path.parts:
        raise CheckpointError(
            f"subfolder = {subfolder!r} leads outside the checkpoint; give a relative path without '..'"
        )
    return "" if str(path) == "." else str(path)


def _commit_of(path: Path) -> str | None:
    """The commit in a cache path ``.../snapshots/<commit>/...``."""
    parts = path.parts
    with contextlib.suppress(ValueError, IndexError):
        return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]
    return None


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
