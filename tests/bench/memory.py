"""Memory of one rank where much of it can be saved

    python tests/bench/memory.py

- 06's log-probabilities, forward and backward, over Qwen's vocabulary of 151,936: one prompt with 8
  answers of 512 tokens, random weights of width 256; the logits in parts, and all at once.
- A step of 03 on a random model of 1 GB in float32: all of it trained, and adapters of rank 16.

Each case has a process of its own. The peak is that of its anonymous memory (Linux), above what it
had when everything was imported.
"""

import argparse
import gc
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import loading
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen2Config

data, model_stage, training = common.data, common.model_stage, common.training
VOCABULARY = 151_936


def log_probabilities(at_once: int) -> float:
    grpo = importlib.import_module("06_grpo")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = Qwen2Config(vocab_size=VOCABULARY, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        data.load_processors(common.TINY).save(folder)
        policy = grpo.Policy(folder, temperature=1.0)
    policy.forbidden = policy.forbidden[:0]  # the embedded tokenizer knows few of these tokens
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, VOCABULARY, 512) for _ in range(8)]
    row = model_stage.pack_tokens([rng.integers(0, VOCABULARY, 200)], [answers])
    model_stage.LOGITS_AT_ONCE = at_once
    with loading.Watched() as watched:
        log_p, _ = policy(row)
        log_p.mean().backward()
    return watched.peak - watched.before


def training_step(lora_rank: int) -> float:
    _, _, device = data.start_distributed()
    before = loading.anonymous_memory()
    with tempfile.TemporaryDirectory() as folder:
        loading.write_checkpoint(Path(folder), layers=8)
        settings = training.Settings(model=folder, lora_rank=lora_rank)
        model = model_stage.RewardModel.from_pretrained(folder, empty=True)
        training.freeze(model.backbone, settings, device)
        training.shard(model, model.backbone, device, in_float32=[model.head])
        training.load_weights(model.backbone, folder, device)
    optimizer = training.make_optimizer(model, settings)
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 500, 64) for _ in range(2)]
    row = model_stage.pack_tokens([rng.integers(0, 500, 128)], [answers])
    gc.collect()  # rank 0 has read a whole copy
    with loading.Watched() as watched:
        for _ in range(2):
            scores = model(row)
            (-torch.nn.functional.logsigmoid(scores[0] - scores[1])).backward()
            optimizer.step()
            optimizer.zero_grad()
    del model, optimizer
    gc.collect()
    dist.destroy_process_group()
    return watched.peak - before


CASES = {
    "log-probabilities, all logits at once": (log_probabilities, 2**40),
    "log-probabilities, in parts": (log_probabilities, model_stage.LOGITS_AT_ONCE),
    "a step of 03, everything trained": (training_step, 0),
    "a step of 03, --lora_rank 16": (training_step, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    case = parser.parse_args().case
    if case:
        measure, argument = CASES[case]
        print(json.dumps(measure(argument)))
        return
    table = [["one rank", "peak of anonymous memory, MB"]]
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        table.append([case, f"{json.loads(done.stdout.splitlines()[-1]):.0f}"])
    print(f"{common.machine()}\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
