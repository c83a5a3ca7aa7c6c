"""Scoring N responses to each of 8 prompts with pictures, fp32, one process

    python tests/bench/score.py

Compare the packed row, which reads each prompt and its picture once, with one padded batch that has
a row for every response, and with one row at a time. Same weights, same comparisons (pictures of
64-256 tokens, prompts of 20-80, responses of 20-200); the scores are compared first.
"""

import tempfile
from functools import partial
from pathlib import Path

import common
import torch


def score_one_by_one(plain, head, batches: list) -> torch.Tensor:
    return torch.cat([common.padded_scores(plain, head, batch) for batch in batches])


def main() -> None:
    ours, plain = common.make_models(Path(tempfile.mkdtemp()), common.vision_language_config())
    processors = ours.processors
    columns = ["N", "here, seconds", "padded rows, seconds", "one row at a time, seconds"]
    table = [[*columns, "faster than padded", "FLOPs say", "than one by one", "FLOPs say"]]
    for n in (2, 4, 8, 16):
        comparisons = common.make_comparisons(processors, 8, n=n, seed=n)
        row = common.model_stage.pack(comparisons, processors)
        padded = common.padded_rows(comparisons, processors)
        singles = []  # in the padded batch's order: all first responses, then all second ones, ...
        for k in range(n):
            for c in comparisons:
                single = common.Comparison(c.prompt, [c.responses[k]], [1], c.images, c.grids)
                singles.append(common.padded_rows([single], processors))
        ways = {
            "ours": partial(ours, row),
            "padded": partial(common.padded_scores, plain, ours.head, padded),
            "one": partial(score_one_by_one, plain, ours.head, singles),
        }
        with torch.inference_mode():
            scores = ways["ours"]().view(len(comparisons), n).T.flatten()
            for other in ("padded", "one"):
                torch.testing.assert_close(ways[other](), scores, atol=1e-5, rtol=1e-5)
            seconds = common.alternate(ways, repetitions=5)
            operations = {name: common.flops(way) for name, way in ways.items()}
        line = [n]
        for times in seconds.values():
            line.append(f"{common.median(times):.2f} ({common.spread(times)})")
        for other in ("padded", "one"):
            line.append(f"{common.ratio(seconds[other], seconds['ours']):.2f}")
            line.append(f"{operations[other] / operations['ours']:.2f}")
        table.append(line)
    print(f"\n{common.machine()}\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
