#!/usr/bin/env bash
# Prepares /local, the folder for the cache of the workspace and for what Ray spills: on the machine's own NVMe disks where
# it has some, else on its root disk. Gives Ray's object store half of the memory. To run it again changes nothing.
set -euo pipefail

sudo mkdir -p /local
if ! mountpoint -q /local; then
    if mountpoint -q /opt/dlami/nvme; then # AWS's deep learning image has joined and mounted them
        sudo mount --bind /opt/dlami/nvme /local
    else
        mapfile -t disks < <(lsblk --noheadings --nodeps --paths --output NAME,MODEL |
            awk '/Amazon EC2 NVMe Instance Storage|nvme_card/ {print $1}')
        if ((${#disks[@]} > 1)); then
            sudo mdadm --create /dev/md0 --level=0 --force --raid-devices="${#disks[@]}" "${disks[@]}"
            disks=(/dev/md0)
        fi
        if ((${#disks[@]})); then
            sudo mkfs.ext4 -q -F "${disks[0]}"
            sudo mount -o noatime "${disks[0]}" /local
        fi
    fi
fi
sudo mkdir -p /local/cache /local/spill
sudo chmod 1777 /local/cache /local/spill
sudo mount -o remount,size=50% /dev/shm
