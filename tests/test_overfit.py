"""A model that has learnt eight pictures and their captions by heart draws each from its caption and names each.

Nothing in between can be wrong then: placeholders, labels, codes, positions, padding, grammar, guidance, decoding.
"""

import pytest
import torch
from transformers import NanoChatConfig, NanoChatForCausalLM

from unitok_hf import UniTokForConditionalGeneration, UniTokVQModel
from unitok_hf.training.collators import StreamCollator, StreamDataset, read_rows, to_pixels


STEPS = 300


@pytest.fixture(scope="module")
def pixels(pictures) -> torch.Tensor:
    """(8, 3, 64, 64)."""
    return torch.stack([to_pixels(picture) for picture in pictures])


@pytest.fixture(scope="module")
def vq_model(pixels) -> UniTokVQModel:
    """An untrained encoder whose 32 codes are latents of the pictures, every fourth patch."""
    torch.manual_seed(0)
    model = UniTokVQModel(block_out_channels=(32, 32, 32), latent_channels=8, num_vq_embeddings=32).eval()
    with torch.no_grad():
        model.codebook.copy_(model.encode(pixels).latents.permute(0, 2, 3, 1).flatten(0, 2)[::4])
    return model


@pytest.fixture(scope="module")
def codes(vq_model, pixels) -> torch.Tensor:
    """(8, 16), another row for every picture, of codes that they share."""
    codes = vq_model.encode_to_indices(pixels).flatten(1)
    assert len(codes.unique(dim=0)) == 8
    return codes


@pytest.fixture(scope="module")
def overfitted(vq_model, tokenizer, pictures, captions, tmp_path_factory) -> UniTokForConditionalGeneration:
    """A NanoChat of two layers of width 128 after 150 steps on all eight pairs, in both orders and without caption."""
    import datasets

    file = tmp_path_factory.mktemp("data") / "pictures.parquet"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": pictures, "text": captions}, features=features).to_parquet(str(file))
    torch.manual_seed(0)
    text_model = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer).train()
    options = {"codes_per_image": 16, "text_column": "text", "max_length": 64, "augment": "none", "seed": 0}
    samples = []
    for image_first, caption_dropout in ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0)):
        orders = {"image_first": image_first, "caption_dropout": caption_dropout}
        streams = StreamDataset(read_rows(str(file)), tokenizer, **orders, **options)
        samples += [streams[index] for index in range(8)]
    batch = StreamCollator(tokenizer)(samples)
    assert batch["input_ids"].shape[0] == len(batch["pixel_values"]) == 24
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def uncond_prompts(tokenizer) -> torch.Tensor:
    """Eight prompts (8, 3) with a dropped caption, as training has them; typed, `<|uncond|>` would be text."""
    return torch.tensor([[tokenizer.bos_token_id, tokenizer.uncond_token_id, tokenizer.image_start_token_id]] * 8)


@pytest.fixture(scope="module")
def draw(overfitted, processor, captions):
    """Codes (8, 16) drawn from the captions in one batch."""

    def draw_with(**options) -> torch.Tensor:
        inputs = processor(text=captions, generation_mode="image", return_tensors="pt")
        ids = overfitted.generate(**inputs, generation_mode="image", **options)
        return overfitted.vocabulary.to_codes(ids)

    return draw_with


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 3.0}, {"num_beams": 3}, {"do_sample": True, "image_top_k": 1}, {"guidance_scale": 1.5}],
    ids=["greedy", "guided", "beams", "likeliest code", "a little guided"],
)
def test_every_caption_gives_the_exact_codes_of_its_picture(draw, codes, options):
    assert torch.equal(draw(**options), codes)


def test_without_a_caption_the_codes_are_those_of_some_picture_but_not_of_all(overfitted, processor, codes):
    inputs = {"input_ids": uncond_prompts(processor.tokenizer)}
    drawn = overfitted.vocabulary.to_codes(overfitted.generate(**inputs, generation_mode="image"))
    assert len(drawn.unique(dim=0)) == 1
    assert (drawn[0] == codes).all(dim=1).any()


def test_every_picture_gives_its_exact_caption(overfitted, processor, pictures, captions):
    inputs = processor(images=pictures, return_tensors="pt")
    streams = overfitted.generate(**inputs, generation_mode="text")
    assert processor.batch_decode(streams, skip_special_tokens=True) == captions
    assert all(overfitted.config.eos_token_id in row for row in streams)
    answers = [parts[-1] for parts in processor.decode_mixed(streams, overfitted)]
    assert answers == captions


def test_left_to_itself_the_model_draws_after_a_caption_and_writes_after_a_picture(
    overfitted, processor, pictures, captions, codes
):
    inputs = processor(
        text=[captions[0], "", captions[2], ""], images=[[], [pictures[1]], [], [pictures[3]]], return_tensors="pt"
    )
    streams = overfitted.generate(**inputs)
    found = overfitted.decode_mixed_tokens(streams, processor.tokenizer)
    for row, segments in enumerate(found):
        [image] = [segment for segment in segments if segment.type == "image"]
        assert torch.equal(overfitted.vocabulary.to_codes(image.ids[1:-1]), codes[row])
        assert "".join(segment.text for segment in segments if segment.type == "text") == captions[row]
    assert [[segment.type for segment in segments if segment.text != ""] for segments in found] == [
        ["text", "image"],
        ["image", "text"],
    ] * 2


def test_the_codes_that_are_given_decide_how_a_picture_goes_on(overfitted, processor, codes):
    half = overfitted.vocabulary.to_ids(codes[:, :8])
    assert len(half.unique(dim=0)) == 8
    inputs = {"input_ids": uncond_prompts(processor.tokenizer)}
    prompt = torch.cat([inputs["input_ids"], half], dim=1)
    drawn = overfitted.vocabulary.to_codes(overfitted.generate(prompt, generation_mode="image"))
    assert torch.equal(drawn, codes)


def test_the_loss_of_a_picture_is_low_only_after_its_caption(overfitted, processor, pixels, captions):
    def image_losses(order: list[int]) -> list[float]:
        text = [f"{captions[index]}<|image|>" for index in order]
        inputs = processor(text=text, images=list((pixels + 1) * 127.5), return_tensors="pt")
        rows = []
        for index in range(8):
            row = {name: value[index : index + 1] for name, value in inputs.items()}
            with torch.no_grad():
                rows.append(overfitted(**row, labels=row["input_ids"]).image_loss.item())
        return rows

    right, wrong = image_losses(list(range(8))), image_losses([*range(1, 8), 0])
    assert max(right) < 0.1
    assert min(wrong) > 10 * max(right)
