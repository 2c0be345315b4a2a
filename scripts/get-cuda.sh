#!/usr/bin/env bash
# Installs nvcc 13.0 with what it needs, about 215 MB, from pinned and hashed wheels, in seconds. No GPU,
# driver or root needed. Does nothing where it is already installed.
#
#   scripts/get-cuda.sh [--headers] [DIR]     DIR: .cuda in the repository, which git ignores
#   eval "$(scripts/get-cuda.sh)"             and the shell has CUDA_HOME, and nvcc in its PATH
#
# --headers: only the runtime's headers and libraries, 26 MB, no compiler.
# The last lines on stdout are the `export` lines; everything else goes to stderr.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)

headers_only=
dir=$scripts/../.cuda
for argument in "$@"; do
    case $argument in
        --headers) headers_only=yes ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "get-cuda.sh: unknown option $argument" >&2; exit 2 ;;
        *) dir=$argument ;;
    esac
done
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
home=$dir/nvidia/cu13

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "get-cuda.sh: the pinned wheels are for Linux on x86-64, this is $(uname -sm)." \
        "Install CUDA 12.4 or newer from NVIDIA and set CUDA_HOME." >&2
    exit 1
fi

have_headers() { [ -e "$home/include/cuda_runtime.h" ] && [ -e "$home/lib64/libcudart_static.a" ]; }
have_compiler() {
    have_headers && [ -x "$home/nvvm/bin/cicc" ] && "$home/bin/nvcc" --version 2>/dev/null | grep -q 'V13\.0\.88'
}

install() { # requirements files
    local files=() file
    for file in "$@"; do files+=(-r "$scripts/$file"); done
    if [ -e "$dir/nvidia" ] && [ ! -e "$dir/made-by-get-cuda" ]; then
        echo "get-cuda.sh: $dir/nvidia is something else; name another folder" >&2
        exit 1
    fi
    touch "$dir/made-by-get-cuda"
    rm -rf "$dir"/nvidia "$dir"/nvidia_*.dist-info # what an interrupted run, or one with --headers, left
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --require-hashes --no-deps \
        --only-binary=:all: --no-compile --target "$dir" "${files[@]}" >&2
    ln -sfn libcudart.so.13 "$home/lib/libcudart.so" # for -lcudart
    rm -f "$home/lib/libnvvm.so.4"                   # 60 MB that nvcc does not use: it runs cicc
    ln -sfn lib "$home/lib64"                        # where nvcc looks for libraries; the last step
}

python3 -m pip --version >/dev/null 2>&1 || have_headers || {
    echo "get-cuda.sh: python3 with pip is needed (Debian: apt-get install python3-pip)" >&2
    exit 1
}
if [ -n "$headers_only" ]; then
    have_headers || install cuda-headers-requirements.txt
else
    have_compiler || {
        install cuda-headers-requirements.txt cuda-requirements.txt
        have_compiler || { echo "get-cuda.sh: nvcc in $home does not run" >&2; exit 1; }
    }
fi
echo "export CUDA_HOME=$home"
[ -n "$headers_only" ] || echo 'export PATH="$CUDA_HOME/bin:$PATH"'
