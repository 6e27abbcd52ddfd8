"""Generation: pictures and text from prompts, and the way back from ids to text and pictures.

- `generate` checks what it is given, and chooses who decodes: `decoding_unitok` for greedy search and sampling, which
  knows guidance and draws images in a loop of their own; transformers' `generate` for beams, assistants and the rest.
  `grammar_unitok` keeps the streams of both well formed
- `decode_mixed_tokens` takes a mixed stream apart and accounts for every token

Letters: B rows, L prompt length, T stream length, V vocabulary, K codes, n = h·w codes per image.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .decoding_unitok import Drawing, decode, draw_images, is_plain
from .grammar_unitok import ImageGrammar, PerModality, image_progress, warpers


GENERATION_MODES = ("auto", "text", "image", "interleaved")
IMAGE_OPTIONS = ("image_temperature", "image_top_k", "image_top_p", "guidance_interval")
# what a text model's generation config may say about its words, and the values that say nothing; inside an image it counts
# only when the call itself says so
TEXT_OPTIONS = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
# arguments of transformers' `generate` that the image loop honours, or that mean nothing inside an image
LOOP_ARGUMENTS = set(
    "bos_token_id do_sample eos_token_id max_length max_new_tokens num_beams num_return_sequences pad_token_id "
    "temperature top_k top_p use_cache".split()
)


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
        guidance_interval: tuple[int, int] | None = None,
        compile_step: str | None = None,
        num_candidates: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
            guidance_interval: guide only the codes [first, last) of each image; after `last` the unconditional branch
                is not computed. All codes when not given, here or in the generation config.
            compile_step: "trace", or a backend of `torch.compile`, to run the model's step with, see `compiled_unitok`;
                compiled at the first call, and anew for other batch sizes and, in steps of 32, other lengths.
            num_candidates: in "image" mode, draw so many pictures per prompt and keep the best `num_return_sequences` of
                them, after which the model finds the prompt likeliest, best first; see `scoring_unitok`.
            generator: source of randomness, or one for each row that is drawn (B · num_return_sequences, or B ·
                num_candidates), which then depends on no other row; the global one when not given.
            generation_config, logits_processor, streamer, **kwargs: as `GenerationMixin.generate`; when neither
                `max_new_tokens` nor `max_length` is given, one image and 64 tokens of text fit.

        Returns:
            "image": visual token ids (B · num_return_sequences, h·w), for `decode_image_tokens`; with
                `return_dict_in_generate`, the output of which they are the `sequences`; with `num_candidates` that is a
                `UniTokCandidates`.
            other modes: what `GenerationMixin.generate` returns, prompts included, placeholders filled.

        Raises:
            ValueError: an unknown mode; not as many generators as rows; a prompt that is empty, padded on the right or ill
                formed; images that do not fit the placeholders; fewer tokens to come than the image that is begun or asked
                for needs; guidance, a generator or a compiled step with beams, an assistant, hidden states or attentions,
                or with another cache than one of keys and values that grows; an interval that is none; candidates in
                another mode, fewer than are to be returned, without sampling, or for a prompt without text.
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
        if num_candidates is not None:
            return self._best_of(
                num_candidates,
                input_ids,
                attention_mask,
                pixel_values,
                image_codes,
                generation_mode,
                generation_config,
                streamer,
                guidance_scale=guidance_scale,
                image_temperature=image_temperature,
                image_top_k=image_top_k,
                image_top_p=image_top_p,
                guidance_interval=guidance_interval,
                compile_step=compile_step,
                generator=generator,
                logits_processor=logits_processor,
                **kwargs,
            )
        config, model_kwargs = self._prepare_generation_config(generation_config, **kwargs)
        image_options = (image_temperature, image_top_k, image_top_p, guidance_interval)
        drawing = self._drawing(config, guidance_scale, image_options, compile_step, generator)
        own_loop = self._own_loop(config, kwargs)
        if not own_loop and drawing.needs_own_loop:
            raise ValueError(
                "guidance_scale, generator and compile_step need greedy search or sampling, not beams or an assistant, "
                "give no hidden states or attentions, and need a cache of keys and values that grows"
            )
        input_ids, attention_mask = self._checked(input_ids, attention_mask, pixel_values, image_codes)
        stored = self.generation_config if generation_config is None else generation_config
        if config.max_new_tokens is not None:
            room = config.max_new_tokens
        elif kwargs.get("max_length") or stored.max_length or self.generation_config.max_length:
            room = config.max_length - input_ids.shape[1]
        else:
            room = self.vocabulary.tokens_per_image + 64
        self._require_room(generation_mode, input_ids, room)

        if generation_mode == "image":
            for name, nothing in TEXT_OPTIONS.items():
                if name not in kwargs:
                    setattr(config, name, nothing)
            past = kwargs.get("past_key_values")
            input_ids, attention_mask = self._begin_images(input_ids, attention_mask, past)
            plain = not (config.return_dict_in_generate or config.output_scores or config.output_logits)
            loop = plain and own_loop and kwargs.keys() <= LOOP_ARGUMENTS
            if loop and not logits_processor and streamer is None:
                return draw_images(self, input_ids, attention_mask, drawing, config.num_return_sequences)
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
            processors.append(PerModality(self.vocabulary, drawing.warpers, text_warpers))
        if own_loop:
            model_kwargs["custom_generate"] = partial(decode, drawing=drawing, stream_to=streamer)
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

    @torch.no_grad()
    def complete_image(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
        keep: int | torch.BoolTensor = 0,
        guidance_scale: float | None = None,
        image_temperature: float | None = None,
        image_top_k: int | None = None,
        image_top_p: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        compile_step: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> torch.LongTensor:
        """Draw the rest of pictures of which a part is given.

        With a mask this is an approximation of inpainting: codes are drawn row by row, and each is chosen from what comes
        before it. The codes that are kept further on are put in their places, but the model has not seen them when it
        draws towards them.

        Args:
            input_ids, attention_mask: (B, L), what the pictures show; images in it are filled, see `fill_images`.
            pixel_values, image_codes: the B pictures, (B, 3, H, W) in [-1, 1], or their codes (B, h, w) or (B, h·w).
            keep: the first so many codes (k rows of them are k · w), or which of them: (h, w), (B, h, w) or (B, h·w).
            guidance_scale, image_temperature, image_top_k, image_top_p, guidance_interval, compile_step, generator,
                generation_config: as `generate` has them.
            **kwargs: `do_sample` and `num_return_sequences`.

        Returns:
            visual token ids (B · num_return_sequences, h·w), for `decode_image_tokens`; those that are kept are unchanged.

        Raises:
            ValueError: not as many pictures as prompts, both pixels and codes or neither, a number or a mask that does
                not fit the grid, an argument that has no meaning here; and what `generate` raises.
        """
        n, grid = self.vocabulary.codes_per_image, self.vocabulary.grid
        if (pixel_values is None) == (image_codes is None):
            raise ValueError("complete_image needs the pictures: pass pixel_values or image_codes, and not both")
        input_ids, attention_mask = self._checked(input_ids, attention_mask)
        inside = image_progress(input_ids, self.vocabulary) > 0
        if inside.any():
            raise ValueError(
                f"row {int(inside.nonzero()[0])} of the prompt ends inside an image; complete_image gets it as codes"
            )
        rows = len(input_ids)
        placeholders = input_ids.new_full((rows, n), self.config.image_token_id)
        pictures = self.fill_images(placeholders, pixel_values, image_codes)  # (B, n)
        if isinstance(keep, torch.Tensor):
            mask = keep.to(self.device)
            if mask.dtype != torch.bool or tuple(mask.shape) not in (grid, (rows, *grid), (rows, n)):
                raise ValueError(
                    f"keep must be a number, or a boolean mask of shape {grid}, {(rows, *grid)} or {(rows, n)}, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
            mask = mask.reshape(-1, n).expand(rows, n)
        elif 0 <= keep <= n:
            mask = (torch.arange(n, device=self.device) < keep).expand(rows, n)
        else:
            raise ValueError(f"keep must be a number of codes from 0 to {n}, got {keep}")
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        image_options = (image_temperature, image_top_k, image_top_p, guidance_interval)
        drawing = self._drawing(config, guidance_scale, image_options, compile_step, generator)
        unknown = sorted(kwargs.keys() - {"do_sample", "num_return_sequences", "num_beams"})
        if unknown or not self._own_loop(config, kwargs):
            what = ", ".join(unknown) or "beams, hidden states, attentions, or a cache of another kind"
            raise ValueError(f"complete_image draws by greedy search or sampling; it cannot use {what}")
        input_ids, attention_mask = self._begin_images(input_ids, attention_mask)
        given = int(mask.long().cumprod(dim=1).sum(dim=1).min())  # codes that are kept before the first that is not
        input_ids = torch.cat([input_ids, pictures[:, :given]], dim=1)
        attention_mask = nn.functional.pad(attention_mask, (0, given), value=1)
        kept = pictures.where(mask, -1).repeat_interleave(config.num_return_sequences, dim=0)
        return draw_images(self, input_ids, attention_mask, drawing, config.num_return_sequences, kept)

    def _drawing(
        self, config: GenerationConfig, scale: float | None, image_options: tuple, compile_step, generator
    ) -> Drawing:
        """How codes are chosen, from the arguments of `generate` and, where they are none, from the generation config."""
        defaults = config.to_dict()
        *options, interval = (
            value if value is not None else defaults.get(name)
            for name, value in zip(IMAGE_OPTIONS, image_options, strict=True)
        )
        scale = config.guidance_scale if scale is None else scale
        scale = 1.0 if scale is None else float(scale)
        config.guidance_scale = 1.0  # what transformers would do with it is done here
        if not 0 <= scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number from 0 on, got {scale:g}")
        n = self.vocabulary.codes_per_image
        first, last = (0, n) if interval is None else interval
        if not 0 <= first <= last <= n:
            raise ValueError(f"guidance_interval must be two numbers from 0 to {n} in order, got {first} and {last}")
        image_warpers = warpers(*options) if config.do_sample else LogitsProcessorList()
        return Drawing(scale, (first, last), image_warpers, config.do_sample, generator, compile_step)

    def _checked(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Prompts (B, L) on the model's device with their images filled, and their mask; raises what `generate` says."""
        if input_ids is None or input_ids.numel() == 0:
            raise ValueError("the prompt is empty; the processor gives at least a bos token")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (B, L), got {tuple(input_ids.shape)}")
        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        attention_mask = attention_mask.to(self.device)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
        if (attention_mask == 0).all(dim=1).any():
            raise ValueError(f"row {int((attention_mask == 0).all(dim=1).nonzero()[0])} of the prompt is empty")
        if (attention_mask[:, -1] == 0).any():
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"row {row} of the prompt is padded on the right; generation needs padding on the left")
        input_ids = self.fill_images(input_ids, pixel_values, image_codes)
        self._require_streams(input_ids)
        return input_ids, attention_mask

    def _own_loop(self, config: GenerationConfig, kwargs: dict) -> bool:
        """Whether `decode` can do what is asked for."""
        given = kwargs.get("past_key_values")
        empty = DynamicCache(config=self.config.text_config)
        return (
            config.get_generation_mode(kwargs.get("assistant_model"))
            in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and not (config.output_hidden_states or config.output_attentions)
            and config.cache_implementation is None
            and (given is None or is_plain(given))
            and is_plain(empty)
        )

    def _begin_images(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, past: Cache | None = None
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Prompts that all end inside an image: image_start is added where a row does not."""
        outside = (image_progress(input_ids, self.vocabulary) < 0)[:, None]
        if not outside.any():
            return input_ids, attention_mask
        if past is not None and past.get_seq_length() and not outside.all():
            raise ValueError(
                f"row {int((~outside).nonzero()[0, 0])} of the prompt ends inside an image, others do not: they would move "
                "against what past_key_values has seen; begin all of them, or leave the cache out"
            )
        pad = torch.full_like(input_ids[:, :1], self.config.pad_token_id)
        start = torch.full_like(pad, self.vocabulary.image_start)
        begun = torch.where(outside, torch.cat([input_ids, start], dim=1), torch.cat([pad, input_ids], dim=1))
        one, zero = torch.ones_like(attention_mask[:, :1]), torch.zeros_like(attention_mask[:, :1])
        mask = torch.where(outside, torch.cat([attention_mask, one], dim=1), torch.cat([zero, attention_mask], dim=1))
        return begun, mask

    def _require_streams(self, input_ids: torch.LongTensor, ends: list[int] | None = None) -> None:
        """Raises ValueError unless every row, up to its end, is a well-formed stream, which may end inside an image."""
        self._require_known(input_ids)
        n = self.vocabulary.codes_per_image
        for number, row in enumerate(input_ids):
            row = row if ends is None else row[: ends[number]]
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
        if tokenizer is not None:
            self.require_tokenizer(tokenizer)
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

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError when a text tokenizer is not that of the model: its special tokens have other ids, or it has
        grown into the ids of the codes."""
        for kind in ("pad", "bos", "image", "image_start", "image_end", "uncond"):
            name = f"{kind}_token_id"
            theirs, ours = getattr(tokenizer, name, None), getattr(self.config, name)
            if theirs != ours:
                raise ValueError(f"the tokenizer is not that of the model: {name} is {theirs} there and {ours} here")
        if len(tokenizer) > self.vocabulary.offset:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, but codes begin at id {self.vocabulary.offset}; "
                "call model.resize_token_embeddings(len(tokenizer)) when it grows"
            )

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
