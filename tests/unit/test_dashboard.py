"""What a run shows and records, and that it does so without network, login, questions or a second rank's help."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from trainers import dashboard as module
from trainers import progress
from trainers.config import RunConfig, WandbConfig
from trainers.dashboard import METRICS_FILE, SAMPLE_TABLES, Dashboard, memory_metrics, read_metrics, wandb_mode
from trainers.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
DISABLED = WandbConfig(mode="disabled")
QUIET = RunConfig(progress=False)


@pytest.fixture
def no_login(monkeypatch, tmp_path_factory):
    """A machine where nobody has logged in to wandb."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))


def quiet_dashboard(folder: Path, total_steps: int = 10, is_main: bool = True) -> Dashboard:
    return Dashboard(folder, DISABLED, QUIET, total_steps, is_main)


def test_each_step_is_one_line_of_strict_json_at_once(tmp_path):
    with quiet_dashboard(tmp_path) as dashboard:
        dashboard.log(0, {"reward/mean": 0.25, "rollout/decode_steps": 7})
        dashboard.log(1, {"train/loss": float("nan"), "train/kl": float("inf"), "train/entropy": float("-inf")})
        lines = (tmp_path / METRICS_FILE).read_text().splitlines()  # before close: already there

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 0, "reward/mean": 0.25, "rollout/decode_steps": 7},
        {"step": 1, "train/loss": "NaN", "train/kl": "Infinity", "train/entropy": "-Infinity"},
    ]
    second = read_metrics(tmp_path)[1]
    assert second["train/loss"] != second["train/loss"]
    assert (second["train/kl"], second["train/entropy"]) == (float("inf"), float("-inf"))


def test_a_killed_run_leaves_all_its_steps(tmp_path):
    script = f"""
import os, signal
from trainers.config import RunConfig, WandbConfig
from trainers.dashboard import Dashboard
dashboard = Dashboard({str(tmp_path)!r}, WandbConfig(mode="disabled"), RunConfig(progress=False), 9, True)
for step in range(3):
    dashboard.log(step, {{"reward/mean": step / 4}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [0.0, 0.25, 0.5]


def test_a_resumed_run_appends_after_a_torn_line_and_its_later_rows_count(tmp_path):
    (tmp_path / METRICS_FILE).write_text(
        '{"step": 0, "reward/mean": 0.1}\n{"step": 1, "reward/mean": 0.2}\n{"step": 2, "rew'
    )
    with quiet_dashboard(tmp_path) as dashboard:
        dashboard.log(1, {"reward/mean": 0.5})
        dashboard.log(2, {"reward/mean": 0.6})
    assert read_metrics(tmp_path) == [
        {"step": 0, "reward/mean": 0.1},
        {"step": 1, "reward/mean": 0.5},
        {"step": 2, "reward/mean": 0.6},
    ]


def test_phases_add_up_within_a_step_and_start_anew_after_it(tmp_path):
    with quiet_dashboard(tmp_path) as dashboard:
        for _ in range(2):
            with dashboard.phase("generate"):
                time.sleep(0.02)
        with pytest.raises(KeyError), dashboard.phase("reward"):
            raise KeyError
        dashboard.log(0, {})
        dashboard.log(1, {})
    first, second = read_metrics(tmp_path)
    assert first.keys() == {"step", "phase/generate_s", "phase/reward_s"}
    assert 0.04 <= first["phase/generate_s"] < 0.5
    assert second == {"step": 1}


def test_other_ranks_time_phases_and_touch_nothing(tmp_path, capfd):
    with Dashboard(tmp_path, WandbConfig(mode="online"), RunConfig(), 3, is_main=False) as dashboard:
        with dashboard.phase("generate"):
            pass
        assert dashboard.phase_seconds.keys() == {"generate"}
        dashboard.log(0, {"reward/mean": 1.0})
        assert dashboard.phase_seconds == {}
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_each_step_is_one_plain_line_and_the_end_a_summary(tmp_path, capsys):
    with Dashboard(tmp_path, DISABLED, RunConfig(), 12, is_main=True) as dashboard:
        for step in range(12):
            with dashboard.phase("generate"):
                pass
            metrics = {
                "reward/mean": step / 10,
                "rollout/generated_tokens_per_s": 1000.0 * (step + 1),
                "step/seconds": 2.0,
            }
            dashboard.log(step, metrics)
        assert capsys.readouterr().err.splitlines()[1] == "step 2/12: reward 0.100, 2,000 tokens/s, 2.0 s"
    dashboard.close()  # a second time: nothing
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["12", "of", "12", "steps", "in", "0.4", "min", "first", "5", "last", "5", "median"],  # 24 s
        ["reward", "0.200", "0.900", "0.550"],  # steps 0 to 4: 1.0 / 5; steps 7 to 11: 4.5 / 5; between 0.5 and 0.6
        ["generated", "tokens/s", "3,000", "10,000", "6,500"],
        ["seconds", "a", "step", "2.0", "2.0", "2.0"],
        ["generate", "0.0", "0.0", "0.0"],
        ["files", str(tmp_path)],
    ]


def test_what_is_measured_after_the_last_step_is_no_step(tmp_path, capsys):
    with Dashboard(tmp_path, WandbConfig(mode="disabled"), RunConfig(), 2, True) as dashboard:
        dashboard.log(0, {"reward/mean": 0.5, "eval/accuracy": 0.125})
        dashboard.log(1, {"reward/mean": 0.5})
        dashboard.log(2, {"eval/accuracy": 0.75})
        dashboard.log_table(2, "eval/samples", [{"prompt": "3+4?"}])  # nothing, without wandb
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "in the end: accuracy 0.750"
    assert "2 of 2" in out and "0.125 -> 0.750" in out


def test_progress_false_prints_no_steps(tmp_path, capsys):
    with quiet_dashboard(tmp_path) as dashboard:
        dashboard.log(0, {"reward/mean": 0.5})
        assert capsys.readouterr() == ("", "")


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Whatever is printed goes to a terminal, as far as the bar can tell; of 100 columns."""
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setattr(progress, "TICK_S", 0.02)
    monkeypatch.setenv("COLUMNS", "100")
    return capsys


def test_on_a_terminal_a_bar_shows_step_reward_rate_phase_and_the_time_that_is_left(tmp_path, terminal):
    with Dashboard(tmp_path, DISABLED, RunConfig(), 4, is_main=True) as dashboard:
        figures = {"reward/mean": 0.125, "rollout/generated_tokens_per_s": 512.4, "step/seconds": 100.0}
        dashboard.log(0, figures)
        terminal.readouterr()
        with dashboard.phase("optimize"):
            drawn = terminal.readouterr().err
            for shown in ("1/4 steps |", "reward 0.125", "512 tokens/s", "optimize 0 s", "05:00 left"):
                assert shown in drawn
            time.sleep(0.1)  # nothing happens, and the bar is drawn all the same
            assert terminal.readouterr().err.count("optimize 0 s") >= 2
    assert "optimize" not in terminal.readouterr().err.splitlines()[-1].rpartition("\r")[2]


def test_the_bar_of_a_run_that_goes_on_begins_where_it_stood(tmp_path, terminal):
    with Dashboard(tmp_path, DISABLED, RunConfig(), 40, is_main=True, done=29) as dashboard:
        assert "29/40 steps" in terminal.readouterr().err
        dashboard.log(29, {"step/seconds": 6.0})
        assert "30/40 steps" in (drawn := terminal.readouterr().err) and "01:00 left" in drawn
        dashboard.log(40, {"eval/accuracy": 0.5})
        assert "40/40 steps" in (drawn := terminal.readouterr().err) and "accuracy 0.500" in drawn


def test_an_evaluation_alone_has_no_steps_to_show(tmp_path, terminal):
    with Dashboard(tmp_path, DISABLED, RunConfig(), 0, is_main=True) as dashboard:
        assert terminal.readouterr().err.strip() == "00:00"
        dashboard.log(0, {"eval/accuracy": 0.5})
    out, err = terminal.readouterr()
    assert err.rpartition("\r")[2].strip() == "accuracy 0.500, 00:00"
    assert out.startswith("  accuracy  0.500  (on held-out prompts, greedy)\n")


def test_disabled_imports_no_wandb(tmp_path):
    script = f"""
import sys
from trainers.config import RunConfig, WandbConfig
from trainers.dashboard import Dashboard
with Dashboard({str(tmp_path)!r}, WandbConfig(mode="disabled"), RunConfig(), 1, True) as dashboard:
    dashboard.log(0, {{"reward/mean": 0.0}})
assert "wandb" not in sys.modules
assert "vllm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60, check=True)
    assert [file.name for file in tmp_path.iterdir()] == [METRICS_FILE]


@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_wandb_offline_records_the_run_in_its_folder_and_is_quiet(mode, tmp_path, capfd, no_login, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", ModuleType("openai"))  # vLLM imports it, and wandb has a word on it
    (tmp_path / "config.yaml").write_text("ppo:\n  steps: 54321\n")
    start = time.perf_counter()
    with Dashboard(tmp_path, WandbConfig(mode=mode, project="the-project", tags=["a-tag"]), QUIET, 1, True) as board:
        assert time.perf_counter() - start < 20  # 1.3 s when measured; a stalled look-up takes longer
        board.log(0, {"reward/mean": 0.5, "train/loss": float("nan")})
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for written in (b"reward/mean", b"train/loss", b"the-project", b"a-tag", b"54321"):
        assert written in content
    out, err = capfd.readouterr()
    assert err == ""
    assert f"wandb sync {record.parent}" in out


def recorded(folder: Path, kind: str) -> list[dict]:
    """What a run's offline record has of one kind, as wandb's own viewer reads it."""
    (record,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    return [row[kind] for row in map(json.loads, lines) if row["type"] == kind]


def test_wandb_is_told_of_each_metric_before_it_comes_and_gets_all_samples(tmp_path, capfd, no_login):
    steps = 2 * SAMPLE_TABLES
    with Dashboard(tmp_path, WandbConfig(mode="offline"), QUIET, steps, True) as board:
        for step in range(steps):
            board.log(step, {"reward/mean": 0.5, "rank/0/rss_gib": 1.0, "nobody/knows": 2} if step == 7 else {})
            board.log_samples(step, [{"step": step, "prompt": "3+4?", "reward": 0.25, "answer": ["7"]}])
    defined = {row["name"]: row for row in recorded(tmp_path, "metric") if "name" in row}
    assert defined.keys() == {"step", "reward/mean", "rank/0/rss_gib"}
    assert {row["step_metric"] for name, row in defined.items() if name != "step"} == {"step"}
    assert defined["reward/mean"]["summary"] == {"last": True, "max": True}
    assert defined["rank/0/rss_gib"]["summary"] == {"max": True}
    assert [row["glob_name"] for row in recorded(tmp_path, "metric") if "glob_name" in row] == ["*"]

    tables = [json.loads(file.read_text()) for file in tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*")]
    assert len(tables) == SAMPLE_TABLES
    assert {tuple(table["columns"]) for table in tables} == {("step", "prompt", "reward", "answer")}
    rows = sorted(row for table in tables for row in table["data"])
    assert rows == [[step, "3+4?", 0.25, "['7']"] for step in range(steps)]  # numbers as numbers, the rest as text
    assert capfd.readouterr().err == ""


def test_wandb_goes_on_with_the_same_run(tmp_path, capfd, no_login):
    ids = []
    for step in range(2):
        with Dashboard(tmp_path, WandbConfig(mode="auto"), QUIET, 2, True, ids[0] if ids else None) as board:
            board.log(step, {"reward/mean": 0.5})
            ids.append(board.wandb_id)
    assert ids[0] is not None and ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) in (1, 2)  # one if within a second
    assert capfd.readouterr().err == ""
    assert quiet_dashboard(tmp_path).wandb_id is None


def test_mode_auto_needs_a_login_to_go_online(no_login, monkeypatch):
    assert wandb_mode("auto") == "offline"
    with pytest.raises(ConfigError, match="wandb.mode is online, but wandb has no login here: run `wandb login`"):
        wandb_mode("online")
    monkeypatch.setattr(module, "_is_logged_in", lambda: True)
    assert wandb_mode("auto") == wandb_mode("online") == "online"
    assert wandb_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("offline") == "offline"  # what the config says outright stands


def test_a_key_in_the_environment_is_a_login(no_login):
    script = "from trainers.dashboard import wandb_mode; print(wandb_mode('auto'))"
    environment = dict(module.os.environ, WANDB_API_KEY="0" * 40)
    answer = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (answer.stdout, answer.stderr) == ("online\n", "")


def test_auto_falls_back_to_offline_when_the_server_does_not_answer(tmp_path, capsys, no_login, monkeypatch):
    monkeypatch.setattr(module, "_is_logged_in", lambda: True)
    monkeypatch.setattr(module, "WANDB_INIT_TIMEOUT_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    with Dashboard(tmp_path, WandbConfig(mode="auto"), QUIET, 1, True) as dashboard:
        dashboard.log(0, {"reward/mean": 0.5})
    assert "this run is recorded offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_memory_in_gib_follows_an_allocation():
    before = memory_metrics()["memory/rss_gib"]
    block = bytearray(b"x") * 2**28  # 0.25 GiB, written
    grown = memory_metrics()["memory/rss_gib"] - before
    assert len(block) == 2**28 and grown == pytest.approx(0.25, abs=0.05)


def test_memory_metrics_are_explained_in_the_docs():
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    assert all(f"\n| `{name}`" in page for name in memory_metrics())
