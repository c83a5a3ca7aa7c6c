"""Makes the embedded backbone: a Qwen2.5-VL of 1.7 M parameters in the Hugging Face layout, pretrained on the world.

    python tests/tiny/make_tiny.py            # about 13 minutes on two cores; overwrites the files beside it

A byte-level BPE tokenizer is trained on the world's own text (with Qwen2's pre-tokenizer, so any text can be encoded),
then the model on pictures with eight lessons each (drills, descriptions, questions, verdicts on somebody's answer) and
on text-only tasks. A picture is encoded once for its eight lessons, by the shared-prefix forward of 02_model.py. Only
scenes, tasks and combinations of the split 'train' are seen. Phase 2 adds requests for brevity, at half the rate.

Three things are on purpose. Verdicts are asked for in a second turn, right behind the answer, where a reward head will
stand: without them a reward model learns very slowly. "Answer briefly." changes nothing here, so a policy that starts
from this model answers much in whole sentences when asked to be brief, and has that to learn. And the base of the
rotary embedding is 100, not 1,000,000: with heads of 32 the published base would turn neighbouring image columns
against each other by 0.0002 at most, and where things stand would hardly be seen.
"""

import argparse
import importlib
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GotOcr2ImageProcessorPil,
)
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
data, model = importlib.import_module("01_data"), importlib.import_module("02_model")
world = data.embedded_world()

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "qwen2")  # the last for text alone
TEXT = 0.12  # share of the groups of lessons that have no picture
TILE = 56  # side of InternVL's tiles, in pixels: 4 tokens
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


Lesson = tuple[str, list[str], str]  # kind, turns so far (user, assistant, user, ...), answer


def lesson_of(asked, rng: random.Random, verdicts: float, briefly: float) -> Lesson:
    """One lesson from a question: an answer to it, or a verdict on somebody's answer, asked for in a second turn.

    What names an object is mostly said in a sentence, everything else mostly in a word, whether brevity is asked for or
    not: that is left for a policy to learn.
    """
    closed, right = asked.sentence != "{}", rng.random() < 0.5
    brief = rng.random() < (0.25 if asked.right.startswith("a ") else 0.75)
    say = str if brief else asked.sentence.format
    question = asked.question + (" Answer briefly." if closed and rng.random() < briefly else "")
    if rng.random() < verdicts:
        said = say(asked.right if right else asked.wrong)
        if rng.random() < 0.1:
            explained = f"{'Right' if right else 'Wrong'}: {asked.reason}."
            return "critique", [question, said, "Is it right? Explain."], explained
        return "verdict", [question, said, "Is it right?"], "Yes" if right else "No"
    kind = f"{'brief' if brief else 'sentence'}: {asked.category}" if closed else asked.category
    return kind, [question], say(asked.right)


def drill(cells, rng: random.Random, split: str) -> Lesson:
    """Many small answers about one picture in one text: what is asked stands right before each answer, so it is learned
    fast."""
    things = [thing for row in cells for thing in row if thing]
    seen = [thing for thing in world.OBJECTS if split == "unseen" or thing not in world.UNSEEN]
    kind = rng.choice(["colours", "counts", "checks", "neighbours"])
    if kind == "colours":
        shapes = [shape for _, shape in things]
        items = [f"{shape} {colour}" for colour, shape in things if shapes.count(shape) == 1]
    elif kind == "counts":
        items = [
            f"{word} {sum(word in thing for thing in things)}"
            for word in (*world.COLOURS, *world.SHAPES)
        ]
    elif kind == "checks":
        asked = {world.near_miss(thing, rng, seen) for thing in things} | set(things)
        items = [
            f"{colour} {shape} {'yes' if (colour, shape) in things else 'no'}"
            for colour, shape in sorted(asked)
        ]
    else:
        items = [
            f"{where} {' '.join(anchor)} {' '.join(thing)}"
            for anchor, where, thing in world.neighbours(cells)
        ]
    rng.shuffle(items)
    return f"drill: {kind}", [f"List the {kind}."], ", ".join(items) or "none"


def lessons(
    seed: int,
    split: str,
    verdicts: float = 0.5,
    briefly: float = 0.5,
    each: int = 8,
    text: float = TEXT,
):
    """Endless groups of lessons that begin alike: (picture or None, `each` lessons about it). A share of `text` of them
    has no picture."""
    rng = random.Random(f"lessons/{split}/{seed}")
    while True:
        if rng.random() < text:
            yield (
                None,
                [
                    lesson_of(
                        world.ask_text(rng.choice(world.TEXT_KINDS), rng, split), rng, 0.3, briefly
                    )
                    for _ in range(each)
                ],
            )
            continue
        cells = world.draw_cells(rng, split)
        group = [drill(cells, rng, split), drill(cells, rng, split)]
        while len(group) < each:
            kind = "describe" if len(group) < 3 else rng.choice(world.CLOSED_KINDS)
            if kind == "describe":
                right = world.describe(cells, 0, rng, split)
                asked = world.Asked(
                    kind,
                    rng.choice(["Describe the picture.", "What do you see?"]),
                    right,
                    world.describe(cells, 1, rng, split),
                    reason="it should be: " + right,
                )
            else:
                asked = world.ask_about(cells, kind, rng, split)
            if asked:
                group.append(lesson_of(asked, rng, 0 if len(group) == 2 else verdicts, briefly))
        yield world.draw_picture(cells, rng), group


def encode(picture: bytes | None, group: list[Lesson], processors):
    """A group of lessons as one comparison: the prompt is what all have in common, the picture above all, and each
    `response` what follows, question and answer. Also where the answers are among the response tokens, the only ones
    that are learned."""
    rows, answers = [], []
    for _, turns, answer in group:
        messages = [
            {"role": role, "content": turn}
            for role, turn in zip(("user", "assistant", "user"), turns)
        ]
        prompt, files, grids = data.encode_prompt(
            messages, [picture] if picture else [], processors
        )
        rows.append((prompt, data.encode_response(answer, processors)))
    shared = (
        1
        + max(
            (i for i, token in enumerate(rows[0][0]) if token == processors.image_token), default=1
        )
        if picture
        else 2
    )
    for prompt, answer in rows:
        answers += [False] * (len(prompt) - shared) + [True] * len(answer)
    responses = [np.concatenate([prompt[shared:], answer]) for prompt, answer in rows]
    return data.Comparison(rows[0][0][:shared], responses, [], files, grids), answers


def make_tokenizer(vocabulary: int, family: str) -> Qwen2Tokenizer:
    """Byte-level BPE trained on the world's text, its special tokens after the ordinary ones as in Qwen's."""
    internvl = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    special = SPECIAL + (list(internvl.values()) if family == "internvl" else [])
    stream, texts = lessons(seed=1, split="train"), []
    for _ in range(1000):
        for _, turns, answer in next(stream)[1]:
            texts += ["user\n" + turns[0] + "\n", "assistant\n" + answer]
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = qwen.pre_tokenizer, qwen.normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False),
    )
    bpe = json.loads(tokenizer.to_str())["model"]
    made = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        model_max_length=32768,
        **({"extra_special_tokens": internvl} if family == "internvl" else {}),
    )
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.chat_template = CHAT_TEMPLATE
    if family == "internvl":
        picture = "<|vision_start|><|image_pad|><|vision_end|>"
        made.chat_template = CHAT_TEMPLATE.replace(picture, "<IMG_CONTEXT>\\n")
    return made


def make_model(tokenizer, family: str, width: int, depth: int):
    """A model of this family with LM head. Language model and vision tower are `width` wide, a multiple of 64; the
    language model has `depth` layers, the tower two. Heads of 32, patches of 14 and merging by 2 are everywhere."""
    token = tokenizer.convert_tokens_to_ids
    decoder = dict(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
    )
    tower = dict(
        depth=2, num_heads=width // 32, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
    )
    wide = dict(hidden_size=width, intermediate_size=2 * width)
    if family == "qwen2":
        decoder |= dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    elif family == "qwen2_5_vl":
        tower |= wide | dict(out_hidden_size=width, window_size=112, fullatt_block_indexes=[1])
    elif family == "qwen2_vl":
        tower |= dict(embed_dim=width, hidden_size=width, mlp_ratio=2)
    elif (
        family == "qwen3_vl"
    ):  # published with patches of 16, which do not fit the world's cells of 28 pixels
        decoder |= dict(head_dim=32)
        decoder["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
        tower |= wide | dict(
            out_hidden_size=width, num_position_embeddings=64, deepstack_visual_indexes=[0]
        )
    elif family == "internvl":  # tiles of 56 x 56 pixels, 4 tokens each
        decoder |= dict(
            model_type="qwen2", rope_parameters={"rope_type": "default", "rope_theta": 100.0}
        )
        tower = wide | dict(
            num_hidden_layers=2, num_attention_heads=width // 32, attention_bias=True
        )
        tower |= dict(
            image_size=[TILE, TILE], patch_size=[14, 14], use_absolute_position_embeddings=True
        )
    if family == "internvl":
        about = dict(
            image_token_id=token("<IMG_CONTEXT>"),
            image_seq_length=(TILE // 28) ** 2,
            downsample_ratio=0.5,
        )
    else:
        names = {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }
        about = {f"{name}_token_id": token(f"<|{special}|>") for name, special in names.items()}
    if family == "qwen2":
        config, auto = AutoConfig.for_model(family, **decoder), AutoModelForCausalLM
    else:
        about |= dict(text_config=decoder, vision_config=tower, tie_word_embeddings=True)
        config, auto = AutoConfig.for_model(family, **about), AutoModelForImageTextToText
    torch.manual_seed(0)
    made = auto.from_config(
        config, dtype=torch.float32, attn_implementation=model.attention_of(config)
    )
    made.generation_config.update(
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
        pad_token_id=token("<|endoftext|>"),
    )
    model.prepare_vision(made)
    return made


def make_image_processor(family: str):
    """None for a family without pictures."""
    if family == "qwen2":
        return None
    if family == "internvl":
        tile = {"height": TILE, "width": TILE}
        return GotOcr2ImageProcessorPil(
            size=tile, crop_to_patches=True, min_patches=1, max_patches=12
        )
    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12845056)


def learn(policy, groups: list, processors) -> tuple[torch.Tensor, list[list[bool]]]:
    """Mean next-token loss over the answers, and for each lesson which of its answer's tokens the model would have
    chosen."""
    encoded = [encode(picture, group, processors) for picture, group in groups]
    row = model.pack([comparison for comparison, _ in encoded], processors)
    places, predictors = row.response_tokens()
    learned = torch.tensor([is_answer for _, answers in encoded for is_answer in answers])
    logits = policy.lm_head(model.run_backbone(policy.model, row)[predictors[learned]])
    targets = row.input_ids[0, places[learned]]
    right = iter((logits.argmax(-1) == targets).tolist())
    outcomes, pieces = (
        [],
        [response for comparison, _ in encoded for response in comparison.responses],
    )
    flags = torch.split(learned, [len(piece) for piece in pieces])
    for flag in flags:
        outcomes.append([next(right) for _ in range(int(flag.sum()))])
    return F.cross_entropy(logits, targets), outcomes


@torch.no_grad()
def examine(policy, processors, split: str = "new", groups: int = 200) -> dict[str, float]:
    """Share of lessons whose every token is the likeliest one, by kind: what greedy decoding would get right."""
    text = TEXT if processors.vision else 1.0
    stream, exact = lessons(seed=2, split=split, text=text), {}
    for _ in range(groups // 20):
        batch = [next(stream) for _ in range(20)]
        for (kind, _, _), tokens in zip(
            (lesson for _, group in batch for lesson in group), learn(policy, batch, processors)[1]
        ):
            exact.setdefault(kind, []).append(all(tokens))
    return {kind: sum(outcomes) / len(outcomes) for kind, outcomes in sorted(exact.items())}


def train(
    policy, processors, steps: int, peak: float, verdicts_at, briefly: float, seed: int
) -> None:
    """Muon on matrices, AdamW on the rest; `peak` scales both learning rates, which warm up and fall linearly."""
    matrices = [p for name, p in policy.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for p in policy.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.01 * peak, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=0.003 * peak, weight_decay=0.01, betas=(0.9, 0.95))
    rate = lambda step: min(1, (step + 1) / 20) * max(0.02, 1 - step / steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in (muon, adam)]
    started = time.time()
    for step in range(steps):
        if step % 50 == 0:
            text = TEXT if processors.vision else 1.0
            stream = lessons(seed + step, "train", verdicts_at(step), briefly, text=text)
        loss, outcomes = learn(policy, [next(stream) for _ in range(24)], processors)
        loss.backward()
        for part in (muon, adam, *schedules):
            part.step()
        policy.zero_grad()
        if step % 50 == 49:
            right = sum(map(sum, outcomes)) / sum(map(len, outcomes))
            seconds = time.time() - started
            print(
                f"step {step + 1}: loss {loss.item():.3f}, next token right {right:.3f}, {seconds:.0f} s",
                flush=True,
            )
        if step % 200 == 199 or step == steps - 1:
            print(
                json.dumps(
                    {kind: round(share, 3) for kind, share in examine(policy, processors).items()}
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(HERE), help="folder for the checkpoint")
    parser.add_argument(
        "--phase",
        type=int,
        choices=(1, 2),
        help="only this phase; 2 continues from what is in --out",
    )
    parser.add_argument(
        "--family", choices=FAMILIES, default=FAMILIES[0], help="model_type of the checkpoint"
    )
    parser.add_argument(
        "--width", type=int, default=128, help="of the language model and the vision tower"
    )
    parser.add_argument("--depth", type=int, default=4, help="layers of the language model")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(1100, 400), help="steps of phase 1 and phase 2"
    )
    arguments = parser.parse_args()
    save = lambda part: part.save_pretrained(arguments.out)
    if arguments.phase != 2:
        tokenizer = make_tokenizer(640, arguments.family)
        policy = make_model(tokenizer, arguments.family, arguments.width, arguments.depth)
        for part in filter(None, (tokenizer, make_image_processor(arguments.family), policy)):
            save(part)
        processors = data.load_processors(arguments.out)
        print(
            f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(tokenizer)} tokens",
            flush=True,
        )
        # Verdicts come in once answers are known; before that they teach nothing.
        verdicts_at = lambda step: 0.6 * min(1, max(0, 4 * step / arguments.steps[0] - 1))
        train(policy, processors, arguments.steps[0], 1.0, verdicts_at, briefly=0.0, seed=0)
        save(policy.to(torch.bfloat16))
    if arguments.phase != 1:
        processors = data.load_processors(arguments.out)
        policy = model.load_backbone(arguments.out, lm_head=True)
        train(
            policy,
            processors,
            arguments.steps[1],
            0.5,
            lambda step: 0.6,
            briefly=0.5,
            seed=1_000_000,
        )
        save(policy.to(torch.bfloat16))


if __name__ == "__main__":
    main()
