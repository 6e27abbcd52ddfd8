"""Training the GPT well: the loss in slices, batches of one length, Muon, LoRA, and that none of it changes the result."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM

from unitok_hf import UniTokForConditionalGeneration, UniTokVQModel, add_special_tokens
from unitok_hf.modeling_unitok import loss_unitok
from unitok_hf.training.collators import LengthGroupedSampler, StreamCollator, StreamDataset
from unitok_hf.training.gpt_trainer import GPTTrainingArguments, train_gpt, train_text_tokenizer
from unitok_hf.training.lora import add_lora
from unitok_hf.training.muon import MuonWith, layer_matrices


ROOT = Path(__file__).resolve().parent.parent
TINY_VQ = {"block_out_channels": [32, 32, 32], "latent_channels": 8, "num_vq_embeddings": 32}
TEXTS = ["a", "a red circle", "a red circle on a green square on a blue square", "one more"] * 2
PLAIN = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures) -> str:
    """A Parquet file of eight pictures with texts of unequal length."""
    path = tmp_path_factory.mktemp("data") / "ragged.parquet"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": pictures, "text": TEXTS}, features=features).to_parquet(str(path))
    return str(path)


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory) -> str:
    torch.manual_seed(0)
    vq_model = UniTokVQModel(**TINY_VQ)
    torch.nn.init.normal_(vq_model.codebook, std=0.3)
    vq_model.save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return str(folder)


@pytest.fixture
def train(data, image_tokenizer, tmp_path):
    """Trains for two steps and returns the folder."""

    def run(name: str, **options) -> Path:
        settings = {"disable_tqdm": True, "use_cpu": True, "max_steps": 2, "logging_steps": 1, "eval_strategy": "no"}
        settings |= {"depth": 1, "hidden_size": 64, "text_vocab_size": 300, "max_length": 80, "save_strategy": "no"}
        settings |= {"data_path": data, "eval_data_path": data, "visual_tokenizer_path": image_tokenizer}
        settings |= {"per_device_train_batch_size": 4, "output_dir": str(tmp_path / name), "sample_prompts": []}
        train_gpt(GPTTrainingArguments(**settings | options))
        return tmp_path / name

    return run


def log(run: Path, step: int) -> list[dict]:
    return json.loads((run / f"checkpoint-{step}/trainer_state.json").read_text())["log_history"]


def largest_difference(first: Path, second: Path) -> float:
    a, b = (load_file(run / "model.safetensors") for run in (first, second))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.fixture
def batch(model) -> dict[str, torch.Tensor]:
    """Two streams of text, an image each, and padding in the second."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(10, 300, (2, 40), generator=generator)
    input_ids[:, 5:21] = model.config.text_vocab_size + torch.randint(64, (2, 16), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 30:] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("softcap", [15.0, None])
@pytest.mark.parametrize("slice_of", [1, 7, 1000])
def test_the_sliced_loss_is_that_of_the_whole_logits(model, batch, monkeypatch, softcap, slice_of):
    model.config.text_config.final_logit_softcapping = softcap
    model.config.text_loss_weight, model.config.image_loss_weight = 2.0, 0.5
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].double()
    targets = batch["labels"][:, 1:]
    nll = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    weights = torch.where(targets >= model.config.text_vocab_size, 0.5, 2.0) * (targets != -100)
    expected = (weights * nll).sum() / 50
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()

    monkeypatch.setattr(loss_unitok, "SLICE", slice_of * model.config.vocab_size)
    output = model.train()(**batch, num_items_in_batch=50)
    assert output.logits is None
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    visual = targets >= model.config.text_vocab_size
    assert output.image_loss.item() == pytest.approx(nll[visual].mean().item(), rel=1e-6)
    assert output.text_loss.item() == pytest.approx(nll[(targets != -100) & ~visual].mean().item(), rel=1e-6)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == gradients.keys() and "lm_head.weight" in found
    assert all(torch.allclose(found[name], gradients[name], rtol=1e-5, atol=1e-6) for name in found)


def test_no_tensor_of_the_sliced_loss_is_larger_than_a_slice(model, batch, monkeypatch):
    vocab_size, weights = model.config.vocab_size, model.lm_head.weight.numel()
    whole = (len(batch["labels"][batch["labels"] != -100]) - 2) * vocab_size
    for rows, limit in ((4, weights), (1000, whole)):
        monkeypatch.setattr(loss_unitok, "SLICE", rows * vocab_size)
        with LargestTensor() as largest:
            model.train()(**batch).loss.backward()
        assert largest.elements == limit
    assert whole > weights


def test_logits_come_when_they_are_of_use(model, batch):
    assert model(**batch).logits.shape == (2, 40, model.config.vocab_size)
    assert model(**batch, skip_logits=True).logits is None
    model.train()
    assert model(**batch).logits is None
    assert model(**batch, skip_logits=False).logits is not None
    assert model(batch["input_ids"]).logits is not None
    last = model(**batch, skip_logits=False, logits_to_keep=1)
    assert last.logits.shape[1] == 1 and torch.equal(last.loss, model(**batch).loss)


@pytest.fixture
def many(tokenizer):
    """400 streams of 4 to 40 words, every tenth without a picture."""
    generator = np.random.default_rng(0)
    texts = [" ".join(["red"] * length) for length in generator.integers(4, 41, 400)]
    codes = [None if index % 10 == 0 else [0, 1, 2, 3] for index in range(400)]
    features = datasets.Features(
        {"image_codes": datasets.List(datasets.Value("int32")), "text": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_dict({"image_codes": codes, "text": texts}, features=features)
    return StreamDataset(rows, tokenizer, 4, "text", 0.5, 0.0, 36, "none", 0)


def test_lengths_are_those_of_the_streams(many):
    assert many.lengths().tolist() == [len(many[index]["input_ids"]) for index in range(len(many))]
    assert many.lengths().max() == 36


def test_grouped_batches_are_hardly_padded_and_cover_the_data_in_another_order_every_epoch(many, tokenizer):
    sampler = LengthGroupedSampler(many, 16)
    orders = []
    for many.epoch in (0, 1):
        order = list(sampler)
        assert sorted(order) == list(range(400)) and order == list(sampler)
        orders.append(order)
    assert orders[0] != orders[1]
    shares = []
    for order in (orders[0], np.random.default_rng(0).permutation(400).tolist()):
        batches = [many.__getitems__(order[begin : begin + 16]) for begin in range(0, 400, 16)]
        masks = [StreamCollator(tokenizer)(batch)["attention_mask"] for batch in batches]
        shares.append(1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks))
    assert shares[0] < 0.1 < 0.2 < shares[1]
    widths = [max(many.lengths()[orders[0][begin : begin + 16]]) for begin in range(0, 400, 16)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)  # no drift from short to long


def test_the_last_short_step_comes_last(many):
    sampler = LengthGroupedSampler(many, 64)
    spread = [np.ptp(many.lengths()[list(sampler)[begin : begin + 64]]) for begin in range(0, 384, 64)]
    assert len(list(sampler)) == 400 and max(spread) < np.ptp(many.lengths())


def test_a_run_logs_its_padding_and_its_bits(train, data, tokenizer):
    run = train("run", train_sampling_strategy="sequential", save_strategy="steps", save_steps=2, image_first=1.0)
    first = log(run, 2)[0]
    kept = AutoProcessor.from_pretrained(run).tokenizer
    lengths = [len(kept(text, add_special_tokens=False).input_ids) for text in TEXTS[:4]]
    longest = max(lengths) + 20  # an image of 16 with both ends, bos, eos
    assert first["padding_share"] == pytest.approx(1 - (sum(lengths) + 4 * 20) / (4 * longest))
    assert first["text_bits"] == pytest.approx(first["text_loss"] / math.log(2))
    assert first["image_bits"] == pytest.approx(first["image_loss"] / math.log(2))


def test_accumulated_steps_are_the_whole_step(train):
    options = PLAIN | {"train_sampling_strategy": "sequential", "text_loss_weight": 3.0}
    whole = train("1x8", per_device_train_batch_size=8, **options)
    parts = train("4x2", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert largest_difference(whole, parts) < 1e-6
    other = train("other", per_device_train_batch_size=8, **options | {"learning_rate": 0.11})
    assert largest_difference(whole, other) > 1e-4  # the runs do move


def test_checkpointed_activations_change_nothing(train):
    plain = train("plain", **PLAIN)
    assert largest_difference(plain, train("checkpointed", **PLAIN, activation_checkpointing=True)) < 1e-6


def test_bf16_is_near_and_leaves_the_image_tokenizer_alone(train, image_tokenizer):
    plain, half = train("plain", **PLAIN), train("half", **PLAIN, bf16=True)
    assert 0 < largest_difference(plain, half) < 0.02
    kept = AutoModel.from_pretrained(half)
    assert {weight.dtype for weight in kept.parameters()} == {torch.float32}
    expected = UniTokVQModel.from_pretrained(image_tokenizer).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in kept.model.vqmodel.state_dict().items())


def test_evaluations_draw_the_prompts_and_do_not_disturb_the_training(train):
    quiet = train("quiet", augment="affine")
    prompts = ["a red circle", "one more", "a typed <|image|> is text"]
    options = {"sample_prompts": prompts, "eval_strategy": "steps", "eval_steps": 1, "augment": "affine"}
    drawn = train("drawn", **options)
    assert largest_difference(quiet, drawn) == 0
    assert not (quiet / "samples").exists()
    assert json.loads((drawn / "samples/prompts.json").read_text()) == prompts
    grids = [Image.open(drawn / f"samples/step_{step:06d}.png") for step in (1, 2)]
    assert [grid.size for grid in grids] == [(3 * 64, 2 * 64)] * 2
    model, processor = AutoModel.from_pretrained(drawn), AutoProcessor.from_pretrained(drawn)
    tokenizer = processor.tokenizer
    words = tokenizer(prompts, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = [[tokenizer.bos_token_id, *own, tokenizer.image_start_token_id] for own in words]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    generator = torch.Generator().manual_seed(42)
    options = {"generation_mode": "image", "do_sample": True, "guidance_scale": 3.0, "generator": generator}
    pixels = model.decode_image_tokens(model.generate(**inputs, **options))
    shown = torch.from_numpy(np.array(grids[1])[:64].reshape(64, 3, 64, 3)).permute(1, 3, 0, 2)
    assert ((pixels + 1) * 127.5 - shown).abs().max() <= 1  # the finished model, asked again, draws the first row


def test_captions_are_drawn_when_no_prompts_are_given(train):
    run = train("run", sample_prompts=None)
    assert json.loads((run / "samples/prompts.json").read_text()) == TEXTS[:4]


def test_muon_has_the_matrices_of_the_layers_and_nothing_else(model):
    names = {name for name, weight in model.named_parameters() if any(weight is one for one in layer_matrices(model))}
    layer = [f"self_attn.{kind}_proj" for kind in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
    assert names == {f"model.language_model.layers.{n}.{part}.weight" for n in (0, 1) for part in layer}


def test_one_optimizer_steps_as_the_two_it_is_made_of_and_goes_on_from_its_state():
    torch.manual_seed(0)

    def weights() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(1)
        return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((8, 4), (4, 6), (5, 4), (4,))]

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))

    def joined(own: list[torch.nn.Parameter]) -> MuonWith:
        rest = [{"params": own[2:3], "weight_decay": 0.1}, {"params": own[3:], "weight_decay": 0.0}]
        return MuonWith(own[:2], rest, 1e-2, 0.1, adamw)

    def train(own: list[torch.nn.Parameter], optimizers: list, steps: range) -> None:
        for step in steps:
            for number, weight in enumerate(own):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + number))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2 / (1 + step)  # as a schedule does
                optimizer.step()

    expected, whole, begun, resumed = (weights() for _ in range(4))
    apart = [torch.optim.Muon(expected[:2], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    apart.append(
        adamw([{"params": expected[2:3], "weight_decay": 0.1}, {"params": expected[3:], "weight_decay": 0.0}])
    )
    train(expected, apart, range(4))
    train(whole, [joined(whole)], range(4))
    first = joined(begun)
    train(begun, [first], range(2))
    second = joined(resumed)
    for weight, before in zip(resumed, begun, strict=True):
        weight.data.copy_(before)
    second.load_state_dict(first.state_dict())
    train(resumed, [second], range(2, 4))
    for found in (whole, resumed):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(), expected, strict=True))


def test_a_resumed_run_with_muon_is_the_one_that_was_never_stopped(train):
    options = {"matrix_optimizer": "muon", "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    options |= {"per_device_train_batch_size": 3, "save_total_limit": None}
    run = train("run", **options)
    for step in (1, 3):  # within an epoch, and at the end of one
        again = train(f"again {step}", **options, resume_from_checkpoint=str(run / f"checkpoint-{step}"))
        assert largest_difference(run, again) == 0
        assert log(run, 4) == log(again, 4)
    plain = train("plain", **options | {"matrix_optimizer": "adamw"})
    assert largest_difference(run, plain) > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_train_the_new_rows_and_no_others(vq_model, tied):
    torch.manual_seed(0)
    tokenizer = add_special_tokens(train_text_tokenizer(["a red circle"], 300))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    config.tie_word_embeddings = tied
    model = UniTokForConditionalGeneration.from_parts(LlamaForCausalLM(config), vq_model, tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = add_lora(model, rank=2, alpha=4.0, dropout=0.0).train()
    ids = torch.randint(20, 200, (2, 24))
    ids[:, 4:20] = model.config.text_vocab_size + torch.randint(64, (2, 16))
    ids[:, 3], ids[:, 20] = model.config.image_start_token_id, model.config.image_end_token_id
    ids[:, 1] = model.config.uncond_token_id
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = adapted.merge_and_unload().state_dict()
    new = [model.config.image_start_token_id, model.config.image_end_token_id, model.config.uncond_token_id]
    new += range(model.config.text_vocab_size, model.config.vocab_size)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        changed = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) <= set(new)
        assert set(changed) >= set(new) if name == "lm_head.weight" else len(changed) > 16
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    moved = before.keys() - frozen - {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert moved and all(name.startswith("model.language_model.layers.") and "_proj" in name for name in moved)


ADAPTER_ALONE = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModel
import unitok_hf
run = sys.argv[1]
ids = torch.load(f"{run}/ids.pt", weights_only=True)
with torch.no_grad():
    alone = PeftModel.from_pretrained(AutoModel.from_pretrained(f"{run}/base"), f"{run}/adapter").eval()(ids).logits
    base = AutoModel.from_pretrained(f"{run}/base")(ids).logits
    merged = AutoModel.from_pretrained(run)(ids).logits
assert torch.allclose(alone, merged, atol=1e-5), (alone - merged).abs().max()
assert not torch.allclose(base, merged, atol=1e-2)
"""


def test_an_adapter_of_a_text_model_loads_alone_and_merged(train, tmp_path):
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(TEXTS, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    options = {"model_path": str(tmp_path / "words"), "lora_rank": 2, "learning_rate": 3e-2, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "sample_prompts": ["a red circle"]}
    run = train("run", **options)
    again = train("again", **options, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert largest_difference(run, again) == 0
    assert (run / "samples/step_000004.png").is_file()
    ids = torch.randint(20, 200, (2, 24))
    ids[:, 4:20] = AutoModel.from_pretrained(run).config.text_vocab_size + torch.randint(32, (2, 16))
    torch.save(ids, run / "ids.pt")
    command = [sys.executable, "-c", ADAPTER_ALONE, str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_trained_model_is_trained_on(train):
    run = train("run")
    options = {"model_path": str(run), "visual_tokenizer_path": None}
    still = train("still", **options, learning_rate=0.0)
    assert largest_difference(run, still) == 0
    assert (
        AutoProcessor.from_pretrained(still).tokenizer.get_vocab()
        == AutoProcessor.from_pretrained(run).tokenizer.get_vocab()
    )
    assert largest_difference(run, train("on", **options)) > 0
    adapted = train("adapted", **options, lora_rank=2)
    assert not (adapted / "base").exists()
    assert json.loads((adapted / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 2}, "--lora_rank adapts a model that is trained already"),
        ({"lora_rank": -1}, "--lora_rank must not be negative, got -1"),
        ({"lora_rank": 2, "model_path": "x", "matrix_optimizer": "muon"}, "not for LoRA's"),
        ({"model_path": "x", "text_tokenizer_path": "y"}, "brings its own text tokenizer"),
        ({"model_path": "x", "use_visual_tokens": False}, "for models that draw"),
        ({"train_sampling_strategy": "batch_rebalance"}, "must be group_by_length, random or sequential"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(train, options, message):
    with pytest.raises(ValueError, match=message):
        train("run", **options)


def test_a_model_brings_its_own_image_tokenizer(train):
    run = train("run")
    with pytest.raises(ValueError, match="has an image tokenizer of its own"):
        train("on", model_path=str(run))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_two_processes_train_as_one(train, tmp_path, data, image_tokenizer, optimizer):
    options = PLAIN | {"train_sampling_strategy": "sequential", "max_steps": 3}
    if optimizer == "muon":
        options["matrix_optimizer"] = "muon"
        options["learning_rate"] = 1e-3
    one = train("one", per_device_train_batch_size=8, **options)
    flags = {"data_path": data, "eval_data_path": data, "visual_tokenizer_path": image_tokenizer, "use_cpu": True}
    flags |= {"disable_tqdm": True, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "depth": 1}
    flags |= {"hidden_size": 64, "text_vocab_size": 300, "max_length": 80, "output_dir": tmp_path / "two"}
    flags |= {"per_device_train_batch_size": 4, **options}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "unitok_hf.training.cli", "train", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if optimizer == "sgd":
        assert largest_difference(one, tmp_path / "two") < 1e-6
        return
    losses = [json.loads((run / "eval_results.json").read_text())["eval_loss"] for run in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Muon rounds to bf16, so weights are alike, not equal
