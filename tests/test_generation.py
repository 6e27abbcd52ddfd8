"""What generation promises: well-formed streams in every strategy, guidance as defined, reproducible draws, and a way
back from ids to text and pictures that accounts for every token.

The model here is untrained and small: a vocabulary of 64 text rows and 16 codes, images of 2x3 codes.
"""

import copy
import re

import pytest
import torch
from transformers import (
    AutoModel,
    DynamicCache,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    NanoChatConfig,
)

from unitok_hf import UniTokConfig, UniTokForConditionalGeneration
from unitok_hf.modeling_unitok.decoding_unitok import select


PAD, BOS, EOS, START, END, PLACEHOLDER, UNCOND = range(7)
OFFSET, K, N = 64, 16, 6
IMAGE = [START, *range(OFFSET, OFFSET + N), END]
PROMPTS = [
    [BOS, 20],
    [BOS, 20, 21, 22, 23, START],
    [BOS, START, 70, 71],
    [BOS, 30, 31, 32, START, 70, 71, 72, 73, 74, 75],
    [BOS, *IMAGE, 40],
]
SAMPLING = {"do_sample": True, "top_k": 0}


TEXT_CONFIGS = {
    "relative positions": NanoChatConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5
    ),
    "learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=2, initializer_range=0.5),
    "sliding window": MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.5, sliding_window=5,
    ),
    "windows in some layers": Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, initializer_range=0.5, sliding_window=4, sliding_window_pattern=3,
    ),
}  # fmt: skip


def tiny(seed: int, text_rows: int = 64, positions: str = "relative positions") -> UniTokForConditionalGeneration:
    torch.manual_seed(seed)
    vq_config = {"block_out_channels": (32, 32, 32), "latent_channels": 4, "num_vq_embeddings": K}
    config = UniTokConfig(
        text_config=TEXT_CONFIGS[positions],
        vq_config=vq_config,
        text_vocab_size=text_rows,
        num_visual_tokens=K,
        image_grid=(2, 3),
    )
    return UniTokForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def built() -> UniTokForConditionalGeneration:
    return tiny(seed=3)


@pytest.fixture(scope="module", params=list(TEXT_CONFIGS)[:2])
def either(request) -> UniTokForConditionalGeneration:
    """A model that would notice wrong distances between tokens, and one that would notice wrong places."""
    return tiny(seed=2, positions=request.param)


@pytest.fixture(scope="module", params=TEXT_CONFIGS)
def every(request) -> UniTokForConditionalGeneration:
    """These two, and two that would notice a token outside their window."""
    return tiny(seed=2, positions=request.param)


@pytest.fixture
def model(built) -> UniTokForConditionalGeneration:
    """The tiny model, its generation config as new, and the global generator seeded."""
    torch.manual_seed(0)
    kept = built.generation_config.to_dict()
    yield built
    built.generation_config = GenerationConfig(**kept)


def batch(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left."""
    length = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": input_ids, "attention_mask": mask}


def letters(ids: list[int]) -> str:
    """One letter per token: b(os) e(os) p(ad) S(tart) E(nd) c(ode) t(ext), x for what never may be generated."""
    special = {PAD: "p", BOS: "b", EOS: "e", START: "S", END: "E", PLACEHOLDER: "x", UNCOND: "x"}
    return "".join(special.get(token, "c" if token >= OFFSET else "t") for token in ids)


WELL_FORMED = re.compile(rf"p*b(t|Sc{{{N}}}E)*(ep*)?")


def images_of(streams: torch.Tensor, beams: bool = False) -> list[int]:
    """Images in each row of streams that are well formed.

    Beams that ended early are filled up with eos: transformers takes a pad token of id 0 for none.
    """
    rows = [letters(row) for row in streams.tolist()]
    for row in rows:
        assert WELL_FORMED.fullmatch(row.rstrip("e") + "e" if beams else row), row
    return [row.count("S") for row in rows]


class Boost(LogitsProcessor):
    """Adds to the score of one token."""

    def __init__(self, token: int, by: float):
        self.token, self.by = token, by

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += self.by
        return scores


def eager(by: float = 1e3) -> LogitsProcessorList:
    """Makes a model begin an image wherever it may."""
    return LogitsProcessorList([Boost(START, by)])


STRATEGIES = {
    "greedy": {},
    "sampling": SAMPLING,
    "hot": SAMPLING | {"temperature": 9.0, "image_temperature": 9.0},
    "top_k": SAMPLING | {"top_k": 3, "image_top_k": 2},
    "top_p": SAMPLING | {"top_p": 0.5, "image_top_p": 0.5},
    "min_p": SAMPLING | {"min_p": 0.2},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": SAMPLING | {"num_beams": 3, "num_return_sequences": 2},
    "several": SAMPLING | {"num_return_sequences": 3},
    "guided": {"guidance_scale": 3.0},
    "guided sampling": SAMPLING | {"guidance_scale": 3.0, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "repetition penalty": {"repetition_penalty": 3.0},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "eos forced at the end": {"forced_eos_token_id": EOS},
    "codes and ends suppressed": {"suppress_tokens": [START, END, *range(OFFSET, OFFSET + 10)]},
}


@pytest.mark.parametrize("mode", ["auto", "interleaved", "text"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_streams_are_well_formed_in_every_strategy(model, strategy, mode):
    options = STRATEGIES[strategy]
    streams = model.generate(**batch(PROMPTS), generation_mode=mode, max_new_tokens=20, **options)
    copies = options.get("num_return_sequences", 1)
    assert len(streams) == len(PROMPTS) * copies
    drawn = torch.tensor(images_of(streams, "num_beams" in options)).view(-1, copies)
    given = torch.tensor([[0], [1], [1], [1], [1]])
    if mode == "text":
        assert (drawn == given).all()
    if mode == "interleaved":
        owed = torch.tensor([[1], [0], [0], [0], [1]])  # rows that end inside an image finish that one
        assert (drawn >= given + owed).all()


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams", "guided"])
def test_a_model_that_wants_nothing_but_images_draws_whole_ones(model, strategy):
    streams = model.generate(**batch(PROMPTS), max_new_tokens=30, logits_processor=eager(), **STRATEGIES[strategy])
    assert min(images_of(streams, strategy == "beams")) >= 3


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams", "guided"])
def test_a_model_that_wants_to_end_does_not_end_inside_an_image(model, strategy):
    hurry = LogitsProcessorList([Boost(EOS, 1e3)])
    streams = model.generate(**batch(PROMPTS), max_new_tokens=20, logits_processor=hurry, **STRATEGIES[strategy])
    assert images_of(streams, strategy == "beams") == [0, 1, 1, 1, 1]
    assert all(EOS in row for row in streams.tolist())
    streams = model.generate(
        **batch(PROMPTS), generation_mode="interleaved", max_new_tokens=20, logits_processor=hurry,
        **STRATEGIES[strategy],
    )  # fmt: skip
    assert images_of(streams, strategy == "beams") == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("room", range(1, 3 * N))
def test_no_image_is_begun_that_does_not_fit(model, room):
    streams = model.generate(**batch([[BOS, 20]]), max_new_tokens=room, logits_processor=eager())
    assert images_of(streams) == [room // (N + 2)]


def test_the_mask_may_be_left_out(model):
    inputs = batch(PROMPTS)
    with_mask = model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=12), with_mask)
    with_mask = model.generate(**inputs, generation_mode="image", guidance_scale=2.0)
    without = model.generate(inputs["input_ids"], generation_mode="image", guidance_scale=2.0)
    assert torch.equal(without, with_mask)


@pytest.mark.parametrize("mode", ["auto", "interleaved", "image"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}, {"num_beams": 3}], ids=["greedy", "guided", "beams"])
def test_a_prompt_alone_and_in_a_batch_of_eight_gives_the_same(either, mode, options):
    prompts = PROMPTS + [[BOS, 50, 51, 52, 53, 54, 55, 56], [BOS, *IMAGE, *IMAGE, START, 66], [BOS]]
    options = options | {"generation_mode": mode}
    if mode != "image":
        options["max_new_tokens"] = 20
    together = either.generate(**batch(prompts), **options)
    assert len(together.unique(dim=0)) >= 6
    for prompt, row in zip(prompts, together.tolist(), strict=True):
        alone = either.generate(**batch([prompt]), **options)[0].tolist()
        while mode != "image" and row[0] == PAD:
            row = row[1:]
        shorter = min(len(row), len(alone))
        assert row[:shorter] == alone[:shorter]
        assert set(row[shorter:] + alone[shorter:]) <= {PAD, EOS}


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny(seed=4)}, {"cache_implementation": "static"}],
    ids=["prompt lookup", "assistant", "static cache"],
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_faster_decoding_gives_the_greedy_stream(model, options, prompt):
    plain = model.generate(**batch([prompt]), generation_mode="interleaved", max_new_tokens=16)
    faster = model.generate(**batch([prompt]), generation_mode="interleaved", max_new_tokens=16, **options)
    assert torch.equal(faster, plain)
    plain = model.generate(**batch([prompt]), generation_mode="image")
    assert torch.equal(model.generate(**batch([prompt]), generation_mode="image", **options), plain)


@pytest.mark.parametrize("strategy", set(STRATEGIES) - {"codes and ends suppressed"})
def test_image_mode_gives_the_codes_of_one_image_per_row(model, strategy):
    options = STRATEGIES[strategy]
    ids = model.generate(**batch(PROMPTS), generation_mode="image", **options)
    copies = options.get("num_return_sequences", 1)
    assert ids.shape == (len(PROMPTS) * copies, N)
    assert ids.min() >= OFFSET and ids.max() < OFFSET + K
    for row in ids[2 * copies : 3 * copies]:
        assert row[:2].tolist() == [70, 71]
    for row in ids[3 * copies : 4 * copies]:
        assert row.tolist() == [70, 71, 72, 73, 74, 75]
    assert model.decode_image_tokens(ids).shape == (len(ids), 3, 32, 48)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_image_loop_draws_what_the_general_way_draws(model, scale):
    inputs = batch(PROMPTS)
    loop = model.generate(**inputs, generation_mode="image", guidance_scale=scale)
    general = model.generate(
        **inputs, generation_mode="image", guidance_scale=scale, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(general.sequences, loop)
    assert len(general.scores) == N + 1
    as_stream = model.generate(**inputs, logits_processor=eager(), max_new_tokens=N + 2, guidance_scale=scale)
    for row, ids, progress in zip(as_stream.tolist(), loop.tolist(), (None, 0, 2, 6, None), strict=True):
        if progress is not None:
            begin = len(row) - (N + 2) - progress
            assert row[begin : begin + N] == ids


def test_one_beam_is_greedy_and_more_find_a_likelier_image(model):
    inputs = batch([[BOS, 20, 21, START]])
    greedy = model.generate(**inputs, generation_mode="image")
    beams = model.generate(**inputs, generation_mode="image", num_beams=8)

    def log_likelihood(ids: torch.Tensor) -> float:
        stream = torch.cat([inputs["input_ids"], ids], dim=1)
        scores = model(stream).logits[0, 3:-1, OFFSET:].log_softmax(dim=-1)
        return scores.gather(1, ids[0, :, None] - OFFSET).sum().item()

    assert torch.equal(model.generate(**inputs, generation_mode="image", num_beams=1), greedy)
    assert not torch.equal(beams, greedy)
    assert log_likelihood(beams) > log_likelihood(greedy)


@torch.no_grad()
def slow_stream(
    model, prompt: list[int], new_tokens: int, scale: float, boost: float, interval: tuple[int, int] = (0, N)
) -> list[int]:
    """The greedy stream of one prompt, from its definition: two full forward passes per code, no cache, no padding."""
    ids = list(prompt)
    end = len(prompt) + new_tokens
    while len(ids) < end and ids[-1] != EOS:
        logits = model(torch.tensor([ids])).logits[0, -1]
        begun = max((place for place, token in enumerate(ids) if token == START), default=-1)
        inside = END not in ids[begun:] and begun >= 0
        if inside and len(ids) - begun == N + 1:
            ids.append(END)
        elif inside:
            uncond = model(torch.tensor([[BOS, UNCOND, *ids[begun:]]])).logits[0, -1]
            guided = uncond + scale * (logits - uncond) if len(ids) - begun - 1 in range(*interval) else logits
            ids.append(OFFSET + int(guided[OFFSET:].argmax()))
        else:
            logits[START] = logits[START] + boost if end - len(ids) >= N + 2 else -torch.inf
            logits[[PAD, BOS, END, PLACEHOLDER, UNCOND]] = -torch.inf
            ids.append(int(logits[:OFFSET].argmax()))
    return ids


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 5.0])
def test_guidance_is_what_its_definition_says(every, scale):
    ids = every.generate(**batch(PROMPTS), generation_mode="image", guidance_scale=scale)
    for prompt, row in zip(PROMPTS, ids.tolist(), strict=True):
        inside = letters(prompt).rfind("S") > letters(prompt).rfind("E")
        stream = slow_stream(every, prompt if inside else [*prompt, START], N + 1, scale, boost=0.0)
        begun = max(place for place, token in enumerate(stream[: len(prompt) + 1]) if token == START)
        assert stream[begun + 1 : begun + 1 + N] == row
    if scale > 1:
        assert not torch.equal(ids, every.generate(**batch(PROMPTS), generation_mode="image"))


@pytest.mark.parametrize("boost", [0.0, 1e3], ids=["as the model likes", "image after image"])
def test_guidance_starts_anew_for_every_image_of_a_stream(every, boost):
    streams = every.generate(
        **batch(PROMPTS), max_new_tokens=26, guidance_scale=3.0, logits_processor=eager(boost)
    ).tolist()
    for prompt, row in zip(PROMPTS, streams, strict=True):
        expected = slow_stream(every, prompt, 26, 3.0, boost)
        padding = len(streams[0]) - 26 - len(prompt)
        assert row[padding : padding + len(expected)] == expected
        assert set(row[padding + len(expected) :]) <= {PAD}
    if boost:
        assert min(images_of(torch.tensor(streams))) >= 3


@pytest.mark.parametrize("interval", [(0, 0), (0, 2), (1, 4), (3, N)])
def test_guidance_may_be_kept_to_some_codes(model, interval):
    options = {"guidance_scale": 5.0, "guidance_interval": interval}
    streams = model.generate(**batch(PROMPTS), max_new_tokens=20, logits_processor=eager(), **options).tolist()
    drawn = model.generate(**batch(PROMPTS), generation_mode="image", **options).tolist()
    for prompt, row, ids in zip(PROMPTS, streams, drawn, strict=True):
        expected = slow_stream(model, prompt, 20, 5.0, 1e3, interval)
        padding = len(row) - 20 - len(prompt)
        assert row[padding : padding + len(expected)] == expected
        if letters(prompt).rfind("S") <= letters(prompt).rfind("E"):
            expected = slow_stream(model, [*prompt, START], N, 5.0, 0.0, interval)[-N:]
            assert ids == expected
    everywhere = model.generate(**batch(PROMPTS), generation_mode="image", guidance_scale=5.0).tolist()
    assert everywhere != drawn


class Calls:
    """Rows and columns of every call of the language model."""

    def __init__(self, model):
        self.shapes = []
        hook = lambda module, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        self.hook = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)

    def __enter__(self) -> list[tuple[int, int]]:
        return self.shapes

    def __exit__(self, *error):
        self.hook.remove()


def test_the_prompt_is_read_once_and_only_drawing_takes_two_branches(model):
    prompts = batch([[BOS, 20, 21], [BOS, 22]])
    script = [[40, START, *[70] * N, END, 41], [START, *[70] * N, END, 41, 42]]

    class Script(LogitsProcessor):
        def __call__(self, input_ids, scores):
            for row, tokens in enumerate(script):
                scores[row, tokens[input_ids.shape[1] - 3]] += 1e4
            return scores

    with Calls(model) as shapes:
        model.generate(
            **prompts, guidance_scale=2.0, max_new_tokens=10, logits_processor=LogitsProcessorList([Script()])
        )
    # the second row begins its image at once, the first a step later; the last code is read by one branch
    assert shapes == [(2, 3), (1, 2), *[(4, 1)] * (N + 1), (2, 1), (2, 1)]
    with Calls(model) as shapes:
        model.generate(**prompts, guidance_scale=2.0, max_new_tokens=5, generation_mode="text")
    assert shapes == [(2, 3), *[(2, 1)] * 4]
    with Calls(model) as shapes:
        model.generate(**prompts, generation_mode="image", guidance_scale=2.0, num_return_sequences=3, do_sample=True)
    assert shapes == [(3, 4), *[(12, 1)] * (N - 1)]  # two prompts and one context, read in one call
    with Calls(model) as shapes:
        model.generate(**prompts, generation_mode="image", guidance_scale=2.0, guidance_interval=(0, 2))
    assert shapes == [(3, 4), (4, 1), *[(2, 1)] * (N - 2)]
    with Calls(model) as shapes:
        model.generate(**prompts, generation_mode="image")
    assert shapes == [(2, 4), *[(2, 1)] * (N - 1)]


@pytest.mark.parametrize(
    ("mode", "scale", "interval"),
    [("auto", 1.0, None), ("interleaved", 3.0, None), ("interleaved", 3.0, (1, 4))],
    ids=["plain", "guided", "guided in part"],
)
def test_the_fast_span_and_the_step_that_shows_its_scores_give_the_same(every, mode, interval, scale):
    prompts = [[BOS, 20, START], [BOS, START, 70], [BOS, 30, 31, START, 70]]
    for inputs in (batch(PROMPTS), batch(prompts), batch(prompts[:1] * 2)):
        options = {**inputs, "generation_mode": mode, "guidance_scale": scale, "guidance_interval": interval}
        with Calls(every) as fast:
            streams = every.generate(**options, max_new_tokens=2 * N + 8)
        with Calls(every) as slow:
            output = every.generate(
                **options, max_new_tokens=2 * N + 8, output_logits=True, return_dict_in_generate=True
            )
        assert torch.equal(streams, output.sequences) and fast == slow
        assert all(logits.shape == (len(streams), OFFSET + K) for logits in output.logits)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_row_that_has_ended_is_filled_up_while_the_others_draw(model, scale):
    prompts, options = [[BOS, 20], [BOS, START, 70]], {"max_new_tokens": N + 3, "guidance_scale": scale}
    word = int(model.generate(**batch(prompts[:1]), max_new_tokens=1)[0, -1])
    ended, drawn = model.generate(**batch(prompts), **options, eos_token_id=word).tolist()
    assert word < OFFSET and ended == [PAD, BOS, 20, word, *[PAD] * (len(drawn) - 4)]
    alone = model.generate(**batch(prompts[1:]), **options, eos_token_id=word)[0].tolist()
    assert drawn == alone and images_of(torch.tensor([drawn])) == [1]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_inside_a_span_only_codes_are_scored(model, scale):
    widths = []

    def watch(module, args, output):
        widths.append(output.shape[-1])

    hook = model.lm_head.register_forward_hook(watch)
    options = {"guidance_scale": scale, "generation_mode": "interleaved"}
    model.generate(**batch([[BOS, 20, START], [BOS, START]]), max_new_tokens=N + 1, **options)
    assert widths == []  # image_end, the last token, follows by rule
    model.generate(**batch([[BOS, 20, START], [BOS, START]]), max_new_tokens=N + 3, **options)
    hook.remove()
    assert widths == [OFFSET + K] * 2


def test_a_head_with_an_adapter_is_used_as_a_whole(model):
    class Doubled(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden):
            return self.head(hidden).flip(-1)

    head, inputs = model.lm_head, batch(PROMPTS)
    model.lm_head = Doubled(head)
    try:
        fast = model.generate(**inputs, generation_mode="image", guidance_scale=2.0)
        general = model.generate(
            **inputs, generation_mode="image", guidance_scale=2.0, return_dict_in_generate=True
        ).sequences
        free = slow_stream(model, [BOS, 20, START], N, 2.0, 0.0)
    finally:
        model.lm_head = head
    assert torch.equal(fast, general) and fast[0].tolist() == free[-N:]


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    scores = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -3.0])
    draws = select(scores.expand(40000, -1), True, torch.Generator().manual_seed(0)).bincount(minlength=5) / 40000
    expected = scores.softmax(dim=-1)
    assert ((draws - expected).abs() <= 4 * (expected * (1 - expected) / 40000).sqrt()).all()
    assert draws[2] == 0


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_what_is_generated_may_be_trained_on(model, scale):
    output = model.generate(
        **batch(PROMPTS), generation_mode="interleaved", max_new_tokens=20, guidance_scale=scale,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    drawn = model.generate(**batch(PROMPTS), generation_mode="image", guidance_scale=scale)
    cache = output.past_key_values
    assert not any(tensor.is_inference() for tensor in (output.sequences, drawn, *output.scores, cache.layers[0].keys))
    model(output.sequences, labels=output.sequences).loss.backward()
    model.zero_grad()


def test_a_compiled_step_gives_the_same_streams():
    model = tiny(seed=3)
    options = {**batch(PROMPTS), **SAMPLING, "generation_mode": "interleaved", "guidance_scale": 3.0}
    plain, traced = (
        model.generate(**options, max_new_tokens=20, compile_step=step, generator=torch.Generator().manual_seed(0))
        for step in (None, "trace")
    )
    assert torch.equal(traced, plain)
    options = batch([[BOS, 33], *PROMPTS[1:]]) | {"generation_mode": "interleaved", "guidance_scale": 3.0}
    other = model.generate(**options, compile_step="trace")  # what is compiled took nothing of a prompt for granted
    assert torch.equal(other, model.generate(**options))
    for weight in model.model.language_model.parameters():
        weight.data.mul_(0.7)
    changed = model.generate(**options, compile_step="trace")  # nor the weights
    assert torch.equal(changed, model.generate(**options)) and not torch.equal(changed, other)


def test_as_many_shapes_are_compiled_as_there_are():
    """torch.compile gives up after eight, unless told otherwise."""
    model = tiny(seed=3)
    for rows in range(1, 11):
        inputs = {"input_ids": torch.tensor([[BOS, 20 + rows]]).repeat(rows, 1), "generation_mode": "image"}
        assert torch.equal(model.generate(**inputs, compile_step="trace"), model.generate(**inputs)), rows


def test_what_a_text_model_says_about_words_does_not_change_pictures(model):
    """Its generation config may punish repetition; a call that says so means it."""
    inputs = batch(PROMPTS) | {"generation_mode": "image"}
    plain = model.generate(**inputs)
    before = model.generation_config
    try:
        model.generation_config = copy.deepcopy(before)
        model.generation_config.update(repetition_penalty=1.8, no_repeat_ngram_size=1)
        assert torch.equal(model.generate(**inputs), plain)
        assert torch.equal(model.generate(**inputs, return_dict_in_generate=True).sequences, plain)
    finally:
        model.generation_config = before
    punished = model.generate(**inputs, no_repeat_ngram_size=1)
    assert all(len(set(row)) == len(row) for row in punished.tolist())
    config = GenerationConfig(return_dict_in_generate=True, output_scores=True)
    output = model.generate(**inputs, generation_config=config)
    assert torch.equal(output.sequences, plain) and output.scores


def test_rows_that_would_move_against_their_cache_are_refused(model):
    cache = DynamicCache(config=model.config.text_config)
    prompts = torch.tensor([[BOS, 33, 34, 35], [BOS, 33, START, OFFSET]])
    with torch.no_grad():
        model(prompts[:, :2], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="row 1 of the prompt ends inside an image, others do not"):
        model.generate(prompts, generation_mode="image", past_key_values=cache)


def test_a_window_shorter_than_the_stream_is_not_compiled():
    with pytest.raises(
        ValueError, match=r"no window shorter than the stream of 32 tokens; this model has sdpa attention"
    ):
        tiny(seed=2, positions="sliding window").generate(
            torch.tensor([[BOS, 20]]), generation_mode="image", compile_step="trace"
        )


def test_a_scale_of_one_or_none_is_no_guidance(model):
    inputs = batch(PROMPTS)
    plain = model.generate(**inputs, generation_mode="image")
    for scale in (1, 1.0, None):
        assert torch.equal(model.generate(**inputs, generation_mode="image", guidance_scale=scale), plain)


@pytest.mark.parametrize("mode", ["interleaved", "image"])
def test_the_same_seed_gives_the_same_and_another_seed_something_else(model, mode):
    options = {**batch(PROMPTS), "generation_mode": mode, **SAMPLING, "num_return_sequences": 2}
    if mode == "interleaved":
        options["max_new_tokens"] = 20

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(**options)

    def by_generator(seed: int) -> torch.Tensor:
        return model.generate(**options, generator=torch.Generator().manual_seed(seed))

    for draw in (seeded, by_generator):
        one, again, other = draw(1), draw(1), draw(2)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    torch.manual_seed(7)
    first = by_generator(1)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), state)  # the global one was left alone
    assert torch.equal(by_generator(1), first)


@pytest.mark.parametrize("own_loop", [False, True], ids=["transformers' loop", "ours"])  # which has no static cache
def test_images_and_text_are_sampled_each_in_its_way(model, own_loop):
    inputs = batch([[BOS, 20]] * 16)

    def parts(**options) -> tuple[set, set]:
        if own_loop:
            options["generator"] = torch.Generator().manual_seed(0)
        else:
            options["cache_implementation"] = "static"
        begun = LogitsProcessorList([Boost(EOS, -1e3)])
        streams = model.generate(
            **inputs, generation_mode="interleaved", max_new_tokens=N + 2, do_sample=True, logits_processor=begun,
            **options,
        )  # fmt: skip
        images = {tuple(row[3:-1]) for row in streams.tolist()}
        longer = model.generate(
            **inputs, generation_mode="text", max_new_tokens=5, do_sample=True, logits_processor=begun, **options
        )
        return images, {tuple(row) for row in longer.tolist()}

    images, texts = parts(top_k=0)
    assert len(images) > 8 and len(texts) > 8
    images, texts = parts(top_k=0, image_top_k=1)
    assert len(images) == 1 and len(texts) > 8
    images, texts = parts(top_k=1)
    assert len(images) > 8 and len(texts) == 1
    images, texts = parts(top_k=0, image_top_p=1e-6)
    assert len(images) == 1 and len(texts) > 8
    images, texts = parts(top_k=0, image_temperature=1e-4)
    assert len(images) == 1 and len(texts) > 8
    images, texts = parts(top_k=0, temperature=1e-4)
    assert len(images) > 8 and len(texts) == 1
    greedy = model.generate(**batch([[BOS, 20, START]]), generation_mode="image")
    loop = model.generate(**inputs, generation_mode="image", do_sample=True, image_top_k=1)
    assert torch.equal(loop, greedy.expand(16, -1))


def test_defaults_of_the_generation_config_are_saved_loaded_and_honoured(model, tmp_path):
    inputs = batch([[BOS, 20]] * 8)
    model.generation_config.update(
        allow_custom_entries=True, do_sample=True, image_top_k=1, guidance_scale=4.0, max_new_tokens=11
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert (loaded.generation_config.image_top_k, loaded.generation_config.guidance_scale) == (1, 4.0)
    ids = loaded.generate(**inputs, generation_mode="image")
    guided = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=4.0)
    assert torch.equal(ids, guided)
    assert not torch.equal(ids, model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=1.0))
    assert loaded.generate(**inputs).shape[1] <= 2 + 11
    streams = loaded.generate(**inputs, do_sample=False, logits_processor=eager())
    explicit = tiny(seed=3).generate(**inputs, guidance_scale=4.0, max_new_tokens=11, logits_processor=eager())
    assert torch.equal(streams, explicit)
    assert len(loaded.generate(**inputs, generation_mode="image", image_top_k=0).unique(dim=0)) > 1


def test_a_generation_config_of_the_call_is_honoured(model):
    inputs = batch([[BOS, 20]] * 8)
    config = GenerationConfig(do_sample=True, image_top_k=1, max_length=9, eos_token_id=63)
    assert len(model.generate(**inputs, generation_mode="image", generation_config=config).unique(dim=0)) == 1
    assert model.generate(**inputs, generation_config=config).shape == (8, 9)
    assert config.max_length == 9 and config.max_new_tokens is None


def test_lengths_are_what_was_asked_for(model):
    inputs = batch([[BOS, 20]])
    endless = LogitsProcessorList([Boost(EOS, -1e3)])
    length = {
        "default": model.generate(**inputs, logits_processor=endless).shape[1],
        "max_length": model.generate(**inputs, logits_processor=endless, max_length=9).shape[1],
        "max_new_tokens": model.generate(**inputs, logits_processor=endless, max_new_tokens=9).shape[1],
    }
    assert length == {"default": 2 + N + 2 + 64, "max_length": 9, "max_new_tokens": 11}


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_streamer_is_given_what_is_returned(model, scale):
    inputs, recorder = batch([[BOS, 20]]), Recorder()
    options = {"guidance_scale": scale, "max_new_tokens": 20}
    stream = model.generate(**inputs, generation_mode="interleaved", streamer=recorder, **options)
    assert recorder.tokens == stream[0].tolist() and recorder.ended == 1
    assert torch.equal(model.generate(**inputs, generation_mode="interleaved", **options), stream)
    recorder = Recorder()
    ids = model.generate(**inputs, generation_mode="image", streamer=recorder, guidance_scale=scale)
    assert recorder.tokens == [BOS, 20, START, *ids[0].tolist(), END] and recorder.ended == 1


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}, {"num_beams": 2}], ids=["plain", "guided", "beams"])
def test_scores_and_logits_come_with_the_stream(model, options):
    inputs = batch(PROMPTS)
    options = {**inputs, "max_new_tokens": 12, "logits_processor": eager(), **options}
    output = model.generate(**options, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert torch.equal(output.sequences, model.generate(**options))
    assert len(output.scores) == len(output.logits) == 12
    assert output.past_key_values.get_seq_length() > 12
    if "num_beams" not in options:
        finite = torch.isfinite(torch.stack(output.scores))  # (T, B, V)
        assert not finite[:, :, [PAD, BOS, PLACEHOLDER, UNCOND]].any()
        assert torch.equal(torch.stack(output.scores).argmax(dim=-1).T, output.sequences[:, -12:])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_conversation_goes_on_from_its_cache(every, scale):
    options = {"guidance_scale": scale, "logits_processor": eager()}
    first = every.generate(
        **batch([[BOS, 20, 21], [BOS, 22]]), max_new_tokens=N + 4, return_dict_in_generate=True, **options
    )
    cache = first.past_key_values
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, torch.tensor([[25, *IMAGE, 26], [27, *IMAGE, 28]])], dim=1)
    mask = (longer != PAD).long()
    ids = torch.where(longer >= OFFSET, PLACEHOLDER, longer)
    codes = longer[longer >= OFFSET].view(-1, N) - OFFSET
    with Calls(every) as shapes:
        again = every.generate(
            ids, attention_mask=mask, image_codes=codes, max_new_tokens=N + 2, past_key_values=cache, **options
        )
    assert shapes[0] == (2, 1 + N + 4)  # the token that was chosen last, and what was said since
    assert torch.equal(again, every.generate(longer, attention_mask=mask, max_new_tokens=N + 2, **options))
    longest = torch.cat([again, torch.tensor([[29], [30]])], dim=1)  # the cache has grown by what was generated
    on = {"attention_mask": (longest != PAD).long(), "max_new_tokens": 3}
    assert torch.equal(every.generate(longest, past_key_values=cache, **on), every.generate(longest, **on))


def test_a_cache_that_is_ahead_of_the_prompt_is_refused(model):
    cache = model.generate(**batch([[BOS, 20, 21]]), max_new_tokens=4, return_dict_in_generate=True).past_key_values
    with pytest.raises(
        ValueError, match="the cache holds 6 tokens, but the prompt, which must begin with them, only 2"
    ):
        model.generate(torch.tensor([[BOS, 20]]), past_key_values=cache, max_new_tokens=4)


def test_hidden_states_come_with_the_stream(model):
    inputs = batch([[BOS, 20]])
    output = model.generate(**inputs, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[0][-1].shape == (1, 2, 32)


def test_a_picture_in_the_prompt_is_returned_as_its_codes(model):
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    input_ids = torch.tensor([[BOS, START, *[PLACEHOLDER] * N, END, 20]])
    stream = model.generate(input_ids, pixel_values=pixels, max_new_tokens=3)
    assert torch.equal(stream[:, 2 : 2 + N], model.get_image_tokens(pixels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"generation_mode": "picture"},
            "generation_mode must be one of auto, text, image, interleaved, got 'picture'",
        ),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt is empty"),
        ({"input_ids": None}, "the prompt is empty"),
        ({"input_ids": torch.tensor([BOS, 20])}, r"input_ids must have shape \(B, L\), got \(2,\)"),
        ({"input_ids": torch.tensor([[BOS, 20], [BOS, PAD]])}, "row 1 of the prompt is padded on the right"),
        ({"input_ids": torch.tensor([[BOS, 20], [PAD, PAD]])}, "row 1 of the prompt is empty"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "row 0 of the prompt is padded on the right"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), input_ids \(1, 2\)"),
        ({"input_ids": torch.tensor([[BOS, 80]])}, r"row 0, position 1: id 80 is outside the vocabulary \[0, 80\)"),
        ({"input_ids": torch.tensor([[BOS, PLACEHOLDER]])}, r"rows of input_ids have \[1\] placeholders"),
        ({"input_ids": torch.tensor([[BOS, 70, 20]])}, r"row 0, positions 1 to 2: not an image of 6 codes"),
        ({"input_ids": torch.tensor([[BOS, START, 70, 20]])}, r"row 0, positions 1 to 3: not an image of 6 codes"),
        ({"input_ids": torch.tensor([[BOS, START, *[70] * 7]])}, r"row 0, positions 1 to 9: not an image of 6 codes"),
        (
            {"input_ids": torch.tensor([[BOS, 20, 21, 22], [BOS, START, 70, START]])},
            r"row 1, positions 1 to 3: not an image of 6 codes",
        ),
        ({"image_codes": torch.zeros(1, N, dtype=torch.int64)}, r"1 images are 6 tokens, but .* \[0\] placeholders"),
        ({"guidance_scale": 2.0, "guidance_interval": (2, 7)}, "two numbers from 0 to 6 in order, got 2 and 7"),
        ({"guidance_interval": (3, 2)}, "two numbers from 0 to 6 in order, got 3 and 2"),
        ({"compile_step": "trace", "num_beams": 2}, "need greedy search or sampling, not beams"),
        ({"guidance_scale": 2.0, "cache_implementation": "static"}, "need a cache of keys and values that grows"),
        ({"input_ids": torch.tensor([[BOS, END]])}, r"row 0, positions 1 to 2: not an image of 6 codes"),
        ({"generation_mode": "image", "max_new_tokens": 5}, "row 0 of the prompt needs 6 more tokens, but only 5 may"),
        ({"generation_mode": "image", "max_length": 7}, "row 0 of the prompt needs 6 more tokens, but only 5 may"),
        ({"generation_mode": "interleaved", "max_new_tokens": 7}, "needs 8 more tokens, but only 7 may be generated"),
        ({"input_ids": torch.tensor([[BOS, START, 70]]), "max_new_tokens": 5}, "needs 6 more tokens, but only 5 may"),
        ({"max_length": 2}, "needs 1 more tokens, but only 0 may be generated"),
        ({"guidance_scale": 2.0, "num_beams": 2}, "need greedy search or sampling, not beams"),
        ({"generator": torch.Generator(), "num_beams": 2}, "need greedy search or sampling, not beams"),
        ({"guidance_scale": 2.0, "output_hidden_states": True}, "give no hidden states"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number from 0 on, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number from 0 on, got nan"),
        ({"do_sample": True, "image_temperature": 0.0}, "temperature.*strictly positive"),
        ({"generation_mode": "image", "tempurature": 2.0}, "tempurature"),
        ({"tempurature": 2.0}, "tempurature"),
        ({"generation_mode": "image", "max_time": 1e-9}, "a stopping criterion cut the image of row 0"),
    ],
)
def test_what_cannot_be_done_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.tensor([[BOS, 20]]), **options})


@pytest.fixture(scope="module")
def reader() -> UniTokForConditionalGeneration:
    """A model with room for the text tokenizer of all tests."""
    return tiny(seed=5, text_rows=320)


def image(first: int, offset: int = OFFSET) -> list[int]:
    """An image of six codes that count up from `first`."""
    return [START, *(offset + (first + step) % K for step in range(N)), END]


def require_cover(rows: list, ids: torch.Tensor):
    """Every token of (B, T) ids is in exactly one segment, in order and unchanged."""
    assert len(rows) == len(ids)
    for segments, row in zip(rows, ids, strict=True):
        assert [segment.span[0] for segment in segments] == [0, *(segment.span[1] for segment in segments[:-1])]
        assert segments[-1].span[1] == len(row)
        assert torch.equal(torch.cat([segment.ids for segment in segments]), row)


def test_a_mixed_stream_comes_apart_into_its_text_and_its_pictures(reader, tokenizer):
    red, blue = (tokenizer(f"a {colour} circle", add_special_tokens=False).input_ids for colour in ("red", "blue"))
    first, second = image(3, offset=320), image(9, offset=320)
    rows = [
        [PAD, BOS, *red, *first, *second, *blue, EOS],
        [BOS, *second, *blue, EOS, PAD],
    ]
    rows[1] = [PAD] * (len(rows[0]) - len(rows[1])) + rows[1]
    ids = torch.tensor(rows)
    found = reader.decode_mixed_tokens(ids, tokenizer)
    require_cover(found, ids)
    assert [[segment.type for segment in segments] for segments in found] == [
        ["text", "image", "image", "text"],
        ["text", "image", "text"],
    ]
    assert [segment.text for segment in found[0]] == ["a red circle", None, None, "a blue circle"]
    assert [segment.text for segment in found[1]] == ["", None, "a blue circle"]
    assert all(segment.complete for segments in found for segment in segments)
    pictures = reader.decode_image_tokens(torch.tensor([first[1:-1], second[1:-1]]))
    assert pictures.shape == (2, 3, 32, 48) and not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    for segment, picture in ((found[0][1], 0), (found[0][2], 1), (found[1][1], 1)):
        assert torch.allclose(segment.image, pictures[picture], atol=1e-5)
        assert segment.image.dtype == torch.float32 and not segment.image.requires_grad
        assert segment.image.min() >= -1 and segment.image.max() <= 1


def test_one_row_may_come_without_a_batch_and_text_without_a_tokenizer(reader):
    row = torch.tensor([BOS, 20, *image(0, offset=320)])
    [[text, picture]] = reader.decode_mixed_tokens(row)
    assert (text.type, text.span, text.text, text.image) == ("text", (0, 2), None, None)
    assert (picture.type, picture.span, picture.text) == ("image", (2, 10), None)


BROKEN = {
    "cut off by the end of the row": ([START, 65, 66], 2),
    "cut off by text": ([START, 65, 66, 20], 2),
    "cut off by another image": ([START, 65, *image(0)], 1),
    "begun and no more": ([START], 0),
    "empty": ([START, END], 0),
    "too short": ([START, 65, 66, 67, END], 3),
    "too long": ([START, *range(65, 72), END], 6),
    "without its end": ([START, *range(65, 71), 20], 6),
    "without its start": ([*range(65, 71), END], 6),
    "a stray code": ([65], 1),
    "a stray end": ([END], 0),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_an_error_skipped_or_padded_with_grey_as_asked(model, kind):
    tokens, codes = BROKEN[kind]
    ids = torch.tensor([[BOS, *[20] * len(tokens)], [BOS, *tokens]])
    broken = len([token for token in tokens if token != 20]) - (N + 2) * ("another" in kind)
    with pytest.raises(ValueError, match=rf"^row 1, positions 1 to {1 + broken}: not an image of 6 codes"):
        model.decode_mixed_tokens(ids)

    skipped = model.decode_mixed_tokens(ids, on_error="skip")
    require_cover(skipped, ids)
    segment = skipped[1][1]
    assert (segment.type, segment.complete, segment.image) == ("image", False, None)
    assert segment.span == (1, 1 + broken)
    if "another" in kind:
        assert skipped[1][2].complete and skipped[1][2].image is not None

    padded = model.decode_mixed_tokens(ids, on_error="pad")
    require_cover(padded, ids)
    assert not padded[1][1].complete
    picture = padded[1][1].image
    assert picture.shape == (3, 32, 48)
    there = [token for token in tokens if token >= OFFSET][:codes]
    whole = model.decode_image_tokens(torch.tensor([there + [OFFSET] * (N - codes)]))[0]
    for place in range(N):
        row, column = 16 * (place // 3), 16 * (place % 3)
        patch = picture[:, row : row + 16, column : column + 16]
        if place < codes:
            assert torch.allclose(patch, whole[:, row : row + 16, column : column + 16], atol=1e-5)
            assert patch.abs().max() > 0
        else:
            assert (patch == 0).all()


def test_all_pictures_of_a_batch_are_decoded_at_once(model):
    batches = []
    hook = model.model.vqmodel.decoder.register_forward_hook(lambda *call: batches.append(len(call[-1])))
    ids = torch.tensor([[BOS, *image(1), *image(2)], [BOS, *image(3), START, 70, *[20] * 6], [BOS, *[20] * 16]])
    model.decode_mixed_tokens(ids, on_error="skip")
    model.decode_mixed_tokens(ids, on_error="pad")
    model.decode_mixed_tokens(ids[2:])
    hook.remove()
    assert batches == [3, 4]


@pytest.mark.parametrize(("on_error", "rows"), [("skip", 1600), ("pad", 400)])
def test_whatever_the_ids_no_token_is_lost_and_no_picture_made_up(model, on_error, rows):
    chance = torch.Generator().manual_seed(0)
    kinds = torch.tensor([START, END, 20, BOS, *[OFFSET + 5] * 4])
    ids = kinds[torch.randint(len(kinds), (rows, 16), generator=chance)]
    ids[::4, 4:12] = torch.tensor(image(2))  # else hardly one would be whole
    found = model.decode_mixed_tokens(ids, on_error=on_error)
    require_cover(found, ids)
    whole = 0
    for segments, row in zip(found, ids.tolist(), strict=True):
        spans = [match.span() for match in re.finditer(rf"Sc{{{N}}}E", letters(row))]
        assert [segment.span for segment in segments if segment.complete and segment.type == "image"] == spans
        whole += len(spans)
        for segment in segments:
            kind = letters(segment.ids.tolist())
            assert (segment.type == "text") == (not set(kind) & set("SEc"))
            pictured = segment.type == "image" and (segment.complete or on_error == "pad")
            assert (segment.image is not None) == pictured
    assert whole >= rows / 4


def test_every_generated_stream_comes_apart(model):
    streams = model.generate(**batch(PROMPTS), generation_mode="interleaved", max_new_tokens=30, **SAMPLING)
    found = model.decode_mixed_tokens(streams)
    require_cover(found, streams)
    pictures = [sum(segment.image is not None for segment in segments) for segments in found]
    assert pictures == images_of(streams)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[BOS, 20], [BOS, 80]], {}, r"row 1, position 1: id 80 is outside the vocabulary \[0, 80\)"),
        ([[BOS, -1]], {"on_error": "skip"}, "row 0, position 1: id -1 is outside the vocabulary"),
        ([[BOS, 20]], {"on_error": "ignore"}, "on_error must be raise, skip or pad, got 'ignore'"),
    ],
)
def test_ids_and_policies_that_do_not_exist_are_refused(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        model.decode_mixed_tokens(torch.tensor(ids), **options)


def test_a_tokenizer_of_another_model_is_refused(reader, tokenizer):
    other = copy.deepcopy(reader.config)
    other.image_start_token_id, before = 100, reader.config
    try:
        reader.config = other
        with pytest.raises(ValueError, match=r"not that of the model: image_start_token_id is \d+ there and 100 here"):
            reader.decode_mixed_tokens(torch.tensor([[1, 2]]), tokenizer)
    finally:
        reader.config = before


def test_a_tokenizer_that_has_grown_into_the_codes_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"codes begin at id 64; call model.resize_token_embeddings"):
        model.decode_mixed_tokens(torch.tensor([[BOS, 20]]), tokenizer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 5), 70), r"an image is 6 tokens, got ids of shape \(1, 5\)"),
        (torch.full((6,), 70), r"an image is 6 tokens, got ids of shape \(6,\)"),
        (torch.tensor([[70, 70, 70, 20, 70, 70]]), r"20 at \[0, 3\] is no visual token"),
    ],
)
def test_what_is_no_image_is_not_decoded(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model.decode_image_tokens(ids)


@pytest.mark.parametrize("mode", ["image", "interleaved", "auto"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}], ids=["plain", "guided"])
def test_a_row_with_a_generator_of_its_own_depends_on_no_other(model, mode, options):
    prompts, seeds = [[BOS, 9], [BOS], [BOS, 20, 21, 22]], [5, 6, 7]

    def draw(rows: list[int]) -> list[list[int]]:
        inputs = batch([prompts[row] for row in rows])
        generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
        ids = model.generate(
            **inputs, generation_mode=mode, generator=generators, max_new_tokens=40, **SAMPLING | options
        )
        return (ids if mode == "image" else ids[:, inputs["input_ids"].shape[1] :]).tolist()

    together, turned = draw([0, 1, 2]), draw([2, 0, 1])
    for row in range(3):
        [alone] = draw([row])
        for other in (together[row], turned[[2, 0, 1].index(row)]):
            assert other[: len(alone)] == alone and set(other[len(alone) :]) <= {PAD}
    assert len({tuple(ids) for ids in together}) == 3


def test_there_are_as_many_generators_as_rows(model):
    generators = [torch.Generator(), torch.Generator()]
    for mode in ("image", "auto"):
        with pytest.raises(ValueError, match="2 generators for 4 rows"):
            model.generate(
                **batch(PROMPTS[:2]), generation_mode=mode, generator=generators, num_return_sequences=2, **SAMPLING
            )
