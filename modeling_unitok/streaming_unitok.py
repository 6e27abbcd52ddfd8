"""Text, pictures and rows of codes of mixed streams, while they are generated.

    model.generate(..., streamer=streamer)      put(prompt (B, L)), put(tokens (B,)) …, end()
        │ one line of the batch at a time: text until an image starts, codes until it ends
        ▼
    Piece(row=0, type="text", text="a red ")  Piece(row=1, type="codes", …)  Piece(row=0, type="image", image=<PIL>)

Text comes in whole words, as `transformers.TextStreamer` cuts it; pictures that are finished in the same step are decoded
in one call. The protocol is that of transformers' streamers, and the iterator that of `TextIteratorStreamer`, for any
number of rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Queue
from threading import Thread
from typing import Literal

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer


@dataclass
class Piece:
    """What one row of a batch has brought forth.

    Args:
        row: which, in [0, B).
        type: "text", "codes" or "image".
        text: one or more whole words, of a text.
        codes: (w,) of a row of codes, or (h, w) of an image; int64 in [0, K).
        line: which row of codes, in [0, h).
        image: the picture of an image.
    """

    row: int
    type: Literal["text", "codes", "image"]
    text: str | None = None
    codes: torch.LongTensor | None = None
    line: int | None = None
    image: Image.Image | None = None


class _Words(TextStreamer):
    """Cuts the text of one row into whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)


class UniTokStreamer(BaseStreamer):
    """A streamer for `generate`, in every mode, for batches and `num_return_sequences`; not for beams.

    Pieces go to `on_piece`, in the thread that generates; without one they are kept for whoever iterates. `start` generates
    in a thread of its own:

        >>> streamer = UniTokStreamer(model, processor).start(**inputs, generation_mode="interleaved")
        >>> for piece in streamer:
        ...     print(piece.text, end="") if piece.type == "text" else piece.image.show()

    Args:
        model: UniTokForConditionalGeneration; decodes the pictures.
        processor: UniTokProcessor; decodes the text and makes PIL pictures.
        on_piece: is called with every `Piece`; what it raises stops the generation.
        code_rows: also bring rows of codes, as soon as they are whole.
        skip_prompt: bring nothing of the prompt, but a picture that it begins.
        timeout: seconds that the iterator waits for a piece before it raises `queue.Empty`; none for as long as it takes.
    """

    def __init__(
        self,
        model,
        processor,
        on_piece: Callable[[Piece], None] | None = None,
        code_rows: bool = False,
        skip_prompt: bool = True,
        timeout: float | None = None,
    ):
        model.require_tokenizer(processor.tokenizer)
        self.model, self.processor, self.vocabulary = model, processor, model.vocabulary
        self.code_rows, self.skip_prompt, self.timeout = code_rows, skip_prompt, timeout
        self.pieces: Queue = Queue()  # of Piece; at the end None, or what the generation raised
        self.emit = on_piece or self.pieces.put
        self.special = set(processor.tokenizer.all_special_ids)
        self.words: list[_Words] | None = None  # per row; none before the prompt
        self.codes: list[list[int] | None] = []  # per row, of the image being drawn; none outside

    def start(self, **arguments) -> "UniTokStreamer":
        """Call `model.generate(**arguments)` in a thread; what it raises, the iterator raises, with `on_piece` too."""

        def generate() -> None:
            try:
                self.model.generate(**arguments, streamer=self)
            except BaseException as error:  # the iterator raises it again
                self.words = None
                self.pieces.put(error)

        Thread(target=generate, daemon=True).start()
        return self

    def put(self, value: torch.LongTensor) -> None:
        """Take the prompts (B, L), then one token of each row (B,)."""
        if self.words is None or value.ndim == 2:  # prompts again where a generation was stopped by an error
            self._begin(value if value.ndim == 2 else value[None])
            return
        self._next(value.tolist())

    def end(self) -> None:
        """Bring what is left of the text; the next `put` is a prompt again."""
        for words in self.words:
            words.end()
        self.words = None
        self.pieces.put(None)

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self.pieces.get(timeout=self.timeout)) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def _begin(self, prompts: torch.LongTensor) -> None:
        def text_of(row: int) -> Callable[[str], None]:
            return lambda text: self.emit(Piece(row, "text", text=text))

        self.words = [_Words(self.processor.tokenizer, text_of(row)) for row in range(len(prompts))]
        self.codes = [None] * len(prompts)
        if self.skip_prompt:
            for row, prompt in enumerate(prompts.tolist()):
                for token in prompt:
                    self._take(row, token)
        else:
            for tokens in prompts.T.tolist():
                self._next(tokens)

    def _take(self, row: int, token: int) -> list[int] | None:
        """Follow the images of a row; the codes of the one that the token ends."""
        if token == self.vocabulary.image_start:
            self.codes[row] = []
        elif token >= self.vocabulary.offset:
            self.codes[row].append(token - self.vocabulary.offset)
        elif token == self.vocabulary.image_end:
            finished, self.codes[row] = self.codes[row], None
            return finished
        return None

    def _next(self, tokens: list[int]) -> None:
        """One token of each row."""
        (height, width), images = self.vocabulary.grid, {}
        for row, token in enumerate(tokens):
            finished = self._take(row, token)
            if finished is not None:
                images[row] = finished
            elif token >= self.vocabulary.offset:
                drawn = self.codes[row]
                if self.code_rows and len(drawn) % width == 0:
                    line = len(drawn) // width - 1
                    self.emit(Piece(row, "codes", codes=torch.tensor(drawn[-width:]), line=line))
            elif token in self.special:  # a word never goes on behind one
                self.words[row].end()
            else:
                self.words[row].put(torch.tensor([token]))
        if images:
            codes = torch.tensor(list(images.values()), device=self.model.device)  # (images, n)
            pixels = self.model.decode_image_tokens(self.vocabulary.to_ids(codes))
            pictures = self.processor.postprocess(pixels)["pixel_values"]
            for row, grid, picture in zip(images, codes.cpu().unflatten(1, (height, width)), pictures, strict=True):
                self.emit(Piece(row, "image", codes=grid, image=picture))


__all__ = ["Piece", "UniTokStreamer"]
