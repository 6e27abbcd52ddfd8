"""UniTokVQModel under what diffusers asks of each of its models, by the public calls of diffusers.

Its source distribution ships no tests of models; these are written anew, and go by the same list: save and load with its
options, dtypes, determinism, tuples and dicts, training, moving averages, gradient checkpointing, layerwise casting.
What needs more than one device, or an accelerator, is left out.
"""

import copy
import inspect
import json

import pytest
import torch
from diffusers import VQModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel

from unitok_hf import UniTokVQModel


CONFIGS = {
    "pixels": {"in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32), "sample_size": 16},
    "patches": {"patch_size": 4, "block_out_channels": (32, 32), "sample_size": 16},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(**changes) -> UniTokVQModel:
    """A tiny tokenizer with 32 codes that its latents come near."""
    torch.manual_seed(0)
    model = UniTokVQModel(**{"latent_channels": 4, "num_vq_embeddings": 32} | changes)
    torch.nn.init.normal_(model.codebook, std=0.3)
    return model.eval()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request) -> UniTokVQModel:
    return make(**request.param)


@pytest.fixture
def sample() -> torch.Tensor:
    """Two pictures (2, 3, 16, 16)."""
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def pictures(model: ModelMixin, sample: torch.Tensor) -> torch.Tensor:
    return model(sample).sample


def loss(model: UniTokVQModel, sample: torch.Tensor) -> torch.Tensor:
    output = model(sample)
    return (output.sample - sample).square().mean() + output.commit_loss


def gradients(model: UniTokVQModel, sample: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, sample).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_a_saved_model_gives_the_same_pictures(model, sample, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = UniTokVQModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(pictures(loaded, sample), pictures(model, sample))


def test_a_variant_loads_by_its_name_only(model, sample, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = UniTokVQModel.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(pictures(loaded, sample), pictures(model, sample))
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        UniTokVQModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_sharded_model_loads(model, sample, tmp_path, variant):
    model.save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    [index] = tmp_path.glob("*.index*.json")
    shards = set(json.loads(index.read_text())["weight_map"].values())
    assert len(shards) > 1 and all((tmp_path / shard).is_file() for shard in shards)
    loaded = UniTokVQModel.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(pictures(loaded, sample), pictures(model, sample))


def test_a_model_in_a_subfolder_loads(model, sample, tmp_path):
    model.save_pretrained(tmp_path / "vqvae")
    loaded = UniTokVQModel.from_pretrained(tmp_path, subfolder="vqvae")
    assert torch.equal(pictures(loaded, sample), pictures(model, sample))


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": False}, {"device_map": {"": "cpu"}}], ids=str)
def test_every_way_of_loading_gives_the_same_model(model, sample, tmp_path, options):
    model.save_pretrained(tmp_path)
    loaded = UniTokVQModel.from_pretrained(tmp_path, **options)
    assert torch.equal(pictures(loaded, sample), pictures(model, sample))


def test_a_pickle_is_never_opened(model, tmp_path):
    """Where diffusers opens it when asked, with `use_safetensors=False`."""
    model.save_pretrained(tmp_path, safe_serialization=False)
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises((OSError, ValueError), match="safetensors"):
            UniTokVQModel.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_dtype_survives_saving_and_loading(model, tmp_path, dtype, low_cpu_mem_usage):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = UniTokVQModel.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.dtype == dtype and {weight.dtype for weight in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pictures_have_the_dtype_of_the_model(model, sample, dtype):
    output = pictures(model.to(dtype), sample.to(dtype))
    assert output.dtype == dtype and output.shape == sample.shape and output.isfinite().all()


def test_other_sizes_load_only_where_told_to(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="quantize.embedding.weight"):
        UniTokVQModel.from_pretrained(tmp_path, num_vq_embeddings=48)
    options = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    loaded, report = UniTokVQModel.from_pretrained(tmp_path, num_vq_embeddings=48, **options)
    assert loaded.codebook.shape == (48, 4) and not report["missing_keys"] and not report["unexpected_keys"]
    assert [entry[0] for entry in report["mismatched_keys"]] == ["quantize.embedding.weight"]


def test_the_same_picture_gives_the_same_output(model, sample):
    assert torch.equal(pictures(model, sample), pictures(model, sample))
    assert torch.equal(pictures(copy.deepcopy(model), sample), pictures(model, sample))


@torch.no_grad()
def test_tuples_hold_what_dicts_hold(model, sample):
    latents = model.encode(sample)
    for as_dict, as_tuple in (
        (model(sample), model(sample, return_dict=False)),
        (latents, model.encode(sample, return_dict=False)),
        (model.decode(latents.latents), model.decode(latents.latents, return_dict=False)),
    ):
        values = [value for value in as_dict.values() if value is not None]
        assert len(values) == len(as_tuple)
        assert all(torch.equal(*pair) for pair in zip(values, as_tuple, strict=True))


def test_signatures_are_those_of_the_stock_model():
    for name in ("forward", "encode", "decode", "__init__"):
        ours, stock = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (UniTokVQModel, VQModel))
        assert ours[: len(stock)] == stock
        assert ours[len(stock) :] == (["patch_size", "pixel_range"] if name == "__init__" else [])


def test_a_model_can_be_made_of_its_configuration(model, tmp_path):
    model.save_config(tmp_path)
    config = UniTokVQModel.load_config(tmp_path)
    for again in (UniTokVQModel.from_config(model.config), UniTokVQModel.from_config(config)):
        assert json.loads(again.to_json_string()) == json.loads(model.to_json_string())
        shapes = {name: weight.shape for name, weight in again.state_dict().items()}
        assert shapes == {name: weight.shape for name, weight in model.state_dict().items()}


def test_every_weight_is_trained(model, sample):
    model.train()
    found = gradients(model, sample)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    weights = {name: gradient for name, gradient in found.items() if name.endswith(".weight")}
    assert all(gradient.any() for gradient in weights.values())


def test_training_under_autocast_takes_the_loss_down(model, sample):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, sample)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_a_moving_average_of_the_model_is_saved_and_loaded(model, sample, tmp_path):
    average = EMAModel(model.parameters(), model_cls=UniTokVQModel, model_config=model.config)
    before = pictures(model, sample)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, UniTokVQModel)
    assert all(torch.equal(*pair) for pair in zip(average.shadow_params, loaded.shadow_params, strict=True))
    average.copy_to(model.parameters())
    after = pictures(UniTokVQModel.from_pretrained(tmp_path), sample)
    assert torch.equal(after, pictures(model, sample)) and not torch.equal(after, before)


def test_gradient_checkpointing_is_turned_on_and_off(model):
    assert UniTokVQModel._supports_gradient_checkpointing and not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing and model.encoder.gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_gradient(model, sample):
    model.train()
    plain = gradients(model, sample)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, sample)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7)


def test_layerwise_casting_leaves_the_codebook_alone(model, sample):
    before = pictures(model, sample)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.codebook.dtype == torch.float32
    assert model.encoder.conv_in.weight.dtype == torch.float8_e4m3fn
    after = pictures(model, sample)
    assert after.dtype == torch.float32 and after.isfinite().all() and not torch.equal(after, before)


def test_group_offloading_is_refused_as_in_the_stock_model(model):
    assert not VQModel._supports_group_offloading
    with pytest.raises(ValueError, match="group offloading"):
        model.enable_group_offload(onload_device="cpu", offload_device="cpu")
