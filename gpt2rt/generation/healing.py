"""Token healing: the last token of a prompt makes way for one that begins with the same text.

A prompt that ends in ``http:`` ends in a token ``:``, and the model, which has learnt ``://`` as one token, is unlikely
to go on with ``//``. So the last token is taken off and chosen again among all tokens that begin with its text.

Source: Lundberg, "The Art of Prompt Design: Prompt Boundaries and Token Healing", 2023; the biases are transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

from gpt2rt.cache import Sequence
from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor

from .decode import new_cache
from .starts import BLOCK_SIZE, compute

# added to the score of every token that extends the last one, and to the last one itself on top of that: the prompt as
# it stands is slightly preferred
_EXTENSION_BIAS = 10.0
_SAME_BIAS = 1.0

# ends the last piece of a word in the vocabulary of OpenAI GPT
_END_OF_WORD = "</w>"


def heal_prompts(executor: Executor, prompts: ListLike[ListLike[int]], tokenizer: Any) -> list[list[int]]:
    """The prompts with their last tokens chosen again.

    As in transformers, the text after a prompt's last special token is stripped of white space at both ends and encoded
    anew first. A prompt of one token, or one that ends in a special token, stays as it is.

    Args:
        executor: of the model.
        prompts: ids without padding, at least one each.
        tokenizer: of the model.

    Returns:
        As many prompts; they may be shorter or longer than before.

    Raises:
        RequestError: there is no tokenizer, or the text of a prompt does not fit the model's positions.
    """
    if tokenizer is None:
        raise RequestError("token_healing needs the tokenizer: generate(..., token_healing=True, tokenizer=tokenizer)")
    plan = executor.plan
    special = set(tokenizer.all_special_ids)
    pieces = [(piece, token) for piece, token in tokenizer.get_vocab().items() if token < plan.vocab_size]
    pieces = [(piece, token) for piece, token in pieces if token not in special]
    healed = [_encoded_anew(list(prompt), tokenizer, special) for prompt in prompts]
    choices: dict[int, list[int]] = {}
    for index, ids in enumerate(healed):
        if len(ids) > 1 and ids[-1] not in special:
            last = tokenizer.convert_ids_to_tokens(ids[-1]).removesuffix(_END_OF_WORD)
            extensions = [token for piece, token in pieces if piece.startswith(last)]
            if len(extensions) > 1:
                choices[index] = extensions
    if not choices:
        return healed
    texts = [healed[index][:-1] for index in choices]
    longest = max(len(text) for text in texts)
    if longest > plan.n_positions:
        raise RequestError(
            f"a prompt has {longest + 1} tokens, but the model has n_positions={plan.n_positions}; shorten it"
        )
    num_blocks = sum(-(-len(text) // BLOCK_SIZE) for text in texts)
    cache = new_cache(executor, num_blocks, f"{len(texts)} prompts", "ask for fewer or shorter rows")
    logits = compute(executor, cache, texts, [Sequence(cache) for _ in texts])
    for row, (index, extensions) in enumerate(choices.items()):
        scores = logits[row].clone()
        scores[extensions] += _EXTENSION_BIAS
        scores[healed[index][-1]] += _SAME_BIAS
        healed[index][-1] = int(scores.argmax())
    return healed


def _encoded_anew(prompt: list[int], tokenizer: Any, special: set[int]) -> list[int]:
    """A prompt whose text after the last special token was stripped and encoded again."""
    start = max((index + 1 for index, token in enumerate(prompt) if token in special), default=0)
    text = tokenizer.decode(prompt[start:], clean_up_tokenization_spaces=False).strip()
    if not text:
        return prompt
    return [*prompt[:start], *(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])]
