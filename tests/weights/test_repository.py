"""Downloads that break off, arrive damaged, or have no room: resumed, repeated, or told in one line."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.hub_server import FILES, FLOW, SPEC, own_flow, partials, snapshots
from huggingface_hub import constants

from flux.errors import InputError
from flux.weights import repository
from flux.weights.repository import Repository

# ---- what goes wrong and is mended


def test_a_dropped_connection_goes_on_where_it_stopped(server):
    server.drop_at = 30_000
    assert own_flow().read_bytes() == FLOW
    assert server.transfers == [None, "bytes=30000-", "bytes=60000-"]


def test_a_later_run_goes_on_where_an_earlier_one_stopped(server, capsys):
    server.drop_at, server.down_after = 30_000, 1
    with pytest.raises(InputError, match="status 500: try again later; what has come so far is kept"):
        own_flow()
    [part] = partials()
    assert part.stat().st_size == 30_000
    assert snapshots() == []
    server.reset()
    capsys.readouterr()
    assert own_flow().read_bytes() == FLOW
    assert server.transfers == ["bytes=30000-"]
    assert partials() == []
    assert "0.00 GB are here already" in capsys.readouterr().out


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy_is_asked_again(server, status):
    server.refusals = [status] * 3
    assert own_flow().read_bytes() == FLOW
    assert len(server.pauses) >= 3
    assert server.pauses == sorted(server.pauses), "longer each time"


def test_a_file_damaged_on_the_way_is_fetched_again(server):
    server.damaged = 1
    assert own_flow().read_bytes() == FLOW
    assert server.transfers == [None, None]


def test_damage_from_an_earlier_run_is_found(server):
    """The size alone would pass."""
    own_flow()
    [blob] = Path(constants.HF_HUB_CACHE).rglob("blobs/*")
    blob.rename(blob.with_name(f"{blob.name}.part"))
    blob.with_name(f"{blob.name}.part").write_bytes(b"?" + FLOW[1:100])
    for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*"):
        path.unlink()
    assert own_flow().read_bytes() == FLOW
    assert server.transfers[-2:] == ["bytes=100-", None]


def test_a_file_that_is_always_damaged_takes_no_place(server):
    server.damaged = 10
    with pytest.raises(InputError, match=r"flux1-dev.safetensors .* damaged .* SHA-256"):
        own_flow()
    assert snapshots() == []
    assert partials() == []


def test_a_damaged_renewal_leaves_the_good_file(server, monkeypatch):
    path = own_flow()
    monkeypatch.setitem(FILES, "flux1-dev.safetensors", FLOW[:-4] + b"new!")
    server.damaged = 10
    with pytest.raises(InputError, match="SHA-256"):
        Repository(SPEC.repo_id, SPEC.licence).fetch([SPEC.repo_flow], renew=True)
    assert own_flow() == path
    assert path.read_bytes() == FLOW


def test_a_file_that_the_repository_lacks(server):
    with pytest.raises(InputError, match=r"nothing.safetensors in black-forest-labs/FLUX.1-dev"):
        own_flow(replace(SPEC, repo_flow="nothing.safetensors"))


def test_a_full_disk_is_told_before_anything_is_fetched(server, monkeypatch):
    monkeypatch.setattr(repository.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"GB of room at .* HF_HOME"):
        own_flow()
    assert server.transfers == []
