"""The adversary of a decoder: its discriminator, how that learns, and what it tells the decoder.

    critic = Critic(config, ranks.device, ranks.world)            # its model and optimizer are a part of the run
    critic.learn(images, decoded, generator, scaler)             # leaves gradients in it
    adversarial = critic.judge(decoded, generator)                # a loss for the decoder

Everything random comes from the caller's generator; nothing is synchronised between ranks but gradients.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist import Ranks, replicated
from models.discriminator import DiscriminatorConfig, FeatureDiscriminator, PatchDiscriminator
from utils.losses.adversarial import discriminator_loss, generator_loss, lecam_loss, move_anchors_
from utils.losses.augment import augment

SURE, LOST = 0.1, 0.95  # discriminator losses: below it sees through everything, above it sees nothing
LEAST_SHARE, MOST_SHARE = 0.001, 3.0  # of the adversarial gradient over that of all other losses
PATIENCE = 200  # steps in a row


@dataclass(frozen=True)
class CriticConfig:
    """network: of the discriminator on pixels. features: makes maps of images to look at instead, with their `channels`; None:
    pixels. rate: learning rate, constant. lecam: weight of its regularisation. augment: it sees images changed at random."""

    network: DiscriminatorConfig = DiscriminatorConfig()
    features: nn.Module | None = None
    rate: float = 1e-3
    lecam: float = 0.0
    augment: bool = False


class Critic:
    """model, optimizer: to be advanced by the caller; anchors: (2,), LeCAM's, to be kept with a checkpoint."""

    def __init__(self, config: CriticConfig, ranks: Ranks):
        self.config = config
        if config.features is None:
            self.model = PatchDiscriminator(config.network)
        else:
            self.model = FeatureDiscriminator(config.features.channels, config.network.width)
        self.model.init_weights()
        self.model.to(ranks.device)
        self.spread = self.model if ranks.world == 1 else replicated(self.model)
        settings = {"lr": config.rate, "betas": (0.5, 0.9), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)
        self.anchors = torch.zeros(2, device=ranks.device)

    def learn(
        self, images: Tensor, made: Tensor, generator: torch.Generator, scaler: torch.amp.GradScaler
    ) -> dict[str, Tensor]:
        """Leaves the gradients of its own loss in it; images, made: (B, 3, H, W) in [-1, 1]. Returns figures, each ()."""
        # real and made in one batch, as they are to be told apart
        real, made = self._judgements(self.spread, torch.cat([images, made.detach()]), generator).chunk(2)
        own = discriminator_loss(real, made)
        loss = own
        if self.config.lecam:
            move_anchors_(self.anchors, real.detach(), made.detach())
            loss = loss + self.config.lecam * lecam_loss(real, made, self.anchors)
        scaler.scale(loss).backward()
        return {
            "discriminator_loss": own.detach(),
            "judged_real": real.detach().mean(),
            "judged_made": made.detach().mean(),
        }

    def judge(self, made: Tensor, generator: torch.Generator) -> Tensor:
        """The decoder's adversarial loss, (), of images (B, 3, H, W); gradients pass through the discriminator, not into it."""
        with frozen(self.model):
            return generator_loss(self._judgements(self.model, made, generator))

    def _judgements(self, model: Callable, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.config.augment:
            images = augment(images, generator)
        return model(images if self.config.features is None else self.config.features(images)).float()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, gradients pass through the model and not into it."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


class Balance:
    """Tells in words when one side of an adversarial training has collapsed; it is shown the figures that are logged."""

    def __init__(self):
        self.since: dict[str, int] = {}  # the step at which each trouble was seen first, while it lasts
        self.told: set[str] = set()

    def remarks(self, step: int, figures: dict[str, float]) -> list[str]:
        """Lines about troubles that have lasted PATIENCE steps by now; each is told once, and again when it comes back."""
        troubles = _troubles(figures)
        self.since = {name: self.since.get(name, step) for name in troubles}
        self.told &= set(troubles)
        lasting = [name for name in troubles if step - self.since[name] >= PATIENCE and name not in self.told]
        self.told |= set(lasting)
        return [f"{troubles[name]} for {step - self.since[name]} steps" for name in lasting]


def _troubles(figures: dict[str, float]) -> dict[str, str]:
    """What is wrong in these figures -> how it is told, but for how long."""
    loss, share = figures.get("discriminator_loss"), figures.get("gan_share")
    troubles = {}
    if loss is not None and loss < SURE:
        mend = "lower --gan_lr, or use --diffaug or --lecam"
        troubles["sure"] = f"the discriminator has seen through everything (loss {loss:.2g} of 0 to 1; {mend})"
    if loss is not None and loss > LOST:
        mend = "raise --gan_lr or --gan_width"
        troubles["lost"] = f"the discriminator has told nothing apart (loss {loss:.2g}, 1 is guessing; {mend})"
    if share is not None and share > MOST_SHARE:
        troubles["loud"] = f"the adversarial gradient has been {share:.2g} times that of all other losses (lower --gan)"
    if share is not None and share < LEAST_SHARE:
        troubles["mute"] = (
            f"the adversarial gradient has been {share:.2g} of that of all other losses, too little (raise --gan)"
        )
    return troubles
