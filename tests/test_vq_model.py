"""UniTokVQModel: a folder that stock diffusers reads, and codes that depend on the picture alone."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from unitok_hf import UniTokVQModel
from unitok_hf.modeling_unitok import modeling_vq
from unitok_hf.modeling_unitok.modeling_vq import CodebookQuantizer, nearest_codes
from unitok_hf.modeling_unitok.tiling_vq import blend_weights, owned_spans, tile_starts


ROOT = Path(__file__).resolve().parent.parent
TINY = {"latent_channels": 8, "num_vq_embeddings": 64}
PLAIN = TINY | {"in_channels": 3, "out_channels": 3, "block_out_channels": (16, 16, 32, 32, 32), "norm_num_groups": 16}
PATCHED = TINY | {"block_out_channels": (32, 32, 32), "patch_size": 4}


def random_pictures(count: int, height: int = 64, width: int = 64, seed: int = 1) -> torch.Tensor:
    """Blobs of random colours, (count, 3, height, width) in [-1, 1]: smooth, so that cells of a picture differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 16, width // 16, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bilinear")


def with_latents_as_codebook(model: UniTokVQModel) -> UniTokVQModel:
    """An untrained encoder crowds its latents; codes at some of those latents make every test see many codes."""
    with torch.no_grad():
        rows = model.encode(random_pictures(8)).latents.permute(0, 2, 3, 1).flatten(0, 2)
        model.codebook.copy_(rows[: model.config.num_vq_embeddings])
    return model.eval()


@pytest.fixture
def spread(vq_model) -> UniTokVQModel:
    """The tiny tokenizer with a codebook that its latents use."""
    return with_latents_as_codebook(vq_model)


@pytest.fixture(params=[PLAIN, PATCHED], ids=["patch_size 1", "patch_size 4"])
def either(request) -> UniTokVQModel:
    """One tokenizer without and one with pixel unshuffle, both at downsampling 16."""
    torch.manual_seed(0)
    return with_latents_as_codebook(UniTokVQModel(**request.param))


@torch.no_grad()
def stock_codes_and_pictures(stock: diffusers.VQModel, pixels: torch.Tensor, patch_size: int):
    """Codes (B, h, w) and pictures (B, 3, H, W), by the public calls of diffusers alone."""
    latents = stock.encode(F.pixel_unshuffle(pixels, patch_size)).latents
    codes = stock.quantize(latents)[2][2].view(latents.shape[0], *latents.shape[2:])
    return codes, F.pixel_shuffle(stock.decode(latents).sample, patch_size)


def test_stock_diffusers_gives_the_same_codes_and_pictures(either, tmp_path):
    either.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    stock = diffusers.VQModel.from_pretrained(tmp_path).eval()
    assert type(stock) is diffusers.VQModel
    pixels = random_pictures(3, seed=2)
    codes = either.encode_to_indices(pixels)
    assert len(codes.unique()) > 12
    stock_codes, stock_pictures = stock_codes_and_pictures(stock, pixels, either.config.patch_size)
    assert torch.equal(codes, stock_codes)
    with torch.no_grad():
        for pictures in (either.decode_from_indices(codes).sample, either(pixels).sample):
            assert torch.allclose(pictures, stock_pictures, rtol=0, atol=1e-4)


def test_diffusers_auto_model_finds_the_stock_class(spread, tmp_path):
    spread.save_pretrained(tmp_path)
    stock = diffusers.AutoModel.from_pretrained(str(tmp_path))
    assert type(stock) is diffusers.VQModel
    assert stock.state_dict().keys() == spread.state_dict().keys()
    assert all(torch.equal(stock.state_dict()[name], weight) for name, weight in spread.state_dict().items())


def test_a_stock_folder_loads_with_the_same_codes_and_pictures(tmp_path):
    torch.manual_seed(0)
    settings = {key: value for key, value in PLAIN.items() if key != "block_out_channels"}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    stock = diffusers.VQModel(**settings, **blocks, block_out_channels=(16, 16, 32), vq_embed_dim=8).eval()
    with torch.no_grad():
        rows = stock.encode(random_pictures(1)).latents.permute(0, 2, 3, 1).flatten(0, 2)  # (256, 8)
        stock.quantize.embedding.weight.copy_(rows[::4])
    stock.save_pretrained(tmp_path)
    ours = UniTokVQModel.from_pretrained(tmp_path).eval()
    assert (ours.config.patch_size, ours.downsampling) == (1, 4)
    pixels = random_pictures(2, seed=2)
    codes, pictures = stock_codes_and_pictures(stock, pixels, 1)
    assert len(codes.unique()) > 20
    assert torch.equal(ours.encode_to_indices(pixels), codes)
    assert torch.allclose(ours.decode_from_indices(codes).sample, pictures, rtol=0, atol=1e-4)


def test_saving_and_loading_changes_nothing(spread, tmp_path):
    spread.save_pretrained(tmp_path / "first")
    loaded = UniTokVQModel.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert second.pop("_name_or_path") == str(tmp_path / "first")  # diffusers notes where a model came from
    assert first == second and first["_class_name"] == "VQModel" and first["patch_size"] == 4
    weights = load_file(tmp_path / "second/diffusion_pytorch_model.safetensors")
    assert weights.keys() == spread.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in spread.state_dict().items())


def test_a_fresh_process_gives_the_same_codes_and_pictures_bit_for_bit(spread, tmp_path):
    spread.save_pretrained(tmp_path / "tokenizer")
    pixels = random_pictures(3, seed=2)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    program = (
        "import sys; from pathlib import Path\n"
        "from safetensors.torch import load_file, save_file\n"
        "from unitok_hf import UniTokVQModel\n"
        "folder = Path(sys.argv[1])\n"
        "model = UniTokVQModel.from_pretrained(folder / 'tokenizer')\n"
        "codes = model.encode_to_indices(load_file(folder / 'pixels.safetensors')['pixels'])\n"
        "pictures = model.decode_from_indices(codes).sample.detach().contiguous()\n"
        "save_file({'codes': codes, 'pictures': pictures}, folder / 'result.safetensors')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "result.safetensors")
    codes = spread.encode_to_indices(pixels)
    assert torch.equal(found["codes"], codes)
    assert torch.equal(found["pictures"], spread.decode_from_indices(codes).sample.detach())


@pytest.mark.parametrize("distance_from_origin", [0, 1000])
def test_the_lookup_is_the_nearest_code_as_float64_finds_it(distance_from_origin):
    generator = torch.Generator().manual_seed(0)
    centre = distance_from_origin * torch.randn(16, generator=generator)
    codebook = torch.randn(512, 16, generator=generator) + centre
    latents = torch.randn(3000, 16, generator=generator) + centre
    distances = (latents.double()[:, None] - codebook.double()).square().sum(dim=2)
    assert torch.equal(nearest_codes(latents, codebook), distances.argmin(dim=1))


@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_the_lookup_does_not_depend_on_its_blocks(monkeypatch, rows):
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(1001, 8, generator=generator), torch.randn(64, 8, generator=generator)
    expected = nearest_codes(latents, codebook)
    blocks, argmax = [], torch.argmax
    monkeypatch.setattr(torch, "argmax", lambda scores, **kw: blocks.append(len(scores)) or argmax(scores, **kw))
    monkeypatch.setattr(modeling_vq, "CPU_LOOKUP_BYTES", 4 * 64 * rows)
    assert torch.equal(nearest_codes(latents, codebook), expected)
    assert max(blocks) == min(rows, 1001) and sum(blocks) == 1001


def test_the_lookup_is_exact_under_autocast_and_for_half_precision_latents():
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(3000, 16, generator=generator), torch.randn(512, 16, generator=generator)
    rounded = latents.bfloat16()
    expected = nearest_codes(latents, codebook), nearest_codes(rounded.float(), codebook)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_codes(latents, codebook), nearest_codes(rounded, codebook)
        assert (latents @ codebook.T).dtype == torch.bfloat16  # autocast is at work here
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_every_code_vector_is_its_own_nearest_code(spread):
    assert torch.equal(nearest_codes(spread.codebook, spread.codebook), torch.arange(64))


def test_codes_survive_the_way_to_latents_and_back(spread):
    codes = torch.randint(64, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    latents = spread.indices_to_latents(codes)
    assert latents.shape == (2, 8, 4, 4)
    assert torch.equal(latents[1, :, 2, 3], spread.codebook[codes[1, 2, 3]])
    assert torch.equal(nearest_codes(latents.permute(0, 2, 3, 1).flatten(0, 2), spread.codebook), codes.flatten())
    assert torch.equal(spread.quantize(latents)[2][2], codes.flatten())


def test_codes_do_not_depend_on_the_batch_or_on_autocast(spread):
    pixels = random_pictures(8, seed=2)
    together = spread.encode_to_indices(pixels)
    one_by_one = torch.cat([spread.encode_to_indices(picture[None]) for picture in pixels])
    with torch.autocast("cpu", torch.bfloat16):
        in_a_mixed_precision_run = spread.encode_to_indices(pixels)
    assert together.dtype == torch.int64 and together.shape == (8, 4, 4)
    assert torch.equal(one_by_one, together)
    assert torch.equal(in_a_mixed_precision_run, together)


def test_pictures_do_not_depend_on_the_shape_of_the_codes(spread):
    codes = torch.randint(64, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pictures = spread.decode_from_indices(codes).sample
        assert pictures.shape == (2, 3, 64, 64)
        for same in (codes.flatten(1), codes.int(), codes.to(torch.uint8)):
            assert torch.equal(spread.decode_from_indices(same).sample, pictures)
        assert torch.equal(spread.decode_from_indices(codes, return_dict=False)[0], pictures)
        assert torch.equal(spread.decode_code(codes).sample, pictures)
        latents = spread.indices_to_latents(codes)
        assert torch.equal(spread.decode(latents, force_not_quantize=True).sample, pictures)
        assert torch.allclose(spread.decode(latents, return_dict=False)[0], pictures, rtol=0, atol=1e-5)


def test_pictures_need_not_be_square(spread):
    codes = spread.encode_to_indices(random_pictures(2, 48, 96, seed=2))
    assert codes.shape == (2, 3, 6) == (2, *spread.grid(48, 96))
    assert spread.decode_from_indices(codes).sample.shape == (2, 3, 48, 96)
    assert spread(random_pictures(2, 48, 96)).sample.shape == (2, 3, 48, 96)


def test_the_default_is_the_tokenizer_of_the_guide():
    with torch.device("meta"):
        model = UniTokVQModel()
    assert model.grid(model.config.sample_size, model.config.sample_size) == (4, 4)
    assert model.codebook.shape == (1024, 16)
    assert model.config.latent_channels == model.config.vq_embed_dim


GREY = torch.zeros(2, 3, 64, 64)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GREY[0], r"\(3, 64, 64\)"),
        (GREY[:, :1], r"\(2, 1, 64, 64\)"),
        (GREY + 2.5, r"\[2.5, 2.5\]"),
        (GREY.byte() + 255, "uint8"),
        (GREY.long(), "int64"),
        (GREY + float("nan"), "nan"),
        (GREY[:, :, :60], "60x64"),
        (GREY[..., :40], "64x40"),
    ],
    ids=["no batch", "grey", "range", "bytes", "integers", "nan", "height", "width"],
)
def test_pixels_that_are_no_pictures_are_refused_with_what_was_seen(vq_model, pixels, message):
    with pytest.raises(ValueError, match=message):
        vq_model.encode_to_indices(pixels)


def test_one_bad_pixel_is_enough(vq_model):
    for value in (1.5, -1.5, float("nan"), float("inf")):
        pixels = GREY.clone()
        pixels[1, 2, 63, 63] = value
        with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
            vq_model.encode_to_indices(pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 4, 4), "float32"),
        (torch.zeros(1, 4, 4, dtype=torch.bool), "bool"),
        (torch.zeros(16, dtype=torch.int64), r"\(16,\)"),
        (torch.zeros(1, 15, dtype=torch.int64), "15 codes are no square"),
        (torch.tensor([[0, 1, 2, 64]]), r"code 64 at \[0, 1, 1\]"),
        (torch.tensor([[0, -1, 2, 3]]), r"code -1 at \[0, 0, 1\]"),
    ],
    ids=["float", "bool", "no batch", "no square", "too large", "negative"],
)
def test_codes_that_are_no_codes_are_refused_with_their_place(vq_model, codes, message):
    with pytest.raises(ValueError, match=message):
        vq_model.decode_from_indices(codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 3, "patch_size": 4}, "in_channels = out_channels = 48, got 3 and 48"),
        ({"in_channels": 3, "out_channels": 3, "patch_size": 4}, "got 3 and 3"),
        ({"in_channels": 12}, "patch_size 2 needs .* got 12 and 48"),
        ({"patch_size": 0}, "at least 1, got 0"),
        ({"in_channels": 0, "out_channels": 0}, "at least 1, got 0"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "3 block_out_channels need .* got 1 and 3"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UniTokVQModel(**arguments)


def test_codebook_stats_of_known_codes(vq_model):
    stats = vq_model.codebook_stats
    assert stats(torch.arange(64).view(4, 4, 4)) == pytest.approx({"usage": 1.0, "perplexity": 64.0})
    assert stats(torch.full((3, 4, 4), 5)) == pytest.approx({"usage": 1 / 64, "perplexity": 1.0})
    # half of the codes are 0, the other half 1 and 2 alike: entropy is 1.5 bits
    assert stats(torch.tensor([0, 0, 1, 2])) == pytest.approx({"usage": 3 / 64, "perplexity": 2**1.5})


def test_the_quantizer_weighs_the_commitment_not_the_codebook():
    torch.manual_seed(0)
    quantizer = CodebookQuantizer(num_codes=5, width=3)
    torch.nn.init.normal_(quantizer.embedding.weight)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantized, loss, (_, _, codes) = quantizer(latents)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    chosen = quantizer.embedding.weight[codes]
    assert torch.allclose(quantized.permute(0, 2, 3, 1).reshape(-1, 3), chosen, atol=1e-6)
    assert torch.allclose(loss, 1.25 * (rows - chosen).square().mean())
    loss.backward()
    error = 2 * (rows - chosen).detach() / rows.numel()
    assert torch.allclose(latents.grad.permute(0, 2, 3, 1).reshape(-1, 3), 0.25 * error, atol=1e-6)
    per_code = torch.zeros(5, 3).index_add_(0, codes, -error)
    assert torch.allclose(quantizer.embedding.weight.grad, per_code, atol=1e-6)


def test_gradients_pass_the_lookup_unchanged():
    torch.manual_seed(0)
    quantizer = CodebookQuantizer(num_codes=5, width=3)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    direction = torch.randn(2, 3, 4, 4)
    (quantizer(latents)[0] * direction).sum().backward()
    assert torch.equal(latents.grad, direction)


def test_gradient_checkpointing_gives_the_same_gradients(spread):
    spread.train()
    pixels = random_pictures(2, seed=2)

    def gradients() -> dict[str, torch.Tensor]:
        spread.zero_grad()
        output = spread(pixels)
        (output.sample.square().mean() + output.commit_loss).backward()
        return {name: weight.grad.clone() for name, weight in spread.named_parameters()}

    calls = []
    spread.encoder.mid_block.register_forward_pre_hook(lambda *_: calls.append("encoder"))
    spread.decoder.mid_block.register_forward_pre_hook(lambda *_: calls.append("decoder"))
    plain = gradients()
    assert sorted(calls) == ["decoder", "encoder"]
    spread.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert sorted(calls[2:]) == ["decoder", "decoder", "encoder", "encoder"]  # once forward, once again backward
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], rtol=1e-5, atol=1e-8), name


def peak_bytes(call, tmp_path) -> int:
    """The most memory that tensors made by the call held at a time, by the profiler's allocation events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes, key=lambda pair: pair[0])))


def test_the_lookup_never_holds_a_score_for_every_pair(tmp_path):
    latents, codebook = torch.randn(8192, 8), torch.randn(4096, 8)
    matrix = 4 * len(latents) * len(codebook)  # 128 MB
    assert peak_bytes(lambda: torch.cdist(latents, codebook).argmin(dim=1), tmp_path) >= matrix
    assert peak_bytes(lambda: nearest_codes(latents, codebook), tmp_path) < modeling_vq.CPU_LOOKUP_BYTES + 2**20


def test_no_latents_have_no_codes():
    assert nearest_codes(torch.empty(0, 8), torch.randn(4, 8)).shape == (0,)


def test_gradient_checkpointing_takes_less_memory(spread, tmp_path):
    def step() -> None:
        spread.zero_grad()
        spread(random_pictures(4)).sample.mean().backward()

    spread.train()
    plain = peak_bytes(step, tmp_path)
    spread.enable_gradient_checkpointing()
    assert peak_bytes(step, tmp_path) < 0.75 * plain


def test_slicing_gives_what_the_pictures_give_one_by_one(either):
    """Bit for bit. Against the whole batch it is up to rounding: PyTorch has other kernels for small batches."""
    pixels = random_pictures(3, 48, 80)
    seen = []
    either.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    either.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))

    @torch.no_grad()
    def everything(pixels: torch.Tensor) -> list[torch.Tensor]:
        codes = either.encode_to_indices(pixels)
        return [codes, either.encode(pixels).latents, either.decode_from_indices(codes).sample, either(pixels).sample]

    whole, loss = everything(pixels), either(pixels).commit_loss
    assert set(seen) == {3}
    one_by_one = [torch.cat(parts) for parts in zip(*(everything(one) for one in pixels.split(1)), strict=True)]
    seen.clear()
    either.enable_slicing()
    sliced = everything(pixels)
    assert set(seen) == {1} and len(seen) == 3 * 5
    assert all(torch.equal(a, b) for a, b in zip(sliced, one_by_one, strict=True))
    assert torch.equal(sliced[0], whole[0])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(sliced[1:], whole[1:], strict=True))
    assert torch.allclose(either(pixels).commit_loss, loss)
    seen.clear()
    either.disable_slicing()
    everything(pixels)
    assert set(seen) == {3}


@pytest.mark.parametrize("extent", range(1, 30))
@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (4, 1), (8, 2), (8, 4), (5, 2)])
def test_tiles_are_full_overlap_and_cover_everything_once(extent, tile, overlap):
    starts = tile_starts(extent, tile, overlap)
    if extent <= tile:
        assert starts == [0]
    else:
        assert starts[0] == 0 and starts[-1] == extent - tile
        assert all(overlap <= a + tile - b < tile for a, b in itertools.pairwise(starts))
        fewer = len(starts) - 1  # even with the least overlap they do not reach the end
        assert fewer * tile - (fewer - 1) * overlap < extent
    spans = owned_spans(starts, tile, extent)
    assert [place for span in spans for place in range(*span)] == list(range(extent))
    for place in range(extent):
        [owner] = [start for start, span in zip(starts, spans, strict=True) if place in range(*span)]
        covering = [start for start in starts if start <= place < start + tile]
        off_centre = {start: abs(place + 0.5 - start - tile / 2) for start in covering}
        assert off_centre[owner] <= min(off_centre.values()) + 1  # odd overlaps have no middle
    weights = torch.zeros(extent)
    for start, weight in zip(starts, blend_weights(starts, tile, extent), strict=True):
        assert (weight > 0).all()
        weights[start : start + tile] += weight
    torch.testing.assert_close(weights, torch.ones(extent))


def test_a_picture_of_one_tile_is_not_changed_by_tiling(either):
    pixels = random_pictures(2, 48, 64)
    codes = either.encode_to_indices(pixels)
    picture = either.decode_from_indices(codes).sample
    either.enable_tiling()
    assert torch.equal(either.encode_to_indices(pixels), codes)
    assert torch.equal(either.decode_from_indices(codes).sample, picture)


def test_tiled_codes_are_those_of_the_tile_in_which_they_lie_deepest(either):
    """11 x 4 codes in tiles of 4 that share at least 1: they begin at 0, 2, 4 and 7."""
    pixels = random_pictures(2, 176, 64)
    either.enable_tiling()
    codes = either.encode_to_indices(pixels)
    assert codes.shape == (2, 11, 4)
    either.disable_tiling()
    for start, owned in ((0, (0, 3)), (2, (3, 5)), (4, (5, 7)), (7, (7, 11))):
        window = either.encode_to_indices(pixels[:, :, 16 * start : 16 * start + 64])
        assert torch.equal(codes[:, slice(*owned)], window[:, owned[0] - start : owned[1] - start])
    assert not torch.equal(codes, either.encode_to_indices(pixels))  # normalisation sees the whole picture here


def test_tiled_pictures_are_mixed_linearly_where_tiles_overlap(either):
    """4 x 7 codes in two tiles that begin at 0 and 3: pixels 48 to 64 belong to both."""
    codes = torch.randint(64, (2, 4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        left, right = (either.decode_from_indices(codes[:, :, begin : begin + 4]).sample for begin in (0, 3))
        either.enable_tiling()
        found = either.decode_from_indices(codes).sample
        mixed = either.decode(either.indices_to_latents(codes), force_not_quantize=True).sample
    share = (torch.arange(16) + 0.5) / 16
    seam = left[..., 48:] * (1 - share) + right[..., :16] * share
    expected = torch.cat([left[..., :48], seam, right[..., 16:]], dim=3)
    assert (left[..., 48:] - right[..., :16]).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(found, mixed)


@pytest.mark.parametrize(("overlap", "same"), [(0.5, True), (0.05, False)], ids=["wide overlap", "narrow overlap"])
def test_without_global_statistics_tiles_equal_the_whole_away_from_the_rims(overlap, same):
    """92 x 92 codes in tiles of 48 that share 26 or 4; the network sees 11 codes to each side."""
    torch.manual_seed(0)
    settings = PLAIN | {"block_out_channels": (8, 8), "norm_num_groups": 8, "sample_size": 96}
    model = UniTokVQModel(**settings, mid_block_add_attention=False).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda features: features
    pixels = random_pictures(1, 192, 192)[..., :184, :184]
    with torch.no_grad():
        latents = model.encode(pixels).latents
        picture = model.decode(latents, force_not_quantize=True).sample
        model.enable_tiling()
        model.tile_overlap_factor = overlap
        tiled_latents = model.encode(pixels).latents
        tiled_picture = model.decode(latents, force_not_quantize=True).sample
    assert torch.allclose(tiled_latents, latents, rtol=0, atol=1e-6) == same
    # tiles begin at pixels 0 and 44, or 0 and 88, and have 96
    only_one_tile = (tiled_picture - picture)[..., :40, :40]
    assert only_one_tile.abs().max() < 1e-6
    assert not torch.allclose(tiled_picture, picture, rtol=0, atol=1e-6)


def test_tiling_bounds_what_the_network_sees_and_holds(tmp_path):
    torch.manual_seed(0)
    model = UniTokVQModel(**PLAIN).eval()
    pixels = random_pictures(1, 160, 208)
    sides = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: sides.append(tuple(inputs[0].shape[-2:])))
    model.decoder.register_forward_pre_hook(lambda module, inputs: sides.append(tuple(inputs[0].shape[-2:])))

    def there_and_back() -> None:
        with torch.no_grad():
            assert model.decode_from_indices(model.encode_to_indices(pixels)).sample.shape == pixels.shape

    whole = peak_bytes(there_and_back, tmp_path)
    sides.clear()
    model.enable_tiling()
    assert peak_bytes(there_and_back, tmp_path) < 0.4 * whole
    assert set(sides) == {(64, 64), (4, 4)} and len(sides) == 2 * 3 * 4


def test_tiles_that_cannot_be_are_refused(vq_model):
    vq_model.enable_tiling()
    with pytest.raises(ValueError, match="100x128"):
        vq_model.encode_to_indices(torch.zeros(1, 3, 100, 128))
    for name, value in (("tile_sample_min_size", 40), ("tile_sample_min_size", 0), ("tile_overlap_factor", 0.75)):
        before = getattr(vq_model, name)
        setattr(vq_model, name, value)
        with pytest.raises(ValueError, match=f"{name} must .* got {value}"):
            vq_model.encode_to_indices(torch.zeros(1, 3, 128, 128))
        with pytest.raises(ValueError, match=f"{name} must .* got {value}"):
            vq_model.decode_from_indices(torch.zeros(1, 8, 8, dtype=torch.int64))
        setattr(vq_model, name, before)
