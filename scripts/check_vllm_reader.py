#!/usr/bin/env python3
"""A checkpoint written by calibrate, in vLLM's own reader: are the scales of its attention layers ours?
By hand, not in CI. Seen to work with vLLM 0.33.0 and torch 2.14.0, without a GPU and without vLLM's compiled
kernels; the folder's model has to fit in memory.

    scripts/check_vllm_reader.py FOLDER [REPORT] [--faults]
    torchrun --nproc-per-node N scripts/check_vllm_reader.py FOLDER [REPORT]      N ranks of tensor parallelism

FOLDER: written by calibrate. REPORT: what `calibrate --json` printed then; without it, the scales in FOLDER's
own file are the truth, and damage to them goes unnoticed. --faults: damaged copies of the folder too, each of
which has to be noticed.

What runs is vLLM's way from a folder to a model: its engine's configuration, its model class with its attention
layers, its loader with its mapping of names and loaders of parameters, its processing after loading. The
CPU platform is asked for: no kernel runs. Scales per channel have to be refused.
"""

import argparse
import atexit
import json
import os
import re
import shutil
import struct
import sys
import tempfile

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
import torch
import vllm
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SCALES, INDEX, CONFIG = "model-kv-scales.safetensors", "model.safetensors.index.json", "config.json"


class Difference(Exception):
    """What vLLM has is not what was written."""


def read_json(*path):
    with open(os.path.join(*path), "rb") as file:
        return json.load(file)


def tensors(path):
    """The tensors of a file of f32, by plain reading of the format: name to values."""
    with open(path, "rb") as file:
        header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        data = file.read()
    found = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            assert tensor["dtype"] == "F32", (name, tensor)
            begin, end = tensor["data_offsets"]
            found[name] = list(struct.unpack(f"<{(end - begin) // 4}f", data[begin:end]))
    return found


def name_of(layer, half):
    return f"model.layers.{layer}.self_attn.{half}_scale"


def scales_written(folder, report):
    """For each layer, K's and V's scales: those that calibrate reported, or those in its file."""
    if report:
        return [{half: layer[half]["scale"] for half in "kv"} for layer in read_json(report)["layers"]]
    found = tensors(os.path.join(folder, SCALES))
    layers = range(read_json(folder, CONFIG)["num_hidden_layers"])
    missing = [name_of(n, half) for n in layers for half in "kv" if name_of(n, half) not in found]
    if missing:
        raise Difference(f"{SCALES} has no {', '.join(missing)}")
    return [{half: found[name_of(n, half)] for half in "kv"} for n in layers]


def load(folder):
    """The folder as vLLM loads it: its configuration and its model."""
    # "enable_weights_track": vLLM refuses to leave a parameter of the model uninitialized.
    args = EngineArgs(
        model=folder, enforce_eager=True, load_format="safetensors", use_tqdm_on_load=False,
        model_loader_extra_config={"enable_weights_track": True},
        tensor_parallel_size=WORLD, distributed_executor_backend="external_launcher" if WORLD > 1 else None,
    )
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(WORLD, RANK, rendezvous(), RANK, "gloo")
            initialize_model_parallel(WORLD, 1)
        return config, get_model(vllm_config=config)


def rendezvous():
    """Where ranks find each other: as torchrun says, or a file for one alone."""
    if WORLD > 1:
        return "env://"
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"file://{folder}/store"


def of_rank(values):
    """The scales that a rank needs: one for all, or those of its KV heads, of which ranks may share one."""
    heads = len(values)
    if heads == 1:
        return values
    return values[RANK * heads // WORLD : max(RANK * heads // WORLD + 1, (RANK + 1) * heads // WORLD)]


def check(folder, written, show=False):
    """Loads the folder, and raises a Difference unless every layer of vLLM's has the scales written."""
    config, model = load(folder)
    declared = read_json(folder, CONFIG)
    heads = declared.get("num_key_value_heads") or declared["num_attention_heads"]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if show and RANK == 0:
        quant = config.quant_config
        print(f"configuration: {type(quant).__name__}, strategy {quant.kv_cache_scheme['strategy']}")
        print(f"model: {type(model).__name__}, {len(layers)} attention layers")
    wrong = []
    if len(layers) != len(written):
        wrong.append(f"{len(layers)} attention layers, not {len(written)}")
    for number, scales in enumerate(written):
        name = f"model.layers.{number}.self_attn.attn"
        layer = layers.get(name)
        if layer is None:
            wrong.append(f"no layer {name}")
            continue
        have = {"kv_cache_dtype": layer.kv_cache_dtype, "_q_scale": layer._q_scale.flatten().tolist()}
        want = {"kv_cache_dtype": "fp8", "_q_scale": [1.0] * len(of_rank(scales["k"]))}
        for half, values in scales.items():
            if len(values) not in (1, heads):
                wrong.append(f"layer {number}: {len(values)} scales for {heads} KV heads")
            values = of_rank(values)
            # FlashAttention takes the tensor, one value or one a KV head; others the largest as a number.
            want[f"_{half}_scale"] = values
            want[f"_{half}_scale_float"] = want[f"_{half}_scale_cpu"] = max(values)
            scale = getattr(layer, f"_{half}_scale")
            have[f"_{half}_scale"] = scale.tolist() if scale.dtype == torch.float32 and scale.dim() == 1 else scale
            have[f"_{half}_scale_float"] = getattr(layer, f"_{half}_scale_float")
            have[f"_{half}_scale_cpu"] = getattr(layer, f"_{half}_scale_cpu").item()
        wrong += [
            f"{name}.{field}: vLLM has {have[field]}, written was {value}"
            for field, value in want.items() if have[field] != value
        ]
        if show and RANK == 0:
            fields = ("_k_scale", "_k_scale_float", "_v_scale", "_v_scale_float", "_q_scale")
            print(f"{name}: {layer.kv_cache_dtype}, {', '.join(f'{field} {have[field]}' for field in fields)}")
    if wrong:
        raise Difference("\n".join(wrong))


def patch(folder, file, change):
    """Puts a changed file in the place of a link."""
    path = os.path.join(folder, file)
    with open(path, "rb") as old:
        new = change(old.read())
    os.unlink(path)
    with open(path, "wb") as out:
        out.write(new)


def patch_json(folder, file, change):
    def changed(text):
        value = json.loads(text)
        change(value)
        return json.dumps(value).encode()

    patch(folder, file, changed)


def flip(data):
    """One more or less in the last place of the last scale."""
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


def exchange(data):
    """K is called V and V is called K in layer 0."""
    name, other, between = b".0.self_attn.k_scale", b".0.self_attn.v_scale", b".0.self_attn.?_scale"
    return data.replace(name, between).replace(other, name).replace(between, other)


def rename(data):
    return data.replace(b".0.self_attn.k_scale", b".0.self_attn.k_scala")


def link(source, target):
    """A copy of a file that takes no time; patch() replaces files and does not write into them."""
    os.symlink(os.path.abspath(source), target)


def leave_out(index):
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != SCALES}


def without(key):
    return lambda copy: patch_json(copy, CONFIG, lambda config: config["quantization_config"].pop(key))


# What is done to a copy, and what has to be said about it: by vLLM, or by the comparison.
FAULTS = {
    "nothing": (lambda copy: None, "^$"),
    "the last bit of one scale": (lambda copy: patch(copy, SCALES, flip), r"_v_scale: vLLM has"),
    "the name of one scale": (lambda copy: patch(copy, SCALES, rename), r"no module or parameter named .*k_scala"),
    "layer 0's K and V": (lambda copy: patch(copy, SCALES, exchange), r"_k_scale: vLLM has"),
    "the scales' place in the index": (lambda copy: patch_json(copy, INDEX, leave_out), r"vLLM has \[1\.0"),
    "the kv_cache_scheme": (without("kv_cache_scheme"), "kv_cache_dtype: vLLM has auto|Attempted to load weight"),
}


def check_faults(folder, written):
    """Whether each fault, in a copy of the folder, is noticed, and nothing is where there is none."""
    all_noticed = True
    for fault, (plant, pattern) in FAULTS.items():
        with tempfile.TemporaryDirectory() as parent:
            copy = os.path.join(parent, "copy")
            shutil.copytree(folder, copy, copy_function=link)
            plant(copy)
            said = ""
            try:
                check(copy, written)
            except Exception as error:
                said = str(error)
        noticed = re.search(pattern, said) is not None
        all_noticed &= noticed
        print(f"fault: {fault}: {'as expected' if noticed else 'NOT AS EXPECTED'}: {said.splitlines()[:1]}")
    return all_noticed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("report", nargs="?")
    parser.add_argument("--faults", action="store_true")
    args = parser.parse_args()
    if args.faults and WORLD > 1:
        parser.error("--faults is for one rank: another's fault is none of its own")
    if RANK == 0:
        print(f"vllm {vllm.__version__}, torch {torch.__version__}, ranks: {WORLD}")
    strategy = read_json(args.folder, CONFIG)["quantization_config"]["kv_cache_scheme"]["strategy"]
    if strategy == "channel":
        try:
            load(args.folder)
        except Exception as error:
            # What the validation of its configuration raises, or wraps.
            refused = "Invalid strategy for compressed-tensors KV cache" in str(error)
            print(f"strategy channel: {type(error).__name__}: {error}")
        else:
            refused = False
            print("strategy channel: loaded")
        print("refused, as we say" if refused else "NOT refused as we say it is")
        return refused
    try:
        written = scales_written(args.folder, args.report)
        check(args.folder, written, show=True)
    except Difference as difference:
        print(f"DIFFERENT on rank {RANK}\n{difference}")
        return False
    print(f"rank {RANK}: the scales of all {len(written)} layers are those written, bit for bit")
    return not args.faults or check_faults(args.folder, written)


if __name__ == "__main__":
    sys.exit(not main())
