"""What the README quotes."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from synthia_vllm.bench.quoted import main, markdown
from synthia_vllm.bench.run_file import Server, read, report_beside, write
from tests.bench.synthetic import closed, run


def made() -> list[str]:
    names = ("vllm-default", "ours")
    rounds = [closed(64, server=name, round=number, workload="closed loop") for number in range(3) for name in names]
    servers = [Server(name=name, title="") for name in names]
    return markdown(run([*rounds, closed(1, workload="closed loop")], servers=servers)).splitlines()


def test_a_server_has_a_line_and_what_was_not_measured_is_empty() -> None:
    lines = made()
    assert lines[0] == "| tokens/s, streams: | 1 | 64 |"
    assert lines[2].startswith("| `vllm-default` |  | ")
    assert lines[3].startswith("| `ours` | ")


def test_ratios_are_of_pairs_that_were_measured() -> None:
    ratios = made()[made().index("") + 3 :]
    assert len(ratios) == 1
    assert ratios[0].startswith("| `ours` / `vllm-default`, 64 streams | 1.0")


def test_what_the_simulator_foretold_stands_beside_what_was_measured() -> None:
    row = {
        "load": "open loop, 2/s", "calibrated": False, "errors": [-0.1, 0.05, 0.0],
        "simulated_ttft_p50": 0.045, "measured_ttft_p50": 0.05, "simulated_ttft_p99": 0.105, "measured_ttft_p99": 0.1,
        "simulated_throughput": 127.0, "measured_throughput": 127.0,
    }  # fmt: skip
    sizing = {"rows": [row, row | {"load": "seen before", "calibrated": True}]}
    lines = markdown(run([closed(64, workload="closed loop")], sizing=sizing)).splitlines()
    assert lines[-1] == "| open loop, 2/s | 45 / 50 (-10.0%) | 105 / 100 (+5.0%) | 127 / 127 (+0.0%) |"
    assert not any("seen before" in line for line in lines)


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_it_is_printed_from_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(run([closed(64, workload="closed loop")]), path)
    assert read(path).measurements[0].server == "ours"
    assert report_beside(path) == tmp_path / "run.html"
    assert "`ours`" in CliRunner().invoke(main, [str(path)], catch_exceptions=False).output


def test_a_broken_compressed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    path.write_text("not compressed")
    with pytest.raises(ValueError, match=r"run\.json\.gz"):
        read(path)
