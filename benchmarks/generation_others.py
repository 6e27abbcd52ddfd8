"""Milliseconds per image token with guidance: Emu3, Janus and ours, each in its own documented way.

python benchmarks/generation_others.py

All three have a language model of the same architecture and size, Llama with 4 layers of width 256 (MLP 1,024, 4 heads),
32,768 text rows and 1,024 codes, random weights; a prompt of 12 tokens, an image of 4x4 codes, guidance scale 3, sampling:

- Emu3: transformers' `generate` with `guidance_scale`, `negative_prompt_ids` and a `prefix_allowed_tokens_fn` that allows
  codes and, at the end of each row, a newline token: 20 tokens for the 16 codes of a picture
- Janus: `generate(generation_mode="image", guidance_scale=…)`, a loop that batches both branches and has a head of its own
- ours: `generate(generation_mode="image", guidance_scale=…)`; compiled: with `compile_step="trace"`

Times are per code of the picture. All run in turn in one process; medians over the repetitions.
"""

import argparse
from functools import partial

import torch
from generation_speed import CODES, OURS, PROMPT, SCALE, TEXT_ROWS
from measuring import medians
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
)

from unitok_hf import UniTokConfig, UniTokForConditionalGeneration


SIZE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
SIDE = 4
PAD, BOS, EOS, START, NEWLINE, IMAGE = 0, 1, 2, 3, 4, 5


def emu3() -> Emu3ForConditionalGeneration:
    vocabulary_map = {"<image>": IMAGE, "<|extra_200|>": NEWLINE}
    vocabulary_map |= {f"<|visual token {code:06d}|>": TEXT_ROWS + code for code in range(CODES)}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = Emu3Config(
        text_config={**SIZE, "num_key_value_heads": 4, "vocab_size": TEXT_ROWS + CODES, **ids},
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "codebook_size": CODES},
        vocabulary_map=vocabulary_map,
    )
    return Emu3ForConditionalGeneration(config).eval()


def draw_emu3(model: Emu3ForConditionalGeneration, prompts: torch.Tensor) -> None:
    codes = model.model.vocabulary_mapping.image_tokens

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        begun = int((ids == START).nonzero()[0])
        return codes if (len(ids) - begun) % (SIDE + 1) else [NEWLINE]

    tokens = SIDE * (SIDE + 1)
    drawn = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        negative_prompt_ids=prompts[:, -3:],
        negative_prompt_attention_mask=torch.ones_like(prompts[:, -3:]),
        guidance_scale=SCALE,
        prefix_allowed_tokens_fn=allowed,
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens,
    )
    assert drawn.shape[1] == PROMPT + tokens


def janus() -> JanusForConditionalGeneration:
    config = JanusConfig(
        text_config=LlamaConfig(**SIZE, vocab_size=TEXT_ROWS),
        vision_config={
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16 * SIDE,
            "patch_size": 16, "num_image_tokens": SIDE * SIDE, "projection_dim": 256,
        },
        vq_config={
            "num_embeddings": CODES, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
            "latent_channels": 32, "image_token_embed_dim": 256, "projection_dim": 256,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": START}
    )
    return model


def draw_janus(model: JanusForConditionalGeneration, prompts: torch.Tensor) -> None:
    drawn = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_mode="image",
        do_sample=True,
        top_k=0,
        guidance_scale=SCALE,
    )
    assert drawn.shape[1] == SIDE * SIDE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = UniTokConfig(
        text_config=LlamaConfig(**SIZE), text_vocab_size=TEXT_ROWS, num_visual_tokens=CODES, image_grid=(SIDE, SIDE)
    )
    ours, other, third = UniTokForConditionalGeneration(config).eval(), emu3(), janus()
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repetitions}\n")
    print(
        "| batch | Emu3 ms | Janus ms | ours ms | compiled ms | Emu3 / ours | Emu3 / compiled | Janus / ours | "
        "Janus / compiled |\n|" + 9 * "---|"
    )
    for batch in (1, 8):
        prompts = torch.randint(10, 1000, (batch, PROMPT))
        prompts[:, -1] = START
        begun = prompts.clone()
        begun[:, -1] = ours.vocabulary.image_start
        taken = medians(
            {
                "Emu3": partial(draw_emu3, other, prompts),
                "Janus": partial(draw_janus, third, prompts),
                "ours": partial(ours.generate, begun, **OURS),
                "compiled": partial(ours.generate, begun, **OURS, compile_step="trace"),
            },
            options.repetitions,
        )
        per_code = {name: 1000 * seconds / SIDE**2 for name, seconds in taken.items()}
        ratios = [per_code[name] / per_code[way] for name in ("Emu3", "Janus") for way in ("ours", "compiled")]
        print(
            f"| {batch} | " + " | ".join(f"{number:.2f}" for number in [*per_code.values(), *ratios]) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
