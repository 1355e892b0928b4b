"""A small random GPT-2 whose likeliest token changes from step to step."""

import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel


def lively_model(**sizes):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(eos_token_id=None, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
        model.transformer.wpe.weight.normal_(std=3.0)
    return model
