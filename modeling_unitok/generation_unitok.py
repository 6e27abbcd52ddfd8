"""Generation: the image grammar, guidance, the image loop, and the way back from ids to text and pictures.

- `ImageGrammar` keeps every stream well formed: after image_start come exactly h·w codes, then image_end; codes come
  nowhere else; no image is begun that cannot be finished. It reads its state from the ids alone, so it holds under
  sampling, beams, left padding, and prompts that end inside an image.
- classifier-free guidance (arXiv:2207.12598; for image tokens arXiv:2203.13131): logits = uncond + s · (cond - uncond)
  inside images, where the unconditional branch has seen `bos <|uncond|> <|image_start|>` and the codes so far. Both
  branches run in one batch.
- `generate(generation_mode="image")` draws one image per row in a loop of its own: only the visual rows of the head are
  computed, and nothing waits for the host inside the image. The other modes run through transformers' `generate`.
- `decode_mixed_tokens` takes a mixed stream apart and accounts for every token.

Letters: B rows, L prompt length, T stream length, V vocabulary, K codes, n = h·w codes per image.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ..configuration.vocabulary_unitok import VisualVocabulary


GENERATION_MODES = ("auto", "text", "image", "interleaved")
IMAGE_OPTIONS = ("image_temperature", "image_top_k", "image_top_p")


@dataclass
class Segment:
    """A stretch of text or one image of a mixed stream.

    Args:
        type: "text" or "image".
        ids: (span length,) its token ids, special tokens included.
        span: first position and one past the last, in its row.
        complete: false for an image that is not start, h·w codes, end.
        text: decoded text of a text segment, when a tokenizer was given.
        image: (3, H, W) in [-1, 1] of a complete image, or of a broken one under `on_error="pad"`.
    """

    type: Literal["text", "image"]
    ids: torch.LongTensor
    span: tuple[int, int]
    complete: bool = True
    text: str | None = None
    image: torch.Tensor | None = None


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
        outside, inside, closing = torch.zeros(3, vocabulary.size)
        outside[vocabulary.offset :] = -torch.inf
        outside[[*forbidden, vocabulary.image_end]] = -torch.inf
        inside[: vocabulary.offset] = -torch.inf
        closing[:] = -torch.inf
        closing[vocabulary.image_end] = 0
        self.bias = torch.stack([outside, inside, closing])  # (3, V)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) with -inf at what may not follow `input_ids` (B, T)."""
        self.bias = self.bias.to(scores.device)
        drawn = image_progress(input_ids, self.vocabulary)
        state = torch.where(drawn < 0, 0, torch.where(drawn < self.vocabulary.codes_per_image, 1, 2))
        scores = scores + self.bias[state]
        outside = (drawn < 0)[:, None]
        room = self.max_length - input_ids.shape[1]
        if self.mode == "text" or room < self.vocabulary.tokens_per_image:
            scores[:, self.vocabulary.image_start] = -torch.inf
        elif self.mode == "interleaved":
            drew = (input_ids[:, self.prompt_length :] == self.vocabulary.image_end).any(dim=1, keepdim=True)
            must_begin = outside & ~drew & (room == self.vocabulary.tokens_per_image)
            scores[:, self.eos] = scores[:, self.eos].masked_fill(outside & ~drew, -torch.inf)
            keep = torch.arange(scores.shape[1], device=scores.device) == self.vocabulary.image_start
            scores = scores.masked_fill(must_begin & ~keep, -torch.inf)
        return scores


class PerModality(LogitsProcessor):
    """One list of processors for rows inside an image, another for the rest."""

    def __init__(self, vocabulary: VisualVocabulary, image: LogitsProcessorList, text: LogitsProcessorList):
        self.vocabulary, self.image, self.text = vocabulary, image, text

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        inside = (image_progress(input_ids, self.vocabulary) >= 0)[:, None]
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


def select(scores: torch.FloatTensor, do_sample: bool, generator: torch.Generator | None) -> torch.LongTensor:
    """One token per row (B,) from scores (B, V): the best, or a draw from their softmax."""
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(1)


def positions(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Position ids (B, T) that count only what is attended to."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


class UniTokGenerationMixin:
    """`generate` and `decode_mixed_tokens` for a model with `model.language_model`, `lm_head` and `vocabulary`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
        generation_mode: Literal["auto", "text", "image", "interleaved"] = "auto",
        guidance_scale: float | None = None,
        image_temperature: float | None = None,
        image_top_k: int | None = None,
        image_top_p: float | None = None,
        generator: torch.Generator | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        streamer=None,
        **kwargs,
    ) -> torch.LongTensor | GenerateDecoderOnlyOutput:
        """Continue prompts with text and images.

        Args:
            input_ids: (B, L), left-padded, with placeholders for the images of the prompt.
            attention_mask: (B, L); derived from the padding when not given.
            pixel_values, image_codes: the images of the prompt, see `fill_images`.
            generation_mode: "auto" lets the model choose; "text" draws nothing; "interleaved" draws at least one image
                in every row; "image" draws exactly one image per row and returns nothing else.
            guidance_scale: how far to push image tokens away from the unconditional branch; 1 or None for none.
            image_temperature, image_top_k, image_top_p: sampling inside images; `temperature`, `top_k`, `top_p` rule the
                text. Each falls back to the generation config, then to plain sampling.
            generator: source of randomness; the global one when not given.
            generation_config, logits_processor, streamer, **kwargs: as `GenerationMixin.generate`; when neither
                `max_new_tokens` nor `max_length` is given, one image and 64 tokens of text fit.

        Returns:
            "image": visual token ids (B · num_return_sequences, h·w), for `decode_image_tokens`.
            other modes: what `GenerationMixin.generate` returns, prompts included, placeholders filled.

        Raises:
            ValueError: an unknown mode; an empty prompt; `max_new_tokens` too small for the image that is asked for;
                guidance or a generator with beams; images that do not fit the placeholders.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {', '.join(GENERATION_MODES)}, got {generation_mode!r}")
        if input_ids is None or input_ids.numel() == 0:
            raise ValueError("the prompt is empty; the processor gives at least a bos token")
        config, model_kwargs = self._prepare_generation_config(generation_config, **kwargs)
        defaults = config.to_dict()
        image_options = {
            name: given if given is not None else defaults.get(name)
            for name, given in zip(IMAGE_OPTIONS, (image_temperature, image_top_k, image_top_p), strict=True)
        }
        scale = 1.0 if guidance_scale is None and config.guidance_scale is None else guidance_scale
        scale = float(config.guidance_scale if scale is None else scale)
        config.guidance_scale = None
        if scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {scale:g}")
        beams = config.num_beams > 1 or kwargs.get("assistant_model") is not None
        if beams and (scale != 1.0 or generator is not None):
            raise ValueError("guidance_scale and generator need greedy search or sampling, not beams or an assistant")

        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        attention_mask = attention_mask.to(self.device)
        if (attention_mask[:, -1] == 0).any():
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"row {row} of the prompt is padded on the right; generation needs padding on the left")
        input_ids = self.fill_images(input_ids, pixel_values, image_codes)
        image_warpers = warpers(*image_options.values()) if config.do_sample else LogitsProcessorList()

        if generation_mode == "image":
            input_ids, attention_mask = self._begin_images(input_ids, attention_mask)
            self._require_room(config, input_ids, kwargs)
            if not beams:
                return self._draw(
                    input_ids.repeat_interleave(config.num_return_sequences, dim=0),
                    attention_mask.repeat_interleave(config.num_return_sequences, dim=0),
                    scale,
                    image_warpers,
                    config.do_sample,
                    generator,
                )
            config.max_length = None
            config.max_new_tokens = self.vocabulary.tokens_per_image + 1

        text_warpers = LogitsProcessorList()
        if config.do_sample:
            text_warpers = warpers(config.temperature, config.top_k, config.top_p)
            config.temperature, config.top_k, config.top_p = 1.0, 0, 1.0
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if config.max_new_tokens is None and kwargs.get("max_length") is None:
            config.max_new_tokens = self.vocabulary.tokens_per_image + 64
        if config.max_new_tokens is not None:
            config.max_length = None
            max_length = input_ids.shape[1] + config.max_new_tokens
        else:
            max_length = config.max_length
        if generation_mode == "interleaved" and max_length - input_ids.shape[1] < self.vocabulary.tokens_per_image:
            raise ValueError(
                f"an image takes {self.vocabulary.tokens_per_image} tokens, but only "
                f"{max_length - input_ids.shape[1]} may be generated; raise max_new_tokens"
            )
        grammar = ImageGrammar(
            self.vocabulary,
            [
                self.config.bos_token_id,
                self.config.pad_token_id,
                self.config.image_token_id,
                self.config.uncond_token_id,
            ],
            generation_mode,
            eos,
            input_ids.shape[1],
            max_length,
        )
        processors = LogitsProcessorList([*(logits_processor or []), grammar])
        if config.do_sample:
            processors.append(PerModality(self.vocabulary, image_warpers, text_warpers))
        custom = {}
        if not beams:
            custom["custom_generate"] = partial(_decode, scale=scale, generator=generator, stream_to=streamer)
        output = super().generate(
            input_ids,
            generation_config=config,
            logits_processor=processors,
            streamer=streamer,
            attention_mask=attention_mask,
            **custom,
            **model_kwargs,
        )
        return self._last_images(output) if generation_mode == "image" else output

    def _begin_images(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Prompts that all end inside an image: image_start is added where a row does not."""
        outside = (image_progress(input_ids, self.vocabulary) < 0)[:, None]
        if not outside.any():
            return input_ids, attention_mask
        pad = torch.full_like(input_ids[:, :1], self.config.pad_token_id)
        start = torch.full_like(pad, self.vocabulary.image_start)
        begun = torch.where(outside, torch.cat([input_ids, start], dim=1), torch.cat([pad, input_ids], dim=1))
        one, zero = torch.ones_like(attention_mask[:, :1]), torch.zeros_like(attention_mask[:, :1])
        mask = torch.where(outside, torch.cat([attention_mask, one], dim=1), torch.cat([zero, attention_mask], dim=1))
        return begun, mask

    def _require_room(self, config: GenerationConfig, input_ids: torch.LongTensor, kwargs: dict) -> None:
        """Raises ValueError when `max_new_tokens` was given and is too small for the rest of one image."""
        missing = int(self.vocabulary.codes_per_image - image_progress(input_ids, self.vocabulary).min())
        if kwargs.get("max_new_tokens") is not None and config.max_new_tokens < missing:
            raise ValueError(
                f"an image needs {missing} more tokens, but max_new_tokens is {config.max_new_tokens}; "
                'leave it out with generation_mode="image"'
            )

    def _unconditional(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Ids and mask, as long as those given, of a context that is only `bos <|uncond|>` and the image begun, if any.

        Args:
            input_ids, attention_mask: (B, T), with at least two columns of room before the last image_start.
        """
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        begun = (image_progress(input_ids, self.vocabulary) + 1)[:, None]  # ids of the image so far, 0 outside
        first = input_ids.shape[1] - begun  # column where the image starts, or T
        ids = torch.where(column >= first, input_ids, self.config.pad_token_id)
        ids = torch.where(column == first - 2, self.config.bos_token_id, ids)
        ids = torch.where(column == first - 1, self.config.uncond_token_id, ids)
        return ids, (column >= first - 2).to(attention_mask.dtype)

    def _draw(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        scale: float,
        image_warpers: LogitsProcessorList,
        do_sample: bool,
        generator: torch.Generator | None,
    ) -> torch.LongTensor:
        """Finish the image each row ends in; returns its visual ids (B, n), those of the prompt included."""
        rows, n = input_ids.shape[0], self.vocabulary.codes_per_image
        drawn = image_progress(input_ids, self.vocabulary)  # (B,)
        ids = torch.zeros(rows, n, dtype=torch.int64, device=input_ids.device)
        known = torch.arange(n, device=input_ids.device) < drawn[:, None]
        tail = input_ids.shape[1] - drawn[:, None] + torch.arange(n, device=input_ids.device)
        ids = torch.where(known, input_ids.gather(1, tail.clamp(max=input_ids.shape[1] - 1)), ids)
        steps = int(n - drawn.min())
        if steps == 0:
            return ids

        guided = scale != 1.0
        if guided:
            input_ids = nn.functional.pad(input_ids, (2, 0), value=self.config.pad_token_id)
            attention_mask = nn.functional.pad(attention_mask, (2, 0), value=0)
            uncond_ids, uncond_mask = self._unconditional(input_ids, attention_mask)
            input_ids = torch.cat([input_ids, uncond_ids])
            attention_mask = torch.cat([attention_mask, uncond_mask])
        length = input_ids.shape[1]
        mask = nn.functional.pad(attention_mask, (0, steps), value=1)  # (B or 2B, L + steps)
        position_ids = positions(mask)
        head = self.lm_head.weight[self.vocabulary.offset :]  # (K, D)
        cache = DynamicCache(config=self.config.text_config)
        for step in range(steps):
            seen = slice(0, length) if step == 0 else slice(length + step - 1, length + step)
            hidden = self.model.language_model(
                input_ids=input_ids,
                attention_mask=mask[:, : length + step],
                position_ids=position_ids[:, seen],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            scores = self.softcap(nn.functional.linear(hidden, head)).float()  # (B or 2B, K)
            if guided:
                cond, uncond = scores.chunk(2)
                scores = uncond + scale * (cond - uncond)
            chosen = select(image_warpers(None, scores), do_sample, generator) + self.vocabulary.offset  # (B,)
            # a row that began with more codes than another is done early; what it goes on to draw is dropped
            where = (drawn + step).clamp(max=n - 1)[:, None]
            unfinished = (drawn + step < n)[:, None]
            ids = torch.where(unfinished, ids.scatter(1, where, chosen[:, None]), ids)
            input_ids = chosen.repeat(2 if guided else 1)[:, None]
        return ids

    def _last_images(self, output: torch.LongTensor | GenerateDecoderOnlyOutput) -> torch.LongTensor:
        """Visual ids (B, n) before the last image_end of each row."""
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        position = torch.arange(ids.shape[1], device=ids.device)
        end = torch.where(ids == self.vocabulary.image_end, position, -1).amax(dim=1, keepdim=True)
        n = self.vocabulary.codes_per_image
        return ids.gather(1, end - n + torch.arange(n, device=ids.device))

    def decode_mixed_tokens(
        self,
        ids: torch.LongTensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
        on_error: Literal["raise", "skip", "pad"] = "raise",
    ) -> list[list[Segment]]:
        """Take mixed streams apart into text and images; all images of the batch are decoded in one call.

        Args:
            ids: (B, T) or (T,).
            tokenizer: decodes the text; special tokens are left out of it.
            on_error: for a broken image (cut off, too long, codes without a start, an end without a start): "raise";
                "skip" returns it as an incomplete segment without a picture; "pad" with the picture of the codes that
                are there and the rest grey.

        Returns:
            one list of segments per row; their spans cover the row without gap or overlap. No id is ever replaced.

        Raises:
            ValueError: an id outside the vocabulary, or a broken image under "raise"; names the row and the position.
        """
        if on_error not in ("raise", "skip", "pad"):
            raise ValueError(f"on_error must be raise, skip or pad, got {on_error!r}")
        ids = ids[None] if ids.ndim == 1 else ids
        bad = (ids < 0) | (ids >= self.vocabulary.size)
        if bad.any():
            row, position = bad.nonzero()[0].tolist()
            raise ValueError(
                f"row {row}, position {position}: id {int(ids[row, position])} is outside the vocabulary "
                f"[0, {self.vocabulary.size})"
            )
        rows = [self._segments(row) for row in ids]
        n, (height, width) = self.vocabulary.codes_per_image, self.vocabulary.grid
        pictured, codes = [], []
        for number, segments in enumerate(rows):
            for segment in segments:
                if segment.type == "text":
                    if tokenizer is not None:
                        segment.text = tokenizer.decode(segment.ids, skip_special_tokens=True)
                    continue
                if not segment.complete and on_error == "raise":
                    raise ValueError(
                        f"row {number}, positions {segment.span[0]} to {segment.span[1]}: not an image of {n} codes "
                        f"between image_start and image_end: {segment.ids[:8].tolist()}…; "
                        'pass on_error="skip" or "pad" to go on'
                    )
                if segment.complete or on_error == "pad":
                    visual = segment.ids[self.vocabulary.is_visual(segment.ids)][:n]
                    pictured.append((segment, len(visual)))
                    codes.append(nn.functional.pad(self.vocabulary.to_codes(visual), (0, n - len(visual))))
        if codes:
            codes = torch.stack(codes).to(self.device).unflatten(1, (height, width))
            images = self.model.vqmodel.decode_from_indices(codes).sample.detach().clamp(-1, 1)
            side = self.model.vqmodel.downsampling
            for (segment, present), image in zip(pictured, images, strict=True):
                there = (torch.arange(n, device=image.device) < present).view(height, width)
                there = there.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)
                segment.image = torch.where(there, image, 0.0)
        return rows

    def _segments(self, row: torch.LongTensor) -> list[Segment]:
        """Segments of one row (T,), without text and pictures.

        An image segment is image_start or a stray code or end, with the codes that follow and the image_end if it comes.
        """
        vocabulary = self.vocabulary
        start, end = vocabulary.image_start, vocabulary.image_end
        tokens = row.tolist()
        segments, begin = [], 0
        while begin < len(tokens):
            stop = begin
            if tokens[begin] in (start, end) or tokens[begin] >= vocabulary.offset:
                codes_from = begin + 1 if tokens[begin] == start else begin
                stop = codes_from
                while stop < len(tokens) and tokens[stop] >= vocabulary.offset:
                    stop += 1
                count = stop - codes_from
                ended = stop < len(tokens) and tokens[stop] == end
                stop += ended
                complete = tokens[begin] == start and ended and count == vocabulary.codes_per_image
                segments.append(Segment("image", row[begin:stop], (begin, stop), complete))
            else:
                while stop < len(tokens) and tokens[stop] < vocabulary.offset and tokens[stop] not in (start, end):
                    stop += 1
                segments.append(Segment("text", row[begin:stop], (begin, stop)))
            begin = stop
        return segments


@torch.no_grad()
def _decode(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config: GenerationConfig,
    scale: float,
    generator: torch.Generator | None,
    stream_to,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """Greedy search or sampling over a stream, with guidance inside images; the `custom_generate` of our `generate`.

    The unconditional branch of a row is kept in step with it: it attends to its own two tokens `bos <|uncond|>` and to
    the image being drawn, and every other column is a hole in its attention mask.
    """
    guided = scale != 1.0
    attention_mask = model_kwargs["attention_mask"]  # None where nothing is padded
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    cache = model_kwargs["past_key_values"]
    cached = cache.get_seq_length()
    feed, mask = input_ids[:, cached:], attention_mask
    if guided:
        if cached:
            raise ValueError("guidance needs a fresh cache: the cached prompt has no unconditional branch")
        feed = nn.functional.pad(input_ids, (2, 0), value=model.config.pad_token_id)
        mask = nn.functional.pad(attention_mask, (2, 0), value=0)
        uncond_ids, uncond_mask = model._unconditional(feed, mask)
        prefix = (uncond_mask.cumsum(dim=1) <= 2).to(mask.dtype) * uncond_mask  # bos <|uncond|> of each row
        feed, mask = torch.cat([feed, uncond_ids]), torch.cat([mask, uncond_mask])
    unfinished = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
    kept_scores, kept_logits = [], []
    while True:
        logits = model(
            input_ids=feed,
            attention_mask=mask,
            position_ids=positions(mask)[:, -feed.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if guided:
            cond, uncond = logits.chunk(2)
            drawn = image_progress(input_ids, model.vocabulary)
            inside = (drawn >= 0) & (drawn < model.vocabulary.codes_per_image)
            logits = torch.where(inside[:, None], uncond + scale * (cond - uncond), cond)
        scores = logits_processor(input_ids, logits)
        chosen = select(scores, generation_config.do_sample, generator)
        chosen = torch.where(unfinished.bool(), chosen, model.config.pad_token_id)
        kept_logits += [logits] if generation_config.output_logits else []
        kept_scores += [scores] if generation_config.output_scores else []
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        if stream_to is not None:
            stream_to.put(chosen.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if unfinished.max() == 0:
            break
        feed = chosen[:, None]
        column = torch.ones_like(feed, dtype=mask.dtype)
        if guided:
            cond_mask, uncond_mask = mask.chunk(2)
            drawing = (image_progress(input_ids, model.vocabulary) >= 0)[:, None]
            uncond_mask = torch.where(drawing, uncond_mask, prefix)
            prefix = nn.functional.pad(prefix, (0, 1), value=0)
            uncond_mask = torch.cat([uncond_mask, drawing.to(mask.dtype)], dim=1)
            mask = torch.cat([torch.cat([cond_mask, column], dim=1), uncond_mask])
            feed = feed.repeat(2, 1)
        else:
            mask = torch.cat([mask, column], dim=1)
    if stream_to is not None:
        stream_to.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(kept_scores) or None,
        logits=tuple(kept_logits) or None,
        past_key_values=cache,
    )
