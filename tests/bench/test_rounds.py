"""Figures of interleaved rounds: ratios are within a round, and no server is always the first."""

import json
from pathlib import Path

from rich.console import Console

from synthia_vllm.bench.rounds import Results, add, in_turn, ratios, report, write


def test_each_server_is_the_first_in_some_round() -> None:
    names = ["a", "b", "c"]
    orders = [in_turn(names, number) for number in range(3)]
    assert {order[0] for order in orders} == set(names)
    assert all(sorted(order) == names for order in orders)


def test_ratios_are_taken_within_a_round() -> None:
    results: Results = {}
    for number, (ours, theirs) in enumerate(((1.0, 2.0), (10.0, 10.0), (30.0, 20.0))):
        add(results, "cost", "ours", ours)
        add(results, "cost", "theirs", theirs)
        add(results, "memory", "ours", float(number))
    assert ratios(results, [("ours", "theirs")]) == {
        "cost: ours / theirs": {"median": 1.0, "least": 0.5, "greatest": 1.5}
    }


def test_a_report_is_written_with_every_round(tmp_path: Path) -> None:
    results: Results = {"cost": {"ours": [1.0, 3.0], "theirs": [2.0, 2.0]}}
    found = report({"cpus": 2}, results, [("ours", "theirs")], streams=64)
    write(found, tmp_path / "new" / "found.json", Console(quiet=True))
    read = json.loads((tmp_path / "new" / "found.json").read_text())
    assert read["machine"] == {"cpus": 2}
    assert read["streams"] == 64
    assert read["results"] == results
    assert read["ratios"]["cost: ours / theirs"]["median"] == 1.0
