"""The tests' stand-in data sets, made whole."""

from pathlib import Path

STAND_INS = Path(__file__).parents[1] / "tests/eval/data"


def stand_ins(folder: Path) -> Path:
    """A folder as `eval --data` takes it, with all of MMLU's subjects: each has the questions of one of three."""
    import lm_eval.tasks
    import yaml

    for name in ("ai2_arc", "hellaswag", "truthful_qa"):
        (folder / name).symlink_to(STAND_INS / name)
    written = sorted((STAND_INS / "mmlu").iterdir())
    (folder / "mmlu").mkdir()
    subjects = Path(lm_eval.tasks.__file__).parent.glob("mmlu/default/mmlu_*.yaml")
    for at, source in enumerate(sorted(subjects)):
        subject = yaml.safe_load(source.read_text())["dataset_name"]
        (folder / "mmlu" / subject).symlink_to(written[at % len(written)])
    return folder
