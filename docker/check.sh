#!/usr/bin/env bash
# Say what this machine lacks for the containers of llmtune (docker/compose.yaml), each with the command that fixes it:
#
#   bash docker/check.sh
#
# It changes nothing. The exit code is 0, or 7 where something would stop a container.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

problems=0
ok() { printf 'ok    %s\n' "$*"; }
note() { printf 'note  %s\n' "$*"; }
bad() { # what, command
    printf 'BAD   %s\n      -> %s\n' "$1" "$2"
    problems=$((problems + 1))
}

at_least() { # version, least: 2.30 is newer than 2.4
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

setting() { # name: from the environment, or .env
    local value=${!1:-}
    if [ -z "$value" ] && [ -r .env ]; then value=$(sed -n "s/^$1=//p" .env | tail -n 1); fi
    value=${value#\"}
    printf '%s' "${value%\"}"
}

check_docker() {
    local version
    if ! command -v docker >/dev/null; then
        bad "docker is not installed" "https://docs.docker.com/engine/install/"
        return
    fi
    if ! version=$(docker version --format '{{.Server.Version}}' 2>/dev/null) || [ -z "$version" ]; then
        bad "the Docker engine does not answer this user" "sudo systemctl start docker; sudo usermod -aG docker $(id -un), and log in anew"
    elif ! at_least "$version" 23; then
        bad "the Docker engine is $version, and the image is built with 23 or newer (BuildKit)" "https://docs.docker.com/engine/install/"
    else
        ok "Docker engine $version"
    fi
    if ! version=$(docker compose version --short 2>/dev/null); then
        bad "docker compose is not installed" "sudo apt-get install docker-compose-plugin"
    elif ! at_least "${version#v}" 2.30; then
        bad "docker compose is ${version#v}, and 'gpus: all' needs 2.30" "sudo apt-get install --only-upgrade docker-compose-plugin"
    else
        ok "docker compose ${version#v}"
    fi
}

check_gpus() {
    local driver
    if ! command -v nvidia-smi >/dev/null; then
        bad "there is no nvidia-smi: no NVIDIA driver" "sudo apt-get install nvidia-driver, and reboot"
    elif ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || [ -z "$driver" ]; then
        bad "nvidia-smi fails: the driver is not loaded" "sudo modprobe nvidia, or reboot where the driver was updated"
    elif ! at_least "$driver" 525; then
        bad "the NVIDIA driver is $driver, and images of CUDA 12 need 525" "sudo apt-get install --only-upgrade nvidia-driver, and reboot"
    else
        ok "NVIDIA driver $driver"
    fi
    if ! command -v nvidia-ctk >/dev/null; then
        bad "the NVIDIA container toolkit is not installed: containers see no GPU" \
            "sudo apt-get install nvidia-container-toolkit && sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    else
        ok "NVIDIA container toolkit"
    fi
}

check_memory() {
    local shared total limit
    shared=$(setting SHM_SIZE)
    shared=${shared:-16gb}
    total=$(awk '/^MemTotal:/ {print int($2 / 1048576)}' "${MEMINFO:-/proc/meminfo}")
    note "the host has $total GiB; /dev/shm of a container may take $shared of it (SHM_SIZE), whatever the host's own is"
    limit=$(ulimit -H -l)
    if [ "$limit" = unlimited ]; then
        ok "locked memory: unlimited"
    else
        note "this shell may lock $limit KiB; containers may lock all (ulimits in compose.yaml), which a rootless engine cannot give"
    fi
}

check_folder() { # name, what must be possible
    local folder free
    folder=$(setting "$1")
    if [ "$1" = DATA_DIR ]; then folder=${folder:-$(dirname "$PWD")/data}; fi
    if [ -z "$folder" ]; then
        ok "$1: a volume that Docker keeps"
        return
    fi
    if [ ! -d "$folder" ] && [ "$2" = read ] && [ -z "$(setting "$1")" ]; then
        note "$1: there is no $folder, and no other folder is named: /data will be empty"
        return
    fi
    if [ ! -d "$folder" ]; then
        bad "$1: there is no folder $folder, and Docker would make one of root's" "mkdir -p $folder && sudo chown $user:$user $folder"
        return
    fi
    if [ "$2" = read ]; then
        if may "$folder" 5; then ok "$1: $folder"; else bad "$1: the container's user $user may not read $folder" "chmod o+rx $folder"; fi
        return
    fi
    if ! may "$folder" 7; then
        bad "$1: the container's user $user may not write to $folder" "sudo chown $user:$user $folder"
        return
    fi
    free=$(df -Pk "$folder" | awk 'NR == 2 {print int($4 / 1048576)}')
    if [ "$free" -lt 20 ]; then
        bad "$1: $free GiB are free in $folder, and a checkpoint of a small model takes several" "$1=/a/larger/disk in docker/.env"
    else
        ok "$1: $folder, $free GiB free"
    fi
}

may() { # folder, rights as one octal digit: has the container's user, or its group, or everybody these?
    local owner group mode
    read -r owner group mode < <(stat -L -c '%u %g %a' "$1")
    mode=$((8#$mode))
    if [ "$owner" = "$user" ]; then
        (((mode >> 6 & $2) == $2))
    elif [ "$group" = "$user" ]; then
        (((mode >> 3 & $2) == $2))
    else
        (((mode & $2) == $2))
    fi
}

check_images() {
    local root free
    root=$(docker info --format '{{.DockerRootDir}}' 2>/dev/null) || return 0
    if [ -d "$root" ]; then
        free=$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1048576)}')
        if [ "$free" -lt 60 ]; then
            bad "$free GiB are free in $root, and building the image takes up to 60" "docker system prune"
        else
            ok "$root has $free GiB free"
        fi
    fi
}

check_env() {
    local mode
    if [ ! -e .env ]; then
        note "there is no docker/.env: cp docker/env.example docker/.env && chmod 600 docker/.env"
        return
    fi
    mode=$(stat -L -c '%a' .env)
    if [ "${mode: -2}" != 00 ]; then
        bad "docker/.env holds keys, and others may read it (mode $mode)" "chmod 600 docker/.env"
    else
        ok "docker/.env is yours alone"
    fi
}

# The user of the image (USER_ID of the Dockerfile).
user=$(setting USER_ID)
user=${user:-1000}
check_docker
check_gpus
check_memory
check_images
check_folder DATA_DIR read
check_folder RUNS_DIR write
check_folder CACHE_DIR write
check_folder NVME_DIR write
check_env
if [ "$problems" -gt 0 ]; then
    printf '%s problem%s would stop a container\n' "$problems" "$([ "$problems" = 1 ] || echo s)" >&2
    exit 7
fi
