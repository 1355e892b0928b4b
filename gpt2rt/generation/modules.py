"""The executor of last resort: a step as calls of the model's own forward.

A plan knows the published layers only. A model with forward hooks, adapters, pruned or parametrized layers computes
something else, and here ``generate`` does too. It is slower: every step goes through the modules one by one, keys and
values are copied between the paged cache and forward's, and sequences of unequal length take turns.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache
from gpt2rt.errors import RequestError
from gpt2rt.graph import Plan, StepBatch, StepOutput

from .evaluating import evaluating

#: its name, for ``generation_executor``
NAME = "modules"


class ModuleExecutor:
    """Runs steps by calling ``model.forward``, so that whatever hangs on its modules takes part.

    Args:
        model: a language model with ``config``, ``cache_class`` and a forward that takes ``past_key_values``,
            ``position_ids`` and ``logits_to_keep``. It is not kept alive.
    """

    name = NAME

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        config, weight = model.config, model.get_input_embeddings().weight
        #: sizes only: there are no nodes to run
        self.plan = Plan(
            nodes=(),
            n_layer=config.n_layer,
            n_head=config.n_head,
            head_dim=config.n_embd // config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            dtype=model.dtype,
            device=weight.device,
        )
        self.cache_dtype = self.plan.dtype

    def with_positions(self, wpe: Tensor) -> ModuleExecutor:
        """Refused: another table would change the caller's model."""
        raise RequestError(
            "token_type_ids cannot be given to generate while the model runs module by module; remove its hooks or "
            "merge what was put in place of its layers"
        )

    @torch.no_grad()
    def step(self, batch: StepBatch, cache: PagedKVCache, *, return_hidden: bool = False) -> StepOutput:
        """Run one step; arguments as those of every executor.

        Raises:
            ValueError: ``return_hidden``, which forward has no place for.
        """
        if return_hidden:
            raise ValueError("the executor of modules returns logits only; ask the model's forward for hidden states")
        starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        places: dict[int, list[int]] = {}
        for place, token in enumerate(batch.logits_indices.tolist()):
            places.setdefault(token, []).append(place)
        shape = (batch.logits_indices.numel(), self.plan.vocab_size)
        logits = torch.empty(shape, dtype=torch.float32, device=self.plan.device)
        alike: dict[tuple[int, int], list[int]] = {}
        for sequence, length in enumerate(lengths):
            query_len = starts[sequence + 1] - starts[sequence]
            alike.setdefault((query_len, length - query_len), []).append(sequence)
        model = self._model()
        assert model is not None
        with evaluating(model):
            for (query_len, past_len), sequences in alike.items():
                tokens = [range(starts[s], starts[s] + query_len) for s in sequences]
                wanted = sorted({i for row in tokens for i, token in enumerate(row) if token in places})
                rows = torch.tensor(tokens, device=self.plan.device)
                found = self._forward(model, batch, cache, rows, sequences, past_len, wanted)
                for row, values in zip(tokens, found, strict=True):
                    for i, value in zip(wanted, values, strict=True):
                        logits[places.get(row[i], [])] = value
        return StepOutput(logits, None)

    def _forward(
        self,
        model: Any,
        batch: StepBatch,
        cache: PagedKVCache,
        rows: Tensor,
        sequences: list[int],
        past_len: int,
        wanted: list[int],
    ) -> Tensor:
        """Sequences of one length: [num_seqs, len(wanted), vocab_size]; their keys and values go to the paged cache.

        Args:
            rows: [num_seqs, query_len], the tokens' places in the batch.
            wanted: the columns whose logits are asked for.
        """
        blocks = batch.block_table[sequences, : cache.blocks_for(past_len)].long()
        # (keys, values) of each layer, [num_seqs, n_head, past_len, head_dim]
        past = model.cache_class(
            tuple(pair) for pair in (cache.read(blocks, past_len, model.dtype) if past_len else ())
        )
        output = model(
            input_ids=batch.input_ids[rows],
            position_ids=batch.position_ids[rows],
            past_key_values=past,
            use_cache=True,
            # at least one: an empty choice of positions is nothing that every head can do
            logits_to_keep=torch.tensor(wanted or [rows.size(1) - 1], device=rows.device),
            return_dict=True,
        )
        slots = batch.slot_mapping[rows].reshape(-1)
        for layer, (keys, values) in enumerate(output.past_key_values):
            new_keys, new_values = (x[:, :, past_len:].transpose(1, 2).flatten(0, 1) for x in (keys, values))
            cache.write(layer, new_keys, new_values, slots)
        return output.logits[:, : len(wanted)].float()
