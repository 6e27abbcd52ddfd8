"""UniTok for Hugging Face: a GPT that reads and draws images with next-token prediction.

Importing the package registers its classes with transformers' Auto classes, so that `AutoModel.from_pretrained` and the
others load UniTok models without further flags.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY


# In a source checkout the subpackages sit beside this folder; in an installed wheel they sit inside it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "modeling_unitok").is_dir():
    __path__.append(str(_CHECKOUT))

from .configuration.configuration_unitok import UniTokConfig
from .configuration.vocabulary_unitok import VisualVocabulary
from .hub import save_remote_code
from .modeling_unitok.generation_unitok import Segment
from .modeling_unitok.modeling_unitok import UniTokForConditionalGeneration, UniTokModel
from .modeling_unitok.modeling_vq import UniTokVQModel
from .modeling_unitok.pipelines_unitok import UniTokAnyToAnyPipeline, UniTokPipeline, UniTokTextToImagePipeline
from .modeling_unitok.streaming_unitok import Piece, UniTokStreamer
from .processing.image_processing_unitok import UniTokImageProcessor
from .processing.processing_unitok import UniTokProcessor, add_special_tokens


__version__ = "0.1.0"

AutoConfig.register(UniTokConfig.model_type, UniTokConfig)
# AutoModel gives the whole model: users of AutoModel.from_pretrained(...) expect to generate
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(UniTokConfig, UniTokForConditionalGeneration)
AutoImageProcessor.register(UniTokConfig, image_processor_classes={"pil": UniTokImageProcessor})
AutoProcessor.register(UniTokConfig, UniTokProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "text-to-image",  # not a task of transformers
    pipeline_class=UniTokTextToImagePipeline,
    pt_model=AutoModelForMultimodalLM,
    type="multimodal",
)

__all__ = [
    "Piece",
    "Segment",
    "UniTokAnyToAnyPipeline",
    "UniTokConfig",
    "UniTokForConditionalGeneration",
    "UniTokImageProcessor",
    "UniTokModel",
    "UniTokPipeline",
    "UniTokProcessor",
    "UniTokStreamer",
    "UniTokTextToImagePipeline",
    "UniTokVQModel",
    "VisualVocabulary",
    "add_special_tokens",
    "save_remote_code",
]
