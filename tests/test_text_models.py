"""Any causal language model learns to draw: the same promises for models of several kinds."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    NanoChatConfig,
    Qwen3Config,
)

from unitok_hf import UniTokForConditionalGeneration
from unitok_hf.training.export import plain_text_model


SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SIZE | {"num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "nanochat": NanoChatConfig(**SIZE, pad_token_id=0),
    "llama": LlamaConfig(**SIZE, num_key_value_heads=1),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.fixture(params=CONFIGS)
def text_model(request, tokenizer):
    """A tiny text model whose weights say something."""
    config = CONFIGS[request.param]
    config = type(config)(**config.to_dict() | {"vocab_size": len(tokenizer), "initializer_range": 0.3})
    for name in ("pad", "bos", "eos"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_text_goes_on_as_before_bit_for_bit(text_model, vq_model, tokenizer, processor):
    ids = tokenizer(["a red circle", "a blue"], padding=True, return_tensors="pt", padding_side="left")
    before = text_model(**ids).logits
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    after = model(**ids).logits
    assert torch.equal(before, after[..., : before.shape[-1]])
    assert torch.equal(before, text_model(**ids).logits)


def test_it_trains_draws_writes_and_comes_back(
    text_model, vq_model, tokenizer, processor, pictures, captions, tmp_path
):
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer).train()
    batch = processor(text=captions, images=pictures, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [
        name for name, weight in model.named_parameters() if name in first and torch.equal(weight, first[name])
    ] == []

    model.eval()
    prompt = processor(text=["a red", "a black square"], return_tensors="pt")
    ways = {
        "image": {"guidance_scale": 2.0, "do_sample": False},
        "text": {"max_new_tokens": 8, "do_sample": False},
        "auto": {"max_new_tokens": 24, "do_sample": False},
        "interleaved": {"max_new_tokens": 40, "guidance_scale": 2.0, "do_sample": False},
    }
    drawn = {mode: model.generate(**prompt, generation_mode=mode, **options) for mode, options in ways.items()}
    assert drawn["image"].shape == (2, 16) and model.vocabulary.is_visual(drawn["image"]).all()
    for row in model.decode_mixed_tokens(drawn["interleaved"], tokenizer):
        assert any(segment.type == "image" and segment.complete for segment in row)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert type(loaded.model.language_model) is type(model.model.language_model)
    for mode, options in ways.items():
        assert torch.equal(loaded.generate(**prompt, generation_mode=mode, **options), drawn[mode]), mode


def test_a_model_whose_bos_is_its_eos_or_that_pads_with_an_end_learns_to_draw(vq_model, tokenizer):
    """The layouts of GPT-2 and of Qwen's instruction models."""
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    for bos, eos in ((tokenizer.eos_token, tokenizer.eos_token_id), (tokenizer.bos_token, ends)):
        own = copy.deepcopy(tokenizer)
        own.bos_token = bos
        text_model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, vocab_size=len(own)))
        text_model.generation_config.eos_token_id = eos
        model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, own)
        assert model.config.bos_token_id == own.bos_token_id
        assert tokenizer.pad_token_id not in torch.tensor(model.config.eos_token_id)
        assert model.generate(torch.tensor([[own.bos_token_id, 20]]), generation_mode="image").shape == (1, 16)


@torch.no_grad()
def test_it_is_a_plain_model_of_its_kind_again(text_model, vq_model, tokenizer):
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    plain = plain_text_model(model)
    ids = torch.randint(7, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    assert type(plain) is type(text_model)
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
