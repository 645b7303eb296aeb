"""What trace-event JSON has to be, for any viewer to draw it as it was meant."""

from collections import defaultdict


def check_format(events: list[dict]) -> None:
    """What the trace-event format requires of each kind of event that we write."""
    names = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    processes = {event["pid"] for event in events if event["name"] == "process_name"}
    assert events
    for event in events:
        assert event["ph"] in ("X", "C", "M")
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["ts"], float) and event["ts"] == int(event["ts"])
        assert event["pid"] in processes
        if event["ph"] == "X":
            assert isinstance(event["dur"], float) and event["dur"] == int(event["dur"]) >= 0.0
            assert (event["pid"], event["tid"]) in names
        elif event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
        elif event["name"].endswith("_name"):
            assert isinstance(event["args"]["name"], str)
        else:
            assert event["name"].endswith("_sort_index") and isinstance(event["args"]["sort_index"], int)


def check_nesting(events: list[dict]) -> None:
    """Each process's spans in order of time; those of a track inside each other, the outer one first, or apart."""
    last: dict[int, float] = {}
    open_until: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in events:
        if event["ph"] != "X":
            continue
        assert event["ts"] >= last.get(event["pid"], event["ts"]), f"{event} comes too late"
        last[event["pid"]] = event["ts"]
        around = open_until[event["pid"], event["tid"]]
        while around and around[-1] <= event["ts"]:
            around.pop()
        end = event["ts"] + event["dur"]
        assert not around or end <= around[-1], f"{event} ends after the span that it began in"
        around.append(end)


def spans_by_track(events: list[dict]) -> dict[tuple[int, str], set[str]]:
    """Names of spans by rank and track."""
    titles = {(each["pid"], each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"}
    found: dict[tuple[int, str], set[str]] = defaultdict(set)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], titles[event["pid"], event["tid"]]].add(event["name"])
    return dict(found)
