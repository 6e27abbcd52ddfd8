"""From Parquet rows to batches.

    PictureDataset, PictureCollator     for the tokenizer: pixels
    StreamDataset, StreamCollator       for the GPT: token streams with placeholders, and the pixels to fill them
    LengthGroupedSampler                which streams go into one batch: those of about one length

What is random about a sample (its order, a dropped caption, the augmentation) is drawn from (seed, epoch, index) alone:
it does not depend on workers, processes, prefetching, or on where a run was resumed. Nor does the grouping, drawn from
(seed, epoch).

The last batch of an epoch may be short. On several processes Accelerate fills it with rows from the beginning of the epoch, so
that a few come twice; streamed rows go on into the next epoch instead (`parquet_rows`).

Every picture in the Parquet of `prepare-data` is square, RGB and of one size; nothing is resized here.
"""

import errno
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .augmentation import AUGMENTATIONS
from .parquet_rows import ParquetRows
from .stored_pictures import guarded, require_bytes


CODE_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


def parquet_files(data_path: str) -> list[Path]:
    """The Parquet files at a path: a file, a folder of them, or a pattern such as `data/emoji-*.parquet`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(data_path)
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
    else:
        files = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if not files:
        raise FileNotFoundError(f"no Parquet data at {data_path}; make some with `unitok-hf prepare-data`")
    return files


def read_rows(data_path: str) -> datasets.Dataset:
    """The rows of Parquet data, memory-mapped.

    Args:
        data_path: as of `parquet_files`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is no Parquet, the files do not fit together, there is no row, or one names a file elsewhere
            instead of holding a picture.
    """
    files = parquet_files(data_path)
    rows = 0
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the file cannot be opened
                raise
            raise ValueError(f"{file} is no Parquet file: {error}") from error
    if rows == 0:
        raise ValueError(f"{data_path} has no rows")
    try:
        rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except MemoryError:
        raise
    except Exception as error:  # the schema, its metadata or the pages are damaged
        if getattr(error, "errno", None) is not None:
            raise
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EFBIG):
            raise OSError(
                f"{datasets.config.HF_DATASETS_CACHE}, where {data_path} is unpacked, is full: {cause}"
            ) from error
        raise ValueError(f"{data_path} cannot be read: {error.__cause__ or repr(error)}") from error
    require_bytes(rows)
    for name, feature in rows.features.items():
        if guarded(feature) != feature:
            rows = rows.cast_column(name, guarded(feature))
    return rows


def hold_out(rows: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows for training and a random share for validation, at least one each.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} row cannot be split into training and validation; pass --eval_data_path")
    held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    parts = rows.train_test_split(test_size=held, seed=seed)
    return parts["train"], parts["test"]


def training_and_validation(
    data_path: str, eval_data_path: str | None, validation_fraction: float, seed: int, streaming: bool
) -> tuple[datasets.Dataset | ParquetRows, datasets.Dataset | ParquetRows]:
    """Training rows and validation rows: of their own file, or held out of the training data.

    Raises:
        ValueError: data that are streamed have no file for validation; and what `read_rows` or `ParquetRows` raises.
    """
    if streaming:
        if eval_data_path is None:
            raise ValueError("--streaming holds no rows out; pass --eval_data_path")
        return ParquetRows(parquet_files(data_path)), ParquetRows(parquet_files(eval_data_path))
    rows = read_rows(data_path)
    if eval_data_path is not None:
        return rows, read_rows(eval_data_path)
    return hold_out(rows, validation_fraction, seed)


def require_text(rows: datasets.Dataset, name: str) -> None:
    """Raises ValueError, with the columns there are, unless the rows have a column of text of this name."""
    if name not in rows.column_names:
        raise ValueError(f"the data has no column {name!r}, only {', '.join(rows.column_names)}")
    if rows.features[name] not in (datasets.Value("string"), datasets.Value("large_string")):
        raise ValueError(f"the column {name!r} holds no text, but {rows.features[name]}")


def has_many(rows: datasets.Dataset) -> bool:
    """Whether rows hold lists of pictures, in a column `images`, or the codes of such lists, in `image_codes`."""
    images, codes = rows.features.get("images"), rows.features.get("image_codes")
    if isinstance(images, datasets.List) and isinstance(images.feature, datasets.Image):
        return True
    return isinstance(codes, datasets.List) and isinstance(codes.feature, datasets.List)


def image_column(rows: datasets.Dataset) -> str:
    """Where the pictures of rows are, or were before they were encoded."""
    return "images" if has_many(rows) else "image"


def require_lists(rows: datasets.Dataset) -> None:
    """Raises ValueError unless the column `images`, where there is one, holds lists of pictures."""
    found = rows.features.get("images")
    if "images" in rows.features and not isinstance(getattr(found, "feature", None), datasets.Image):
        raise ValueError(f"the column 'images' holds no lists of pictures, but {found}")


def require_images(rows: datasets.Dataset) -> tuple[int, int]:
    """Width and height of the first picture of the rows; raises ValueError when there is none."""
    if has_many(rows) and "images" in rows.column_names:
        require_lists(rows)
        picture = next((picture for pictures in rows["images"] for picture in pictures or []), None)
    elif isinstance(rows.features.get("image"), datasets.Image):
        picture = next((picture for picture in rows["image"] if picture is not None), None)
    else:
        raise ValueError(f"the data has no column 'image' of pictures, only {', '.join(rows.column_names)}")
    if picture is None:
        raise ValueError("no row of the data has a picture")
    return picture.size


def require_size(rows: datasets.Dataset, image_size: int) -> None:
    """Raises ValueError unless there are pictures, and the first one is a square of this size in pixels."""
    require_side(require_images(rows), image_size, "the pictures are")


def require_side(size: tuple[int, int], image_size: int, what: str) -> None:
    """Raises ValueError unless a picture of this width and height is a square of `image_size`; `what` begins the message."""
    if size != (image_size, image_size):
        raise ValueError(
            f"{what} {size[0]}x{size[1]} pixels, not {image_size}x{image_size}; "
            f"prepare the data again with --image_size {image_size}"
        )


def with_text_alone(rows: datasets.Dataset, text_column: str) -> datasets.Dataset:
    """The rows that have a text, and nothing else of them.

    Raises:
        ValueError: there is none.
    """
    rows = rows.select_columns(text_column).filter(bool, input_columns=text_column)
    if len(rows) == 0:
        raise ValueError(f"no row of the data has a text in the column {text_column!r}")
    return rows


def require_pictures(rows: datasets.Dataset) -> None:
    """Raises ValueError if a row has no picture, or lists of them."""
    if "image" not in rows.column_names:
        raise ValueError(
            f"a tokenizer needs a picture in every row, but the columns are {', '.join(rows.column_names)}"
        )
    if isinstance(rows, ParquetRows):  # which would be read in full; a row without a picture is refused when it comes
        return
    missing = rows.data.column("image").null_count
    if missing:
        raise ValueError(f"{missing} rows of the data have no picture; a tokenizer needs one in every row")


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) in [-1, 1] of an RGB picture, with the arithmetic of `UniTokImageProcessor`."""
    levels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    return (levels.float() * (1 / 255) - 0.5) / 0.5


class EpochDataset(torch.utils.data.Dataset):
    """Rows whose samples may be random; `epoch` changes what is drawn."""

    def __init__(self, rows: datasets.Dataset, augment: str, seed: int):
        self.rows, self.seed = rows, seed
        self.augmentation = AUGMENTATIONS[augment]
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may live on from epoch to epoch

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict:
        """One row; raises ValueError, with its number, when it cannot be read."""
        try:
            return self.rows[index]
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error

    def generator(self, index: int) -> torch.Generator:
        """Randomness of one sample in this epoch."""
        seeds = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(seeds[0]) << 32 | int(seeds[1]))


class EpochCallback(TrainerCallback):
    """Tells the training data which epoch begins."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **_):
        train_dataloader.dataset.epoch = int(state.epoch or 0)


class PictureDataset(EpochDataset):
    """Rows to pixels (3, H, W) in [-1, 1]."""

    def __init__(self, rows: datasets.Dataset | ParquetRows, augment: str, seed: int):
        super().__init__(rows.select_columns("image"), augment, seed)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = self.row(index)["image"]
        if picture is None:
            raise ValueError(f"row {index} of the data has no picture; a tokenizer needs one in every row")
        return self.augmentation(to_pixels(picture), self.generator(index))


def require_one_size(pixels: list[torch.Tensor]) -> None:
    """Raises ValueError unless pictures (…, H, W) are all of one size."""
    sizes = sorted({f"{picture.shape[-1]}x{picture.shape[-2]}" for picture in pixels})
    if len(sizes) > 1:
        raise ValueError(f"the pictures of the data are not of one size, but {', '.join(sizes)}; prepare them first")


class PictureCollator:
    """Pixels to `pixel_values` (B, 3, H, W); ValueError when they are not all of one size."""

    def __call__(self, pixels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        require_one_size(pixels)
        return {"pixel_values": torch.stack(pixels)}


class StreamDataset(EpochDataset):
    """Rows to token streams.

        image first:   bos image_start code·n image_end  text  eos
        text first:    bos  text  image_start code·n image_end eos
        caption gone:  bos <|uncond|> image_start code·n image_end eos

    A row with a list of images has each of them where its text says `<|image|>`, or all before a text that does not say so:

        bos  text  image_start code·n image_end  text  image_start code·n image_end  text  eos

    Codes are placeholders here, to be filled from the picture or from cached codes. The text of a row may be missing, its
    picture too. A text that makes the stream longer than `max_length` loses its end; an image is never cut. Streams are
    made a batch at a time: one read of the table, one call of the tokenizer.

    Args:
        rows: with a column `text_column`, and `image`, `images` (lists), or `image_codes` (of either) unless only text is
            wanted.
        tokenizer: with the tokens of `add_special_tokens`; control tokens inside captions are read as plain text.
        codes_per_image: n.
        image_first: share of samples with the image before the text.
        caption_dropout: share of text-first samples whose text is replaced by <|uncond|>, for guidance.
        max_length: longest stream.
        augment: "none" or "affine".
        seed: of everything random.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        codes_per_image: int,
        text_column: str,
        image_first: float,
        caption_dropout: float,
        max_length: int,
        augment: str,
        seed: int,
    ):
        self.many = has_many(rows)
        wanted = (image_column(rows), "image_codes", text_column)
        super().__init__(rows.select_columns([name for name in rows.column_names if name in wanted]), augment, seed)
        if self.many:
            require_lists(rows)
        pictures = rows.features.get("image")
        if not self.many and not isinstance(pictures, datasets.Image | None):
            raise ValueError(f"the column 'image' holds no pictures, but {pictures}")
        codes = rows.features.get("image_codes")
        kind = codes
        while isinstance(kind, datasets.List):
            kind = kind.feature
        if codes is not None and (kind == codes or getattr(kind, "dtype", None) not in CODE_TYPES):
            raise ValueError(
                f"the column 'image_codes' must hold lists of integers, not {codes}; encode the data again"
            )
        self.codes_per_image = codes_per_image
        self.tokenizer, self.text_column = tokenizer, text_column
        self.image_first, self.caption_dropout, self.max_length = image_first, caption_dropout, max_length
        self.image = [
            tokenizer.image_start_token_id,
            *[tokenizer.image_token_id] * codes_per_image,
            tokenizer.image_end_token_id,
        ]
        if max_length < len(self.image) + 3:
            raise ValueError(f"an image takes {len(self.image) + 3} tokens, more than the {max_length} of a stream")

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The samples of a batch, as `DataLoader` asks for them."""
        try:
            rows = self.rows[indices]
        except ValueError:
            for index in indices:
                self.row(index)
            raise
        nothing = [None] * len(indices)
        if self.many:
            parts = (rows[self.text_column], rows.get("images", nothing), rows.get("image_codes", nothing))
            return [self.sample_of_many(*part) for part in zip(indices, *parts, strict=True)]
        texts = self.words(rows[self.text_column])
        parts = zip(indices, texts, rows.get("image", nothing), rows.get("image_codes", nothing), strict=True)
        return [self.sample(*part) for part in parts]

    def words(self, texts: list[str | None]) -> list[list[int]]:
        """Token ids of texts; none for a text that is missing."""
        return self.tokenizer(
            [text or "" for text in texts], add_special_tokens=False, split_special_tokens=True
        ).input_ids

    def image_prompts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Prompts `bos text image_start` as streams have them, padded on the left, for `generate`."""
        room, start = self.max_length - len(self.image) - 2, self.tokenizer.image_start_token_id
        ids = [[self.tokenizer.bos_token_id, *words[:room], start] for words in self.words(texts)]
        return dict(self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt"))

    def require_codes(self, index: int, codes: list[int] | None) -> None:
        """Raises ValueError unless these are the codes of one image, or none."""
        if codes is not None and (len(codes) != self.codes_per_image or None in codes):
            raise ValueError(
                f"row {index} of the data has {len(codes)} codes for an image, {codes.count(None)} of them missing; "
                f"it must be {self.codes_per_image}: encode the data again"
            )

    def sample(self, index: int, words: list[int], picture: Image.Image | None, codes: list[int] | None) -> dict:
        self.require_codes(index, codes)
        if picture is None and codes is None and not words:
            raise ValueError(f"row {index} of the data has neither a picture nor a text")
        generator = self.generator(index)
        order, drop = torch.rand(2, generator=generator).tolist()
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        image = [] if picture is None and codes is None else self.image
        words = words[: self.max_length - len(image) - 2]
        if image and order < self.image_first:
            ids = [bos, *image, *words, eos]
        elif image and (not words or drop < self.caption_dropout):
            ids = [bos, self.tokenizer.uncond_token_id, *image, eos]
        else:
            ids = [bos, *words, *image, eos]
        pixels = None if picture is None else self.augmentation(to_pixels(picture), generator)
        return {"input_ids": ids, "pixel_values": pixels, "image_codes": codes}

    def sample_of_many(
        self, index: int, text: str | None, pictures: list[Image.Image] | None, codes: list[list[int]] | None
    ) -> dict:
        for own in codes or []:
            self.require_codes(index, own or [])
        if None in (pictures or []):
            raise ValueError(f"row {index} of the data has a list of pictures in which one is missing")
        count = len((pictures if codes is None else codes) or [])
        pieces = (text or "").split(self.tokenizer.image_token)
        pieces = [""] * count + pieces if len(pieces) == 1 else pieces
        if len(pieces) != count + 1:
            raise ValueError(
                f"row {index} of the data has {len(pieces) - 1} {self.tokenizer.image_token} in its text, but {count} images"
            )
        words = self.words(pieces)
        room = self.max_length - 2 - count * len(self.image) - sum(map(len, words[:-1]))
        if room < 0:
            raise ValueError(
                f"row {index} of the data takes {self.max_length - room} tokens up to its last image, more than the "
                f"{self.max_length} of a stream; raise --max_length or split it"
            )
        words[-1] = words[-1][:room]
        ids = [self.tokenizer.bos_token_id, *words[0]]
        for own in words[1:]:
            ids += [*self.image, *own]
        ids.append(self.tokenizer.eos_token_id)
        generator = self.generator(index)
        pixels = [self.augmentation(to_pixels(picture), generator) for picture in pictures or []]
        require_one_size(pixels)
        return {
            "input_ids": ids,
            "pixel_values": torch.stack(pixels) if pixels else None,
            "image_codes": codes or None,
        }

    def lengths(self) -> np.ndarray:
        """Length (N,) of every stream, as long as its caption is not dropped."""
        if self.many:
            name = "image_codes" if "image_codes" in self.rows.column_names else "images"
            column = self.rows.select_columns([self.text_column, name]).with_format("arrow")
            return np.array([length for batch in column.iter(1000) for length in self._lengths_of_many(batch, name)])
        texts = self.rows.select_columns(self.text_column)
        words = [len(ids) for batch in texts.iter(1000) for ids in self.words(batch[self.text_column])]
        images = np.zeros(len(self), dtype=bool)
        for name in {"image", "image_codes"} & set(self.rows.column_names):
            if self.rows.data.column(name).null_count == 0:
                images[:] = True  # known without reading a single picture
            else:
                column = self.rows.select_columns(name).with_format("arrow")
                images |= np.concatenate([batch[name].is_valid().to_numpy(False) for batch in column.iter(1000)])
        return np.minimum(np.array(words) + images * len(self.image) + 2, self.max_length)

    def _lengths_of_many(self, batch: pa.Table, name: str) -> list[int]:
        counts = batch[name].combine_chunks().value_lengths().fill_null(0).to_pylist()
        texts = [(text or "").replace(self.tokenizer.image_token, "") for text in batch[self.text_column].to_pylist()]
        lengths = [
            len(own) + count * len(self.image) + 2 for own, count in zip(self.words(texts), counts, strict=True)
        ]
        return [min(length, self.max_length) for length in lengths]


class LengthGroupedSampler(torch.utils.data.Sampler):
    """An order in which the streams of one step have about the same length, so that little of a batch is padding.

    Shuffled, cut into pools of 50 steps, sorted by length within each pool, and the steps shuffled again. The last step
    of an epoch may be a short one. Drawn from the seed and the epoch of the data alone.

    Args:
        data: the streams.
        step: streams of one step, over all processes.
    """

    def __init__(self, data: StreamDataset, step: int):
        self.data, self.step, self.lengths = data, step, data.lengths()

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.data.seed, self.data.epoch])
        order = random.permutation(len(self.data))
        whole = len(order) - len(order) % self.step
        steps, pool = [], 50 * self.step
        for begin in range(0, whole, pool):
            part = order[begin : min(begin + pool, whole)]
            steps.append(part[np.argsort(self.lengths[part], kind="stable")].reshape(-1, self.step))
        steps = np.concatenate(steps) if steps else np.empty((0, self.step), dtype=int)
        yield from random.permutation(steps).ravel().tolist()
        yield from order[whole:].tolist()


class StreamCollator:
    """Streams to a batch padded on the right, with labels for everything but padding and <|uncond|>."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        streams = [torch.tensor(sample["input_ids"]) for sample in samples]
        input_ids = torch.nn.utils.rnn.pad_sequence(streams, True, self.tokenizer.pad_token_id)  # (B, T)
        lengths = torch.tensor([len(stream) for stream in streams])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        unlabelled = (attention_mask == 0) | (input_ids == self.tokenizer.uncond_token_id)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": input_ids.masked_fill(unlabelled, -100),
        }
        pictures = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if pictures:
            require_one_size(pictures)
            batch["pixel_values"] = torch.cat(
                [own if own.ndim == 4 else own[None] for own in pictures]
            )  # (M, 3, H, W)
        codes = [torch.tensor(sample["image_codes"]) for sample in samples if sample.get("image_codes") is not None]
        if codes:
            batch["image_codes"] = torch.cat([own if own.ndim == 2 else own[None] for own in codes])  # (M, h·w)
        return batch
