"""A broker of somebody else's: its own CA, and passwords or certificates that it knows.

Everything is real: mosquitto, `mosquitto_passwd`, a CA that no fleet knows.
"""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

from broker_bridge.link.local_broker import LocalBroker, free_port, shipped_file
from server.fleet.authority import Authority, Issued
from server.fleet.certificates import write_private, write_public
from tests.fleets import ROOT, Fleet

__all__ = ["Company", "in_the_doc"]


def in_the_doc(name: str) -> str:
    """The file that docs/brokers.md prints for a mosquitto with passwords."""
    text = (ROOT / "docs" / "brokers.md").read_text()
    _, found, rest = text.partition(f"```conf\n# {name}")
    assert found, f"docs/brokers.md prints no {name} any more"
    return f"# {name}{rest.partition('```')[0]}"


class Company:
    """A folder with a broker that asks for passwords at `port`, for certificates at `port_2`."""

    def __init__(self, folder: Path, *, port: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.now = datetime.now(UTC)
        self.authority = Authority.create("Company Ltd", now=self.now)
        self.ca = folder / "company-ca.pem"
        write_public(self.ca, self.authority.certificate)
        for name in ("certs", "conf.d"):
            (folder / name).mkdir()
        self._put(folder / "certs" / "broker", self.authority.issue_for_broker(
            ["localhost", "127.0.0.1"], now=self.now))  # fmt: skip
        rules = shipped_file("mosquitto.acl").read_text()
        (folder / "midge.acl").write_text(rules + in_the_doc("mosquitto.acl"))
        self.passwords = folder / "passwords"
        self.passwords.touch()
        self.port_2 = free_port()
        self.broker = LocalBroker(
            folder, port=port, engine="mosquitto", conf_text=self._conf(), conf_more=self._more()
        )

    def _conf(self) -> str:
        text = in_the_doc("mosquitto.conf")
        for place in ("/etc/mosquitto", "/var/lib/mosquitto"):
            assert place in text
            text = text.replace(place, str(self.folder))
        return text

    def _more(self) -> str:
        return f"""
listener {self.port_2} 127.0.0.1
cafile {self.ca}
certfile {self.folder}/certs/broker.pem
keyfile {self.folder}/certs/broker-key.pem
require_certificate true
use_identity_as_username true
"""

    def add(self, username: str, password: str) -> None:
        """What whoever runs it types for a new user, or a new password. Then `reload`."""
        subprocess.run(["mosquitto_passwd", "-b", self.passwords, username, password], check=True,
                       capture_output=True)  # fmt: skip
        self.passwords.chmod(0o600)

    def certify(self, name: str, folder: Path) -> None:
        """Put a client certificate of the company's CA, and its key, into `folder`."""
        issued = {
            "midge-server": self.authority.issue_for_server,
            "midge-operator": self.authority.issue_for_operator,
        }.get(name)
        found = (
            issued(now=self.now)
            if issued
            else self.authority.issue_with_new_key(name, now=self.now)
        )
        folder.mkdir(exist_ok=True, mode=0o700)
        write_public(folder / f"{name}.pem", found.certificate)
        write_private(folder / f"{name}.key", found.key)

    def settings(self, fleet: Fleet, lines: str, *, port: int = 0) -> None:
        """Write midge.toml anew; `lines` end its [broker] and may begin other tables."""
        (fleet.home.folder / "midge.toml").write_text(
            'log = "debug"\n[rounds]\ndeadline_s = 30\n'
            f'[broker]\nhost = "localhost"\nport = {port or fleet.port}\n{lines}\n'
        )

    @staticmethod
    def keep(home: Path, name: str, password: str) -> Path:
        """Put a password into the fleet's logins/."""
        (home / "logins").mkdir(exist_ok=True, mode=0o700)
        path = home / "logins" / name
        path.touch(mode=0o600)
        path.write_text(password + "\n")
        return path

    def _put(self, path: Path, issued: Issued) -> None:
        write_public(path.with_name(f"{path.name}.pem"), issued.certificate)
        write_private(path.with_name(f"{path.name}-key.pem"), issued.key)
