#!/usr/bin/env python3
"""Decode over a paged cache by us and by others, in one process, on the same tensors.

  scripts/peers.py [--shapes 1x1024,8x16384,..] [--no-skew] [--layout NHD] [--page 16] [--heads 32/8] [--dim 128]
                   [--peers ours,ours_bf16,xqa,fi_fp8,fi_bf16,vllm,vllm_bf16,sdpa] [--vllm DIR] [--out DIR]

  ours, ours_bf16   libquantkv_cuda.so (--ours FILE; compiled from csrc/ with nvcc if there is none), e4m3 and bf16 cache
  ours_hnd          the same over an HND copy of the tensors, the layout this library prefers
  xqa, fi_fp8, fi_bf16   FlashInfer 0.6.12 (packages flashinfer-python and apache-tvm-ffi, brought by whoever runs this)
  vllm, vllm_bf16   vLLM's Triton unified attention: --vllm DIR holds triton_unified_attention.py and the helper files it
                    imports, out of vLLM's source distribution
  sdpa              torch: gather the pages, convert to bf16, scaled_dot_product_attention (equal lengths only)

Each result is compared with attention in f32 before it is timed; what is off is not timed. Times are medians of 30 replays
of a CUDA graph of 20 or more calls that take turns over caches of more than 200 MB in all, tables shuffled; plans are made
outside the graph. R is a plain read of the same bytes, timed alike. Peers that are missing are left out. Writes
peers.csv and peers.md to --out.
"""
import argparse
import csv
import functools
import importlib
import importlib.util
import itertools
import math
import os
import statistics
import sys
import tempfile
import types

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, here)
os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", os.path.join(tempfile.gettempdir(), "flashinfer"))
os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
os.environ.setdefault("FLASHINFER_DISABLE_VERSION_CHECK", "1")
os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))

import quantkv_ctypes as qkv  # noqa: E402

import torch  # noqa: E402

SHAPES = "1x1024,1x32768,8x4096,8x16384,16x16384,32x4096,64x4096,128x4096,256x1024"
# Relative errors of a right result: of bf16 sums, and of XQA, which rounds queries and probabilities to e4m3 (half a unit
# is 2^-4; over many terms a fraction of it stays).
BF16_PRODUCTS, E4M3_PRODUCTS = 2e-2, 2.0**-4
SKEWED = [[128] * 32 + [4096] * 32, [131072] + [4096] * 31]


def label(lens):
    if len(set(lens)) == 1:
        return f"{len(lens)} x {lens[0]}"
    runs = [f"{len(list(run))} x {length}" for length, run in itertools.groupby(lens)]
    return " + ".join(runs)


class Case:
    """The tensors of one shape: several caches, each with a table of its own.

    q [B, Hq, D] bf16; k8, v8 (e4m3) and k16, v16 (bf16) [pages, page, Hkv, D] (NHD) or [pages, Hkv, page, D] (HND);
    table [B, pages of the longest] i32.
    """

    def __init__(self, lens, args):
        self.lens, self.args = lens, args
        self.page, self.dim, self.layout = args.page, args.dim, args.layout
        self.hq, self.hkv = args.hq, args.hkv
        self.pages = [math.ceil(length / self.page) for length in lens]
        self.total, self.longest = sum(self.pages), max(self.pages)
        self.bytes = 2 * sum(lens) * self.hkv * self.dim  # of an 8-bit cache
        cuda = dict(device="cuda")
        self.lens_t = torch.tensor(lens, dtype=torch.int32, **cuda)
        self.starts = torch.arange(len(lens) + 1, dtype=torch.int32, **cuda)
        self.scale = 2.0 / math.sqrt(self.dim)
        self.q = torch.randn(len(lens), self.hq, self.dim, dtype=torch.bfloat16, **cuda)
        self.indptr = torch.tensor([0, *itertools.accumulate(self.pages)], dtype=torch.int32, **cuda)
        last = [length - (pages - 1) * self.page for length, pages in zip(lens, self.pages)]
        self.last = torch.tensor(last, dtype=torch.int32, **cuda)
        self.pools = []
        # At most 64 caches, and a third of the memory: both widths of each are kept.
        fits = int(torch.cuda.mem_get_info()[0] / 3 / (3 * self.bytes))
        if fits == 0:
            raise MemoryError("the caches do not fit")
        for _ in range(max(1, min(fits, 64, max(3, math.ceil(200e6 / self.bytes) + 1)))):
            order = torch.randperm(self.total, dtype=torch.int32, **cuda)
            table = torch.zeros(len(lens), self.longest, dtype=torch.int32, **cuda)
            for seq, (first, pages) in enumerate(zip(itertools.accumulate([0, *self.pages]), self.pages)):
                table[seq, :pages] = order[first : first + pages]
            inner = (self.page, self.hkv) if self.layout == "NHD" else (self.hkv, self.page)
            shape = (self.total, *inner, self.dim)
            pool = dict(table=table, order=order)
            for name in "kv":
                # The same numbers in both widths: e4m3 values are exact in bf16.
                pool[name + "8"] = (torch.randn(shape, dtype=torch.bfloat16, **cuda) * 0.5).to(torch.float8_e4m3fn)
                pool[name + "16"] = pool[name + "8"].to(torch.bfloat16)
            self.pools.append(pool)

    def dense(self, pool, name, seq):
        """[Hkv, length, D] f32 of one sequence."""
        pages = pool[name][pool["table"][seq, : self.pages[seq]].long()].float()
        if self.layout == "NHD":
            pages = pages.permute(0, 2, 1, 3)
        return pages.permute(1, 0, 2, 3).reshape(self.hkv, -1, self.dim)[:, : self.lens[seq]]

    def check(self, out):
        """The largest relative error over the first, the last and a middle sequence of cache 0."""
        worst = 0.0
        for seq in {0, len(self.lens) // 2, len(self.lens) - 1}:
            k, v = (self.dense(self.pools[0], name, seq) for name in ("k16", "v16"))
            group = self.hq // self.hkv
            q = self.q[seq].float().reshape(self.hkv, group, self.dim)
            weights = torch.softmax(torch.einsum("hgd,htd->hgt", q, k) * self.scale, dim=-1)
            want = torch.einsum("hgt,htd->hgd", weights, v).reshape(self.hq, self.dim)
            error = (torch.linalg.norm(out[seq].float() - want) / torch.linalg.norm(want)).item()
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst


def replay(call, pools, replays=30):
    """Microseconds of one call: median, fastest, slowest."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for pool in pools[:3]:
            call(pool)
    torch.cuda.synchronize()
    launches = len(pools) * math.ceil(20 / len(pools))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(pools[i % len(pools)])
    samples = []
    for i in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            samples.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(samples), min(samples), max(samples)


# ---- who is compared: a function of a case that gives a function of a cache, and the output tensor


def stream_now():
    return torch.cuda.current_stream().cuda_stream


def ours(library, width, layout=None):
    def prepare(case):
        out = torch.full_like(case.q, math.nan)
        formats = {8: qkv.E4M3, 16: qkv.BF16}
        ones = torch.ones(2, device="cuda")
        faults = torch.zeros(1, dtype=torch.int32, device="cuda")
        way = layout or case.layout
        row = case.hq * case.dim
        plan = {}

        def op(pool):
            def half(name, i):
                codes = pool[name + str(width)]
                if way != case.layout:
                    key = f"{name}{width}{way}"
                    if key not in pool:
                        pool[key] = codes.view(torch.uint8 if width == 8 else torch.bfloat16).permute(0, 2, 1, 3).contiguous()
                    codes = pool[key]
                scale = qkv.Scale(ones.data_ptr() + 4 * i, 0, 0)
                address_map = qkv.strides(way, case.hkv, case.page, case.dim)
                return qkv.Half(codes.data_ptr(), None, scale, address_map, formats[width], case.dim)

            cache = qkv.Cache(half("k", 0), half("v", 1), case.total, case.page, case.hkv, faults.data_ptr())
            made = qkv.PagedAttention(
                cache=cache, query=qkv.Rows(case.q.data_ptr(), row, case.dim), output=qkv.Rows(out.data_ptr(), row, case.dim),
                query_starts=case.starts.data_ptr(), seq_lens=case.lens_t.data_ptr(), block_tables=pool["table"].data_ptr(),
                block_table_stride=case.longest, num_seqs=len(case.lens), num_tokens=len(case.lens), num_heads=case.hq, max_query_len=1,
                activation=qkv.BF16, softmax_scale=case.scale, kernel=qkv.AUTO,
            )
            if "space" not in plan:
                plan["space"] = torch.empty(library.workspace_bytes(made), dtype=torch.uint8, device="cuda")
            made.workspace, made.workspace_bytes = plan["space"].data_ptr(), plan["space"].numel()
            return made

        for pool in case.pools:
            pool[f"op{width}{way}"] = op(pool)
        library.paged_attention(case.pools[0][f"op{width}{way}"], stream_now())  # makes the plan
        torch.cuda.synchronize()

        def call(pool):
            made = pool[f"op{width}{way}"]
            made.plan_is_ready = 1
            library.paged_attention(made, stream_now())

        call.keep = (ones, faults, plan)
        return call, out

    return prepare


def xqa(case):
    import flashinfer

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    out, lens = torch.empty_like(case.q), case.lens_t.to(torch.uint32)

    def call(pool):
        flashinfer.decode.xqa_batch_decode_with_kv_cache(
            case.q, (pool["k8"], pool["v8"]), workspace, pool["table"], lens, max(case.lens),
            bmm1_scale=case.scale, bmm2_scale=1.0, kv_layout=case.layout, out=out,
        )

    return call, out


def flashinfer_decode(width):
    def prepare(case):
        import flashinfer

        space, out = torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), torch.empty_like(case.q)
        dtype = torch.float8_e4m3fn if width == 8 else torch.bfloat16
        for pool in case.pools:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, case.layout, use_tensor_cores=True)
            wrapper.plan(
                case.indptr, pool["order"], case.last, case.hq, case.hkv, case.dim, case.page,
                q_data_type=torch.bfloat16, kv_data_type=dtype, sm_scale=case.scale,
            )
            pool[f"fi{width}"] = wrapper

        def call(pool):
            pool[f"fi{width}"].run(case.q, (pool[f"k{width}"], pool[f"v{width}"]), out=out)

        return call, out

    return prepare


@functools.lru_cache
def vllm_module(folder):
    """vLLM's one file without vLLM: what it imports is found in `folder` by file name, or stood in for."""
    import enum

    import triton
    import triton.language as tl

    class KVQuantMode(enum.IntEnum):
        NONE, FP8_PER_TENSOR, INT8_PER_TOKEN_HEAD, FP8_PER_TOKEN_HEAD, INT4_PER_TOKEN_HEAD, INT2_PER_TOKEN_HEAD = range(6)

    class Quiet:
        def __getattr__(self, _):
            return lambda *a, **k: None

    platform = types.SimpleNamespace(fp8_dtype=lambda: torch.float8_e4m3fn, is_rocm=lambda: False, is_cuda=lambda: True, is_xpu=lambda: False)
    known = {
        "vllm.envs": dict(VLLM_BATCH_INVARIANT=False),
        "vllm.logger": dict(init_logger=lambda name: Quiet()),
        "vllm.platforms": dict(current_platform=platform),
        "vllm.triton_utils": dict(tl=tl, triton=triton),
        "vllm.v1.kv_cache_interface": dict(KVQuantMode=KVQuantMode),
        "vllm.model_executor.layers.batch_invariant": dict(vllm_is_batch_invariant=lambda: False),
    }

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != "vllm" and not name.startswith("vllm."):
                return None
            file = os.path.join(folder, name.rsplit(".", 1)[-1] + ".py")
            if name not in known and os.path.exists(file):
                return importlib.util.spec_from_file_location(name, file)

            class Loader:
                @staticmethod
                def create_module(spec):
                    module = types.ModuleType(name)
                    module.__path__ = []
                    module.__dict__.update(known.get(name, {}))
                    return module

                @staticmethod
                def exec_module(module):
                    pass

            return importlib.util.spec_from_loader(name, Loader, is_package=True)

    sys.meta_path.insert(0, Finder)
    return importlib.import_module("vllm.v1.attention.ops.triton_unified_attention"), KVQuantMode


def vllm(folder, width):
    def prepare(case):
        import inspect

        if case.layout != "NHD":
            raise NotImplementedError("vLLM's kernel is compared over NHD")
        module, mode = vllm_module(folder)
        accepted = inspect.signature(module.unified_attention).parameters
        batch, segments = len(case.lens), 16
        out, dim = torch.empty_like(case.q), 1 << (case.dim - 1).bit_length()
        ones = torch.ones(1, dtype=torch.float32, device="cuda")
        part = lambda *shape: torch.empty(*shape, dtype=torch.float32, device="cuda")  # noqa: E731
        # What vLLM's backend passes for a decode batch; its threshold for splitting is 128 / KV heads.
        extra = dict(
            seq_threshold_3D=128 // case.hkv, num_par_softmax_segments=segments,
            softmax_segm_output=part(batch, case.hq, segments, dim), softmax_segm_max=part(batch, case.hq, segments),
            softmax_segm_expsum=part(batch, case.hq, segments),
            kv_quant_mode=mode.FP8_PER_TENSOR if width == 8 else mode.NONE,
        )
        extra = {name: value for name, value in extra.items() if name in accepted}

        def call(pool):
            module.unified_attention(
                q=case.q, k=pool[f"k{width}"], v=pool[f"v{width}"], out=out, cu_seqlens_q=case.starts, max_seqlen_q=1,
                seqused_k=case.lens_t, max_seqlen_k=max(case.lens), softmax_scale=case.scale, causal=True,
                window_size=(-1, -1), block_table=pool["table"], softcap=0, q_descale=None,
                k_descale=ones if width == 8 else None, v_descale=ones if width == 8 else None, **extra,
            )

        return call, out

    return prepare


def sdpa(case):
    if len(set(case.lens)) != 1:
        raise NotImplementedError("equal lengths only")
    out = torch.empty_like(case.q)
    batch, length = len(case.lens), case.lens[0]

    def dense(pool, name):
        pages = pool[name].view(torch.uint8)[pool["table"].long()].view(torch.float8_e4m3fn).to(torch.bfloat16)
        if case.layout == "HND":
            pages = pages.transpose(2, 3)
        return pages.reshape(batch, -1, case.hkv, case.dim)[:, :length].transpose(1, 2)

    def call(pool):
        k, v = dense(pool, "k8"), dense(pool, "v8")
        q = case.q.reshape(batch, case.hq, 1, case.dim)
        result = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=case.scale, enable_gqa=True)
        out.copy_(result.reshape(batch, case.hq, case.dim))

    return call, out


# ---- the run


def read_us(ceilings, case, width):
    """R: a plain read of as many bytes, over the caches in turn; the best of a few grids."""
    sink = torch.zeros(64, dtype=torch.int32, device="cuda")
    half = case.bytes * width // 8 // 2 // 16 * 16

    def read(blocks):
        def call(pool):
            # K and V of a cache are two tensors; their bytes are read by one kernel from a tensor as large as both.
            ceilings.read(pool["flat"].data_ptr(), 2 * half, sink.data_ptr(), blocks, stream_now())

        return call

    flat = torch.randint(0, 255, (max(2 * half * min(len(case.pools), 8), 16),), dtype=torch.uint8, device="cuda")
    slices = max(1, flat.numel() // max(2 * half, 1))
    pools = [dict(flat=flat[i * 2 * half :]) for i in range(slices)]
    return min(replay(read(blocks), pools)[0] for blocks in (2, 4, 8))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--no-skew", action="store_true")
    parser.add_argument("--layout", default="NHD", choices=["NHD", "HND"])
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--heads", default="32/8")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--peers", default="ours,ours_hnd,ours_bf16,xqa,fi_fp8,fi_bf16,vllm,vllm_bf16,sdpa")
    parser.add_argument("--ours", default="")
    parser.add_argument("--ceilings", default="")
    parser.add_argument("--vllm", default="")
    parser.add_argument("--out", default=".")
    args = parser.parse_args()
    args.hq, args.hkv = (int(part) for part in args.heads.split("/"))
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        return 0
    torch.manual_seed(0)
    csrc = os.path.join(here, "..", "csrc")
    library, ceilings = qkv.Library(args.ours, csrc), qkv.Ceilings(args.ceilings, csrc)
    peers = {
        "ours": (ours(library, 8), 8), "ours_hnd": (ours(library, 8, "HND"), 8), "ours_bf16": (ours(library, 16), 16),
        "xqa": (xqa, 8), "fi_fp8": (flashinfer_decode(8), 8), "fi_bf16": (flashinfer_decode(16), 16),
        "vllm": (vllm(args.vllm, 8), 8), "vllm_bf16": (vllm(args.vllm, 16), 16), "sdpa": (sdpa, 8),
    }  # fmt: skip
    names = [name for name in args.peers.split(",") if name]
    if args.layout == "HND":
        names = [name for name in names if name != "ours_hnd"]
    if importlib.util.find_spec("flashinfer") is None:
        print("FlashInfer is not here: xqa, fi_fp8 and fi_bf16 are left out")
        names = [name for name in names if name not in ("xqa", "fi_fp8", "fi_bf16")]
    if not args.vllm:
        names = [name for name in names if not name.startswith("vllm")]
    cases = [[int(length)] * int(batch) for batch, length in (shape.split("x") for shape in args.shapes.split(",") if shape)]
    cases += [] if args.no_skew else SKEWED
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.heads} heads, d {args.dim}, page {args.page}, {args.layout}\n")

    rows, wrong = [], 0
    for lens in cases:
        try:
            case = Case(lens, args)
        except (MemoryError, torch.OutOfMemoryError) as error:
            print(f"{label(lens)}: {error}")
            continue
        read = {8: read_us(ceilings, case, 8), 16: read_us(ceilings, case, 16)}
        for name in names:
            prepare, width = peers[name]
            row = dict(shape=label(lens), who=name, bytes=case.bytes * width // 8, read_us=round(read[width], 2))
            try:
                call, out = prepare(case)
                call(case.pools[0])
                torch.cuda.synchronize()
                row["error"] = case.check(out)
                if row["error"] > (E4M3_PRODUCTS if name == "xqa" else BF16_PRODUCTS):
                    wrong += 1
                    row["note"] = "WRONG RESULT"
                else:
                    row["us"], row["fastest"], row["slowest"] = replay(call, case.pools)
                    row["of_read"] = read[width] / row["us"]
            except NotImplementedError as error:
                row["note"] = str(error)
            except Exception as error:  # a peer that fails must not end the run
                row["note"] = f"{type(error).__name__}: {str(error)[:120]}"
                wrong += name.startswith("ours")
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
            rows.append(row)
        del case
        torch.cuda.empty_cache()
    write(rows, names, args)
    return 1 if wrong else 0


def write(rows, names, args):
    with open(os.path.join(args.out, "peers.csv"), "w", newline="") as file:
        fields = ["shape", "who", "bytes", "read_us", "us", "fastest", "slowest", "of_read", "error", "note"]
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    at = {(row["shape"], row["who"]): row for row in rows}
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    others = [name for name in names if name in ("xqa", "fi_fp8", "vllm")]
    lines = ["| batch x context | R, us | " + " | ".join(names) + " | of R | best other FP8 / ours |"]
    lines.append("|---|" + "---:|" * (len(names) + 3))
    ratios = []
    for shape in shapes:
        cells = []
        for name in names:
            row = at.get((shape, name), {})
            cells.append(f"{row['us']:.1f}" if "us" in row else ("wrong" if "WRONG" in row.get("note", "") else "-"))
        mine = at.get((shape, "ours"), {})
        best = min((at[shape, name]["us"] for name in others if "us" in at.get((shape, name), {})), default=None)
        ratio = best / mine["us"] if best and "us" in mine else None
        ratios += [ratio] if ratio else []
        tail = [f"{mine['of_read']:.3f}" if "us" in mine else "-", f"{ratio:.2f}" if ratio else "-"]
        lines.append(f"| {shape} | {mine.get('read_us', '-')} | " + " | ".join(cells + tail) + " |")
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"\ngeometric mean of best other FP8 / ours: {mean:.2f} over {len(ratios)} shapes, least {min(ratios):.2f}")
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    with open(os.path.join(args.out, "peers.md"), "w") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
