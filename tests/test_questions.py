"""Questions with checkable answers.

Published rows become the benchmarks' own prompts, rules tell right answers from wrong ones, and
scores are the benchmarks' own. The tests write the rows, in the schemas that the readers name.
"""

import base64
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import picture, prepare_here, stages, torchrun, write_jsonl

data, grpo = stages.data, stages.grpo
PNG = picture()
IMAGE = {"bytes": PNG, "path": None}  # as parquet holds it


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)


def seal_row(asked: str, answered: str, objects: int = 1) -> dict:
    return {
        "image": "gqa/images/1.jpg",
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}],
        "target_instances": [{"name": "kite", "bbox": [1.0, 2.0, 3.0, 4.0]}] * objects,
    }


def write_vstar(folder: Path) -> str:
    write_picture(folder / "gqa/images/1.jpg")
    focus = "<image>\nAdditional visual information to focus on: <object>; <object>.\n"
    rows = [
        seal_row(f"{focus}Is the kite brown and large?", "Yes, the kite is brown and large."),
        seal_row("<image>\nIs the countertop tan or blue?", "The countertop is tan."),
        seal_row("Describe it.", "Nothing of note is to be seen.", objects=0),
    ]
    (folder / "GQA_data.json").write_text(json.dumps(rows))
    return f"vstar:{folder}"


def write_arxivqa(folder: Path) -> str:
    write_picture(folder / "images/1501.1.jpg")
    row = {
        "id": "cs-1",
        "image": "images/1501.1.jpg",
        "question": "Which line is highest?",
        "rationale": "Look.",
    }
    rows = [
        {**row, "options": ["A) red", "B) blue"], "label": "B"},
        {**row, "options": ["B. pumilus", "B. sphaericus", "B. cereus"], "label": "C) B. cereus"},
        {**row, "options": ["A. red", "-", "C. blue"], "label": "C"},
        {**row, "options": ["red", "blue"], "label": "D"},
        {**row, "options": ["red", "blue"], "label": "blue"},
        {**row, "options": None, "label": "A"},
    ]
    write_jsonl(folder / "arxivqa.jsonl", rows)
    return f"arxivqa:{folder}"


def write_thinklite(folder: Path) -> str:
    row = {"image": PNG, "ground_truth": "", "choices": None}
    rows = [
        {
            **row,
            "id": "1",
            "problem": "<image>Hint: Give the letter.\nQuestion: Which?\n(A) 1 (B) 2",
            "answer": "B",
        },
        {**row, "id": "2", "problem": "<image>How many?", "answer": "1,200"},
        {**row, "id": "3", "problem": "<image>Is it open?", "answer": "Yes"},
        {**row, "id": "4", "problem": "<image>Who wrote it?", "answer": "Martha White"},
    ]
    write_parquet(folder / "data.parquet", rows)
    return f"thinklite-vl:{folder}"


def mmbench_row(index, hint, options, answer, image) -> dict:
    row = {"index": index, "question": 'Which is "it"?', "hint": hint}
    row |= dict(zip("ABCD", options, strict=True))
    row |= {"answer": answer, "category": "identity_reasoning", "image": image, "source": "sqa"}
    return row | {"l2-category": "attribute_reasoning", "split": "dev"}


def quoted(value) -> str:
    return '"' + str(value).replace('"', '""') + '"'


def write_mmbench(folder: Path) -> str:
    image = base64.b64encode(PNG).decode()
    hint = "A passage.\nIn two lines."
    rows = [
        mmbench_row(241, hint, ["red", "blue", "", ""], "A", image),
        mmbench_row(252, "nan", ["one", "two", "three", "nan"], "C", image),
        mmbench_row(1000241, hint, ["blue", "red", "", ""], "B", 241),  # the picture of row 241
        mmbench_row(260, "", ["one", "two", "", ""], "", image),  # as in the test split
        mmbench_row(270, "", ["one", "two", "", ""], "A", 999),  # the file has no row 999
    ]
    lines = ["\t".join(rows[0])]
    for row in rows:
        lines.append("\t".join(quoted(value) for value in row.values()))
    (folder / "MMBench_DEV_EN.tsv").write_text("\n".join(lines) + "\n")
    return f"mmbench:{folder / 'MMBench_DEV_EN.tsv'}"


def mme_row(text: str, answer: str, category: str) -> dict:
    return {
        "question_id": f"{category}/1.png",
        "image": IMAGE,
        "question": f"{text} Please answer yes or no.",
        "answer": answer,
        "category": category,
    }


def write_mme(folder: Path) -> str:
    rows = [
        mme_row("Is there a dog?", "Yes", "existence"),
        mme_row("Is there a cat?", "No", "existence"),
        mme_row("Should I multiply?", "Yes", "numerical_calculation"),
        mme_row("Should I divide?", "No", "numerical_calculation"),
    ]
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)
    return f"mme:{folder}"


def write_mmstar(folder: Path) -> str:
    text = "Where is the cat?\nOptions: A: on the mat, B: under it, C: beside it, D: away"
    row = {
        "index": 0,
        "question": text,
        "image": PNG,
        "answer": "A",
        "category": "coarse perception",
        "l2_category": "image scene and topic",
        "meta_info": {"source": "SEEDBench", "split": "val", "image_path": "images/0.jpg"},
    }
    write_parquet(folder / "mmstar.parquet", [row])
    return f"mmstar:{folder}"


def write_mathvista(folder: Path) -> str:
    row = {
        "question": "How far?",
        "image": "images/1.jpg",
        "decoded_image": IMAGE,
        "unit": None,
        "precision": None,
        "metadata": {"task": "geometry problem solving", "split": "testmini"},
    }
    free = {**row, "question_type": "free_form", "choices": None}
    area = {**free, "precision": 1.0, "unit": "cm^2"}
    choice = {**row, "question_type": "multi_choice", "choices": ["140°", "145°"]}
    rows = [
        {**area, "pid": "1", "answer": "1.2", "answer_type": "float"},
        {**free, "pid": "2", "answer": "1000", "answer_type": "integer"},
        {**free, "pid": "3", "answer": "[2007, 2008]", "answer_type": "list"},
        {**choice, "pid": "4", "answer": "145°", "answer_type": "text"},
        {**choice, "pid": "5", "answer": "12°", "answer_type": "text"},
        {**free, "pid": "6", "answer": "", "answer_type": "integer"},
    ]
    for row in rows:
        row["query"] = f"Hint: Please answer it.\nQuestion {row['pid']}: How far?"
    write_parquet(folder / "data/testmini-00000-of-00001.parquet", rows)
    write_parquet(folder / "data/test-00000-of-00002.parquet", rows[-1:])  # not read: no answers
    return f"mathvista:{folder}"


def write_vstar_bench(folder: Path) -> str:
    write_picture(folder / "direct_attributes/sa_1.jpg")
    text = "What is the material of the glove?\n(A) rubber\n(B) cotton"
    row = {"image": "direct_attributes/sa_1.jpg", "category": "direct_attributes", "label": "A"}
    rows = [
        {**row, "text": text, "question_id": "0"},
        {**row, "text": f"{text}\n{data.LETTER}", "question_id": "1"},
    ]
    write_jsonl(folder / "test_questions.jsonl", rows)
    return f"vstar-bench:{folder}"


def write_llava(folder: Path) -> str:
    write_picture(folder / "images/001.jpg")
    row = {"image": "001.jpg", "category": "conv"}
    rows = [
        {"question_id": 0, **row, "text": "What is this scene?"},
        {"question_id": 1, **row, "text": "Describe it."},
    ]
    write_jsonl(folder / "questions.jsonl", rows)
    context = {"id": "001", "image": "001.jpg", "caption": "A scene."}
    write_jsonl(folder / "context.jsonl", [context])  # not read
    return f"llava-in-the-wild:{folder}"


def write_wildvision(folder: Path) -> str:
    row = {
        "question_id": "2db1",
        "instruction": "What is this?",
        "image": IMAGE,
        "language": "English",
    }
    for version in ("0617", "0701"):  # 01 reads one of them
        write_parquet(folder / f"vision_bench_{version}/test-00000-of-00001.parquet", [row])
    return f"wildvision:{folder}"


WRITERS = {
    "vstar": write_vstar,
    "arxivqa": write_arxivqa,
    "thinklite-vl": write_thinklite,
    "mmbench": write_mmbench,
    "mme": write_mme,
    "mmstar": write_mmstar,
    "mathvista": write_mathvista,
    "vstar-bench": write_vstar_bench,
    "llava-in-the-wild": write_llava,
    "wildvision": write_wildvision,
}


@pytest.fixture(scope="module")
def read(tmp_path_factory, processors):
    """Read each source: {name: (text of the prompt, record) or the reason for rejecting a row}."""
    become = {}
    for name, write in WRITERS.items():
        become[name] = []
        for file, _, row in data.open_source(write(tmp_path_factory.mktemp(name))):
            try:
                record = row()
                encoded = data.encode_record(record, processors, 4096, Path(file).parent)
            except data.Unusable as error:
                become[name].append(str(error))
                continue
            assert encoded.images == [PNG] and not encoded.responses
            assert encoded.record.get("rule") == record.get("rule")
            become[name].append((record["prompt"][0]["content"][1]["text"], record))
    return become


def prompts(rows) -> list[str]:
    return [row[0] for row in rows if not isinstance(row, str)]


def kept(rows, *keys) -> list[tuple]:
    return [tuple(row[1].get(key) for key in keys) for row in rows if not isinstance(row, str)]


def test_vstar_asks_the_question_alone_and_checks_the_yes_of_a_sentence(read):
    assert prompts(read["vstar"]) == [
        "Is the kite brown and large?",
        "Is the countertop tan or blue?",
    ]
    assert kept(read["vstar"], "answer", "rule") == [
        ("Yes", "yes_no"),
        ("The countertop is tan.", "text"),
    ]
    assert "no target_instances" in read["vstar"][2]


def test_arxivqa_letters_its_options_and_rejects_what_is_not_clean(read):
    assert prompts(read["arxivqa"]) == [
        f"Which line is highest?\nA. red\nB. blue\n{data.LETTER}",
        f"Which line is highest?\nA. B. pumilus\nB. B. sphaericus\nC. B. cereus\n{data.LETTER}",
    ]
    assert kept(read["arxivqa"], "id", "answer", "rule")[0] == (
        "cs-1",
        "B",
        {"kind": "letter", "options": ["red", "blue"]},
    )
    assert kept(read["arxivqa"], "answer")[1] == ("C",)
    reasons = [
        "a separator",
        "'D' of 2 options",
        "does not begin with a letter",
        "not a row of this data set",
    ]
    for reason, rejected in zip(reasons, read["arxivqa"][2:], strict=True):
        assert reason in rejected


def test_thinklites_answers_decide_their_rules(read):
    prompt = "Hint: Give the letter.\nQuestion: Which?\n(A) 1 (B) 2"
    assert prompts(read["thinklite-vl"])[0] == prompt
    rules = [("B", "letter"), ("1,200", "number"), ("Yes", "yes_no"), ("Martha White", "text")]
    assert kept(read["thinklite-vl"], "answer", "rule") == rules


def test_mmbench_is_asked_as_vlmevalkit_asks_it_and_rotations_are_one_group(read):
    asked = "Please select the correct answer from the options above. \n"
    hint = "Hint: A passage.\nIn two lines.\n"
    question = 'Question: Which is "it"?\nOptions:\n'
    assert prompts(read["mmbench"]) == [
        f"{hint}{question}A. red\nB. blue\n{asked}",
        f"{question}A. one\nB. two\nC. three\n{asked}",
        f"{hint}{question}A. blue\nB. red\n{asked}",
    ]
    assert kept(read["mmbench"], "id", "group", "answer", "category") == [
        ("241", 241, "A", "attribute_reasoning"),
        ("252", 252, "C", "attribute_reasoning"),
        ("1000241", 241, "B", "attribute_reasoning"),
    ]
    assert kept(read["mmbench"], "rule")[1] == (
        {"kind": "letter", "options": ["one", "two", "three"]},
    )
    assert len(read["mmbench"]) == 5
    assert "no answer" in read["mmbench"][3] and isinstance(read["mmbench"][4], str)


def test_mme_keeps_its_instruction_and_pairs_the_questions_of_a_picture(read):
    assert prompts(read["mme"])[0] == "Is there a dog? Please answer yes or no."
    assert kept(read["mme"], "group", "category", "answer", "rule")[:2] == [
        ("existence/1.png", "existence", "Yes", "yes_no"),
        ("existence/1.png", "existence", "No", "yes_no"),
    ]


def test_mmstar_and_vstar_bench_ask_for_the_letter(read):
    text = "Where is the cat?\nOptions: A: on the mat, B: under it, C: beside it, D: away"
    assert prompts(read["mmstar"]) == [f"{text}\n{data.LETTER}"]
    assert kept(read["mmstar"], "id", "answer", "rule", "category") == [
        (0, "A", "letter", "coarse perception")
    ]
    text = "What is the material of the glove?\n(A) rubber\n(B) cotton"
    assert prompts(read["vstar-bench"]) == [f"{text}\n{data.LETTER}"] * 2
    assert kept(read["vstar-bench"], "id", "answer", "category")[0] == (
        "0",
        "A",
        "direct_attributes",
    )


def test_mathvista_is_asked_by_its_own_query_and_carries_precision_and_unit(read):
    assert prompts(read["mathvista"])[0] == "Hint: Please answer it.\nQuestion 1: How far?"
    assert kept(read["mathvista"], "answer", "rule") == [
        ("1.2", {"kind": "number", "type": "float", "precision": 1, "unit": "cm^2"}),
        ("1000", {"kind": "number", "type": "integer"}),
        ("[2007, 2008]", {"kind": "number", "type": "list"}),
        ("B", {"kind": "letter", "options": ["140°", "145°"]}),
    ]
    assert "none of the choices" in read["mathvista"][4] and "no answer" in read["mathvista"][5]
    assert len(read["mathvista"]) == 6
    assert kept(read["mathvista"], "category")[0] == ("geometry problem solving",)


def test_questions_for_a_judge_have_no_answer_and_carry_what_its_file_needs(read):
    assert kept(read["llava-in-the-wild"], "answer", "judged") == [
        (None, {"question_id": 0, "prompt": "What is this scene?"}),
        (None, {"question_id": 1, "prompt": "Describe it."}),
    ]
    judged = {"question_id": "2db1", "instruction": "What is this?", "language": "English"}
    assert kept(read["wildvision"], "answer", "judged") == [(None, judged)]


def test_a_row_without_a_published_field_names_it():
    row = {"question_id": "1", "category": "c", "question": "?", "answer": "1"}
    row["target_instances"] = [1]
    missing = {"mme": "image", "vstar": "conversations", "mathvista": "question_type"}
    for source, name in missing.items():
        with pytest.raises(data.Unusable, match=f"missing field: {name}"):
            data.convert_row(row.copy, data.SOURCES[source].convert)


# --------------------------------------------------------------------------------------------------
# Rules.

GLOVE = {"kind": "letter", "options": ["rubber", "cotton", "kevlar", "leather"]}
ANIMALS = {"kind": "letter", "options": ["a cat", "a dog", "neither", "both of them"]}
AREA = {"kind": "number", "type": "float", "precision": 1, "unit": "cm^2"}
INTEGER, LIST = {"kind": "number", "type": "integer"}, {"kind": "number", "type": "list"}


@pytest.mark.parametrize(
    "text", ["B", "b", "(B)", "B.", "**B**", "[B]", " B\n", "B. cotton", "B: cotton", "(B) cotton"]
)
@pytest.mark.parametrize("rule", [GLOVE, "letter"])
def test_a_letter_is_read_however_it_is_written(text, rule):
    assert grpo.is_match(text, "B", rule) and not grpo.is_match(text, "A", rule)


@pytest.mark.parametrize(
    "text, rule, chosen",
    [
        ("The answer is B", GLOVE, "B"),
        ("The answer is (B).", GLOVE, "B"),
        ("Answer: B", GLOVE, "B"),
        ("The correct answer is: **B**", GLOVE, "B"),
        ("The correct option is B because it is woven.", GLOVE, "B"),
        ("The answer is A because it shines.", GLOVE, "A"),
        ("Based on the picture, the best choice is (C) kevlar.", GLOVE, "C"),
        ("It looks woven, so (B) fits best.", GLOVE, "B"),
        ("B\nThe glove is woven.", GLOVE, "B"),
        ("Option A is too shiny. The answer is B.", GLOVE, "B"),
        ("The answer is B. No, wait: the answer is D.", GLOVE, "D"),
        ("cotton", GLOVE, "B"),
        ("Cotton.", GLOVE, "B"),
        ("The answer is cotton.", GLOVE, "B"),
        ("A dog", ANIMALS, "B"),  # the article, and the text of option B
        ("a cat", ANIMALS, "A"),
        ("The answer is a dog.", ANIMALS, "B"),
        ("Answer: A dog", ANIMALS, "B"),
        ("A", ANIMALS, "A"),
        ("A bird sits there.", ANIMALS, None),
        ("A dog sits on the mat.", ANIMALS, None),
        ("A or B", GLOVE, None),
        ("(A) and (B) both fit.", GLOVE, None),
        ("It is not cotton.", GLOVE, None),
        ("E", GLOVE, None),
        ("I think it is the glove.", "letter", None),
        ("I do not know.", GLOVE, None),
        ("U.S. made", GLOVE, None),
        ("D.C. comics", GLOVE, None),
        ("", GLOVE, None),
    ],
)
def test_a_choice_is_the_option_that_an_answer_clearly_names(text, rule, chosen):
    named = [letter for letter in "ABCD" if grpo.is_match(text, letter, rule)]
    assert named == ([chosen] if chosen else [])


@pytest.mark.parametrize(
    "text, said",
    [
        ("Yes", "Yes"),
        ("yes.", "Yes"),
        ("No, there is none.", "No"),
        ("**No**", "No"),
        ("The answer is yes.", "Yes"),
        ("Yes\nNo", "Yes"),
        ("None of them.", None),
        ("Not sure.", None),
        ("Nope", None),
        ("There is no dog.", None),
        ("Yesterday", None),
        ("", None),
    ],
)
def test_yes_and_no_are_words_in_front(text, said):
    assert grpo.is_match(text, "Yes", "yes_no") == (said == "Yes")
    assert grpo.is_match(text, "No", "yes_no") == (said == "No")


@pytest.mark.parametrize(
    "text, answer, rule, right",
    [
        ("1.2", "1.2", AREA, True),
        ("1.23 cm^2", "1.2", AREA, True),  # rounded; the 2 of the unit is none
        ("The area is 1.16 cm^2.", "1.2", AREA, True),
        ("1.27", "1.2", AREA, False),
        ("12", "1.2", AREA, False),
        ("one point two", "1.2", AREA, False),
        ("3.10", "3.1", {"kind": "number", "precision": 2}, True),
        ("1000", "1000", INTEGER, True),
        ("1,000 g", "1000", INTEGER, True),
        ("4.7", "4", INTEGER, True),  # as MathVista counts it
        ("There are 3 cats and 4 dogs, so 7 animals.", "7", INTEGER, True),
        ("The answer is 7.", "7", INTEGER, True),
        ("17", "7", INTEGER, False),
        ("-7", "7", INTEGER, False),
        ("−7", "-7", INTEGER, True),
        ("2007-2008", "2008", INTEGER, True),
        ("", "7", INTEGER, False),
        ("9" * 400, "7", INTEGER, False),
        ("[2007, 2008]", "[2007, 2008]", LIST, True),
        ("The two years are [2007,2008].", "[2007, 2008]", LIST, True),
        ("Between 2007 and 2008.", "[2007, 2008]", LIST, True),
        ("[2008, 2007]", "[2007, 2008]", LIST, False),
        ("2007", "[2007, 2008]", LIST, False),
        ("1,200", "1200", "number", True),
        (".5", "0.5", "number", True),
        ("2e-3", "0.002", "number", True),
        ("0.501", "0.5", "number", False),
        ("50%", 50, "number", True),
    ],
)
def test_a_number_is_compared_as_mathvista_compares_it(text, answer, rule, right):
    assert grpo.is_match(text, answer, rule) == right


def test_01_and_06_know_the_same_rules():
    assert list(data.RULES) == list(grpo.RULES)


@pytest.mark.parametrize(
    "answer, rule, reason",
    [
        ("B", "letters", "rule: 'letters'; known are text, letter, verdict, yes_no, number"),
        ("B", {"options": ["red"]}, "rule: None"),
        ("B", ["letter"], "rule: (a list|\\['letter'\\])"),
        ("B", {"kind": "letter", "choices": ["red"]}, "letter with choices"),
        ("1", {"kind": "number", "precision": "one"}, "number with precision = 'one'"),
        ("red", "letter", "answer: 'red' is none that the rule letter can check"),
        ("maybe", "yes_no", "answer: 'maybe'"),
        ("many", "number", "answer: 'many'"),
        ("C", {"kind": "letter", "options": ["red", "blue"]}, "answer: 'C' of 2 options"),
    ],
)
def test_an_unknown_rule_and_an_answer_that_it_cannot_check_are_rejected(
    answer, rule, reason, processors
):
    with pytest.raises(data.Unusable, match=reason):
        data.encode_record({"prompt": "q", "answer": answer, "rule": rule}, processors, 4096)


def test_a_question_without_a_rule_is_matched_exactly(processors):
    question = data.encode_record({"prompt": "q", "answer": "a circle"}, processors, 4096)
    assert "rule" not in question.record
    open_question = data.Comparison(question.prompt, [], [], record={"truth": {}})
    closed, match = grpo.matches([question, open_question], [["A circle.", "square"]] * 2)
    assert closed.tolist() == [[True], [False]]
    assert match.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    "text, answer, same",
    [
        ("A red circle.", "a red circle", True),
        ("red circle", "a red circle", True),
        ("2", 2, True),
        (" Yes!", "Yes", True),
        ("a.", "A", True),
        ("B", "A", False),
        ("", "A", False),
        ("12", "1 2", False),
        ("-3", "3", False),
        ("2.5", "25", False),
        ("red", "red circle", False),
    ],
)
def test_an_exact_match_ignores_case_punctuation_and_a_leading_article(text, answer, same):
    assert grpo.is_match(text, answer) == same


# --------------------------------------------------------------------------------------------------
# Scores.


def metrics_of(name: str, outcomes: list[tuple]) -> dict:
    """Return the metric of outcomes (category, group, whether the response is right)."""
    questions = []
    for category, group, _ in outcomes:
        record = {"category": category, "group": group, "answer": "A"}
        questions.append(data.Comparison(None, [], [], record=record))
    match = torch.tensor([[float(right)] for _, _, right in outcomes])
    return grpo.benchmark_metrics(name, questions, match)


def test_mmes_score_is_accuracy_plus_accuracy_plus_summed_over_categories():
    outcomes = [("existence", 1, True), ("existence", 1, True)]
    outcomes += [("existence", 2, True), ("existence", 2, False)]
    outcomes += [("count", 1, False), ("count", 1, True)]
    outcomes += [("code_reasoning", 1, True), ("code_reasoning", 1, True)]
    assert metrics_of("mme", outcomes) == {
        "existence": 0.75 + 0.5,
        "count": 0.5 + 0,
        "code_reasoning": 1 + 1,
        "perception": 1.75,
        "cognition": 2.0,
        "total": 3.75,
    }
    names = [f"category {i}" for i in range(10)] + list(grpo.MME_COGNITION)
    best = [(name, picture, True) for name in names for picture in (1, 1, 2, 2)]
    points = metrics_of("mme", best)
    assert (points["perception"], points["cognition"], points["total"]) == (20, 8, 28)


def test_a_question_of_mmbench_counts_if_every_rotation_is_answered_right():
    outcomes = [("AR", 1, True), ("AR", 1, True), ("AR", 2, True), ("AR", 2, False)]
    outcomes += [("LR", 3, True)]
    assert metrics_of("circular", outcomes) == {"circular": 2 / 3, "AR": 0.5, "LR": 1.0}
    assert metrics_of("accuracy", outcomes) == {"AR": 0.75, "LR": 1.0}


def test_every_benchmark_has_a_metric_or_a_judge_and_no_training_set_has():
    train = ("vstar", "arxivqa", "thinklite-vl")
    for name in WRITERS:
        metric = data.SOURCES[name].metric
        known = metric in {"accuracy", "circular", "mme", *grpo.JUDGES}
        assert known == (name not in train), name


def prepared(folder: Path, *names: str) -> Path:
    """Prepare the sources of these names as one data set, by 01."""
    sources = []
    for name in names:
        (folder / name).mkdir()
        sources.append(WRITERS[name](folder / name))
    prepare_here(source=sources, out=str(folder), name="_".join(names))
    return folder / "_".join(names)


def improve(questions: Path, benchmark: Path, out: Path, options: str, ranks: int = 1) -> str:
    """Run 06 with the reward by rule; return what it prints."""
    folders = ["--data", questions, "--benchmark", benchmark, "--out", out]
    sizes = ["--reward", "rule", "--group_size", 2, "--max_new_tokens", 8]
    return torchrun("06_grpo.py", *folders, *sizes, *options.split(), ranks=ranks).stdout


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path)]


def test_a_question_whose_answer_is_null_is_open(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "Tell me of red.", "answer": None}] * 4)
    prepare_here(source=[str(tmp_path / "mine.jsonl")], out=str(tmp_path))
    out = tmp_path / "policy"
    improve(tmp_path / "mine", tmp_path / "mine", out, "--steps 1 --batch_size 2")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["after"] == {"closed": 0, "open": 4}
    (line,) = read_lines(out / "metrics.jsonl")
    assert line["phantom"] == 0


def test_06_trains_on_questions_with_rules_and_evaluates_by_the_benchmarks_own_score(tmp_path):
    questions, benchmark = prepared(tmp_path, "arxivqa", "thinklite-vl"), prepared(tmp_path, "mme")
    out = tmp_path / "policy"
    options = "--steps 2 --batch_size 3 --evaluate_size 0"
    printed = improve(questions, benchmark, out, options, ranks=2)
    result = json.loads((out / "evaluation.json").read_text())["after"]
    responses = [sample["after"] for sample in read_lines(out / "samples.jsonl")]
    right = []
    for text, answer in zip(responses, ("Yes", "No") * 2, strict=True):
        right.append(grpo.is_match(text, answer, "yes_no"))
    assert result["closed"] == 4 and result["exact_match"] == sum(right) / 4
    assert result["perception"] == result["existence"] == sum(right[:2]) / 2 + all(right[:2])
    assert result["total"] == result["perception"] + result["cognition"] and "| total" in printed
    assert len(read_lines(out / "metrics.jsonl")) == 2


def test_06_writes_answers_in_the_form_that_llavas_judge_reads(tmp_path):
    questions, benchmark = prepared(tmp_path, "mmstar"), prepared(tmp_path, "llava-in-the-wild")
    out = tmp_path / "mine"
    printed = improve(questions, benchmark, out, "--steps 1 --batch_size 1")
    samples = read_lines(out / "samples.jsonl")
    for when, model in (("before", "policy"), ("after", "mine")):
        lines = read_lines(out / f"answers_{when}.jsonl")
        assert [line.pop("text") for line in lines] == [sample[when] for sample in samples]
        named = {"answer_id": f"{model}-1", "model_id": model, "metadata": {}}
        assert lines[1] == {"question_id": 1, "prompt": "Describe it.", **named}
    assert "2 of the 2 questions of llava-in-the-wild, for its judge model" in printed
    assert "nan" not in printed
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert "exact_match" not in evaluation["after"]  # none is closed


def test_answers_to_wildvision_are_in_the_form_that_its_judge_reads(tmp_path, processors):
    questions = data.Comparisons(str(prepared(tmp_path, "wildvision")))
    assert questions.info["metric"] == "wildvision"
    judged = questions[0].record["judged"]
    line = grpo.judge_line("wildvision", judged, "Ein Bär", "mine", processors.tokenizer)
    tokens = processors.tokenizer.encode("Ein Bär", add_special_tokens=False)
    asked = {"question_id": "2db1", "instruction": "What is this?", "language": "English"}
    named = {"output": "Ein Bär", "model": "mine", "token_len": len(tokens)}
    assert line == {**asked, **named}
