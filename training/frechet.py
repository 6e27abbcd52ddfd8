"""Frechet distance of pictures and their reconstructions (arXiv:1706.08500).

    pictures (B, 3, H, W) --network--> features (B, C) --Moments--> mean and covariance --frechet_distance--> a number

- rFID is that distance on the pool features of the Inception network of the first FID, as torch-fidelity converted it
- where Inception cannot be had, the features are those of EfficientNet-Lite0, and the distance has its name. The numbers of
  the two are not comparable, nor are those of different numbers of pictures

Letters: B batch, N pictures, C features.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from .efficientnet import EfficientNetLite0


class Moments:
    """Mean and covariance of features, added batch by batch in float64: memory does not grow with their number."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, features: torch.Tensor) -> "Moments":
        """Take in features (n, C)."""
        features = features.cpu().double()
        self.count += len(features)
        self.sum = self.sum + features.sum(dim=0)
        self.products = self.products + features.T @ features
        return self

    @property
    def mean(self) -> torch.Tensor:
        """(C,)."""
        return self.sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """(C, C), of the sample.

        Raises:
            ValueError: of fewer than two features there is none.
        """
        if self.count < 2:
            raise ValueError(f"a Frechet distance needs at least two pictures, got {self.count}")
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet distance of the Gaussians with these moments; the root of the product of covariances comes from the
    eigenvalues of S1^½ S2 S1^½, which are real by construction."""
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float((first.mean - second.mean).square().sum() + traces - 2 * product)


class InceptionFeatures(nn.Module):
    """torch-fidelity's Inception v3; it resizes to 299x299 itself, as TensorFlow 1 did.

    Attributes:
        sha256: of the file of weights.

    Raises:
        ImportError: torch-fidelity or torchvision is not installed.
        OSError: the weights are not in torch's cache, and cannot be downloaded.
    """

    name = "rfid"
    title = "Inception v3 of torch-fidelity"

    def __init__(self):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        super().__init__()
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 2048) features of pictures (B, 3, H, W) in [-1, 1], rounded to 8 bits."""
        return self.network(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))[0]


class EfficientNetFeatures(EfficientNetLite0):
    """EfficientNet-Lite0; pictures are resized to 224x224, bilinear."""

    name = "frechet_efficientnet_lite0"
    title = "EfficientNet-Lite0"


EXTRACTORS = (InceptionFeatures, EfficientNetFeatures)
