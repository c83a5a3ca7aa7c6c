"""Stage 4: metrics checked by hand, intervals, raw scores, report, overlap with training data."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from conftest import assistant, picture, stages, torchrun, write_jsonl
from safetensors.numpy import load_file
from transformers import AutoTokenizer

evaluation, data = stages.eval, stages.data
Items = evaluation.Items


def items(ranks, categories=None, groups=None) -> Items:
    n = len(ranks)
    records = [{"characters": [10] * len(r)} for r in ranks]
    numbers = [str(i) for i in range(n)]
    return Items(ranks, categories or ["all"] * n, groups or numbers, records)


def arrays(*scores):
    return [np.array(s, float) for s in scores]


def test_overall_macro_and_acc_plus_by_hand():
    benchmark = items([[1, 2]] * 5, ["a", "a", "a", "b", "b"], ["x", "x", "y", "y", "z"])
    rows = evaluation.metrics(arrays([1, 0], [1, 0], [0, 1], [1, 0], [0, 1]), benchmark)
    assert {name: row["accuracy"] for name, row in rows.items()} == pytest.approx(
        {"overall": 3 / 5, "macro": (2 / 3 + 1 / 2) / 2, "Acc+": 1 / 3, "a": 2 / 3, "b": 1 / 2}
    )  # only x has all pairs right
    assert rows["overall"]["items"] == 5 and rows["Acc+"]["items"] == 3


def test_a_tie_and_nan_are_wrong_and_the_position_decides_nothing():
    benchmark = items([[1, 2], [2, 1], [1, 2], [2, 1]])
    ties = evaluation.metrics(arrays([0, 0], [0, np.nan], [1, 1], [2, 2]), benchmark)
    assert ties["overall"]["accuracy"] == 0
    half = evaluation.metrics(arrays([1, 0], [0, 1], [0, 1], [1, 0]), benchmark)
    assert half["overall"]["accuracy"] == 0.5


def test_a_ranking_counts_its_ordered_pairs():
    rows = evaluation.metrics(arrays([3, 1, 2, 2.5]), items([[1, 2, 2, 3]]))
    assert rows["overall"]["items"] == 5
    assert rows["overall"]["accuracy"] == pytest.approx(3 / 5) and rows["Acc+"]["accuracy"] == 0


def test_overall_is_the_count_weighted_mean_of_the_categories():
    rng = np.random.default_rng(0)
    ranks = [rng.permutation(rng.integers(2, 5)).tolist() for _ in range(200)]
    categories = [f"c{i}" for i in rng.integers(0, 6, 200)]
    groups = [str(i) for i in rng.integers(0, 50, 200)]
    benchmark = items(ranks, categories, groups)
    rows = evaluation.metrics([rng.random(len(r)) for r in ranks], benchmark)
    parts = [row for name, row in rows.items() if name.startswith("c")]
    right = sum(row["accuracy"] * row["items"] for row in parts)
    pairs = sum(row["items"] for row in parts)
    assert rows["overall"]["accuracy"] == pytest.approx(right / pairs)


# ---- intervals


def test_an_item_of_weight_2_counts_like_the_item_twice_in_every_metric():
    """The bootstrap's shortcut: an item that weighs 2 counts like the item twice, in any metric."""
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, 60)
    names = ["math-prm", "hep-cpp", "Ties", "Math"]
    categories = [names[i // 2 % 4] for i in range(60)]
    ids = [f"{'tied' if i % 2 else 'ref'}:{i // 2}" for i in range(60)]
    weights[::2] = weights[1::2]  # the two forms of a question go together
    ranks = [[1, 1, 1, 2, 2, 2]] * 60
    scores = [rng.integers(0, 4, 6).astype(float) for _ in ranks]
    chosen = np.repeat(np.arange(60), weights)
    copy = np.concatenate([np.arange(count) for count in weights])  # which of the repetitions

    def benchmark(indices, copies, weights=None):
        part = [categories[i] for i in indices]
        records = []
        for i, k in zip(indices, copies):
            records.append({"id": f"{ids[i]}-{k}", "subset": categories[i]})
        groups = [f"{i // 2}-{k}" for i, k in zip(indices, copies)]
        return Items([ranks[i] for i in indices], part, groups, records, weights)

    for name, measure in evaluation.METRICS.items():
        weighted = measure(scores, benchmark(range(60), [0] * 60, weights[None]))
        repeated = measure([scores[i] for i in chosen], benchmark(chosen, copy))
        for row in repeated:
            expected = repeated[row]["accuracy"]
            assert weighted[row]["accuracy"] == pytest.approx([expected], nan_ok=True), (name, row)


def test_the_interval_holds_the_truth_95_times_in_100_even_when_pairs_of_a_group_go_together():
    rng, held = np.random.default_rng(0), 0
    benchmark = items([[1, 2]] * 300, groups=[str(i // 5) for i in range(300)])
    for _ in range(600):
        skill = rng.beta(4, 2, 60)  # each group has its own difficulty; the mean is 2/3
        right = rng.random((60, 5)) < skill[:, None]
        scores = [np.array([1.0, 0.0]) if each else np.array([0.0, 1.0]) for each in right.flat]
        row = evaluation.with_intervals(evaluation.metrics, scores, benchmark, 400)["overall"]
        held += row["low"] <= 2 / 3 <= row["high"]
    assert 0.92 < held / 600 < 0.98


def test_an_interval_is_the_same_each_time_and_holds_the_accuracy_in_every_row():
    rng = np.random.default_rng(0)
    categories = [f"c{i}" for i in rng.integers(0, 30, 100)]  # some are in few draws
    benchmark = items([[1, 2]] * 100, categories)
    scores = [rng.random(2) for _ in range(100)]
    rows = evaluation.with_intervals(evaluation.metrics, scores, benchmark)
    assert rows == evaluation.with_intervals(evaluation.metrics, scores, benchmark)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows.values())
    overall = rows["overall"]
    error = np.sqrt(overall["accuracy"] * (1 - overall["accuracy"]) / 100)
    assert overall["high"] - overall["low"] == pytest.approx(2 * 1.96 * error, abs=0.02)


# ---- baselines


def test_random_is_half_on_pairs_and_less_on_whole_groups():
    benchmark = items([[1, 2]] * 400, groups=[str(i // 2) for i in range(400)])
    random = evaluation.baselines(benchmark)["random"]
    assert random["overall"]["accuracy"] == pytest.approx(0.5, abs=0.01)
    assert random["Acc+"]["accuracy"] == pytest.approx(0.25, abs=0.01)


def test_longer_wins_compares_characters_of_the_text(tmp_path):
    lines = [
        {"prompt": "q", "chosen": "longer text", "rejected": "short"},
        {"prompt": "q2", "chosen": "s", "rejected": "longer"},
        {"prompt": "q3", "chosen": "same!", "rejected": "equal"},
    ]
    source = write_jsonl(tmp_path / "b.jsonl", lines)
    torchrun("01_data.py", "--source", source, "--out", tmp_path, "--holdout", 0, ranks=1)
    benchmark = Items.of(data.Comparisons(str(tmp_path / "b")))
    longer = evaluation.baselines(benchmark)["longer wins"]
    assert longer["overall"]["accuracy"] == pytest.approx(1 / 3)


# ---- the stage


def test_scores_are_those_of_the_model_whatever_the_ranks_and_are_saved_unrounded(
    world, reward, tmp_path
):
    reward.save_pretrained(str(tmp_path / "model"))
    log = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
    write_jsonl(tmp_path / "model/metrics.jsonl", log)
    run = ["04_eval.py", "--model", tmp_path / "model", "--benchmark", world / "data/new_scenes"]
    saved = {}
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        torchrun(*run, "--out", out, "--micro_tokens", 1000, ranks=ranks)
        saved[ranks] = load_file(out / "model/new_scenes.safetensors")
    scores, offsets = saved[1]["scores"], saved[1]["offsets"]
    np.testing.assert_allclose(scores, saved[2]["scores"], atol=1e-5)
    comparisons = data.Comparisons(str(world / "data/new_scenes"))
    for i in (0, 7, len(comparisons) - 1):
        with torch.no_grad():
            expected = reward(stages.model.pack([comparisons[i]], reward.processors)).numpy()
        np.testing.assert_allclose(scores[offsets[i] : offsets[i + 1]], expected, atol=1e-5)
    assert scores.dtype == np.float32
    assert len(np.unique(scores)) > 0.9 * len(scores)  # rounding would make ties
    page = (tmp_path / "1/model/report.html").read_text()
    assert 'points="1,-0.7 2,-0.6 "' in page
    summary = json.loads((tmp_path / "1/model/summary.json").read_text())["new_scenes"]
    assert set(summary) == {"model", "longer wins", "random"}
    assert summary["model"]["overall"]["items"] > 30
    assert json.loads((tmp_path / "1/model/cost.json").read_text())["new_scenes"]["patches"] > 0


def test_models_trained_on_different_sources_stand_side_by_side_on_all_benchmarks(
    world, reward, tmp_path
):
    models = [tmp_path / name for name in ("first/reward", "second/reward", "third")]
    arguments = []
    for scale, model in zip((1, -1, 1), models):
        last = reward.head.mlp[-1].weight.data
        last.mul_(scale)  # the second model says the opposite of the first
        reward.save_pretrained(str(model))
        last.mul_(scale)
        arguments += ["--model", model]
    for name in ("new_scenes", "new_text"):
        arguments += ["--benchmark", world / "data" / name]
    printed = torchrun("04_eval.py", *arguments, "--out", tmp_path / "scores").stdout
    names = [str(model).strip("/").replace("/", "-") for model in models[:2]] + ["third"]
    overall = []
    for name in names:
        summary = json.loads((tmp_path / "scores" / name / "summary.json").read_text())
        systems = [summary[benchmark][name] for benchmark in ("new_scenes", "new_text")]
        overall.append([rows["overall"]["accuracy"] for rows in systems])
    assert np.add(overall[0], overall[1]) == pytest.approx([1, 1], abs=0.02)
    assert overall[2] == overall[0]
    table = {}
    for line in printed.split("overall accuracy")[1].splitlines():
        first, *cells = [cell.strip() for cell in line.split("|")[1:-1]] or [""]
        table[first] = [cell.split(" ")[0] for cell in cells]
    for name, values in zip(names, overall):
        assert table[name] == [f"{100 * value:.1f}" for value in (*values, np.mean(values))]
    assert "longer wins" in table


def test_two_benchmarks_of_one_name_are_refused_before_one_replaces_the_other(world, tmp_path):
    folders = [str(world / "data" / name) for name in ("new_text", "new_scenes", "new_text")]
    for stage in (evaluation, stages.ensemble):
        with pytest.raises(data.UserError, match="two are named new_text"):
            stage.main(stage.Settings(benchmark=folders, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_prompts_without_responses_are_no_benchmark(world):
    with pytest.raises(data.UserError, match="prompts without responses"):
        evaluation.check_names([str(world / "data/new_questions")])


# ---- scores of another system


def test_another_systems_scores_are_read_in_the_benchmarks_order(world, tmp_path):
    comparisons = data.Comparisons(str(world / "data/new_scenes"))
    perfect = [[-float(rank) for rank in comparison.ranks] for comparison in comparisons]
    file = write_jsonl(tmp_path / "perfect.jsonl", perfect)
    benchmark = ["--benchmark", world / "data/new_scenes"]
    torchrun("04_eval.py", "--scores_from", file, *benchmark, "--out", tmp_path, ranks=2)
    rows = json.loads((tmp_path / "perfect/summary.json").read_text())["new_scenes"]["perfect"]
    assert rows["overall"]["accuracy"] == rows["macro"]["accuracy"] == rows["Acc+"]["accuracy"] == 1


SPOILED = [
    (lambda lines: lines[:-1], "lines, but"),
    (lambda lines: [lines[0], [1.0], *lines[2:]], "line 2: not a JSON list of"),
    (lambda lines: ["[NaN, 1]", *lines[1:]], "line 1: not a JSON list of"),
    (lambda lines: ['{"a": 1}', *lines[1:]], "line 1: not a JSON list of"),
]


@pytest.mark.parametrize("spoil, reason", SPOILED)
def test_scores_that_do_not_fit_are_refused_with_their_line(spoil, reason, world, tmp_path):
    folder = str(world / "data/new_scenes")
    lines = [[float(rank) for rank in comparison.ranks] for comparison in data.Comparisons(folder)]
    file = write_jsonl(tmp_path / "s.jsonl", spoil(lines))
    settings = evaluation.Settings(scores_from=str(file), benchmark=[folder])
    with pytest.raises(data.UserError, match=reason):
        evaluation.read_results(settings)


# ---- report


HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\" onmouseover=\"y"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.names, self.attributes, self.text = set(), [], ""

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.text += text


def test_the_report_shows_what_came_from_data_as_text_and_needs_nothing_from_elsewhere(processors):
    content = [{"type": "image"}, {"type": "text", "text": HOSTILE}]
    record = {
        "prompt": [{"role": "user", "content": content}],
        "chosen": [assistant(HOSTILE)],
        "rejected": [assistant(f"{HOSTILE} h\u00e9llo \U0001f600")],
        "images": [picture(56, 56)],
        "id": HOSTILE,
    }
    comparison = data.encode_record(record, processors, 4096)
    section = evaluation.margins([np.array([-1.0, 2.0])], [comparison])
    page = evaluation.render(HOSTILE, {}, [{"title": HOSTILE, **section}], processors)
    tags = Tags()
    tags.feed(page)
    assert not tags.names & {"script", "link", "iframe", "object", "base"}
    for name, value in tags.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith("data:image/")
    shown = tags.text.count("<script>alert('x')</script>")
    assert shown >= 7  # title, heading, benchmark, id, prompt, both responses
    assert "h\u00e9llo \U0001f600" in tags.text and "[picture]" in tags.text


def test_a_score_that_is_no_number_does_not_cost_the_report(processors, comparisons):
    scores = arrays([1, np.nan, 0.5], [np.nan] * 3, [0, 1, 2], [2, 1, 0])
    for part, lost, wrong in ((scores, 5, 1), (scores[1:2] * 4, 12, 0)):
        section = evaluation.margins(part, comparisons)
        assert section["lost"] == lost and len(section["wrong"]) == wrong
        page = evaluation.render("name", {}, [{"title": "title", **section}], processors)
        assert f"{lost} pairs" in page and page.count("<article>") == wrong


FAMILIES = [("qwen2_5_vl", "<|image_pad|>"), ("internvl", "<IMG_CONTEXT>")]


@pytest.mark.parametrize("family, token", FAMILIES)
def test_the_report_says_where_in_a_prompt_a_picture_stands(family, token, tmp_path):
    families.write_tokenizer(family, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(f"<|im_start|>Is {token * 4} it?", add_special_tokens=False)
    image_token = tokenizer.convert_tokens_to_ids(token)
    processors = SimpleNamespace(tokenizer=tokenizer, image_token=image_token)
    assert evaluation.decode(np.array(ids), processors) == "Is [picture] it?"


def test_the_learning_curves_of_a_model_go_through_the_numbers_of_its_metrics(tmp_path):
    assert evaluation.learning_curves(str(tmp_path)) == {}
    rng, lines = np.random.default_rng(0), []
    for step in range(1, 131):
        line = {"step": step, "loss": rng.random(), "accuracy": rng.random(), "margin": 1.0}
        if step % 50 == 0:
            line |= {"validation_loss": rng.random(), "validation_accuracy": rng.random()}
        lines.append(line)
    write_jsonl(tmp_path / "metrics.jsonl", [*lines, '{"step": 131, "lo'])
    curves = evaluation.learning_curves(str(tmp_path))
    page = evaluation.render("name", curves, [], None)
    drawn = re.findall(r'points="([^"]*)">\s*<title>([^<]*)', page)
    assert [name for _, name in drawn] == [
        "loss", "validation_loss", "accuracy", "validation_accuracy"
    ]  # fmt: skip
    for points, name in drawn:
        expected = [(line["step"], -line[name]) for line in lines if name in line]
        assert [tuple(map(float, point.split(","))) for point in points.split()] == expected


# ---- what training data and a benchmark share


def pair(folder, text: str, *pictures: bytes) -> dict:
    names = []
    for content in pictures:
        names.append(f"{hash(content)}.png")
        (folder / names[-1]).write_bytes(content)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    prompt = {"prompt": [{"role": "user", "content": content}], "images": names}
    return prompt | {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}


def test_one_line_tells_what_a_benchmark_shares_with_the_training_data(tmp_path, capsys):
    seen = [picture(224, 168, seed) for seed in range(3)]
    train = [
        pair(tmp_path, "Is it?", seen[0]),
        pair(tmp_path, "Is it red?", *seen[1:]),
        pair(tmp_path, "Is 2 > 1?"),
    ]
    benchmark = [
        pair(tmp_path, "Is it?", picture(224, 168, 9)),  # the same words about another picture
        pair(tmp_path, "What else?", seen[0]),
        pair(tmp_path, "And this?", picture(224, 168, 8), seen[2]),
        pair(tmp_path, "Is 2 > 1?"),
        pair(tmp_path, "Is 3 > 1?"),
    ]
    for name, lines in (("train", train), ("benchmark", benchmark), ("other", benchmark[:1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", lines)
        torchrun("01_data.py", "--source", source, "--out", tmp_path, "--holdout", 0, ranks=1)
    folders = [str(tmp_path / name) for name in ("train", "gone")]
    for name in ("benchmark", "train", "other"):
        comparisons = data.Comparisons(str(tmp_path / name))
        evaluation.print_overlap(name, folders, comparisons)
    shared, same = capsys.readouterr().out.splitlines()
    assert "benchmark: 1 of 2 prompts without pictures and 2 of 4 pictures are also in" in shared
    assert same == "train: this is training data"
