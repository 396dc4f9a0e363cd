#!/usr/bin/env bash
# Start sshd as this user, for the keys in SSH_PUBLIC_KEYS (one a line); there is no start without one.
set -euo pipefail
keys=$HOME/.ssh/authorized_keys host=$HOME/.host-keys/ed25519
umask 077
printf '%s\n' "${SSH_PUBLIC_KEYS:-}" >"$keys"
if ! ssh-keygen -l -f "$keys" >/dev/null 2>&1; then
    printf 'error: SSH_PUBLIC_KEYS holds no public key, and passwords are not taken.\n%s\n' \
        "Set it to what this prints on your machine: cat ~/.ssh/id_ed25519.pub" >&2
    exit 7
fi
[ -f "$host" ] || ssh-keygen -q -t ed25519 -N '' -f "$host"
printf 'host key: %s\n' "$(ssh-keygen -l -f "$host")"

# A session begins with an empty environment: what the image says of paths is handed on, and no key or token is.
settings=()
for name in PATH HF_HOME LLMTUNE_CACHE TORCH_EXTENSIONS_DIR XDG_CACHE_HOME LD_LIBRARY_PATH CUDA_HOME PYTHONUNBUFFERED; do
    if [ -n "${!name:-}" ]; then settings+=("$name=${!name}"); fi
done
exec /usr/sbin/sshd -D -e -f /opt/llmtune/sshd_config -o "SetEnv=${settings[*]}" "$@"
