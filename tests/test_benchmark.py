import contextlib
import json
import sys

import pytest
import torch
from commands import ROOT, make_images, run_in_process, script
from small_models import small_transformer

from models.pyramid import STANDARD_SIDES, Pyramid
from models.tokenizer import TOKENIZER_PRESETS, VQVAE
from models.transformer import family_config
from scripts.benchmarks import attention, check_data, length, memory, table, tokenizer
from scripts.benchmarks.config import DEFAULTS, FLAGS

benchmark = script("benchmark")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAMILIES = ("var", "mvar", "markov")


def kept(config, recompute: bool, device: torch.device = CPU, real: bool = False) -> int:
    with contextlib.nullcontext() if real else memory.fake_device(device):
        return memory.kept_per_image(memory.training_pass, config, device, recompute)


@pytest.fixture
def measure(monkeypatch, capsys):
    threads = torch.get_num_threads()
    yield lambda *words: run_in_process(benchmark.main, words, monkeypatch, capsys)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_without_values_keep_what_real_ones_keep(family, recompute):
    config = small_transformer(family, drop_path=0.2).config
    assert kept(config, recompute) == kept(config, recompute, real=True) > 0


def test_tensors_without_values_keep_what_windows_in_tiles_keep():
    config = small_transformer("markov", sides=(1, 24), window=7).config
    assert kept(config, False) == kept(config, False, real=True)
    assert kept(config, False, GPU) == pytest.approx(kept(config, False), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_an_imitated_gpu_keeps_what_a_real_one_keeps(family):
    config = family_config(family, 2, STANDARD_SIDES[256], 1000)
    assert kept(config, False, GPU) == pytest.approx(kept(config, False, GPU, real=True), rel=0.01)


@pytest.mark.parametrize("family", ["var", "markov-mamba"])
def test_a_recomputed_block_keeps_its_input_only(family):
    """Hooks around everything see what checkpoints inside the blocks, Mamba's too, keep of their inputs."""
    small, large = (small_transformer(family, depth).config for depth in (2, 3))
    width, num_tokens = small.width, small.pyramid.num_tokens
    class_embedding = 2 * width  # what the projection of the modulation saves
    assert kept(large, True) - kept(small, True) == 2 * width * num_tokens + class_embedding


def test_mamba_keeps_inputs_and_output_of_what_it_computes_again():
    """Hooks around everything see what the checkpoint inside Mamba keeps; what it does not keep would be four times as much."""
    plain, mamba = (small_transformer(family).config for family in ("markov", "markov-mamba"))
    width, num_tokens, heads = mamba.width, mamba.pyramid.num_tokens, 2 * mamba.width // 64
    around = 4 * width  # x before and after its norm, modulated x, result
    inputs, output = 2 * width + (2 * width + 2 * 64) + heads, 2 * width  # z, x with B and C, steps; y
    expected = 2 * (around + inputs + output) + 8  # bytes per token, with two float32 statistics of the norm
    added = (kept(mamba, False) - kept(plain, False)) / mamba.depth / num_tokens
    assert added == pytest.approx(expected, rel=0.02)  # the modulation, once per image, is not in it
    with memory.fake_device(CPU):
        inside = memory.kept_per_image(memory.mamba_pass, mamba, CPU) / num_tokens
        assert memory.kept_per_image(memory.mamba_pass, plain, CPU) == 0
    assert inside > 2 * expected


def test_an_imitated_gpu_keeps_no_attention_scores():
    config = family_config("var", 2, STANDARD_SIDES[256], 1000, num_codes=16)
    assert kept(config, False, GPU) < 1.2 * kept(config, False)  # 1.7 times with scores


def test_imitating_a_gpu_leaves_no_trace():
    kept(small_transformer("var").config, False, GPU)
    assert not torch.is_autocast_enabled("cuda")
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_memory_is_a_row_for_every_model_in_markdown_and_json(measure, tmp_path):
    code, shown, errors = measure("memory", "--depth=1", "--family=var,mvar", f"--json={tmp_path / 'memory.json'}")
    assert (code, errors) == (0, "")
    stored = json.loads((tmp_path / "memory.json").read_text())
    assert "memory --depth=1 --family=var,mvar" in stored["command"]
    assert set(stored) == {"command", "device", "versions", "commit", "threads", "rows"}
    assert [(row["model"], row["family"]) for row in stored["rows"]] == [("d1", "var"), ("d1", "mvar")]
    for row in stored["rows"]:
        assert row["state_bytes"] == 20 * row["parameters"]
        assert row["recomputed_bytes"] < row["activation_bytes"]
        assert (row["inside_mamba_bytes"] > 0) == (row["family"] == "mvar")
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    assert lines[0].startswith("| model | family | parameters | state | activations per image | recomputed |")
    assert len(lines) == 4
    assert shown.startswith("# Memory of training\n")


def test_the_document_holds_what_the_command_prints(measure):
    _, shown, _ = measure("memory", "--depth=12", "--family=var")
    document = (ROOT / "docs" / "memory.md").read_text()
    text, row = shown.split("Printed by")[0], shown.splitlines()[-1]
    assert document.startswith(text)
    assert row in document.splitlines()


D16 = family_config("mvar", 16, STANDARD_SIDES[256], 1000)


def test_d16_keeps_at_most_a_gigabyte_per_image():
    assert kept(D16, False, GPU) <= 1.0e9


def test_d16_recomputed_keeps_at_most_150_megabytes_per_image():
    assert kept(D16, True, GPU) <= 0.15e9


def test_tokens_are_gathered_from_a_cache_of_the_real_format(measure, tmp_path):
    out = tmp_path / "new" / "tokens.json"
    code, shown, _ = measure("tokens", "--rows=1500", "--batch=16", "--repeats=2", f"--json={out}")
    assert code == 0
    stored = json.loads(out.read_text())
    row = stored["rows"][0]
    assert stored["threads"] == 1
    assert (row["rows"], row["shards"], row["batch"]) == (1500, 2, 16)
    assert row["images_per_second"] == pytest.approx(16 / row["batch_seconds"])
    assert row["imagenet_view_tokens_bytes"] == 1_281_167 * 680 * 2
    assert "| 1.74 GB |" in shown


def test_scan_is_a_row_for_every_depth_pyramid_and_backend(measure, tmp_path):
    out = tmp_path / "scan.json"
    code, shown, _ = measure("scan", "--depth=1,2", "--pn=1_2,1_2_3", "--batch=1", "--repeats=2", f"--json={out}")
    assert code == 0
    assert shown.startswith("# Mamba-2 between its projections\n")
    assert "| forward and backward | spread | memory |" in shown  # `table` has others for these names
    rows = [row for row in json.loads(out.read_text())["rows"] if row["backend"] == "torch"]
    assert [(row["model"], row["tokens"]) for row in rows] == [("d1", 5), ("d1", 14), ("d2", 5), ("d2", 14)]
    assert all(row[f"{way}_seconds"] > 0 for row in rows for way in ("forward", "training", "scales", "prefix"))
    assert all((row["training_peak_bytes"] or 0) > 0 for row in rows) == torch.cuda.is_available()


def test_training_takes_steps_of_the_trainer_and_tells_their_parts(measure, tmp_path):
    out = tmp_path / "training.json"
    words = ["--family=mvar,markov", "--depth=1", "--pn=1_2_3", "--batch=2", "--repeats=2", "--tfast=0"]
    code, shown, _ = measure("training", *words, f"--json={out}")
    assert code == 0
    assert shown.startswith("# Training steps\n")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["family"], row["compiled"]) for row in rows] == [("d1", "mvar", "no"), ("d1", "markov", "no")]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert all(row[f"{part}_seconds"] > 0 for part in ("teacher_inputs", "forward", "backward", "optimizer"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_training_step_does_not_wait_for_the_gpu(measure, tmp_path, precision):
    out = tmp_path / "training.json"
    words = ["--depth=2", "--pn=1_2_3", "--batch=2", "--repeats=2", "--tfast=0", f"--precision={precision}"]
    assert measure("training", *words, f"--json={out}")[0] == 0
    assert [row["host_waits"] for row in json.loads(out.read_text())["rows"]] == [0, 0, 0]


def test_attention_is_a_row_for_every_map_and_number_of_heads(measure, tmp_path):
    out = tmp_path / "attention.json"
    code, shown, _ = measure("attention", "--sides=9,21", "--heads=1,2", "--repeats=2", f"--json={out}")
    assert code == 0
    assert shown.startswith("# Windows on one map\n")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["heads"], row["map"], row["tiles"]) for row in rows] == [
        *[(1, "9x9", "1x1"), (1, "21x21", "3x3")],
        *[(2, "9x9", "1x1"), (2, "21x21", "3x3")],
    ]
    times = [f"{way}_seconds" for way in ("whole", "mask", "tiles", "whole_training", "mask_training", "tiles_training")]
    assert all(row[name] > 0 for row in rows for name in times)


@pytest.mark.parametrize("ending", ["", "_training"])
def test_masks_and_tiles_are_measured_on_one_function(ending):
    torch.manual_seed(0)
    ways = attention.ways(2, 1, 21, CPU)
    torch.testing.assert_close(ways["tiles" + ending](), ways["mask" + ending](), atol=1e-4, rtol=1e-4)


def test_length_compares_models_and_sizes_and_draws_them(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(length, "PIXELS", (32, 64))
    out = tmp_path / "length.json"
    code, shown, _ = measure("length", "--repeats=1", f"--json={out}")
    assert code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["tokens"]) for row in rows[:2]] == [("VAR", 30), ("VAR", 103)]
    assert len(rows) == 2 * len(length.MODELS)
    for small, large in zip(rows[::2], rows[1::2], strict=True):
        assert small["over_smallest"] == 1
        assert large["over_smallest"] == pytest.approx(large["token_seconds"] / small["token_seconds"])
    assert (tmp_path / "length.png").stat().st_size > 1000


def test_peak_memory_is_the_most_held_at_once():
    def hold_two_of_three() -> None:
        first = torch.zeros(1000, dtype=torch.float64)
        second = first + 1
        del first
        second + 1

    assert length.cpu_peak_bytes(hold_two_of_three) == pytest.approx(2 * 8000, abs=500)


def test_published_counts_and_states_of_the_table_come_out():
    for (family, depth), published in table.PUBLISHED.items():
        row = table.counted(family, depth, Pyramid.standard(10), published)
        # one published figure, 81.52, is not the sum that gives the other five: that is 81.512
        rounding = 0.01 if (family, depth) == ("var", 20) else 0.005
        assert row["attention_gflops"] == pytest.approx(published.attention_gflops, abs=rounding)
        assert row["state_mib"] == published.state_mib
    alone = family_config("mvar", 16, STANDARD_SIDES[256], 1000)
    assert table.attention_gflops(alone) == pytest.approx(37.85, abs=0.005)  # inside the scale, no windows


def test_the_table_has_ours_beside_the_published(measure, tmp_path):
    out = tmp_path / "table.json"
    words = ["--family=var,markov-mamba", "--depth=1", "--pn=1_2", "--batch=2", "--repeats=1", f"--json={out}"]
    code, shown, errors = measure("table", *words)
    assert code == 0, errors
    assert shown.startswith("# Efficiency\n")
    rows = json.loads(out.read_text())["rows"]
    assert [row["family"] for row in rows] == ["var", "markov-mamba"]
    assert all(row["sampling_seconds"] > 0 and row["training_seconds"] > 0 and row["published_seconds"] is None for row in rows)
    # keys and values of 5 tokens; the last 3 inputs of the convolution and a state of 64 numbers per channel
    assert rows[0]["state_mib"] == pytest.approx(64 * 2 * 5 * 64 * 4 / 2**20)
    assert rows[1]["state_mib"] == pytest.approx(64 * (3 * 256 + 128 * 64) * 4 / 2**20)


def test_both_stages_of_the_tokenizer_are_measured(measure, tmp_path, monkeypatch):
    processes = []

    def alone(*arguments):  # the first has its process, the others need not take the time
        processes.append(arguments)
        return (own_process if len(processes) == 1 else tokenizer.steps)(*arguments)

    own_process = tokenizer.alone
    monkeypatch.setattr(tokenizer, "alone", alone)
    out = tmp_path / "tokenizer.json"
    code, shown, _ = measure("tokenizer", "--batch=2", "--repeats=1", f"--json={out}")
    assert code == 0
    assert shown.startswith("# Training steps of the tokenizer\n")
    rows = json.loads(out.read_text())["rows"]
    whole, alone = "all", "decoder alone (--refine)"
    expected = [(whole, "no"), (whole, "yes"), (alone, "no"), (alone, "yes")]
    assert [(row["stage"], row["discriminator"]) for row in rows] == expected
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
    if sys.platform == "linux":  # weights, gradients and two averages of each, at least
        assert rows[0]["peak_bytes"] > 4 * 4 * sum(p.numel() for p in VQVAE(TOKENIZER_PRESETS["f8-32"]).parameters())


def test_workers_have_lists_of_names_for_themselves_and_share_arrays(measure, tmp_path):
    out = tmp_path / "listing.json"
    code, shown, errors = measure("listing", "--rows=5000", "--workers=2", f"--json={out}")
    assert code == 0, errors
    assert shown.startswith("# Names of a large data set\n")
    lists, arrays = json.loads(out.read_text())["rows"]
    # a name is an object of 49 bytes and its text, a pair one of 56: all are in pages that a worker writes to
    assert lists["worker_bytes"] > 5000 * (49 + 56)
    assert arrays["worker_bytes"] < lists["worker_bytes"] / 2


def test_looking_at_a_folder_counts_all_of_its_pictures_and_processes(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(check_data, "export_fashion_mnist", make_images)  # 24 and 9
    words = ["check_data", "--rows=50", "--processes=1,2", "--repeats=1", "--json", tmp_path / "a.json"]
    code, output, errors = measure(*words)
    assert code == 0, errors
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["pictures"], row["count"], row["processes"]) for row in rows] == [
        ("PNG 32x32", 33, 1),
        ("PNG 32x32", 33, 2),
        ("JPEG 500x375", 50, 1),
        ("JPEG 500x375", 50, 2),
    ]
    for row in rows:
        assert row["images_per_cpu_second"] == pytest.approx(row["count"] / row["cpu_seconds"])
        assert row["cpu_seconds"] > 0.001  # that of the processes that read is counted
    assert "| JPEG 500x375 | 50 | 2 |" in output


def test_defaults_are_of_commands_that_there_are():
    assert DEFAULTS.keys() <= benchmark.MEASUREMENTS.keys()
    assert FLAGS.keys() == benchmark.MEASUREMENTS.keys()
    assert all(DEFAULTS[command].keys() <= set(FLAGS[command]) for command in DEFAULTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: command"),
        (["speed"], "invalid choice: 'speed'"),
        (["memory", "--family=mvar,foo"], "--family=mvar,foo: no foo: give some of mvar,var"),
        (["memory", "--depth=12,"], "--depth=12,: give numbers of blocks such as 12,16"),
        (["attention", "--sides=13,x"], "--sides=13,x: give numbers such as 13,16,18,24,32,48,64"),
        (["tokens", "--batch=0"], "--batch=0: give at least 1"),
        (["tokenizer", "--presets=f8-32,f9"], "--presets=f8-32,f9: no f9: give some of f16-256"),
        (["training", "--tfast=4"], "--tfast=4: give some of 0,1,2,3"),
        (["peer", "--batch=4"], "--batch=4: peer does not read it: leave it out"),
        (["scan", "--threads=1"], "--threads=1: scan does not read it"),
        (["training", "--pn=256,512"], "--pn=256,512: training takes one pyramid"),
    ],
)
def test_wrong_arguments_get_one_line(measure, words, message):
    code, _, errors = measure(*words)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_nothing_is_overwritten_unasked(measure, tmp_path):
    out = tmp_path / "old.json"
    out.write_text("mine")
    code, _, errors = measure("tokens", f"--json={out}")
    assert code == 1
    assert "is there already: give another --json, or --overwrite" in errors
    assert out.read_text() == "mine"


def test_a_profile_names_what_takes_the_time_and_its_shares_are_the_whole():
    from scripts.benchmarks.profile import shares

    x, weight = torch.randn(256, 512), torch.randn(512, 512)
    found = shares(lambda: [torch.nn.functional.linear(x, weight) for _ in range(30)], torch.device("cpu"))
    assert next(iter(found)) == "products"
    assert sum(found.values()) == pytest.approx(1)
