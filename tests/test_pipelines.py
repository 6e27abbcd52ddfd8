"""UniTok models in transformers' pipelines and in diffusers': text, pictures, chats, batches, mixed output, one folder for both."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.utils import is_torchvision_available

from unitok_hf import UniTokAnyToAnyPipeline, UniTokPipeline


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def checkpoint(model, processor, tmp_path) -> str:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def pipe(checkpoint):
    return pipeline("any-to-any", model=checkpoint, pipeline_class=UniTokAnyToAnyPipeline)


def test_a_prompt_becomes_the_picture_that_generate_draws(pipe, model, processor):
    [found] = pipe(text="a red circle", generation_mode="image", generate_kwargs={"do_sample": False})
    inputs = processor(text="a red circle", generation_mode="image", return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="image", do_sample=False)
    [expected] = processor.postprocess(model.decode_image_tokens(ids)).pixel_values
    assert found["input_text"] == "a red circle"
    assert found["generated_image"].tobytes() == expected.tobytes()
    several = pipe(
        text=["a", "a red circle"],
        generation_mode="image",
        generate_kwargs={"do_sample": True, "num_return_sequences": 3},
    )
    assert [entry["input_text"] for entry in several] == ["a"] * 3 + ["a red circle"] * 3


def test_a_picture_becomes_text_alone_in_batches_and_in_a_chat(pipe, model, processor, pictures):
    [found] = pipe(text="a", images=pictures[0], max_new_tokens=6, return_full_text=False)
    inputs = processor(images=pictures[0], text="a", return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="auto", max_new_tokens=6)
    assert processor.batch_decode(ids, skip_special_tokens=True)[0] == "a" + found["generated_text"]
    both = pipe(text=["a", "a red"], images=pictures[:2], max_new_tokens=6)
    assert [entry["input_text"] for entry in both] == ["a", "a red"]
    pipe.processor.chat_template = CHAT
    chat = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "what?"}]}]
    [answer] = pipe(text=chat, max_new_tokens=6)
    assert answer["generated_text"][:-1] == chat and answer["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("mode", ["auto", "interleaved"])
def test_mixed_output_is_strings_and_pictures_in_their_order(pipe, model, processor, mode):
    options = {"do_sample": False, "guidance_scale": 2.0}
    found = pipe(text=["a red circle", "a"], generation_mode=mode, max_new_tokens=40, generate_kwargs=options)
    inputs = processor(text=["a red circle", "a"], return_tensors="pt")
    ids = model.generate(**inputs, generation_mode=mode, max_new_tokens=40, **options)[
        :, inputs["input_ids"].shape[1] :
    ]
    for entry, expected in zip(found, processor.decode_mixed(ids, model, on_error="skip"), strict=True):
        assert [type(part) for part in entry["generated_content"]] == [type(part) for part in expected]
        assert [part for part in entry["generated_content"] if isinstance(part, str)] == [
            part for part in expected if isinstance(part, str)
        ]
    if mode == "interleaved":
        assert all(any(isinstance(part, Image.Image) for part in entry["generated_content"]) for entry in found)


def test_text_to_image_is_a_task_of_its_own(checkpoint):
    draw = pipeline("text-to-image", model=checkpoint)
    for _ in range(2):
        [found] = draw(text="a red circle")
        assert found["generated_image"].size == (64, 64)
    assert "generated_content" in draw(text="a red circle", generation_mode="interleaved", max_new_tokens=40)[0]


def test_the_stock_pipelines_take_our_models(checkpoint, pictures):
    """image-text-to-text always; any-to-any where torchvision is, which it asks for."""
    read = pipeline("image-text-to-text", model=checkpoint)
    [found] = read(images=pictures[0], text="<|image|>a", max_new_tokens=4)
    assert found["generated_text"].startswith("<|image|>a")
    if is_torchvision_available():
        [found] = pipeline("any-to-any", model=checkpoint)(text="a red circle", generation_mode="image")
        assert found["generated_image"].size == (64, 64)
    else:
        with pytest.raises(ImportError, match="[Tt]orchvision"):
            pipeline("any-to-any", model=checkpoint)


def test_one_folder_serves_both_libraries(checkpoint, tmp_path):
    pipe = UniTokPipeline(AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint))
    prompts, options = ["a red circle", "a"], {"num_images_per_prompt": 3, "guidance_scale": 2.0}
    images = pipe(prompts, **options, generator=torch.Generator().manual_seed(1)).images
    assert len(images) == 6 and all(image.size == (64, 64) for image in images)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = UniTokPipeline.from_pretrained(tmp_path / "pipe")
    again = loaded(prompts, **options, generator=torch.Generator().manual_seed(1)).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in again]
    assert type(AutoModel.from_pretrained(tmp_path / "pipe")) is type(pipe.model)
    (tensor,) = loaded("a", temperature=0.0, output_type="pt", return_dict=False)
    assert tensor.shape == (1, 3, 64, 64) and 0 <= tensor.min() and tensor.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "np"}, "output_type must be"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"temperature": 0.0, "num_images_per_prompt": 2}, "draws the same picture every time"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, processor, options, message):
    with pytest.raises(ValueError, match=message):
        UniTokPipeline(model, processor)("a", **options)
