"""Answers chat completions over HTTP, as OpenAI's API has them, with text and pictures in and text out.

    unitok-hf serve --checkpoint out/model --port 8000
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"model": "out/model", "messages": [{"role": "user", "content": "a red"}], "max_tokens": 8}'

`model` is the --checkpoint as it was given, or left out. This is `transformers serve` with one model loaded, which it does not
know by itself: it looks its classes up in tables of names that are part of the library, and ours is registered there. Its
`POST /v1/chat/completions`, also streamed, its `/v1/completions`, `/v1/models` and `/health` are as its documentation says; a
picture comes as `image_url`, also as a `data:` address. What the model draws is not part of an answer.
"""

from dataclasses import dataclass, field

from transformers import AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from ..configuration.configuration_unitok import UniTokConfig
from ..modeling_unitok.modeling_unitok import UniTokForConditionalGeneration
from .generate import pick_device, require_model, require_port


@dataclass
class ServeArguments:
    """Arguments of `serve`."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a trained model."})
    host: str = field(default="localhost", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, mps, …; auto takes the best there is."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})

    def __post_init__(self):
        require_port(self.port)
        if "@" in self.checkpoint:
            raise ValueError(
                f"--checkpoint {self.checkpoint}: the server takes what follows an @ for a revision; rename it"
            )


def serve(args: ServeArguments) -> None:
    """Serve until interrupted.

    Raises:
        ImportError: the web server is not installed.
        OSError, ValueError: there is no UniTok model, or it has no chat template; the device cannot be used.
    """
    if not is_serve_available():
        raise ImportError("serving needs a web server: pip install 'unitok-hf[serve]'")
    from transformers.cli.serve import Serve

    device = pick_device(args.device)
    require_model(args.checkpoint)
    if AutoProcessor.from_pretrained(args.checkpoint).chat_template is None:
        raise ValueError(
            f"{args.checkpoint} has no chat template, which says how a conversation becomes a prompt; "
            "set processor.chat_template and save the processor there"
        )
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[UniTokConfig.model_type] = UniTokForConditionalGeneration.__name__
    Serve(args.checkpoint, device=str(device), host=args.host, port=args.port, default_seed=args.seed)
