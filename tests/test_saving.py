import threading
import time

import pytest
import torch
import torch.distributed as torch_dist
from small_models import small_transformer

from utils.checkpoint import Description, load_description, load_transformer
from utils.runs import saving
from utils.runs.checkpoints import checkpoints, seal
from utils.runs.optim import build_adamw
from utils.runs.saving import ShardedSaver, read_numbers, restore_, save_checkpoint
from utils.runs.state import MODEL, Part, TrainState, optimizer_tensors

DESCRIPTION = Description("transformer", class_names=["cat", "dog"], tokenizer="vae.pth", training={"seed": 3})


def make_state(seed: int, average: bool = True) -> TrainState:
    """A state after a step of AdamW with gradients drawn from the seed."""
    model = small_transformer().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = build_adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ema = {name: weight.detach() + 1 for name, weight in model.named_parameters()} if average else {}
    return TrainState({MODEL: Part(model, optimizer)}, scaler, ema, step=seed, seconds=1.5, skipped_steps=2)


def save(run, state: TrainState, keep: int = 2):
    numbers = state.numbers() | {"ranks": 1}
    return save_checkpoint(run, state.step, state.model.config, DESCRIPTION, numbers, state.tensors(), keep)


def equal(state: TrainState, other: TrainState) -> bool:
    ours, theirs = state.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_state_comes_back_whole(tmp_path):
    state, other = make_state(5), make_state(6)
    assert not equal(state, other)
    checkpoint = save(tmp_path, state)
    restore_(other.tensors(), checkpoint)
    other.set_numbers(read_numbers(checkpoint))
    assert equal(state, other)
    assert (other.step, other.seconds, other.skipped_steps) == (5, 1.5, 2)


def test_moments_are_restored_before_the_first_step_too(tmp_path):
    state = make_state(5)
    model = small_transformer()
    fresh = TrainState({MODEL: Part(model, build_adamw(model))}, torch.amp.GradScaler("cpu", enabled=False))
    restore_(fresh.tensors(), save(tmp_path, state))
    for ours, theirs in zip(state.model.parameters(), fresh.model.parameters(), strict=True):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(ours)
    for each in (state, fresh):
        each.parts[MODEL].optimizer.step()
    state.ema = {}
    assert equal(state, fresh)


def test_averaged_weights_start_from_the_weights_where_there_were_none(tmp_path):
    state, other = make_state(5, average=False), make_state(6)
    lacking = restore_(other.tensors(), save(tmp_path, state), may_lack=("ema", "another"))
    assert lacking == {"ema"}
    other.start_anew_(lacking)
    assert torch.equal(other.ema["head.weight"], state.model.head.weight)


def test_a_checkpoint_is_a_model_with_a_description(tmp_path):
    state = make_state(5)
    save(tmp_path, state)
    assert torch.equal(load_transformer(tmp_path).head.bias, state.ema["head.bias"])
    assert torch.equal(load_transformer(tmp_path, ema=False).head.bias, state.model.head.bias)
    assert load_description(tmp_path) == DESCRIPTION


def test_keep_bounds_the_number_of_checkpoints(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, make_state(step))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_10", "step_11"]


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    first = save(tmp_path, make_state(1))
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    calls = []

    def write(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"x" * 1000)

    monkeypatch.setattr("models.storage.save_file", write)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, make_state(2), keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


@pytest.fixture
def sharded_saver():
    torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
    yield ShardedSaver(is_main=True, barrier=lambda: None)
    torch_dist.destroy_process_group()


def start(saver: ShardedSaver, run, state: TrainState) -> None:
    saver.start(run, state.step, state.model.config, DESCRIPTION, state.numbers(), state.tensors(), keep=2)


def test_shards_are_written_in_the_background_from_a_copy(sharded_saver, tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(saving, "seal", lambda directory: (go_on.wait(20), seal(directory)))
    state = make_state(5)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    start(sharded_saver, tmp_path, state)
    assert checkpoints(tmp_path) == []
    assert not sharded_saver.has_failed()
    for tensor in state.tensors().values():
        tensor.detach().zero_()  # training goes on
    go_on.set()
    sharded_saver.finish()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_5"]
    restore_(state.tensors(), checkpoints(tmp_path)[-1])
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.tensors().items())


def test_a_save_that_fails_in_the_background_is_told(sharded_saver, tmp_path, monkeypatch):
    def fail(directory):
        raise OSError(28, "No space left on device")

    start(sharded_saver, tmp_path, make_state(5))
    sharded_saver.finish()
    monkeypatch.setattr(saving, "seal", fail)
    start(sharded_saver, tmp_path, make_state(6))
    while not sharded_saver.has_failed():
        time.sleep(0.01)
    with pytest.raises(OSError, match="the last checkpoint could not be written .*No space left on device"):
        sharded_saver.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_5"]
    sharded_saver.finish()  # nothing is left to wait for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {**tensors, "model.more": torch.zeros(1)}, "model.more is missing"),
        (lambda tensors: {**tensors, "critic.weight": torch.zeros(1)}, "critic.weight is missing"),
        (lambda tensors: {**tensors, "model.head.bias": torch.zeros(3)}, r"model.head.bias has size \(24,\), this model wants"),
    ],
)
def test_a_state_of_another_model_is_refused(tmp_path, change, message):
    checkpoint = save(tmp_path, make_state(1))
    with pytest.raises(ValueError, match=message):
        restore_(change(make_state(2).tensors()), checkpoint)


# --- parts and optimizers -----------------------------------------------------------------------------------------------


def test_an_optimizer_may_be_any(tmp_path):
    """Also one that keeps nothing but momenta, before its first step and for parameters that never had a gradient."""
    models = [torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)}) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    models[0]["used"](torch.ones(2)).sum().backward()
    optimizers[0].step()
    kept, fresh = (optimizer_tensors(*pair) for pair in zip(models, optimizers, strict=True))
    assert kept.keys() == {f"{part}.{name}.momentum_buffer" for part in ("used", "idle") for name in ("weight", "bias")}
    assert kept.keys() == fresh.keys()
    assert kept["used.weight.momentum_buffer"].any()
    assert not any(tensor.any() for name, tensor in kept.items() if name.startswith("idle"))


def test_what_adamw_has_not_kept_yet_is_as_it_starts_itself():
    models = [small_transformer() for _ in range(2)]
    optimizers = [build_adamw(model) for model in models]
    optimizer_tensors(models[0], optimizers[0])
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_part_that_a_checkpoint_lacks_starts_anew(tmp_path):
    """As a discriminator does that is added to a run; its optimizer has then made no step."""
    checkpoint, state = save(tmp_path, make_state(1)), make_state(2)
    critic = torch.nn.Linear(2, 1)
    state.parts["critic"] = Part(critic, torch.optim.AdamW(critic.parameters()))
    before = critic.weight.clone()
    lacking = restore_(state.tensors(), checkpoint, may_lack=("critic", "critic_optimizer"))
    state.start_anew_(lacking)
    assert lacking == {"critic", "critic_optimizer"}
    assert torch.equal(critic.weight, before)
    assert not state.parts["critic"].optimizer.state
    assert equal(TrainState({MODEL: state.parts[MODEL]}, state.scaler, state.ema), make_state(1))
    again = save(tmp_path, state)
    assert restore_(state.tensors(), again) == set()
