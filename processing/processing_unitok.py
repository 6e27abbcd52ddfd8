"""UniTokProcessor: text and pictures to one stream of ids, and streams back to text and pictures.

    "a red <|image|> apple", [picture]   ->   bos a red image_start <|image|>·n image_end apple     + pixel_values

- an image stands at each `<|image|>` of the text; without any, the images of a sample come before its text
- `generation_mode="image"` ends the prompt with image_start: the next token is a code
- control tokens that somebody typed are text: a stream begins, ends and opens images where we say so. `<|image|>` alone is
  understood, and of conversations only what their template writes
- placeholders become codes inside the model, which knows the image tokenizer
"""

import re
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils.chat_template_utils import mark_control_tokens

from ..configuration.refusal_unitok import refused_in_words, require_size
from .image_processing_unitok import to_pictures


UNITOK_TOKENS = {
    "image_token": "<|image|>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "uncond_token": "<|uncond|>",
}
MOST_IMAGE_TOKENS = 2**16  # every picture makes a text so much longer
PAD_TOKEN, BOS_TOKEN = "<|pad|>", "<|bos|>"
# A conversation as a model that knows only pictures and captions has seen them: what was said, without who said it.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a text tokenizer the special tokens UniTok needs, in place; returns it.

    Adds `<|image|>`, `<|image_start|>`, `<|image_end|>` and `<|uncond|>` under the attributes `image_token` and so on, a
    bos token where there is none, and a pad token where there is none or where it is the bos or the eos token (the
    embedding of the pad token is never trained).

    Raises:
        ValueError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer needs an eos_token; set it before add_special_tokens")
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": BOS_TOKEN})
    tokenizer._set_model_specific_special_tokens(UNITOK_TOKENS)
    tokenizer.add_special_tokens(UNITOK_TOKENS)
    if tokenizer.pad_token in (None, tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


class UniTokProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call beside those of the tokenizer and the image processor.

    generation_mode (`str`, *optional*, defaults to `"text"`):
        "image" ends every prompt with the token that begins an image.
    """

    generation_mode: str


class UniTokProcessor(ProcessorMixin):
    """Processor of UniTok models.

    Args:
        image_processor: a `UniTokImageProcessor`.
        tokenizer: a fast tokenizer with the tokens of `add_special_tokens`.
        chat_template: Jinja template of conversations with image parts.
        num_image_tokens: codes per image, at most 65,536.

    Raises:
        ValueError: the tokenizer lacks a token, or there are no codes or too many.

    Example:
        >>> processor(text="a red apple", generation_mode="image", return_tensors="pt")
        >>> processor(images=picture, text="", return_tensors="pt")
    """

    valid_processor_kwargs = UniTokProcessorKwargs
    text_kwargs = {"padding": True, "padding_side": "left"}
    generation_mode = "text"

    def __init__(
        self, image_processor, tokenizer, chat_template: str | None = None, num_image_tokens: int = 16, **kwargs
    ):
        missing = [name for name in UNITOK_TOKENS if getattr(tokenizer, name, None) is None]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}; call add_special_tokens on it first")
        require_size("num_image_tokens", num_image_tokens, MOST_IMAGE_TOKENS)
        self.num_image_tokens = num_image_tokens
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.image_start_token = tokenizer.image_start_token
        self.image_end_token = tokenizer.image_end_token
        typed = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        typed = sorted(set(typed) - {self.image_token}, key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, typed)))
        self._marked_image_token = mark_control_tokens(self.image_token, re.compile(re.escape(self.image_token)))
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "UniTokProcessor":
        """As transformers does; raises ValueError about what is in the files, OSError when there are none."""
        with refused_in_words(f"the processor of {pretrained_model_name_or_path} is malformed"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(
        self,
        images: ImageInput | list[list[Image.Image]] | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[UniTokProcessorKwargs],
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with images, `pixel_values` (M, 3, H, W) in reading order.

        Args:
            images: pictures of the samples: one list per sample, or a flat list or batch, one per sample (all of them for
                a single text).
            text: one string per sample; may be left out when there are images.
            **kwargs: `generation_mode`, and those of the tokenizer and the image processor. `sanitize_control_tokens=False`
                is for texts that a chat template has rendered: their control tokens are understood.

        Raises:
            ValueError: an unknown mode; pictures that do not match the samples or their placeholders; or what is no picture
                or no text, also text that UTF-8 cannot write (half a surrogate pair).
        """
        with refused_in_words("these texts and pictures cannot be processed"):
            return self._process(images, text, **kwargs)

    def _process(self, images, text, **kwargs) -> BatchFeature:
        mode = kwargs.get("generation_mode", self.generation_mode)
        if mode not in ("text", "image"):
            raise ValueError(f'generation_mode of the processor must be "text" or "image", got {mode!r}')
        texts = [text] if isinstance(text, str) else text
        if texts is not None and not len(texts):
            raise ValueError("text is an empty list; pass at least one string")
        for number, sample in enumerate(texts or []):
            if not isinstance(sample, str):
                raise ValueError(f"text {number} must be a string, got {type(sample).__name__}")
            try:
                sample.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text {number} is no text that can be written: {error}") from error
        if images is not None:
            images = self._per_sample(images, None if texts is None else len(texts))
            texts = [""] * len(images) if texts is None else list(texts)
            if not texts:
                raise ValueError("images is an empty list, and there is no text")
            for number, (own, sample) in enumerate(zip(images, texts, strict=True)):
                found = sample.count(self.image_token) - sample.count(self._marked_image_token)
                if not found:
                    texts[number] = self.image_token * len(own) + sample
                elif found != len(own):
                    raise ValueError(f"text {number} has {found} {self.image_token}, but {len(own)} images")
            images = [picture for own in images for picture in own]
        if texts is not None:
            if "sanitize_control_tokens" not in kwargs and any(map(self._typed.search, texts)):
                texts = mark_control_tokens(texts, self._typed)
                kwargs["sanitize_control_tokens"] = True
            if kwargs.get("add_special_tokens", True):  # a stream begins with bos, whatever the tokenizer would add
                adds = self.tokenizer("").input_ids == [self.tokenizer.bos_token_id]
                if kwargs.get("sanitize_control_tokens") or not adds:
                    texts = [self.tokenizer.bos_token + sample for sample in texts]
                    kwargs["add_special_tokens"] = False
            if mode == "image":
                texts = [sample + self.image_start_token for sample in texts]
        return super().__call__(images=images or None, text=texts, **kwargs)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers, with `sanitize_control_tokens` on where it can be: text of the conversation is text.

        A conversation that is rendered first (`tokenize=False`) is a string like any other to `__call__`, which is to be
        told that its control tokens count: `processor(text=rendered, sanitize_control_tokens=False)`.
        """
        tokenize, mask = kwargs.get("tokenize", False), kwargs.get("return_assistant_tokens_mask", False)
        kwargs = {"sanitize_control_tokens": tokenize and not mask} | kwargs
        if tokenize and not kwargs["sanitize_control_tokens"]:
            own = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"sanitize_control_tokens": False} | own
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _per_sample(self, images, samples: int | None) -> list[list]:
        """Images as one list per sample."""
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
            images = list(images)
        elif not isinstance(images, list | tuple):
            images = [images]
        if images and isinstance(images[0], list | tuple):
            nested = [list(own) for own in images]
        elif samples == 1:
            nested = [list(images)]
        else:
            nested = [[picture] for picture in images]
        if samples is not None and len(nested) != samples:
            raise ValueError(
                f"{samples} texts, but images for {len(nested)} samples; pass one list of images per text"
            )
        return nested

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What one `<|image|>` of the text becomes."""
        return self.image_start_token + self.image_token * self.num_image_tokens + self.image_end_token

    def postprocess(self, images: torch.Tensor, **kwargs) -> BatchFeature:
        """As the image processor's: `pixel_values`, PIL pictures of (B, 3, H, W) in [-1, 1]."""
        return self.image_processor.postprocess(images, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[Image.Image]:
        """Strings of generated ids, or PIL pictures of decoded images when `generation_mode` is "image"."""
        if generation_mode == "image":
            return to_pictures(generated_outputs)
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def decode_mixed(
        self, ids: torch.LongTensor, model, on_error: Literal["raise", "skip", "pad"] = "raise"
    ) -> list[list[str | Image.Image]]:
        """Streams (B, T) as lists of strings and PIL pictures; empty text and images that were skipped are left out."""
        rows = []
        for segments in model.decode_mixed_tokens(ids, tokenizer=self.tokenizer, on_error=on_error):
            parts = [to_pictures(part.image[None])[0] if part.image is not None else part.text for part in segments]
            rows.append([part for part in parts if part])
        return rows


__all__ = ["UniTokProcessor", "add_special_tokens"]
