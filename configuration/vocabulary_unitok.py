"""Where image codes live in the vocabulary.

    [ text tokens | special tokens | spare rows ][ visual tokens ]
    0                                            offset           offset + num_codes

- code k is token `offset + k`, for every k: no table, no names in the text tokenizer
- the spare rows let the text tokenizer grow without moving a single code
- an image in a stream is: image_start, h·w codes row by row, image_end

The layout of Chameleon (arXiv:2405.09818) with an offset in place of its name table.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VisualVocabulary:
    """Arithmetic between image codes and token ids.

    Args:
        offset: first visual token id; also the number of text rows.
        num_codes: size K of the codebook.
        image_start, image_end: ids of the two tokens around an image, both below `offset`.
        grid: height and width of an image in codes.
    """

    offset: int
    num_codes: int
    image_start: int
    image_end: int
    grid: tuple[int, int]

    @property
    def codes_per_image(self) -> int:
        """h·w."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens_per_image(self) -> int:
        """h·w codes and the two tokens around them."""
        return self.codes_per_image + 2

    @property
    def size(self) -> int:
        """All ids are in [0, size)."""
        return self.offset + self.num_codes

    def is_visual(self, ids: torch.LongTensor) -> torch.BoolTensor:
        """Which ids are codes; any shape."""
        return (ids >= self.offset) & (ids < self.size)

    def to_ids(self, codes: torch.LongTensor) -> torch.LongTensor:
        """Token ids of image codes.

        Args:
            codes: any shape, integers in [0, num_codes).

        Raises:
            ValueError: a code is out of range; names the first one and its position.
        """
        self._require((codes >= 0) & (codes < self.num_codes), codes, f"outside the codebook [0, {self.num_codes})")
        return codes + self.offset

    def to_codes(self, ids: torch.LongTensor) -> torch.LongTensor:
        """Image codes of visual token ids.

        Args:
            ids: any shape, integers in [offset, offset + num_codes).

        Raises:
            ValueError: an id is no visual token; names the first one and its position.
        """
        self._require(self.is_visual(ids), ids, f"no visual token [{self.offset}, {self.size})")
        return ids - self.offset

    def wrap(self, codes: torch.LongTensor) -> torch.LongTensor:
        """The ids (h·w + 2,) of one image in a stream, from its codes (h, w) or (h·w,)."""
        ids = self.to_ids(codes.flatten())
        return torch.cat([ids.new_tensor([self.image_start]), ids, ids.new_tensor([self.image_end])])

    @staticmethod
    def _require(good: torch.BoolTensor, values: torch.LongTensor, what: str) -> None:
        if not good.all():
            where = (~good).nonzero()[0].tolist()
            raise ValueError(f"{int(values[tuple(where)])} at {where} is {what}; was it made by another tokenizer?")
