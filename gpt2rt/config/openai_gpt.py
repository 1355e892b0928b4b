"""The configuration of OpenAI GPT."""

import warnings
from typing import Any, ClassVar

from gpt2rt.config.base import PretrainedConfig
from gpt2rt.config.gpt2 import ACTIVATIONS, MAX_LAYERS, MAX_PARAMETERS, SUMMARY_TYPES
from gpt2rt.errors import ConfigError


def openai_gpt_activation(afn: str) -> str:
    """The activation that the field ``afn`` means: "gelu" is the tanh form that GPT was trained with, "gelu_new"."""
    return "gelu_new" if afn == "gelu" else afn


class OpenAIGPTConfig(PretrainedConfig):
    """The configuration of an OpenAI GPT, with transformers' fields and defaults (those of the published model).

    Args:
        vocab_size: rows of the token embedding.
        n_positions: rows of the position embedding, the longest sequence in tokens.
        n_embd, n_layer, n_head: width, blocks, attention heads; ``n_embd`` is a multiple of ``n_head``. The MLP is
            ``4 * n_embd`` wide.
        afn: one of ``ACTIVATIONS``; "gelu" means "gelu_new", as in transformers, which knows "relu", "silu" and "swish"
            besides. The exact form is "gelu_python".
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities, used in training mode only.
        layer_norm_epsilon: added to the variance, > 0.
        initializer_range: standard deviation of freshly made weights.
        summary_type, summary_use_proj, summary_activation, summary_proj_to_labels, summary_first_dropout: the
            multiple-choice head of OpenAIGPTDoubleHeadsModel.
        pad_token_id, bos_token_id, eos_token_id: special ids; the published model has none. An id outside the
            vocabulary is treated as unset (None), with a warning.
        tie_word_embeddings: the output layer shares the token embedding.
        **kwargs: the shared fields of :class:`PretrainedConfig`, transformers' general names (``hidden_size``, ...),
            and any other key, which is kept. ``n_ctx`` of old files is kept but has no effect.
    Raises:
        ConfigError: a field breaks its rule.
    """

    model_type = "openai-gpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = []

    def __init__(
        self,
        *,
        vocab_size: int = 40478,
        n_positions: int = 512,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        afn: str = "gelu",
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        summary_type: str = "cls_index",
        summary_use_proj: bool = True,
        summary_activation: str | None = None,
        summary_proj_to_labels: bool = True,
        summary_first_dropout: float = 0.1,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.afn = afn
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.summary_type = summary_type
        self.summary_use_proj = summary_use_proj
        self.summary_activation = summary_activation
        self.summary_proj_to_labels = summary_proj_to_labels
        self.summary_first_dropout = summary_first_dropout
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    def validate(self) -> None:
        super().validate()
        for field in ("vocab_size", "n_positions", "n_embd", "n_head"):
            self._check_int(field, 1)
        self._check_int("n_layer", 1, MAX_LAYERS)
        if self.n_embd % self.n_head != 0:
            raise ConfigError(
                f"{type(self).__name__}: n_embd = {self.n_embd} with n_head = {self.n_head}, but n_embd must be a "
                "multiple of n_head"
            )
        self._check_choice("afn", ACTIVATIONS)
        self._check_choice("summary_activation", ACTIVATIONS, optional=True)
        self._check_choice("summary_type", SUMMARY_TYPES)
        for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
            self._check_number(field, 0.0, 1.0)
        self._check_number("layer_norm_epsilon", 0.0, 1.0, above=True)
        self._check_number("initializer_range", 0.0, 1e4)
        self._check_bool("summary_use_proj", "summary_proj_to_labels", "tie_word_embeddings")
        for field in ("bos_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, field)
            listed = value if field == "eos_token_id" and isinstance(value, list) else [value]
            if value is not None and not (listed and all(type(token) is int for token in listed)):
                raise self._broken(field, f"a token id{' or a list of them' if field[0] == 'e' else ''} or None")
        total = (self.vocab_size + self.n_positions) * self.n_embd + self.n_layer * 12 * self.n_embd**2
        if total > MAX_PARAMETERS:
            raise ConfigError(
                f"{type(self).__name__}: vocab_size = {self.vocab_size}, n_positions = {self.n_positions}, n_embd = "
                f"{self.n_embd}, n_layer = {self.n_layer} make about {total:.2e} weights, but a model may have at most "
                f"{MAX_PARAMETERS:.2e}; is config.json damaged?"
            )

    def _drop_foreign_token_ids(self) -> None:
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            listed = value if isinstance(value, list) else [] if value is None else [value]
            kept = [token for token in listed if 0 <= token < self.vocab_size]
            if kept == listed:
                continue
            setattr(self, field, kept if isinstance(value, list) and kept else None)
            warnings.warn(
                f"{type(self).__name__}: {field} = {value!r} lies outside the vocabulary of {self.vocab_size} tokens "
                "and is treated as unset",
                stacklevel=4,
            )
