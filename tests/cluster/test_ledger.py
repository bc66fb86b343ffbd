"""The ledger: one final state for every group that was begun, in what survives of a run."""

import json

import pytest

from cluster import ledger
from cluster.errors import DataError
from cluster.ledger import Final, Ledger


def test_each_group_ends_once(tmp_path):
    book = Ledger(tmp_path / "ledger.jsonl")
    assert book.begin(3) == [0, 1, 2] and book.upcoming(2) == [3, 4]
    book.close(1, [Final(0, "a"), Final(2, "c", "late")])
    assert book.unfinished == [1]
    assert ledger.check(book.path, book.next, book.unfinished) == {"trained": 1, "late": 1}
    for wrong in ([Final(0, "a")], [Final(7, "x")], [Final(1, "b"), Final(1, "b")]):
        with pytest.raises(ValueError, match="unfinished are"):
            book.close(2, wrong)
    for begun, unfinished in ((3, []), (4, [1]), (2, [1]), (3, [0, 1])):
        with pytest.raises(DataError, match="group"):
            ledger.check(book.path, begun, unfinished)


def test_a_checkpoint_gives_its_unfinished_groups_back(tmp_path):
    book = Ledger(tmp_path / "ledger.jsonl")
    book.begin(6)
    book.close(1, [Final(p, "e") for p in (0, 1, 3)])
    state = json.loads(json.dumps(book.state_dict()))
    assert book.begin(2) == [6, 7]
    book.close(2, [Final(p, "e") for p in (2, 4, 6)])
    with open(book.path, "a") as file:
        file.write('{"group": 9, "epis')  # cut short

    again = Ledger(book.path)
    again.roll_back(1, state)
    assert again.upcoming(7) == [2, 4, 5, 6, 7, 8, 9]
    assert again.begin(2) == [2, 4] and again.begin(3) == [5, 6, 7] and again.upcoming(1) == [8]
    again.close(2, [Final(p, "e") for p in (2, 4, 5, 6, 7)])
    assert ledger.check(book.path, again.next) == {"trained": 8}
    assert [line["group"] for line in ledger.read(book.path) if line.get("rolled_back")] == [2, 4, 6]
    from_the_start = Ledger(book.path)
    from_the_start.roll_back(-1, {"position": 0})
    assert from_the_start.begin(1) == [0] and not ledger.surviving(ledger.read(book.path))
