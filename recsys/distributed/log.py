"""Set up Python's `logging` for the ranks of a job: from INFO on rank 0, from WARNING on others."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from pythonjsonlogger.json import JsonFormatter

from recsys.config import LogFormat, LogLevel

if TYPE_CHECKING:
    from tqdm import tqdm

PACKAGE_LOGGERS = ("recsys", "embeddings")


class _StandardOutput(logging.StreamHandler):  # type: ignore[type-arg]
    def emit(self, record: logging.LogRecord) -> None:
        try:
            print_table(self.format(record))
        except Exception:
            self.handleError(record)


class _TextFormatter(logging.Formatter):
    """Formats INFO of rank 0 as the message alone; all else with level and rank before it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno == logging.INFO and self.rank == 0:
            return text
        return f"{record.levelname.lower()}: rank {self.rank}: {text}"


def configure_logging(
    rank: int = 0, level: LogLevel = "auto", log_format: LogFormat = "text"
) -> None:
    """Send the log of this project's packages to standard output; may be called again."""
    if level == "auto":
        level = "info" if rank == 0 else "warning"
    handler, fields = _StandardOutput(), "%(asctime)s %(levelname)s %(name)s %(message)s"
    as_json = JsonFormatter(fields, static_fields={"rank": rank})
    handler.setFormatter(as_json if log_format == "json" else _TextFormatter(rank))
    for name in PACKAGE_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


def print_table(text: str) -> None:
    """Print a table, above a progress bar if there is one; call it on rank 0 alone."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)  # looked up now, as it may have been replaced
    sys.stdout.flush()


def progress_bar(total: int, name: str, shown: bool = True, **options: Any) -> tqdm:
    """Return a bar on standard error; nothing is drawn without a terminal or with JSON logs."""
    from tqdm import tqdm

    handlers = logging.getLogger(PACKAGE_LOGGERS[0]).handlers
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)
    is_drawn = shown and sys.stderr.isatty() and not is_json
    return tqdm(total=total, desc=name, disable=not is_drawn, dynamic_ncols=True, **options)
