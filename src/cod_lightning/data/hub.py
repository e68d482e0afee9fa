"""Check quickly whether the Hugging Face hub can be used, instead of failing after minutes of retries."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.request

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
    answered = threading.Event()

    def probe() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # any HTTP status is an answer
        except (OSError, ValueError, http.client.HTTPException):  # also a URL that is malformed
            return
        answered.set()

    # A thread, because name resolution does not honour the time-out.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)  # returns at once if the connection is refused
    if not answered.is_set():
        raise UserError(f"{what} needs the Hugging Face hub, but {endpoint} does not answer. {instead}")


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
