"""What front-ends need to know of a model: read once, so that all of a run know the same, and sent
by a replica to ingresses, which need no engine folder.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from msgspec import Struct

from runtime.model import manifest as manifests
from runtime.model.tokenizer import CaptionTokenizer


class ModelFiles(Struct, frozen=True):
    """The files of an engine folder that a front-end reads. kind: see `kind_digest`."""

    manifest: bytes
    tokenizer: bytes
    kind: str

    @classmethod
    def of(cls, folder: Path, fingerprint: str | None = None) -> "ModelFiles":
        """The files of an engine folder, checked. Raises EngineFolderError, also for another engine
        than that with the fingerprint.
        """
        manifest = manifests.read(folder)
        manifest.check_fingerprint(folder, fingerprint)
        manifests.check_whole(folder / manifests.TOKENIZER, manifest.files[manifests.TOKENIZER])
        CaptionTokenizer(folder, manifest)  # raises if it can't be read
        tokenizer = (folder / manifests.TOKENIZER).read_bytes()
        return cls((folder / manifests.FILE).read_bytes(), tokenizer, kind_digest(manifest))

    def write(self, folder: Path) -> Path:
        """Write the files to a new folder, which a front-end can read; return the folder."""
        folder.mkdir(parents=True)
        (folder / manifests.FILE).write_bytes(self.manifest)
        (folder / manifests.TOKENIZER).write_bytes(self.tokenizer)
        return folder


def kind_digest(manifest: manifests.Manifest) -> str:
    """Digest of tokens, preprocessing and sizes: engines of one kind take each other's requests."""
    parts = [asdict(manifest.sizes), asdict(manifest.tokens), asdict(manifest.preprocessing)]
    parts_json = json.dumps([*parts, manifest.files.get(manifests.TOKENIZER)], sort_keys=True)
    return hashlib.sha256(parts_json.encode()).hexdigest()[:12]
