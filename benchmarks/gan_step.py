"""Seconds of a GAN training step: our one backward pass against the classic order.

python benchmarks/gan_step.py

Both compute losses and gradients of the same tokenizer and discriminator on the same batch, adaptive weight included; the
optimizers are left out, which are the same. `classic` is the order of taming-transformers: two extra `autograd.grad` from the
two losses back to the last convolution, the backward pass of the tokenizer, then a second forward pass of the tokenizer for
the discriminator's turn. `classic, kept` reuses the first reconstruction in that turn, as later code bases do. The script
ends with an error when the gradients differ.
"""

import argparse
import tempfile
from functools import partial

import torch
import yaml
from measuring import medians

from unitok_hf.training.losses import RECONSTRUCTION_LOSSES
from unitok_hf.training.vq_trainer import VQTrainingArguments, VQTrainingModel, build_training_model


def prepared(preset: str, perceptual: bool) -> VQTrainingModel:
    """A training model with a codebook, at the moment at which both networks learn."""
    with open(preset, encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        chosen = yaml.safe_load(file) | {"adversarial_weight": 0.5, "perceptual_weight": float(perceptual)}
        chosen |= {"perceptual_network": "efficientnet_lite0"}
        arguments = VQTrainingArguments(data_path="", output_dir=folder, report_to="none", **chosen)
    torch.manual_seed(0)
    model = build_training_model(arguments)
    with torch.no_grad():
        model.vq.codebook.normal_()
        model.codebook_state.started.fill_(True)
    model.progress = 1.0
    return model.train()


def tokenizer_losses(model: VQTrainingModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction and commitment loss."""
    latents = model.vq.encode(pixels).latents
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    vectors, commitment, _ = model.codebook_state(rows, model.vq.codebook)
    quantized = vectors.unflatten(0, (latents.shape[0], *latents.shape[2:])).permute(0, 3, 1, 2)
    return model.vq.decode(quantized, force_not_quantize=True).sample, commitment


def classic(model: VQTrainingModel, pixels: torch.Tensor, again: bool) -> None:
    """Gradients as taming-transformers computes them."""
    args, last = model.args, model.vq.decoder.conv_out.weight
    sample, commitment = tokenizer_losses(model, pixels)
    reconstruction = RECONSTRUCTION_LOSSES[args.reconstruction_loss](sample, pixels)
    if model.perceptual is not None:
        reconstruction = reconstruction + args.perceptual_weight * model.perceptual(sample, pixels).mean()
    wish = -model.discriminator(sample).mean()
    [away] = torch.autograd.grad(reconstruction, last, retain_graph=True)
    [towards] = torch.autograd.grad(wish, last, retain_graph=True)
    weight = (away.norm() / (towards.norm() + 1e-4)).clamp(max=10.0).detach()
    loss = reconstruction + args.adversarial_weight * weight * wish + args.commitment_weight * commitment
    loss.backward()
    model.discriminator.zero_grad()
    if again:
        sample, _ = tokenizer_losses(model, pixels)
    real, fake = model.discriminator(pixels), model.discriminator(sample.detach())
    model.discriminator.loss(real, fake, args.lecam_weight).backward()


def ours(model: VQTrainingModel, pixels: torch.Tensor) -> None:
    model(pixels)["loss"].backward()
    model.adaptive_weight.step()
    model.discriminator.step()


def gradients(model: VQTrainingModel, step, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    step(model, pixels)  # our weight is that of the step before
    model.zero_grad()
    step(model, pixels)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="configs/vq-64.yaml")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    pixels = torch.rand(options.batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ways = {
        "ours": ours,
        "classic": lambda model, pixels: classic(model, pixels, again=True),
        "classic, kept": lambda model, pixels: classic(model, pixels, again=False),
    }
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {options.batch}, {options.preset}"
    )
    print("| perceptual loss | ours s | classic s | ours / classic | classic, kept s | ours / classic, kept |")
    print("|---|---|---|---|---|---|")
    for perceptual in (False, True):
        model = prepared(options.preset, perceptual)
        found = {name: gradients(model, way, pixels) for name, way in ways.items()}
        rounding = 1e-5 * max(expected.norm() for expected in found["classic"].values())  # biases of keys have no more
        for name, expected in found["classic"].items():
            difference = (found["ours"][name] - expected).norm() / expected.norm().clamp(min=rounding)
            assert difference < 1e-3, f"the gradients of {name} differ by {difference:.2g} of their norm"
        seconds = medians({name: partial(way, model, pixels) for name, way in ways.items()}, options.repetitions)
        print(
            f"| {'EfficientNet-Lite0' if perceptual else 'none'} | {seconds['ours']:.3f} | {seconds['classic']:.3f} "
            f"| {seconds['ours'] / seconds['classic']:.2f} | {seconds['classic, kept']:.3f} "
            f"| {seconds['ours'] / seconds['classic, kept']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
