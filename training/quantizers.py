"""How the codebook learns: k-means start, EMA codes, revival of dead ones, rotation trick.

None of this is part of the tokenizer: `EMACodebook` holds what only training needs and writes its result into
`vq.codebook`, where inference finds a plain Euclidean lookup.

- start: k-means on a buffer of recent latents, after the encoder has trained without quantisation for a while. The stock
  initialisation U(-1/K, 1/K) starves the rotation trick and leaves most codes far from every latent.
- EMA (arXiv:1711.00937, appendix A.1): a code is the decayed mean of the latents that chose it.
- revival: a code is dead when its decayed count falls below a fraction of the *mean* count N/K. The absolute thresholds
  of other libraries (1 or 2 per step) call every healthy code dead once a step holds fewer latents than codes, as here.
- rotation trick (arXiv:2410.06424): the gradient passes the lookup by the rotation and scaling that take the latent to
  its code, in place of the straight-through copy.

Under several processes the latents of all ranks are gathered and every rank makes the same update from them, so that
codebooks stay bit-identical without a broadcast.

Letters: N latents per step over all processes, K codes, d code width, R rows of the buffer.
"""

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from ..modeling_unitok.modeling_vq import nearest_codes


def rotate_to(latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Code vectors in value, with the gradient of the rotation trick towards the latents.

    With e a latent, q its code, R the rotation of e/||e|| onto q/||q||: returns (||q||/||e||) R e, where R and the
    ratio count as constants. Norms are floored at 1e-4.

    Args:
        latents: (N, d), receives the gradient.
        codes: (N, d), the code vector of each latent; receives none.

    Returns:
        (N, d), equal to `codes` up to rounding.
    """
    codes = codes.detach()
    e_norm = latents.detach().norm(dim=1, keepdim=True).clamp(min=1e-4)
    q_norm = codes.norm(dim=1, keepdim=True).clamp(min=1e-4)
    e_unit, q_unit = latents.detach() / e_norm, codes / q_norm
    middle = F.normalize(e_unit + q_unit, dim=1, eps=1e-4)
    reflected = latents - 2 * (latents * middle).sum(dim=1, keepdim=True) * middle
    rotated = reflected + 2 * (latents * e_unit).sum(dim=1, keepdim=True) * q_unit
    return rotated * (q_norm / e_norm)


@torch.no_grad()
def kmeans(points: torch.Tensor, k: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm from random points; an empty cluster restarts at a random point.

    Args:
        points: (N, d) with N >= k.
        generator: on the CPU, so that every device draws the same points.

    Returns:
        (k, d) centres.
    """
    draw = torch.randperm(points.shape[0], generator=generator)[:k].to(points.device)
    centres = points[draw].clone()
    for _ in range(iterations):
        nearest = nearest_codes(points, centres)
        sizes = torch.bincount(nearest, minlength=k).to(points.dtype)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = sums / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        draw = torch.randint(points.shape[0], (len(empty),), generator=generator).to(points.device)
        centres[empty] = points[draw]
    return centres


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, …) of all processes, in the order of their ranks; every process must hold as many."""
    if not torch.distributed.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class EMACodebook(nn.Module):
    """Training state of an EMA codebook.

    Args:
        num_codes: K.
        width: d.
        decay: of the moving averages, per step, in the long run; see `_decay`.
        dead_share: a code is dead when its moving count is below this fraction of the mean count.
        max_revived: at most this fraction of the codes is revived in one step.
        buffer_rows: R, latents kept for k-means and as candidates for revival; k-means wants 32 per code.
        seed: of the draws in k-means and revival, with the step number: every rank and a resumed run draw the same.

    Buffers (saved in training checkpoints):
        counts: (K,) moving average of how many latents chose each code in a step.
        sums: (K, d) moving average of their sum.
        age: (K,) steps since the code was made.
        recent: (R, d) latents of the last steps, a ring.
        position: () rows ever written into `recent`.
        tokens: () latents of the last step, N.
        started: () whether k-means has run.
        updates: () steps since then.
        window: (K,) how often each code was chosen since the last `report`; not saved.
    """

    def __init__(
        self,
        num_codes: int,
        width: int,
        decay: float = 0.99,
        dead_share: float = 0.05,
        max_revived: float = 0.02,
        buffer_rows: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.decay, self.dead_share, self.max_revived, self.seed = decay, dead_share, max_revived, seed
        rows = buffer_rows or 32 * num_codes
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, width))
        self.register_buffer("age", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(rows, width))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("window", torch.zeros(num_codes), persistent=False)
        self.pending: list[torch.Tensor] = []  # latents of the micro-batches of this step
        self.revived = 0  # codes revived since the last `report`
        self.steps = 0  # steps since the last `report`

    def observe(self, latents: torch.Tensor) -> None:
        """Keep the latents (n, d) of one micro-batch for the next `step`."""
        self.pending.append(latents.detach().float())

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def _remember(self, latents: torch.Tensor) -> None:
        rows = self.recent.shape[0]
        latents = latents[-rows:]
        where = (torch.arange(latents.shape[0], device=latents.device) + self.position) % rows
        self.recent[where] = latents
        self.position += latents.shape[0]

    @property
    def seen(self) -> torch.Tensor:
        """The filled part of `recent`, a view."""
        return self.recent[: min(int(self.position), self.recent.shape[0])]

    @torch.no_grad()
    def start(self, codebook: torch.Tensor, step: int) -> None:
        """Set the codebook (K, d) to the k-means centres of the buffer, in place.

        Raises:
            ValueError: the buffer holds fewer latents than there are codes.
        """
        seen = self.seen
        if seen.shape[0] < codebook.shape[0]:
            raise ValueError(
                f"k-means needs at least as many latents as codes, got {seen.shape[0]} for {codebook.shape[0]}; "
                "lengthen the continuous warm-up, enlarge the batch, or take a smaller codebook"
            )
        generator = self._generator(step)
        centres = kmeans(seen, codebook.shape[0], 10, generator)
        # centres that coincide (duplicate pictures) would share one cell of the space for ever
        spread = 0.01 * seen.std(dim=0)
        centres += spread * torch.randn(centres.shape, generator=generator).to(centres.device)
        shares = torch.bincount(nearest_codes(seen, centres), minlength=len(centres)) / seen.shape[0]
        self.counts.copy_(shares * self.tokens)
        self.sums.copy_(centres * self.counts[:, None])
        codebook.copy_(centres)
        self.age.zero_()
        self.started.fill_(True)

    @torch.no_grad()
    def step(self, codebook: torch.Tensor, step: int) -> None:
        """Update the codebook (K, d) in place from the latents observed since the last call.

        Args:
            step: number of the optimizer step, seeds the draws.
        """
        latents = gather_rows(torch.cat(self.pending))
        self.pending.clear()
        self._remember(latents)
        self.tokens.fill_(latents.shape[0])
        self.steps += 1
        if not self.started:
            return
        codes = nearest_codes(latents, codebook)
        counts = torch.bincount(codes, minlength=codebook.shape[0]).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
        decay = self._decay(latents.shape[0] / codebook.shape[0])
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        self.updates += 1
        self.age += 1
        self.window += counts
        alive = self.counts > 1e-8
        codebook[alive] = self.sums[alive] / self.counts[alive, None]
        self.revived += self._revive(codebook, step, latents.shape[0])

    def _decay(self, mean_count: float) -> float:
        """Decay of this step: short memory while the encoder moves fast, but never so short that it holds fewer than
        twenty latents per code, below which healthy codes would look dead by chance."""
        updates = int(self.updates)
        return min(self.decay, max(1 - mean_count / 20, (1 + updates) / (10 + updates)))

    def _revive(self, codebook: torch.Tensor, step: int, tokens: int) -> int:
        mean_count = tokens / codebook.shape[0]
        dead = (self.counts < self.dead_share * mean_count) & (self.age > 20 / mean_count)
        dead = dead.nonzero().flatten()
        dead = dead[self.counts[dead].argsort(stable=True)][: max(1, int(self.max_revived * codebook.shape[0]))]
        if len(dead) == 0:
            return 0
        generator = self._generator(step)
        newest = min(len(self.seen), max(tokens, 4 * len(dead)))
        draw = torch.randperm(newest, generator=generator)[: len(dead)].to(codebook.device)
        dead = dead[: len(draw)]
        vectors = self.recent[(self.position - 1 - draw) % self.recent.shape[0]]
        noise = torch.randn(vectors.shape, generator=generator).to(codebook.device)
        vectors = vectors + 0.01 * self.seen.std(dim=0) * noise
        codebook[dead] = vectors
        self.counts[dead] = mean_count
        self.sums[dead] = vectors * mean_count
        self.age[dead] = 0
        return len(dead)

    def report(self) -> dict[str, float]:
        """Usage and perplexity of the codes chosen since the last call, and codes revived per step; {} if none was."""
        steps, revived, chosen = self.steps, self.revived, self.window.sum()
        shares, usage = self.window / chosen.clamp(min=1), (self.window > 0).float().mean().item()
        self.steps = self.revived = 0
        self.window.zero_()
        if chosen == 0:
            return {}
        perplexity = torch.special.xlogy(shares, shares).sum().neg().exp().item()
        return {"codebook_usage": usage, "codebook_perplexity": perplexity, "codes_revived": revived / max(steps, 1)}
