"""`keys` and `usage`, as an operator runs them."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.request import Exchange, Usage
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.ledger import Ledger
from tests.services import Postgres

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SYNTHIA_")}
    environment["SYNTHIA_DATA"] = str(tmp_path / "data")

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "synthia_vllm", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment | more)

    return run


def listed(run: Run, *words: str) -> list[dict[str, object]]:
    return json.loads(run("keys", "list", "--format", "json", *words).stdout)


def fill(tmp_path: Path, *models: str) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'data' / 'synthia.db'}")
    ledger = Ledger(engine)
    for number, model in enumerate(models):
        usage = Usage(prompt=10, generated=5, accepted=True)
        one = Exchange(f"{number}", "r", "/v1/chat/completions", account=Account("alice"), model=model, usage=usage)
        one.status, one.outcome = 200, "finished"
        ledger.add(one)
    ledger.close()
    engine.dispose()


def test_create_prints_the_key_alone_on_stdout(run: Run) -> None:
    done = run("keys", "create", "--user", "alice")
    assert done.returncode == 0
    assert re.fullmatch(r"sk-synthia-[0-9A-Za-z]{40}\n", done.stdout)
    assert done.stdout.strip() not in done.stderr
    assert done.stdout.strip()[11:19] in done.stderr


def test_a_key_for_a_model_that_only_a_server_knows_is_made_and_says_so(run: Run) -> None:
    done = run("keys", "create", "--user", "a", "--models", "synthia", "--models", "nope")
    assert done.returncode == 0
    assert "whether it serves nope:" in done.stderr
    assert len(done.stdout.split()) == 1
    assert "serves" not in run("keys", "create", "--user", "b", "--models", "synthia").stderr


def test_all_settings_reach_the_list(run: Run) -> None:
    options = {"weight": 3.0, "priority": "batch", "requests_per_minute": 60, "tokens_per_minute": 9000}
    options |= {"concurrent_requests": 4, "tokens_per_month": 10**12}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    models = ("--models", "synthia", "--models", "synthia-tot")
    assert run("keys", "create", "--user", "a", "--admin", *words, *models, "--expires", "2099-01-31").returncode == 0
    (row,) = listed(run)
    assert {name: row[name] for name in options} == options
    assert row["models"] == ["synthia", "synthia-tot"]
    assert row["admin"] is True
    assert row["expires"] == "2099-01-31 00:00:00+00:00"
    assert row["revoked"] is None
    assert not {"digest", "key"} & row.keys()


LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "tokens_per_month")


@pytest.mark.parametrize("command", [("keys", "set"), ("keys", "create")], ids=" ".join)
def test_none_unsets_a_limit_and_the_rest_stays(run: Run, command: tuple[str, ...]) -> None:
    options = [word for name in LIMITS for word in (f"--{name.replace('_', '-')}", "9")]
    run("keys", "create", "--user", "a", "--models", "synthia", "--weight", "2", *options)
    done = run(*command, "--user", "a", "--tokens-per-minute", "none", "--tokens-per-month", "NONE", "--models", "none")
    assert done.returncode == 0
    row = listed(run)[0]
    assert [row[name] for name in LIMITS] == [9, None, 9, None]
    assert (row["models"], row["weight"]) == (None, 2.0)


def test_a_user_is_changed_without_another_key(run: Run) -> None:
    run("keys", "create", "--user", "a")
    done = run("keys", "set", "--user", "a", "--tokens-per-minute", "5")
    assert (done.returncode, done.stdout) == (0, "")
    (row,) = listed(run)
    assert row["tokens_per_minute"] == 5
    assert run("keys", "set", "--user", "b", "--tokens-per-minute", "5").returncode == 2


@pytest.mark.parametrize("zone", ["Asia/Shanghai", "America/Los_Angeles"])
@pytest.mark.parametrize("given", ["2099-01-31", "2099-01-31T00:00", "2099-01-31T08:00+08:00"])
def test_an_end_without_a_zone_is_utc_whatever_the_machines_is_and_is_told(run: Run, zone: str, given: str) -> None:
    done = run("keys", "create", "--user", "a", "--expires", given, TZ=zone)
    assert "It ends at 2099-01-31 00:00:00+00:00" in done.stderr
    assert listed(run)[0]["expires"] == "2099-01-31 00:00:00+00:00"


def test_rotate_and_revoke(run: Run) -> None:
    first = run("keys", "create", "--user", "alice").stdout.strip()
    second = run("keys", "rotate", first[11:19], "--grace", "1h")
    assert re.fullmatch(r"sk-synthia-\w{40}\n", second.stdout)
    old, new = listed(run)
    assert old["expires"] is not None
    assert new["expires"] is None
    done = run("keys", "revoke", str(new["id"]))
    assert (done.returncode, done.stdout) == (0, "")
    assert listed(run)[1]["revoked"] is not None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["keys", "revoke", "nosuchid"], "keys list"),
        (["keys", "rotate", "nosuchid"], "keys list"),
        (["keys", "create"], "--user"),
        (["keys", "create", "--user", "a", "--expires", "soon"], "--expires"),
        (["keys", "create", "--user", "a", "--expires", "2001-01-01"], "--expires"),
        (["keys", "create", "--user", "a", "--weight", "0"], "--weight"),
        (["keys", "create", "--user", "a", "--priority", "high"], "--priority"),
        (["keys", "set", "--user", "a", "--tokens-per-minute", "0"], "--tokens-per-minute"),
        (["keys", "set", "--user", "a", "--tokens-per-minute", "nil"], "--tokens-per-minute"),
        (["keys", "set", "--user", "nobody"], "nobody"),
        (["keys", "create", "--user", "a", "--expires", "9999-12-31T23:59:59-14:00"], "--expires"),
        (["keys", "create", "--user", "a", "--expires", "0s"], "--expires"),
        (["keys", "create", "--user", "a", "--expires", "9" * 5000 + "d"], "--expires"),
        (["keys", "create", "--user", "a", "--models", ""], "--models"),
        (["keys", "create", "--user", "anonymous"], "--user"),
        (["keys", "create", "--user", "other"], "--user"),
        (["keys", "create", "--user", "\uff41lice"], "alice"),
        (["keys", "rotate", "nosuchid", "--grace", "31d"], "--grace"),
        (["keys", "list", "--database", "nonsense"], "--access.database"),
        (["usage", "--since", "yesterday"], "--since"),
        (["usage", "--until", "2027-13-01"], "--until"),
        (["usage", "--by", "hour"], "--by"),
    ],
)
def test_a_mistake_is_told_with_its_option(run: Run, words: list[str], told: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--user", ""],
        ["--user", "u" * 65],
        ["--user", "a", "--weight", "nan"],
        ["--user", "a", "--weight", "inf"],
        ["--user", "a", "--expires", "9999999d"],
        ["--user", "a", "--database", "sqlite:////nowhere/a.db"],
    ],
    ids=" ".join,
)
def test_a_value_out_of_bounds_is_refused(run: Run, words: list[str]) -> None:
    done = run("keys", "create", *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_keys_in_postgresql(run: Run, postgres: Postgres) -> None:
    url = postgres.new_database()
    key = run("keys", "create", "--user", "alice", "--database", url).stdout.strip()
    assert [row["id"] for row in listed(run, "--database", url)] == [key[11:19]]
    assert listed(run) == []
    assert run("keys", "list", SYNTHIA_ACCESS__DATABASE=url).stdout.count(key[11:19]) == 1


def test_usage_as_table_csv_and_json(run: Run, tmp_path: Path) -> None:
    run("keys", "list")  # makes the folder
    fill(tmp_path, "synthia", "synthia", "synthia-tot")
    table = run("usage")
    assert "alice" in table.stdout
    assert table.stderr == ""
    rows = list(csv.DictReader(io.StringIO(run("usage", "--by", "model", "--format", "csv").stdout)))
    assert [(row["model"], row["requests"], row["prompt_tokens"]) for row in rows] == [
        ("synthia", "2", "20"),
        ("synthia-tot", "1", "10"),
    ]
    (day,) = json.loads(run("usage", "--by", "day", "--format", "json", "--since", "24h").stdout)
    assert (day["requests"], day["refused"], day["generated_tokens"]) == (3, 0, 15)
    none = run("usage", "--user", "bob")
    assert (none.returncode, none.stdout) == (0, "")
    assert none.stderr.startswith("No requests that match (database sqlite:///")
    assert json.loads(run("usage", "--user", "bob", "--format", "json").stdout) == []
    assert json.loads(run("usage", "--until", "24h", "--format", "json").stdout) == []


def test_usage_tells_of_a_gap_on_stderr(run: Run, tmp_path: Path) -> None:
    run("keys", "list")
    url = f"sqlite:///{tmp_path / 'data' / 'synthia.db'}"
    code = (
        "import sys, time; from synthia_vllm.gateway.store.database import open_database\n"
        "from synthia_vllm.gateway.store.ledger import Ledger\n"
        "ledger = Ledger(open_database(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    fill(tmp_path, "synthia")  # the next start
    done = run("usage", "--format", "csv")
    assert "may be missing. Under way then: 0 requests with 0 tokens, 0 at most." in done.stderr
    assert "missing" not in done.stdout
    future = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 2 * 86_400))
    assert run("usage", "--since", future).stderr.startswith("No requests that match")
    assert run("usage", "--since", future, "--format", "json").stderr == ""


def test_a_models_name_is_text_and_not_markup(run: Run, tmp_path: Path) -> None:
    run("keys", "list")
    fill(tmp_path, "[/bold]", "[red]", "a\x1b[31mb")
    done = run("usage", "--by", "model")
    assert done.returncode == 0
    assert "[red]" in done.stdout
    assert "\x1b" not in done.stdout
