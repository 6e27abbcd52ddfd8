"""`unitok-hf app` as somebody uses it: the real command, in a real browser; and the Space that shows the same page.

The page's process and the browser are watched: whatever they ask of another machine is found here.
"""

import builtins
import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, ROOT, TINY_VQ, draw
from PIL import Image
from transformers import NanoChatConfig

import unitok_hf_cli as cli
from unitok_hf import UniTokConfig, UniTokForConditionalGeneration
from unitok_hf.processing.image_processing_unitok import to_pictures
from unitok_hf.training import app


LOCAL = "127.0.0.1"
# Runs a command; every address that its process looks up or connects to, beyond this machine, is a line in a file.
WATCHED = """
import sys

def watch(event, args):
    host = {"socket.connect": lambda: args[1], "socket.getaddrinfo": lambda: args}.get(event, lambda: None)()
    if isinstance(host, tuple) and host[0] not in ("127.0.0.1", "localhost", "::1"):
        print(event, args, file=log, flush=True)

log = open(sys.argv[1], "w")
sys.addaudithook(watch)
from unitok_hf_cli import main
main(sys.argv[2:])
"""
PIXELS = """async selector => Promise.all([...document.querySelectorAll(selector + " img")].map(async image =>
    [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]))"""


@pytest.fixture(scope="module")
def model() -> UniTokForConditionalGeneration:
    """As in conftest.py, with codes of several kinds; for the whole file, since the page is started once."""
    torch.manual_seed(0)
    text_config = NanoChatConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2
    )
    config = UniTokConfig(text_config=text_config, text_vocab_size=384, num_visual_tokens=64, vq_config=TINY_VQ)
    model = UniTokForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.vqmodel.codebook, std=0.3)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, processor) -> str:
    folder = tmp_path_factory.mktemp("app") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def address(tmp_path_factory, checkpoint) -> Iterator[str]:
    """Where the command says that its page is. At the end nothing beyond this machine has been asked."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'unitok-hf[app]'")
    folder = tmp_path_factory.mktemp("server")
    command = [
        sys.executable,
        "-c",
        WATCHED,
        str(folder / "asked"),
        "app",
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "gradio")}
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    with process:
        try:
            line = process.stdout.readline().strip()
            assert urlsplit(line).hostname == LOCAL, (folder / "stderr").read_text()
            yield line
        finally:
            process.terminate()
    assert (folder / "asked").read_text() == ""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no chromium or google-chrome on the path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, freshly opened. At the end its console has no errors, and every request was answered by its process."""
    trouble = []
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: message.type == "error" and trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "response", lambda response: response.status >= 400 and trouble.append((response.status, response.url))
        )

        def asked(request):
            if urlsplit(request.url).scheme not in ("data", "blob") and urlsplit(request.url).hostname != LOCAL:
                trouble.append(request.url)

        def failed(request):
            # gradio closes its stream of events itself when there are no more
            if "/queue/data" not in request.url or request.failure != "net::ERR_ABORTED":
                trouble.append((request.failure, request.url))

        page.on("request", asked)
        page.on("requestfailed", failed)
        page.goto(address)
        yield page
        page.wait_for_load_state()
        assert trouble == []


def open_tab(page, name: str):
    """The panel of a tab."""
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def set_seed(panel, seed: int) -> None:
    panel.get_by_label("Random seed").uncheck()
    panel.get_by_label("Seed", exact=True).fill(str(seed))


def press(page, panel, button: str, result: str, seed: int | None = None) -> list[bytes]:
    """Press a button, with a seed or a random one; returns pixels of the pictures when the result shows another seed."""
    if seed is not None:
        set_seed(panel, seed)
    note = page.locator(f"#{result}-with strong")
    before = note.inner_text() if note.count() else ""
    panel.get_by_role("button", name=button, exact=True).click()
    page.wait_for_function(
        "([id, before]) => (document.querySelector(`#${id}-with strong`)?.innerText ?? before) != before",
        arg=[result, before],
    )
    assert seed is None or note.inner_text() == str(seed)
    page.wait_for_timeout(300)  # the pictures come with the note, but may be drawn after it
    files = page.evaluate(PIXELS, f"#{ {'read': 'seen'}.get(result, result) }")
    return [pixels(Image.open(io.BytesIO(bytes(file)))) for file in files]


def pixels(picture: Image.Image) -> bytes:
    return picture.convert("RGB").tobytes()


@pytest.fixture
def picture_file(tmp_path) -> Path:
    """A picture that is larger than the model's, and not square."""
    draw(CAPTIONS[0]).resize((120, 90)).save(tmp_path / "circle.png")
    return tmp_path / "circle.png"


def test_a_prompt_becomes_a_grid_and_its_seed_makes_it_again(page, model, processor):
    panel = open_tab(page, "Draw")
    panel.get_by_label("Prompt").fill("a red circle")
    panel.get_by_label("number input for Pictures").fill("5")
    first = press(page, panel, "Draw", "drawn")
    seed = int(panel.get_by_label("Seed", exact=True).input_value())
    assert page.locator("#drawn-with").inner_text() == f"seeds {seed} to {seed + 4} · guidance 3 · temperature 1"
    second = press(page, panel, "Draw", "drawn")
    third = press(page, panel, "Draw", "drawn", seed=3)
    again = press(page, panel, "Draw", "drawn", seed=seed)
    assert [len(grid) for grid in (first, second, third)] == [5, 5, 5]
    assert first == again and first != second and first != third
    panel.get_by_label("number input for Pictures").fill("1")
    [alone] = press(page, panel, "Draw", "drawn", seed=6)  # the fourth of them, up to rounding in another batch
    differences = np.frombuffer(alone, np.uint8).astype(int) - np.frombuffer(third[3], np.uint8)
    assert np.abs(differences).max() <= 1
    assert third == [pixels(one) for one in app.draw(model, processor, "a red circle", 5, 3.0, 1.0, 3)]
    width = page.locator("#drawn img").first.bounding_box()["width"]
    assert width > 64, "small pictures are enlarged"


def test_the_slider_is_the_guidance(page, model, processor):
    panel = open_tab(page, "Draw")
    panel.get_by_label("Prompt").fill("a blue square")
    panel.get_by_label("number input for Pictures").fill("2")
    panel.get_by_role("slider", name="Guidance").fill("7.5")
    drawn = press(page, panel, "Draw", "drawn", seed=1)
    assert drawn == [pixels(one) for one in app.draw(model, processor, "a blue square", 2, 7.5, 1.0, 1)]
    assert drawn != [pixels(one) for one in app.draw(model, processor, "a blue square", 2, 3.0, 1.0, 1)]


def test_a_picture_gets_its_caption(page, model, processor, picture_file):
    picture, seed = Image.open(picture_file), 2
    caption, seen = app.read(model, processor, picture, 0.7, seed)
    assert caption
    panel = open_tab(page, "Read")
    panel.locator("input[type=file]").set_input_files(picture_file)
    panel.get_by_role("button", name="Remove Image").wait_for()
    panel.get_by_label("number input for Temperature").fill("0.7")
    assert press(page, panel, "Read", "read", seed=seed) == [pixels(seen)]
    assert panel.get_by_label("Caption").input_value().split() == caption.split()  # line ends may differ
    panel.get_by_label("number input for Temperature").fill("0")
    assert press(page, panel, "Read", "read", seed=seed + 1) == [pixels(seen)]
    assert panel.get_by_label("Caption").input_value().split() == app.read(model, processor, picture, 0, 0)[0].split()


def test_half_a_picture_is_completed(page, model, processor, picture_file):
    panel = open_tab(page, "Complete")
    panel.locator("input[type=file]").set_input_files(picture_file)
    panel.get_by_role("button", name="Remove Image").wait_for()
    panel.get_by_label("What it shows").fill("a red circle")
    panel.get_by_label("number input for Pictures").fill("3")
    shown = press(page, panel, "Keep the upper half, draw the lower", "completed", seed=5)
    original, pictures = app.complete(model, processor, Image.open(picture_file), "a red circle", 3, 3.0, 1.0, 5)
    assert shown == [pixels(original), *map(pixels, pictures)]
    other = press(page, panel, "Keep the upper half, draw the lower", "completed", seed=6)
    assert other[0] == shown[0] and other[1:] != shown[1:]


def test_what_cannot_be_done_is_said_on_the_page(page, tmp_path):
    panel = open_tab(page, "Read")
    panel.get_by_role("button", name="Read", exact=True).click()
    page.get_by_text("There is no picture yet").wait_for()

    (tmp_path / "broken.png").write_text("no picture")
    panel.locator("input[type=file]").set_input_files(tmp_path / "broken.png")
    panel.get_by_role("button", name="Remove Image").wait_for()
    panel.get_by_role("button", name="Read", exact=True).click()
    page.get_by_text("not an image: Pillow recognises no picture format in it").wait_for()

    panel = open_tab(page, "Draw")
    panel.get_by_label("Prompt").fill("a <|image|> circle")
    panel.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("no images were passed").wait_for()

    call = page.request.post(f"{page.url}gradio_api/call/draw", data={"data": ["a red circle", 17, 3, 1, 0, False]})
    answer = page.request.get(f"{page.url}gradio_api/call/draw/{call.json()['event_id']}").text()
    assert "event: error" in answer and "17 is greater than maximum value 16" in answer


def test_a_completed_picture_has_the_codes_of_the_half_that_is_kept(model, processor, noise, monkeypatch):
    decoded = []
    monkeypatch.setattr(model, "decode_image_tokens", lambda ids: decoded.append(ids) or noise[: len(ids)])
    [picture] = to_pictures(noise[:1])
    original, completed = app.complete(model, processor, picture, "a red square", 4, 2.0, 1.0, 0)
    own = model.get_image_tokens(processor(images=picture, return_tensors="pt")["pixel_values"])
    assert len(completed) == 4 and pixels(original) == pixels(picture)
    assert len(own[0, :8].unique()) > 1 and torch.equal(decoded[0][:, :8], own[:, :8].expand(4, 8))
    assert all(not torch.equal(row[8:], own[0, 8:]) for row in decoded[0])


def test_at_temperature_zero_there_is_one_answer(model, processor, pictures):
    [one], [other] = (app.draw(model, processor, "a red circle", 2, 3.0, 0, seed) for seed in (1, 2))
    assert pixels(one) == pixels(other)
    assert len(app.complete(model, processor, pictures[0], "a red circle", 2, 3.0, 0, 1)[1]) == 1
    assert app.read(model, processor, pictures[0], 0, 1)[0] == app.read(model, processor, pictures[0], 0, 2)[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--checkpoint", "nowhere"], "no model at nowhere"),
        (["--checkpoint", "{checkpoint}", "--device", "abacus"], "--device abacus cannot be used here"),
        (["--checkpoint", "{checkpoint}", "--port", "0"], "--port must be from 1 to 65535, got 0"),
        (["--checkpoint", "{checkpoint}", "--port", "{taken}"], "{taken}"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_refused_in_one_line(checkpoint, capsys, flags, expected):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'unitok-hf[app]'")
    with socket.create_server((LOCAL, 0)) as other:
        known = {"checkpoint": checkpoint, "taken": other.getsockname()[1]}
        with pytest.raises(SystemExit) as end:
            cli.main(["app", *(flag.format(**known) for flag in flags)])
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert end.value.code == 2 and line.startswith("unitok-hf app: error:") and expected.format(**known) in line


def test_without_gradio_the_extra_is_named(checkpoint, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.partition(".")[0] == "gradio":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit):
        cli.main(["app", "--checkpoint", checkpoint])
    assert capsys.readouterr().err == "unitok-hf app: error: the page needs gradio: pip install 'unitok-hf[app]'\n"


def test_the_space_shows_the_page_of_the_model_it_is_told(checkpoint, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'unitok-hf[app]'")
    monkeypatch.setenv("UNITOK_MODEL", checkpoint)
    demo = runpy.run_path(str(ROOT / "space/app.py"))["demo"]
    assert isinstance(demo, gradio.Blocks)
    parts = json.loads(json.dumps(demo.get_config_file()))["components"]
    assert [part["props"]["label"] for part in parts if part["type"] == "tabitem"] == ["Draw", "Read", "Complete"]
    assert not demo.analytics_enabled


def test_the_space_tells_the_hub_how_to_run_it():
    from huggingface_hub import SpaceCard
    from packaging.requirements import Requirement
    from packaging.version import Version

    about = SpaceCard.load(ROOT / "space/README.md").data
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert about.sdk == "gradio" and f"gradio=={about.sdk_version}" in tested
    assert Version(about.python_version) >= Version("3.11")
    assert (ROOT / "space" / about.app_file).is_file()
    assert about.title and about.license == "apache-2.0"
    assert len(about.short_description) <= 60, "the Hub takes no more"
    [needed] = map(Requirement, (ROOT / "space/requirements.txt").read_text(encoding="utf-8").split())
    assert needed.name == "unitok-hf" and needed.extras == {"app"}
