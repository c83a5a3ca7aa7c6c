"""Stage 1: nothing is lost, nothing depends on the number of ranks, and the embedded world is what it says."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assistant, picture, stages, torchrun, write_jsonl

data = stages.data
world_of = data.embedded_world()
PAIR = {
    "prompt": [{"role": "user", "content": "What is it?"}],
    "chosen": [assistant("A circle.")],
    "rejected": [assistant("A square.")],
}
IMAGE_PROMPT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def read_all(folder) -> list:
    comparisons = data.Comparisons(str(folder))
    return [comparisons[i] for i in range(len(comparisons))]


def test_every_unusable_line_is_reported_with_its_reason(tmp_path):
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "cut.png").write_bytes(picture()[:100])
    (tmp_path / "page.png").write_text("<html>")
    good = [
        PAIR,
        {**PAIR, "prompt": "a plain string"},
        {
            **PAIR,
            "prompt": IMAGE_PROMPT,
            "images": ["good.png"],
            "id": 7,
            "category": "c",
            "unknown": [1],
        },
        {**PAIR, "images": ["good.png"]},  # an image without a place stands first
        {
            "prompt": PAIR["prompt"],
            "responses": ["one", "two", [assistant("three")]],
            "ranks": [1, 2, 2],
        },
        {"prompt": PAIR["prompt"], "answer": "a circle"},
    ]
    bad = {
        "not a line of JSON": '{"prompt": [',
        "not a JSON object": "[1, 2]",
        "": "",
        "missing field: prompt": {"chosen": "a", "rejected": "b"},
        "missing field: rejected": {"prompt": "q", "chosen": "a"},
        "missing field: chosen and rejected": {"prompt": "q"},
        "unreadable image: no_such.png": {
            **PAIR,
            "prompt": IMAGE_PROMPT,
            "images": ["no_such.png"],
        },
        "unreadable image: ": {**PAIR, "prompt": IMAGE_PROMPT, "images": ["cut.png"]},
        "unreadable image: none of PNG": {**PAIR, "prompt": IMAGE_PROMPT, "images": ["page.png"]},
        "images: 0 given, but the prompt has 1": {**PAIR, "prompt": IMAGE_PROMPT},
        "images: 2 given, but the prompt has 1": {
            **PAIR,
            "prompt": IMAGE_PROMPT,
            "images": ["good.png", "good.png"],
        },
        "chosen and rejected are identical": {**PAIR, "rejected": PAIR["chosen"]},
        "rejected: empty response": {**PAIR, "rejected": [assistant(" \n")]},
        "chosen: role is 'user'": {**PAIR, "chosen": [{"role": "user", "content": "x"}]},
        "prompt: ends with the role 'assistant'": {
            **PAIR,
            "prompt": [*PAIR["prompt"], assistant("x")],
        },
        "prompt: a part of type 'video'": {
            **PAIR,
            "prompt": [{"role": "user", "content": [{"type": "video"}]}],
        },
        "responses and ranks: not two lists": {
            "prompt": "q",
            "responses": ["a", "b"],
            "ranks": [1],
        },
        "ranks: all equal": {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]},
        "tokens, more than --max_length": {**PAIR, "chosen": [assistant("x " * 3000)]},
    }
    lines = [line for pair in zip(bad.values(), good + [PAIR] * len(bad)) for line in pair]
    file = write_jsonl(tmp_path / "mixed.jsonl", lines)
    out = torchrun(
        "01_data.py",
        "--source",
        file,
        "--out",
        tmp_path / "out",
        "--holdout",
        0,
        "--shard_size",
        4,
        ranks=2,
    ).stdout
    rejected = [json.loads(line) for line in open(tmp_path / "out/mixed/rejected.jsonl")]
    assert [line["line"] for line in rejected] == list(range(1, 2 * len(bad), 2))
    for line, reason in zip(rejected, bad):
        assert reason in line["reason"] and line["file"] == str(file), line
    info = json.loads((tmp_path / "out/mixed/dataset.json").read_text())
    kept = read_all(tmp_path / "out/mixed")
    assert info["read"] == len(lines) == len(kept) + len(rejected) and info["comparisons"] == len(
        kept
    )
    assert f"read {len(lines)} = kept {len(kept)} + rejected {len(rejected)}" in out
    assert [len(c.responses) for c in kept[:6]] == [2, 2, 2, 2, 3, 0] and kept[4].ranks == [1, 2, 2]
    assert (
        kept[2].record["id"] == 7
        and len(kept[2].images) == len(kept[3].images) == 1
        and kept[2].images[0] == picture()
    )
    assert np.array_equal(kept[2].prompt, kept[3].prompt)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_ranks(ranks, world, tmp_path):
    torchrun("01_data.py", "--out", tmp_path, "--world_size", 0.05, "--shard_size", 64, ranks=ranks)
    for folder in (world / "data").iterdir():
        assert contents(folder) == contents(tmp_path / folder.name), folder.name


def test_no_prompt_is_both_in_training_and_in_its_holdout(world):
    key = lambda c: (c.prompt.tobytes(), *c.images)
    train, held_out = (
        {key(c) for c in read_all(world / "data" / name)} for name in ("train", "train_holdout")
    )
    assert train and held_out and not train & held_out


def test_an_image_that_several_comparisons_share_is_stored_once(tmp_path, processors):
    image = picture(280, 280)
    made = [
        data.encode_record({**PAIR, "prompt": f"Question {i}", "images": [image]}, processors, 4096)
        for i in range(10)
    ]
    data.write_shard(tmp_path / "shard", made)
    shard = data.Shard(tmp_path / "shard")
    assert (
        len(shard.grids) == 1
        and shard[3].images == [image]
        and (tmp_path / "shard").stat().st_size < 2 * len(image) + 20_000
    )


def test_shards_hold_exactly_what_was_written(tmp_path, processors, comparisons):
    data.write_shard(tmp_path / "shard", comparisons)
    shard = data.Shard(tmp_path / "shard")
    for i, comparison in enumerate(comparisons):
        read = shard[i]
        assert (
            np.array_equal(read.prompt, comparison.prompt)
            and read.ranks == comparison.ranks
            and read.images == comparison.images
        )
        assert np.array_equal(read.grids, comparison.grids) and all(
            map(np.array_equal, read.responses, comparison.responses)
        )


def test_shards_of_another_tokenizer_are_refused(world):
    with pytest.raises(data.UserError, match="another tokenizer"):
        data.Comparisons(str(world / "data/train"), expect="0123456789abcdef")


def test_a_data_set_can_be_read_by_a_loader_process_that_does_not_fork(world):
    comparisons = data.Comparisons(str(world / "data/train"))
    here = comparisons[0]  # opens a shard
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(comparisons, [0]),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    (there,) = loader
    assert np.array_equal(here.prompt, there.prompt) and here.images == there.images


def test_lengths_known_for_planning_are_the_rows_lengths(world, processors):
    comparisons = data.Comparisons(str(world / "data/train"))
    tokens, patches = comparisons.sizes()
    for i in (0, 1, len(comparisons) - 1):
        row = stages.model.pack([comparisons[i]], processors)
        assert tokens[i] == row.input_ids.shape[1] and patches[i] == (
            0 if row.images is None else len(row.images.pixel_values)
        )


def test_the_world_is_a_function_of_its_seed():
    again = [world_of.record("scenes", "train", 3, i) for i in range(50)]
    assert (
        again
        == [world_of.record("scenes", "train", 3, i) for i in range(50)]
        != [world_of.record("scenes", "train", 4, i) for i in range(50)]
    )


def test_held_out_scenes_and_combinations_never_occur_in_training():
    def cells(split):
        return [
            world_of.draw_cells(world_of.random.Random(f"{split}{i}"), split) for i in range(1500)
        ]

    train, new, unseen = (cells(split) for split in ("train", "new", "unseen"))
    things = lambda scenes: {thing for scene in scenes for row in scene for thing in row if thing}
    assert not {repr(scene) for scene in train} & {repr(scene) for scene in new + unseen}
    assert not things(train + new) & world_of.UNSEEN and things(unseen) >= world_of.UNSEEN
    texts = [str(world_of.record("scenes", "train", 0, i)) for i in range(1500)]
    assert not [
        text for text in texts for colour, shape in world_of.UNSEEN if f"{colour} {shape}" in text
    ]


@pytest.mark.parametrize("split", ["new", "unseen"])
def test_longer_wins_is_near_chance_on_the_held_out_sets(split):
    longer = shorter = 0
    for i in range(3000):
        record = world_of.record("benchmark", split, 0, i)
        texts = record.get("responses") or [
            record[key][0]["content"] for key in ("chosen", "rejected")
        ]
        for better in range(len(texts)):
            for worse in range(better + 1, len(texts)):
                longer += len(texts[better]) > len(texts[worse])
                shorter += len(texts[better]) < len(texts[worse])
    assert 0.45 < longer / (longer + shorter) < 0.55


def test_the_flawed_sources_have_their_flaws():
    def longer_share(source):
        pairs = [
            r
            for r in (world_of.record(source, "train", 0, i) for i in range(2000))
            if "chosen" in r
        ]
        lengths = [
            (len(r["chosen"][0]["content"]), len(r["rejected"][0]["content"])) for r in pairs
        ]
        return sum(a > b for a, b in lengths) / sum(a != b for a, b in lengths)

    assert longer_share("wordy") > 0.7 > 0.6 > longer_share("scenes")
    noisy = [
        r
        for r in (world_of.record("noisy", "train", 0, i) for i in range(2000))
        if r["category"] == "yes_no"
    ]
    wrong = np.mean([not r["chosen"][0]["content"].startswith(r["answer"]) for r in noisy])
    assert 0.18 < wrong < 0.32


def test_the_grade_of_a_description_is_1_for_the_truth_and_falls_with_errors():
    for i in range(200):
        rng = world_of.random.Random(i)
        cells = world_of.draw_cells(rng, "new")
        truth = {
            place: list(thing) for place, thing in world_of.places(cells).items() if thing
        }  # as JSON gives it back
        grades = [
            world_of.grade(world_of.describe(cells, errors, rng, "new"), truth)
            for errors in (0, 1, 2)
        ]
        assert grades[0] == 1 > grades[1] and grades[2] < 1
    assert world_of.grade("", truth) == world_of.grade("I see nothing at all.", truth) == 0
    fact = "at row 1 column 2 a red circle"
    assert world_of.grade(
        f"{fact}, {fact}", {"row 1 column 2": ["red", "circle"]}
    ) == pytest.approx(2 / 3)  # saying it twice does not help


def test_max_pixels_bounds_what_an_image_costs(tmp_path):
    (tmp_path / "large.png").write_bytes(picture(1400, 1400))
    file = write_jsonl(tmp_path / "one.jsonl", [{**PAIR, "images": ["large.png"]}])
    for limit, tokens in ((28 * 28 * 100, 100), (28 * 28 * 16, 16)):
        torchrun(
            "01_data.py",
            "--source",
            file,
            "--out",
            tmp_path / str(limit),
            "--max_pixels",
            limit,
            "--holdout",
            0,
            ranks=1,
        )
        (comparison,) = read_all(tmp_path / str(limit) / "one")
        processors = data.load_processors(TINY)
        assert (comparison.prompt == processors.image_token).sum() == tokens
