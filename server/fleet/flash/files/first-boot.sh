#!/bin/sh
# Runs on the Pi as root, by midge-first-boot.service, until it has succeeded once:
# installs from the boot partition, then takes every secret and itself off that partition.
# What it says is kept in midge/log/install.txt there, for `midge flash doctor`.
#
# Taken off is not erased: flash memory may keep old blocks. That is why the token enrols one
# device, once, and only for some days.
#
# With a folder as its argument it installs into that, and leaves systemd alone.
set -u
umask 077
root=${1:-}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
boot=$(dirname -- "$here")
mkdir -p "$here/log"

forget() { # overwrite, then remove
    for each in "$@"; do
        if [ -f "$each" ]; then
            dd if=/dev/zero of="$each" bs="$(wc -c <"$each")" count=1 conv=notrunc 2>/dev/null
            sync
            rm -f "$each"
        fi
    done
}

finish() {
    install -m 644 "$here/midge-report.service" "$here/midge-report.timer" "$root/etc/systemd/system/"
    install -m 755 "$here/report.sh" "$root/opt/midge/bin/midge-report"
    forget "$here/device.bundle" "$here"/data/*
    # cloud-init wrote the network down on the card's other partition; it reads this file again
    # only for another instance-id.
    if grep -q 'password:' "$boot/network-config" 2>/dev/null; then
        sed 's/password: .*/password: "erased-after-the-first-boot"/' "$boot/network-config" >"$here/network-config.new"
        forget "$boot/network-config"
        mv -f "$here/network-config.new" "$boot/network-config"
    fi
    rm -rf "$here/wheels" "$here/tasks" "$here/data"
    if [ -z "$root" ]; then
        systemctl daemon-reload
        systemctl --quiet disable midge-first-boot.service
        systemctl --quiet enable --now --no-block midge-report.timer
    fi
    rm -f "$here/first-boot.sh" "$root/etc/systemd/system/midge-first-boot.service"
    sync
}

{
    echo "first boot on $(date -u '+%Y-%m-%d %H:%M:%S') UTC, $(uname -sr), $(tr -d '\000' 2>/dev/null </proc/device-tree/model)"
    if sh "$here/install.sh" ${root:+--root "$root"}; then
        finish
        echo "result: installed"
    else
        echo "result: not installed; it is tried again at the next boot"
    fi
} >"$here/log/install.txt" 2>&1
sync
