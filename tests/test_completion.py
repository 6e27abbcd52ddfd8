"""Pictures of which a part is given are finished, and the part stays what it was."""

import pytest
import torch

from unitok_hf import UniTokForConditionalGeneration


N = 16


@pytest.fixture
def prompts(processor) -> dict:
    return dict(processor(text=["a red circle", "a"], return_tensors="pt"))


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(64, (2, N), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def slowly(
    model: UniTokForConditionalGeneration, prompt: list[int], codes: torch.Tensor, keep: torch.Tensor, scale: float
):
    """The greedy picture (n,) from its definition: a full forward pass per branch and code, kept codes put in place."""
    bos, uncond, start = model.config.bos_token_id, model.config.uncond_token_id, model.vocabulary.image_start
    drawn = []
    for code, kept in zip(codes.tolist(), keep.tolist(), strict=True):
        ids = [start, *(384 + one for one in drawn)]
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1, 384:]
        free = model(torch.tensor([[bos, uncond, *ids]])).logits[0, -1, 384:]
        drawn.append(code if kept else int((free + scale * (logits - free)).argmax()))
    return torch.tensor(drawn) + 384


MASKS = {
    "the upper half": torch.arange(N) < 8,
    "the lower half": torch.arange(N) >= 8,
    "a column": torch.arange(N) % 4 == 2,
    "everything but one": torch.arange(N) != 5,
    "nothing": torch.zeros(N, dtype=torch.bool),
}


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kept", MASKS)
def test_codes_that_are_kept_stay_and_the_others_follow_what_is_before_them(model, prompts, codes, kept, scale):
    ids = model.complete_image(**prompts, image_codes=codes, keep=MASKS[kept].view(4, 4), guidance_scale=scale)
    assert torch.equal(ids[:, MASKS[kept]], codes[:, MASKS[kept]] + 384)
    for row in range(2):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1].tolist()
        assert torch.equal(ids[row], slowly(model, prompt, codes[row], MASKS[kept], scale))


def test_every_row_may_keep_something_else(model, prompts, codes):
    masks = torch.stack([MASKS["the upper half"], MASKS["a column"]])
    for shape in ((2, 4, 4), (2, N)):
        ids = model.complete_image(**prompts, image_codes=codes.view(2, 4, 4), keep=masks.view(shape))
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in prompts.items()}
            assert torch.equal(
                ids[row], model.complete_image(**alone, image_codes=codes[row, None], keep=masks[row, None])[0]
            )


def test_a_number_keeps_the_first_codes_and_zero_and_all_are_the_ends(model, prompts, codes):
    five = model.complete_image(**prompts, image_codes=codes, keep=5)
    assert torch.equal(five, model.complete_image(**prompts, image_codes=codes, keep=(torch.arange(N) < 5).view(4, 4)))
    assert torch.equal(five[:, :5], codes[:, :5] + 384) and not torch.equal(five, codes + 384)
    assert torch.equal(model.complete_image(**prompts, image_codes=codes, keep=N), codes + 384)
    drawn = model.generate(**prompts, generation_mode="image")
    assert torch.equal(model.complete_image(**prompts, image_codes=codes, keep=0), drawn)
    begun = torch.cat([prompts["input_ids"], torch.full((2, 1), model.vocabulary.image_start)], dim=1)
    assert torch.equal(model.complete_image(begun, image_codes=codes, keep=0), drawn)


def test_pixels_are_kept_as_their_codes(model, prompts, noise):
    ids = model.complete_image(**prompts, pixel_values=noise[:2], keep=8)
    assert torch.equal(ids[:, :8], model.get_image_tokens(noise[:2])[:, :8])
    assert model.decode_image_tokens(ids).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("keep", [6, MASKS["a column"].view(4, 4)], ids=["first", "mask"])
def test_several_completions_differ_and_a_generator_makes_them_again(model, prompts, codes, keep):
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"do_sample": True, "num_return_sequences": 3, "generator": generator, "guidance_scale": 2.0}
        return model.complete_image(**prompts, image_codes=codes, keep=keep, **options)

    ids = draw(1)
    assert ids.shape == (6, N) and len(ids.unique(dim=0)) == 6
    assert torch.equal(ids, draw(1)) and not torch.equal(ids, draw(2))
    mask = torch.arange(N) < keep if isinstance(keep, int) else keep.flatten()
    assert torch.equal(ids[:, mask], codes.repeat_interleave(3, dim=0)[:, mask] + 384)
    for option in ({"image_top_k": 1}, {"image_temperature": 1e-4}, {"image_top_p": 1e-6}):
        drawn = model.complete_image(**prompts, image_codes=codes, keep=keep, do_sample=True, **option)
        assert torch.equal(drawn, model.complete_image(**prompts, image_codes=codes, keep=keep))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_codes": None}, "needs the pictures: pass pixel_values or image_codes"),
        ({"pixel_values": torch.zeros(2, 3, 64, 64)}, "pass pixel_values or image_codes, and not both"),
        ({"image_codes": torch.zeros(3, N, dtype=torch.int64)}, r"3 images are 48 tokens, but the rows of input_ids have"),
        ({"image_codes": torch.zeros(2, 9, dtype=torch.int64)}, r"must be integers of shape \(images, 16\)"),
        ({"image_codes": torch.full((2, N), 64)}, r"64 at \[0\] is outside the codebook|64 at \[0, 0\] is outside the codebook"),
        ({"keep": 17}, "keep must be a number of codes from 0 to 16, got 17"),
        ({"keep": -1}, "keep must be a number of codes from 0 to 16, got -1"),
        ({"keep": torch.ones(4, 4)}, r"boolean mask of shape \(4, 4\), \(2, 4, 4\) or \(2, 16\), got torch.float32"),
        ({"keep": torch.ones(3, 4, 4, dtype=torch.bool)}, r"got torch.bool \(3, 4, 4\)"),
        ({"num_beams": 2}, "it cannot use beams, hidden states"),
        ({"temperature": 0.5, "eos_token_id": 3}, "it cannot use eos_token_id, temperature"),
        ({"tempurature": 2.0}, "it cannot use tempurature"),
        ({"guidance_scale": -2.0}, "guidance_scale must be a number from 0 on"),
        ({"input_ids": torch.tensor([[1], [1]]), "attention_mask": torch.tensor([[1], [0]])}, "row 1 of the prompt is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_completed_is_refused(model, prompts, codes, change, message):
    with pytest.raises(ValueError, match=message):
        model.complete_image(**{**prompts, "image_codes": codes, "keep": 4, **change})


def test_a_prompt_that_has_begun_a_picture_is_refused(model, prompts, codes):
    ids = torch.cat([prompts["input_ids"], torch.tensor([[40, 41], [model.vocabulary.image_start, 390]])], dim=1)
    with pytest.raises(ValueError, match="row 1 of the prompt ends inside an image; complete_image gets it as codes"):
        model.complete_image(ids, image_codes=codes, keep=4)
