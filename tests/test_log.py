from utils.log import RunLog, clock, read_metrics


def test_a_resumed_log_drops_what_will_be_redone_and_a_torn_line(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    for step in (1, 2, 3):
        log.metrics(step, {"loss": 1.0 / step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    log = RunLog(tmp_path, is_main=True, step=2)
    log.metrics(3, {"loss": 0.25})
    log.close()
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_only_the_main_rank_writes(tmp_path):
    log = RunLog(tmp_path / "run", is_main=False)
    log.metrics(1, {"loss": 1.0})
    log.text("hello")
    log.progress(0.5, 10, "")
    log.close()
    assert not (tmp_path / "run").exists()


def test_progress_shows_figures_and_time_left(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True)
    log.progress(0.25, 60, "loss 4.2")
    log.close()
    shown = capsys.readouterr().err
    assert "25%" in shown
    assert "loss 4.2, 03:00 left" in shown


def test_text_is_kept_with_its_time(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=True)
    log.text("step 3 done")
    log.close()
    assert capsys.readouterr().out == "step 3 done\n"
    assert (tmp_path / "log.txt").read_text().endswith(" step 3 done\n")


def test_clock():
    assert [clock(seconds) for seconds in (5.4, 125, 3723)] == ["00:05", "02:05", "1:02:03"]
