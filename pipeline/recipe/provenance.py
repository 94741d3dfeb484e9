"""Signed pictures: the holder of a server's public key sees that it made a picture, of what, and that it is unchanged.

The signature (Ed25519) covers the pixels and the text that says what made them, so it outlives another compression of
the same pixels, and neither an edited pixel nor an edited text. The text has C2PA's names for what it says; it is no
C2PA manifest, which needs a certificate.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CHUNK = "unclip-signature"
"""Text chunk of a PNG."""
C2PA = {
    "actions": [
        {
            "action": "c2pa.created",
            "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
        }
    ]
}
"""What every picture's text says in C2PA's words, unless it is one of ``C2PA_EDITED``."""
C2PA_EDITED = {
    "actions": [
        {
            "action": "c2pa.edited",
            "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia",
        }
    ]
}
"""The same of a picture of which only a part was made: the rest is somebody's own."""


@dataclass(frozen=True)
class Signer:
    """A server's private key."""

    key: "Ed25519PrivateKey"

    @classmethod
    def read(cls, path: Path) -> "Signer":
        """Read a key.

        Raises:
            ConfigError: If the file holds no Ed25519 key in PEM.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        how = f"make one: openssl genpkey -algorithm ed25519 -out {path}"
        try:
            key = load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"serve.provenance: {path}: cannot be read as a private key: {error}; {how}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"serve.provenance: {path}: is no Ed25519 key; {how}")
        return cls(key)

    def sign(self, size: tuple[int, int], pixels: bytes, text: str) -> str:
        """The chunk for a picture; arguments as ``verify``."""
        public = self.key.public_key().public_bytes_raw().hex()
        return json.dumps({"public_key": public, "signature": self.key.sign(_message(size, pixels, text)).hex()})


def verify(chunk: str, size: tuple[int, int], pixels: bytes, text: str) -> str:
    """The public key, in hex, that signed a picture.

    Args:
        chunk: Its ``CHUNK``.
        size: Width and height, in pixels.
        pixels: Red, green and blue, row by row.
        text: Its ``unclip`` chunk.

    Raises:
        ValueError: If the chunk is no signature, or one of other pixels or another text.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        parts = json.loads(chunk)
        public, signature = str(parts["public_key"]), bytes.fromhex(parts["signature"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, _message(size, pixels, text))
    except (ValueError, KeyError, TypeError, InvalidSignature):
        raise ValueError("the signature does not match: the pixels or the text were changed") from None
    return public


def _message(size: tuple[int, int], pixels: bytes, text: str) -> bytes:
    parts = (f"{size[0]}x{size[1]}".encode(), pixels, text.encode())
    return b"unclip picture 1" + b"".join(hashlib.sha256(part).digest() for part in parts)
