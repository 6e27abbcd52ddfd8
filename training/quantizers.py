"""How a codebook learns: four modes behind one interface, `Quantizer`.

None of this is part of the tokenizer. A quantizer holds what only training needs, and after every optimizer step
`vq.codebook` is a plain Euclidean lookup table, which training itself uses too (`nearest_codes`):

    mode    what learns                                   the table
    ema     nothing by gradient: moving means of latents  the means (arXiv:1711.00937, appendix A.1)
    grad    the codes                                     the codes (ibid., equation 3)
    simvq   a matrix W over a fixed base                  base Wᵀ (arXiv:2411.02038)
    ibq     the codes, all of them at every step          [codes, sqrt(M² - |code|²)] (arXiv:2412.02692)

`codebook_norm` l2 makes latents and codes unit vectors (arXiv:2110.04627): the decoder sees unit codes, and as those are
in the table, the Euclidean nearest code of the raw latent is the one of the largest cosine. `ibq` chooses by the largest
dot product; without l2 that needs one more column, with which |z - code|² = |z|² + M² - 2 z·code (M the largest norm of a
code), and latents that are 0 there.

What the modes share:

- start: k-means on a buffer of recent latents, after the encoder has trained without quantisation for a while. The stock
  initialisation U(-1/K, 1/K) starves the rotation trick and leaves most codes far from every latent.
- revival: a code is dead when the moving count of its latents falls below a fraction of the *mean* count N/K. The
  absolute thresholds of other libraries (1 or 2 per step) call every healthy code dead once a step holds fewer latents
  than codes, as here. In `simvq` a revived code gets a new row in the base, the one that W takes to the wanted place.
- gradients pass the lookup by the rotation trick (arXiv:2410.06424): the rotation and scaling that take the latent to its
  code; or straight through. In `ibq` straight-through is meant of the one-hot choice, see `index_backpropagation`; with
  rotation the encoder gets the rotated gradient, the codes that of the choice.

Two departures: `simvq` starts with the k-means centres as base and the identity as W, not with Gaussian rows, which do
worse; the entropy loss of `ibq` has the softmax of its gradient, not one that is a hundred times sharper, which for
latents of unit variance would be a choice without gradient.

Under several processes the latents of all ranks are gathered and every rank makes the same update from them. Sums over
latents, which a GPU adds up in no fixed order, are those of the first rank, so that codebooks stay bit-identical.

Letters: N latents per step over all processes, K codes, d code width, R rows of the buffer.
"""

from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from ..modeling_unitok.modeling_vq import full_fp32, nearest_codes, usage_and_perplexity
from .index_backpropagation import BLOCK_BYTES, IndexBackpropagation, IndexEntropy


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


def straight_through(latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Code vectors (N, d) in value, with their gradient passed on to the latents as it is; as `rotate_to`."""
    return latents + (codes - latents).detach()


NORMS = ("none", "l2")
ESTIMATORS = {"rotation": rotate_to, "straight_through": straight_through}


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


def of_first_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of the first process, in place on all others."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, 0)
    return tensor


class Quantized(NamedTuple):
    """What a quantizer makes of latents.

    vectors: (N, width of the table), the code vectors, with the gradient of the mode; for the decoder.
    commitment: mean squared distance of latents to their codes, with a gradient to the latents alone.
    codebook_loss: what moves the codes, at weight 1; 0 where no gradient does.
    """

    vectors: torch.Tensor
    commitment: torch.Tensor
    codebook_loss: torch.Tensor


class Quantizer(nn.Module):
    """What the training of a codebook remembers; the modes extend it.

    Args:
        num_codes: K.
        width: d.
        norm: one of `NORMS`; l2 for unit vectors.
        estimator: one of `ESTIMATORS`.
        decay: of the moving averages, per step, in the long run; see `_decay`.
        dead_share: a code is dead when its moving count is below this fraction of the mean count. The count remembers at
            least twenty latents of an average code, so that chance alone does not take a healthy one there.
        max_revived: at most this fraction of the codes is revived in one step.
        buffer_rows: R, latents kept for k-means and as candidates for revival; k-means wants 32 per code.
        seed: of the draws in k-means and revival, with the step number: every rank and a resumed run draw the same.

    Buffers (saved in training checkpoints):
        counts: (K,) moving average of how many latents chose each code in a step.
        age: (K,) steps since the code was made.
        recent: (R, d) latents of the last steps, a ring; as the encoder made them, also with l2.
        position: () rows ever written into `recent`.
        tokens: () latents of the last step, N.
        started: () whether k-means has run.
        updates: () steps since then.
        window: (K,) how often each code was chosen since the last `report`; not saved.
    """

    learns_table = False  # whether the optimizer moves the table itself
    extra_columns = 0  # of the table, beyond d

    def __init__(
        self,
        num_codes: int,
        width: int,
        norm: str = "none",
        estimator: str = "rotation",
        decay: float = 0.99,
        dead_share: float = 0.25,
        max_revived: float = 0.02,
        buffer_rows: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.width, self.norm, self.estimator = width, norm, estimator
        self.decay, self.dead_share, self.max_revived, self.seed = decay, dead_share, max_revived, seed
        rows = buffer_rows or 32 * num_codes
        self.register_buffer("counts", torch.zeros(num_codes))
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

    def unit(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents or codes (n, d) as the mode sees them: unit vectors with l2, else as they are."""
        return F.normalize(rows, dim=1, eps=1e-6) if self.norm == "l2" else rows

    def widen(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents (n, d) with a 0 in every extra column of the table."""
        return F.pad(rows, (0, self.extra_columns)) if self.extra_columns else rows

    def forward(self, latents: torch.Tensor, codebook: torch.Tensor) -> Quantized:
        """Pass latents through the lookup; in fp32, also under autocast.

        Args:
            latents: (N, width of the table).
            codebook: the table.
        """
        with torch.autocast(latents.device.type, enabled=False):
            latents = self.unit(latents.float()[:, : self.width])
            if not self.started:  # DDP wants to see every parameter that will learn
                idle = sum((0 * parameter.sum() for parameter in self.learned(codebook)), latents.new_zeros(()))
                return Quantized(self.widen(latents), latents.new_zeros(()), idle)
            vectors, commitment, codebook_loss = self._quantize(latents, codebook)
            return Quantized(self.widen(vectors), commitment, codebook_loss)

    def _quantize(self, latents: torch.Tensor, codebook: torch.Tensor) -> Quantized:
        codes = nearest_codes(self.widen(latents), codebook)
        chosen = self.vectors(codes, codebook)  # (N, d)
        moves = F.mse_loss(chosen, latents.detach()) if chosen.requires_grad else latents.new_zeros(())
        passed = ESTIMATORS[self.estimator](latents, chosen.detach())
        return Quantized(passed, F.mse_loss(latents, chosen.detach()), moves)

    def learned(self, codebook: torch.Tensor) -> list[torch.Tensor]:
        """What the optimizer moves, to make the codes."""
        return [*self.parameters()] + ([codebook] if self.learns_table else [])

    def vectors(self, codes: torch.LongTensor, codebook: torch.Tensor) -> torch.Tensor:
        """Vectors (n, d) of codes (n,), with a gradient to what is learned."""
        return self.unit(codebook[codes])

    def lookup(self, latents: torch.Tensor, codebook: torch.Tensor) -> torch.LongTensor:
        """Codes (n,) of latents (n, width of the table) by the definition of the mode, not by the table's distances:
        what an exported tokenizer is held against."""
        return nearest_codes(self.unit(latents[:, : self.width]), self.unit(codebook[:, : self.width]))

    def refresh(self, codebook: torch.Tensor) -> None:
        """Make the table of what the optimizer has moved, in place."""

    def place(self, codebook: torch.Tensor, codes: torch.LongTensor, vectors: torch.Tensor) -> None:
        """Put codes (n,) at vectors (n, d), in place."""
        codebook[codes] = vectors

    def candidates(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents (n, d) as places for codes."""
        return self.unit(rows)

    @property
    def scale(self) -> torch.Tensor:
        """Size of the latents in the buffer: their standard deviation, with l2 their mean norm."""
        return self.seen.norm(dim=1).mean() if self.norm == "l2" else self.seen.std()

    def observe(self, latents: torch.Tensor) -> None:
        """Keep the latents (n, d) of one micro-batch for the next `step`."""
        self.pending.append(latents[:, : self.width].detach().float())

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
        """Set the table to the k-means centres of the buffer, in place.

        Raises:
            ValueError: the buffer holds fewer latents than there are codes.
        """
        if self.seen.shape[0] < codebook.shape[0]:
            raise ValueError(
                f"k-means needs at least as many latents as codes, got {self.seen.shape[0]} for {codebook.shape[0]}; "
                "lengthen the continuous warm-up, enlarge the batch, or take a smaller codebook"
            )
        seen = self.candidates(self.seen)
        generator = self._generator(step)
        centres = kmeans(seen, codebook.shape[0], 10, generator)
        # centres that coincide (duplicate pictures) would share one cell of the space for ever
        spread = 0.01 * seen.std(dim=0)
        centres += spread * torch.randn(centres.shape, generator=generator).to(centres.device)
        centres = of_first_rank(self.candidates(centres).contiguous())
        shares = torch.bincount(nearest_codes(seen, centres), minlength=len(centres)) / seen.shape[0]
        self.counts.copy_(shares * self.tokens)
        self.place(codebook, torch.arange(len(centres), device=centres.device), centres)
        self.age.zero_()
        self.started.fill_(True)

    @torch.no_grad()
    def step(self, codebook: torch.Tensor, step: int) -> torch.LongTensor:
        """Bring the table up to date, in place, after an optimizer step, from the latents observed since the last call.

        Args:
            step: number of the optimizer step, seeds the draws.

        Returns:
            (n,), the codes that were revived; what an optimizer remembers of them is void, see `forget_rows`.
        """
        latents = gather_rows(torch.cat(self.pending))
        self.pending.clear()
        self._remember(latents)
        self.tokens.fill_(latents.shape[0])
        self.steps += 1
        if not self.started:
            return self.age.new_empty(0)
        self.refresh(codebook)
        latents = self.unit(latents)
        codes = nearest_codes(self.widen(latents), codebook)
        counts = torch.bincount(codes, minlength=codebook.shape[0]).float()
        decay = self._decay(latents.shape[0] / codebook.shape[0])
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.updates += 1
        self.age += 1
        self.window += counts
        self._average(codebook, latents, codes, decay)
        return self._revive(codebook, step, latents.shape[0])

    def _average(self, codebook: torch.Tensor, latents: torch.Tensor, codes: torch.LongTensor, decay: float) -> None:
        """Move the codes by moving averages, in the mode that does."""

    def _decay(self, mean_count: float) -> float:
        """Decay of this step: short memory while the encoder moves fast, but never so short that it holds fewer than
        twenty latents per code, below which healthy codes would look dead by chance."""
        updates = int(self.updates)
        return max(1 - mean_count / 20, min(self.decay, (1 + updates) / (10 + updates)))

    def _revive(self, codebook: torch.Tensor, step: int, tokens: int) -> torch.LongTensor:
        mean_count = tokens / codebook.shape[0]
        dead = (self.counts < self.dead_share * mean_count) & (self.age > 20 / mean_count)
        dead = dead.nonzero().flatten()
        dead = dead[self.counts[dead].argsort(stable=True)][: max(1, int(self.max_revived * codebook.shape[0]))]
        if len(dead) == 0:
            return dead
        generator = self._generator(step)
        newest = min(len(self.seen), max(tokens, 4 * len(dead)))
        draw = torch.randperm(newest, generator=generator)[: len(dead)].to(codebook.device)
        dead = dead[: len(draw)]
        vectors = self.recent[(self.position - 1 - draw) % self.recent.shape[0]]
        noise = torch.randn(vectors.shape, generator=generator).to(codebook.device)
        vectors = self.candidates(vectors + 0.01 * self.seen.std(dim=0) * noise)
        self.counts[dead] = mean_count
        self.age[dead] = 0
        self.place(codebook, dead, vectors)
        self.revived += len(dead)
        return dead

    def report(self) -> dict[str, float]:
        """Usage and perplexity of the codes chosen since the last call, and codes revived per step; {} if none was."""
        steps, revived, counts = self.steps, self.revived, self.window.clone()
        self.steps = self.revived = 0
        self.window.zero_()
        if not counts.any():
            return {}
        found = {f"codebook_{name}": value for name, value in usage_and_perplexity(counts).items()}
        return found | {"codes_revived": revived / steps}


class EMACodebook(Quantizer):
    """Codes that are decayed means of the latents that chose them; with l2, the directions of those means.

    Buffers, next to those of `Quantizer`:
        sums: (K, d) moving average of the sum of the latents of each code in a step.
    """

    def __init__(self, num_codes: int, width: int, **options):
        super().__init__(num_codes, width, **options)
        self.register_buffer("sums", torch.zeros(num_codes, width))

    def vectors(self, codes, codebook):
        return codebook[codes].detach()

    def place(self, codebook, codes, vectors):
        codebook[codes] = vectors
        self.sums[codes] = vectors * self.counts[codes, None]

    def _average(self, codebook, latents, codes, decay):
        sums = of_first_rank(torch.zeros_like(self.sums).index_add_(0, codes, latents))
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        alive = self.counts > 1e-8
        codebook[alive] = self.unit(self.sums[alive] / self.counts[alive, None])


class GradientCodebook(Quantizer):
    """Codes that the optimizer moves towards their latents; with l2, back onto the sphere after every step."""

    learns_table = True

    def refresh(self, codebook):
        codebook.copy_(self.unit(codebook))


class SimVQCodebook(Quantizer):
    """Codes base Wᵀ, of which the optimizer moves W: all codes move together, none is left behind.

    Parameters:
        weight: W, (d, d), the identity at first.

    Buffers, next to those of `Quantizer`:
        base: (K, d); a row changes when its code is revived, and never else.
    """

    def __init__(self, num_codes: int, width: int, **options):
        super().__init__(num_codes, width, **options)
        self.register_buffer("base", torch.zeros(num_codes, width))
        self.weight = nn.Parameter(torch.eye(width))

    def vectors(self, codes, codebook):
        return self.unit(self.base[codes] @ self.weight.T)

    def refresh(self, codebook):
        codebook.copy_(self.unit(self.base @ self.weight.T))

    def place(self, codebook, codes, vectors):
        inverse = torch.linalg.pinv(self.weight.cpu().double())  # not every device has float64
        self.base[codes] = (vectors.cpu().double() @ inverse.T).to(self.base)
        self.refresh(codebook)


class IBQCodebook(Quantizer):
    """Codes chosen by the largest dot product, all of which learn from every latent; with l2 by the largest cosine.

    The table has one column more than the codes, unless they are unit vectors; see the module. Dot products prefer long
    codes, so that centres of k-means as they are would leave the short ones without a latent: codes start, and start
    again, with the mean norm of the latents. The loss is the paper's: the distance of codes to latents, the double loss
    that also goes back through the choice, and 0.05 of the entropy loss, without which latents and codes shrink together.
    With l2 the logits are d times the cosine, as of vectors whose entries have
    unit variance; the cosine alone makes a softmax over many codes flat.
    """

    learns_table = True

    @property
    def extra_columns(self) -> int:
        return 0 if self.norm == "l2" else 1

    def _quantize(self, latents, codebook):
        codes = nearest_codes(self.widen(latents), codebook)
        vectors = self.unit(codebook[:, : self.width])  # (K, d)
        scale = float(self.width) if self.norm == "l2" else 1.0
        chosen = vectors[codes]  # (N, d)
        if self.estimator == "straight_through":
            passed = through = IndexBackpropagation.apply(latents, vectors, codes, scale)
        else:
            through = IndexBackpropagation.apply(latents.detach(), vectors, codes, scale)
            passed = rotate_to(latents, chosen) + (through - through.detach())
        entropy = IndexEntropy.apply(latents, vectors, scale)
        moves = F.mse_loss(chosen, latents.detach()) + F.mse_loss(through, latents) + 0.05 * entropy
        return Quantized(passed, F.mse_loss(latents, chosen.detach()), moves)

    def lookup(self, latents, codebook):
        if self.norm == "l2":
            return super().lookup(latents, codebook)
        vectors = codebook[:, : self.width]
        blocks = latents[:, : self.width].split(max(1, BLOCK_BYTES // (4 * len(codebook))))
        with full_fp32(latents.device):
            return torch.cat([(block @ vectors.T).argmax(dim=1) for block in blocks])

    def candidates(self, rows):
        return F.normalize(rows, dim=1) * (1.0 if self.norm == "l2" else self.seen.norm(dim=1).mean())

    def place(self, codebook, codes, vectors):
        codebook[codes, : self.width] = vectors
        self.refresh(codebook)

    def refresh(self, codebook):
        vectors = self.unit(codebook[:, : self.width])
        codebook[:, : self.width] = vectors
        if self.extra_columns:
            squares = vectors.square().sum(dim=1)
            codebook[:, -1] = (squares.max() - squares).sqrt()


QUANTIZERS = {"ema": EMACodebook, "grad": GradientCodebook, "simvq": SimVQCodebook, "ibq": IBQCodebook}


def forget_rows(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, rows: torch.LongTensor) -> None:
    """Zero what an optimizer remembers of rows (n,) of a parameter, if it moves it: the moments of a dead code would push
    the one that took its place."""
    for value in optimizer.state.get(parameter, {}).values():
        if torch.is_tensor(value) and value.shape == parameter.shape:
            value[rows] = 0
