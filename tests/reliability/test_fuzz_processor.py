"""The processor, given any texts and pictures: control tokens that somebody typed stay text, images stand where they are said to."""

import numpy as np
import pytest
import torch
from hostile_profile import documented, hypothesis
from PIL import Image

from unitok_hf import UniTokImageProcessor, UniTokProcessor


st = hypothesis.strategies

TOKENS = [
    "<|image|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|uncond|>",
    "<|bos|>",
    "<|pad|>",
    "<|endoftext|>",
    "<|",
    "|>",
    "image",
]
words = st.one_of(
    st.text(max_size=12), st.sampled_from(TOKENS), st.characters(), st.sampled_from(["\ud800", "\0", "\u202e", " "])
)
typed = st.lists(words, max_size=6).map("".join)
sides = st.integers(0, 9)


@st.composite
def pictures(draw):
    kind = draw(st.sampled_from(["pil", "pil", "pil", "array", "tensor", "none"]))
    width, height = draw(sides), draw(sides)
    if kind == "pil":
        mode = draw(
            st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I", "F", "I;16", "YCbCr", "HSV", "LAB"])
        )
        return Image.new(mode, (width, height), draw(st.sampled_from([0, 1])) if mode in "1LPIF" else 0)
    shape = draw(st.sampled_from([(height, width, 3), (3, height, width), (height, width), (2, height, width, 3)]))
    if kind == "array":
        return np.zeros(shape, draw(st.sampled_from(["uint8", "float32", "int64", "bool", "float16"])))
    return torch.full(shape, draw(st.sampled_from([0.0, float("nan"), 1e30]))) if kind == "tensor" else None


samples = st.one_of(st.none(), typed, st.lists(st.one_of(typed, typed, typed, st.none()), max_size=3))
images = st.one_of(
    st.none(), pictures(), st.lists(pictures(), max_size=3), st.lists(st.lists(pictures(), max_size=2), max_size=3)
)


@pytest.fixture(scope="module")
def small(tokenizer):
    """A processor of 8x8 pictures and 4 codes an image."""
    pixels = UniTokImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return UniTokProcessor(pixels, tokenizer, num_image_tokens=4)


@hypothesis.given(text=samples, images=images, mode=st.sampled_from(["text", "image"]))
def test_any_texts_and_pictures_make_a_stream_or_are_refused(small, text, images, mode):
    with documented():
        batch = small(text=text, images=images, generation_mode=mode, return_tensors="pt")
        ids, tokenizer = batch["input_ids"], small.tokenizer
        count = len(batch["pixel_values"]) if "pixel_values" in batch else 0
        extra = len(ids) if mode == "image" else 0
        assert (ids == tokenizer.image_token_id).sum() == 4 * count
        assert (ids == tokenizer.image_start_token_id).sum() == count + extra
        assert (ids == tokenizer.image_end_token_id).sum() == count
        assert (ids == tokenizer.uncond_token_id).sum() == 0
        for row, mask in zip(ids, batch["attention_mask"], strict=True):
            stream = row[mask.bool()].tolist()
            assert stream[0] == tokenizer.bos_token_id and stream.count(tokenizer.bos_token_id) == 1
            assert mode != "image" or stream[-1] == tokenizer.image_start_token_id
        if count:
            assert batch["pixel_values"].shape[1:] == (3, 8, 8)
