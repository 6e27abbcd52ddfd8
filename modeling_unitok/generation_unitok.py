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
# arguments of transformers' `generate` that the image loop honours, or that mean nothing inside an image
LOOP_ARGUMENTS = set(
    "bos_token_id do_sample eos_token_id max_length max_new_tokens num_beams num_return_sequences pad_token_id "
    "temperature top_k top_p use_cache".split()
)
OUTSIDE, INSIDE, CLOSING, BEGINNING = range(4)  # where a stream stands; in the last two, one token may follow


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
            "image": visual token ids (B · num_return_sequences, h·w), for `decode_image_tokens`; with
                `return_dict_in_generate`, the output of which they are the `sequences`.
            other modes: what `GenerationMixin.generate` returns, prompts included, placeholders filled.

        Raises:
            ValueError: an unknown mode; a prompt that is empty, padded on the right or ill formed; images that do not fit
                the placeholders; fewer tokens to come than the image that is begun or asked for needs; guidance or a
                generator with beams, an assistant, hidden states or attentions.
        """
        if generation_config is not None and generation_config.is_assistant:  # the grammar is among its processors
            return super().generate(
                input_ids,
                generation_config=generation_config,
                logits_processor=logits_processor,
                attention_mask=attention_mask,
                **kwargs,
            )
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {', '.join(GENERATION_MODES)}, got {generation_mode!r}")
        if input_ids is None or input_ids.numel() == 0:
            raise ValueError("the prompt is empty; the processor gives at least a bos token")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (B, L), got {tuple(input_ids.shape)}")
        config, model_kwargs = self._prepare_generation_config(generation_config, **kwargs)
        defaults = config.to_dict()
        image_options = {
            name: given if given is not None else defaults.get(name)
            for name, given in zip(IMAGE_OPTIONS, (image_temperature, image_top_k, image_top_p), strict=True)
        }
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        scale = 1.0 if scale is None else float(scale)
        config.guidance_scale = 1.0  # what transformers would do with it is done here
        if not 0 <= scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number from 0 on, got {scale:g}")
        beams = config.num_beams > 1 or kwargs.get("assistant_model") is not None
        own_loop = scale != 1.0 or generator is not None
        if own_loop and (beams or config.output_hidden_states or config.output_attentions):
            raise ValueError(
                "guidance_scale and generator need greedy search or sampling, not beams or an assistant, and give no "
                "hidden states or attentions"
            )

        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        attention_mask = attention_mask.to(self.device)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
        if (attention_mask[:, -1] == 0).any():
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"row {row} of the prompt is padded on the right; generation needs padding on the left")
        input_ids = self.fill_images(input_ids, pixel_values, image_codes)
        self._require_streams(input_ids)
        stored = self.generation_config if generation_config is None else generation_config
        if config.max_new_tokens is not None:
            room = config.max_new_tokens
        elif kwargs.get("max_length") or stored.max_length or self.generation_config.max_length:
            room = config.max_length - input_ids.shape[1]
        else:
            room = self.vocabulary.tokens_per_image + 64
        self._require_room(generation_mode, input_ids, room)
        image_warpers = warpers(*image_options.values()) if config.do_sample else LogitsProcessorList()

        if generation_mode == "image":
            input_ids, attention_mask = self._begin_images(input_ids, attention_mask)
            if kwargs.keys() <= LOOP_ARGUMENTS and not beams and not logits_processor and streamer is None:
                return self._draw(
                    input_ids.repeat_interleave(config.num_return_sequences, dim=0),
                    attention_mask.repeat_interleave(config.num_return_sequences, dim=0),
                    scale,
                    image_warpers,
                    config.do_sample,
                    generator,
                )
            room = int(self.vocabulary.codes_per_image - image_progress(input_ids, self.vocabulary).min()) + 1
            config.eos_token_id = self.vocabulary.image_end
        config.max_new_tokens, config.max_length, config.min_length = room, None, config.min_length or None

        text_warpers = LogitsProcessorList()
        if config.do_sample:
            text_warpers = warpers(config.temperature, config.top_k, config.top_p)
            config.temperature, config.top_k, config.top_p = 1.0, 0, 1.0
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
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
            input_ids.shape[1] + room,
        )
        processors = LogitsProcessorList([*(logits_processor or []), grammar])
        if config.do_sample:
            processors.append(PerModality(self.vocabulary, image_warpers, text_warpers))
        if own_loop:
            model_kwargs["custom_generate"] = partial(_decode, scale=scale, generator=generator, stream_to=streamer)
        for name in ("output_hidden_states", "output_attentions"):  # config has them too
            model_kwargs.pop(name, None)
        output = super().generate(
            input_ids,
            generation_config=config,
            logits_processor=processors,
            streamer=streamer,
            attention_mask=attention_mask,
            **model_kwargs,
        )
        if generation_mode != "image":
            return output
        if isinstance(output, torch.Tensor):
            return self._last_images(output)
        output.sequences = self._last_images(output.sequences)
        return output

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

    def _require_streams(self, input_ids: torch.LongTensor) -> None:
        """Raises ValueError unless every row is a well-formed stream, which may end inside an image."""
        self._require_known(input_ids)
        n = self.vocabulary.codes_per_image
        for number, row in enumerate(input_ids):
            for segment in self._segments(row):
                begun = segment.ids[0] == self.vocabulary.image_start and segment.span[1] == len(row)
                open_ended = begun and segment.ids[-1] != self.vocabulary.image_end and len(segment.ids) <= n + 1
                if not segment.complete and not open_ended:
                    raise _broken(number, segment, n, "a prompt may end inside an image, but not hold a broken one")

    def _require_known(self, ids: torch.LongTensor) -> None:
        """Raises ValueError for an id (B, T) outside the vocabulary."""
        bad = (ids < 0) | (ids >= self.vocabulary.size)
        if bad.any():
            row, position = bad.nonzero()[0].tolist()
            raise ValueError(
                f"row {row}, position {position}: id {int(ids[row, position])} is outside the vocabulary "
                f"[0, {self.vocabulary.size})"
            )

    def _require_room(self, mode: str, input_ids: torch.LongTensor, room: int) -> None:
        """Raises ValueError when `room` tokens do not finish the images that are begun, or asked for by the mode."""
        n = self.vocabulary.codes_per_image
        drawn = image_progress(input_ids, self.vocabulary)
        whole = {"image": n, "interleaved": n + 2}.get(mode, 1)
        needed = torch.where(drawn < 0, whole, n - drawn + (mode != "image"))
        if room < needed.max():
            row = int(needed.argmax())
            raise ValueError(
                f"row {row} of the prompt needs {int(needed[row])} more tokens, but only {room} may be generated; "
                "raise or leave out max_new_tokens or max_length"
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

    def _last_images(self, ids: torch.LongTensor) -> torch.LongTensor:
        """Visual ids (B, n) of the last image of each row (B, T)."""
        unfinished = image_progress(ids, self.vocabulary) >= 0
        if unfinished.any():
            raise ValueError(f"a stopping criterion cut the image of row {int(unfinished.nonzero()[0])}")
        position = torch.arange(ids.shape[1], device=ids.device)
        start = torch.where(ids == self.vocabulary.image_start, position, -1).amax(dim=1, keepdim=True)
        return ids.gather(1, start + 1 + torch.arange(self.vocabulary.codes_per_image, device=ids.device))

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
            ValueError: an id outside the vocabulary, or a broken image under "raise", with the row and the position; or a
                tokenizer that has grown into the ids of the codes.
        """
        if on_error not in ("raise", "skip", "pad"):
            raise ValueError(f"on_error must be raise, skip or pad, got {on_error!r}")
        if tokenizer is not None and len(tokenizer) > self.vocabulary.offset:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, but codes begin at id {self.vocabulary.offset}; "
                "call model.resize_token_embeddings(len(tokenizer)) when it grows"
            )
        ids = ids[None] if ids.ndim == 1 else ids
        self._require_known(ids)
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
                    raise _broken(number, segment, n, 'pass on_error="skip" or "pad" to go on')
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


def _broken(row: int, segment: Segment, n: int, advice: str) -> ValueError:
    """The error for an image that is not start, n codes, end."""
    begin, end = segment.span
    return ValueError(
        f"row {row}, positions {begin} to {end}: not an image of {n} codes between image_start and image_end: "
        f"{segment.ids[:8].tolist()}{'…' if len(segment.ids) > 8 else ''}; {advice}"
    )


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
    """Greedy search or sampling with guidance inside images or a generator; the `custom_generate` of our `generate`.

    The unconditional branch of a row is kept in step with it: it attends to its own two tokens `bos <|uncond|>` and to
    the image being drawn, and every other column is a hole in its attention mask.
    """
    guided = scale != 1.0
    attention_mask = model_kwargs["attention_mask"]  # None where nothing is padded
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    cache = model_kwargs.get("past_key_values")
    if guided and cache is not None and cache.get_seq_length() > 0:
        raise ValueError("guidance needs a fresh cache: the cached prompt has no unconditional branch")
    if guided or cache is None:  # a cache made by transformers has no room for a second branch
        cache = DynamicCache(config=model.config.text_config)
    feed, mask = input_ids[:, cache.get_seq_length() :], attention_mask
    if guided:
        feed = nn.functional.pad(input_ids, (2, 0), value=model.config.pad_token_id)
        mask = nn.functional.pad(attention_mask, (2, 0), value=0)
        uncond_ids, uncond_mask = model._unconditional(feed, mask)
        prefix = (uncond_mask.cumsum(dim=1) <= 2).to(mask.dtype) * uncond_mask  # bos <|uncond|> of each row
        feed, mask = torch.cat([feed, uncond_ids]), torch.cat([mask, uncond_mask])
    unfinished = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
    kept_scores, kept_logits = [], []
    while True:
        outputs = model(
            input_ids=feed,
            attention_mask=mask,
            position_ids=positions(mask)[:, -feed.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = outputs.logits[:, -1].float()
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
