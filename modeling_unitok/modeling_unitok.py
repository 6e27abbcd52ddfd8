"""UniTok: one causal language model over text and image tokens.

    input_ids with <|image|> placeholders + pixels or codes
        │ fill_images: pixels -> codes (frozen, fp32) -> visual token ids
        ▼
    token ids ── language_model (NanoChat or any other) ── lm_head ── logits over [ text | visual ]

- one embedding matrix and one head over text rows and visual rows; a code is predicted as a word is
- placeholders are filled in `input_ids` and in `labels`, so `labels=input_ids.clone()` trains on the codes
- the loss is the weighted sum over tokens divided by `num_items_in_batch`, with its text and image part reported
- the image tokenizer is part of the model: one checkpoint; its weights stay fp32 and frozen

Letters: B batch, T sequence, V vocabulary, D hidden width, M images in the batch, h w grid.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.configuration_unitok import SPECIAL_TOKENS, UniTokConfig
from ..configuration.refusal_unitok import refused_in_words
from ..configuration.vocabulary_unitok import VisualVocabulary
from .generation_unitok import UniTokGenerationMixin
from .loss_unitok import sliced_cross_entropy
from .modeling_vq import UniTokVQModel, require_finite, require_safetensors
from .scoring_unitok import UniTokScoringMixin


SPARE_ROWS = 32  # at least so many text rows are left for tokens added later


@dataclass
class UniTokOutput(ModelOutput):
    """What `UniTokForConditionalGeneration.forward` returns.

    Args:
        loss: scalar, the weighted sum over tokens divided by `num_items_in_batch` (the labelled tokens of this batch when
            that is not given).
        text_loss, image_loss: scalars without gradient, mean negative log-likelihood in nats per labelled text token and
            per labelled image token; 0 where there are none.
        logits: (B, T, V), or the last `logits_to_keep` positions; None when they were skipped.
        past_key_values: the cache.
    """

    loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def require_own_shards(index: Path) -> None:
    """Raises ValueError if an index of weights, where there is one, names something else than safetensors files beside it."""
    if index.is_file():
        for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} lists {name!r}, which is no safetensors file beside it; it is not opened")


class UniTokPreTrainedModel(PreTrainedModel):
    """What both classes share: configuration, initialisation, and what the library may do with them."""

    config: UniTokConfig
    config_class = UniTokConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatDecoderLayer", "FrozenVQModel"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["vqmodel"]
    _keep_in_fp32_modules = [r"(?:model\.)?vqmodel"]  # what quantizers leave alone, by names from the root on
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers does, from safetensors alone: a pickle is never opened, nor a file outside of the folder.

        Raises:
            ValueError: the configuration or the weights are malformed, do not fit together, or are not finite; or the image
                tokenizer lacks some, whose codes would then mean nothing.
            OSError: there are none.
        """
        where, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if torch.get_default_device().type == "meta":
            return super().from_pretrained(where, *args, **kwargs)  # which says why that cannot be
        with refused_in_words(f"the model in {where} cannot be loaded"):
            if where is not None:
                require_own_shards(Path(where) / (kwargs.get("subfolder") or "") / "model.safetensors.index.json")
            kwargs = {"use_safetensors": True, "output_loading_info": True} | kwargs
            model, info = super().from_pretrained(where, *args, **kwargs)
        missing = sorted(name for name in info["missing_keys"] if "vqmodel." in name)
        if missing and where is not None:
            raise ValueError(
                f"the model in {where} has no {missing[0]}, and {len(missing)} such weights are missing in all"
            )
        if where is not None and not hasattr(model, "hf_quantizer"):
            require_finite(model, f"the weights in {where} are of no use")
        return (model, info) if with_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        require_safetensors(checkpoint_files or ())
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of what is not the language model's own, which initialises itself.

        | parameter                  | distribution                                      |
        | lm_head.weight             | as the language model has its linear layers       |
        | vqmodel codebook           | N(0, 1), the scale of trained latents             |
        | vqmodel convolutions etc.  | torch's defaults, as diffusers has them           |
        """
        if module is self.get_output_embeddings():
            self.model.language_model._init_weights(module)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
            module.reset_parameters()

    @property
    def vocabulary(self) -> VisualVocabulary:
        """The arithmetic between codes and token ids."""
        return self.config.vocabulary

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Make room for a text tokenizer that has grown; the rows of the codes move up as one piece.

        No text row is ever dropped: a number that the spare rows can hold changes nothing.

        Args:
            new_num_tokens: text tokens, `len(tokenizer)`; rounded up to a multiple of 64.
            pad_to_multiple_of: of the text rows, if 64 is not enough.
            mean_resizing: as in `PreTrainedModel`.

        Returns:
            the input embeddings.
        """
        before = self.config.text_vocab_size
        multiple = math.lcm(64, pad_to_multiple_of or 1)
        after = math.ceil(max(new_num_tokens or 0, before) / multiple) * multiple
        if after == before:
            return self.get_input_embeddings()
        embeddings = super().resize_token_embeddings(after + self.config.num_visual_tokens, None, mean_resizing)
        codes_from = before + self.config.num_visual_tokens  # where the new rows are now, behind those of the codes
        both = [embeddings, self.get_output_embeddings()]  # UniTokModel has no output embeddings
        for weight in {part.weight for part in both if part is not None}:
            weight[before:] = torch.cat([weight[codes_from:], weight[before:codes_from]])
        self.config.text_vocab_size = after
        return embeddings


class FrozenVQModel(UniTokVQModel):
    """The image tokenizer inside a model: whatever is done to the rest, it stays as it was trained.

    It is not trained, stays in evaluation mode, and stays fp32 under `.to(dtype)`, `.half()` and the like, because in half
    precision pictures get other codes.
    """

    def train(self, mode: bool = True):
        """Evaluation mode and frozen, always; `from_pretrained` makes all it loads trainable, and then calls `eval`.

        Where that is so already, the Trainer's call at every step costs nothing.
        """
        if next(self.parameters()).requires_grad:
            self.requires_grad_(False)
        return super().train(False) if self.training else self

    def _apply(self, fn, recurse: bool = True):
        def in_full(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == torch.float32:
                return moved
            source = tensor if tensor.dtype == torch.float32 else moved  # not what was rounded on the way
            return source.to(moved.device, torch.float32)

        return super()._apply(in_full, recurse)


class UniTokModel(UniTokPreTrainedModel):
    """The language model and the image tokenizer, without the head."""

    def __init__(self, config: UniTokConfig):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        vq_config = {"num_vq_embeddings": config.num_visual_tokens, **config.vq_config}
        self.vqmodel = FrozenVQModel(**vq_config).float().requires_grad_(False).eval()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of token ids (B, T) in which no placeholder is left; arguments as the text model's."""
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class UniTokForConditionalGeneration(
    UniTokPreTrainedModel, UniTokGenerationMixin, UniTokScoringMixin, GenerationMixin
):
    """The model that reads and draws images with next-token prediction.

    Example:
        >>> model = AutoModel.from_pretrained("out/model")
        >>> inputs = processor(text="a red apple", generation_mode="image", return_tensors="pt")
        >>> picture = model.decode_image_tokens(model.generate(**inputs, generation_mode="image"))
    """

    output_modalities = ("image", "text")
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UniTokConfig):
        super().__init__(config)
        self.model = UniTokModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tied_weights_keys = {"lm_head.weight": f"{embedding_name(self)}.weight"}
        self.generation_config._from_model_config = False  # else image_temperature and the like are saved but not read
        self.post_init()

    @classmethod
    def from_parts(
        cls, text_model: PreTrainedModel, vq_model: UniTokVQModel, tokenizer: PreTrainedTokenizerBase
    ) -> "UniTokForConditionalGeneration":
        """A text model that learns to draw: its vocabulary, extended by the codes of an image tokenizer.

        Text rows keep their weights and ids. New rows of the input embedding are drawn with the mean and spread of the
        text rows; new rows of the head lie at their mean with a hundredth of the spread, so that at first no code is
        likelier than a middling word (as all new rows do when both are one matrix).

        Args:
            text_model: a causal language model with input and output embeddings and no bias in the head; it is left as
                it was.
            vq_model: a trained image tokenizer.
            tokenizer: of the text model, with the special tokens of `add_special_tokens` in processing_unitok.

        Returns:
            a model in evaluation mode that owns copies of the weights.

        Raises:
            ValueError: the tokenizer lacks a special token, or the logits of the joined model differ from the text
                model's (its head does more than a matrix product and a softcap).
        """
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None) for kind in SPECIAL_TOKENS}
        missing = [name for name, token in special.items() if token is None]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}; call add_special_tokens on it first")
        rows = text_model.get_input_embeddings().weight.shape[0]
        text_vocab_size = math.ceil(max(rows, len(tokenizer) + SPARE_ROWS) / 64) * 64
        config = UniTokConfig(
            text_config=text_model.config,
            vq_config={key: value for key, value in vq_model.config.items() if not key.startswith("_")},
            text_vocab_size=text_vocab_size,
            num_visual_tokens=vq_model.config.num_vq_embeddings,
            image_grid=vq_model.grid(vq_model.config.sample_size, vq_model.config.sample_size),
            tie_word_embeddings=text_model.config.tie_word_embeddings,
            **special | {"eos_token_id": cls._ends(text_model, tokenizer)},
        )
        model = cls._from_config(config, dtype=text_model.dtype).to(text_model.device)
        tied = config.tie_word_embeddings
        extend_rows(
            model.get_input_embeddings().weight, text_model.get_input_embeddings().weight, 0.01 if tied else 1.0
        )
        if not tied:
            extend_rows(model.get_output_embeddings().weight, text_model.get_output_embeddings().weight, 0.01)
        backbone = text_model.base_model
        weights = backbone.state_dict() | {f"{embedding_name(backbone)}.weight": model.get_input_embeddings().weight}
        model.model.language_model.load_state_dict(weights)
        model.model.vqmodel.load_state_dict(vq_model.state_dict())
        model.generation_config = copy.deepcopy(text_model.generation_config)
        model.generation_config._from_model_config = False
        model.generation_config.update(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        model.eval()
        words = [token for token in range(rows) if token not in special.values()][:16]
        probe = torch.tensor([words], device=model.device)
        was_training = text_model.training
        with torch.no_grad():
            before = text_model.eval()(input_ids=probe).logits.float()
            after = model(input_ids=probe).logits[..., : before.shape[-1]].float()
        text_model.train(was_training)
        rounding = 1e-3 if text_model.dtype == torch.float32 else 0.1
        if not torch.allclose(before, after, atol=rounding):
            raise ValueError(
                f"{type(text_model).__name__} computes its logits in a way that UniTok does not reproduce "
                f"(largest difference {(before - after).abs().max():.3g})"
            )
        return model

    @staticmethod
    def _ends(text_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | list[int]:
        """Ids that end a text: the tokenizer's, or, where the text model has several and it among them, all of these."""
        for owner in (text_model.generation_config, text_model.config):
            ends = owner.eos_token_id
            if isinstance(ends, list) and tokenizer.eos_token_id in ends:
                return [end for end in ends if end != tokenizer.pad_token_id]  # Qwen pads with one of its ends
        return tokenizer.eos_token_id

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Visual token ids (M, h·w), row by row, of pictures (M, 3, H, W) in [-1, 1].

        Raises:
            ValueError: pictures of another size than the model's grid, or values outside [-1, 1].
        """
        codes = self.model.vqmodel.encode_to_indices(pixel_values.to(self.model.vqmodel.device))
        if tuple(codes.shape[1:]) != self.vocabulary.grid:
            side = self.model.vqmodel.downsampling
            rows, columns = self.vocabulary.grid
            raise ValueError(
                f"the model reads pictures of {rows * side}x{columns * side} pixels, "
                f"got {pixel_values.shape[-2]}x{pixel_values.shape[-1]}"
            )
        return self.vocabulary.to_ids(codes.flatten(1)).to(pixel_values.device)

    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.Tensor:
        """Pictures (M, 3, H, W) in [-1, 1] of visual token ids (M, h·w).

        Raises:
            ValueError: an id is no visual token, or a row is no whole image.
        """
        rows, columns = self.vocabulary.grid
        if image_tokens.ndim != 2 or image_tokens.shape[1] != rows * columns:
            raise ValueError(f"an image is {rows * columns} tokens, got ids of shape {tuple(image_tokens.shape)}")
        codes = self.vocabulary.to_codes(image_tokens).unflatten(1, (rows, columns)).to(self.model.vqmodel.device)
        with torch.no_grad():
            return self.model.vqmodel.decode_from_indices(codes).sample.clamp(-1, 1)

    def fill_images(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
    ) -> torch.LongTensor:
        """`input_ids` (B, T) with each placeholder replaced by the visual token it stands for, in reading order.

        Args:
            input_ids: placeholders `image_token_id`, h·w of them per image.
            pixel_values: (M, 3, H, W) in [-1, 1], the M images of the batch in reading order.
            image_codes: (M, h·w) or (M, h, w) integers, in place of pixels.

        Raises:
            ValueError: both pixels and codes; codes that are no images of h·w integers; a number of images that differs
                from the placeholders, of which every row must have those of whole images; or an image whose placeholders
                do not stand together.
        """
        placeholders = input_ids == self.config.image_token_id
        n = self.vocabulary.codes_per_image
        if pixel_values is not None and image_codes is not None:
            raise ValueError("pass pixel_values or image_codes, not both")
        if pixel_values is not None:
            tokens = self.get_image_tokens(pixel_values)
        elif image_codes is not None:
            if tuple(image_codes.shape[1:]) not in ((n,), self.vocabulary.grid) or image_codes.is_floating_point():
                raise ValueError(
                    f"image_codes must be integers of shape (images, {n}) or (images, {self.vocabulary.grid[0]}, "
                    f"{self.vocabulary.grid[1]}), got {image_codes.dtype} {tuple(image_codes.shape)}"
                )
            tokens = self.vocabulary.to_ids(image_codes.flatten(1).to(input_ids.dtype))
        else:
            tokens = input_ids.new_empty(0, n)
        counts = placeholders.sum(dim=1)
        if counts.sum() != tokens.numel() or (counts % n).any():
            raise ValueError(
                f"{len(tokens)} images are {tokens.numel()} tokens, but the rows of input_ids have {counts.tolist()} "
                f"placeholders (id {self.config.image_token_id}); each image needs {n}"
            )
        if len(tokens):
            self._require_together(placeholders)
        return input_ids.masked_scatter(placeholders, tokens.to(input_ids.device))

    def _require_together(self, placeholders: torch.BoolTensor) -> None:
        """Raises ValueError unless placeholders (B, T), row by row those of whole images, stand h·w together."""
        n = self.vocabulary.codes_per_image
        columns = placeholders.nonzero()[:, 1].view(-1, n)  # (images, n)
        apart = (columns - columns[:, :1] != torch.arange(n, device=columns.device)).any(dim=1)
        if apart.any():
            row, position = placeholders.nonzero()[int(apart.nonzero()[0]) * n].tolist()
            raise ValueError(
                f"row {row}, position {position}: the {n} placeholders of an image (id {self.config.image_token_id}) "
                "do not stand together"
            )

    def softcap(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as the text model has them, squashed into (-c, c) when its configuration names such a c."""
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)

    def token_losses(
        self, hidden: torch.Tensor, shift_labels: torch.LongTensor, num_items_in_batch: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, mean text loss and mean image loss of hidden states (B, T, D) and what is to follow each (B, T)."""
        targets = shift_labels.to(hidden.device)
        labelled = targets != -100
        targets = targets[labelled]  # (N,)
        visual = self.vocabulary.is_visual(targets)
        loss, nll = sliced_cross_entropy(
            hidden[labelled],
            targets,
            torch.where(visual, float(self.config.image_loss_weight), float(self.config.text_loss_weight)),
            lambda rows: self.softcap(self.lm_head(rows)),
            self.lm_head.parameters(),
            self.config.vocab_size,
        )
        items = len(targets) if num_items_in_batch is None else num_items_in_batch
        text_loss, image_loss = ((nll * kind).sum() / kind.sum().clamp(min=1) for kind in (~visual, visual))
        return loss / items, text_loss, image_loss

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniTokOutput:
        """Logits, and the loss when labels are given.

        Args:
            input_ids: (B, T), with placeholders for the images that `pixel_values` or `image_codes` bring.
            pixel_values: (M, 3, H, W) in [-1, 1].
            image_codes: (M, h·w) int64, in place of `pixel_values`.
            labels: (B, T), token ids or placeholders where `input_ids` has them; -100 is ignored. Shifted inside.
            shift_labels: (B, T), in place of `labels`: what follows each position. Whoever splits sequences over devices
                shifts before.
            num_items_in_batch: labelled tokens over all accumulated batches and processes; the loss is divided by it.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
            skip_logits: return None for the logits, which the loss does not need. Default: in training with labels.

        Raises:
            ValueError: see `fill_images`; images without `input_ids`; an id outside the vocabulary; or a placeholder is
                left where no image came. (Whether streams are well formed is the business of whoever made them; `score`
                and `generate` look.)
        """
        with_images = pixel_values is not None or image_codes is not None
        if with_images and input_ids is None:
            raise ValueError("images fill the placeholders of input_ids; pass input_ids, not inputs_embeds")
        # a decoding step, which has neither images nor placeholders, is spared the look for them
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        if with_images or (begins and input_ids is not None):
            self._require_known(input_ids)
            filled = self.fill_images(input_ids, pixel_values, image_codes)
            if shift_labels is not None:
                following = F.pad(filled[:, 1:], (0, 1), value=-100)
                shift_labels = torch.where(shift_labels == self.config.image_token_id, following, shift_labels)
            elif labels is not None:
                labels = torch.where(labels == self.config.image_token_id, filled, labels)
            input_ids = filled
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        outputs = self.model.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss = text_loss = image_loss = logits = None
        if shift_labels is not None:
            loss, text_loss, image_loss = self.token_losses(
                outputs.last_hidden_state, shift_labels, num_items_in_batch
            )
        if not (self.training and shift_labels is not None if skip_logits is None else skip_logits):
            hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
            logits = self.softcap(self.lm_head(hidden))  # (B, T, V)
        return UniTokOutput(
            loss=loss,
            text_loss=text_loss,
            image_loss=image_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def embedding_name(model: PreTrainedModel) -> str:
    """Name of the input embeddings among the modules of `model`."""
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


@torch.no_grad()
def extend_rows(target: torch.Tensor, source: torch.Tensor, spread: float) -> None:
    """Copy the rows of `source` (R, D) to the top of `target` (V, D); draw the rest with their mean and a share of their
    spread."""
    rows = source.shape[0]
    target[:rows] = source
    target[rows:] = source.mean(dim=0) + spread * source.std(dim=0) * torch.randn_like(target[rows:])


__all__ = ["UniTokForConditionalGeneration", "UniTokModel", "UniTokPreTrainedModel"]
