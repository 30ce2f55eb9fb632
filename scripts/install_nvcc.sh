#!/bin/sh
# Installs NVIDIA's compiler (nvcc, NVRTC, headers; about 510 MB) from PyPI into a virtual environment, so
# that CUDA kernels compile on machines without a CUDA toolkit or a GPU.
#
#   scripts/install_nvcc.sh [DIR]     DIR: where to put it, default target/nvcc
#
# The last line printed is `export CUDA_HOME=...`; the build looks there for bin/nvcc:
#   eval "$(scripts/install_nvcc.sh | tail -n 1)"
set -eu
dir=${1:-"$(dirname "$0")/../target/nvcc"}

command -v python3 >/dev/null || { echo "python3 is missing: install it (with the venv module)" >&2; exit 1; }
command -v c++ >/dev/null || { echo "a C++ compiler is missing: nvcc needs one (for example g++)" >&2; exit 1; }
if [ ! -x "$dir/bin/pip" ]; then
    mkdir -p "$(dirname "$dir")"
    python3 -m venv "$dir"
fi
dir=$(cd "$dir" && pwd)
"$dir/bin/pip" install --quiet --disable-pip-version-check \
    'cuda-toolkit[nvcc,cudart,nvrtc,cccl]==13.0.*' 'nvidia-cuda-cuobjdump==13.2.51' 'nvidia-cuda-nvdisasm==13.2.51' >&2
home=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"] + "/nvidia/cu13")')
"$home/bin/nvcc" --version >&2
echo "export CUDA_HOME=$home"
