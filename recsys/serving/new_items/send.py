"""Sends items of Parquet files to a server, which encodes them."""

import base64
import http.client
import json
from collections import Counter
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from recsys.data.parquet.file import open_parquet
from recsys.storage.location import Location

ITEMS_PER_REQUEST = 64
SECONDS = 60  # for an answer


def send_items(server: str, items: str, token: str | None) -> str:
    """Send the items of files; return the server's counts as text.

    If the server refuses some items, which is a ValueError, earlier ones have been added.
    """
    files, total = Location.of(items).files(".parquet"), Counter[str]()
    if not files:
        raise ValueError(f"{items}: no such Parquet file, nor a folder with *.parquet files")
    for file in files:
        with open_parquet(file) as parquet:
            first = 0
            for batch in parquet.iter_batches(ITEMS_PER_REQUEST):
                body = json.dumps({"items": batch.to_pylist()}, default=_plain)
                total.update(_send(server, body, token, f"{file}, rows from {first}"))
                first += batch.num_rows
    return ", ".join(f"{count:,} {name}" for name, count in total.items())


def _plain(value: Any) -> str | float:
    """Return a value that JSON has: bytes in base64, decimal numbers as floats, others as text."""
    if isinstance(value, Decimal):
        return float(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _send(server: str, body: str, token: str | None, location: str) -> dict[str, int]:
    url = urlsplit(server)
    client = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    headers = {"content-type": "application/json"}
    headers |= {} if token is None else {"authorization": f"Bearer {token}"}
    connection = client(url.netloc, timeout=SECONDS)
    try:
        connection.request("POST", f"{url.path.rstrip('/')}/v1/items", body, headers)
        response = connection.getresponse()
        content = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{server}: does not answer ({error}); start it, or correct it") from error
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise ValueError(f"{location}: {server} refuses them: {content.get('error')}")
    return {name: count for name, count in content.items() if isinstance(count, int)}
