"""UniTokConfig: a causal language model, an image tokenizer, and the vocabulary that joins them.

- `text_config` is the configuration of any causal language model of transformers, NanoChat unless told otherwise
- `vq_config` holds the arguments of `UniTokVQModel` that differ from its defaults
- the sizes of the vocabulary are stored once: `text_config.vocab_size` is always text_vocab_size + num_visual_tokens,
  and the special ids of `text_config` are those of this configuration
- a file is read as one of a stranger: what is malformed is a `ConfigurationError`, a ValueError; nothing in it replaces a
  part of the class, or names code to be fetched
"""

import copy
from collections.abc import Callable
from functools import wraps

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .refusal_unitok import refused_in_words, require_plain_keys
from .vocabulary_unitok import VisualVocabulary


SPECIAL_TOKENS = ("pad", "bos", "eos", "image_start", "image_end", "image", "uncond")
MOST_LAYERS = 4096  # a file of a hundred bytes can ask for 10⁹
ATTENTION_KEYS = ("_attn_implementation", "attn_implementation")


class ConfigurationError(StrictDataclassFieldValidationError, ValueError):
    """A value of another type than its field, or one that the language model's configuration cannot take."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


def refusing(construct: Callable) -> Callable:
    """A constructor or parser of configurations that raises nothing else than ValueError about its arguments."""

    @wraps(construct)
    def refused(*args, **kwargs):
        with refused_in_words("the configuration is malformed", ConfigurationError):
            return construct(*args, **kwargs)

    return refused


def refusing_class(cls: type) -> type:
    """The class with such a constructor; outside `strict`, which puts its checks around the constructor."""
    cls.__init__ = refusing(cls.__init__)
    return cls


@refusing_class
@strict
class UniTokConfig(PreTrainedConfig):
    """Configuration of `UniTokForConditionalGeneration`.

    Args:
        text_config: configuration (or its dict, with `model_type`) of the language model.
        vq_config: arguments of `UniTokVQModel`.
        text_vocab_size: rows for text, special and spare tokens, a multiple of 64; the id of the first code.
        num_visual_tokens: size of the codebook.
        image_grid: height and width of an image in codes.
        image_start_token_id, image_end_token_id: the tokens around an image.
        image_token_id: placeholder for one code, replaced before the model sees it.
        uncond_token_id: stands for a dropped caption, in training and in the unconditional branch of guidance.
        bos_token_id, eos_token_id, pad_token_id: as everywhere; there may be several eos, and bos may be one of them, as
            in GPT-2; pad is none of the others.
        text_loss_weight, image_loss_weight: weights of the two kinds of tokens in the loss.
        tie_word_embeddings: whether input and output embeddings are one matrix.

    Raises:
        ValueError: ids that collide or do not fit, or a `vq_config` of another codebook size; a language model of more than
            4,096 layers, or of this class; as `ConfigurationError` what has another type than its field.
    """

    model_type = "unitok_hf"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="nanochat")}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vq_config: dict | None = None
    text_vocab_size: int = 32768
    num_visual_tokens: int = 1024
    image_grid: list[int] | tuple[int, ...] = (4, 4)
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    image_start_token_id: int = 3
    image_end_token_id: int = 4
    image_token_id: int = 5
    uncond_token_id: int = 6
    text_loss_weight: float | int = 1.0
    image_loss_weight: float | int = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        require_plain_keys(kwargs, type(self), "the configuration")
        if isinstance(self.text_config, dict):
            require_plain_keys(self.text_config, PreTrainedConfig, "text_config")
        self.text_config = copy.deepcopy(self.text_config)
        arguments = (self.vq_config or {}).items()
        self.vq_config = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments}
        self.image_grid = tuple(self.image_grid)
        super().__post_init__(**kwargs)
        if isinstance(self.text_config, UniTokConfig):
            raise ValueError("text_config is that of a UniTok model; it must be that of a language model")
        self.validate_vocabulary()
        self.text_config.vocab_size = self.vocab_size
        self.text_config.bos_token_id = self.bos_token_id
        self.text_config.eos_token_id = self.eos_token_id
        self.text_config.pad_token_id = self.pad_token_id
        self.text_config.tie_word_embeddings = self.tie_word_embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "UniTokConfig":
        """As transformers does; raises ValueError about what is in the file, OSError when there is none."""
        with refused_in_words(
            f"the configuration of {pretrained_model_name_or_path} is malformed", ConfigurationError
        ):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As transformers does; raises OSError where there is no configuration, instead of making one up."""
        found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not found:
            raise FileNotFoundError(f"no configuration at {pretrained_model_name_or_path}")
        return found, rest

    @classmethod
    @refusing
    def from_dict(cls, config_dict: dict, **kwargs) -> "UniTokConfig":
        """As transformers does, for the content of a file; which attention to use is for the caller to say.

        Raises:
            ValueError: as the class; or an attention implementation that is code of a repository on the Hub.
        """
        for part in (config_dict, config_dict.get("text_config")):
            for key in ATTENTION_KEYS:
                if isinstance(part, dict) and "/" in str(part.get(key)):
                    raise ValueError(
                        f"the configuration wants code from the Hub, {key} {part[key]!r}; "
                        "pass attn_implementation yourself if you trust it"
                    )
        return super().from_dict(config_dict, **kwargs)

    def validate_vocabulary(self):
        """Ids and sizes that must fit together; called on construction and before saving."""
        if self.text_vocab_size % 64 or self.text_vocab_size < 64:
            raise ValueError(f"text_vocab_size must be a multiple of 64, got {self.text_vocab_size}")
        layers = getattr(self.text_config, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"text_config has {layers:,} layers, more than {MOST_LAYERS:,}")
        if self.num_visual_tokens < 1:
            raise ValueError(f"num_visual_tokens must be at least 1, got {self.num_visual_tokens}")
        named = {f"{kind}_token_id": getattr(self, f"{kind}_token_id") for kind in SPECIAL_TOKENS}
        if self.eos_token_id == []:
            raise ValueError("eos_token_id is an empty list; a stream needs at least one token to end with")
        tokens = [(name, token) for name, ids in named.items() for token in (ids if isinstance(ids, list) else [ids])]
        for name, token in tokens:
            if token is None or not 0 <= token < self.text_vocab_size:
                raise ValueError(f"{name} {token} is outside the text vocabulary [0, {self.text_vocab_size})")
        kinds = {name: token for name, token in tokens if name not in ("bos_token_id", "eos_token_id")}
        apart = [*kinds.values(), *{token for name, token in tokens if name not in kinds}]  # bos may be an eos
        if len(set(apart)) < len(apart):
            raise ValueError(f"special tokens must have different ids, got {named}")
        codes = self.vq_config.get("num_vq_embeddings", self.num_visual_tokens)
        if codes != self.num_visual_tokens:
            raise ValueError(f"num_visual_tokens is {self.num_visual_tokens}, but vq_config has {codes} codes")
        if len(self.image_grid) != 2 or min(self.image_grid) < 1:
            raise ValueError(f"image_grid must be a height and a width in codes, got {self.image_grid}")

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings: text, special, spare and visual."""
        return self.text_vocab_size + self.num_visual_tokens

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.text_config.hidden_size

    @property
    def vocabulary(self) -> VisualVocabulary:
        """The arithmetic between codes and token ids."""
        return VisualVocabulary(
            offset=self.text_vocab_size,
            num_codes=self.num_visual_tokens,
            image_start=self.image_start_token_id,
            image_end=self.image_end_token_id,
            grid=tuple(self.image_grid),
        )


__all__ = ["UniTokConfig"]
