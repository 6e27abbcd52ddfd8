"""Scores: how likely a model finds text given pictures, and pictures given text.

    bos <image> a red apple        text given image: the log-probabilities of the words
    bos a red apple <image>        image given text: those of the codes

- a stream is scored as training reads it: log p(token | all before it), over the whole vocabulary. Minus the mean over
  codes is the `image_loss` of the stream; guidance, grammar and sampling options have no part in it
- logits are made for a few positions at a time; a (B, T, V) block never exists
- best of n, `generate(num_candidates=n)`: of n pictures drawn for a prompt, the one is kept after which the model finds
  the prompt likeliest. For one prompt this is the order by mutual information, log p(text | image) - log p(text),
  whereas log p(image | text) prefers what is common in any picture. DALL-E (arXiv:2102.12092) ranks with a second model,
  CLIP; CogView (arXiv:2105.13290) with the captions' likelihood, as here. It needs a model that has learnt to read
  pictures: one whose training had images before their text

Letters: B rows, T stream length, V vocabulary, D hidden width, N scored tokens, P prompts, C candidates, n = h·w codes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import ModelOutput

from .decoding_unitok import positions
from .grammar_unitok import image_progress


LOGIT_BYTES = 64 * 2**20  # the (positions, V) block of fp32 logits that scoring holds at a time


@dataclass
class SpanScore:
    """The score of a stretch of text or of one image.

    Args:
        type: "text" or "image".
        span: first position and one past the last, in its row.
        log_prob: in nats, the sum over its scored tokens.
        tokens: how many these are. Of an image they are the codes, without the tokens around them: whether a picture
            comes is not what it looks like. Of a text, all but the first token of the row.
    """

    type: Literal["text", "image"]
    span: tuple[int, int]
    log_prob: float
    tokens: int


@dataclass
class UniTokScores:
    """What `score` returns.

    Args:
        log_probs: (B, T) fp32, log p(token | all before it in its row) in nats; 0 for padding and for the first token of
            a row, before which there is nothing.
        spans: per row, its text and its images in order.
    """

    log_probs: torch.FloatTensor
    spans: list[list[SpanScore]]


@dataclass
class UniTokCandidates(ModelOutput):
    """What `generate` returns with `num_candidates` and `return_dict_in_generate`.

    Args:
        sequences: (P · num_return_sequences, n) visual ids of the pictures that are kept, best first for each prompt.
        sequences_scores: (P · num_return_sequences,) their scores, log p(prompt | picture) in nats.
        candidates: (P, C, n) all pictures in the order in which they were drawn.
        candidate_scores: (P, C) their scores.
    """

    sequences: torch.LongTensor | None = None
    sequences_scores: torch.FloatTensor | None = None
    candidates: torch.LongTensor | None = None
    candidate_scores: torch.FloatTensor | None = None


class UniTokScoringMixin:
    """`score`, and the choice among candidates, for a model with `model.language_model`, `lm_head` and `vocabulary`."""

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
    ) -> UniTokScores:
        """Log-probabilities of streams, per token, per stretch of text and per image.

        An image before its text gives text given image; a text before its image gives image given text.

        Args:
            input_ids: (B, T), padded on either side, with placeholders for the images that come as pixels or codes.
            attention_mask: (B, T); derived from the padding when not given.
            pixel_values, image_codes: see `fill_images`.

        Returns:
            the same for a row alone and in a batch.

        Raises:
            ValueError: an empty row, an id outside the vocabulary, a broken image, with row and position; images that do
                not fit the placeholders.
        """
        ids, mask = self._to_score(input_ids, attention_mask, pixel_values, image_codes)
        hidden = self.model.language_model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False
        ).last_hidden_state  # (B, T, D)
        scored = mask[:, 1:] & mask[:, :-1]
        log_probs = torch.zeros(ids.shape, device=hidden.device)
        log_probs[:, 1:][scored] = self._log_probs(hidden[:, :-1][scored], ids[:, 1:][scored])
        return UniTokScores(log_probs, [self._span_scores(*row) for row in zip(ids, mask, log_probs, strict=True)])

    def _to_score(self, input_ids, attention_mask, pixel_values, image_codes) -> tuple[torch.Tensor, torch.BoolTensor]:
        """Streams (B, T) with their images filled, and what of them is no padding; raises what `score` says."""
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must have shape (B, T) and hold something, got {tuple(input_ids.shape)}")
        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        mask = attention_mask.to(self.device).bool()
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
        if not mask.any(dim=1).all():
            raise ValueError(f"row {int((~mask.any(dim=1)).nonzero()[0])} is empty; there is nothing to score")
        ids = self.fill_images(input_ids, pixel_values, image_codes)
        self._require_streams(ids, [int(row.nonzero()[-1]) + 1 for row in mask])
        return ids, mask

    def _log_probs(self, hidden: torch.Tensor, targets: torch.LongTensor) -> torch.FloatTensor:
        """log p (N,) of tokens (N,) after hidden states (N, D)."""
        rows = max(1, LOGIT_BYTES // (4 * self.config.vocab_size))
        found = []
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self.softcap(self.lm_head(part)).float()  # (rows, V)
            found.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1))
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    def _span_scores(self, ids: torch.LongTensor, mask: torch.BoolTensor, log_probs: torch.Tensor) -> list[SpanScore]:
        """The spans of one row (T,), padding left out."""
        where = mask.nonzero()[:, 0]
        first, last = int(where[0]), int(where[-1]) + 1
        spans = []
        for segment in self._segments(ids[first:last]):
            begin, end = (first + edge for edge in segment.span)
            scored = torch.arange(begin, end, device=ids.device) > first
            if segment.type == "image":
                scored &= self.vocabulary.is_visual(segment.ids)
            spans.append(
                SpanScore(segment.type, (begin, end), float(log_probs[begin:end][scored].sum()), int(scored.sum()))
            )
        return spans

    def _best_of(
        self,
        num_candidates: int,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_codes: torch.LongTensor | None,
        generation_mode: str,
        generation_config: GenerationConfig | None,
        streamer,
        **options,
    ) -> torch.LongTensor | UniTokCandidates:
        """What `generate` returns with `num_candidates`; arguments as there."""
        given = {name: options[name] for name in ("do_sample", "num_return_sequences") if name in options}
        config, _ = self._prepare_generation_config(generation_config, **given)
        return_dict = options.pop("return_dict_in_generate", config.return_dict_in_generate)
        kept = config.num_return_sequences
        if generation_mode != "image" or streamer is not None:
            raise ValueError('num_candidates needs generation_mode="image", and no streamer: the choice comes last')
        if not kept <= num_candidates:
            raise ValueError(f"num_candidates must be at least num_return_sequences, got {num_candidates} and {kept}")
        if not config.do_sample:
            raise ValueError("num_candidates needs do_sample=True: without it, all candidates would be the same")
        input_ids, attention_mask = self._checked(input_ids, attention_mask, pixel_values, image_codes)
        captions = self._captions(input_ids, attention_mask)
        drawn = self.generate(
            input_ids,
            attention_mask,
            generation_mode="image",
            generation_config=generation_config,
            **options | {"num_return_sequences": num_candidates},
        )
        drawn = drawn if isinstance(drawn, torch.Tensor) else drawn.sequences
        candidates = drawn.unflatten(0, (len(input_ids), num_candidates))  # (P, C, n)
        scores = self._caption_scores(captions, candidates)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]  # of equals, the one drawn first
        best = candidates.gather(1, order[..., None].expand(-1, -1, candidates.shape[2])).flatten(0, 1)
        if not return_dict:
            return best
        return UniTokCandidates(
            sequences=best,
            sequences_scores=scores.gather(1, order).flatten(),
            candidates=candidates,
            candidate_scores=scores,
        )

    def _captions(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> list[torch.LongTensor]:
        """Of each prompt (B, L) what describes the picture: without bos, padding, and the image it ends in."""
        captions = []
        progress = image_progress(input_ids, self.vocabulary).tolist()
        for row, (ids, mask, drawn) in enumerate(zip(input_ids, attention_mask.bool(), progress, strict=True)):
            ids = ids[mask]
            ids = ids[: len(ids) - drawn - 1] if drawn >= 0 else ids
            ids = ids[1:] if len(ids) and ids[0] == self.config.bos_token_id else ids
            if not self._is_text(ids).any():
                raise ValueError(f"row {row} of the prompt has no text, by which num_candidates could choose")
            captions.append(ids)
        return captions

    def _is_text(self, ids: torch.LongTensor) -> torch.BoolTensor:
        """Which ids are neither codes nor the tokens around them."""
        around = (ids == self.vocabulary.image_start) | (ids == self.vocabulary.image_end)
        return ~self.vocabulary.is_visual(ids) & ~around

    def _caption_scores(self, captions: list[torch.LongTensor], candidates: torch.LongTensor) -> torch.FloatTensor:
        """log p(text of the caption | picture), (P, C), of captions and visual ids (P, C, n)."""
        bos = candidates.new_tensor([self.config.bos_token_id])
        start, end = self.vocabulary.image_start, self.vocabulary.image_end
        pictures = nn.functional.pad(nn.functional.pad(candidates, (1, 0), value=start), (0, 1), value=end)
        streams = [
            torch.cat([bos, picture, caption])
            for caption, own in zip(captions, pictures, strict=True)
            for picture in own
        ]
        pad = self.config.pad_token_id
        ids = nn.utils.rnn.pad_sequence(streams, batch_first=True, padding_value=pad, padding_side="left")
        there = nn.utils.rnn.pad_sequence(
            [torch.ones_like(stream) for stream in streams], batch_first=True, padding_side="left"
        )
        picture_end = ids.shape[1] - torch.tensor([len(caption) for caption in captions], device=ids.device)
        column = torch.arange(ids.shape[1], device=ids.device)
        of_caption = column >= picture_end.repeat_interleave(candidates.shape[1])[:, None]
        log_probs = self.score(ids, there).log_probs
        return (log_probs * (of_caption & self._is_text(ids))).sum(dim=1).unflatten(0, candidates.shape[:2])


__all__ = ["SpanScore", "UniTokCandidates", "UniTokScores"]
