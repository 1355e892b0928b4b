"""Fixtures shared by all tests."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# tests leave nothing in the home folder; those of the cache itself turn it on in a folder of their own
os.environ["GPT2RT_PACKED_CACHE"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores: threads of one would only wait for those of another, at full speed
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def test_data():
    """Folder with the real vocabularies: ``$GPT2RT_TEST_DATA``, else ``../shared/data`` beside the repository."""
    for folder in (os.environ.get("GPT2RT_TEST_DATA"), ROOT.parent / "shared" / "data"):
        if folder and pathlib.Path(folder, "gpt2", "vocab.json").exists():
            return pathlib.Path(folder)
    pytest.skip("the real vocabularies are not here; set GPT2RT_TEST_DATA to a folder with gpt2/vocab.json")


class _Transformers:
    """transformers, and copies of our models in its classes."""

    def __init__(self):
        import transformers

        transformers.logging.set_verbosity_error()
        self.module = transformers

    def copy_of(self, model, attn_implementation="eager"):
        config = self.module.GPT2Config(**model.config.to_dict(), attn_implementation=attn_implementation)
        copy = getattr(self.module, type(model).__name__)(config).eval()
        copy.load_state_dict(model.state_dict(), strict=True)
        return copy.to(model.dtype)


@pytest.fixture(scope="session")
def hf():
    """transformers as the reference; see :class:`_Transformers`."""
    return _Transformers()
