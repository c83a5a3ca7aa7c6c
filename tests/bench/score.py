"""Scoring N responses to each of 8 prompts with pictures, fp32, one process

    python tests/bench/score.py

Here, each prompt and its picture are read once; against one row for each response, padded, all in one batch, and
against one row at a time. Same weights, same comparisons (pictures of 64-256 tokens, prompts of 20-80, responses of
20-200); the scores are compared first.
"""

import tempfile
from pathlib import Path

import common
import torch


def main() -> None:
    ours, plain = common.make_models(Path(tempfile.mkdtemp()), common.vision_language_config())
    processors = ours.processors
    table = [
        [
            "N",
            "here, seconds",
            "padded rows, seconds",
            "one row at a time, seconds",
            "faster than padded",
            "than one by one",
        ]
    ]
    for n in (2, 4, 8, 16):
        comparisons = common.make_comparisons(processors, 8, n=n, seed=n)
        row = common.model_stage.pack(comparisons, processors)
        padded = common.padded_rows(comparisons, processors)
        # in the padded batch's order: all first responses, then all second ones, ...
        single = [
            common.Comparison(c.prompt, [c.responses[k]], [1], c.images, c.grids)
            for k in range(n)
            for c in comparisons
        ]
        singles = [common.padded_rows([each], processors) for each in single]
        ways = {
            "ours": lambda: ours(row),
            "padded": lambda: common.padded_scores(plain, ours.head, padded),
            "one": lambda: torch.cat(
                [common.padded_scores(plain, ours.head, batch) for batch in singles]
            ),
        }
        with torch.inference_mode():
            scores = ways["ours"]().view(len(comparisons), n).T.flatten()
            for other in ("padded", "one"):
                torch.testing.assert_close(ways[other](), scores, atol=1e-5, rtol=1e-5)
            seconds = common.alternate(ways, repetitions=5)
        faster = [
            f"{common.ratio(seconds[other], seconds['ours']):.2f}" for other in ("padded", "one")
        ]
        table.append(
            [
                n,
                *(
                    f"{common.median(each):.2f} ({common.spread(each)})"
                    for each in seconds.values()
                ),
                *faster,
            ]
        )
    print(f"\n{common.machine()}\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
