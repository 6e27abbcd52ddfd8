"""What the log of the tokenizer's training says about its health, and the three warnings."""

import json
import logging

import pytest
import torch

from unitok_hf.training.health import HealthWatch, latent_measures
from unitok_hf.training.quantizers import EMACodebook
from unitok_hf.training.vq_trainer import VQTrainingArguments, train_tokenizer


CODES = 400


@pytest.fixture
def warned(caplog):
    """Warnings so far."""
    caplog.set_level(logging.WARNING, logger="unitok_hf.training.health")
    return lambda: [record.message for record in caplog.records if record.name.endswith("health")]


def window(used: int, latents: int) -> torch.Tensor:
    """Counts of an interval in which so many codes share the latents evenly."""
    counts = torch.zeros(CODES)
    counts[:used] = latents / used
    return counts


def test_a_codebook_that_collapses_is_told_once_and_after_enough_latents(warned):
    watch = HealthWatch()
    for _ in range(3):  # 6,000 latents each: three intervals are too few to judge
        watch.check({}, window(10, 6_000), 50, 1000)
    assert not warned()
    watch.check({}, window(10, 6_000), 50, 1000)
    [message] = warned()
    assert (
        "the codebook has collapsed" in message
        and "24,000 latents" in message
        and "10.0, 2.5% of 400 codes" in message
    )
    for _ in range(8):
        watch.check({}, window(10, 6_000), 50, 1000)
    assert len(warned()) == 1


def test_a_codebook_in_use_is_not_called_collapsed(warned):
    watch = HealthWatch()
    for number in range(8):  # few codes at a time, others each time
        watch.check({}, window(10, 6_000).roll(40 * number), 50, 1000)
    assert not warned()


@pytest.mark.parametrize(("max_steps", "patience"), [(100, 50), (4000, 200), (1_000_000, 1000)])
def test_a_discriminator_that_wins_for_long_is_told(warned, max_steps, patience):
    watch, steps = HealthWatch(), 10
    winning, losing = ({"adversarial": 0.1, "discriminator_accuracy": value} for value in (0.97, 0.9))
    for _ in range(patience // steps - 1):
        watch.check(winning, window(CODES, 100), steps, max_steps)
    watch.check(losing, window(CODES, 100), steps, max_steps)  # in between it did not
    for _ in range(patience // steps - 1):
        watch.check(winning, window(CODES, 100), steps, max_steps)
    alone = {"discriminator_accuracy": 0.99}  # before the tokenizer hears it, it may
    HealthWatch().check(alone, window(CODES, 100), 10 * patience, max_steps)
    assert not warned()
    watch.check(winning, window(CODES, 100), steps, max_steps)
    [message] = warned()
    assert "the discriminator wins: it tells 97.0%" in message and f"for {patience} steps" in message


@pytest.mark.parametrize("kind", ["latent", "code"])
def test_norms_that_fp32_does_not_stand_are_told(warned, kind):
    watch = HealthWatch()
    watch.check({f"{kind}_norm": 99.0}, window(CODES, 100), 50, 1000)
    assert not warned()
    watch.check({f"{kind}_norm": 123.4}, window(CODES, 100), 50, 1000)
    [message] = warned()
    assert message.startswith(f"{kind}s have a mean norm of 123.4; beyond 100")


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_measures_of_latents_are_what_they_say(norm):
    quantizer = EMACodebook(8, 2, norm=norm)
    latents, vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [2.0, 0.0]])
    vectors = quantizer.unit(vectors)
    found = latent_measures(latents, vectors, quantizer)
    assert found["latent_norm"] == 3.5 and found["latent_norm_max"] == 5
    assert found["commitment_ratio"].item() == pytest.approx((0 + 2**0.5) / 2)


def test_the_log_of_a_run_has_them_all(parquet, tmp_path):
    train_tokenizer(
        VQTrainingArguments(
            data_path=parquet, eval_data_path=parquet, output_dir=str(tmp_path / "run"), max_steps=8, logging_steps=2,
            save_steps=8, eval_strategy="no", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4,
            block_out_channels=[32, 32, 32], latent_channels=8, num_vq_embeddings=32, continuous_fraction=0.2,
            adversarial_weight=0.1, discriminator_start=0.3, adversarial_start=0.5,
        )
    )  # fmt: skip
    history = json.loads((tmp_path / "run/checkpoint-8/trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry][-1]
    assert set(logged) >= {
        "codebook_usage", "codebook_perplexity", "codes_revived", "commitment_ratio", "code_norm", "code_norm_max",
        "latent_norm", "latent_norm_max", "adaptive_weight", "discriminator_accuracy", "logits_real", "logits_fake",
        "grad_norm", "discriminator_grad_norm",
    }  # fmt: skip
    assert 0 <= logged["discriminator_accuracy"] <= 1 and logged["latent_norm_max"] >= logged["latent_norm"] > 0
