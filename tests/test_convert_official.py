import pytest
import torch
from commands import run_in_process, script
from golden_weights import tokenizer_weights, transformer_weights
from small_models import assert_same_model, small_tokenizer

from utils.checkpoint import load_description, load_tokenizer, load_transformer


@pytest.fixture
def convert(monkeypatch, capsys):
    main = script("convert_official").main
    return lambda *arguments: run_in_process(main, list(arguments), monkeypatch, capsys)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Released files of the golden models."""
    directory = tmp_path_factory.mktemp("released")
    transformer, tokenizer = transformer_weights("var_tiny"), tokenizer_weights("1234_qsr4")
    torch.save(transformer, directory / "var.pth")
    torch.save(tokenizer, directory / "vae.pth")
    torch.save({"trainer": {"var_wo_ddp": transformer, "vae_local": tokenizer}}, directory / "training.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, directory / "resnet.pth")
    return directory


def test_transformer(released, tmp_path, convert):
    words = ["--out", tmp_path / "markov", "--family=markov", "--tokenizer=owner/name:vae.pth"]
    code, output, errors = convert(released / "var.pth", *words)
    assert code == 0, errors
    assert output.splitlines() == [
        f"{released / 'var.pth'}: transformer, Markov MVAR d2, 4x4 tokens",
        f"wrote it to {tmp_path / 'markov'}, weights in float32",
    ]
    assert_same_model(load_transformer(tmp_path / "markov"), load_transformer(released / "var.pth", family="markov"))
    assert load_description(tmp_path / "markov").tokenizer == "owner/name:vae.pth"


@pytest.mark.parametrize(("words", "sides"), [([], None), (["--sides=1,2,4"], (1, 2, 4)), (["--sides=1_2_4"], (1, 2, 4))])
def test_tokenizer(released, tmp_path, convert, words, sides):
    code, output, errors = convert(released / "vae.pth", "--out", tmp_path / "vae", *words)
    assert code == 0, errors
    assert "tokenizer, Multi-scale VQVAE" in output
    assert_same_model(load_tokenizer(tmp_path / "vae"), load_tokenizer(released / "vae.pth", sides))


@pytest.mark.parametrize(
    ("words", "precision"), [([], "float16"), (["--dtype=bfloat16"], "bfloat16"), (["--dtype=float32"], "float32")]
)
def test_precision(released, tmp_path, convert, words, precision):
    """That of the source where none is asked for."""
    weights = tokenizer_weights("1234_qsr4")
    torch.save({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "half.pth")
    code, output, errors = convert(tmp_path / "half.pth", "--out", tmp_path / "vae", *words)
    assert code == 0, errors
    assert output.endswith(f"weights in {precision}\n")
    assert load_description(tmp_path / "vae").precision == precision
    if precision != "bfloat16":
        assert_same_model(load_tokenizer(tmp_path / "vae"), load_tokenizer(tmp_path / "half.pth"))


def test_training_checkpoint_holds_both(released, tmp_path, convert):
    code, output, _ = convert(released / "training.pth", "--out", tmp_path / "transformer")
    assert code == 0
    assert "transformer, VAR d2, 4x4 tokens\nMVAR's weights look the same" in output
    assert_same_model(load_transformer(tmp_path / "transformer"), load_transformer(released / "var.pth"))
    assert convert(released / "training.pth", "--out", tmp_path / "tokenizer", "--sides=1,2,3,4")[0] == 0
    assert_same_model(load_tokenizer(tmp_path / "tokenizer"), load_tokenizer(released / "vae.pth"))


@pytest.mark.parametrize(
    ("file", "words", "complaint"),
    [
        ("absent.pth", [], "no such file or directory"),
        ("resnet.pth", [], "not a released transformer"),
        ("var.pth", ["--sides=1,2,3,4"], "has no tokenizer: --sides is for one, leave it out"),
        ("var.pth", ["--family=mvar"], "family 'mvar' does not fit"),
        ("vae.pth", ["--family=markov"], "is a tokenizer: --family and --tokenizer are for transformers"),
        ("vae.pth", ["--tokenizer=x"], "is a tokenizer: --family and --tokenizer are for transformers"),
        ("vae.pth", ["--sides=1,x"], "pyramid '1_x'"),
    ],
)
def test_what_is_not_converted(released, tmp_path, convert, file, words, complaint):
    code, _, errors = convert(released / file, "--out", tmp_path / "out", *words)
    assert code == 1
    assert complaint in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(released, tmp_path, convert):
    small_tokenizer().save_pretrained(tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    code, _, errors = convert(released / "vae.pth", "--out", tmp_path / "ours")
    assert code == 1
    assert "ours: is there already: give another --out" in errors
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before


def test_a_file_of_ours(tmp_path, convert):
    small_tokenizer().save_pretrained(tmp_path / "ours")
    code, _, errors = convert(tmp_path / "ours", "--out", tmp_path / "out")
    assert code == 1
    assert "is a checkpoint of this project already: use it as it is" in errors
