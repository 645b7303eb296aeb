"""Stands in for a benchmark's system: answers its turns, or does what a turn tells it. Needs no model.

A turn {"do": "add", "values": [...]} is answered with the sum; "die" ends rank 0 with code 7; "hang" answers nothing.
"""

import json
import os
import sys
import time
from pathlib import Path


def main(folder: Path) -> None:
    if os.environ["RANK"] == "0":
        with open(folder / "turns") as turns, open(folder / "answers", "w", buffering=1) as answers:
            print(json.dumps({"pid": os.getpid(), "world_size": int(os.environ["WORLD_SIZE"])}), file=answers)
            for line in turns:
                turn = json.loads(line)
                if turn["do"] == "die":
                    print("the last words of rank 0", file=sys.stderr, flush=True)
                    os._exit(7)
                if turn["do"] == "hang":
                    time.sleep(3600)
                print(json.dumps({"sum": sum(turn["values"])}), file=answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
