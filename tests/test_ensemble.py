"""Stage 5: combinations that can be checked by hand, and a text-only member that is the same model on text."""

import json

import numpy as np
import pytest
import torch
from conftest import RESPONSES, TINY, stages, torchrun, user

data, model, ensemble = stages.data, stages.model, stages.ensemble


def test_combinations_by_hand():
    scores = np.array([[1.0, 2.0, 3.0], [3.0, 0.0, 9.0]])
    assert ensemble.mean_of_scores(scores).tolist() == [2, 1, 6]
    assert ensemble.weighted_mean(scores, np.array([3.0, 1.0])).tolist() == [1.5, 1.5, 4.5]
    assert ensemble.route(
        scores[0], np.array([np.nan, 7, 8]), np.array([True, False, False])
    ).tolist() == [1, 7, 8]


def test_weights_are_each_members_accuracy_and_mean_margin_over_their_sum():
    scores = np.array(
        [[2.0, 1.0, 0.0, 4.0], [0.0, 3.0, 1.0, 0.0]]
    )  # comparisons of 2 and 2; first is better, then second is
    weights = ensemble.fit_weights(scores, [[1, 2], [2, 1]])
    assert weights["accuracy"].tolist() == [1.0, 0.0]
    assert weights["confidence"].tolist() == [2.5 / 4.5, 2.0 / 4.5]


def test_the_language_half_is_the_same_model_on_text(tmp_path, reward, processors):
    ensemble.language_half(TINY, str(tmp_path))
    half = model.load_backbone(str(tmp_path))
    assert (
        half.config.model_type == "qwen2"
        and data.load_processors(str(tmp_path)).fingerprint == processors.fingerprint
    )
    ids, _, _ = data.encode_prompt([user("What is 2 + 3?")], [], processors)
    row = model.pack(
        [
            data.Comparison(
                ids, [data.encode_response(text, processors) for text in RESPONSES], [1, 2, 3]
            )
        ],
        processors,
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model.run_backbone(half, row),
            model.run_backbone(reward.backbone, row),
            atol=1e-5,
            rtol=0,
        )


def test_a_text_only_model_refuses_images_by_name(tmp_path):
    ensemble.language_half(TINY, str(tmp_path))
    text_only = model.RewardModel.from_backbone(str(tmp_path), model.HeadSettings())
    with pytest.raises(ValueError, match="text-only"):
        text_only.score([user("What is it?", b"...")], RESPONSES)
    assert text_only.score([user("What is it?")], RESPONSES).shape == (3,)


def test_an_ensemble_of_one_model_with_itself_is_that_model(world, reward, tmp_path):
    for name in ("a", "b"):
        reward.save_pretrained(str(tmp_path / name))
    torchrun(
        "05_ensemble.py",
        "--member",
        tmp_path / "a",
        "--member",
        tmp_path / "b",
        "--heldout",
        world / "data/train_holdout",
        "--benchmark",
        world / "data/new_scenes",
        "--benchmark",
        world / "data/new_text",
        "--out",
        tmp_path / "out",
        ranks=2,
    )
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (
        summary["weights"]["accuracy"]
        == pytest.approx([0.5, 0.5])
        == summary["weights"]["confidence"]
    )
    for benchmark in summary["benchmarks"].values():
        assert (
            benchmark["a"]
            == benchmark["b"]
            == benchmark["mean"]
            == benchmark["by accuracy"]
            == benchmark["by confidence"]
        )
