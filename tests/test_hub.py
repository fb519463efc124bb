"""The real client against a hub on the loopback (hub_server.py)."""

import copy
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import ROOT, run_in_process, run_in_shell, script
from golden_weights import tokenizer_weights, transformer_weights
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants, hf_hub_download
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import assert_same_model, small_tokenizer, small_transformer

import sample
from models import VQVAE, ScaleTransformer
from models.hub import HubName
from models.precision import cast_for_file_
from models.storage import Description, weights_hash
from utils.checkpoint import load_description, load_tokenizer, load_transformer, save_model

DESCRIPTION = Description("transformer", ["cat", "dog", "a|b"], "me/tokenizer", {"family": "mvar", "seed": 3, "tblr": 1e-4})
EVALUATED = {
    "settings": {"reference": "data/imagenet-val.npz", "k": 3},
    "extractor": {"name": "inception", "weights_sha256": "0" * 64},
    "scores": {
        "samples": {"images": 50000, "reference images": 10000, "FID": 3.0712, "precision": 0.8, "recall": None}
        | {"KID": 0.000512, "KID std": 0.00003},
        "real": {"images": 50000, "reference images": 10000, "FID": 1.5, "precision": 0.7, "recall": 0.6},
    },
    "notes": ["too few images"],
    "biases": {"FID": {"says": "too large", "by": {"samples": 0.1, "real": None}}},
    "by_class": {"classes": {"cat": {"images": 5, "KID": None}}, "recognised": 0.5, "real_recognised": 0.6},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The client of this process talks to a hub of its own, with an empty cache and no token."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its tries
    yield server
    server.stop()


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def model():
    model = small_transformer()
    model.description = DESCRIPTION
    return model


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, bytes]:
    """What the hub stores of the model."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, model, DESCRIPTION)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def released(weights: dict) -> bytes:
    contents = io.BytesIO()
    torch.save(weights, contents)
    return contents.getvalue()


def assert_same(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    assert ours.description == other.description
    assert_same_model(ours, other)


def test_names():
    assert HubName.parse("owner/name") == ("owner/name", None, None)
    assert HubName.parse("owner/name@v1:sub/file.pth") == ("owner/name", "v1", "sub/file.pth")
    assert HubName.parse("o-w.n_er/name@refs/pr/1") == ("o-w.n_er/name", "refs/pr/1", None)
    assert str(HubName.parse("owner/name@v1:file.pth")) == "owner/name@v1:file.pth"
    for text in ("name", "a/b/c", "/absolute/path", "owner/name:", "owner/name@", "owner/name:a:b", "file.pth"):
        assert HubName.parse(text) is None, text


# --- loading ------------------------------------------------------------------------------------------------------------


def test_sample_py_takes_everything_from_the_hub(hub, tmp_path):
    """In a process of its own, which reads HF_ENDPOINT as users set it; then once more without the hub, from the cache."""
    hub.add("someone/M-VAR", {"d2.pth": released(transformer_weights("mvar_tiny"))})
    hub.add("someone/var", {"vae.pth": released(tokenizer_weights("1234_qsr4"))})
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    words = [
        "sample.py",
        "--ckpt=someone/M-VAR:d2.pth",
        "--vae=someone/var:vae.pth",
        "--classes=3",
        "--num=2",
        "--precision=float32",
    ]
    online = run_in_shell(*words, f"--out={tmp_path / 'a.png'}", HF_ENDPOINT=hub.url, **variables)
    assert online.returncode == 0, online.stderr
    assert ("HEAD", "/someone/M-VAR/resolve/main/d2.pth", f"Bearer {TOKEN}") in hub.requests
    hub.stop()
    offline = run_in_shell(*words, f"--out={tmp_path / 'b.png'}", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", **variables)
    assert offline.returncode == 0, offline.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").width > 2 * 64


def test_sample_py_finds_the_tokenizer_that_our_repository_names(hub, logged_in, model, tmp_path, monkeypatch, capsys):
    small_tokenizer().push_to_hub("me/tokenizer")
    model.push_to_hub("me/mvar")
    words = ["--ckpt=me/mvar", "--classes=dog", "--num=1", f"--out={tmp_path / 'dog.png'}"]
    code, _, errors = run_in_process(sample.main, words, monkeypatch, capsys)
    assert code == 0, errors
    assert Image.open(tmp_path / "dog.png").width > 18


def test_our_repositories(hub, files, model):
    hub.add("me/mvar", files)
    assert_same(load_transformer("me/mvar"), model)
    assert load_description("me/mvar") == DESCRIPTION
    assert_same(ScaleTransformer.from_pretrained("me/mvar"), model)
    with pytest.raises(ValueError, match="describes a transformer, not a tokenizer"):
        VQVAE.from_pretrained("me/mvar")


def test_a_file_is_loaded_once(hub, files):
    hub.add("me/mvar", files)
    for _ in range(3):
        load_transformer("me/mvar")
    loaded = [path for command, path, _ in hub.requests if command == "GET"]
    assert len(loaded) == 2, loaded


def test_revisions(hub, files, model):
    old = hub.add("me/mvar", files, revision="v1")
    hub.add("me/mvar", files)
    renamed = json.dumps(json.loads(files["config.json"]) | {"class_names": ["new"]}).encode()
    hub.add("me/mvar", {"config.json": renamed})
    assert load_description("me/mvar").class_names == ["new"]
    for source in ("me/mvar@v1", f"me/mvar@{old}"):
        assert_same(load_transformer(source), model)
    assert ScaleTransformer.from_pretrained("me/mvar", revision="v1").description == DESCRIPTION
    assert ScaleTransformer.from_pretrained("me/mvar@v1").description == DESCRIPTION


def test_weights_and_configuration_are_of_one_commit(hub, files, model, monkeypatch):
    """A push between the two downloads must not mix two models."""
    hub.add("me/mvar", files)

    def push_in_between(name: str, file: str, **options) -> str:
        path = hf_hub_download(name, file, **options)
        hub.add("me/mvar", {"model.safetensors": b"of the next model"})
        return path

    monkeypatch.setattr("models.hub.hf_hub_download", push_in_between)
    assert_same(load_transformer("me/mvar"), model)


def test_without_network_the_cache_serves(hub, files, model, monkeypatch):
    hub.add("me/mvar", files)
    load_transformer("me/mvar")
    hub.broken = True
    assert_same(load_transformer("me/mvar"), model)
    hub.stop()
    assert_same(load_transformer("me/mvar"), model)
    assert_same(ScaleTransformer.from_pretrained("me/mvar", local_files_only=True), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(load_transformer("me/mvar"), model)


# --- errors -------------------------------------------------------------------------------------------------------------


def message(source: str, **options) -> str:
    with pytest.raises(FileNotFoundError) as caught:
        ScaleTransformer.from_pretrained(source, **options) if options else load_transformer(source)
    text = str(caught.value)
    assert text.startswith(f"{source}: no such path here, and "), text
    assert "\n" not in text
    return text


def test_what_the_hub_does_not_have(hub, files):
    hub.add("me/mvar", files)
    hub.add("someone/other", {"README.md": b"hello"})
    hub.add("someone/closed", files)
    hub.repositories["someone/closed"].gated = True
    assert "there is no me/mvra on the hub, or it is private: check the spelling, or log in" in message("me/mvra")
    assert "me/mvar has no revision v9: see" in message("me/mvar@v9")
    assert "me/mvar has no d16.pth: see" in message("me/mvar:d16.pth")
    assert "has no config.json: it is no model of this project: name a file of it" in message("someone/other")
    assert "accept them at" in message("someone/closed")
    assert "the hub has no such names (" in message("some--one/-.x")


def test_without_network_and_cache(hub, monkeypatch):
    hub.broken = True
    assert f"the hub at {hub.url} answered 503: try again later" in message("me/mvar")
    hub.stop()
    assert f"the hub at {hub.url} is out of reach (" in message("me/mvar:d16.pth")
    elsewhere = {"local_files_only": True, "cache_dir": "elsewhere"}
    assert "config.json is not in the cache elsewhere" in message("me/mvar", **elsewhere)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "config.json is not in the cache" in message("me/mvar")
    assert message("me/mvar").endswith("unset HF_HUB_OFFLINE to download it")


def test_half_a_download_is_told(hub, files, monkeypatch):
    hub.add("me/mvar", {"config.json": files["config.json"]})
    assert "me/mvar has no model.safetensors" in message("me/mvar")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "model.safetensors is not in the cache" in message("me/mvar")


@pytest.mark.parametrize("name", ["absent", "a/b/c", "me/mvar:d16.pth"])
def test_what_from_pretrained_does_not_take(name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such directory: give a checkpoint directory or owner/name"):
        ScaleTransformer.from_pretrained(name)


def test_nothing_is_unpickled(hub, files):
    hub.add("me/mvar", {"config.json": files["config.json"], "pytorch_model.bin": b"\x80", "model.safetensors": b"\x80\x02."})
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable weights file"):
        ScaleTransformer.from_pretrained("me/mvar")


def test_loading_is_strict(tmp_path, model):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: missing head\.bias"):
        ScaleTransformer.from_pretrained(tmp_path)


# --- saving -------------------------------------------------------------------------------------------------------------


def test_directories_of_either_way_are_the_same(tmp_path, model, files):
    model.save_pretrained(tmp_path / "ours")
    written = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    assert written.pop("README.md")
    assert written == files
    assert_same(load_transformer(tmp_path / "ours"), model)
    assert_same(ScaleTransformer.from_pretrained(tmp_path / "ours"), model)


def test_averaged_weights_are_loaded_as_by_load_transformer(tmp_path, model):
    model.save_pretrained(tmp_path)
    averaged = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(averaged, tmp_path / "ema.safetensors")
    for loaded in (ScaleTransformer.from_pretrained(tmp_path), load_transformer(tmp_path)):
        assert torch.equal(loaded.head.bias, model.head.bias + 1)
    assert torch.equal(load_transformer(tmp_path, ema=False).head.bias, model.head.bias)


def test_directory_without_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json and no model\.safetensors: give a checkpoint directory"):
        ScaleTransformer.from_pretrained(tmp_path)


def test_what_is_loaded_is_saved_with_its_description(tmp_path, model):
    model.save_pretrained(tmp_path / "first")
    copy.deepcopy(load_transformer(tmp_path / "first")).save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_push_and_pull(hub, logged_in, model):
    tokenizer = small_tokenizer()
    url = tokenizer.push_to_hub("me/tokenizer", model_card_kwargs={"license": "mit"})
    assert url.startswith(f"{hub.url}/me/tokenizer/commit/")
    model.push_to_hub("me/mvar", commit_message="Weights")
    assert sorted(hub.files("me/mvar")) == ["README.md", "config.json", "model.safetensors"]
    assert_same(ScaleTransformer.from_pretrained("me/mvar"), model)
    assert_same(load_transformer("me/mvar"), model)
    assert_same(VQVAE.from_pretrained("me/tokenizer"), tokenizer)
    assert_same(load_tokenizer("me/tokenizer"), tokenizer)
    assert 'load_transformer("me/mvar")' in hub.files("me/mvar")["README.md"].decode()


def test_push_without_a_token(hub, model):
    with pytest.raises(OSError, match=r"^me/mvar: not published: .*log in with `hf auth login` or set HF_TOKEN$"):
        model.push_to_hub("me/mvar")


def test_push_without_network(hub, logged_in, model):
    hub.stop()
    with pytest.raises(OSError, match=r"^me/mvar: not published: the hub at .* is out of reach \(.*\): check the network"):
        model.push_to_hub("me/mvar")


# --- the card -----------------------------------------------------------------------------------------------------------


def test_card_of_a_transformer(tmp_path, model):
    model.save_pretrained(tmp_path, model_card_kwargs={"scores": EVALUATED, "license": "mit", "name": "me/mvar"})
    card = ModelCard.load(tmp_path / "README.md")
    metadata = card.data.to_dict()
    assert metadata["license"] == "mit"
    assert metadata["library_name"] == "m-var"
    assert "pytorch_model_hub_mixin" in metadata["tags"]
    published = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert published == {"FID": 3.0712, "precision": 0.8, "KID": 0.000512}
    assert {result.dataset_name for result in card.data.eval_results} == {"imagenet-val"}
    assert metadata["model-index"][0]["name"] == "me/mvar"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for line in (
        "# M-VAR d2, 9x9 tokens",
        "| depth, width, heads | 2, 64, 2 |",
        f"| parameters | {parameters:,} |",
        "| pyramid | 1_2_3_5_8_9, 184 tokens |",
        "| resolution | 9x9 tokens |",
        "| classes | 5: cat, dog, a\\|b |",
        "| tokenizer | `me/tokenizer` |",
        "python sample.py --ckpt me/mvar --out samples.png",
        "|  | samples | real |",
        "| FID | 3.0712 | 1.5 |",
        "| recall | - | 0.6 |",
        "| KID | 0.000512 | - |",
        "| KID std | 0.00003 | - |",
        "By `scripts/evaluate.py` with the extractor inception against `imagenet-val`.",
        "- too few images",
        ' "seed": 3,',
    ):
        assert line in card.text.splitlines(), f"{line}\n\n{card.text}"


def test_card_says_nothing_that_is_not_known(tmp_path):
    small_tokenizer().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert not {"license", "model-index", "eval_results"} & set(card.data.to_dict())
    assert "# Multi-scale VQVAE tokenizer, 18x18 px" in card.text.splitlines()
    assert "## Scores" not in card.text
    assert "## Training" not in card.text


def test_scores_may_be_plain_numbers(model):
    card = model.generate_model_card(scores={"FID": 3.07, "IS": 294}, dataset="ImageNet")
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("fid", 3.07), ("is", 294)]
    assert card.data.eval_results[0].dataset_type == "imagenet"
    assert "| IS | 294 |" in card.text


@pytest.mark.parametrize("scores", [{"FID": "3"}, {"scores": 3}, {"scores": {"samples": 3}}, {"environment": {}}])
def test_what_is_no_score(model, scores):
    with pytest.raises(ValueError, match="scores: .*evaluate.py --json wrote"):
        model.generate_model_card(scores=scores)


# --- scripts/publish.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def publish(monkeypatch, capsys):
    main = script("publish").main
    return lambda *arguments: run_in_process(main, list(arguments), monkeypatch, capsys)


@pytest.fixture
def checkpoint(tmp_path, model) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_model(directory, model, replace(DESCRIPTION, tokenizer=str(tmp_path)))
    return directory


def test_publishing(hub, logged_in, publish, checkpoint, tmp_path, model):
    (tmp_path / "scores.json").write_text(json.dumps(EVALUATED))
    words = ["--tokenizer=me/tokenizer", "--scores", tmp_path / "scores.json", "--license=mit", "--dataset=ImageNet"]
    code, output, errors = publish(checkpoint, "me/mvar", *words)
    assert code == 0, errors
    assert output == f"published {checkpoint}: {hub.url}/me/mvar/commit/{hub.repositories['me/mvar'].revisions['main']}\n"
    assert_same(load_transformer("me/mvar"), model)
    card = ModelCard(hub.files("me/mvar")["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.eval_results[0].dataset_name == "ImageNet"


def test_scores_of_other_weights_are_not_published(hub, logged_in, publish, checkpoint, tmp_path, model):
    path, words = tmp_path / "scores.json", ["--tokenizer=me/tokenizer", "--scores", tmp_path / "scores.json"]
    path.write_text(json.dumps(EVALUATED | {"dump": {"transformer_sha256": "ab" * 32}}))
    code, _, errors = publish(checkpoint, "me/mvar", *words)
    assert code == 1
    assert f"the scores are of weights with hash abababababab, these have {weights_hash(model)[:12]}" in errors
    assert not hub.repositories
    path.write_text(json.dumps(EVALUATED | {"dump": {"transformer_sha256": weights_hash(model)}}))
    assert publish(checkpoint, "me/mvar", *words)[0] == 0


def test_scores_are_those_of_what_is_published(hub, logged_in, publish, checkpoint, tmp_path, model):
    """Rounded weights have other scores than those they were rounded from."""
    half = copy.deepcopy(model)
    cast_for_file_(half, "bfloat16")
    path = tmp_path / "scores.json"
    words = [checkpoint, "me/mvar", "--tokenizer=me/tokenizer", "--scores", path]
    path.write_text(json.dumps(EVALUATED | {"dump": {"transformer_sha256": weights_hash(model)}}))
    code, _, errors = publish(*words, "--dtype=bfloat16")
    assert code == 1
    assert "the scores are of its weights before --dtype rounds them: score what scripts/export_checkpoint.py makes" in errors
    assert not hub.repositories
    path.write_text(json.dumps(EVALUATED | {"dump": {"transformer_sha256": weights_hash(half)}}))
    assert publish(*words)[0] == 1  # those of the rounded ones are not those of float32 either
    code, _, errors = publish(*words, "--dtype=bfloat16")
    assert code == 0, errors
    published = load_transformer("me/mvar")
    assert load_description("me/mvar").precision == "bfloat16"
    assert weights_hash(published) == weights_hash(half)
    assert "| precision of the file | bfloat16 (" in hub.files("me/mvar")["README.md"].decode()


def test_scores_of_reconstructions_are_published_with_a_tokenizer(hub, logged_in, publish, tmp_path):
    tokenizer = small_tokenizer()
    (tmp_path / "vae").mkdir()
    save_model(tmp_path / "vae", tokenizer, Description("tokenizer"))
    scores = {"images": 50, "rFID": 1.25, "PSNR": 20.5, "SSIM": None, "LPIPS": None}
    written = {"scores": scores, "tokenizer": {"weights_sha256": weights_hash(tokenizer)}, "notes": []}
    (tmp_path / "scores.json").write_text(json.dumps(written))
    code, _, errors = publish(tmp_path / "vae", "me/vae", "--scores", tmp_path / "scores.json")
    assert code == 0, errors
    card = ModelCard(hub.files("me/vae")["README.md"].decode())
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {"rFID": 1.25, "PSNR": 20.5}


def test_no_path_of_this_machine_is_published(hub, logged_in, publish, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config["training"] |= {
        "data_path": "/home/me/secret",
        "vae": "here/vae",
        "local_out_dir_path": "out",
        "other": "/home/me/x",
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert publish(checkpoint, "me/mvar", "--tokenizer=me/tokenizer")[0] == 0
    files = hub.files("me/mvar")
    for name in ("README.md", "config.json"):
        text = files[name].decode()
        assert "seed" in text
        assert not any(word in text for word in ("secret", "here/vae", "local_out_dir_path", "/home/me"))


def test_a_card_that_people_have_edited_is_not_lost(hub, logged_in, publish, checkpoint):
    words = [checkpoint, "me/mvar", "--tokenizer=me/tokenizer"]
    assert publish(*words)[0] == 0
    assert publish(*words)[0] == 0  # ours may be replaced
    edited = hub.files("me/mvar")["README.md"].replace(b"# M-VAR", b"# My M-VAR")
    hub.add("me/mvar", {"README.md": edited})
    code, _, errors = publish(*words)
    assert code == 1
    assert "me/mvar: people have written in its card: give --keep_card, or --replace_card" in errors
    assert publish(*words, "--keep_card")[0] == 0
    assert hub.files("me/mvar")["README.md"] == edited
    assert publish(*words, "--replace_card")[0] == 0
    assert b"# My M-VAR" not in hub.files("me/mvar")["README.md"]


def test_what_is_to_be_private_is_not_sent_to_a_public_place(hub, logged_in, publish, checkpoint):
    words = [checkpoint, "me/mvar", "--tokenizer=me/tokenizer"]
    assert publish(*words, "--private")[0] == 0
    assert hub.repositories["me/mvar"].private
    hub.repositories["me/mvar"].private = False
    before = hub.files("me/mvar")
    code, _, errors = publish(*words, "--private")
    assert code == 1
    assert "me/mvar: is public: make it private on the hub first, or leave --private out" in errors
    assert hub.files("me/mvar") is before


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["me/mvar"], "which only this machine has: publish that and give --tokenizer owner/name"),
        (
            ["me/mvar", "--tokenizer=me/tokenizer"],
            "me/mvar: not published: there is no token here: log in with `hf auth login`",
        ),
        (["mvar"], "mvar: no name of a repository: give owner/name"),
        (["me/mvar@v1"], "me/mvar@v1: no name of a repository: give owner/name"),
        (["me/mvar", "--dataset=x"], "--dataset=x: says what --scores belong to: give these too"),
        (["me/mvar", "--tokenizer=me/tokenizer", "--scores=README.md"], "README.md: not valid JSON"),
        (
            ["me/mvar", "--tokenizer=me/tokenizer", "--scores=results/demo.json"],
            "results/demo.json: scores: 'command' is 'make demo'",
        ),
    ],
)
def test_what_is_not_published(hub, publish, checkpoint, monkeypatch, words, complaint):
    monkeypatch.chdir(ROOT)
    code, _, errors = publish(checkpoint, *words)
    assert code != 0
    assert complaint in errors
    assert errors.count("\n") == 1
    assert not hub.repositories


def test_a_hub_that_does_not_answer_is_noticed_before_anything_is_loaded(hub, logged_in, publish, checkpoint, monkeypatch):
    hub.broken = True
    (checkpoint / "model.safetensors").write_bytes(b"")  # to be loaded it would have to be whole
    code, _, errors = publish(checkpoint, "me/mvar", "--tokenizer=me/tokenizer")
    assert code == 1
    assert f"me/mvar: not published: the hub at {hub.url} answered 503: try again later" in errors


def test_a_released_file_is_not_published(publish, tmp_path):
    (tmp_path / "var.pth").write_bytes(released(transformer_weights("var_tiny")))
    code, _, errors = publish(tmp_path / "var.pth", "me/var")
    assert code == 1
    assert "a released file: turn it into ours with scripts/convert_official.py" in errors
