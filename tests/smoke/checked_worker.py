"""Runs in every rank: one of the scripts, with the engine compared with the policy, all of it, after every weight sync.

torchrun --nproc_per_node=2 checked_worker.py ALGORITHM [what the script takes]
"""

import sys
from typing import Any

from rollout import RolloutEngine
from tests.smoke.resume_worker import SCRIPTS
from trainers.cli import run_cli

sync = RolloutEngine.sync_weights


def checked(self: RolloutEngine, policy: Any, version: int) -> Any:
    report = sync(self, policy, version)
    assert report.planned
    self.check_weights(policy)
    print(f"checked version {version}, {report.num_bytes} bytes", flush=True)
    return report


if __name__ == "__main__":
    RolloutEngine.sync_weights = checked  # type: ignore[method-assign]
    config_class, train = SCRIPTS[sys.argv[1]]
    run_cli(config_class, train, sys.argv[2:])
