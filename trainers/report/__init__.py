"""One self-contained HTML page of one run or several: `scripts/report.py`."""
