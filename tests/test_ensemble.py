"""Stage 5: combinations checked by hand, and a text-only member that equals the model on text."""

import json

import numpy as np
import pytest
import torch
from conftest import RESPONSES, TINY, stages, torchrun, user

data, model, ensemble = stages.data, stages.model, stages.ensemble


def test_means_weights_and_routing_are_those_by_hand():
    scores = np.array([[1.0, 2.0, 3.0], [3.0, 0.0, 9.0]])
    weights = {"accuracy": np.array([3.0, 1.0])}
    has_image = np.array([True, False, False])
    systems = ensemble.combine(scores, weights, [np.array([7.0, 8.0])], has_image)
    expected = {"mean": [2, 1, 6], "by accuracy": [1.5, 1.5, 4.5]}
    expected |= {"mean, text voted": [2, (2 + 0 + 7) / 3, (3 + 9 + 8) / 3]}
    expected |= {"mean, text routed": [2, 7, 8]}
    assert {name: values.tolist() for name, values in systems.items()} == expected
    assert set(ensemble.combine(scores, weights, [], has_image)) == {"mean", "by accuracy"}
    on_text = ensemble.combine(scores, weights, [scores[1]], np.zeros(3, bool))
    assert on_text["text-only"].tolist() == [3, 0, 9] == on_text["mean, text routed"].tolist()


def test_weights_are_each_members_accuracy_and_mean_margin():
    # Two comparisons of two responses; the first response is better, then the second.
    scores = np.array([[2.0, 1.0, 0.0, 4.0], [0.0, 3.0, 1.0, 0.0]])
    one = np.zeros(1, np.int32)
    heldout = [data.Comparison(one, [one, one], ranks) for ranks in ([1, 2], [2, 1])]
    weights = ensemble.fit_weights(scores, heldout)
    assert weights["accuracy"].tolist() == [1.0, 0.0]
    assert weights["confidence"].tolist() == [2.5, 2.0]


def test_the_language_half_is_the_same_model_on_text(tmp_path, reward, processors):
    ensemble.language_half(TINY, str(tmp_path))
    half = model.load_backbone(str(tmp_path))
    assert half.config.model_type == "qwen2"
    assert data.load_processors(str(tmp_path)).fingerprint == processors.fingerprint
    prompt, _, _ = data.encode_prompt([user("What is 2 + 3?")], [], processors)
    responses = [data.encode_response(text, processors) for text in RESPONSES]
    row = model.pack([data.Comparison(prompt, responses, [1, 2, 3])], processors)
    with torch.no_grad():
        expected = model.run_backbone(reward.backbone, row)
        torch.testing.assert_close(model.run_backbone(half, row), expected, atol=1e-5, rtol=0)


def test_a_text_only_model_refuses_images_by_name(tmp_path):
    ensemble.language_half(TINY, str(tmp_path))
    text_only = model.RewardModel.from_backbone(str(tmp_path), model.HeadSettings())
    with pytest.raises(ValueError, match="text-only"):
        text_only.score([user("What is it?", b"...")], RESPONSES)
    assert text_only.score([user("What is it?")], RESPONSES).shape == (3,)


def test_an_ensemble_of_one_model_with_itself_is_that_model(world, reward, tmp_path):
    for name in ("a", "b"):
        reward.save_pretrained(str(tmp_path / name))
    members = ["--member", tmp_path / "a", "--member", tmp_path / "b"]
    sets = ["--heldout", world / "data/train_holdout"]
    for name in ("new_scenes", "new_text"):
        sets += ["--benchmark", world / "data" / name]
    torchrun("05_ensemble.py", *members, *sets, "--out", tmp_path / "out", ranks=2)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    for first, second in summary["weights"].values():
        assert first == pytest.approx(second) and first > 0
    for systems in summary["benchmarks"].values():
        for name in ("b", "mean", "by accuracy", "by confidence"):
            assert systems[name] == systems["a"]
