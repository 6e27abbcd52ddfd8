"""The tokenizer presets in configs/ train, as they are but for widths, batches and the number of steps."""

import argparse
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

from unitok_hf import UniTokForConditionalGeneration, UniTokVQModel
from unitok_hf.training.vq_trainer import VQTrainingArguments, train_tokenizer
from unitok_hf_cli import COMMANDS, Parser, add_arguments, read_arguments


PRESETS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("vq-*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_two_steps(preset, pictures, tmp_path):
    settings = yaml.safe_load(preset.read_text(encoding="utf-8"))
    side = settings["image_size"]
    features = datasets.Features({"image": datasets.Image()})
    rows = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(str(tmp_path / "pictures.parquet"))
    data = str(tmp_path / "pictures.parquet")
    narrow = {
        "block_out_channels": [32] * len(settings["block_out_channels"]),
        "norm_num_groups": 8,
        "num_vq_embeddings": 32,
        "max_steps": 2,
        "warmup_steps": 0,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_strategy": "no",
        "data_path": data,
        "eval_data_path": data,
        "output_dir": str(tmp_path / "tokenizer"),
    }
    words = [str(preset)]
    for name, value in narrow.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    values = read_arguments(parser, add_arguments(parser, COMMANDS["train-tokenizer"]), words)
    arguments = VQTrainingArguments(**values)
    assert all(getattr(arguments, name) == settings[name] for name in settings.keys() - narrow.keys())
    metrics = train_tokenizer(arguments)
    assert metrics["eval_psnr"] > 3
    trained = UniTokVQModel.from_pretrained(tmp_path / "tokenizer")
    assert trained.downsampling == (8 if "f8" in preset.stem else 16)
    assert trained.config.sample_size == side


@pytest.mark.parametrize("config", sorted(PRESETS[0].parent.glob("accelerate-*.yaml")), ids=lambda path: path.stem)
def test_accelerate_understands_its_configuration(config):
    found = load_config_from_file(str(config))
    assert found.num_processes == 8 * found.num_machines and found.mixed_precision == "bf16"
    if found.distributed_type == "FSDP":
        assert (
            found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in UniTokForConditionalGeneration._no_split_modules
        )
