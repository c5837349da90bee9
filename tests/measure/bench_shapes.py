"""Policies of the published shapes with random weights, for measuring without a download.

    from bench_shapes import SHAPES, make_policy
    policy = make_policy("3b", "cuda", torch.bfloat16)

"3b" and "7b" have every size of the text model and the vision tower in the config.json of
Qwen2.5-VL-3B-Instruct and -7B-Instruct. "small" runs on a CPU. "slice" is one layer of 3B at half
its width, because its balance of matrices and attention is nearer to 3B's. "tiny" is data/tiny's
config. The tokenizer is data/tiny's and has few tokens, but the vocabulary matrix has the published
number of rows, and it is the matrix that takes time and memory. The image processor has the
published limits on pixels. On the meta device a policy has shapes and no weights.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from extras.attention import batch_windows
from policy import Policy

TINY = ROOT / "data" / "tiny"


def shape(hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, sections,
          vision) -> dict:
    """The content of a config.json.

    vision: (depth, width, intermediate size, heads, blocks with full attention).
    """
    depth, width, vision_intermediate, vision_heads, full = vision
    return {
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen2_5_vl_text", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": sections},
            "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None,
            "pad_token_id": None},
        "vision_config": {
            "model_type": "qwen2_5_vl_vision", "depth": depth, "hidden_size": width,
            "num_heads": vision_heads, "intermediate_size": vision_intermediate,
            "out_hidden_size": hidden, "fullatt_block_indexes": full, "window_size": 112,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "tokens_per_second": 2}}


# The vision tower of 3B and 7B is the same but for the width of its output.
TOWER = (32, 1280, 3420, 16, [7, 15, 23, 31])
SHAPES = {
    "3b": shape(2048, 11008, 36, 16, 2, 151936, True, [16, 24, 24], TOWER),
    "7b": shape(3584, 18944, 28, 28, 4, 152064, False, [16, 24, 24], TOWER),
    "small": shape(256, 1024, 4, 4, 2, 8192, True, [8, 12, 12], (4, 128, 512, 4, [1, 3])),
    "slice": shape(1024, 5504, 1, 8, 1, 8192, True, [16, 24, 24], (4, 128, 512, 4, [1, 3])),
    "tiny": None}


def make_config(name: str) -> Qwen2_5_VLConfig:
    """The config of a shape of SHAPES; ValueError for another name."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; one of {', '.join(SHAPES)}")
    if name == "tiny":
        return Qwen2_5_VLConfig.from_pretrained(TINY)
    return Qwen2_5_VLConfig(**copy.deepcopy(SHAPES[name]))


def make_policy(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32,
                seed: int = 0) -> Policy:
    """A policy of a shape of SHAPES with normally distributed weights, made on `device` itself."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            make_config(name), dtype=dtype, attn_implementation="sdpa")
    batch_windows(model)        # as extras/weights.py:load does
    # the published image processor: least and most pixels, two temporal patches
    sizes = {} if name == "tiny" else {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 3584 * 3584}, "temporal_patch_size": 2}
    processor = Qwen2VLImageProcessorPil.from_pretrained(TINY, **sizes)
    return Policy(model.eval(), AutoTokenizer.from_pretrained(TINY), processor)
