"""Kind `frames`: a video as the list of its frames, encoded images of an item column of kind image.

`max_images` frames of each item are used, evenly spaced and in order. Each is encoded by itself,
and the tokens of all frames are concatenated.
"""

from __future__ import annotations

import numpy as np

from recsys.content.kinds.image import Image


class Frames(Image):
    """Videos: an entry is a frame."""

    has_several = True

    def chosen(self, count: int) -> list[int]:
        """Return the indices in the middle of `max_images` equal parts of the video.

        Example::

            frames = Frames("content.modalities.video", settings)  # max_images: 4
            frames.chosen(100)  # [12, 37, 62, 87]
            frames.chosen(3)  # [0, 1, 2]
        """
        most = self.modality.max_images
        if count <= most:
            return list(range(count))
        return [int(place) for place in (np.arange(most) + 0.5) * count / most]

    def which_are_used(self) -> str:
        """Return a description of the frames used of a long video, for the log."""
        return f"{self.modality.max_images} of each are used, evenly over its length"
