"""The two parts of index backpropagation quantization (IBQ, arXiv:2412.02692) that look at all codes, in blocks of rows.

A latent z chooses the code of the largest dot product. Backward, the choice counts as softmax(z Cᵀ), so that every code
gets a gradient with every latent, not only the chosen one; and an entropy loss wants each latent sure of its code, and
all codes in use. Written plainly that costs several (N, K) matrices, kept from the forward pass to the backward one;
here the softmax is made again in the backward pass, block by block, and nothing of that size is kept.

Letters: N latents, K codes, d code width.
"""

import torch
import torch.distributed


BLOCK_BYTES = 16 * 2**20  # each of the few (rows, K) matrices that exist at a time


def _rows(codes: torch.Tensor) -> int:
    """Rows of a block."""
    return max(1, BLOCK_BYTES // (4 * codes.shape[0]))


class IndexBackpropagation(torch.autograd.Function):
    """Codes in value, softmax-weighted codes in gradient.

    With C the codes, onehot the choice and soft = softmax(scale · z Cᵀ): the value is onehot C, the gradient that of
    (onehot - sg[soft] + soft) C, towards latents and codes.

    Args of `apply`:
        latents: z, (N, d) fp32.
        codes: C, (K, d) fp32.
        chosen: (N,) int64, the index of the largest dot product.
        scale: of the logits.

    Returns:
        (N, d), `codes[chosen]`.
    """

    @staticmethod
    def forward(ctx, latents: torch.Tensor, codes: torch.Tensor, chosen: torch.LongTensor, scale: float):
        ctx.save_for_backward(latents, codes, chosen)
        ctx.scale = scale
        return codes[chosen]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        latents, codes, chosen = ctx.saved_tensors
        towards_latents = torch.empty_like(latents)
        towards_codes = torch.zeros_like(codes).index_add_(0, chosen, gradient)
        blocks = (tensor.split(_rows(codes)) for tensor in (latents, gradient, towards_latents))
        for z, g, out in zip(*blocks, strict=True):
            soft = torch.softmax(ctx.scale * (z @ codes.T), dim=1)  # (rows, K)
            wish = g @ codes.T
            slope = ctx.scale * soft * (wish - (soft * wish).sum(dim=1, keepdim=True))  # of z Cᵀ
            torch.mm(slope, codes, out=out)
            towards_codes.addmm_(slope.T, z)
        return towards_latents, towards_codes, None, None


class IndexEntropy(torch.autograd.Function):
    """Mean entropy of softmax(scale · z Cᵀ), less the entropy of its mean over the latents: minus what, in nats, the
    index tells about the latent.

    The mean is over the latents of all processes; gradients are right when those of the processes are averaged.

    Args of `apply`: latents (N, d), codes (K, d), scale, as above.

    Returns:
        (), in [-log K, 0].
    """

    @staticmethod
    def forward(ctx, latents: torch.Tensor, codes: torch.Tensor, scale: float):
        sums = codes.new_zeros(len(codes) + 1)  # of the probabilities; and of the entropies
        for z in latents.split(_rows(codes)):
            logs = torch.log_softmax(scale * (z @ codes.T), dim=1)  # (rows, K)
            sums[:-1] += logs.exp().sum(dim=0)
            sums[-1] -= (logs.exp() * logs).sum()
        means = sums / len(latents)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(means)
            means /= torch.distributed.get_world_size()
        mean_logs = means[:-1].clamp(min=torch.finfo(means.dtype).tiny).log()
        ctx.save_for_backward(latents, codes, mean_logs)
        ctx.scale = scale
        return means[-1] + (means[:-1] * mean_logs).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        latents, codes, mean_logs = ctx.saved_tensors
        towards_latents, towards_codes = torch.empty_like(latents), torch.zeros_like(codes)
        factor = ctx.scale * gradient / len(latents)
        for z, out in zip(latents.split(_rows(codes)), towards_latents.split(_rows(codes)), strict=True):
            logs = torch.log_softmax(ctx.scale * (z @ codes.T), dim=1)  # (rows, K)
            soft, wish = logs.exp(), mean_logs - logs
            slope = factor * soft * (wish - (soft * wish).sum(dim=1, keepdim=True))  # of z Cᵀ
            torch.mm(slope, codes, out=out)
            towards_codes.addmm_(slope.T, z)
        return towards_latents, towards_codes, None
