"""Boxes of sharded tensors arrive where they are needed, bit for bit as in a gathered tensor, in bounded buckets."""

import json
from pathlib import Path

import pytest
import torch

from rollout.backend.shard_exchange import Need, Piece, find_holders, find_pieces, make_buckets, volume
from tests.launch import launch

WORKER = Path(__file__).with_name("shard_exchange_worker.py")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("exchange")
    done = launch([WORKER, out], nproc=request.param, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(request.param)]


def test_every_box_is_what_the_whole_tensor_has(ranks: list[dict]) -> None:
    for rank in ranks:
        assert [found["wrong"] for found in rank["random"]] == [0] * 12
        assert all(found["all_in_pieces"] for found in rank["random"]), "nothing was gathered whole"


def test_no_bucket_is_larger_than_its_limit(ranks: list[dict]) -> None:
    for rank in ranks:
        for found in rank["random"]:
            assert 0 < found["largest"] <= found["limit"] // 2, "two are on their way at a time"
            assert found["memory"] <= 2 * found["limit"]
        assert rank["random"][0]["buckets"] > 10 and rank["random"][3]["buckets"] == 1


def test_a_rank_receives_what_it_lacks_and_no_more(ranks: list[dict]) -> None:
    for rank in ranks:
        for found in rank["random"]:
            # In bfloat16 two bytes an element, in float32 four; each piece is rounded up to 16.
            assert found["missing"] <= found["received"]
            if found["limit"] == 2**20:
                assert found["received"] <= 2 * found["missing"] + 16 * 45 * len(ranks)
        assert rank["silent"] == 0, "where all have what they need, no word is said"


def test_replicas_share_the_sending(ranks: list[dict]) -> None:
    if len(ranks) == 4:
        assert ranks[0]["spread"] == [32, 32, 32, 32]


def test_between_machines_only_that_travels_which_the_receivers_lacks() -> None:
    rows = [(slice(start, start + 2), slice(0, 4)) for start in range(0, 8, 2)]
    shape, whole = torch.Size([8, 4]), (slice(0, 8), slice(0, 4))
    needs = [[Need(0, "it", whole, torch.float32)] for _ in range(4)]
    machines = ["a", "a", "b", "b"]

    def over_the_network(held: list) -> int:
        holders = find_holders([{"it": box} for box in held], {"it": shape})
        pieces = find_pieces(holders, needs, machines)
        return sum(volume(each.box) for each in pieces if machines[each.sender] != machines[each.receiver])

    halves = [(slice(start, start + 4), slice(0, 4)) for start in (0, 4)]
    assert over_the_network([halves[0], halves[1], halves[0], halves[1]]) == 0, "each machine has all of it"
    assert over_the_network(rows) == 4 * 16, "to each rank, the half that its machine lacks"


def test_other_layouts_are_left_out(ranks: list[dict]) -> None:
    for rank in ranks:
        left_out = rank["left_out"]
        assert left_out == {"partial": True, "rows": False} | ({"strided": True} if len(ranks) == 4 else {})


def test_boxes_that_overlap_or_leave_a_gap_have_no_holders() -> None:
    shapes = {"overlap": torch.Size([4]), "gap": torch.Size([4]), "right": torch.Size([4]), "odd": torch.Size([4])}
    first = {"overlap": (slice(0, 3),), "gap": (slice(0, 1),), "right": (slice(0, 2),), "odd": (slice(0, 4),)}
    second = {"overlap": (slice(2, 3),), "gap": (slice(2, 4),), "right": (slice(2, 4),), "odd": None}
    assert set(find_holders([first, second], shapes)) == {"right"}


def test_a_row_larger_than_a_bucket_is_cut_too() -> None:
    shape = torch.Size([3, 100])
    box = (slice(0, 3), slice(0, 100))
    holders = find_holders([{"it": box}, {"it": (slice(0, 0),) * 2}], {"it": shape})
    pieces = find_pieces(holders, [[], [Need(0, "it", box, torch.float32)]])
    buckets = make_buckets(pieces, 96)
    assert all(sum(piece.num_bytes for piece in bucket) <= 96 for bucket in buckets)
    seen = torch.zeros(shape)
    for piece in (piece for bucket in buckets for piece in bucket):
        assert (piece.sender, piece.receiver) == (0, 1)
        seen[piece.box] += 1
    assert (seen == 1).all()
    with pytest.raises(ValueError, match="at least 16"):
        make_buckets(pieces, 8)


def test_buckets_are_filled() -> None:
    box = (slice(0, 1000), slice(0, 8))
    piece = Piece(Need(0, "it", box, torch.bfloat16), 0, 0, 1, box)
    buckets = make_buckets([piece, piece], 8000)
    assert sum(volume(each.box) for bucket in buckets for each in bucket) == 16000
    assert len(buckets) == 4, "32000 bytes in buckets of 8000"
