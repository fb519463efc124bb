import pytest
import torch
from small_models import NUM_CLASSES, seeded, small_tokenizer, small_transformer

from models.generate import SamplingConfig, decode_sampled, sample
from models.storage import write_tensors
from utils.sampling.judging import BestOf, Judge, chosen

LABELS = torch.tensor([1, 4, 0])
CPU = torch.device("cpu")


class Brightness:
    """A judge to whom bright images are likely."""

    name = "brightness"

    def __call__(self, images, labels):
        return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def models():
    return small_transformer().requires_grad_(False), small_tokenizer()


def drawing(models):
    return lambda labels, generators: sample(*models, labels, SamplingConfig(top_k=0, top_p=0.0), generators)


def generators(count: int = 3) -> list[torch.Generator]:
    return [seeded(n) for n in range(count)]


def test_the_kept_image_is_the_best_of_those_drawn_one_after_another(models):
    draw, own = drawing(models), generators()
    candidates = [draw(LABELS, own) for _ in range(4)]
    brightness = torch.stack([Brightness()(decode_sampled(models[1], each), LABELS) for each in candidates])
    best_of = BestOf(4, draw, models[1], Brightness())
    best = best_of(LABELS, generators())
    best_of.count_in(3)
    for n, place in enumerate(brightness.argmax(dim=0).tolist()):
        for ours, theirs in zip(best.indices, candidates[place].indices, strict=True):
            assert torch.equal(ours[n], theirs[n])
    assert torch.equal(decode_sampled(models[1], best).mean(dim=(1, 2, 3)), brightness.amax(dim=0))
    assert best_of.kept_first == (brightness.argmax(dim=0) == 0).sum()
    assert best_of.told().startswith(f"best of 4 by brightness: {best_of.kept_first / 3:.0%} of images are the first candidate")
    assert "25% of all candidates are kept" in best_of.told()


def test_images_that_fill_up_a_cohort_do_not_count(models):
    first = BestOf(4, drawing(models), models[1], Brightness())
    first(LABELS, generators())
    first.count_in(1)
    alone = BestOf(4, drawing(models), models[1], Brightness())
    alone(LABELS[:1], generators(1))
    alone.count_in(1)
    assert first.told() == alone.told()


def test_which_is_kept_does_not_depend_on_the_other_images(models):
    best_of = BestOf(3, drawing(models), models[1], Brightness())
    together = best_of(LABELS, generators())
    alone = best_of(LABELS[1:2], generators()[1:2])
    assert all(torch.equal(ours[1:2], theirs) for ours, theirs in zip(together.indices, alone.indices, strict=True))


def test_what_is_not_finite_is_not_forgotten(models):
    drawn = drawing(models)(LABELS, generators())
    broken = drawn._replace(finite=torch.tensor(False))
    assert not chosen(torch.tensor([False] * 3), broken, drawn).finite


@pytest.fixture
def resnet(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = resnet18(num_classes=NUM_CLASSES).eval()
    write_tensors(tmp_path / "resnet18-own.safetensors", network.state_dict())
    return network, tmp_path / "resnet18-own.safetensors"


def test_a_torchvision_classifier_judges_as_its_own_preparation_has_it(resnet):
    network, path = resnet
    images = torch.rand(2, 3, 224, 224, generator=seeded())
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = network((images - mean) / deviation).softmax(dim=1)
    judged = Judge(str(path), NUM_CLASSES, CPU)(images, torch.tensor([3, 0]))
    torch.testing.assert_close(judged, torch.stack([expected[0, 3], expected[1, 0]]))


def test_efflite0_judges_as_it_measures():
    from utils.metrics.features import load_extractor

    images = torch.randint(0, 256, (2, 32, 32, 3), generator=seeded(), dtype=torch.uint8)
    expected = load_extractor("efflite0")(images).logits.softmax(dim=1)[:, 7]
    judged = Judge("efflite0", 1000, CPU)(images.permute(0, 3, 1, 2) / 255, torch.tensor([7, 7]))
    torch.testing.assert_close(judged, expected, atol=1e-6, rtol=1e-3)


def test_judges_that_cannot_judge_are_refused(resnet, tmp_path):
    with pytest.raises(FileNotFoundError, match="--judge=nowhere.pth: no such file"):
        Judge("nowhere.pth", 5, CPU)
    with pytest.raises(ValueError, match="knows 1000 classes, the transformer 5"):
        Judge("efflite0", 5, CPU)
    with pytest.raises(ValueError, match="knows 5 classes, the transformer 7"):
        Judge(str(resnet[1]), 7, CPU)
    unnamed = resnet[1].rename(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="mine.safetensors: its name has to begin with that of a torchvision classifier"):
        Judge(str(unnamed), 5, CPU)
    with pytest.raises(ValueError, match="seems to be no resnet34"):
        Judge(str(unnamed.rename(tmp_path / "resnet34.safetensors")), 5, CPU)
