"""LoRA for a model that draws: low-rank updates of the layers, and whole rows for what is new.

    linear layers of the language model     W + B A · alpha/rank, W frozen      (Hu et al., arXiv:2106.09685)
    rows of the codes, <|image_start|>,     trained as they are, in the embedding and in the head;
    <|image_end|>, <|uncond|>               the rows of words stay frozen

New rows start at random, where a low rank cannot help; they are what peft calls trainable tokens. A matrix that is both
embedding and head is trained once.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..modeling_unitok.modeling_unitok import UniTokForConditionalGeneration, embedding_name


def add_lora(model: UniTokForConditionalGeneration, rank: int, alpha: float, dropout: float) -> PreTrainedModel:
    """The model with adapters, a `peft.PeftModel`; everything else in it is frozen.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora_rank needs peft; pip install 'unitok-hf[lora]'") from error
    layers = model.model.language_model.named_modules()
    kinds = {name.rsplit(".")[-1] for name, module in layers if isinstance(module, (nn.Linear, Conv1D))}
    config = model.config
    rows = [config.image_start_token_id, config.image_end_token_id, config.uncond_token_id]
    rows += range(config.text_vocab_size, config.vocab_size)
    ends = [embedding_name(model)] if config.tie_word_embeddings else [embedding_name(model), "lm_head"]
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(kinds))})",
            trainable_token_indices=dict.fromkeys(ends, rows),
        ),
    )
