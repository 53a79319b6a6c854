"""What a host can export, and where llama.cpp is looked for."""

from pathlib import Path

import pytest

from unslothd.v1.artifact_pb2 import ExportFormat
from unslothd.v1.service_pb2 import ExportModelRequest
from unslothd_server.errors import InvalidFieldsError, PreconditionError
from unslothd_server.export_formats import check_export, check_gguf_quantization, export_formats
from unslothd_server.llama_cpp import LlamaCpp, find_llama_cpp

ADAPTER = ExportFormat.EXPORT_FORMAT_ADAPTER
MERGED = ExportFormat.EXPORT_FORMAT_MERGED_16BIT
MERGED_4BIT = ExportFormat.EXPORT_FORMAT_MERGED_4BIT
GGUF = ExportFormat.EXPORT_FORMAT_GGUF


def llama_cpp_in(folder: Path, *, quantizer: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "convert_hf_to_gguf.py").touch()
    if quantizer:
        program = folder / quantizer
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(mode=0o755)
    return folder


@pytest.fixture(autouse=True)
def nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_a_cpu_without_llama_cpp_writes_adapters_and_merged_16_bits():
    assert export_formats(["cpu"], find=lambda: None) == [ADAPTER, MERGED]


def test_a_gpu_writes_4_bits_too():
    assert export_formats(["cuda:0", "cuda:1"], find=lambda: None) == [ADAPTER, MERGED, MERGED_4BIT]


def test_llama_cpp_makes_gguf_possible(tmp_path: Path):
    assert GGUF in export_formats(["cpu"], find=lambda: LlamaCpp(tmp_path, None))


def test_llama_cpp_is_found_where_the_operator_says_before_anywhere_else(tmp_path: Path):
    own = llama_cpp_in(tmp_path / "own", quantizer="build/bin/llama-quantize")
    other = llama_cpp_in(tmp_path / "other", quantizer="llama-quantize")
    environ = {"UNSLOTH_LLAMA_CPP_PATH": str(own), "PATH": str(other)}
    assert find_llama_cpp(environ) == LlamaCpp(own / "convert_hf_to_gguf.py", own / "build" / "bin" / "llama-quantize")
    assert find_llama_cpp({"PATH": str(other)}) == LlamaCpp(other / "convert_hf_to_gguf.py", other / "llama-quantize")


def test_llama_cpp_is_found_in_unsloths_folder(tmp_path: Path):
    folder = llama_cpp_in(tmp_path / "home" / ".unsloth" / "llama.cpp")
    assert find_llama_cpp({}) == LlamaCpp(folder / "convert_hf_to_gguf.py", None)


def test_a_quantizer_alone_is_not_llama_cpp(tmp_path: Path):
    program = tmp_path / "llama-quantize"
    program.touch(mode=0o755)
    assert find_llama_cpp({"PATH": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("form", "said"), [(MERGED_4BIT, "GPU"), (GGUF, "UNSLOTH_LLAMA_CPP_PATH")], ids=["4-bit", "gguf"]
)
def test_a_form_that_cannot_be_written_says_what_it_needs_and_what_can_be(form: "ExportFormat.ValueType", said: str):
    with pytest.raises(PreconditionError) as raised:
        check_export(ExportModelRequest(format=form), [ADAPTER, MERGED])
    assert raised.value.reason_name == "EXPORT_UNSUPPORTED"
    assert said in raised.value.message
    assert "ADAPTER, MERGED_16BIT" in raised.value.message


def test_a_gguf_type_belongs_to_gguf():
    with pytest.raises(InvalidFieldsError) as raised:
        check_export(ExportModelRequest(format=MERGED, gguf_quantization="q8_0"), [ADAPTER, MERGED])
    assert raised.value.violations[0].field == "gguf_quantization"


def test_types_are_known_and_some_need_the_quantizer(tmp_path: Path):
    without, with_it = LlamaCpp(tmp_path, None), LlamaCpp(tmp_path, tmp_path)
    check_gguf_quantization("q8_0", without)
    check_gguf_quantization("q4_k_m", with_it)
    with pytest.raises(PreconditionError):
        check_gguf_quantization("q4_k_m", without)
    with pytest.raises(InvalidFieldsError):
        check_gguf_quantization("q4_k_xxl", with_it)
