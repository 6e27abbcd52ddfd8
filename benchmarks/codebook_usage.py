"""Is the whole codebook in use, although a step holds fewer latents than there are codes?

python benchmarks/codebook_usage.py --data_path emoji64.parquet --group_column group --held_out 0.3
python benchmarks/codebook_usage.py --data_path photos64.parquet --group_column photo_id --held_out 0.3
python benchmarks/codebook_usage.py --data_path emoji64.parquet --group_column group --codes 16384 --steps 4000

Trains the inner network of `configs/vq-64.yaml` in batches of 32, 512 latents a step, and counts the codes that occur in the
pictures of unseen groups, and in those it was trained on. Even codes chosen quite evenly are not all seen in few pictures:
`at most` is what so many latents would show of codes drawn with equal chances, 1 - exp(-latents / codes).
"""

import argparse
import math

import torch
import yaml
from tokenizer_presets import pixels_of, split_by_group
from tokenizer_quality import Ours, train

from unitok_hf.training.collators import read_rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="configs/vq-64.yaml", help="YAML file with arguments of train-tokenizer")
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--group_column", required=True)
    parser.add_argument("--held_out", type=float, default=0.1, help="share of the groups that are not trained on")
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantizer", default="ema")
    parser.add_argument("--codebook_norm", default="none")
    options = parser.parse_args()
    with open(options.preset, encoding="utf-8") as file:
        preset = yaml.safe_load(file)
    preset |= {"num_vq_embeddings": options.codes, "per_device_train_batch_size": 32}
    preset |= {"quantizer": options.quantizer, "codebook_norm": options.codebook_norm}
    rows, test = split_by_group(read_rows(options.data_path), options.group_column, options.held_out)
    with torch.enable_grad():
        model, seconds = train(Ours, preset, rows, options.steps, options.seed)
    print(
        f"{options.quantizer} {options.codebook_norm}, {options.steps} steps of 32, {seconds:.0f} s, seed {options.seed}"
    )
    print("| pictures | latents | codes | usage | at most | perplexity |\n|---|---|---|---|---|---|")
    vq_model = model.training_model.tokenizer
    for name, part in (("trained on", rows), ("unseen", test)):
        codes = torch.cat([vq_model.encode_to_indices(batch) for batch in pixels_of(part).split(64)])
        found = vq_model.codebook_stats(codes)
        most = 1 - math.exp(-codes.numel() / options.codes)
        print(
            f"| {len(part)} {name} | {codes.numel()} | {options.codes} | {found['usage']:.4f} | {most:.4f} "
            f"| {found['perplexity']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
