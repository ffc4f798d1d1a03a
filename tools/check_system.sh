#!/usr/bin/env bash
# Names whatever the set-up needs and this machine lacks, with the line that installs it.
set -u
missing=()
command -v python3.11 >/dev/null || missing+=(python3.11)
command -v git >/dev/null || missing+=(git)
command -v g++ >/dev/null || missing+=(g++)
if command -v python3.11 >/dev/null && ! python3.11 -c 'import ensurepip, venv' 2>/dev/null; then
  missing+=(python3.11-venv)
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "missing: ${missing[*]}" >&2
  echo "on Debian: sudo apt-get install -y python3.11 python3.11-venv make git g++" >&2
  exit 1
fi
