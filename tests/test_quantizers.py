"""The training of the codebook: exact gradients, a good start, and no code that dies or is killed without need."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from unitok_hf.modeling_unitok.modeling_vq import nearest_codes
from unitok_hf.training.quantizers import EMACodebook, kmeans, rotate_to


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The rotation in the plane of two unit vectors (d,) that takes `start` to `end`, as a matrix (d, d), float64."""
    cosine = start @ end
    if cosine > 1 - 1e-12:
        return torch.eye(len(start), dtype=torch.float64)
    across = torch.nn.functional.normalize(end - cosine * start, dim=0)  # the plane's other axis
    plane = torch.stack([start, across])  # (2, d)
    sine = (1 - cosine**2).sqrt()
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return torch.eye(len(start), dtype=torch.float64) + plane.T @ (turn - torch.eye(2, dtype=torch.float64)) @ plane


def test_the_rotation_trick_returns_the_codes():
    latents, codes = 3 * draws(500, 8), draws(500, 8, seed=1)
    assert torch.allclose(rotate_to(latents, codes), codes, atol=1e-5)


def test_the_gradient_of_the_rotation_trick_is_the_scaled_turned_back_gradient():
    latents, codes, gradient = 3 * draws(50, 4), draws(50, 4, seed=1), draws(50, 4, seed=2)
    latents.requires_grad_()
    codes.requires_grad_()
    rotate_to(latents, codes).backward(gradient)
    assert codes.grad is None
    for row in range(50):
        e, q, g = (rows[row].detach().double() for rows in (latents, codes, gradient))
        turn = rotation(e / e.norm(), q / q.norm())
        assert torch.allclose(turn @ e / e.norm(), q / q.norm())
        expected = q.norm() / e.norm() * turn.T @ g
        assert torch.allclose(latents.grad[row].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("latent_scale", [0.0, 1e-30, 1e-6])
@pytest.mark.parametrize("code_scale", [0.0, 1e-30, 1.0])
def test_vanishing_latents_and_codes_stay_finite(latent_scale, code_scale):
    latents = (latent_scale * draws(20, 4)).requires_grad_()
    rotated = rotate_to(latents, code_scale * draws(20, 4, seed=1))
    rotated.sum().backward()
    assert rotated.isfinite().all() and latents.grad.isfinite().all()


def test_opposite_and_equal_directions_stay_exact():
    latents = draws(20, 4).requires_grad_()
    for factor in (1.0, 0.5, -1.0, -2.0):
        assert torch.allclose(rotate_to(latents, factor * latents.detach()), factor * latents, atol=1e-5)
    latents.grad = None
    rotate_to(latents, 0.5 * latents.detach()).sum().backward()
    assert torch.allclose(latents.grad, torch.full((20, 4), 0.5), atol=1e-5)  # no turn: the ratio of the norms alone


def test_kmeans_puts_a_centre_into_every_cluster():
    middles = 20 * draws(8, 4)
    points = (middles[:, None] + 0.1 * draws(8, 100, 4, seed=1)).flatten(0, 1)
    centres = kmeans(points, 40, 10, torch.Generator().manual_seed(0))
    assert torch.cdist(points, centres).amin(dim=1).max() < 0.5
    assert torch.cdist(centres, middles).amin(dim=1).max() < 0.5


def test_kmeans_ends_at_the_means_of_its_clusters():
    points = draws(1000, 3)
    centres = kmeans(points, 10, 200, torch.Generator().manual_seed(0))
    nearest = nearest_codes(points, centres)
    for number, centre in enumerate(centres):
        assert torch.allclose(points[nearest == number].mean(dim=0), centre, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_an_empty_cluster_restarts_where_points_are(seed):
    """Two heaps; where both centres begin on the same one, the second is chosen by no point."""
    points = torch.tensor([[11.0, 11.0], [15.0, 15.0]]).repeat(50, 1)
    centres = kmeans(points, 2, 20, torch.Generator().manual_seed(seed))
    assert centres.sort(dim=0).values.tolist() == [[11.0, 11.0], [15.0, 15.0]]


def train(state: EMACodebook, codebook: torch.Tensor, batches, first_step: int = 0) -> list[int]:
    """One step per batch of latents; returns how many codes each step revived."""
    revived = []
    for step, latents in enumerate(batches, first_step):
        before = state.revived
        state.observe(latents)
        state.step(codebook, step)
        revived.append(state.revived - before)
    return revived


def running(codebook: torch.Tensor, tokens: int, **options) -> EMACodebook:
    """A state that has been going on with this codebook for long, every code chosen equally often."""
    state = EMACodebook(*codebook.shape, **options)
    state.counts.fill_(tokens / len(codebook))
    state.sums.copy_(codebook * state.counts[:, None])
    state.age.fill_(10_000)
    state.updates.fill_(10_000)
    state.started.fill_(True)
    return state


def around(centres: torch.Tensor, tokens: int, steps: int, seed: int = 0):
    """`steps` batches of latents near centres that are drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(centres), (tokens,), generator=generator)
        yield centres[chosen] + 0.01 * torch.randn(tokens, centres.shape[1], generator=generator)


def test_a_code_is_the_decayed_mean_of_its_latents():
    codebook = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    state = EMACodebook(2, 2, decay=0.6, buffer_rows=120)
    batches = [torch.cat([draws(30, 2, seed=step), 10 + draws(30, 2, seed=50 + step)]) for step in range(12)]
    train(state, codebook, batches[:2])
    state.start(codebook, 1)
    order = codebook[:, 0].argsort()
    counts, sums = state.counts[order].double(), state.sums[order].double()
    assert torch.allclose(counts, torch.tensor([30.0, 30.0]).double())
    train(state, codebook, batches[2:], 2)
    for update, latents in enumerate(batches[2:]):
        decay = min(0.6, (1 + update) / (10 + update))  # 30 latents per code: a short memory holds twenty of them
        counts = decay * counts + (1 - decay) * 30
        sums = decay * sums + (1 - decay) * latents.double().view(2, 30, 2).sum(dim=1)
    assert torch.allclose(codebook[order].double(), sums / counts[:, None], atol=1e-4)


def test_codes_follow_latents_that_move():
    start = 3 * draws(16, 4)
    end = start + 0.3
    codebook = start.clone()
    state = running(codebook, tokens=64)
    train(state, codebook, around(end, 64, steps=1000))
    assert torch.allclose(codebook, end, atol=0.01)
    assert torch.equal(nearest_codes(end, codebook), torch.arange(16))


def test_the_memory_holds_twenty_latents_per_code_however_few_a_step_brings():
    state = EMACodebook(1024, 16)
    assert [round(state._decay(mean_count), 4) for mean_count in (0.25, 0.5, 4.0, 100.0)] == [0.9875, 0.975, 0.8, 0.1]
    state.updates.fill_(10_000)
    assert [round(state._decay(mean_count), 4) for mean_count in (0.1, 0.25, 4.0, 100.0)] == [0.99] * 4


@pytest.mark.parametrize("seed", range(2))
def test_healthy_codes_are_never_revived_though_a_step_holds_four_times_fewer_latents(seed):
    centres = 5 * draws(256, 8)
    codebook = centres.clone()
    state = running(codebook, tokens=64)
    assert sum(train(state, codebook, around(centres, 64, steps=2000, seed=seed))) == 0
    assert state.report() == {
        "codebook_usage": 1.0,
        "codebook_perplexity": pytest.approx(256, rel=0.01),
        "codes_revived": 0,
    }


def test_dead_codes_come_to_life_a_few_per_step_and_stay_alive():
    codebook = draws(100, 4)
    codebook[30:] += 1000  # no latent will ever choose these
    state = running(codebook, tokens=100)
    generator = torch.Generator().manual_seed(1)
    revived = train(state, codebook, (torch.randn(100, 4, generator=generator) for _ in range(1500)))
    assert max(revived) == 2  # 2 % of the codes
    assert sum(revived[:400]) >= 70
    assert sum(revived[-1000:]) < 10
    assert codebook.abs().max() < 10
    state.report()
    train(state, codebook, (torch.randn(100, 4, generator=generator) for _ in range(100)), 1500)
    assert state.report()["codebook_usage"] == 1.0


def test_a_revived_code_starts_with_a_clean_slate():
    codebook = torch.cat([draws(9, 4), torch.full((1, 4), 1000.0)])
    state = running(codebook, tokens=40)
    state.counts[9] = 0.0
    latents = draws(40, 4, seed=1)
    assert train(state, codebook, [latents]) == [1]
    assert torch.cdist(codebook[9:], latents).min() < 0.2
    assert (state.counts[9], state.age[9]) == (4.0, 0)
    assert torch.allclose(state.sums[9], 4.0 * codebook[9])


def test_a_young_code_is_left_in_peace():
    codebook = torch.cat([draws(9, 4), torch.full((1, 4), 1000.0)])
    state = running(codebook, tokens=5)
    state.counts[9] = 0.0
    state.age[9] = 0
    revived = train(state, codebook, (draws(5, 4, seed=step) for step in range(60)))
    assert revived.index(1) == 40  # twenty latents per code have passed: 20 · 10 / 5 steps


def learn(seed: int = 0, steps: int = 40) -> tuple[EMACodebook, torch.Tensor]:
    """A codebook of 32 codes after a warm-up, k-means and some steps."""
    codebook = torch.zeros(32, 4)
    state = EMACodebook(32, 4, seed=seed)
    train(state, codebook, (draws(48, 4, seed=step) for step in range(5)))
    assert not codebook.any() and state.report() == {}
    state.start(codebook, 4)
    train(state, codebook, (draws(48, 4, seed=5 + step) for step in range(steps)), 5)
    return state, codebook


def test_learning_is_decided_by_the_seed_and_the_steps_alone():
    _, first = learn()
    torch.manual_seed(123)
    torch.rand(10)
    _, again = learn()
    _, other = learn(seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("steps", [0, 40])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path, steps):
    state, codebook = learn(steps=steps)
    codebook[7] += 1000  # some reviving to do
    state.sums[7] += 1000 * state.counts[7]
    save_file(state.state_dict(), tmp_path / "state.safetensors")
    copy_of_codebook, resumed = codebook.clone(), EMACodebook(32, 4)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    revived = train(state, codebook, (draws(48, 4, seed=100 + step) for step in range(400)), 50)
    assert sum(revived) > 0
    assert revived == train(resumed, copy_of_codebook, (draws(48, 4, seed=100 + step) for step in range(400)), 50)
    assert torch.equal(codebook, copy_of_codebook)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in state.state_dict().items())


def test_micro_batches_count_as_one_step():
    state, codebook = learn()
    accumulating, copy_of_codebook = copy.deepcopy(state), codebook.clone()
    latents = draws(48, 4, seed=100)
    train(state, codebook, [latents])
    for part in latents.split(16):
        accumulating.observe(part)
    accumulating.step(copy_of_codebook, 0)
    assert torch.equal(codebook, copy_of_codebook)


def test_kmeans_sees_the_latest_latents():
    state, codebook = EMACodebook(4, 2, buffer_rows=10), torch.zeros(4, 2)
    train(state, codebook, (torch.full((3, 2), float(step)) for step in range(7)))
    assert sorted(state.recent[:, 0].tolist()) == [3, 4, 4, 4, 5, 5, 5, 6, 6, 6]


def test_identical_latents_still_make_different_codes():
    state, codebook = EMACodebook(16, 4), torch.zeros(16, 4)
    train(state, codebook, [draws(4, 4).repeat(8, 1)])
    state.start(codebook, 0)
    assert len(codebook.unique(dim=0)) == 16


def test_kmeans_with_fewer_latents_than_codes_is_refused():
    state, codebook = EMACodebook(64, 4), torch.zeros(64, 4)
    train(state, codebook, [draws(63, 4)])
    with pytest.raises(ValueError, match="got 63 for 64; lengthen"):
        state.start(codebook, 0)


def test_the_report_is_of_the_codes_chosen_since_the_last_one():
    codebook = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    state = running(codebook, tokens=4)
    train(state, codebook, [torch.tensor([[0.0], [0.0], [1.0], [2.0]])])
    assert state.report() == pytest.approx({"codebook_usage": 0.75, "codebook_perplexity": 2**1.5, "codes_revived": 0})
    train(state, codebook, [torch.tensor([[3.0]]).repeat(4, 1)] * 2)
    assert state.report() == pytest.approx({"codebook_usage": 0.25, "codebook_perplexity": 1.0, "codes_revived": 0})
