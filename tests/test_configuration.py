"""What the configuration and the vocabulary promise."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, GPT2Config, LlamaConfig, NanoChatConfig

from unitok_hf import UniTokConfig, VisualVocabulary


VOCABULARY = VisualVocabulary(offset=384, num_codes=64, image_start=3, image_end=4, grid=(2, 3))
IDS = ("pad", "bos", "eos", "image_start", "image_end", "image", "uncond")


@pytest.fixture
def config() -> UniTokConfig:
    """Small, and with no value at its default."""
    return UniTokConfig(
        text_config=NanoChatConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2),
        vq_config={"block_out_channels": (32, 32, 32), "num_vq_embeddings": 64},
        text_vocab_size=384,
        num_visual_tokens=64,
        image_grid=(2, 3),
        **{f"{kind}_token_id": 16 - position for position, kind in enumerate(IDS)},
        text_loss_weight=0.25,
        image_loss_weight=2,
        tie_word_embeddings=True,
    )


def test_codes_are_ids_above_the_text_and_come_back():
    codes = torch.arange(64).view(2, 4, 8)
    ids = VOCABULARY.to_ids(codes)
    assert ids.min() == 384 and ids.max() == VOCABULARY.size - 1 == 447
    assert torch.equal(VOCABULARY.to_codes(ids), codes)


def test_only_ids_of_codes_are_visual():
    assert VOCABULARY.is_visual(torch.tensor([-1, 0, 383, 384, 447, 448])).tolist() == [False] * 3 + [True] * 2 + [
        False
    ]


def test_an_image_in_a_stream_is_its_codes_row_by_row_between_start_and_end():
    codes = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert VOCABULARY.wrap(codes).tolist() == [3, 384, 385, 386, 387, 388, 389, 4]
    assert VOCABULARY.wrap(codes.flatten()).tolist() == VOCABULARY.wrap(codes).tolist()
    assert (VOCABULARY.codes_per_image, VOCABULARY.tokens_per_image) == (6, 8)


@pytest.mark.parametrize("code", [-1, 64])
def test_a_code_outside_the_codebook_is_named_with_its_place(code):
    with pytest.raises(ValueError, match=rf"^{code} at \[1, 0\] is outside the codebook \[0, 64\)"):
        VOCABULARY.to_ids(torch.tensor([[0, 1], [code, 99]]))


@pytest.mark.parametrize("token", [383, 448])
def test_an_id_that_is_no_code_is_named_with_its_place(token):
    with pytest.raises(ValueError, match=rf"^{token} at \[2\] is no visual token \[384, 448\)"):
        VOCABULARY.to_codes(torch.tensor([384, 447, token]))


def test_the_vocabulary_of_a_configuration_is_its_own_numbers(config):
    assert config.vocabulary == VisualVocabulary(384, 64, image_start=13, image_end=12, grid=(2, 3))
    assert config.vocab_size == config.vocabulary.size == 448


def test_the_text_model_is_given_the_size_and_the_ids_of_the_whole(config):
    text_config = config.text_config
    assert text_config.vocab_size == 448
    assert (text_config.pad_token_id, text_config.bos_token_id, text_config.eos_token_id) == (16, 15, 14)
    assert text_config.tie_word_embeddings is True
    assert config.hidden_size == 64


def test_a_configuration_comes_back_from_its_file_as_it_was(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is UniTokConfig and type(loaded.text_config) is NanoChatConfig
    loaded._name_or_path = config._name_or_path  # the folder it came from
    assert loaded.to_dict() == config.to_dict()
    assert loaded.image_grid == config.image_grid == (2, 3)


def test_a_size_in_the_file_that_contradicts_the_layout_is_not_believed(config, tmp_path):
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "vocab_size" not in stored and stored["text_config"]["vocab_size"] == 448
    stored["text_config"] |= {"vocab_size": 7, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.vocab_size == loaded.text_config.vocab_size == 448
    assert loaded.text_config.eos_token_id == 14


@pytest.mark.parametrize("text_config", [GPT2Config(n_embd=32), LlamaConfig(hidden_size=32, num_attention_heads=2)])
def test_any_text_model_can_be_inside(text_config, tmp_path):
    config = UniTokConfig(text_config=text_config, text_vocab_size=64, num_visual_tokens=8)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded.text_config) is type(text_config)
    assert loaded.get_text_config() is loaded.text_config
    assert (loaded.hidden_size, loaded.text_config.vocab_size) == (32, 72)


def test_nanochat_is_inside_unless_told_otherwise():
    assert type(UniTokConfig().text_config) is NanoChatConfig
    assert type(UniTokConfig(text_config={"hidden_size": 64}).text_config) is NanoChatConfig
    assert type(UniTokConfig(text_config={"model_type": "gpt2"}).text_config) is GPT2Config


def test_what_the_user_passes_in_is_not_changed():
    text_config, vq_config = GPT2Config(n_embd=32), {"block_out_channels": (32, 32), "num_vq_embeddings": 1024}
    before = text_config.to_dict()
    config = UniTokConfig(text_config=text_config, vq_config=vq_config)
    config.text_config.n_embd = 48
    config.vq_config["num_vq_embeddings"] = 7
    assert text_config.to_dict() == before
    assert vq_config == {"block_out_channels": (32, 32), "num_vq_embeddings": 1024}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_vocab_size": 100}, "text_vocab_size must be a multiple of 64, got 100"),
        ({"num_visual_tokens": 0}, "num_visual_tokens must be at least 1, got 0"),
        ({"uncond_token_id": 5}, "special tokens must have different ids, got .*'uncond_token_id': 5"),
        ({"pad_token_id": 2}, "special tokens must have different ids, got .*'pad_token_id': 2"),
        ({"text_vocab_size": 64, "image_token_id": 64}, r"image_token_id 64 is outside the text vocabulary \[0, 64\)"),
        ({"bos_token_id": -1}, "bos_token_id -1 is outside the text vocabulary"),
        ({"pad_token_id": None}, "pad_token_id None is outside the text vocabulary"),
        ({"vq_config": {"num_vq_embeddings": 64}}, "num_visual_tokens is 1024, but vq_config has 64 codes"),
        ({"image_grid": (4, 4, 4)}, r"image_grid must be a height and a width in codes, got \(4, 4, 4\)"),
        ({"image_grid": (0, 4)}, r"image_grid must be a height and a width in codes, got \(0, 4\)"),
        ({"text_config": {"model_type": "no-such-model"}}, "no-such-model"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UniTokConfig(**arguments)


def test_numbers_that_no_longer_fit_together_are_not_saved(config, tmp_path):
    config.uncond_token_id = config.image_token_id
    with pytest.raises(Exception, match="special tokens must have different ids"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"text_vocab_size": "384"},
        {"image_grid": 4},
        {"vq_config": 3},
        {"text_config": "nanochat"},
        {"eos_token_id": 2.0},
    ],
)
def test_values_of_the_wrong_type_are_refused(arguments):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{next(iter(arguments))}'"):
        UniTokConfig(**arguments)
