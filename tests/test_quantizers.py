"""The training of the codebook: exact gradients, a good start, and no code that dies or is killed without need.

What the modes share is tested on `EMACodebook`; the last part holds every mode against its definition.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from unitok_hf.modeling_unitok.modeling_vq import nearest_codes
from unitok_hf.training import index_backpropagation
from unitok_hf.training.index_backpropagation import IndexBackpropagation
from unitok_hf.training.quantizers import QUANTIZERS, EMACodebook, Quantizer, kmeans, rotate_to
from unitok_hf.training.vq_trainer import CodebookCallback, VQTrainer, VQTrainingArguments, build_training_model


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
    assert [round(state._decay(mean_count), 4) for mean_count in (0.02, 0.1, 0.25, 100.0)] == [
        0.999,
        0.995,
        0.99,
        0.99,
    ]


@pytest.mark.parametrize(("tokens", "seed"), [(64, 0), (64, 1), (8, 0)])
def test_healthy_codes_are_never_revived_though_a_step_holds_far_fewer_latents(tokens, seed):
    """A fourth as many, and a thirty-second."""
    centres = 5 * draws(256, 8)
    codebook = centres.clone()
    state = running(codebook, tokens=tokens)
    assert sum(train(state, codebook, around(centres, tokens, steps=128_000 // tokens, seed=seed))) == 0
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


MODES = [(mode, norm) for mode in QUANTIZERS for norm in ("none", "l2")]
ESTIMATED = [(*mode, estimator) for mode in MODES for estimator in ("rotation", "straight_through")]


def on_the_sphere(count: int, width: int, radius: float = 3.0, seed: int = 0) -> torch.Tensor:
    return radius * F.normalize(draws(count, width, seed=seed), dim=1)


def started(
    mode: str, norm: str, estimator: str = "rotation", codes: int = 16, **options
) -> tuple[Quantizer, torch.nn.Parameter]:
    """A quantizer of width 4 with its table, after k-means on points near as many centres as codes."""
    quantizer = QUANTIZERS[mode](codes, 4, norm=norm, estimator=estimator, **options)
    table = torch.nn.Parameter(torch.zeros(codes, 4 + quantizer.extra_columns), requires_grad=quantizer.learns_table)
    quantizer.observe(on_the_sphere(codes, 4).repeat(20, 1) + 0.05 * draws(20 * codes, 4, seed=1))
    quantizer.step(table, 0)
    quantizer.start(table, 0)
    return quantizer, table


def learn_steps(quantizer: Quantizer, table: torch.nn.Parameter, centres: torch.Tensor, steps: int) -> torch.Tensor:
    """Steps of training on latents near centres; returns the mean squared error of the codes at the end."""
    parameters = quantizer.learned(table)
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0) if parameters else None
    for step in range(steps):
        latents = centres.repeat(4, 1) + 0.05 * draws(4 * len(centres), 4, seed=step)
        latents = quantizer.widen(latents)
        quantizer.observe(latents)
        if optimizer:
            optimizer.zero_grad()
            quantizer(latents, table).codebook_loss.backward()
            optimizer.step()
        quantizer.step(table, step)
    return quantizer(quantizer.widen(centres), table).commitment.detach()


def right_codes(mode: str, norm: str, latents: torch.Tensor, table: torch.Tensor) -> torch.LongTensor:
    """Codes of latents (n, 4) by the definition of the mode, in float64."""
    latents, codes = latents.double(), table.detach()[:, :4].double()
    if norm == "l2":
        return (F.normalize(latents, dim=1) @ F.normalize(codes, dim=1).T).argmax(dim=1)
    if mode == "ibq":
        return (latents @ codes.T).argmax(dim=1)
    return (latents[:, None] - codes).square().sum(dim=2).argmin(dim=1)


@pytest.mark.parametrize(("mode", "norm", "estimator"), ESTIMATED)
def test_what_passes_is_the_code_of_the_table(mode, norm, estimator):
    quantizer, table = started(mode, norm, estimator)
    learn_steps(quantizer, table, on_the_sphere(16, 4, seed=5), 20)
    latents = 2 * draws(500, 4, seed=3)
    codes = right_codes(mode, norm, latents, table)
    assert torch.equal(nearest_codes(quantizer.widen(latents), table), codes)
    assert torch.equal(quantizer.lookup(quantizer.widen(latents), table), codes)
    quantized = quantizer(quantizer.widen(latents), table)
    expected = table.detach()[codes, :4]
    assert torch.allclose(quantized.vectors[:, :4], expected, atol=1e-5)
    assert quantized.vectors.shape == (500, table.shape[1]) and not quantized.vectors[:, 4:].any()
    unit = F.normalize(latents, dim=1) if norm == "l2" else latents
    assert quantized.commitment.item() == pytest.approx((unit - expected).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(("mode", "norm"), MODES)
def test_the_table_is_what_the_mode_says(mode, norm):
    quantizer, table = started(mode, norm)
    learn_steps(quantizer, table, on_the_sphere(16, 4, seed=5), 20)
    codes = table.detach()[:, :4]
    if norm == "l2":
        assert torch.allclose(codes.norm(dim=1), torch.ones(16), atol=1e-6)
    if mode == "simvq":
        assert not torch.allclose(quantizer.weight, torch.eye(4), atol=0.05)
        made = quantizer.base @ quantizer.weight.T
        assert torch.allclose(codes, F.normalize(made, dim=1) if norm == "l2" else made, atol=1e-5)
    if quantizer.extra_columns:
        assert codes.norm(dim=1).std() > 0.01
        assert torch.allclose(table.norm(dim=1), codes.norm(dim=1).max().expand(16), atol=1e-4)


@pytest.mark.parametrize(("mode", "norm", "estimator"), ESTIMATED)
def test_the_gradient_of_the_latents_is_that_of_the_estimator(mode, norm, estimator):
    """Through the lookup, and with l2 through the normalisation before it; all in float64."""
    quantizer, table = started(mode, norm, estimator)
    latents, gradient = 2 * draws(30, 4, seed=3), draws(30, 4, seed=4)
    wide = quantizer.widen(latents).clone().requires_grad_()
    (quantizer(wide, table).vectors[:, :4] * gradient).sum().backward()
    z = latents.double().requires_grad_()
    unit = F.normalize(z, dim=1) if norm == "l2" else z
    codes = table.detach()[:, :4].double()
    chosen = codes[right_codes(mode, norm, latents, table)]
    if estimator == "rotation":
        turned = []
        for e, q, g in zip(unit.detach(), chosen, gradient.double(), strict=True):
            turned.append(q.norm() / e.norm() * rotation(e / e.norm(), q / q.norm()).T @ g)
        unit.backward(torch.stack(turned))
    elif mode == "ibq":
        soft = ((4 if norm == "l2" else 1) * unit @ codes.T).softmax(dim=1)
        (soft @ codes).backward(gradient.double())
    else:
        unit.backward(gradient.double())
    assert torch.allclose(wide.grad[:, :4].double(), z.grad, atol=1e-4, rtol=1e-3)
    assert not wide.grad[:, 4:].any()


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_index_backpropagation_has_the_gradient_of_its_definition(monkeypatch, rows):
    monkeypatch.setattr(index_backpropagation, "BLOCK_BYTES", 4 * 11 * rows)
    latents, codes = draws(50, 3).double().requires_grad_(), draws(11, 3, seed=1).double().requires_grad_()
    chosen, gradient = (latents @ codes.T).argmax(dim=1), draws(50, 3, seed=2).double()
    value = IndexBackpropagation.apply(latents, codes, chosen, 0.7)
    assert torch.equal(value, codes[chosen])
    found = torch.autograd.grad((value * gradient).sum(), [latents, codes])
    soft = (0.7 * latents @ codes.T).softmax(dim=1)
    onehot = F.one_hot(chosen, 11).double()
    expected = torch.autograd.grad((((onehot - soft).detach() + soft) @ codes * gradient).sum(), [latents, codes])
    assert all(torch.allclose(*pair) for pair in zip(found, expected, strict=True))
    assert (found[1].norm(dim=1) > 0).all()  # every code hears of every latent


@pytest.mark.parametrize("estimator", ["rotation", "straight_through"])
def test_in_ibq_codes_that_were_not_chosen_learn_from_the_picture(estimator):
    quantizer, table = started("ibq", "none", estimator)
    latents = quantizer.widen(2 * draws(3, 4, seed=3))
    quantizer(latents, table).vectors.square().sum().backward()
    assert (table.grad[:, :4].norm(dim=1) > 0).all() and not table.grad[:, 4].any()


def test_a_gradient_codebook_hears_of_the_distance_at_full_weight_and_not_of_the_picture():
    quantizer, table = started("grad", "none")
    latents = 2 * draws(40, 4, seed=3)
    codes = right_codes("grad", "none", latents, table)
    quantized = quantizer(latents.requires_grad_(), table)
    assert quantized.codebook_loss.item() == pytest.approx(quantized.commitment.item())
    quantized.vectors.sum().backward(retain_graph=True)
    assert table.grad is None
    quantized.codebook_loss.backward()
    towards = (table[codes] - latents).detach() * 2 / latents.numel()
    assert torch.allclose(table.grad, torch.zeros_like(table).index_add_(0, codes, towards), atol=1e-6)


@pytest.mark.parametrize(("mode", "norm"), MODES)
def test_codes_follow_latents_that_have_turned(mode, norm):
    quantizer, table = started(mode, norm, decay=0.9)
    turn = torch.linalg.matrix_exp(0.2 * torch.triu(torch.ones(4, 4), 1) - 0.2 * torch.tril(torch.ones(4, 4), -1))
    centres = on_the_sphere(16, 4) @ turn.T
    at_best = quantizer(
        quantizer.widen(on_the_sphere(16, 4)), table
    ).commitment  # k-means lets some centres share a code
    before = quantizer(quantizer.widen(centres), table).commitment
    after = learn_steps(quantizer, table, centres, 150)
    assert before > 1.3 * at_best and after - at_best < 0.3 * (before - at_best)


@pytest.mark.parametrize(("mode", "norm"), MODES)
def test_a_dead_code_of_any_mode_comes_to_a_latent(mode, norm):
    quantizer, table = started(mode, norm)
    with torch.no_grad():
        if mode == "simvq":
            quantizer.weight += 0.2 * draws(4, 4)
            quantizer.refresh(table)
    quantizer.counts[3], quantizer.age[3], kept = 0.0, 10_000, table.detach().clone()
    quantizer.counts[:3] = quantizer.counts[4:] = 100.0
    others = torch.arange(16) != 3
    weight, base = (x.clone() for x in (quantizer.weight, quantizer.base)) if mode == "simvq" else (None, None)
    latents = on_the_sphere(16, 4, seed=8).repeat(3, 1)
    latents = latents[quantizer.lookup(quantizer.widen(latents), table) != 3]
    quantizer.observe(latents)
    assert quantizer.step(table, 7).tolist() == [3]
    code = table.detach()[3:4, :4]
    assert torch.cdist(F.normalize(code, dim=1), F.normalize(latents, dim=1)).min() < 0.1
    assert code.norm().item() == pytest.approx(1.0 if norm == "l2" else 3.0, abs=0.1)
    if mode == "simvq":
        assert torch.equal(quantizer.weight, weight) and torch.equal(quantizer.base[others], base[others])
    if mode != "ema":
        assert torch.allclose(table[others, :4], kept[others, :4], atol=1e-6)


@pytest.mark.parametrize(("mode", "norm"), MODES)
def test_autocast_changes_nothing(mode, norm):
    quantizer, table = started(mode, norm)
    latents = quantizer.widen(2 * draws(50, 4, seed=3))
    expected = quantizer(latents, table)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(latents, table)
        rounded = quantizer(latents.bfloat16(), table)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
    assert rounded.vectors.dtype == torch.float32


def tiny_arguments(tmp_path, **options) -> VQTrainingArguments:
    sizes = {"block_out_channels": [16, 16, 16], "norm_num_groups": 16, "latent_channels": 6, "num_vq_embeddings": 12}
    common = {
        "data_path": "",
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_strategy": "no",
    }
    return VQTrainingArguments(**sizes | common | {"max_steps": 10} | options)


@pytest.mark.parametrize("mode", ["grad", "ibq"])
def test_the_optimizer_forgets_a_dead_code_and_no_other(tmp_path, noise, mode):
    torch.manual_seed(0)
    model = build_training_model(tiny_arguments(tmp_path, quantizer=mode))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    callback, state = CodebookCallback(0.1), SimpleNamespace(global_step=0, max_steps=10)
    for state.global_step in range(1, 4):
        optimizer.zero_grad()
        model(noise)["loss"].backward()
        optimizer.step()
        if state.global_step == 3:
            with torch.no_grad():  # where no latent chooses it
                model.vq.codebook[5, :6] = 1000.0 if mode == "grad" else 0.0
            model.codebook_state.counts.fill_(100.0)
            model.codebook_state.counts[5], model.codebook_state.age[5] = 0.0, 10_000
            moments = {name: x.clone() for name, x in optimizer.state[model.vq.codebook].items() if x.ndim == 2}
        callback.on_step_end(None, state, None, model=model, optimizer=optimizer)
    assert model.codebook_state.revived == 1
    for name, before in moments.items():
        after = optimizer.state[model.vq.codebook][name]
        others = torch.arange(12) != 5
        assert not after[5].any() and torch.equal(after[others], before[others]) and before[others].any()


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.1])
@pytest.mark.parametrize(
    ("mode", "name"), [("grad", "vq.quantize.embedding.weight"), ("simvq", "codebook_state.weight")]
)
def test_weight_decay_does_not_shrink_codes(tmp_path, mode, name, adversarial_weight):
    args = tiny_arguments(tmp_path, quantizer=mode, weight_decay=0.1, adversarial_weight=adversarial_weight)
    model = build_training_model(args)
    groups = VQTrainer(model, args).create_optimizer().param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    expected = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert decays.keys() == expected
    assert decays[id(model.get_parameter(name))] == 0
    assert decays[id(model.vq.quant_conv.weight)] == 0.1


@pytest.mark.parametrize(("mode", "norm"), MODES)
def test_starting_the_codebook_does_not_change_what_the_network_computes(tmp_path, noise, mode, norm):
    torch.manual_seed(0)
    model = build_training_model(tiny_arguments(tmp_path, quantizer=mode, codebook_norm=norm))

    @torch.no_grad()
    def unquantized() -> torch.Tensor:
        latents = model.vq.encode(noise).latents
        latents = F.normalize(latents, dim=1) if norm == "l2" else latents
        return model.vq.decode(latents, force_not_quantize=True).sample

    with torch.no_grad():
        model.vq.quant_conv.weight *= 5
    model(noise)
    model.codebook_state.step(model.vq.codebook, 0)
    before = unquantized()
    model.start_codebook(1)
    assert torch.allclose(before, unquantized(), atol=1e-5)
    latents = model.vq.encode(noise).latents[:, :6].detach()
    size = latents.norm(dim=1).mean() if norm == "l2" else latents.std()
    assert size.item() == pytest.approx(1, abs=0.01)


def test_an_unknown_norm_or_estimator_is_refused(tmp_path):
    for name, message in (
        ("codebook_norm", "--codebook_norm must be one of none, l2, got 'L1'"),
        ("gradient_estimator", "--gradient_estimator must be one of rotation, straight_through, got 'L1'"),
        ("quantizer", "--quantizer must be one of ema, grad, simvq, ibq, got 'L1'"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_arguments(tmp_path, **{name: "L1"})
