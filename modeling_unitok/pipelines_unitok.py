"""UniTok models behind `pipeline(…)` of transformers and as a pipeline of diffusers.

    pipeline("any-to-any", model=…, pipeline_class=UniTokAnyToAnyPipeline)     text, images or both, from text, images, chats
    pipeline("text-to-image", model=…)                                        a task that transformers has not; ours
    UniTokPipeline.from_pretrained(…)("a red apple").images                   as diffusers has it

- transformers' own class for "any-to-any" asks for torchvision as soon as a model reads images, whether or not its image
  processor needs it; ours does not. Without torchvision it has to be named, as above
- `generation_mode` "auto" or "interleaved" gives `generated_content`: strings and pictures in their order
- `UniTokPipeline` loads what `AutoModel` loads: one folder, or one repository on the Hub, serves both libraries. diffusers'
  own loader knows no component classes outside of it, unless they lie on the disk
"""

import os

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from transformers import AnyToAnyPipeline, AutoModel, AutoProcessor, Pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


MIXED = ("auto", "interleaved")
HUB_OPTIONS = (
    "revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "trust_remote_code"
)  # fmt: skip


class UniTokAnyToAnyPipeline(AnyToAnyPipeline):
    """`AnyToAnyPipeline` without torchvision, and with mixed output.

    Example:
        >>> pipe = pipeline("any-to-any", model="out/model", pipeline_class=UniTokAnyToAnyPipeline)
        >>> pipe(text="a red apple", generation_mode="image")[0]["generated_image"]
        >>> pipe(text="a red apple", generation_mode="interleaved")[0]["generated_content"]
    """

    def __init__(self, *args, **kwargs):
        Pipeline.__init__(self, *args, **kwargs)
        self.check_model_type(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)

    def _sanitize_parameters(self, generation_mode: str | None = None, generate_kwargs: dict | None = None, **kwargs):
        kwargs["generate_kwargs"] = dict(generate_kwargs or {})  # to be changed; the caller's stay what they are
        if generation_mode not in MIXED:
            return super()._sanitize_parameters(generation_mode=generation_mode, **kwargs)
        preprocess, forward, postprocess = super()._sanitize_parameters(generation_mode="image", **kwargs)
        forward["generate_kwargs"]["generation_mode"] = generation_mode
        return preprocess, forward, postprocess | {"generation_mode": generation_mode}

    def postprocess(self, model_outputs, generation_mode: str | None = None, **kwargs) -> list[dict]:
        if generation_mode not in MIXED:
            return super().postprocess(model_outputs, generation_mode=generation_mode, **kwargs)
        texts, streams = model_outputs["prompt_text"], model_outputs["generated_sequence"]
        texts = texts if isinstance(texts, list) else [texts]
        streams = streams.flatten(0, -2)[:, model_outputs["input_ids"].shape[1] :]
        contents = self.processor.decode_mixed(streams, self.model, on_error="skip")
        texts = [text for text in texts for _ in range(len(streams) // len(texts))]
        return [
            {"input_text": getattr(text, "messages", text), "generated_content": content}
            for text, content in zip(texts, contents, strict=True)
        ]


class UniTokTextToImagePipeline(UniTokAnyToAnyPipeline):
    """`UniTokAnyToAnyPipeline` that draws unless told otherwise."""

    def _sanitize_parameters(self, generation_mode: str | None = None, **kwargs):
        # what was settled at construction comes back as it was; a call without a mode must not undo it
        return super()._sanitize_parameters(generation_mode=generation_mode or "image", **kwargs)


class UniTokPipeline(DiffusionPipeline):
    """Text to pictures, as diffusers' pipelines do it.

    Args:
        model: UniTokForConditionalGeneration.
        processor: UniTokProcessor.
    """

    def __init__(self, model, processor):
        super().__init__()
        self.register_modules(model=model, processor=processor)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, dtype: torch.dtype | str = "auto", **kwargs
    ) -> "UniTokPipeline":
        """The pipeline of a saved model.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub, as `AutoModel.from_pretrained` takes it.
            dtype: of the language model's weights; by default as they were saved. `torch_dtype` means the same.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and the like, for model and processor; others are
                for the model.

        Raises:
            OSError: there is no model or no processor.
        """
        dtype = kwargs.pop("torch_dtype", dtype)
        where = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        return cls(
            AutoModel.from_pretrained(pretrained_model_name_or_path, dtype=dtype, **kwargs),
            AutoProcessor.from_pretrained(pretrained_model_name_or_path, **where),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | torch.Tensor]:
        """Draw.

        Args:
            prompt: one or more texts.
            num_images_per_prompt: pictures of each.
            guidance_scale: weight of the prompt; 1 for none.
            temperature, top_k, top_p: of the sampling of codes; temperature 0 takes the likeliest.
            generator: of the sampling, on the model's device; or a list with one for each picture.
            output_type: "pil", or "pt" for a tensor (N, 3, H, W) in [0, 1].
            return_dict: False for a tuple.

        Returns:
            `images`, those of the first prompt first.

        Raises:
            ValueError: an unknown `output_type`, a negative temperature; and what `generate` raises.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f'output_type must be "pil" or "pt", got {output_type!r}')
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        inputs = self.processor(text=prompts, generation_mode="image", return_tensors="pt").to(self.device)
        sampling = {"do_sample": temperature > 0, "num_return_sequences": num_images_per_prompt}
        if temperature > 0:
            sampling |= {"image_temperature": temperature, "image_top_k": top_k, "image_top_p": top_p}
        elif num_images_per_prompt > 1:
            raise ValueError("temperature 0 draws the same picture every time; num_images_per_prompt must be 1")
        codes = self.model.generate(
            **inputs, generation_mode="image", guidance_scale=guidance_scale, generator=generator, **sampling
        )
        pictures = self.model.decode_image_tokens(codes)
        if output_type == "pil":
            images = self.processor.postprocess(pictures).pixel_values
        else:
            images = (pictures.clamp(-1, 1) + 1) / 2
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write one folder for both libraries: model and processor at its root, and `model_index.json`."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        self.save_config(save_directory)


__all__ = ["UniTokAnyToAnyPipeline", "UniTokPipeline", "UniTokTextToImagePipeline"]
