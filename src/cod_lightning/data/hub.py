"""Check quickly whether the Hugging Face hub can be used, instead of failing after minutes of retries."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

from cod_lightning.errors import UserError

PROBE_SECONDS = 4.0


def require_hub(what: str, instead: str) -> None:
    """Return if the hub answers within `PROBE_SECONDS`.

    `what` names the setting that needs the hub, `instead` an alternative; both are part of the message.

    Raises:
        UserError: the hub is switched off (`HF_HUB_OFFLINE`) or does not answer.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(f"{what} needs the Hugging Face hub, but HF_HUB_OFFLINE is set. {instead}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # any HTTP status is an answer
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
    """Return if the config.json of a repository is in the local cache, or the hub answers.

    Raises:
        UserError: `name` is not a valid name on the hub; or as `require_hub`.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise UserError(f"{name} is neither a folder nor a name on the hub. {instead}") from error
    if not isinstance(cached, str):
        require_hub(name, instead)
