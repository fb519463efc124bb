"""Plans, what they make run, and the arithmetic of their tables, on made-up figures."""

import math
import re
from pathlib import Path

import pytest
from commands import ROOT
from small_models import small_tokenizer

from utils.runs.flops import training_flops
from utils.runs.tokenizer_config import TokenizerTraining
from utils.studies.figures import draw, draw_fits
from utils.studies.plan import NOWHERE, read_plan
from utils.studies.runs import Tokens, check_rows, planned
from utils.studies.tables import (
    as_csv,
    differences,
    holm,
    paired,
    power_law,
    table_of_differences,
    table_of_fits,
    table_of_scores,
)

PLANS = sorted((ROOT / "studies").glob("*.toml"))
HEAD = """
question = "What?"
tokenizer = { source = "somewhere" }
common = { depth = 2, width = 64, heads = 1, bs = 4 }
"""
BODY = """
[[comparisons]]
name = "some"
steps = 20
rows.VAR = { family = "var" }
rows."M-VAR" = { family = "mvar" }
"""


def plan_of(tmp_path: Path, text: str):
    path = tmp_path / "made_up.toml"
    path.write_text(text)
    return read_plan(path)


def runs_of(plan):
    tokens = Tokens(Path("cache"), "tokenizer", small_tokenizer(), 5, "tokens")
    return planned(plan, tokens, Path("out"))


# --- plans --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_of_the_repository_can_be_read(path):
    plan = read_plan(path)
    assert plan.name == path.stem
    assert plan.seeds >= (2 if plan.name == "quick" else 3)
    assert all(len(comparison.rows) > 1 for comparison in plan.comparisons)
    if "source" not in plan.tokenizer:
        check_rows(plan, TokenizerTraining(**NOWHERE, **plan.tokenizer).sizes(), 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question = ", "made_up.toml: is no TOML"),
        ("question = 'What?'", "made_up.toml: tokenizer is missing"),
        (HEAD, "comparisons is missing"),
        (HEAD + "sedes = 3" + BODY, "a plan has no 'sedes': did you mean seeds?"),
        (HEAD + "seeds = 0" + BODY, "seeds = 0: give 1 or more"),
        (HEAD + "seeds = '3'" + BODY, "seeds = '3': is to be a whole number"),
        (HEAD + "samples = 3" + BODY, "samples = 3: give 10 or more"),
        (HEAD + "sampling = { num = 3 }" + BODY, "sampling: num is set by the study"),
        (HEAD + "sampling = { top_p = 2.0 }" + BODY, "sampling: --top_p"),
        (HEAD.replace("source", "sauce") + BODY, "tokenizer has no 'sauce'"),
        (HEAD.replace("bs = 4", "sb = 4") + BODY, "common has no 'sb'"),
        (HEAD.replace("bs = 4", "seed = 4") + BODY, "common: seed is set by the study"),
        (HEAD.replace("bs = 4", "bs = 4.5") + BODY, "common: bs = 4.5: is to be a whole number"),
        (HEAD.replace("bs = 4", "hflip = 1") + BODY, "common: hflip = 1: is to be true or false"),
        (HEAD + BODY.replace('"var"', '"vra"'), "comparison 'some', row 'VAR': family = 'vra': give one of mvar"),
        (HEAD + BODY.replace('"mvar"', '"mvar", window = 3'), "row 'M-VAR': --window=3: family mvar has no windows"),
        (HEAD + BODY + "baseline = 'x'", "baseline = 'x' is no row: give one of VAR, M-VAR"),
        (HEAD + BODY + "fit_by = 'scan'", "fit_by = 'scan': is not a flag of every row"),
        (HEAD + BODY.replace("steps = 20", ""), "comparison 'some': has no budget: give one of steps, minutes, teraflops"),
        (HEAD + BODY.replace("steps = 20", "steps = 20\nminutes = 1.0"), "has steps and minutes: give one"),
        (HEAD + BODY.replace("steps = 20", "minutes = -1.0"), "minutes = -1.0: give more than 0"),
        (HEAD + BODY.replace("steps = 20", "teraflops = inf"), "teraflops = inf: give more than 0, and a number that ends"),
        (HEAD + BODY.replace("steps = 20", "steps = true"), "steps = True: is to be a whole number"),
        (HEAD + "[[comparisons]]\nname = 'some'\nsteps = 3\ngrid.depth = 2", "grid has depth = 2: give a list"),
        (HEAD + "[[comparisons]]\nname = 'some'\nsteps = 3", "comparison 'some': has no rows"),
        (HEAD + "[[comparisons]]\nsteps = 3", "a comparison has no name"),
        (HEAD + BODY + BODY.replace("some", "some!"), "comparisons are named 'some' and 'some!': give each letters of its own"),
        (
            HEAD.replace("bs = 4", "hflip = true") + BODY,
            "--hflip=True: is a setting of the token cache: give it to scripts/cache_tokens.py",
        ),
        (
            HEAD.replace("bs = 4", "pg = 0.5") + BODY.replace("steps = 20", "teraflops = 1.0"),
            "pg = 0.5: its steps cost other operations than whole ones: give steps or minutes",
        ),
    ],
)
def test_a_wrong_plan_is_told_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        plan_of(tmp_path, text)
    assert "made_up.toml" in str(error.value)


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such plan"):
        read_plan(tmp_path / "none.toml")


def test_a_grid_has_all_combinations_as_rows(tmp_path):
    grid = "[[comparisons]]\nname = 'all'\nsteps = 3\ngrid = { family = ['var', 'mvar'], depth = [1, 2] }"
    (comparison,) = plan_of(tmp_path, HEAD + grid).comparisons
    assert list(comparison.rows) == [f"family={family} depth={depth}" for family in ("var", "mvar") for depth in (1, 2)]
    assert comparison.baseline == "family=var depth=1"


def test_a_row_that_fits_no_transformer_is_told_before_anything_runs(tmp_path):
    plan = plan_of(tmp_path, HEAD + BODY.replace('"mvar" }', '"mvar", width = 80 }'))
    with pytest.raises(ValueError, match="comparison 'some', row 'M-VAR': width 80 .* head size"):
        check_rows(plan, small_tokenizer().config, 5)


def test_a_pyramid_that_the_tokenizer_has_not_is_told_before_anything_runs(tmp_path):
    plan = plan_of(tmp_path, HEAD.replace("bs = 4", "pn = '1_2'") + BODY)
    with pytest.raises(ValueError, match="row 'VAR': pn = '1_2': the tokenizer has pyramid"):
        check_rows(plan, small_tokenizer().config, 5)


def test_the_same_run_is_trained_once_whatever_asks_for_it(tmp_path):
    """Flags that say what is the default anyway, or that change nothing, make no other run of it; a seed or a budget does."""
    other = BODY.replace('"some"', '"other"').replace(
        '{ family = "mvar" }', '{ family = "mvar", scan = "across", log_every = 3 }'
    )
    longer = BODY.replace('"some"', '"longer"').replace("20", "30")
    runs = runs_of(plan_of(tmp_path, HEAD + "seeds = 2" + BODY + other + longer))
    by_place = {(run.comparison, run.row, run.seed): run.directory for run in runs}
    assert len(by_place) == 3 * 2 * 2
    assert len(set(by_place.values())) == 2 * 2 * 2
    assert by_place["some", "M-VAR", 1] == by_place["other", "M-VAR", 1] != by_place["longer", "M-VAR", 1]


def test_equal_operations_are_more_steps_for_what_costs_less(tmp_path):
    runs = runs_of(plan_of(tmp_path, HEAD + "seeds = 1" + BODY.replace("steps = 20", "teraflops = 1.0")))
    steps = {run.row: int(run.words[[word[:11] for word in run.words].index("--max_steps")].split("=")[1]) for run in runs}
    assert steps["VAR"] > steps["M-VAR"]
    for run in runs:
        assert training_flops(run.model) * 4 * steps[run.row] == pytest.approx(1e12, rel=0.01)


def test_minutes_are_for_runs_that_have_the_machine_to_themselves(tmp_path):
    runs = runs_of(plan_of(tmp_path, HEAD + BODY.replace("steps = 20", "minutes = 2.0")))
    assert all(run.alone and "--max_minutes=2.0" in run.words for run in runs)
    assert not any(run.alone for run in runs_of(plan_of(tmp_path, HEAD + BODY)))


# --- tables -------------------------------------------------------------------------------------------------------------


def made_up(row: str, seed: int, loss: float, **further):
    run = {"comparison": "some", "row": row, "seed": seed, "flags": {"family": row}, "steps": 20, "val_loss": loss, "fd": 10.0}
    return {**run, "recognised": 0.5, "training_flops": 1e12, "seconds": 3.0, "curve": [(10, 2 * loss), (20, loss)], **further}


RUNS = [
    *(made_up("VAR", seed, loss) for seed, loss in enumerate((5.0, 5.2, 5.1))),
    *(made_up("M-VAR", seed, loss) for seed, loss in enumerate((4.5, 4.71, 4.6))),  # less by .5, .49, .5
    *(made_up("Markov", seed, loss) for seed, loss in enumerate((5.1, 5.1, 5.12))),  # more by .1, -.1, .02
]
FAILED = {"comparison": "some", "row": "Markov", "seed": 3, "flags": {}, "failed": "no memory"}


def test_a_paired_difference_is_students():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 / (1 / sqrt 3) with two degrees of freedom, p = 1 - t / sqrt(2 + t²)."""
    difference = paired([2, 4, 6], [1, 2, 3])
    t = 2 * math.sqrt(3)
    assert difference[:2] == (2, 1)
    assert difference.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert paired([2.0], [1.0]) == (1.0, None, None, 1)
    assert paired([1, 2], [1, 2]).p == 1
    assert paired([2, 3], [1, 2]).p is None


def test_holms_adjustment():
    """The example of four: .01 * 4, .03 * 3 and no less than those before, .04 * 2 -> .09, .005 * 4 first."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.5, None]) == [None, 0.5, None]
    assert holm([0.9, 0.8]) == [1, 1]


def test_what_differs_alike_with_every_seed_is_not_tested():
    """One image of 1,000 each time: t would be infinite."""
    runs = [made_up("VAR", n, 5.0, recognised=share) for n, share in enumerate((0.842, 0.839, 0.846))]
    runs += [made_up("M-VAR", n, 4.0 + n, recognised=share) for n, share in enumerate((0.841, 0.838, 0.845))]
    assert "| -0.001 with every seed: no test |" in table_of_differences(runs, "some", "VAR")


def test_what_lies_inside_the_spread_is_called_so():
    found = differences(RUNS, "some", "VAR", "val_loss")
    assert found["M-VAR"].mean == pytest.approx(-0.4967, abs=1e-4)
    assert found["M-VAR"].is_distinguishable
    assert not found["Markov"].is_distinguishable
    table = table_of_differences(RUNS, "some", "VAR")
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert "-0.497 ± 0.006 (p < 0.001)" in lines["M-VAR"]
    assert "+0.007 ± 0.101, not distinguishable (p = 0.92)" in lines["Markov"]


def test_differences_are_of_seeds_that_both_have():
    found = differences([*RUNS[1:], made_up("M-VAR", 9, 0.0)], "some", "VAR", "val_loss")
    assert found["M-VAR"].seeds == 2
    assert table_of_differences(RUNS[:1] + RUNS[3:4], "some", "VAR").count("one seed: no test") == 3
    assert table_of_differences(RUNS[:3], "some", "VAR") == ""


def test_a_failed_run_is_named_and_not_counted():
    table = table_of_scores([*RUNS, FAILED], "some", {"fd": 1.5})
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table.splitlines()}
    heads = next(line for line in table.splitlines()).split(" | ")
    assert lines["Markov"][1] == "3, 1 failed"
    assert lines["M-VAR"][heads.index("held-out loss")] == "4.603 ± 0.105"
    assert lines["real images"][heads.index("FD-EffLite0")] == "1.5"
    assert "no memory" in as_csv([*RUNS, FAILED])
    assert as_csv(RUNS).splitlines()[1].startswith("some,VAR,0,VAR,")


def test_names_do_not_break_a_table():
    run = made_up("a|b", 0, 5.0)
    assert "| a\\|b | 1 |" in table_of_scores([run], "some", {})


def test_a_power_law_is_found_again():
    sizes = [1e5, 1e6, 1e7, 1e8]
    fit = power_law(sizes, [9 * size**-0.07 for size in sizes])
    assert fit.exponent == pytest.approx(0.07)
    assert (fit.factor, fit.r_squared) == pytest.approx((9, 1))
    assert power_law(sizes[:2], [2, 1]) is None
    runs = [made_up("VAR", 0, 9 * size**-0.07, parameters=size) for size in sizes]
    assert "| VAR | parameters | 0.0700 ± 0.0000 | 1.00 | 4 |" in table_of_fits(runs, "some", "family")


def test_the_pictures_are_drawn(tmp_path):
    draw(tmp_path / "some.png", [*RUNS, FAILED, made_up("$_$", 0, 5.0)], "some", {"fd": 1.5})
    assert (tmp_path / "some.png").stat().st_size > 10_000
    sizes = [made_up(row, 0, 9 * size**-0.07, parameters=size) for row in ("VAR", "M-VAR") for size in (1e5, 1e6, 1e7)]
    draw_fits(tmp_path / "fitted.png", sizes, "some", "family")
    assert (tmp_path / "fitted.png").stat().st_size > 10_000
