#!/bin/sh
# Takes midge's device client off this machine again.
#
#   sudo /opt/midge/uninstall.sh           identity, outbox and settings stay for a later install
#   sudo /opt/midge/uninstall.sh --purge   they go too: the device must be enrolled anew
#   uninstall.sh --root DIR                what install.sh --root put there
set -eu

root=
purge=no
while [ $# -gt 0 ]; do
    case $1 in
        --root) root=${2:?"--root needs a folder"}; shift 2 ;;
        --purge) purge=yes; shift ;;
        *) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
if [ -z "$root" ] && [ "$(id -u)" != 0 ]; then
    printf 'midge: this needs root; say: sudo %s\n' "$0" >&2
    exit 1
fi
found=no
for each in "$root/opt/midge" "$root/etc/midge" "$root/var/lib/midge"; do
    if [ -e "$each" ]; then found=yes; fi
done
if [ $found = no ]; then
    echo "midge: there is nothing of midge here"
    exit 0
fi
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    systemctl --quiet disable --now midge-device.service midge-report.timer 2>/dev/null || true
fi
rm -f "$root/etc/systemd/system/midge-device.service" \
    "$root/etc/systemd/system/multi-user.target.wants/midge-device.service" \
    "$root/etc/systemd/system/midge-report.service" "$root/etc/systemd/system/midge-report.timer" \
    "$root/usr/local/bin/midge-device"
rm -rf "$root/opt/midge" "$root/var/lib/midge-report"
if [ "$purge" = yes ]; then
    rm -rf "$root/etc/midge" "$root/var/lib/midge"
    if [ -z "$root" ] && getent passwd midge >/dev/null; then userdel midge; fi
    echo "midge: removed, with identity and settings"
elif [ ! -e "$root/var/lib/midge" ]; then
    echo "midge: removed"
else
    echo "midge: removed; identity and settings are still in $root/var/lib/midge and $root/etc/midge"
fi
if [ -z "$root" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
