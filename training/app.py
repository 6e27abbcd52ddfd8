"""A page on which a trained model draws, reads and completes pictures: `unitok-hf app --checkpoint out/demo/model`.

    Draw        prompt              ->  a grid of pictures
    Read        picture             ->  its caption, and the picture as its codes have it
    Complete    picture, prompt     ->  pictures with the upper half of this one

- the seed that was used stands beside what it made, each picture of a grid having the next one; the same seed and settings
  make it again, on the same device
- one request at a time runs the model, the others wait in line
- all of it comes from this process: no analytics, no fonts or scripts from elsewhere, no public link
- `space/` is the same page as a Space on the Hub; `gradio_client` reaches it as /draw, /read and /complete

Gradio is imported when a page is built, so that the command line can be checked without it.
"""

import html
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..modeling_unitok.modeling_unitok import UniTokForConditionalGeneration
from ..processing.image_processing_unitok import to_pictures
from ..processing.pixels import load_rgb
from ..processing.processing_unitok import UniTokProcessor
from .generate import generators, load_model, pick_device, require_port


if TYPE_CHECKING:
    import gradio as gr


MOST_PICTURES = 16
LARGEST_SEED = 2**32 - 1
SMALL = 128  # pictures up to this side are enlarged, and look better in clear pixels than blurred
CSS = """
.gradio-container main { width: 100%; max-width: 1100px; margin: 0 auto; }
.enlarged img { width: 100%; height: 100%; object-fit: contain; }
.enlarged .grid-wrap { min-height: 0; max-height: none; }
.enlarged .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
.enlarged:has(.preview) .gallery-container { min-height: 440px; }
.pixels img { image-rendering: pixelated; }
.caption textarea { font-size: 1.4em; }
.made { opacity: .7; }
#completed .gallery-item:first-child button { outline: 3px solid var(--color-accent); outline-offset: 1px; }
"""


@dataclass
class AppArguments:
    """Arguments of `app`: a model, and where its page is to be found."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a trained model."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, mps, …; auto takes the best there is."})
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 opens the page to the whole network."}
    )
    port: int | None = field(default=None, metadata={"help": "Port. Default: the first that is free from 7860 on."})

    def __post_init__(self):
        if self.port is not None:
            require_port(self.port)


def app(args: AppArguments) -> None:
    """Serve the page of a model until it is interrupted; prints its address.

    Raises:
        ImportError: gradio is not installed.
        OSError, ValueError: the model, the device or the port cannot be used.
    """
    _gradio()
    launch(build_page(*load_model(args.checkpoint, pick_device(args.device))), args.host, args.port)


def launch(page: "gr.Blocks", host: str | None = None, port: int | None = None) -> None:
    """Serve a page until it is interrupted; prints its address.

    Args:
        page: as `build_page` makes it.
        host, port: gradio's environment variables, or its defaults, when not given.

    Raises:
        OSError: the port is taken.
    """
    gr = _gradio()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        theme=gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", **fonts),
        css=CSS,
    )
    print(address, flush=True)
    page.block_thread()


@torch.no_grad()
def draw(
    model: UniTokForConditionalGeneration,
    processor: UniTokProcessor,
    prompt: str,
    num_images: int,
    guidance_scale: float,
    temperature: float,
    seed: int,
) -> list[Image.Image]:
    """Pictures of a prompt; a single one at temperature 0, where all would be the same.

    Raises:
        ValueError: what `generate` refuses.
    """
    inputs = processor(text=prompt, generation_mode="image", return_tensors="pt").to(model.device)
    ids = model.generate(
        **inputs,
        generation_mode="image",
        **_sampling(model, num_images, guidance_scale, temperature, seed),
    )
    return to_pictures(model.decode_image_tokens(ids))


@torch.no_grad()
def read(
    model: UniTokForConditionalGeneration,
    processor: UniTokProcessor,
    picture: Image.Image,
    temperature: float,
    seed: int,
) -> tuple[str, Image.Image]:
    """The caption of a picture, "" if the model writes none, and the picture that its codes stand for."""
    inputs = processor(images=picture, text="", return_tensors="pt").to(model.device)
    sampling = {}
    if temperature > 0:
        sampling = {"temperature": temperature, "top_k": 0, "generator": generators(model.device, seed, 1)}
    ids = model.generate(**inputs, generation_mode="text", do_sample=temperature > 0, **sampling)  # (1, L + caption)
    caption = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    codes = model.get_image_tokens(inputs["pixel_values"])
    return caption, to_pictures(model.decode_image_tokens(codes))[0]


@torch.no_grad()
def complete(
    model: UniTokForConditionalGeneration,
    processor: UniTokProcessor,
    picture: Image.Image,
    prompt: str,
    num_images: int,
    guidance_scale: float,
    temperature: float,
    seed: int,
) -> tuple[Image.Image, list[Image.Image]]:
    """A picture as the model gets it, square and small, and pictures with the codes of its upper half; see `draw`.

    Raises:
        ValueError: what `complete_image` refuses.
    """
    inputs = processor(text=prompt, return_tensors="pt").to(model.device)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"].to(model.device)
    rows, columns = model.vocabulary.grid
    ids = model.complete_image(
        **inputs,
        image_codes=model.vocabulary.to_codes(model.get_image_tokens(pixels)),
        keep=rows // 2 * columns,
        **_sampling(model, num_images, guidance_scale, temperature, seed),
    )
    return to_pictures(pixels)[0], to_pictures(model.decode_image_tokens(ids))


def build_page(model: UniTokForConditionalGeneration, processor: UniTokProcessor) -> "gr.Blocks":
    """The page of a model, for `launch`.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's own.

    Raises:
        ImportError: gradio is not installed.
    """
    gr = _gradio()
    rows, columns = model.vocabulary.grid
    height, width = (number * model.model.vqmodel.downsampling for number in model.vocabulary.grid)
    pixels = ["pixels"] if max(height, width) <= SMALL else []

    @contextmanager
    def told() -> Iterator[None]:
        """What a user can do something about becomes a message on the page."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def opened(picture: str | None) -> Image.Image:
        if picture is None:
            raise ValueError("There is no picture yet: drop one into the box, or click on it.")
        return load_rgb(picture)

    def chosen(seed: int | None, fresh: bool) -> int:
        return random.randint(0, LARGEST_SEED - MOST_PICTURES) if fresh or seed is None else seed

    def made(seed: int, count: int, **settings: float) -> str:
        seeds = f"seed **{seed}**" if count == 1 else f"seeds **{seed}** to {seed + count - 1}"
        return " · ".join([seeds, *(f"{name} {value:g}" for name, value in settings.items())])

    def grid(pictures: list[Image.Image]) -> gr.Gallery:
        return gr.Gallery(pictures, columns=min(4, max(2, len(pictures))))

    def on_draw(prompt, num_images, guidance_scale, temperature, seed, fresh):
        seed = chosen(seed, fresh)
        with told():
            pictures = draw(model, processor, prompt or "", num_images, guidance_scale, temperature, seed)
        return grid(pictures), made(seed, len(pictures), guidance=guidance_scale, temperature=temperature), seed

    def on_read(picture, temperature, seed, fresh):
        seed = chosen(seed, fresh)
        with told():
            caption, seen = read(model, processor, opened(picture), temperature, seed)
        if not caption:
            gr.Warning("The model wrote nothing about this picture; another temperature or seed may help.")
        return caption, seen, made(seed, 1, temperature=temperature), seed

    def on_complete(picture, prompt, num_images, guidance_scale, temperature, seed, fresh):
        seed = chosen(seed, fresh)
        with told():
            original, pictures = complete(
                model, processor, opened(picture), prompt or "", num_images, guidance_scale, temperature, seed
            )
        note = made(seed, len(pictures), guidance=guidance_scale, temperature=temperature)
        return grid([original, *pictures]), f"first the picture itself · {note}", seed

    def run(events: list, work: Callable, inputs: list, outputs: list, name: str) -> None:
        """Have events do the work, one at a time in all; its last result is the seed, for the box before the last."""
        gr.on(
            events,
            work,
            inputs,
            [*outputs, inputs[-2]],
            show_progress_on=outputs[0],
            api_name=name,
            concurrency_id="model",
            concurrency_limit=1,
        )

    def picture_box() -> gr.Image:
        box = gr.Image(
            label="Picture", type="filepath", sources=["upload", "clipboard"], height=240, elem_classes="enlarged"
        )
        # the file as it was uploaded: `load_rgb` opens more kinds than gradio, and says what is wrong with the others
        box.preprocess = lambda file: file and file.path
        return box

    def prompt_box(label: str, placeholder: str) -> gr.Textbox:
        return gr.Textbox(label=label, placeholder=placeholder, max_lines=3, max_length=1000)

    def drawing_options(num_images: int) -> list:
        return [
            gr.Slider(1, MOST_PICTURES, num_images, step=1, precision=0, label="Pictures"),
            gr.Slider(1, 10, 3, step=0.5, label="Guidance", info="Weight of the prompt; 1 for none."),
            gr.Slider(0, 2, 1, step=0.05, label="Temperature", info="0 always takes the likeliest code."),
            *seed_boxes(),
        ]

    def seed_boxes() -> list:
        with gr.Row(equal_height=True):
            return [
                gr.Number(0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed", min_width=120),
                gr.Checkbox(True, label="Random seed", info="A new one each time.", min_width=120),
            ]

    def gallery(name: str) -> gr.Gallery:
        return gr.Gallery(
            label=name.capitalize(), show_label=False, format="png", object_fit="contain", height="auto", elem_id=name,
            interactive=False, elem_classes=["enlarged", *pixels], buttons=["download", "fullscreen"],
        )  # fmt: skip

    with gr.Blocks(title="UniTok", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        about = ["/".join(Path(model.name_or_path).parts[-2:])] if model.name_or_path else []
        about += [f"pictures of {width}×{height} pixels in {columns}×{rows} codes"]
        gr.Markdown(f"# UniTok\n{html.escape(' · '.join(about))}")

        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = prompt_box("Prompt", "What to draw")
                button = gr.Button("Draw", variant="primary")
                options = drawing_options(8)
            with gr.Column(scale=3, min_width=300):
                drawn, note = gallery("drawn"), gr.Markdown(elem_id="drawn-with", elem_classes="made")
        run([button.click, prompt.submit], on_draw, [prompt, *options], [drawn, note], "draw")

        with gr.Tab("Read"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = picture_box()
                button = gr.Button("Read", variant="primary")
                temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", info="0 always takes the likeliest word."
                )
                options = [temperature, *seed_boxes()]
            with gr.Column(scale=3, min_width=300):
                caption = gr.Textbox(label="Caption", interactive=False, elem_id="caption", elem_classes="caption")
                seen = gr.Image(
                    label="What the model sees", format="png", interactive=False, height=320, elem_id="seen",
                    elem_classes=["enlarged", *pixels], buttons=["download", "fullscreen"],
                )  # fmt: skip
                note = gr.Markdown(elem_id="read-with", elem_classes="made")
        run([button.click], on_read, [picture, *options], [caption, seen, note], "read")

        with gr.Tab("Complete"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = picture_box()
                prompt = prompt_box("What it shows", "What the whole picture shows")
                button = gr.Button("Keep the upper half, draw the lower", variant="primary")
                options = drawing_options(7)
            with gr.Column(scale=3, min_width=300):
                completed, note = gallery("completed"), gr.Markdown(elem_id="completed-with", elem_classes="made")
        run([button.click, prompt.submit], on_complete, [picture, prompt, *options], [completed, note], "complete")
    return page


def _gradio():
    """The module, or an error that says where it comes from."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio: pip install 'unitok-hf[app]'") from error
    return gradio


def _sampling(
    model: UniTokForConditionalGeneration, num_images: int, guidance_scale: float, temperature: float, seed: int
) -> dict:
    """Arguments of `generate` and `complete_image` that say how codes are drawn."""
    common = {"guidance_scale": guidance_scale, "do_sample": temperature > 0}
    if temperature == 0:
        return common
    own = generators(model.device, seed, num_images)
    return common | {"generator": own, "image_temperature": temperature, "num_return_sequences": num_images}
