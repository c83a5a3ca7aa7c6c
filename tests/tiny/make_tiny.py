r"""Make the embedded backbones: small Qwen2.5-VL and Qwen2-VL models, pretrained on the world.

    python tests/tiny/make_tiny.py --out tests/tiny/qwen2_5_vl
    python tests/tiny/make_tiny.py --out tests/tiny/qwen2_vl --family qwen2_vl --seed 1
    python tests/tiny/make_tiny.py --out tests/tiny/policy --width 64 --seed 2 \
        --steps 1000 400 0 0 0 0
    python tests/tiny/make_tiny.py --out tests/tiny/policy --seed 2 --steps 0 0 600 0 0 0 \
        --short 0.4 0.85 --partial 0.85

The first two take almost two hours each on one core, the policy half an hour. It sees worse, often
answers in a whole sentence where a name was asked for briefly, and mostly stops describing after
two or three objects, as many captions do: mistakes that a reward can mend.

Train a byte-level BPE tokenizer on the world's own text; its alphabet of bytes lets it encode any
text. Then train the model on text-only tasks and on pictures with eight lessons each: drills,
descriptions, questions, verdicts on somebody's answer, and checks of a description. The
shared-prefix forward of 02_model.py encodes a picture once for its eight lessons. The model sees
only scenes, tasks and combinations of the split 'train'. Later phases add requests for brevity, at
half the learning rate.

Four choices are on purpose:

- A second turn asks for a verdict, right behind the answer, where a reward head will stand. Without
  verdicts a reward model learns very slowly.
- Checks, in the last two phases, count the wrong and the missing clauses of a description, or write
  true and false clauses with yes or no behind each. Verdicts teach little about two descriptions
  that both have errors, as a policy's have.
- "Answer briefly." changes nothing here. A policy that starts from this model answers many such
  requests in whole sentences, so it can still learn brevity.
- The base of the rotary embedding is 100, not 1,000,000. With heads of 32 the published base would
  rotate neighbouring image columns by at most 0.0002 against each other, and the model would hardly
  see positions.
"""

import argparse
import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GotOcr2ImageProcessorPil,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
world = data.embedded_world()

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "qwen2")  # the last for text alone
GROUPS = 16  # of lessons in a step of pretraining
EACH = 8  # lessons of a group
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


class Mix(NamedTuple):
    """What lessons are about: shares between 0 and 1."""

    verdicts: float = 0.5  # questions about pictures that become a verdict on an answer
    late: bool = False  # verdicts begin after a quarter of the phase
    briefly: float = 0.5  # closed questions that ask for brevity
    checks: float = 0.0  # lessons about pictures that check clauses
    text: float = 0.12  # groups of lessons that have no picture
    short: tuple[float, float] = (0.25, 0.75)  # answers in a word: names of objects, all others
    partial: float = 0.0  # descriptions that end after two or three objects


# Of pretraining: steps, peak of the learning rate, lessons.
PHASES = (
    (1800, 1.0, Mix(verdicts=0.6, late=True, briefly=0.0)),
    (500, 0.5, Mix(verdicts=0.6)),
    (800, 0.5, Mix(verdicts=0.6)),
    (1300, 0.5, Mix(verdicts=0.8)),
    (1000, 0.5, Mix(verdicts=0.8, checks=0.4)),
    (900, 0.5, Mix(verdicts=0.8, checks=0.4)),
)


def lesson_of(kind: str, asked, rng: random.Random, mix: Mix, verdicts: float) -> Lesson:
    """Make a lesson from a question: its answer, or in a second turn a verdict on an answer.

    Whether an answer is short has nothing to do with whether the question asks for brevity.
    """
    right = rng.random() < 0.5
    brief = rng.random() < mix.short[0 if asked.right.startswith("a ") else 1]
    sentence = "{}" if brief else asked.sentence
    question = asked.question
    if asked.is_closed() and rng.random() < mix.briefly:
        question += " Answer briefly."
    if rng.random() < verdicts:
        answer = sentence.format(asked.right if right else asked.wrong)
        if rng.random() < 0.1:
            critique = f"{'Right' if right else 'Wrong'}: {asked.reason}."
            return "critique", [question, answer, "Is it right? Explain."], critique
        return f"verdict: {kind}", [question, answer, "Is it right?"], "Yes" if right else "No"
    if asked.is_closed():
        kind = f"{'brief' if brief else 'sentence'}: {kind}"
    answer = sentence.format(asked.right)
    if kind == "describe" and rng.random() < mix.partial:
        clauses = answer.split(", ")
        answer = ", ".join(clauses[: rng.choice([2, 3])]) + "."
    return kind, [question], answer


def drill(scene, rng: random.Random) -> Lesson:
    """List many facts of a picture, each right behind its cue, so that the model learns fast."""
    things = scene.things()
    kind = rng.choice(["colours", "counts", "checks", "neighbours"])
    items = []
    if kind == "colours":
        shapes = [shape for _, shape in things]
        items = [f"{shape} {colour}" for colour, shape in things if shapes.count(shape) == 1]
    elif kind == "counts":
        for word in (*world.COLOURS, *world.SHAPES):
            items.append(f"{word} {sum(word in thing for thing in things)}")
    elif kind == "checks":
        asked = {world.near_miss(thing, scene, rng) for thing in things} | set(things)
        for colour, shape in sorted(asked):
            items.append(f"{colour} {shape} {'yes' if (colour, shape) in things else 'no'}")
    else:
        for anchor, direction, thing in scene.neighbours():
            items.append(f"{direction} {' '.join(anchor)} {' '.join(thing)}")
    rng.shuffle(items)
    return f"drill: {kind}", [f"List the {kind}."], ", ".join(items) or "none"


def check(scene, rng: random.Random) -> Lesson:
    """Count the mistakes of a description, or write one, yes or no behind each of its clauses."""
    if rng.random() < 0.3:
        return check_neighbours(scene, rng)
    text = world.describe(scene, rng.randint(0, 5), rng)
    truth = scene.truth()
    marked = []
    right = 0
    for place, colour, shape in world.FACT.findall(text):
        is_right = truth.get(place) == (colour, shape)
        marked.append(f"at {place} a {colour} {shape} {'yes' if is_right else 'no'}")
        right += is_right
    if rng.random() < 0.4:
        return "check: marks", ["Check each place."], ", ".join(marked) or "none"
    question = rng.choice(["Describe the picture.", "What do you see?"])
    answer = f"{len(marked) - right} wrong, {len(truth) - right} missing"
    return "check: count", [question, text, "Count the mistakes."], answer


def check_neighbours(scene, rng: random.Random) -> Lesson:
    marked = []
    for anchor, direction, thing in scene.neighbours():
        right = rng.random() < 0.5
        named = world.name_of(thing if right else world.mistake(thing, scene, rng))
        marked.append(f"{direction} the {' '.join(anchor)} {named} {'yes' if right else 'no'}")
    rng.shuffle(marked)
    return "check: neighbours", ["Check the neighbours."], ", ".join(marked) or "none"


def lessons(seed: int | str, split: str, mix: Mix):
    """Yield groups of lessons with one beginning: (picture or None, EACH lessons about it)."""
    rng = random.Random(f"lessons/{split}/{seed}")
    while True:
        group = []
        if rng.random() < mix.text:
            for _ in range(EACH):
                kind = rng.choice(world.TEXT_KINDS)
                group.append(lesson_of(kind, world.ask_text(kind, rng, split), rng, mix, 0.3))
            yield None, group
            continue
        scene = world.draw_scene(rng, split)
        for _ in range(2):
            group.append(drill(scene, rng))
        group.append(lesson_of("describe", world.ask("describe", scene, rng), rng, mix, 0))
        while len(group) < EACH:
            if rng.random() < mix.checks:
                group.append(check(scene, rng))
                continue
            kind = rng.choice(list(world.ABOUT_PICTURES))
            asked = world.ask(kind, scene, rng)
            if asked:
                group.append(lesson_of(kind, asked, rng, mix, mix.verdicts))
        yield world.draw_picture(scene, rng), group


def encode(picture: bytes | None, group: list[Lesson], processors):
    """Encode a group of lessons as one comparison, and say which response tokens are learned.

    The prompt is the common beginning with the picture; each response is the question and the
    answer behind it. Only the tokens of answers are learned.
    """
    rows = []
    pictures = [picture] if picture else []
    for _, turns, answer in group:
        messages = []
        for role, turn in zip(("user", "assistant", "user"), turns):
            messages.append({"role": role, "content": turn})
        prompt, files, grids = data.encode_prompt(messages, pictures, processors)
        rows.append((prompt, data.encode_response(answer, processors)))
    first = rows[0][0]
    shared = 2  # <|im_start|>user
    if picture:
        image_tokens = (i for i, token in enumerate(first) if token == processors.image_token)
        shared = 1 + max(image_tokens, default=1)
    responses = []
    is_answer = []
    for prompt, answer in rows:
        responses.append(np.concatenate([prompt[shared:], answer]))
        is_answer += [False] * (len(prompt) - shared) + [True] * len(answer)
    return data.Comparison(first[:shared], responses, [], files, grids), is_answer


def make_tokenizer(vocabulary: int, family: str) -> Qwen2Tokenizer:
    """Train a byte-level BPE on the world's text; special tokens come last, as in Qwen's."""
    internvl = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    special = SPECIAL + (list(internvl.values()) if family == "internvl" else [])
    stream = lessons(1, "train", Mix())
    texts = []
    for _ in range(1000):
        _, group = next(stream)
        for _, turns, answer in group:
            texts += ["user\n" + turns[0] + "\n", "assistant\n" + answer]
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = qwen.pre_tokenizer
    tokenizer.normalizer = qwen.normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        model_max_length=32768,
        **({"extra_special_tokens": internvl} if family == "internvl" else {}),
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.chat_template = CHAT_TEMPLATE
    if family == "internvl":
        picture = "<|vision_start|><|image_pad|><|vision_end|>"
        tokenizer.chat_template = CHAT_TEMPLATE.replace(picture, "<IMG_CONTEXT>\\n")
    return tokenizer


def make_model(tokenizer, family: str, width: int, depth: int, seed: int = 0):
    """Make a model of this family with LM head.

    The language model has `depth` layers, the vision tower two. Both are `width` wide (a multiple
    of 64) and have heads of 32. Patches of 14 pixels merge by 2.
    """
    token = tokenizer.convert_tokens_to_ids
    heads = width // 32
    rope = {"rope_type": "default", "rope_theta": 100.0}
    decoder = dict(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=width // 64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        rope_parameters={**rope, "mrope_section": [4, 6, 6]},
    )
    tower = dict(
        depth=2, num_heads=heads, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
    )
    wide = dict(hidden_size=width, intermediate_size=2 * width)
    if family == "qwen2":
        decoder["rope_parameters"] = rope
    elif family == "qwen2_5_vl":
        tower |= wide
        tower |= dict(out_hidden_size=width, window_size=112, fullatt_block_indexes=[1])
    elif family == "qwen2_vl":
        tower |= dict(embed_dim=width, hidden_size=width, mlp_ratio=2)
    elif family == "qwen3_vl":
        # Its published patches of 16 do not fit the world's cells of 28 pixels.
        decoder["head_dim"] = 32
        decoder["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
        tower |= wide
        tower |= dict(out_hidden_size=width, num_position_embeddings=64)
        tower["deepstack_visual_indexes"] = [0]
    elif family == "internvl":
        decoder["model_type"] = "qwen2"
        decoder["rope_parameters"] = rope
        tower = dict(
            **wide,
            num_hidden_layers=2,
            num_attention_heads=heads,
            attention_bias=True,
            image_size=[TILE, TILE],  # 4 tokens a tile
            patch_size=[14, 14],
            use_absolute_position_embeddings=True,
        )
    if family == "qwen2":
        auto = AutoModelForCausalLM
        options = decoder
    else:
        auto = AutoModelForImageTextToText
        options = dict(text_config=decoder, vision_config=tower, tie_word_embeddings=True)
        if family == "internvl":
            options |= dict(
                image_token_id=token("<IMG_CONTEXT>"),
                image_seq_length=(TILE // 28) ** 2,
                downsample_ratio=0.5,
            )
        else:
            options |= dict(
                image_token_id=token("<|image_pad|>"),
                video_token_id=token("<|video_pad|>"),
                vision_start_token_id=token("<|vision_start|>"),
                vision_end_token_id=token("<|vision_end|>"),
            )
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    attention = model.attention_of(config)
    made = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
    made.generation_config.update(
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
        pad_token_id=token("<|endoftext|>"),
    )
    model.prepare_vision(made)
    return made


def make_image_processor(family: str):
    """Return None for a family without pictures."""
    if family == "qwen2":
        return None
    if family == "internvl":
        tile = {"height": TILE, "width": TILE}
        return GotOcr2ImageProcessorPil(
            size=tile, crop_to_patches=True, min_patches=1, max_patches=12
        )
    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12845056)


def loss_and_outcomes(policy, groups: list, processors) -> tuple[torch.Tensor, list[list[bool]]]:
    """Return the mean next-token loss over the answers, and for each lesson the right tokens.

    A token of an answer is right if the model gives it the highest probability.
    """
    comparisons = []
    is_answer = []
    for picture, group in groups:
        comparison, flags = encode(picture, group, processors)
        comparisons.append(comparison)
        is_answer += flags
    row = model.pack(comparisons, processors)
    places, predictors = model.response_tokens(row)
    learned = torch.tensor(is_answer)
    logits = policy.lm_head(model.run_backbone(policy.model, row)[predictors[learned]])
    targets = row.input_ids[0, places[learned]]
    right = iter((logits.argmax(-1) == targets).tolist())
    lengths = [len(response) for comparison in comparisons for response in comparison.responses]
    outcomes = []
    for flags in torch.split(learned, lengths):
        outcomes.append([next(right) for _ in range(int(flags.sum()))])
    return F.cross_entropy(logits, targets), outcomes


def share_without_picture(processors) -> float:
    return Mix().text if processors.vision else 1.0


@torch.no_grad()
def examine(policy, processors, groups: int) -> dict[str, float]:
    """Measure by kind the share of lessons that greedy decoding would answer exactly, on new scenes
    and tasks."""
    stream = lessons(2, "new", Mix(checks=0.3, text=share_without_picture(processors)))
    exact = {}
    for _ in range(groups // 20):
        batch = [next(stream) for _ in range(20)]
        _, outcomes = loss_and_outcomes(policy, batch, processors)
        kinds = [kind for _, group in batch for kind, _, _ in group]
        for kind, tokens in zip(kinds, outcomes):
            exact.setdefault(kind, []).append(all(tokens))
    return {kind: round(sum(right) / len(right), 3) for kind, right in sorted(exact.items())}


def train(policy, processors, steps: int, peak: float, mix: Mix, seed: str) -> None:
    """Run Muon on matrices and AdamW on the rest.

    Late verdicts begin once the model knows answers; earlier they teach nothing.
    """
    matrices = [p for name, p in policy.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for p in policy.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.01 * peak, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=0.003 * peak, weight_decay=0.01, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        """Warm up, then fall linearly."""
        return min(1, (step + 1) / 20) * max(0.02, 1 - step / steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in (muon, adam)]
    started = time.time()
    for step in range(steps):
        if step % 50 == 0:
            verdicts = mix.verdicts
            if mix.late:
                verdicts *= min(1, max(0, 4 * step / steps - 1))
            stream = lessons(f"{seed}/{step}", "train", mix._replace(verdicts=verdicts))
        batch = [next(stream) for _ in range(GROUPS)]
        loss, outcomes = loss_and_outcomes(policy, batch, processors)
        loss.backward()
        for part in (muon, adam, *schedules):
            part.step()
        policy.zero_grad()
        if step % 50 == 49:
            right = sum(map(sum, outcomes)) / sum(map(len, outcomes))
            seconds = time.time() - started
            progress = f"step {step + 1}: loss {loss.item():.3f}, next token right {right:.3f}"
            print(f"{progress}, {seconds:.0f} s", flush=True)
        if step % 200 == 199 or step == steps - 1:
            print(json.dumps(examine(policy, processors, groups=200)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--out", required=True, help="folder for the checkpoint")
    option("--family", choices=FAMILIES, default=FAMILIES[0], help="model_type of the checkpoint")
    option("--width", type=int, default=128, help="of the language model and the vision tower")
    option("--depth", type=int, default=4, help="layers of the language model")
    steps = [steps for steps, _, _ in PHASES]
    help = "of each phase; if the first is 0, continue with the checkpoint in --out"
    option("--steps", type=int, nargs=len(steps), default=steps, help=help)
    help = "shares of short answers: names of objects, all others"
    option("--short", type=float, nargs=2, default=Mix().short, help=help)
    help = "share of descriptions that end after two or three objects"
    option("--partial", type=float, default=0.0, help=help)
    option("--seed", type=int, default=0, help="of the weights and the lessons")
    arguments = parser.parse_args()
    family = arguments.family
    seed = arguments.seed
    out = arguments.out
    if arguments.steps[0]:
        tokenizer = make_tokenizer(640, family)
        policy = make_model(tokenizer, family, arguments.width, arguments.depth, seed)
        parameters = sum(p.numel() for p in policy.parameters())
        print(f"{parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
        for part in (tokenizer, make_image_processor(family), policy):
            if part is not None:
                part.save_pretrained(out)
    processors = data.load_processors(out)
    style = dict(short=tuple(arguments.short), partial=arguments.partial)
    for number, (steps, (_, peak, mix)) in enumerate(zip(arguments.steps, PHASES), 1):
        if steps:
            print(f"phase {number}", flush=True)
            policy = model.load_backbone(out, lm_head=True)
            mix = mix._replace(text=share_without_picture(processors), **style)
            train(policy, processors, steps, peak, mix, f"{seed}/{number}")
            policy.to(torch.bfloat16).save_pretrained(out)
    print(json.dumps(examine(model.load_backbone(out, lm_head=True), processors, groups=800)))


if __name__ == "__main__":
    main()
