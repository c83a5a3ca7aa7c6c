"""Published training sets: rows in the sets' own schemas become comparisons or rejected lines.

The rows are made up. Also: where sources are found, and that an interrupted preparation continues.
"""

import base64
import gzip
import json
import re
from functools import partial
from pathlib import Path

import pytest
from conftest import picture, prepare_here, stages, torchrun, write_jsonl

data = stages.data
PICTURES = [picture(56, 56, seed) for seed in range(4)]
PARQUET_PICTURES = [{"bytes": content, "path": None} for content in PICTURES]


def read(source, processors):
    """Read a source: (record, comparison) of every usable row, and the reasons of the others."""
    usable, reasons = [], []
    for file, _, row in data.open_source(str(source)):
        try:
            record = row()
            comparison = data.encode_record(record, processors, 4096, Path(file).parent)
        except data.Unusable as error:
            reasons.append(str(error))
        else:
            usable.append((record, comparison))
    return usable, reasons


def as_text(comparison, processors) -> str:
    """Write a comparison as "prompt | rank: response | ...", with <image> for each picture."""
    decode = processors.tokenizer.decode
    image = r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>"
    prompt = re.sub(image, "<image>", decode(comparison.prompt))
    prompt = re.sub(r"<\|im_(start|end)\|>", "", prompt).strip().removesuffix("assistant").strip()
    texts = [prompt.replace("\n", " / ")]
    for rank, response in zip(comparison.ranks, comparison.responses):
        texts.append(f"{rank}: {decode(response).removesuffix('<|im_end|>')}")
    return " | ".join(texts)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


# Each function writes a set into a folder as it is published.


def write_rlaif_v(folder: Path) -> None:
    row = {"ds_name": "RLAIF-V", "image": PARQUET_PICTURES[0], "question": "What is it?"}
    row |= {"chosen": "A cat.", "rejected": "A dog.", "image_path": "vqa/0.png"}
    row |= {"origin_dataset": "vqav2", "origin_split": '{"model": "x"}', "idx": "7"}
    rows = [row, row | {"rejected": "A cat."}, row | {"question": "And?"}]
    write_parquet(folder / "RLAIF-V-Dataset_000.parquet", rows)
    broken = {"bytes": PICTURES[0][:90], "path": None}
    rows = [row | {"image": PARQUET_PICTURES[1]}, row | {"image": broken}]
    write_parquet(folder / "RLAIF-V-Dataset_001.parquet", rows)


def write_mmpr(folder: Path) -> None:
    meta = {}
    for name in ("one", "two"):
        annotation = f"MMPR-v1.2/annotations/{name}.jsonl"
        meta[name] = {"root": f"MMPR-v1.2/images/{name}", "annotation": annotation, "length": 3}
    write(folder / "meta.json", json.dumps(meta).encode())
    for content, name in zip(PICTURES, ("one/a.png", "two/deep/b.png", "two/c.png")):
        write(folder / "images" / name, content)
    row = {"image": "a.png", "question": "<image>\nHow many?", "chosen": "2", "rejected": "3"}
    rows = [row, row | {"image": "none.png"}, row | {"question": "Unmarked?"}]
    write_lines(folder / "annotations/one.jsonl", rows)
    both = row | {"image": ["deep/b.png", "c.png"], "question": "Is <image> as <image>?"}
    rows = [both, {"image": "c.png", "question": "q", "chosen": "c"}]
    write_lines(folder / "annotations/two.jsonl", rows)


def write_mm_rlhf(folder: Path) -> None:
    write(folder / "mcq/1.png", PICTURES[0])
    for i in range(1, 13):
        write(folder / f"video/clip/{i}.png", picture(28, 28, i))
    row = {"prompt": "What happens?", "chosen": "It moves.", "rejected": "Nothing."}
    still = row | {"image": "mcq/1.png", "chosen_reason": "right", "rejected_reason": "wrong"}
    rows = [still, row | {"video": "video/clip"}, row | {"video": "video/none"}, row]
    write_lines(folder / "dpo_pairs.jsonl", rows)
    write_lines(folder / "data.jsonl", [{"prompt": "not pairs"}])


def write_r1_reward(folder: Path) -> None:
    judge = "Compare.\n###### [Question]:\nWhich?  \n\n###### [Response 1]:\nThe left.  \n\n"
    judge += "###### [Response 2]:\nThe right."
    ending = "  \n\n###### **Output Format (strictly follow):**  \n<answer>1/2</answer>"

    def message(*texts):
        parts = [{"type": "text", "text": text} for text in texts]
        parts.append({"type": "image", "image": "/their/disk/0.png"})
        return json.dumps([{"role": "user", "content": parts}])

    row = {
        "question": "Which?",
        "message": message(judge, ending),
        "answer": ["<answer>2</answer>"],
    }
    row["image"] = base64.b64encode(picture(600, 600)).decode()
    rows = [
        row,
        row | {"answer": ["<answer>1</answer>"], "message": message(judge)},
        row | {"answer": ["<answer>tie</answer>"]},
        row | {"message": message("one response")},
        row | {"image": ""},
        row | {"message": "no JSON"},
    ]
    write_parquet(folder / "data/train-00000-of-00001.parquet", rows)


def write_llama_factory(folder: Path) -> None:
    write(folder / "images/0.png", PICTURES[0])

    def turn(speaker, text):
        return {"from": speaker, "value": text}

    responses = {"chosen": turn("gpt", "Good."), "rejected": turn("gpt", "Bad.")}
    turns = [turn("human", "Hi <image>"), turn("gpt", "Yes?"), turn("human", "And?")]
    alpaca = {"instruction": "Add", "input": "2 + 3", "chosen": "5", "rejected": "6"}
    rows = [
        {"conversations": [turn("human", "Hello")], **responses},
        {"conversations": turns, **responses, "images": ["images/0.png"], "system": "Be brief."},
        alpaca,
        alpaca | {"input": "", "history": [["Hi", "Hello"]], "system": "Count."},
        {"conversations": turns, **responses},  # without its picture
        {"conversations": [turn("observation", "{}")], **responses},
        alpaca | {"tools": "[{}]"},
        "no row",
    ]
    write(folder / "dpo.json", json.dumps(rows).encode())


def write_mmif(folder: Path) -> None:
    write(folder / "cc3m/0.png", PICTURES[0])
    row = {"conversations": [{"from": "human", "value": "<image>Name it in one word."}]}
    write(folder / "v2/sft/mmif.json", json.dumps([row]).encode())
    row["chosen"] = {"from": "gpt", "value": "Cat."}
    row["rejected"] = {"from": "gpt", "value": "It is a cat."}
    rows = [row | {"images": ["cc3m/0.png"]}, row | {"images": ["cc3m/1.png"]}]
    write(folder / "v2/dpo/mmif.json", json.dumps(rows).encode())


def write_omnialign_v_dpo(folder: Path) -> None:
    write(folder / "images/0.png", PICTURES[0])
    row = {"prompt": "Explain the chart.\n<image>", "chosen": "It grows.", "rejected": "No."}
    images = ("images/0.png", ["images/0.png"], "images/1.png")
    for name in ("chart", "poster"):
        write_lines(folder / f"{name}.jsonl", [row | {"image": image} for image in images])


def write_ultrafeedback(folder: Path) -> None:
    def row(*scores):
        completions = []
        for i, score in enumerate(scores):
            answer = {"model": "m", "response": f"Answer {i}.", "critique": f"Critique {i}."}
            completions.append(answer | {"overall_score": score, "fine-grained_score": 4.5})
        return {"source": "flan", "instruction": "Do it.", "completions": completions}

    write_lines(folder / "flan.jsonl", [row(7.0, 8.5, 7.0, 2.0), row(5, 5, 5), row(3), row()])
    write_lines(folder / "sharegpt.jsonl", [row(1, 9), row(4, None)])


def write_shp(folder: Path) -> None:
    row = {"post_id": "p0", "domain": "askbaking_train", "history": "Why flat?", "labels": 1}
    row |= {"human_ref_A": "Old soda.", "human_ref_B": "No idea.", "score_ratio": 3.0}
    rows = [row, row | {"labels": 0, "post_id": "p1"}, row | {"score_ratio": 1.5}]
    rows.append(row | {"labels": 2})
    rows += [row | {"labels": True, "human_ref_B": f"No {i}."} for i in range(6)]
    write_lines(folder / "askbaking/train.json", rows)  # one object a line, whatever its name
    write_lines(folder / "askacademia/train.json", [row | {"post_id": "p2"}])
    write_lines(folder / "askbaking/test.json", [row])


def conversation_rows() -> list[dict]:
    """Make two usable rows, and one whose conversations differ before the last turn."""

    def turn(role, content):
        return {"role": role, "content": content}

    several = [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello")]
    several.append(turn("user", "Sum 2, 3"))
    sum_of_ones = [turn("user", "Sum 1, 1")]
    prompts = [(sum_of_ones, sum_of_ones), (several, several)]
    prompts.append(([turn("user", "One?")], [turn("user", "Two?")]))
    rows = []
    for i, (first, second) in enumerate(prompts):
        chosen = [*first, turn("assistant", "Right.")]
        rows.append({"id": f"id-{i}", "chosen": chosen})
        rows[i]["rejected"] = [*second, turn("assistant", "Wrong.")]
    return rows


def write_tulu(folder: Path, splits=("train",)) -> None:
    rows = [row | {"prompt": row["chosen"][0]["content"]} for row in conversation_rows()]
    for split in splits:
        write_parquet(folder / f"data/{split}-00000-of-00001.parquet", rows)


def write_olmo(folder: Path) -> None:
    rows = conversation_rows()  # without a prompt, and without an id in one file
    write_parquet(folder / "data/train-00000-of-00002.parquet", rows)
    rows = [{key: row[key] for key in ("chosen", "rejected")} for row in rows[:1]]
    write_parquet(folder / "data/train-00001-of-00002.parquet", rows)


def write_swe_arena(folder: Path) -> None:
    question = ["user", "Write a page."]

    def row(vote, first=(), second=()):
        states = {}
        for model, start in (("A", first), ("B", second)):
            turns = [*start, question, ["assistant", f"Page {model}."]]
            states[f"model_{model}"] = {"messages": turns, "roles": ["user", "assistant"]}
        return {"chat_session_id": "s", "states": states, "feedback": {"vote_type": vote}}

    greeting = ["user", "Hi"]
    differing = (greeting, ["assistant", "Hello"]), (greeting, ["assistant", "Hey"])
    rows = [row("vote_model_A"), row("vote_model_B"), row("vote_tie"), row("vote_both_bad")]
    rows.append(row("vote_model_A", *differing))
    write_parquet(folder / "data/train-00000-of-00001.parquet", rows)


def write_hh_rlhf(folder: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Tell me."
    pairs = [
        (f"{start}\n\nAssistant: Gladly.\n\nIt is so.", f"{start}\n\nAssistant: No."),
        (f"{start}\n\nAssistant: Gladly.", "\n\nHuman: Other\n\nAssistant: No."),
        (f"{start}\n\nAssistant: Same.", f"{start}\n\nAssistant: Same."),
        (f"{start}\n\nAssistant: ", f"{start}\n\nAssistant: No."),
        ("no transcript", "at all"),
    ]
    rows = [json.dumps({"chosen": chosen, "rejected": rejected}) for chosen, rejected in pairs]
    content = gzip.compress("\n".join(rows).encode())
    for name in ("harmless-base/train", "harmless-base/test", "red-team-attempts/attempts"):
        write(folder / f"{name}.jsonl.gz", content)


def write_trl(folder: Path) -> None:
    write(folder / "0.png", PICTURES[0])
    sky = [{"role": "user", "content": "Sky?"}]
    blue = [{"role": "assistant", "content": "Blue."}]
    green = [{"role": "assistant", "content": "Green."}]
    rows = [
        {"prompt": sky, "chosen": blue, "rejected": green},
        {"chosen": sky + blue, "rejected": sky + green},
        {"prompt": "The sky is", "chosen": "blue.", "rejected": "black."},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"prompt": sky, "chosen": blue, "rejected": green, "image": "0.png"},
        {"chosen": "Blue.", "rejected": "Green."},
        {"chosen": "The sky is ", "rejected": "The sky is green."},
        {"chosen": sky + blue, "rejected": sky + sky + green},
    ]
    write_lines(folder / "train.jsonl", rows)


WILDCHAT = ("wildchat_if", "wildchat_reused_on_policy_70b")
CONVERSATIONS = [
    "user / Sum 1, 1 | 1: Right. | 2: Wrong.",
    "system / Be kind. / user / Hi / assistant / Hello / user / Sum 2, 3 | 1: Right. | 2: Wrong.",
]
DIFFER = "do not share everything up to the last assistant turn"
SETS = {  # name: (its writer, usable comparisons, a part of the reason of each other row)
    "rlaif-v": (
        write_rlaif_v,
        [
            "<image>What is it? | 1: A cat. | 2: A dog.",
            "<image>And? | 1: A cat. | 2: A dog.",
            "<image>What is it? | 1: A cat. | 2: A dog.",
        ],
        ["chosen and rejected are identical", "unreadable image"],
    ),
    "mmpr": (
        write_mmpr,
        [
            "<image> / How many? | 1: 2 | 2: 3",
            "<image>Unmarked? | 1: 2 | 2: 3",
            "Is <image> as <image>? | 1: 2 | 2: 3",
        ],
        ["unreadable image: ", "missing field: rejected"],
    ),
    "mm-rlhf": (
        write_mm_rlhf,
        [
            "<image>What happens? | 1: It moves. | 2: Nothing.",
            "<image>" * 6 + "What happens? | 1: It moves. | 2: Nothing.",
        ],
        ["unreadable image: video/none", "missing field: video"],
    ),
    "r1-reward": (
        write_r1_reward,
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
    "llama-factory": (
        write_llama_factory,
        [
            "user / Hello | 1: Good. | 2: Bad.",
            "system / Be brief. / user / Hi <image> / assistant / Yes? / user / And?"
            " | 1: Good. | 2: Bad.",
            "user / Add / 2 + 3 | 1: 5 | 2: 6",
            "system / Count. / user / Hi / assistant / Hello / user / Add | 1: 5 | 2: 6",
        ],
        ["images: 0", "observation|role", "tools: not supported", "not a row of this data set"],
    ),
    "mmif": (
        write_mmif,
        ["<image>Name it in one word. | 1: Cat. | 2: It is a cat."],
        ["unreadable image"],
    ),
    "omnialign-v-dpo": (
        write_omnialign_v_dpo,
        ["<image>Explain the chart. | 1: It grows. | 2: No."] * 4,
        ["unreadable image", "unreadable image"],
    ),
    "ultrafeedback-all": (
        write_ultrafeedback,
        [
            "user / Do it. | 2: Answer 0. | 1: Answer 1. | 2: Answer 2. | 4: Answer 3.",
            "user / Do it. | 2: Answer 0. | 1: Answer 1.",
        ],
        ["all equal", "at least two", "at least two", "not a row of this data set: TypeError"],
    ),
    "ultrafeedback-hard": (
        write_ultrafeedback,
        [
            "user / Do it. | 1: Answer 1. | 4: Answer 3.",
            "user / Do it. | 1: Answer 1. | 2: Answer 0.",
        ],
        ["all equal", "all equal", "not a row of this data set: ValueError", "TypeError"],
    ),
    "shp": (
        write_shp,
        ["Why flat? | 1: Old soda. | 2: No idea."] * 2
        + ["Why flat? | 2: Old soda. | 1: No idea."]
        + [f"Why flat? | 1: Old soda. | 2: No {i}." for i in range(4)],
        ["score_ratio below 2", "2 does not say which", *["more than 5 pairs of this post"] * 2],
    ),
    "tulu-3-if": (write_tulu, CONVERSATIONS, [DIFFER]),
    "tulu-3-ultrafeedback": (write_tulu, CONVERSATIONS, [DIFFER]),
    "wildchat": (partial(write_tulu, splits=WILDCHAT), CONVERSATIONS * 2, [DIFFER] * 2),
    "olmo-2": (write_olmo, CONVERSATIONS + CONVERSATIONS[:1], [DIFFER]),
    "swe-arena": (
        write_swe_arena,
        [
            "user / Write a page. | 1: Page A. | 2: Page B.",
            "user / Write a page. | 1: Page B. | 2: Page A.",
        ],
        ["no better response: vote_tie", "no better response: vote_both_bad", DIFFER],
    ),
    "hh-rlhf": (
        write_hh_rlhf,
        ["user / Hi / assistant / Hello! / user / Tell me. | 1: Gladly.\n\nIt is so. | 2: No."],
        [DIFFER, "identical", "empty response", "no transcript"],
    ),
    "trl": (
        write_trl,
        ["user / Sky? | 1: Blue. | 2: Green."] * 2
        + ["user / The sky is | 1: blue. | 2: black."] * 2
        + ["<image>Sky? | 1: Blue. | 2: Green."],
        ["begin with different words", "empty response", DIFFER],
    ),
}


def write_set(name: str, folder: Path) -> tuple[int, int]:
    """Write a set; return how many rows of it are usable, and how many there are."""
    write_files, texts, reasons = SETS[name]
    write_files(folder)
    return len(texts), len(texts) + len(reasons)


@pytest.mark.parametrize("name", SETS)
def test_every_row_of_a_published_set_becomes_a_comparison_or_a_reason(name, tmp_path, processors):
    write_set(name, tmp_path / "set")
    usable, reasons = read(f"{name}:{tmp_path / 'set'}", processors)
    texts = [as_text(comparison, processors) for _, comparison in usable]
    assert len(texts) == len(SETS[name][1]), (texts, reasons)
    for text, end in zip(texts, SETS[name][1]):
        assert text.endswith(end), text  # some templates begin with a system turn
    assert len(reasons) == len(SETS[name][2]), reasons
    for reason, part in zip(reasons, SETS[name][2]):
        assert any(alternative in reason for alternative in part.split("|")), reason
    for record, comparison in usable:
        assert record["source"] == comparison.record["source"] == name


def test_every_published_training_set_is_tested():
    train = {name for name, source in data.SOURCES.items() if not source.metric}
    in_test_questions = {"vstar", "arxivqa", "thinklite-vl"}
    assert train == {*SETS, *in_test_questions, "jsonl", "world"}


def test_pictures_and_further_fields_are_carried(tmp_path, processors):
    def comparisons(name):
        write_set(name, tmp_path / name)
        return [comparison for _, comparison in read(f"{name}:{tmp_path / name}", processors)[0]]

    first, _, third = comparisons("rlaif-v")
    assert first.images == [PICTURES[0]] and third.images == [PICTURES[1]]
    assert (first.record["id"], first.record["category"]) == ("7", "vqav2")
    images = [comparison.images for comparison in comparisons("mmpr")]
    assert images == [[PICTURES[0]], [PICTURES[0]], PICTURES[1:3]]
    still, video = comparisons("mm-rlhf")
    assert still.record["critiques"] == ["right", "wrong"] and still.record["category"] == "mcq"
    assert video.images == [picture(28, 28, i) for i in (1, 2, 4, 5, 7, 8, 10, 12)]  # 10 after 9
    assert comparisons("r1-reward")[0].images == [picture(600, 600)]
    hard = comparisons("ultrafeedback-hard")[0].record
    assert (hard["critiques"], hard["category"]) == (["Critique 1.", "Critique 3."], "flan")


def test_one_entry_adds_a_set(tmp_path, processors, monkeypatch):
    convert = partial(data.pair, prompt="ask", images="picture", category="topic")
    monkeypatch.setitem(data.SOURCES, "mine", data.Source(convert, files="*.jsonl"))
    write(tmp_path / "0.png", PICTURES[0])
    row = {"ask": "Sky?", "chosen": "Blue.", "rejected": "Green.", "picture": "0.png", "topic": "t"}
    write_lines(tmp_path / "rows.jsonl", [row, {"ask": "Sky?"}])
    usable, reasons = read(f"mine:{tmp_path}", processors)
    assert as_text(usable[0][1], processors).endswith("<image>Sky? | 1: Blue. | 2: Green.")
    assert usable[0][0]["category"] == "t" and reasons == ["missing field: chosen"]


def test_a_single_file_a_pattern_and_parquet_of_the_own_form_are_read_too(tmp_path, processors):
    write_hh_rlhf(tmp_path / "hh")
    write_tulu(tmp_path / "wildchat", WILDCHAT)
    assert len(read(f"hh-rlhf:{tmp_path / 'hh/harmless-base/test.jsonl.gz'}", processors)[0]) == 1
    assert len(read(f"wildchat:{tmp_path / 'wildchat/data/wildchat_if-*'}", processors)[0]) == 2
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "images": PARQUET_PICTURES[:1]}
    usable, _ = read(write_parquet(tmp_path / "own.parquet", [row] * 3), processors)
    assert [comparison.images for _, comparison in usable] == [[PICTURES[0]]] * 3
    assert "source" not in usable[0][0]


def line_numbers(source) -> list[int]:
    return [line for _, line, _ in data.open_source(str(source))]


def test_a_limit_takes_so_many_rows_or_that_share_of_them(tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(2000)]
    file = write_jsonl(tmp_path / "a@b.jsonl", rows)
    assert len(line_numbers(file)) == 2000  # "b.jsonl" is no number
    assert line_numbers(f"{file}@3") == line_numbers(f"trl:{file}@3") == [1, 2, 3]
    assert len(line_numbers(f"{file}@9999")) == 2000
    half = line_numbers(f"{file}@0.5")
    assert 930 < len(half) < 1070 and half == line_numbers(f"trl:{file}@.5")
    assert set(line_numbers(f"{file}@0.25")) < set(half)
    assert data.split_source("mmpr:/x/MMPR-v1.2@0.1") == ("mmpr", "/x/MMPR-v1.2", 0.1)
    own = ("jsonl", "my@home/pairs.jsonl", float("inf"))
    assert data.split_source("my@home/pairs.jsonl") == own
    assert data.split_source("rlaif-v@100") == ("rlaif-v", "", 100)


def test_a_data_set_is_called_after_its_first_file_or_folder_or_its_source(tmp_path):
    folder = write(tmp_path / "MMPR-v1.2/test.jsonl.gz", b"").parent
    names = {
        f"mmpr:{folder}@9": "MMPR-v1.2",
        f"hh-rlhf:{folder}/test.jsonl.gz": "test",
        f"trl:{folder}/*": "trl",
        "rlaif-v@0.5": "rlaif-v",
        "trl:owner/of.this": "of.this",
    }
    assert [data.default_name(source) for source in names] == list(names.values())


def test_sources_add_up_to_one_data_set_on_any_number_of_ranks(tmp_path):
    sources, usable, rows = [], 0, 0
    for name in ("rlaif-v", "shp", "hh-rlhf"):  # shp counts the pairs of a post across all ranks
        counts = write_set(name, tmp_path / name)
        usable, rows = usable + counts[0], rows + counts[1]
        sources.append(f"--source={name}:{tmp_path / name}")
    contents = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        options = ["--out", out, "--name", "all", "--holdout", 0, "--shard_size", 4]
        printed = torchrun("01_data.py", *sources, *options, ranks=ranks).stdout
        assert f"read {rows} = kept {usable} + rejected {rows - usable}" in printed
        contents.append({file.name: file.read_bytes() for file in (out / "all").iterdir()})
        rejected = [json.loads(line) for line in open(out / "all/rejected.jsonl")]
        assert len(rejected) == rows - usable
        assert all(line["reason"] and Path(line["file"]).exists() for line in rejected)
    assert contents[0] == contents[1]


def test_a_missing_set_is_downloaded_or_ends_in_the_command_that_does_it(
    tmp_path, monkeypatch, processors
):
    arguments = ["--source", "rlaif-v", "--out", tmp_path]
    done = torchrun("01_data.py", *arguments, ranks=1, check=False, HF_HUB_OFFLINE="1")
    repo = "openbmb/RLAIF-V-Dataset"
    lines = [line for line in done.stderr.splitlines() if line.startswith("01_data.py: ")]
    assert done.returncode and "UserError" not in done.stderr  # one line, no traceback of ours
    assert f"hf download {repo} --repo-type dataset --local-dir {repo}" in lines[0]
    with pytest.raises(data.UserError, match="nothing there. A source is a file or name:PATH"):
        read("no_such_file.jsonl", processors)
    with pytest.raises(data.UserError, match=f"nothing there. hf download {repo} "):
        read("rlaif-v:no/such/folder", processors)

    write_rlaif_v(tmp_path / "snapshot")
    downloads = []

    def download(repo, repo_type):
        downloads.append((repo, repo_type))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(read("rlaif-v@2", processors)[0]) == 1
    assert len(read("jsonl:owner/name", processors)[0]) == 0
    assert downloads == [(repo, "dataset"), ("owner/name", "dataset")]


def test_the_papers_mixture_is_found_by_hub_names_and_missing_sets_are_named_at_once(tmp_path):
    names = [data.split_source(part)[0] for part in data.MIXES["basereward"]]
    folders = {name: tmp_path / "sets" / data.SOURCES[name].hub for name in names}
    options = ["--mix", "basereward", "--mix_folder", tmp_path / "sets", "--out", tmp_path]
    printed = torchrun("01_data.py", *options, ranks=1, check=False).stderr
    for name, folder in folders.items():
        hub = data.SOURCES[name].hub
        assert f"hf download {hub} --repo-type dataset --local-dir {folder}\n" in printed
    usable, rows = -2, -3  # of WildChat's two files only one belongs to the mixture
    for name, folder in folders.items():
        counts = write_set(name, folder)
        usable, rows = usable + counts[0], rows + counts[1]
    printed = torchrun("01_data.py", *options, "--holdout", 0).stdout
    assert f"basereward: read {rows} = kept {usable} + rejected {rows - usable};" in printed


KILLED = """
import sys
sys.path.insert(0, "tests")
import kills

kills.FORK = True  # ranks are forked from this process
*command, out = sys.argv[1:]
enough = lambda out: len([*out.glob("pairs/shard-*")]) > 20
print(kills.run_until(command, kills.Path(out), enough, wait=0, everything=True, rng=None))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/*")}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_killed_preparation_continues_and_gives_the_same_bytes(tmp_path):
    pairs = []
    for i in range(2000):
        pair = {"prompt": f"Number {i}?", "chosen": "a " * 300, "rejected": "b" if i % 7 else ""}
        pairs.append(pair)
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    options = ["--source", source, "--shard_size", 8, "--holdout", 0.1, "--out"]
    torchrun("01_data.py", *options, tmp_path / "whole")
    folder = tmp_path / "killed/pairs"
    (tmp_path / "killed.py").write_text(KILLED)
    command = ["01_data.py", *options[:-1], tmp_path / "killed"]
    assert "True" in torchrun(tmp_path / "killed.py", *command, ranks=1).stdout
    times = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert 20 < len(times) < 250 and not (folder / "dataset.json").exists()

    printed = torchrun("01_data.py", *options, tmp_path / "killed", ranks=3).stdout
    assert "read 2000 = kept 1714" in printed
    again = [file for file, time_ns in times.items() if file.stat().st_mtime_ns != time_ns]
    assert len(again) <= 2  # at most the chunk that each rank was busy with
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_an_interrupted_preparation_of_something_else_is_not_continued(tmp_path):
    def prepare(rejected="b", **settings):
        """Prepare 20 pairs after an unfinished preparation; return the lengths of responses."""
        lines = [{"prompt": f"{i}?", "chosen": "a", "rejected": rejected} for i in range(20)]
        source = write_jsonl(tmp_path / "pairs.jsonl", lines)
        folder = tmp_path / "out/pairs"
        (folder / "dataset.json").unlink(missing_ok=True)
        prepare_here(source=[str(source)], out=str(tmp_path / "out"), **settings)
        return [len(comparison.responses[1]) for comparison in data.Comparisons(str(folder))]

    (length,) = set(prepare(shard_size=2))
    assert prepare(shard_size=8) == [length] * 20
    assert set(prepare("much longer", shard_size=8)) != {length}
    assert len(prepare("b " * 99, shard_size=8, max_length=99)) == 0
