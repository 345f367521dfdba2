"""Schemas of the nodes, and the example workflows that use them."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from helpers import comfy_stand_in

import comfyui

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[2] / "comfyui"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
# Nodes of ComfyUI itself, with the number of their widgets.
CORE = {
    "UNETLoader": 2, "DualCLIPLoader": 4, "VAELoader": 1, "EmptySD3LatentImage": 3, "LoadImage": 2,
    "VAEEncode": 0, "KSampler": 7, "VAEDecode": 0, "SaveImage": 1, "PreviewImage": 0, "Note": 1,
}  # fmt: skip
WIDGETS = ("Combo", "String", "Float", "Int")


@pytest.fixture
def nodes(monkeypatch):
    return comfy_stand_in.import_nodes(monkeypatch)


@pytest.fixture
def schemas(nodes):
    listed = asyncio.run(asyncio.run(comfyui.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node.define_schema() for node in listed}


def test_five_nodes_with_ids_of_their_own(schemas):
    assert len(schemas) == 5
    assert all(name.startswith("StableFlow") for name in schemas)


def test_ids_of_inputs_are_unique(schemas):
    for schema in schemas.values():
        names = [socket.id for socket in schema.inputs]
        assert len(set(names)) == len(names)


def test_defaults_lie_within_their_bounds(schemas):
    for schema in schemas.values():
        for socket in schema.inputs:
            if socket.kind in ("Int", "Float"):
                assert socket.declared["min"] <= socket.declared["default"] <= socket.declared["max"]
            if socket.kind == "Combo":
                assert socket.declared["default"] in socket.options


def test_each_input_is_an_argument(nodes, schemas):
    for node in (
        nodes.VitalLayers,
        nodes.StableFlowPrompts,
        nodes.StableFlowEdit,
        nodes.SkipLayers,
        nodes.LayerScan,
    ):
        code = node.execute.__func__.__code__
        arguments = code.co_varnames[1 : code.co_argcount]
        assert [socket.id for socket in node.define_schema().inputs] == list(arguments)


def test_layers_come_from_a_list_before_the_preset(nodes, tmp_path):
    preset = next(iter(nodes.PRESETS))
    assert nodes.VitalLayers.execute(preset, "4, 0", "").args == ((4, 0),)
    assert nodes.VitalLayers.execute(preset, "", "").args == (nodes.PRESETS[preset],)
    path = tmp_path / "vital_layers.json"
    path.write_text('{"vital_layers": [2]}')
    assert nodes.VitalLayers.execute(preset, "", str(path)).args == ((2,),)
    with pytest.raises(ValueError, match="give one of them"):
        nodes.VitalLayers.execute(preset, "1", str(path))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_nodes(schemas, path):
    workflow = json.loads(path.read_text())
    for node in workflow["nodes"]:
        if node["type"] in CORE:
            assert len(node["widgets_values"]) == CORE[node["type"]]
            continue
        schema = schemas[node["type"]]
        widgets = [socket for socket in schema.inputs if socket.kind in WIDGETS]
        # ComfyUI shows one more widget, what to do with the seed after a run, beside each seed.
        controls = sum(bool(socket.declared.get("control_after_generate")) for socket in widgets)
        assert len(node["widgets_values"]) == len(widgets) + controls
        sockets = [socket.id for socket in schema.inputs if socket.kind not in WIDGETS]
        assert [given["name"] for given in node["inputs"]] == sockets
        assert len(node["outputs"]) == len(schema.outputs)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_of_workflows_join_sockets_of_one_type(path):
    workflow = json.loads(path.read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for link, source, out, target, into, kind in workflow["links"]:
        assert by_id[source]["outputs"][out]["type"] == kind
        assert link in by_id[source]["outputs"][out]["links"]
        assert by_id[target]["inputs"][into] == {
            "name": by_id[target]["inputs"][into]["name"],
            "type": kind,
            "link": link,
        }


def test_three_workflows_those_of_edits_with_an_image():
    assert len(WORKFLOWS) == 3
    assert {path.stem for path in (ROOT / "example_workflows").glob("*.jpg")} == {
        path.stem for path in WORKFLOWS if "edit" in path.stem
    }


def test_registry_finds_what_it_asks_for():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = data["project"]
    assert "comfyui" not in project["name"].lower()
    assert project["name"][0].isalpha()
    assert len(project["version"].split(".")) == 3
    assert project["license"] == {"text": "Apache-2.0"}
    assert project["urls"]["Repository"].startswith("https://")
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= data["tool"]["comfy"].keys()
