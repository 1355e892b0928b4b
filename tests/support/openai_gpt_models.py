"""Small OpenAI GPTs whose every part shows in the logits, and transformers' copies of them."""

import torch

from gpt2rt import OpenAIGPTConfig, OpenAIGPTLMHeadModel

TINY = {"vocab_size": 100, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}


def make(kind=OpenAIGPTLMHeadModel, seed=0, **fields):
    """A model in eval mode; norms and biases are random too."""
    torch.manual_seed(seed)
    model = kind(OpenAIGPTConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if ".ln_" in name and "weight" in name else 0.0, std=0.1)
    return model


def copy_of(hf, model):
    """The same model in transformers; ``hf`` is the fixture."""
    theirs = getattr(hf.module, type(model).__name__)(hf.module.OpenAIGPTConfig(**model.config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.to(model.dtype)


def random_ids(*shape, seed=1, vocab_size=100):
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths, width):
    """int64 mask [len(lengths), width], ones at the end of each row."""
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
