#!/usr/bin/env bash
# basedpyright 1.40.2: an entry of `include` with a single `*` that ends in a folder ("packages/*/src") matches no file,
# without a warning, and the check ends with "0 errors". The documentation lists `*` as a wildcard of such paths. The same
# entry with `**`, or followed by `/**`, or without a wildcard, finds the folder. A monorepo whose type gate is written this
# way checks nothing, and is green. The number of files is only in --outputjson and --stats.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet basedpyright==1.40.2
mkdir -p "$folder/project/packages/a/src/a" "$folder/project/scripts"
cd "$folder/project"
echo 'wrong: int = "text"' >packages/a/src/a/module.py
echo 'right = 1' >scripts/script.py
seen() {
    printf '{"include": ["%s", "scripts"]}' "$1" >pyrightconfig.json
    # A check that finds an error ends with status 1.
    { "$folder/venv/bin/basedpyright" --outputjson || true; } |
        python3 -c 'import json, sys; said = json.load(sys.stdin)["summary"]; print(said["filesAnalyzed"], said["errorCount"])'
}
"$folder/venv/bin/basedpyright" --version
changed=0
while read -r entry files errors; do
    got=$(seen "$entry")
    echo "include $entry: files and errors $got"
    [ "$got" = "$files $errors" ] || changed=1
done <<'CASES'
packages/*/src 1 0
packages/**/src 2 1
packages/*/src/** 2 1
packages/a/src 2 1
CASES
exit "$changed"
