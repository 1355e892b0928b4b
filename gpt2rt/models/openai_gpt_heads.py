"""OpenAI GPT with task heads: ranking choices, classifying sequences.

Each is the bare model with one small layer on its last hidden states. Names of classes, modules and parameters, the
arguments of forward and its results are those of transformers. Every forward also takes ``past_key_values``,
``use_cache`` and ``head_mask``, as :meth:`OpenAIGPTModel.forward` does. Inputs may have any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from gpt2rt.config import OpenAIGPTConfig
from gpt2rt.generation import GenerationMixin

from .cache import DynamicCache
from .inputs import check_input, reject_unknown
from .layers import project
from .lm_head import causal_lm_loss, check_token_labels, token_logits
from .losses import choice_targets, class_loss, sequence_loss, sequence_targets
from .openai_gpt import OpenAIGPTModel, OpenAIGPTPreTrainedModel
from .outputs import OpenAIGPTDoubleHeadsModelOutput, SequenceClassifierOutput
from .summary import SequenceSummary, check_cls_index
from .trunk import last_tokens


class OpenAIGPTDoubleHeadsModel(OpenAIGPTPreTrainedModel, GenerationMixin):
    """OpenAI GPT with a language-modelling head and one that gives each of several choices a score.

    transformers' class has no ``generate`` and saves the shared embedding under the name of the output layer only; here
    the first works, and files use the same names as those of all other classes. Both kinds of files are read.

    Args:
        config: shape and flags; the ``summary_*`` fields say how a choice is scored, see :class:`SequenceSummary`. Its
            ``num_labels`` is set to 1, in the object given, as transformers does.
    """

    # the losses are means over this call's labels; transformers' Trainer asks before it passes num_items_in_batch
    accepts_loss_kwargs: ClassVar[bool] = False
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.tokens_embed.weight"}
    cache_class = DynamicCache
    whole_steps: ClassVar[bool] = True
    lm_head: nn.Linear

    def __init__(self, config: OpenAIGPTConfig) -> None:
        # before the config is checked: a problem_type that one label does not allow is refused here, not at the save
        config.num_labels = 1
        super().__init__(config)
        self.transformer = OpenAIGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = SequenceSummary(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        head_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The logits of the next token at every position, a score for every choice, and the losses of both.

        Args:
            input_ids: [batch, num_choices, seq_len]; or [*leading, seq_len] of any shape.
            mc_token_ids: [*leading], the token of each sequence that its score is read from, by default the last. Only
                ``summary_type`` "cls_index", the default, looks at it.
            labels: like ``input_ids``, -100 = ignored; shifted here.
            mc_labels: [batch], the right choice of each, -100 = ignored: one label for each row of ``mc_logits``.
            logits_to_keep: as in :meth:`OpenAIGPTLMHeadModel.forward`.
            **others: as in :meth:`OpenAIGPTModel.forward`.

        Returns:
            OpenAIGPTDoubleHeadsModelOutput, or a tuple of its values that are not None. Losses are float32.

        Raises:
            ValueError, InputRangeError, TypeError: as in :meth:`OpenAIGPTModel.forward`.
        """
        reject_unknown(type(self).forward, kwargs)
        vocab_size = self.transformer.tokens_embed.num_embeddings
        *leading, seq_len = check_input(input_ids, inputs_embeds, vocab_size, self.config.n_embd)
        check_token_labels(labels, None, self.config.vocab_size)
        if mc_token_ids is not None:
            check_cls_index("mc_token_ids", mc_token_ids, tuple(leading), seq_len)
        if mc_labels is not None and self.multiple_choice_head.scores_choices:
            choice_targets(mc_labels, tuple(leading))
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
        mc_logits = self.multiple_choice_head(base.last_hidden_state, mc_token_ids).squeeze(-1)
        mc_loss = None
        if mc_labels is not None:
            mc_loss = class_loss(mc_logits, choice_targets(mc_labels, tuple(mc_logits.shape)))
        output = OpenAIGPTDoubleHeadsModelOutput(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=mc_logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            past_key_values=base.past_key_values,
        )
        return self._finish(return_dict, output)


class OpenAIGPTForSequenceClassification(OpenAIGPTPreTrainedModel):
    """OpenAI GPT with a linear layer on the last token of each sequence: classes, several labels, or values.

    The last token is the rightmost that is not ``config.pad_token_id``, whatever the attention mask says; of a sequence
    of pads alone it is the first. Without a ``pad_token_id``, and for ``inputs_embeds``, it is the last position.

    Args:
        config: shape and flags; ``num_labels`` is the width of the layer. ``problem_type`` says which loss is meant:
            "regression" (mean squared error), "single_label_classification" (cross entropy) or
            "multi_label_classification" (binary cross entropy). If it is None, the first call with valid labels infers
            it and writes it into the config, as transformers does: models that share a config object share it too.
    """

    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(self, config: OpenAIGPTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = OpenAIGPTModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
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
        *,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        head_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits of each sequence, and the loss if there are labels.

        Args:
            labels: numbers of classes [*leading], -100 = ignored; or for each label 0 to 1 or a value
                [*leading, num_labels]. One label is always regression unless the config says otherwise.
            **others: as in :meth:`OpenAIGPTModel.forward`.

        Returns:
            SequenceClassifierOutput, or a tuple of its values that are not None. The loss is float32.

        Raises:
            ValueError: several sequences and no ``pad_token_id``; else as in :meth:`OpenAIGPTModel.forward`.
            InputRangeError, TypeError: as in :meth:`OpenAIGPTModel.forward`.
        """
        reject_unknown(type(self).forward, kwargs)
        vocab_size = self.transformer.tokens_embed.num_embeddings
        leading = tuple(check_input(input_ids, inputs_embeds, vocab_size, self.config.n_embd)[:-1])
        if self.config.pad_token_id is None and math.prod(leading) != 1:
            raise ValueError(
                "Cannot handle batch sizes > 1 if no padding token is defined. Set model.config.pad_token_id; "
                f"the input has {math.prod(leading)} sequences"
            )
        problem_type, target = "", None
        if labels is not None:
            problem_type, target = sequence_targets(self.config.problem_type, labels, leading, self.num_labels)
            if self.config.problem_type is None:
                self.config.problem_type = problem_type
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
        # only the rows that are asked for go through the layer
        logits = project(self.score, last_tokens(self, base.last_hidden_state, input_ids))
        output = SequenceClassifierOutput(
            loss=None if target is None else sequence_loss(problem_type, logits, target),
            logits=logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            past_key_values=base.past_key_values,
        )
        return self._finish(return_dict, output)
