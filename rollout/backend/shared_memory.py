"""The shared-memory segments of vLLM's CPU communicator, which carry their job's name."""

from rollout.world import SHARED_MEMORY


def unlink_shared_memory(job: str) -> None:
    """Remove the names of a job's segments, once every rank has mapped them.

    The mappings stay until the processes end, however they end: a killed job leaves nothing behind.
    """
    if SHARED_MEMORY.is_dir():
        for segment in SHARED_MEMORY.glob(f"*{job}*"):
            segment.unlink(missing_ok=True)  # another rank may have been faster
