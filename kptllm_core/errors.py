"""The exceptions of this product, one small tree.

    KptError                    anything a user can be told in a sentence; has a stable `code`
    ├── InvalidInput            what was sent is wrong (HTTP 400)
    │   ├── SchemaError         a label config or a keypoint schema that cannot be used
    │   ├── ImageError          bytes that are no usable image
    │   └── DataError           a data folder or annotation file that cannot be used
    ├── ArtifactError           a checkpoint or adapter: missing, damaged, or made for another base (HTTP 409)
    ├── TooLarge                a limit on bytes, pixels or counts was exceeded (HTTP 413)
    ├── Unauthorized            no, or wrong, credentials (HTTP 401)
    ├── NotFound                no such thing (HTTP 404)
    ├── Conflict                the request does not fit the present state (HTTP 409)
    └── Unavailable             a service that we need does not answer; trying later may help (HTTP 503)

Every message says what was found, what was expected and how to fix it. Messages go to clients; tracebacks never do.
"""

from __future__ import annotations


class KptError(Exception):
    """Base of the tree. `code` is stable for programs, `status` is the HTTP status that a server answers with."""

    code = "error"
    status = 500

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def to_json(self) -> dict[str, object]:
        """`{"code", "message", …details}`: the body of every error answer."""
        return {"code": self.code, "message": self.message, **self.details}


class InvalidInput(KptError):
    code, status = "invalid_input", 400


class SchemaError(InvalidInput):
    code = "schema"


class ImageError(InvalidInput):
    code = "image"


class DataError(InvalidInput):
    code = "data"


class ArtifactError(KptError):
    code, status = "artifact", 409


class TooLarge(KptError):
    code, status = "too_large", 413


class Unauthorized(KptError):
    code, status = "unauthorized", 401


class NotFound(KptError):
    code, status = "not_found", 404


class Conflict(KptError):
    code, status = "conflict", 409


class Unavailable(KptError):
    code, status = "unavailable", 503
