"""Make the tables of docs/configuration.md anew, from the dataclasses: `make reference`.

python scripts/write_reference.py
"""

from pathlib import Path

from trainers.reference import with_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
