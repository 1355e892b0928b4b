"""Attentions and hidden states of a generation: the tokens are known, so the model's forward computes them again.

``generate`` runs the model as one graph, which keeps none of this. Steps are laid out as transformers does: the first
holds the whole prompt, each further one its newest token; without a cache each holds all tokens of the row so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .beams import BeamDecoder
from .continuation import Given
from .evaluating import evaluating
from .modes import Loop
from .outputs import Steps
from .past import cache_columns


class Replay:
    """The model's forward over the prompt of every row, then over their new tokens.

    Args:
        model: a language model.
        loop: that has ended.
        given: what the prompts had besides ids, or None.
        attentions, hidden_states: what is wanted.
        whole: each step holds all tokens so far.

    Attributes:
        attentions, hidden_states: for each step, of each layer; None if not wanted.
    """

    def __init__(
        self,
        model: Any,
        loop: Loop,
        given: Given | None,
        *,
        attentions: bool,
        hidden_states: bool,
        whole: bool = False,
    ) -> None:
        self._model = model
        self._loop = loop
        self._given = given
        self._wanted = {"output_attentions": attentions, "output_hidden_states": hidden_states}
        self._attentions: list[tuple[Tensor, ...]] = []
        self._hidden_states: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), evaluating(model):
            if isinstance(loop, BeamDecoder):
                self._whole_beams(loop) if whole else self._beams(loop)
            else:
                self._rows(whole)
        self.attentions: Steps | None = tuple(self._attentions) if attentions else None
        self.hidden_states: Steps | None = tuple(self._hidden_states) if hidden_states else None

    def _rows(self, whole: bool) -> None:
        plan = self._loop.plan
        count = plan.num_return_sequences
        new = [row.new_ids for row in self._loop.rows]
        num_new = max(len(ids) for ids in new)
        # the last token is never computed
        tokens = torch.tensor([(ids + [plan.pad_token_id] * num_new)[: num_new - 1] for ids in new], dtype=torch.int64)
        if whole:
            columns = torch.cat([plan.columns.repeat_interleave(count, dim=0), tokens], dim=1)
            output = self._forward(columns, None, count, num_new - 1)
            for step in range(num_new):
                self._keep(output, slice(0, plan.columns.size(1) + step))
            return
        cache = self._prompt(count)
        if num_new > 1:
            self._split(self._forward(tokens, cache, count, num_new - 1), num_new - 1)

    def _beams(self, loop: BeamDecoder) -> None:
        count = loop.plan.num_beams
        cache = self._prompt(count)
        for step, (origins, tokens) in enumerate(loop.moves[:-1]):
            cache.reorder_cache(torch.tensor(origins, device=loop.plan.executor.plan.device))
            output = self._forward(torch.tensor(tokens)[:, None], cache, count, step + 1)
            self._split(output, 1)

    def _whole_beams(self, loop: BeamDecoder) -> None:
        columns = loop.plan.columns.repeat_interleave(loop.plan.num_beams, dim=0)
        for step, (origins, tokens) in enumerate(loop.moves):
            self._keep(self._forward(columns, None, loop.plan.num_beams, step))
            columns = torch.cat([columns[origins], torch.tensor(tokens)[:, None]], dim=1)

    def _prompt(self, rows_per_prompt: int) -> Any:
        """Compute the first step, and return the cache after it."""
        given, plan = self._given, self._loop.plan
        if given is not None and given.embeds is not None:
            inputs = {"inputs_embeds": given.embeds.repeat_interleave(rows_per_prompt, dim=0)}
            width = given.embeds.size(1)
            cache = None
        else:
            past = 0 if given is None else given.past_columns
            columns = plan.columns if given is None else plan.columns[:, -(given.keep.size(1) - past) :]
            inputs = {"input_ids": columns.repeat_interleave(rows_per_prompt, dim=0).to(plan.executor.plan.device)}
            width = past + columns.size(1)
            cache = None
            if given is not None and given.past is not None:
                cache = tuple(
                    (keys.repeat_interleave(rows_per_prompt, dim=0), values.repeat_interleave(rows_per_prompt, dim=0))
                    for keys, values in given.past
                )
        output = self._call(inputs, cache, cache_columns(plan, rows_per_prompt, 0)[:, :width])
        self._keep(output, later=0)
        return output.past_key_values

    def _forward(self, tokens: Tensor, cache: Any, rows_per_prompt: int, num_new: int) -> Any:
        plan = self._loop.plan
        inputs = {"input_ids": tokens.to(plan.executor.plan.device)}
        if self._given is not None and self._given.token_type is not None:
            inputs["token_type_ids"] = torch.full_like(inputs["input_ids"], self._given.token_type)
        return self._call(inputs, cache, cache_columns(plan, rows_per_prompt, num_new))

    def _call(self, inputs: dict[str, Tensor], cache: Any, keep: Tensor) -> Any:
        """One forward over the last columns of ``keep``."""
        length = next(iter(inputs.values())).size(1)
        last = self._loop.plan.executor.plan.n_positions - 1
        # padding after a row's end may run past the positions; what it sees there is of no use anyway
        positions = (keep.long().cumsum(dim=1) - 1).clamp(0, last)[:, -length:]
        device = self._loop.plan.executor.plan.device
        return self._model.base_model(
            **inputs,
            past_key_values=cache,
            attention_mask=keep.long().to(device),
            position_ids=positions.to(device),
            use_cache=True,
            return_dict=True,
            **self._wanted,
        )

    def _split(self, output: Any, count: int) -> None:
        """Take the last ``count`` queries of an output as steps of their own."""
        for step in range(count):
            # a query sees nothing after itself, and a step knows nothing of later ones
            self._keep(output, slice(step, step + 1), count - 1 - step)

    def _keep(self, output: Any, queries: slice = slice(None), later: int | None = None) -> None:
        """Take some queries of an output as a step, without the ``later`` last keys; None: as many keys as queries."""
        if self._wanted["output_attentions"]:
            keys = queries if later is None else slice(0, output.attentions[0].size(3) - later)
            self._attentions.append(tuple(probs[:, :, queries, keys] for probs in output.attentions))
        if self._wanted["output_hidden_states"]:
            self._hidden_states.append(tuple(state[:, queries] for state in output.hidden_states))
