"""OpenAI GPT: the bare model and the language model.

    x = tokens_embed[ids] + positions_embed[positions]
    x = h.0(x), h.1(x), ...           (openai_gpt_blocks.py)
    logits = lm_head(x)

Source: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018). Names of modules and
parameters, arguments of forward and its results are those of transformers. Beyond those, forward takes and returns a
cache of keys and values, and ``generate`` runs on the paged cache: transformers computes the whole text again for every
new token.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2rt.config import OpenAIGPTConfig
from gpt2rt.generation import GenerationMixin
from gpt2rt.graph import Plan, build_openai_gpt_plan

from .attention import self_attention_mask
from .cache import DynamicCache
from .inputs import check_input, layer_head_masks, reject_unknown, selected_layers
from .layers import Conv1D
from .lm_head import causal_lm_loss, check_token_labels, token_logits
from .openai_gpt_blocks import OpenAIGPTBlock
from .outputs import BaseModelOutput, CausalLMOutput
from .pretrained import PreTrainedModel
from .trunk import DecoderPreTrainedModel, Trunk


class OpenAIGPTPreTrainedModel(DecoderPreTrainedModel):
    """What all OpenAI GPT classes share: config class, initialisation, the graph, gradient checkpointing."""

    config_class = OpenAIGPTConfig
    config: OpenAIGPTConfig
    base_model_prefix = "transformer"
    _input_embedding_name: ClassVar[str] = "tokens_embed"
    # old files also hold the numbers of the positions
    _keys_to_ignore_on_load_unexpected: ClassVar[tuple[str, ...]] = (
        *PreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"(^|\.)position_ids$",
    )

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

    def build_graph(self) -> Plan:
        """The model as a flat plan of fused nodes for ``gpt2rt.graph``; without a language-modelling head, the trunk.

        Raises:
            ValueError: the model's weights differ in dtype or device.
        """
        return build_openai_gpt_plan(self.config, self.graph_weights(), self.base_model.get_submodule("h.0.mlp.act"))


class OpenAIGPTModel(Trunk, OpenAIGPTPreTrainedModel):
    """OpenAI GPT without a head: token ids to the hidden states after the last block.

    Args:
        config: shape and flags.
    """

    def __init__(self, config: OpenAIGPTConfig) -> None:
        super().__init__(config)
        self.tokens_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions_embed = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([OpenAIGPTBlock(config, layer_idx=i) for i in range(config.n_layer)])
        # arguments for torch's checkpoint function; None: off
        self.gradient_checkpointing: dict[str, Any] | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        head_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The hidden states of every token.

        Args:
            input_ids: [*leading, seq_len] int64 or int32; or give ``inputs_embeds``. N is the product of ``leading``.
            attention_mask: over past and new tokens, T in all. [*leading, T]: 1 = attend, 0 = never; causality comes on
                top. A token that may see nothing weighs the later tokens with a flag alike, or all tokens if there are
                none: that is what transformers' float32 numbers come to. [N, seq_len, T] and
                [N or 1, n_head or 1, seq_len or 1, T] say for every query what it sees, alone: flags, or floats added
                to the scores; a token that may see nothing gets zeros.
            token_type_ids: like ``input_ids``; looked up in the token embedding and added.
            position_ids: like ``input_ids`` or [1, seq_len]; by default they count on from the past, whatever the
                mask says.
            inputs_embeds: [*leading, seq_len, n_embd] instead of ``input_ids``.
            output_attentions, output_hidden_states, return_dict: what to return, and whether as a
                ModelOutput or a plain tuple; by default as the config says. ``output_hidden_states`` may also be an
                index or a list of indices: the others are then None.
            past_key_values: what an earlier call returned; a transformers cache; or a tuple of (keys, values) per
                block. A cache object is appended to in place and returned.
            use_cache: return ``past_key_values``; by default only if some were given.
            head_mask: [n_head] or [n_layer, n_head], factors on the attention probabilities of each head.

        Returns:
            BaseModelOutput, or a tuple of its values that are not None.

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

        device = self.positions_embed.weight.device
        *leading_list, seq_len = check_input(input_ids, inputs_embeds, self.tokens_embed.num_embeddings, config.n_embd)
        leading = tuple(leading_list)
        batch = math.prod(leading)
        cache, use_cache = self._cache(past_key_values, use_cache, batch)
        past_len = 0 if cache is None else int(cache.get_seq_length())
        positions = self._positions(position_ids, leading, seq_len, past_len)
        token_types = self._token_types(token_type_ids, leading, seq_len)
        mask = self_attention_mask(attention_mask, leading, seq_len, past_len, config.n_head, None, device, level=True)
        # every token's own result is wanted where more than the last hidden states is, or a caller's cache grows
        own = output_attentions or wanted_states or past_key_values is not None
        mask = self._lay_out(mask, input_ids, (token_types, positions), (batch, seq_len), past_len, not own)
        hidden = self._embed(input_ids, inputs_embeds, token_types, positions, batch, seq_len)
        if mask.layout is not None:
            hidden = mask.layout.gather(hidden)

        states: list[Tensor | None] = []
        attentions: list[Tensor] = []
        for i, block in enumerate(self.h):
            states.append(hidden if i in wanted_states else None)
            arguments = (hidden, cache, mask, head_masks[i], output_attentions)
            if self.gradient_checkpointing is not None and self.training:
                outputs = checkpoint(block, *arguments, **self.gradient_checkpointing)
            else:
                outputs = block(*arguments)
            hidden = outputs[0]
            attentions += outputs[1:]
        last = hidden
        hidden = (last if mask.layout is None else mask.layout.spread(last)).view(*leading, seq_len, config.n_embd)
        states.append(hidden if config.n_layer in wanted_states else None)

        output = BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(states) if wanted_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            past_key_values=cache if use_cache else None,
        )
        self._note_shared(output, mask, last, cache, batch)
        return self._finish(return_dict, output)

    @property
    def tables(self) -> tuple[Any, nn.Embedding]:
        """``tokens_embed`` and ``positions_embed``."""
        return self.tokens_embed, self.positions_embed

    def _cache(self, past_key_values: Any, use_cache: bool | None, batch: int) -> tuple[Any, bool]:
        if hasattr(past_key_values, "cross_attention_cache"):
            raise ValueError(
                "past_key_values holds keys and values of an encoder, but OpenAI GPT has no cross attention; pass the "
                "cache of its own tokens, past_key_values.self_attention_cache"
            )
        return self._open_cache(past_key_values, use_cache, past_key_values is not None, batch)


class OpenAIGPTLMHeadModel(OpenAIGPTPreTrainedModel, GenerationMixin):
    """OpenAI GPT with its language-modelling head, which shares the token embedding unless the config says no.

    Args:
        config: shape and flags.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.tokens_embed.weight"}
    cache_class = DynamicCache
    whole_steps: ClassVar[bool] = True
    lm_head: nn.Linear

    def __init__(self, config: OpenAIGPTConfig) -> None:
        super().__init__(config)
        self.transformer = OpenAIGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        head_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits of the next token at every position, and the loss if there are labels.

        Args:
            labels: like ``input_ids``, -100 = ignored; shifted here, so ``labels=input_ids`` trains a language model.
            logits_to_keep: compute logits only for: the last n positions (int, 0 = all); these positions ([n]); these
                of each row ([*leading, n] integers); the true ones ([*leading, seq_len] bool; logits are then
                [num_true, vocab_size]).
            shift_labels: labels that the caller has shifted; taken instead of ``labels``.
            num_items_in_batch: divide the summed loss by this number instead of taking the mean.
            **others: as in :meth:`OpenAIGPTModel.forward`.

        Returns:
            CausalLMOutput, or a tuple of its values that are not None. Logits have the dtype of the weights; the loss
            is float32.

        Raises:
            ValueError, InputRangeError, TypeError: as in :meth:`OpenAIGPTModel.forward`.
        """
        reject_unknown(type(self).forward, kwargs)
        check_token_labels(labels, shift_labels, self.config.vocab_size)
        base = self.transformer(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
            past_key_values=past_key_values,
            use_cache=use_cache,
            head_mask=head_mask,
        )
        logits = token_logits(self.lm_head, base, logits_to_keep)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, shift_labels, num_items_in_batch)
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            past_key_values=base.past_key_values,
        )
        return self._finish(return_dict, output)
