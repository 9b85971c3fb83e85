"""train_log.py: speed is that of the steps, and log.csv of an older version can be continued."""

from small_runs import log_rows, maps, run, small_presets

import train_log


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_evaluations_and_samples_do_not_count_into_the_speed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train_log, "time", clock)
    tally = train_log.Tally("cpu")
    tally.norms = [1.0] * 10
    clock.now += 2
    with tally.paused():
        clock.now += 100  # an evaluation
    clock.now += 3
    assert tally.steps_per_s() == 10 / 5


def test_the_first_step_is_shown_at_once(tmp_path, maps, capsys):
    settings = dict(data=maps, log_every=50, eval_every=50)
    run(tmp_path / "a", steps=3, **settings)
    assert [row[0] for row in log_rows(tmp_path / "a")] == ["step", "1", "3"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step      1  loss ") for line in lines) == 1

    # Of a resumed run too.
    run(tmp_path / "a", "--resume", steps=6, **settings)
    assert [row[0] for row in log_rows(tmp_path / "a")] == ["step", "1", "3", "4", "6"]


def test_a_resumed_run_gives_an_old_log_the_new_header_and_keeps_its_rows(tmp_path, maps):
    run(tmp_path / "a", data=maps, steps=2)
    path = tmp_path / "a/log.csv"
    assert path.read_text().startswith("step,loss,grad_norm,lr,crops_per_s,held_out_t0.05")
    before = log_rows(tmp_path / "a")
    path.write_text(path.read_text().replace("crops_per_s", "maps_per_s"))
    run(tmp_path / "a", "--resume", data=maps, steps=3)
    rows = log_rows(tmp_path / "a")
    assert rows[:3] == before and len(rows) == 4
