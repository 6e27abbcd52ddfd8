"""What scoring promises: the log-probabilities of the definition, alone and in a batch, and the best of n by them."""

import math
import re

import pytest
import torch
from transformers import NanoChatConfig

from unitok_hf import UniTokConfig, UniTokForConditionalGeneration
from unitok_hf.modeling_unitok import scoring_unitok


PAD, BOS, EOS, START, END, PLACEHOLDER, UNCOND = range(7)
OFFSET, K, N = 64, 16, 6
IMAGE = [START, 70, 64, 79, 71, 71, 66, END]
ROWS = {
    "image first": [BOS, *IMAGE, 20, 21, 22, EOS],
    "text first": [BOS, 30, 31, *IMAGE, EOS],
    "text alone": [BOS, 40],
    "image alone": IMAGE,
    "begun": [BOS, 20, START, 70, 71],
    "two images": [BOS, *IMAGE, 33, *IMAGE],
}


@pytest.fixture(scope="module")
def model() -> UniTokForConditionalGeneration:
    """Untrained, with logits far apart: a softcap at work, and captions that depend on the picture."""
    torch.manual_seed(3)
    text_config = NanoChatConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5
    )
    vq_config = {"block_out_channels": (32, 32, 32), "latent_channels": 4, "num_vq_embeddings": K}
    config = UniTokConfig(
        text_config=text_config, vq_config=vq_config, text_vocab_size=64, num_visual_tokens=K, image_grid=(2, 3)
    )
    return UniTokForConditionalGeneration(config).eval()


def batch(rows: list[list[int]], side: str = "left") -> torch.Tensor:
    """Rows padded on one side."""
    length = max(map(len, rows))
    padded = [([PAD] * (length - len(row)), row) for row in rows]
    return torch.tensor([pad + row if side == "left" else row + pad for pad, row in padded])


@torch.no_grad()
def by_definition(model, row: list[int]) -> list[float]:
    """log p of each token of one row after the first, worked out in double precision from the logits of `forward`."""
    found = []
    for scores, token in zip(model(torch.tensor([row])).logits[0, :-1].double().tolist(), row[1:], strict=True):
        largest = max(scores)
        found.append(scores[token] - largest - math.log(sum(math.exp(score - largest) for score in scores)))
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_a_token_is_scored_by_the_softmax_over_the_whole_vocabulary(model, kind):
    row = ROWS[kind]
    scores = model.score(torch.tensor([row]))
    assert scores.log_probs.shape == (1, len(row)) and scores.log_probs.dtype == torch.float32
    assert scores.log_probs[0, 0] == 0
    assert scores.log_probs[0, 1:].tolist() == pytest.approx(by_definition(model, row), abs=1e-4)
    assert scores.log_probs[0, 1:].max() < 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_a_row_has_the_same_scores_alone_and_in_a_padded_batch(model, side, with_mask):
    ids = batch(list(ROWS.values()), side)
    mask = (ids != PAD).long() if with_mask else None
    together = model.score(ids, mask)
    for number, row in enumerate(ROWS.values()):
        alone = model.score(torch.tensor([row]))
        there = ids[number] != PAD
        assert torch.allclose(together.log_probs[number, there], alone.log_probs[0], atol=1e-5)
        assert (together.log_probs[number, ~there] == 0).all()
        shift = int(there.nonzero()[0])
        for found, expected in zip(together.spans[number], alone.spans[0], strict=True):
            assert (found.type, found.tokens) == (expected.type, expected.tokens)
            assert found.span == tuple(edge + shift for edge in expected.span)
            assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


def test_spans_are_the_texts_and_the_codes_of_the_images(model):
    row = ROWS["image first"]
    expected = [0.0, *by_definition(model, row)]
    bos, image, text = model.score(torch.tensor([row])).spans[0]
    assert (bos.type, bos.span, bos.tokens, bos.log_prob) == ("text", (0, 1), 0, 0.0)
    assert (image.type, image.span, image.tokens) == ("image", (1, 9), N)
    assert image.log_prob == pytest.approx(sum(expected[2:8]), abs=1e-4)  # neither of the tokens around the codes
    assert (text.type, text.span, text.tokens) == ("text", (9, 13), 4)
    assert text.log_prob == pytest.approx(sum(expected[9:13]), abs=1e-4)
    begun = model.score(torch.tensor([ROWS["begun"]])).spans[0][-1]
    assert (begun.type, begun.span, begun.tokens) == ("image", (2, 5), 2)


def test_scores_are_the_losses_of_training_with_another_sign(model):
    ids = batch([ROWS["image first"], ROWS["text first"]], "right")
    output = model(ids, (ids != PAD).long(), labels=ids.masked_fill(ids == PAD, -100))
    log_probs = model.score(ids).log_probs
    visual = ids >= OFFSET
    assert -log_probs[visual].mean() == pytest.approx(output.image_loss.item(), rel=1e-4)
    texts = (~visual & (ids != PAD)).sum() - len(ids)  # all but the first of each row
    assert -log_probs[~visual].sum() / texts == pytest.approx(output.text_loss.item(), rel=1e-4)


def test_pixels_and_codes_are_scored_as_the_ids_they_stand_for(model):
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = torch.tensor([[BOS, START, *[PLACEHOLDER] * N, END, 20, 21]])
    visual = model.get_image_tokens(pixels)
    filled = torch.cat([ids[:, :2], visual, ids[:, -3:]], dim=1)
    expected = model.score(filled)
    for found in (model.score(ids, pixel_values=pixels), model.score(ids, image_codes=visual - OFFSET)):
        assert torch.equal(found.log_probs, expected.log_probs) and found.spans == expected.spans


def test_the_picture_before_a_text_changes_its_score_and_not_the_other_way_round(model):
    other = [START, 65, 65, 65, 65, 65, 65, END]
    first = [model.score(torch.tensor([[BOS, *image, 20, 21]])).spans[0][-1].log_prob for image in (IMAGE, other)]
    assert abs(first[0] - first[1]) > 0.01
    last = [model.score(torch.tensor([[BOS, 20, 21, *image]])).spans[0][0].log_prob for image in (IMAGE, other)]
    assert last[0] == pytest.approx(last[1], abs=1e-5)


def test_logits_are_made_for_a_few_positions_at_a_time(model, monkeypatch):
    ids = batch(list(ROWS.values()))
    whole = model.score(ids)
    monkeypatch.setattr(scoring_unitok, "LOGIT_BYTES", 5 * 4 * (OFFSET + K))
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, given, made: shapes.append(tuple(made.shape)))
    parts = model.score(ids)
    hook.remove()
    scored = sum(len(row) - 1 for row in ROWS.values())
    assert sum(rows for rows, _ in shapes) == scored and max(rows for rows, _ in shapes) == 5
    assert torch.allclose(parts.log_probs, whole.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "input_ids must have shape (B, T)"),
        ([[BOS, 20], [PAD, PAD]], "row 1 is empty"),
        ([[BOS, 20], [BOS, OFFSET + K]], "row 1, position 1: id 80 is outside the vocabulary [0, 80)"),
        ([[BOS, START, 70, 71, END, 20]], "row 0, positions 1 to 5: not an image of 6 codes"),
        ([[BOS, START, 70, START, 71, 72]], "row 0, positions 1 to 3: not an image of 6 codes"),
        ([[BOS, *[PLACEHOLDER] * N]], "0 images are 0 tokens, but the rows of input_ids have [6] placeholders"),
    ],
)
def test_what_is_no_stream_is_not_scored(model, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.score(torch.tensor(rows, dtype=torch.int64))


def test_a_mask_of_another_shape_is_refused(model):
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 1\), input_ids \(1, 2\)"):
        model.score(torch.tensor([[BOS, 20]]), torch.ones(1, 1))


PROMPTS = [[BOS, 20], [BOS, 21, 22, 23, START], [BOS, 24, 25, START, 70, 71], [BOS, *IMAGE, 26, 27]]
CAPTIONS = [[20], [21, 22, 23], [24, 25], [*IMAGE, 26, 27]]
DRAW = {"generation_mode": "image", "do_sample": True, "top_k": 0}


def caption_score(model, codes: list[int], caption: list[int]) -> float:
    """log p(words of the caption | picture), by definition."""
    row = [BOS, START, *codes, END, *caption]
    found = [0.0, *by_definition(model, row)][len(codes) + 3 :]
    return sum(p for p, token in zip(found, caption, strict=True) if token < OFFSET and token not in (START, END))


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 2.0}, {"num_return_sequences": 3}, {"repetition_penalty": 1.2}]
)
def test_of_n_candidates_those_are_kept_after_which_the_prompt_is_likeliest(model, options):
    ids = batch(PROMPTS)

    def draw(**more):
        return model.generate(ids, **DRAW, **options | more, generator=torch.Generator().manual_seed(1))

    kept = options.get("num_return_sequences", 1)
    output = draw(num_candidates=5, return_dict_in_generate=True)
    drawn = draw(num_return_sequences=5)
    assert torch.equal(output.candidates.flatten(0, 1), drawn)
    assert output.sequences.shape == (4 * kept, N) and output.sequences_scores.shape == (4 * kept,)
    for prompt, caption in enumerate(CAPTIONS):
        scores = [caption_score(model, codes, caption) for codes in output.candidates[prompt].tolist()]
        assert output.candidate_scores[prompt].tolist() == pytest.approx(scores, abs=1e-3)
        order = sorted(range(5), key=lambda number: -scores[number])[:kept]
        own = slice(prompt * kept, (prompt + 1) * kept)
        assert torch.equal(output.sequences[own], output.candidates[prompt, order])
        assert output.sequences_scores[own].tolist() == pytest.approx([scores[number] for number in order], abs=1e-3)
        assert max(scores) - min(scores) > 0.01
    assert torch.equal(draw(num_candidates=5), output.sequences)


def test_of_equal_candidates_the_first_is_kept(model, monkeypatch):
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]] * 4)
    monkeypatch.setattr(model, "_caption_scores", lambda captions, candidates: scores)
    output = model.generate(
        batch(PROMPTS), **DRAW, num_candidates=5, num_return_sequences=4, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences.view(4, 4, N), output.candidates[:, [1, 2, 4, 0]])


def test_one_candidate_is_the_picture_that_is_drawn_anyway(model):
    ids = batch(PROMPTS)
    one = model.generate(ids, **DRAW, num_candidates=1, generator=torch.Generator().manual_seed(2))
    assert torch.equal(one, model.generate(ids, **DRAW, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (PROMPTS, {"num_candidates": 2, "num_return_sequences": 3}, "at least num_return_sequences, got 2 and 3"),
        (PROMPTS, {"num_candidates": 0}, "at least num_return_sequences, got 0 and 1"),
        (PROMPTS, {"num_candidates": 2, "do_sample": False}, "needs do_sample=True"),
        (PROMPTS, {"num_candidates": 2, "generation_mode": "auto"}, 'needs generation_mode="image"'),
        ([[BOS, 20], [BOS, START]], {"num_candidates": 2}, "row 1 of the prompt has no text"),
        ([[BOS, 20], [BOS, *IMAGE]], {"num_candidates": 2}, "row 1 of the prompt has no text"),
    ],
)
def test_candidates_that_cannot_be_ranked_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(batch(prompts), **DRAW | options)
