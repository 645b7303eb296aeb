"""The wandb workspace: every logged metric in a panel, no panel empty; written to a file, or saved where a login is."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainers.dashboard import to_json_line
from trainers.metrics import all_metrics
from trainers.workspace import specification, workspace

REPOSITORY = Path(__file__).parents[2]


def logged_names() -> list[str]:
    """One name for each metric of the table."""
    return [name.replace("NAME", "short").replace("/N/", "/0/") for name in all_metrics()]


def panels_of(specified: dict) -> dict[str, dict]:
    """The configs of all panels by title."""
    sections = specified["section"]["panelBankConfig"]["sections"]
    configs = [panel["config"] for section in sections for panel in section["panels"]]
    return {config["chartTitle"]: config for config in configs if "chartTitle" in config}


def test_all_metrics_have_a_panel_over_the_step() -> None:
    made = workspace("me", "sums", "a name", logged_names(), ["samples", "eval/samples"])
    specified = specification(made)
    panels = panels_of(specified)
    assert {config["xAxis"] for config in panels.values()} == {"step"}
    shown = [name for config in panels.values() for name in config["metrics"]]
    patterns = [config["metricRegex"] for config in panels.values() if "metricRegex" in config]
    plain = {name for name, metric in all_metrics().items() if not metric.is_family and not metric.no_panel}
    by_pattern = {name for name in ("memory/rss_gib", "memory/device_gib")}  # beside those of the ranks
    assert sorted(shown) == sorted(plain - by_pattern)
    assert len(patterns) == 5 and all(pattern.startswith("^(") for pattern in patterns)
    assert panels["Phases"]["plotType"] == "stacked-area" and panels["Phases"]["yAxisTitle"] == "s"
    sections = [section["name"] for section in specified["section"]["panelBankConfig"]["sections"]]
    assert sections == [
        "Throughput", "Time of a step", "Scheduler and host gap", "Rank health", "Learning", "Samples",
    ]  # fmt: skip
    assert json.dumps(specified).count('"samples"') and json.dumps(specified).count('"eval/samples"')


def test_a_panel_without_its_metric_is_left_out() -> None:
    made = workspace("me", "sums", "a name", ["reward/mean", "rank/1/rss_gib", "sync/version"])
    assert panels_of(specification(made)).keys() == {"Reward", "Memory of the ranks"}


def run_folder(folder: Path) -> Path:
    metrics = {"reward/mean": 0.5, "rank/0/rss_gib": 2.0}
    (folder / "metrics.jsonl").write_text(to_json_line(0, metrics))
    (folder / "samples.jsonl").write_text("{}\n")
    (folder / "config.yaml").write_text("wandb:\n  project: of-the-config\n  entity: null\n")
    return folder


def script(*words: str | Path, home: Path, **variables: str) -> subprocess.CompletedProcess:
    """scripts/dashboard.py where nobody is logged in, but for `variables`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_ERROR_REPORTING": "false"} | variables
    command = [sys.executable, "scripts/dashboard.py", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)


def test_without_a_login_the_specification_is_a_file(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    done = script(run, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{run / 'workspace.json'}: 3 sections, 3 panels" in done.stdout  # Rank health, Learning, Samples
    assert "GPU" not in panels_of(json.loads((run / "workspace.json").read_text()))
    assert "Checkpoint (checkpoint.every)" in done.stdout and "`wandb login`" in done.stdout
    done = script(tmp_path / "nowhere", home=tmp_path)
    assert done.returncode == 2 and "give the folder of a run that finished a step" in done.stderr


@pytest.fixture
def wandb_server() -> Iterator[tuple[str, list[dict]]]:
    """A server that answers wandb's client as far as saving a workspace goes: its address, and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer: dict = {}
            if self.path == "/graphql":
                asked.append(json.loads(body))
                viewer = {
                    "id": "1",
                    "entity": "somebody",
                    "username": "somebody",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
                view = {"view": {"id": "2", "name": "nw-new-v"}, "inserted": True}
                answer = {"data": {"upsertView": view} if "upsertView" in asked[-1]["query"] else {"viewer": viewer}}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_with_a_login_it_is_saved_for_the_project(tmp_path: Path, wandb_server: tuple[str, list[dict]]) -> None:
    address, asked = wandb_server
    run = run_folder(tmp_path)
    done = script(run, "--name", "mine", home=tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=address)
    assert done.returncode == 0, done.stderr
    assert "/somebody/of-the-config?nw=new" in done.stdout
    (saved,) = [question["variables"] for question in asked if "upsertView" in question["query"]]
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("somebody", "of-the-config", "mine")
    assert panels_of(json.loads(saved["spec"])).keys() == {"Reward", "Memory of the ranks"}
    assert not (run / "workspace.json").exists()
