"""Trains the GPT: `unitok-hf train configs/unitok.json`.

Parquet of pictures and captions, a trained image tokenizer, and a text model become one folder that
`AutoModel.from_pretrained` loads. Pictures are encoded on the fly by the frozen tokenizer inside the model, or come as
codes from `unitok-hf encode`.

- text model: NanoChat, sized by one dial as nanochat has it: `depth` layers of width 64 · depth
- text tokenizer: a byte-level BPE trained on the captions, unless one is given
- samples: half image first, half text first (without those, a prompt could not steer a picture), and a tenth of the
  latter without their caption, for classifier-free guidance
- with `use_visual_tokens: false`, the text model alone, as a plain NanoChat folder
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..modeling_unitok.modeling_unitok import UniTokForConditionalGeneration
from ..modeling_unitok.modeling_vq import UniTokVQModel
from ..processing.image_processing_unitok import UniTokImageProcessor
from ..processing.processing_unitok import UNITOK_TOKENS, UniTokProcessor, add_special_tokens
from .collators import (
    EpochCallback,
    StreamCollator,
    StreamDataset,
    parquet_files,
    require_size,
    require_text,
    training_and_validation,
    with_text_alone,
)
from .evaluation import nats_and_tokens, stream_bits
from .runs import checkpoint_to_resume, require_finite, save_arguments, save_beside
from .token_cache import require_fresh


@dataclass(kw_only=True)
class GPTTrainingArguments(TrainingArguments):
    """Arguments of `train`: those below, and every field of `transformers.TrainingArguments`.

    Defaults that differ from the parent's: AdamW at 1e-3 with betas (0.9, 0.95) and weight decay 0.1, a cosine to a
    tenth, batches of 32, ten epochs; evaluation once per epoch, checkpoints every 500 steps of which two are kept;
    columns are never dropped, memory is not pinned; a non-finite loss is an error, not skipped.
    """

    data_path: str = field(metadata={"help": "Parquet file, folder of them, or pattern, from prepare-data or encode."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Parquet to evaluate on. Default: rows held out of --data_path."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the rows held out when --eval_data_path is not given."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the captions."})
    use_visual_tokens: bool = field(default=True, metadata={"help": "False trains the text model alone."})
    visual_tokenizer_path: str | None = field(default=None, metadata={"help": "Folder of the image tokenizer."})
    visual_vocab_size: int | None = field(
        default=None, metadata={"help": "Codes the tokenizer is expected to have; another number is refused."}
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
    text_loss_weight: float = field(default=1.0, metadata={"help": "Weight of text tokens in the loss."})
    image_loss_weight: float = field(default=1.0, metadata={"help": "Weight of image tokens in the loss."})

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
        if self.use_visual_tokens and self.visual_tokenizer_path is None:
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


class TextTrainer(Trainer):
    """`transformers.Trainer` for the text model alone; a non-finite loss is an error."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        require_finite({"loss": loss}, self.state.global_step, self.args.output_dir)
        return (loss, outputs) if return_outputs else loss


class GPTTrainer(Trainer):
    """`transformers.Trainer` for UniTok models: text and image loss in the log, bits per token in evaluation."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.counted: list[torch.Tensor] = []  # nats and tokens of each batch since the last log line

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = {"loss": loss, "text_loss": outputs.text_loss, "image_loss": outputs.image_loss}
        require_finite(terms, self.state.global_step, self.args.output_dir)
        self.counted.append(nats_and_tokens(outputs, inputs["labels"], self.model.config.image_token_id))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(torch.stack(self.counted).sum(dim=0))
            text_nats, texts, image_nats, images = sums.tolist()
            logs |= {"text_loss": text_nats / max(texts, 1), "image_loss": image_nats / max(images, 1)}
            self.counted.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Bits per text token and per image token over the whole set."""
        found = stream_bits(self.model.eval(), self.get_eval_dataloader(eval_dataset), self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
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
    """A fresh NanoChat around an image tokenizer, and its processor."""
    text_model = NanoChatForCausalLM(nanochat_config(args.depth, args.hidden_size, len(tokenizer), args.max_length))
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    model.config.text_loss_weight = args.text_loss_weight
    model.config.image_loss_weight = args.image_loss_weight
    size = vq_model.config.sample_size
    image_processor = UniTokImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = UniTokProcessor(image_processor, tokenizer, num_image_tokens=model.vocabulary.codes_per_image)
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
    codes = vq_model.config.num_vq_embeddings
    if args.visual_vocab_size not in (None, codes):
        raise ValueError(
            f"visual_vocab_size is {args.visual_vocab_size}, but the tokenizer at {folder} has {codes} codes"
        )
    return vq_model


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
    checkpoint = checkpoint_to_resume(args)
    vq_model = load_visual_tokenizer(args) if args.use_visual_tokens else None
    data_seed = args.seed if args.data_seed is None else args.data_seed
    rows, eval_rows = training_and_validation(args.data_path, args.eval_data_path, args.validation_fraction, data_seed)
    for part in (rows, eval_rows):
        require_text(part, args.text_column)
    if vq_model is None:
        rows, eval_rows = (with_text_alone(part, args.text_column) for part in (rows, eval_rows))
    else:
        require_images(args, args.data_path, rows, vq_model)
        if args.eval_data_path is not None:
            require_images(args, args.eval_data_path, eval_rows, vq_model)
    set_seed(args.seed)
    if args.text_tokenizer_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.text_tokenizer_path)
    else:
        captions = (text for text in rows[args.text_column] if text)
        tokenizer = train_text_tokenizer(captions, args.text_vocab_size)
    add_special_tokens(tokenizer)
    if vq_model is None:
        model = NanoChatForCausalLM(nanochat_config(args.depth, args.hidden_size, len(tokenizer), args.max_length))
        trainer_class, processor, codes_per_image = TextTrainer, tokenizer, 0
    else:
        model, processor = build_model(args, tokenizer, vq_model)
        trainer_class, codes_per_image = GPTTrainer, model.vocabulary.codes_per_image

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

    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=streams(rows, args.augment),
        eval_dataset=streams(eval_rows, "none"),
        data_collator=StreamCollator(tokenizer),
        processing_class=processor,
        callbacks=[EpochCallback()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_beside(args.output_dir, lambda folder: (model.save_pretrained(folder), processor.save_pretrained(folder)))
        save_arguments(args, args.output_dir)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics, combined=False)
    return metrics
