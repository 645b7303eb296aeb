"""Pictures of runs: that they are written, that they show the figures, and that gaps in a run do not stop them."""

from pathlib import Path

import numpy as np
import pytest

from trainers import plots
from trainers.dashboard import METRICS_FILE, read_metrics, to_json_line
from trainers.plots import plot_run, running_mean

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, rewards: list[float], **changed: float) -> Path:
    folder.mkdir()
    with (folder / METRICS_FILE).open("w") as file:
        for step, reward in enumerate(rewards):
            metrics = {
                "reward/mean": reward,
                "phase/optimize_s": 4.0,
                "phase/generate_s": 2.0,
                "step/seconds": 7.0,
                "rollout/generated_tokens_per_s": 100.0,
            }
            file.write(to_json_line(step, metrics | changed))
    return folder


def test_both_pictures_are_written_as_png(tmp_path):
    folder = write_run(tmp_path / "run", [0.1, float("nan"), 0.5], **{"eval/accuracy": 0.4})
    written = plot_run(folder)
    assert written == [folder / "reward.png", folder / "phases.png"]
    for file in written:
        assert file.read_bytes().startswith(PNG_MAGIC)


def test_one_step_and_a_killed_run_are_drawn(tmp_path):
    folder = write_run(tmp_path / "run", [0.1])
    with (folder / METRICS_FILE).open("a") as file:
        file.write('{"step": 1, "reward/me')
    assert len(plot_run(folder)) == 2


def test_a_picture_without_figures_is_left_out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / METRICS_FILE).write_text(to_json_line(0, {"reward/mean": 0.5}))
    assert plot_run(folder) == [folder / "reward.png"]


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no metrics; give the folder of a run that finished a step"):
        plot_run(tmp_path)


def test_reward_curve_shows_finite_rewards_and_their_running_mean(tmp_path):
    folder = write_run(tmp_path / "run", [0.0, float("nan"), 0.6])
    (axes,) = plots._reward_figure(read_metrics(folder), "run").axes
    points, mean = axes.lines
    assert points.get_xydata().tolist() == [[0, 0.0], [2, 0.6]]
    assert mean.get_xydata().tolist() == [[0, 0.0], [2, 0.3]]  # (0.0 + 0.6) / 2
    assert axes.get_ylim()[0] == 0.0 and axes.get_xlabel() == "step" and axes.get_ylabel() == "reward"


def test_phases_stack_up_to_the_step(tmp_path):
    folder = write_run(tmp_path / "run", [0.1, 0.2])
    upper, lower = plots._phases_figure(read_metrics(folder), "run").axes
    assert upper.lines[0].get_ydata().tolist() == [100.0, 100.0]
    stacks = {bars.get_label(): [(bar.get_y(), bar.get_height()) for bar in bars] for bars in lower.containers}
    assert stacks == {  # 2 s of generate, 4 s of optimize on top, and the second that 7 - 6 leaves
        "generate": [(0.0, 2.0)] * 2,
        "optimize": [(2.0, 4.0)] * 2,
        "other": [(6.0, 1.0)] * 2,
    }


def test_running_mean_of_a_window_and_of_fewer_steps_at_the_start():
    # 1; (1 + 2) / 2; (2 + 6) / 2; (6 + 0) / 2
    assert running_mean(np.array([1.0, 2.0, 6.0, 0.0]), window=2).tolist() == [1.0, 1.5, 4.0, 3.0]
    assert running_mean(np.array([1.0, 2.0, 6.0]), window=5).tolist() == [1.0, 1.5, 3.0]
