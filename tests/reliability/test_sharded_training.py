"""FSDP2 on two processes: the model sharded by Accelerate trains as it does alone, and is saved in shards and in one piece."""

from conftest import ROOT, TWO_PROCESSES, run_program


PROGRAM = """
import sys

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModel, AutoProcessor

import unitok_hf

source, out, tests = sys.argv[1:]
sys.path.insert(0, tests)
from conftest import CAPTIONS, draw

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
processor = AutoProcessor.from_pretrained(source)
batch = dict(processor(text=CAPTIONS, images=[draw(caption) for caption in CAPTIONS], return_tensors="pt"))
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
tokens = (batch["labels"][:, 1:] != -100).sum()


def sharded(model):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["NanoChatDecoderLayer"],
        cpu_ram_efficient_loading=False,
        ignored_modules=[model.model.vqmodel],
    )
    accelerator.state.fsdp_plugin = plugin  # Accelerate asks for a GPU before it does so itself
    return fsdp2_prepare_model(accelerator, model)


def optimizer_of(model):
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)


def train(model, optimizer, rows, steps, share):
    losses = []
    for _ in range(steps):
        loss = share * model(**{name: tensor[rows] for name, tensor in batch.items()}, num_items_in_batch=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        if share > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss / share)
    return torch.stack(losses)


def fresh():
    return AutoModel.from_pretrained(source).train()


alone = fresh()
alone_optimizer = optimizer_of(alone)
expected = train(alone, alone_optimizer, slice(None), 50, 1)

mine = slice(4 * rank, 4 * rank + 4)
model = sharded(fresh())
assert isinstance(model.lm_head.weight, DTensor) and model.lm_head.weight.to_local().shape[0] == 448 // 2
optimizer = optimizer_of(model)
found = train(model, optimizer, mine, 25, 2)
checkpoint.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=out)
accelerator.wait_for_everyone()

model = sharded(fresh())  # as after a restart
optimizer = optimizer_of(model)
saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
checkpoint.load(saved, checkpoint_id=out)
set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
found = torch.cat([found, train(model, optimizer, mine, 25, 2)])
assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5), (found - expected).abs().max()
assert (found[:10] - expected[:10]).abs().max() < 1e-6 * expected[0]
assert found[-1] < 0.1 * found[0]

whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    fresh().save_pretrained(out + "/whole", state_dict=whole)
    saved = AutoModel.from_pretrained(out + "/whole")
    worst = max((ours - theirs).abs().max() for ours, theirs in zip(saved.parameters(), alone.parameters()))
    assert worst < 1e-3, worst
    assert torch.equal(saved.model.vqmodel.codebook, alone.model.vqmodel.codebook)
"""


def test_a_sharded_model_trains_resumes_and_is_saved_as_one(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [tmp_path / "program.py", tmp_path / "source", tmp_path / "out", ROOT / "tests"]
    run_program([*TWO_PROCESSES, *map(str, words)])
    shards = {path.suffix for path in (tmp_path / "out").rglob("*.distcp")}
    assert shards and (tmp_path / "out/whole/model.safetensors").is_file()
