"""Published benchmarks: rows in their own schemas become comparisons, and official metrics agree
with numbers computed by hand."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, stages, torchrun, write_jsonl

data, evaluation = stages.data, stages.eval

VL = {
    "query": "What is it?",
    "response": ["A cat.", "A dog."],
    "image": "images/1.png",
    "human_ranking": [0, 1],
}
MM = {"id": "1_2", "image": "mcq/1.png", "prompt": "Which one?", "chosen": "A", "rejected": "B"}
MULTIMODAL = {
    "Text": "What is it?",
    "Image": "images/1.jpg",
    "Output1": "A cat.",
    "Output2": "A dog.",
}
REWARDBENCH = {
    "id": 1,
    "prompt": "2 + 2?",
    "chosen": "4",
    "rejected": "5",
    "chosen_model": "a",
    "rejected_model": "b",
}
REWARDBENCH_2 = {
    "id": "1",
    "prompt": "2 + 2?",
    "chosen": ["4"],
    "rejected": ["5", "6", "7"],
    "num_correct": 1,
}
REWARDBENCH_2 |= {"num_incorrect": 3, "total_completions": 4, "subset": "Math"}
RM_BENCH = {
    "id": "chat/1",
    "prompt": "2 + 2?",
    "chosen": ["4", "It is 4.", "**4**"],
    "domain": "chat",
}
RM_BENCH |= {"rejected": ["5", "It is 5.", "**5**"]}
JUDGEBENCH = {
    "pair_id": "81ec",
    "original_id": "7",
    "source": "mmlu-pro-law",
    "question": "May one?",
    "label": "A>B",
}
JUDGEBENCH |= {"response_model": "gpt-4o-2024-05-13", "response_A": "Yes.", "response_B": "No."}
LLMBAR = {"input": "Sort 3 1 2.", "output_1": "1 2 3", "output_2": "3 2 1", "label": 1}


def write_json(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def read(source: str, path, processors) -> list:
    """The comparisons of a source, text alone; raises Unusable at the first row that is."""
    lines = data.open_source(f"{source}:{path}")
    return [
        data.encode_record(line(), processors, 4096, without_images=True) for _, _, line in lines
    ]


def measure(metric: str, comparisons: list, *scores) -> dict[str, float]:
    """{row: value} of one list of scores for each comparison."""
    scores = [np.array(score, float) for score in scores]
    items = evaluation.Items.of(comparisons)
    rows = evaluation.with_intervals(evaluation.METRICS[metric], scores, items)
    for name, row in rows.items():
        assert row["low"] <= row["accuracy"] <= row["high"], name
    return {name: row["accuracy"] for name, row in rows.items()}


def approximately(**rows):
    return pytest.approx({name.replace("_", " "): value for name, value in rows.items()})


def test_vl_rewardbench_in_both_groupings_with_ids_that_occur_twice(tmp_path, processors):
    ids = [
        "hallucination_pair-1",
        "RLAIF-V-2",
        "RLAIF-V-2",
        "RLHF-V-3",
        "mathverse_4",
        "mmmu_pro_5",
        "wildvision-6",
    ]
    rows = [{**VL, "id": id} for id in ids]
    rows[1]["human_ranking"] = [1, 0]
    comparisons = read("vl-rewardbench", write_json(tmp_path / "v.json", rows), processors)
    assert [c.ranks for c in comparisons[:3]] == [[1, 2], [2, 1], [1, 2]]
    scores = (
        [2, 1],
        [0, 3],
        [1, 1],
        [0, 1],
        [5, 4],
        [math.nan, 1],
        [-2, -1],
    )  # right: 0, 1, 4; 2 is a tie
    result = measure("vl-rewardbench", comparisons, *scores)
    as_paper = {
        name.split(",")[0]: result.pop(name)
        for name in list(result)
        if "as BaseReward groups" in name
    }
    assert result == approximately(
        overall=3 / 7, macro=1 / 3, hallucination=2 / 4, reasoning=1 / 2, general=0
    )
    # RLAIF and RLHF count as general there
    assert as_paper == approximately(macro=7 / 12, hallucination=1, reasoning=1 / 2, general=1 / 4)


def test_vl_rewardbench_from_the_hub_has_its_images_as_bytes(processors):
    record = data.SOURCES["vl-rewardbench"].convert(
        {**VL, "id": "RLHF-V-3", "image": {"bytes": picture(), "path": None}}
    )
    assert data.encode_record(record, processors, 4096).images == [picture()]


def test_mm_rlhf_rewardbench_counts_pairs_and_whole_ids(tmp_path, processors):
    video = {**MM, "id": "3", "video": "video/3"}
    del video["image"]
    rows = [{**MM, "id": "1"}, {**MM, "id": "1"}, {**MM, "id": "2"}, video, video]
    comparisons = read("mm-rlhf-rewardbench", write_jsonl(tmp_path / "m.jsonl", rows), processors)
    result = measure("mm-rlhf-rewardbench", comparisons, [1, 0], [3, 2], [0, 1], [1, 0], [1, 1])
    expected = {
        "overall": 3 / 5,
        "Acc+": 1 / 3,
        "mcq": 2 / 3,
        "mcq, Acc+": 1 / 2,
        "video": 1 / 2,
        "video, Acc+": 0,
    }
    assert result == pytest.approx(expected)


def test_a_video_is_32_of_its_frames_in_their_order(tmp_path):
    frames = tmp_path / "video/3"
    frames.mkdir(parents=True)
    for number in range(1, 64):
        (frames / f"{number}.png").touch()
    images = data.mm_rlhf_rewardbench(
        {**MM, "image": None, "video": "video/3"}, tmp_path / "m.jsonl"
    )["images"]
    assert images == [f"video/3/{number}.png" for number in range(1, 64, 2)]
    none = data.pictures({"video": "video/none"}, tmp_path / "m.jsonl", 32)
    assert none == ["video/none"]  # which is then reported as unreadable


def test_multimodal_rewardbench_splits_safety_and_reasoning_by_the_id(tmp_path, processors):
    entries = [
        ("PAIRS_1", "safety", "Output1"),
        ("memes_2", "safety", "Output1"),
        ("math_3", "reasoning", "Output1"),
        ("EMMA_4", "reasoning", "Output1"),
        ("vqa_5", "vqa", "Output2"),
        ("vqa_6", "vqa", "Output1"),
    ]
    rows = []
    for name, category, better in entries:
        rows.append({**MULTIMODAL, "ID": name, "Category": category, "Better": better})
    comparisons = read(
        "multimodal-rewardbench", write_json(tmp_path / "all_data.json", rows), processors
    )
    result = measure(
        "multimodal-rewardbench", comparisons, [1, 0], [0, 1], [1, 0], [1, 1], [0, 1], [1, 0]
    )
    split = {"safety/bias": 1, "safety/toxicity": 0, "reasoning/math": 1, "reasoning/coding": 0}
    assert result == pytest.approx({"overall": 4 / 6, "vqa": 1} | split)


def test_rewardbench_weighs_subsets_by_their_published_size_and_math_like_code(
    tmp_path, processors
):
    subsets = [
        "alpacaeval-easy",
        "alpacaeval-easy",
        "mt-bench-med",
        "mt-bench-hard",
        "xstest-should-refuse",
    ]
    subsets += ["xstest-should-respond", "math-prm", "hep-cpp"]
    rows = [{**REWARDBENCH, "subset": subset} for subset in subsets]
    comparisons = read("rewardbench", write_json(tmp_path / "filtered.json", rows), processors)
    scores = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 1]]
    result = measure("rewardbench", comparisons, *scores)
    sections = [(100 / 2 + 40) / 140, 0, 154 / 404, 984 / (984 + 164)]
    assert [result[name] for name in ("Chat", "Chat Hard", "Safety", "Reasoning")] == pytest.approx(
        sections
    )
    assert result["overall"] == pytest.approx(sum(sections) / 4)
    assert result["alpacaeval-easy"] == 1 / 2 and "Prior Sets" not in result
    assert result["Safety, as the code weighs"] == pytest.approx(250 / 404)
    assert result["overall, as the code weighs"] == pytest.approx((sum(sections) + 96 / 404) / 4)

    turns = [{"role": "user", "content": "Why?"}]  # the prior sets, in both forms, count half
    for name, row in {
        "shp": {"prompt": turns, "chosen": "Because.", "rejected": "No."},
        "summarize": {"chosen": [*turns, answer("Because.")], "rejected": [*turns, answer("No.")]},
    }.items():
        write_json(tmp_path / f"prior/{name}-00000-of-00001.json", [row])
    comparisons += read("rewardbench-prior-sets", tmp_path / "prior", processors)
    result = measure("rewardbench", comparisons, *scores, [1, 0], [0, 0])
    assert result["Prior Sets"] == 1 / 2
    assert result["overall"] == pytest.approx((sum(sections) + 0.5 * 1 / 2) / 4.5)


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_rewardbench_2_is_best_of_four_and_shares_with_ties(tmp_path, processors):
    rows = [*[REWARDBENCH_2] * 4, {**REWARDBENCH_2, "subset": "Focus"}]
    comparisons = read("rewardbench-2", write_json(tmp_path / "test.json", rows), processors)
    assert comparisons[0].ranks == [1, 2, 2, 2]
    scores = [3, 2, 1, 0], [3, 3, 1, 0], [2, 3, 1, 0], [math.nan, 1, 1, 1], [1, 1, 1, 1]
    assert measure("rewardbench-2", comparisons, *scores) == approximately(
        overall=(1.5 / 4 + 1 / 4) / 2, Math=(1 + 1 / 2) / 4, Focus=1 / 4
    )


def test_rewardbench_2_ties_by_hand(tmp_path, processors):
    scores = {
        "tied:0": [5, 4, 1],  # gap 3, spread 1
        "ref:0": [3, 1],  # gap 2
        "tied:1": [2, 2, 2],  # gap 0, spread 0
        "ref:1": [0, 1],  # gap -1; -1 / 0 has the tanh -1
        "tied:2": [1, 1, 1],
        "ref:2": [1, 1],  # 0 / 0 counts 0
    }
    rows = []
    for id, each in scores.items():
        right, wrong = ["a", "b"][: len(each) - 1], ["c"]
        counts = {"num_correct": len(right), "total_completions": len(each), "subset": "Ties"}
        rows.append({**REWARDBENCH_2, "id": id, "chosen": right, "rejected": wrong, **counts})
    comparisons = read("rewardbench-2", write_json(tmp_path / "test.json", rows), processors)
    expected = (0.30 + 0.30 + 0.20 + 0.20) / 3 + 0.01 * (math.tanh(1) - 1 + 0) / 3
    assert measure("rewardbench-2", comparisons, *scores.values()) == approximately(
        overall=expected, Ties=expected
    )


def test_rm_bench_by_hand_with_both_safety_domains_as_one(tmp_path, processors):
    rows = [
        RM_BENCH,
        *({**RM_BENCH, "domain": f"safety-{kind}"} for kind in ("refuse", "response", "response")),
    ]
    comparisons = read("rm-bench", write_json(tmp_path / "total_dataset.json", rows), processors)
    assert comparisons[0].ranks == [1, 1, 1, 2, 2, 2]
    chat = [
        3,
        1,
        2,
        2.5,
        0,
        2,
    ]  # chosen 3 beats all, chosen 1 and 2 only the 0; the other 2 is a tie
    all_right, all_wrong = [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]
    result = measure("rm-bench", comparisons, chat, all_right, all_wrong, all_wrong)
    levels = {
        "easy": (1 / 3 + 1 / 3) / 2,
        "normal": (2 / 3 + 1 / 3) / 2,
        "hard": (2 / 3 + 1 / 3) / 2,
    }
    assert result == approximately(overall=(5 / 9 + 1 / 3) / 2, chat=5 / 9, safety=1 / 3, **levels)


def test_rm_bench_in_files_of_one_domain_has_it_from_the_name(tmp_path, processors):
    row = {key: value for key, value in RM_BENCH.items() if key != "domain"}
    (comparison,) = read(
        "rm-bench", write_json(tmp_path / "safety-refuse_filtered.json", [row]), processors
    )
    assert comparison.record["category"] == "safety"


def test_judgebench_by_source_and_by_model(tmp_path, processors):
    claude = {
        "response_model": "claude-3-5-sonnet-20240620",
        "label": "B>A",
        "source": "livecodebench-easy",
    }
    rows = [JUDGEBENCH, {**JUDGEBENCH, "source": "livebench-math-amps"}, {**JUDGEBENCH, **claude}]
    path = write_jsonl(tmp_path / "gpt.jsonl", rows)
    result = measure("judgebench", read("judgebench", path, processors), [1, 0], [0, 1], [0, 1])
    models = {"gpt-4o-2024-05-13": 1 / 2, "claude-3-5-sonnet-20240620": 1}
    assert result == pytest.approx(
        {"overall": 2 / 3, "knowledge": 1, "math": 0, "coding": 1} | models
    )
    assert set(measure("judgebench", read("judgebench", path, processors)[:1], [1, 0])) == {
        "overall",
        "knowledge",
    }


def test_llmbar_has_its_subsets_from_the_folders(tmp_path, processors):
    write_json(tmp_path / "Natural/dataset.json", [LLMBAR, {**LLMBAR, "label": 2}])
    write_json(tmp_path / "Adversarial/GPTInst/dataset.json", [LLMBAR])
    write_json(tmp_path / "Adversarial/GPTInst/evaluators/GPT-4/CoT/result.json", [{"not": "data"}])
    comparisons = read("llmbar", tmp_path, processors)  # GPTInst first
    result = measure("llmbar", comparisons, [0, 1], [1, 0], [0, 1])
    assert result == approximately(overall=2 / 3, Natural=1, GPTInst=0)


@pytest.mark.parametrize(
    "source, row, reason",
    [
        (
            "vl-rewardbench",
            {**VL, "id": "RLHF-V-1", "human_ranking": [0, 0]},
            "does not say which of two is better",
        ),
        (
            "vl-rewardbench",
            {**VL, "id": "RLHF-V-1", "response": ["one"]},
            "does not say which of two is better",
        ),
        ("vl-rewardbench", VL, "missing field: id"),
        ("mm-rlhf-rewardbench", {**MM, "image": "other/1.png"}, "names no category"),
        (
            "multimodal-rewardbench",
            {**MULTIMODAL, "ID": "1", "Category": "vqa", "Better": "tie"},
            "'tie' does not say",
        ),
        ("rewardbench", REWARDBENCH, "missing field: subset"),
        (
            "rm-bench",
            {**RM_BENCH, "chosen": ["4"]},
            "1 chosen and 3 rejected, not 3 styles of each",
        ),
        ("rm-bench", {**RM_BENCH, "domain": "cooking"}, "'cooking' names no category"),
        ("judgebench", {**JUDGEBENCH, "label": "A=B"}, "'A=B' does not say"),
        ("judgebench", {**JUDGEBENCH, "source": "arena"}, "'arena' names no category"),
        ("llmbar", {**LLMBAR, "label": 0}, "0 does not say"),
    ],
)
def test_a_row_that_does_not_say_what_is_right_is_unusable(
    source, row, reason, tmp_path, processors
):
    with pytest.raises(data.Unusable, match=reason):
        read(source, write_jsonl(tmp_path / "rows.jsonl", [row]), processors)


@pytest.mark.parametrize(
    "metric", sorted(set(evaluation.METRICS) - {"rm-bench"})
)  # whose order means the styles
def test_the_order_of_the_responses_decides_nothing(metric):
    rng = np.random.default_rng(0)
    ranks = [[1, 1, 2, 2] if i % 2 else [1, 2, 2, 2] for i in range(40)]
    categories = [["math-prm", "hep-cpp", "Ties", "Math"][i % 4] for i in range(40)]
    ids = [f"{'tied' if i // 4 % 2 else 'ref'}:{i // 8}" for i in range(40)]
    scores = [rng.integers(0, 4, 4).astype(float) for _ in ranks]  # with ties
    rows = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        shuffled = [np.array(each)[order].tolist() for each in ranks]
        records = [{"id": name, "subset": "a"} for name in ids]
        items = evaluation.Items(shuffled, categories, ids, records)
        rows.append(evaluation.METRICS[metric]([score[order] for score in scores], items))
    assert rows[0] == rows[1] and 0 < rows[0]["overall"]["accuracy"] < 1


def test_every_metric_of_a_source_is_known_and_benchmarks_of_two_are_not_mixed():
    of_policies = {"accuracy", "circular", "mme", *stages.grpo.JUDGES}
    assert {source.metric for source in data.SOURCES.values()} == {
        *evaluation.METRICS,
        *of_policies,
    }
    assert data.official_metric(["rewardbench:a", "rewardbench-prior-sets:b"]) == "rewardbench"
    assert data.official_metric(["pairs.jsonl"]) == data.official_metric([]) == ""
    with pytest.raises(data.UserError, match="not scored together"):
        data.official_metric(["rewardbench:a", "pairs.jsonl"])


def test_without_its_images_a_benchmark_says_so_everywhere(tmp_path):
    rows = [{**VL, "id": f"RLHF-V-{i}", "query": f"What is {i}?"} for i in range(40)] + [
        {**VL, "human_ranking": [0]}
    ]
    file = write_json(tmp_path / "vl.json", rows)
    prepare = ["01_data.py", "--source", f"vl-rewardbench:{file}", "--out", tmp_path]
    torchrun(*prepare, "--name", "with", ranks=1)
    rejected = [json.loads(line) for line in open(tmp_path / "with/rejected.jsonl")]
    assert len(rejected) == 41 and "unreadable image: images/1.png" in rejected[0]["reason"]

    out = torchrun(*prepare, "--name", "text", "--without_images", ranks=1).stdout
    assert (
        "read 41 = kept 40 + rejected 1" in out and "WITHOUT IMAGES" in out
    )  # and no holdout of a benchmark
    info = json.loads((tmp_path / "text/dataset.json").read_text())
    assert (
        info["metric"] == "vl-rewardbench"
        and info["without_images"]
        and not (tmp_path / "text_holdout").exists()
    )

    scores = write_jsonl(tmp_path / "theirs.jsonl", [[1.0, 0.0]] * 30 + [[0.0, 0.0]] * 10)
    evaluate = [
        "04_eval.py",
        "--scores_from",
        scores,
        "--benchmark",
        tmp_path / "text",
        "--out",
        tmp_path / "scores",
    ]
    out = torchrun(*evaluate, ranks=1).stdout
    title = "text, without images, without 1 of 41 lines"
    (result,) = json.loads((tmp_path / "scores/theirs/summary.json").read_text()).items()
    assert result[0] == title and result[1]["theirs"]["hallucination"]["accuracy"] == 0.75
    header, line, *table = [line for line in io.StringIO(out) if line.startswith("|")]
    assert (
        title in header
        and set(line) <= set("| -\n")
        and "longer wins" in header
        and "random" in header
    )
    assert [row.split("|")[1].strip() for row in table] == list(result[1]["theirs"])
    assert all(row.count("|") == header.count("|") for row in table)
