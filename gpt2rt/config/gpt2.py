"""The configuration of GPT-2."""

import warnings
from typing import Any, ClassVar

from gpt2rt.config.base import PretrainedConfig
from gpt2rt.errors import ConfigError

# transformers' parameter-free activations; its "prelu" and "xielu" carry weights that GPT-2 checkpoints do not have
# fmt: off
ACTIVATIONS = frozenset((
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
))
# fmt: on

SUMMARY_TYPES = ("cls_index", "last", "first", "mean", "attn")

# a GPT-2 of this many weights is a damaged or hostile file, not a model: 2**40 float32 weights are 4 TiB
MAX_PARAMETERS = 2**40
MAX_LAYERS = 10_000


class GPT2Config(PretrainedConfig):
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
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

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
        super().validate()
        for field in ("vocab_size", "n_positions", "n_embd", "n_head"):
            self._check_int(field, 1)
        self._check_int("n_layer", 1, MAX_LAYERS)
        if self.n_inner is not None:
            self._check_int("n_inner", 1)
        if self.n_embd % self.n_head != 0:
            raise ConfigError(
                f"{type(self).__name__}: n_embd = {self.n_embd} with n_head = {self.n_head}, but n_embd must be a "
                f"multiple of n_head; the nearest are {self.n_embd // self.n_head * self.n_head} and "
                f"{(self.n_embd // self.n_head + 1) * self.n_head}"
            )
        self._check_choice("activation_function", ACTIVATIONS)
        self._check_choice("summary_activation", ACTIVATIONS, optional=True)
        self._check_choice("summary_type", SUMMARY_TYPES)
        for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
            self._check_number(field, 0.0, 1.0)
        self._check_number("layer_norm_epsilon", 0.0, 1.0, above=True)
        self._check_number("initializer_range", 0.0, 1e4)
        self._check_bool(
            "summary_use_proj",
            "summary_proj_to_labels",
            "scale_attn_weights",
            "use_cache",
            "scale_attn_by_inverse_layer_idx",
            "reorder_and_upcast_attn",
            "add_cross_attention",
            "tie_word_embeddings",
        )
        for field in ("bos_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, field)
            listed = value if field == "eos_token_id" and isinstance(value, list) else [value]
            if value is not None and not (listed and all(type(token) is int for token in listed)):
                raise self._broken(field, f"a token id{' or a list of them' if field[0] == 'e' else ''} or None")
        self._check_size()

    def _check_size(self) -> None:
        embd, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        attention = 4 * embd * embd * (2 if self.add_cross_attention else 1)
        total = (self.vocab_size + self.n_positions) * embd + self.n_layer * (attention + 2 * embd * inner)
        if total > MAX_PARAMETERS:
            raise ConfigError(
                f"{type(self).__name__}: vocab_size = {self.vocab_size}, n_positions = {self.n_positions}, n_embd = "
                f"{embd}, n_inner = {inner}, n_layer = {self.n_layer} make about {total:.2e} weights, but a model may "
                f"have at most {MAX_PARAMETERS:.2e}; is config.json damaged?"
            )

    def _drop_foreign_token_ids(self) -> None:
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            listed = value if isinstance(value, list) else [] if value is None else [value]
            kept = [token for token in listed if 0 <= token < self.vocab_size]
            if kept == listed:
                continue
            setattr(self, field, kept if isinstance(value, list) and kept else None)
            if value != 50256:
                warnings.warn(
                    f"{type(self).__name__}: {field} = {value!r} lies outside the vocabulary of {self.vocab_size} "
                    "tokens and is treated as unset",
                    stacklevel=4,
                )
