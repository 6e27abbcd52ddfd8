"""What the log of the tokenizer's training says about its health, and when it warns.

    collapse        the perplexity of the codes falls below 5 % of the codebook
    discriminator   it tells more than 95 % of the patches apart, for long, while the tokenizer learns from it
    norms           latents or codes grow so long that fp32 distances pick other codes

Measures are taken in the forward pass and stay on the device; they are read, judged and logged every `logging_steps`.
Perplexity is judged over at least 20,000 latents, however short the intervals of the log: a few hundred latents cannot
show more than a few hundred codes. Every kind of warning is given once.
"""

import logging

import torch

from ..modeling_unitok.modeling_vq import usage_and_perplexity
from .quantizers import Quantizer


logger = logging.getLogger(__name__)

COLLAPSED = 0.05  # of the codebook
JUDGED_LATENTS = 20_000
WINNING = 0.95
LONG_NORM = (
    100.0  # fp32 lookups of 16,384 unit codes agree with fp64 to 99.9 % at this norm, to 99.6 % at ten times it
)


@torch.no_grad()
def latent_measures(latents: torch.Tensor, vectors: torch.Tensor, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """Norms of latents and how far their codes are.

    Args:
        latents: (N, width of the table), as the encoder made them.
        vectors: (N, width of the table), their code vectors.
        quantizer: what chose them; with l2 the distance is that of unit vectors.

    Returns:
        scalars `latent_norm`, `latent_norm_max`, and `commitment_ratio`, the mean over latents of the distance to the
        code in units of the latent's norm (0 while nothing is quantised).
    """
    latents, vectors = latents.detach()[:, : quantizer.width], vectors.detach()[:, : quantizer.width]
    norms, compared = latents.norm(dim=1), quantizer.unit(latents)
    return {
        "latent_norm": norms.mean(),
        "latent_norm_max": norms.max(),
        "commitment_ratio": ((compared - vectors).norm(dim=1) / compared.norm(dim=1).clamp(min=1e-8)).mean(),
    }


class HealthWatch:
    """Judges what is logged, and warns once per kind."""

    def __init__(self):
        self.chosen: torch.Tensor | float = 0.0  # (K,) how often each code was chosen since the last judgement
        self.won = 0  # steps in a row that the discriminator has won
        self.given: set[str] = set()

    def check(self, logs: dict[str, float], window: torch.Tensor, steps: int, max_steps: int) -> None:
        """Look at the log of an interval.

        Args:
            logs: what was logged of it.
            window: (K,) how often each code was chosen in it.
            steps: how many steps it had.
            max_steps: of the run. The discriminator may win for a twentieth of them, at least 50 and at most 1,000.
        """
        self._check_collapse(window)
        self._check_discriminator(logs, steps, patience=min(1000, max(50, max_steps // 20)))
        for kind in ("latent", "code"):
            norm = logs.get(f"{kind}_norm", 0.0)
            if norm > LONG_NORM:
                self._warn(
                    f"{kind} norms",
                    f"{kind}s have a mean norm of {norm:.4g}; beyond {LONG_NORM:g}, distances in fp32 pick other codes "
                    "now and then. Lower --learning_rate, raise --commitment_weight, or take --codebook_norm l2, whose "
                    "latents are looked up as unit vectors",
                )

    def _check_collapse(self, window: torch.Tensor) -> None:
        self.chosen = self.chosen + window
        total, codes = self.chosen.sum(), len(window)
        if total < JUDGED_LATENTS:
            return
        perplexity = usage_and_perplexity(self.chosen)["perplexity"]
        self.chosen = 0.0
        if perplexity < COLLAPSED * codes:
            self._warn(
                "collapse",
                f"the codebook has collapsed: the last {int(total):,} latents use it with a perplexity of "
                f"{perplexity:.1f}, {perplexity / codes:.1%} of {codes:,} codes. The pictures may be too much alike; "
                "otherwise lower --learning_rate or lengthen --continuous_fraction",
            )

    def _check_discriminator(self, logs: dict[str, float], steps: int, patience: int) -> None:
        winning = "adversarial" in logs and logs["discriminator_accuracy"] > WINNING
        self.won = self.won + steps if winning else 0
        if self.won >= patience:
            self._warn(
                "discriminator",
                f"the discriminator wins: it tells {logs['discriminator_accuracy']:.1%} of the patches apart, more than "
                f"{WINNING:.0%} for {self.won} steps, and the tokenizer learns little from it. Lower "
                "--discriminator_learning_rate or raise --lecam_weight",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.given:
            self.given.add(kind)
            logger.warning(message)
