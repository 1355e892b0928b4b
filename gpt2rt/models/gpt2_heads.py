"""GPT-2 with task heads: ranking choices, classifying sequences or tokens, marking an answer in a text.

Each is the bare model with one small layer on its last hidden states. Names of classes, modules and parameters, the
arguments of forward and its results are those of transformers. Beside what its signature lists, every forward takes the
other arguments of :meth:`GPT2Model.forward` by name, among them ``output_attentions``, ``output_hidden_states``,
``return_dict``, ``head_mask`` and ``encoder_hidden_states``. Inputs may have any leading dimensions.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

from torch import Tensor, nn

from gpt2rt.config import GPT2Config
from gpt2rt.generation import GenerationMixin

from .cache import DynamicCache
from .gpt2 import GPT2Model, GPT2PreTrainedModel
from .inputs import check_input, reject_unknown
from .layers import project
from .lm_head import causal_lm_loss, check_token_labels, token_logits
from .losses import choice_targets, class_loss, class_targets, sequence_loss, sequence_targets
from .outputs import (
    GPT2DoubleHeadsModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from .summary import SequenceSummary, check_cls_index
from .trunk import last_tokens

_BASE_ARGUMENTS = [name for name in inspect.signature(GPT2Model.forward).parameters if name not in ("self", "kwargs")]


class GPT2WithHead(GPT2PreTrainedModel):
    """What the models with a task head share: how their forward begins and ends.

    A forward calls ``_start``, checks its own arguments, calls ``_run_base`` and returns what ``_finish`` makes of its
    output. ``kwargs`` are always those that its signature does not list.
    """

    # the losses are means over this call's labels; transformers' Trainer asks before it passes num_items_in_batch
    accepts_loss_kwargs: ClassVar[bool] = False
    transformer: GPT2Model

    def _start(
        self, kwargs: dict[str, Any], input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[tuple[int, ...], int]:
        """The leading dimensions and the length of the input, which is checked; TypeError for unknown keywords."""
        unknown = [name for name in kwargs if name not in _BASE_ARGUMENTS]
        reject_unknown(type(self).forward, unknown, _BASE_ARGUMENTS)
        *leading, seq_len = check_input(
            input_ids, inputs_embeds, self.transformer.wte.num_embeddings, self.config.n_embd
        )
        return tuple(leading), seq_len

    def _run_base(self, kwargs: dict[str, Any], arguments: tuple[Any, ...], use_cache: bool | None) -> Any:
        """The bare model's output for its first ``arguments`` and for ``kwargs``."""
        return self.transformer(*arguments, **{"use_cache": use_cache, **kwargs, "return_dict": True})


class GPT2DoubleHeadsModel(GPT2WithHead, GenerationMixin):
    """GPT-2 with a language-modelling head and one that gives each of several choices a score.

    Args:
        config: shape and flags; the ``summary_*`` fields say how a choice is scored, see :class:`SequenceSummary`. Its
            ``num_labels`` is set to 1, in the object given, as transformers does.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    cache_class = DynamicCache
    lm_head: nn.Linear

    def __init__(self, config: GPT2Config) -> None:
        # before the config is checked: a problem_type that one label does not allow is refused here, not at the save
        config.num_labels = 1
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = SequenceSummary(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The logits of the next token at every position, a score for every choice, and the losses of both.

        Args:
            input_ids: [batch, num_choices, seq_len]; or [*leading, seq_len] of any shape.
            mc_token_ids: [*leading], the token of each sequence that its score is read from, by default the last. Only
                ``summary_type`` "cls_index", the default, looks at it.
            labels: like ``input_ids``, -100 = ignored; shifted here.
            logits_to_keep: as in :meth:`GPT2LMHeadModel.forward`, for the language model's logits.
            mc_labels: [batch], the right choice of each, -100 = ignored: one label for each row of ``mc_logits``.
            **others: as in :meth:`GPT2Model.forward`.

        Returns:
            GPT2DoubleHeadsModelOutput, or a tuple of its values that are not None. Losses are float32.

        Raises:
            ValueError, InputRangeError, TypeError: as in :meth:`GPT2Model.forward`.
        """
        leading, seq_len = self._start(kwargs, input_ids, inputs_embeds)
        check_token_labels(labels, None, self.config.vocab_size)
        if mc_token_ids is not None:
            check_cls_index("mc_token_ids", mc_token_ids, leading, seq_len)
        if mc_labels is not None and self.multiple_choice_head.scores_choices:
            choice_targets(mc_labels, leading)
        arguments = (input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds)
        base = self._run_base(kwargs, arguments, use_cache=use_cache)
        logits = token_logits(self.lm_head, base, logits_to_keep)
        mc_logits = self.multiple_choice_head(base.last_hidden_state, mc_token_ids).squeeze(-1)
        mc_loss = None
        if mc_labels is not None:
            mc_loss = class_loss(mc_logits, choice_targets(mc_labels, tuple(mc_logits.shape)))
        output = GPT2DoubleHeadsModelOutput(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=mc_logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return self._finish(kwargs.get("return_dict"), output)


class GPT2ForSequenceClassification(GPT2WithHead):
    """GPT-2 with a linear layer on the last token of each sequence: classes, several labels, or values.

    The last token is the rightmost that is not ``config.pad_token_id``, whatever the attention mask says; of a sequence
    of pads alone it is the first. Without a ``pad_token_id``, and for ``inputs_embeds``, it is the last position.

    Args:
        config: shape and flags; ``num_labels`` is the width of the layer. ``problem_type`` says which loss is meant:
            "regression" (mean squared error), "single_label_classification" (cross entropy) or
            "multi_label_classification" (binary cross entropy). If it is None, the first call with valid labels infers
            it and writes it into the config, as transformers does: models that share a config object share it too.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits of each sequence, and the loss if there are labels.

        Args:
            labels: numbers of classes [*leading], -100 = ignored; or for each label 0 to 1 or a value
                [*leading, num_labels]. One label is always regression unless the config says otherwise.
            **others: as in :meth:`GPT2Model.forward`.

        Returns:
            SequenceClassifierOutputWithPast, or a tuple of its values that are not None. The loss is float32.

        Raises:
            ValueError: several sequences and no ``pad_token_id``; else as in :meth:`GPT2Model.forward`.
            InputRangeError, TypeError: as in :meth:`GPT2Model.forward`.
        """
        leading, _ = self._start(kwargs, input_ids, inputs_embeds)
        pad_token_id = self.config.pad_token_id
        if pad_token_id is None and math.prod(leading) != 1:
            raise ValueError(
                "Cannot handle batch sizes > 1 if no padding token is defined. Set model.config.pad_token_id; "
                f"the input has {math.prod(leading)} sequences"
            )
        problem_type, target = "", None
        if labels is not None:
            problem_type, target = sequence_targets(self.config.problem_type, labels, leading, self.num_labels)
            if self.config.problem_type is None:
                self.config.problem_type = problem_type
        arguments = (input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds)
        base = self._run_base(kwargs, arguments, use_cache=use_cache)
        # only the rows that are asked for go through the layer
        logits = project(self.score, last_tokens(self, base.last_hidden_state, input_ids))
        output = SequenceClassifierOutputWithPast(
            loss=None if target is None else sequence_loss(problem_type, logits, target),
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return self._finish(kwargs.get("return_dict"), output)


class GPT2ForTokenClassification(GPT2WithHead):
    """GPT-2 with a linear layer on every token.

    Args:
        config: shape and flags; ``num_labels`` is the width of the layer. The dropout before it is
            ``classifier_dropout``, else ``hidden_dropout``, else 0.1.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        given = [getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout")]
        self.dropout = nn.Dropout(next((p for p in given if p is not None), 0.1))
        self.classifier = nn.Linear(config.n_embd, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits of every token, and the loss if there are labels.

        Args:
            labels: like ``input_ids``, the class of each token, -100 = ignored.
            use_cache: accepted, but the output has no place for a cache. One given as ``past_key_values`` is read and
                appended to.
            **others: as in :meth:`GPT2Model.forward`.

        Returns:
            TokenClassifierOutput, or a tuple of its values that are not None. The loss is float32.

        Raises:
            ValueError, InputRangeError, TypeError: as in :meth:`GPT2Model.forward`.
        """
        leading, seq_len = self._start(kwargs, input_ids, inputs_embeds)
        target = None
        if labels is not None:
            target = class_targets("labels", labels, (*leading, seq_len), self.num_labels)
        arguments = (input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds)
        base = self._run_base(kwargs, arguments, use_cache=False)
        logits = project(self.classifier, self.dropout(base.last_hidden_state))
        output = TokenClassifierOutput(
            loss=None if target is None else class_loss(logits, target),
            logits=logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return self._finish(kwargs.get("return_dict"), output)


class GPT2ForQuestionAnswering(GPT2WithHead):
    """GPT-2 with a linear layer that scores every token as the first and as the last of the answer.

    Args:
        config: shape and flags. The layer has two outputs whatever ``num_labels`` says.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The scores of every token, and the loss if start and end are given.

        Args:
            start_positions, end_positions: [*leading] or [*leading, 1], the first and the last token of each answer.
                Those beyond the sequence are ignored, and negative ones count as 0, as in transformers. The loss is the
                mean of both cross entropies.
            **others: as in :meth:`GPT2Model.forward`.

        Returns:
            QuestionAnsweringModelOutput, or a tuple of its values that are not None. The loss is float32.

        Raises:
            ValueError: only one of ``start_positions`` and ``end_positions``; else as in :meth:`GPT2Model.forward`.
            InputRangeError, TypeError: as in :meth:`GPT2Model.forward`.
        """
        leading, seq_len = self._start(kwargs, input_ids, inputs_embeds)
        if (start_positions is None) != (end_positions is None):
            absent = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(f"{absent} is missing: the loss needs both start_positions and end_positions")
        targets: list[Tensor] = []
        if start_positions is not None:
            for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
                targets.append(class_targets(name, positions, leading, seq_len, ignored=None).clamp(0, seq_len))
        past_key_values = kwargs.pop("past_key_values", None)
        arguments = (input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds)
        base = self._run_base(kwargs, arguments, use_cache=False)
        logits = project(self.qa_outputs, base.last_hidden_state)
        start_logits, end_logits = (x.contiguous() for x in logits.unbind(-1))
        loss = None
        if targets:
            start_target, end_target = targets
            # seq_len stands for a place beyond the sequence
            start_loss = class_loss(start_logits, start_target, ignored=seq_len)
            loss = (start_loss + class_loss(end_logits, end_target, ignored=seq_len)) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return self._finish(kwargs.get("return_dict"), output)
