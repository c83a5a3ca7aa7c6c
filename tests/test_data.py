"""Stage 1 loses nothing, its result does not depend on the ranks, and the world is as described."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assistant, picture, prepare_here, stages, torchrun, write_jsonl

data = stages.data
world_of = data.embedded_world()
QUESTION = [{"role": "user", "content": "What is it?"}]
PAIR = {
    "prompt": QUESTION,
    "chosen": [assistant("A circle.")],
    "rejected": [assistant("A square.")],
}
SEE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
VIDEO = [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "video"}]}]

GOOD = [
    PAIR,
    {**PAIR, "prompt": "a plain string"},
    {**PAIR, "prompt": SEE, "images": ["good.png"], "id": 7, "category": "c", "unknown": [1]},
    {**PAIR, "images": ["good.png"]},  # an image without a place comes first
    {"prompt": QUESTION, "responses": ["one", "two", [assistant("three")]], "ranks": [1, 2, 2]},
    {"prompt": QUESTION, "answer": "a circle"},
]
BAD = {  # reason: line
    "not a line of JSON": '{"prompt": [',
    "not a JSON object": "[1, 2]",
    "not a line of JSON: Expecting value": "",
    "missing field: prompt": {"chosen": "a", "rejected": "b"},
    "missing field: rejected": {"prompt": "q", "chosen": "a"},
    "missing field: chosen and rejected": {"prompt": "q"},
    "unreadable image: none.png": {**PAIR, "prompt": SEE, "images": ["none.png"]},
    "unreadable image: ": {**PAIR, "prompt": SEE, "images": ["cut.png"]},
    "unreadable image: none of PNG": {**PAIR, "prompt": SEE, "images": ["page.png"]},
    "images: 0 given, but the prompt has 1": {**PAIR, "prompt": SEE},
    "images: 2 given, but the prompt has 1": {**PAIR, "prompt": SEE, "images": ["good.png"] * 2},
    "chosen and rejected are identical": {**PAIR, "rejected": PAIR["chosen"]},
    "rejected: empty response": {**PAIR, "rejected": [assistant(" \n")]},
    "chosen[0].role: 'user', not one of": {**PAIR, "chosen": [{"role": "user", "content": "x"}]},
    "prompt: ends with the role 'assistant'": {**PAIR, "prompt": [*QUESTION, assistant("x")]},
    "prompt[0].content[1].type: 'video', not one of": {**PAIR, "prompt": VIDEO},
    "not two lists of the same length": {"prompt": "q", "responses": ["a", "b"], "ranks": [1]},
    "ranks: all equal": {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]},
    "tokens, more than --max_length": {**PAIR, "chosen": [assistant("x " * 3000)]},
}


def hashes_of_files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def read_all(folder) -> list:
    comparisons = data.Comparisons(str(folder))
    return [comparisons[i] for i in range(len(comparisons))]


def test_every_unusable_line_is_reported_with_its_reason(tmp_path):
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "cut.png").write_bytes(picture()[:100])
    (tmp_path / "page.png").write_text("<html>")
    lines = []
    for bad, good in zip(BAD.values(), GOOD + [PAIR] * len(BAD)):
        lines += [bad, good]
    file = write_jsonl(tmp_path / "mixed.jsonl", lines)
    options = ["--source", file, "--out", tmp_path / "out", "--holdout", 0, "--shard_size", 4]
    printed = torchrun("01_data.py", *options, ranks=2).stdout

    folder = tmp_path / "out/mixed"
    rejected = [json.loads(line) for line in open(folder / "rejected.jsonl")]
    assert [line["line"] for line in rejected] == list(range(1, 2 * len(BAD), 2))
    for line, reason in zip(rejected, BAD):
        assert reason in line["reason"] and line["file"] == str(file), line
    kept = read_all(folder)
    info = json.loads((folder / "dataset.json").read_text())
    assert info["read"] == len(lines) == len(kept) + len(rejected)
    assert f"read {len(lines)} = kept {len(kept)} + rejected {len(rejected)}" in printed
    assert [len(comparison.responses) for comparison in kept[:6]] == [2, 2, 2, 2, 3, 0]
    assert kept[4].ranks == [1, 2, 2]
    assert kept[2].record["id"] == 7 and kept[2].images == kept[3].images == [picture()]
    assert np.array_equal(kept[2].prompt, kept[3].prompt)


def test_the_result_does_not_depend_on_the_number_of_ranks(world, tmp_path):
    options = ["--out", tmp_path, "--world_size", 0.05, "--shard_size", 64]
    torchrun("01_data.py", *options, ranks=3)
    for folder in (world / "data").iterdir():
        assert hashes_of_files(folder) == hashes_of_files(tmp_path / folder.name), folder.name


def test_pictures_that_were_mended_are_read_when_a_finished_set_is_prepared_again(tmp_path):
    file = write_jsonl(tmp_path / "pairs.jsonl", [{**PAIR, "images": ["late.png"]}])
    options = ["--source", file, "--out", tmp_path, "--holdout", 0]
    assert "kept 0 + rejected 1" in torchrun("01_data.py", *options, ranks=1).stdout
    (tmp_path / "late.png").write_bytes(picture())
    assert "kept 1 + rejected 0" in torchrun("01_data.py", *options, ranks=1).stdout


def test_no_prompt_is_both_in_training_and_in_its_holdout(world):
    def prompts(name: str) -> set:
        return {(c.prompt.tobytes(), *c.images) for c in read_all(world / "data" / name)}

    train, held_out = prompts("train"), prompts("train_holdout")
    assert train and held_out and not train & held_out


def test_what_an_earlier_preparation_held_out_does_not_stay_beside_the_set(tmp_path):
    lines = lines_of_pairs(["AB"], "Is it red?") + lines_of_pairs(["AB"], "Is it blue?")
    source = [str(write_jsonl(tmp_path / "pairs.jsonl", lines))]
    for holdout in (0.999, 0):
        prepare_here(source=source, out=str(tmp_path), holdout=holdout)
        assert (tmp_path / "pairs_holdout/dataset.json").exists() == (holdout > 0)
    assert len(data.Comparisons(str(tmp_path / "pairs"))) == 2
    prepare_here(source=source, out=str(tmp_path), name="pairs_holdout")  # a set of one's own
    prepare_here(source=source, out=str(tmp_path))
    assert len(data.Comparisons(str(tmp_path / "pairs_holdout"))) == 2


def test_an_image_that_several_comparisons_share_is_stored_once(tmp_path, processors):
    image = picture(280, 280)
    comparisons = []
    for i in range(10):
        record = {**PAIR, "prompt": f"Question {i}", "images": [image]}
        comparisons.append(data.encode_record(record, processors, 4096))
    data.write_shard(tmp_path / "shard", comparisons)
    assert data.Shard(tmp_path / "shard")[3].images == [image]
    assert (tmp_path / "shard").stat().st_size < 2 * len(image) + 20_000


def test_shards_hold_exactly_the_comparisons_that_were_written(tmp_path, processors, comparisons):
    data.write_shard(tmp_path / "shard", comparisons)
    shard = data.Shard(tmp_path / "shard")
    for i, comparison in enumerate(comparisons):
        stored = shard[i]
        assert np.array_equal(stored.prompt, comparison.prompt)
        assert all(map(np.array_equal, stored.responses, comparison.responses))
        assert np.array_equal(stored.grids, comparison.grids)
        assert stored.grids.dtype == stored.prompt.dtype == np.int32
        assert stored.ranks == comparison.ranks and stored.images == comparison.images


def test_shards_of_another_tokenizer_are_refused(world):
    with pytest.raises(data.UserError, match="another tokenizer"):
        data.Comparisons(str(world / "data/train"), expect="0123456789abcdef")


def test_a_data_set_can_be_read_by_a_loader_process_that_does_not_fork(world):
    comparisons = data.Comparisons(str(world / "data/train"))
    here = comparisons[0]  # opens a shard
    first = torch.utils.data.Subset(comparisons, [0])
    options = {"batch_size": None, "num_workers": 1, "multiprocessing_context": "spawn"}
    (there,) = torch.utils.data.DataLoader(first, **options)
    assert np.array_equal(here.prompt, there.prompt) and here.images == there.images


def test_lengths_known_for_planning_are_the_rows_lengths(world, processors):
    comparisons = data.Comparisons(str(world / "data/train"))
    tokens, patches = comparisons.sizes()
    for i in (0, 1, len(comparisons) - 1):
        row = stages.model.pack([comparisons[i]], processors)
        assert tokens[i] == row.input_ids.shape[1]
        assert patches[i] == (len(row.images.pixel_values) if row.images else 0)


def test_without_images_nothing_is_left_of_them_in_either_form_of_a_prompt(processors):
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    records = [
        {"prompt": "How many?", "chosen": "2", "rejected": "3"},
        {"prompt": "<image>How many?", "images": ["1.png"], "chosen": "2", "rejected": "3"},
        {"prompt": [{"role": "user", "content": parts}], "chosen": "2", "rejected": "3"},
    ]
    made = [data.encode_record(each, processors, 99, without_images=True) for each in records]
    assert made[0].prompt.tolist() == made[1].prompt.tolist() == made[2].prompt.tolist()


def test_max_pixels_bounds_the_cost_of_an_image(tmp_path, processors):
    (tmp_path / "large.png").write_bytes(picture(1400, 1400))
    file = write_jsonl(tmp_path / "one.jsonl", [{**PAIR, "images": ["large.png"]}])
    for tokens in (100, 16):
        out = tmp_path / str(tokens)
        options = ["--source", file, "--out", out, "--max_pixels", 28 * 28 * tokens]
        torchrun("01_data.py", *options, "--holdout", 0, ranks=1)
        (comparison,) = read_all(out / "one")
        assert (comparison.prompt == processors.image_token).sum() == tokens


# ---- the embedded world


def records(source: str, split: str, count: int, seed: int = 0) -> list[dict]:
    return [world_of.record(source, split, seed, i) for i in range(count)]


def test_the_world_is_a_function_of_its_seed():
    assert records("scenes", "train", 50, 3) == records("scenes", "train", 50, 3)
    assert records("scenes", "train", 50, 3) != records("scenes", "train", 50, 4)


def test_held_out_scenes_and_combinations_never_occur_in_training():
    def scenes(split: str) -> list:
        seeds = (f"{split}{i}" for i in range(1500))
        return [world_of.draw_scene(world_of.random.Random(seed), split) for seed in seeds]

    def things(scenes: list) -> set:
        return {thing for scene in scenes for thing in scene.things()}

    train, new, unseen = scenes("train"), scenes("new"), scenes("unseen")
    assert not set(map(repr, train)) & set(map(repr, new + unseen))
    assert not things(train + new) & world_of.UNSEEN and things(unseen) >= world_of.UNSEEN
    text = str(records("scenes", "train", 1500))
    assert not [thing for thing in world_of.UNSEEN if " ".join(thing) in text]


@pytest.mark.parametrize("split", ["new", "unseen"])
def test_longer_wins_is_near_chance_on_the_held_out_sets(split):
    longer = shorter = 0
    for record in records("benchmark", split, 3000):
        texts = record.get("responses")
        if not texts:
            texts = [record[key][0]["content"] for key in ("chosen", "rejected")]
        for better in range(len(texts)):
            for worse in range(better + 1, len(texts)):
                longer += len(texts[better]) > len(texts[worse])
                shorter += len(texts[better]) < len(texts[worse])
    assert 0.45 < longer / (longer + shorter) < 0.55


def test_the_flawed_sources_have_their_flaws():
    def longer_share(source: str) -> float:
        longer = shorter = 0
        for record in records(source, "train", 2000):
            if "chosen" in record:
                chosen, rejected = (
                    len(record[key][0]["content"]) for key in ("chosen", "rejected")
                )
                longer += chosen > rejected
                shorter += chosen < rejected
        return longer / (longer + shorter)

    assert longer_share("wordy") > 0.7 > 0.6 > longer_share("scenes")
    noisy = [r for r in records("noisy", "train", 2000) if r.get("answer") in ("Yes", "No")]
    wrong = [not record["chosen"][0]["content"].startswith(record["answer"]) for record in noisy]
    assert 0.18 < np.mean(wrong) < 0.32


# ---- pairs of one prompt


def lines_of_pairs(pairs: list[str], prompt: str = "Is it red?") -> list[dict]:
    """Lines whose better and worse answers are the letters of each pair."""
    return [
        {"prompt": prompt, "chosen": f"It is {a}.", "rejected": f"It is {b}."} for a, b in pairs
    ]


JOINED = {  # pairs in the order of their lines: ranks of A, B, C, ... or None where they stay pairs
    ("AB", "AC", "AD", "BC", "BD", "CD"): [1, 2, 3, 4],
    ("CD", "AD", "BD", "AB", "AC", "BC"): [1, 2, 3, 4],
    ("AB", "AC"): [1, 2, 2],
    ("AC", "BC"): [1, 1, 3],
    ("AB", "BC"): None,  # A against C is not there
    ("AB", "BC", "CA"): None,  # a circle
    ("AB", "AB"): None,  # twice the same would count once
    ("AB", "BA"): None,
}


@pytest.mark.parametrize("pairs", JOINED)
def test_the_pairs_of_one_prompt_are_joined_if_they_are_all_pairs_of_a_ranking(pairs, tmp_path):
    lines = lines_of_pairs(pairs) + lines_of_pairs(["AB"], "Is it blue?")
    source = [str(write_jsonl(tmp_path / "pairs.jsonl", lines))]
    prepare_here(source=source, out=str(tmp_path), holdout=1e-9)
    comparisons = data.Comparisons(str(tmp_path / "pairs"))
    assert comparisons.weights().sum() == len(lines) and comparisons[-1].weight == 1
    if JOINED[pairs] is None:
        assert len(comparisons) == len(lines)
        return
    joined, _ = comparisons
    decode = comparisons_text(joined)
    assert [rank for _, rank in sorted(zip(decode, joined.ranks))] == JOINED[pairs]
    assert joined.weight == len(pairs) and len(joined.record["characters"]) == len(joined.ranks)
    for apart in ({"join": False, "holdout": 1e-9}, {}):  # and as a benchmark, --holdout 0
        prepare_here(source=source, out=str(tmp_path), **apart)
        assert len(data.Comparisons(str(tmp_path / "pairs"))) == len(lines)


def comparisons_text(comparison) -> list[str]:
    tokenizer = data.load_processors(TINY).tokenizer
    return [tokenizer.decode(response[:-1]) for response in comparison.responses]


def test_pairs_with_critiques_of_their_own_or_too_many_tokens_are_not_joined(tmp_path, monkeypatch):
    lines = lines_of_pairs(["AB", "AC", "BC"])
    monkeypatch.setattr(data, "JOINED_TOKENS", 20)
    source = [str(write_jsonl(tmp_path / "pairs.jsonl", lines))]
    prepare_here(source=source, out=str(tmp_path), holdout=1e-9)
    assert len(data.Comparisons(str(tmp_path / "pairs"))) == 3
    monkeypatch.undo()
    for critiques, count in ((["Right.", "Wrong."], 3), (["It is.", "It is."], 1)):
        with_critiques = [line | {"critiques": critiques} for line in lines]
        source = [str(write_jsonl(tmp_path / "pairs.jsonl", with_critiques))]
        prepare_here(source=source, out=str(tmp_path), holdout=1e-9)
        assert len(data.Comparisons(str(tmp_path / "pairs"))) == count


def test_the_gradient_of_a_joined_comparison_is_that_of_its_pairs(reward, tmp_path):
    pairs = lines_of_pairs(["AB", "AC", "AD", "BC", "BD", "CD"])
    others = lines_of_pairs(["XY"], "Is it blue?")
    gradients = []
    for join in (False, True):
        source = str(write_jsonl(tmp_path / f"{join}.jsonl", pairs + others))
        prepare_here(source=[source], out=str(tmp_path), join=join, holdout=1e-9)
        comparisons = data.Comparisons(str(tmp_path / str(join)))
        order = [list(range(len(comparisons)))]
        sizes = *comparisons.sizes(), 8192, 0, 1, comparisons.weights()
        (micro,) = stages.train.plan(order, *sizes)
        _, row, of_row = stages.train.pack_micro_batch(micro, comparisons, reward.processors)
        reward.zero_grad()
        loss = stages.train.ranking_loss(reward(row), of_row)
        (loss / micro.step_weight).backward()
        gradients.append([p.grad.clone() for p in reward.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    reward.zero_grad()


def test_the_grade_of_a_description_is_1_for_the_truth_and_falls_with_errors():
    for i in range(200):
        rng = world_of.random.Random(i)
        scene = world_of.draw_scene(rng, "new")
        places = scene.places().items()
        truth = {place: list(thing) for place, thing in places if thing}  # as JSON gives it back
        grades = []
        for errors in (0, 1, 2):
            text = world_of.describe(scene, errors, rng)
            grades.append(world_of.grade(text, truth))
        assert grades[0] == 1 > grades[1] and grades[2] < 1
    assert world_of.grade("", truth) == world_of.grade("I see nothing at all.", truth) == 0
    fact = "at row 1 column 2 a red circle"  # saying it twice does not help
    grade = world_of.grade(f"{fact}, {fact}", {"row 1 column 2": ["red", "circle"]})
    assert grade == pytest.approx(2 / 3)
