#!/usr/bin/env bash
# usage: setup.sh [--dry-run] NAME ZONE
#
# The last commit of this checkout, as ~/kl_reg on all workers, installed with the extra `tpu` into ~/kl_reg/.venv.
# ~/kl_reg/runs stays. A worker that has this commit already is left as it is.
source "$(dirname "$0")/common.sh"
begin '' "$@"
no_more 0

checkout=$(cd "$(dirname "$0")/.." && pwd)
commit=$(git -C "$checkout" rev-parse HEAD)
if [[ -n $(git -C "$checkout" status --porcelain --untracked-files=no) ]]; then
    echo "changes that are not committed are not sent" >&2
fi
archive=$(mktemp --suffix=.tar)
trap 'rm -f "$archive"' EXIT
git -C "$checkout" archive --output="$archive" HEAD
call compute tpus tpu-vm scp "$archive" "$name:kl_reg.tar" --worker=all --zone="$zone"
on all "set -e
if [ \"\$(cat kl_reg/.commit 2>/dev/null)\" = $commit ]; then echo 'this commit is there already'; exit 0; fi
rm -rf kl_reg.new && mkdir kl_reg.new && tar xf kl_reg.tar -C kl_reg.new
for kept in runs .venv; do if [ -e kl_reg/\$kept ]; then mv kl_reg/\$kept kl_reg.new/; fi; done
rm -rf kl_reg && mv kl_reg.new kl_reg && cd kl_reg
pip install --quiet --user uv
if [ ! -e .venv ]; then python3 -m uv venv --quiet --python 3.11 .venv; fi
python3 -m uv pip install --quiet --python .venv -e '.[tpu]'
echo $commit > .commit"
