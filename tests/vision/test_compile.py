"""A tower that was compiled in advance returns the embeddings of the eager tower."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.config import BadSetting
from common.families import FAMILIES as DESCRIPTIONS
from common.settings import CompileSettings
from common.vision_artefact import VisionArtefact, open_artefact, sha256_of
from compute.linear import Linear
from services.vision import compile as compile_module
from services.vision.compile import column_widths_of, compile_vision
from services.vision.compile import noise as noise_of
from services.vision.compiled_tower import CompiledTower
from services.vision.compilers import COMPILERS
from services.vision.compilers.graph import BadGraph, read_graph
from services.vision.eager_tower import EagerTower
from services.vision.families import FAMILIES, load
from services.vision.item_rules import ItemRules
from services.vision.sample_shapes import samples
from services.vision.tower_thread import ItemShape
from tests.golden import ROOT, GoldenCase, max_difference
from tests.toy_family import tower as toy_tower
from tests.toy_family.checkpoint import make_checkpoint
from tests.toy_family.description import MODEL_TYPE, Toy
from tests.vision.test_qwen2_5_vl import CPU, embed, patches_of, tower_of
from tests.vision.test_static_tower import noise
from tests.vision.test_toy_tower import SHAPES, item

CASE = GoldenCase("a_image")
BUCKETS = (64, 1000)
"""The larger one is not a whole number of windows."""
GRIDS = [(2, 2), (2, 30), (8, 8), (16, 16), (34, 22)]


def compiled(
    folder: Path, case: GoldenCase = CASE, dtype: torch.dtype = torch.float32, **how: object
) -> VisionArtefact:
    checkpoint = open_checkpoint(case.checkpoint)
    compile_vision(checkpoint, (256,), dtype, folder, **how)  # type: ignore[arg-type]
    return open_artefact(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of one case, in float32, whose embeddings leave in chunks."""
    made = tmp_path_factory.mktemp("artefact") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "COLUMNS_PER_CHUNK", 48)
        checkpoint = open_checkpoint(CASE.checkpoint)
        compile_vision(checkpoint, BUCKETS, torch.float32, made, in_chunks=True)
    return made


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def test_golden_embeddings_equal_the_reference(folder: Path) -> None:
    tower = CompiledTower(open_artefact(folder), CPU)
    assert max_difference(embed(tower, CASE), CASE.tensors["image_embeds"]) < 1e-4


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_grid_has_the_embeddings_of_the_eager_tower(
    folder: Path, height: int, width: int
) -> None:
    """In every bucket, padded, masked and dropped, and joined from chunks of columns."""
    image = noise(height, width)
    expected = EagerTower(tower_of(CASE)).encode(*image).numpy()
    assert max_difference(compiled_tower(folder).encode(*image).numpy(), expected) < 1e-5


def compiled_tower(folder: Path) -> CompiledTower:
    return CompiledTower(open_artefact(folder), CPU)


def test_golden_videos_equal_the_reference(tmp_path: Path) -> None:
    """Videos have programs of their own: two frames in a patch, and a mask of steps in time."""
    case = GoldenCase("e_video")
    tower = CompiledTower(compiled(tmp_path / "made", case), CPU)
    expected = case.tensors["video_embeds"]
    assert max_difference(embed(tower, case), expected) < 1e-4


def test_bfloat16_stays_near_the_reference(tmp_path: Path) -> None:
    """The kernels of this CPU take no part in it, whatever they are."""
    tower = CompiledTower(compiled(tmp_path / "made", dtype=torch.bfloat16), CPU)
    expected = CASE.tensors["image_embeds"]
    assert tower.encode(*patches_of(CASE)[0]).dtype == torch.bfloat16
    assert max_difference(embed(tower, CASE), expected) < 0.05 * np.abs(expected).max()


def test_compiling_leaves_the_kernels_on(folder: Path) -> None:
    assert Linear(torch.ones(16, 16)).is_packed_by_onednn


def test_columns_leave_in_chunks_of_640() -> None:
    assert column_widths_of(3584, in_chunks=True) == [640] * 5 + [384]
    assert column_widths_of(1280, in_chunks=True) == [640, 640]
    assert column_widths_of(128, in_chunks=True) == [128]
    assert column_widths_of(3584, in_chunks=False) == [3584]


def test_the_programs_have_an_output_for_each_chunk_and_share_their_weights(folder: Path) -> None:
    artefact = open_artefact(folder)
    assert artefact.manifest.column_widths == (48, 48, 32)
    graphs = [read_graph((folder / f"graph-{n}.json").read_bytes()) for n in BUCKETS]
    assert [len(graph.outputs) for graph in graphs] == [3, 3]
    assert graphs[0].weights == graphs[1].weights
    tower = sum(info.num_bytes for name, info in tower_infos().items())
    assert (folder / "weights.safetensors").stat().st_size < 1.25 * tower


def tower_infos() -> dict[str, object]:
    tensors = open_checkpoint(CASE.checkpoint).tensors
    return {name: info for name, info in tensors.items() if name.startswith("visual.")}


def test_what_depends_on_the_grid_comes_from_outside(folder: Path) -> None:
    programs = {program.name: program for program in open_artefact(folder).manifest.programs}
    program = programs["1000"]
    assert (program.num_patches, program.length) == (1000, 1024)
    assert {each.name: (each.dtype, each.shape) for each in program.inputs} == {
        "patches": ("uint8", (1024, 588)),
        "order": ("int64", (256,)),
        "inverse": ("int64", (256,)),
        "cos": ("float32", (1024, 16)),
        "signed_sin": ("float32", (1024, 16)),
        "window_mask": ("bool", (16, 1, 64, 192)),
        "full_mask": ("bool", (1, 1, 1, 1024)),
    }


def test_the_artefact_says_of_the_model_what_the_service_asks(folder: Path) -> None:
    checkpoint = open_checkpoint(CASE.checkpoint)
    artefact = open_artefact(folder)
    kept = artefact.checkpoint
    assert artefact.buckets == BUCKETS
    assert kept.fingerprint == checkpoint.fingerprint
    assert kept.sizes == checkpoint.sizes
    assert kept.preprocessor_config == checkpoint.preprocessor_config
    rules = ItemRules.of(checkpoint, buckets=BUCKETS)
    assert ItemRules.of(kept, buckets=BUCKETS).max_patches == rules.max_patches


def test_it_has_no_weights_of_the_model(folder: Path) -> None:
    kept = open_artefact(folder).checkpoint
    tower = load(kept, torch.float32, CPU)
    assert tower.output_width == CASE.tensors["image_embeds"].shape[1]
    with pytest.raises((NotImplementedError, RuntimeError)):
        EagerTower(tower).encode(*noise(2, 2)).tolist()


def test_an_image_that_fits_into_no_bucket_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="1028 patches fit into none"):
        compiled_tower(folder).encode(*noise(2, 514))


def test_loading_reports_its_progress(folder: Path) -> None:
    reported: list[float] = []
    CompiledTower(open_artefact(folder), CPU, reported.append)
    assert reported == sorted(reported) and len(reported) > 10 and reported[-1] == 1


def test_a_family_that_nobody_knows_is_compiled_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy family has other plans, three patches per token, and content of any size."""
    monkeypatch.setitem(DESCRIPTIONS, MODEL_TYPE, Toy())
    monkeypatch.setitem(FAMILIES, MODEL_TYPE, toy_tower.load)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model"))
    eager = EagerTower(load(checkpoint, torch.float32, CPU))
    compile_vision(checkpoint, (12, 30), torch.float32, tmp_path / "made")
    shutil.rmtree(tmp_path / "model")
    tower = CompiledTower(open_artefact(tmp_path / "made"), CPU)
    for shape in SHAPES:
        expected = eager.encode(*item(shape)).numpy()
        assert max_difference(tower.encode(*item(shape)).numpy(), expected) < 1e-5


MODELS = {
    "qwen2_5_vl": "qwen2_5_vl/a_image",
    "qwen": "qwen_vl/a_chat_image",
    "wemm": "wemm/a_image",
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_tower_of_every_family_is_compiled(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ROOT / MODELS[model_type] / "checkpoint")
    bucket = min(1040, checkpoint.family.max_patches(checkpoint, None, None) + 6)
    bucket -= bucket % checkpoint.patches_per_token
    compile_vision(checkpoint, (bucket,), torch.float32, tmp_path / "made")
    tower = CompiledTower(open_artefact(tmp_path / "made"), CPU)
    eager = EagerTower(load(checkpoint, torch.float32, CPU))
    tried = set()
    for shape in islice(samples(checkpoint, bucket), 0, None, 2):
        tried.add((shape.kind, shape.grid_thw[0]))
        num_values = shape.frames_per_patch * eager._tower.values_per_patch
        patches = noise_of(math.prod(shape.grid_thw), num_values)
        expected = eager.encode(patches, shape).numpy()
        found = tower.encode(patches, shape).numpy()
        assert max_difference(found, expected) < 1e-5 * np.abs(expected).max()
    videos = {("video", 1), ("video", 2), ("video", 3)} if model_type == "qwen2_5_vl" else set()
    assert tried == {("image", 1)} | videos


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"buckets": ""}, "--buckets"),
        ({"buckets": "63"}, "--buckets 63.*multiples of 4"),
        ({"buckets": "64,no"}, "--buckets 64,no"),
        ({"out": ""}, "--out"),
        ({"out": "."}, r"--out \..*exists"),
        ({"model": "/no/such"}, "/no/such"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(changed: dict[str, str], words: str) -> None:
    given = {"model": str(CASE.checkpoint), "buckets": "64", "out": "/no/such/folder"}
    with pytest.raises((BadSetting, BadCheckpoint), match=words):
        compile_module.main(CompileSettings(**given | changed))


def test_others_may_read_the_artefact(folder: Path) -> None:
    """The user of a container is not the one who compiled it."""
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir())


def test_a_model_without_a_vision_tower_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, "qwen2_5_vl")
    with pytest.raises(BadCheckpoint, match="no vision tower"):
        compiled(tmp_path / "made")


def change_graph(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a graph and the manifest with it, as a careless or a malicious tool might."""
    file = folder / "graph-64.json"
    graph = json.loads(file.read_text())
    change(graph)
    file.write_text(json.dumps(graph))
    refresh(folder, "graph-64.json")


def refresh(folder: Path, name: str) -> None:
    """Enter a file's hash into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = sha256_of(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def set_step(graph: dict, step: list) -> None:
    graph["steps"][0] = step


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: set_step(g, ["aten.from_file.default", ["/etc/passwd"], {}]), "from_file"),
        (lambda g: set_step(g, ["aten.set_.default", [{"value": 0}], {}]), "set_"),
        (lambda g: set_step(g, ["os.system", ["true"], {}]), "os.system"),
        (lambda g: set_step(g, ["aten.__class__.mro", [], {}]), "__class__"),
        (lambda g: set_step(g, ["aten.neg.default", [{"value": 10**6}], {}]), "does not exist"),
        (lambda g: set_step(g, ["aten.neg.default", [{"value": -1}], {}]), "does not exist"),
        (lambda g: set_step(g, ["aten.neg.default", [{"code": "x"}], {}]), "malformed"),
        (lambda g: set_step(g, ["aten.neg.default", ["x"], {}]), "cannot be run"),
        (lambda g: g["weights"].append("weight.none"), "weight.none"),
        (lambda g: g["outputs"].append(10**6), "does not exist"),
        (lambda g: g["outputs"].pop(), "columns of the widths"),
        (lambda g: g.update(more=1), "more"),
        (lambda g: g.update(num_inputs=10**9), "inputs"),
        (lambda g: g.update(num_inputs=1), "1 inputs"),
    ],
)
def test_a_graph_that_asks_for_more_than_operations_is_refused(
    copy: Path, change: Callable[[dict], object], words: str
) -> None:
    change_graph(copy, change)
    with pytest.raises(BadCheckpoint, match=words):
        compiled_tower(copy)


@pytest.mark.parametrize("change", [{"plan_values": "{'windows': (1,)}"}, {"inputs": []}], ids=str)
def test_a_plan_that_no_program_was_made_for_is_an_error(
    folder: Path, change: dict[str, object]
) -> None:
    """As after an update of Twinlens that changed what a plan is."""
    tower = compiled_tower(folder)
    tower._programs[64] = [
        msgspec.structs.replace(program, **change) for program in tower._programs[64]
    ]
    with pytest.raises(ValueError, match="compile the model again"):
        tower.encode(*noise(2, 2))


def test_a_changed_file_is_refused(copy: Path) -> None:
    weights = copy / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"weights\.safetensors is damaged"):
        compiled_tower(copy)


def test_weights_that_are_cut_off_are_refused(copy: Path) -> None:
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refresh(copy, "weights.safetensors")
    with pytest.raises(BadCheckpoint, match="cut off"):
        compiled_tower(copy)


def test_an_artefact_of_a_compiler_that_is_not_here_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"compiler": "vendor"}))
    with pytest.raises(BadCheckpoint, match=r"vendor.*torch\.export"):
        compiled_tower(copy)


def test_a_tower_with_an_operation_that_is_not_in_the_table_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.vision.compilers.graph.OPERATIONS", frozenset())
    with pytest.raises(BadGraph, match=r"uses aten\.\w+"):
        compiled(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_another_compiler_gets_the_exported_programs_and_their_shapes(tmp_path: Path) -> None:
    """What a vendor implements: files from exported programs, and a runtime for them."""
    seen = []

    class Vendor:
        name = "vendor"
        version = "1"

        def compile(self, programs, folder, report):  # type: ignore[no-untyped-def]
            seen.extend(programs)
            (folder / "blob").write_bytes(b"compiled")
            return ["blob"]

        def load(self, artefact, device, report_loading):  # type: ignore[no-untyped-def]
            assert artefact.file("blob").read_bytes() == b"compiled"
            return self

        def run(self, name, inputs):  # type: ignore[no-untyped-def]
            [program] = (p for p in seen if p.compiled.name == name)
            return list(program.exported.module()(*inputs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPILERS, "vendor", Vendor())
        tower = CompiledTower(compiled(tmp_path / "made", compiler=Vendor()), CPU)
        assert max_difference(embed(tower, CASE), CASE.tensors["image_embeds"]) < 1e-4


def test_a_shape_of_content_is_not_mistaken(folder: Path) -> None:
    patches, _ = noise(4, 6)
    with pytest.raises(ValueError, match="needs uint8"):
        compiled_tower(folder).encode(patches, ItemShape((1, 4, 4), (56, 56)))
