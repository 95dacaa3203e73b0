"""Whether a checkpoint's files are the same at the end of an export as at its start; a mix of two is no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from skv_export.checkpoints import adapter
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.gguf import shard_names
from skv_export.checkpoints.tensor_files import Stamp, stamp
from skv_export.errors import SkvError

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's files at some time.

    Attributes:
        source: The checkpoint.
        files: Name to inode, size and time of change; empty for one that is not on this disk.
    """

    source: Source
    files: Mapping[str, Stamp]

    @classmethod
    def take(cls, source: Source) -> Snapshot:
        """Looks at the files of a checkpoint."""
        if source.path is None:
            return cls(source, {})
        if source.gguf_file:
            names = shard_names(source.gguf_file)
        else:
            names = [path.name for path in source.path.iterdir() if path.suffix in _SUFFIXES]
        paths = [source.path / name for name in sorted(names)]
        if source.adapter is not None:
            paths += [source.adapter / name for name in (adapter.CONFIG, adapter.WEIGHTS)]
        return cls(source, {path.name: stamp(path.stat()) for path in paths if path.is_file()})

    def check(self) -> None:
        """Compares the files with what they were.

        Raises:
            SkvError: One was written, replaced, removed or added.
        """
        now = Snapshot.take(self.source).files
        changed = sorted(name for name in self.files.keys() | now.keys() if self.files.get(name) != now.get(name))
        if self.files and changed:
            raise SkvError(
                f"{self.source}: files changed while they were exported, so the weights may be a mix of two models",
                got=", ".join(changed[:4]),
                fix="Export again when nothing writes to the checkpoint.",
            )
