"""Videos as lists of frames: sampled evenly, kept in order, encoded one by one."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from recsys.cli import main
from recsys.config import ModalitySettings
from recsys.data.items.content_store import ContentStore
from tests.datasets import write_dataset
from tests.recsys.command_runs import train_argv
from tests.recsys.data.items.item_content import rewrite, table_of

NUM_ITEMS, MOST = 4, 3
NUM_FRAMES = [0, 2, 3, 10]  # of each item
VIDEO = ModalitySettings(
    "frames", "poster", encoder="random:vit", image_size=32, max_images=MOST, pooling="cls"
)


def frame(shade: int) -> bytes:
    """An image of one shade of grey."""
    buffer = BytesIO()
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Frame f of each video is of shade 10 f."""
    dataset = write_dataset(tmp_path / "data", num_items=NUM_ITEMS)

    def with_videos(table: pa.Table) -> pa.Table:
        videos = [[frame(10 * f) for f in range(NUM_FRAMES[i])] for i in table["item"].to_pylist()]
        index = table.column_names.index("poster")
        return table.set_column(index, "poster", pa.array(videos, pa.list_(pa.binary())))

    rewrite(dataset, with_videos)
    return dataset


def store_of(dataset: Path) -> ContentStore:
    store = ContentStore(table_of(dataset), {"video": VIDEO}, dataset.parent / "cache")
    store.build("video")
    return store


def test_frames_stand_in_the_order_of_the_video(dataset: Path) -> None:
    video = store_of(dataset).gather(np.arange(NUM_ITEMS))["video"]
    assert video.mask.sum(dim=1).tolist() == [0, 2, 3, 3]
    shades = [row[mask].tolist() for row, mask in zip(video.values[:, :, 0, 0, 0], video.mask)]
    assert shades == [[], [0, 10], [0, 10, 20], [10, 50, 80]]


def test_videos_train_by_one_line_of_yaml(dataset: Path) -> None:
    video = "{video: {kind: frames, column: poster, encoder: 'random:vit', image_size: 32, "
    argv = ["--content.modalities", video + "max_images: 3}}"]
    assert main(train_argv(dataset, dataset.parent / "run", *argv)) == 0
    assert (dataset.parent / "run" / "metrics.json").is_file()
