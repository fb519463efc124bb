import pytest
import torch
from small_models import seeded
from timm import create_model

from dist import Ranks
from models.discriminator import DiscriminatorConfig
from models.storage import write_tensors
from utils.files import sha256
from utils.losses.backbones import DinoMaps, EfficientNetMaps
from utils.losses.critic import PATIENCE, Balance, Critic, CriticConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def pair():
    images = torch.rand(4, 3, 16, 16, generator=seeded()) * 2 - 1
    return images, torch.nn.functional.avg_pool2d(images.flip(0), 3, stride=1, padding=1)


class Halves(torch.nn.Module):
    """Two maps of an image, to be looked at instead of it."""

    channels = (3, 3)

    def forward(self, images):
        return [images, images[:, :, ::2, ::2]]


@pytest.mark.parametrize(
    "settings",
    [{}, {"lecam": 0.1}, {"augment": True}, {"features": Halves()}, {"features": Halves(), "augment": True}],
    ids=str,
)
def test_it_learns_to_tell_images_apart_and_the_decoder_is_told(settings, pair):
    torch.manual_seed(0)
    critic = Critic(CriticConfig(DiscriminatorConfig(8), rate=1e-2, **settings), ALONE)
    losses = []
    for step in range(60):
        figures = critic.learn(*pair, seeded(step), SCALER)
        critic.optimizer.step()
        critic.optimizer.zero_grad()
        losses.append(figures["discriminator_loss"].item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert figures["judged_real"] > figures["judged_made"]
    made = pair[1].clone().requires_grad_()
    critic.judge(made, seeded()).backward()
    assert made.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in critic.model.parameters())
    assert bool(critic.anchors.any()) == ("lecam" in settings)


def test_lecam_pulls_judgements_together(pair):
    def gap(lecam):
        torch.manual_seed(0)
        critic = Critic(CriticConfig(DiscriminatorConfig(8), rate=1e-2, lecam=lecam), ALONE)
        for step in range(60):
            figures = critic.learn(*pair, seeded(step), SCALER)
            critic.optimizer.step()
            critic.optimizer.zero_grad()
        return figures["judged_real"] - figures["judged_made"]

    assert gap(1.0) < 0.8 * gap(0.0)


def test_features_are_those_of_frozen_networks(tmp_path):
    torch.manual_seed(0)
    vit = create_model("vit_small_patch16_224", num_classes=0)
    write_tensors(tmp_path / "dino.safetensors", vit.state_dict())
    dino = DinoMaps(tmp_path / "dino.safetensors", sha256(tmp_path / "dino.safetensors"))
    efflite0 = EfficientNetMaps(create_model("tf_efficientnet_lite0"))
    for network, sides in ((dino, (14, 14, 14, 14)), (efflite0, (56, 28, 14, 7))):
        images = torch.rand(1, 3, 32, 32, requires_grad=True)
        maps = network(images)
        assert [tuple(x.shape[1:]) for x in maps] == [(c, s, s) for c, s in zip(network.channels, sides, strict=True)]
        sum(x.square().mean() for x in maps).backward()
        assert images.grad.abs().sum() > 0
        assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="SHA-256 is"):
        DinoMaps(tmp_path / "dino.safetensors", "0" * 64)
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="the file seems to be no ViT-S/16 of DINO"):
        DinoMaps(tmp_path / "other.safetensors", sha256(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"discriminator_loss": 0.01}, "has seen through everything"),
        ({"discriminator_loss": 1.0}, "has told nothing apart"),
        ({"discriminator_loss": 0.6, "gan_share": 9.0}, "9 times that of all other losses"),
        ({"discriminator_loss": 0.6, "gan_share": 1e-5}, "1e-05 of that of all other losses"),
    ],
)
def test_a_side_that_collapses_is_told_in_words_once(figures, words):
    balance = Balance()
    lines = [line for step in range(0, 3 * PATIENCE, 50) for line in balance.remarks(step, figures)]
    assert len(lines) == 1
    assert words in lines[0]
    assert lines[0].endswith(f"for {PATIENCE} steps")
    assert balance.remarks(3 * PATIENCE, {"discriminator_loss": 0.6, "gan_share": 0.2}) == []
    again = [line for step in range(4 * PATIENCE, 6 * PATIENCE, 50) for line in balance.remarks(step, figures)]
    assert len(again) == 1


def test_a_healthy_or_absent_discriminator_is_not_remarked_upon():
    balance = Balance()
    for step in range(0, 2000, 50):
        assert balance.remarks(step, {"discriminator_loss": 0.65, "gan_share": 0.3}) == []
        assert balance.remarks(step, {"loss": 0.2}) == []
