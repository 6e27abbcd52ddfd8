"""The image grammar: what may follow what in a stream of text and image tokens.

- after image_start come exactly h·w codes, then image_end; codes come nowhere else; no image is begun that cannot be
  finished
- the state is read from the ids alone, so the grammar holds under sampling, beams, assistants, left padding, and for
  prompts that end inside an image
- sampling has options of its own inside images (`PerModality`), as in Chameleon's and Lumina-mGPT's own generators

Letters: B rows, T stream length, V vocabulary.
"""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..configuration.vocabulary_unitok import VisualVocabulary


OUTSIDE, INSIDE, CLOSING, BEGINNING = range(4)  # where a stream stands; in the last two, one token may follow


def image_progress(ids: torch.LongTensor, vocabulary: VisualVocabulary) -> torch.LongTensor:
    """Codes that each row has drawn of the image it ends in; -1 for a row that ends outside an image.

    Args:
        ids: (B, T), well-formed streams.

    Returns:
        (B,) int64 in [-1, h·w].
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    last_start = torch.where(ids == vocabulary.image_start, position, -1).amax(dim=1)  # (B,)
    last_end = torch.where(ids == vocabulary.image_end, position, -1).amax(dim=1)
    return torch.where(last_start > last_end, ids.shape[1] - 1 - last_start, -1)


class ImageGrammar(LogitsProcessor):
    """Forbids every token that would make the stream ill formed.

    Args:
        vocabulary: where the codes are.
        forbidden: ids that are never generated (bos, pad, the placeholder, <|uncond|>).
        mode: "text" begins no image; "interleaved" ends no row that has drawn no image since the prompt.
        eos: end-of-sequence ids.
        prompt_length: L, padding included.
        max_length: no image is begun that would not fit into so many positions.
    """

    def __init__(
        self,
        vocabulary: VisualVocabulary,
        forbidden: list[int],
        mode: str,
        eos: list[int],
        prompt_length: int,
        max_length: int,
    ):
        self.vocabulary, self.mode, self.eos = vocabulary, mode, eos
        self.prompt_length, self.max_length = prompt_length, max_length
        self.bias = torch.zeros(4, vocabulary.size)
        self.bias[OUTSIDE, vocabulary.offset :] = -torch.inf
        self.bias[OUTSIDE, [*forbidden, vocabulary.image_end]] = -torch.inf
        self.bias[INSIDE, : vocabulary.offset] = -torch.inf
        self.bias[[CLOSING, BEGINNING]] = -torch.inf
        self.bias[CLOSING, vocabulary.image_end] = self.bias[BEGINNING, vocabulary.image_start] = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) with -inf at what may not follow `input_ids` (B, T)."""
        self.bias = self.bias.to(scores.device)
        drawn = image_progress(input_ids, self.vocabulary)
        inside = torch.where(drawn < self.vocabulary.codes_per_image, INSIDE, CLOSING)
        state = torch.where(drawn < 0, OUTSIDE, inside)  # (B,)
        scores = scores.clone()
        room = self.max_length - input_ids.shape[1]
        if self.mode == "text" or room < self.vocabulary.tokens_per_image:
            scores[:, self.vocabulary.image_start] = -torch.inf
        elif self.mode == "interleaved":
            drew = (input_ids[:, self.prompt_length :] == self.vocabulary.image_end).any(dim=1)
            owing = (drawn < 0) & ~drew
            scores[:, self.eos] = scores[:, self.eos].masked_fill(owing[:, None], -torch.inf)
            if room == self.vocabulary.tokens_per_image:
                state = torch.where(owing, BEGINNING, state)
        bias = self.bias[state]
        # the only token that may follow is set, not added to: another processor may have forbidden it
        return torch.where((state >= CLOSING)[:, None], bias, scores + bias)


class PerModality(LogitsProcessor):
    """One list of processors for rows inside an image, another for the rest."""

    def __init__(self, vocabulary: VisualVocabulary, image: LogitsProcessorList, text: LogitsProcessorList):
        self.vocabulary, self.image, self.text = vocabulary, image, text

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        inside = (image_progress(input_ids, self.vocabulary) >= 0)[:, None]
        if not inside.any():  # a look that costs less than sorting the vocabulary twice
            return self.text(input_ids, scores)
        return torch.where(inside, self.image(input_ids, scores), self.text(input_ids, scores))


def warpers(temperature: float | None, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """Transformers' sampling warpers for the options that change anything; temperature first, as `generate` has them."""
    chosen = LogitsProcessorList()
    if temperature not in (None, 1.0):
        chosen.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen
