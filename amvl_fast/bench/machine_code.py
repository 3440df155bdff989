"""What a compiled kernel is made of: registers, spills, memory instructions and their widths, counts by pipe."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource

from amvl_fast.bench.specialisations import TARGETS, Specialisation

# What one multiprocessor has, on all NVIDIA targets but for the warps of these.
REGISTERS_PER_SM = 65536
WARPS_PER_SM = {"sm_86": 48, "sm_89": 48, "sm_120": 48}

PACKED = ("FADD2", "FMUL2", "FFMA2")  # two results a lane
FLOAT = ("FADD", "FMUL", "FFMA", *PACKED)
SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "FRND")  # the units for functions and conversions, a sixteenth as wide
MEMORY = ("LD", "ST", "LDG", "STG", "LDS", "STS", "LDL", "STL", "LDC", "LDSM", "STSM", "ATOM", "RED", "ULDC", "LDCU")


@dataclass
class MachineCode:
    """One specialisation, compiled.

    Attributes:
        error: why it did not compile, or None; without machine code the rest stays empty.
        registers: 32-bit registers a thread; on AMD vector registers.
        spills: bytes spilled, stores and loads together; on AMD registers spilled.
        local: instructions on local memory, and on AMD on scratch.
        stack: bytes of local memory (AMD: scratch) a thread.
        shared: bytes of shared memory a program.
        warps: warps a program.
        loads, stores: the number of instructions on global memory by width in bits.
        wide_loads, wide_stores: of the bytes of latent tensors that a pass over a tile moves, the share that goes
            through accesses of 128 bits. NVIDIA only; NaN where the tile moves none.
        instructions: executed instructions a warp over the whole program by class (float, integer, special,
            memory), loops included. NVIDIA only; an upper estimate, since branches count as taken both ways.
        packed: how many of the float ones compute two results.
    """

    error: str | None = None
    registers: int = 0
    spills: int = 0
    local: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    wide_loads: float = float("nan")
    wide_stores: float = float("nan")
    instructions: Counter[str] = field(default_factory=Counter)
    packed: int = 0


def inspect(one: Specialisation) -> MachineCode:
    """Compile for the specialisation's target and take the result apart. Never raises for what cannot compile."""
    try:
        kernel, log = compile_for(one)
    except Exception as error:  # whatever the compiler dies of is a result of this report
        return MachineCode(error=f"{type(error).__name__}: {str(error).strip()}"[:500])
    code = MachineCode(shared=kernel.metadata.shared, warps=kernel.metadata.num_warps)
    if TARGETS[one.target].backend == "hip":
        read_amdgcn(kernel.asm["amdgcn"], code)
        return code
    read_ptxas(log, code)
    read_sass(disassemble(kernel.asm["cubin"]), code, one.trips)
    threads = 32 * code.warps
    tiles = tile_bytes(kernel.asm["ttgir"])
    if not tiles:
        raise RuntimeError(f"{one.function} moves no tile that this report recognises in Triton's intermediate code")
    if tiles["load"]:
        code.wide_loads = min(1.0, code.loads[128] * 16 * threads / tiles["load"])
    if tiles["store"]:
        code.wide_stores = min(1.0, code.stores[128] * 16 * threads / tiles["store"])
    return code


def compile_for(one: Specialisation) -> tuple[Any, str]:
    """Triton's compiled kernel, and what ptxas said about it."""
    function = getattr(importlib.import_module(one.module), one.function)
    source = ASTSource(function, one.signature, one.constants, one.attributes)
    said = io.StringIO()
    # A cached kernel would come without ptxas' word on it.
    with contextlib.redirect_stdout(said), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        kernel = triton.compile(source, target=TARGETS[one.target], options=one.options)
    return kernel, said.getvalue()


def disassemble(cubin: bytes) -> str:
    """SASS, by the disassembler in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_ptxas(log: str, code: MachineCode) -> None:
    """Registers, stack and spills out of `ptxas -v`."""
    used = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or frame is None:
        raise RuntimeError(f"ptxas did not say what the kernel uses: {log!r}")
    code.registers = int(used[1])
    code.stack = int(frame[1])
    code.spills = int(frame[2]) + int(frame[3])


_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)


def read_sass(text: str, code: MachineCode, trips: int) -> None:
    """Memory instructions and counts; `trips` is how often the kernel's loop, if it has one, is walked."""
    lines = [(int(address, 16), opcode, operands) for address, opcode, operands in _SASS.findall(text)]
    loops = []
    for address, opcode, operands in lines:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        # A jump to itself is padding behind the code, not a loop.
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    # Behind the last exit stand the subroutines for cases that never come up, such as division beyond 32 bits.
    end = max((address for address, opcode, _ in lines if opcode == "EXIT"), default=0)
    for address, opcode, _ in lines:
        name, *suffixes = opcode.split(".")
        if name in ("LDL", "STL"):
            code.local += 1
        if address > end or name == "NOP":
            continue
        weight = trips if any(first <= address <= last for first, last in loops) else 1
        code.instructions[pipe(name)] += weight
        if name in PACKED:
            code.packed += weight
        if name in ("LDG", "STG"):
            bits = next((int(s) for s in suffixes if s in ("64", "128", "256")), 32)
            bits = next((int(s[1:]) for s in suffixes if s in ("U8", "S8", "U16", "S16")), bits)
            (code.loads if name == "LDG" else code.stores)[bits] += 1


def pipe(name: str) -> str:
    """The class of an opcode; whatever is not float, special or memory shares the integer pipe."""
    if name in FLOAT:
        return "float"
    if name in SPECIAL:
        return "special"
    return "memory" if name in MEMORY else "integer"


_TILE = re.compile(r"tt\.(load|store) .* : tensor<((?:\d+x){2,})!tt\.ptr<[a-z]+(\d+)>")


def tile_bytes(ttgir: str) -> Counter[str]:
    """Bytes that the tensors of rank 2 and more move in one pass, for "load" and "store"; rows and seeds left out."""
    total: Counter[str] = Counter()
    for kind, shape, bits in _TILE.findall(ttgir):
        count = 1
        for size in shape.rstrip("x").split("x"):
            count *= int(size)
        total[kind] += count * int(bits) // 8
    return total


_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(?:(dword|short|ushort|ubyte|byte)(x\d)?)", re.M)


def read_amdgcn(text: str, code: MachineCode) -> None:
    """The same out of AMD's assembly and the metadata at its end."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"AMD's assembly has no .{name}")
        return int(found[1])

    code.registers = number("vgpr_count")
    code.spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    code.stack = number("private_segment_fixed_size")
    code.local = len(re.findall(r"^\s+scratch_", text, re.M))
    for kind, unit, times in _AMD_ACCESS.findall(text):
        bits = {"dword": 32, "short": 16, "ushort": 16}.get(unit, 8) * int(times[1:] or 1)
        (code.loads if kind == "load" else code.stores)[bits] += 1


def occupancy(registers: int, warps: int, target: str = "sm_90") -> float:
    """The share of a multiprocessor's warps that the registers of an NVIDIA kernel leave room for, 0 to 1."""
    # A warp's registers are allocated in units of 256, and a program's warps all at once.
    per_warp = -(-registers * 32 // 256) * 256
    most = WARPS_PER_SM.get(target, 64)
    return min(most, REGISTERS_PER_SM // per_warp // warps * warps) / most
