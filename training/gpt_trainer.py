"""Trains the GPT: `unitok-hf train configs/unitok.json`.

Parquet of pictures and captions, a trained image tokenizer, and a text model become one folder that
`AutoModel.from_pretrained` loads. Pictures are encoded on the fly by the frozen tokenizer inside the model, or come as
codes from `unitok-hf encode`.

- text model: NanoChat, sized by one dial as nanochat has it: `depth` layers of width 64 · depth; or, with `model_path`,
  any causal language model that is to learn to draw, or a UniTok model that is trained on
- text tokenizer: a byte-level BPE trained on the captions, unless one is given or comes with the model
- optimizer: AdamW, or Muon for the matrices of the layers
- `lora_rank` trains adapters alone; output_dir/adapter holds them, output_dir the model they are merged into
- samples: half image first, half text first (without those, a prompt could not steer a picture), and a tenth of the
  latter without their caption, for classifier-free guidance
- with `use_visual_tokens: false`, the text model alone, as a plain NanoChat folder
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from ..configuration.configuration_unitok import UniTokConfig
from ..modeling_unitok.modeling_unitok import UniTokForConditionalGeneration
from ..modeling_unitok.modeling_vq import UniTokVQModel
from ..processing.image_processing_unitok import UniTokImageProcessor
from ..processing.processing_unitok import PLAIN_CHAT_TEMPLATE, UNITOK_TOKENS, UniTokProcessor, add_special_tokens
from .cards import write_card
from .collators import (
    EpochCallback,
    LengthGroupedSampler,
    StreamCollator,
    StreamDataset,
    parquet_files,
    require_size,
    require_text,
    training_and_validation,
    with_text_alone,
)
from .evaluation import nats_and_tokens, stream_bits
from .generate import load_model
from .lora import add_lora
from .muon import MuonWith, decay_groups, layer_matrices
from .parquet_rows import require_batch
from .push import push_run
from .reconstruction import picture_rows
from .runs import Run, RunTrainer, require_finite, save_arguments, save_beside, write_beside
from .token_cache import require_fresh
from .tracking import LastEvaluationCallback, last_metrics, track_pictures


@dataclass(kw_only=True)
class GPTTrainingArguments(TrainingArguments):
    """Arguments of `train`: those below, and every field of `transformers.TrainingArguments`.

    Defaults that differ from the parent's: AdamW at 1e-3 with betas (0.9, 0.95) and weight decay 0.1, a cosine to a
    tenth, batches of 32 streams of about one length, ten epochs; evaluation once per epoch, checkpoints every 500 steps
    of which two are kept; columns are never dropped, memory is not pinned; a non-finite loss is an error, not skipped.
    """

    data_path: str = field(metadata={"help": "Parquet file, folder of them, or pattern, from prepare-data or encode."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Parquet to evaluate on. Default: rows held out of --data_path."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the rows held out when --eval_data_path is not given."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read Parquet as needed, for data larger than memory; shuffled within windows, not grouped by length."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of the captions."})
    use_visual_tokens: bool = field(default=True, metadata={"help": "False trains the text model alone."})
    visual_tokenizer_path: str | None = field(default=None, metadata={"help": "Folder of the image tokenizer."})
    visual_vocab_size: int | None = field(
        default=None, metadata={"help": "Codes the tokenizer is expected to have; another number is refused."}
    )
    model_path: str | None = field(
        default=None,
        metadata={"help": "Causal language model or UniTok model to begin from. Default: a new NanoChat."},
    )
    text_tokenizer_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a text tokenizer. Default: train one on the captions."}
    )
    text_vocab_size: int = field(default=4096, metadata={"help": "Largest vocabulary of the BPE that is trained."})
    depth: int = field(default=4, metadata={"help": "Layers of NanoChat."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of NanoChat. Default: 64 times depth."})
    image_first: float = field(default=0.5, metadata={"help": "Share of samples with the image before the text."})
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of text-first samples whose caption is dropped, for guidance."}
    )
    augment: Literal["none", "affine"] = field(
        default="none", metadata={"help": "Random change of each picture before it is encoded."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest stream in tokens; longer texts lose their end."})
    text_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of text tokens in the loss. Default: the model's, 1 in a new one."}
    )
    image_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of image tokens in the loss. Default: the model's, 1 in a new one."}
    )
    matrix_optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "Optimizer of the matrices inside the layers; the rest is trained by --optim."},
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains every weight."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of the adapters, divided by the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={"help": "Texts drawn at every evaluation. Default: the first captions of the evaluation data."},
    )

    output_dir: str | None = field(default="out/model", metadata={"help": "Folder of the run and the model."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples per device and step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Samples per device in evaluation."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the data."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "Arguments of the schedule."}
    )
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps, or share below 1, of rising learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay; none on norms and biases."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="steps", metadata={"help": "When to write checkpoints: no, steps or epoch."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Order of the streams: group_by_length, random or sequential."}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pinned memory; worth it with a GPU."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses from the log."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_first", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction must lie in (0, 1), got {self.validation_fraction}")
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor is not supported: the Trainer's labels still hold placeholders")
        if self.train_sampling_strategy not in ("group_by_length", "random", "sequential"):
            raise ValueError(
                f"--train_sampling_strategy must be group_by_length, random or sequential, "
                f"got {self.train_sampling_strategy}"
            )
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank must not be negative, got {self.lora_rank}")
        if self.lora_rank and self.model_path is None:
            raise ValueError("--lora_rank adapts a model that is trained already; pass --model_path")
        if self.lora_rank and self.matrix_optimizer == "muon":
            raise ValueError("--matrix_optimizer muon is for whole matrices, not for LoRA's; leave one of the two out")
        if self.model_path is not None and self.text_tokenizer_path is not None:
            raise ValueError("--model_path brings its own text tokenizer; leave --text_tokenizer_path out")
        if self.model_path is not None and not self.use_visual_tokens:
            raise ValueError("--model_path is for models that draw; leave --use_visual_tokens false out")
        if self.push_to_hub and not self.use_visual_tokens:
            raise ValueError("--push_to_hub is for models that draw; leave it out with --use_visual_tokens false")
        if self.streaming and self.train_sampling_strategy == "sequential":
            raise ValueError(
                "--streaming shuffles rows within windows; leave --train_sampling_strategy sequential out"
            )
        if self.streaming and not self.use_visual_tokens:
            raise ValueError("--streaming is for pictures and text; leave it out with --use_visual_tokens false")
        if self.use_visual_tokens and self.visual_tokenizer_path is None and self.model_path is None:
            raise ValueError("--visual_tokenizer_path is missing; train a tokenizer with `unitok-hf train-tokenizer`")


def train_text_tokenizer(captions: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that begins every text with bos and has the special tokens of UniTok first.

    Args:
        captions: texts to learn merges from.
        vocab_size: upper bound; at least the 256 bytes and the special tokens.
    """
    control = ["<|pad|>", "<|bos|>", "<|eos|>"]
    special = [*control, UNITOK_TOKENS["image_start_token"], UNITOK_TOKENS["image_end_token"]]
    special += [UNITOK_TOKENS["image_token"], UNITOK_TOKENS["uncond_token"]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 256 + len(special)),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=control[0], bos_token=control[1], eos_token=control[2]
    )


def nanochat_config(depth: int, hidden_size: int | None, vocab_size: int, max_length: int) -> NanoChatConfig:
    """NanoChat by its one dial: `depth` layers, width 64 · depth unless given, heads of 128 (64 for narrow models)."""
    hidden_size = hidden_size or 64 * depth
    head = 128 if hidden_size % 128 == 0 and hidden_size >= 512 else 64
    if hidden_size % head:
        raise ValueError(f"--hidden_size must be a multiple of 64, got {hidden_size}")
    return NanoChatConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=hidden_size // head,
        max_position_embeddings=max(2048, max_length),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class StreamTrainer(RunTrainer):
    """`transformers.Trainer` over a `StreamDataset`: grouped by length, Muon, the share of padding in the log.

    A non-finite loss is an error.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.counted: list[torch.Tensor] = []  # what `count` found in each batch since the last log line

    def _get_train_sampler(self, train_dataset: StreamDataset | None = None) -> torch.utils.data.Sampler:
        if self.args.streaming or self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.world_size
        return LengthGroupedSampler(self.train_dataset if train_dataset is None else train_dataset, step)

    def _get_eval_sampler(self, eval_dataset: StreamDataset) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(eval_dataset)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.args.matrix_optimizer == "muon" and self.optimizer is None:
            matrices = layer_matrices(self.model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = MuonWith(
                matrices,
                decay_groups(self, apart=matrices),
                self.args.learning_rate,
                self.args.weight_decay,
                lambda rest: kind(rest, **options),
            )
        return super().create_optimizer(model)

    @cached_property
    def weights_per_token(self) -> int:
        """Parameters that every token meets: not the embeddings, nor the image tokenizer, which sees pictures."""
        embeddings = self.model.get_input_embeddings().weight
        return sum(
            weight.numel()
            for name, weight in self.model.named_parameters()
            if weight is not embeddings and "vqmodel" not in name
        )

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Forward and backward, for the log; counted once, where the Trainer counts at every step."""
        return 6 * inputs["input_ids"].numel() * self.weights_per_token

    def terms(self, loss: torch.Tensor, outputs) -> dict[str, torch.Tensor]:
        """What to show when the loss is not finite."""
        return {"loss": loss}

    def count(self, outputs, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions that are padding, and positions."""
        mask = inputs["attention_mask"]
        return torch.stack([(mask == 0).sum(), mask.new_tensor(mask.numel())])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        require_finite(self.terms(loss, outputs), self.state.global_step, self.args.output_dir)
        if model.training:
            self.counted.append(self.count(outputs, inputs))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(torch.stack(self.counted).sum(dim=0))
            logs |= self.shares(sums.tolist())
            self.counted.clear()
        super().log(logs, start_time)

    def shares(self, sums: list[float]) -> dict[str, float]:
        """What a log line says about the sums of `count`."""
        padding, positions = sums
        return {"padding_share": padding / positions}


class TextTrainer(StreamTrainer):
    """Trains the text model alone."""


class GPTTrainer(StreamTrainer):
    """Trains UniTok models: text and image loss in the log; bits per token and drawings at every evaluation.

    Args:
        prompts: texts that are drawn, one picture each in two rows, in samples/step_….png; samples/prompts.json has them
            in order. The random numbers are the same every time, so that what changes is the model.
    """

    def __init__(self, prompts: list[str], **kwargs):
        super().__init__(**kwargs)
        self.prompts = prompts

    def terms(self, loss: torch.Tensor, outputs) -> dict[str, torch.Tensor]:
        return {"loss": loss, "text_loss": outputs.text_loss, "image_loss": outputs.image_loss}

    def count(self, outputs, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Padding and positions; nats and tokens of text and of images."""
        nats = nats_and_tokens(outputs, inputs["labels"], self.model.config.image_token_id)
        return torch.cat([super().count(outputs, inputs), nats])

    def shares(self, sums: list[float]) -> dict[str, float]:
        text_nats, texts, image_nats, images = sums[2:]
        return super().shares(sums[:2]) | {
            "text_loss": text_nats / max(texts, 1),
            "image_loss": image_nats / max(images, 1),
            "text_bits": text_nats / max(texts, 1) / math.log(2),
            "image_bits": image_nats / max(images, 1) / math.log(2),
        }

    @torch.no_grad()
    def draw(self) -> None:
        """Pictures of the prompts, in a file named by the step."""
        folder = Path(self.args.output_dir) / "samples"
        write_beside(folder / "prompts.json", json.dumps(self.prompts, indent=2, ensure_ascii=False).encode())
        inputs = self.eval_dataset.image_prompts(self.prompts)
        guided = self.args.caption_dropout > 0 and self.args.image_first < 1  # has it learned to draw without a text
        generator = torch.Generator(self.model.device).manual_seed(self.args.seed)
        rows = [
            self.model.decode_image_tokens(
                self.model.generate(
                    **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
                    generation_mode="image",
                    do_sample=True,
                    guidance_scale=3.0 if guided else None,
                    generator=generator,
                )
            )
            for _ in range(2)
        ]
        pictures = picture_rows(rows)
        name = f"step_{self.state.global_step:06d}.png"
        save_beside(folder, lambda beside: pictures.save(Path(beside) / name))
        track_pictures(self, pictures)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Bits per text token and per image token over the whole set, and drawings of the prompts."""
        streams = self.eval_dataset if eval_dataset is None else eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        found = stream_bits(self.model.eval(), streams, self.data_collator, batch_size, self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        if self.prompts and self.is_world_process_zero():
            self.draw()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """Model and processor as they load, and the arguments in readable form; no pickles."""
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)
            save_arguments(self.args, output_dir)


def build_model(
    args: GPTTrainingArguments, tokenizer: PreTrainedTokenizerBase, vq_model: UniTokVQModel
) -> tuple[UniTokForConditionalGeneration, UniTokProcessor]:
    """A text model, given or a fresh NanoChat, around an image tokenizer, and its processor."""
    if args.model_path is None:
        text_model = NanoChatForCausalLM(
            nanochat_config(args.depth, args.hidden_size, len(tokenizer), args.max_length)
        )
    else:
        text_model = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32)
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    size = vq_model.config.sample_size
    image_processor = UniTokImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    processor = UniTokProcessor(image_processor, tokenizer, template, model.vocabulary.codes_per_image)
    return model, processor


def load_visual_tokenizer(args: GPTTrainingArguments) -> UniTokVQModel:
    """The image tokenizer of `args.visual_tokenizer_path`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has another number of codes than `args.visual_vocab_size`.
    """
    folder = Path(args.visual_tokenizer_path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no image tokenizer at {folder}; train one with `unitok-hf train-tokenizer --output_dir {folder}`"
        )
    vq_model = UniTokVQModel.from_pretrained(folder)
    require_codes(args, vq_model, str(folder))
    return vq_model


def require_codes(args: GPTTrainingArguments, vq_model: UniTokVQModel, where: str) -> None:
    """Raises ValueError unless a tokenizer has as many codes as `args.visual_vocab_size` says, if it says so."""
    codes = vq_model.config.num_vq_embeddings
    if args.visual_vocab_size not in (None, codes):
        raise ValueError(
            f"visual_vocab_size is {args.visual_vocab_size}, but the tokenizer at {where} has {codes} codes"
        )


def is_unitok(model_path: str) -> bool:
    """Whether a folder or Hub repository holds a UniTok model, by its configuration."""
    return PreTrainedConfig.get_config_dict(model_path)[0].get("model_type") == UniTokConfig.model_type


def save_model(model, processor, folder: str) -> None:
    """Model and processor as they load."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def prompts_to_draw(args: GPTTrainingArguments, rows: datasets.Dataset) -> list[str]:
    """`args.sample_prompts`, or the first eight different captions of the rows."""
    if args.sample_prompts is not None:
        return args.sample_prompts
    captions: dict[str, None] = {}
    for text in islice(rows[args.text_column], 1000):
        if text and len(captions) < 8:
            captions[text] = None
    return list(captions)


def require_images(
    args: GPTTrainingArguments, data_path: str, rows: datasets.Dataset, vq_model: UniTokVQModel
) -> None:
    """Raises ValueError unless the rows hold pictures of the tokenizer's size, or codes that this tokenizer made."""
    if "image_codes" not in rows.column_names:
        require_size(rows, vq_model.config.sample_size)
        return
    require_fresh(parquet_files(data_path), vq_model)
    if args.augment != "none":
        raise ValueError(f"--augment {args.augment} changes pictures, but {data_path} holds codes; leave it out")


def train_gpt(args: GPTTrainingArguments) -> dict[str, float]:
    """Train a model as the arguments say, and save it to `args.output_dir`.

    Returns:
        the metrics of the final evaluation.

    Raises:
        FileNotFoundError, ValueError: the data, the tokenizer or the output folder are not usable; nothing was written.
    """
    with Run(args) as run:
        return _train(args, run)


def _train(args: GPTTrainingArguments, run: Run) -> dict[str, float]:
    model = processor = None
    if args.model_path is not None and is_unitok(args.model_path):
        if args.visual_tokenizer_path is not None:
            raise ValueError(f"{args.model_path} has an image tokenizer of its own; leave --visual_tokenizer_path out")
        model, processor = load_model(args.model_path, torch.device("cpu"))
        vq_model = model.float().model.vqmodel
        require_codes(args, vq_model, args.model_path)
    elif args.use_visual_tokens:
        vq_model = load_visual_tokenizer(args)
    else:
        vq_model = None
    data_seed = args.seed if args.data_seed is None else args.data_seed
    rows, eval_rows = training_and_validation(
        args.data_path, args.eval_data_path, args.validation_fraction, data_seed, args.streaming
    )
    if args.streaming:
        require_batch(rows, args.train_batch_size * args.world_size)
    for part in (rows, eval_rows):
        require_text(part, args.text_column)
    if vq_model is None:
        rows, eval_rows = (with_text_alone(part, args.text_column) for part in (rows, eval_rows))
    else:
        require_images(args, args.data_path, rows, vq_model)
        if args.eval_data_path is not None:
            require_images(args, args.eval_data_path, eval_rows, vq_model)
    set_seed(args.seed)
    given = args.text_tokenizer_path or args.model_path
    if processor is not None:
        tokenizer = processor.tokenizer
    elif given is not None:
        tokenizer = AutoTokenizer.from_pretrained(given)
    else:
        captions = (text for text in rows[args.text_column] if text)
        tokenizer = train_text_tokenizer(captions, args.text_vocab_size)
    add_special_tokens(tokenizer)
    grown = vq_model is not None and model is None
    if vq_model is None:
        model = NanoChatForCausalLM(nanochat_config(args.depth, args.hidden_size, len(tokenizer), args.max_length))
        processor, codes_per_image = tokenizer, 0
    elif grown:
        model, processor = build_model(args, tokenizer, vq_model)
    run.begin()
    if vq_model is not None:
        if grown and args.lora_rank and args.should_save:  # what the adapter is for, so that it can be used alone
            base = Path(args.output_dir) / "base"
            save_beside(base, lambda folder: save_model(model, processor, folder))
        for name in ("text_loss_weight", "image_loss_weight"):
            if getattr(args, name) is not None:
                setattr(model.config, name, getattr(args, name))
        codes_per_image = model.vocabulary.codes_per_image
        if args.lora_rank:
            model.name_or_path = args.model_path if is_unitok(args.model_path) else str(Path(args.output_dir) / "base")
            model = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)

    def streams(part: datasets.Dataset, augment: str) -> StreamDataset:
        return StreamDataset(
            part,
            tokenizer,
            codes_per_image,
            args.text_column,
            args.image_first,
            args.caption_dropout,
            args.max_length,
            augment,
            data_seed,
        )

    parts = {
        "model": model,
        "args": args,
        "train_dataset": streams(rows, args.augment),
        "eval_dataset": streams(eval_rows, "none"),
        "data_collator": StreamCollator(tokenizer),
        "processing_class": processor,
        "callbacks": [EpochCallback()],
    }
    if vq_model is None:
        trainer = TextTrainer(**parts)
    else:
        trainer = GPTTrainer(prompts=prompts_to_draw(args, eval_rows), **parts)
    trainer.add_callback(LastEvaluationCallback())
    run.train(trainer)
    metrics = last_metrics(trainer)
    if trainer.is_world_process_zero():
        if args.lora_rank:
            save_beside(Path(args.output_dir) / "adapter", model.save_pretrained)
            model = model.merge_and_unload()
        save_beside(args.output_dir, lambda folder: save_model(model, processor, folder))
        save_arguments(args, args.output_dir)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics, combined=False)
        if vq_model is not None:
            write_card(args.output_dir)
            push_run(trainer)
    return metrics
