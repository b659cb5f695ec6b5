import dataclasses

from synthia_vllm.eval.scores import Evaluation, Score, markdown

SCORES = [
    Score("arc_challenge", "acc_norm", 25, 0.625, 0.0141, 1172),
    Score("hellaswag", "acc_norm", 10, 0.8379, 0.0037, 10042),
    Score("mmlu", "acc", 5, 0.639, 0.0039, 14042),
    Score("truthfulqa_mc", "mc2", 0, 0.4385, 0.0152, 817),
]
EVALUATION = Evaluation("synthia", "plain", "0.4.13", None, 0, 26073, 100.0, SCORES)


def test_the_table_is_the_cards_with_standard_errors() -> None:
    lines = markdown(EVALUATION).splitlines()
    assert lines[2] == "|**Task**|**Metric**|**Value**|**Std. error**|"
    assert lines[3] == "|*arc_challenge*|acc_norm|0.6250|0.0141|"
    assert lines[7] == "|**Total Average**|-|0.6351||"
    assert "lm-evaluation-harness 0.4.13" in lines[9]


def test_a_part_of_the_tasks_has_no_average() -> None:
    part = dataclasses.replace(EVALUATION, scores=SCORES[:2])
    assert part.as_json()["average"] is None
    assert "Average" not in markdown(part)


def test_a_limited_run_says_that_it_is_no_result() -> None:
    assert "only the first 5 questions" in markdown(dataclasses.replace(EVALUATION, limit=5))
