"""What a card's first boot reads. Pure: text in, text out.

On trixie cloud-init reads user-data, network-config and meta-data; `ds=nocloud;i=…` on the
kernel's command line names the same instance, or cloud-init would look for it at every boot.
On bookworm systemd runs firstrun.sh once, before anything else, and reboots.
Both only set name, network and login, and enable midge-first-boot.service: the installation
itself runs in an ordinary boot, and again if the power goes.

Every string that a person gave is quoted where it lands: as JSON, which YAML reads, or for
the shell.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field

from broker_bridge.errors import LocalError

__all__ = [
    "Login",
    "Wifi",
    "command_line",
    "firstrun",
    "login",
    "meta_data",
    "network_config",
    "user_data",
    "wifi",
]

BOOT = "/boot/firmware"
_START = (
    # FAT says of every file that it may be executed, and systemd complains of such units.
    f"install -m 644 {BOOT}/midge/midge-first-boot.service /etc/systemd/system/"
    " && systemctl daemon-reload && systemctl --quiet enable{now} midge-first-boot.service"
)
# Raspberry Pi OS puts its first user into these.
_GROUPS = "users,adm,dialout,audio,netdev,video,plugdev,cdrom,games,input,gpio,spi,i2c,render,sudo"
_KEY_TYPES = ("ssh-ed25519 ", "ssh-rsa ", "ecdsa-sha2-", "sk-ssh-ed25519", "sk-ecdsa-sha2-")


@dataclass(frozen=True)
class Wifi:
    """A network to join. `psk`: 64 hex digits, empty for an open network."""

    ssid: str
    country: str
    psk: str = field(repr=False)
    hidden: bool = False


@dataclass(frozen=True)
class Login:
    """Who may log in over SSH, with this public key and no password."""

    name: str
    key: str


def wifi(ssid: str, passphrase: str, *, country: str, hidden: bool = False) -> Wifi:
    """Check a network and derive its key: PBKDF2-SHA1, IEEE 802.11-2020 J.4.1.

    Only the derived key goes on the card. It opens this network, and no account that has
    the same passphrase. Raises LocalError.
    """
    if not 1 <= len(ssid.encode()) <= 32 or not ssid.isprintable() or set(ssid) & set("\"\\';"):
        raise LocalError(
            f"the network's name {ssid!r} cannot be put on a card: 1 to 32 bytes, without quotes, "
            "backslashes and semicolons; join it on the running Pi instead"
        )
    if len(country) != 2 or not country.isascii() or not country.isalpha():
        raise LocalError(
            "wifi stays off until it knows which country's rules hold; say --wifi-country, "
            "two letters as in GB"
        )
    if not passphrase:
        return Wifi(ssid, country.upper(), "", hidden)
    if not (8 <= len(passphrase) <= 63 and passphrase.isascii() and passphrase.isprintable()):
        raise LocalError("a wifi passphrase has 8 to 63 characters of plain ASCII; type it again")
    key = hashlib.pbkdf2_hmac("sha1", passphrase.encode(), ssid.encode(), 4096, 32)
    return Wifi(ssid, country.upper(), key.hex(), hidden)


def login(name: str, key: str) -> Login:
    """Check a user's name and public key. Raises LocalError."""
    plain = name.replace("-", "").replace("_", "")
    if not (name[:1].isalpha() and plain.isalnum() and name.isascii() and name == name.lower()):
        raise LocalError(f"{name!r} cannot be a user's name; use a-z, 0-9, - and _")
    text = key.strip()
    if not text.startswith(_KEY_TYPES) or "\n" in text or not text.isprintable():
        raise LocalError(
            "--ssh-key names the file of a public key, one line as in ~/.ssh/id_ed25519.pub"
        )
    return Login(name, text)


# ── Trixie: cloud-init ──────────────────────────────────────────────────────────────────


def user_data(device: str, who: Login | None) -> str:
    """What cloud-init shall do: name, login, and our service."""
    lines = ["#cloud-config", "# Written by midge flash.", f"hostname: {_quoted(device)}",
             "manage_etc_hosts: true"]  # fmt: skip
    if who is not None:
        # `user`, not `users`: the image's own first user keeps its groups.
        lines += ["user:", f"  name: {_quoted(who.name)}", "  lock_passwd: true",
                  "  shell: /bin/bash", f"  groups: {_quoted(_GROUPS)}",
                  '  sudo: "ALL=(ALL) NOPASSWD:ALL"', "  ssh_authorized_keys:",
                  f"    - {_quoted(who.key)}", "ssh_pwauth: false"]  # fmt: skip
    lines += ["runcmd:", f"  - [sh, -c, {_quoted(_START.format(now=' --now --no-block'))}]"]
    if who is not None:
        lines.append("  - [systemctl, enable, --now, ssh]")  # cloud-init does not start it
    return "\n".join(lines) + "\n"


def network_config(joined: Wifi | None) -> str:
    """Netplan: it replaces the image's own, so the cable is in it."""
    lines = ["network:", "  version: 2", "  ethernets:", "    eth0:", "      dhcp4: true",
             "      optional: true"]  # fmt: skip
    if joined is not None:
        lines += ["  wifis:", "    wlan0:", "      dhcp4: true", "      optional: true",
                  f"      regulatory-domain: {_quoted(joined.country)}", "      access-points:",
                  f"        {_quoted(joined.ssid)}:"]  # fmt: skip
        if joined.hidden:
            lines.append("          hidden: true")
        if joined.psk:
            lines.append(f"          password: {_quoted(joined.psk)}")
        else:
            lines += ["          auth:", "            key-management: none"]
    return "\n".join(lines) + "\n"


def meta_data(instance: str) -> str:
    """Which instance this is. `dsmode: local`: before the network, as the image has it."""
    return f"dsmode: local\ninstance-id: {instance}\n"


def command_line(old: str, system_is_cloud_init: bool, instance: str, country: str | None) -> str:
    """The kernel's command line: one line, ours at its end, what was there of this kind gone."""
    ours = ("ds=", "systemd.run", "systemd.unit=kernel-command-line", "cfg80211.ieee80211_regdom=")
    words = [word for word in old.split() if not word.startswith(ours)]
    if country:
        words.append(f"cfg80211.ieee80211_regdom={country}")
    if system_is_cloud_init:
        words.append(f"ds=nocloud;i={instance}")
    else:
        # Raspberry Pi Imager says /boot/firstrun.sh, which the image turns into this and reboots.
        words += [f"systemd.run={BOOT}/firstrun.sh", "systemd.run_success_action=reboot",
                  "systemd.unit=kernel-command-line.target"]  # fmt: skip
    return " ".join(words) + "\n"


# ── Bookworm: firstrun.sh ───────────────────────────────────────────────────────────────


def firstrun(device: str, joined: Wifi | None, who: Login | None) -> str:
    """The script that systemd runs once. It always ends well: a Pi that boots can be helped."""
    custom = "/usr/lib/raspberrypi-sys-mods/imager_custom"
    lines = [f"{custom} set_hostname {device}"]
    if joined is not None:
        hidden = ["--hidden"] if joined.hidden else []
        words = [*hidden, joined.ssid, joined.psk, joined.country]
        lines.append(f"{custom} set_wlan {_words(words)}")
    if who is not None:
        lines += [f"/usr/lib/userconf-pi/userconf {_words([who.name, ''])}",
                  f"{custom} enable_ssh -k {_words([who.key])}"]  # fmt: skip
    lines += [
        _START.format(now=""),
        # The network's key is in here: overwritten, then removed.
        f"dd if=/dev/zero of={BOOT}/firstrun.sh bs=4096 count=1 conv=notrunc 2>/dev/null",
        "sync",
        f"rm -f {BOOT}/firstrun.sh",
        f"sed -i 's| systemd\\.[^ ]*||g' {BOOT}/cmdline.txt",
        "sync",
        "exit 0",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return (
        "#!/bin/sh\n# Written by midge flash; runs once, as root, and removes itself.\n"
        f"set +e\nmkdir -p {BOOT}/midge/log\n"
        # In braces: the shell has read all of it before the file is overwritten.
        f"{{\n{body}\n}} >{BOOT}/midge/log/firstrun.txt 2>&1\n"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _words(words: Iterable[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
