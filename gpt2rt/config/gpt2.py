"""The configuration of GPT-2."""

from typing import Any, ClassVar

from gpt2rt.config.decoder import DecoderConfig


class GPT2Config(DecoderConfig):
    """The configuration of a GPT-2, with transformers' fields and defaults (those of the 124M model).

    Args:
        vocab_size: rows of the token embedding.
        n_positions: rows of the position embedding, the longest sequence in tokens.
        n_embd, n_layer, n_head: width, blocks, attention heads; ``n_embd`` is a multiple of ``n_head``.
        n_inner: width of the MLP; None means ``4 * n_embd``.
        activation_function: one of ``ACTIVATIONS``.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities, used in training mode only.
        layer_norm_epsilon: added to the variance, > 0.
        initializer_range: standard deviation of freshly made weights.
        summary_type, summary_use_proj, summary_activation, summary_proj_to_labels, summary_first_dropout: the
            multiple-choice head of GPT2DoubleHeadsModel.
        scale_attn_weights: scale scores by ``1 / sqrt(head_dim)``.
        scale_attn_by_inverse_layer_idx: scale scores of block i (from 0) by ``1 / (i + 1)`` as well.
        reorder_and_upcast_attn: scores in float32; gpt2rt always does so.
        add_cross_attention: blocks also attend to an encoder.
        use_cache: return keys and values from forward by default.
        bos_token_id, eos_token_id, pad_token_id: special ids. An id outside the vocabulary is treated as unset (None):
            silently for the default 50256, with a warning otherwise.
        tie_word_embeddings: the output layer shares the token embedding.
        **kwargs: the shared fields of :class:`PretrainedConfig`, transformers' general names (``hidden_size``, ...),
            and any other key, which is kept. ``n_ctx`` of old files is kept but has no effect.
    Raises:
        ConfigError: a field breaks its rule.
    """

    model_type = "gpt2"
    _activation_field = "activation_function"
    _flags: ClassVar[tuple[str, ...]] = (
        *DecoderConfig._flags,
        "scale_attn_weights",
        "use_cache",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    )
    _default_token_id = 50256

    def __init__(
        self,
        *,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        activation_function: str = "gelu_new",
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
        scale_attn_weights: bool = True,
        use_cache: bool = True,
        bos_token_id: int | None = 50256,
        eos_token_id: int | list[int] | None = 50256,
        pad_token_id: int | None = None,
        scale_attn_by_inverse_layer_idx: bool = False,
        reorder_and_upcast_attn: bool = False,
        add_cross_attention: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.activation_function = activation_function
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
        self.scale_attn_weights = scale_attn_weights
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.reorder_and_upcast_attn = reorder_and_upcast_attn
        self.add_cross_attention = add_cross_attention
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    def validate(self) -> None:
        if self.n_inner is not None:
            self._check_int("n_inner", 1)
        super().validate()

    def _block_weights(self) -> int:
        attention = 4 * self.n_embd * self.n_embd * (2 if self.add_cross_attention else 1)
        return attention + 2 * self.n_embd * (self.n_inner or 4 * self.n_embd)
