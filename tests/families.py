"""Write tiny checkpoints of every family with random weights and the layout of the published ones:
fields of config.json, names of tensors, bfloat16 in several files with an index, special tokens,
image processors. The layout is that of transformers' code and conversion scripts; sizes smaller.

    write("qwen3_vl", Path("somewhere"))
"""

import json
import re
from pathlib import Path

import torch
from conftest import TINY
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "use_cache": True,
}
DECODER |= {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
NARROW = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # heads of 16, as wide together as the hidden states
WIDE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": False,
}  # Qwen3: wider
QWEN = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
WINDOWS = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
VISION_TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
VISION_TOKENS |= {"image_token_id": 151655, "video_token_id": 151656}
PATCHES = {
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
MROPE = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}

CONFIGS = {
    "qwen2_5_vl": {  # Qwen2.5-VL-3B-Instruct: the decoder's fields at the top
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **DECODER, **NARROW, **QWEN, **WINDOWS, **VISION_TOKENS, **MROPE,
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 3, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
            "num_heads": 2, "in_chans": 3,
            "out_hidden_size": 32, "window_size": 112, "fullatt_block_indexes": [1],
            "tokens_per_second": 2, **PATCHES,
        },
    },
    "qwen2_vl": {  # Qwen2-VL-7B-Instruct
        "architectures": ["Qwen2VLForConditionalGeneration"],
        **DECODER, **NARROW, **QWEN, **WINDOWS, **VISION_TOKENS, **MROPE,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2, "embed_dim": 48, "mlp_ratio": 4, "num_heads": 2, "in_chans": 3,
            "hidden_size": 32, **PATCHES,
        },
    },
    "qwen3_vl": {  # Qwen3-VL-4B-Instruct
        "architectures": ["Qwen3VLForConditionalGeneration"],
        **VISION_TOKENS,
        "tie_word_embeddings": True,
        "text_config": {
            **DECODER, **WIDE, **QWEN,
            "model_type": "qwen3_vl_text", "rope_theta": 5e6, "tie_word_embeddings": True,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2],
            "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 4, "deepstack_visual_indexes": [0, 2],
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32, "in_channels": 3, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 36, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "internvl": {  # OpenGVLab/InternVL3-1B-hf
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5, "image_seq_length": 4, "image_token_id": 151667,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "text_config": {
            **DECODER, **NARROW, **QWEN, "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 151674, "rope_theta": 1e6, "tie_word_embeddings": False,
            "use_sliding_window": False,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        },
        "vision_config": {
            "model_type": "internvl_vision", "attention_bias": True, "hidden_act": "gelu",
            "hidden_size": 32,
            "image_size": [56, 56], "intermediate_size": 48, "layer_norm_eps": 1e-6,
            "layer_scale_init_value": 0.1,
            "norm_type": "layer_norm", "num_attention_heads": 2, "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": [14, 14], "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True, "use_qk_norm": False,
        },
    },
    "qwen2": {  # Qwen2.5-0.5B
        "architectures": ["Qwen2ForCausalLM"],
        **DECODER, **NARROW, **QWEN, **WINDOWS, "rope_theta": 1e6, "tie_word_embeddings": True,
    },
    "qwen3": {  # Qwen3-8B
        "architectures": ["Qwen3ForCausalLM"],
        **DECODER, **WIDE, **QWEN, "rope_theta": 1e6, "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36,
    },
    "llama": {  # Llama-3.2-1B-Instruct
        "architectures": ["LlamaForCausalLM"],
        **DECODER, **NARROW, "head_dim": 16, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 5e5,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}  # fmt: skip

PUBLISHED_NAMES = {  # transformers' name of a tensor of a model with LM head -> its checkpoint's
    "qwen2_5_vl": [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")],
    "qwen2_vl": [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")],
    "internvl": [
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ],
}
IN_ONE_FILE = ("qwen2", "llama")

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
QWEN_IMAGES = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
QWEN_IMAGES |= {**CLIP, "image_processor_type": "Qwen2VLImageProcessor"}
IMAGES = {
    "qwen2_5_vl": {**QWEN_IMAGES, "processor_class": "Qwen2_5_VLProcessor"},
    "qwen2_vl": {**QWEN_IMAGES, "processor_class": "Qwen2VLProcessor"},
    "qwen3_vl": {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
    },
    "internvl": {
        "crop_to_patches": False, "min_patches": 1, "max_patches": 12, "size": {"height": 56,
        "width": 56},
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "default_to_square": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
        "rescale_factor": 1 / 255,
        "image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor",
    },
}  # fmt: skip

# Special tokens behind the base vocabulary, in the order of their ids; "_" is one of no use here.
QWEN_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> " + "_ " * 6
QWEN_SPECIAL += "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
SPECIAL = {
    "qwen": QWEN_SPECIAL,
    "internvl": QWEN_SPECIAL + " _" * 8 + " <img> </img> <IMG_CONTEXT>" + " _" * 6,
    "llama": "<|begin_of_text|> <|end_of_text|>"
    + " _" * 4
    + " <|start_header_id|> <|end_header_id|> _ <|eot_id|>",
}
LLAMA_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def write_tokenizer(name: str, folder: Path, published: bool = False) -> int:
    """Write the byte-level BPE of tests/tiny with the special tokens of a family.

    `published`: filled up with unused tokens to the published number, 151,643 or 128,000, so that
    special tokens have their published ids; that takes seconds to read. Else their ids are lower by
    the number that this function returns.
    """
    kind = name if name in ("internvl", "llama") else "qwen"
    tiny = json.loads(Path(TINY, "tokenizer.json").read_text())
    vocab = tiny["model"]["vocab"]
    vocab["AB"] = len(vocab)  # as in the published vocabularies: a judge's letters are two tokens
    tiny["model"]["merges"].append(["A", "B"])
    whole = 128000 if kind == "llama" else 151643
    size = whole if published else len(vocab)
    vocab |= {f"unused {i}": i for i in range(len(vocab), size)}
    names = [
        f"<|reserved_{i}|>" if token == "_" else token
        for i, token in enumerate(SPECIAL[kind].split())
    ]
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {
        "special": True
    }
    tiny["added_tokens"] = [
        {"id": size + i, "content": token, **plain} for i, token in enumerate(names)
    ]
    about = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    about["chat_template"] = Path(TINY, "chat_template.jinja").read_text()
    if name == "qwen2":
        # As in the checkpoints without -Instruct, whose template has <|im_end|>.
        about["eos_token"] = "<|endoftext|>"
    if name == "internvl":
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        about["chat_template"] = about["chat_template"].replace(image, "<IMG_CONTEXT>\\n")
        extra = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        }
        about["extra_special_tokens"] = extra | {"video_token": "<video>"}
    if name == "llama":
        begin, end = names[0], "<|eot_id|>"
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
        about["chat_template"] = LLAMA_TEMPLATE
        first, text = (
            {"SpecialToken": {"id": begin, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        )
        tokens = {begin: {"id": begin, "ids": [size], "tokens": [begin]}}
        more = {
            "pair": [first, text],
            "special_tokens": tokens,
        }  # encoding a text sets <|begin_of_text|> before it
        tiny["post_processor"] = {"type": "TemplateProcessing", "single": [first, text], **more}
    about["added_tokens_decoder"] = {
        str(size + i): {"content": each, **plain} for i, each in enumerate(names)
    }
    if (
        name == "qwen2_vl"
    ):  # a file of the processor, in older checkpoints the only one with a template
        (folder / "chat_template.json").write_text(
            json.dumps({"chat_template": about.pop("chat_template")})
        )
    (folder / "tokenizer.json").write_text(json.dumps(tiny))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return whole - size


def random_(name: str, shape: torch.Size) -> torch.Tensor:
    """Draw weights with which every input changes the output: transformers' own are too small."""
    if len(shape) > 1:
        return torch.randn(shape) / (
            1 if "embed_tokens" in name else max(1, shape[1:].numel()) ** 0.5
        )
    return torch.randn(shape) / 10 + ("bias" not in name)


def write_processors(name: str, folder: Path, published: bool = False) -> None:
    """Write config.json, whose token ids are those of the tokenizer, and what 01 reads."""
    folder.mkdir(parents=True, exist_ok=True)
    shift = write_tokenizer(name, folder, published)
    config = json.dumps({"model_type": name, **CONFIGS[name]}, indent=1)
    config = re.sub(r"\b(151|128)\d{3}\b", lambda token: str(int(token[0]) - shift), config)
    (folder / "config.json").write_text(config)
    if name in IMAGES:
        (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES[name]))


def write(name: str, folder: Path) -> Path:
    """Writes the checkpoint of a family; returns the folder."""
    write_processors(name, folder)
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if name in IMAGES else AutoModelForCausalLM
    with torch.device("meta"):
        parameters = dict(auto.from_config(config).named_parameters())  # shared ones once
    torch.manual_seed(0)
    weights = {}
    for key, parameter in parameters.items():
        for pattern, published in PUBLISHED_NAMES.get(name, []):
            key = re.sub(pattern, published, key)
        weights[key] = random_(key, parameter.shape).bfloat16()
    if name == "llama":
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
            8
        )  # in Llama 2's; to be ignored
    count = 1 if name in IN_ONE_FILE else 3
    names = list(weights)
    files = {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names[i::count] for i in range(count)}
    if count == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {"total_size": 2 * sum(map(torch.numel, weights.values()))}}
        index["weight_map"] = {key: file for file, keys in files.items() for key in keys}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, keys in files.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    return folder
