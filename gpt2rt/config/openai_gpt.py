"""The configuration of OpenAI GPT."""

from typing import Any, ClassVar

from gpt2rt.config.decoder import DecoderConfig


def openai_gpt_activation(afn: str) -> str:
    """The activation that the field ``afn`` means: "gelu" is the tanh form that GPT was trained with, "gelu_new"."""
    return "gelu_new" if afn == "gelu" else afn


class OpenAIGPTConfig(DecoderConfig):
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
    keys_to_ignore_at_inference: ClassVar[list[str]] = []
    _activation_field = "afn"

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
