"""Trains the image tokenizer: `unitok-hf train-tokenizer --data_path pictures.parquet --output_dir out/tokenizer`.

The recipe, in the order in which it acts:

1. continuous warm-up: for the first tenth of the steps nothing is quantised (arXiv:2603.17052 finds that codebooks
   started on a young encoder shrink); the latents are only watched
2. the latents are scaled to unit variance, once, with the factor folded into the two 1x1 convolutions around them
3. k-means on the watched latents makes the codebook; from here on latents are quantised
4. EMA codes, relative dead-code rule, rotation trick (see `quantizers`, also for the other modes of `quantizer`),
   commitment loss, multi-scale L1; with `perceptual_weight`, a distance of features (see `perceptual`)
5. with `adversarial_weight`, a discriminator (see `discriminator`) that learns from `discriminator_start` on and is heard
   from `adversarial_start` on, first softly; both learn from the same batch in one optimizer step
6. from the codebook's making on, the weights are averaged (see `weight_average`): the average is what is evaluated, saved
   and released

`--vq_model_path` starts from the weights of a tokenizer and makes it a new codebook by the same recipe; with
`--decoder_only` its codes stay and only its pictures get better (see `decoder_tuning`).

A `transformers.Trainer`: its arguments, logging, callbacks, distributed runs and resume. A checkpoint is a loadable
tokenizer folder plus what training needs; a resumed run continues bit for bit. The final folder is the tokenizer alone.
The log says how the codebook and the discriminator are, see `health`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from ..modeling_unitok.modeling_vq import UniTokVQModel
from .cards import write_card
from .collators import (
    EpochCallback,
    PictureCollator,
    PictureDataset,
    require_pictures,
    require_size,
    training_and_validation,
)
from .decoder_tuning import FrozenCodebook, freeze_codes, require_same_codes
from .discriminator import AdaptiveWeight, PatchDiscriminator
from .health import HealthWatch, latent_measures
from .losses import RECONSTRUCTION_LOSSES
from .muon import MuonWith, decay_groups, kernels
from .parquet_rows import require_batch
from .perceptual import DISTANCES, perceptual_loss
from .push import push_run
from .quantizers import ESTIMATORS, NORMS, QUANTIZERS, Quantizer, forget_rows
from .reconstruction import ReconstructionMeter, picture_rows
from .runs import Run, RunTrainer, load_tensors, require_finite, save_arguments, save_beside
from .tracking import LastEvaluationCallback, last_metrics, track_pictures
from .weight_average import WeightAverage


TRAINING_STATE = "training_state.safetensors"

# The arguments that a tokenizer's folder answers, with their keys in its configuration and what a new tokenizer gets.
ARCHITECTURE = {
    "image_size": ("sample_size", 64),
    "num_vq_embeddings": ("num_vq_embeddings", 1024),
    "latent_channels": ("vq_embed_dim", 16),
    "patch_size": ("patch_size", 4),
    "block_out_channels": ("block_out_channels", (64, 128, 128)),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_num_groups", 32),
}


@dataclass(kw_only=True)
class VQTrainingArguments(TrainingArguments):
    """Arguments of `train-tokenizer`: those below, and every field of `transformers.TrainingArguments`.

    Defaults that differ from the parent's: AdamW at 4e-4 with betas (0.9, 0.95) and weight decay 1e-4, a cosine to a
    tenth, batches of 32, five epochs; evaluation and a picture grid once per epoch, checkpoints every 500 steps of
    which two are kept; columns are never dropped, memory is not pinned; a non-finite loss is an error, not skipped.
    """

    data_path: str = field(metadata={"help": "Parquet file, folder of Parquet files, or pattern, from prepare-data."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Parquet to evaluate on. Default: rows held out of --data_path."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the rows held out when --eval_data_path is not given."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read Parquet as needed, for data larger than memory; rows are shuffled within windows."},
    )
    vq_model_path: str | None = field(
        default=None,
        metadata={"help": "Folder of a tokenizer to start from; the seven sizes that follow are its own."},
    )
    decoder_only: bool = field(
        default=False, metadata={"help": "Train the decoder of --vq_model_path alone; the codes stay what they are."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the pictures in pixels. Default: 64."})
    num_vq_embeddings: int | None = field(default=None, metadata={"help": "Size of the codebook. Default: 1024."})
    latent_channels: int | None = field(default=None, metadata={"help": "Width of a code. Default: 16."})
    patch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels per side that become channels before the first convolution; 1 for none. Default: 4."
        },
    )
    block_out_channels: list[int] | None = field(
        default=None,
        metadata={"help": "Widths; each level but the last halves the resolution. Default: 64 128 128."},
    )
    layers_per_block: int | None = field(default=None, metadata={"help": "Residual blocks per level. Default: 1."})
    norm_num_groups: int | None = field(
        default=None, metadata={"help": "Groups of the group normalisations. Default: 32."}
    )
    augment: Literal["none", "affine", "flip"] = field(
        default="none", metadata={"help": "Random change of each picture in training."}
    )
    continuous_fraction: float = field(
        default=0.1, metadata={"help": "Share of the steps that train without quantisation, before k-means."}
    )
    quantizer: Literal["ema", "grad", "simvq", "ibq"] = field(
        default="ema",
        metadata={"help": "How the codes learn: moving averages, gradients, one matrix, or all of them."},
    )
    codebook_norm: Literal["none", "l2"] = field(
        default="none", metadata={"help": "l2 makes latents and codes unit vectors, chosen by cosine."}
    )
    gradient_estimator: Literal["rotation", "straight_through"] = field(
        default="rotation", metadata={"help": "How gradients pass the lookup of a code."}
    )
    reconstruction_loss: Literal["l1", "l2", "l1_l2"] = field(
        default="l1", metadata={"help": "Multi-scale absolute error, squared error, or absolute and squared error."}
    )
    matrix_optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata={"help": "Optimizer of the layers but the first and last; adamw: as the rest."}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight of the commitment loss."})
    perceptual_weight: float = field(default=0.0, metadata={"help": "Weight of the perceptual loss; 0 for none."})
    perceptual_network: Literal["auto", "lpips", "efficientnet_lite0"] = field(
        default="auto", metadata={"help": "What the perceptual loss is; auto: the first of them that can be had."}
    )
    adversarial_weight: float = field(
        default=0.0, metadata={"help": "Weight of the adversarial loss next to the others; 0 for no discriminator."}
    )
    discriminator_start: float = field(
        default=0.4, metadata={"help": "Share of the steps after which the discriminator learns."}
    )
    adversarial_start: float = field(
        default=0.5, metadata={"help": "Share of the steps after which the tokenizer hears it."}
    )
    adversarial_ramp: float = field(
        default=0.1, metadata={"help": "Share of the steps over which the adversarial weight rises."}
    )
    discriminator_layers: int = field(
        default=2, metadata={"help": "Strided layers of the discriminator: 2 for 64x64 pictures, 3 for 256x256."}
    )
    discriminator_learning_rate: float = field(
        default=2e-4, metadata={"help": "Learning rate of the discriminator, before the schedule, which both share."}
    )
    lecam_weight: float = field(default=0.001, metadata={"help": "Weight of LeCAM in the discriminator's loss."})
    ema_decay: float = field(default=0.99, metadata={"help": "Decay of the codebook's moving averages, per step."})
    weight_ema_decay: float = field(
        default=0.995, metadata={"help": "Decay of the averaged weights, which are released, per step; 0 for none."}
    )

    output_dir: str | None = field(default="out/tokenizer", metadata={"help": "Folder of the run and the tokenizer."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Pictures per device and step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pictures per device in evaluation."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the data."})
    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "Arguments of the schedule."}
    )
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps, or share below 1, of rising learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay; none on norms and biases."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="steps", metadata={"help": "When to write checkpoints: no, steps or epoch."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pinned memory; worth it with a GPU."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses from the log."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Copy rank 0's buffers; not needed, all ranks make the same update."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._settle_architecture()
        choices = {"quantizer": QUANTIZERS, "codebook_norm": NORMS, "gradient_estimator": ESTIMATORS}
        choices |= {"matrix_optimizer": ("adamw", "muon")}
        choices |= {"reconstruction_loss": RECONSTRUCTION_LOSSES, "perceptual_network": ("auto", *DISTANCES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.fp16 and self.matrix_optimizer == "muon":
            raise ValueError(
                "--matrix_optimizer muon sees gradients that fp16 has scaled; take --bf16, or leave it out"
            )
        if not 0 <= self.continuous_fraction < 1:
            raise ValueError(f"--continuous_fraction must lie in [0, 1), got {self.continuous_fraction}")
        continuous = 0 if self.decoder_only else self.continuous_fraction
        starts = (continuous, self.discriminator_start, self.adversarial_start, 1)
        if self.adversarial_weight and not starts[0] <= starts[1] < starts[2] <= starts[3]:
            raise ValueError(
                "--continuous_fraction, --discriminator_start and --adversarial_start must follow each other, got "
                f"{continuous}, {self.discriminator_start}, {self.adversarial_start}"
            )
        if self.adversarial_weight and not 1 <= self.discriminator_layers <= math.log2(self.image_size / 3):
            raise ValueError(
                f"--discriminator_layers must be at least 1, and pictures at least 3·2^layers pixels; got "
                f"{self.discriminator_layers} layers for {self.image_size} pixels"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction must lie in (0, 1), got {self.validation_fraction}")
        if not 0 <= self.weight_ema_decay < 1:
            raise ValueError(f"--weight_ema_decay must lie in [0, 1), got {self.weight_ema_decay}")

    def _settle_architecture(self) -> None:
        """Fill in the sizes that were not given, from the folder to start from or with their defaults."""
        if self.vq_model_path is None:
            if self.decoder_only:
                raise ValueError(
                    "--decoder_only improves a tokenizer that is there; name its folder by --vq_model_path"
                )
            known = dict(ARCHITECTURE.values())
        else:
            if not (Path(self.vq_model_path) / "config.json").is_file():
                raise ValueError(f"no image tokenizer at {self.vq_model_path}")
            if self.quantizer == "ibq" and self.codebook_norm == "none" and not self.decoder_only:
                raise ValueError(
                    "--quantizer ibq needs a column in the codebook that the tokenizer of --vq_model_path has no room "
                    "for; add --codebook_norm l2, or choose another --quantizer"
                )
            with torch.device("meta"):
                known = UniTokVQModel.from_config(UniTokVQModel.load_config(self.vq_model_path)).config
            if known["norm_type"] == "spatial" and not self.decoder_only:
                raise ValueError(
                    "--vq_model_path has a decoder that looks at the latents (norm_type spatial), which cannot get a new "
                    "codebook; add --decoder_only true"
                )
        for name, (key, _) in ARCHITECTURE.items():
            theirs = list(known[key]) if isinstance(known[key], (list, tuple)) else known[key]
            if getattr(self, name) not in (None, theirs) and self.vq_model_path is not None:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, but {theirs} in the tokenizer at {self.vq_model_path}; "
                    "leave it out to start from there"
                )
            setattr(self, name, theirs if getattr(self, name) is None else getattr(self, name))


class VQTrainingModel(nn.Module):
    """The tokenizer with its training losses.

    Args:
        vq: the tokenizer.
        codebook_state: how its codebook learns, and what that remembers.
        args: weights and times of the losses.

    Attributes:
        progress: share of the training steps that are done; the trainer keeps it.
        average: the averaged tokenizer; None without averaging.
        discriminator: None where its weight is 0.
        perceptual: the perceptual loss; None where its weight is 0, or there is none to be had.
    """

    def __init__(self, vq: UniTokVQModel, codebook_state: Quantizer, args: VQTrainingArguments):
        super().__init__()
        self.vq = vq
        self.average = WeightAverage(vq, args.weight_ema_decay) if args.weight_ema_decay else None
        if args.decoder_only:
            freeze_codes(vq)
        else:
            vq.codebook.requires_grad_(codebook_state.learns_table)
        self.codebook_state = codebook_state
        self.args = args
        self.progress = 0.0
        self.discriminator = PatchDiscriminator(args.discriminator_layers) if args.adversarial_weight else None
        self.adaptive_weight = AdaptiveWeight() if args.adversarial_weight else None
        self.perceptual = perceptual_loss(args.perceptual_network) if args.perceptual_weight else None
        if self.discriminator is not None:  # what the last convolution of the decoder sees, for the adaptive weight
            vq.decoder.conv_out.register_forward_pre_hook(
                lambda module, inputs: setattr(self, "last_features", inputs[0].detach())
            )

    @property
    def tokenizer(self) -> UniTokVQModel:
        """The tokenizer that is evaluated and saved: the averaged one, where there is one."""
        return self.vq if self.average is None else self.average.vq

    @torch.compiler.disable(recursive=False)
    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of pictures (B, 3, H, W) in [-1, 1]: `loss`, and its terms and health by name, without gradient."""
        latents = self._encode(pixel_values)  # (B, d, h, w)
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2).float()  # (N, d)
        self.codebook_state.observe(rows)
        vectors, commitment, codebook_loss = self.codebook_state(rows, self.vq.codebook)
        quantized = vectors.unflatten(0, (latents.shape[0], *latents.shape[2:])).permute(0, 3, 1, 2).to(latents.dtype)
        sample = self.vq._decode(quantized).float()  # `decode` would take them for indices where the config says so
        terms = {"commitment": commitment} | latent_measures(rows, vectors, self.codebook_state)
        if self.discriminator is not None and self.progress >= self.args.discriminator_start:
            loss = self._adversarial(sample, pixel_values, terms)
        else:
            loss = self._reconstruction(sample, pixel_values, terms)
            if self.discriminator is not None:  # DDP wants to see every parameter
                loss = loss + 0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        loss = loss + self.args.commitment_weight * commitment + codebook_loss
        return {"loss": loss} | {name: value.detach() for name, value in terms.items()}

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self.args.decoder_only:
            return self.vq.encode(pixels).latents
        # codes that stay are those of `encode_to_indices`, in full precision
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return self.vq.encode(pixels).latents

    def _reconstruction(self, sample: torch.Tensor, pixels: torch.Tensor, terms: dict) -> torch.Tensor:
        terms["reconstruction"] = loss = RECONSTRUCTION_LOSSES[self.args.reconstruction_loss](sample, pixels)
        if self.perceptual is not None:
            terms[self.perceptual.name] = distance = self.perceptual(sample, pixels).mean()
            loss = loss + self.args.perceptual_weight * distance
        return loss

    def _adversarial(self, sample: torch.Tensor, pixels: torch.Tensor, terms: dict) -> torch.Tensor:
        """Loss of tokenizer and discriminator whose one backward pass gives both their gradients.

        Its value is that of the losses; its gradient at `sample` is the sum of the two gradients taken here.
        """
        leaf = sample.detach().requires_grad_()
        with torch.enable_grad():
            reconstruction = self._reconstruction(leaf, pixels, terms)
            [gradient] = torch.autograd.grad(reconstruction, leaf)
            fake, real = self.discriminator(leaf), self.discriminator(pixels)
        args = self.args
        ramp = min(1.0, (self.progress - args.adversarial_start) / max(args.adversarial_ramp, 1e-9))
        if ramp > 0:
            [wish] = torch.autograd.grad(-fake.mean(), leaf, retain_graph=True)
            patch = self.vq.config.patch_size
            if self.training:
                self.adaptive_weight.observe(
                    F.pixel_unshuffle(gradient, patch),
                    F.pixel_unshuffle(wish, patch),
                    self.last_features,
                    self.vq.decoder.conv_out.weight,
                )
            weight = self.adaptive_weight.value.clone()
            gradient = gradient + ramp * args.adversarial_weight * weight * wish
            terms |= {"adversarial": -fake.mean(), "adaptive_weight": weight}
        judged = self.discriminator.loss(real, fake, args.lecam_weight)
        if self.training:
            self.discriminator.observe(real, fake)
        terms |= {
            "discriminator": judged,
            "discriminator_accuracy": torch.cat([real > 0, fake < 0]).float().mean(),
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
        }
        through = (sample * gradient).sum()
        return through - through.detach() + reconstruction.detach() + judged

    @torch.no_grad()
    def start_codebook(self, step: int) -> None:
        """Scale the latents without changing the function, then make the codebook by k-means."""
        scale = self._scale_latents(self.vq)
        self.codebook_state.recent /= scale
        if self.codebook_state.norm == "none":
            self.vq.post_quant_conv.weight *= scale
        self.codebook_state.start(self.vq.codebook, step)

    def _scale_latents(self, vq: UniTokVQModel) -> torch.Tensor:
        """Bring latents to unit variance, with l2 to unit norm, by a factor in the convolution that makes them."""
        scale = self.codebook_state.scale
        vq.quant_conv.weight /= scale
        vq.quant_conv.bias /= scale
        return scale

    def finish_step(self, optimizer: torch.optim.Optimizer, step: int, start: bool) -> None:
        """What an optimizer step leaves to do: the codebook, the statistics of the adversarial part, the average.

        Args:
            optimizer: forgets the codes that were revived.
            step: number of the step.
            start: whether it is time to make the codebook, if there is none and the latents suffice for k-means.
        """
        state = self.codebook_state
        revived = state.step(self.vq.codebook, step)
        forget_rows(optimizer, self.vq.codebook, revived)
        was_started = bool(state.started)
        if start and not was_started and state.position >= len(self.vq.codebook):
            self.start_codebook(step)
        if self.discriminator is not None:
            self.discriminator.step()
            self.adaptive_weight.step()
        if self.average is not None and was_started:
            self.average.update(self.vq, state, revived)
        elif self.average is not None:
            self.average.copy(self.vq)

    @torch.no_grad()
    def export(self, folder: str, pixel_values: torch.Tensor) -> None:
        """Write the tokenizer, proved on pictures (B, 3, H, W); raises as `UniTokVQModel.export`.

        With l2 only the direction of a latent counts, so that its norm may have grown beyond what fp32 distances stand:
        it is scaled back first.
        """
        vq = self.tokenizer
        if self.codebook_state.norm == "l2":
            self._scale_latents(vq)
        vq.export(folder, pixel_values, lambda rows: self.codebook_state.lookup(rows, vq.codebook))

    def activation_checkpointing_enable(self, **_) -> None:
        """What the Trainer calls for `--activation_checkpointing`."""
        self.vq.enable_gradient_checkpointing()

    def training_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds besides the tokenizer: the codebook's state, the adversarial part, and, where the
        tokenizer is the average, the live weights."""
        saved = "average.vq." if self.average is not None else "vq."
        return {
            name: tensor.contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith((saved, "perceptual."))
        }

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint: a tokenizer folder with a file of `training_state`.

        Raises:
            ValueError: it is of another architecture or other arguments: the first key or tensor that differs is named;
                or a file is corrupt.
        """
        saved = UniTokVQModel.from_pretrained(folder)
        for key, ours in sorted(self.vq.config.items()):
            if not key.startswith("_") and saved.config[key] != ours:
                raise ValueError(
                    f"{folder} holds another tokenizer: {key} is {saved.config[key]} there and {ours} here"
                )
        self.tokenizer.load_state_dict(saved.state_dict())
        self.load_state_dict(load_tensors(folder / TRAINING_STATE, self.training_state()), strict=False)


class CodebookCallback(TrainerCallback):
    """Ends every optimizer step, and makes the codebook when the continuous warm-up is over."""

    def __init__(self, continuous_fraction: float):
        self.continuous_fraction = continuous_fraction

    def on_step_begin(self, args, state, control, model: VQTrainingModel, **_):
        model.progress = state.global_step / state.max_steps

    def on_step_end(self, args, state, control, model: VQTrainingModel, optimizer, **_):
        warm = state.global_step >= self.continuous_fraction * state.max_steps
        model.finish_step(optimizer, state.global_step, start=warm)

    def on_train_end(self, args, state, control, model: VQTrainingModel, **_):
        if not model.codebook_state.started:
            raise ValueError(
                f"training ended after {state.global_step} steps with {int(model.codebook_state.position)} latents seen, "
                f"too few to make {len(model.vq.codebook)} codes; train longer, or with a larger batch or fewer codes"
            )


class VQTrainer(RunTrainer):
    """`transformers.Trainer` for `VQTrainingModel`: loss terms and codebook in the log, pictures at every evaluation."""

    def __init__(self, model: VQTrainingModel, args: VQTrainingArguments, **kwargs):
        callbacks = [EpochCallback(), CodebookCallback(args.continuous_fraction)]
        super().__init__(model=model, args=args, data_collator=PictureCollator(), callbacks=callbacks, **kwargs)
        self.terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.health = HealthWatch()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """None of those that make the codes: decay would shrink the codes that are not chosen."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if "quantize.embedding" not in name and "codebook_state" not in name]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One optimizer, so that one checkpoint and one schedule hold all: the discriminator's group has its own rate,
        betas (0.5, 0.9) and no weight decay; with Muon, the matrices of the tokenizer are apart."""
        vq, discriminator, matrices = self.model.vq, self.model.discriminator, []
        if self.args.matrix_optimizer == "muon":
            matrices = [weight for weight in kernels(vq.encoder) + kernels(vq.decoder) if weight.requires_grad]
        if self.optimizer is None and (matrices or discriminator is not None):
            judges = [] if discriminator is None else list(discriminator.parameters())
            rest = decay_groups(self, apart=matrices + judges)
            if judges:
                own = {"lr": self.args.discriminator_learning_rate, "betas": (0.5, 0.9), "weight_decay": 0.0}
                rest.append({"params": judges, **own})
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if matrices:
                rate, decay = self.args.learning_rate, self.args.weight_decay
                self.optimizer = MuonWith(matrices, rest, rate, decay, lambda groups: kind(groups, **options))
            else:
                self.optimizer = kind(rest, **options)
        return super().create_optimizer(model)

    def _clip_grad_norm(self, model):
        """Clips tokenizer and discriminator apart: neither's gradients shrink because the other's are large."""
        return self._clip_both(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        return self._clip_both(float("inf")) if grad_norm is None else grad_norm

    def _clip_both(self, largest: float) -> torch.Tensor:
        """Norm of the tokenizer's gradients, before clipping; the discriminator's is kept for the log."""
        self.accelerator.unscale_gradients()  # once; accelerate's own clipping would do it each time
        if self.model.discriminator is not None:
            norm = nn.utils.clip_grad_norm_(self.model.discriminator.parameters(), largest)
            self.terms["discriminator_grad_norm"].append(norm.detach())
        tokenizer = [*self.model.vq.parameters(), *self.model.codebook_state.parameters()]
        return nn.utils.clip_grad_norm_(tokenizer, largest)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        require_finite(outputs, self.state.global_step, self.args.output_dir)
        for name in outputs.keys() - {"loss"}:
            self.terms[name].append(outputs[name])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            state, codebook = self.model.codebook_state, self.model.vq.codebook
            window, steps = state.window.clone(), state.steps
            norms = codebook.detach()[:, : state.width].norm(dim=1)
            logs |= self._terms() | state.report()
            logs |= {"code_norm": norms.mean().item(), "code_norm_max": norms.max().item()}
            if self.is_world_process_zero():
                self.health.check(logs, window, steps, self.state.max_steps)
        super().log(logs, start_time)

    def _terms(self) -> dict[str, float]:
        """What the steps since the last log line measured: the mean over steps and processes, the largest of a maximum."""
        found = {}
        for name, values in sorted(self.terms.items()):
            values = torch.stack(values)
            if name.endswith("_max"):
                found[name] = self.accelerator.gather(values.max()).max().item()
            else:
                found[name] = self.accelerator.reduce(values.mean(), reduction="mean").item()
        self.terms.clear()
        return found

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """PSNR, SSIM, codebook usage and perplexity over the whole set, and a grid of reals above reconstructions."""
        meter = ReconstructionMeter(self.model.tokenizer.eval(), self.accelerator)
        for batch in self.get_eval_dataloader(eval_dataset):
            meter.update(batch["pixel_values"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.compute().items()}
        self.log(metrics)
        if self.is_world_process_zero():
            name = f"step_{self.state.global_step:06d}.png"
            pictures = picture_rows(meter.shown)
            save_beside(Path(self.args.output_dir) / "samples", lambda folder: pictures.save(Path(folder) / name))
            track_pictures(self, pictures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """A tokenizer folder, with the state of training and the arguments beside it."""
        output_dir = Path(output_dir or self.args.output_dir)
        self.model.tokenizer.save_pretrained(output_dir)
        save_file(self.model.training_state(), output_dir / TRAINING_STATE)
        save_arguments(self.args, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load_checkpoint(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def build_training_model(args: VQTrainingArguments) -> VQTrainingModel:
    """The tokenizer to start from, or a fresh one of the size the arguments say, ready for training.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if args.decoder_only:
        state = FrozenCodebook(args.num_vq_embeddings, args.latent_channels)
    else:
        state = QUANTIZERS[args.quantizer](
            args.num_vq_embeddings,
            args.latent_channels,
            norm=args.codebook_norm,
            estimator=args.gradient_estimator,
            decay=args.ema_decay,
            seed=args.seed,
        )
    if args.vq_model_path is None:
        vq = _new_tokenizer(args, state.extra_columns)
    else:
        vq = UniTokVQModel.from_pretrained(args.vq_model_path)
    vq.grid(args.image_size, args.image_size)
    return VQTrainingModel(vq, state, args)


@torch.no_grad()
def _new_tokenizer(args: VQTrainingArguments, extra_columns: int) -> UniTokVQModel:
    vq = UniTokVQModel(
        in_channels=3 * args.patch_size**2,
        out_channels=3 * args.patch_size**2,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels + extra_columns,
        sample_size=args.image_size,
        num_vq_embeddings=args.num_vq_embeddings,
        norm_num_groups=args.norm_num_groups,
        patch_size=args.patch_size,
    )
    # nothing reaches the extra channels or comes from them, before training and after it
    vq.quant_conv.weight[args.latent_channels :] = 0
    vq.quant_conv.bias[args.latent_channels :] = 0
    vq.post_quant_conv.weight[:, args.latent_channels :] = 0
    # the pixels of a patch start equal (ICNR, arXiv:1707.02937): otherwise each begins as noise of its own, which is
    # seen as a grid until late in training
    for tensor in (vq.decoder.conv_out.weight, vq.decoder.conv_out.bias):
        tensor.copy_(tensor[:: args.patch_size**2].repeat_interleave(args.patch_size**2, dim=0))
    return vq


def train_tokenizer(args: VQTrainingArguments) -> dict[str, float]:
    """Train a tokenizer as the arguments say, and save it to `args.output_dir`.

    Returns:
        the metrics of the final evaluation.

    Raises:
        FileNotFoundError, ValueError: the data, the sizes or the output folder are not usable; nothing was written.
    """
    with Run(args) as run:
        return _train(args, run)


def _train(args: VQTrainingArguments, run: Run) -> dict[str, float]:
    data_seed = args.seed if args.data_seed is None else args.data_seed
    rows, eval_rows = training_and_validation(
        args.data_path, args.eval_data_path, args.validation_fraction, data_seed, args.streaming
    )
    if args.streaming:
        require_batch(rows, args.train_batch_size * args.world_size)
    for part in (rows, eval_rows):
        require_size(part, args.image_size)
        require_pictures(part)
    set_seed(args.seed)
    model = build_training_model(args)
    trainer = VQTrainer(
        model,
        args,
        train_dataset=PictureDataset(rows, args.augment, data_seed),
        eval_dataset=PictureDataset(eval_rows, "none", args.seed),
    )
    trainer.add_callback(LastEvaluationCallback())
    run.begin()
    run.train(trainer)
    metrics = last_metrics(trainer)
    if trainer.is_world_process_zero():
        shown = [trainer.eval_dataset[row] for row in range(min(64, len(trainer.eval_dataset)))]
        pixels = trainer.data_collator(shown)["pixel_values"]

        def save(folder: str) -> None:
            exported = Path(folder) / "exported"  # what an export that is killed leaves beside it goes with `folder`
            model.export(str(exported), pixels)
            for file in list(exported.iterdir()):
                file.rename(Path(folder) / file.name)
            exported.rmdir()
            if args.decoder_only:
                batches = torch.utils.data.DataLoader(
                    trainer.eval_dataset, args.per_device_eval_batch_size, collate_fn=trainer.data_collator
                )
                require_same_codes(
                    folder, args.vq_model_path, (batch["pixel_values"] for batch in batches), args.device
                )

        save_beside(args.output_dir, save)
        save_arguments(args, args.output_dir)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics, combined=False)
        write_card(args.output_dir)
        push_run(trainer)
    return metrics
