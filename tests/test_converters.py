"""Converted checkpoints: the codes and pictures of the original, whose arithmetic is written out here.

Weights are random, shapes those of the published files. Codes lie beside the latents of the test's picture, each token
has its own, and all are compared.
"""

import json
import logging
import math
import subprocess
import sys

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from unitok_hf import UniTokVQModel


F16 = (128, 128, 256, 256, 512)
F8 = (128, 256, 256, 512)
AMUSED = (128, 256, 256, 512, 768)
NARROW = (32, 64)


class Taming:
    """The VQGAN of taming-transformers with random weights.

    A weight is drawn when the arithmetic first asks for it, under the name and in the shape of the original: once a
    picture has passed, `weights` is the state dict.

    Args:
        widths: of the levels, shallow to deep.
        codes, code_width: size of the codebook.
        latent_width: `z_channels`.
        attention: whether the deepest level and the middle have it.
    """

    low, high = -1.0, 1.0  # black and white as the network sees them
    down, up, block = "encoder.down.{}", "decoder.up.{}", "block"
    middle_names = ("block_1", "attn_1", "block_2")

    def __init__(self, widths, codes, code_width, latent_width=256, attention=True):
        self.widths, self.latent_width, self.attention = widths, latent_width, attention
        self.codebook_shape = (codes, code_width)
        self.random = torch.Generator().manual_seed(0)
        self.weights = {}

    def drawn(self, name, shape, spread, centre=0.0):
        if name not in self.weights:
            self.weights[name] = torch.empty(shape).normal_(centre, spread, generator=self.random)
        return self.weights[name]

    def conv(self, name, x, width, size=3, stride=1, padding=None, bias=True, spread=1.0):
        shape = (width, x.shape[1], size, size)
        weight = self.drawn(f"{name}.weight", shape, spread * (x.shape[1] * size**2) ** -0.5)
        shift = self.drawn(f"{name}.bias", (width,), 0.1) if bias else None
        return F.conv2d(x, weight, shift, stride, size // 2 if padding is None else padding)

    def norm(self, name, x):
        scale = self.drawn(f"{name}.weight", (x.shape[1],), 0.1, 1.0)
        shift = self.drawn(f"{name}.bias", (x.shape[1],), 0.1)
        grouped = x.unflatten(1, (32, -1))
        centred = grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)
        variance = centred.square().mean(dim=(2, 3, 4), keepdim=True)
        return (centred / (variance + 1e-6).sqrt()).flatten(1, 2) * scale[:, None, None] + shift[:, None, None]

    def active(self, name, x):
        x = self.norm(name, x)
        return x * torch.sigmoid(x)

    def residual(self, name, x, width):
        h = self.conv(f"{name}.conv1", self.active(f"{name}.norm1", x), width)
        h = self.conv(f"{name}.conv2", self.active(f"{name}.norm2", h), width)
        return h + (x if x.shape[1] == width else self.conv(f"{name}.nin_shortcut", x, width, 1))

    def attend(self, name, x):
        normed = self.norm(f"{name}.norm", x)
        query, key, value = (self.conv(f"{name}.{part}", normed, x.shape[1], 1).flatten(2) for part in "qkv")
        share = torch.einsum("bci,bcj->bij", query, key).div(math.sqrt(x.shape[1])).softmax(dim=2)
        mixed = torch.einsum("bij,bcj->bci", share, value).view(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed, x.shape[1], 1)

    def level(self, name, x, width, blocks, deepest):
        for i in range(blocks):
            x = self.residual(f"{name}.{self.block}.{i}", x, width)
            if deepest and self.attention:
                x = self.attend(f"{name}.attn.{i}", x)
        return x

    def middle(self, name, x):
        before, between, after = (f"{name}.mid.{part}" for part in self.middle_names)
        x = self.residual(before, x, x.shape[1])
        if self.attention:
            x = self.attend(between, x)
        return self.residual(after, x, x.shape[1])

    def up_index(self, level):
        return level

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, self.widths[0])
        for level, width in enumerate(self.widths):
            deepest = level == len(self.widths) - 1
            x = self.level(self.down.format(level), x, width, 2, deepest)
            if not deepest:  # one row and one column of zeros, below and on the right
                x = F.pad(x, (0, 1, 0, 1))
                x = self.conv(f"{self.down.format(level)}.downsample.conv", x, width, stride=2, padding=0)
        x = self.active("encoder.norm_out", self.middle("encoder", x))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, self.latent_width), self.codebook_shape[1], 1)

    def decode(self, z):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, self.latent_width, 1), self.widths[-1])
        x = self.middle("decoder", x)
        for level, width in reversed(list(enumerate(self.widths))):
            name = self.up.format(self.up_index(level))
            x = self.level(name, x, width, 3, level == len(self.widths) - 1)
            if level:
                x = self.conv(f"{name}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), width)
        return self.conv("decoder.conv_out", self.active("decoder.norm_out", x), 3, spread=0.5)

    def codebook(self, rows):
        """The codes, (K, d): drawn at first, some of them beside the given latents."""
        if "quantize.embedding.weight" not in self.weights:
            spread = rows.std(dim=0)
            codes = rows.mean(dim=0) + 3 * spread * torch.randn(self.codebook_shape, generator=self.random)
            places = torch.randperm(len(codes), generator=self.random)[: len(rows)]
            codes[places] = rows + 0.05 * spread * torch.randn(rows.shape, generator=self.random)
            self.weights["quantize.embedding.weight"] = codes
        return self.weights["quantize.embedding.weight"]

    def nearest(self, rows):
        """Codes of latents (N, d), and their vectors."""
        book = self.codebook(rows)
        codes = torch.cdist(rows.double(), book.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
        return codes, book[codes]

    @torch.no_grad()
    def __call__(self, pixels):
        """Codes (B, h, w) and pictures in [-1, 1] of pictures in [-1, 1]."""
        z = self.encode((pixels + 1) / 2 * (self.high - self.low) + self.low)
        codes, vectors = self.nearest(z.permute(0, 2, 3, 1).flatten(0, 2))
        pictures = self.decode(vectors.view(*z.shape[:1], *z.shape[2:], -1).permute(0, 3, 1, 2))
        return codes.view(z.shape[0], *z.shape[2:]), (pictures - self.low) / (self.high - self.low) * 2 - 1


class LlamaGen(Taming):
    """LlamaGen's tokenizer: other names, decoder levels counted from the deepest, codes nearest in angle."""

    down, up, block = "encoder.conv_blocks.{}", "decoder.conv_blocks.{}", "res"
    middle_names = ("0", "1", "2")

    def up_index(self, level):
        return len(self.widths) - 1 - level

    def codebook(self, rows):
        if "quantize.embedding.weight" not in self.weights:
            lengths = torch.rand(self.codebook_shape[0], 1, generator=self.random) + 0.5
            self.weights["quantize.embedding.weight"] = super().codebook(rows) * lengths
            self.weights["quantize.codebook_used"] = torch.zeros(65536)
        return self.weights["quantize.embedding.weight"]

    def nearest(self, rows):
        book = self.codebook(rows)
        book = book / book.norm(dim=1, keepdim=True)
        codes = (rows.double() @ book.double().T).argmax(dim=1)
        return codes, book[codes]


class OpenMuse(Taming):
    """open-muse's VQGANModel: taming's network, attention optional, pictures in [0, 1]."""

    low, high = 0.0, 1.0


class MaskGit(OpenMuse):
    """open-muse's port of MaskGIT's tokenizer, which shares little but the residual blocks."""

    def residual(self, name, x, width):
        h = self.conv(f"{name}.conv1", self.active(f"{name}.norm1", x), width, bias=False)
        h = self.conv(f"{name}.conv2", self.active(f"{name}.norm2", h), width, bias=False)
        return h + (x if x.shape[1] == width else self.conv(f"{name}.nin_shortcut", h, width, 1, bias=False))

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, self.widths[0], bias=False)
        for level, width in enumerate(self.widths):
            x = self.level(f"encoder.down.{level}", x, width, 2, False)
            if level < len(self.widths) - 1:
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        for i in range(2):
            x = self.residual(f"encoder.mid.{i}", x, x.shape[1])
        return self.conv("encoder.conv_out", self.active("encoder.norm_out", x), self.codebook_shape[1], 1)

    def decode(self, z):
        x = self.conv("decoder.conv_in", z, self.widths[-1])
        for i in range(2):
            x = self.residual(f"decoder.mid.{i}", x, x.shape[1])
        for level, width in reversed(list(enumerate(self.widths))):
            x = self.level(f"decoder.up.{level}", x, width, 2, False)
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.up.{level}.upsample_conv", x, width)
        return self.conv("decoder.conv_out", self.active("decoder.norm_out", x), 3, spread=0.5)


def picture(height: int, width: int) -> torch.Tensor:
    """A picture (1, 3, height, width) of noise in [-1, 1], another colour in every 8x8: no two tokens are alike."""
    random = torch.Generator().manual_seed(1)
    colours = (
        torch.rand(1, 3, height // 8, width // 8, generator=random).repeat_interleave(8, 2).repeat_interleave(8, 3)
    )
    return (colours + torch.rand(1, 3, height, width, generator=random)) - 1


def lightning(weights: dict, path) -> str:
    """A file as the training of taming-transformers leaves it."""
    losses = {"loss.perceptual_loss.lin0.weight": torch.ones(2), "loss.discriminator.main.0.bias": torch.ones(2)}
    torch.save({"epoch": 3, "state_dict": weights | losses, "optimizer_states": [{"state": {}}]}, path / "last.ckpt")
    return str(path / "last.ckpt")


def training_file(weights: dict, path) -> str:
    """A file as the training of LlamaGen leaves it: the model, its average, and more."""
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"model": other, "ema": weights, "discriminator": {"bias": torch.ones(2)}, "steps": 5}, path / "5.pt")
    return str(path / "5.pt")


def published_file(weights: dict, path) -> str:
    """A file as LlamaGen publishes it."""
    torch.save({"model": weights}, path / "vq.pt")
    return str(path / "vq.pt")


def folder(weights: dict, path) -> str:
    """A folder as open-muse writes it."""
    (path / "config.json").write_text('{"_class_name": "MaskGitVQGAN"}')
    torch.save(weights, path / "pytorch_model.bin")
    return str(path)


def safetensors(weights: dict, path) -> str:
    """A safetensors file."""
    save_file(weights, path / "model.safetensors")
    return str(path / "model.safetensors")


def assert_same(original: Taming, convert, write, pixels: torch.Tensor, path) -> UniTokVQModel:
    """Ours and, from our folder, stock diffusers give the original's codes, and pictures within 1e-4."""
    codes, pictures = original(pixels)
    assert len(codes.unique()) == codes.numel()
    ours = convert(write(original.weights, path))
    assert not ours.training
    assert torch.equal(ours.encode_to_indices(pixels), codes)
    with torch.no_grad():
        assert (ours.decode_from_indices(codes).sample - pictures).abs().max() < 1e-4
    ours.save_pretrained(path / "ours")
    stock = diffusers.VQModel.from_pretrained(path / "ours").eval()
    scale = (original.high - original.low) / 2
    with torch.no_grad():
        latents = stock.encode((pixels + 1) * scale + original.low).latents
        assert torch.equal(stock.quantize(latents)[2][2].view(codes.shape), codes)
        assert (stock.decode(latents).sample - ((pictures + 1) * scale + original.low)).abs().max() < 1e-4
    return ours


PUBLISHED = {
    "taming 16,384": (lambda: Taming(F16, 16384, 256), UniTokVQModel.from_taming, lightning),
    "taming 1,024": (lambda: Taming(F16, 1024, 256), UniTokVQModel.from_taming, safetensors),
    "llamagen VQ-16": (lambda: LlamaGen(F16, 16384, 8), UniTokVQModel.from_llamagen, published_file),
    "llamagen VQ-8": (lambda: LlamaGen(F8, 16384, 8), UniTokVQModel.from_llamagen, published_file),
    "maskgit": (lambda: MaskGit(F16, 1024, 256), UniTokVQModel.from_open_muse, folder),
    "open-muse": (lambda: OpenMuse(AMUSED, 8192, 64, 64, attention=False), UniTokVQModel.from_open_muse, safetensors),
}
SMALL = {
    "taming": (lambda: Taming((32, 64, 64), 512, 16, 32), UniTokVQModel.from_taming, lightning),
    "llamagen": (lambda: LlamaGen((32, 64, 64), 512, 8, 32), UniTokVQModel.from_llamagen, training_file),
    "maskgit": (lambda: MaskGit((32, 64, 64), 512, 16), UniTokVQModel.from_open_muse, folder),
    "open-muse": (lambda: OpenMuse((32, 64, 64), 512, 16, 32), UniTokVQModel.from_open_muse, safetensors),
}


@pytest.mark.parametrize("name", ["taming 16,384", "llamagen VQ-8"])
def test_published_shapes_give_the_codes_and_pictures_of_the_original(name, tmp_path):
    original, convert, write = PUBLISHED[name]
    assert_same(original(), convert, write, picture(32, 48), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_give_the_codes_and_pictures_of_the_original_at_256_pixels(name, tmp_path):
    original, convert, write = PUBLISHED[name]
    assert_same(original(), convert, write, picture(256, 256), tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_widths_and_levels_are_read_from_the_shapes(name, tmp_path):
    original, convert, write = SMALL[name]
    model = assert_same(original(), convert, write, picture(24, 40), tmp_path)
    assert (model.downsampling, model.config.num_vq_embeddings, model.config.sample_size) == (4, 512, 256)


def test_the_size_of_the_training_pictures_is_the_callers(tmp_path):
    original = MaskGit(NARROW, 64, 16)
    original(picture(8, 8))
    assert UniTokVQModel.from_open_muse(folder(original.weights, tmp_path), sample_size=64).config.sample_size == 64


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_llamagen_codes_do_not_suffer_from_long_or_short_latents(length, tmp_path):
    original = LlamaGen(NARROW, 16384, 8)
    original(picture(16, 16))
    for part in ("weight", "bias"):
        original.weights[f"quant_conv.{part}"] *= length
    features = torch.randn(1, 256, 32, 32, generator=torch.Generator().manual_seed(2))
    rows = original.conv("quant_conv", features, 8, 1).permute(0, 2, 3, 1).flatten(0, 2)
    codes, vectors = original.nearest(rows)
    ours = UniTokVQModel.from_llamagen(published_file(original.weights, tmp_path))
    ours.save_pretrained(tmp_path / "ours")
    stock = diffusers.VQModel.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        latents = ours.quant_conv(features)
        assert 0.2 < latents.norm(dim=1).mean() < 5
        for model in (ours, stock):
            assert (model.quantize(latents)[2][2] == codes).double().mean() >= 0.9999
        assert torch.allclose(stock.quantize.embedding(codes), vectors)
        unscaled = (stock.quantize(latents * (1e5 / latents.norm(dim=1).mean()))[2][2] == codes).double().mean()
    assert unscaled < 0.95  # what the scale is for


def stock_model(**settings) -> diffusers.VQModel:
    """A stock tokenizer whose codes are latents of the test's picture in [0, 1]."""
    torch.manual_seed(0)
    settings = {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 8,
        "num_vq_embeddings": 96,
        "mid_block_add_attention": False,
        **settings,
    }
    model = diffusers.VQModel(**settings).eval()
    with torch.no_grad():
        rows = model.encode((picture(16, 24) + 1) / 2).latents.permute(0, 2, 3, 1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(rows)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"lookup_from_codebook": True, "force_upcast": True},
        {"lookup_from_codebook": True, "mid_block_add_attention": True},
        {"norm_type": "spatial", "vq_embed_dim": 8},
        {
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
            "layers_per_block": 2,
        },
    ],
    ids=["amused", "attention", "movq", "attention in levels"],
)
@torch.no_grad()
def test_folders_of_stock_diffusers_load_as_they_are(settings, tmp_path):
    stock = stock_model(**settings)
    stock.save_pretrained(tmp_path)
    pixels = picture(16, 24)
    latents = stock.encode((pixels + 1) / 2).latents
    codes = stock.quantize(latents)[2][2].view(1, 8, 12)
    pictures = stock.decode(latents).sample * 2 - 1
    assert len(codes.unique()) == 96
    for ours in (
        UniTokVQModel.from_pretrained(tmp_path, pixel_range=(0, 1), sample_size=256),
        UniTokVQModel.from_open_muse(tmp_path),
    ):
        assert torch.equal(ours.encode_to_indices(pixels), codes)
        assert (ours.decode_from_indices(codes).sample - pictures).abs().max() < 1e-4
        if ours.config.lookup_from_codebook:  # as aMUSEd's pipelines call it
            shape = (1, 8, 12, ours.config.latent_channels)
            assert (ours.decode(codes, force_not_quantize=True, shape=shape).sample - pictures).abs().max() < 1e-4
        ours.save_pretrained(tmp_path / "again")
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert {name: config[name] for name in settings} == settings
        assert (config["sample_size"], config["pixel_range"]) == (256, [0, 1])
        again = UniTokVQModel.from_pretrained(tmp_path / "again")
        assert torch.equal(again.encode_to_indices(pixels), codes)


@torch.no_grad()
def test_a_stock_folder_of_an_older_diffusers_loads(tmp_path):
    stock = stock_model(mid_block_add_attention=True)
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for later in ("norm_type", "mid_block_add_attention", "lookup_from_codebook", "force_upcast", "scaling_factor"):
        del config[later]
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = picture(16, 24)
    codes = stock.quantize(stock.encode(pixels).latents)[2][2].view(1, 8, 12)
    assert torch.equal(UniTokVQModel.from_pretrained(tmp_path).encode_to_indices(pixels), codes)


@pytest.mark.parametrize("pixel_range", [(1, 0), (0, 0), (0, 1, 2), (0, float("nan"))], ids=str)
def test_a_pixel_range_that_is_none_is_refused(pixel_range):
    with pytest.raises(ValueError, match="pixel_range must be a lower and a higher number"):
        UniTokVQModel(pixel_range=pixel_range)


@pytest.fixture(scope="module")
def taming() -> dict[str, torch.Tensor]:
    """Weights of a small network of taming-transformers."""
    original = Taming(NARROW, 64, 16, 32)
    original(picture(8, 8))
    return original.weights


@pytest.fixture(scope="module")
def llamagen() -> dict[str, torch.Tensor]:
    """Weights of a small network of LlamaGen."""
    original = LlamaGen(NARROW, 64, 8, 32)
    original(picture(8, 8))
    return original.weights


def test_what_is_left_out_is_in_the_log(taming, llamagen, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    UniTokVQModel.from_taming(lightning(taming, tmp_path))
    assert "left out 2 tensors of loss.discriminator, loss.perceptual_loss" in caplog.text
    UniTokVQModel.from_llamagen(published_file(llamagen, tmp_path))
    assert "left out 1 tensors of quantize.codebook_used" in caplog.text


def test_half_precision_weights_become_fp32(taming, tmp_path):
    halves = {name: tensor.half() for name, tensor in taming.items()}
    model = UniTokVQModel.from_taming(safetensors(halves, tmp_path))
    assert model.dtype == torch.float32
    assert torch.equal(model.codebook, halves["quantize.embedding.weight"].float())


class Callback:
    """What Lightning pickles beside the weights, and what would run if it were unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


def test_pickled_objects_are_refused_with_a_command_that_leaves_them_out(taming, tmp_path):
    trace = tmp_path / "it ran"
    objects = {Callback: {"best": Callback(trace)}}
    torch.save({"state_dict": taming, "callbacks": objects}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="holds pickled objects besides tensors .*exec.*Callback") as refusal:
        UniTokVQModel.from_taming(tmp_path / "last.ckpt")
    command = str(refusal.value).splitlines()[-1]
    assert command.startswith("python -c")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd="/")
    model = UniTokVQModel.from_taming(tmp_path / "last.weights.pt")
    assert torch.equal(model.codebook, taming["quantize.embedding.weight"])
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
        ("empty.ckpt", b""),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1"),
        ("cut.pth", b"PK\x03\x04 and then nothing"),
    ],
)
def test_damaged_files_say_so(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        UniTokVQModel.from_taming(tmp_path / name)


def test_files_that_are_not_there_say_so(tmp_path):
    for path in (tmp_path / "no.ckpt", tmp_path / "no.safetensors"):
        with pytest.raises(FileNotFoundError, match=path.name):
            UniTokVQModel.from_taming(path)
    with pytest.raises(FileNotFoundError, match="holds no file of weights"):
        UniTokVQModel.from_taming(tmp_path)


def test_of_several_files_in_a_folder_the_safetensors_file_is_taken(taming, tmp_path):
    lightning({}, tmp_path)
    safetensors(taming, tmp_path)
    assert torch.equal(UniTokVQModel.from_taming(tmp_path).codebook, taming["quantize.embedding.weight"])
    save_file(taming, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="several files of weights, model.safetensors and other.safetensors"):
        UniTokVQModel.from_taming(tmp_path)


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], torch.ones(2), {"epoch": 3}, {}], ids=["list", "tensor", "number", "empty"]
)
def test_files_without_weights_say_so(content, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="file.pt (holds no weights|is of another layout)"):
        UniTokVQModel.from_taming(tmp_path / "file.pt")


def refused(convert, weights, path, message):
    with pytest.raises(ValueError, match=message):
        convert(safetensors(weights, path))


def test_checkpoints_of_another_layout_are_refused(taming, llamagen, tmp_path):
    refused(UniTokVQModel.from_taming, llamagen, tmp_path, "has 52 tensors .*: decoder.mid.0.conv1.bias, ")
    refused(UniTokVQModel.from_llamagen, taming, tmp_path, "has 52 tensors .*: decoder.mid.attn_1.k.bias, ")
    refused(
        UniTokVQModel.from_taming, {"visual.proj": torch.ones(2)}, tmp_path, "another layout: .* it has visual.proj$"
    )
    ours = UniTokVQModel.from_taming(safetensors(taming, tmp_path)).state_dict()
    refused(UniTokVQModel.from_llamagen, ours, tmp_path, "names of a diffusers VQModel; load its folder")
    gumbel = {name.replace("embedding", "embed"): tensor for name, tensor in taming.items()}
    refused(UniTokVQModel.from_taming, gumbel, tmp_path, "another layout: it lacks 'quantize.embedding.weight'")


def test_tensors_too_many_too_few_or_too_large_are_named(taming, tmp_path):
    convert = UniTokVQModel.from_taming
    refused(
        convert, taming | {"decoder.extra.weight": torch.ones(2)}, tmp_path, "has 1 tensors .*: decoder.extra.weight$"
    )
    refused(convert, taming | {"quantize.used": torch.ones(2)}, tmp_path, "has 1 tensors .*: quantize.used$")
    deep = {name: tensor for name, tensor in taming.items() if not name.startswith("decoder.up.1.block.2.conv")}
    refused(convert, deep, tmp_path, "lacks 4 tensors .*: decoder.up_blocks.0.resnets.2.conv1.weight, ")
    wide = taming | {"decoder.conv_in.weight": torch.ones(64, 33, 3, 3)}
    refused(convert, wide, tmp_path, r"decoder.conv_in.weight .* \(64, 33, 3, 3\), .* \(64, 32, 3, 3\)")
    hollow = taming | {"quant_conv.bias": torch.full((16,), float("nan"))}
    refused(convert, hollow, tmp_path, "quant_conv.bias .* not finite")
    grey = taming | {"encoder.conv_in.weight": torch.ones(32, 1, 3, 3)}
    refused(convert, grey, tmp_path, "got 1 and 3")
