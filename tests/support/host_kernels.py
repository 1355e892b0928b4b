"""The cuda executor without its kernels: their definitions in torch do what they would, at the speed of a test.

Everything above the kernels is the executor's own: its sizes, buffers and padding, its decode loops, and what the
engine makes of them.
"""

import torch

from gpt2rt.graph import StepBatch, chain, device_loop, executor
from gpt2rt.graph.eager import EagerExecutor
from gpt2rt.kernels.advance import advance_ref
from gpt2rt.kernels.embedding_rows import embedding_rows_ref
from gpt2rt.kernels.sampling_refs import argmax_ref, sample_ref, uniforms_ref


def use_host_kernels(monkeypatch):
    """Make ``executor="cuda"`` run on the CPU until the test ends."""
    monkeypatch.setattr(executor, "_why_not_cuda", lambda plan: "")
    monkeypatch.setattr(chain.Chain, "run", _run)
    monkeypatch.setattr(chain.Chain, "embed", _embed)
    monkeypatch.setattr(device_loop, "advance_triton", _advance)
    monkeypatch.setattr(device_loop, "argmax_into_triton", _argmax_into)
    monkeypatch.setattr(device_loop, "sample_into_triton", _sample_into)
    monkeypatch.setattr(device_loop, "uniforms_into_triton", _uniforms_into)


def _embed(self, buffers):
    buffers.x.copy_(embedding_rows_ref(buffers.input_ids, buffers.position_ids, self._wte, self._wpe))


def _advance(*tensors, keys, embedding, pdl):
    assert keys is None
    advance_ref(*tensors, embedding=embedding)


def _run(self, buffers, cache, max_query_len, *, hidden=True, chosen=None, in_loop=False):
    """A step on what is in the buffers; what padding gives is NaN, and it has no slot."""
    if in_loop:
        # the step before has embedded these tokens
        embedded = buffers.x.clone()
        _embed(self, buffers)
        assert torch.equal(buffers.x, embedded)
    live = int((buffers.seq_lens > 0).sum())
    decodes = buffers.size.num_splits > 0
    # sequences that have ended may stand between others
    places = buffers.seq_lens.nonzero().flatten() if decodes else torch.arange(live)
    rows = places if decodes else torch.arange(int(buffers.query_start_loc[live]))
    padding = torch.ones(buffers.size.num_tokens, dtype=torch.bool)
    padding[rows] = False
    assert (buffers.slot_mapping[padding] == -1).all()
    buffers.logits.fill_(torch.nan)
    buffers.hidden.fill_(torch.nan)
    if not live:
        return None
    wanted = torch.arange(live) if decodes else buffers.logits_indices
    batch = StepBatch(
        input_ids=buffers.input_ids[rows],
        position_ids=buffers.position_ids[rows],
        query_start_loc=torch.arange(live + 1, dtype=torch.int32) if decodes else buffers.query_start_loc[: live + 1],
        seq_lens=buffers.seq_lens[places],
        block_table=buffers.block_table[places],
        slot_mapping=buffers.slot_mapping[rows],
        logits_indices=wanted,
        max_query_len=1 if decodes else max_query_len,
        max_seq_len=int(buffers.seq_lens.max()),
    )
    found = EagerExecutor(self.plan).step(batch, cache, return_hidden=True)
    targets = places if decodes else torch.arange(len(wanted))
    buffers.hidden[targets] = found.hidden
    if found.logits is not None:
        buffers.logits[targets] = found.logits
    return None


def _argmax_into(scores, out, maxima, places, *, finite):
    out.copy_(argmax_ref(scores, finite))


def _sample_into(scores, uniforms, out, work, *, temperature=None, top_k=None, top_p=None, min_p=None, finite=False):
    out.copy_(sample_ref(scores, uniforms, temperature, top_k, top_p, min_p, None, False, finite))


def _uniforms_into(seeds, requests, choices, positions, out, *, advance=0):
    out.copy_(uniforms_ref(seeds, requests, choices, positions))
    positions += advance
