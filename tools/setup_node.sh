#!/usr/bin/env bash
# Makes a cluster node's environment from a lock; repeated, it does nothing.
#   setup_node.sh requirements.lock|requirements-gpu.lock
# `ray up` runs it on every node behind the line that writes the cluster's variables to
# ~/.kdscale/env.sh. Run once on a machine whose image you keep, nodes of that image start at once.
set -euo pipefail
code=$(cd "$(dirname "$0")/.." && pwd)
home=~/.kdscale
lock=$code/$1
mkdir -p $home/bin
touch $home/env.sh
cat > $home/profile.sh <<END
. $home/env.sh
export PATH=$home/bin:$home/venv/bin:$HOME/.local/bin:\$PATH PYTHONPATH=$code
END
cat > $home/bin/kdscale <<'END' # the code is not installed, it lies beside
#!/bin/sh
exec python -c 'from kdscale.cli import app; app(prog_name="kdscale")' "$@"
END
chmod +x $home/bin/kdscale
grep -qxF ". $home/profile.sh" ~/.bashrc 2>/dev/null || echo ". $home/profile.sh" >> ~/.bashrc
if [ -e ~/.ray/auth_token ]; then chmod 600 ~/.ray/auth_token; fi
if cmp -s "$lock" $home/lock; then exit 0; fi

PATH=$HOME/.local/bin:$PATH
version=$(cat "$code/tools/uv-version")
if [ "$(uv --version 2>/dev/null | cut -d' ' -f2)" != "$version" ]; then
  curl -LsSf "https://astral.sh/uv/$version/install.sh" | sh
fi
uv venv --quiet --clear --python 3.11 $home/venv
grep -v '^flash-attn' "$lock" > $home/first
uv pip sync --quiet --python $home/venv/bin/python $home/first
if grep -q '^flash-attn' "$lock"; then # built against the torch that is there by now
  uv pip install --quiet --python $home/venv/bin/python --no-deps --no-build-isolation \
    "$(grep '^flash-attn' "$lock")"
fi
cp "$lock" $home/lock
