#!/usr/bin/env python3
"""A checkpoint written by calibrate, in transformers + compressed-tensors and in our generate: the same
greedy tokens? By hand, not in CI: `pip install torch transformers==5.17.0 compressed-tensors==0.19.0`.
(transformers 5.24 with compressed-tensors 0.20.1 applies no KV scheme to Llama, LLM Compressor's own
checkpoints included: the scales are then "unexpected keys", and this script says so.)

    scripts/check_calibrated.py FOLDER GENERATE IDS_FILE

FOLDER: an f32 model written by calibrate. GENERATE: the program. IDS_FILE: JSON list of lists of token ids.
transformers applies the checkpoint's scales on load: it quantizes and dequantizes keys and values.
"""

import json
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24

folder, program, ids_file = sys.argv[1:]
with open(ids_file) as file:
    prompts = json.load(file)

model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", attn_implementation="eager", output_loading_info=True
)
assert model.dtype == torch.float32, "bf16 has ties: give an f32 model"
problems = {kind: sorted(names) for kind, names in info.items() if names}
print(f"loaded {type(model).__name__}, {len(prompts)} prompts, tokenizer of {len(AutoTokenizer.from_pretrained(folder))}")
print(f"loading problems: {problems or 'none'}")
if problems:
    sys.exit(1)
attention = model.model.layers[0].self_attn
print(f"layer 0: k_scale {attention.k_scale.flatten().tolist()}, v_scale {attention.v_scale.flatten().tolist()}")


def greedy(ids, quantized):
    """Tokens by transformers' own generate, with the checkpoint's scales or without them."""
    for layer in model.model.layers:
        layer.self_attn.quantization_enabled = quantized
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=NEW_TOKENS,
        eos_token_id=None, pad_token_id=0,
    )
    return out[0, len(ids):].tolist()


command = [program, "--model", folder, "--max-tokens", str(NEW_TOKENS), "--ignore-eos", "--json"]
for ids in prompts:
    command += ["--prompt-ids", ",".join(map(str, ids))]
ours = [request["outputs"][0]["token_ids"] for request in json.loads(subprocess.check_output(command))["requests"]]

with torch.no_grad():
    theirs = [greedy(ids, True) for ids in prompts]
    unquantized = [greedy(ids, False) for ids in prompts]
same = sum(a == b for a, b in zip(ours, theirs))
changed = sum(a != b for a, b in zip(unquantized, theirs))
print(f"{same} of {len(prompts)} prompts give the same {NEW_TOKENS} tokens; quantization changed {changed}")
sys.exit(same != len(prompts))
