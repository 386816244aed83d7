#!/bin/sh
# The gate, as any CI runs it:  gate.sh [PROJECT [REPORTS]]
#
#   PROJECT   a folder with an mtl-export.toml and what was exported from it
#   REPORTS   where the reports go, from PROJECT; out/reports beside this script if not given
#
# Exits as the first command that does not pass: 3 if a number is wrong, 7 if a file is not
# what was written, 6 if a runtime is missing. The reports are written in every case.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "${1:-$here/../01_ads_relevance}"
reports=${2:-$here/out/reports}

mtl-export parity --golden \
    --report "$reports/parity.json" --report "$reports/parity.xml" \
    --report "$reports/parity.sarif" --report "$reports/parity.md" \
    --report "$reports/parity.html"
mtl-export verify out
