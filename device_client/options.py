"""The option --dir of each command: the device's folder, which belongs to a user of its own."""

from pathlib import Path
from typing import Any

import click

__all__ = ["FOLDER"]


class _Folder(click.Path):
    """A folder; one that this user may not read gets the sentence that helps."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            if "is not readable" not in error.message:
                raise
            raise click.ClickException(
                f"{value} is the device's own, not yours: put sudo before the command"
            ) from None


FOLDER = click.option(
    "--dir", "folder", type=_Folder(path_type=Path, file_okay=False), envvar="MIDGE_DEVICE_DIR",
    default=Path("/var/lib/midge"), show_default=True,
    help="The folder with this device's keys and state.",
)  # fmt: skip
