"""Stage 4: metrics that can be checked by hand, and scores that are kept as they are."""

import io
import json
import re
from html.parser import HTMLParser

import families
import numpy as np
import pytest
import torch
from conftest import assistant, picture, stages, torchrun, write_jsonl
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoTokenizer

evaluation, data = stages.eval, stages.data
Items = evaluation.Items


def items(ranks, categories=None, groups=None) -> Items:
    n = len(ranks)
    return Items(
        ranks,
        categories or ["all"] * n,
        groups or [str(i) for i in range(n)],
        [[10] * len(r) for r in ranks],
    )


def arrays(*scores):
    return [np.array(s, float) for s in scores]


def test_overall_macro_and_acc_plus_by_hand():
    benchmark = items([[1, 2]] * 5, ["a", "a", "a", "b", "b"], ["x", "x", "y", "y", "z"])
    result = evaluation.metrics(arrays([1, 0], [1, 0], [0, 1], [1, 0], [0, 1]), benchmark)
    assert result["overall"]["accuracy"] == pytest.approx(3 / 5) and result["overall"]["items"] == 5
    assert result["a"]["accuracy"] == pytest.approx(2 / 3) and result["b"][
        "accuracy"
    ] == pytest.approx(1 / 2)
    assert result["macro"]["accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (
        result["Acc+"]["accuracy"] == pytest.approx(1 / 3) and result["Acc+"]["items"] == 3
    )  # only x has all pairs right


def test_a_tie_is_wrong_and_the_position_decides_nothing():
    benchmark = items([[1, 2], [2, 1], [1, 2], [2, 1]])
    assert (
        evaluation.metrics(arrays([0, 0], [0, 0], [1, 1], [2, 2]), benchmark)["overall"]["accuracy"]
        == 0
    )
    assert (
        evaluation.metrics(arrays([1, 0], [0, 1], [0, 1], [1, 0]), benchmark)["overall"]["accuracy"]
        == 0.5
    )


def test_a_ranking_counts_its_ordered_pairs():
    result = evaluation.metrics(arrays([3, 1, 2, 2.5]), items([[1, 2, 2, 3]]))
    assert (
        result["overall"]["items"] == 5
        and result["overall"]["accuracy"] == pytest.approx(3 / 5)
        and result["Acc+"]["accuracy"] == 0
    )


def test_overall_is_the_count_weighted_mean_of_the_categories():
    rng = np.random.default_rng(0)
    ranks = [rng.permutation(rng.integers(2, 5)).tolist() for _ in range(200)]
    benchmark = items(
        ranks,
        [f"c{i}" for i in rng.integers(0, 6, 200)],
        [str(i) for i in rng.integers(0, 50, 200)],
    )
    result = evaluation.metrics([rng.random(len(r)) for r in ranks], benchmark)
    categories = [value for name, value in result.items() if name.startswith("c")]
    assert result["overall"]["accuracy"] == pytest.approx(
        sum(c["accuracy"] * c["items"] for c in categories) / sum(c["items"] for c in categories)
    )


def test_wilson_gives_the_published_example():
    low, high = evaluation.wilson(0.9, 10)  # 9 of 10, a standard worked example
    assert low == pytest.approx(0.5958, abs=2e-4) and high == pytest.approx(0.9821, abs=2e-4)
    assert evaluation.wilson(1.0, 20)[0] < 1 and evaluation.wilson(0.0, 20)[1] > 0


def test_the_interval_holds_the_truth_95_times_in_100_even_when_pairs_of_a_group_go_together():
    rng, held = np.random.default_rng(0), 0
    for _ in range(600):
        skill = rng.beta(4, 2, 60)  # each group has its own difficulty; the mean is 2/3
        outcomes = [rng.random(5) < s for s in skill]
        scores = [
            np.array([1.0, 0.0]) if right else np.array([0.0, 1.0])
            for group in outcomes
            for right in group
        ]
        result = evaluation.metrics(
            scores, items([[1, 2]] * 300, groups=[str(g) for g in range(60) for _ in range(5)])
        )
        held += result["overall"]["low"] <= 2 / 3 <= result["overall"]["high"]
    assert 0.92 < held / 600 < 0.98


def test_random_is_half_on_pairs_and_less_on_whole_groups():
    result = evaluation.baselines(items([[1, 2]] * 400, groups=[str(i // 2) for i in range(400)]))[
        "random"
    ]
    assert result["overall"]["accuracy"] == pytest.approx(0.5, abs=0.01) and result["Acc+"][
        "accuracy"
    ] == pytest.approx(0.25, abs=0.01)


def test_longer_wins_compares_characters_of_the_text(tmp_path):
    lines = [
        {"prompt": "q", "chosen": "longer text", "rejected": "short"},
        {"prompt": "q2", "chosen": "s", "rejected": "longer"},
        {"prompt": "q3", "chosen": "same!", "rejected": "equal"},
    ]
    torchrun(
        "01_data.py",
        "--source",
        write_jsonl(tmp_path / "b.jsonl", lines),
        "--out",
        tmp_path,
        "--holdout",
        0,
        ranks=1,
    )
    benchmark = Items.of(data.Comparisons(str(tmp_path / "b")))
    assert evaluation.baselines(benchmark)["longer wins"]["overall"]["accuracy"] == pytest.approx(
        1 / 3
    )


def test_scores_are_those_of_the_model_whatever_the_ranks_and_are_saved_unrounded(
    world, reward, tmp_path
):
    reward.save_pretrained(str(tmp_path / "model"))
    write_jsonl(
        tmp_path / "model/metrics.jsonl", [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
    )
    for ranks in (1, 2):
        torchrun(
            "04_eval.py",
            "--model",
            tmp_path / "model",
            "--benchmark",
            world / "data/new_scenes",
            "--out",
            tmp_path / str(ranks),
            "--micro_tokens",
            1000,
            ranks=ranks,
        )
    one, two = (
        load_file(tmp_path / str(ranks) / "model/new_scenes.safetensors") for ranks in (1, 2)
    )
    comparisons = data.Comparisons(str(world / "data/new_scenes"))
    np.testing.assert_allclose(one["scores"], two["scores"], atol=1e-5)
    for i in (0, 7, len(comparisons) - 1):
        with torch.no_grad():
            expected = reward(stages.model.pack([comparisons[i]], reward.processors)).numpy()
        np.testing.assert_allclose(
            one["scores"][one["offsets"][i] : one["offsets"][i + 1]], expected, atol=1e-5
        )
    assert one["scores"].dtype == np.float32 and len(np.unique(one["scores"])) > 0.9 * len(
        one["scores"]
    )  # rounding would make ties
    assert "<title>step 2: 0.6000</title>" in (tmp_path / "1/model/report.html").read_text()
    summary = json.loads((tmp_path / "1/model/summary.json").read_text())["new_scenes"]
    assert (
        set(summary) == {"model", "longer wins", "random"}
        and summary["model"]["overall"]["items"] > 30
    )


def test_models_trained_on_different_sources_stand_side_by_side_on_all_benchmarks(
    world, reward, tmp_path
):
    models = [tmp_path / name for name in ("first/reward", "second/reward", "third")]
    for scale, model in zip((1, -1, 1), models):
        reward.head.mlp[-1].weight.data.mul_(
            scale
        )  # the second model says the opposite of the first
        reward.save_pretrained(str(model))
        reward.head.mlp[-1].weight.data.mul_(scale)
    given = [part for model in models for part in ("--model", model)]
    sets = [
        part
        for name in ("new_scenes", "new_text")
        for part in ("--benchmark", world / "data" / name)
    ]
    printed = torchrun("04_eval.py", *given, *sets, "--out", tmp_path / "scores").stdout
    names = [str(model).strip("/").replace("/", "-") for model in models[:2]] + ["third"]
    found = [
        json.loads((tmp_path / "scores" / name / "summary.json").read_text()) for name in names
    ]
    overall = [
        [found[k][b][names[k]]["overall"]["accuracy"] for b in ("new_scenes", "new_text")]
        for k in range(3)
    ]
    assert (
        np.add(overall[0], overall[1]) == pytest.approx([1, 1], abs=0.02)
        and overall[2] == overall[0]
    )
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.split("overall accuracy")[1].splitlines()
    ]
    rows = {row[0]: [cell.split(" ")[0] for cell in row[1:]] for row in rows if row}
    for name, values in zip(names, overall):
        assert rows[name] == [f"{100 * value:.1f}" for value in (*values, np.mean(values))]
    assert "longer wins" in rows


def test_another_systems_scores_are_read_in_the_benchmarks_order(world, tmp_path):
    comparisons = data.Comparisons(str(world / "data/new_scenes"))
    perfect = write_jsonl(
        tmp_path / "perfect.jsonl",
        [[-float(r) for r in comparisons[i].ranks] for i in range(len(comparisons))],
    )
    torchrun(
        "04_eval.py",
        "--scores_from",
        perfect,
        "--benchmark",
        world / "data/new_scenes",
        "--out",
        tmp_path,
        ranks=2,
    )
    result = json.loads((tmp_path / "perfect/summary.json").read_text())["new_scenes"]["perfect"]
    assert (
        result["overall"]["accuracy"]
        == result["macro"]["accuracy"]
        == result["Acc+"]["accuracy"]
        == 1
    )


def test_two_benchmarks_of_one_name_are_refused_before_one_replaces_the_other(world, tmp_path):
    given = [
        str(world / "data/new_text"),
        str(world / "data/new_scenes"),
        str(world / "data/new_text"),
    ]
    for stage in (evaluation, stages.ensemble):
        with pytest.raises(data.UserError, match="two are named new_text"):
            stage.main(stage.Settings(benchmark=given, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda lines: lines[:-1], "lines, but"),
        (lambda lines: [lines[0], [1.0], *lines[2:]], "line 2: not a JSON list of"),
        (lambda lines: ["[NaN, 1]", *lines[1:]], "line 1: not a JSON list of"),
        (lambda lines: ['{"a": 1}', *lines[1:]], "line 1: not a JSON list of"),
    ],
)
def test_scores_that_do_not_fit_are_refused_with_their_line(spoil, says, world, tmp_path):
    comparisons = data.Comparisons(str(world / "data/new_scenes"))
    lines = [[float(r) for r in comparisons[i].ranks] for i in range(len(comparisons))]
    with pytest.raises(data.UserError, match=says):
        evaluation.read_scores(str(write_jsonl(tmp_path / "s.jsonl", spoil(lines))), comparisons)


# ---- report


HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\" onmouseover=\"y"


def test_the_report_shows_what_came_from_data_as_text_and_needs_nothing_from_elsewhere(
    reward, processors, tmp_path
):
    record = {
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": HOSTILE}]}
        ],
        "chosen": [{"role": "assistant", "content": HOSTILE}],
        "rejected": [{"role": "assistant", "content": f"{HOSTILE} h\u00e9llo \U0001f600"}],
        "images": [picture(56, 56)],
        "id": HOSTILE,
        "category": HOSTILE,
    }
    comparison = data.encode_record(record, processors, 4096)
    scores = [np.array([-1.0, 2.0])]
    benchmark = Items([[1, 2]], [HOSTILE], ["one"], [[1, 1]])
    systems = {HOSTILE: evaluation.metrics(scores, benchmark)}
    page = evaluation.page(
        HOSTILE,
        [evaluation.section(HOSTILE, systems, scores, [comparison], reward, processors.tokenizer)],
    )
    found = Tags()
    found.feed(page)
    assert not found.names & {"script", "link", "iframe", "object", "base"}
    assert all(not name.startswith("on") for name, _ in found.attributes)
    assert all(
        value.startswith("data:image/")
        for name, value in found.attributes
        if name in ("src", "href")
    )
    assert (
        found.text.count("<script>alert('x')</script>") >= 6
    )  # title, heading, bar, prompt, both responses
    assert "h\u00e9llo \U0001f600" in found.text


def test_a_score_that_is_no_number_does_not_cost_the_report(processors, comparisons):
    scores = [
        np.array([1.0, np.nan, 0.5]),
        np.full(3, np.nan),
        np.array([0.0, 1.0, 2.0]),
        np.array([2.0, 1.0, 0.0]),
    ]
    for given, says in (
        (scores, "of 12 pairs, 5 not finite;"),
        (scores[1:2] * 4, "of 12 pairs, 12 not finite;"),
    ):
        systems = {"model": evaluation.metrics(given, items([[1, 2, 3]] * 4))}
        made = evaluation.section(
            "benchmark", systems, given, comparisons, None, processors.tokenizer
        )
        assert says in made and made.count("<article>") == (given is scores)


@pytest.mark.parametrize(
    "family, token", [("qwen2_5_vl", "<|image_pad|>"), ("internvl", "<IMG_CONTEXT>")]
)
def test_the_report_says_where_in_a_prompt_a_picture_stands(family, token, tmp_path):
    families.write_tokenizer(family, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(f"<|im_start|>Is {token * 4} it?", add_special_tokens=False)
    comparison = data.Comparison(np.array(ids), [np.array(ids)] * 2, [1, 2])
    assert "<div class=text>Is [picture] it?</div>" in evaluation.article(
        comparison, [0.0, 1.0], -1.0, None, tokenizer
    )


def test_the_learning_curves_of_a_model_go_through_the_numbers_of_its_metrics(tmp_path):
    rng, lines = np.random.default_rng(0), []
    for step in range(1, 131):
        lines.append(
            {
                "step": step,
                "loss": 0.7 * rng.random(),
                "accuracy": rng.integers(17) / 16,
                "margin": 1.0,
            }
        )
        if step % 50 == 0:
            lines[-1] |= {
                "validation_loss": 0.4 + rng.random(),
                "validation_accuracy": rng.random(),
            }
    lines[7] |= {"loss": None, "accuracy": None}  # its update was skipped
    assert evaluation.learning_curves(str(tmp_path)) == ""
    write_jsonl(
        tmp_path / "metrics.jsonl",
        [*lines, {"loss": 9}, {"step": 9, "loss": "9"}, [9], '{"step": 131, "lo'],
    )
    found = evaluation.learning_curves(str(tmp_path)).split("<svg")
    assert len(found) == 3
    for svg, what in zip(found[1:], ("loss", "accuracy")):
        drawn = {}  # {curve: [(step, value)]} by the numbers that stand at the axes
        to_step, to_value = (np.polyfit(*axis(svg, name), 1) for name in "xy")
        for points, title in re.findall(r'<polyline points="([^"]*)"[^>]*><title>([^<]*)', svg):
            places = np.array([place.split(",") for place in points.split()], float)
            drawn[title] = np.stack(
                [np.polyval(to_step, places[:, 0]), np.polyval(to_value, places[:, 1])], 1
            )
        for name in (what, f"validation_{what}"):
            expected = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            assert (np.abs(drawn.pop(name) - expected) < [0.01, 0.001]).all(), name
        assert sorted(drawn) == sorted(
            f"step {s}: {lines[s - 1][f'validation_{what}']:.4f}" for s in (50, 100)
        )


def axis(svg: str, name: str) -> tuple[list[float], list[float]]:
    """Where the numbers of an axis stand, and the numbers."""
    found = re.findall(rf'<text class={name} x="([\d.]*)" y="([\d.]*)"[^>]*>([-\d.,]*)<', svg)
    return [float(each[name == "y"]) for each in found], [
        float(each[2].replace(",", "")) for each in found
    ]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.names, self.attributes, self.text = set(), [], ""

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.text += text


def test_what_is_read_at_a_response_s_last_token_is_its_score(reward, comparisons):
    for comparison in comparisons:
        with torch.no_grad():
            scores = reward(stages.model.pack([comparison], reward.processors))
        read = evaluation.scores_while_reading(reward, comparison)
        assert [len(each) for each in read] == [
            1 + len(response) for response in comparison.responses
        ]
        np.testing.assert_allclose([each[-1] for each in read], scores, atol=1e-5)


# ---- what training data and a benchmark share


def test_shared_prompts_pictures_and_copies_of_pictures_are_found(tmp_path):
    def smaller(content: bytes) -> bytes:
        file = io.BytesIO()
        Image.open(io.BytesIO(content)).resize((120, 90)).save(file, "JPEG", quality=60)
        return file.getvalue()

    def pair(text: str, *pictures: bytes) -> dict:
        names = []
        for content in pictures:
            names.append(f"{hash(content)}.png")
            (tmp_path / names[-1]).write_bytes(content)
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        turns = {"prompt": [{"role": "user", "content": content}], "images": names}
        return turns | {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}

    seen = [picture(224, 168, seed) for seed in range(3)]
    write_jsonl(
        tmp_path / "train.jsonl",
        [pair("Is it?", seen[0]), pair("Is it red?", *seen[1:]), pair("Is 2 > 1?")],
    )
    benchmark = [
        pair("Is it?", picture(224, 168, 9)),  # the same words about another picture
        pair("What else?", seen[0]),
        pair("And this?", picture(224, 168, 8), smaller(seen[2])),
        pair("Is 2 > 1?"),
        pair("Is 3 > 1?"),
    ]
    write_jsonl(tmp_path / "benchmark.jsonl", benchmark)
    for name in ("train", "benchmark"):
        torchrun(
            "01_data.py",
            "--source",
            tmp_path / f"{name}.jsonl",
            "--out",
            tmp_path,
            "--holdout",
            0,
            ranks=1,
        )
    found = evaluation.overlap(
        data.Comparisons(str(tmp_path / "benchmark")), [str(tmp_path / "train")]
    )
    assert found == {"prompt": 1, "picture": 1, "picture that looks alike": 2}
