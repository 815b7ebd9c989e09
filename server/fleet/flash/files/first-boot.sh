#!/bin/sh
# Runs on the Pi as root, by midge-first-boot.service, at each boot until it has succeeded once:
# takes the wifi's key off the boot partition, installs from there, then takes every other secret
# and itself off it. What it says is kept in midge/log/install.txt there, for `midge flash doctor`,
# and in the journal. It fails, and systemd says so, until nothing is left to do.
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
log=$here/log/install.txt
# A card that has become read-only: what can be done is done, and the journal has the rest.
{ mkdir -p "$here/log" && true >"$log"; } 2>/dev/null || log=$(mktemp)

say() { printf 'midge: %s\n' "$*"; }

forget() { # overwrite, then remove
    for each in "$@"; do
        if [ -f "$each" ]; then
            dd if=/dev/zero of="$each" bs="$(wc -c <"$each")" count=1 conv=notrunc 2>/dev/null
            sync
            rm -f "$each"
        fi
    done
}

# cloud-init wrote the network down on the card's other partition before this began; it reads this
# file again only for another instance-id. What is written over the key has its length: the file is
# one sector of the card, so it is the old one or the new one, whenever the power goes.
forget_wifi() {
    network=$boot/network-config
    pad='####################################'
    if ! grep -Eq 'password: "[0-9a-f]{64}"' "$network" 2>/dev/null; then return; fi
    sed -E "s/password: \"[0-9a-f]{64}\"/password: \"erased-after-the-first-boot\" $pad/" "$network" >"$here/network-config.new" &&
        dd if="$here/network-config.new" of="$network" bs=64k conv=notrunc 2>/dev/null
    sync
    rm -f "$here/network-config.new"
}

is_clean() {
    for each in "$here/device.bundle" "$here"/data/*; do
        if [ -e "$each" ]; then return 1; fi
    done
    ! grep -Eq 'password: "[0-9a-f]{64}"' "$boot/network-config" 2>/dev/null
}

finish() {
    forget "$here/device.bundle" "$here"/data/*
    if ! is_clean; then
        say "secrets are still on the boot partition, which cannot be written; check the card in another machine"
        return 1
    fi
    install -m 644 "$here/midge-report.service" "$here/midge-report.timer" "$root/etc/systemd/system/"
    install -m 755 "$here/report.sh" "$root/opt/midge/bin/midge-report"
    rm -rf "$here/wheels" "$here/tasks" "$here/data"
    if [ -z "$root" ]; then
        systemctl daemon-reload
        systemctl --quiet disable midge-first-boot.service
        systemctl --quiet enable --now --no-block midge-report.timer
    fi
    # From here on nothing is tried again.
    rm -f "$here/first-boot.sh" "$root/etc/systemd/system/midge-first-boot.service"
}

first_boot() {
    echo "first boot on $(date -u '+%Y-%m-%d %H:%M:%S') UTC, $(uname -sr), $(tr -d '\000' 2>/dev/null </proc/device-tree/model)"
    forget_wifi
    # install.sh checks every file, and some are gone if the power went while they were taken off.
    if [ ! -e "$here/installed" ]; then
        if ! sh "$here/install.sh" ${root:+--root "$root"}; then
            echo "result: not installed; it is tried again at the next boot"
            return 1
        fi
        sync
        true >"$here/installed"
        sync
    fi
    if ! finish; then
        echo "result: installed, and not finished; it is tried again at the next boot"
        return 1
    fi
    echo "result: installed"
}

first_boot >"$log" 2>&1
code=$?
sync
cat "$log"
exit $code
