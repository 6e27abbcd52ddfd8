"""Milliseconds per image token with guidance: our image loop against the way transformers documents for Emu3.

python benchmarks/generation_speed.py

The model is NanoChat with 4 layers of width 256, 32,768 text rows and 1,024 visual rows, random weights, a prompt of 12
tokens, 16 tokens per image, guidance scale 3. Three ways, in turn in one process, medians over the repetitions:

- documented: `generate(guidance_scale=…, negative_prompt_ids=…, prefix_allowed_tokens_fn=…)` of the same language model
- ours: `generate(generation_mode="image", guidance_scale=…)`
- floor: only the matrix products of a guided step (projections, MLP, visual rows of the head), nothing around them
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import NanoChatConfig, NanoChatForCausalLM

from unitok_hf import UniTokConfig, UniTokForConditionalGeneration


PROMPT, TEXT_ROWS, CODES, SCALE = 12, 32768, 1024, 3.0


def timed(call, repetitions: int) -> float:
    """Median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


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


def ways(model, text_model, batch: int, tokens: int) -> tuple[Callable, Callable, Callable]:
    prompts = torch.randint(10, 1000, (batch, PROMPT))
    prompts[:, -1] = model.vocabulary.image_start
    return (
        partial(documented, text_model, prompts, tokens),
        partial(model.generate, prompts, generation_mode="image", do_sample=True, guidance_scale=SCALE),
        partial(floor, text_model, model.lm_head.weight[TEXT_ROWS:], batch, tokens),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text_config = NanoChatConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
    )
    model = UniTokForConditionalGeneration(UniTokConfig(text_config=text_config, text_vocab_size=TEXT_ROWS)).eval()
    text_model = NanoChatForCausalLM(model.config.text_config).eval()
    tokens = model.vocabulary.codes_per_image
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repetitions}")
    print("| batch | documented ms | ours ms | floor ms | documented / ours | ours / floor |")
    print("|---|---|---|---|---|---|")
    for batch in (1, 8):
        slow, ours, bare = (
            1000 * timed(way, options.repetitions) / tokens for way in ways(model, text_model, batch, tokens)
        )
        print(
            f"| {batch} | {slow:.1f} | {ours:.1f} | {bare:.1f} | {slow / ours:.1f} | {ours / bare:.1f} |", flush=True
        )


if __name__ == "__main__":
    main()
