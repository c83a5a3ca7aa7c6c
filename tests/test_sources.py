"""Published training sets, read as they are published: every field where it belongs, every row kept or rejected with a
reason; and preparation that was interrupted goes on. The rows are made up, in the sets' schemas."""

import base64
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, picture, stages, torchrun, write_jsonl

data = stages.data
PICTURES = [picture(56, 56, seed) for seed in range(4)]


def read(source, processors) -> tuple[list, list[str]]:
    """What 01 makes of a source: (record, comparison) of every row that is kept, and the reasons of the others."""
    kept, reasons = [], []
    for file, _, row in data.open_source(str(source)):
        try:
            record = row()
            kept.append((record, data.encode_record(record, processors, 4096, Path(file).parent)))
        except data.Unusable as error:
            reasons.append(str(error))
    return kept, reasons


def shown(comparison, processors) -> str:
    """A comparison as text: the prompt with one <image> for each picture, then the responses with their ranks."""
    decode = processors.tokenizer.decode
    prompt = re.sub(
        r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>",
        "<image>",
        decode(comparison.prompt),
    )
    prompt = re.sub(r"<\|im_(start|end)\|>", "", prompt).strip().removesuffix("assistant").strip()
    answers = [
        f"{rank}: {decode(ids)[:-10]}" for rank, ids in zip(comparison.ranks, comparison.responses)
    ]
    return " | ".join([prompt.replace("\n", " / "), *answers])


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Each of these writes a set into a folder as it is published and returns how many rows of it can be used.


def write_rlaif_v(folder: Path) -> int:
    row = {
        "ds_name": "RLAIF-V",
        "image": {"bytes": PICTURES[0], "path": "0.png"},
        "question": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "origin_dataset": "vqav2",
        "origin_split": '{"model": "x", "type": "question answering"}',
        "idx": "7",
        "image_path": "vqa/0.png",
    }
    write_parquet(
        folder / "RLAIF-V-Dataset_000.parquet",
        [row, {**row, "rejected": "A cat."}, {**row, "question": "And?"}],
    )
    broken = {**row, "image": {"bytes": PICTURES[0][:90], "path": None}}
    write_parquet(
        folder / "RLAIF-V-Dataset_001.parquet",
        [{**row, "image": {"bytes": PICTURES[1], "path": None}}, broken],
    )
    return 3


def write_mmpr(folder: Path) -> int:
    meta = {
        "one": {
            "root": "MMPR-v1.2/images/one",
            "annotation": "MMPR-v1.2/annotations/one.jsonl",
            "length": 3,
        },
        "two": {
            "root": "MMPR-v1.2/images/two",
            "annotation": "MMPR-v1.2/annotations/two.jsonl",
            "length": 2,
        },
    }
    write(folder / "meta.json", json.dumps(meta).encode())
    for i, place in enumerate(("one/a.png", "two/deep/b.png", "two/c.png")):
        write(folder / "images" / place, PICTURES[i])
    row = {
        "image": "a.png",
        "question": "<image>\nHow many?",
        "chosen": "Two.",
        "rejected": "Three.",
    }
    (folder / "annotations").mkdir()
    write_jsonl(
        folder / "annotations/one.jsonl",
        [row, {**row, "image": "none.png"}, {**row, "question": "Unmarked?"}],
    )
    several = {**row, "image": ["deep/b.png", "c.png"], "question": "Is <image> as <image>?"}
    write_jsonl(
        folder / "annotations/two.jsonl",
        [several, {"image": "c.png", "question": "q", "chosen": "c"}],
    )
    return 3


def write_mm_rlhf(folder: Path) -> int:
    write(folder / "mcq/1.png", PICTURES[0])
    for i in range(1, 13):
        write(folder / f"video/clip/{i}.png", picture(28, 28, i))
    row = {"prompt": "What happens?", "chosen": "It moves.", "rejected": "Nothing."}
    lines = [
        {**row, "image": "mcq/1.png", "chosen_reason": "right", "rejected_reason": "wrong"},
        {**row, "video": "video/clip"},
        {**row, "video": "video/none"},
        row,
    ]
    write_jsonl(folder / "dpo_pairs.jsonl", lines)
    write_jsonl(folder / "data.jsonl", [{"prompt": "not pairs"}])
    return 2


def write_r1_reward(folder: Path) -> int:
    judge = "Compare.\n###### [Question]:\nWhich?  \n\n"
    judge += "###### [Response 1]:\nThe left.  \n\n###### [Response 2]:\nThe right."
    ending = "  \n\n###### **Output Format (strictly follow):**  \n<think>...</think><answer>1/2</answer>"
    content = [
        {"type": "text", "text": judge + ending},
        {"type": "image", "image": "/their/disk/0.png"},
    ]
    large = picture(600, 600)
    row = {
        "question": "Which?",
        "message": json.dumps([{"role": "user", "content": content}]),
        "answer": ["<answer>2</answer>"],
        "image": base64.b64encode(large).decode(),
    }
    bare = [{"type": "text", "text": judge}, content[1]]
    rows = [
        row,
        {
            **row,
            "answer": ["<answer>1</answer>"],
            "message": json.dumps([{"role": "user", "content": bare}]),
        },
        {**row, "answer": ["<answer>tie</answer>"]},
        {
            **row,
            "message": '[{"role": "user", "content": [{"type": "text", "text": "one response"}]}]',
        },
        {**row, "image": ""},
        {**row, "message": "no JSON"},
    ]
    write_parquet(folder / "data/train-00000-of-00001.parquet", rows)
    return 2


def write_llama_factory(folder: Path) -> int:
    write(folder / "images/0.png", PICTURES[0])
    chosen, rejected = {"from": "gpt", "value": "Good."}, {"from": "gpt", "value": "Bad."}
    pair = {"chosen": chosen, "rejected": rejected}
    said = [
        {"from": "human", "value": "Hi <image>"},
        {"from": "gpt", "value": "Yes?"},
        {"from": "human", "value": "And?"},
    ]
    alpaca = {"instruction": "Add", "input": "2 + 3", "chosen": "5", "rejected": "6"}
    rows = [
        {"conversations": [{"from": "human", "value": "Hello"}], **pair},
        {"conversations": said, **pair, "images": ["images/0.png"], "system": "Be brief."},
        alpaca,
        {**alpaca, "input": "", "history": [["Hi", "Hello"]], "system": "Count."},
        {"conversations": said, **pair},  # its picture is missing
        {"conversations": [{"from": "observation", "value": "{}"}], **pair},
        {**alpaca, "tools": "[{}]"},
        "no row",
    ]
    write(folder / "dpo.json", json.dumps(rows).encode())
    return 4


def write_mmif(folder: Path) -> int:
    write(folder / "cc3m/0.png", PICTURES[0])
    turn = {"from": "human", "value": "<image>Name it in one word."}
    answers = {
        "chosen": {"from": "gpt", "value": "Cat."},
        "rejected": {"from": "gpt", "value": "It is a cat."},
    }
    row = {"conversations": [turn], **answers, "images": ["cc3m/0.png"]}
    write(
        folder / "v2/dpo/mmif.json", json.dumps([row, {**row, "images": ["cc3m/1.png"]}]).encode()
    )
    write(folder / "v2/sft/mmif.json", json.dumps([{"conversations": [turn]}]).encode())
    return 1


def write_omnialign_v_dpo(folder: Path) -> int:
    write(folder / "images/0.png", PICTURES[0])
    row = {
        "prompt": "Explain the chart.\n<image>",
        "chosen": "It grows.",
        "rejected": "No.",
        "image": "images/0.png",
    }
    for name in ("chart", "poster"):
        write_jsonl(
            folder / f"{name}.jsonl",
            [row, {**row, "image": ["images/0.png"]}, {**row, "image": "images/1.png"}],
        )
    return 4


def write_ultrafeedback(folder: Path) -> int:
    def row(*scores):
        keys = ("model", "response", "overall_score", "fine-grained_score", "critique")
        answers = [
            dict(zip(keys, ("m", f"Answer {i}.", score, 4.5, f"Critique {i}.")))
            for i, score in enumerate(scores)
        ]
        return {"source": "flan", "instruction": "Do it.", "completions": answers, "models": []}

    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "flan.jsonl", [row(7.0, 8.5, 7.0, 2.0), row(5, 5, 5), row(3), row()])
    write_jsonl(folder / "sharegpt.jsonl", [row(1, 9), row(4, None)])
    return 2


def write_shp(folder: Path) -> int:
    row = {
        "post_id": "p0",
        "domain": "askbaking_train",
        "history": "Why flat?",
        "human_ref_A": "Old soda.",
        "human_ref_B": "No idea.",
        "score_A": 9,
        "score_B": 3,
        "labels": 1,
        "score_ratio": 3.0,
    }
    rows = [
        row,
        {**row, "labels": 0, "post_id": "p1"},
        {**row, "score_ratio": 1.5},
        {**row, "labels": 2},
    ]
    rows += [{**row, "labels": True, "human_ref_B": f"No {i}."} for i in range(6)]
    for subject in ("askacademia", "askbaking"):
        (folder / subject).mkdir(parents=True)
    write_jsonl(
        folder / "askbaking/train.json", rows
    )  # the name ends in .json, but it is one object a line
    write_jsonl(folder / "askacademia/train.json", [{**row, "post_id": "p2"}])
    write_jsonl(folder / "askbaking/test.json", [row])
    return 7


def conversation_rows() -> list[dict]:
    """Two usable rows, and one whose conversations differ before the last turn."""
    ask = lambda text: {"role": "user", "content": text}
    say = lambda text: {"role": "assistant", "content": text}
    several = [{"role": "system", "content": "Be kind."}, ask("Hi"), say("Hello"), ask("Sum 2, 3")]
    pairs = [([ask("Sum 1, 1")],) * 2, (several,) * 2, ([ask("One?")], [ask("Two?")])]
    return [
        {"id": f"id-{i}", "chosen": [*before, say("Right.")], "rejected": [*other, say("Wrong.")]}
        for i, (before, other) in enumerate(pairs)
    ]


def write_tulu(folder: Path, *splits: str) -> int:
    rows = [{**row, "prompt": row["chosen"][0]["content"]} for row in conversation_rows()]
    for split in splits or ("train",):
        write_parquet(folder / f"data/{split}-00000-of-00001.parquet", rows)
    return 2 * len(splits or ("train",))


def write_olmo(folder: Path) -> int:
    write_parquet(folder / "data/train-00000-of-00001.parquet", conversation_rows())  # no prompt
    return 2


def write_swe_arena(folder: Path) -> int:
    def row(vote, *before):
        told = [*before, ["user", "Write a page."]]
        state = lambda answer: {
            "messages": [*told, ["assistant", answer]],
            "roles": ["user", "assistant"],
            "conv_id": "c",
        }
        return {
            "chat_session_id": "s",
            "instruction": "Write a page.",
            "models": {"model_A": "a", "model_B": "b"},
            "states": {"model_A": state("Page A."), "model_B": state("Page B.")},
            "feedback": {"vote_type": vote, "correctness": None},
        }

    differing = row("vote_model_A", ["user", "Hi"], ["assistant", "Hello"])
    differing["states"]["model_B"]["messages"] = [
        ["user", "Hi"],
        ["assistant", "Hey"],
        ["user", "Write a page."],
    ]
    votes = ("vote_model_A", "vote_model_B", "vote_tie", "vote_both_bad")
    write_parquet(folder / "data/train-00000-of-00001.parquet", [*map(row, votes), differing])
    return 2


def write_hh_rlhf(folder: Path) -> int:
    before = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Tell me."
    pairs = [
        (f"{before}\n\nAssistant: Gladly.\n\nIt is so.", f"{before}\n\nAssistant: No."),
        (f"{before}\n\nAssistant: Gladly.", "\n\nHuman: Other\n\nAssistant: No."),
        (f"{before}\n\nAssistant: Same.", f"{before}\n\nAssistant: Same."),
        (f"{before}\n\nAssistant: ", f"{before}\n\nAssistant: No."),
        ("no transcript", "at all"),
    ]
    lines = "".join(
        json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in pairs
    )
    for name in (
        "harmless-base/train",
        "harmless-base/test",
        "red-team-attempts/red_team_attempts",
    ):
        write(folder / f"{name}.jsonl.gz", gzip.compress(lines.encode()))
    return 1


def write_trl(folder: Path) -> int:
    ask, say = (
        [{"role": "user", "content": "Sky?"}],
        lambda text: [{"role": "assistant", "content": text}],
    )
    rows = [
        {"prompt": ask, "chosen": say("Blue."), "rejected": say("Green.")},
        {"chosen": ask + say("Blue."), "rejected": ask + say("Green.")},
        {"prompt": "The sky is", "chosen": "blue.", "rejected": "black."},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"prompt": ask, "chosen": say("Blue."), "rejected": say("Green."), "image": "0.png"},
        {"chosen": "Blue.", "rejected": "Green."},
        {"chosen": "The sky is ", "rejected": "The sky is green."},
        {"chosen": ask + say("Blue."), "rejected": [*ask, *ask, *say("Green.")]},
    ]
    write(folder / "0.png", PICTURES[0])
    write_jsonl(folder / "train.jsonl", rows)
    return 5


SETS = {
    "rlaif-v": (write_rlaif_v, 5),
    "mmpr": (write_mmpr, 5),
    "mm-rlhf": (write_mm_rlhf, 4),
    "r1-reward": (write_r1_reward, 6),
    "mmif": (write_mmif, 2),
    "omnialign-v-dpo": (write_omnialign_v_dpo, 6),
    "ultrafeedback-all": (write_ultrafeedback, 6),
    "ultrafeedback-hard": (write_ultrafeedback, 6),
    "shp": (write_shp, 11),
    "tulu-3-if": (write_tulu, 3),
    "tulu-3-ultrafeedback": (write_tulu, 3),
    "wildchat": (
        lambda folder: write_tulu(folder, "wildchat_if", "wildchat_reused_on_policy_70b"),
        6,
    ),
    "olmo-2": (write_olmo, 3),
    "swe-arena": (write_swe_arena, 5),
    "hh-rlhf": (write_hh_rlhf, 5),
    "llama-factory": (write_llama_factory, 8),
    "trl": (write_trl, 8),
}


@pytest.mark.parametrize("name", SETS)
def test_every_row_of_a_published_set_is_kept_or_rejected_with_a_reason(name, tmp_path, processors):
    write_set, rows = SETS[name]
    usable = write_set(tmp_path / "set")
    kept, reasons = read(f"{name}:{tmp_path / 'set'}", processors)
    assert (len(kept), len(kept) + len(reasons)) == (usable, rows), reasons
    assert all(reasons) and all(
        record["source"] == comparison.record["source"] == name for record, comparison in kept
    )


def test_every_published_training_set_is_tested():
    questions = {"vstar", "arxivqa", "thinklite-vl"}  # in test_questions.py
    assert SETS.keys() | {"jsonl", "world"} | questions >= {
        name for name, each in data.SOURCES.items() if not each.metric
    }


@pytest.mark.parametrize(
    "name, expected, reasons",
    [
        (
            "rlaif-v",
            [
                f"<image>{question}? | 1: A cat. | 2: A dog."
                for question in ("What is it", "And", "What is it")
            ],
            ["chosen and rejected are identical", "unreadable image"],
        ),
        (
            "mmpr",
            [
                "<image> / How many? | 1: Two. | 2: Three.",
                "<image>Unmarked? | 1: Two. | 2: Three.",
                "Is <image> as <image>? | 1: Two. | 2: Three.",
            ],
            ["unreadable image: ", "missing field: rejected"],
        ),
        (
            "mm-rlhf",
            [
                "<image>What happens? | 1: It moves. | 2: Nothing.",
                "<image>" * 6 + "What happens? | 1: It moves. | 2: Nothing.",
            ],
            ["unreadable image: video/none", "missing field: video"],
        ),
        (
            "r1-reward",
            [
                "<image>Which? | 2: The left. | 1: The right.",
                "<image>Which? | 1: The left. | 2: The right.",
            ],
            [
                "answer: '<answer>tie</answer>'",
                "message without [Response 1] and [Response 2]",
                "image: empty",
                "not a row of this data set: JSONDecodeError",
            ],
        ),
        (
            "llama-factory",
            [
                "user / Hello | 1: Good. | 2: Bad.",
                "system / Be brief. / user / Hi <image> / assistant / Yes? / user / And? | 1: Good. | 2: Bad.",
                "user / Add / 2 + 3 | 1: 5 | 2: 6",
                "system / Count. / user / Hi / assistant / Hello / user / Add | 1: 5 | 2: 6",
            ],
            [
                "images: 0 given",
                "a message without the role",
                "tools: not supported",
                "not a row of this data set",
            ],
        ),
        ("mmif", ["<image>Name it in one word. | 1: Cat. | 2: It is a cat."], ["unreadable image"]),
        (
            "omnialign-v-dpo",
            ["<image>Explain the chart. | 1: It grows. | 2: No."] * 4,
            ["unreadable image"] * 2,
        ),
        (
            "ultrafeedback-all",
            [
                "user / Do it. | 2: Answer 0. | 1: Answer 1. | 2: Answer 2. | 4: Answer 3.",
                "user / Do it. | 2: Answer 0. | 1: Answer 1.",
            ],
            [
                "ranks: all equal",
                "at least two responses",
                "at least two responses",
                "not a row of this data set: TypeError",
            ],
        ),
        (
            "ultrafeedback-hard",
            [
                "user / Do it. | 1: Answer 1. | 4: Answer 3.",
                "user / Do it. | 1: Answer 1. | 2: Answer 0.",
            ],
            [
                "ranks: all equal",
                "ranks: all equal",
                "not a row of this data set: ValueError",
                "TypeError",
            ],
        ),
        (
            "shp",
            ["Why flat? | 1: Old soda. | 2: No idea."] * 2
            + ["Why flat? | 2: Old soda. | 1: No idea."]
            + [f"Why flat? | 1: Old soda. | 2: No {i}." for i in range(4)],
            [
                "score_ratio below 2",
                "2 does not say which of two is better",
                *["more than 5 pairs of this post"] * 2,
            ],
        ),
        (
            "tulu-3-if",
            [
                "user / Sum 1, 1 | 1: Right. | 2: Wrong.",
                "system / Be kind. / user / Hi / assistant / Hello / user / Sum 2, 3 | 1: Right. | 2: Wrong.",
            ],
            ["do not share everything up to the last assistant turn"],
        ),
        (
            "swe-arena",
            [
                "user / Write a page. | 1: Page A. | 2: Page B.",
                "user / Write a page. | 1: Page B. | 2: Page A.",
            ],
            [
                "no better response: vote_tie",
                "no better response: vote_both_bad",
                "do not share everything",
            ],
        ),
        (
            "hh-rlhf",
            ["user / Hi / assistant / Hello! / user / Tell me. | 1: Gladly.\n\nIt is so. | 2: No."],
            ["do not share everything", "identical", "chosen: empty response", "no transcript"],
        ),
        (
            "trl",
            ["user / Sky? | 1: Blue. | 2: Green."] * 2
            + ["user / The sky is | 1: blue. | 2: black."] * 2
            + ["<image>Sky? | 1: Blue. | 2: Green."],
            ["begin with different words", "chosen: empty response", "do not share everything"],
        ),
    ],
)
def test_every_field_of_a_published_set_is_read_where_it_belongs(
    name, expected, reasons, tmp_path, processors
):
    SETS[name][0](tmp_path)
    kept, rejected = read(f"{name}:{tmp_path}", processors)
    texts = [shown(comparison, processors) for _, comparison in kept]
    for text, end in zip(texts, expected):  # some templates begin with a system turn
        assert text.endswith(end), text
    assert [reason for reason, part in zip(rejected, reasons) if part not in reason] == [], rejected
    assert (len(texts), len(rejected)) == (len(expected), len(reasons))


def test_pictures_and_what_else_a_set_says_are_carried(tmp_path, processors):
    for name in ("rlaif-v", "mmpr", "mm-rlhf", "r1-reward", "ultrafeedback-hard"):
        SETS[name][0](tmp_path / name)
    (record, first), (_, _), (_, third) = read(f"rlaif-v:{tmp_path / 'rlaif-v'}", processors)[0]
    assert first.images == [PICTURES[0]] and third.images == [PICTURES[1]]
    assert first.record["id"] == "7" and first.record["category"] == "vqav2"
    comparisons = [comparison for _, comparison in read(f"mmpr:{tmp_path / 'mmpr'}", processors)[0]]
    assert [comparison.images for comparison in comparisons] == [
        [PICTURES[0]],
        [PICTURES[0]],
        PICTURES[1:3],
    ]
    (_, still), (_, video) = read(f"mm-rlhf:{tmp_path / 'mm-rlhf'}", processors)[0]
    assert still.record["critiques"] == ["right", "wrong"] and still.record["category"] == "mcq"
    assert video.images == [picture(28, 28, i) for i in (1, 2, 4, 5, 7, 8, 10, 12)]  # 10 after 9
    assert read(f"r1-reward:{tmp_path / 'r1-reward'}", processors)[0][0][1].images == [
        picture(600, 600)
    ]
    pair = read(f"ultrafeedback-hard:{tmp_path / 'ultrafeedback-hard'}", processors)[0][0][1]
    assert (
        pair.record["critiques"] == ["Critique 1.", "Critique 3."]
        and pair.record["category"] == "flan"
    )


def test_a_single_file_a_pattern_and_parquet_of_the_own_form_are_read_too(tmp_path, processors):
    write_hh_rlhf(tmp_path / "hh")
    write_tulu(tmp_path / "wildchat", "wildchat_if", "wildchat_unused")
    assert len(read(f"hh-rlhf:{tmp_path / 'hh/harmless-base/test.jsonl.gz'}", processors)[0]) == 1
    assert len(read(f"wildchat:{tmp_path / 'wildchat/data/wildchat_if-*'}", processors)[0]) == 2
    own = {
        "prompt": "Q",
        "chosen": "A",
        "rejected": "B",
        "images": [{"bytes": PICTURES[0], "path": None}],
    }
    kept, _ = read(write_parquet(tmp_path / "own.parquet", [own] * 3), processors)
    assert [comparison.images for _, comparison in kept] == [
        [PICTURES[0]]
    ] * 3 and "source" not in kept[0][0]


def numbers(source) -> list[int]:
    return [line for _, line, _ in data.open_source(str(source))]


def test_a_limit_takes_so_many_rows_or_that_share_of_them(tmp_path):
    file = write_jsonl(
        tmp_path / "a@b.jsonl",
        [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(2000)],
    )
    assert len(numbers(file)) == 2000  # what follows this @ is no number
    assert (
        numbers(f"{file}@3") == numbers(f"trl:{file}@3") == [1, 2, 3]
        and len(numbers(f"{file}@9999")) == 2000
    )
    half = numbers(f"{file}@0.5")
    assert (
        930 < len(half) < 1070
        and half == numbers(f"trl:{file}@.5")
        and set(numbers(f"{file}@0.25")) < set(half)
    )
    assert data.split_source("mmpr:/x/MMPR-v1.2@0.1") == ("mmpr", "/x/MMPR-v1.2", 0.1)
    assert data.split_source("my@home/pairs.jsonl") == (
        "jsonl",
        "my@home/pairs.jsonl",
        float("inf"),
    )
    assert data.split_source("rlaif-v@100") == ("rlaif-v", "", 100)


def test_a_data_set_is_called_after_its_first_file_or_folder_or_its_source(tmp_path):
    folder = write(tmp_path / "MMPR-v1.2/test.jsonl.gz", b"").parent
    sources = (
        f"mmpr:{folder}@9",
        f"hh-rlhf:{folder}/test.jsonl.gz",
        f"trl:{folder}/*",
        "rlaif-v@0.5",
        "trl:owner/of.this",
    )
    assert [*map(data.default_name, sources)] == ["MMPR-v1.2", "test", "trl", "rlaif-v", "of.this"]


def test_sources_add_up_to_one_data_set_on_any_number_of_ranks(tmp_path):
    kept = sum(SETS[name][0](tmp_path / name) for name in ("rlaif-v", "shp", "hh-rlhf"))
    sources = [f"--source={name}:{tmp_path / name}" for name in ("rlaif-v", "shp", "hh-rlhf")]
    contents = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        options = ["--out", out, "--name", "all", "--holdout", 0, "--shard_size", 4]
        printed = torchrun("01_data.py", *sources, *options, ranks=ranks).stdout
        assert f"read 21 = kept {kept} + rejected {21 - kept}" in printed
        contents.append({file.name: file.read_bytes() for file in (out / "all").iterdir()})
        rejected = [json.loads(line) for line in open(out / "all/rejected.jsonl")]
        assert len(rejected) == 21 - kept and all(
            line["reason"] and Path(line["file"]).exists() for line in rejected
        )
    assert contents[0] == contents[1]


def test_what_is_not_there_is_downloaded_or_ends_in_the_command_that_does_it(
    tmp_path, monkeypatch, processors
):
    done = torchrun(
        "01_data.py",
        "--source",
        "rlaif-v",
        "--out",
        tmp_path,
        ranks=1,
        check=False,
        HF_HUB_OFFLINE="1",
    )
    command = "hf download openbmb/RLAIF-V-Dataset --repo-type dataset --local-dir openbmb/RLAIF-V-Dataset"
    said = [line for line in done.stderr.splitlines() if line.startswith("01_data.py: ")]
    assert (
        done.returncode and command in said[0] and "UserError" not in done.stderr
    )  # a line, no traceback of ours
    with pytest.raises(data.UserError, match="nothing there. A source is a file or name:PATH"):
        read("no_such_file.jsonl", processors)

    asked = []
    write_rlaif_v(tmp_path / "snapshot")
    download = lambda repo, repo_type: asked.append((repo, repo_type)) or str(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(data.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(data.dist, "barrier", lambda: None)
    assert (
        len(read("rlaif-v@2", processors)[0]) == 1
        and len(read("jsonl:owner/name", processors)[0]) == 0
    )
    assert asked == [("openbmb/RLAIF-V-Dataset", "dataset"), ("owner/name", "dataset")]


def test_the_papers_mixture_is_found_by_hub_names_and_what_is_missing_is_named_at_once(tmp_path):
    hubs = {data.split_source(part)[0]: "" for part in data.MIXES["basereward"]}
    hubs = {name: data.SOURCES[name].hub for name in hubs}
    options = [
        "--mix",
        "basereward",
        "--mix_folder",
        tmp_path / "sets",
        "--out",
        tmp_path,
        "--holdout",
        0,
    ]
    missing = torchrun("01_data.py", *options, ranks=1, check=False).stderr
    for hub in hubs.values():
        assert (
            f"hf download {hub} --repo-type dataset --local-dir {tmp_path / 'sets' / hub}\n"
            in missing
        )
    kept = sum(SETS[name][0](tmp_path / "sets" / hub) for name, hub in hubs.items())
    read = sum(SETS[name][1] for name in hubs)
    kept, read = kept - 2, read - 3  # of WildChat's splits, one belongs to it
    assert (
        f"basereward: read {read} = kept {kept} + rejected {read - kept};"
        in torchrun("01_data.py", *options).stdout
    )


def kill_when(command: list, enough) -> None:
    """Starts a command of torchrun and kills it and its ranks with SIGKILL as soon as enough() is true."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not enough():
        time.sleep(0.002)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for each in [*map(int, ranks.read_text().split()), process.pid] if ranks.exists() else []:
        os.kill(each, signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_preparation_killed_in_the_middle_continues_and_gives_the_same_bytes(tmp_path):
    pairs = [
        {"prompt": f"Number {i}?", "chosen": "a " * 300, "rejected": "b" if i % 7 else ""}
        for i in range(4000)
    ]
    options = [
        "--source",
        write_jsonl(tmp_path / "pairs.jsonl", pairs),
        "--shard_size",
        8,
        "--holdout",
        0.1,
    ]
    torchrun("01_data.py", *options, "--out", tmp_path / "whole")
    out = tmp_path / "out/pairs"
    arguments = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "01_data.py",
    ]
    kill_when(
        [*arguments, *map(str, options), "--out", str(tmp_path / "out")],
        lambda: len([*out.glob(".chunk-*")]) > 20,
    )
    records, shards = sorted(out.glob(".chunk-*.json")), sorted(out.glob("shard-*"))
    assert 20 < len(records) < 500 and not (out / "dataset.json").exists()
    made = {
        file: file.stat().st_mtime_ns
        for file in shards
        if out / f".chunk-{file.name[6:11]}.json" in records
    }

    printed = torchrun("01_data.py", *options, "--out", tmp_path / "out", ranks=3).stdout
    assert "read 4000 = kept 3428" in printed
    assert {
        file: file.stat().st_mtime_ns for file in made
    } == made  # what was there was not made again
    for name in ("pairs", "pairs_holdout"):
        whole, continued = (
            {file.name: file.read_bytes() for file in (tmp_path / of / name).iterdir()}
            for of in ("whole", "out")
        )
        assert whole.keys() == continued.keys()
        assert [file for file in whole if whole[file] != continued[file]] == []


def test_what_was_made_with_other_settings_or_of_another_file_is_made_anew(tmp_path, processors):
    lines = [{"prompt": f"Number {i}?", "chosen": "a", "rejected": "b"} for i in range(20)]
    file = write_jsonl(tmp_path / "pairs.jsonl", lines)
    settings = data.Settings(source=[str(file)], shard_size=8)
    chunk = [*data.open_source(str(file))][:8]
    made_of = data.fingerprint(chunk, processors, settings, 0.1)
    assert made_of == data.fingerprint(chunk, processors, settings, 0.1)
    other = [
        data.fingerprint(chunk, processors, settings, 0.2),
        data.fingerprint(chunk[:7], processors, settings, 0.1),
    ]
    other.append(
        data.fingerprint(chunk, processors, data.Settings(source=[str(file)], max_length=9), 0.1)
    )
    os.utime(file, (1, 1))
    other.append(data.fingerprint(chunk, processors, settings, 0.1))
    assert len({made_of, *other}) == 5

    # An interrupted run with smaller shards leaves more of them than are needed now; none of them is used or stays.
    folder = tmp_path / "out/pairs"
    torchrun(
        "01_data.py",
        "--source",
        file,
        "--out",
        tmp_path / "out",
        "--holdout",
        0,
        "--shard_size",
        2,
        ranks=1,
    )
    (folder / "dataset.json").unlink()
    write(
        folder / ".chunk-00000.json",
        b'{"made_of": "something else", "kept": {"pairs": 2}, "rejected": []}',
    )
    for unfinished in (
        ".shard-00009.safetensors.tmp",
        "..chunk-00009.json.tmp",
        ".tmpA1b2C3",
    ):  # ours, safetensors' own
        write(folder / unfinished, b"cut")
    torchrun(
        "01_data.py",
        "--source",
        file,
        "--out",
        tmp_path / "out",
        "--holdout",
        0,
        "--shard_size",
        8,
        ranks=1,
    )
    assert len(data.Comparisons(str(folder))) == 20
    assert sorted(each.name for each in folder.glob("*shard*")) == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    assert not [*folder.glob(".*")]
