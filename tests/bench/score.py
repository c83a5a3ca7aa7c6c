"""Scoring N responses to each of 8 prompts with pictures, fp32, one process

    python tests/bench/score.py

Compare three ways: here, which reads each prompt and its picture once; padded rows, one for each
response, all in one batch; and one such row at a time. Weights and comparisons are the same
(pictures of 64-256 tokens, prompts of 20-80, responses of 20-200). Compare the scores first.
"""

import tempfile
from pathlib import Path

import common
import torch

COLUMNS = [
    "N",
    "here, seconds",
    "padded rows, seconds",
    "one row at a time, seconds",
    "faster than padded",
    "than one by one",
]


def measure(ours, plain, n: int) -> dict[str, list[float]]:
    """Compare the scores of the three ways; return {way: its seconds}."""
    processors = ours.processors
    comparisons = common.make_comparisons(processors, 8, n=n, seed=n)
    row = common.model_stage.pack(comparisons, processors)
    padded = common.padded_rows(comparisons, processors)
    # in the padded batch's order: all first responses, then all second ones, ...
    singles = []
    for k in range(n):
        for c in comparisons:
            single = common.Comparison(c.prompt, [c.responses[k]], [1], c.images, c.grids)
            singles.append(common.padded_rows([single], processors))

    def score_here() -> torch.Tensor:
        return ours(row)

    def score_padded() -> torch.Tensor:
        return common.padded_scores(plain, ours.head, padded)

    def score_one_by_one() -> torch.Tensor:
        return torch.cat([common.padded_scores(plain, ours.head, single) for single in singles])

    with torch.inference_mode():
        scores = score_here().view(len(comparisons), n).T.flatten()
        torch.testing.assert_close(score_padded(), scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(score_one_by_one(), scores, atol=1e-5, rtol=1e-5)
        ways = {"ours": score_here, "padded": score_padded, "one": score_one_by_one}
        return common.alternate(ways, repetitions=5)


def main() -> None:
    ours, plain = common.make_models(Path(tempfile.mkdtemp()), common.vision_language_config())
    table = [COLUMNS]
    for n in (2, 4, 8, 16):
        seconds = measure(ours, plain, n)
        line = [n]
        for times in seconds.values():
            line.append(f"{common.median(times):.2f} ({common.spread(times)})")
        for other in ("padded", "one"):
            line.append(f"{common.ratio(seconds[other], seconds['ours']):.2f}")
        table.append(line)
    print(f"\n{common.machine()}\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
