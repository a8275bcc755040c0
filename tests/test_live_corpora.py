"""`pytest --live`: each corpus is still at its address, and laid out as its row says.

Needs a network, and for gated datasets a Hugging Face login whose licences are accepted. Skipped
without the option: every corpus fails or passes alone.
"""

import pytest
import requests

import corpora
import download_data
import fetching

pytestmark = pytest.mark.live
TABLE = [row for row in download_data.CORPORA if isinstance(row, corpora.OnHub | corpora.Archives)]


def size_at(url):
    """The bytes that an address promises, without fetching them."""
    with requests.get(url, stream=True, timeout=fetching.TIMEOUT_S) as response:
        assert response.status_code == 200, f"{url}: HTTP {response.status_code}"
        return int(response.headers.get("Content-Length", 0))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_corpus_is_there_as_its_row_says(row):
    if isinstance(row, corpora.Archives):
        sizes = {a.name: size_at(f"{row.bases[0]}/{a.name}") for a in row.archives}
        for archive in row.archives:
            found = sizes[archive.name] / fetching.GIGABYTE
            assert found == pytest.approx(archive.gigabytes, rel=0.2, abs=0.1), archive.name
        return
    assert not (row.gated and fetching.licence_page(row.repo, None)), "accept its licence first"
    shards = corpora.shards_of(row, None)
    assert shards
    if isinstance(row, corpora.Hub):
        columns = schema(shards[0])
        text = "" if row.layout == "crema_d" else row.text  # known by its file's name
        wanted = {row.audio, row.file, text, *(row.keep[:1] if row.keep else ()), row.style}
        assert wanted - {""} <= set(columns), columns
        assert not row.speakers or set(row.speakers) & set(columns), columns


def schema(shard):
    """The columns of a shard on the Hub, from its last bytes alone."""
    import pyarrow.parquet
    from huggingface_hub import HfFileSystem

    path = f"datasets/{shard.repo}/{shard.path}"
    with HfFileSystem().open(path, "rb", revision=shard.revision) as file:
        return pyarrow.parquet.read_schema(file).names
