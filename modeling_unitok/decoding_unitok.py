"""The decoding loop: both branches of guidance over one preallocated cache, and images drawn without a stop.

    rows 0..B    conditional    [ prompt | text <start> code code … <end> text … ]
    rows B..2B   unconditional            [bos <|uncond|> <start> code code … ]

- every step adds one column to all rows; the cache has room for the whole stream from the beginning, so that nothing is
  copied, and a compiled step keeps its shapes
- the unconditional rows are computed only while a row draws. Their context `bos <|uncond|>` is read once, and its keys
  and values are put right before each image that begins, so that distances are those of training, in models with a
  sliding window too
- while all rows that are not finished draw, only the visual rows of the head are computed, a code is chosen from K
  scores, and nothing waits for the host: how long this lasts is known when it begins. A stream whose scores are asked
  for, or that has processors or stopping criteria beyond the usual, takes the general step throughout

Classifier-free guidance: arXiv:2207.12598; in an interval only: arXiv:2404.07724.

Letters: B rows, R = B or 2B computed rows, L prompt length, T columns, V vocabulary, K codes, n = h·w codes per image,
D hidden width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .compiled_unitok import COLUMNS, CompiledStep, run
from .grammar_unitok import ImageGrammar, PerModality, image_progress


TOGETHER = 64  # prompts up to this length are read in one call with the context of the unconditional branch
Generators = torch.Generator | list[torch.Generator] | None
DENSE_MASKS = ("sdpa", "eager")  # kinds of attention whose mask is a tensor (R, 1, 1, T)


def positions(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Position ids (B, T) that count only what is attended to."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def random_levels(rows: int, generator: Generators, device: torch.device) -> torch.FloatTensor:
    """A number in [0, 1) per row (B, 1): of one generator, of the global one, or of each row's own."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([torch.rand(1, 1, device=device, generator=own) for own in generator])
    return torch.rand(rows, 1, device=device, generator=generator)


def require_generators(generator: Generators, rows: int) -> None:
    """Raises ValueError unless a list of generators has one for each row."""
    if isinstance(generator, (list, tuple)) and len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} rows; pass one, or one for each row that is drawn")


def select(scores: torch.FloatTensor, do_sample: bool, generator: Generators) -> torch.LongTensor:
    """One token per row (B,) from scores (B, V): the best, or a draw from their softmax.

    The draw inverts the cumulative distribution: one random number per row, where `torch.multinomial` takes one per entry.
    With a generator per row, what a row draws depends on no other row.
    """
    if not do_sample:
        return scores.argmax(dim=-1)
    heights = scores.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    below = heights[:, -1:] * (1 - 2**-22)  # so that rounding never leads past the last entry that can be drawn
    level = below * random_levels(len(scores), generator, scores.device)
    return torch.searchsorted(heights, level, right=True).squeeze(1)


def is_plain(cache: Cache) -> bool:
    """Whether a cache holds nothing but keys and values, a column per token."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in cache.layers)


@dataclass(frozen=True)
class Drawing:
    """How codes are chosen.

    Args:
        scale: guidance scale; 1 for no unconditional branch.
        interval: the codes [first, last) of each image that are guided.
        warpers: what changes the scores of codes before one is chosen.
        do_sample, generator: see `select`.
        compile_step: backend of `CompiledStep` that runs the step; none for running it as it is.
    """

    scale: float
    interval: tuple[int, int]
    warpers: LogitsProcessorList
    do_sample: bool
    generator: Generators
    compile_step: str | None

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.scale != 1.0

    @property
    def needs_own_loop(self) -> bool:
        """Whether something is asked for that transformers' own loops cannot do."""
        return self.guided or self.generator is not None or self.compile_step is not None


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer for all columns of a stream; its cache says which are in use."""

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: "FixedCache", rows: int, columns: int, like: DynamicLayer):
        super().__init__()
        self.cache = cache
        self.keys, self.values = (
            kind.new_zeros(rows, kind.shape[1], columns, kind.shape[3]) for kind in (like.keys, like.values)
        )  # (2B, heads, T, width)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write one column (R, heads, 1, width); returns all that is in use, (R, heads, visible, width) each."""
        rows, visible = key_states.shape[0], self.cache.visible
        keys, values, column = self.keys[:rows], self.values[:rows], self.cache.column.to(self.keys.device)
        keys.index_copy_(2, column, key_states)
        values.index_copy_(2, column, value_states)
        return keys[:, :, :visible], values[:, :, :visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0

    def get_seq_length(self) -> int:
        return self.cache.visible - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class FixedCache(Cache):
    """A cache that is allocated once.

    Args:
        like: a cache of B rows that has seen the prompt.
        rows, columns: what to allocate.

    Attributes:
        rows: as allocated.
        column: (1,) the column that a step writes.
        visible: columns that a step sees.
    """

    def __init__(self, like: DynamicCache, rows: int, columns: int):
        layers = [
            layer if isinstance(layer, DummyLayer) else FixedLayer(self, rows, columns, layer) for layer in like.layers
        ]
        super().__init__(layers=layers)
        self.rows = rows
        self.column = torch.zeros(1, dtype=torch.int64, device=next(iter(self.attention())).keys.device)
        self.visible = 0

    def attention(self) -> list[FixedLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, FixedLayer)]

    def put(self, rows: slice | torch.Tensor, end: int, other: list, copies: int = 1) -> None:
        """Copy keys and values of other columns so that they end before `end`; a single row of them goes to all rows."""
        for layer, (keys, values) in zip(self.attention(), other, strict=True):
            begin = end - keys.shape[2]  # a sliding window keeps only the last columns
            layer.keys[rows, :, begin:end] = keys.repeat_interleave(copies, dim=0)
            layer.values[rows, :, begin:end] = values.repeat_interleave(copies, dim=0)


def full_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache that keeps all columns, in layers with a sliding window too."""
    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def contents(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the layers that have any."""
    return [(layer.keys, layer.values) for layer in cache.layers if not isinstance(layer, DummyLayer)]


class Branches:
    """The conditional and the unconditional rows of a batch of streams.

    Args:
        model: UniTokForConditionalGeneration.
        input_ids, attention_mask: (B, L), the prompts.
        room: tokens that may follow them.
        drawing: how codes are chosen.
        past: a cache that has seen a beginning of the prompts; the rest is added to it.
        copies: so many rows in turn share a prompt, which is then read once.

    Attributes:
        hidden: (R, D) after the last column.
    """

    def __init__(self, model, input_ids, attention_mask, room: int, drawing: Drawing, past=None, copies: int = 1):
        self.model, self.drawing, self.vocabulary = model, drawing, model.vocabulary
        self.language_model = model.model.language_model
        # the head of an adapter, or one that accelerate moves about, is no matrix to take rows of
        self.whole_head = type(model.lm_head) is not nn.Linear or "forward" in vars(model.lm_head)
        rows, length = input_ids.shape
        seen = 0 if past is None else past.get_seq_length()
        if seen >= length:
            raise ValueError(
                f"the cache holds {seen} tokens, but the prompt, which must begin with them, only {length}"
            )
        self.rows = rows
        self.first = 2 if drawing.guided else 0  # columns before the prompt, for the context of an image at its begin
        self.column = self.first + length
        columns = self.column + room
        if drawing.compile_step is not None:
            columns = -(-columns // COLUMNS) * COLUMNS
        self.dense = self._dense(columns)

        cache = full_cache(model.config.text_config) if past is None else past
        prompts = input_ids[::copies], attention_mask[::copies]
        begun = image_progress(prompts[0], self.vocabulary) + 1  # (B / copies,) ids of the image so far, 0 outside
        begins = drawing.guided and bool(begun.any())
        contexts = self._contexts(prompts[0], begun) if begins else None
        if begins and past is None and length <= TOGETHER:
            width = max(length, contexts[0].shape[1])
            both = zip(self._widen(*prompts, width), self._widen(*contexts, width), strict=True)
            hidden = self._read(*map(torch.cat, both), cache)
            sizes = [len(prompts[0]), len(contexts[0])]
            hidden, uncond_hidden = hidden.split(sizes)
            pairs = [zip(keys.split(sizes), values.split(sizes), strict=True) for keys, values in contents(cache)]
            own, uncond = zip(*pairs, strict=True)
        else:
            hidden, own = self._read(*prompts, cache, seen), contents(cache)
            if begins:
                cache = full_cache(model.config.text_config)
                uncond_hidden, uncond = self._read(*contexts, cache), contents(cache)

        self.cache = FixedCache(cache, 2 * rows if drawing.guided else rows, columns)
        self.cache.put(slice(0, rows), self.column, own, copies)
        self.hidden = hidden.repeat_interleave(copies, dim=0)
        # 0 where a row sees a column; those to come are hidden, as a compiled step is given all of them
        self.hide = torch.finfo(self.hidden.dtype).min
        self.mask = self.hidden.new_full((self.cache.rows, columns), self.hide)  # (2B, T), added to the scores
        self.mask[:rows, self.first : self.column] = self.hide * (attention_mask == 0)
        self.compiled: dict[int, CompiledStep] = {}  # by numbers of rows
        self.ids = input_ids.new_zeros(self.cache.rows, 1)  # (2B, 1), what a compiled step reads
        self.context = None
        if begins:
            distinct, (_, seen_by) = len(contexts[0]) > 1, contexts
            share = copies if distinct else rows  # rows in turn that have one context
            self.cache.put(slice(rows, None), self.column, uncond, copies if distinct else 1)
            self.hidden = torch.cat([self.hidden, uncond_hidden.repeat_interleave(share, dim=0)])
            hidden_columns = (seen_by == 0).repeat_interleave(share, dim=0)
            self.mask[rows:, self.column - seen_by.shape[1] : self.column] = self.hide * hidden_columns
            end = uncond[0][0].shape[2] - int(begun[0] if distinct else begun.max())
            self.context = [(k[:1, :, end - 2 : end].clone(), v[:1, :, end - 2 : end].clone()) for k, v in uncond]
        self.position = (self.mask == 0).sum(dim=1, keepdim=True)  # (2B, 1), of the next token

    def _dense(self, columns: int) -> bool:
        """Whether one mask (R, 1, 1, T) serves all layers; else transformers makes one for each kind of layer."""
        attention = self.language_model.config._attn_implementation
        layers = DynamicCache(config=self.model.config.text_config).layers
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        dense = (
            attention in DENSE_MASKS
            and self.language_model._supports_attention_backend
            and min(windows, default=columns) >= columns
        )
        if self.drawing.compile_step is not None and not dense:
            raise ValueError(
                f"compile_step needs sdpa or eager attention and no window shorter than the stream of {columns} tokens; "
                f"this model has {attention} attention and windows of {sorted(set(windows)) or 'any length'}"
            )
        return dense

    def _read(self, ids: torch.LongTensor, mask: torch.Tensor, cache: Cache, seen: int = 0) -> torch.Tensor:
        """Hidden states (B, D) of the last column of ids (B, L), of which the cache has `seen` the first."""
        return self.language_model(
            input_ids=ids[:, seen:],
            attention_mask=mask,
            position_ids=positions(mask)[:, seen:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _widen(self, ids: torch.LongTensor, mask: torch.Tensor, width: int) -> tuple[torch.LongTensor, torch.Tensor]:
        """Ids and mask, padded on the left."""
        left = (width - ids.shape[1], 0)
        return nn.functional.pad(ids, left, value=self.model.config.pad_token_id), nn.functional.pad(mask, left)

    def _contexts(self, input_ids: torch.LongTensor, begun: torch.LongTensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """Ids and mask of the unconditional branch, `bos <|uncond|>` and the image begun; one row when all are the same."""
        config, width = self.model.config, 2 + int(begun.max())
        if width == 3:  # nothing but image_start, or not even that, which `begin` will put right
            input_ids, begun = input_ids[begun.argmax(), None], begun.max()[None]
        ids = nn.functional.pad(input_ids, (2, 0))[:, -width:]
        column = torch.arange(width, device=ids.device)
        first = width - begun[:, None]  # column where the image starts
        ids = ids.where(column != first - 2, config.bos_token_id).where(column != first - 1, config.uncond_token_id)
        mask = column >= first - 2
        return ids.where(mask, config.pad_token_id), mask.long()

    def begin(self, rows: torch.LongTensor) -> None:
        """Put the unconditional context before the next column, in which an image begins in `rows` (b,)."""
        if self.context is None:
            ids = rows.new_tensor([[self.model.config.bos_token_id, self.model.config.uncond_token_id]])
            cache = full_cache(self.model.config.text_config)
            self._read(ids, torch.ones_like(ids), cache)
            self.context = contents(cache)
        rows = rows + self.rows
        self.cache.put(rows, self.column, self.context)
        self.mask[rows] = self.hide
        self.mask[rows, self.column - 2 : self.column] = 0
        self.position[rows] = 2

    def step(self, tokens: torch.LongTensor, both: bool) -> None:
        """Add tokens (B,) as one column: to both branches, or to the conditional one."""
        rows = 2 * self.rows if both else self.rows
        ids = (tokens.repeat(2) if both else tokens)[:, None]
        self.mask[:, self.column] = 0
        self.cache.column.fill_(self.column)
        self.column += 1
        self.cache.visible = self.mask.shape[1] if self.drawing.compile_step else self.column
        mask = self.mask[:rows, : self.cache.visible]
        mask = mask[:, None, None] if self.dense else (mask == 0).long()
        with torch.inference_mode():
            if self.drawing.compile_step is None:
                self.hidden = run(self.language_model, ids, mask, self.position[:rows], self.cache)
            else:
                if rows not in self.compiled:
                    tensors = (self.ids[:rows], mask, self.position[:rows], self.cache)
                    self.compiled[rows] = CompiledStep(self.drawing.compile_step, self.language_model, *tensors)
                self.ids[:rows] = ids
                self.hidden = self.compiled[rows]()
        self.position += 1

    def code_logits(self, guided: bool | torch.BoolTensor) -> torch.FloatTensor:
        """Logits (B, K) of codes: with guidance, without it, or with it in some rows (B, 1)."""
        hidden = self.hidden[: self.rows] if guided is False else self.hidden
        offset = self.vocabulary.offset
        if self.whole_head:
            logits = self.model.lm_head(hidden)[:, offset:]
        else:
            logits = nn.functional.linear(hidden, self.model.lm_head.weight[offset:])
        logits = self.model.softcap(logits).float()
        if guided is False:
            return logits
        cond, uncond = logits.chunk(2)
        mixed = uncond + self.drawing.scale * (cond - uncond)
        return mixed if guided is True else torch.where(guided, mixed, cond)

    def give_back(self, cache: Cache) -> None:
        """Add to a cache the columns of the conditional rows that it has not seen."""
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, FixedLayer):
                new = slice(self.first + int(cache.get_seq_length(index)), self.column)
                cache.update(layer.keys[: self.rows, :, new], layer.values[: self.rows, :, new], index)


def draw_codes(
    branches: Branches,
    stream: torch.LongTensor,
    length: int,
    progress: list[int],
    feed_last: bool,
    stream_to=None,
    kept: torch.LongTensor | None = None,
) -> int:
    """Draw in all rows that stand inside an image, until the first of them has all its codes; nothing waits for the host.

    Args:
        stream: (B, T), is written from column `length` on; rows outside an image get pad tokens.
        progress: codes that each row has of its image, changed in place; rows with less than 0 or n do not draw.
        feed_last: whether the model is to read the last code too.
        stream_to: a streamer.
        kept: (B, n) ids that take the place of what is drawn, -1 for none; all rows have the same progress then.

    Returns:
        the new length.
    """
    drawing, vocabulary = branches.drawing, branches.vocabulary
    n, (first, last) = vocabulary.codes_per_image, drawing.interval
    rows = [row for row, codes in enumerate(progress) if 0 <= codes < n]
    draws = None
    if len(rows) < len(progress):
        draws = torch.tensor([0 <= codes < n for codes in progress], device=stream.device)
    for _ in range(n - max(progress[row] for row in rows)):
        guided = [drawing.guided and first <= codes < last for codes in progress]
        if len({guided[row] for row in rows}) == 1:  # all of them or none
            guided = guided[rows[0]]
        else:
            guided = torch.tensor(guided, device=stream.device)[:, None]
        scores = drawing.warpers(None, branches.code_logits(guided))
        chosen = select(scores, drawing.do_sample, drawing.generator) + vocabulary.offset  # (B,)
        if kept is not None:
            given = kept[:, progress[0]]
            chosen = given.where(given >= 0, chosen)
        if draws is not None:
            chosen = chosen.where(draws, branches.model.config.pad_token_id)
        stream[:, length] = chosen
        length += 1
        if stream_to is not None:
            stream_to.put(chosen.cpu())
        for row in rows:
            progress[row] += 1
        if feed_last or any(progress[row] < n for row in rows):
            branches.step(chosen, drawing.guided and any(progress[row] < min(n, last) for row in rows))
    return length


def draw_images(
    model,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    drawing: Drawing,
    copies: int,
    kept: torch.LongTensor | None = None,
) -> torch.LongTensor:
    """Finish the image that each prompt (B, L) ends in.

    Returns:
        its visual ids (B · copies, n), given ones included.
    """
    n, length = model.vocabulary.codes_per_image, input_ids.shape[1]
    drawn = image_progress(input_ids, model.vocabulary).repeat_interleave(copies)  # (B · copies,)
    input_ids = input_ids.repeat_interleave(copies, dim=0)
    attention_mask = attention_mask.repeat_interleave(copies, dim=0)
    require_generators(drawing.generator, len(drawn))
    progress = drawn.tolist()
    room = n - min(progress)
    stream = nn.functional.pad(input_ids, (0, room))
    if room:
        branches = Branches(model, input_ids, attention_mask, room, drawing, copies=copies)
        while min(progress) < n:
            length = draw_codes(branches, stream, length, progress, feed_last=False, kept=kept)
    first = input_ids.shape[1] - drawn[:, None]
    return stream.gather(1, first + torch.arange(n, device=stream.device))


@torch.no_grad()
def decode(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config: GenerationConfig,
    drawing: Drawing,
    stream_to,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """Greedy search or sampling of mixed streams; what `generate` hands to transformers as `custom_generate`."""
    vocabulary, pad = model.vocabulary, model.config.pad_token_id
    n, (first, last) = vocabulary.codes_per_image, drawing.interval
    rows, length = input_ids.shape
    attention_mask = model_kwargs["attention_mask"]  # None where nothing is padded
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    given = model_kwargs.get("past_key_values")
    past = None if given is None or given.get_seq_length() == 0 else given
    room, copies = generation_config.max_length - length, generation_config.num_return_sequences
    require_generators(drawing.generator, rows)
    branches = Branches(model, input_ids, attention_mask, room, drawing, past, copies)
    stream = nn.functional.pad(input_ids, (0, room), value=pad)
    spans = (
        all(isinstance(processor, (ImageGrammar, PerModality)) for processor in logits_processor)
        and all(isinstance(criterion, (EosTokenCriteria, MaxLengthCriteria)) for criterion in stopping_criteria)
        and not (generation_config.output_scores or generation_config.output_logits)
    )
    progress = image_progress(input_ids, vocabulary).tolist()  # codes of the image, -1 outside; n + 1 when finished
    unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    kept_scores, kept_logits = [], []
    while min(progress) <= n:
        going = [codes for codes in progress if codes <= n]
        if spans and all(0 <= codes < n for codes in going):
            length = draw_codes(branches, stream, length, progress, feed_last=True, stream_to=stream_to)
            continue
        if spans and all(codes == n for codes in going):
            chosen = torch.full_like(stream[:, 0], vocabulary.image_end)
            if isinstance(drawing.generator, (list, tuple)):  # a number per token, whether or not there is a choice
                random_levels(rows, drawing.generator, chosen.device)
        else:
            logits = model.softcap(model.lm_head(branches.hidden[:rows])).float()  # (B, V)
            guided = [drawing.guided and 0 <= codes < n and first <= codes < last for codes in progress]
            if any(guided):
                guided = torch.tensor(guided, device=stream.device)[:, None]
                logits = torch.cat([logits[:, : vocabulary.offset], branches.code_logits(guided)], dim=1)
            scores = logits_processor(stream[:, :length], logits)
            chosen = select(scores, generation_config.do_sample, drawing.generator)
            kept_logits += [logits] if generation_config.output_logits else []
            kept_scores += [scores] if generation_config.output_scores else []
        chosen = chosen.where(unfinished, pad)
        stream[:, length] = chosen
        length += 1
        if stream_to is not None:
            stream_to.put(chosen.cpu())
        unfinished = unfinished & ~stopping_criteria(stream[:, :length], None)
        begins = []
        for row, (token, goes_on) in enumerate(zip(chosen.tolist(), unfinished.tolist(), strict=True)):
            if not goes_on:
                progress[row] = n + 1
            elif token == vocabulary.image_start:
                progress[row] = 0
                begins.append(row)
            elif progress[row] >= 0:
                progress[row] = -1 if token == vocabulary.image_end else progress[row] + 1
        if min(progress) > n:
            break
        if drawing.guided and begins:
            branches.begin(torch.tensor(begins, device=stream.device))
        branches.step(chosen, drawing.guided and any(0 <= codes < min(n, last) for codes in progress))
    if stream_to is not None:
        stream_to.end()
    if given is not None:
        if past is not None and copies > 1:
            past.batch_repeat_interleave(copies)
        branches.give_back(given)
    if not generation_config.return_dict_in_generate:
        return stream[:, :length]
    return GenerateDecoderOnlyOutput(
        sequences=stream[:, :length],
        scores=tuple(kept_scores) or None,
        logits=tuple(kept_logits) or None,
        past_key_values=given,
    )
