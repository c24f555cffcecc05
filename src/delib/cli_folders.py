"""The folders that a command line names: those of this machine, and mirrors of run folders on object storage."""

from pathlib import Path
from typing import Annotated

import typer

from delib.errors import UserError


def run_folder(text: str) -> Path:
    """A run folder here: the named one, or the mirror of the one at an address, to which nothing is fetched yet."""
    if "://" not in text:
        return Path(text)
    from delib import remote

    return remote.mirror(text)


def here(text: str) -> Path:
    """A folder of this machine alone."""
    if "://" in text:
        raise UserError(f"{text}: this command writes to a folder of this machine; only 'delib run' makes runs there")
    return Path(text)


def fetched(run: Path) -> Path:
    """The same folder, to be read; a mirror with what stands at its address."""
    from delib import remote

    remote.fetched(run)
    return run


RunOption = Annotated[Path, typer.Option("--run", parser=run_folder, help="The run folder.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(parser=run_folder, help="A run folder.")]
