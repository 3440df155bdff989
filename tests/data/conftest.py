"""Where the data tests keep images and what the datasets library caches."""

import datasets
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keeps what the datasets library caches out of the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def folder(tmp_path):
    """A folder with three images of different sizes."""
    for name, size in {"red": (64, 64), "green": (32, 48), "blue": (64, 32)}.items():
        Image.new("RGB", size, name).save(tmp_path / f"{name}.png")
    return tmp_path
