"""The GAN stage and the feature loss of the tokenizer's training."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from unitok_hf.modeling_unitok.modeling_vq import nearest_codes
from unitok_hf.training.discriminator import PatchDiscriminator
from unitok_hf.training.losses import multi_scale_l1
from unitok_hf.training.quantizers import rotate_to
from unitok_hf.training.vq_trainer import VQTrainingArguments, build_training_model, train_tokenizer


def arguments(tmp_path, data: str = "", name: str = "run", **options) -> VQTrainingArguments:
    settings = {
        "block_out_channels": [32, 32, 32],
        "latent_channels": 8,
        "num_vq_embeddings": 32,
        "adversarial_weight": 0.2,
        "continuous_fraction": 0.2,
        "discriminator_start": 0.3,
        "adversarial_start": 0.5,
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_strategy": "no",
    }
    return VQTrainingArguments(data_path=data, output_dir=str(tmp_path / name), **settings | options)


@pytest.fixture
def training_model(tmp_path):
    """A tokenizer in training, past its ramp, with a codebook that is in use."""
    torch.manual_seed(0)
    model = build_training_model(arguments(tmp_path)).train()
    torch.nn.init.normal_(model.vq.codebook)
    model.codebook_state.started.fill_(True)
    model.progress = 1.0
    return model


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None
    }


def test_one_backward_pass_gives_the_gradients_of_the_classic_three(training_model, noise):
    """The classic way: two extra passes to the last layer for the weight, then one for the sum."""
    training_model(noise)
    training_model.adaptive_weight.step()  # the weight is that of the step before, here of the same pictures
    outputs = training_model(noise)
    outputs["loss"].backward()
    found, judged = gradients(training_model.vq), gradients(training_model.discriminator)

    training_model.zero_grad()
    vq, discriminator = training_model.vq, training_model.discriminator
    latents = vq.encode(noise).latents
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    chosen = vq.codebook[nearest_codes(rows, vq.codebook)]
    quantized = rotate_to(rows, chosen).view(len(noise), 4, 4, -1).permute(0, 3, 1, 2)
    sample = vq.decode(quantized, force_not_quantize=True).sample
    reconstruction, adversarial = multi_scale_l1(sample, noise), -discriminator(sample).mean()
    last = vq.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    weight = norms[0] / (norms[1] + 1e-6)
    loss = reconstruction + 0.2 * weight * adversarial + 0.25 * F.mse_loss(rows, chosen)
    loss.backward()
    assert outputs["adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    for name, expected in gradients(vq).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-3, msg=name)

    discriminator.zero_grad()
    real, fake = discriminator(noise), discriminator(sample.detach())
    (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
    for name, expected in gradients(discriminator).items():  # LeCAM is a thousandth, its anchors start at 0
        torch.testing.assert_close(judged[name], expected, atol=5e-3, rtol=5e-2, msg=name)


def test_the_discriminator_learns_first_and_is_heard_later(training_model, noise):
    def terms(progress: float) -> set[str]:
        training_model.progress = progress
        return set(training_model(noise))

    assert "discriminator" not in terms(0.29)
    assert "discriminator" in terms(0.4) and "adversarial" not in terms(0.4)
    assert "adversarial" in terms(0.51)


def test_before_its_start_the_discriminator_stands_still(training_model, noise):
    training_model.progress = 0.0
    training_model(noise)["loss"].backward()
    assert all(not gradient.any() for gradient in gradients(training_model.discriminator).values())


@pytest.mark.parametrize(("layers", "field"), [(2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, field):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(layers).eval()
    for module in discriminator.network:  # group statistics would see the whole picture
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda features: features
    pixels = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(pixels)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = pixels.grad[0].abs().sum(dim=0).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [field, field]


def test_a_resumed_run_with_both_networks_equals_the_undisturbed_one(parquet, tmp_path):
    options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "eval_data_path": parquet}
    train_tokenizer(arguments(tmp_path, parquet, "whole", save_total_limit=None, **options))
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "again/checkpoint-3")
    train_tokenizer(
        arguments(tmp_path, parquet, "again", save_total_limit=None, resume_from_checkpoint="last", **options)
    )
    for name in ("diffusion_pytorch_model.safetensors", "training_state.safetensors"):
        whole, again = (load_file(tmp_path / run / "checkpoint-6" / name) for run in ("whole", "again"))
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[key], again[key]) for key in whole), name
    assert any(key.startswith("discriminator.") for key in whole)


def test_a_checkpoint_without_discriminator_is_refused(parquet, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "eval_data_path": parquet}
    train_tokenizer(arguments(tmp_path, parquet, adversarial_weight=0.0, **options))
    with pytest.raises(ValueError, match="other arguments: it differs in adaptive_weight"):
        train_tokenizer(arguments(tmp_path, parquet, resume_from_checkpoint="last", **options))
