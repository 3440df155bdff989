"""How long the launches would take on GPUs that are not here: an estimate from data sheets and machine code."""

from __future__ import annotations

from dataclasses import dataclass

from amvl_fast.bench.compile_cases import Case
from amvl_fast.bench.gpus import GPUS
from amvl_fast.bench.machine_code import MachineCode, occupancy
from amvl_fast.bench.specialisations import Specialisation, specialisations

# (batch, slots) with d = 512: the paper's latents for a batch of 4, and enough of them to fill any GPU.
SHAPES = {"tiny 4 x 8 x 512": (4, 8), "huge 4096 x 8 x 512": (4096, 8)}


SCHEDULERS = 4  # a multiprocessor, each issuing one warp's instruction a clock
LAUNCH = 4e-6  # seconds
MEMORY_LATENCY = 0.7e-6  # seconds for one load from memory
DEPENDENT_CLOCKS = 4  # between an instruction and one that needs its result
PROGRAMS_PER_PROCESSOR = 32

ASSUMPTIONS = """\
Predicted, not measured: no GPU ran any of this. predicted = launch + max(bandwidth, instructions, latency), where
  launch       is 4 us from the launch to the first instruction: our assumption, true to a factor of two. What the
               host spends before that, often more, is left out.
  bandwidth    is the bytes of all tensors, each moved once, over the published peak of the memory. Inputs that an
               earlier kernel left in the second-level cache come faster, as tiny ones mostly will.
  instructions is the busiest of: all warp instructions at one a clock for each of 4 schedulers; float32 ones at 64
               (A100) or 128 lanes a clock and multiprocessor; integer and all other ones at 64; special functions
               and conversions at 16. Counted in the machine code, branches taken both ways, at boost clock.
  latency      is for each wave of programs two dependent loads from memory (0.7 us each: our assumption) and the
               instructions of one warp 4 clocks apart, all programs of a wave side by side.
Peak bandwidth and boost clock: NVIDIA's data sheets of A100 80GB SXM (2039 GB/s), H100 SXM (3.35 TB/s), H200 SXM
(4.8 TB/s) and B200 (8 TB/s), the clock where not given from the float32 peak; multiprocessors: NVIDIA's architecture
whitepapers, B200's as its device properties report them; lanes: throughput table of the CUDA C++ Programming Guide.
A real memory reaches some 90% of its peak, so "of bound" (launch included) can at best come near that."""


@dataclass(frozen=True)
class Prediction:
    """One launch on one GPU; times in seconds.

    Attributes:
        gpu, shape, op, dtypes: which launch; keys of `GPUS` and `SHAPES` and fields of `Case`.
        bytes: moved.
        bandwidth, instructions, latency: each on its own; see `ASSUMPTIONS`.
        pipe: which part of a multiprocessor is busiest.
    """

    gpu: str
    shape: str
    op: str
    dtypes: str
    bytes: float
    bandwidth: float
    instructions: float
    latency: float
    pipe: str

    @property
    def seconds(self) -> float:
        return LAUNCH + max(self.bandwidth, self.instructions, self.latency)

    @property
    def bound_by(self) -> str:
        times = {"bandwidth": self.bandwidth, f"{self.pipe} instructions": self.instructions, "latency": self.latency}
        slowest = max(times, key=lambda name: times[name])
        return slowest if times[slowest] > LAUNCH else f"launch, then {slowest}"


def predicted_launches() -> list[tuple[str, str, Specialisation]]:
    """GPU, shape and specialisation of every launch to predict."""
    launches = []
    for gpu, sheet in GPUS.items():
        for shape, leading in SHAPES.items():
            for dtypes in ("float32", "bfloat16"):
                for op in ("gaussian_dual_kl_forward", "gaussian_dual_kl_backward"):
                    (one,) = specialisations([Case(op, dtypes, 512, leading=leading)], [sheet.target])
                    launches.append((gpu, shape, one))
    return launches


def predict(gpu: str, shape: str, one: Specialisation, code: MachineCode, bytes_per_latent: float) -> Prediction:
    """The estimate that `ASSUMPTIONS` describes; `bytes_per_latent` is what the launch moves, in all."""
    assert one.case is not None
    sheet = GPUS[gpu]
    moved = bytes_per_latent * one.elements
    warps = code.warps * one.programs
    lanes = {"float": sheet.float_lanes, "integer": 64, "special": 16}
    # Warp instructions that a multiprocessor takes a clock, by pipe, and how many there are for all of them.
    rates = {"all": float(SCHEDULERS), **{pipe: width / 32 for pipe, width in lanes.items()}}
    counts = {"all": code.instructions.total(), **{pipe: code.instructions[pipe] for pipe in lanes}}
    counts["float"] += code.packed  # such an instruction occupies the pipe twice as long
    clocks = {pipe: counts[pipe] * warps / sheet.processors / rate for pipe, rate in rates.items()}
    pipe = max(clocks, key=lambda name: clocks[name])
    fit = occupancy(code.registers, code.warps, one.target) * 64 // code.warps
    waves = -(-one.programs // (sheet.processors * min(int(fit), PROGRAMS_PER_PROCESSOR)))
    program = 2 * MEMORY_LATENCY + counts["all"] * DEPENDENT_CLOCKS / sheet.clock
    return Prediction(
        gpu,
        shape,
        one.case.op,
        one.case.dtypes,
        bytes=moved,
        bandwidth=moved / sheet.bandwidth,
        instructions=clocks[pipe] / sheet.clock,
        latency=waves * program,
        pipe=pipe,
    )
