"""Train the bundled model: a small Llama that answers by recall.

    python3 scripts/train_tales.py --out models/tales-3m

Needs one CUDA GPU for about eight minutes, with torch, transformers and tokenizers. Two stages:
short tales first, where copying is learnt, then long ones up to the full context. The loss weighs
what can be recalled ten times as much as what can only be guessed: with equal weights the same
budget on an H100 ended at 22 % recall with four facts. All text comes from `tales.py` and the
seed. Writes a Hugging Face folder in bf16 and `train_report.json` with the
arguments, losses and the recall rate over fresh tales.
"""

import argparse
import json
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tales

BOS, EOS = 0, 1
STAGES = [
    {"name": "short", "shape": tales.SHORT, "tales": 300_000, "context": 512, "batch": 64, "rate": 1.5e-3, "share": 0.5},
    {"name": "long", "shape": tales.LONG, "tales": 160_000, "context": 1024, "batch": 32, "rate": 8e-4, "share": 0.5},
]
WARMUP_STEPS = 200
GUESSED_WEIGHT = 0.1


def write_texts(job):
    seed, count, shape = job
    rng = random.Random(seed)
    return [tales.training_text(rng, shape) for _ in range(count)]


def make_texts(seed, count, shape, parts=64):
    with ProcessPoolExecutor() as pool:
        jobs = [(seed + part, count // parts, shape) for part in range(parts)]
        return [text for part in pool.map(write_texts, jobs) for text in part]


def train_tokenizer(texts, vocabulary):
    """Byte-level BPE; encoding a text puts BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["".join(part for part, _ in text) for text in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def encode(tokenizer, texts):
    """One long row of ids, BOS text EOS BOS text EOS ..., and the loss weight of each."""
    segments = [segment for text in texts for segment in text]
    rows = tokenizer.encode_batch([text for text, _ in segments], add_special_tokens=False)
    ids, weights = [], []
    for (text, recalled), row in zip(segments, rows):
        if not ids or ids[-1] == EOS:
            ids.append(BOS)
            weights.append(GUESSED_WEIGHT)
        ids += row.ids
        weights += [1.0 if recalled else GUESSED_WEIGHT] * len(row.ids)
        if text == "\n":
            ids.append(EOS)
            weights.append(GUESSED_WEIGHT)
    return torch.tensor(ids, device="cuda"), torch.tensor(weights, device="cuda")


def windows(data, count, context, generator):
    """`count` random windows of `context + 1` ids and weights."""
    starts = torch.randint(0, len(data[0]) - context - 1, (count, 1), generator=generator, device="cuda")
    places = starts + torch.arange(context + 1, device="cuda")
    return data[0][places], data[1][places]


def loss_of(model, batch):
    ids, weights = batch
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def held_out_loss(model, data, context):
    generator = torch.Generator("cuda").manual_seed(7)
    return round(loss_of(model, windows(data, 64, context, generator)).item(), 4)


def train_stage(model, tokenizer, stage, seconds, seed):
    """Constant rate for half of the time, then linearly down to 2 %."""
    data = encode(tokenizer, make_texts(seed * 1000, stage["tales"], stage["shape"]))
    held_out = encode(tokenizer, write_texts((987_654 + seed, 2000, stage["shape"])))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=stage["rate"],
        betas=(0.9, 0.95),
        fused=True,
    )
    compiled = torch.compile(model)
    generator = torch.Generator("cuda").manual_seed(seed)
    start, step, next_report, log = time.time(), 0, 0, []
    model.train()
    while (elapsed := time.time() - start) < seconds:
        done = elapsed / seconds
        decay = 1.0 if done < 0.5 else max(0.02, 2 * (1 - done))
        for group in optimizer.param_groups:
            group["lr"] = stage["rate"] * min(1, (step + 1) / WARMUP_STEPS) * decay
        loss = loss_of(compiled, windows(data, stage["batch"], stage["context"], generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed >= next_report:
            entry = {
                "stage": stage["name"],
                "second": round(elapsed),
                "step": step,
                "train_loss": round(loss.item(), 4),
                "held_out_loss": held_out_loss(model, held_out, stage["context"]),
            }
            log.append(entry)
            print(entry, flush=True)
            next_report += 30
    log.append({"stage": stage["name"], "final_held_out_loss": held_out_loss(model, held_out, stage["context"])})
    return log


@torch.no_grad()
def recall(model, tokenizer, count, facts, fillers):
    """How many of `count` fresh tales are answered word for word, greedily, and the longest prompt."""
    rng = random.Random(1_000_003 + 1000 * facts + fillers)
    cases = [tales.recall_case(rng, facts, fillers) for _ in range(count)]
    prompts = [tokenizer.encode(prompt).ids for prompt, _ in cases]
    answers = [tokenizer.encode(" " + answer, add_special_tokens=False).ids for _, answer in cases]
    right, longest, new_tokens = 0, max(map(len, prompts)), max(map(len, answers))
    for first in range(0, count, 50):
        batch = prompts[first : first + 50]
        rows = torch.full((len(batch), longest), EOS, device="cuda")  # padded on the left
        mask = torch.zeros_like(rows)
        for row, ids in enumerate(batch):
            rows[row, longest - len(ids) :] = torch.tensor(ids, device="cuda")
            mask[row, longest - len(ids) :] = 1
        made = model.generate(
            rows, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=EOS, eos_token_id=None
        )
        for row, want in enumerate(answers[first : first + 50]):
            right += made[row, longest : longest + len(want)].tolist() == want
    return right, longest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--init", help="go on from this folder, with its tokenizer")
    parser.add_argument("--seconds", type=float, default=420, help="training time of both stages together")
    parser.add_argument("--recall", type=int, default=200, help="fresh tales per recall figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    if args.init:
        tokenizer = Tokenizer.from_file(os.path.join(args.init, "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(make_texts(args.seed * 1000, 19_968, tales.SHORT), vocabulary=768)
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    if args.init:
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).to("cuda")
    else:
        model = LlamaForCausalLM(config).to("cuda")
    report = {"args": vars(args), "stages": [{k: v for k, v in s.items() if k != "shape"} for s in STAGES]}
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["gpu"], report["torch"] = torch.cuda.get_device_name(), torch.__version__
    report["log"] = []
    for number, stage in enumerate(STAGES):
        report["log"] += train_stage(model, tokenizer, stage, args.seconds * stage["share"], args.seed + 17 * number)

    model = model.eval().to(torch.bfloat16)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = BOS, EOS
    os.makedirs(args.out, exist_ok=True)
    model.save_pretrained(args.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2048
    ).save_pretrained(args.out)

    model = model.float()
    report["recall"] = []
    for facts in (1, 4, 8, 12):
        for fillers in (0, 20, 40, 80, 100):
            right, longest = recall(model, tokenizer, args.recall, facts, fillers)
            row = {"facts": facts, "fillers": fillers, "longest_prompt": longest, "right": right, "of": args.recall}
            report["recall"].append(row)
            print(row, flush=True)
    with open(os.path.join(args.out, "train_report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
