"""The C ABI (csrc/quantkv.h) through ctypes, as far as scripts/peers.py needs it: paged attention and the ceilings.

Structs are in the order of the header, and abi_version is compared, so that a change there is an error here.
"""
import ctypes as C
import glob
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

ABI_VERSION = 1
F32, F16, BF16, E4M3, E5M2, E4M3_FNUZ = range(6)
AUTO, PORTABLE, TENSOR_CORE = range(3)


def struct(name, *fields):
    return type(name, (C.Structure,), {"_fields_": list(fields)})


i32, i64, f32, pointer, size = C.c_int32, C.c_int64, C.c_float, C.c_void_p, C.c_size_t
AddressMap = struct("AddressMap", ("block_stride", i64), ("head_stride", i64), ("slot_stride", i64), ("chunk", i64), ("chunk_stride", i64))
Scale = struct("Scale", ("values", pointer), ("head_stride", i64), ("channel_stride", i64))
Half = struct("Half", ("codes", pointer), ("dynamic", pointer), ("scale", Scale), ("map", AddressMap), ("format", i32), ("head_dim", i32))
Cache = struct("Cache", ("k", Half), ("v", Half), ("num_blocks", i64), ("block_size", i32), ("num_kv_heads", i32), ("faults", pointer))
Rows = struct("Rows", ("data", pointer), ("token_stride", i64), ("head_stride", i64))
PagedAttention = struct(
    "PagedAttention",
    ("cache", Cache), ("query", Rows), ("output", Rows), ("lse", pointer), ("query_starts", pointer), ("seq_lens", pointer),
    ("block_tables", pointer), ("block_table_stride", i64), ("num_seqs", i64), ("num_tokens", i64), ("num_heads", i32),
    ("activation", i32), ("softmax_scale", f32), ("soft_cap", f32), ("sliding_window", i64), ("alibi_slopes", pointer),
    ("sinks", pointer), ("workspace", pointer), ("workspace_bytes", size), ("plan_is_ready", i32), ("kernel", i32), ("max_query_len", i64),
)


def compile_library(csrc, name, sources, archs="90a"):
    """Builds a shared library from csrc/ with nvcc, one compile a source, for machines without cargo."""
    folder = tempfile.mkdtemp()
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("NVCC") or os.path.join(home, "bin", "nvcc")
    flags = ["-std=c++17", "-O3", "-I", csrc, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split(",")]

    def one(source):
        made = os.path.join(folder, os.path.basename(source) + ".o")
        subprocess.run([nvcc, *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(one, sources))
    library = os.path.join(folder, name)
    subprocess.run([nvcc, "-shared", "-o", library, *objects], check=True)
    return library


def check(library, what, status):
    if status != 0:
        library.quantkv_cuda_status_string.restype = C.c_char_p
        raise RuntimeError(f"{what}: {library.quantkv_cuda_status_string(status).decode()}")


class Library:
    """libquantkv_cuda.so; compiled from `csrc` if there is no such file."""

    def __init__(self, path, csrc):
        if not path or not os.path.exists(path):
            path = compile_library(csrc, "libquantkv_cuda.so", sorted(glob.glob(os.path.join(csrc, "cuda", "*.cu"))))
        self.library = C.CDLL(path)
        if self.library.quantkv_abi_version() != ABI_VERSION:
            raise RuntimeError("libquantkv_cuda.so has another ABI version than this file")

    def workspace_bytes(self, op):
        needed = size()
        check(self.library, "workspace", self.library.quantkv_cuda_paged_attention_workspace_bytes(C.byref(op), C.byref(needed)))
        return needed.value

    def paged_attention(self, op, stream):
        check(self.library, "paged_attention", self.library.quantkv_cuda_paged_attention(C.byref(op), C.c_void_p(stream)))


class Ceilings:
    """libquantkv_bench.so (csrc/bench/ceilings.cu)."""

    def __init__(self, path, csrc):
        if not path or not os.path.exists(path):
            path = compile_library(csrc, "libquantkv_bench.so", [os.path.join(csrc, "bench", "ceilings.cu")])
        self.library = C.CDLL(path)

    def read(self, address, count, sink, blocks, stream):
        status = self.library.quantkv_bench_read(C.c_void_p(address), i64(count), C.c_void_p(sink), C.c_int(blocks), C.c_void_p(stream))
        if status != 0:
            raise RuntimeError(f"read: status {status}")


def strides(layout, heads, block, dim):
    """The address map of one half: "HND" [blocks, heads, block, dim], "NHD" [blocks, block, heads, dim]."""
    if layout == "HND":
        return AddressMap(heads * block * dim, block * dim, dim, dim, dim)
    return AddressMap(heads * block * dim, dim, heads * dim, dim, dim)


if __name__ == "__main__":
    # The sizes that bindgen found in the header.
    import re

    text = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src", "raw", "bindings.rs")).read()
    sizes = dict(re.findall(r'"Size of (quantkv_\w+)"\]\s*\[::core::mem::size_of::<quantkv_\w+>\(\) - (\d+)usize', text))
    for ours, theirs in [(AddressMap, "address_map"), (Scale, "scale"), (Half, "half"), (Cache, "cache"), (Rows, "rows"), (PagedAttention, "paged_attention")]:
        assert C.sizeof(ours) == int(sizes["quantkv_" + theirs]), theirs
    assert f"QUANTKV_ABI_VERSION: u32 = {ABI_VERSION};" in text
    print("the structs have the sizes of csrc/quantkv.h")
