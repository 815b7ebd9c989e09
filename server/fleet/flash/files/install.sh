#!/bin/sh
# Installs midge's device client from the files beside it: no internet, no pip, no compiler.
#
#   sudo ./install.sh             install, or upgrade in place: identity, outbox, settings stay
#   sudo ./install.sh --no-start  the same, and leave starting to the next boot
#   ./install.sh --root DIR       into a folder, as any user; nothing is started
#   ./install.sh --python PATH    with another Python than python3
#
# /opt/midge  the software, a folder for each version   /etc/midge  settings
# /var/lib/midge  keys, outbox, samples; the service's own user `midge` owns it
#
# Until the new version has shown that it starts here, the old one stays as it is.
set -eu
umask 022

root=
python=python3
start=yes
while [ $# -gt 0 ]; do
    case $1 in
        --root) root=${2:?"--root needs a folder"}; shift 2 ;;
        --python) python=${2:?"--python needs a path"}; shift 2 ;;
        --no-start) start=no; shift ;;
        *) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
opt=$root/opt/midge
etc=$root/etc/midge
var=$root/var/lib/midge
ours=$root/etc/systemd/system

say() { printf 'midge: %s\n' "$*"; }
die() { printf 'midge: %s\n' "$*" >&2; exit 1; }
own() { if [ -z "$root" ]; then chown "$@"; fi }
# The service's user may have put links into its folder: what is written there, it writes.
as_midge() {
    if [ -z "$root" ]; then setpriv --reuid=midge --regid=midge --clear-groups "$@"; else "$@"; fi
}
give() { # FILE NAME: the file becomes the service's, whole or not at all
    # shellcheck disable=SC2016 # that shell expands it
    as_midge sh -c 'umask 077 && cat >"$1.new" && mv -f "$1.new" "$1"' give "$2" <"$1"
}

# ── May this be installed here? ──────────────────────────────────────────────────────────

if [ -z "$root" ] && [ "$(id -u)" != 0 ]; then
    die "this needs root; say: sudo $0"
fi
"$python" -c '' 2>/dev/null || die "there is no $python here; install Debian's python3, or say --python"

facts=$("$python" -c 'import platform, struct, sys
print("cp%d%d" % sys.version_info[:2], struct.calcsize("P") * 8, platform.machine())') ||
    die "$python does not work; repair it first"
version=${facts%% *}
machine=${facts##* }
bits=${facts#* }
bits=${bits%% *}
[ "$bits" = 64 ] ||
    die "this is a $bits-bit system; there is no 32-bit TensorFlow Lite: use 64-bit Raspberry Pi OS"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "this system has Python $("$python" -V 2>&1 | cut -d' ' -f2), and midge needs 3.11: use Debian 12 or newer"
wheels=$here/wheels/$version-$machine
if [ ! -d "$wheels" ]; then
    has=$(cd "$here/wheels" 2>/dev/null && printf '%s ' *) || has=nothing
    die "this bundle is for ${has% } and this system is $version-$machine; make one for it with: midge bundle --for"
fi
(cd "$here" && sha256sum --check --quiet --strict SHA256SUMS) ||
    die "a file was damaged on its way, see above; copy or write it again"
mkdir -p "$opt/releases" "$opt/bin"
room=$(df -Pk "$opt" | awk 'NR == 2 { print $4 }')
[ "$room" -gt 250000 ] ||
    die "$opt has room for $((room / 1000)) MB, and this needs 250; make room or use a larger card"

# ── The clock: a Pi without a battery may wake up before its certificates begin ──────────

floor=$(cat "$here/made-at")
if [ -z "$root" ] && [ "$(date +%s)" -lt "$floor" ]; then
    if date -s "@$floor" >/dev/null 2>&1; then
        mkdir -p /var/lib/systemd/timesync
        touch /var/lib/systemd/timesync/clock # where systemd looks for the time at the next boot
        say "the clock was behind; set to $(date -u '+%Y-%m-%d %H:%M') UTC until the network has a better one"
    else
        say "the clock is behind and could not be set; certificates may seem not yet valid"
    fi
fi

# ── The software, beside what is there ───────────────────────────────────────────────────

release=$(grep "  wheels/$version-$machine/" "$here/SHA256SUMS" | sha256sum | cut -c1-16)
new=$opt/releases/$release
if [ -e "$new/complete" ]; then
    say "this version is installed already"
else
    rm -rf "$new"
    "$python" -m venv --without-pip "$new" ||
        die "$python cannot make an environment; install python3-venv"
    "$new/bin/python" - "$wheels" <<'UNPACK'
import pathlib, sys, sysconfig, zipfile

for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(sysconfig.get_path("purelib"))
UNPACK
    # The service's user may not write here, so what is not compiled now is compiled at every start.
    # Packages bring tests, which nobody imports here.
    "$new/bin/python" -m compileall -q -j 0 -x 'site-packages/.*/tests/' "$new/lib" >/dev/null || true
    (cd / && "$new/bin/python" -P -c 'import importlib, importlib.util, device_client.cli
names = [n for n in ("tflite_runtime", "ai_edge_litert") if importlib.util.find_spec(n)]
importlib.import_module(names[0] + ".interpreter")') ||
        die "the new version does not start on this machine, see above; what was installed before is untouched"
    sync
    touch "$new/complete"
fi
ln -sfn "releases/$release" "$opt/current.new"
mv -fT "$opt/current.new" "$opt/current"
cat >"$opt/bin/midge-device.new" <<'WRAPPER'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
exec "$here/../current/bin/python" -P -c 'import sys
from device_client.cli import main
del sys.argv[0]
main()' "$here/midge-device" "$@"
WRAPPER
chmod 755 "$opt/bin/midge-device.new"
mv -f "$opt/bin/midge-device.new" "$opt/bin/midge-device"
cp "$here/uninstall.sh" "$opt/uninstall.sh"
chmod 755 "$opt/uninstall.sh"
mkdir -p "$root/usr/local/bin"
ln -sfn ../../../opt/midge/bin/midge-device "$root/usr/local/bin/midge-device"
say "the software is in $opt"

# ── Its user, settings and state ─────────────────────────────────────────────────────────

if [ -z "$root" ]; then
    getent group midge >/dev/null || groupadd --system midge
    getent passwd midge >/dev/null ||
        useradd --system --gid midge --home-dir /var/lib/midge --no-create-home \
            --shell /usr/sbin/nologin midge
fi
mkdir -p "$etc" "$var"
chmod 750 "$etc"
own root:midge "$etc"
chmod 700 "$var"
own midge:midge "$var"
as_midge mkdir -p "$var/tasks" "$var/data"
if [ -e "$etc/device.toml" ]; then
    say "kept your settings in $etc/device.toml"
elif [ -e "$here/device.toml" ]; then
    cp "$here/device.toml" "$etc/device.toml"
fi
if [ -e "$etc/device.toml" ]; then
    chmod 640 "$etc/device.toml"
    own root:midge "$etc/device.toml"
    [ -e "$var/device.toml" ] || as_midge ln -sfn ../../../etc/midge/device.toml "$var/device.toml"
fi
if [ -e "$var/identity.json" ]; then
    who=$(as_midge sed -n 's/.*"device":"\([a-z0-9-]*\)".*/\1/p' "$var/identity.json")
    say "this device is enrolled already, as ${who:-?}: it keeps its identity and its outbox"
elif [ -e "$here/device.bundle" ]; then
    give "$here/device.bundle" "$var/device.bundle"
fi
for each in "$here"/tasks/*.plan; do
    if [ -e "$each" ]; then give "$each" "$var/tasks/${each##*/}"; fi
done
for each in "$here"/data/*; do
    if [ -e "$each" ]; then give "$each" "$var/data/${each##*/}" && say "your file $var/data/${each##*/}"; fi
done

# ── The service ──────────────────────────────────────────────────────────────────────────

mkdir -p "$ours"
cp "$here/midge-device.service" "$ours/midge-device.service.new"
chmod 644 "$ours/midge-device.service.new" # from a FAT partition it comes as executable
mv -f "$ours/midge-device.service.new" "$ours/midge-device.service"
sync
if [ -n "$root" ]; then
    say "installed into $root; start it with $opt/bin/midge-device run --dir $var"
elif ! command -v systemctl >/dev/null; then
    say "installed; there is no systemd here, so start it with: midge-device run --dir /var/lib/midge"
else
    systemctl --quiet enable midge-device.service
    if [ "$start" = no ] || [ ! -d /run/systemd/system ]; then
        say "installed; it starts at the next boot"
    else
        systemctl daemon-reload
        systemctl --no-block restart midge-device.service # it may be activating for minutes
        say "installed and started; see: journalctl -u midge-device, sudo midge-device status"
    fi
fi
if [ -e "$here/device.bundle" ] && [ ! -e "$here/first-boot.sh" ]; then # a card's is taken off it
    say "remove $here, and what it was unpacked from: what is secret in it is not needed any more"
fi
# Last: the old version was the way back until here.
for each in "$opt"/releases/*; do
    if [ "$each" != "$new" ]; then rm -rf "$each"; fi
done
