"""Models in programs that do not know this package: transformers alone, onnxruntime, clients of an HTTP server."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import onnxruntime
import pytest
import torch
from conftest import ROOT, run_program
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from unitok_hf.processing.processing_unitok import PLAIN_CHAT_TEMPLATE
from unitok_hf.training.export import ExportArguments, export


@pytest.fixture
def checkpoint(model, processor, captions, tmp_path):
    """A saved model that writes words of the captions, not halves of letters, and knows chats."""
    words = {token for text in captions for token in processor.tokenizer(text, add_special_tokens=False).input_ids}
    with torch.no_grad():
        others = [row for row in range(model.config.text_vocab_size) if row not in words]
        model.lm_head.weight[others] = 0
    processor = type(processor)(processor.image_processor, processor.tokenizer, PLAIN_CHAT_TEMPLATE)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


ALONE = """
import sys
sys.modules["unitok_hf"] = None  # as if it were not there
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM
folder, expected = sys.argv[1:]
expected = load_file(expected)
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model) is NanoChatForCausalLM
assert torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"])
assert AutoTokenizer.from_pretrained(folder)("a red circle").input_ids == expected["text"].tolist()
"""


@torch.no_grad()
def test_the_text_model_needs_no_code_of_ours(checkpoint, model, processor, tmp_path, monkeypatch):
    export(ExportArguments(str(checkpoint), str(tmp_path / "plain")))
    ids = torch.randint(6, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    text = torch.tensor(processor.tokenizer("a red circle").input_ids)
    expected = {"ids": ids, "logits": model(input_ids=ids).logits, "text": text}
    save_file(expected, tmp_path / "expected.safetensors")
    run_program([sys.executable, "-c", ALONE, str(tmp_path / "plain"), str(tmp_path / "expected.safetensors")])
    card = (tmp_path / "plain/README.md").read_text(encoding="utf-8")
    assert "| 384 … 447 | image codes 0 … 63: id = 384 + code |" in card
    monkeypatch.chdir(tmp_path / "plain")
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], names)
    assert names["codes"].shape == (1, 16) and 0 <= names["codes"].min() and names["codes"].max() < 64


@pytest.mark.parametrize("of_a_model", [True, False])
def test_onnxruntime_gives_the_same_codes_and_pictures(of_a_model, checkpoint, model, pictures, processor, tmp_path):
    vq_model = model.model.vqmodel
    if not of_a_model:
        checkpoint = tmp_path / "tokenizer"
        vq_model.save_pretrained(checkpoint)
    export(ExportArguments(str(checkpoint), str(tmp_path / "onnx"), to="onnx"))
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / f"onnx/{name}.onnx") for name in ("encoder", "decoder")
    )
    pixels = processor.image_processor(pictures * 2, return_tensors="pt")["pixel_values"]
    for batch in (pixels[:1], pixels[:5], pixels):
        [codes] = encoder.run(None, {"pixel_values": batch.numpy()})
        assert torch.equal(torch.from_numpy(codes), vq_model.encode_to_indices(batch))
        [decoded] = decoder.run(None, {"codes": codes})
        expected = vq_model.decode_from_indices(torch.from_numpy(codes)).sample
        assert torch.allclose(torch.from_numpy(decoded), expected, atol=1e-4)


@pytest.mark.parametrize("to", ["text_model", "onnx"])
def test_an_export_that_computes_something_else_is_not_left_there(to, checkpoint, monkeypatch, tmp_path):
    from unitok_hf.training import export as module

    right = module.plain_text_model

    def wrong(model):
        text_model = right(model)
        with torch.no_grad():
            text_model.get_output_embeddings().weight[5] += 1
        return text_model

    monkeypatch.setattr(module, "plain_text_model", wrong)
    monkeypatch.setattr(
        module.Encoder, "forward", lambda self, pixels: self.vq_model.encode(pixels).latents.argmin(dim=1)
    )
    with pytest.raises(ValueError, match="nothing was exported"):
        export(ExportArguments(str(checkpoint), str(tmp_path / "new"), to=to))
    assert not list((tmp_path / "new").iterdir())


@torch.no_grad()
def test_a_model_in_bf16_is_exported(model, processor, tmp_path):
    model.bfloat16().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export(ExportArguments(str(tmp_path / "model"), str(tmp_path / "plain")))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == torch.bfloat16


def test_what_cannot_be_exported_is_refused(checkpoint, vq_model, tmp_path):
    vq_model.save_pretrained(tmp_path / "tokenizer")
    for source, target, message in (
        (tmp_path / "tokenizer", tmp_path / "new", "holds no UniTok model, but VQModel"),
        (tmp_path / "none", tmp_path / "new", "no model at"),
        (checkpoint, checkpoint, "already holds files"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            export(ExportArguments(str(source), str(target)))
    assert not (tmp_path / "new").exists()


@pytest.fixture
def server(checkpoint, tmp_path):
    """`unitok-hf serve` in a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "unitok_hf_cli.py"),
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, content: str | list[dict], **options) -> str:
    """The answer to one message, as it is sent."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0} | options
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request).read().decode()


def test_chats_with_text_and_pictures_are_answered(server, checkpoint, model, processor, pictures):
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG")
    image = {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}
    for content, inputs in (
        ("a red", processor(text="a red", return_tensors="pt")),
        (
            [{"type": "image_url", "image_url": image}, {"type": "text", "text": "a"}],
            processor(text="a", images=pictures[0], return_tensors="pt"),
        ),
    ):
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        [expected] = processor.batch_decode(ids, skip_special_tokens=True)
        assert json.loads(ask(server, content))["choices"][0]["message"]["content"] == expected
        chunks = ask(server, content, stream=True, model=str(checkpoint))
        chunks = re.findall(r"^data: (\{.*)", chunks, flags=re.MULTILINE)
        words = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(words) == expected


def test_a_model_that_knows_no_chats_is_not_served(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    command = [sys.executable, str(ROOT / "unitok_hf_cli.py"), "serve", "--checkpoint", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 2 and "has no chat template" in result.stderr
