"""Check quickly whether the Hugging Face hub can be used, instead of failing after minutes of retries."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from concurrent import futures
from contextlib import suppress
from http.client import HTTPException

from cod_lightning.data.workers import in_thread
from cod_lightning.errors import UserError

PROBE_SECONDS = 4.0


def require_hub(what: str, instead: str) -> None:
    """Raise a UserError if the hub is switched off (`HF_HUB_OFFLINE`) or does not answer within `PROBE_SECONDS`.

    It raises one, too, if `HF_ENDPOINT`, the address of a mirror, is not a URL.
    `what` names the setting that needs the hub, `instead` an alternative; both are part of the message.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(f"{what} needs the Hugging Face hub, but HF_HUB_OFFLINE is set. {instead}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not endpoint.startswith(("https://", "http://")):
        raise UserError(f"{what} needs the Hugging Face hub, but HF_ENDPOINT={endpoint!r} does not begin with https://")

    def probe() -> None:
        with suppress(urllib.error.HTTPError):  # any HTTP status is an answer
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()

    try:
        in_thread(probe).result(PROBE_SECONDS)  # name resolution does not honour the time-out of urlopen
    except (OSError, ValueError, HTTPException, futures.TimeoutError) as error:  # also a URL that is malformed
        raise UserError(f"{what} needs the Hugging Face hub, but {endpoint} does not answer. {instead}") from error


def require_cached_or_hub(name: str, instead: str) -> None:
    """Raise a UserError unless the config.json of repository `name` is in the local cache, or the hub answers."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise UserError(f"{name} is neither a folder nor a name on the hub. {instead}") from error
    if not isinstance(cached, str):
        require_hub(f"{name} is not a folder here, so it", instead)
