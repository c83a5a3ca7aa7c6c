"""Let the start policy answer questions of the world: the source 'sampled'.

    python tests/tiny/sample.py   # some minutes; overwrites sampled.jsonl.gz

Preference data has to contain the mistakes that a policy makes, so the published sets let models
write their responses. Here the policy answers each question four times at temperature 1, and the
world grades the answers: 1 or 0 for an exact match or none, the F1 of its facts for a description.
A line has the different answers to one question. Where all have one grade there is no line.
"""

import argparse
import gzip
import importlib
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
data = importlib.import_module("01_data")
grpo = importlib.import_module("06_grpo")
world = data.embedded_world()

LINES = {"train": 2000, "new": 400}  # of each split
SAMPLES = 4  # answers to a question
BATCH = 50  # questions


def grade(text: str, question: dict) -> float:
    if "answer" in question:
        return float(grpo.is_match(text, question["answer"]))
    return round(world.grade(text, question["truth"]), 3)


def sampled_lines(policy, split: str, max_new_tokens: int):
    """Yield one line after the other, without end."""
    for start in itertools.count(0, BATCH):
        indices = range(start, start + BATCH)
        questions = [world.sampled_question(split, index) for index in indices]
        encode = partial(data.encode_record, processors=policy.processors, max_length=4096)
        prompts = list(map(encode, questions))
        noise = np.random.default_rng([len(split), start])
        noise = noise.random((BATCH, SAMPLES, max_new_tokens))
        tokens, _ = grpo.rollout(policy, prompts, SAMPLES, max_new_tokens, noise)
        for index, question, sampled in zip(indices, questions, tokens):
            texts = grpo.model_stage.texts_of(sampled, policy.processors)
            responses = sorted({text for text in texts if text.strip()})
            grades = [grade(text, question) for text in responses]
            if len(set(grades)) > 1:
                yield {"split": split, "index": index, "responses": responses, "grades": grades}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default=str(Path(__file__).with_name("policy")))
    arguments = parser.parse_args()
    policy = grpo.Policy(arguments.policy, temperature=1.0).eval()
    lines = []
    for split, count in LINES.items():
        stream = sampled_lines(policy, split, max_new_tokens=96)
        lines += tqdm(itertools.islice(stream, count), desc=split, total=count)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    world.SAMPLED.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
