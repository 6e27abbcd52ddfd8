"""How tokenizers are measured: known values, the protocol, several side by side, and the networks behind perceptual measures."""

import json
import math
import pickle
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

import unitok_hf_cli as cli
from unitok_hf import UniTokVQModel
from unitok_hf.training import efficientnet
from unitok_hf.training.collators import to_pixels
from unitok_hf.training.efficientnet import EfficientNetLite0
from unitok_hf.training.evaluation import EvaluateArguments, evaluate
from unitok_hf.training.frechet import InceptionFeatures, Moments, frechet_distance
from unitok_hf.training.perceptual import LPIPS, EfficientNetDistance, perceptual_loss
from unitok_hf.training.pretrained import first_available
from unitok_hf.training.reconstruction import ms_ssim_scales, reconstruction_scores, rounded


@pytest.fixture(autouse=True)
def torch_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch's, where torchvision and torch-fidelity look first, and no network where they look then."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def image_tokenizer(vq_model, tmp_path) -> str:
    vq_model.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_psnr_and_ssim_of_known_distortions():
    grey = torch.full((3, 3, 64, 64), 100 / 127.5 - 1)  # level 100 of 255
    distorted = grey.clone()
    distorted[1] += 10 / 127.5
    distorted[2, :, :, :32] += 20.4 / 127.5  # 20 after rounding, in half of the picture
    scores = reconstruction_scores(grey, distorted)
    errors = [10**2, 20**2 / 2]
    assert scores["psnr"].tolist() == pytest.approx([100.0] + [10 * math.log10(255**2 / error) for error in errors])
    a, b, c = 100 / 255, 110 / 255, 0.01**2  # constant pictures: SSIM is the luminance term
    assert scores["ssim"][:2].tolist() == pytest.approx([1.0, (2 * a * b + c) / (a**2 + b**2 + c)], abs=5e-4)
    assert scores["ssim"][2] < scores["ssim"][1]
    beyond = torch.full((1, 3, 64, 64), 1.7)
    assert (
        reconstruction_scores(torch.ones(1, 3, 64, 64), beyond)["psnr"].item() == 100.0
    )  # clamped as a file would be


def test_ms_ssim_has_five_scales_where_they_fit():
    assert [ms_ssim_scales(side, side) for side in (8, 16, 43, 44, 64, 98, 99, 175, 176)] == [
        1,
        2,
        2,
        3,
        3,
        3,
        4,
        4,
        5,
    ]
    for side in (41, 96, 168):  # none of which torchmetrics would take with a scale more
        assert reconstruction_scores(*torch.rand(2, 1, 3, side, side))["ms_ssim"].shape == (1,)
    pixels = torch.rand(2, 3, 192, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = F.avg_pool2d(pixels, 5, 1, 2)
    expected = multiscale_structural_similarity_index_measure(
        (rounded(blurred) + 1) / 2, (rounded(pixels) + 1) / 2, data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(reconstruction_scores(pixels, blurred)["ms_ssim"], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_tokenizer_is_measured_over_all_pictures(image_tokenizer, vq_model, parquet, pictures, tmp_path, capsys):
    file = tmp_path / "new/folder/measures.json"
    flags = ["--checkpoint", image_tokenizer, "--data_path", parquet, "--batch_size", "3"]
    cli.main(["evaluate", *flags, "--output_file", str(file)])
    measured = json.loads(file.read_text())
    [found] = measured["tokenizers"]
    pixels = torch.stack([to_pixels(picture) for picture in pictures])
    codes = vq_model.encode_to_indices(pixels)
    sample = vq_model.decode_from_indices(codes).sample
    levels = (sample.double().clamp(-1, 1) + 1) * 127.5
    errors = (levels.round() - ((pixels.double() + 1) * 127.5).round()).square().mean(dim=(1, 2, 3))
    shares = codes.flatten().bincount() / codes.numel()
    shares = shares[shares > 0].double()
    assert found["checkpoint"] == image_tokenizer
    assert found["psnr"] == pytest.approx((10 * (255**2 / errors).log10()).mean().item(), abs=1e-3)
    assert found["codebook_usage"] == pytest.approx(len(codes.unique()) / 64)
    assert found["codebook_perplexity"] == pytest.approx(shares.pow(-shares).prod().item())
    assert found["bits_per_pixel"] == 6 / 256
    assert -1 <= found["ssim"] < 1 and 0 <= found["ms_ssim"] < 1
    network = EfficientNetLite0()
    features = [network.features(rounded(x)).double() for x in (pixels, sample)]
    (mean, cov), (other, scatter) = ((x.mean(dim=0), torch.cov(x.T)) for x in features)
    values = torch.linalg.eigvals(cov @ scatter).real.clamp(min=0).sqrt().sum()
    expected = (mean - other).square().sum() + cov.trace() + scatter.trace() - 2 * values
    assert found["frechet_efficientnet_lite0"] == pytest.approx(expected.item(), rel=1e-3)
    distance = EfficientNetDistance()(rounded(sample), rounded(pixels)).mean().item()
    assert found["efficientnet_lite0_distance"] == pytest.approx(distance, rel=1e-4)

    protocol, shown = measured["protocol"], capsys.readouterr().out
    assert protocol["data_path"] == parquet and protocol["pictures"] == 8 and protocol["size"] == "64x64"
    assert protocol["frechet_weights_sha256"] == efficientnet.SHA256
    assert "no LPIPS: " in protocol["perceptual_distance"] and "no Inception" in protocol["frechet_features"]
    for name, value in protocol.items():
        assert f"{name}: {value}" in shown
    assert "lpips" not in found and "rfid" not in found


def test_several_tokenizers_are_one_table(image_tokenizer, parquet, tmp_path, capsys):
    torch.manual_seed(1)
    stock = VQModel(
        block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 3, num_vq_embeddings=16,
    )  # fmt: skip
    stock.save_pretrained(tmp_path / "stock")
    arguments = EvaluateArguments(image_tokenizer, parquet, compare=[str(tmp_path / "stock"), image_tokenizer])
    ours, other, again = evaluate(arguments)["tokenizers"]
    assert ours == again
    assert other["checkpoint"] == str(tmp_path / "stock")
    assert other["bits_per_pixel"] == 4 / 16 and other["psnr"] != ours["psnr"]
    [header, _, *rows] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and rows[0] == rows[2]
    assert [line.count("|") for line in (header, *rows)] == [header.count("|")] * 4


def test_pictures_that_do_not_divide_into_codes_are_refused_by_name(image_tokenizer, pictures, tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [picture.resize((56, 56)) for picture in pictures]}, features=features)
    rows.to_parquet(str(tmp_path / "odd.parquet"))
    with pytest.raises(ValueError, match=r"56x56 pixels do not divide .*tokenizer, which stand for 16x16"):
        evaluate(EvaluateArguments(image_tokenizer, str(tmp_path / "odd.parquet")))


def test_what_is_no_tokenizer_is_not_compared(image_tokenizer, model, parquet, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model holds no image tokenizer, but something else"):
        evaluate(EvaluateArguments(image_tokenizer, parquet, compare=[str(tmp_path / "model")]))
    with pytest.raises(ValueError, match="--compare is for tokenizers"):
        evaluate(EvaluateArguments(str(tmp_path / "model"), parquet, compare=[image_tokenizer]))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        evaluate(EvaluateArguments(image_tokenizer, parquet, compare=[str(tmp_path / "none")]))


def test_the_frechet_distance_of_gaussians_is_known():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 50_000, 3, generator=generator, dtype=torch.float64)
    second = second * 2 + 1
    whole, parts = Moments().add(first), Moments()
    for part in second.split(7_000):
        parts.add(part)
    torch.testing.assert_close(parts.covariance, torch.cov(second.T))
    # ||1||² over three dimensions, and (1 - 2)² for each
    assert frechet_distance(whole, parts) == pytest.approx(6, rel=0.03)
    assert frechet_distance(whole, whole) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        frechet_distance(whole, Moments().add(first[:1]))


def test_the_feature_network_is_whole_and_frozen():
    network = EfficientNetLite0()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.train().training


def require_distance(distance, noise) -> None:
    """Zero for the same, growing with the damage, the same in training mode, with gradients to the first picture alone."""
    smooth = F.avg_pool2d(noise, 9, 1, 4)
    values = [distance(smooth + level * noise / 2, smooth) for level in (0, 0.05, 0.1, 0.2, 0.4)]
    assert values[0].tolist() == pytest.approx([0] * len(noise), abs=1e-7)
    assert all((further > nearer).all() for nearer, further in zip(values, values[1:], strict=False))
    assert torch.equal(distance.train()(smooth, noise), distance.eval()(smooth, noise))
    pixels, target = smooth.clone().requires_grad_(), noise.clone().requires_grad_()
    distance(pixels, target).sum().backward()
    assert pixels.grad.abs().sum() > 0 and target.grad is None
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_the_feature_distance_grows_with_the_damage(noise):
    require_distance(EfficientNetDistance(), noise)


def test_the_stand_in_is_never_called_lpips(caplog):
    assert perceptual_loss("auto").name == "efficientnet_lite0_distance"
    assert "the perceptual loss is the EfficientNet-Lite0 distance (no LPIPS: " in caplog.text
    assert perceptual_loss("efficientnet_lite0").name == "efficientnet_lite0_distance"


def test_a_perceptual_loss_that_cannot_be_had_is_said_or_raised(monkeypatch, caplog):
    def missing(package: str):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(efficientnet, "files", missing)
    assert perceptual_loss("auto") is None
    assert "training WITHOUT a perceptual loss" in caplog.text and "no LPIPS" in caplog.text
    with pytest.raises(ImportError, match="no EfficientNet-Lite0 distance: .*unitok-hf.perceptual"):
        perceptual_loss("efficientnet_lite0")


def test_weights_that_were_not_checked_are_refused(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / efficientnet.WEIGHTS).write_bytes(b"something else")
    monkeypatch.setattr(efficientnet, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="is not the EfficientNet-Lite0 that was checked"):
        EfficientNetLite0()


def test_lpips_with_vgg_from_the_cache(torch_cache, noise):
    """Random weights: the arithmetic is torchmetrics', what is ours is how it is held."""
    torchvision = pytest.importorskip("torchvision", reason="PyPI has none for every CPU build of torch")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    torch.save(vgg.state_dict(), torch_cache / "vgg16-397923af.pth")
    distance = LPIPS()
    held = distance.state_dict()
    assert any(torch.equal(tensor, vgg.features[0].weight) for tensor in held.values())
    require_distance(distance, noise)
    assert perceptual_loss("auto").name == "lpips"


def test_rfid_with_inception_from_the_cache(torch_cache, noise, monkeypatch):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs torchvision")
    with monkeypatch.context() as patch:  # a network of the right shapes, to make a file of
        patch.setattr(extractor, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, weights: None)
        network = extractor.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), torch_cache / Path(extractor.URL_INCEPTION_V3).name)
    found = InceptionFeatures()
    levels = ((noise + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(found.features(noise), network(levels)[0])
    assert found.features(noise).shape == (4, 2048) and len(found.sha256) == 64


class Hostile:
    def __reduce__(self):
        return (open, ("opened", "w"))


def test_a_file_of_weights_that_runs_code_is_not_run(torch_cache, monkeypatch, tmp_path):
    pytest.importorskip("torchvision", reason="PyPI has none for every CPU build of torch")
    monkeypatch.chdir(tmp_path)
    (torch_cache / "vgg16-397923af.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(pickle.UnpicklingError):
        first_available([LPIPS])
    assert not (tmp_path / "opened").exists()


def test_a_corrupt_tokenizer_says_so(image_tokenizer, parquet):
    file = Path(image_tokenizer) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="corrupt"):
        UniTokVQModel.from_pretrained(image_tokenizer)


def test_a_pickle_in_the_place_of_weights_is_not_opened(image_tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (Path(image_tokenizer) / "diffusion_pytorch_model.safetensors").unlink()
    (Path(image_tokenizer) / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(OSError, match="safetensors"):
        UniTokVQModel.from_pretrained(image_tokenizer)
    assert not (tmp_path / "opened").exists()
