"""Is this body what its publisher made? Checksums in the form of sha256sum, and minisign's detached signatures.

Minisign (https://jedisct1.github.io/minisign/, "Signature format"): Ed25519 over the body (`Ed`) or over its
BLAKE2b-512 hash (`ED`), and a second, global signature over the first one and the trusted comment.

    verified = PublicKey.parse("RWQf6LRC…").verify(body, signature_file)
    check_sha256(body, expected_sha256(checksum_file, "stars.csv.gz"))
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kbsync.connectors.text import printable

__all__ = ["HEX", "BadSignature", "PublicKey", "check_comment", "check_sha256", "expected_sha256", "is_replay"]

HEX = r"[0-9a-fA-F]{64}"
"""How a sha256 is written."""

_LEGACY, _PREHASHED = b"Ed", b"ED"
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
# `<hash>  name`, `<hash> *name` (sha256sum), `SHA256 (name) = <hash>` (sha256sum --tag, BSD), or the hash alone.
_SUM_LINE = re.compile(rf"(?P<first>{HEX})(?:\s+\*?(?P<name>.+))?|SHA256 \((?P<tagged>.+)\) = (?P<last>{HEX})")
_SIGNED = re.compile(r"minisign ([0-9A-F]{16}) \([^)]*?\btimestamp:([0-9]{1,15})\b")


class BadSignature(ValueError):
    """The body is not what was signed or summed, or what should prove it cannot be read."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A minisign public key: 8 bytes that name the pair, and an Ed25519 key."""

    id: bytes
    key: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """The key of a base64 line such as `RWQf6LRC…` (56 characters). Raises ValueError where it is none."""
        raw = _base64(text, "the public key")
        if len(raw) != 10 + _KEY_BYTES or raw[:2] != _LEGACY:
            raise ValueError("is no minisign public key: 56 characters that begin with RW")
        return cls(raw[2:10], raw[10:])

    @property
    def name(self) -> str:
        """The key id as minisign prints it: 16 hex digits."""
        return self.id[::-1].hex().upper()

    def verify(self, body: bytes, signature: bytes) -> str:
        """The trusted comment of a signature file, where it is this key's signature of `body`.

        Raises BadSignature where the file is no signature, is another key's, or does not fit body and comment.
        """
        algorithm, key_id, signed, comment, over_all = _parts(signature)
        if key_id != self.id:
            raise BadSignature(f"the signature is by key {key_id[::-1].hex().upper()}, not by {self.name}")
        key = Ed25519PublicKey.from_public_bytes(self.key)
        message = hashlib.blake2b(body, digest_size=64).digest() if algorithm == _PREHASHED else body
        try:
            key.verify(signed, message)
        except InvalidSignature as error:
            raise BadSignature(f"the signature by key {self.name} is of another body") from error
        try:
            key.verify(over_all, signed + comment.encode())
        except InvalidSignature as error:
            raise BadSignature("the trusted comment is not the one that was signed") from error
        return comment


def expected_sha256(checksums: bytes, name: str) -> str:
    """What a checksum file says of the file `name`: its own line, or the only one. Raises BadSignature."""
    try:
        lines = [line.strip() for line in checksums.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise BadSignature("the checksum file is no text") from error
    found = [match for line in lines if (match := _SUM_LINE.fullmatch(line))]
    own = [one for one in found if (one["name"] or one["tagged"] or "").rpartition("/")[2] == name]
    nameless = [one for one in found if not (one["name"] or one["tagged"])]
    chosen = own or (nameless if len(found) == 1 else [])
    if len(chosen) != 1:
        raise BadSignature(f"the checksum file has {len(chosen) or 'no'} sha256 of {printable(name, 100)}")
    return str(chosen[0]["first"] or chosen[0]["last"])


def check_sha256(body: bytes, expected: str) -> None:
    """Raises BadSignature where `body` has another sha256 than the `expected` 64 hex digits."""
    found = hashlib.sha256(body).hexdigest()
    if not hmac.compare_digest(found, expected.lower()):
        raise BadSignature(f"its sha256 is {found}, not {expected.lower()}")


def check_comment(comment: str, name: str) -> None:
    """Raises BadSignature where a trusted comment names another file than `name`, as minisign writes it by itself
    (`timestamp:1700000000\tfile:stars.csv`): the publisher signed that one, and somebody put it here."""
    signed = re.search(r"(?:^|\t)file:([^\t]+)", comment)
    if signed and signed[1] != name:
        signed_name = printable(signed[1], 100)
        raise BadSignature(f"the signature is of a file {signed_name!r}, not of {name!r}; see `minisign.file`")


def is_replay(verified: str, before: str | None) -> bool:
    """Whether what proves a body was signed earlier than what proved the last one, by the same key's timestamps."""
    now, then = _SIGNED.search(verified), _SIGNED.search(before or "")
    return bool(now and then and now[1] == then[1] and int(now[2]) < int(then[2]))


def _parts(signature: bytes) -> tuple[bytes, bytes, bytes, str, bytes]:
    """Algorithm, key id, signature, trusted comment and global signature of a signature file."""
    try:
        untrusted, first, trusted, second = signature.decode().rstrip("\r\n").split("\n")
    except ValueError as error:
        raise BadSignature("the signature file does not have minisign's four lines") from error
    comment = trusted.rstrip("\r").removeprefix(_TRUSTED)
    if not untrusted.startswith(_UNTRUSTED) or not trusted.startswith(_TRUSTED):
        raise BadSignature("the signature file does not have minisign's two comments")
    raw, over_all = _base64(first, "the signature"), _base64(second, "the global signature")
    if len(raw) != 10 + _SIGNATURE_BYTES or len(over_all) != _SIGNATURE_BYTES or raw[:2] not in (_LEGACY, _PREHASHED):
        raise BadSignature("the signature file has no signature that minisign makes")
    return raw[:2], raw[2:10], raw[10:], comment, over_all


def _base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSignature(f"{what} is not base64") from error
