"""Milliseconds per image token with guidance: our image loop against the way transformers documents for Emu3.

python benchmarks/generation_speed.py

The model is NanoChat with 4 layers of width 256, 32,768 text rows and 1,024 visual rows, random weights, a prompt of 12
tokens, 16 tokens per image, guidance scale 3. All ways run in turn in one process; medians over the repetitions:

- documented: `generate(guidance_scale=…, negative_prompt_ids=…, prefix_allowed_tokens_fn=…)` of the same language model
- ours: `generate(generation_mode="image", guidance_scale=…)`; compiled: the same with `compile_step="trace"`, and after how
  many pictures that has made up for its compilation, measured against ours
- floor: only the matrix products of a guided step (projections, MLP, visual rows of the head), nothing around them

The second table is one call that writes 32 tokens and then draws (`generation_mode="interleaved"`) against a call that
writes them and one that draws behind them.
"""

import argparse
import time
from functools import partial

import torch
from measuring import medians
from transformers import NanoChatConfig, NanoChatForCausalLM

from unitok_hf import UniTokConfig, UniTokForConditionalGeneration


PROMPT, TEXT_ROWS, CODES, SCALE, WORDS = 12, 32768, 1024, 3.0, 32
OURS = {"generation_mode": "image", "do_sample": True, "guidance_scale": SCALE}


def documented(text_model, prompts: torch.Tensor, tokens: int) -> None:
    codes = list(range(TEXT_ROWS, TEXT_ROWS + CODES))
    text_model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        negative_prompt_ids=prompts[:, -3:],
        negative_prompt_attention_mask=torch.ones_like(prompts[:, -3:]),
        guidance_scale=SCALE,
        prefix_allowed_tokens_fn=lambda row, ids: codes,
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )


@torch.no_grad()
def floor(text_model, head: torch.Tensor, batch: int, tokens: int) -> None:
    config = text_model.config
    x = torch.randn(2 * batch, config.hidden_size)
    for _ in range(tokens):
        for layer in text_model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                projection(x)
            mlp.fc2(mlp.fc1(x))
        x @ head.T


def image_tokens(model, text_model, batch: int, repetitions: int) -> str:
    """A row of the first table."""
    tokens = model.vocabulary.codes_per_image
    prompts = torch.randint(10, 1000, (batch, PROMPT))
    prompts[:, -1] = model.vocabulary.image_start
    compiled = partial(model.generate, prompts, **OURS, compile_step="trace")
    begin = time.perf_counter()
    compiled()
    compilation = time.perf_counter() - begin
    slow, ours, fast, bare = medians(
        {
            "documented": partial(documented, text_model, prompts, tokens),
            "ours": partial(model.generate, prompts, **OURS),
            "compiled": compiled,
            "floor": partial(floor, text_model, model.lm_head.weight[TEXT_ROWS:], batch, tokens),
        },
        repetitions,
    ).values()
    pays = f"{compilation / (ours - fast) * batch:.0f}" if fast < ours else "never"
    times = " | ".join(f"{1000 * taken / tokens:.2f}" for taken in (slow, ours, fast, bare))
    return f"| {batch} | {times} | {slow / ours:.1f} | {slow / fast:.1f} | {ours / bare:.1f} | {compilation:.1f} | {pays} |"


def in_one_call(model, batch: int, repetitions: int) -> str:
    """A row of the second table."""
    prompts = torch.randint(10, 1000, (batch, PROMPT))
    longer = torch.cat([prompts, torch.randint(10, 1000, (batch, WORDS))], dim=1)
    written = {"do_sample": True, "top_k": 0, "guidance_scale": SCALE}
    whole = {"generation_mode": "interleaved", "max_new_tokens": WORDS + model.vocabulary.tokens_per_image}
    one, text, picture = medians(
        {
            "one call": partial(model.generate, prompts, **written, **whole),
            "text": partial(model.generate, prompts, **written, generation_mode="text", max_new_tokens=WORDS),
            "picture": partial(model.generate, longer, **OURS),
        },
        repetitions,
    ).values()
    times = " | ".join(f"{1000 * taken:.0f}" for taken in (one, text, picture))
    return f"| {batch} | {times} | {one / (text + picture):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text_config = NanoChatConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
    )
    model = UniTokForConditionalGeneration(UniTokConfig(text_config=text_config, text_vocab_size=TEXT_ROWS)).eval()
    text_model = NanoChatForCausalLM(model.config.text_config).eval()
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repetitions}\n")
    print(
        "| batch | documented ms | ours ms | compiled ms | floor ms | documented / ours | documented / compiled | "
        "ours / floor | compilation s | pays after pictures |"
    )
    print("|" + 10 * "---|")
    for batch in (1, 8):
        print(image_tokens(model, text_model, batch, options.repetitions), flush=True)
    print("\n| batch | one call ms | text ms | picture ms | one call / sum |\n|" + 5 * "---|")
    for batch in (1, 8):
        print(in_one_call(model, batch, options.repetitions), flush=True)


if __name__ == "__main__":
    main()
