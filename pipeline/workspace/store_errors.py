"""What an error of an object store's driver means: each driver has classes of its own, and they are told by name.

A request that fails for a reason that passes (500, 503, a closed connection) may be made again. What does not pass is a
credential, the machine's clock, or one file.
"""

import email.utils
import errno
import time
from typing import Any, cast

from pipeline.errors import ConfigError, DataError, StepError

Json = dict[str, Any]

NO_CREDENTIALS = frozenset(
    {
        "ClientAuthenticationError",
        "DefaultCredentialsError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "PermissionError",
        "ProfileNotFound",
        "RefreshError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)
_NO_CONNECTION = frozenset(
    {
        "ClientError",  # aiohttp's; botocore's class of this name is told apart by its response
        "ConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "ServiceRequestError",
        "ServiceResponseError",
        "TimeoutError",
    }
)
REFUSED_FILE = frozenset({"403", "AccessDenied", "InvalidObjectState"})  # the last is archived
"""What S3 answers with 403 about one file; its other codes are about the credentials."""
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine an instance profile",
    "gcs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "azure": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
}
_ENDPOINTS = {"s3": "; is AWS_ENDPOINT_URL right, and AWS_REGION?"}
_MOST_SKEW_S = 900.0
"""S3 refuses what is signed with a time that is off by so much; it passes when the machine's clock is set right."""
_PASSING_ERRNOS = frozenset({errno.EREMOTEIO, errno.EBUSY})  # s3fs's numbers for 500 and 503


def is_of_wrong_clock(error: Exception) -> bool:
    """Whether a store refuses a request because this machine's time is wrong; the answer has the store's own."""
    facts: Json = response_of(error).get("ResponseMetadata", {})
    date: str = facts.get("HTTPHeaders", {}).get("date", "")
    if facts.get("HTTPStatusCode") != 403 or not date:
        return False
    return abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) > _MOST_SKEW_S


def response_of(error: Exception) -> Json:
    """What botocore says of an answer; empty if the error has none."""
    responses: list[Any] = [getattr(one, "response", None) for one in (error.__cause__, error)]
    return next((cast("Json", response) for response in responses if isinstance(response, dict)), {})


def status_of(error: Exception) -> int:
    """The HTTP status of a driver's error; 0 if it has none."""
    status: Any = response_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    status = status or getattr(error, "status", 0)  # aiohttp's ClientResponseError
    status = status or getattr(error, "status_code", 0)  # azure's HttpResponseError
    code = str(getattr(error, "code", ""))  # gcsfs's HttpError
    return status if isinstance(status, int) and status else int(code) if code.isdigit() else 0


def is_beyond_end(error: BaseException) -> bool:
    """Whether a range was asked for of which the file has no byte."""
    is_416 = isinstance(error, Exception) and status_of(error) == 416
    return is_416 or (isinstance(error, OSError) and error.errno == errno.EINVAL)  # s3fs's number for it


def passes(error: Exception) -> bool:
    """Whether a request that failed so may succeed later."""
    if isinstance(error, PermissionError):
        return is_of_wrong_clock(error)
    response: Any = getattr(error, "response", None)  # botocore's ClientError
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in {408, 429}
    status = getattr(error, "status", None)  # aiohttp's ClientResponseError
    if isinstance(status, int) and status:
        return status >= 500 or status in {408, 429}
    code = getattr(error, "code", None)  # gcsfs's HttpError
    if isinstance(code, int | str) and str(code) in {"408", "429", "500", "502", "503", "504"}:
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNOS:
        return True
    return bool({cls.__name__ for cls in type(error).__mro__} & _NO_CONNECTION)


def explained(error: Exception, uri: str, kind: str, *, has_answered: bool, patience_s: float) -> Exception:
    """A driver's error as one sentence for people.

    Args:
        error: The driver's.
        uri: The URI that was asked for.
        kind: The store: ``s3``, ``gcs``, ``azure``, or empty for another.
        has_answered: Whether the store has answered this process before: then a failure is no wrong setting.
        patience_s: How long the request was repeated, in seconds.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "FileExpired":
        return DataError(f"{uri}: a file was replaced while it was read; run again")
    if is_of_wrong_clock(error):
        return StepError(f"{uri}: this machine's clock is wrong ({text}); set it, then run again")
    if names & NO_CREDENTIALS:
        return ConfigError(f"{uri}: no access ({text}); {_CREDENTIALS.get(kind, 'check the credentials')}")
    if not passes(error):
        return StepError(f"{uri}: {type(error).__name__}: {text}")
    if not has_answered:
        return ConfigError(f"{uri}: no answer ({text}){_ENDPOINTS.get(kind, '')}")
    return StepError(f"{uri}: no answer for {patience_s / 60:.0f} minutes ({text}); finished work is kept, run again")
