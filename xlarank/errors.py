"""Every exception that xlarank raises on purpose.

    XlarankError
    ├── ConfigError            a spec, config file, flag or argument is wrong
    ├── RequestError           the caller's fault; the server goes on
    │   ├── FeatureError       a feature is missing, unknown or malformed
    │   ├── ModelNotFoundError no such model or version
    │   ├── AccessError        the caller may not do this, or doesn't say who it is
    │   └── UnsupportedError   the server, as it was started, doesn't do this for anybody
    ├── ModelError             the compiler refuses a model
    │   └── VerifyError        its compiled scores leave the tolerance
    ├── BundleError            a bundle or feature file is damaged, truncated or of an unknown format
    ├── BucketError            no compiled bucket fits; a bug of ours, requests are planned before
    ├── DeadlineError          an answer would come, or came, too late to be of use
    ├── ExecutionError         a device failed, or gave scores that aren't finite
    ├── OverloadError          more work is queued than is allowed; says when to come again
    └── UnavailableError       the engine is loading, draining or closed, or no device is healthy

A message says where, what was expected, what came and, if there is one, the fix.
"""


class XlarankError(Exception):
    """Base of every exception above."""


class ConfigError(XlarankError, ValueError):
    """A spec, config file, flag or argument is wrong."""


class RequestError(XlarankError, ValueError):
    """The caller's fault; the server goes on."""


class FeatureError(RequestError):
    """A feature of a request is missing, unknown or malformed."""


class ModelNotFoundError(RequestError, LookupError):
    """The repository has no such model or version."""


class AccessError(RequestError):
    """The caller may not do what it asks for; `is_known_caller` says whether it has said who it is."""

    def __init__(self, message: str, is_known_caller: bool = False) -> None:
        super().__init__(message)
        self.is_known_caller = is_known_caller


class UnsupportedError(RequestError):
    """The server, as it was started, doesn't do this for anybody; the message says what does it instead."""


class ModelError(XlarankError):
    """The compiler refuses a model; the message names the operation or the output."""


class VerifyError(ModelError):
    """Compiled scores differ from the reference by more than the tolerance."""


class BundleError(XlarankError):
    """A bundle or feature file is damaged, truncated or of an unknown format version."""


class BucketError(XlarankError):
    """No compiled bucket holds the rows and requests asked for."""


class DeadlineError(XlarankError):
    """An answer would come, or came, after the request's deadline; nothing of it was executed late."""


class ExecutionError(XlarankError):
    """Running a batch failed, or gave scores that aren't finite. The message says what is at fault."""


class OverloadError(XlarankError):
    """The queue is full. `retry_after_seconds` is the predicted time until it has room again."""

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(XlarankError):
    """The engine is loading, draining or closed, or no device of it is healthy."""
