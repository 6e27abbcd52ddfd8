"""What a stream brings while it is generated is what it holds when it is done, piece by piece and for every row."""

import threading
from queue import Empty

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from unitok_hf import Piece, UniTokStreamer


class Script(LogitsProcessor):
    """Makes each row choose its given tokens, one after another; where there is none, the model is free."""

    def __init__(self, length: int, rows: list[list[int | None]]):
        self.length, self.rows = length, rows

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, tokens in enumerate(self.rows):
            token = tokens[input_ids.shape[1] - self.length]
            if token is not None:
                scores[row, token] = scores[row, token] + 1e4
        return scores


@pytest.fixture
def scripted(model, processor) -> dict:
    """Prompts of two rows, of which one writes, draws and writes, and one draws, ends, and is filled up."""
    words = processor.tokenizer("a red circle", add_special_tokens=False).input_ids
    start, eos = model.vocabulary.image_start, processor.tokenizer.eos_token_id
    drawn = [start, *[None] * 16, model.vocabulary.image_end]
    rows = [[*words, *drawn, *words, eos], [*drawn, eos]]
    length = max(map(len, rows))
    inputs = processor(text=["a blue square", "a"], return_tensors="pt")
    script = Script(inputs["input_ids"].shape[1], [row + [eos] * (length - len(row)) for row in rows])
    return {**inputs, "logits_processor": LogitsProcessorList([script]), "max_new_tokens": length}


def run(model, processor, arguments: dict, **options) -> tuple[torch.Tensor, list[Piece]]:
    pieces = []
    streamer = UniTokStreamer(model, processor, on_piece=pieces.append, **options)
    return model.generate(**arguments, streamer=streamer), pieces


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_pieces_of_a_row_are_the_segments_of_its_stream(model, processor, scripted, scale):
    streams, pieces = run(model, processor, scripted | {"guidance_scale": scale})
    length = scripted["input_ids"].shape[1]
    assert (
        "".join(piece.text for piece in pieces if piece.row == 0 and piece.type == "text")
        == "a red circlea red circle"
    )
    for row, stream in enumerate(streams):
        [segments] = model.decode_mixed_tokens(stream[length:], processor.tokenizer)
        expected = [part.text if part.type == "text" else part.ids[1:-1] - 384 for part in segments]
        expected = [part for part in expected if isinstance(part, torch.Tensor) or part]
        found = []
        for piece in pieces:
            if piece.row == row and piece.type == "text" and found and isinstance(found[-1], str):
                found[-1] += piece.text
            elif piece.row == row:
                found.append(piece.text if piece.type == "text" else piece.codes.flatten())
        assert len(found) == len(expected) == (3, 1)[row]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    pictures = [piece for piece in pieces if piece.type == "image"]
    for piece in pictures:
        whole = [
            part for part in processor.decode_mixed(streams[piece.row, None], model)[0] if not isinstance(part, str)
        ]
        assert piece.codes.shape == (4, 4) and piece.image.tobytes() == whole[0].tobytes()
    assert [piece.row for piece in pictures] == [1, 0]  # the second row is done first


def test_words_come_whole_and_pictures_before_the_text_behind_them(model, processor, scripted):
    _, pieces = run(model, processor, scripted)
    assert [piece.text or piece.type for piece in pieces if piece.row == 0] == [
        "a ", "red ", "circle", "image", "a ", "red ", "circle",
    ]  # fmt: skip


def test_rows_of_codes_come_as_they_are_drawn(model, processor, scripted):
    _, pieces = run(model, processor, scripted, code_rows=True)
    for row in range(2):
        own = [piece for piece in pieces if piece.row == row and piece.type != "text"]
        assert [(piece.type, piece.line) for piece in own] == [
            *(("codes", line) for line in range(4)),
            ("image", None),
        ]
        assert torch.equal(torch.stack([piece.codes for piece in own[:4]]), own[4].codes)


def test_pictures_finished_in_the_same_step_are_decoded_in_one_call(model, processor):
    inputs = processor(text=["a red circle", "a"], generation_mode="image", return_tensors="pt")
    batches = []
    hook = model.model.vqmodel.decoder.register_forward_hook(lambda *call: batches.append(len(call[-1])))
    options = {"generation_mode": "image", "do_sample": True, "num_return_sequences": 2}
    ids, pieces = run(model, processor, inputs | options)
    hook.remove()
    assert batches == [4]
    assert [(piece.row, piece.type) for piece in pieces] == [(row, "image") for row in range(4)]
    assert torch.equal(torch.stack([piece.codes.flatten() for piece in pieces]) + 384, ids)


def test_a_picture_that_the_prompt_begins_comes_whole(model, processor):
    prompt = torch.tensor([[processor.tokenizer.bos_token_id, model.vocabulary.image_start, 390, 391]])
    ids, [piece] = run(model, processor, {"input_ids": prompt, "generation_mode": "image"})
    assert torch.equal(piece.codes.flatten() + 384, ids[0]) and piece.codes[0, :2].tolist() == [6, 7]


def test_the_prompt_comes_too_when_asked_for(model, processor, pictures):
    inputs = processor(text="a red circle", images=pictures[0], return_tensors="pt")
    _, pieces = run(model, processor, {**inputs, "max_new_tokens": 1}, skip_prompt=False)
    assert [piece.type for piece in pieces][:2] == ["image", "text"]
    assert "".join(piece.text or "" for piece in pieces).startswith("a red circle")
    expected = model.decode_image_tokens(model.get_image_tokens(inputs["pixel_values"]))
    assert pieces[0].image.tobytes() == processor.postprocess(expected)["pixel_values"][0].tobytes()


def test_the_iterator_gets_the_same_while_another_thread_generates(model, processor, scripted):
    _, expected = run(model, processor, scripted)
    streamer = UniTokStreamer(model, processor, timeout=60).start(**scripted)
    pieces = list(streamer)
    assert [(p.row, p.type, p.text) for p in pieces] == [(p.row, p.type, p.text) for p in expected]
    again = list(streamer.start(**scripted))  # it may be used again
    assert [(p.row, p.type, p.text) for p in again] == [(p.row, p.type, p.text) for p in expected]


def test_the_first_piece_comes_long_before_the_last_token(model, processor, scripted):
    seen = []
    free, streamer = threading.Event(), UniTokStreamer(model, processor, timeout=60)

    class Gate(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            if len(seen) == 8:
                assert free.wait(60)
            return scores

    scripted["logits_processor"].append(Gate())
    pieces = iter(streamer.start(**scripted))
    assert next(pieces).text == "a "
    assert len(seen) <= 8
    free.set()
    assert [piece.type for piece in pieces].count("image") == 2


def test_what_goes_wrong_in_the_thread_is_raised_where_one_waits(model, processor, scripted):
    streamer = UniTokStreamer(model, processor, timeout=60)
    with pytest.raises(ValueError, match="guidance_scale must be a number from 0 on"):
        list(streamer.start(**scripted, guidance_scale=-1.0))

    def refuse(piece: Piece) -> None:
        raise KeyError(piece.type)

    with pytest.raises(KeyError, match="text"):
        model.generate(**scripted, streamer=UniTokStreamer(model, processor, on_piece=refuse))
    with pytest.raises(Empty):
        next(iter(UniTokStreamer(model, processor, timeout=0.01)))
