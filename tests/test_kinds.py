"""Critics and judges read, write and learn as transformers alone computes it."""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import (
    RESPONSES,
    TINY,
    assistant,
    picture,
    prepare_here,
    stages,
    torchrun,
    user,
    write_jsonl,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

data, model = stages.data, stages.model


@pytest.fixture(scope="module")
def kinds():
    """A critic and a judge on the embedded backbone, with noise on its weights: texts differ."""
    models = {}
    for kind in ("critic", "generative"):
        torch.manual_seed(1)
        models[kind] = model.RewardModel.from_backbone(
            TINY, model.HeadSettings(kind=kind, critique_tokens=14)
        ).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in models[kind].backbone.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    torch.nn.init.normal_(models["critic"].head.mlp[-1].weight, std=0.3)
    return models


@pytest.fixture(scope="module")
def plain(kinds):
    """The same backbone in transformers alone."""
    lm = AutoModelForImageTextToText.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    lm.load_state_dict(kinds["critic"].backbone.state_dict())
    return lm


def plain_inputs(parts: list, comparison, processors) -> dict:
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == processors.image_token).int()}
    if comparison.images:
        inputs |= dict(
            processors.image_processor(
                [data.open_image(file) for file in comparison.images], return_tensors="pt"
            )
        )
    return inputs


def critiques_of(comparison, processors) -> list:
    return [
        data.encode_response(f"{word}: it is.", processors)
        for word in ("Wrong", "Right", "Well, wrong")
    ]


def test_what_stands_behind_an_answer_is_the_chat_template_s_next_turn(processors):
    turns = [user("What is 2 + 3?"), assistant("It is 5."), user("Is it right? Explain.")]
    prompt, _, _ = data.encode_prompt(turns[:1], [], processors)
    request = model.turn_after_answer("Is it right? Explain.", processors)
    ours = np.concatenate([prompt, data.encode_response("It is 5.", processors), request])
    assert np.array_equal(ours, data.encode_prompt(turns, [], processors)[0])


# ---- the critic


def test_a_critics_score_is_that_of_one_plain_forward_over_prompt_response_and_critique(
    kinds, plain, comparisons, processors
):
    critic, asked, expected = kinds["critic"], [], []
    with torch.no_grad():
        for comparison in comparisons:
            critiques = critiques_of(comparison, processors)
            asked.append(model.with_critiques(comparison, critiques, critic.request))
            for response, critique in zip(comparison.responses, critiques):
                parts = [comparison.prompt, response, critic.request, critique]
                hidden = plain.model(
                    **plain_inputs(parts, comparison, processors)
                ).last_hidden_state[0, -1:]
                expected.append(critic.head(hidden)[0])
        torch.testing.assert_close(
            critic(model.pack(asked, processors)), torch.stack(expected), atol=1e-5, rtol=0
        )


def test_a_critique_is_what_transformers_generates(kinds, plain, comparisons, processors):
    critic, eos = kinds["critic"], processors.end_token
    forbidden = model.Writer(critic.backbone, processors).forbidden.tolist()
    written = critic.write_critiques(comparisons)
    critiques = iter(written)
    for comparison in comparisons:
        for response, critique in zip(comparison.responses, critiques):
            inputs = plain_inputs(
                [comparison.prompt, response, critic.request], comparison, processors
            )
            how = {
                "do_sample": False,
                "max_new_tokens": 14,
                "suppress_tokens": forbidden,
                "eos_token_id": eos,
            }
            expected = plain.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :].tolist()
            assert critique.tolist() == [token for token in expected if token != eos] + [eos]
    lengths = list(map(len, written))
    assert len(set(lengths)) > 2 and max(lengths) == 15, (
        "some have to end by themselves, one at the limit"
    )


def test_a_critic_is_scored_on_the_critique_it_writes_never_on_the_datas(
    kinds, comparisons, processors
):
    critic, comparison = kinds["critic"], comparisons[1]
    scores = critic.score_encoded([comparison])
    own = model.with_critiques(comparison, critic.write_critiques([comparison]), critic.request)
    with torch.no_grad():
        torch.testing.assert_close(scores, critic(model.pack([own], processors)), atol=1e-5, rtol=0)
        given = data.Comparison(**vars(comparison) | {"record": {"critiques": ["Right: yes."] * 3}})
        assert torch.equal(critic.score_encoded([given]), scores)
        assert (critic(model.pack([critic.rewrite(given)], processors)) - scores).abs().max() > 1e-3
    together = critic.score_encoded(comparisons).view(len(comparisons), -1)
    torch.testing.assert_close(together[1], scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens_at_once", [1000, 3])
def test_the_critiques_loss_is_transformers_own_over_all_their_tokens(
    tokens_at_once, kinds, plain, comparisons, processors, monkeypatch
):
    critic = kinds["critic"]
    vocabulary = critic.backbone.lm_head.out_features
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", tokens_at_once * vocabulary)
    for comparison in comparisons:
        critiques, losses = critiques_of(comparison, processors), []
        asked = [model.with_critiques(comparison, critiques, critic.request)]
        row = model.pack_written(asked, processors)
        for response, critique in zip(comparison.responses, critiques):
            inputs = plain_inputs(
                [comparison.prompt, response, critic.request, critique], comparison, processors
            )
            labels = inputs["input_ids"].clone()
            labels[:, : -len(critique)] = -100
            losses.append(plain(**inputs, labels=labels).loss * len(critique))
        with torch.no_grad():
            _, log_p = critic(row, written=True)
        expected = sum(losses) / sum(map(len, critiques))
        loss = -(row.weight * log_p).sum()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_a_comparison_without_critiques_is_left_without_responses(kinds, comparisons):
    critic = kinds["critic"]
    texts = ["Right: a.", "Wrong: b.", "Wrong: c."]
    for critiques, responses in ((texts, 3), (None, 0), ([], 0)):
        fields = vars(comparisons[0]) | {"record": {"critiques": critiques}}
        rewritten = critic.rewrite(data.Comparison(**fields))
        assert len(rewritten.responses) == responses
        assert all(map(np.array_equal, map(len, rewritten.learned), map(len, rewritten.responses)))


@pytest.mark.parametrize("kind", ["critic", "generative"])
def test_a_loaders_process_can_rewrite_comparisons(kind, kinds, comparisons):
    rewrite = pickle.loads(pickle.dumps(kinds[kind].rewrite))
    ours, expected = rewrite(comparisons[1]), kinds[kind].rewrite(comparisons[1])
    assert all(map(np.array_equal, ours.responses, expected.responses))


# ---- the judge


def pair_shown(comparison, i: int, j: int, request, processors) -> list[np.ndarray]:
    """The token ids of the prompt, of responses i and j as A and B, and of the request."""
    before_a, before_b = (
        np.array(processors.tokenizer.encode(text), np.int32) for text in ("A:\n", " B:\n")
    )
    first, second = comparison.responses[i][:-1], comparison.responses[j]
    return [comparison.prompt, before_a, first, before_b, second, request]


def plain_odds(plain, comparison, i: int, j: int, request, processors) -> torch.Tensor:
    """Log-odds of A over B when transformers alone is shown responses i and j."""
    parts = pair_shown(comparison, i, j, request, processors)
    logits = plain(**plain_inputs(parts, comparison, processors)).logits[0, -1]
    a, b = (processors.tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    log_p = logits.log_softmax(-1)
    return log_p[a] - log_p[b]


def test_a_judges_scores_are_the_log_odds_of_plain_forwards_over_both_orders(
    kinds, plain, comparisons, processors
):
    judge = kinds["generative"]
    for comparison in comparisons:
        with torch.no_grad():
            odds = {
                (i, j): plain_odds(plain, comparison, i, j, judge.request, processors)
                for i, j in itertools.permutations(range(3), 2)
            }
        expected = []
        for i in range(3):
            expected.append(sum(odds[i, j] - odds[j, i] for j in range(3) if j != i) / 2)
        expected = torch.stack(expected)
        torch.testing.assert_close(judge.score_encoded([comparison]), expected, atol=2e-5, rtol=0)
    together = judge.score_encoded(comparisons)
    apart = torch.cat([judge.score_encoded([comparison]) for comparison in comparisons])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)


def test_a_judges_score_of_a_pair_changes_its_sign_with_the_order_and_no_rank_decides(kinds):
    judge, messages = kinds["generative"], [user("What do you see?", picture())]
    first, second = judge.score(messages, RESPONSES[:2])
    torch.testing.assert_close(
        torch.stack([second, first]), judge.score(messages, RESPONSES[1::-1])
    )
    assert first == -second and abs(first) > 1e-3
    assert judge.score(messages, [RESPONSES[0]] * 2).tolist() == [0, 0]
    a, b = (first - second).item() / 2, -(first - second).item() / 2  # each against the other
    repeated = judge.score(messages, [RESPONSES[0], RESPONSES[1], RESPONSES[0], RESPONSES[0]])
    assert repeated.tolist() == pytest.approx(
        [a, 3 * b, a, a], abs=1e-5
    )  # against one, three, one and one of the other
    assert judge.score(messages, RESPONSES[:1]).tolist() == [0]  # nothing to compare it with
    prompt, files, grids = data.encode_prompt(messages, [], judge.processors)
    responses = [data.encode_response(text, judge.processors) for text in RESPONSES]
    scores = []
    for ranks in ([1, 2, 3], [3, 2, 1], [], [1, 1, 2]):
        comparison = data.Comparison(prompt, responses, ranks, files, grids)
        scores.append(judge.score_encoded([comparison]))
    assert all(torch.equal(other, scores[0]) for other in scores)


def test_a_judge_learns_the_right_letter_in_both_orders_and_nothing_of_ties(
    kinds, plain, comparisons, processors
):
    judge, comparison = (
        kinds["generative"],
        data.Comparison(**vars(comparisons[1]) | {"ranks": [2, 1, 2]}),
    )
    asked, losses = [judge.rewrite(comparison)], []
    row = model.pack_written(asked, processors)
    for i, j in ((0, 1), (1, 0), (1, 2), (2, 1)):
        parts = pair_shown(comparison, i, j, judge.request, processors)
        parts.append(np.array(processors.tokenizer.encode("A" if i == 1 else "B"), np.int32))
        inputs = plain_inputs(parts, comparison, processors)
        labels = inputs["input_ids"].clone()
        labels[:, :-1] = -100
        losses.append(plain(**inputs, labels=labels).loss)
    with torch.no_grad():
        _, log_p = judge(row, written=True)
    loss = -(row.weight * log_p).sum()
    torch.testing.assert_close(loss, sum(losses) / 4, atol=1e-5, rtol=0)


# ---- the judge that writes a rationale, and its training by reinforcement


@pytest.fixture(scope="module")
def reasoner(kinds):
    """The judge of `kinds`, asked for a rationale."""
    judge = kinds["generative"]
    asks = judge.asks | {"rationale": True}
    return model.Judge(judge.backbone, None, judge.processors, asks=asks).eval()


def test_a_judge_with_a_rationale_decides_behind_what_transformers_generates(
    reasoner, plain, comparisons, processors
):
    forbidden = model.Writer(reasoner.backbone, processors).forbidden.tolist()
    comparison = comparisons[1]
    how = {"do_sample": False, "max_new_tokens": 14, "suppress_tokens": forbidden}
    odds = {}
    for i, j in itertools.permutations(range(3), 2):
        parts = pair_shown(comparison, i, j, reasoner.request, processors)
        inputs = plain_inputs(parts, comparison, processors)
        written = plain.generate(**inputs, **how, eos_token_id=processors.end_token)
        written = written[0, inputs["input_ids"].shape[1] :].tolist()
        text = processors.tokenizer.decode([t for t in written if t != processors.end_token])
        parts.append(np.array(processors.tokenizer.encode(text + "\nAnswer:\n"), np.int32))
        with torch.no_grad():
            logits = plain(**plain_inputs(parts, comparison, processors)).logits[0, -1]
        a, b = (processors.tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
        odds[i, j] = logits[a] - logits[b]
    expected = []
    for i in range(3):
        expected.append(sum(odds[i, j] - odds[j, i] for j in range(3) if j != i) / 2)
    found = reasoner.score_encoded([comparison])
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=0)
    assert reasoner.cost["written"] > 0


def test_a_judge_learns_a_rationale_of_the_datas_critiques_half_a_letter_and_to_end_its_turn(
    reasoner, comparisons, processors
):
    texts = ["Right: a.", "Wrong: b.", "Wrong: c."]
    fields = vars(comparisons[1]) | {"ranks": [1, 2, 2], "record": {"critiques": texts}}
    rewritten = reasoner.rewrite(data.Comparison(**fields))
    letters = sum(learned[-2] for learned in rewritten.learned)
    assert letters == pytest.approx(0.5) and sum(map(sum, rewritten.learned)) == pytest.approx(1)
    learned = rewritten.responses[0][rewritten.learned[0] > 0]
    expected = "A: Right: a.\nB: Wrong: b.\nAnswer:\nA"
    assert processors.tokenizer.decode(learned) == expected + "<|im_end|>"
    assert stages.grpo.is_match(expected, "A", "verdict"), "so 06 can go on with its answers"
    assert len(rewritten.responses) == 4, "the tie of two wrongs teaches nothing"
    assert not reasoner.rewrite(comparisons[1]).responses  # without critiques


def test_a_judges_question_to_a_policy_has_the_tokens_that_the_judge_reads(
    kinds, tmp_path, processors
):
    line = {"prompt": "Is it red?", "responses": ["No.", "Yes, it is.", "Oh"], "ranks": [3, 1, 2]}
    source = str(write_jsonl(tmp_path / "pairs.jsonl", [line]))
    request = model.REQUESTS["generative"]
    prepare_here(source=[source], out=str(tmp_path), judge_request=request)
    questions = data.Comparisons(str(tmp_path / "pairs"))
    prompt, _, _ = data.encode_prompt([user("Is it red?")], [], processors)
    responses = [data.encode_response(text, processors) for text in ("Yes, it is.", "No.")]
    judged = kinds["generative"].rewrite(data.Comparison(prompt, responses, [1, 2]))
    for question, shown, letter in zip(questions, judged.responses, "AB", strict=True):
        assert np.array_equal(question.prompt, np.concatenate([prompt, shown[:-1]]))
        assert question.record["answer"] == letter
        rule = question.record["rule"]
        for text, right in ((letter, True), (f"A: B.\nB: A.\nAnswer:\n{letter}", True)):
            assert stages.grpo.is_match(text, letter, rule) == right
        for text in (f"{letter}: Right: there are", f"{letter}: Right.\nAnswer:", "", "AB"):
            assert not stages.grpo.is_match(text, letter, rule), "cut before the verdict"


def test_06_trains_a_judge_that_02_reads_again(reasoner, tmp_path):
    lines = [{"prompt": "Is it red?", "chosen": "Yes", "rejected": "No", "id": str(i)}
             for i in range(8)]  # fmt: skip
    source = str(write_jsonl(tmp_path / "pairs.jsonl", lines))
    prepare_here(source=[source], out=str(tmp_path), judge_request=model.REQUESTS["generative"])
    reasoner.save_pretrained(str(tmp_path / "judge"))
    few = ["--steps", 1, "--batch_size", 4, "--group_size", 4, "--max_new_tokens", 8]
    few += ["--reward", "rule", "--benchmark", "", "--backbone", tmp_path / "judge"]
    few += ["--data", tmp_path / "pairs", "--out", tmp_path / "policy"]
    torchrun("06_grpo.py", *few, ranks=1)
    trained = model.HeadSettings(kind="generative", rationale=True, critique_tokens=14)
    judge = model.RewardModel.from_backbone(str(tmp_path / "policy"), trained).eval()
    scores = judge.score([user("Is it red?")], ["Yes", "No"])
    assert scores[0] == -scores[1]


# ---- read in rows, by a router, as TRL's reward


@pytest.mark.parametrize("kind", ["critic", "generative"])
def test_scores_do_not_depend_on_how_comparisons_are_cut_into_rows(kind, kinds, comparisons):
    expected = kinds[kind].score_encoded(comparisons)
    assert expected.shape == (3 * len(comparisons),)
    torch.testing.assert_close(
        kinds[kind].score_encoded(comparisons, 60), expected, atol=2e-5, rtol=0
    )
    assert kinds[kind].score_encoded([]).shape == (0,) and kinds[kind].score(
        [user("?")], []
    ).shape == (0,)


def test_a_row_has_no_more_tokens_than_the_budget_though_a_judge_shows_many_pairs(
    kinds, comparisons, monkeypatch
):
    judge, sizes, forward = kinds["generative"], [], model.Judge.forward
    monkeypatch.setattr(
        model.Judge,
        "forward",
        lambda self, row: sizes.append(row.input_ids.shape[1]) or forward(self, row),
    )
    judge.score_encoded(comparisons[:1], 150)
    assert len(sizes) > 1 and max(sizes) <= 150


def test_a_router_and_trl_take_a_critic_and_a_judge(kinds, comparisons):
    router = model.RewardRouter(kinds["critic"], kinds["generative"])
    expected = [
        kinds["critic" if each.images else "generative"].score_encoded([each])
        for each in comparisons
    ]
    torch.testing.assert_close(
        router.score_encoded(comparisons), torch.cat(expected), atol=2e-5, rtol=0
    )
    prompt = [user("What is 2 + 3?")]
    found = model.trl_reward(kinds["generative"], [prompt] * 3, RESPONSES)
    assert found == pytest.approx(kinds["generative"].score(prompt, RESPONSES).tolist(), abs=2e-5)


# ---- saved, loaded, refused


@pytest.mark.parametrize("file_size", ["5GB", "300KB"])
def test_a_kind_is_kept_where_it_is_saved_and_transformers_alone_loads_its_language_model(
    file_size, kinds, plain, comparisons, processors, tmp_path
):
    messages = [user("What do you see?", picture())]
    for kind, made in kinds.items():
        folder = str(tmp_path / kind)
        made.save_pretrained(folder, file_size=file_size)
        loaded = model.RewardModel.from_pretrained(folder).eval()
        assert type(loaded) is type(made) and loaded.asks == made.asks
        assert torch.equal(loaded.score(messages, RESPONSES), made.score(messages, RESPONSES))
        names = [
            name
            for file in (tmp_path / kind).glob("model*.safetensors")
            for name in load_file(file)
        ]
        assert not any(name.startswith("lm_head") for name in names), "it is the embeddings"
        assert bool(load_file(tmp_path / kind / "reward_head.safetensors")) == (kind == "critic")
        theirs = AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="sdpa"
        ).eval()
        inputs = plain_inputs([comparisons[1].prompt], comparisons[1], processors)
        with torch.no_grad():
            assert torch.equal(theirs(**inputs).logits, plain(**inputs).logits)


def test_a_head_file_of_no_known_kind_ends_in_one_line(reward, tmp_path):
    reward.save_pretrained(str(tmp_path))
    path = tmp_path / "reward_head.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["reward_head"])
    for other in ([], description | {"kind": "oracle"}, description | {"head": {"layers": 2}}):
        save_file(tensors, path, {"reward_head": json.dumps(other)})
        with pytest.raises(data.UserError, match="reward_head.safetensors") as error:
            model.RewardModel.from_pretrained(str(tmp_path))
        assert "\n" not in str(error.value)


def test_critiques_of_no_token_are_refused():
    with pytest.raises(data.UserError, match="--critique_tokens 0: must be at least 1"):
        model.RewardModel.from_backbone(TINY, model.HeadSettings(kind="critic", critique_tokens=0))


# ---- through the stages


@pytest.mark.parametrize("kind", ["critic", "generative"])
def test_each_kind_goes_through_all_stages_and_two_ranks_train_what_one_trains(
    kind, world, tmp_path
):
    told = ["--kind", kind, "--critique_tokens", 10, "--data", world / "data/train"]
    torchrun("02_model.py", "--out", tmp_path / "model", *told, ranks=1)
    runs = []
    for ranks in (1, 2):
        arguments = {
            "model": tmp_path / "model",
            "data": world / "data/train",
            "out": tmp_path / f"reward{ranks}",
        }
        arguments |= {
            "steps": 2,
            "batch_size": 10,
            "learning_rate": 1e-3,
            "warmup": 0.5,
            "micro_tokens": 1500,
        }
        torchrun(
            "03_train.py",
            *(x for key, value in arguments.items() for x in (f"--{key}", value)),
            ranks=ranks,
        )
        files = [
            arguments["out"] / name for name in ("model.safetensors", "reward_head.safetensors")
        ]
        weights = load_file(files[0]) | load_file(files[1])
        runs.append(
            (weights, [json.loads(line) for line in open(arguments["out"] / "metrics.jsonl")])
        )
    (one, lines_one), (two, lines_two) = runs
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0, msg=name)
    for a, b in zip(lines_one, lines_two, strict=True):
        assert all(
            a[key] == pytest.approx(b[key], abs=1e-4) for key in ("loss", "margin", "grad_norm")
        )
    assert any(name.startswith("validation_accuracy_with_given") for name in lines_one[-1]) == (
        kind == "critic"
    )
    assert any(name.startswith("mlp") for name in one) == (kind == "critic")

    rewarded = ["--model", tmp_path / "reward2"]
    benchmarks = [
        f"--benchmark={world / 'data' / name}" for name in ("new_text", "unseen_combinations")
    ]
    printed = torchrun("04_eval.py", *rewarded, *benchmarks, "--out", tmp_path / "scores").stdout
    costs = json.loads((tmp_path / "scores/reward2/cost.json").read_text())
    cost = costs["new_text"]
    assert cost["patches"] == 0 < costs["unseen_combinations"]["patches"] and (
        cost["written"] > 0
    ) == (kind == "critic")
    costs = f"a comparison costs {cost['read']:.4g} read, {cost['written']:.4g} written"
    assert f"reward2 on new_text: {costs}" in printed
    few = {
        "steps": 1,
        "batch_size": 4,
        "group_size": 3,
        "max_new_tokens": 10,
        "evaluate_size": 4,
        "reward": "model",
    }
    few |= {
        "data": world / "data/questions",
        "benchmark": world / "data/new_questions",
        "out": tmp_path / "policy",
    }
    torchrun(
        "06_grpo.py",
        *rewarded,
        *(x for key, value in few.items() for x in (f"--{key}", value)),
        ranks=1,
    )
    line = json.loads((tmp_path / "policy/metrics.jsonl").read_text())
    assert line["reward_std"] > 0 and (
        kind == "critic" or line["reward"] == pytest.approx(0, abs=1e-4)
    )


def test_a_critics_loss_that_is_not_finite_stops_the_run_and_names_its_comparisons(kinds, tmp_path):
    pairs = [
        {"prompt": f"Is it {i}?", "chosen": "yes", "rejected": "no", "id": f"pair {i}"}
        for i in range(3)
    ]
    for pair in pairs[:2]:
        pair["critiques"] = ["Right.", "Wrong."]
    prepared = [
        "--source",
        write_jsonl(tmp_path / "pairs.jsonl", pairs),
        "--holdout",
        0,
        "--out",
        tmp_path,
    ]
    torchrun("01_data.py", *prepared, ranks=1)
    kinds["critic"].save_pretrained(str(tmp_path / "model"))
    weights = load_file(tmp_path / "model/model.safetensors")
    (embeddings,) = (
        tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight")
    )
    embeddings[-1] = 3e38  # its logit overflows in every critique, no score does
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    run = {
        "model": tmp_path / "model",
        "data": tmp_path / "pairs",
        "out": tmp_path / "out",
        "steps": 1,
        "batch_size": 2,
    }
    done = torchrun(
        "03_train.py", *(f"--{key}={value}" for key, value in run.items()), ranks=1, check=False
    )
    assert done.returncode and "1 of 3 comparisons left out" in done.stdout
    assert "from 2 comparison(s)" in done.stderr and all(
        f"(id pair {i})" in done.stderr for i in (0, 1)
    )
