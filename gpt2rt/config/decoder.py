"""The rules that the configurations of GPT-2 and OpenAI GPT share."""

import warnings
from typing import ClassVar

from gpt2rt.config.base import PretrainedConfig
from gpt2rt.errors import ConfigError

# transformers' parameter-free activations; its "prelu" and "xielu" carry weights that these checkpoints do not have
# fmt: off
ACTIVATIONS = frozenset((
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
))
# fmt: on

SUMMARY_TYPES = ("cls_index", "last", "first", "mean", "attn")

# a model of this many weights is a damaged or hostile file: 2**40 float32 weights are 4 TiB
MAX_PARAMETERS = 2**40
MAX_LAYERS = 10_000


class DecoderConfig(PretrainedConfig):
    """Base of both configs: sizes, dropout, summary fields and special ids are checked alike."""

    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    # the field that names the activation
    _activation_field: ClassVar[str]
    # fields that are True or False
    _flags: ClassVar[tuple[str, ...]] = ("summary_use_proj", "summary_proj_to_labels", "tie_word_embeddings")
    # a special id outside the vocabulary that is dropped without a warning, for it is only the default
    _default_token_id: ClassVar[int | None] = None

    vocab_size: int
    n_positions: int
    n_embd: int
    n_head: int
    n_layer: int

    def validate(self) -> None:
        super().validate()
        for field in ("vocab_size", "n_positions", "n_embd", "n_head"):
            self._check_int(field, 1)
        self._check_int("n_layer", 1, MAX_LAYERS)
        if self.n_embd % self.n_head != 0:
            raise ConfigError(
                f"{type(self).__name__}: n_embd = {self.n_embd} with n_head = {self.n_head}, but n_embd must be a "
                f"multiple of n_head; the nearest are {self.n_embd // self.n_head * self.n_head} and "
                f"{(self.n_embd // self.n_head + 1) * self.n_head}"
            )
        self._check_choice(self._activation_field, ACTIVATIONS)
        self._check_choice("summary_activation", ACTIVATIONS, optional=True)
        self._check_choice("summary_type", SUMMARY_TYPES)
        for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
            self._check_number(field, 0.0, 1.0)
        self._check_number("layer_norm_epsilon", 0.0, 1.0, above=True)
        self._check_number("initializer_range", 0.0, 1e4)
        self._check_bool(*self._flags)
        for field in ("bos_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, field)
            listed = value if field == "eos_token_id" and isinstance(value, list) else [value]
            if value is not None and not (listed and all(type(token) is int for token in listed)):
                raise self._broken(field, f"a token id{' or a list of them' if field[0] == 'e' else ''} or None")
        self._check_size()

    def _block_weights(self) -> int:
        """About how many weights a block has."""
        return 12 * self.n_embd**2

    def _check_size(self) -> None:
        total = (self.vocab_size + self.n_positions) * self.n_embd + self.n_layer * self._block_weights()
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
            if value != self._default_token_id:
                warnings.warn(
                    f"{type(self).__name__}: {field} = {value!r} lies outside the vocabulary of {self.vocab_size} "
                    "tokens and is treated as unset",
                    stacklevel=4,
                )
