"""Small checkpoints to load and to damage."""

import pytest
import torch
from checkpoints import small_config

from gpt2rt import GPT2LMHeadModel


@pytest.fixture
def config():
    return small_config()


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def saved(model, tmp_path):
    """A folder with the model's files."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    return folder
