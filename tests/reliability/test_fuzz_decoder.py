"""The id decoder, given any ids: every token of a row is in one segment, or the row and the position are named."""

import pytest
import torch
from hostile_profile import hypothesis

from unitok_hf import UniTokConfig, UniTokForConditionalGeneration


st = hypothesis.strategies


@pytest.fixture(scope="module")
def decoder():
    """A model whose vocabulary is small: 64 text ids, 8 codes, images of 2x2 codes."""
    text_config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vq_config = {
        "block_out_channels": (8,), "norm_num_groups": 8, "latent_channels": 4, "num_vq_embeddings": 8,
        "in_channels": 3, "out_channels": 3, "sample_size": 2, "mid_block_add_attention": False,
    }  # fmt: skip
    config = UniTokConfig(
        text_config=text_config, vq_config=vq_config, text_vocab_size=64, num_visual_tokens=8, image_grid=(2, 2)
    )
    torch.manual_seed(0)
    return UniTokForConditionalGeneration(config).eval()


START, END, OFFSET, SIZE = 3, 4, 64, 72
codes = st.integers(OFFSET, SIZE - 1)
image = st.lists(codes, min_size=4, max_size=4).map(lambda found: [START, *found, END])
pieces = st.one_of(
    image,
    st.lists(st.integers(0, SIZE - 1), max_size=6),
    st.lists(st.sampled_from([START, END, OFFSET, SIZE - 1, 0, 7]), max_size=8),
    st.lists(codes, max_size=10),
)
streams = st.lists(pieces, max_size=6).map(lambda parts: [token for part in parts for token in part])
outside = st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=12)


@hypothesis.given(
    rows=st.lists(st.one_of(streams, outside), min_size=1, max_size=3),
    on_error=st.sampled_from(["raise", "skip", "pad"]),
)
def test_any_ids_are_taken_apart_without_gap_or_overlap_or_refused_by_row_and_position(decoder, rows, on_error):
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64).view(len(rows), length)
    known = bool(((ids >= 0) & (ids < SIZE)).all())
    try:
        found = decoder.decode_mixed_tokens(ids, on_error=on_error)
    except ValueError as error:
        assert not known or on_error == "raise", error
        assert str(error).strip()
        return
    assert known
    for row, segments in zip(ids, found, strict=True):
        ends = [0, *(segment.span[1] for segment in segments)]
        assert [segment.span[0] for segment in segments] == ends[:-1] and ends[-1] == length
        for segment in segments:
            assert segment.ids.tolist() == row[slice(*segment.span)].tolist() and len(segment.ids) > 0
            if segment.type == "text":
                assert segment.image is None and segment.complete
                continue
            whole = len(segment.ids) == 6 and segment.ids[0] == START and segment.ids[-1] == END
            assert segment.complete == (whole and bool((segment.ids[1:-1] >= OFFSET).all()))
            assert (segment.image is not None) == (segment.complete or on_error == "pad")
            if segment.image is not None:
                assert segment.image.shape == (3, 2, 2) and segment.image.abs().max() <= 1
        assert on_error != "raise" or all(segment.complete for segment in segments)
