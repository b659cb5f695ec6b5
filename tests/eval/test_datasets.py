import shutil
from pathlib import Path

import pytest

from synthia_vllm.errors import SetupError
from synthia_vllm.eval.benchmarks import chosen
from synthia_vllm.eval.datasets import find_files
from synthia_vllm.eval.harness import load_tasks, task_manager
from tests.eval.conftest import DATA


def test_a_missing_data_set_is_named_with_the_command_that_gets_it(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as missing:
        task_manager(chosen(["arc_challenge"]), tmp_path, tmp_path)
    text = str(missing.value)
    assert f"hf download allenai/ai2_arc --repo-type dataset --local-dir {tmp_path}/ai2_arc" in text
    assert "ai2_arc/ARC-Challenge/{train,test}.jsonl" in text


def test_missing_subjects_of_a_group_are_counted(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"for 53 more: business_ethics, clinical_knowledge, college_biology"):
        task_manager(chosen(["mmlu"]), tmp_path, DATA)


def test_parquet_as_the_hub_has_it_is_read_like_json(tmp_path: Path) -> None:
    import pandas

    folder = tmp_path / "data" / "truthful_qa" / "multiple_choice"
    folder.mkdir(parents=True)
    source = DATA / "truthful_qa/multiple_choice/validation.jsonl"
    pandas.read_json(source, lines=True).to_parquet(folder / "validation-00000-of-00001.parquet")
    loaded = []
    for data in (tmp_path / "data", DATA):
        target = tmp_path / data.parent.name
        target.mkdir()
        (task,) = load_tasks(chosen(["truthfulqa_mc2"]), task_manager(chosen(["truthfulqa_mc2"]), target, data), data)
        loaded.append([(doc["question"], doc["mc2_targets"]) for doc in task.eval_docs])
    assert loaded[0] == loaded[1]


def test_a_split_of_several_files_is_whole_and_one_that_lacks_is_none(tmp_path: Path) -> None:
    for name in ("test-00000-of-00002.parquet", "test-00001-of-00002.parquet"):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / name).touch()
    found = find_files(tmp_path, "c", ["test"])
    assert found is not None
    assert len(found["test"]) == 2
    assert find_files(tmp_path, "c", ["dev", "test"]) is None


def test_data_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    shutil.copytree(DATA / "truthful_qa", tmp_path / "truthful_qa")
    (tmp_path / "truthful_qa/multiple_choice/validation.jsonl").write_text("{not json\n")
    (tmp_path / "tasks").mkdir()
    benchmarks = chosen(["truthfulqa_mc2"])
    with pytest.raises(SetupError, match="truthfulqa_mc2: its data set can't be read"):
        load_tasks(benchmarks, task_manager(benchmarks, tmp_path / "tasks", tmp_path), tmp_path)


def test_a_task_that_is_none_is_refused() -> None:
    with pytest.raises(SetupError, match="--tasks winogrande: there are arc_challenge, hellaswag"):
        chosen(["winogrande"])
