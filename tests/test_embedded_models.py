"""The models that ship inside the package load through the same code as any other, and have learnt something."""

import math

import pytest
import torch

from gpt2rt import AutoModelForCausalLM, AutoTokenizer
from gpt2rt.checkpoint.resolve import embedded_folder, embedded_models

SPEECH = "ROMEO:\nWhat is the matter? I will speak with him, and then we shall go to the king.\n"


def test_there_is_one_of_each_family():
    assert embedded_models() == ["gpt2rt/tiny-gpt1", "gpt2rt/tiny-gpt2"]


@pytest.mark.parametrize("name", embedded_models())
def test_an_embedded_model_is_small_and_trained(name):
    folder = embedded_folder() / name.removeprefix("gpt2rt/")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length == model.config.n_positions
    ids = tokenizer(SPEECH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        # the words of a sentence in any other order are less likely
        shuffled = ids[:, torch.randperm(ids.size(1), generator=torch.Generator().manual_seed(0))]
        worse = model(shuffled, labels=shuffled).loss.item()
    assert loss < 0.7 * math.log(len(tokenizer))
    assert loss + 1 < worse
    text = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])
    assert text.lower().startswith("romeo")


@pytest.mark.parametrize("name", embedded_models())
def test_the_card_says_what_the_files_are(name):
    folder = embedded_folder() / name.removeprefix("gpt2rt/")
    card = (folder / "README.md").read_text(encoding="utf-8")
    config = AutoModelForCausalLM.from_pretrained(name).config
    assert f"# {name}" in card
    assert f"{config.n_layer} layers, n_embd {config.n_embd}, {config.n_head} heads" in card
    assert f"dropout {config.resid_pdrop}" in card
