"""Rows that are read when they are asked for: the same as `datasets` has, each once an epoch, few at a time."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from unitok_hf.training.parquet_rows import ParquetRows, WindowSampler


class Numbered(torch.utils.data.Dataset):
    """Rows as their texts, with what a sampler asks of a data set."""

    seed = epoch = 0

    def __init__(self, rows: ParquetRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return self.rows[index]["text"]


@pytest.fixture
def files(pictures, tmp_path):
    """A hundred rows in two files, in row groups of eight; every tenth has no text."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for part in range(2):
        texts = [None if row % 10 == 9 else f"row {part * 50 + row}" for row in range(50)]
        images = [pictures[row % 8] for row in range(50)]
        rows = datasets.Dataset.from_dict({"image": images, "text": texts}, features=features)
        rows.to_parquet(str(tmp_path / f"{part}.parquet"), batch_size=8)
    return sorted(tmp_path.glob("*.parquet"))


def test_they_are_the_rows_of_datasets(files):
    ours = ParquetRows(files)
    theirs = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    assert len(ours) == len(theirs) == 100 and ours.column_names == theirs.column_names
    assert ours.features.to_dict() == theirs.features.to_dict()
    for index in (0, 7, 8, 49, 50, 99):
        assert ours[index]["text"] == theirs[index]["text"]
        assert ours[index]["image"].tobytes() == theirs[index]["image"].tobytes()
    assert ours[[99, 3]]["text"] == theirs[[99, 3]]["text"]
    assert list(ours["text"]) == list(theirs["text"])
    assert ours.select_columns("text")[0] == {"text": "row 0"}
    with pytest.raises(IndexError, match="row 100 of 100"):
        ours[100]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_comes_once_an_epoch_whatever_the_workers(files, workers):
    data = Numbered(ParquetRows(files, memory=2000))
    orders = []
    for data.epoch in (0, 1):
        loader = torch.utils.data.DataLoader(
            data, 5, sampler=WindowSampler(data, 5), num_workers=workers, collate_fn=list
        )
        orders.append([text for batch in loader for text in batch])
        assert sorted(map(str, orders[-1])) == sorted(map(str, data.rows["text"]))
    assert orders[0] != orders[1]
    data.epoch = 0
    assert [data[index] for index in WindowSampler(data, 5)] == orders[0]


def test_rows_that_do_not_fill_a_batch_begin_the_next_epoch(files):
    data = Numbered(ParquetRows(files, memory=2000))
    stream, whole = [], WindowSampler(data, 100)
    for data.epoch in range(50):
        sampler = WindowSampler(data, 16)
        assert len(sampler) == 96
        stream += sampler
    for epoch in range(48):
        data.epoch = epoch
        assert stream[100 * epoch : 100 * (epoch + 1)] == list(whole)
        assert sorted(whole) == list(range(100))


def test_fewer_rows_than_a_batch_are_refused(files):
    with pytest.raises(
        ValueError, match="100 rows do not fill a batch of 128 on all processes together; lower --per_device"
    ):
        WindowSampler(Numbered(ParquetRows(files)), 128)


def test_no_rows_are_refused(files, tmp_path):
    pq.write_table(pq.read_table(files[0]).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="none.parquet and the files beside it have no rows"):
        ParquetRows([tmp_path / "none.parquet"])


def test_rows_of_different_groups_are_mixed(files):
    data = Numbered(ParquetRows(files, memory=100_000_000))
    order = np.array(list(WindowSampler(data, 1)))
    assert np.corrcoef(order, np.arange(100))[0, 1] < 0.3
    assert len({index // 8 for index in order[:10]}) > 4


def test_a_group_is_read_once_an_epoch_and_few_are_kept(files, monkeypatch):
    rows = ParquetRows(files, memory=3 * pq.read_metadata(files[0]).row_group(0).total_byte_size)
    read, most = [], 0
    stock = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, *a, **k: read.append(a) or stock(self, *a, **k))
    data = Numbered(rows)
    for index in WindowSampler(data, 1):
        data[index]
        most = max(most, len(rows.kept))
    assert most == rows.window == 3
    assert len(read) == len(rows.places) == 14


def test_files_that_cannot_be_read_are_named(files, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="broken.parquet is no Parquet file"):
        ParquetRows([*files, tmp_path / "broken.parquet"])
    datasets.Dataset.from_dict({"text": [1]}).to_parquet(str(tmp_path / "other.parquet"))
    with pytest.raises(ValueError, match="other.parquet has other columns than"):
        ParquetRows([*files, tmp_path / "other.parquet"])
    rows = ParquetRows(files)
    damaged = bytearray(files[0].read_bytes())
    pixels = damaged.index(b"IDAT") + 4
    damaged[pixels : pixels + 20] = bytes(20)  # in the first picture
    files[0].write_bytes(damaged)
    with pytest.raises(ValueError, match="row 0, in .*0.parquet: .* cannot be read"):
        rows[0]
    damaged[4:60] = bytes(56)  # in the header of a page
    files[0].write_bytes(damaged)
    with pytest.raises(ValueError, match="row group 0 of .*0.parquet cannot be read"):
        ParquetRows(files)[0]


def test_rows_of_files_that_differ_in_what_can_be_null_make_one_table(tmp_path):
    for name, nullable in (("a", True), ("b", False)):
        schema = pa.schema([pa.field("text", pa.string(), nullable)])
        pq.write_table(pa.table({"text": [name] * 3}, schema), tmp_path / f"{name}.parquet")
    rows = ParquetRows([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert rows.table(1, 5)["text"].to_pylist() == ["a", "a", "b", "b"]
