"""Whether the Hugging Face hub can be used, asked once and quickly instead of after minutes of retries."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

from cod_lightning.errors import UserError

PROBE_SECONDS = 4.0


def require_hub(what: str, instead: str) -> None:
    """Return if the hub answers within `PROBE_SECONDS`.

    `what` is the setting that needs the hub and `instead` the way to do without it; both go into the message.

    Raises:
        UserError: The hub is switched off (`HF_HUB_OFFLINE`) or does not answer.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(f"{what} needs the Hugging Face hub, but HF_HUB_OFFLINE is set. {instead}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an HTTP status, whatever it is, is an answer
        except (OSError, ValueError):
            return
        answered.set()

    # A thread, because name resolution does not honour the time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if not answered.is_set():
        raise UserError(f"{what} needs the Hugging Face hub, but {endpoint} does not answer. {instead}")


def require_cached_or_hub(name: str, instead: str) -> None:
    """Return if a repository is in the local cache, by its config.json, or the hub can be asked for it.

    Raises:
        UserError: `name` cannot be one on the hub, or as `require_hub`.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise UserError(f"{name} is neither a folder nor a name on the hub. {instead}") from error
    if not isinstance(cached, str):
        require_hub(name, instead)
