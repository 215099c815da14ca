"""Compares settings and frozen encoders of a new run with those of the run it starts from."""

from __future__ import annotations

from collections.abc import Callable

from recsys.build import Job
from recsys.checkpoint.compatibility import differing_settings
from recsys.checkpoint.run_folder import encoder_identities
from recsys.checkpoint.state import frozen_digest
from recsys.checkpoint.warm_start.differences import Differences
from recsys.checkpoint.warm_start.source import Source
from recsys.config import content_settings
from recsys.config.parser import short
from recsys.content.encoders.identity import check_identities


def compare_settings(source: Source, job: Job, differences: Differences) -> None:
    """List the settings that differ and decide more than how long and fast a run trains.

    Weights of another ranking model mean something else, even where they have names in common.
    """
    is_one_without_content = None in map(content_settings, (source.config, job.config))
    for name, before, now in differing_settings(source.config, job.config):
        if name.startswith("content.") and is_one_without_content:
            continue
        what = f"was {short(before)}, is {short(now)}"
        if name == "ranking.name" and source.request.takes("ranking."):
            differences.refuse(name, what, "set it back, or --warm-start.skip 'ranking.*'")
        else:
            differences.add(f"setting {name}", what, short(now))


def compare_encoders(
    source: Source, job: Job, takes: Callable[[str], bool], differences: Differences
) -> bool:
    """Return whether items are encoded as in the run, as far as frozen weights and settings go.

    Frozen weights are in no checkpoint, so other ones are refused for encoders of which a part is
    taken over.
    """
    before, now = content_settings(source.config.content), content_settings(job.config.content)
    if before is None or now is None:
        return False
    differing = [of[0] for of in differing_settings(source.config, job.config)]
    is_same = not any(name.startswith("content.") for name in differing)
    identities = encoder_identities(job)
    for name in before.modalities.keys() & now.modalities.keys():
        if name not in identities:
            continue
        try:
            check_identities({name: identities[name]}, source.request.run)
        except ValueError as error:
            is_same = False
            prefixes = f"content.encoders.{name}.", f"content.projections.{name}."
            if any(takes(each) for each in job.model.state_dict() if each.startswith(prefixes)):
                fix = f"or --warm-start.skip 'content.*.{name}.*'"
                differences.refuse(f"content.modalities.{name}", str(error), fix)
    digests = source.model.manifest["frozen_weights"], frozen_digest(job)
    if is_same and digests[0] != digests[1]:
        differences.refuse(
            "frozen weights",
            "they are others, though encoders and settings are the same",
            "bring the run's encoders back, or train anew",
        )
    return is_same
