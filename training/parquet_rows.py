"""Rows of Parquet files, read when they are asked for: for data larger than memory, and than a copy in the cache.

    files ── row groups ── a window of neighbouring groups, in a random order of groups ── its rows, in random order

- `ParquetRows` has the part of `datasets.Dataset` that training needs. It keeps the row groups that were asked for last, as
  many as fit into `memory`, and nothing else of the data: what is resident does not grow with it
- `WindowSampler` gives an order in which that is enough: row groups are shuffled, and rows within windows of so many groups as
  are kept. Drawn from the seed alone, it is the same for any number of workers and processes, which take their batches from
  it in turn, and a run is resumed at any batch. Such orders, one after another, are a stream that is cut into full batches:
  rows that do not fill the last batch of an epoch begin the next one, so that none is lost or comes twice on the way. An
  epoch is so many full batches; what is left when training ends is not seen
- rows that lie together in the files meet more often than by chance; files whose rows are in random order forgive that

The files' row groups should be small (those of `prepare-data` have at most 256 rows): a group is what is read at once, by each
process and each worker, which keep `memory` each.
"""

import copy
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate, chain, count, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..configuration.refusal_unitok import refused_in_words
from .stored_pictures import guarded


MEMORY = 256 * 2**20


class ParquetRows:
    """Rows of Parquet files of one schema.

    Args:
        files: the files, in order.
        memory: bytes that are kept, uncompressed, as the files count them; one group in any case.

    Attributes:
        features: the columns and their kinds, as `datasets` has them.
        groups: (G + 1,) first row of each row group, and the number of rows.
        window: how many row groups of the usual size are kept.

    Raises:
        ValueError: a file is no Parquet, or has other columns than the first; or there is no row.
    """

    def __init__(self, files: list[Path], memory: int = MEMORY):
        self.files = list(files)
        self.places: list[tuple[int, int]] = []  # file and number of each row group
        rows, size = [], 0
        for number, file in enumerate(self.files):
            try:
                opened = pq.ParquetFile(file)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file} is no Parquet file: {error}") from error
            with refused_in_words(f"{file} has no columns that can be read"):
                features = datasets.Features(guarded(datasets.Features.from_arrow_schema(opened.schema_arrow)))
            if number == 0:
                self.features = features
            elif any(features.get(name) != kind for name, kind in self.features.items()):
                raise ValueError(f"{file} has other columns than {self.files[0]}: {features} and {self.features}")
            for group in range(opened.num_row_groups):
                about = opened.metadata.row_group(group)
                self.places.append((number, group))
                rows.append(about.num_rows)
                size += about.total_byte_size
        self.groups = np.array([0, *accumulate(rows)])
        if len(self) == 0:
            raise ValueError(f"{self.files[0]} and the files beside it have no rows")
        self.window = max(1, memory * len(rows) // max(1, size))
        self.kept: OrderedDict[int, pa.Table] = OrderedDict()
        self.opened: tuple[int, pq.ParquetFile] | None = None

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    def __len__(self) -> int:
        return int(self.groups[-1])

    def __getstate__(self) -> dict:
        """For copies and worker processes: each has its own open file and row groups."""
        return self.__dict__ | {"kept": OrderedDict(), "opened": None}

    def select_columns(self, columns: str | list[str]) -> "ParquetRows":
        """The same rows, with these columns alone."""
        selected = copy.copy(self)  # with nothing kept, see `__getstate__`
        names = [columns] if isinstance(columns, str) else columns
        selected.features = datasets.Features({name: self.features[name] for name in names})
        return selected

    def group(self, number: int) -> pa.Table:
        """A row group as it is stored, pictures as bytes.

        Raises:
            ValueError: the file breaks off or is damaged there.
        """
        if number in self.kept:
            self.kept.move_to_end(number)
            return self.kept[number]
        file, place = self.places[number]
        if self.opened is None or self.opened[0] != file:
            self.opened = file, pq.ParquetFile(self.files[file])
        try:
            table = self.opened[1].read_row_group(place, columns=self.column_names, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"row group {place} of {self.files[file]} cannot be read: {error}") from error
        self.kept[number] = table
        if len(self.kept) > self.window:
            self.kept.popitem(last=False)
        return table

    def __getitem__(self, key: int | list[int] | str):
        """A row as a dict; rows (list of N) as a dict of lists; a column, by its name, as an iterator over all rows."""
        if isinstance(key, str):
            return self.column(key)
        if isinstance(key, list):
            rows = [self[index] for index in key]
            return {name: [row[name] for row in rows] for name in self.features}
        if not 0 <= key < len(self):
            raise IndexError(f"row {key} of {len(self)}")
        number = bisect_right(self.groups, key) - 1
        row = self.group(number).slice(key - int(self.groups[number]), 1).to_pylist()[0]
        try:
            return self.features.decode_example(row)
        except ValueError as error:
            raise ValueError(f"row {key}, in {self.files[self.places[number][0]]}: {error}") from error

    def table(self, begin: int, end: int) -> pa.Table:
        """The rows from `begin` to before `end` as they are stored."""
        first, last = bisect_right(self.groups, begin) - 1, bisect_right(self.groups, end - 1) - 1
        groups = [self.group(number) for number in range(first, last + 1)]
        whole = pa.concat_tables(groups, promote_options="default")  # files may differ in which columns can be null
        return whole.slice(begin - int(self.groups[first]), end - begin)

    def column(self, name: str) -> Iterator:
        """The values of a column, one after another."""
        alone = self.select_columns(name)
        for number in range(len(alone.places)):
            for row in alone.group(number).to_pylist():
                yield alone.features.decode_example(row)[name]


def require_batch(rows: ParquetRows | torch.utils.data.Dataset, batch_size: int) -> None:
    """Raises ValueError unless there are as many rows as a batch of all processes together has."""
    if len(rows) < batch_size:
        raise ValueError(
            f"{len(rows)} rows do not fill a batch of {batch_size} on all processes together; lower "
            "--per_device_train_batch_size, or leave out --streaming"
        )


class WindowSampler(torch.utils.data.Sampler):
    """The full batches of an epoch, in an order that needs few row groups at a time; see above.

    Args:
        data: a data set of `rows`, a `ParquetRows`, whose `seed` and `epoch` decide about the order.
        batch_size: rows of a batch, of all processes together.

    Raises:
        ValueError: there are fewer rows than that.
    """

    def __init__(self, data: torch.utils.data.Dataset, batch_size: int):
        require_batch(data, batch_size)
        self.data = data
        self.length = len(data) // batch_size * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        number, begin = divmod(self.data.epoch * self.length, len(self.data))
        stream = chain.from_iterable(map(self.order, count(number)))
        return islice(stream, begin, begin + self.length)

    def order(self, number: int) -> Iterator[int]:
        """Every row once: the order of this number."""
        random = np.random.default_rng([self.data.seed, number])
        rows = self.data.rows
        groups = random.permutation(len(rows.places))
        for begin in range(0, len(groups), rows.window):
            window = [np.arange(*rows.groups[group : group + 2]) for group in groups[begin : begin + rows.window]]
            yield from random.permutation(np.concatenate(window)).tolist()
