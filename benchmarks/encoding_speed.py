"""Pictures per second into codes: `encode_to_indices` against stock diffusers, and patches against plain pixels.

python benchmarks/encoding_speed.py

Random weights, random pictures of 64x64, in evaluation mode without gradients. The last row is the plain network with widths
that give it about as many parameters as the first has. `stock` is `diffusers.VQModel` with the same weights, given patches
where there are any: `quantize(encode(patches).latents)`; its codes must be ours. All take turns; medians over the repetitions.
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
import yaml
from diffusers import VQModel
from measuring import medians

from unitok_hf.training.vq_trainer import VQTrainingArguments, build_training_model


NARROW = [16, 32, 64, 128, 128]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["configs/vq-64.yaml", "configs/vq-64-plain.yaml"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    pixels = torch.rand(options.batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    presets = {}
    for name in options.presets:
        with open(name, encoding="utf-8") as file:
            presets[name] = yaml.safe_load(file)
    presets[f"{name}, narrow"] = presets[name] | {"block_out_channels": NARROW}
    ways, parameters = {}, {}
    for preset, settings in presets.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = VQTrainingArguments(data_path="", output_dir=folder, report_to="none", **settings)
            ours = build_training_model(arguments).vq.eval()
            torch.nn.init.normal_(ours.codebook)
            ours.save_pretrained(folder)
            stock = VQModel.from_pretrained(folder).eval()

        def stock_codes(stock=stock, patch=arguments.patch_size) -> torch.LongTensor:
            inside = F.pixel_unshuffle(pixels, patch) if patch > 1 else pixels
            return stock.quantize(stock.encode(inside).latents)[2][2]

        with torch.no_grad():
            same = (stock_codes() == ours.encode_to_indices(pixels).flatten()).double().mean().item()
        assert same > 0.999, f"stock diffusers gives {same:.2%} of our codes"
        parameters[preset] = sum(parameter.numel() for parameter in ours.parameters())
        ways |= {(preset, "stock"): stock_codes, (preset, "ours"): lambda ours=ours: ours.encode_to_indices(pixels)}
    with torch.no_grad():
        seconds = medians(ways, options.repetitions)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {options.batch}")
    print("| preset | parameters | stock pictures/s | ours pictures/s | ours / stock |\n|---|---|---|---|---|")
    rates = {way: options.batch / taken for way, taken in seconds.items()}
    for preset in presets:
        stock, ours = rates[preset, "stock"], rates[preset, "ours"]
        print(f"| {preset} | {parameters[preset] / 1e6:.1f} M | {stock:.0f} | {ours:.0f} | {ours / stock:.2f} |")
    first, *others = presets
    for other in others:
        print(f"{first} / {other}: {rates[first, 'ours'] / rates[other, 'ours']:.2f}")


if __name__ == "__main__":
    main()
