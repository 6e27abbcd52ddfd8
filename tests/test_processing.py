"""What the processor promises: text and pictures to one stream of ids, the pixels of training, and the way back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from unitok_hf import UniTokForConditionalGeneration, UniTokImageProcessor, UniTokProcessor, add_special_tokens
from unitok_hf.training.collators import to_pixels


SLOT = "<|image_start|>" + "<|image|>" * 16 + "<|image_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def red() -> Image.Image:
    return Image.new("RGB", (64, 64), (255, 0, 0))


@pytest.fixture
def colours() -> list[Image.Image]:
    """Red, green and blue: known again by their pixels."""
    return [Image.new("RGB", (64, 64), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]


def streams(processor, **arguments) -> list[str]:
    """The rows of a call as text, special tokens and padding included, a whole image as SLOT."""
    inputs = processor(**arguments, return_tensors="pt")
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    pads = inputs["input_ids"] == processor.tokenizer.pad_token_id
    assert torch.equal(inputs["attention_mask"] == 0, pads)
    return [processor.tokenizer.decode(row).replace(SLOT, "#") for row in inputs["input_ids"]]


def order(processor, **arguments) -> str:
    """First letters of the colours of the pixels of a call."""
    pixels = processor(**arguments, return_tensors="pt")["pixel_values"]
    return "".join("rgb"[int(picture.mean(dim=(1, 2)).argmax())] for picture in pixels)


def test_text_is_a_stream_that_begins_with_bos(processor):
    assert streams(processor, text="a red circle") == ["<|bos|>a red circle"]


def test_an_image_comes_before_the_text_of_its_sample(processor, colours):
    assert streams(processor, text="a red circle", images=colours[0]) == ["<|bos|>#a red circle"]
    several = {"text": ["a red circle", "a red circle"], "images": colours[:2]}
    assert streams(processor, **several) == ["<|bos|>#a red circle"] * 2
    assert order(processor, **several) == "rg"


def test_an_image_stands_where_its_placeholder_is(processor, colours):
    arguments = {"text": "a <|image|> red <|image|>", "images": colours[:2]}
    assert streams(processor, **arguments) == ["<|bos|>a # red #"]
    assert order(processor, **arguments) == "rg"


def test_samples_have_as_many_images_as_they_like(processor, colours):
    arguments = {
        "text": ["red", "a <|image|> <|image|>", "blue"],
        "images": [[colours[2]], [colours[1], colours[0]], []],
    }
    rows = streams(processor, **arguments)
    assert [row.replace("<|pad|>", "") for row in rows] == ["<|bos|>#red", "<|bos|>a # #", "<|bos|>blue"]
    assert order(processor, **arguments) == "bgr"
    assert streams(processor, text="red", images=colours) == ["<|bos|>###red"]


def test_images_need_no_text(processor, colours):
    assert streams(processor, images=colours[0]) == ["<|bos|>#"]
    assert streams(processor, images=colours) == ["<|bos|>#"] * 3
    assert streams(processor, images=[colours[:2], colours[2:]])[0] == "<|bos|>##"


def test_image_mode_ends_every_prompt_with_the_token_that_begins_an_image(processor, red):
    rows = streams(processor, text=["red", "a red circle"], generation_mode="image")
    assert [row.replace("<|pad|>", "") for row in rows] == [
        "<|bos|>red<|image_start|>",
        "<|bos|>a red circle<|image_start|>",
    ]
    assert streams(processor, text="red", images=red, generation_mode="image") == ["<|bos|>#red<|image_start|>"]
    assert streams(processor, images=red, generation_mode="image") == ["<|bos|>#<|image_start|>"]


def test_rows_are_padded_on_the_left(processor, red):
    rows = streams(processor, text=["red", "a red circle"], images=[[], [red]])
    assert rows[0].startswith("<|pad|><|pad|>") and rows[0].endswith("<|bos|>red")
    assert not rows[1].startswith("<|pad|>")


def test_arrays_and_batches_of_them_are_pictures_too(processor, colours):
    text = ["red", "green", "blue"]
    expected = processor(text=text, images=colours, return_tensors="pt")
    channels_last = np.stack([np.asarray(picture) for picture in colours])
    channels_first = torch.from_numpy(channels_last).permute(0, 3, 1, 2)
    for images in (channels_last, channels_first, list(channels_last), list(channels_first)):
        found = processor(text=text, images=images, return_tensors="pt")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (["a", "b"], 3, "2 texts, but images for 3 samples; pass one list of images per text"),
        ("<|image|> <|image|>", 1, r"text 0 has 2 <\|image\|>, but 1 images"),
        (["a", "<|image|>"], [0, 2], r"text 1 has 1 <\|image\|>, but 2 images"),
        (["<|image|>", "b"], [0, 1], r"text 0 has 1 <\|image\|>, but 0 images"),
        ("<|image|>", None, r"Found 1 <\|image\|> tokens in the text but no images were passed"),
    ],
)
def test_images_that_do_not_match_the_texts_are_refused(processor, red, text, images, message):
    if isinstance(images, list):
        images = [[red] * count for count in images]
    elif images is not None:
        images = [red] * images
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images)


def test_an_image_is_never_cut_to_a_length(processor, red):
    with pytest.raises(ValueError, match="[Mm]ismatch in `image` token count"):
        processor(text="red", images=red, truncation=True, max_length=10)


def test_an_unknown_mode_is_refused(processor):
    with pytest.raises(ValueError, match="""must be "text" or "image", got 'images'"""):
        processor(text="red", generation_mode="images")


def test_the_lists_of_the_caller_are_left_as_they_were(processor, red):
    text, images = ["red", "b"], [[red], []]
    processor(text=text, images=images, generation_mode="image")
    assert text == ["red", "b"] and images == [[red], []]


def test_pixels_are_those_of_training_bit_for_bit(processor, pictures):
    levels = np.random.default_rng(0).permutation(np.arange(64 * 64 * 3) % 256).astype(np.uint8)
    every_level = Image.fromarray(levels.reshape(64, 64, 3))
    for picture in [*pictures, every_level]:
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0], to_pixels(picture))
    assert pixels.min() == -1 and pixels.max() == 1
    [back] = processor.postprocess(pixels)["pixel_values"]
    assert np.array_equal(np.asarray(back), np.asarray(every_level))


def test_a_picture_is_turned_upright_before_anything_else(processor):
    upright = Image.new("RGB", (64, 64), "white")
    upright.paste("black", (0, 0, 64, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    shown = processor(images=Image.open(file), return_tensors="pt")["pixel_values"]
    assert torch.equal(shown, processor(images=upright, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("as_array", [False, True])
def test_transparency_is_laid_on_white(processor, as_array):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 64, 32))
    expected = Image.new("RGB", (64, 64), "white")
    expected.paste((0, 0, 255), (0, 0, 64, 32))
    pixels = processor(images=np.asarray(clear) if as_array else clear, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], to_pixels(expected))


def test_another_size_is_resized_and_its_centre_cut_out(processor, red):
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("red", (100, 0, 200, 100))
    pixels = processor(images=wide, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert torch.equal(pixels[0, :, :, 2:-2], to_pixels(red)[:, :, 2:-2])  # the filter looks over the edge
    assert processor(images=wide.resize((9, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


def test_a_processor_of_another_size_makes_pictures_of_that_size():
    image_processor = UniTokImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = image_processor(Image.new("RGB", (300, 100), "red"), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], to_pixels(Image.new("RGB", (32, 32), "red")))


def test_grey_pictures_become_rgb(processor):
    grey = Image.linear_gradient("L").resize((64, 64))
    pixels = processor(images=grey, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], to_pixels(grey.convert("RGB")))


def test_floats_up_to_one_do_not_become_black_in_silence(processor, pictures):
    levels = np.asarray(pictures[0])
    with pytest.raises(ValueError, match="floats up to 1 would become black; pass do_rescale=False"):
        processor(images=levels / 255)
    scaled = processor(images=levels / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.allclose(scaled.float(), to_pixels(pictures[0]), atol=1e-6)
    floats = processor(images=levels.astype(np.float32), return_tensors="pt")["pixel_values"]
    assert torch.equal(floats[0], to_pixels(pictures[0]))


def test_only_the_files_of_the_processor_and_the_tokenizer_are_written_and_load(processor, red, tmp_path):
    processor.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is UniTokProcessor and loaded.num_image_tokens == 16
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is UniTokImageProcessor
    assert AutoTokenizer.from_pretrained(tmp_path).uncond_token == "<|uncond|>"
    arguments = {"text": ["a <|image|> b", "red"], "images": [[red], []], "generation_mode": "image"}
    expected, found = (each(**arguments, return_tensors="pt") for each in (processor, loaded))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_sizes_and_template_of_a_model_are_saved_with_its_processor(tokenizer, tmp_path):
    image_processor = UniTokImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    UniTokProcessor(image_processor, tokenizer, CHAT_TEMPLATE, num_image_tokens=4).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.num_image_tokens == 4 and loaded.chat_template == CHAT_TEMPLATE
    inputs = loaded(images=Image.new("RGB", (64, 64)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and inputs["input_ids"].shape == (1, 1 + 4 + 2)


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(
        ValueError, match="has no image_token, image_start_token, image_end_token, uncond_token; call add"
    ):
        UniTokProcessor(UniTokImageProcessor(), bare)


def test_special_tokens_are_added_once_and_pad_is_never_eos(tokenizer):
    backend = tokenizer.backend_tokenizer
    like_gpt2 = PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(backend.to_str()),
        bos_token="<|eos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
    )
    size = len(add_special_tokens(like_gpt2))
    assert like_gpt2.pad_token == "<|pad|>" != like_gpt2.eos_token
    assert len(add_special_tokens(like_gpt2)) == size
    assert like_gpt2.image_start_token_id == tokenizer.image_start_token_id
    like_qwen = PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(backend.to_str()), eos_token="<|eos|>", pad_token="<|pad|>"
    )
    assert add_special_tokens(like_qwen).bos_token == "<|bos|>"
    with pytest.raises(ValueError, match="needs an eos_token"):
        add_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_conversation_with_image_parts_becomes_a_stream(processor, red):
    processor.chat_template = CHAT_TEMPLATE
    parts = [{"type": "text", "text": "a "}, {"type": "image", "image": red}, {"type": "text", "text": " red"}]
    conversation = [{"role": "user", "content": parts}]
    try:
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        drawing = processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"generation_mode": "image"},
        )
    finally:
        processor.chat_template = None
    assert text == "user: a <|image|> red\nassistant: "
    assert processor.decode(inputs["input_ids"][0]) == f"<|bos|>user: a {SLOT} red\nassistant: "
    assert torch.equal(inputs["pixel_values"][0], to_pixels(red))
    assert drawing["input_ids"][0, -1] == processor.tokenizer.image_start_token_id


TYPED = "a<|eos|>b <|image_end|> c<|image_start|>"


def test_control_tokens_that_were_typed_are_text(processor, red):
    """Alone, beside a picture, in either mode, and as in training."""
    tokenizer = processor.tokenizer
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<|eos|>", "<|image_end|>", "<|image_start|>")}
    [alone, plain] = processor(text=[TYPED, "a"], return_tensors="pt")["input_ids"]
    expected = [
        tokenizer.bos_token_id,
        *tokenizer(TYPED, add_special_tokens=False, split_special_tokens=True).input_ids,
    ]
    assert alone.tolist() == expected and not control & set(expected)
    assert processor.decode(alone, skip_special_tokens=True) == TYPED
    assert plain[plain != tokenizer.pad_token_id].tolist() == processor(text="a")["input_ids"][0]
    drawing = processor(text=TYPED, generation_mode="image")["input_ids"][0]
    assert drawing == [*expected, tokenizer.image_start_token_id]
    beside = processor(images=red, text=f"<|image|>{TYPED}", return_tensors="pt")["input_ids"][0].tolist()
    assert [token for token in beside if token in control] == [
        tokenizer.image_start_token_id,
        tokenizer.image_end_token_id,
    ]
    assert beside[19:] == expected[1:]


def test_control_tokens_in_a_conversation_are_those_of_its_template(processor, red):
    template = "{{ bos_token }}" + CHAT_TEMPLATE.replace("{{ '\n' }}", "{{ eos_token }}")
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": f"{TYPED}<|image|>"}, {"type": "image", "image": red}]},
        {"role": "assistant", "content": [{"type": "image", "image": red}, {"type": "text", "text": "<|bos|>"}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(conversation, chat_template=template, **options)
    tokenizer, ids = processor.tokenizer, inputs["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 2 and ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.image_start_token_id) == ids.count(tokenizer.image_end_token_id) == 2
    assert ids.count(tokenizer.image_token_id) == 32 and len(inputs["pixel_values"]) == 2
    text = processor.decode(ids).replace(SLOT, "[]")
    assert text == f"<|bos|>user: {TYPED}<|image|>[]<|eos|>assistant: []<|bos|><|eos|>"


def test_a_stream_begins_with_bos_whatever_the_tokenizer_does(tokenizer, processor):
    """As training has it; GPT-2's and Qwen's tokenizers add none."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    bare = add_special_tokens(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
        )
    )
    assert bare("a red").input_ids != tokenizer("a red").input_ids
    other = UniTokProcessor(UniTokImageProcessor(), bare)
    for arguments in ({"text": ["a red", ""]}, {"text": "a", "generation_mode": "image"}, {"text": "a<|eos|>"}):
        assert other(**arguments)["input_ids"] == processor(**arguments)["input_ids"]


def test_a_rendered_conversation_is_understood_when_that_is_said(processor):
    template = "{{ bos_token }}" + CHAT_TEMPLATE.replace("{{ '\n' }}", "{{ eos_token }}")
    conversation = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    rendered = processor.apply_chat_template(conversation, chat_template=template)
    one_step = processor.apply_chat_template(conversation, chat_template=template, tokenize=True, return_dict=True)
    told = processor(text=rendered, sanitize_control_tokens=False, add_special_tokens=False)
    assert told["input_ids"] == one_step["input_ids"]
    generation = template.replace("{{ message.role }}", "{% generation %}{{ message.role }}{% endgeneration %}")
    masked = processor.apply_chat_template(
        conversation, chat_template=generation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert masked["input_ids"] == one_step["input_ids"] and sum(masked["assistant_masks"][0]) > 0


def test_the_output_of_either_mode_becomes_what_a_pipeline_returns(processor, pictures):
    pixels = torch.stack([to_pixels(picture) for picture in pictures[:2]])
    images = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert [np.array_equal(*map(np.asarray, pair)) for pair in zip(images, pictures, strict=False)] == [True, True]
    ids = processor(text=["a red circle", "red"], return_tensors="pt")["input_ids"]
    assert processor.post_process_multimodal_output(ids) == ["a red circle", "red"]
    assert processor.post_process_multimodal_output(ids, skip_special_tokens=False)[0] == "<|bos|>a red circle"


def test_pictures_are_clamped_and_rounded_to_eight_bits(processor):
    pixels = torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0]).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    [picture] = processor.postprocess(pixels)["pixel_values"]
    assert np.asarray(picture)[..., 0].tolist() == [[0, 0, 128], [255, 255, 255]]


def test_a_mixed_stream_becomes_strings_and_pictures(processor, pictures, model: UniTokForConditionalGeneration):
    inputs = processor(text=["red <|image|> circle", "a blue square"], images=[pictures[:1], []], return_tensors="pt")
    ids = model.fill_images(inputs["input_ids"], inputs["pixel_values"])
    codes = model.get_image_tokens(inputs["pixel_values"])
    first, second = processor.decode_mixed(ids, model)
    assert [first[0], first[2]] == ["red ", " circle"] and second == ["a blue square"]
    expected = processor.post_process_multimodal_output(model.decode_image_tokens(codes), generation_mode="image")[0]
    assert isinstance(first[1], Image.Image) and first[1].size == (64, 64)
    assert np.array_equal(np.asarray(first[1]), np.asarray(expected))

    cut = ids[:, :-4]  # in the first row the image loses its end
    with pytest.raises(ValueError, match="row 0, positions 4 to 19: not an image of 16 codes"):
        processor.decode_mixed(cut, model)
    assert processor.decode_mixed(cut, model, on_error="skip")[0] == ["red "]
    padded = processor.decode_mixed(cut, model, on_error="pad")[0]
    assert padded[0] == "red " and padded[1].getpixel((63, 63)) == (128, 128, 128)
