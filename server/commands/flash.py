"""`midge flash`: a card on which a Raspberry Pi enrols and trains by itself."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import fingerprint, random_bytes
from server.commands.bundle import FILE, FOLDER, What, what_options
from server.commands.flashed import BOOT, IMAGE, doctor, undo, verify
from server.commands.options import DIR, JSON
from server.fleet.additions import names_from
from server.fleet.authority import check_device_name
from server.fleet.flash import flashing
from server.fleet.flash.card import Card, ImageCard, open_card
from server.fleet.flash.firstboot import Login, Wifi, login, wifi
from server.fleet.flash.flashing import Settings
from server.fleet.flash.images import copy_image, look_into, unpacked
from server.fleet.flash.labels import Written, as_csv, as_labels, from_csv
from server.fleet.home import Home
from server.store.database import Database

__all__ = ["flash"]


@click.group(invoke_without_command=True)
@click.option("--device", help="The device's name; it becomes its host name too.")
@IMAGE
@BOOT
@click.option("--out", type=FOLDER,
              help="Where images go, NAME.img; default: cards/ in the fleet's folder.")  # fmt: skip
@click.option("--count", type=click.IntRange(1, 1000), help="Write so many cards (with --image).")
@click.option("--name", "pattern", help="Their names, as in 'ward-{:02}'.")
@click.option("--wifi", "ssid", help="Join this network; its passphrase is asked for, or in "
              "MIDGE_WIFI_PASSPHRASE.")  # fmt: skip
@click.option("--wifi-country", default="", help="Whose rules hold for wifi, as in GB.")
@click.option("--wifi-hidden", is_flag=True, help="The network does not show its name.")
@click.option("--ssh-key", type=FILE, help="A public key that may log in; without it nobody may.")
@click.option("--user", default="pi", show_default=True, help="Who logs in with that key.")
@click.option("--replace", is_flag=True, help="Also where Imager prepared the first boot.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the device has enrolled.")
@what_options
@DIR
@JSON
def flash(
    device: str | None, image: Path | None, boot: Path | None, out: Path | None,
    count: int | None, pattern: str | None, ssid: str | None, wifi_country: str, wifi_hidden: bool,
    ssh_key: Path | None, user: str, replace: bool, dry_run: bool, no_wait: bool, folder: Path,
    as_json: bool, **what: Any,
) -> None:  # fmt: skip
    """Make a card on which a Raspberry Pi enrols and trains by itself, without internet.

    \b
    Example:
      midge flash --device ward-3-pi-07 --image raspios-trixie-arm64-lite.img.xz --dir fleet
      midge flash --device ward-3-pi-07 --boot /media/me/bootfs --wifi 'Ward 3' --wifi-country GB
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    names = _names(device, count, pattern, image)
    wanted = What(Home.find(folder), **what)
    wanted.must_be_reachable()
    wanted.must_get_in(names)
    if wanted.made is not None and count is not None:
        raise LocalError("a bundle is for one device; leave --bundle out")
    joined = _asked(ssid, wifi_country, wifi_hidden)
    who = _login(user, ssh_key)
    job = _Job(wanted, joined, who, replace=replace, quiet=as_json)
    began = time.time()
    with _looked_into(boot, image) as card:
        if dry_run:
            job.show(card, names[0])
            return
        flashing.check_card(card, replace=replace)  # before anything is copied
    out = out or wanted.home.folder / "cards"
    with _ready(image, out, names) as image:
        written = [job.flash(name, boot, image, out) for name in names]
    _list(out, written, wanted, count)
    if as_json:
        click.echo(json.dumps([card.__dict__ for card in written]))
        return
    _say_next(written, boot)
    if not what["data"]:
        click.echo("no --data: it enrols once data is set in /etc/midge/device.toml on the device")
    elif not no_wait:
        _wait(wanted.home, names, began)


def _names(
    device: str | None, count: int | None, pattern: str | None, image: Path | None
) -> list[str]:
    if count is None and pattern is None:
        if device is None:
            raise LocalError("say --device NAME, or --count 20 --name 'ward-{:02}' for a fleet")
        names = [device]
    elif count is None or pattern is None or device is not None or image is None:
        raise LocalError("a fleet of cards takes --count, --name and --image, and no --device")
    else:
        names = names_from(pattern, count=count)
    for name in names:
        check_device_name(name)
    return names


def _asked(ssid: str | None, country: str, hidden: bool) -> Wifi | None:
    if ssid is None:
        if country or hidden:
            raise LocalError("which wifi is that about? say --wifi SSID too")
        return None
    wifi(ssid, "", country=country)  # what is wrong with these is said before the question
    passphrase = os.environ.get("MIDGE_WIFI_PASSPHRASE")
    if passphrase is None:
        if not sys.stdin.isatty():
            raise LocalError(
                f"there is no terminal to ask for the passphrase of {ssid}; put it into the "
                "environment as MIDGE_WIFI_PASSPHRASE"
            )
        passphrase = click.prompt(
            f"Passphrase of {ssid} (empty: an open network)", hide_input=True, default="",
            show_default=False, err=True,
        )  # fmt: skip
    return wifi(ssid, passphrase, country=country, hidden=hidden)


def _login(user: str, ssh_key: Path | None) -> Login | None:
    if ssh_key is None:
        return None
    with disk_errors(ssh_key):
        return login(user, ssh_key.read_text(errors="replace"))


def _looked_into(boot: Path | None, image: Path | None) -> contextlib.AbstractContextManager[Card]:
    """The card as it is now, for reading."""
    if image is not None and boot is None:
        return look_into(image)
    return contextlib.nullcontext(open_card(boot, image))


@contextlib.contextmanager
def _ready(image: Path | None, out: Path, names: list[str]) -> Iterator[Path | None]:
    """What to copy from, and the folder to copy to. For many cards an image is unpacked once."""
    if image is None:
        yield None
        return
    with disk_errors(out):
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    if len(names) == 1:
        yield image
        return
    with unpacked(image, out / "unpacked.img.part") as found:
        yield found


@dataclass(frozen=True)
class _Job:
    """One call of `midge flash`: what is alike on all of its cards."""

    what: What
    wifi: Wifi | None
    login: Login | None
    replace: bool
    quiet: bool

    def flash(self, device: str, boot: Path | None, image: Path | None, out: Path) -> Written:
        """Write one card. Raises LocalError; then the card is as it was, or is no more."""
        if image is None:
            return self._write(open_card(boot, image), device)
        # Under another name until it is whole: half a card looks like one.
        copy, part = out / f"{device}.img", out / f"{device}.img.part"
        if copy.exists():
            raise LocalError(f"{copy} is there already; remove it, or say another --out")
        with disk_errors(part):
            part.unlink(missing_ok=True)
        copy_image(image, part)
        try:
            written = self._write(ImageCard(part, called=copy), device)
            with disk_errors(copy):
                part.replace(copy)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return written

    def _write(self, card: Card, device: str) -> Written:
        now = time.time()
        system = flashing.check_card(card, replace=self.replace)
        self._say("image", system.name)
        settings = self._settings(device)
        # All that can be found out is, before a token is made.
        empty = self.what.parcel([system.target], None, now)
        anew = flashing.manifest(card) is not None  # then what it replaces makes the room
        card.check_room({} if anew else flashing.boot_files(card, system, settings, empty))
        if self.what.is_replaced(device):
            self._say("note", f"the card or bundle made before for {device} enrols no more")
        token, expires = self.what.token(device, now)
        files = self.what.parcel([system.target], token, now)
        wheels = [name for name in files if name.endswith(".whl")]
        size = sum(len(data) for data in files.values())
        self._say("bundle", f"{size / 1e6:.1f} MB offline, {len(wheels)} wheels, sha256 checked")
        self._say("identity", f"one-time token until {expires}; the device makes its own keys")
        content = flashing.boot_files(card, system, settings, files)
        flashing.write(card, system, settings, content, made_at=int(now), token_expires=expires)
        tops = sorted({name.split("/")[0] for name in content})
        self._say("written", f"{' '.join(tops)} on {card.where}; read back: identical")
        return Written(device, card.where, expires)

    def show(self, card: Card, device: str) -> None:
        """Say what would be written."""
        system = flashing.check_card(card, replace=self.replace)
        self._say("image", system.name)
        files = self.what.parcel([system.target], None, time.time())
        files["device.bundle"] = b""
        content = flashing.boot_files(card, system, self._settings(device), files)
        for name, data in sorted(content.items()):
            old = card.read(name)
            size = "a secret" if name.endswith("device.bundle") else f"{len(data)} bytes"
            verb = "add" if old is None else ("keep" if old == data else "change")
            click.echo(f"  {verb:6} {name} ({size})")
        click.echo("nothing was written, and no token was made")

    def _settings(self, device: str) -> Settings:
        instance = f"midge-{random_bytes(6).hex()}"
        return Settings(device=device, instance=instance, wifi=self.wifi, login=self.login)

    def _say(self, name: str, text: str) -> None:
        if not self.quiet:
            click.echo(f"  {name:10} {text}")


def _list(out: Path, written: list[Written], what: What, count: int | None) -> None:
    if count is None:
        return
    federation = what.home.keys().federation
    path = out / "cards.csv"
    with disk_errors(path):
        former = from_csv(path.read_text(errors="replace")) if path.exists() else []
    names = {card.device for card in written}  # and what earlier calls wrote stays in the list
    listed = [*(card for card in former if card.device not in names), *written]
    write_atomic(path, as_csv(listed).encode(), mode=0o644)
    write_atomic(out / "labels.html", as_labels(written, federation).encode(), mode=0o644)
    click.echo(f"  list       {path}, {out / 'labels.html'}", err=True)


def _say_next(written: list[Written], boot: Path | None) -> None:
    if boot is not None:
        click.echo(f"  next       eject {boot}, put the card into the Pi, give it power")
        return
    for card in written:
        click.echo(f"  next       rpi-imager --cli {card.image} /dev/sdX   (the card, not a disk)")
    click.echo("             then remove the file: what is secret on the card is in it, too")


def _wait(home: Home, names: list[str], began: float) -> None:
    """Say when each device has enrolled. Ctrl-C ends the waiting, and nothing else."""
    click.echo(f"waiting for {', '.join(names)} …  (Ctrl-C: stop waiting, the card is done)")
    try:
        _watch(home, names, began)
    except KeyboardInterrupt:
        click.echo("\nnot waiting any more; `midge device list` shows who has enrolled")


def _watch(home: Home, names: list[str], began: float) -> None:
    left = list(names)
    with contextlib.closing(Database(home.database)) as db:
        while left:
            with db.reading() as tx:
                known = [device for name in left if (device := tx.device(name)) is not None]
            # Whoever had this name on an earlier card does not count.
            for device in (d for d in known if d.enrolled_at >= began):
                minutes, seconds = divmod(int(time.time() - began), 60)
                click.echo(
                    f"{device.name} enrolled after {minutes}m{seconds:02}s, "
                    f"fingerprint {fingerprint(device.sign_public)}"
                )
                if device.status == "waiting":
                    click.echo(f"it waits for you: midge device accept {device.name}")
                left.remove(device.name)
            time.sleep(1.0 if left else 0)


for _command in (verify, undo, doctor):
    flash.add_command(_command)
