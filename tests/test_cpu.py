"""What a CPU multiplies fast, by what Linux and oneDNN's variable say of it; and PyTorch agrees."""

import pytest

from codeparrot_ds import cpu
from codeparrot_ds.cpu import cpu_precisions, why_not_bf16
from codeparrot_ds.model.products import has_bf16_products

# The instruction sets that matter of real processors, as /proc/cpuinfo has them.
ZEN2 = "flags\t\t: fpu sse4_2 avx f16c avx2 bmi2 sha_ni"
CASCADE_LAKE = "flags\t\t: fpu avx avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni"
ZEN4 = f"{CASCADE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} amx_bf16 avx512_fp16 amx_tile amx_int8"
GRAVITON2 = "Features\t: fp asimd evtstrm aes asimdhp cpuid asimdrdm"
GRAVITON3 = f"{GRAVITON2} sve svebf16 i8mm bf16"
POWER = "cpu\t\t: POWER9, altivec supported"


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Makes this machine's processor another one."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    read = cpu.instructions

    def put(line):
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\n{line}\nprocessor\t: 1\n")
        read.cache_clear()
        monkeypatch.setattr(cpu, "instructions", lambda: read(file))

    yield put
    read.cache_clear()


@pytest.mark.parametrize(
    ("line", "precisions"),
    [
        (ZEN2, ("fp32",)),
        (CASCADE_LAKE, ("fp32",)),
        (ZEN4, ("bf16", "fp32")),
        (SAPPHIRE_RAPIDS, ("bf16", "fp32", "fp16")),
        (GRAVITON2, ("fp32",)),
        (GRAVITON3, ("bf16", "fp32")),
        (POWER, ("fp32",)),
    ],
)
def test_processors(processor, line, precisions):
    processor(line)
    assert cpu_precisions() == precisions


def test_a_machine_without_cpuinfo_trains_in_fp32(tmp_path, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    found = cpu.instructions(tmp_path / "no cpuinfo")
    monkeypatch.setattr(cpu, "instructions", lambda: found)
    assert cpu_precisions() == ("fp32",) and why_not_bf16() == "this CPU has no bf16 instructions"


@pytest.mark.parametrize(
    ("limit", "precisions"),
    [
        ("AVX2", ("fp32",)),
        ("avx512_core_vnni", ("fp32",)),
        ("AVX512_CORE_BF16", ("bf16", "fp32")),
        ("DEFAULT", ("bf16", "fp32", "fp16")),
    ],
)
def test_the_variable_of_onednn_makes_a_cpu_older(processor, monkeypatch, limit, precisions):
    processor(SAPPHIRE_RAPIDS)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_precisions() == precisions
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", limit)
    assert cpu_precisions() == precisions


def test_the_reason_names_what_is_there(processor, monkeypatch):
    processor(ZEN2)
    assert why_not_bf16() == "this CPU has no bf16 instructions (AVX2 without them)"
    processor(SAPPHIRE_RAPIDS)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert why_not_bf16() == "ONEDNN_MAX_CPU_ISA=AVX2 leaves this CPU no bf16 instructions"


def test_pytorch_has_bf16_products_where_they_are_called_fast():
    assert has_bf16_products() or "bf16" not in cpu_precisions()
