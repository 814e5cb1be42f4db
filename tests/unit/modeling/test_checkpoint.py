"""Full-precision weights from safetensors: one file or shards, a folder or the hub's cache, whatever the names."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quailora
from quailora.calibration.data import Calibration
from quailora.errors import CheckpointError
from quailora.files import DTYPES
from quailora.modeling import checkpoint as checkpoints
from quailora.modeling.checkpoint import INDEX, SINGLE, Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from tests.helpers import tiny

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def rewritten(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a one-file checkpoint with other tensors."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / SINGLE)), folder / SINGLE, metadata={"format": "pt"})
    return folder


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """Names that begin with `old` begin with `new` instead."""
    return lambda tensors: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()
    }


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(Checkpoint(folder), CPU, dtype)


def weights(folder: Path, dtype: torch.dtype = torch.float32) -> Tensors:
    """All the decoder's weights, as they are while resident."""
    model = streamed(folder, dtype)
    found = {}
    for names in (model.outside_blocks(), *([f"{block.name}."] for block in model.blocks)):
        with model.resident(*names):
            for name, parameter in model.model.named_parameters(remove_duplicate=False):
                if not parameter.is_meta:
                    found[name] = parameter.detach().clone()
    return found


def assert_as_from_pretrained(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    decoder = {id(parameter) for parameter in whole.get_decoder().parameters()}
    found = weights(folder, dtype)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    needed = {name for name, parameter in whole.named_parameters() if id(parameter) in decoder}
    assert needed <= set(found)


def factors(folder: Path, output: Path) -> Tensors:
    quailora.build_adapter(
        folder,
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        Calibration(tiny.sequences(), "random tokens"),
        output,
        progress=False,
    )
    return load_file(output / "adapter_model.safetensors")


def test_shards_give_the_same_fingerprint_and_the_same_factors_as_one_file(tmp_path: Path) -> None:
    single = tiny.checkpoint(tmp_path / "single")
    sharded = tmp_path / "sharded"
    tiny.model().save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2 and not (sharded / SINGLE).exists()
    assert Checkpoint(sharded).fingerprint == Checkpoint(single).fingerprint
    one, other = factors(single, tmp_path / "one"), factors(sharded, tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_with_one_file_and_shards_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.model(seed=1).save_pretrained(folder, max_shard_size="100KB")
    tiny.checkpoint(tmp_path / "single")
    shutil.copy(tmp_path / "single" / SINGLE, folder)
    assert_as_from_pretrained(folder)


def test_a_changed_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")

    def scale(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
        return tensors

    other = rewritten(folder, tmp_path / "other", scale)
    copy = rewritten(folder, tmp_path / "copy", lambda tensors: dict(reversed(tensors.items())))
    assert Checkpoint(copy).fingerprint == Checkpoint(folder).fingerprint
    assert Checkpoint(other).fingerprint != Checkpoint(folder).fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_embeddings_are_found_under_either_name(family: str, stored: str, tmp_path: Path) -> None:
    plain = tiny.checkpoint(tmp_path / "plain", family, tie_word_embeddings=True)
    embedding = {
        "llama": "model.embed_tokens.weight",
        "gpt2": "transformer.wte.weight",
        "opt": "model.decoder.embed_tokens.weight",
    }[family]

    def store(tensors: Tensors) -> Tensors:
        value = tensors.pop(embedding)
        names = {"embedding": [embedding], "head": ["lm_head.weight"], "both": [embedding, "lm_head.weight"]}[stored]
        return tensors | {name: value.clone() for name in names}

    folder = rewritten(plain, tmp_path / "model", store)
    found = weights(folder)
    assert torch.equal(found[embedding], load_file(plain / SINGLE)[embedding])
    assert_as_from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("llama", "model.", ""),
        ("llama", "model.", "model.model."),
        ("gpt2", "transformer.", ""),
        ("opt", "model.", ""),
        ("bloom", "transformer.", ""),
        ("gpt_neox", "gpt_neox.", ""),
        ("mixtral", "model.", ""),
    ],
)
def test_names_may_lack_the_models_prefix_or_have_one_more(family: str, old: str, new: str, tmp_path: Path) -> None:
    plain = tiny.checkpoint(tmp_path / "plain", family)
    folder = rewritten(plain, tmp_path / "model", renamed(old, new))
    expected, found = weights(plain), weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_of_another_model_are_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    plain = tiny.checkpoint(tmp_path / "plain")
    folder = rewritten(plain, tmp_path / "model", renamed("model.layers.", "model.blocks."))
    with pytest.raises(CheckpointError, match=r"18 of 20 tensors are missing, the first is model\.layers\.0\."):
        streamed(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_read_in_any_float_and_cast_as_transformers_does(stored: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", dtype=stored)
    assert Checkpoint(folder).dtype == stored
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_from_pretrained(folder, dtype)


def test_without_a_dtype_in_the_configuration_it_is_that_of_the_tensors(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3", "falcon"])
def test_only_what_is_resident_has_memory_and_it_is_what_from_pretrained_loads(family: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", family)
    assert_as_from_pretrained(folder)
    model = streamed(folder)

    def in_memory() -> set[str]:
        return {n for n, p in model.model.named_parameters(remove_duplicate=False) if not p.is_meta}

    assert not in_memory()
    for block in model.blocks:
        with model.resident(f"{block.name}."):
            assert in_memory() == {f"{block.name}.{name}" for name, _ in block.module.named_parameters()}
        assert not in_memory()
    with model.resident(*model.outside_blocks()):
        assert in_memory() == set(model.outside_blocks())
    assert not in_memory()


def test_nothing_stays_in_memory_after_an_error(tmp_path: Path) -> None:
    model = streamed(tiny.checkpoint(tmp_path / "model"))
    with pytest.raises(RuntimeError, match="within"), model.resident("model.layers.0."):
        raise RuntimeError("within")
    (tmp_path / "model" / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"), model.resident("model.layers.1."):
        pass
    assert all(parameter.is_meta for parameter in model.model.parameters())


def hub_cache(folder: Path, repository: str, cache: Path) -> None:
    """What huggingface_hub leaves after a download."""
    base = cache / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, base / "snapshots" / commit)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_a_downloaded_model_is_read_from_the_cache_without_a_network(
    shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    tiny.model().save_pretrained(tmp_path / "model", max_shard_size=shard_size)
    hub_cache(tmp_path / "model", "someone/tiny", tmp_path / "cache")
    checkpoint = Checkpoint("someone/tiny")
    assert checkpoint.fingerprint == Checkpoint(tmp_path / "model").fingerprint
    assert all((tmp_path / "cache") in entry.file.parents for entry in checkpoint.tensors.values())


def test_a_download_that_was_cut_off_is_not_taken_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    tiny.model().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    missing = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    missing.unlink()
    hub_cache(tmp_path / "model", "someone/tiny", tmp_path / "cache")
    with pytest.raises(CheckpointError, match=f"shard {missing.name} of someone/tiny is missing"):
        Checkpoint("someone/tiny")
    (tmp_path / "model" / INDEX).unlink()
    hub_cache(tmp_path / "model", "someone/weightless", tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"neither .* \(if it can be reached\)"):
        Checkpoint("someone/weightless")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "/no/such/folder", "./no/such", "", "not a name"])
def test_what_is_neither_a_folder_nor_a_model_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        Checkpoint(name)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        Checkpoint(folder / SINGLE)


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()


def file(header: bytes, data: bytes = bytes(8), length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x01\x02", id="shorter than a length"),
        pytest.param(file(HEADER, length=2**40), id="length beyond the file"),
        pytest.param(file(HEADER, length=2**63 + 1), id="length beyond a signed integer"),
        pytest.param(file(HEADER, length=7), id="length within the JSON"),
        pytest.param(file(HEADER, bytes(7)), id="truncated by a byte"),
        pytest.param(file(HEADER, bytes(9)), id="a byte too many"),
        pytest.param(file(b"not JSON"), id="no JSON"),
        pytest.param(file(b"\xff\xfe"), id="no UTF-8"),
        pytest.param(file(b"[1, 2]"), id="a list"),
        pytest.param(file(b'{"a": 1}'), id="an entry that is a number"),
        pytest.param(file(b'{"a": {"dtype": "F32"}}'), id="an entry without offsets"),
        pytest.param(file(HEADER.replace(b"[0, 8]", b"[8, 0]")), id="offsets the wrong way round"),
        pytest.param(file(HEADER.replace(b"[0, 8]", b"[-8, 0]")), id="negative offsets"),
        pytest.param(file(HEADER.replace(b"[2]", b"[3]")), id="a shape that does not fit the offsets"),
        pytest.param(file(HEADER.replace(b"F32", b"Q9")), id="an unknown dtype"),
        pytest.param(file(HEADER[:-1] + b"," + HEADER[1:].replace(b'"a"', b'"b"')), id="overlapping tensors"),
        pytest.param(b"\x80\x04}q\x00.", id="a pickle"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", id="a git-lfs pointer"),
    ],
)
def test_a_damaged_file_is_found_at_once_and_named(content: bytes, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} \({len(content)} bytes\) is truncated, damaged or no"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a safetensors index"),
        ("[]", "is not a safetensors index"),
        ("\udcff", "is not a safetensors index"),
        ('{"weight_map": [1]}', "is not a safetensors index"),
        ('{"weight_map": {"a": {}}}', "is not a safetensors index"),
        ('{"weight_map": {"a": 1}}', "points outside its folder"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "points outside its folder, to '../secret.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "points outside its folder, to '/etc/passwd'"),
        ('{"weight_map": {"a": ".."}}', "points outside its folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "shard gone.safetensors of .* is missing, one of the 1 in"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(index: str, message: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    (folder / SINGLE).rename(tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(index, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_a_pickle_is_named_and_never_opened(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, .* convert it to safetensors"):
        Checkpoint(folder)


def with_tensors(folder: Path, tensors: Tensors) -> Checkpoint:
    """A checkpoint that holds these tensors and no model."""
    tiny.checkpoint(folder)
    save_file(tensors, folder / SINGLE)
    return Checkpoint(folder)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_as_safetensors_reads_it(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        return (
            torch.randint(0, 2 if name == "BOOL" else 256, (count,), generator=generator).byte().view(dtype).view(shape)
        )

    # "large" has pages of its own.
    tensors = {"matrix": some(3, 5), "scalar": some(), "empty": some(0, 4), "one": some(1), "large": some(257, 300)}
    found, expected = with_tensors(tmp_path / "model", tensors), load_file(tmp_path / "model" / SINGLE)
    assert {entry.dtype for entry in found.tensors.values()} == {name}
    lazy = found.slices(tensors)
    for key in tensors:
        assert_same_bits(found.tensors[key].read(), expected[key])
        assert_same_bits(found.tensor(key), expected[key])
        assert_same_bits(lazy[key][...], expected[key])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casting_piece_by_piece_is_casting(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_PIECE", 1000)  # bytes: no tensor below is a multiple of it
    tensors = {
        "matrix": torch.randn(37, 41).to(stored),
        "scalar": torch.tensor(0.3).to(stored),
        "empty": torch.empty(0, 2).to(stored),
    }
    found = with_tensors(tmp_path / "model", tensors)
    lazy = found.slices(tensors, dict.fromkeys(tensors, dtype))
    for key, tensor in tensors.items():
        assert_same_bits(lazy[key][...], tensor.to(dtype))


def test_a_read_may_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does from 2 GiB on."""
    tensor = torch.randn(1000)
    found = with_tensors(tmp_path / "model", {"a": tensor})
    opened = Path.open

    class Slow:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> "Slow":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def readinto(self, buffer: memoryview) -> int:
            return self.file.readinto(buffer[:300])

    monkeypatch.setattr(Path, "open", lambda *args, **options: Slow(opened(*args, **options)))
    assert torch.equal(found.tensor("a"), tensor)


def test_a_dtype_that_torch_has_not_is_named(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    (folder / SINGLE).write_bytes(file(HEADER.replace(b"F32", b"F8_E8M0").replace(b"[2]", b"[8]")))
    found = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} holds a tensor of F8_E8M0, for which torch has no dtype"):
        found.tensor("a")


@pytest.mark.parametrize("known", [True, False], ids=["by its date", "unseen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as it is", "cast"])
def test_a_file_that_is_cut_off_after_opening(
    known: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = with_tensors(tmp_path / "model", {"a": torch.randn(100), "b": torch.randn(100)})
    path = tmp_path / "model" / SINGLE
    if not known:  # it shrinks between the look at its date and the read
        monkeypatch.setattr(checkpoints, "_version", lambda _: found.tensors["a"].version)
    os.truncate(path, path.stat().st_size - 3)
    message = "has changed since it was opened" if known else "ends 3 bytes too early"
    with pytest.raises(CheckpointError, match=rf"{SINGLE} {message}: download it again"):
        found.tensors["b"].read(dtype)


def test_a_file_of_the_same_size_that_took_its_place_is_not_read(tmp_path: Path) -> None:
    found = with_tensors(tmp_path / "model", {"a": torch.randn(100)})
    path = tmp_path / "model" / SINGLE
    save_file({"a": torch.randn(100)}, path)
    os.utime(path, ns=(0, found.tensors["a"].version[1] + 1))
    with pytest.raises(CheckpointError, match=rf"{SINGLE} has changed since it was opened: download it again"):
        found.tensor("a")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    found = with_tensors(tmp_path / "model", {"a": torch.randn(100)})
    (tmp_path / "model" / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=rf"{SINGLE} cannot be read: .*No such file.*; download it again"):
        found.tensor("a")
