"""Takes passwords out of text that people and stores will see. Called wherever an address or an error becomes text."""

from __future__ import annotations

import re

#: User and password of an address. Up to the last @ before the next address: a password that nobody escaped may hold
#: one, or a slash.
_PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):(?:(?!://)\S)*@")
#: Options of an address that are secrets, too: `tlsCertificateKeyFilePassword`, tokens of `authMechanismProperties`.
_OPTION = re.compile(
    r"([?&][^?&=\s]*(?:password|secret|token|passphrase|authmechanismproperties)[^&=\s]*=)[^&;\s]+", re.IGNORECASE
)


def redact(text: str) -> str:
    """The text without the passwords of the addresses in it."""
    return _OPTION.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))
