"""What the model promises: its loss, its three ways of taking pictures in, saving and loading, and growing."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from unitok_hf import UniTokForConditionalGeneration, UniTokModel


START, END, PLACEHOLDER = 3, 4, 5
OFFSET, N = 384, 16
IMAGE = [START, *[PLACEHOLDER] * N, END]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
SMALL_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 320, "initializer_range": 0.2}


@pytest.fixture
def model(model, noise) -> UniTokForConditionalGeneration:
    """The model of all tests, with the latents of the noise as its codebook: its 64 patches have 64 codes."""
    vqmodel = model.model.vqmodel
    with torch.no_grad():
        vqmodel.codebook.copy_(vqmodel.encode(noise).latents.permute(0, 2, 3, 1).flatten(0, 2))
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows: an image before its text, a text before its image; the first is padded on the right."""
    rows = [[1, *IMAGE, 20, 21, 2, 0], [1, 22, 23, 24, *IMAGE, 2]]
    input_ids = torch.tensor(rows)
    attention_mask = (input_ids != 0).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def labels(batch) -> torch.Tensor:
    """Everything but padding."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> tuple[list[float], list[float]]:
    """Text and image terms of rows, worked out token by token in double precision.

    Args:
        logits: (B, T, V).
        targets: (B, T) ids in place, not shifted, without placeholders; -100 is left out.
    """
    text, image = [], []
    for row, ids in zip(logits.double().tolist(), targets.tolist(), strict=True):
        for scores, target in zip(row[:-1], ids[1:], strict=True):
            if target != -100:
                largest = max(scores)
                log_sum = largest + math.log(sum(math.exp(score - largest) for score in scores))
                (image if target >= OFFSET else text).append(log_sum - scores[target])
    return text, image


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture
def codes() -> torch.Tensor:
    """Codes (2, 16) of two images."""
    return torch.randint(64, (2, N), generator=torch.Generator().manual_seed(5))


def with_codes(ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`ids` with the placeholders of each row replaced by the visual ids of its image."""
    ids = ids.clone()
    for row, own in zip(ids, codes, strict=True):
        row[row == PLACEHOLDER] = own + OFFSET
    return ids


def test_the_loss_is_the_cross_entropy_of_text_and_codes(model, batch, labels, codes):
    output = model(**batch, image_codes=codes, labels=labels)
    text, image = cross_entropies(output.logits, with_codes(labels, codes))
    assert (len(text), len(image)) == (2 + 3 + 2 * 2 + 2, 2 * N)  # words, eos, and both ends of both images
    assert output.loss.item() == pytest.approx(mean(text + image), rel=1e-5)
    assert output.text_loss.item() == pytest.approx(mean(text), rel=1e-5)
    assert output.image_loss.item() == pytest.approx(mean(image), rel=1e-5)
    assert abs(mean(text) - mean(image)) > 0.01


def test_the_loss_is_divided_by_the_number_of_items_it_is_given(model, batch, labels, codes):
    output = model(**batch, image_codes=codes, labels=labels, num_items_in_batch=torch.tensor(100))
    text, image = cross_entropies(output.logits, with_codes(labels, codes))
    assert output.loss.item() == pytest.approx(sum(text + image) / 100, rel=1e-5)
    assert output.text_loss.item() == pytest.approx(mean(text), rel=1e-5)


def test_the_weights_of_the_configuration_weigh_the_two_kinds_of_tokens(model, batch, labels, codes):
    model.config.text_loss_weight, model.config.image_loss_weight = 0.25, 3
    output = model(**batch, image_codes=codes, labels=labels, num_items_in_batch=10)
    text, image = cross_entropies(output.logits, with_codes(labels, codes))
    assert output.loss.item() == pytest.approx((0.25 * sum(text) + 3 * sum(image)) / 10, rel=1e-5)
    assert output.image_loss.item() == pytest.approx(mean(image), rel=1e-5)


def test_a_batch_of_image_targets_alone_has_no_text_loss(model, batch, labels, codes):
    labels = labels.masked_fill(labels != PLACEHOLDER, -100)
    output = model(**batch, image_codes=codes, labels=labels)
    text, image = cross_entropies(output.logits, with_codes(labels, codes))
    assert text == [] and len(image) == 2 * N
    assert output.loss.item() == pytest.approx(mean(image), rel=1e-5)
    assert output.text_loss.item() == 0


def test_a_batch_of_text_targets_alone_has_no_image_loss(model):
    input_ids = torch.tensor([[1, 20, 21, 22, 2]])
    output = model(input_ids, labels=input_ids)
    text, image = cross_entropies(output.logits, input_ids)
    assert image == [] and len(text) == 4
    assert output.loss.item() == pytest.approx(mean(text), rel=1e-5)
    assert output.image_loss.item() == 0


def test_labels_cloned_from_the_input_train_on_the_codes_and_not_on_the_placeholder(model, batch, codes):
    input_ids = batch["input_ids"][1:]
    output = model(input_ids, image_codes=codes[1:], labels=input_ids.clone())
    filled = with_codes(input_ids, codes[1:])
    assert torch.equal(output.loss, model(filled, labels=filled).loss)


def test_the_labels_of_the_caller_are_left_as_they_were(model, batch, labels, codes):
    input_ids, before = batch["input_ids"].clone(), labels.clone()
    model(**batch, image_codes=codes, labels=labels)
    assert torch.equal(labels, before) and torch.equal(batch["input_ids"], input_ids)


def test_gradients_of_two_micro_batches_add_up_to_those_of_the_whole(model, batch, labels, codes):
    items = int((labels[:, 1:] != -100).sum())
    model(**batch, image_codes=codes, labels=labels).loss.backward()
    whole = model.lm_head.weight.grad.clone()
    model.zero_grad()
    for row in (slice(0, 1), slice(1, 2)):
        part = {name: value[row] for name, value in batch.items()}
        model(**part, image_codes=codes[row], labels=labels[row], num_items_in_batch=items).loss.backward()
    assert torch.allclose(model.lm_head.weight.grad, whole, atol=1e-6)


def test_pixels_codes_and_ids_are_three_ways_to_say_the_same(model, batch, labels, noise):
    pixels = noise[:2]
    codes = model.model.vqmodel.encode_to_indices(pixels)  # (2, 4, 4)
    assert torch.equal(codes, torch.arange(32).view(2, 4, 4))
    by_pixels = model(**batch, pixel_values=pixels, labels=labels)
    by_codes = model(**batch, image_codes=codes, labels=labels)
    by_flat_codes = model(**batch, image_codes=codes.flatten(1).int(), labels=labels)
    filled = with_codes(batch["input_ids"], codes.flatten(1))
    by_ids = model(filled, batch["attention_mask"], labels=with_codes(labels, codes.flatten(1)))
    for other in (by_codes, by_flat_codes, by_ids):
        assert torch.equal(other.logits, by_pixels.logits)
        assert torch.equal(other.loss, by_pixels.loss)


def test_pictures_fill_the_placeholders_in_reading_order(model, noise):
    two, one = torch.tensor([[1, *IMAGE, *IMAGE, 20]]), torch.tensor([[1, *IMAGE, 20]])
    first, second, third = model.get_image_tokens(noise[:3])
    filled = model.fill_images(two, noise[:2])
    assert torch.equal(filled[0, 2:18], first) and torch.equal(filled[0, 20:36], second)
    padded = torch.cat([torch.zeros(1, 18, dtype=torch.int64), one], dim=1)
    filled = model.fill_images(torch.cat([padded, two]), noise[:3])
    assert torch.equal(filled[0, 20:36], first)
    assert torch.equal(filled[1, 2:18], second) and torch.equal(filled[1, 20:36], third)


def test_another_picture_gives_other_logits_from_its_first_code_on(model, noise):
    input_ids = torch.tensor([[1, 20, *IMAGE, 21]])
    one, other = (model(input_ids, pixel_values=picture[None]).logits[0] for picture in noise[:2])
    assert torch.equal(one[:3], other[:3])
    assert not torch.allclose(one[3], other[3], atol=0.1) and not torch.allclose(one[-1], other[-1], atol=0.1)


def test_a_code_is_read_from_the_embedding_row_of_its_visual_id(model):
    input_ids, codes = torch.tensor([[1, *IMAGE, 21]]), torch.full((1, N), 7)
    before = model(input_ids, image_codes=codes).logits
    rows = model.get_input_embeddings().weight.data
    rows[[7, PLACEHOLDER, OFFSET + 8]] += 1.0
    assert torch.equal(model(input_ids, image_codes=codes).logits, before)
    rows[OFFSET + 7] += 1.0
    assert not torch.allclose(model(input_ids, image_codes=codes).logits, before, atol=0.1)


def test_a_picture_that_comes_after_a_cached_prompt_is_seen(model, noise):
    head, tail = torch.tensor([[1, 20, 21]]), torch.tensor([[*IMAGE, 22]])
    whole = model(torch.cat([head, tail], dim=1), pixel_values=noise[:1]).logits[:, 3:]
    cache = model(head, use_cache=True).past_key_values
    parts = model(tail, past_key_values=cache, pixel_values=noise[:1]).logits
    assert torch.allclose(parts, whole, atol=1e-4)


def test_embeddings_of_the_ids_can_be_passed_in_their_place(model):
    input_ids = torch.tensor([[1, 20, 21, OFFSET + 3]])
    embeddings = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(input_ids).logits)


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([[1, *IMAGE]], 0, r"0 images are 0 tokens, but the rows of input_ids have \[16\] placeholders \(id 5\)"),
        ([[1, *IMAGE], [1, *IMAGE]], 1, r"1 images are 16 tokens, .* have \[16, 16\] placeholders"),
        ([[1, 20]], 1, r"1 images are 16 tokens, .* have \[0\] placeholders"),
        ([[1, *[PLACEHOLDER] * 8], [1, *[PLACEHOLDER] * 8]], 1, r"1 images .* \[8, 8\] .*; each image needs 16"),
        ([[1, *[PLACEHOLDER] * 17], [1, *[PLACEHOLDER] * 15, 20, 20]], 2, r"2 images .* \[17, 15\] placeholders"),
    ],
)
def test_pictures_that_do_not_fit_the_placeholders_of_each_row_are_refused(model, noise, rows, images, message):
    pixels = noise[:images] if images else None
    with pytest.raises(ValueError, match=message):
        model(torch.tensor(rows), pixel_values=pixels)


def test_pixels_and_codes_together_are_refused(model, noise):
    with pytest.raises(ValueError, match="pixel_values or image_codes, not both"):
        model(torch.tensor([IMAGE]), pixel_values=noise[:1], image_codes=torch.zeros(1, N, dtype=torch.int64))


def test_an_id_outside_the_vocabulary_is_named_with_its_place(model):
    with pytest.raises(ValueError, match=r"row 1, position 2: id 448 is outside the vocabulary \[0, 448\)"):
        model(torch.tensor([[1, 2, 3], [1, 2, 448]]))


def test_pictures_without_ids_are_refused(model, noise):
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 18, 64), pixel_values=noise[:1])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            torch.zeros(4, 8, dtype=torch.int64),
            r"of shape \(images, 16\) or \(images, 4, 4\), got torch.int64 \(4, 8\)",
        ),
        (torch.zeros(32, dtype=torch.int64), r"got torch.int64 \(32,\)"),
        (torch.zeros(2, N), r"image_codes must be integers .* got torch.float32"),
        (torch.full((2, N), 64), r"64 at \[0, 0\] is outside the codebook \[0, 64\)"),
    ],
)
def test_codes_that_are_no_images_of_this_codebook_are_refused(model, batch, codes, message):
    with pytest.raises(ValueError, match=message):
        model(**batch, image_codes=codes)


def test_pictures_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match="the model reads pictures of 64x64 pixels, got 128x64"):
        model.get_image_tokens(torch.zeros(1, 3, 128, 64))


def test_two_steps_of_training_move_every_weight_but_those_of_the_image_tokenizer(model, batch, labels, noise):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, pixel_values=noise[:2], labels=labels).loss.backward()
        optimizer.step()
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith("model.vqmodel.")}
    assert len(frozen) > 50 and len(trainable) == len(before) - len(frozen) > 10
    assert moved == before.keys() - frozen

    # row by row: the head learns from every row, the embedding only from those that a label depends on, never from pad
    head, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    assert (after[head] != before[head]).any(dim=1).all()
    read = model.fill_images(batch["input_ids"], noise[:2])[:, :-1][labels[:, 1:] != -100]
    rows = (after[embedding] != before[embedding]).any(dim=1).nonzero().flatten()
    assert torch.equal(rows, read.unique()) and 0 not in rows


def test_the_image_tokenizer_stays_in_evaluation_mode_and_frozen(model):
    model.train()
    assert model.model.language_model.training and model.model.language_model.layers[0].training
    assert not any(module.training for module in model.model.vqmodel.modules())
    assert not any(parameter.requires_grad for parameter in model.model.vqmodel.parameters())


def test_gradient_checkpointing_changes_no_gradient(model, batch, labels, noise):
    model.train()
    calls = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        calls.clear()
        model(**batch, pixel_values=noise[:2], labels=labels).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    plain = gradients()
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    checkpointed = gradients()
    assert len(calls) == 2  # forward, and again for the backward pass
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


LOAD_IN_A_FRESH_PROCESS = """
import sys
import torch
import transformers
from PIL import Image

import unitok_hf


folder, given = sys.argv[1], torch.load(sys.argv[1] + "/given.pt")
found = {}
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        output = model(**given["batch"], pixel_values=given["pixels"], labels=given["labels"])
    drawn = model.generate(given["batch"]["input_ids"][:1, :1], generation_mode="image", guidance_scale=2.0)
    found[name] = {
        "class": type(model).__name__,
        "logits": output.logits,
        "loss": output.loss,
        "codes": model.get_image_tokens(given["pixels"]),
        "image_temperature": model.generation_config.image_temperature,
        "drawn": drawn,
        "picture": model.decode_image_tokens(drawn),
    }
text, pictures = "a red <|image|> circle", [Image.open(folder + "/picture.png")]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
image_processor = transformers.AutoImageProcessor.from_pretrained(folder)
processor = transformers.AutoProcessor.from_pretrained(folder)
found["processor"] = {
    "classes": [type(image_processor).__name__, type(processor).__name__],
    "tokens": tokenizer(text).input_ids,
    "special": [tokenizer.image_start_token_id, tokenizer.uncond_token_id, tokenizer.pad_token_id],
    "pixels": image_processor(pictures, return_tensors="pt").pixel_values,
    "inputs": dict(processor(text=text, images=pictures, generation_mode="image", return_tensors="pt")),
}
torch.save(found, folder + "/found.pt")
"""


def test_a_fresh_process_loads_the_same_model_and_processor(
    model, processor, batch, labels, noise, pictures, tmp_path
):
    model.generation_config.image_temperature = 0.5
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures[0].save(tmp_path / "picture.png")
    torch.save({"batch": batch, "labels": labels, "pixels": noise[:2]}, tmp_path / "given.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD_IN_A_FRESH_PROCESS, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    found = torch.load(tmp_path / "found.pt")

    with torch.no_grad():
        output = model(**batch, pixel_values=noise[:2], labels=labels)
    drawn = model.generate(batch["input_ids"][:1, :1], generation_mode="image", guidance_scale=2.0)
    of_processor = found.pop("processor")
    assert len(found) == 4
    for auto_class, loaded in found.items():
        assert loaded["class"] == "UniTokForConditionalGeneration", auto_class
        assert torch.equal(loaded["logits"], output.logits), auto_class
        assert torch.equal(loaded["loss"], output.loss), auto_class
        assert torch.equal(loaded["codes"], model.get_image_tokens(noise[:2])), auto_class
        assert torch.equal(loaded["drawn"], drawn), auto_class
        assert torch.equal(loaded["picture"], model.decode_image_tokens(drawn)), auto_class
        assert loaded["image_temperature"] == 0.5, auto_class

    text = "a red <|image|> circle"
    inputs = processor(text=text, images=pictures[:1], generation_mode="image", return_tensors="pt")
    assert of_processor["classes"] == ["UniTokImageProcessor", "UniTokProcessor"]
    assert of_processor["tokens"] == processor.tokenizer(text).input_ids
    assert of_processor["special"] == [START, model.config.uncond_token_id, 0]
    assert torch.equal(of_processor["pixels"], inputs["pixel_values"])
    assert inputs.keys() == of_processor["inputs"].keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(of_processor["inputs"][name], value) for name, value in inputs.items())


def test_one_file_holds_every_weight_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_weights_that_a_checkpoint_lacks_are_drawn_anew_and_the_image_tokenizer_is_not(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path)
    assert 0.15 < loaded.lm_head.weight.std() < 0.25  # initializer_range is 0.2
    for name, value in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_in_half_precision_the_image_tokenizer_stays_exact(model, batch, noise, tmp_path):
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == half.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {value.dtype for value in half.model.vqmodel.state_dict().values()} == {torch.float32}
    assert torch.equal(half.get_image_tokens(noise), model.get_image_tokens(noise))
    logits = half(**batch, pixel_values=noise[:2]).logits
    assert (logits - model(**batch, pixel_values=noise[:2]).logits).abs().mean() < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.get_image_tokens(noise), half.get_image_tokens(noise))


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bfloat16().float(),
        lambda model: model.to("cpu", torch.float16).to(torch.bfloat16),
        lambda model: model.double(),
    ],
    ids=["to", "half", "there and back", "twice", "double"],
)
def test_a_cast_reaches_the_language_model_and_leaves_the_image_tokenizer_as_it_was(model, noise, cast):
    codes = model.get_image_tokens(noise)
    picture = model.decode_image_tokens(codes)
    before = {name: value.clone() for name, value in model.model.vqmodel.state_dict().items()}
    rows = model.lm_head.weight.clone()
    cast(model)
    for name, value in model.model.vqmodel.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in model.model.vqmodel.parameters())
    assert torch.equal(model.get_image_tokens(noise), codes)
    assert torch.equal(model.decode_image_tokens(codes), picture)
    changed = model.lm_head.weight.dtype != rows.dtype or not torch.equal(model.lm_head.weight, rows)
    assert changed and model.lm_head.weight.dtype == next(model.model.language_model.parameters()).dtype


def test_a_new_model_in_half_precision_has_an_image_tokenizer_in_full(model):
    half = UniTokForConditionalGeneration._from_config(model.config, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert {value.dtype for value in half.model.vqmodel.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, {"model.language_model": "cpu", "model.vqmodel": "cpu", "lm_head": "cpu"}],
    ids=["auto", "whole", "parts"],
)
def test_a_device_map_places_the_parts(model, noise, batch, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    placed = AutoModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(placed(**batch, pixel_values=noise[:2]).logits, model(**batch, pixel_values=noise[:2]).logits)
    drawn = placed.generate(batch["input_ids"][:1, :1], generation_mode="image")
    assert torch.equal(drawn, model.generate(batch["input_ids"][:1, :1], generation_mode="image"))


def test_quantizers_leave_the_image_tokenizer_and_the_head_alone(model):
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    converted = {name for name in linear if should_convert_module(name, skipped)}
    assert any(
        "vqmodel" in name and "attentions" in name for name in linear
    )  # Linear layers, which a quantizer would take
    of_text = {name for name in linear if name.startswith("model.language_model.")}
    assert converted == of_text and len(of_text) > 10
    assert not any(should_convert_module(f"{name}.weight", skipped) for name in linear if "vqmodel" in name)


TEXT_MODELS = {
    "nanochat": lambda tied: NanoChatForCausalLM(NanoChatConfig(**SMALL, tie_word_embeddings=tied)),
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)),
    "gpt2": lambda tied: GPT2LMHeadModel(GPT2Config(**SMALL_GPT2, tie_word_embeddings=tied)),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_a_text_model_keeps_its_logits_and_a_tokenizer_its_weights(kind, tied, vq_model, tokenizer, tmp_path):
    torch.manual_seed(0)
    text_model = TEXT_MODELS[kind](tied).train()
    before = {name: value.clone() for name, value in text_model.state_dict().items()}
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    assert text_model.training and not model.training
    assert all(torch.equal(value, before[name]) for name, value in text_model.state_dict().items())

    config = model.config
    assert config.text_vocab_size == 320 and config.num_visual_tokens == 64 and config.image_grid == (4, 4)
    assert config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert config.uncond_token_id == tokenizer.uncond_token_id
    input_ids = torch.tensor([[1, 50, 60, 319, 7, 5]])[:, :-1]
    text_logits = text_model.eval()(input_ids).logits
    logits = model(input_ids).logits
    assert logits.shape[-1] == 384
    assert torch.equal(logits[..., :320], text_logits)
    assert torch.isfinite(logits).all()
    for name, value in vq_model.state_dict().items():
        assert torch.equal(model.model.vqmodel.state_dict()[name], value), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


def test_new_rows_look_like_the_old_ones_and_are_no_likelier_at_first(vq_model, tokenizer):
    torch.manual_seed(0)
    text_model = TEXT_MODELS["llama"](False)
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    embeddings = model.get_input_embeddings().weight
    assert 0.9 < embeddings[320:].std() / embeddings[:320].std() < 1.1
    scores = model(torch.tensor([[1, 50, 60, 70]])).logits[0, -1].softmax(dim=0)
    assert scores[320:].max() < scores[:320].max()
    assert len(embeddings.unique(dim=0)) == len(embeddings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_text_model_in_half_precision_gets_an_image_tokenizer_in_full(dtype, vq_model, tokenizer, tmp_path):
    TEXT_MODELS["llama"](False).save_pretrained(tmp_path)
    text_model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    input_ids = torch.tensor([[1, 50, 60, 70]])
    assert model.lm_head.weight.dtype == dtype
    assert torch.equal(model(input_ids).logits[..., :320], text_model(input_ids).logits)
    assert all(
        torch.equal(model.model.vqmodel.state_dict()[name], value) for name, value in vq_model.state_dict().items()
    )
    nanochat = TEXT_MODELS["nanochat"](False).to(dtype)  # its softcap rounds, ours does not
    UniTokForConditionalGeneration.from_parts(nanochat, vq_model, tokenizer)


def test_a_text_tokenizer_larger_than_the_text_model_gets_rows_and_spare_ones(vq_model, tokenizer):
    text_model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 100}))
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    assert model.config.text_vocab_size == 320 >= len(tokenizer) + 32
    assert model.lm_head.weight.shape == (384, 64)


def test_a_text_tokenizer_without_the_special_tokens_is_refused(vq_model, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|bos|>")
    missing = "pad_token_id, eos_token_id, image_start_token_id, image_end_token_id, image_token_id, uncond_token_id"
    with pytest.raises(ValueError, match=f"the tokenizer has no {missing}; call add_special_tokens"):
        UniTokForConditionalGeneration.from_parts(TEXT_MODELS["llama"](False), vq_model, bare)


@pytest.mark.parametrize(
    "text_model",
    [
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    ],
    ids=["cohere", "granite"],
)
def test_a_text_model_whose_head_does_more_than_ours_is_refused(text_model, vq_model, tokenizer):
    with pytest.raises(ValueError, match=r"computes its logits in a way that UniTok does not reproduce \(largest"):
        UniTokForConditionalGeneration.from_parts(text_model(), vq_model, tokenizer)


@pytest.mark.parametrize("kind", TEXT_MODELS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_when_the_text_grows_the_codes_move_up_as_one_piece(kind, tied, vq_model, tokenizer, codes, tmp_path):
    torch.manual_seed(0)
    model = UniTokForConditionalGeneration.from_parts(TEXT_MODELS[kind](tied), vq_model, tokenizer)
    input_ids = torch.tensor([[1, 50, 319, *IMAGE, 60]])
    before = model(input_ids, image_codes=codes[:1], labels=input_ids)

    embeddings = model.resize_token_embeddings(330)
    assert embeddings is model.get_input_embeddings() and embeddings.weight.shape == (448, 64)
    assert model.lm_head.weight.shape == (448, 64)
    assert model.config.text_vocab_size == 384 and model.vocabulary.offset == 384
    assert model.config.text_config.vocab_size == model.model.language_model.config.vocab_size == 448
    after = model(input_ids, image_codes=codes[:1], labels=input_ids)
    assert torch.equal(after.logits[..., :320], before.logits[..., :320])
    assert torch.equal(after.logits[..., 384:], before.logits[..., 320:])
    assert after.image_loss > 0
    assert model.generate(input_ids[:, :3], generation_mode="image").min() >= 384

    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids, image_codes=codes[:1]).logits, after.logits)


def test_text_that_fits_the_spare_rows_changes_nothing(model):
    before = model.get_input_embeddings().weight.clone()
    for size in (None, 10, 384):
        model.resize_token_embeddings(size)
        assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.config.text_vocab_size == OFFSET
    model.resize_token_embeddings(385, pad_to_multiple_of=100)
    assert model.config.text_vocab_size == 1600  # the least common multiple of 64 and 100


def test_the_model_without_a_head_grows_as_well(model):
    headless: UniTokModel = model.model
    codes = headless.get_input_embeddings().weight[OFFSET:].clone()
    headless.resize_token_embeddings(400)
    assert torch.equal(headless.get_input_embeddings().weight[448:], codes)
    assert headless.vocabulary.offset == 448


def test_labels_may_come_shifted_and_outputs_as_a_tuple(model, processor, pictures, captions):
    batch = processor(text=captions, images=pictures, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    before, after = model(**batch, labels=labels), model(**batch, shift_labels=shifted)
    assert torch.equal(before.loss, after.loss) and torch.equal(before.image_loss, after.image_loss)
    as_tuple = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], before.loss) and torch.equal(as_tuple[3], before.logits)


def test_a_loaded_image_tokenizer_is_frozen_and_the_rest_is_not(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for start in (model, loaded, loaded.train()):
        assert not any(weight.requires_grad for weight in start.model.vqmodel.parameters())
        assert all(weight.requires_grad for weight in start.model.language_model.parameters())
