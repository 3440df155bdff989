"""The compile report: what the kernels compile to on every target, and that the report would notice worse.

Triton cannot compile where it interprets, as it does here without a GPU, so what compiles has its own process.
"""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

import amvl_fast.kernels.triton as kernels  # noqa: E402
from amvl_fast.bench import compile_report, machine_code, predictions, tables  # noqa: E402
from amvl_fast.bench.compile_cases import OPS, PURE_DTYPES, Case  # noqa: E402
from amvl_fast.bench.machine_code import MachineCode, occupancy, read_amdgcn, read_sass  # noqa: E402
from amvl_fast.bench.specialisations import TARGETS, record, specialisations  # noqa: E402
from amvl_fast.bench.traffic import traffic_of  # noqa: E402
from amvl_fast.errors import AMVLError  # noqa: E402


def run_python(code, *arguments, interpret=False):
    """Run `code` in a fresh process that can import this file; what it printed."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["broad", pytest.param("wide", marks=pytest.mark.slow)])
def written(request, tmp_path_factory):
    """The directory that a report wrote to, and the report."""
    directory = tmp_path_factory.mktemp(request.param)
    code = "import sys, pathlib; from amvl_fast.bench.compile_report import report; "
    code += "print(report(pathlib.Path(sys.argv[1]), wide=sys.argv[2] == 'wide'))"
    return directory, run_python(code, directory, request.param)


@pytest.fixture(scope="module")
def rows(written):
    return json.loads((written[0] / "compile.json").read_text())["kernels"]


def none_of(rows, wrong):
    """Fail with the names of the rows that are wrong."""
    assert rows
    found = [tables.name(row) for row in rows if wrong(row)]
    assert not found, f"{len(found)} of {len(rows)}:\n" + "\n".join(found)


def test_every_specialisation_compiles(rows):
    none_of(rows, lambda row: row["error"])


def test_the_targets_get_what_they_should(rows):
    for target in TARGETS:
        mine = [row for row in rows if row["target"] == target]
        shapes = {(row["kernel"], row["dtypes"], row["d"]) for row in mine if row["layout"] == "contiguous"}
        assert set(itertools.product(OPS[:2], PURE_DTYPES, (64, 512, 2048))) <= shapes
        assert {row["kernel"] for row in mine} == set(OPS)
        with_ids = {row["kernel"] for row in mine if row["options"] == "sample ids"}
        assert with_ids == set(OPS if target == "sm_90" else OPS[:2])


def test_nothing_spills_or_touches_local_memory(rows):
    none_of(rows, lambda row: row["spills"] or row["local"] or row["stack_bytes"])


def test_registers_leave_room_for_half_of_the_warps(rows):
    hopper = [row for row in rows if row["target"] == "sm_90" and not row["error"]]
    none_of(hopper, lambda row: row["registers"] == 0)
    crowded = [tables.name(row) for row in hopper if row["occupancy"] < 0.5]
    # Of all that there are, 17 of 1,244 rare ones need 71 to 77 registers; of the common ones none.
    assert len(crowded) <= 0.014 * len(hopper) if len(hopper) > 1000 else not crowded, "\n".join(crowded)
    assert max(row["registers"] for row in hopper) < 80


def test_aligned_tensors_move_in_128_bits(rows):
    aligned = [row for row in rows if row["target"].startswith("sm_") and row["aligned"] and not row["error"]]
    pure = [row for row in aligned if row["dtypes"] in PURE_DTYPES]
    assert {row["d"] for row in pure} >= {64, 512, 1000, 2048, 3000, 8192} and {row["layout"] for row in pure} >= {
        "expanded"
    }
    none_of(pure, lambda row: row["wide_stores"] != 1 or row["wide_loads"] not in (1, None))
    plain = [row for row in pure if row["kernel"] != "gaussian_noise" and row["options"] in ("", "sample ids")]
    none_of(plain, lambda row: row["wide_loads"] is None)


def test_mixed_dtypes_move_a_thread_s_share_at_once(rows):
    aligned = [row for row in rows if row["target"] == "sm_90" and row["aligned"] and not row["error"]]
    mixed = [row for row in aligned if row["dtypes"] not in PURE_DTYPES]
    mixed = [row for row in mixed if row["kernel"] != "gaussian_noise"]
    none_of(mixed, lambda row: "16 x" in row["loads"] + row["stores"] or "128 x" not in row["loads"])


def test_fourteen_elements_are_moved_per_latent_element():
    shapes = [("float32", 512, (4, 8)), ("bfloat16", 100, (3, 5)), ("bfloat16", 3000, (1, 3))]
    shapes = [(*shape, sample_ids) for shape in shapes for sample_ids in (False, True)]
    cases = [
        Case(op, dtypes, width, leading=leading, sample_ids=sample_ids)
        for dtypes, width, leading, sample_ids in shapes
        for op in OPS[:2]
    ]
    counted = traffic_of(cases)
    for (dtypes, width, leading, sample_ids), forward, backward in zip(
        shapes, counted[::2], counted[1::2], strict=True
    ):
        rows, latents = leading[0] * leading[1], forward.latents
        assert latents == backward.latents == rows * width
        assert (forward.elements + backward.elements) / latents <= 14
        assert max(forward.row_elements, backward.row_elements) <= (2 + sample_ids) * rows
        assert forward.scalars + backward.scalars <= 0.005 * 14 * latents
        assert forward.bytes == forward.elements * (4 if dtypes == "float32" else 2)


# The analysis itself: probes that are as bad as the assertions above forbid.


@triton.jit
def probe(x, out, stride, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + column * stride)
    if SUM:  # all of a thread's values stay alive until the sum is known
        value = value / tl.sum(value, axis=1)[:, None]
    tl.store(out + column, value)


@triton.jit
def twice(x, out, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    mask = column < COLUMNS - 3
    tl.store(out + column, tl.load(x + column, mask=mask) + tl.load(x + column, mask=mask), mask=mask)


def inspected_probes():
    """Every probe, compiled for sm_90, or for gfx942; called in a process of its own."""

    def inspected(target="sm_90", stride=1, offset=0, columns=4096, summed=False, **options):
        x, out = (torch.zeros(2 * columns + 1, device="meta")[offset:] for _ in range(2))
        _, (one,) = record(lambda: probe[(1,)](x, out, stride, columns, summed, **options), target)
        return machine_code.inspect(one)

    found = {
        "good": inspected(),
        "spilling": inspected(columns=16384, summed=True, maxnreg=32),
        "strided": inspected(stride=2),
        "unaligned": inspected(offset=1),
        "impossible": inspected(columns=100),
        "good on AMD": inspected("gfx942"),
        "strided on AMD": inspected("gfx942", stride=2),
        "spilling on AMD": inspected("gfx942", columns=65536, summed=True, num_warps=1),
    }
    print(json.dumps({name: vars(code) for name, code in found.items()}))


@pytest.fixture(scope="module")
def probes():
    return json.loads(run_python("import test_compile_report as here; here.inspected_probes()"))


def test_a_good_kernel_is_found_good(probes):
    good = probes["good"]
    assert good["error"] is None and 0 < good["registers"] <= 64
    assert good["spills"] == good["local"] == good["stack"] == 0
    assert good["loads"] == good["stores"] == {"128": 8} and good["wide_loads"] == good["wide_stores"] == 1


def test_spills_are_found(probes):
    spilling = probes["spilling"]
    assert spilling["registers"] <= 32 and spilling["spills"] > 0 and spilling["stack"] > 0 and spilling["local"] > 0


def test_narrow_accesses_are_found(probes):
    strided, unaligned = probes["strided"], probes["unaligned"]
    assert "128" not in strided["loads"] and strided["wide_loads"] == 0 and strided["wide_stores"] == 1
    assert unaligned["loads"] == unaligned["stores"] == {"32": 32}
    assert unaligned["wide_loads"] == unaligned["wide_stores"] == 0


def test_what_does_not_compile_is_a_result(probes):
    assert "power of 2" in probes["impossible"]["error"]


def test_amd_code_is_understood(probes):
    good, strided, spilling = (probes[name] for name in ("good on AMD", "strided on AMD", "spilling on AMD"))
    assert good["error"] is None and good["loads"] == good["stores"] == {"128": 4}
    assert good["registers"] > 0 and good["spills"] == good["stack"] == good["local"] == 0
    assert "128" not in strided["loads"]
    assert spilling["spills"] > 0 and spilling["stack"] > 0 and spilling["local"] > 0


def test_traffic_is_counted_without_what_is_masked():
    print_traffic = (
        "import torch, test_compile_report as here, amvl_fast.bench.traffic as traffic_module\n"
        "with traffic_module.counting() as traffic: here.twice[(2,)](torch.zeros(64), torch.zeros(64), 64)\n"
        "print(traffic.elements, traffic.bytes, traffic.row_elements, traffic.scalars)"
    )
    # Two programs, three accesses each, 61 of 64 columns: a kernel that loads twice does not pass for one.
    assert run_python(print_traffic, interpret=True).split() == [str(2 * 3 * 61), str(2 * 3 * 61 * 4), "0", "0"]


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R4.64] ;        /* 0x1 */
        /*0010*/                   FFMA R4, R4, R4, R4 ;                   /* 0x1 */
        /*0020*/              @!P0 MUFU.EX2 R5, R4 ;                       /* 0x1 */
        /*0030*/               @P0 BRA 0x10 ;                              /* 0x1 */
        /*0040*/                   STG.E.U16 desc[UR4][R4.64], R8 ;        /* 0x1 */
        /*0050*/                   EXIT ;                                  /* 0x1 */
        /*0060*/                   LDL R4, [R1] ;                          /* 0x1 */
        /*0070*/                   BRA 0x70;                               /* 0x1 */
"""


def test_loops_weigh_and_subroutines_do_not():
    code = MachineCode()
    read_sass(SASS, code, trips=5)
    assert code.instructions == Counter(memory=2, float=5, special=5, integer=6)
    assert code.loads == {128: 1} and code.stores == {16: 1}
    assert code.local == 1  # local memory counts wherever it stands


def test_amd_assembly_without_metadata_is_refused():
    with pytest.raises(RuntimeError, match="vgpr_count"):
        read_amdgcn("s_endpgm", MachineCode())


@pytest.mark.parametrize(
    ("registers", "warps", "share"), [(64, 4, 0.5), (65, 4, 0.4375), (32, 8, 1.0), (168, 8, 0.125)]
)
def test_occupancy(registers, warps, share):
    assert occupancy(registers, warps) == share


def recorded_specialisations():
    """Cases that must and must not share a specialisation; called in a process of its own."""
    same = [Case("gaussian_dual_kl_forward", leading=(4, 8)), Case("gaussian_dual_kl_forward", leading=(2, 16))]
    with_ids = [Case(op, leading=rows, sample_ids=True) for op in OPS for rows in ((4, 8), (2, 16), (32, 1), (3, 7))]
    others = [
        Case("gaussian_dual_kl_forward", layout=layout)
        for layout in ("expanded", "odd rows", "offset", "strided", "int64")
    ]
    print(json.dumps({
        "same": len(specialisations(same, ["sm_90"])),
        "with_ids": len(specialisations(with_ids, ["sm_90"])),
        "others": len(specialisations([same[0], *others], ["sm_90"])) - 1,
        "targets": len(specialisations(same, ["sm_90", "sm_80"])),
        "aligned": [found.aligned for found in specialisations([same[0], *others], ["sm_90"])],
        "elements": specialisations(same, ["sm_90"])[0].elements,
        "driver": type(triton.runtime.driver._active).__name__,
    }))  # fmt: skip


def test_specialisations_are_those_of_the_launcher():
    found = json.loads(run_python("import test_compile_report as here; here.recorded_specialisations()"))
    assert found["with_ids"] == len(OPS)  # the number of rows in a sample is no reason to compile anew
    assert found["same"] == 1 and found["others"] == 4 and found["targets"] == 2
    # "odd rows" and "offset" are the same: rows that begin at multiples of 4 bytes.
    assert found["aligned"] == [True, True, False, False, True]
    assert found["elements"] == 4 * 8 * 512
    assert found["driver"] == "NoneType"  # put back


def layouts_of_sums(view):
    """How the program that sums a tensor's rows spreads them over its threads."""
    z = torch.empty(view.shape, dtype=view.dtype, device="meta")
    kls = torch.empty(2, *view.shape[:-1], device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    _, (one,) = record(lambda: kernels.gaussian_dual_kl_forward(*[view] * 4, seed, None, z, *kls), "sm_90")
    if one.key not in compiled:
        kernel, _ = machine_code.compile_for(one)
        # Layouts are named at the top; reductions end with their type, `(tensor<1x128x4xf32, #blocked1>) -> ...`.
        text = re.sub(r"%\w+| loc\(.*", "", kernel.asm["ttgir"])
        compiled[one.key] = re.findall(r"^#\w+ = #ttg.*$", text, re.M), re.findall(r"^ *}\) : .*$", text, re.M)
    return compiled[one.key]


compiled = {}


def slices_with_other_sums():
    """Which slices of tensors are summed in another layout than the whole; called in a process of its own."""
    found = []
    for dtype, columns in itertools.product((torch.float32, torch.bfloat16), (7, 100, 512, 2056)):
        tensors = {
            "contiguous": torch.empty(6, columns, dtype=dtype, device="meta"),
            "odd rows": torch.empty(6, columns + 1, dtype=dtype, device="meta")[:, :columns],
            "rows side by side": torch.empty(columns, 6, dtype=dtype, device="meta").t(),
            "transposed": torch.empty(3, 6, columns, dtype=dtype, device="meta").transpose(0, 1),
        }
        for name, tensor in tensors.items():
            whole = layouts_of_sums(tensor)
            assert all(whole)
            for rows in (slice(0, 1), slice(1, 2), slice(1, 6), slice(3, 5)):
                if layouts_of_sums(tensor[rows]) != whole:
                    found.append(f"{name} {rows} of {columns} {dtype}")
    print(json.dumps({"other": found, "programs": len(compiled)}))


def test_a_row_is_summed_alike_in_any_batch():
    """What no comparison on a CPU can see: that the order of a GPU's sums does not depend on what else is there."""
    found = json.loads(run_python("import test_compile_report as here; here.slices_with_other_sums()"))
    assert not found["other"]
    # One for each tensor, but some share theirs; and another for a single row of a transposed one.
    assert found["programs"] == 30


def spec(programs, elements):
    """A specialisation as predictions see it."""
    fields = dict.fromkeys(("signature", "constants", "attributes", "options"), {})
    return machine_code.Specialisation(
        "sm_90",
        "module",
        "function",
        **fields,
        programs=programs,
        key="",
        elements=elements,
        case=Case("gaussian_noise"),
    )


def test_predictions_name_what_limits():
    light = MachineCode(registers=32, warps=4, instructions=Counter(integer=30, float=30))
    heavy = MachineCode(registers=32, warps=4, instructions=Counter(integer=300, float=9000, special=40))
    huge = spec(16384, 2**24)
    assert predictions.predict("H100 SXM", "huge", huge, light, 20.0).bound_by == "bandwidth"
    by_instructions = predictions.predict("A100 80GB SXM", "huge", huge, heavy, 20.0)
    assert by_instructions.bound_by == "float instructions"  # half as many lanes as schedulers
    assert predictions.predict("H100 SXM", "huge", huge, heavy, 20.0).bound_by == "all instructions"
    tiny = predictions.predict("H100 SXM", "tiny", spec(16, 2**14), light, 20.0)
    assert tiny.bound_by == "launch, then latency" and tiny.seconds < 10e-6
    assert tiny.bandwidth == pytest.approx(2**14 * 20 / 3350e9)


def test_the_report_says_what_it_predicts(written):
    directory, text = written
    assert "Predicted, not measured" in text and "sm_100" in text and "gfx942" in text
    assert all(gpu in text for gpu in predictions.GPUS)
    data = json.loads((directory / "compile.json").read_text())
    assert len(data["predicted"]) == len(predictions.GPUS) * len(predictions.SHAPES) * 2 * 2
    with (directory / "compile.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(data["kernels"])
    assert sorted(path.name for path in directory.iterdir()) == ["compile.csv", "compile.json"]


def test_the_interpreter_is_refused():
    code = "import amvl_fast.bench.compile_report as r\ntry: r.report()\nexcept r.AMVLError as error: print(error)"
    assert "unset TRITON_INTERPRET" in run_python(code, interpret=True)


def test_missing_triton_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(AMVLError, match="needs Triton, which cannot be imported"):
        compile_report.report()
