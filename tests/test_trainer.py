"""The trainer called directly, in this process: steps, evaluation, precision, groups of scales."""

import time

import pytest
import torch
from commands import live_saved_bytes
from torch._dynamo.testing import CompileCounter

import train
from dist import Ranks
from models.families import FAMILIES
from models.transformer import ScaleTransformer
from trainer import Trainer
from utils.checkpoint import load_tokenizer, load_transformer
from utils.data.batches import TrainOrder
from utils.data.images import read_folders
from utils.runs.checkpoints import checkpoints
from utils.runs.config import TrainConfig
from utils.runs.log import read_metrics
from utils.runs.state import MODEL
from utils.runs.task import ALL_RANKS, step_seed


def small_trainer(images, tokenizer, run, **changes) -> Trainer:
    defaults = {"depth": 2, "width": 64, "heads": 1, "bs": 8, "seed": 1, "max_steps": 40, "drop_path": 0.0}
    config = TrainConfig(**{**defaults, "data_path": str(images), "local_out_dir_path": str(run), **changes})
    model = load_tokenizer(tokenizer)
    torch.manual_seed(0)
    transformer = ScaleTransformer(config.transformer_config(model.config, 3))
    transformer.init_weights(config.alng, config.aln, config.hd)
    data, ranks = train.build_data(config, model, read_folders(config.data_path)), Ranks(0, 1, torch.device("cpu"))
    return Trainer(
        train.NextScalePrediction(config, transformer, model, data, ranks), train.run_config(config, data.size), ranks
    )


def batches_of(trainer: Trainer):
    config, data = trainer.config, trainer.task.data
    order = TrainOrder(data.size, config.batch, config.seed, micro_batches=config.micro_batches)
    return data.train_batches(order, 0, 1000)


def gradients(trainer: Trainer, monkeypatch) -> dict[str, torch.Tensor]:
    """Of the next step, before clipping."""
    kept = {}

    def clip(parameters, limit):
        kept.update({name: p.grad.clone() for name, p in trainer.state.model.named_parameters() if p.grad is not None})
        return torch.ones(())

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        trainer.train_step(batches_of(trainer))
    return kept


def test_training_lowers_the_validation_loss(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, tblr=0.05, alng=0.1, save_every=100, val_every=100)
    before = trainer.task.validate().metrics()["loss"]
    assert trainer.fit()["val_loss"] < before - 0.05


def test_validation_is_the_training_loss_without_dropouts(images, tokenizer, tmp_path):
    """The released M-VAR validates with another computation than it trains; here both are one."""
    trainer = small_trainer(images, tokenizer, tmp_path, class_dropout=0.0, mid_reso=1.0, bs=9)
    trainer.task.data.train = trainer.task.data.val  # the same images, in order
    validated = trainer.task.validate()
    trained = trainer.train_step(trainer.task.data.val_batches(9, 0, 1))[0].outcome
    torch.testing.assert_close(trained.sums, validated.sums, atol=1e-4, rtol=0)


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(images, tokenizer, tmp_path):
    """With class dropout: it is drawn for the whole step."""
    weights = []
    for ac in (1, 2):
        trainer = small_trainer(images, tokenizer, tmp_path, class_dropout=0.5, ac=ac, tblr=0.01)
        trainer.train_step(batches_of(trainer))
        weights.append(torch.cat([p.flatten() for p in trainer.state.model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


def test_class_dropout_drops_its_share_and_nothing_else(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, class_dropout=0.25, bs=4000)
    labels = torch.full((4000,), 2)
    dropped = trainer.task._drop_classes(labels, 0, 0)
    assert set(dropped.tolist()) == {2, trainer.state.model.unconditional}
    assert (dropped != 2).float().mean().item() == pytest.approx(0.25, abs=0.03)


# --- progressive training and groups of scales --------------------------------------------------------------------------


def test_progressive_training_computes_no_logits_of_later_scales(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, pg=0.8, pg0=1)
    assert trainer.train_step(batches_of(trainer))[0].rates["scales"] == 2
    gradient_step = trainer.state.parts[MODEL].optimizer.state[trainer.state.model.position_embed]["exp_avg"]
    assert gradient_step[:, :5].abs().sum() > 0
    assert gradient_step[:, 5:].abs().sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_progressive_training_grows_to_all_scales_in_every_family(family, images, tokenizer, tmp_path):
    flags = {"family": family, "pg": 0.8, "pg0": 0, "max_steps": 12, "log_every": 1, "wp": 0.1, "val_samples": 0}
    small_trainer(images, tokenizer, tmp_path, **flags).fit()
    scales = [entry["scales"] for entry in read_metrics(tmp_path) if "scales" in entry]
    assert scales == sorted(scales)
    assert set(scales) == {1, 2, 3, 4}
    assert len(read_metrics(tmp_path)[0]["loss_by_scale"]) == 1


@pytest.mark.parametrize("window_from", [0, 3, 1])
def test_scale_groups_in_turn_give_the_gradient_of_one_pass(window_from, images, tokenizer, tmp_path, monkeypatch):
    flags = {"family": "markov", "window_from": window_from, "alng": 0.5, "ac": 2, "ls": 0.1}
    together, each = (
        gradients(small_trainer(images, tokenizer, tmp_path, scale_groups=mode, **flags), monkeypatch)
        for mode in ("together", "each")
    )
    assert together.keys() == each.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(each[name], gradient, atol=1e-6 * gradient.abs().max().item() + 1e-12, rtol=1e-4)


def test_scale_groups_in_turn_need_the_memory_of_the_largest_group(images, tokenizer, tmp_path):
    peaks = {}
    for mode in ("together", "each"):
        trainer = small_trainer(images, tokenizer, tmp_path, family="markov", scale_groups=mode)
        with live_saved_bytes() as watch:
            trainer.train_step(batches_of(trainer))
        peaks[mode] = watch.peak
    task = small_trainer(images, tokenizer, tmp_path, family="markov").task
    alone = []
    for scales in (range(2), range(2, 3), range(3, 4)):
        indices = task._indices(next(batches_of(trainer))[0])
        with live_saved_bytes() as watch:
            inputs = task.tokenizer.teacher_inputs(indices)
            losses, _ = task._token_losses(task.spread, torch.cat(indices, 1), inputs, torch.zeros(8).long(), scales, 0.0)
            losses.sum().backward()
        alone.append(watch.peak)
    assert peaks["each"] == pytest.approx(max(alone), rel=0.02)
    assert peaks["each"] < 0.65 * peaks["together"]


def test_drawn_groups_follow_the_released_schedule(images, tokenizer, tmp_path):
    flags = {"family": "markov", "scale_groups": "drawn", "max_steps": 20, "log_every": 1, "val_every": 20}
    small_trainer(images, tokenizer, tmp_path, **flags).fit()
    trained = [list(entry["loss_by_scale"]) for entry in read_metrics(tmp_path) if "loss" in entry]
    assert trained == 2 * (8 * [["1x1", "2x2"]] + [["3x3"], ["4x4"]])


# --- precision ----------------------------------------------------------------------------------------------------------


def poison(trainer: Trainer, steps: set[int], scale: int = 2) -> None:
    """Make the loss of one scale infinite in some steps."""
    usual = trainer.task._token_losses

    def token_losses(*arguments):
        losses, predictions = usual(*arguments)
        if trainer.state.step in steps:
            tokens = trainer.task.pyramid.tokens(range(scale, scale + 1))
            losses = losses.clone()
            losses[:, tokens] *= torch.inf
        return losses, predictions

    trainer.task._token_losses = token_losses


@pytest.mark.parametrize("fp16", [0, 2])
def test_what_is_not_finite_stops_the_run_at_once(fp16, images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, fp16=fp16, save_every=1, tblr=0.01)
    poison(trainer, {2})
    with pytest.raises(FloatingPointError, match="step 3: the loss is inf at scale 3x3 on rank 0; the last checkpoint is unt"):
        trainer.fit()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_1", "step_2"]
    assert load_transformer(tmp_path, ema=False).head.weight.isfinite().all()
    assert trainer.state.ema["head.weight"].isfinite().all()


def test_what_is_not_finite_is_noticed_one_step_later_and_named_rightly(images, tokenizer, tmp_path):
    """Looking at a step while the device is still at it would keep the device waiting for the next one."""
    trainer = small_trainer(images, tokenizer, tmp_path)
    poison(trainer, {1})
    batches = batches_of(trainer)
    for _ in range(2):
        trainer.train_step(batches)
    with pytest.raises(FloatingPointError, match="step 2: the loss is inf at scale 3x3 on rank 0"):
        trainer.train_step(batches)


@pytest.mark.parametrize("use", ["save", "_validate", "check_step"])
def test_nothing_uses_the_weights_of_a_step_that_was_not_finite(use, images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path)
    poison(trainer, {0})
    trainer.train_step(batches_of(trainer))
    with pytest.raises(FloatingPointError, match="step 1: the loss is inf at scale 3x3"):
        getattr(trainer, use)(*((None, None) if use == "_validate" else ()))
    assert checkpoints(tmp_path) == []


def test_half_precision_skips_and_counts_steps_that_are_not_finite(images, tokenizer, tmp_path):
    flags = {"fp16": 1, "max_steps": 6, "log_every": 1, "tblr": 0.01, "max_bad_steps": 3}
    trainer = small_trainer(images, tokenizer, tmp_path, **flags)
    poison(trainer, {1, 2, 4})
    trainer.fit()
    entries = [entry for entry in read_metrics(tmp_path) if "loss" in entry]
    assert [entry["skipped_steps"] for entry in entries] == [0, 1, 2, 2, 3, 3]
    assert [entry["loss_scale"] for entry in entries] == [2048, 1024, 512, 512, 256, 256]
    assert [entry["loss"] is None for entry in entries] == [False, True, True, False, True, False]


def test_half_precision_ends_after_too_many_bad_steps_in_a_row(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, fp16=1, save_every=1, max_bad_steps=3, tblr=0.01)
    poison(trainer, {1, 2, 3})
    message = "step 4: the loss is inf at scale 3x3 on rank 0 at loss scale 512, 3 such steps in a row; .* or use --fp16=0"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit()
    assert [path.name for path in checkpoints(tmp_path)][-1] == "step_3"


def test_a_gradient_without_a_bad_loss_is_told_apart(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path)
    trainer.state.model.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient is not finite \(largest loss 3.4.* at scale"):
        trainer.fit()


def test_the_loss_scale_grows_to_its_cap(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, fp16=1, max_steps=8, log_every=1, tblr=1e-6)
    trainer.state.scaler.set_growth_interval(1)
    trainer.fit()
    scales = [entry["loss_scale"] for entry in read_metrics(tmp_path) if "loss" in entry]
    assert scales == [4096, 8192, 16384, 32768, 32768, 32768, 32768, 32768]


def test_a_loss_that_is_not_finite_counts_where_the_gradient_is(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path)
    usual = trainer.task._token_losses
    trainer.task._token_losses = lambda *arguments: ((r := usual(*arguments))[0] + torch.inf, r[1])
    with pytest.raises(FloatingPointError, match="step 1: the loss is inf at scale 1x1 on rank 0"):
        trainer.fit()


def test_random_numbers_of_all_ranks_are_not_those_of_one():
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1, ALL_RANKS)}
    assert len(seeds) == 12


def test_a_step_takes_the_rates_clipping_and_smoothing_that_it_is_told(images, tokenizer, tmp_path):
    """The recipe as a whole: one step of the trainer against AdamW written out."""
    flags = {"tblr": 0.32, "tclip": 0.5, "ls": 0.2, "twd": 0.3, "wp0": 1.0, "class_dropout": 0.0, "ema": 0.9}
    trainer = small_trainer(images, tokenizer, tmp_path, **flags)
    model = trainer.state.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pixels, labels = next(batches_of(trainer))
    indices = trainer.task.tokenizer.encode(pixels)
    logits = model(labels, trainer.task.tokenizer.teacher_inputs(indices))
    log_probabilities = logits.log_softmax(dim=-1)
    chosen = log_probabilities.gather(2, torch.cat(indices, 1)[..., None]).squeeze(2)
    loss = -(0.8 * chosen + 0.2 * log_probabilities.mean(dim=-1)).mean()
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 0.5
    _, norms = trainer.train_step(batches_of(trainer))
    trainer.check_step()
    assert norms["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    rate = 0.32 * 8 / 256  # the peak, in the first step with wp0 = 1
    for name, decays in (("head.weight", True), ("head.bias", False), ("position_embed", False)):
        clipped = gradients[name] * 0.5 / norm
        step = clipped / (clipped.abs() + 1e-8)  # AdamW's first one
        expected = before[name] * (1 - rate * 0.3 * decays) - rate * step
        torch.testing.assert_close(dict(model.named_parameters())[name], expected, atol=2e-5, rtol=0)
    ramped = min(0.9, 2 / 11)  # after one step
    average = before["head.weight"] * ramped + model.head.weight * (1 - ramped)
    torch.testing.assert_close(trainer.state.ema["head.weight"], average, atol=1e-6, rtol=0)


def test_utilisation_counts_the_scales_that_are_trained(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, peak_tflops=1.0, pg=0.9, pg0=0)
    result, norms = trainer.train_step(batches_of(trainer))
    assert result.rates["scales"] == 1
    assert trainer._metrics(result, norms, 100.0)["mfu"] == pytest.approx(100 * trainer.task.mfu_of_image / 30)


# --- compiled -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile makes graphs and counts them, but leaves out the minutes of making code of them."""
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: compile_(function, backend=counter))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_are_one_graph_for_all_steps(family, graphs, images, tokenizer, tmp_path):
    """With drop-path, whose rate is another in each block: as a number in it, it made each block a graph of its own."""
    flags = {"family": family, "depth": 4, "drop_path": 0.3, "max_steps": 3, "val_every": 9, "fp16": 2, "tblr": 0.01}
    trainer = small_trainer(images, tokenizer, tmp_path, tfast=3, **flags)
    batches = batches_of(trainer)
    trainer.train_step(batches)
    assert graphs.frame_count == 3  # teacher inputs, block, loss
    for _ in range(2):
        trainer.train_step(batches)
    assert graphs.frame_count == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_training_with_validation_and_samples_is_training(graphs, images, tokenizer, tmp_path):
    """Every stage of progressive training is a graph, as is validation; samples are not compiled, scale by scale."""
    flags = {"max_steps": 4, "log_every": 1, "val_every": 2, "val_samples": 2, "pg": 0.6, "pg0": 0}
    losses = []
    for tfast in (0, 3):
        run = tmp_path / str(tfast)
        small_trainer(images, tokenizer, run, tfast=tfast, **flags).fit()
        losses.append([entry.get("loss", entry.get("val_loss")) for entry in read_metrics(run)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert {entry["scales"] for entry in read_metrics(run) if "scales" in entry} == {1, 3, 4}
    assert graphs.frame_count == 3 * (3 + 1)  # teacher inputs, block and loss of the stages and of validation


# --- averaged weights, recomputation, figures ---------------------------------------------------------------------------


def test_averaged_weights_follow_the_trained_ones(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, tblr=0.01, max_steps=3, ema=0.5)
    start = trainer.state.model.head.weight.detach().clone()
    trainer.fit()
    averaged, current = load_transformer(tmp_path), load_transformer(tmp_path, ema=False)
    assert (start - averaged.head.weight).norm() < (start - current.head.weight).norm()
    assert not torch.equal(start, averaged.head.weight)


def test_averaged_weights_change_places_and_come_back(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path)
    weight, average = trainer.state.model.head.weight, trainer.state.ema["head.weight"]
    average.add_(1)
    before = weight.detach().clone(), average.clone()
    with trainer.state.averaged_weights():
        assert torch.equal(weight, before[1])
    assert torch.equal(weight, before[0])
    assert torch.equal(average, before[1])


def test_recomputation_takes_the_same_step_with_less_memory(images, tokenizer, tmp_path):
    weights, peaks = [], []
    for recompute in (False, True):
        trainer = small_trainer(images, tokenizer, tmp_path, recompute=recompute, drop_path=0.5, tblr=0.01, depth=6)
        with live_saved_bytes() as watch:
            trainer.train_step(batches_of(trainer))
        peaks.append(watch.peak)
        weights.append(torch.cat([p.flatten() for p in trainer.state.model.parameters()]))
    assert torch.equal(*weights)
    assert peaks[1] < 0.6 * peaks[0]


def test_a_run_that_waits_for_its_data_is_told_once(images, tokenizer, tmp_path, monkeypatch):
    trainer = small_trainer(images, tokenizer, tmp_path, max_steps=5, log_every=1)
    usual = trainer.task.data.train_batches

    def slowly(*arguments):
        for batch in usual(*arguments):
            time.sleep(1)
            yield batch

    monkeypatch.setattr(trainer.task.data, "train_batches", slowly)
    trainer.fit()
    waited = [entry["data_wait"] for entry in read_metrics(tmp_path) if "data_wait" in entry]
    assert len(waited) == 5
    assert all(0.1 < share <= 1 for share in waited)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("of the time went by in waiting for data: give more --workers") == 1


def test_every_figure_of_a_step_and_of_a_validation_is_logged(images, tokenizer, tmp_path):
    trainer = small_trainer(images, tokenizer, tmp_path, max_steps=3, log_every=3, peak_tflops=1.0, fp16=1)
    trainer.fit()
    step, validation = read_metrics(tmp_path)
    scales = ["1x1", "2x2", "3x3", "4x4"]
    assert list(step["loss_by_scale"]) == list(step["accuracy_by_scale"]) == scales
    assert list(validation["val_loss_by_scale"]) == list(validation["val_accuracy_by_scale"]) == scales
    lengths = torch.tensor([1.0, 4.0, 9.0, 16.0])
    mean = (torch.tensor(list(step["loss_by_scale"].values())) * lengths).sum() / lengths.sum()
    assert step["loss"] == pytest.approx(mean.item())
    assert step["loss_last"] == step["loss_by_scale"]["4x4"]
    assert step["epoch"] == validation["epoch"] == 1.0
    assert step["grad_norm"] > 0
    assert 0 < step["mfu"] < 1
    assert step["memory_gb"] > 0.1
    assert 0 <= validation["val_codes_used"] <= 1
    by_class = (tmp_path / "val_classes.jsonl").read_text()
    assert by_class.count("\n") == 1
    assert '"step": 3' in by_class
    assert (tmp_path / "log.txt").read_text().count("Mamba's scan is computed by torch: the model is not on a CUDA GPU") == 1
