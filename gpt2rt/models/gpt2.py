"""GPT-2: the bare model and the language model.

    x = wte[ids] + wpe[positions]
    x = h.0(x), h.1(x), ...           (gpt2_blocks.py)
    logits = lm_head(ln_f(x))

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Names of modules and parameters,
arguments of forward and its results are those of transformers. Here the layers call each other one by one, so that
hooks, masks, gradients and intermediate results all work; ``generate`` runs the same weights as one graph, made from
``build_graph``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2rt.config import GPT2Config
from gpt2rt.generation import GenerationMixin
from gpt2rt.graph import Plan, build_plan

from .attention import AttentionMask, cross_attention_mask, self_attention_mask
from .cache import DynamicCache, EncoderDecoderCache
from .gpt2_blocks import GPT2MLP, GPT2Attention, GPT2Block
from .inputs import (
    check_input,
    layer_head_masks,
    reject_unknown,
    selected_layers,
)
from .layers import Conv1D, LayerNorm
from .lm_head import causal_lm_loss, check_token_labels, token_logits
from .outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from .trunk import DecoderPreTrainedModel, Trunk


class GPT2PreTrainedModel(DecoderPreTrainedModel):
    """What all GPT-2 classes share: config class, initialisation, gradient checkpointing."""

    config_class = GPT2Config
    config: GPT2Config
    base_model_prefix = "transformer"

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | Conv1D):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, GPT2Attention | GPT2MLP):
            # two layers a block add to the residual stream; Radford et al. (2019), section 2.3
            nn.init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def build_graph(self) -> Plan:
        """The model as a flat plan of fused nodes for ``gpt2rt.graph``; without a language-modelling head, the trunk.

        Raises:
            ValueError: the graph cannot run this model, or its weights differ in dtype or device.
        """
        return build_plan(self.config, self.graph_weights(), self.base_model.get_submodule("h.0.mlp.act"))


class GPT2Model(Trunk, GPT2PreTrainedModel):
    """GPT-2 without a head: token ids to the hidden states after the final norm.

    Args:
        config: shape and flags.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPT2Block(config, layer_idx=i) for i in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # arguments for torch's checkpoint function; None: off
        self.gradient_checkpointing: dict[str, Any] | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The hidden states of every token.

        Args:
            input_ids: [*leading, seq_len] int64 or int32; or give ``inputs_embeds``. N is the product of ``leading``.
            past_key_values: what an earlier call returned; a transformers cache; or a tuple of (keys, values) per
                block. A cache object is appended to in place and returned.
            attention_mask: over past and new tokens, T in all. [*leading, T]: 1 = attend, 0 = never; causality comes on
                top. [N, seq_len, T] and [N or 1, n_head or 1, seq_len or 1, T] say for every query what it sees, alone:
                flags, or floats added to the scores. A token that may see nothing gets zeros from attention.
            token_type_ids: like ``input_ids``; looked up in the token embedding and added.
            position_ids: like ``input_ids`` or [1, seq_len]; by default they count on from the past, whatever the
                mask says. Where they do not go up by one, and there is neither mask nor past, a new sequence starts
                that does not see the one before it.
            inputs_embeds: [*leading, seq_len, n_embd] instead of ``input_ids``.
            encoder_hidden_states: [N, encoder_len, n_embd], for models with ``add_cross_attention``.
            encoder_attention_mask: [N, encoder_len], [N, seq_len, encoder_len] or with heads, as ``attention_mask``.
            use_cache: return ``past_key_values``; by default as the config says.
            head_mask: [n_head] or [n_layer, n_head], factors on the attention probabilities of each head.
            output_attentions, output_hidden_states, return_dict: what to return, and whether as a
                ModelOutput or a plain tuple; by default as the config says. ``output_hidden_states`` may also be an
                index or a list of indices: the others are then None.

        Returns:
            BaseModelOutputWithPastAndCrossAttentions, or a tuple of its values that are not None.

        Raises:
            ValueError: arguments that contradict each other, or a shape that does not fit.
            InputRangeError: a ValueError and IndexError: a token id or position outside the tables, or a sequence
                longer than ``n_positions``. Values are checked on the CPU only.
            TypeError: an argument of the wrong kind, or one that does not exist.
        """
        reject_unknown(type(self).forward, kwargs)
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        wanted_states = selected_layers(output_hidden_states, config.n_layer + 1)
        head_masks = layer_head_masks(head_mask, config.n_layer, config.n_head)

        *leading_list, seq_len = check_input(input_ids, inputs_embeds, self.wte.num_embeddings, config.n_embd)
        leading = tuple(leading_list)
        batch = math.prod(leading)
        cache, use_cache = self._cache(past_key_values, use_cache, batch)
        past_len = 0 if cache is None else int(cache.get_seq_length())
        positions = self._positions(position_ids, leading, seq_len, past_len)
        token_types = self._token_types(token_type_ids, leading, seq_len)
        mask = self_attention_mask(
            attention_mask,
            leading,
            seq_len,
            past_len,
            config.n_head,
            positions if position_ids is not None and past_key_values is None else None,
            self.wpe.weight.device,
        )
        # every token's own result is wanted where more than the last hidden states is, or a caller's cache grows
        own = output_attentions or wanted_states or past_key_values is not None or config.add_cross_attention
        mask = self._lay_out(mask, input_ids, (token_types, positions), (batch, seq_len), past_len, not own)
        hidden = self._embed(input_ids, inputs_embeds, token_types, positions, batch, seq_len)
        if mask.layout is not None:
            hidden = mask.layout.gather(hidden)
        encoder_hidden_states, encoder_mask = self._encoder(
            encoder_hidden_states, encoder_attention_mask, cache, batch, seq_len
        )

        states: list[Tensor | None] = []
        attentions: list[tuple[Tensor, Tensor | None]] | None = [] if output_attentions else None
        for i, block in enumerate(self.h):
            states.append(hidden if i in wanted_states else None)
            arguments = (hidden, cache, mask, encoder_hidden_states, encoder_mask, head_masks[i], attentions)
            if self.gradient_checkpointing is not None and self.training:
                hidden = checkpoint(block, *arguments, **self.gradient_checkpointing)
            else:
                hidden = block(*arguments)
        normed = self.ln_f(hidden)
        hidden = (normed if mask.layout is None else mask.layout.spread(normed)).view(*leading, seq_len, config.n_embd)
        states.append(hidden if config.n_layer in wanted_states else None)

        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(states) if wanted_states else None,
            attentions=None if attentions is None else tuple(probs for probs, _ in attentions),
            cross_attentions=(
                None if attentions is None or encoder_hidden_states is None else tuple(probs for _, probs in attentions)
            ),
        )
        self._note_shared(output, mask, normed, cache, batch)
        return self._finish(return_dict, output)

    @property
    def tables(self) -> tuple[Any, nn.Embedding]:
        """``wte`` and ``wpe``."""
        return self.wte, self.wpe

    def _cache(self, past_key_values: Any, use_cache: bool | None, batch: int) -> tuple[Any, bool]:
        cache, use_cache = self._open_cache(past_key_values, use_cache, self.config.use_cache, batch)
        if cache is not None and self.config.add_cross_attention and not hasattr(cache, "cross_attention_cache"):
            cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
        return cache, use_cache

    def _encoder(
        self, states: Tensor | None, attention_mask: Tensor | None, cache: Any, batch: int, seq_len: int
    ) -> tuple[Tensor | None, AttentionMask | None]:
        """The encoder's states [batch, encoder_len, n_embd] and their mask, or (None, None)."""
        if states is None:
            return None, None
        if not self.config.add_cross_attention:
            raise ValueError(
                "If `encoder_hidden_states` are passed, the model has to be instantiated with cross-attention layers "
                "by setting `config.add_cross_attention=True`"
            )
        if states.dim() != 3 or states.size(0) != batch or states.size(2) != self.config.n_embd:
            raise ValueError(
                f"encoder_hidden_states has shape {list(states.shape)}, expected [{batch}, encoder_len, "
                f"{self.config.n_embd}] (batch of the input, ..., n_embd)"
            )
        self._check_dtype("encoder_hidden_states", states)
        encoder_len = states.size(1)
        if cache is not None and cache.is_updated.get(0):
            encoder_len = int(cache.cross_attention_cache.get_seq_length())
        mask = cross_attention_mask(
            attention_mask, batch, self.config.n_head, seq_len, encoder_len, self.wpe.weight.device
        )
        return states, mask


class GPT2LMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head; the output layer shares the token embedding unless the config says no.

    Args:
        config: shape and flags.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    cache_class = DynamicCache
    lm_head: nn.Linear

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        head_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits of the next token at every position, and the loss if there are labels.

        Args:
            labels: like ``input_ids``, -100 = ignored; shifted here, so ``labels=input_ids`` trains a language model.
            shift_labels: labels that the caller has shifted; taken instead of ``labels``.
            num_items_in_batch: divide the summed loss by this number instead of taking the mean.
            logits_to_keep: compute logits only for: the last n positions (int, 0 = all); these positions ([n]); these
                of each row ([*leading, n] integers); the true ones ([*leading, seq_len] bool; logits are then
                [num_true, vocab_size]).
            **others: as in :meth:`GPT2Model.forward`.

        Returns:
            CausalLMOutputWithCrossAttentions, or a tuple of its values that are not None. Logits have the dtype of the
            weights; the loss is float32.

        Raises:
            ValueError, InputRangeError, TypeError: as in :meth:`GPT2Model.forward`.
        """
        reject_unknown(type(self).forward, kwargs)
        check_token_labels(labels, shift_labels, self.config.vocab_size)
        base = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            use_cache,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = token_logits(self.lm_head, base, logits_to_keep)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, shift_labels, num_items_in_batch)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            cross_attentions=base.cross_attentions,
        )
        return self._finish(return_dict, output)
